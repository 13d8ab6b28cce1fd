//! What passes between the API and dispatch: one request of one choice, and the events of its answer.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tandem_types::{
    BLOCK_TOKENS, Choice, FinishReason, RequestId, Sampled, SamplingParams, ServiceClass, StopRules, Time,
    TokenId, Usage, WorkerId,
};
use tokio::sync::{mpsc, watch};

/// One choice of one request, valid and ready to be placed. Every dialect becomes this.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// The router's own name for it.
    pub id: RequestId,
    /// The client's: `x-request-id`.
    pub name: String,
    /// The model, as the API calls it.
    pub model: String,
    /// The prompt; never empty.
    pub prompt: Arc<[TokenId]>,
    /// Which of the request's answers.
    pub choice: Choice,
    /// How tokens are drawn, with a seed in any case.
    pub sampling: SamplingParams,
    /// When it ends.
    pub stop: StopRules,
    /// Whether it has latency targets.
    pub class: ServiceClass,
    /// When it is given up.
    pub deadline: Time,
    /// The tenant's salt of the block hashes.
    pub salt: Vec<u8>,
    /// When it came.
    pub arrived: Time,
    /// The trace it belongs to.
    pub traceparent: Option<String>,
    /// What it has to do with the other choices of its prompt.
    pub share: PromptShare,
    /// Nobody sees a token before the answer is whole, so it may go on elsewhere whatever breaks.
    pub unseen: bool,
    /// The prompt's own log probabilities are wanted, and so many of the likeliest tokens at each position: `echo`.
    pub score_prompt: Option<u32>,
}

/// The choices of one prompt: one leads, and the others start when somebody holds what it has computed.
#[derive(Clone, Debug, Default)]
pub enum PromptShare {
    /// There are no others, or the prompt is too short to share.
    #[default]
    Alone,
    /// Tells the others who holds the prompt; that it is over without, by being dropped.
    Leads(Arc<watch::Sender<Option<WorkerId>>>),
    /// Waits for that word.
    Follows(watch::Receiver<Option<WorkerId>>),
}

impl PromptShare {
    /// For each of `choices` choices of a prompt of so many tokens.
    pub fn among(choices: u32, prompt_tokens: usize) -> Vec<PromptShare> {
        // The last known token is always computed, so less than a block and one has nothing to share.
        if choices < 2 || prompt_tokens <= BLOCK_TOKENS as usize {
            return vec![PromptShare::Alone; choices as usize];
        }
        let (lead, follow) = watch::channel(None);
        let mut shares = vec![PromptShare::Leads(Arc::new(lead))];
        shares.resize(choices as usize, PromptShare::Follows(follow));
        shares
    }
}

/// Who did what. A worker that did both stands for both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The worker that prefilled.
    pub prefill: String,
    /// The worker that decodes.
    pub decode: String,
}

/// An event of an answer. `Finished` or `Failed` comes last, and exactly once.
#[derive(Clone, Debug, PartialEq)]
pub enum GenerateEvent {
    /// Where it went; before the first token.
    Routed(Route),
    /// The prompt's next tokens with their log probabilities, if they were wanted; all before the first token, in order,
    /// each once. The very first has none: nothing stands before it.
    Scored(Vec<Sampled>),
    /// A token.
    Token {
        /// Its index in the answer.
        position: u32,
        /// The token.
        sampled: Sampled,
    },
    /// The answer is complete.
    Finished {
        /// Why.
        reason: FinishReason,
        /// What it cost.
        usage: Usage,
    },
    /// It is over without an answer.
    Failed(DispatchError),
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum DispatchError {
    /// Too many requests wait.
    #[error("too many requests wait; try again in {} s", retry_after.as_secs())]
    Overloaded {
        /// When to try again.
        retry_after: Duration,
    },
    /// Nobody can take it.
    #[error("no worker is available: {message}")]
    NoWorker {
        /// Whom there is.
        message: String,
    },
    /// The prompt is longer than anybody can hold.
    #[error("{message}")]
    ContextLength {
        /// How long, and how much fits.
        message: String,
    },
    /// The workers do not have a feature it needs.
    #[error("{0}")]
    Unsupported(String),
    /// It took too long.
    #[error("the request's deadline has passed")]
    Deadline,
    /// Workers were lost under it.
    #[error("a worker was lost and the answer cannot go on (attempt {attempts}): {message}")]
    WorkerLost {
        /// Attempts that failed.
        attempts: u32,
        /// What happened.
        message: String,
    },
    /// The client does not read.
    #[error("{0}")]
    SlowClient(String),
    /// The router is going down.
    #[error("this router is draining")]
    Draining,
    /// A bug.
    #[error("{0}")]
    Internal(String),
}

impl DispatchError {
    /// A word for metrics.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            DispatchError::Overloaded { .. } => "overloaded",
            DispatchError::NoWorker { .. } => "no_worker",
            DispatchError::ContextLength { .. } => "context_length",
            DispatchError::Unsupported(_) => "unsupported",
            DispatchError::Deadline => "deadline",
            DispatchError::WorkerLost { .. } => "worker_lost",
            DispatchError::SlowClient(_) => "slow_client",
            DispatchError::Draining => "draining",
            DispatchError::Internal(_) => "internal",
        }
    }
}

/// An answer under way. Dropping it cancels the request everywhere at once.
#[derive(Debug)]
pub struct Generation {
    route: Option<Route>,
    scores: Vec<Sampled>,
    ahead: VecDeque<GenerateEvent>,
    events: mpsc::Receiver<GenerateEvent>,
}

impl Generation {
    /// Waits for the first event that tells whether there will be an answer.
    pub(crate) async fn begin(
        mut events: mpsc::Receiver<GenerateEvent>,
    ) -> Result<Generation, DispatchError> {
        let (mut route, mut scores) = (None, Vec::new());
        loop {
            match events.recv().await {
                Some(GenerateEvent::Routed(taken)) => route = Some(taken),
                Some(GenerateEvent::Scored(more)) => scores.extend(more),
                Some(GenerateEvent::Failed(error)) => return Err(error),
                Some(first) => {
                    return Ok(Generation { route, scores, ahead: VecDeque::from([first]), events });
                }
                None => return Err(DispatchError::Internal("the request ended without a word".into())),
            }
        }
    }

    /// Where it went.
    pub fn route(&self) -> Option<&Route> {
        self.route.as_ref()
    }

    /// The prompt's tokens with their log probabilities, once; empty if they were not wanted.
    pub fn take_scores(&mut self) -> Vec<Sampled> {
        std::mem::take(&mut self.scores)
    }

    /// The next event; a request that vanishes without a last event has failed.
    pub async fn next(&mut self) -> GenerateEvent {
        if let Some(event) = self.ahead.pop_front() {
            return event;
        }
        let lost =
            || GenerateEvent::Failed(DispatchError::Internal("the request ended without a word".into()));
        self.events.recv().await.unwrap_or_else(lost)
    }
}

/// Takes requests in. The dispatcher; in tests of the API, a script.
#[async_trait::async_trait]
pub trait Generate: Send + Sync + 'static {
    /// Resolves when the answer has begun, or with the reason why there is none.
    async fn start(&self, request: GenerateRequest) -> Result<Generation, DispatchError>;
}

#[async_trait::async_trait]
impl Generate for Arc<crate::dispatch::Dispatcher> {
    async fn start(&self, request: GenerateRequest) -> Result<Generation, DispatchError> {
        crate::dispatch::Dispatcher::start(self, request).await
    }
}
