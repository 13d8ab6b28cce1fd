//! Drawings of numbers, for pages that need nothing else.

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

pub const BLUE: &str = "#2f6fb0";
pub const ORANGE: &str = "#d9731a";
pub const GREEN: &str = "#2a8a4a";

/// A page: its name, a paragraph that explains it, and the rest.
pub fn page(title: &str, about: &str, body: &str) -> String {
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>{title}</title><style>{STYLE}</style><h1>{title}</h1><p>{about}</p>\
         {body}</html>\n"
    )
}

/// A drawing under its caption, with a key of colours where there are several.
pub fn figure(title: &str, keys: &[(&str, &str)], axes: &Axes, body: &str) -> String {
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
}

/// Seconds or something else to the right, values up.
pub struct Axes {
    /// What the right edge stands for.
    pub end: f64,
    /// Behind every number below.
    pub end_unit: &'static str,
    /// What the upper edge stands for.
    pub most: f64,
    /// Behind every number at the left.
    pub unit: &'static str,
}

impl Axes {
    /// Where a value lies from the left.
    pub fn x(&self, at: f64) -> f64 {
        LEFT + at / self.end * (WIDTH - LEFT - RIGHT)
    }

    /// Where a value lies from above.
    pub fn y(&self, value: f64) -> f64 {
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
                 <text x=\"{0:.1}\" y=\"{2}\" text-anchor=\"{anchor}\">{3}{4}</text>",
                self.x(at),
                bottom + 4.0,
                bottom + 17.0,
                short(at),
                self.end_unit
            );
            at += step;
        }
        text
    }

    /// A line, broken where there is no value.
    pub fn line(&self, values: &[(f64, f64)], colour: &str) -> String {
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
}

/// The next number from above whose quarters read well.
pub fn round_up(value: f64) -> f64 {
    let power = 10f64.powf(value.max(1e-3).log10().floor());
    let steps = [1.0, 2.0, 4.0, 6.0, 8.0, 10.0];
    steps.iter().map(|step| step * power).find(|most| *most >= value).unwrap_or(10.0 * power)
}

/// Values between ticks, so that there are about eight: whole minutes and hours where they are many seconds.
fn tick(end: f64) -> f64 {
    let small = (-3..0).flat_map(|power| [1.0, 2.0, 5.0].map(|step| step * 10f64.powi(power)));
    let steps = [1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 10_800.0];
    small.chain(steps).find(|step| end / step <= 9.0).unwrap_or(end / 8.0)
}

/// Without zeros that say nothing.
pub fn short(value: f64) -> String {
    let text = if value.abs() < 10.0 { format!("{value:.3}") } else { format!("{value:.0}") };
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers_and_have_a_few_ticks() {
        assert_eq!([0.3, 1.0, 3.7, 3970.0].map(round_up), [0.4, 1.0, 4.0, 4000.0]);
        for end in [0.03, 0.7, 5.0, 400.0, 1200.0, 86_400.0] {
            assert!((4.0..=9.0).contains(&(end / tick(end))), "{end}");
        }
        assert_eq!([0.0, 0.25, 2.5, 100.0].map(short), ["0", "0.25", "2.5", "100"]);
    }
}
