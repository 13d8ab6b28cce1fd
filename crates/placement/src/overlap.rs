//! When a decode worker should start to pull while the prompt is still being computed.

/// Tokens from which pulling alongside pays. Shorter prompts are computed in a step or two: there is little to
/// hide, and the decode worker's room would be taken before it is needed.
const OVERLAP_TOKENS: u32 = 1024;

/// Whether to start the decode worker at the grant of a prompt of so many tokens rather than at its first token.
pub fn overlap_pays(prompt_tokens: u32) -> bool {
    prompt_tokens >= OVERLAP_TOKENS
}
