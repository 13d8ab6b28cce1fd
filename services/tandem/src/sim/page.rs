//! Runs as a page that needs nothing else: attainment, queues, decodes and roles over time.

use tandem_simulator::report::Sample;

use super::runs::Done;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem;\
color:#1c2430}h1{font-size:1.4rem}h2{font-size:1.15rem;margin:2.5rem 0 0}table{border-collapse:collapse;width:100%}\
td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #d8dee6}td:first-child,th:first-child\
{text-align:left}svg{width:100%;height:auto;display:block}svg text{font-size:11px;fill:#5a6675}\
figure{margin:1.2rem 0 0}figcaption{font-size:.9rem}p{color:#5a6675}.key{display:inline-block;width:.8em;height:.8em;\
margin:0 .3em 0 .8em;border-radius:2px}";

/// A drawing: room for labels at the left and below, and the field between.
const WIDTH: f64 = 900.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 8.0;
const TOP: f64 = 8.0;
const HEIGHT: f64 = 140.0;
const BELOW: f64 = 22.0;

const BLUE: &str = "#2f6fb0";
const ORANGE: &str = "#d9731a";
const GREEN: &str = "#2a8a4a";
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
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>tandem sim</title><style>{STYLE}</style><h1>tandem sim</h1><p>Attained \
         is the share of online requests that met both targets; those that did not end count as missed. TTFT is the \
         time to the first token, TPOT the time per further token.</p><table>{head}{}</table>{figures}</html>\n",
        rows.collect::<String>()
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
    let figure = |title: &str, keys: &[(&str, &str)], axes: &Axes, body: String| {
        let keys = keys
            .iter()
            .map(|(name, colour)| format!("<span class=\"key\" style=\"background:{colour}\"></span>{name}"));
        format!(
            "<figure><figcaption>{title}{}</figcaption><svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" \
             aria-label=\"{title}\">{}{body}</svg></figure>",
            keys.collect::<String>(),
            TOP + HEIGHT + BELOW,
            axes.grid()
        )
    };
    let one = |title: &str, of: fn(&Sample) -> f64, unit: &'static str, most: Option<f64>, colour: &str| {
        let values = over(of);
        let seen =
            values.iter().map(|(_, value)| *value).filter(|value| value.is_finite()).fold(0.0, f64::max);
        let axes = Axes { end, most: most.unwrap_or_else(|| round_up(seen)), unit };
        figure(title, &[], &axes, axes.line(&values, colour))
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
    let axes = Axes { end, most: f64::from(all), unit: "" };
    let roles = figure("Workers by the work they prefer", &ROLES, &axes, axes.roles(&samples));
    format!("<h2>{}</h2>{attained}{queued}{decodes}{roles}", escape(&done.name))
}

/// Seconds to the right, values up.
struct Axes {
    end: f64,
    most: f64,
    unit: &'static str,
}

impl Axes {
    fn x(&self, at: f64) -> f64 {
        LEFT + at / self.end * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        TOP + HEIGHT - value / self.most * HEIGHT
    }

    /// The field, a line and a label at each quarter of the values, and ticks of the time.
    fn grid(&self) -> String {
        let (right, bottom) = (WIDTH - RIGHT, TOP + HEIGHT);
        let mut text = format!(
            "<rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{HEIGHT}\" fill=\"#f5f7fa\"/>",
            right - LEFT
        );
        for quarter in 0..=4 {
            let value = self.most * f64::from(quarter) / 4.0;
            let y = self.y(value);
            text += &format!(
                "<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#dfe5ec\"/>\
                 <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}{}</text>",
                LEFT - 6.0,
                y + 4.0,
                short(value),
                self.unit
            );
        }
        let step = tick(self.end);
        let mut at = 0.0;
        while at <= self.end {
            // A label at the very edge would be cut off.
            let anchor = if self.x(at) > right - 20.0 { "end" } else { "middle" };
            text += &format!(
                "<line x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"{bottom}\" y2=\"{1}\" stroke=\"#9aa5b1\"/>\
                 <text x=\"{0:.1}\" y=\"{2}\" text-anchor=\"{anchor}\">{3} s</text>",
                self.x(at),
                bottom + 4.0,
                bottom + 17.0,
                short(at)
            );
            at += step;
        }
        text
    }

    /// A line, broken where there is no value.
    fn line(&self, values: &[(f64, f64)], colour: &str) -> String {
        let stretches = values.split(|(_, value)| !value.is_finite()).filter(|stretch| !stretch.is_empty());
        let lines = stretches.map(|stretch| {
            let points: Vec<String> = stretch
                .iter()
                .map(|(at, value)| format!("{:.1},{:.1}", self.x(*at), self.y(*value)))
                .collect();
            // One point alone would not be seen as a line.
            let points = if points.len() == 1 { [points.clone(), points].concat() } else { points };
            format!(
                "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\" stroke-linecap=\"round\" \
                 points=\"{}\"/>",
                points.join(" ")
            )
        });
        lines.collect()
    }

    /// Roles on top of each other, one rectangle for as long as nothing changes.
    fn roles(&self, samples: &[&Sample]) -> String {
        let mut text = String::new();
        let mut from = 0;
        while let Some(sample) = samples.get(from) {
            let next = (from..samples.len()).find(|&at| samples[at].roles != sample.roles);
            let begin = self.x(sample.at.as_secs_f64());
            let end = next.map_or(self.x(self.end), |at| self.x(samples[at].at.as_secs_f64()));
            let mut below = 0.0;
            for (count, (_, colour)) in sample.roles.iter().zip(ROLES).filter(|(count, _)| **count > 0) {
                let above = below + f64::from(*count);
                text += &format!(
                    "<rect x=\"{begin:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>",
                    self.y(above),
                    (end - begin).max(0.5),
                    self.y(below) - self.y(above)
                );
                below = above;
            }
            from = next.unwrap_or(samples.len());
        }
        text
    }
}

/// The next number from above whose quarters read well.
fn round_up(value: f64) -> f64 {
    let power = 10f64.powf(value.max(1e-3).log10().floor());
    let steps = [1.0, 2.0, 4.0, 6.0, 8.0, 10.0];
    steps.iter().map(|step| step * power).find(|most| *most >= value).unwrap_or(10.0 * power)
}

/// Seconds between ticks, so that there are about eight.
fn tick(end: f64) -> f64 {
    let steps = [1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 10_800.0];
    steps.into_iter().find(|step| end / step <= 9.0).unwrap_or(end / 8.0)
}

/// Without zeros that say nothing.
fn short(value: f64) -> String {
    let text = if value.abs() < 10.0 { format!("{value:.3}") } else { format!("{value:.0}") };
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers_and_have_a_few_ticks() {
        assert_eq!([0.3, 1.0, 3.7, 3970.0].map(round_up), [0.4, 1.0, 4.0, 4000.0]);
        for end in [5.0, 400.0, 1200.0, 86_400.0] {
            assert!((4.0..=9.0).contains(&(end / tick(end))), "{end}");
        }
        assert_eq!([0.0, 0.25, 2.5, 100.0].map(short), ["0", "0.25", "2.5", "100"]);
    }
}
