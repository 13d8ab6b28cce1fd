//! The example does what its first line says, and stays as short as a first look wants it.

mod support;

#[allow(dead_code, reason = "the test calls what `main` calls")]
#[path = "../examples/generate.rs"]
mod example;

use support::{Reference, checkpoint};

#[test]
fn the_example_continues_a_prompt_as_the_reference_does() {
    let dir = checkpoint("qwen3");
    let reference = Reference::read(&dir);
    let case = reference.cases.iter().find(|case| case.name == "short").expect("a case of this name");
    // bf16, so up to the first near-tie.
    let sure = case.margins.iter().position(|margin| f64::from(*margin) < 10.0 * case.bf16_error);
    let sure = sure.unwrap_or(case.greedy.len());
    let output = example::generate(&dir, &case.prompt, sure as u32).unwrap();
    assert_eq!(output, case.greedy[..sure]);
    assert!(sure > 2, "too few tokens to compare");
    assert!(include_str!("../examples/generate.rs").lines().count() < 40);
}
