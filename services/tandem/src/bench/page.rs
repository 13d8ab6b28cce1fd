//! A run as a page that needs nothing else: its figures, how times are distributed, and how it went over time.

use tandem_simulator::report::Spread;
use tandem_types::Time;

use super::answer::End;
use super::report::Run;
use crate::plot::{Axes, BLUE, GREEN, ORANGE, escape, figure, page, round_up};

/// Stretches of time that a run is cut into.
const STRETCHES: usize = 60;
/// Points of a distribution's line.
const POINTS: usize = 200;

pub fn html(run: &Run) -> String {
    let about = "TTFT is the time from sending a request to its first text, TPOT the time per further token of an \
                 answer, and a request counts for goodput when it ended with a finish reason and met both targets, where \
                 there are any. Times are those of complete answers.";
    let notes: String = run.warnings().iter().map(|note| format!("<p>Note: {}</p>", escape(note))).collect();
    let body = format!(
        "<h2>{}</h2>{}{notes}{}{}",
        escape(&run.name),
        tables(run),
        over_time(run),
        distributions(run)
    );
    page("tandem bench", about, &body)
}

fn tables(run: &Run) -> String {
    let (errors, cut) = run.failures();
    let row = |name: &str, value: String| format!("<tr><td>{name}</td><td>{value}</td></tr>");
    let mut facts = vec![
        row("requests", run.requests().to_string()),
        row("seconds", format!("{:.2}", run.seconds())),
        row("offered per second", format!("{:.2}", run.offered())),
        row("goodput per second", format!("{:.2}", run.goodput())),
        row("attained", format!("{:.2} %", run.attainment() * 100.0)),
        row("output tokens per second", format!("{:.1}", run.output_tokens() as f64 / run.seconds())),
        row("errors", errors.values().sum::<usize>().to_string()),
        row("cut streams", cut.values().sum::<usize>().to_string()),
    ];
    facts.extend(run.slo.map(|slo| row("targets", slo.to_string())));
    facts.extend(run.router_seconds.map(|seconds| {
        row(
            "CPU of the router, µs per request",
            format!("{:.1}", seconds * 1e6 / run.requests().max(1) as f64),
        )
    }));
    for (kind, count) in errors.iter().chain(&cut) {
        facts.push(row(&escape(kind), count.to_string()));
    }
    let times = [
        ("TTFT", run.first_ms()),
        ("TPOT", run.per_token_ms()),
        ("between tokens", run.gaps_ms()),
        ("end to end", run.whole_ms()),
        ("to an error", run.error_ms()),
        ("sent late", run.late_ms()),
    ];
    let times = times.into_iter().filter(|(_, values)| !values.is_empty()).map(|(name, values)| {
        let Spread { p50, p90, p99, mean } = Spread::of(values);
        format!(
            "<tr><td>{name}</td><td>{p50:.2}</td><td>{p90:.2}</td><td>{p99:.2}</td><td>{mean:.2}</td></tr>"
        )
    });
    format!(
        "<table>{}</table><table><tr><th>milliseconds</th><th>p50</th><th>p90</th><th>p99</th><th>mean</th></tr>{}\
         </table>",
        facts.concat(),
        times.collect::<String>()
    )
}

fn over_time(run: &Run) -> String {
    let (began, end) = (run.driven.began, run.seconds());
    let width = end / STRETCHES as f64;
    let seconds = |at: Time| at.since(began).as_secs_f64();
    let middle = |stretch: usize| (stretch as f64 + 0.5) * width;
    let mut firsts = vec![Vec::new(); STRETCHES];
    let (mut ended, mut running) = ([0u32; STRETCHES], [0u32; STRETCHES]);
    let mut failed = [0u32; STRETCHES];
    let stretch = |at: Time| ((seconds(at) / width) as usize).min(STRETCHES - 1);
    for answer in &run.driven.answers {
        let counted = if answer.end == End::Whole { &mut ended } else { &mut failed };
        counted[stretch(answer.over)] += 1;
        if let Some(first) = answer.first.filter(|_| answer.end == End::Whole) {
            firsts[stretch(answer.sent)].push(first.since(answer.sent).as_secs_f64() * 1e3);
        }
        for (at, running) in running.iter_mut().enumerate() {
            let now = middle(at);
            *running += u32::from(seconds(answer.sent) <= now && now < seconds(answer.over));
        }
    }
    let points = |values: &[f64]| -> Vec<(f64, f64)> {
        values.iter().enumerate().map(|(at, &value)| (middle(at), value)).collect()
    };
    let lines = |title: &str, unit: &'static str, lines: &[(&str, &str, Vec<f64>)]| {
        let all =
            lines.iter().flat_map(|(_, _, values)| values.iter().copied()).filter(|value| value.is_finite());
        let axes = Axes { end, end_unit: " s", most: round_up(all.fold(0.0, f64::max)), unit };
        let keys: Vec<(&str, &str)> = lines.iter().map(|(name, colour, _)| (*name, *colour)).collect();
        let drawn: String =
            lines.iter().map(|(_, colour, values)| axes.line(&points(values), colour)).collect();
        figure(title, &keys, &axes, &drawn)
    };
    let per_second =
        |counts: &[u32]| counts.iter().map(|&count| f64::from(count) / width).collect::<Vec<f64>>();
    let part = |of: fn(&Spread) -> f64| -> Vec<f64> {
        let of =
            |values: &Vec<f64>| if values.is_empty() { f64::NAN } else { of(&Spread::of(values.clone())) };
        firsts.iter().map(of).collect()
    };
    let ends = [("complete", GREEN, per_second(&ended)), ("failed or cut", ORANGE, per_second(&failed))];
    let first =
        [("median", BLUE, part(|spread| spread.p50)), ("99th percentile", ORANGE, part(|spread| spread.p99))];
    let running = [("", BLUE, running.iter().map(|&count| f64::from(count)).collect())];
    let mut text = lines("Requests that ended, per second", "", &ends);
    if run.streams {
        text += &lines("TTFT of the requests sent at each time", " ms", &first);
    }
    text + &lines("Requests running", "", &running)
}

fn distributions(run: &Run) -> String {
    let times = [
        ("TTFT", run.first_ms(), BLUE),
        ("TPOT", run.per_token_ms(), GREEN),
        ("Time between tokens", run.gaps_ms(), GREEN),
        ("Time to the end", run.whole_ms(), ORANGE),
    ];
    let drawn =
        times.into_iter().filter(|(_, values, _)| !values.is_empty()).map(|(name, mut values, colour)| {
            values.sort_by(f64::total_cmp);
            let at = |share: f64| values[((values.len() - 1) as f64 * share) as usize];
            // The last hundredth would press everything else to the left.
            let end = (at(0.99) * 1.1).max(1e-3);
            let shares = (0..=POINTS).map(|point| point as f64 / POINTS as f64);
            let line: Vec<(f64, f64)> =
                shares.map(|share| (at(share), share * 100.0)).filter(|(time, _)| *time <= end).collect();
            let axes = Axes { end, end_unit: " ms", most: 100.0, unit: " %" };
            figure(&format!("{name}: share that took no longer"), &[], &axes, &axes.line(&line, colour))
        });
    drawn.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_stands_alone_and_holds_the_figures() {
        let html = html(&super::super::report::tests::run());
        for part in [
            "<td>requests</td><td>6</td>",
            "<td>attained</td><td>33.33 %</td>",
            "<td>goodput per second</td><td>1.00</td>",
            "<td>503 overloaded</td><td>1</td>",
            "<td>TTFT</td><td>100.00</td>",
            "<td>CPU of the router, µs per request</td><td>500.0</td>",
            "a run &lt;b>",
        ] {
            assert!(html.contains(part), "{part}");
        }
        assert_eq!(html.matches("<svg").count(), 7);
        assert!(["<script", "http://", "https://", "<link", "url("].iter().all(|part| !html.contains(part)));
        assert!(!html.contains("NaN") && !html.contains("inf"));
    }
}
