//! Server-sent events: `data: {...}` per chunk, `data: [DONE]` after a clean end and never after an error.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures_util::stream;
use serde_json::Value;

use super::answer::{Answer, Finish, Piece, Step};
use super::error::ApiError;

/// How an endpoint writes its chunks.
pub(crate) trait Chunks: Send + 'static {
    /// Before the first piece of a choice, if anything.
    fn first(&mut self, index: usize) -> Option<Value>;
    /// A piece; with `finish` it is the last of its choice.
    fn piece(&mut self, index: usize, piece: &Piece, finish: Option<&Finish>) -> Value;
    /// After everything, if usage was asked for.
    fn usage(&mut self, usage: Value) -> Value;
}

/// An event stream over an answer. Dropping it, as a client that leaves does, cancels the answer.
pub(crate) fn respond(answer: Answer, chunks: impl Chunks, include_usage: bool) -> Response {
    let state =
        Events { answer, chunks, include_usage, begun: Vec::new(), ready: VecDeque::new(), over: false };
    let body = stream::unfold(state, |mut state| async move {
        let bytes = state.next().await?;
        Some((Ok::<_, Infallible>(bytes), state))
    });
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

struct Events<C> {
    answer: Answer,
    chunks: C,
    include_usage: bool,
    begun: Vec<usize>,
    ready: VecDeque<Bytes>,
    over: bool,
}

impl<C: Chunks> Events<C> {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                return Some(bytes);
            }
            if self.over {
                return None;
            }
            self.step().await;
        }
    }

    async fn step(&mut self) {
        match self.answer.next().await {
            Some((_, Step::Failed(error))) => {
                self.ready.push_back(event(&ApiError::from(error).body()));
                self.over = true;
            }
            Some((index, Step::Piece(piece))) => self.piece(index, &piece, None),
            Some((index, Step::End(piece, finish))) => self.piece(index, &piece, Some(&finish)),
            None => {
                if self.include_usage {
                    let usage = self.chunks.usage(self.answer.usage());
                    self.ready.push_back(event(&usage));
                }
                self.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
                self.over = true;
            }
        }
    }

    fn piece(&mut self, index: usize, piece: &Piece, finish: Option<&Finish>) {
        if !self.begun.contains(&index) {
            self.begun.push(index);
            let first = self.chunks.first(index);
            self.ready.extend(first.map(|chunk| event(&chunk)));
        }
        let chunk = self.chunks.piece(index, piece, finish);
        self.ready.push_back(event(&chunk));
    }
}

fn event(data: &Value) -> Bytes {
    // JSON has no raw line breaks, so one line is one event.
    format!("data: {data}\n\n").into()
}
