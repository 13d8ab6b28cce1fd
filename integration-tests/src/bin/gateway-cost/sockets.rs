//! Clients that are no load but a burden: those that stay connected, and those that do not read.

use std::net::SocketAddr;
use std::time::Duration;

use tandem_chassis::group::Group;
use tandem_chassis::seam;
use tandem_integration_tests::measure::at_rest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// Time after which memory is what it will be.
const SETTLE: Duration = Duration::from_secs(2);
/// Requests that are sent at a time while many connections are made.
const BATCH: usize = 64;
/// Time in which an answer to nothing in particular comes, or never.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// What a slow reader's system takes in for it.
const RECEIVE_BYTES: u32 = 16 << 10;

/// What idle connections cost.
pub struct Idle {
    /// Resident KiB per connection that was held.
    pub during: f64,
    /// How much of that was left when they had gone.
    pub after: f64,
    /// Connections that were not held: not answered within [`ANSWER_MAX`], or closed before they were counted.
    pub refused: usize,
}

/// Opens `count` connections, sends a request on each, and leaves them be.
pub async fn idle(address: SocketAddr, group: Group, count: usize) -> Result<Idle, String> {
    let before = at_rest(group).await;
    let mut open = Vec::with_capacity(count);
    while open.len() < count {
        let batch = (0..BATCH.min(count - open.len())).map(|_| connected(address));
        match seam::timeout(ANSWER_MAX, futures_util::future::try_join_all(batch)).await {
            Ok(batch) => open.extend(batch?),
            Err(_) => break, // it takes no more
        }
    }
    let during = at_rest(group).await;
    let still_open = |stream: &&TcpStream| {
        let read = stream.try_read(&mut [0; 1]);
        read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    };
    let held = open.iter().filter(still_open).count();
    drop(open);
    let per = |bytes: u64| bytes.saturating_sub(before) as f64 / 1024.0 / held.max(1) as f64;
    Ok(Idle { during: per(during), after: per(at_rest(group).await), refused: count - held })
}

/// A connection on which one request has been answered.
async fn connected(address: SocketAddr) -> Result<TcpStream, String> {
    let mut stream = seam::connect_tcp(address).await.map_err(|error| format!("{address}: {error}"))?;
    stream
        .write_all(b"GET /v1/models HTTP/1.1\r\nhost: bench\r\n\r\n")
        .await
        .map_err(|error| error.to_string())?;
    let mut bytes = [0; 4096];
    match stream.read(&mut bytes).await {
        Ok(0) => Err("a connection was closed before its answer".to_owned()),
        Ok(_) => Ok(stream),
        Err(error) => Err(error.to_string()),
    }
}

/// Seconds until a gateway closes connections on which a request's head comes a byte a second; half of them are
/// closed by then. `most` where they are not.
pub async fn slow_heads(address: SocketAddr, count: usize, most: Duration) -> Result<f64, String> {
    let heads = (0..count).map(|_| slow_head(address, most));
    let mut seconds = futures_util::future::try_join_all(heads).await?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[count / 2])
}

async fn slow_head(address: SocketAddr, most: Duration) -> Result<f64, String> {
    let stream = seam::connect_tcp(address).await.map_err(|error| format!("{address}: {error}"))?;
    let (mut reads, mut writes) = stream.into_split();
    let began = seam::now();
    writes
        .write_all(b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\nx-slow: ")
        .await
        .map_err(|error| error.to_string())?;
    let drips = async {
        let mut second = seam::interval(Duration::from_secs(1));
        while writes.write_all(b"x").await.is_ok() {
            second.tick().await;
        }
        // The reader learns of the end first.
        std::future::pending::<()>().await;
    };
    let closed = async {
        let mut bytes = [0; 1024];
        // It may say why before it closes.
        while reads.read(&mut bytes).await.is_ok_and(|read| read > 0) {}
    };
    tokio::select! {
        () = drips => {}
        ended = seam::timeout(most, closed) => drop(ended),
    }
    Ok(seam::now().since(began).as_secs_f64())
}

/// Resident KiB per stream whose client does not read, once it grows no more.
pub async fn slow_readers(
    address: SocketAddr,
    model: &str,
    group: Group,
    count: usize,
    tokens: u32,
) -> Result<f64, String> {
    let before = at_rest(group).await;
    let mut open = Vec::new();
    for number in 0..count {
        let body = serde_json::json!({
            "model": model, "prompt": format!("{number} time"), "max_tokens": tokens, "stream": true,
            "ignore_eos": true,
        });
        let body = body.to_string();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {}\
             \r\n\r\n",
            body.len()
        );
        let socket = TcpSocket::new_v4().map_err(|error| error.to_string())?;
        socket.set_recv_buffer_size(RECEIVE_BYTES).map_err(|error| error.to_string())?;
        let mut stream = socket.connect(address).await.map_err(|error| format!("{address}: {error}"))?;
        stream.write_all(&[head, body].concat().into_bytes()).await.map_err(|error| error.to_string())?;
        open.push(stream);
    }
    let mut most = 0;
    // Until it has not grown for a while.
    for _ in 0..15 {
        seam::sleep(SETTLE).await;
        let now = group.resident_bytes();
        if now <= most + most / 100 {
            break;
        }
        most = now;
    }
    Ok(most.saturating_sub(before) as f64 / 1024.0 / count as f64)
}
