//! Stands in for protoc, so that a build script that wants one (etcd-client's) needs nothing installed.

use std::path::PathBuf;
use std::process::ExitCode;

use protox::Compiler;

/// What prost-build asks protoc for.
#[derive(Debug, Default, PartialEq)]
struct Call {
    includes: Vec<PathBuf>,
    out: Option<PathBuf>,
    files: Vec<PathBuf>,
    include_imports: bool,
    include_source_info: bool,
}

/// Whether these arguments (without the program's name) are meant for protoc.
pub fn is_protoc_call(arguments: &[String]) -> bool {
    let descriptor = |a: &String| a == "-o" || a.starts_with("--descriptor_set_out");
    arguments.iter().any(descriptor) || arguments == ["--version".to_owned()]
}

/// Does what protoc would.
pub fn run(arguments: &[String]) -> ExitCode {
    if arguments == ["--version".to_owned()] {
        println!("libprotoc 3.21.12");
        return ExitCode::SUCCESS;
    }
    match parse(arguments).and_then(|call| compile(&call)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: &[String]) -> Result<Call, String> {
    let mut call = Call::default();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut value =
            |name: &str| rest.next().ok_or_else(|| format!("{name} needs a value")).map(PathBuf::from);
        match argument.as_str() {
            "-o" | "--descriptor_set_out" => call.out = Some(value("-o")?),
            "-I" | "--proto_path" => call.includes.push(value("-I")?),
            "--include_imports" => call.include_imports = true,
            "--include_source_info" => call.include_source_info = true,
            "--experimental_allow_proto3_optional" => {}
            other => match other.split_once('=') {
                Some(("--descriptor_set_out", path)) => call.out = Some(path.into()),
                Some(("--proto_path", path)) => call.includes.push(path.into()),
                _ if other.starts_with("-I") => call.includes.push(other[2..].into()),
                _ if other.starts_with('-') => return Err(format!("this protoc has no option {other}")),
                _ => call.files.push(other.into()),
            },
        }
    }
    Ok(call)
}

fn compile(call: &Call) -> Result<(), String> {
    let out = call.out.as_ref().ok_or("this protoc only writes descriptor sets: -o FILE is needed")?;
    let mut compiler = Compiler::new(&call.includes).map_err(|e| e.to_string())?;
    compiler.include_imports(call.include_imports).include_source_info(call.include_source_info);
    compiler.open_files(&call.files).map_err(|e| e.to_string())?;
    std::fs::write(out, compiler.encode_file_descriptor_set()).map_err(|e| format!("{}: {e}", out.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn what_prost_build_says_is_understood() {
        let said = arguments(
            "--include_imports --include_source_info -o out.bin -I proto -I other a.proto b/c.proto",
        );
        assert!(is_protoc_call(&said));
        let call = parse(&said).unwrap();
        assert_eq!(call.includes, [PathBuf::from("proto"), PathBuf::from("other")]);
        assert_eq!(call.files, [PathBuf::from("a.proto"), PathBuf::from("b/c.proto")]);
        assert_eq!(call.out, Some(PathBuf::from("out.bin")));
        assert!(call.include_imports && call.include_source_info);
    }

    #[test]
    fn other_commands_are_not_protocs_and_unknown_options_are_named() {
        assert!(!is_protoc_call(&arguments("test --lane rust")));
        assert!(parse(&arguments("--cpp_out=x a.proto")).unwrap_err().contains("--cpp_out"));
    }

    #[test]
    fn a_file_is_compiled() {
        let dir = std::env::temp_dir().join(format!("tandem-protoc-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("a.proto"), "syntax = \"proto3\"; message A { optional string b = 1; }")
            .unwrap();
        let out = dir.join("out.bin");
        let call = Call {
            includes: vec![dir.clone()],
            out: Some(out.clone()),
            files: vec![dir.join("a.proto")],
            ..Call::default()
        };
        compile(&call).unwrap();
        assert!(std::fs::metadata(&out).unwrap().len() > 10);
        std::fs::remove_dir_all(dir).unwrap();
    }
}
