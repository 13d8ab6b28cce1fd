//! Tokens per second of the engine, and what share of the machine's limits that is.
//!
//! `cargo xtask bench engine` runs this. The model is a random checkpoint of Qwen3-0.6B's shape. Each round measures
//! the limits and then every case once, because machines change their speed from minute to minute; a share is
//! taken within a round. A limit is what the case's bytes take at the rate of reading memory, or its products at the
//! rate of the instruction set in use, whichever is longer.
//!
//! With `--llama` every case is measured on llama.cpp as well, right after ours and on the same weights: BF16, Q8_0
//! beside w8a8, Q4_0 beside int4. Its sampling is not counted, ours is.
//!
//! With `--load` it reports instead how long loading takes and what memory it leaves in use; with `--neighbours` what is
//! left of its speed beside a busy process per thread; with `--quality DIR`, which can be given several times, how far
//! quantised weights of that checkpoint stray from bf16.

use std::path::PathBuf;
use std::process::ExitCode;

mod case;
mod gguf;
mod llama;
mod load;
mod machine;
mod neighbours;
mod quality;
mod roofline;

use case::{Case, Subject};
use gguf::Form;
use llama::Llama;
use machine::{Limits, Took};
use tandem_engine::Quantization;

/// Tokens after which llama.cpp's logits are compared with ours.
const CHECKED: u32 = 32;

const HELP: &str = "\
Tokens per second of the engine on a random checkpoint of Qwen3-0.6B's shape, as shares of this machine's limits.

  --threads N           threads to compute with; one for each processor without it
  --rounds N            how often everything is measured, 5 without it
  --quick               one round
  --only TEXT           only cases whose name contains this, as in \"batch 8 context 128\" or \"prefill\"
  --quantization FORM   weights of the layers: auto (as they are), w8a8 or int4
  --llama PYTHON        also measure llama.cpp, with a Python that has llama-cpp-python (`cargo xtask bench engine
                        --llama` makes one and names it)
  --plot FILE           a picture of the cases under the roofline, as SVG
  --load                how long loading takes, and what memory it leaves in use, instead
  --neighbours          what is left of the speed beside a busy process for each thread, instead
  --quality DIR         how far quantised weights of this checkpoint stray from bf16, instead; can be repeated";

struct Options {
    threads: usize,
    rounds: usize,
    /// Cases whose name holds this text.
    only: String,
    /// Weights of the layers.
    quantization: Quantization,
    /// A Python with llama.cpp, or why it is not compared.
    llama: Result<PathBuf, String>,
    /// Measure loading instead.
    load: bool,
    /// Measure beside busy processes instead.
    neighbours: bool,
    /// Where the picture goes.
    plot: Option<PathBuf>,
    /// Checkpoints whose quality under quantisation is asked for.
    quality: Vec<PathBuf>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments == [neighbours::BUSY] {
        neighbours::be_busy();
    }
    if arguments.iter().any(|argument| argument == "--help" || argument == "-h") {
        println!("{HELP}");
        return ExitCode::SUCCESS;
    }
    match options(&arguments).and_then(|options| run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("{sentence}");
            ExitCode::FAILURE
        }
    }
}

fn options(arguments: &[String]) -> Result<Options, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut options = Options {
        threads,
        rounds: 5,
        only: String::new(),
        quantization: Quantization::Auto,
        llama: Err("it was not asked for (--llama)".to_owned()),
        load: false,
        neighbours: false,
        plot: None,
        quality: Vec::new(),
    };
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let mut number = || {
            let number = arguments.next().and_then(|text| text.parse().ok()).filter(|number| *number > 0);
            number.ok_or_else(|| format!("{argument} needs a number above zero"))
        };
        match argument.as_str() {
            "--quick" => options.rounds = 1,
            "--load" => options.load = true,
            "--neighbours" => options.neighbours = true,
            "--threads" => options.threads = number()?,
            "--rounds" => options.rounds = number()?,
            "--only" => options.only = arguments.next().ok_or("--only needs a text")?.clone(),
            "--plot" => options.plot = Some(arguments.next().ok_or("--plot needs a file")?.into()),
            "--quality" => options.quality.push(arguments.next().ok_or("--quality needs a folder")?.into()),
            "--llama" => {
                options.llama =
                    Ok(arguments.next().ok_or("--llama needs a Python that has llama.cpp")?.into());
            }
            // From xtask, which looks for that Python.
            "--llama-missing" => {
                options.llama = Err(arguments.next().ok_or("--llama-missing needs a reason")?.clone());
            }
            "--quantization" => {
                options.quantization = arguments.next().map_or("", String::as_str).parse()?;
            }
            wrong => {
                return Err(format!("unknown option `{wrong}`; --help names those there are"));
            }
        }
    }
    Ok(options)
}

fn run(options: &Options) -> Result<(), String> {
    if !options.quality.is_empty() {
        quality::head();
        return options.quality.iter().try_for_each(|dir| quality::report(dir, options.threads));
    }
    if options.load {
        let dir = case::checkpoint()?;
        return load::report(&dir, options.threads, options.rounds, options.quantization);
    }
    let cases: Vec<Case> =
        Case::all().into_iter().filter(|case| case.to_string().contains(&options.only)).collect();
    if cases.is_empty() {
        let names: Vec<String> = Case::all().iter().map(Case::to_string).collect();
        return Err(format!("no case has {:?} in its name; there are {}", options.only, names.join(", ")));
    }
    if options.neighbours {
        return neighbours::report(options.threads, options.rounds, options.quantization);
    }
    speed(options, &cases)
}

/// Measures and prints the table.
fn speed(options: &Options, cases: &[Case]) -> Result<(), String> {
    let mut subject = Subject::load(options.threads, cases, options.quantization)?;
    let (kernel, form) = (subject.kernel().to_owned(), options.quantization);
    let (mut llama, about_llama) = peer(options, &mut subject)?;
    eprintln!(
        "{kernel} with {} threads, weights {form}, {} rounds; {about_llama}",
        options.threads, options.rounds
    );
    let mut limits = Vec::new();
    let mut figures: Vec<Vec<Figure>> = cases.iter().map(|_| Vec::new()).collect();
    for round in 1..=options.rounds {
        let now = Limits::measure(options.threads, subject.isa()?)?;
        for (case, figures) in cases.iter().zip(&mut figures) {
            let tokens = (case.steps() * case.tokens()) as f64;
            let rate = |took: Took| options.threads as f64 * tokens / took.cpu;
            let took = subject.measure(case)?;
            let theirs = llama.as_mut().map(|llama| llama.measure(case)).transpose().unwrap_or_else(|why| {
                eprintln!("{why}; it is not measured any more");
                llama = None;
                None
            });
            let figure = Figure {
                cpu: rate(took),
                wall: tokens / took.wall,
                share: rate(took) / case.limit(&now, form),
                share_of_wall: tokens / took.wall / case.limit(&now, form),
                llama: theirs.map(rate),
            };
            eprintln!("round {round}: {case}: {:.1} by CPU time, {:.1} by wall", figure.cpu, figure.wall);
            if let Some(took) = theirs {
                let wall = tokens / took.wall;
                eprintln!(
                    "round {round}: {case}: llama.cpp: {:.1} by CPU time, {wall:.1} by wall",
                    rate(took)
                );
            }
            figures.push(figure);
        }
        limits.push(now);
    }
    println!("Limits, {} threads: {}", options.threads, Limits::spread(&limits));
    println!("\nTokens per second, median (minimum to maximum) of {}; {about_llama}\n", options.rounds);
    println!(
        "| case | by CPU time | of the limit | by wall | of the limit | llama.cpp by CPU time | ours / llama.cpp |\n\
         |---|---|---|---|---|---|---|"
    );
    for (case, figures) in cases.iter().zip(&figures) {
        println!("| {case} | {} |", row(figures).join(" | "));
    }
    let Some(path) = &options.plot else { return Ok(()) };
    let title = format!(
        "{kernel}, {} threads, weights {form}: medians of {} rounds",
        options.threads, options.rounds
    );
    let picture = picture(&title, form, cases, &figures, &limits);
    std::fs::write(path, picture).map_err(|error| format!("{}: {error}", path.display()))
}

/// llama.cpp where it can be had, and a sentence about it. That it computes something else is an error.
fn peer(options: &Options, subject: &mut Subject) -> Result<(Option<Llama>, String), String> {
    let form = Form::beside(options.quantization);
    let start = |python: PathBuf| {
        let file = gguf::beside(&subject.dir, form).map_err(|error| format!("its {form} file: {error}"))?;
        Llama::start(&python, &file, options.threads)
    };
    let started = options.llama.clone().and_then(start);
    match started {
        Ok(mut llama) => {
            let prompt: Vec<u32> = (0..CHECKED).map(case::token).collect();
            llama.check(&prompt, &subject.logits(&prompt)?, form)?;
            let about = format!("llama.cpp with {form} weights, sampling not counted ({})", llama.facts);
            Ok((Some(llama), about))
        }
        Err(reason) => Ok((None, format!("llama.cpp: not compared: {reason}"))),
    }
}

/// A case's columns.
fn row(figures: &[Figure]) -> [String; 6] {
    let column = |of: fn(&Figure) -> f64, digits| spread(figures.iter().map(of).collect(), digits);
    let theirs = |of: fn(&Figure, f64) -> f64, digits| {
        let values: Vec<f64> = figures.iter().filter_map(|figure| Some(of(figure, figure.llama?))).collect();
        if values.is_empty() { "-".to_owned() } else { spread(values, digits) }
    };
    [
        column(|figure| figure.cpu, 1),
        column(|figure| figure.share, 2),
        column(|figure| figure.wall, 1),
        column(|figure| figure.share_of_wall, 2),
        theirs(|_, llama| llama, 1),
        theirs(|figure, llama| figure.cpu / llama, 2),
    ]
}

/// The cases under the limits, in medians.
fn picture(
    title: &str,
    form: Quantization,
    cases: &[Case],
    figures: &[Vec<Figure>],
    limits: &[Limits],
) -> String {
    let points: Vec<roofline::Point> = cases
        .iter()
        .zip(figures)
        .map(|(case, figures)| {
            let (work, tokens) = (case.work(form), case.tokens() as f64);
            let operations = work.numbers + work.whole;
            let rate = middle(figures.iter().map(|figure| figure.cpu).collect()) * operations / tokens;
            roofline::Point { name: case.to_string(), intensity: operations / work.bytes, rate }
        })
        .collect();
    let of = |of: fn(&Limits) -> f64| middle(limits.iter().map(of).collect());
    let limits = Limits {
        bytes: of(|limits| limits.bytes),
        products: of(|limits| limits.products),
        whole: of(|limits| limits.whole),
    };
    roofline::svg(title, &points, &limits)
}

/// One case in one round.
struct Figure {
    cpu: f64,
    wall: f64,
    share: f64,
    share_of_wall: f64,
    /// Tokens per second of llama.cpp, by CPU time.
    llama: Option<f64>,
}

/// The median.
fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Median, minimum and maximum as text.
fn spread(mut values: Vec<f64>, digits: usize) -> String {
    values.sort_by(f64::total_cmp);
    let (least, middle, most) = (values[0], values[values.len() / 2], values[values.len() - 1]);
    format!("{middle:.digits$} ({least:.digits$} to {most:.digits$})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_option_is_refused_by_name() {
        let options = |line: &str| {
            options(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
                .map(|o| (o.threads, o.rounds))
        };
        assert_eq!(options("--threads 3 --quick"), Ok((3, 1)));
        assert_eq!(options("--rounds 0").unwrap_err(), "--rounds needs a number above zero");
        assert_eq!(options("--fast").unwrap_err(), "unknown option `--fast`; --help names those there are");
        assert!(options("--quantization int3").unwrap_err().contains("expected auto, w8a8 or int4"));
    }

    #[test]
    fn llama_is_a_python_or_a_reason_why_not() {
        let llama = |line: &[&str]| {
            options(&line.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>()).map(|o| o.llama)
        };
        assert!(llama(&[]).unwrap().unwrap_err().contains("--llama"));
        assert_eq!(llama(&["--llama", "venv/bin/python"]), Ok(Ok("venv/bin/python".into())));
        assert_eq!(llama(&["--llama-missing", "no network"]), Ok(Err("no network".to_owned())));
        assert!(llama(&["--llama"]).is_err());
    }

    #[test]
    fn a_ratio_is_taken_within_a_round_and_left_out_without_llama() {
        let figure = |cpu, llama| Figure { cpu, wall: 1.0, share: 0.5, share_of_wall: 0.5, llama };
        let both = [figure(30.0, Some(10.0)), figure(20.0, Some(20.0)), figure(40.0, Some(20.0))];
        let [ours, .., theirs, ratio] = row(&both);
        assert_eq!(ours, "30.0 (20.0 to 40.0)");
        assert_eq!((&*theirs, &*ratio), ("20.0 (10.0 to 20.0)", "2.00 (1.00 to 3.00)"));
        assert_eq!(row(&[figure(30.0, None)])[4..], ["-", "-"]);
    }

    #[test]
    fn a_spread_is_median_minimum_and_maximum() {
        assert_eq!(spread(vec![3.0, 1.0, 2.25], 1), "2.2 (1.0 to 3.0)");
    }
}
