//! The admin port as its clients see it, over real sockets.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::routing::get;
use bytes::Bytes;
use futures_util::future::FutureExt;
use http::{Method, Request, StatusCode, header};
use http_body_util::BodyExt;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tandem_chassis::admin::{self, Subject};
use tandem_chassis::http::Limits;
use tandem_chassis::{Shutdown, Tasks, seam};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;

#[derive(Default)]
struct Worker {
    draining: AtomicBool,
}

impl Subject for Worker {
    fn ready(&self) -> bool {
        !self.draining.load(Ordering::SeqCst)
    }
    fn state(&self) -> Value {
        json!({"id": "prefill-0", "state": if self.ready() { "ready" } else { "draining" }})
    }
    fn config(&self) -> Value {
        json!({"port": 7100})
    }
    fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }
    fn metrics(&self) -> String {
        "tandem_steps_total 1\n".to_owned()
    }
}

async fn client(address: SocketAddr) -> SendRequest<Body> {
    let stream = TokioIo::new(seam::connect(address).await.unwrap());
    let (sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
    drop(seam::spawn(connection.map(drop)));
    sender
}

async fn ask(address: SocketAddr, method: Method, path: &str) -> (StatusCode, String, Bytes) {
    let request =
        Request::builder().method(method).uri(path).header(header::HOST, "x").body(Body::empty()).unwrap();
    let response = client(address).await.send_request(request).await.unwrap();
    let status = response.status();
    let kind = response.headers()[header::CONTENT_TYPE].to_str().unwrap().to_owned();
    (status, kind, response.into_body().collect().await.unwrap().to_bytes())
}

#[tokio::test]
async fn every_process_answers_the_same_questions() {
    let tasks = Tasks::new();
    let shutdown = Shutdown::new();
    let listener = seam::listen("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let routes = admin::routes(Arc::new(Worker::default()))
        .merge(Router::new().route("/admin/cluster", get(|| async { axum::Json(json!({"workers": []})) })));
    tasks.spawn(admin::serve(listener, routes, shutdown.clone()));

    assert_eq!(ask(address, Method::GET, "/livez").await.0, StatusCode::OK);
    assert_eq!(ask(address, Method::GET, "/readyz").await.0, StatusCode::OK);
    let (status, kind, body) = ask(address, Method::GET, "/metrics").await;
    assert_eq!((status, kind.as_str()), (StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8"));
    assert_eq!(body, "tandem_steps_total 1\n");
    let value = |body: &Bytes| serde_json::from_slice::<Value>(body).unwrap();
    assert_eq!(value(&ask(address, Method::GET, "/admin/state").await.2)["state"], "ready");
    assert_eq!(value(&ask(address, Method::GET, "/admin/config").await.2)["port"], 7100);
    assert_eq!(value(&ask(address, Method::GET, "/admin/cluster").await.2), json!({"workers": []}));

    let (status, kind, body) = ask(address, Method::GET, "/nowhere").await;
    assert_eq!((status, kind.as_str()), (StatusCode::NOT_FOUND, "application/json"));
    assert_eq!(value(&body)["error"]["code"], "not_found");
    let (status, _, body) = ask(address, Method::GET, "/admin/drain").await;
    assert_eq!(
        (status, &value(&body)["error"]["code"]),
        (StatusCode::METHOD_NOT_ALLOWED, &json!("method_not_allowed"))
    );
    assert_eq!(value(&ask(address, Method::GET, "/admin/state").await.2)["state"], "ready");

    let (status, _, body) = ask(address, Method::POST, "/admin/drain").await;
    assert_eq!((status, &value(&body)["state"]), (StatusCode::OK, &json!("draining")));
    let (status, _, body) = ask(address, Method::GET, "/readyz").await;
    assert_eq!(
        (status, &value(&body)["error"]["code"]),
        (StatusCode::SERVICE_UNAVAILABLE, &json!("not_ready"))
    );

    shutdown.drain();
    assert_eq!(ask(address, Method::GET, "/livez").await.0, StatusCode::OK);
    let idle = client(address).await;
    shutdown.stop();
    assert_eq!(tasks.shutdown(Duration::from_secs(30)).await, 0);
    drop(idle);
    assert!(seam::connect(address).await.is_err());
}

fn with(header_timeout: Duration, grace: Duration) -> Limits {
    Limits { connections_max: 1, header_timeout, grace, ..Limits::default() }
}

#[tokio::test]
async fn an_answer_under_way_gets_its_grace() {
    let (asked, answer) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let routes = Router::new().route(
        "/slow",
        get({
            let (asked, answer) = (asked.clone(), answer.clone());
            move || async move {
                asked.notify_one();
                answer.notified().await;
                "done"
            }
        }),
    );
    let shutdown = Shutdown::new();
    let listener = seam::listen("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let minute = Duration::from_secs(60);
    let server =
        seam::spawn(tandem_chassis::http::serve(listener, routes, with(minute, minute), shutdown.clone()));
    let client = seam::spawn(async move { ask(address, Method::GET, "/slow").await });
    asked.notified().await;
    shutdown.stop();
    // The port is closed before the answer is there.
    while seam::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    answer.notify_one();
    assert_eq!(client.await.unwrap().2, "done");
    server.await.unwrap();
}

#[tokio::test]
async fn a_client_that_sends_no_request_gives_up_its_place() {
    let routes = Router::new().route("/", get(|| async { "here" }));
    let shutdown = Shutdown::new();
    let listener = seam::listen("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let limits = with(Duration::from_millis(50), Duration::ZERO);
    let server = seam::spawn(tandem_chassis::http::serve(listener, routes, limits, shutdown.clone()));
    let mut silent = seam::connect(address).await.unwrap();
    silent.write_all(b"GET / HT").await.unwrap();
    // One connection at most: this one is served only after the silent one was ended.
    assert_eq!(ask(address, Method::GET, "/").await.2, "here");
    let mut left = Vec::new();
    let _ = silent.read_to_end(&mut left).await;
    assert!(!String::from_utf8_lossy(&left).contains("200 OK"));
    shutdown.stop();
    server.await.unwrap();
}
