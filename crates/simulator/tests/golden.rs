//! The same cluster as an independent simulator's, row by row: attainment within two points, median time to the
//! first token within 5 %. `golden/reference_sim.py golden all` makes the rows.
//!
//! Every day some rows of each file; all of them with `TANDEM_GOLDEN=full`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use tandem_batching::pace::Order;
use tandem_simulator::workload::{Workload, shift};
use tandem_simulator::{Options, Split, Trace, run, scenario};

/// Of so many rows one is compared every day.
const STRIDE: usize = 73;
/// Seconds of each trace, as the script has them.
const CODE_SECONDS: f64 = 900.0;
const CONV_SECONDS: f64 = 400.0;

struct Row {
    name: String,
    order: Order,
    split: Split,
    scale: f64,
    arrivals: usize,
    sums: [u64; 3],
    attainment: f64,
    first_ms: f64,
}

fn row(line: &str) -> Row {
    let cells: Vec<&str> = line.split(',').collect();
    let number = |at: usize| cells[at].parse::<f64>().expect("a number");
    let split = match cells[0].strip_prefix("co ") {
        Some(chunk) => Split::Mixed(chunk.parse().expect("a chunk")),
        None => {
            let prefill: usize = cells[0].trim_end_matches('P').parse().expect("a split");
            Split::Roles(prefill, 8 - prefill)
        }
    };
    Row {
        name: cells[..3].join(" "),
        order: if cells[1] == "arrival" { Order::Arrival } else { Order::Deadline },
        split,
        scale: number(2),
        arrivals: number(3) as usize,
        sums: [number(4) as u64, number(5) as u64, number(6) as u64],
        attainment: number(7),
        first_ms: number(8),
    }
}

fn workload(file: &str, scale: f64) -> Workload {
    let read = |name: &str| Trace::read(&scenario::own_traces().join(format!("azure2023_{name}.csv.gz")));
    let code = || read("code").expect("it is committed");
    match file.rsplitn(3, '-').nth(2).expect("NAME-TTFT-TPOT") {
        "code" => code().window(0.0, Some(CODE_SECONDS)).superposed(scale, 1),
        "code-squeezed" => code().squeezed(scale),
        "conv" => read("conv").expect("it is committed").window(0.0, Some(CONV_SECONDS)).superposed(scale, 1),
        "shift" => shift(&code().window(0.0, Some(300.0)), scale, 1),
        other => panic!("no workload {other}"),
    }
}

#[test]
fn it_is_the_cluster_of_the_reference() {
    let full = std::env::var("TANDEM_GOLDEN").is_ok_and(|value| value == "full");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "csv"));
    files.sort();
    assert_eq!(files.len(), 9, "one for each row of the table");
    let (mut compared, mut wrong) = (0, Vec::new());
    for (number, path) in files.iter().enumerate() {
        let file = path.file_stem().unwrap().to_str().unwrap();
        let [_, first, token] =
            file.rsplitn(3, '-').collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>()[..]
        else {
            panic!("{file} is NAME-TTFT-TPOT")
        };
        let ms = |text: &str| Duration::from_millis(text.parse().expect("milliseconds"));
        let text = fs::read_to_string(path).unwrap();
        let rows = text.lines().skip(1).map(row).enumerate();
        let chosen = rows.filter(|(at, _)| full || at % STRIDE == number % STRIDE);
        for (_, row) in chosen {
            let workload = workload(file, row.scale);
            let sums = [
                workload.arrivals.iter().map(|a| a.at.0 as f64 / 1e6).sum::<f64>().round() as u64,
                workload.arrivals.iter().map(|a| u64::from(a.input)).sum(),
                workload.arrivals.iter().map(|a| u64::from(a.output)).sum(),
            ];
            assert_eq!(workload.arrivals.len(), row.arrivals, "{file} {}", row.name);
            assert_eq!(sums[1..], row.sums[1..], "{file} {}", row.name);
            assert!(
                sums[0].abs_diff(row.sums[0]) <= 1 + row.arrivals as u64 / 1_000_000,
                "{file} {}",
                row.name
            );
            let options = Options {
                policy: "least-loaded".into(),
                planner: false,
                order: row.order,
                split: row.split,
                first_token: ms(first),
                per_token: ms(token),
                as_reference: true,
                admission: false, // the reference lets everybody in
                ..Options::default()
            };
            let outcome = run(&options, &workload).expect("the options are sound");
            let (share, median) = (outcome.attainment(), outcome.first_ms().p50);
            if (share - row.attainment).abs() > 0.02 || (median / row.first_ms - 1.0).abs() > 0.05 {
                wrong.push(format!(
                    "{file} {}: attainment {share:.4} for {:.4}, TTFT {median:.1} for {:.1} ms",
                    row.name, row.attainment, row.first_ms
                ));
            }
            compared += 1;
        }
    }
    assert!(wrong.is_empty(), "{} of {compared}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(compared >= 9 * 3);
}
