//! Answers container probes on an abstract Unix socket named after the worker, from a thread that
//! depends on neither Redis nor the broker.

use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::protocol::state::Phase;
use crate::telemetry::status::WorkerStatus;

const TIMEOUT: Duration = Duration::from_secs(2);

/// What a worker reports about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Health {
    /// The process responds.
    pub live: bool,
    /// It takes jobs.
    pub ready: bool,
}

fn address(namespace: &str, worker_id: &str) -> std::io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("scorer/{namespace}/{worker_id}"))
}

/// Answers probes until the process ends.
///
/// # Errors
/// When another process already answers under this name.
pub fn serve(
    namespace: &str,
    worker_id: &str,
    status: Arc<WorkerStatus>,
    phase: watch::Receiver<Phase>,
) -> std::io::Result<()> {
    let listener = UnixListener::bind_addr(&address(namespace, worker_id)?)?;
    let answer = move || {
        for stream in listener.incoming() {
            let ready = status.ready(*phase.borrow());
            let word: &[u8] = if ready { b"ready" } else { b"live" };
            if let Err(error) = stream.and_then(|mut stream| stream.write_all(word)) {
                tracing::debug!(%error, "a probe disconnected");
            }
        }
    };
    std::thread::Builder::new()
        .name("scorer-health".into())
        .spawn(answer)
        .map(drop)
}

/// Asks the worker with this name on this host.
pub fn ask(namespace: &str, worker_id: &str) -> Health {
    let asked = || -> std::io::Result<String> {
        let mut stream = UnixStream::connect_addr(&address(namespace, worker_id)?)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut word = String::new();
        stream.read_to_string(&mut word)?;
        Ok(word)
    };
    let word = asked().unwrap_or_default();
    Health {
        live: !word.is_empty(),
        ready: word == "ready",
    }
}
