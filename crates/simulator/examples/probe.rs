use std::path::Path;
use std::time::Duration;
use tandem_batching::pace::Order;
use tandem_simulator::*;

fn main() {
    let a: Vec<String> = std::env::args().skip(1).collect();
    let get =
        |k: &str, d: &str| a.iter().find_map(|x| x.strip_prefix(&format!("{k}="))).unwrap_or(d).to_string();
    let row = get("row", "code");
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("traces");
    let seed: u64 = get("seed", "1").parse().unwrap();
    let make: Box<dyn Fn(f64) -> Workload> = match row.as_str() {
        "code" | "conv" => {
            let t = Trace::read(&dir.join(format!("azure2023_{row}.csv.gz")))
                .unwrap()
                .window(get("offset", "0").parse().unwrap(), Some(if row == "code" { 900.0 } else { 400.0 }));
            Box::new(move |s| t.superposed(s, seed))
        }
        "codesq" | "convsq" => {
            let t = Trace::read(&dir.join(format!("azure2023_{}.csv.gz", &row[..4]))).unwrap();
            Box::new(move |s| t.squeezed(s))
        }
        "shift" => {
            let t = Trace::read(&dir.join("azure2023_code.csv.gz")).unwrap().window(0.0, Some(300.0));
            Box::new(move |s| workload::shift(&t, s, seed))
        }
        f => {
            let t = Trace::read(Path::new(f)).unwrap();
            let (o, n): (f64, f64) =
                (get("offset", "0").parse().unwrap(), get("seconds", "300").parse().unwrap());
            if t.timed {
                let t = t.window(o, Some(n));
                Box::new(move |s| t.superposed(s, seed))
            } else {
                let cv = get("cv", "0").parse::<f64>().unwrap();
                Box::new(move |s| t.drawn(s, n, (cv > 0.0).then_some(cv), seed))
            }
        }
    };
    let ms = |k: &str, d: &str| Duration::from_secs_f64(get(k, d).parse::<f64>().unwrap() / 1e3);
    let mut o = Options {
        policy: get("policy", "cost"),
        order: if get("order", "deadline") == "arrival" { Order::Arrival } else { Order::Deadline },
        planner: get("planner", "on") == "on",
        first_token: ms("ttft", "1000"),
        per_token: ms("tpot", "50"),
        shared_links: get("shared", "off") == "on",
        noise: get("noise", "0").parse().unwrap(),
        bias: get("bias", "0").parse().unwrap(),
        stale: ms("stale", "0"),
        split: get("split", "4P4D").parse().unwrap(),
        seed,
        ..Options::default()
    };
    let target: f64 = get("target", "0.9").parse().unwrap();
    let golden = get("golden", "");
    if !golden.is_empty() {
        o.policy = "least-loaded".into();
        o.planner = false;
        o.shared_links = false;
        o.as_reference = true;
        let text = std::fs::read_to_string(
            Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("golden/{golden}.csv")),
        )
        .unwrap();
        let mut cached: Option<(f64, Workload)> = None;
        for l in text.lines().skip(1) {
            let c: Vec<&str> = l.split(',').collect();
            let scale: f64 = c[2].parse().unwrap();
            o.order = if c[1] == "arrival" { Order::Arrival } else { Order::Deadline };
            o.split = match c[0].strip_prefix("co ") {
                Some(k) => Split::Mixed(k.parse().unwrap()),
                None => {
                    let p: usize = c[0][..1].parse().unwrap();
                    Split::Roles(p, 8 - p)
                }
            };
            if cached.as_ref().map(|c| c.0) != Some(scale) {
                cached = Some((scale, make(scale)));
            }
            let w = &cached.as_ref().unwrap().1;
            let r = run(&o, w).unwrap();
            let (want, med): (f64, f64) = (c[7].parse().unwrap(), c[8].parse().unwrap());
            let got = (r.attainment(), r.first_ms().p50);
            let flag =
                if (got.0 - want).abs() > 0.02 || (got.1 / med - 1.0).abs() > 0.05 { "BAD" } else { "ok" };
            println!(
                "{flag} {} {} {} n={} {} {want:.4} {:.4} | {med:.1} {:.1}",
                c[0],
                c[1],
                c[2],
                w.arrivals.len(),
                c[3],
                got.0,
                got.1
            );
        }
        return;
    }
    let t0 = std::time::Instant::now();
    let scales = get("scales", "");
    if scales.is_empty() {
        let splits = match get("splits", "").as_str() {
            "" => vec![o.split],
            "all" => (1..8)
                .map(|p| Split::Roles(p, 8 - p))
                .chain([256, 512, 1024, 2048].map(Split::Mixed))
                .collect(),
            l => l.split(',').map(|x| x.parse().unwrap()).collect(),
        };
        let mut guess: f64 = get("guess", "30").parse().unwrap();
        for s in splits {
            o.split = s;
            let v = search::highest_scale(|x| run(&o, &make(x)).unwrap().attainment(), target, 0.01, guess);
            guess = if v > 0.0 { v } else { guess };
            println!(
                "{row} {} {} {:?} {s} seed {seed}: {v:.2}  ({:.1}s)",
                o.policy,
                get("ttft", "1000"),
                o.per_token,
                t0.elapsed().as_secs_f64()
            );
        }
        return;
    }
    for s in scales.split(',') {
        let s: f64 = s.parse().unwrap();
        let w = make(s);
        let r = run(&o, &w).unwrap();
        println!(
            "{s}: att {:.4} n {} ttft {:?} tpot {:?} flips {} steps {} pre {} busy {:.2} unf {} ({:.1}s)",
            r.attainment(),
            w.arrivals.len(),
            r.first_ms(),
            r.per_token_ms(),
            r.flips,
            r.steps,
            r.preempted,
            r.busy_seconds / r.span.as_secs_f64() / 8.0,
            r.unfinished,
            t0.elapsed().as_secs_f64()
        );
        if get("v", "") == "1" {
            for s in r.samples.iter().step_by(get("every", "4").parse().unwrap()) {
                println!(
                    "  {:.0}s att {:.3} of {} queue {:.2} rows {} roles {:?}",
                    s.at.as_secs_f64(),
                    s.attainment,
                    s.ended,
                    s.queue_seconds,
                    s.decodes,
                    s.roles
                );
            }
        }
    }
}
