//! An answer under way, in text: tokens become pieces, stop strings end choices, several choices interleave.

use std::sync::Arc;

use axum::http::HeaderMap;
use futures_util::StreamExt;
use futures_util::future::try_join_all;
use futures_util::stream::{self, BoxStream, SelectAll};
use serde::Serialize;
use tandem_chassis::seam;
use tandem_types::{Choice, FinishReason, RequestId, Sampled, StopRules, TokenId};

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
    /// How many tokens were drawn for it.
    pub(crate) drawn: u32,
    /// They themselves, where the client wants to see them or choices are compared.
    pub(crate) tokens: Vec<Sampled>,
    /// Tokens of the prompt that begin `text`, where the client wants to see them.
    pub(crate) echoed: Arc<[Sampled]>,
}

impl Piece {
    /// What comes after it in the same choice.
    fn append(&mut self, next: Piece) {
        self.text.push_str(&next.text);
        self.drawn += next.drawn;
        self.tokens.extend(next.tokens);
        if self.echoed.is_empty() {
            self.echoed = next.echoed;
        }
    }

    /// Mean log probability of its tokens: what `best_of` goes by.
    pub(crate) fn mean_logprob(&self) -> f32 {
        let sum: f32 = self.tokens.iter().filter_map(|sampled| sampled.logprob).sum();
        sum / self.tokens.len().max(1) as f32
    }
}

/// Why a choice is over.
#[derive(Clone, Debug)]
pub(crate) struct Finish {
    /// `stop` or `length`.
    pub(crate) reason: &'static str,
    /// The stop string or token, if one of the client's; vLLM's extension.
    pub(crate) stop_reason: Option<StopReason>,
    pub(crate) cached_tokens: u32,
}

/// What of the client's ended a choice.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub(crate) enum StopReason {
    Text(String),
    Token(TokenId),
}

/// What an answer cost: each prompt once, however many choices.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct PromptDetails {
    cached_tokens: u32,
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
    pub(crate) piece: Piece,
    pub(crate) finish: Option<Finish>,
}

impl Answer {
    /// Sends every choice of every prompt to the workers; an error of one is an error of all. `echo` has the text of
    /// each prompt, where answers begin with it.
    pub(crate) async fn begin(
        app: &App,
        name: &RequestName,
        headers: &HeaderMap,
        prompts: Vec<Arc<[TokenId]>>,
        echo: Option<Vec<String>>,
        parameters: &Parameters,
        prompt_param: &str,
    ) -> Result<Answer, ApiError> {
        let (arrived, deadline) = deadline(app);
        let traceparent = headers.get("traceparent").and_then(|v| v.to_str().ok()).map(str::to_owned);
        let score_prompt = parameters.logprobs.filter(|_| echo.is_some());
        let mut requests = Vec::new();
        let mut texts = Vec::new();
        for (which, prompt) in prompts.iter().enumerate() {
            let stop = parameters.stop_rules(&app.model, prompt.len(), prompt_param)?;
            let id = RequestId(seam::random_u128());
            let shares = PromptShare::among(parameters.draws, prompt.len());
            for (choice, share) in (0..parameters.draws).zip(shares) {
                let echo = echo.as_ref().map(|texts| texts[which].clone());
                texts.push(ChoiceText::new(app.model.clone(), stop.clone(), parameters, echo));
                requests.push(GenerateRequest {
                    id,
                    name: name.0.clone(),
                    model: app.model.name.clone(),
                    prompt: prompt.clone(),
                    choice: Choice(choice),
                    sampling: parameters.sampling.clone(),
                    // A prompt is scored on the way to its first token.
                    stop: StopRules { max_tokens: stop.max_tokens.max(1), ..stop.clone() },
                    class: parameters.class,
                    deadline,
                    salt: Vec::new(),
                    arrived,
                    traceparent: traceparent.clone(),
                    share,
                    unseen: !parameters.stream,
                    // What is true of one choice's prompt is true of all.
                    score_prompt: score_prompt.filter(|_| choice == 0),
                });
            }
        }
        let choices = texts.len();
        if parameters.max_tokens == Some(0) && score_prompt.is_none() {
            // Nothing is to be computed.
            let ends = texts.into_iter().enumerate().map(|(index, mut text)| {
                let end = text.on_finished(FinishReason::Length, 0);
                stream::iter([(index, end)]).boxed()
            });
            let steps = stream::select_all(ends);
            return Ok(Answer { prompts, route: None, choices, steps, output_tokens: 0, cached_tokens: 0 });
        }
        let mut generations =
            try_join_all(requests.into_iter().map(|request| app.generate.start(request))).await?;
        let draws = parameters.draws as usize;
        for (generations, texts) in generations.chunks_mut(draws).zip(texts.chunks_mut(draws)) {
            let scores: Arc<[Sampled]> = generations[0].take_scores().into();
            texts.iter_mut().for_each(|text| text.next.echoed = scores.clone());
        }
        let route = generations.first().and_then(|generation| generation.route().cloned());
        let steps = generations.into_iter().zip(texts).enumerate();
        let steps =
            stream::select_all(steps.map(|(index, (generation, text))| steps_of(index, generation, text)));
        Ok(Answer { prompts, route, choices, steps, output_tokens: 0, cached_tokens: 0 })
    }

    /// The next step of any choice; `None` when all are over.
    pub(crate) async fn next(&mut self) -> Option<(usize, Step)> {
        let (index, step) = self.steps.next().await?;
        if let Step::Piece(piece) | Step::End(piece, _) = &step {
            self.output_tokens += piece.drawn;
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
            choices[index].piece.append(piece);
            choices[index].finish = finish;
        }
        Ok(choices)
    }

    /// What it has cost so far.
    pub(crate) fn usage(&self) -> Usage {
        let prompt_tokens = self.prompts.iter().map(|prompt| prompt.len()).sum();
        let completion_tokens = self.output_tokens as usize;
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens: self.cached_tokens },
        }
    }
}

/// The steps of one choice. Ends, and lets go of its generation, with the last one.
fn steps_of(index: usize, generation: Generation, choice: ChoiceText) -> BoxStream<'static, (usize, Step)> {
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
    /// Tokens are drawn for the prompt's sake only.
    discards: bool,
    drawn: u32,
    next: Piece,
}

impl ChoiceText {
    fn new(model: Arc<Model>, rules: StopRules, parameters: &Parameters, echo: Option<String>) -> ChoiceText {
        ChoiceText {
            detokenizer: Detokenizer::new(&model, parameters.skip_special_tokens),
            stops: StopStrings::new(parameters.stop.clone(), parameters.include_stop),
            include_stop: parameters.include_stop,
            wants_tokens: parameters.return_token_ids || parameters.sampling.logprobs.is_some(),
            discards: rules.max_tokens == 0,
            rules,
            model,
            drawn: 0,
            next: Piece { text: echo.unwrap_or_default(), ..Piece::default() },
        }
    }

    /// What an event of the generation means; `None` if there is nothing to say yet.
    fn on(&mut self, event: GenerateEvent) -> Option<Step> {
        match event {
            // Both were there before the first token.
            GenerateEvent::Routed(_) | GenerateEvent::Scored(_) => None,
            GenerateEvent::Failed(error) => Some(Step::Failed(error)),
            GenerateEvent::Token { .. } if self.discards => None,
            GenerateEvent::Token { sampled, .. } => self.on_token(sampled),
            GenerateEvent::Finished { reason, usage } => Some(self.on_finished(reason, usage.cached_tokens)),
        }
    }

    fn on_token(&mut self, sampled: Sampled) -> Option<Step> {
        let token = sampled.token;
        self.drawn += 1;
        self.next.drawn += 1;
        if self.wants_tokens {
            self.next.tokens.push(sampled);
        }
        let text = if self.is_stop(token) && !self.include_stop {
            String::new()
        } else {
            self.detokenizer.push(&self.model, token)
        };
        let (text, stop) = self.stops.push(text);
        if let Some(stop) = stop {
            let finish =
                Finish { reason: "stop", stop_reason: Some(StopReason::Text(stop)), cached_tokens: 0 };
            return Some(Step::End(self.piece(text), finish));
        }
        (self.wants_tokens || !text.is_empty()).then(|| Step::Piece(self.piece(text)))
    }

    fn on_finished(&mut self, reason: FinishReason, cached_tokens: u32) -> Step {
        let rest = self.detokenizer.finish(&self.model);
        let (mut text, stop) = self.stops.push(rest);
        if stop.is_none() {
            text.push_str(&self.stops.finish());
        }
        let (reason, stop_reason) = match (stop, reason) {
            _ if self.discards => ("length", None),
            (Some(stop), _) => ("stop", Some(StopReason::Text(stop))),
            (None, FinishReason::Eos) => ("stop", None),
            (None, FinishReason::StopToken(token)) => ("stop", Some(StopReason::Token(token))),
            (None, FinishReason::Length) => ("length", None),
        };
        Step::End(self.piece(text), Finish { reason, stop_reason, cached_tokens })
    }

    /// What has gathered, with this text at its end.
    fn piece(&mut self, text: String) -> Piece {
        let mut piece = std::mem::take(&mut self.next);
        if piece.text.is_empty() {
            piece.text = text;
        } else {
            piece.text.push_str(&text);
        }
        piece
    }

    /// A token that ends the answer and is not part of its text.
    fn is_stop(&self, token: TokenId) -> bool {
        let named = self.rules.eos.contains(&token) || self.rules.stop_token_ids.contains(&token);
        named && self.drawn > self.rules.min_tokens
    }
}

/// A log probability as JSON has it: minus infinity is very unlikely.
pub(crate) fn json_logprob(logprob: f32) -> f64 {
    if logprob.is_finite() { f64::from(logprob) } else { -9999.0 }
}

/// Ids of tokens.
pub(crate) fn ids(tokens: &[Sampled]) -> Vec<TokenId> {
    tokens.iter().map(|sampled| sampled.token).collect()
}
