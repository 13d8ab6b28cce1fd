//! Runs as a page that needs nothing else: attainment, queues, decodes and roles over time.

use tandem_simulator::report::Sample;

use super::runs::Done;
use crate::plot::{Axes, BLUE, GREEN, ORANGE, escape, figure, page, round_up};

const ROLES: [(&str, &str); 3] = [("prefill", "#7aa6d8"), ("decode", "#8fcf9f"), ("either", "#d9b8e0")];

pub fn html(runs: &[Done]) -> String {
    let rows = runs.iter().map(|done| {
        let (first, token) = (done.outcome.first_ms(), done.outcome.per_token_ms());
        format!(
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{:.2}</td><td>{:.2} %</td><td>{:.1}</td><td>{:.0}</td>\
             <td>{:.0}</td><td>{:.1}</td><td>{:.1}</td><td>{}</td></tr>",
            escape(&done.name),
            escape(&done.run.split),
            done.run.order,
            done.run.scale,
            done.outcome.attainment() * 100.0,
            done.outcome.goodput(),
            first.p50,
            first.p99,
            token.p50,
            token.p99,
            done.outcome.flips
        )
    });
    let head = "<tr><th>run</th><th>split at the start</th><th>order</th><th>scale</th><th>attained</th>\
                <th>goodput per s</th><th>TTFT p50 ms</th><th>p99</th><th>TPOT p50 ms</th><th>p99</th>\
                <th>role changes</th></tr>";
    let figures: String = runs.iter().map(figures).collect();
    page(
        "tandem sim",
        "Attained is the share of online requests that met both targets; those that did not end count as missed. TTFT \
         is the time to the first token, TPOT the time per further token.",
        &format!("<table>{head}{}</table>{figures}", rows.collect::<String>()),
    )
}

fn figures(done: &Done) -> String {
    // After the last arrival a run only drains; the load is what the page is about.
    let end = done.outcome.span.as_secs_f64().max(1.0);
    let samples: Vec<&Sample> =
        done.outcome.samples.iter().filter(|sample| sample.at.as_secs_f64() <= end).collect();
    let over = |of: fn(&Sample) -> f64| -> Vec<(f64, f64)> {
        samples.iter().map(|sample| (sample.at.as_secs_f64(), of(sample))).collect()
    };
    let one = |title: &str, of: fn(&Sample) -> f64, unit: &'static str, most: Option<f64>, colour: &str| {
        let values = over(of);
        let seen =
            values.iter().map(|(_, value)| *value).filter(|value| value.is_finite()).fold(0.0, f64::max);
        let axes = Axes { end, end_unit: " s", most: most.unwrap_or_else(|| round_up(seen)), unit };
        figure(title, &[], &axes, &axes.line(&values, colour))
    };
    let attained = one(
        "Attained, of the requests that ended in each 5 s",
        |s| s.attainment * 100.0,
        " %",
        Some(100.0),
        BLUE,
    );
    let queued =
        one("Prompts queued that can be in time, seconds of work", |s| s.queue_seconds, " s", None, ORANGE);
    let decodes = one("Sequences that decode", |s| f64::from(s.decodes), "", None, GREEN);
    let all = samples.iter().map(|s| s.roles.iter().sum::<u32>()).max().unwrap_or(1).max(1);
    let axes = Axes { end, end_unit: " s", most: f64::from(all), unit: "" };
    let roles = figure("Workers by the work they prefer", &ROLES, &axes, &stacked(&axes, &samples));
    format!("<h2>{}</h2>{attained}{queued}{decodes}{roles}", escape(&done.name))
}

/// Roles on top of each other, one rectangle for as long as nothing changes.
fn stacked(axes: &Axes, samples: &[&Sample]) -> String {
    let mut text = String::new();
    let mut from = 0;
    while let Some(sample) = samples.get(from) {
        let next = (from..samples.len()).find(|&at| samples[at].roles != sample.roles);
        let begin = axes.x(sample.at.as_secs_f64());
        let end = next.map_or(axes.x(axes.end), |at| axes.x(samples[at].at.as_secs_f64()));
        let mut below = 0.0;
        for (count, (_, colour)) in sample.roles.iter().zip(ROLES).filter(|(count, _)| **count > 0) {
            let above = below + f64::from(*count);
            text += &format!(
                "<rect x=\"{begin:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>",
                axes.y(above),
                (end - begin).max(0.5),
                axes.y(below) - axes.y(above)
            );
            below = above;
        }
        from = next.unwrap_or(samples.len());
    }
    text
}
