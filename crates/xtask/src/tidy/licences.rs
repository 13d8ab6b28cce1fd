//! Every package may be passed on under terms that ask for nothing but their own text.

use super::Failure;
use crate::workspace::Workspace;

const ALLOWED: &[&str] = &[
    "MIT",
    "MIT-0",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "0BSD",
    "ISC",
    "Unicode-3.0",
    "Unicode-DFS-2016",
    "Zlib",
    "CC0-1.0",
    "Unlicense",
    "BSL-1.0",
];

/// Packages under further terms, with the reason why those do no harm here.
const EXCEPTIONS: &[(&str, &str, &str)] =
    &[("libfuzzer-sys", "NCSA", "libFuzzer's terms are those of BSD-3-Clause, and only the fuzzer holds it")];

/// Every package whose licence is missing or not allowed.
pub fn check(workspace: &Workspace) -> Vec<Failure> {
    let mut failures = Vec::new();
    for package in &workspace.packages {
        let text = match package.licence.as_deref() {
            None => "names no licence".to_owned(),
            Some(licence) if allowed(licence, &package.name) => continue,
            Some(licence) => format!("is under `{licence}`, which is not on the list of licences"),
        };
        let place = match &package.folder {
            Some(folder) => format!("{folder}/Cargo.toml"),
            None => "Cargo.lock".to_owned(),
        };
        failures.push(Failure {
            place,
            rule: "licence",
            text: format!("{} {} {text}", package.name, package.version),
        });
    }
    failures
}

/// True when the terms can be chosen so that all of them are allowed.
fn allowed(expression: &str, package: &str) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = words.as_slice();
    let known = |licence: &str| {
        ALLOWED.contains(&licence)
            || EXCEPTIONS.iter().any(|(name, terms, _)| *name == package && *terms == licence)
    };
    any(&mut rest, &known) == Some(true) && rest.is_empty()
}

// One function per level of the SPDX grammar; `None` is a text outside it.

fn any(words: &mut &[&str], known: &impl Fn(&str) -> bool) -> Option<bool> {
    let mut result = all(words, known)?;
    while take(words, "OR") {
        result |= all(words, known)?;
    }
    Some(result)
}

fn all(words: &mut &[&str], known: &impl Fn(&str) -> bool) -> Option<bool> {
    let mut result = one(words, known)?;
    while take(words, "AND") {
        result &= one(words, known)?;
    }
    Some(result)
}

fn one(words: &mut &[&str], known: &impl Fn(&str) -> bool) -> Option<bool> {
    if take(words, "(") {
        let result = any(words, known)?;
        return take(words, ")").then_some(result);
    }
    let (licence, rest) = words.split_first()?;
    *words = rest;
    if take(words, "WITH") {
        // An exception only ever permits more.
        *words = words.split_first()?.1;
    }
    Some(known(licence))
}

fn take(words: &mut &[&str], wanted: &str) -> bool {
    match words.split_first() {
        Some((word, rest)) if *word == wanted => {
            *words = rest;
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::workspace::Package;

    #[test]
    fn expressions_are_judged_by_their_choices() {
        for good in [
            "MIT",
            "MIT/Apache-2.0",
            "MIT OR GPL-3.0",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR MIT",
            "GPL-2.0 OR (MIT AND ISC)",
        ] {
            assert!(allowed(good, "x"), "{good}");
        }
        for bad in
            ["", "GPL-3.0", "MIT AND GPL-3.0", "(MIT", "MIT OR", "MIT Apache-2.0", "MIT)", "MPL-2.0", "OR"]
        {
            assert!(!allowed(bad, "x"), "{bad}");
        }
    }

    #[test]
    fn a_package_without_a_licence_is_named() {
        let package = |name: &str, licence: Option<&str>| Package {
            name: name.to_owned(),
            version: "1.0.0".to_owned(),
            licence: licence.map(str::to_owned),
            ..Package::default()
        };
        let packages =
            vec![package("good", Some("MIT")), package("none", None), package("bad", Some("AGPL-3.0"))];
        let found = check(&Workspace { root: PathBuf::new(), target: PathBuf::new(), packages });
        let lines: Vec<String> = found.iter().map(Failure::to_string).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0], "Cargo.lock: licence: none 1.0.0 names no licence");
        assert!(lines[1].contains("bad 1.0.0 is under `AGPL-3.0`"));
    }
}
