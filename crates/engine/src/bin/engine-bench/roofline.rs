//! The cases against the roofline (Williams, Waterman and Patterson, 2009) as a picture: operations a second over
//! operations per byte, both logarithmic, under what memory and products allow.

use std::fmt::Write;

use crate::machine::Limits;

/// A measured case.
pub(crate) struct Point {
    pub(crate) name: String,
    /// Operations per byte that has to be read.
    pub(crate) intensity: f64,
    /// Operations a second.
    pub(crate) rate: f64,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 440.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 30.0;

const COLOURS: [&str; 13] = [
    "#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5", "#e03e3e", "#64473a", "#9b9a97", "#dfab01",
    "#2f6f3e", "#000000", "#4aa3df", "#f28cb1",
];

/// Where a value is on a logarithmic axis from `low` on, `decades` long over `length`.
fn place(value: f64, low: f64, decades: f64, length: f64) -> f64 {
    (value / low).log10() / decades * length
}

/// An SVG that needs nothing else.
pub(crate) fn svg(title: &str, points: &[Point], limits: &Limits) -> String {
    // From 1 to 10,000 operations per byte, and three decades of rates that end above every roof.
    let (low_x, decades, up_decades) = (1.0, 4.0, 3.0);
    let high_y = 10_f64.powf((limits.products.max(limits.whole)).log10().ceil());
    let low_y = high_y / 1e3;
    let x = |value: f64| LEFT + place(value.max(low_x), low_x, decades, WIDTH);
    let y = |value: f64| TOP + HEIGHT - place(value.max(low_y), low_y, up_decades, HEIGHT);
    let mut out = String::new();
    let mut line = |text: String| {
        let _ = writeln!(out, "{text}");
    };
    line(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" font-family=\"sans-serif\" font-size=\"12\">",
        LEFT + WIDTH + 210.0,
        TOP + HEIGHT + 50.0
    ));
    line("<rect width=\"100%\" height=\"100%\" fill=\"white\"/>".to_owned());
    line(format!("<text x=\"{LEFT}\" y=\"18\">{title}</text>"));
    let (bottom, right) = (TOP + HEIGHT, LEFT + WIDTH);
    for across in (0..=4).map(|decade| low_x * 10_f64.powi(decade)) {
        let at = x(across);
        line(format!("<path d=\"M{at:.1} {TOP}V{bottom}\" stroke=\"#ddd\"/>"));
        line(format!("<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{across}</text>", bottom + 16.0));
    }
    for up in (0..=3).map(|decade| low_y * 10_f64.powi(decade)) {
        let at = y(up);
        line(format!("<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"#ddd\"/>"));
        line(format!(
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 6.0,
            at + 4.0,
            up / 1e9
        ));
    }
    line(format!(
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">operations per byte</text>",
        LEFT + WIDTH / 2.0,
        TOP + HEIGHT + 36.0
    ));
    line(format!("<text x=\"8\" y=\"{}\">Gop/s</text>", TOP - 12.0));
    for (name, roof) in [("bf16", limits.products), ("8-bit integers", limits.whole)] {
        let (ridge, end) = (roof / limits.bytes, low_x * 10_f64.powf(decades));
        line(format!(
            "<path d=\"M{:.1} {:.1}L{:.1} {:.1}H{:.1}\" fill=\"none\" stroke=\"#555\" stroke-width=\"1.5\"/>",
            x(low_x),
            y(limits.bytes * low_x),
            x(ridge),
            y(roof),
            x(end)
        ));
        line(format!(
            "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"#555\">{name}</text>",
            x(end) + 6.0,
            y(roof) + 4.0
        ));
    }
    for (at, point) in points.iter().enumerate() {
        let colour = COLOURS[at % COLOURS.len()];
        let (across, up) = (x(point.intensity), y(point.rate));
        line(format!("<circle cx=\"{across:.1}\" cy=\"{up:.1}\" r=\"4\" fill=\"{colour}\"/>"));
        let label = TOP + HEIGHT - 18.0 * (points.len() - at) as f64;
        line(format!(
            "<circle cx=\"{}\" cy=\"{}\" r=\"4\" fill=\"{colour}\"/><text x=\"{}\" y=\"{label}\">{}</text>",
            LEFT + WIDTH + 14.0,
            label - 4.0,
            LEFT + WIDTH + 24.0,
            point.name
        ));
    }
    line("</svg>".to_owned());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_at_its_limit_lies_on_the_roof() {
        let limits = Limits { bytes: 5e10, products: 1e12, whole: 2e12 };
        let roofed = |intensity: f64| Point {
            name: String::new(),
            intensity,
            rate: (intensity * limits.bytes).min(limits.products),
        };
        let picture = svg("two", &[roofed(2.0), roofed(1000.0)], &limits);
        assert!(picture.contains("M70.0 367.5L317.2 176.7H830.0"), "{picture}");
        let circles: Vec<&str> = picture.lines().filter(|line| line.starts_with("<circle")).collect();
        assert_eq!(circles.len(), 4);
        assert!(circles[0].contains("cx=\"127.2\" cy=\"323.3\""), "{}", circles[0]);
        assert!(circles[2].contains("cx=\"640.0\" cy=\"176.7\""), "{}", circles[2]);
    }
}
