//! Server-sent events: `data: {...}` per chunk, `data: [DONE]` after a clean end and never after an error.

use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures_util::{FutureExt, stream};
use serde::Serialize;

use super::answer::{Answer, Finish, Piece, Step, Usage};
use super::error::ApiError;

/// How an endpoint writes its chunks, with [`event`].
pub(crate) trait Chunks: Send + 'static {
    /// A piece; `first` of its choice or not, and with `finish` the last.
    fn piece(&mut self, out: &mut Vec<u8>, index: usize, piece: Piece, first: bool, finish: Option<&Finish>);
    /// After everything, if usage was asked for.
    fn usage(&mut self, out: &mut Vec<u8>, usage: Usage);
}

/// So many bytes of what is ready at once make one write.
const WRITE_BYTES: usize = 16 << 10;

/// An event stream over an answer. Dropping it, as a client that leaves does, cancels the answer.
pub(crate) fn respond(answer: Answer, chunks: impl Chunks, include_usage: bool) -> Response {
    let begun = vec![false; answer.choices];
    let state = Events { answer, chunks, include_usage, begun, over: false };
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
    begun: Vec<bool>,
    over: bool,
}

impl<C: Chunks> Events<C> {
    /// The next events: all that are ready, in one piece.
    async fn next(&mut self) -> Option<Bytes> {
        if self.over {
            return None;
        }
        let mut out = Vec::with_capacity(512);
        let step = self.answer.next().await;
        self.step(&mut out, step);
        while !self.over && out.len() < WRITE_BYTES {
            let Some(step) = self.answer.next().now_or_never() else { break };
            self.step(&mut out, step);
        }
        Some(out.into())
    }

    fn step(&mut self, out: &mut Vec<u8>, step: Option<(usize, Step)>) {
        match step {
            Some((_, Step::Failed(error))) => {
                event(out, &ApiError::from(error).body());
                self.over = true;
            }
            Some((index, Step::Piece(piece))) => self.piece(out, index, piece, None),
            Some((index, Step::End(piece, finish))) => self.piece(out, index, piece, Some(&finish)),
            None => {
                if self.include_usage {
                    self.chunks.usage(out, self.answer.usage());
                }
                out.extend_from_slice(b"data: [DONE]\n\n");
                self.over = true;
            }
        }
    }

    fn piece(&mut self, out: &mut Vec<u8>, index: usize, piece: Piece, finish: Option<&Finish>) {
        let first = !std::mem::replace(&mut self.begun[index], true);
        self.chunks.piece(out, index, piece, first, finish);
    }
}

/// Writes one event. JSON has no raw line breaks, so one line is one event.
pub(crate) fn event(out: &mut Vec<u8>, data: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *out, data).expect("what we send is JSON, and memory takes it");
    out.extend_from_slice(b"\n\n");
}
