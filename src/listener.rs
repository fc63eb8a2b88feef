//! Serves HTTP to whoever reads: metrics and pages. The only place that knows hyper, for axum's own
//! loop waits for ever for a client that connects and says nothing.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Connections at a time; others wait until one ends.
const AT_ONCE: usize = 64;
/// How long a connection may take to ask, the first time and each time after.
const TO_ASK: Duration = Duration::from_secs(10);
/// After which it is tried again to take a connection, when there are no descriptors left.
const AGAIN: Duration = Duration::from_secs(1);

/// Answers until it is dropped.
pub async fn serve(listener: TcpListener, routes: Router) {
    within(listener, routes, AT_ONCE, TO_ASK).await;
}

async fn within(listener: TcpListener, routes: Router, at_once: usize, to_ask: Duration) {
    let places = Arc::new(Semaphore::new(at_once));
    // It is never closed.
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection to our HTTP listener cannot be taken");
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(routes.clone());
        tokio::spawn(async move {
            let serving = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(to_ask)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = serving.await {
                tracing::debug!(%error, %peer, "a connection to our HTTP listener ended early");
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
        let to_ask = Duration::from_millis(200);
        tokio::spawn(within(listener, routes, 2, to_ask));
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
}
