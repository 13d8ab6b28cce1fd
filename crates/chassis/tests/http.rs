//! Connections that lie idle give back everything but their socket, and nobody who speaks on them notices.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::routing::{get, post};
use tandem_chassis::http::{Limits, serve};
use tandem_chassis::{Shutdown, seam};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A port whose connections give their buffers back as soon as an answer is written.
async fn hasty(router: Router) -> (TcpStream, Shutdown) {
    let listener = seam::listen("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let shutdown = Shutdown::new();
    let limits = Limits { linger: Duration::ZERO, ..Limits::default() };
    seam::spawn(serve(listener, router, limits, shutdown.clone()));
    (seam::connect_tcp(address).await.expect("it listens"), shutdown)
}

/// Reads until so many answers that end in `done` have come.
async fn answers(stream: &mut TcpStream, count: usize) -> String {
    let mut read = Vec::new();
    while String::from_utf8_lossy(&read).matches("done").count() < count {
        let mut bytes = [0; 1024];
        let more = stream.read(&mut bytes).await.expect("the connection holds");
        assert!(more > 0, "closed after {:?}", String::from_utf8_lossy(&read));
        read.extend_from_slice(&bytes[..more]);
    }
    String::from_utf8(read).expect("text")
}

fn done() -> Router {
    Router::new()
        .route("/", get(|| async { "done" }).post(|body: String| async move { format!("{body} done") }))
}

#[tokio::test]
async fn one_connection_carries_many_requests_with_pauses_between_them() {
    let (mut stream, _shutdown) = hasty(done()).await;
    for at in 0..5 {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("it is open");
        assert!(answers(&mut stream, 1).await.starts_with("HTTP/1.1 200"));
        let body = format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n{at}");
        stream.write_all(body.as_bytes()).await.expect("it is open");
        assert!(answers(&mut stream, 1).await.ends_with(&format!("{at} done")));
        // Whether it has given back its buffers by now or not must not matter.
        seam::sleep(Duration::from_millis(5 * at)).await;
    }
}

#[tokio::test]
async fn bytes_that_came_before_their_turn_are_not_lost() {
    let (mut stream, _shutdown) = hasty(done()).await;
    let head = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    for cut in [1, 4, head.len() - 1] {
        let (begin, rest) = head.split_at(cut);
        stream.write_all(format!("{head}{head}{begin}").as_bytes()).await.expect("it is open");
        answers(&mut stream, 2).await;
        seam::sleep(Duration::from_millis(10)).await;
        stream.write_all(rest.as_bytes()).await.expect("it is open");
        answers(&mut stream, 1).await;
    }
}

#[tokio::test]
async fn the_rest_of_a_body_is_never_taken_for_a_request() {
    let asked = Arc::new(AtomicUsize::new(0));
    let secret = {
        let asked = asked.clone();
        move || async move {
            asked.fetch_add(1, Ordering::SeqCst);
            "done"
        }
    };
    // An answer that does not wait for the body.
    let router = done().route("/early", post(|_body: Body| async { "done" })).route("/secret", get(secret));
    let (mut stream, _shutdown) = hasty(router).await;
    let inner = "GET /secret HTTP/1.1\r\nhost: a\r\n\r\n";
    let head = format!("POST /early HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", 3 * inner.len());
    stream.write_all(head.as_bytes()).await.expect("it is open");
    answers(&mut stream, 1).await;
    for _ in 0..3 {
        seam::sleep(Duration::from_millis(10)).await;
        let _ = stream.write_all(inner.as_bytes()).await; // it may have been closed
    }
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
    assert_eq!(String::from_utf8_lossy(&rest), "", "nothing but the end");
    assert_eq!(asked.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn an_idle_connection_ends_with_its_client_and_with_the_process() {
    let (mut stream, shutdown) = hasty(done()).await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("it is open");
    answers(&mut stream, 1).await;
    shutdown.stop();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.expect("closed in order");
    assert!(rest.is_empty());
}
