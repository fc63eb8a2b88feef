//! A small HTTP server whose every path has a fault, or none, of its own.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What a path answers.
#[derive(Clone)]
pub(crate) enum Route {
    /// 200 with these bytes.
    Bytes(Vec<u8>),
    /// 200 with these bytes and no length announced; the connection's end is the body's.
    Unannounced(Vec<u8>),
    /// A status and nothing else.
    Status(u16),
    /// 302 to this place.
    Redirect(String),
    /// The head at once, then nothing for this long.
    Stall(Duration),
}

/// The server; it serves until the test process ends.
pub(crate) struct Server {
    port: u16,
    routes: Arc<Mutex<HashMap<String, Route>>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let port = listener.local_addr().expect("a bound address").port();
        let server = Self {
            port,
            routes: Arc::default(),
            asked: Arc::default(),
        };
        let (routes, asked) = (Arc::clone(&server.routes), Arc::clone(&server.asked));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (routes, asked) = (Arc::clone(&routes), Arc::clone(&asked));
                std::thread::spawn(move || serve(stream, &routes, &asked));
            }
        });
        server
    }

    /// Puts something on a path; returns its URL.
    pub(crate) fn put(&self, path: &str, route: Route) -> String {
        self.routes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(path.to_owned(), route);
        self.url(path)
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// How often a path was asked for.
    pub(crate) fn asked(&self, path: &str) -> usize {
        self.asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .filter(|p| *p == path)
            .count()
    }
}

/// Answers one request and closes; an error is the client going away, which some tests mean.
fn serve(
    mut stream: TcpStream,
    routes: &Mutex<HashMap<String, Route>>,
    asked: &Mutex<Vec<String>>,
) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    while !lines.next()?.ok()?.is_empty() {}
    asked
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(path.clone());
    let route = routes
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get(&path)
        .cloned();
    let head =
        |status: u16, more: &str| format!("HTTP/1.1 {status} X\r\nConnection: close\r\n{more}\r\n");
    match route.unwrap_or(Route::Status(404)) {
        Route::Bytes(bytes) => {
            stream
                .write_all(head(200, &format!("Content-Length: {}\r\n", bytes.len())).as_bytes())
                .ok()?;
            stream.write_all(&bytes).ok()?;
        }
        Route::Unannounced(bytes) => {
            stream.write_all(head(200, "").as_bytes()).ok()?;
            stream.write_all(&bytes).ok()?;
        }
        Route::Status(status) => stream
            .write_all(head(status, "Content-Length: 0\r\n").as_bytes())
            .ok()?,
        Route::Redirect(to) => {
            let more = format!("Location: {to}\r\nContent-Length: 0\r\n");
            stream.write_all(head(302, &more).as_bytes()).ok()?;
        }
        Route::Stall(pause) => {
            stream
                .write_all(head(200, "Content-Length: 1000\r\n").as_bytes())
                .ok()?;
            std::thread::sleep(pause);
        }
    }
    Some(())
}
