//! An answer under way, in text: tokens become pieces, stop strings end choices, several choices interleave.

use std::sync::Arc;

use axum::http::HeaderMap;
use futures_util::StreamExt;
use futures_util::future::try_join_all;
use futures_util::stream::{self, BoxStream, SelectAll};
use serde_json::{Value, json};
use tandem_chassis::seam;
use tandem_types::{Choice, FinishReason, RequestId, Sampled, StopRules, TokenId, Usage};

use super::error::ApiError;
use super::parameters::Parameters;
use super::{App, RequestName, deadline};
use crate::request::{DispatchError, GenerateEvent, GenerateRequest, Generation, PromptShare, Route};
use crate::text::{Detokenizer, Model, StopStrings};

/// What a choice has to say next.
#[derive(Debug)]
pub(crate) enum Step {
    /// More text.
    Piece(Piece),
    /// The last text, and why it is the last.
    End(Piece, Finish),
    /// It broke.
    Failed(DispatchError),
}

/// Text, and the tokens it came with.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    pub(crate) text: String,
    pub(crate) tokens: Vec<Sampled>,
}

/// Why a choice is over.
#[derive(Clone, Debug)]
pub(crate) struct Finish {
    /// `stop` or `length`.
    pub(crate) reason: &'static str,
    /// The stop string or token, if one of the client's; vLLM's extension.
    pub(crate) stop_reason: Value,
    pub(crate) cached_tokens: u32,
}

/// All choices of all prompts of one request.
pub(crate) struct Answer {
    pub(crate) prompts: Vec<Arc<[TokenId]>>,
    pub(crate) route: Option<Route>,
    /// Choices over all prompts.
    pub(crate) choices: usize,
    steps: SelectAll<BoxStream<'static, (usize, Step)>>,
    output_tokens: u32,
    cached_tokens: u32,
}

/// A finished choice.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    pub(crate) text: String,
    pub(crate) tokens: Vec<Sampled>,
    pub(crate) finish: Option<Finish>,
}

impl Answer {
    /// Sends every choice of every prompt to the workers; an error of one is an error of all.
    pub(crate) async fn begin(
        app: &App,
        name: &RequestName,
        headers: &HeaderMap,
        prompts: Vec<Arc<[TokenId]>>,
        parameters: &Parameters,
        prompt_param: &str,
    ) -> Result<Answer, ApiError> {
        let (arrived, deadline) = deadline(app);
        let traceparent = headers.get("traceparent").and_then(|v| v.to_str().ok()).map(str::to_owned);
        let mut requests = Vec::new();
        for prompt in &prompts {
            let stop = parameters.stop_rules(&app.model, prompt.len(), prompt_param)?;
            let id = RequestId(seam::random_u128());
            let shares = PromptShare::among(parameters.n, prompt.len());
            for (choice, share) in (0..parameters.n).zip(shares) {
                requests.push(GenerateRequest {
                    id,
                    name: name.0.clone(),
                    model: app.model.name.clone(),
                    prompt: prompt.clone(),
                    choice: Choice(choice),
                    sampling: parameters.sampling.clone(),
                    stop: stop.clone(),
                    class: parameters.class,
                    deadline,
                    salt: Vec::new(),
                    arrived,
                    traceparent: traceparent.clone(),
                    share,
                });
            }
        }
        let stops: Vec<StopRules> = requests.iter().map(|request| request.stop.clone()).collect();
        let generations =
            try_join_all(requests.into_iter().map(|request| app.generate.start(request))).await?;
        let route = generations.first().and_then(|generation| generation.route().cloned());
        let choices = generations.len();
        let steps = generations.into_iter().zip(stops).enumerate().map(|(index, (generation, stop))| {
            let choice = ChoiceText::new(app.model.clone(), stop, parameters);
            steps(index, generation, choice)
        });
        let steps = stream::select_all(steps);
        Ok(Answer { prompts, route, choices, steps, output_tokens: 0, cached_tokens: 0 })
    }

    /// The next step of any choice; `None` when all are over.
    pub(crate) async fn next(&mut self) -> Option<(usize, Step)> {
        let (index, step) = self.steps.next().await?;
        if let Step::Piece(piece) | Step::End(piece, _) = &step {
            self.output_tokens += piece.tokens.len() as u32;
        }
        if let Step::End(_, finish) = &step
            && index.is_multiple_of(self.choices / self.prompts.len())
        {
            // What the other choices of a prompt found cached, its first choice has computed.
            self.cached_tokens += finish.cached_tokens;
        }
        Some((index, step))
    }

    /// Waits for all choices.
    pub(crate) async fn collect(&mut self) -> Result<Vec<Collected>, ApiError> {
        let mut choices: Vec<Collected> = (0..self.choices).map(|_| Collected::default()).collect();
        while let Some((index, step)) = self.next().await {
            let (piece, finish) = match step {
                Step::Piece(piece) => (piece, None),
                Step::End(piece, finish) => (piece, Some(finish)),
                Step::Failed(error) => return Err(error.into()),
            };
            let choice = &mut choices[index];
            choice.text.push_str(&piece.text);
            choice.tokens.extend(piece.tokens);
            choice.finish = finish;
        }
        Ok(choices)
    }

    /// What it has cost so far: each prompt once, however many choices.
    pub(crate) fn usage(&self) -> Value {
        let prompt: usize = self.prompts.iter().map(|prompt| prompt.len()).sum();
        let completion = self.output_tokens as usize;
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": { "cached_tokens": self.cached_tokens },
        })
    }
}

/// The steps of one choice. Ends, and lets go of its generation, with the last one.
fn steps(index: usize, generation: Generation, choice: ChoiceText) -> BoxStream<'static, (usize, Step)> {
    let state = Some((generation, choice));
    stream::unfold(state, move |state| async move {
        let (mut generation, mut choice) = state?;
        loop {
            let Some(step) = choice.on(generation.next().await) else { continue };
            let more = matches!(step, Step::Piece(_)).then_some((generation, choice));
            return Some(((index, step), more));
        }
    })
    .boxed()
}

/// One choice's text so far.
struct ChoiceText {
    model: Arc<Model>,
    rules: StopRules,
    detokenizer: Detokenizer,
    stops: StopStrings,
    include_stop: bool,
    /// Every token makes a piece, also without text.
    wants_tokens: bool,
    drawn: u32,
    pending: Vec<Sampled>,
}

impl ChoiceText {
    fn new(model: Arc<Model>, rules: StopRules, parameters: &Parameters) -> ChoiceText {
        ChoiceText {
            model,
            rules,
            detokenizer: Detokenizer::new(parameters.skip_special_tokens),
            stops: StopStrings::new(parameters.stop.clone(), parameters.include_stop),
            include_stop: parameters.include_stop,
            wants_tokens: parameters.return_token_ids || parameters.sampling.logprobs.is_some(),
            drawn: 0,
            pending: Vec::new(),
        }
    }

    /// What an event of the generation means; `None` if there is nothing to say yet.
    fn on(&mut self, event: GenerateEvent) -> Option<Step> {
        match event {
            GenerateEvent::Routed(_) => None,
            GenerateEvent::Failed(error) => Some(Step::Failed(error)),
            GenerateEvent::Token { sampled, .. } => self.on_token(sampled),
            GenerateEvent::Finished { reason, usage } => Some(self.on_finished(reason, usage)),
        }
    }

    fn on_token(&mut self, sampled: Sampled) -> Option<Step> {
        let token = sampled.token;
        self.drawn += 1;
        self.pending.push(sampled);
        let text = if self.is_stop(token) && !self.include_stop {
            String::new()
        } else {
            self.detokenizer.push(&self.model, token)
        };
        let (text, stop) = self.stops.push(&text);
        if let Some(stop) = stop {
            let finish = Finish { reason: "stop", stop_reason: stop.into(), cached_tokens: 0 };
            return Some(Step::End(self.piece(text), finish));
        }
        (self.wants_tokens || !text.is_empty()).then(|| Step::Piece(self.piece(text)))
    }

    fn on_finished(&mut self, reason: FinishReason, usage: Usage) -> Step {
        let rest = self.detokenizer.finish(&self.model);
        let (mut text, stop) = self.stops.push(&rest);
        if stop.is_none() {
            text.push_str(&self.stops.finish());
        }
        let (reason, stop_reason) = match (stop, reason) {
            (Some(stop), _) => ("stop", stop.into()),
            (None, FinishReason::Eos) => ("stop", Value::Null),
            (None, FinishReason::StopToken(token)) => ("stop", token.into()),
            (None, FinishReason::Length) => ("length", Value::Null),
        };
        Step::End(self.piece(text), Finish { reason, stop_reason, cached_tokens: usage.cached_tokens })
    }

    fn piece(&mut self, text: String) -> Piece {
        Piece { text, tokens: std::mem::take(&mut self.pending) }
    }

    /// A token that ends the answer and is not part of its text.
    fn is_stop(&self, token: TokenId) -> bool {
        let named = self.rules.eos.contains(&token) || self.rules.stop_token_ids.contains(&token);
        named && self.drawn > self.rules.min_tokens
    }
}

/// A log probability as JSON has it: minus infinity is very unlikely.
pub(crate) fn json_logprob(logprob: f32) -> Value {
    json!(if logprob.is_finite() { f64::from(logprob) } else { -9999.0 })
}

/// Ids of tokens.
pub(crate) fn ids(tokens: &[Sampled]) -> Vec<TokenId> {
    tokens.iter().map(|sampled| sampled.token).collect()
}
