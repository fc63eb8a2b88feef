//! A small HTTP server whose every path has a fault, or none, of its own.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::digest::digest;

/// What a path answers.
#[derive(Clone)]
pub enum Route {
    /// 200 with these bytes.
    Bytes(Vec<u8>),
    /// These bytes as a mirror or a bucket serves them: with an `ETag`, and from any byte on.
    Mirror(Vec<u8>),
    /// The same, but every connection breaks after so many bytes of the body.
    Breaking(Vec<u8>, usize),
    /// 200 with these bytes and no length announced; the connection's end is the body's.
    Unannounced(Vec<u8>),
    /// These bytes, one by one, with a pause after each.
    Drip(Vec<u8>, Duration),
    /// The first once, then the other.
    Then(Box<Route>, Box<Route>),
    /// A status and nothing else.
    Status(u16),
    /// 200 with these bytes, said to be gzip.
    Coded(Vec<u8>),
    /// 302 to this place.
    Redirect(String),
    /// The head at once, then nothing for this long.
    Stall(Duration),
    /// Nothing at all for this long.
    Silence(Duration),
}

/// Buckets send one with every object, and their clients ask for it.
const MODIFIED: &str = "Last-Modified: Thu, 26 Nov 2026 12:00:00 GMT\r\n";

/// The server; it serves until the test process ends.
pub struct Server {
    port: u16,
    routes: Arc<Mutex<HashMap<String, Route>>>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

/// One request.
struct Asked {
    path: String,
    /// N of `Range: bytes=N-`.
    range: Option<u64>,
    /// The answer was 304.
    unchanged: bool,
}

impl Server {
    /// Starts on a free port of the loopback.
    pub fn start() -> Self {
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
    pub fn put(&self, path: &str, route: Route) -> String {
        self.routes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(path.to_owned(), route);
        self.url(path)
    }

    /// The URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How often a path was asked for.
    pub fn asked(&self, path: &str) -> usize {
        self.of(path, |_| ()).len()
    }

    /// From which byte on a path was asked for, each time: none is the whole.
    pub fn ranges(&self, path: &str) -> Vec<Option<u64>> {
        self.of(path, |asked| asked.range)
    }

    /// How often a path was answered with 304, that it has not changed.
    pub fn unchanged(&self, path: &str) -> usize {
        let answers = self.of(path, |asked| asked.unchanged);
        answers.into_iter().filter(|unchanged| *unchanged).count()
    }

    fn of<T>(&self, path: &str, what: impl Fn(&Asked) -> T) -> Vec<T> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = asked.iter().filter(|a| a.path == path);
        asked.map(what).collect()
    }
}

/// What a client sends that matters here.
struct Request {
    path: String,
    /// Names in lower case.
    headers: HashMap<String, String>,
}

impl Request {
    fn read(stream: &TcpStream) -> Option<Self> {
        let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
        let target = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
        // Some clients write even dots as `%2E`.
        let path = url::Url::parse(&format!("file://{target}")).ok()?;
        let path = path.to_file_path().ok()?.to_str()?.to_owned();
        let mut headers = HashMap::new();
        loop {
            let line = lines.next()?.ok()?;
            let Some((name, value)) = line.split_once(':') else {
                return Some(Self { path, headers });
            };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// N of `Range: bytes=N-`, the one form that a resumed download needs.
    fn range(&self) -> Option<u64> {
        let range = self.header("range")?.strip_prefix("bytes=")?;
        range.strip_suffix('-')?.parse().ok()
    }
}

/// What is sent, and how long nothing is before the connection ends.
struct Reply {
    status: u16,
    headers: String,
    body: Vec<u8>,
    /// Before everything.
    silence: Duration,
    /// After each byte.
    drip: Duration,
    pause: Duration,
}

impl Reply {
    /// A body whose length is announced.
    fn new(status: u16, headers: &str, body: Vec<u8>) -> Self {
        Self {
            status,
            headers: format!("{headers}Content-Length: {}\r\n", body.len()),
            body,
            silence: Duration::ZERO,
            drip: Duration::ZERO,
            pause: Duration::ZERO,
        }
    }

    fn to(request: &Request, route: Route) -> Self {
        match route {
            Route::Bytes(bytes) => Self::new(200, "", bytes),
            Route::Mirror(bytes) => Self::from_mirror(request, &bytes),
            Route::Breaking(bytes, after) => {
                let mut reply = Self::from_mirror(request, &bytes);
                reply.body.truncate(after);
                reply
            }
            Route::Unannounced(bytes) => Self {
                headers: String::new(),
                ..Self::new(200, "", bytes)
            },
            Route::Drip(bytes, drip) => Self {
                drip,
                ..Self::new(200, "", bytes)
            },
            Route::Coded(bytes) => {
                let mut reply = Self::from_mirror(request, &bytes);
                reply.headers += "Content-Encoding: gzip\r\n";
                reply
            }
            Route::Then(first, _) => Self::to(request, *first),
            Route::Status(status) => Self::new(status, "", Vec::new()),
            Route::Redirect(to) => Self::new(302, &format!("Location: {to}\r\n"), Vec::new()),
            Route::Stall(pause) => Self {
                pause,
                headers: "Content-Length: 1000\r\n".to_owned(),
                ..Self::new(200, "", Vec::new())
            },
            Route::Silence(silence) => Self {
                silence,
                ..Self::new(200, "", Vec::new())
            },
        }
    }

    fn from_mirror(request: &Request, bytes: &[u8]) -> Self {
        let tag = format!("\"{}\"", &digest(bytes)[..16]);
        let headers = format!("ETag: {tag}\r\nAccept-Ranges: bytes\r\n{MODIFIED}");
        let known = request.header("if-none-match").unwrap_or_default();
        if known
            .split(',')
            .any(|k| [tag.as_str(), "*"].contains(&k.trim()))
        {
            return Self {
                headers,
                ..Self::new(304, "", Vec::new())
            };
        }
        // Whoever holds a part of another file gets this one whole.
        let resumes = request.header("if-range").is_none_or(|held| held == tag);
        let Some(from) = request.range().filter(|_| resumes) else {
            return Self::new(200, &headers, bytes.to_vec());
        };
        let length = bytes.len();
        let rest = usize::try_from(from)
            .ok()
            .and_then(|from| bytes.get(from..));
        match rest.filter(|rest| !rest.is_empty()) {
            Some(rest) => {
                let part = format!("Content-Range: bytes {from}-{}/{length}\r\n", length - 1);
                Self::new(206, &(headers + &part), rest.to_vec())
            }
            None => {
                let part = format!("Content-Range: bytes */{length}\r\n");
                Self::new(416, &(headers + &part), Vec::new())
            }
        }
    }
}

/// What a path answers this time.
fn take(routes: &Mutex<HashMap<String, Route>>, path: &str) -> Option<Route> {
    let mut routes = routes.lock().unwrap_or_else(PoisonError::into_inner);
    let route = routes.get(path).cloned();
    if let Some(Route::Then(_, next)) = &route {
        routes.insert(path.to_owned(), Route::clone(next));
    }
    route
}

/// Answers one request and closes; an error is the client going away, which some tests mean.
fn serve(
    mut stream: TcpStream,
    routes: &Mutex<HashMap<String, Route>>,
    asked: &Mutex<Vec<Asked>>,
) -> Option<()> {
    let request = Request::read(&stream)?;
    let route = take(routes, &request.path);
    // What else a client would take, some servers would send.
    let reply = match request.header("accept-encoding") {
        Some("identity") => Reply::to(&request, route.unwrap_or(Route::Status(404))),
        Some(_) | None => Reply::new(406, "", Vec::new()),
    };
    // Before the answer, so that whoever has it finds the request here.
    asked
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(Asked {
            range: request.range(),
            unchanged: reply.status == 304,
            path: request.path,
        });
    std::thread::sleep(reply.silence);
    let (status, headers) = (reply.status, reply.headers);
    let head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\n{headers}\r\n");
    stream.write_all(head.as_bytes()).ok()?;
    if reply.drip.is_zero() {
        stream.write_all(&reply.body).ok()?;
    } else {
        for byte in &reply.body {
            stream.write_all(&[*byte]).ok()?;
            std::thread::sleep(reply.drip);
        }
    }
    std::thread::sleep(reply.pause);
    Some(())
}
