//! Scores of the prompt on their way to the client: each position once and in order, whoever computes them.

use tandem_chassis::seam;
use tandem_proto::{convert, v1};
use tandem_types::{Sampled, TokenId, WorkerId};
use tokio::sync::mpsc::error::TrySendError;

use super::Course;
use super::round::{Again, Round};
use crate::request::GenerateEvent;

impl Course {
    /// Whether scores of the prompt are wanted and not all there: then its positions must be computed, and nobody's
    /// cache is of use from the first one that is missing on.
    pub(super) fn unscored(&self) -> bool {
        self.request.score_prompt.is_some() && self.scored < self.request.prompt.len()
    }

    /// Hands scores on. What a worker that was lost had scored need not come again, and is left out if it does.
    pub(super) async fn take_scores(&mut self, scored: &v1::Scored, from: &WorkerId) -> Result<(), Round> {
        self.begun(0);
        if self.request.score_prompt.is_none() {
            return Ok(());
        }
        let scores = fresh(scored, self.scored, &self.request.prompt)
            .map_err(|what| Round::Again(Again::new(Some(from.clone()), true, format!("{from} {what}"))))?;
        if scores.is_empty() {
            return Ok(());
        }
        self.scored += scores.len();
        self.send(GenerateEvent::Scored(scores)).await
    }

    /// Why a worker's token cannot be taken, if it comes before all scores are there.
    pub(super) fn check_scored(&self, from: &WorkerId) -> Result<(), Round> {
        if !self.unscored() {
            return Ok(());
        }
        let (known, all) = (self.scored, self.request.prompt.len());
        let why = format!("{from} sent a token with {known} of {all} positions of the prompt scored");
        Err(Round::Again(Again::new(Some(from.clone()), true, why)))
    }

    /// To the client, who has some time to take it.
    pub(super) async fn send(&self, event: GenerateEvent) -> Result<(), Round> {
        // Nearly always there is room, and no need for a timer.
        let Err(TrySendError::Full(event)) = self.out.try_send(event) else { return Ok(()) };
        let sent = seam::timeout(super::CLIENT_PATIENCE, self.out.send(event)).await;
        sent.map(|_| ()).map_err(|_| {
            let seconds = super::CLIENT_PATIENCE.as_secs();
            let message = format!("the client has read nothing for {seconds} s");
            Round::Broken(crate::request::DispatchError::SlowClient(message))
        })
    }
}

/// What of a worker's scores is new to a client that has those of the first `known` positions; or what is wrong.
fn fresh(scored: &v1::Scored, known: usize, prompt: &[TokenId]) -> Result<Vec<Sampled>, String> {
    let first = scored.position as usize;
    let end = first + scored.logprobs.len();
    if first > known {
        return Err(format!("left out the scores of positions {known} to {}", first - 1));
    }
    if end > prompt.len() {
        return Err(format!("scored position {} of a prompt of {}", end - 1, prompt.len()));
    }
    let new = scored.logprobs.iter().skip(known - first).zip(&prompt[known..]);
    Ok(new.map(|(score, &token)| convert::sampled(token, Some(score))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scores of `count` positions from `position` on, each minus its position; what is new of them where the first
    /// `known` of a prompt of ten are there: positions, by their tokens.
    fn check(position: u32, count: usize, known: usize, expected: Result<std::ops::Range<u32>, &str>) {
        let prompt: Vec<TokenId> = (100..110).collect();
        let score = |at: u32| v1::TokenLogprob { logprob: -(at as f32), top: Vec::new() };
        let logprobs = (position..).map(score).take(count).collect();
        let new = fresh(&v1::Scored { position, logprobs }, known, &prompt);
        let expected = expected.map(|positions| {
            let scored = |at| Sampled { token: 100 + at, logprob: Some(-(at as f32)), top: Vec::new() };
            positions.map(scored).collect()
        });
        assert_eq!(new, expected.map_err(str::to_owned));
    }

    #[test]
    fn each_position_is_taken_once_and_none_is_left_out_or_made_up() {
        check(1, 4, 1, Ok(1..5));
        check(5, 5, 5, Ok(5..10));
        // Scored again by whoever took over.
        check(1, 4, 3, Ok(3..5));
        check(1, 4, 5, Ok(5..5));
        check(1, 2, 7, Ok(7..7));
        check(4, 0, 4, Ok(4..4));
        check(6, 2, 4, Err("left out the scores of positions 4 to 5"));
        check(8, 3, 8, Err("scored position 10 of a prompt of 10"));
        check(u32::MAX - 1, 1, 4, Err("left out the scores of positions 4 to 4294967293"));
    }
}
