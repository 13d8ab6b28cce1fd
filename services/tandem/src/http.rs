//! A small HTTP client for the commands that talk to a running cluster.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use http_body_util::{BodyExt, BodyStream, Full};
use hyper::Request;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tandem_chassis::seam;

/// How long an answer may take to begin.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// GETs JSON. Errors are sentences that name the address.
pub async fn get_json(url: &str) -> Result<Value, String> {
    let request = Request::get(url).body(Full::<Bytes>::default()).map_err(|e| format!("{url}: {e}"))?;
    let (status, body) = seam::timeout(ANSWER_MAX, async {
        let answer = send(url, request).await?;
        let status = answer.status();
        let body = answer.into_body().collect().await.map_err(|e| format!("{url}: {e}"))?.to_bytes();
        Ok::<_, String>((status, body))
    })
    .await
    .map_err(|_| format!("{url}: no answer in {} s", ANSWER_MAX.as_secs()))??;
    let value: Value = serde_json::from_slice(&body).map_err(|e| format!("{url}: not JSON: {e}"))?;
    if status.is_success() { Ok(value) } else { Err(format!("{url}: {}", error_message(&value))) }
}

/// POSTs JSON and returns the body as it comes.
pub async fn post_stream(
    url: &str,
    body: &Value,
) -> Result<impl Stream<Item = Result<Bytes, String>> + Unpin + use<>, String> {
    let request = Request::post(url)
        .header("content-type", "application/json")
        .body(Full::from(body.to_string()))
        .map_err(|e| format!("{url}: {e}"))?;
    let answer = send(url, request).await?;
    let status = answer.status();
    if !status.is_success() {
        let body = answer.into_body().collect().await.map_err(|e| format!("{url}: {e}"))?.to_bytes();
        let value = serde_json::from_slice(&body).unwrap_or_default();
        return Err(format!("{status}: {}", error_message(&value)));
    }
    let stream = TryStreamExt::map_err(BodyStream::new(answer.into_body()), |e| e.to_string());
    Ok(Box::pin(stream.try_filter_map(async |frame| Ok(frame.into_data().ok()))))
}

async fn send(
    url: &str,
    request: Request<Full<Bytes>>,
) -> Result<hyper::Response<hyper::body::Incoming>, String> {
    let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    client.request(request).await.map_err(|error| {
        let why = if error.is_connect() {
            "nobody listens there; is the cluster up?"
        } else {
            "the connection broke"
        };
        format!("{url}: {why}")
    })
}

/// The sentence in an error body.
fn error_message(body: &Value) -> &str {
    body["error"]["message"].as_str().unwrap_or("no reason was given")
}
