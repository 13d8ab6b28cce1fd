use super::*;

#[derive(Clone, Debug, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Numerics {
    Strict,
    Mixed,
}

#[derive(Debug, Serialize, Parser)]
#[command(name = "tandem-test")]
struct Config {
    /// Port of the API
    #[arg(long, default_value_t = 8000)]
    port: u16,
    #[arg(long, default_value = "512MiB")]
    kv_memory: ByteSize,
    #[arg(long, default_value = "10s")]
    lease_time_to_live: HumanDuration,
    #[arg(long)]
    processes: bool,
    #[arg(long)]
    etcd: Option<String>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "zero")]
    fake: Option<String>,
    #[arg(long, value_enum, default_value = "strict")]
    numerics: Numerics,
    #[arg(long, value_delimiter = ',')]
    holders: Vec<String>,
    #[command(flatten)]
    #[serde(flatten)]
    who: Who,
}

#[derive(Debug, Serialize, clap::Args)]
struct Who {
    #[arg(long)]
    id: String,
}

fn parsed(flags: &str, file: Option<&str>) -> Result<Parsed<Config>, Error> {
    let mut arguments: Vec<OsString> = vec!["tandem-test".into()];
    arguments.extend(flags.split_whitespace().map(OsString::from));
    if file.is_some() {
        arguments.extend(["--config".into(), "tandem.yaml".into()]);
    }
    let read = |_: &Path| file.map(str::to_owned).ok_or_else(|| io::Error::other("no file in this test"));
    parse(arguments, read, |config: &Config| match config.port {
        1 => Err("port 1 is taken".to_owned()),
        _ => Ok(()),
    })
}

fn run(flags: &str, file: Option<&str>) -> Config {
    match parsed(flags, file) {
        Ok(Parsed::Run(config)) => config,
        other => panic!("{other:?}"),
    }
}

fn refused(flags: &str, file: Option<&str>) -> String {
    parsed(flags, file).expect_err("this is refused").to_string()
}

#[test]
fn flags_override_the_file_and_the_file_overrides_defaults() {
    let file = "id: from-file\nport: 9000\nkv_memory: 1GiB\nprocesses: true\nholders: [a, b]\n";
    let config = run("--port 9001", Some(file));
    assert_eq!((config.port, config.kv_memory), (9001, ByteSize(1 << 30)));
    assert_eq!((config.who.id.as_str(), config.processes), ("from-file", true));
    assert_eq!(config.holders, ["a", "b"]);
    assert_eq!(config.lease_time_to_live.0.as_secs(), 10);
    assert_eq!(run("--id x --holders c", Some(file)).holders, ["c"]);
}

#[test]
fn an_optional_value_may_be_given_as_true() {
    assert_eq!(run("", Some("id: x\nfake: true")).fake.as_deref(), Some("zero"));
    assert_eq!(run("", Some("id: x\nfake: 'paced:1s,5ms'")).fake.as_deref(), Some("paced:1s,5ms"));
    assert_eq!(run("", Some("id: x\nfake: false")).fake, None);
    assert_eq!(run("--fake=zero", Some("id: x\nfake: false\netcd:")).fake.as_deref(), Some("zero"));
}

#[test]
fn a_wrong_flag_is_refused_with_the_right_one() {
    assert!(refused("--id x --prot 1", None).contains("`--prot`: did you mean `--port`?"));
    assert!(refused("--id x --kv-mem=1GiB", None).contains("did you mean `--kv-memory`?"));
    assert!(refused("--id x --numerics lax", None).contains("strict, mixed"));
    assert!(refused("--id x --kv-memory 1M", None).contains("512MiB"));
    assert!(refused("", None).contains("--id"));
    assert!(refused("--id x stray", None).contains("stray"));
}

#[test]
fn a_wrong_key_or_value_in_the_file_is_refused_with_its_place() {
    let cases = [
        ("id: x\nprot: 1", "tandem.yaml: unknown key `prot`: did you mean `port`?"),
        ("id: x\nkv-memory: 1GiB", "unknown key `kv-memory`: did you mean `kv_memory`?"),
        ("id: x\nconfig: other.yaml", "unknown key `config`"),
        ("id: x\nport: many", "tandem.yaml: `port` does not take `many`"),
        ("id: x\nport: 70000", "`port` does not take `70000`"),
        ("id: x\nkv_memory: 1M", "`kv_memory` does not take `1M`: `1M` is not a size"),
        ("id: x\nnumerics: lax", "`numerics` does not take `lax`: it is one of strict, mixed"),
        ("id: x\nport: {a: 1}", "`port` takes one plain value"),
        ("id: x\nport: [1, 2]", "`port` takes one plain value"),
        ("id: x\nprocesses: 3", "`processes` is either true or false"),
        ("id: x\nid: y", "tandem.yaml: "),
        ("- id", "expected lines of the form"),
        ("id: [", "tandem.yaml: "),
    ];
    for (file, message) in cases {
        let error = refused("", Some(file));
        assert!(error.contains(message), "{file}\n{error}");
    }
    assert!(refused("", Some("")).contains("--id"));
}

#[test]
fn a_missing_file_is_named() {
    let arguments = ["x", "--id", "y", "--config", "gone.yaml"].map(OsString::from).to_vec();
    let error = parse::<Config>(arguments, |path| fs::read_to_string(path), |_| Ok(())).unwrap_err();
    assert!(error.to_string().starts_with("cannot read gone.yaml: "), "{error}");
}

#[test]
fn the_check_sees_the_whole_configuration() {
    assert_eq!(refused("--id x", Some("port: 1")), "port 1 is taken");
    assert_eq!(refused("--id x --port 1 --check-config", None), "port 1 is taken");
    assert!(matches!(parsed("--id x --check-config", None), Ok(Parsed::Valid)));
}

#[test]
fn help_and_version_are_there() {
    let Err(Error::Clap(help)) = parsed("--help", None) else { panic!("help is a text of clap") };
    assert_eq!(help.exit_code(), 0);
    for part in
        ["--print-config", "--check-config", "--config <FILE>", "--port", "[default: 8000]", "--version"]
    {
        assert!(help.to_string().contains(part), "{part} is missing in {help}");
    }
    let Err(Error::Clap(version)) = parsed("--version", None) else { panic!("so is the version") };
    assert_eq!(version.to_string().trim(), format!("tandem-test {}", env!("CARGO_PKG_VERSION")));
}

#[test]
fn the_printed_configuration_is_a_file_that_says_the_same() {
    assert_prints_what_it_reads::<Config>(&["--id", "x"]);
    assert_prints_what_it_reads::<Config>(&[
        "--id=prefill-0",
        "--port=9",
        "--fake=paced:1s,50ms",
        "--holders=a,b",
        "--processes",
        "--numerics=mixed",
        "--kv-memory=1.5GiB",
        "--lease-time-to-live=1500ms",
        "--etcd=http://127.0.0.1:2379",
    ]);
    let Ok(Parsed::Print(text)) = parsed("--id x --print-config", Some("port: 81")) else {
        panic!("it prints")
    };
    assert!(text.contains("port: 81\n") && text.contains("kv_memory: 512MiB\n"), "{text}");
}
