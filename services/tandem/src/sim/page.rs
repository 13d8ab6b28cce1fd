//! Runs as a page that needs nothing else: attainment, queues and roles over time.

use super::runs::Done;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem;\
color:#1c2430}h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;width:100%}\
td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #d8dee6}td:first-child,th:first-child\
{text-align:left}svg{width:100%;height:auto;display:block}figcaption{color:#5a6675;font-size:.85rem}";

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 160.0;

pub fn html(runs: &[Done]) -> String {
    let rows = runs.iter().map(|done| {
        let (first, token) = (done.outcome.first_ms(), done.outcome.per_token_ms());
        format!(
            "<tr><td>{}</td><td>{}</td><td>{:.2}</td><td>{:.2} %</td><td>{:.1}</td><td>{:.0}</td><td>{:.0}</td>\
             <td>{:.1}</td><td>{}</td></tr>",
            escape(&done.name),
            escape(&done.run.split),
            done.run.scale,
            done.outcome.attainment() * 100.0,
            done.outcome.goodput(),
            first.p50,
            first.p99,
            token.p50,
            done.outcome.flips
        )
    });
    let head = "<tr><th>run</th><th>split</th><th>scale</th><th>attained</th><th>goodput/s</th><th>TTFT p50 ms</th>\
                <th>p99</th><th>TPOT p50 ms</th><th>flips</th></tr>";
    let figures: String = runs.iter().map(figures).collect();
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>tandem sim</title><style>{STYLE}</style>\
         <h1>tandem sim</h1><table>{head}{}</table>{figures}</html>\n",
        rows.collect::<String>()
    )
}

fn figures(done: &Done) -> String {
    let samples = &done.outcome.samples;
    let end = samples.last().map_or(1.0, |sample| sample.at.as_secs_f64().max(1.0));
    let x = |at: f64| at / end * WIDTH;
    let line = |values: Vec<(f64, f64)>, most: f64, colour: &str| {
        let points: Vec<String> = values
            .iter()
            .filter(|(_, value)| value.is_finite())
            .map(|(at, value)| format!("{:.1},{:.1}", x(*at), HEIGHT - value / most * HEIGHT))
            .collect();
        format!(
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" points=\"{}\"/>",
            points.join(" ")
        )
    };
    let over = |of: fn(&tandem_simulator::report::Sample) -> f64| -> Vec<(f64, f64)> {
        samples.iter().map(|sample| (sample.at.as_secs_f64(), of(sample))).collect()
    };
    let most = |values: &[(f64, f64)]| values.iter().map(|(_, v)| *v).fold(1e-9, f64::max);
    let figure = |title: &str, body: String| {
        format!(
            "<figure><svg viewBox=\"0 -4 {WIDTH} {}\" role=\"img\" aria-label=\"{title}\"><rect width=\"{WIDTH}\" \
             height=\"{HEIGHT}\" fill=\"#f5f7fa\"/>{body}</svg><figcaption>{title}</figcaption></figure>",
            HEIGHT + 8.0
        )
    };
    let (queues, rows) = (over(|s| s.queue_seconds), over(|s| f64::from(s.decodes)));
    let (queue_most, rows_most) = (most(&queues), most(&rows));
    let attained = figure(
        &format!("attainment of requests that ended, 0 to 100 %, over {end:.0} s"),
        line(over(|s| s.attainment), 1.0, "#1f77b4"),
    );
    let queued = figure(
        &format!(
            "queued prompts, up to {queue_most:.1} s of work (orange); decodes, up to {rows_most:.0} (green)"
        ),
        line(queues, queue_most, "#e67e22") + &line(rows, rows_most, "#2a9d4a"),
    );
    let all = samples.iter().map(|s| s.roles.iter().sum::<u32>()).max().unwrap_or(1).max(1);
    let mut bars = String::new();
    for (at, sample) in samples.iter().enumerate() {
        let from = x(sample.at.as_secs_f64());
        let to = samples.get(at + 1).map_or(WIDTH, |next| x(next.at.as_secs_f64()));
        let mut top = HEIGHT;
        for (count, colour) in sample.roles.iter().zip(["#7aa6d8", "#8fcf9f", "#d9b8e0"]) {
            let height = f64::from(*count) / f64::from(all) * HEIGHT;
            top -= height;
            if *count > 0 {
                bars += &format!(
                    "<rect x=\"{from:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>",
                    (to - from + 0.3).max(0.0)
                );
            }
        }
    }
    let roles = figure("workers that prefer prefill (blue), decode (green), either (violet)", bars);
    format!("<h2>{}</h2>{attained}{queued}{roles}", escape(&done.name))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}
