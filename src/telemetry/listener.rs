//! Serves HTTP: metrics and pages. The only place that knows hyper: axum's own server has no time-out
//! for a client that connects and sends nothing.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Simultaneous connections; further ones wait until one ends.
const AT_ONCE: usize = 64;
/// How long a client may take to send its request. No keep-alive: one response per connection.
const TO_ASK: Duration = Duration::from_secs(10);
/// Delay before accepting again when there are no file descriptors left.
const AGAIN: Duration = Duration::from_secs(1);

/// Limits of connections.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    at_once: usize,
    to_ask: Duration,
    /// From the first byte to the last; none = no limit.
    in_all: Option<Duration>,
}

impl Limits {
    /// For small responses.
    pub const SHORT: Self = Self {
        at_once: AT_ONCE,
        to_ask: TO_ASK,
        in_all: Some(Duration::from_secs(30)),
    };
    /// For event streams.
    pub const LASTING: Self = Self {
        in_all: None,
        ..Self::SHORT
    };
}

/// Serves until it is dropped.
pub async fn serve(listener: TcpListener, routes: Router, limits: Limits) {
    let places = Arc::new(Semaphore::new(limits.at_once));
    // The semaphore is never closed.
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection to the HTTP listener");
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(routes.clone());
        tokio::spawn(async move {
            let serving = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(limits.to_ask)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            let in_all = limits.in_all.unwrap_or(Duration::MAX);
            match tokio::time::timeout(in_all, serving).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::debug!(%error, %peer, "a connection to the HTTP listener ended early");
                }
                Err(_) => tracing::debug!(%peer, "a client of the HTTP listener reads too slowly"),
            }
            drop(place);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    #[tokio::test]
    async fn clients_that_say_nothing_make_room() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let routes = Router::new().route("/", get(async || "here"));
        let limits = Limits {
            at_once: 2,
            to_ask: Duration::from_millis(200),
            in_all: None,
        };
        tokio::spawn(serve(listener, routes, limits));
        let mut silent = TcpStream::connect(address).await.unwrap();
        let mut slow = TcpStream::connect(address).await.unwrap();
        slow.write_all(b"GET / HTTP/1.1\r\nHost: ").await.unwrap();
        let mut third = TcpStream::connect(address).await.unwrap();
        third
            .write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            .await
            .unwrap();
        let mut answer = String::new();
        third.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("here"), "{answer}");
        // The others were let go: all that is left to read is the end, or a last word before it.
        for client in [&mut silent, &mut slow] {
            let mut rest = String::new();
            client.read_to_string(&mut rest).await.unwrap();
            assert!(!rest.contains("here"), "{rest}");
        }
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_and_one_that_goes_on_asking_make_room() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        // More than the buffers of two sockets take.
        let routes = Router::new()
            .route("/large", get(async || vec![b'x'; 64 << 20]))
            .route("/", get(async || "here"));
        let limits = Limits {
            at_once: 1,
            to_ask: Duration::from_secs(60),
            in_all: Some(Duration::from_millis(300)),
        };
        tokio::spawn(serve(listener, routes, limits));
        let ask = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let mut deaf = TcpStream::connect(address).await.unwrap();
        deaf.write_all(ask("/large").as_bytes()).await.unwrap();
        let mut eager = TcpStream::connect(address).await.unwrap();
        eager
            .write_all(ask("/").repeat(50).as_bytes())
            .await
            .unwrap();
        let mut last = TcpStream::connect(address).await.unwrap();
        last.write_all(ask("/").as_bytes()).await.unwrap();
        let mut answer = String::new();
        last.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("here"), "{answer}");
        // What it asked beyond the first may cost it the rest of its answer.
        let mut answers = Vec::new();
        drop(eager.read_to_end(&mut answers).await);
        let answers = String::from_utf8(answers).unwrap();
        assert!(answers.matches("here").count() <= 1, "{answers}");
    }
}
