//! Sections that ask how much load each cluster carries.

use tandem_simulator::scenario::Arrivals;

use super::{Bench, Carried, Case, median, spread, table, verdict};

/// Windows of the Azure traces, and how far apart they begin: five of them span the hour.
const CODE: (f64, f64) = (900.0, 620.0);
const CONV: (f64, f64) = (400.0, 760.0);

/// The five rows of the first goal.
pub fn target_cases() -> Vec<Case> {
    let code = |token| Case::new("Azure Code", "azure2023_code", 1000, token).windows(CODE.0, CODE.1);
    let conv = |first, token| Case::new("Azure Conv", "azure2023_conv", first, token).windows(CONV.0, CONV.1);
    vec![code(50), code(20), conv(1000, 50), conv(1000, 20), conv(500, 15)]
}

pub fn shift_cases() -> Vec<Case> {
    vec![Case::new("shift", "shift", 1000, 50), Case::new("shift", "shift", 1000, 20)]
}

fn squeezed_cases() -> Vec<Case> {
    let case = |name: &str, trace| Case {
        squeezed: true,
        stride: 690.0,
        ..Case::new(&format!("{name}, squeezed"), trace, 1000, 50)
    };
    vec![case("Azure Code", "azure2023_code"), case("Azure Conv", "azure2023_conv")]
}

const HEAD: [&str; 8] = [
    "load, targets",
    "ours",
    "best fixed split",
    "best mixed",
    "ours / best",
    "goal",
    "prefill alone",
    "flips",
];

fn row(case: &Case, rounds: &[Carried], goal: f64) -> (Vec<String>, f64) {
    let reached = median(&ratios(rounds));
    let named = |of: fn(&Carried) -> &(f64, String)| {
        let mut names: Vec<&str> = rounds.iter().map(|r| of(r).1.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        format!("{}, {}", spread(rounds.iter().map(|r| of(r).0), 2), names.join(" "))
    };
    let cells = vec![
        case.label(),
        spread(rounds.iter().map(|r| r.ours), 2),
        named(|r| &r.fixed),
        named(|r| &r.mixed),
        spread(ratios(rounds), 3),
        verdict(reached, goal),
        spread(rounds.iter().map(|r| r.ceiling), 1),
        spread(rounds.iter().map(|r| r.flips as f64), 0),
    ];
    (cells, reached)
}

fn ratios(rounds: &[Carried]) -> Vec<f64> {
    rounds.iter().map(|r| r.ours / r.best()).collect()
}

pub fn targets(bench: &Bench) -> Result<String, String> {
    let (mut rows, mut logs) = (Vec::new(), 0.0);
    for case in target_cases().into_iter().filter(|case| bench.wants(&case.label())) {
        let rounds = bench.carried(&case, |options| options)?.expect("its trace is committed");
        let (cells, reached) = row(&case, &rounds, 0.98);
        rows.push(cells);
        logs += reached.ln();
    }
    let mean = (logs / rows.len() as f64).exp();
    let mean = match rows.len() {
        5 => format!("Geometric mean of the five ratios: {mean:.3}; goal {}.", verdict(mean, 1.0)),
        0 => String::new(),
        some => format!("Geometric mean of {some} ratios: {mean:.3}."),
    };
    Ok(format!("### Every target\n\n{}\n{mean}\n", table(&HEAD, &rows)))
}

pub fn xllm(bench: &Bench) -> Result<String, String> {
    let superposed = target_cases().into_iter().filter(|case| (case.first_ms, case.token_ms) == (1000, 50));
    let cases = superposed.zip([2.5, 1.2]).chain(squeezed_cases().into_iter().zip([1.67, 1.1]));
    let mut rows = Vec::new();
    for (case, goal) in cases.filter(|(case, _)| bench.wants(&case.label())) {
        let rounds = bench.carried(&case, |options| options)?.expect("its trace is committed");
        let ratios: Vec<f64> = rounds.iter().map(|r| r.ours / r.half).collect();
        rows.push(vec![
            case.label(),
            spread(rounds.iter().map(|r| r.ours), 2),
            spread(rounds.iter().map(|r| r.half), 2),
            spread(ratios.iter().copied(), 2),
            verdict(median(&ratios), goal),
            spread(rounds.iter().map(|r| r.best()), 2),
            spread(rounds.iter().map(|r| r.ceiling), 1),
        ]);
    }
    let head = [
        "load, targets",
        "ours",
        "4P4D, least load, by arrival",
        "ratio",
        "goal",
        "best of all by deadline",
        "prefill alone",
    ];
    Ok(format!("### Against what xLLM compares with\n\n{}", table(&head, &rows)))
}

pub fn shift(bench: &Bench) -> Result<String, String> {
    let mut rows = Vec::new();
    for case in shift_cases().into_iter().filter(|case| bench.wants(&case.label())) {
        let rounds = bench.carried(&case, |options| options)?.expect("its trace is committed");
        let fixed: Vec<f64> = rounds.iter().map(|r| r.ours / r.fixed.0).collect();
        let mixed: Vec<f64> = rounds.iter().map(|r| r.ours / r.mixed.0).collect();
        let mut cells = row(&case, &rounds, 0.0).0;
        cells.splice(
            4..6,
            [
                spread(fixed.iter().copied(), 3),
                verdict(median(&fixed), 1.2),
                spread(mixed.iter().copied(), 3),
                verdict(median(&mixed), 0.97),
            ],
        );
        rows.push(cells);
    }
    let mut head = HEAD.to_vec();
    head.splice(4..6, ["ours / fixed", "goal", "ours / mixed", "goal"]);
    Ok(format!("### A load that shifts\n\n{}", table(&head, &rows)))
}

pub fn general(bench: &Bench) -> Result<String, String> {
    const HALF_HOUR: f64 = 1800.0;
    let slice = |name: &str, trace, offset: f64| {
        // One slice is one window: rounds differ by seed alone.
        (Case::new(name, trace, 1000, 50), offset, HALF_HOUR)
    };
    let timed = [
        slice("ServeGen m-large", "servegen_m_large_day3_10h_30min", 0.0),
        slice("images, first half", "servegen_mm_image_peak_1h", 0.0),
        slice("images, second half", "servegen_mm_image_peak_1h", HALF_HOUR),
    ];
    let timed = timed.map(|(case, offset, seconds)| Case { seconds: Some(seconds), offset, ..case });
    let lengths = [
        ("ShareGPT lengths, Poisson", "lengths_sharegpt8k", Arrivals::Poisson),
        ("ShareGPT lengths, Gamma CV 2", "lengths_sharegpt8k", Arrivals::Gamma(2.0)),
        ("arXiv lengths, Poisson", "lengths_arxiv_sum", Arrivals::Poisson),
        ("arXiv lengths, Gamma CV 2", "lengths_arxiv_sum", Arrivals::Gamma(2.0)),
    ];
    let lengths = lengths.map(|(name, trace, arrivals)| Case {
        arrivals,
        seconds: Some(300.0),
        ..Case::new(name, trace, 1000, 50)
    });
    let mut rows = Vec::new();
    for case in timed.into_iter().chain(lengths).filter(|case| bench.wants(&case.label())) {
        rows.push(match bench.carried(&case, |options| options)? {
            Some(rounds) => row(&case, &rounds, 0.95).0,
            None => vec![case.label(), bench.missing(case.trace)],
        });
    }
    Ok(format!("### Loads that nothing was tuned on\n\n{}", table(&HEAD, &rows)))
}
