//! Scores of the prompt on their way to the client: each position once and in order, whoever computes them.

use tandem_chassis::seam;
use tandem_proto::{convert, v1};
use tandem_types::{Sampled, WorkerId};

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
        let (first, known, prompt) = (scored.position as usize, self.scored, self.request.prompt.clone());
        let end = first + scored.logprobs.len();
        let wrong = |why: String| Err(Round::Again(Again::new(Some(from.clone()), true, why)));
        if first > known {
            return wrong(format!("{from} left out the scores of positions {known} to {first}"));
        }
        if end > prompt.len() {
            return wrong(format!("{from} scored position {} of a prompt of {}", end - 1, prompt.len()));
        }
        if end <= known {
            return Ok(());
        }
        let new = scored.logprobs[known - first..].iter().zip(&prompt[known..]);
        let scores: Vec<Sampled> = new.map(|(score, &token)| convert::sampled(token, Some(score))).collect();
        self.scored = end;
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
        let sent = seam::timeout(super::CLIENT_PATIENCE, self.out.send(event)).await;
        sent.map(|_| ()).map_err(|_| {
            let seconds = super::CLIENT_PATIENCE.as_secs();
            let message = format!("the client has read nothing for {seconds} s");
            Round::Broken(crate::request::DispatchError::SlowClient(message))
        })
    }
}
