//! A TCP proxy between a worker and a service, with the faults that networks have.

use std::time::Duration;

use testkit::aggregator::runtime;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use url::Url;

/// Pieces on their way in one direction; more are left to the sockets, so that a sender notices.
const UNDERWAY: usize = 16;
/// A throttled direction moves this often.
const DRIP: Duration = Duration::from_millis(50);

/// What becomes of the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// They arrive.
    Pass,
    /// Every connection is reset, a new one at once.
    Cut,
    /// They arrive this much later, in both directions.
    Delay(Duration),
    /// So many arrive in a second, in each direction.
    Throttle(u32),
    /// Connections are accepted and stay open; what is sent is swallowed and nothing comes back.
    /// They are reset when this ends: somebody who was away does not know them any more.
    HalfOpen,
}

/// A listener in front of one service.
pub(crate) struct Proxy {
    url: Url,
    mode: watch::Sender<Mode>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// Listens in front of a service. Where it has several nodes, a connection goes to the first that
    /// takes it.
    pub(crate) fn before(nodes: &[String]) -> Self {
        let urls = nodes
            .iter()
            .map(|node| Url::parse(node).expect("a well-formed url"));
        let urls: Vec<Url> = urls.collect();
        let targets = urls
            .iter()
            .map(|url| url.port().expect("a url with a port"));
        let targets: Vec<u16> = targets.collect();
        let mut url = urls.into_iter().next().expect("at least one node");
        let listener = runtime()
            .block_on(TcpListener::bind(("127.0.0.1", 0)))
            .expect("a free port");
        let port = listener.local_addr().expect("a bound address").port();
        url.set_port(Some(port)).expect("a url that has ports");
        let (mode, modes) = watch::channel(Mode::Pass);
        let accepting = runtime().spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, targets.clone(), modes.clone()));
            }
        });
        Self {
            url,
            mode,
            accepting,
        }
    }

    /// The service's URL by way of the proxy.
    pub(crate) fn url(&self) -> &str {
        self.url.as_str()
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// One connection, from its first byte to its end.
async fn carry(mut client: TcpStream, targets: Vec<u16>, modes: watch::Receiver<Mode>) {
    let at_first = *modes.borrow();
    match at_first {
        Mode::Cut => reset(&client),
        Mode::HalfOpen => {
            doomed(modes).await;
            reset(&client);
        }
        Mode::Pass | Mode::Delay(_) | Mode::Throttle(_) => {
            let Some(mut server) = first(&targets).await else {
                return reset(&client);
            };
            if !join(&mut client, &mut server, modes).await {
                reset(&client);
                reset(&server);
            }
        }
    }
}

async fn first(targets: &[u16]) -> Option<TcpStream> {
    for target in targets {
        if let Ok(server) = TcpStream::connect(("127.0.0.1", *target)).await {
            return Some(server);
        }
    }
    None
}

/// Resets when dropped; an error is a peer that was faster.
fn reset(stream: &TcpStream) {
    stream.set_zero_linger().ok();
}

/// Carries both directions. True = both ended in order.
async fn join(
    client: &mut TcpStream,
    server: &mut TcpStream,
    modes: watch::Receiver<Mode>,
) -> bool {
    client.set_nodelay(true).ok();
    server.set_nodelay(true).ok();
    let (client_out, client_in) = client.split();
    let (server_out, server_in) = server.split();
    let there = pump(client_out, server_in, modes.clone());
    let back = pump(server_out, client_in, modes.clone());
    tokio::select! {
        () = doomed(modes) => false,
        done = async { tokio::try_join!(there, back) } => done.is_ok(),
    }
}

/// Resolves when the connection has to be reset.
async fn doomed(mut modes: watch::Receiver<Mode>) {
    let mut open = true;
    loop {
        let mode = *modes.borrow_and_update();
        if mode == Mode::Cut || !open {
            return;
        }
        // Once half open it is doomed, and goes with the next change.
        open = mode != Mode::HalfOpen;
        if modes.changed().await.is_err() {
            return;
        }
    }
}

/// Carries one direction to its end.
async fn pump(
    from: ReadHalf<'_>,
    to: WriteHalf<'_>,
    modes: watch::Receiver<Mode>,
) -> std::io::Result<()> {
    let (pieces, underway) = mpsc::channel(UNDERWAY);
    tokio::try_join!(take(from, pieces, modes.clone()), give(to, underway, modes))?;
    Ok(())
}

/// A piece and when it is due.
type Piece = (Instant, Vec<u8>);

async fn take(
    mut from: ReadHalf<'_>,
    pieces: mpsc::Sender<Piece>,
    modes: watch::Receiver<Mode>,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = from.read(&mut buffer).await?;
        let mode = *modes.borrow();
        match mode {
            // The end is swallowed as well.
            Mode::HalfOpen if read == 0 => std::future::pending().await,
            Mode::HalfOpen => continue,
            Mode::Pass | Mode::Cut | Mode::Delay(_) | Mode::Throttle(_) if read == 0 => {
                return Ok(());
            }
            Mode::Pass | Mode::Cut | Mode::Delay(_) | Mode::Throttle(_) => {}
        }
        let late = match mode {
            Mode::Delay(late) => late,
            Mode::Pass | Mode::Cut | Mode::Throttle(_) | Mode::HalfOpen => Duration::ZERO,
        };
        let piece = (Instant::now() + late, buffer[..read].to_vec());
        if pieces.send(piece).await.is_err() {
            return Ok(());
        }
    }
}

async fn give(
    mut to: WriteHalf<'_>,
    mut underway: mpsc::Receiver<Piece>,
    modes: watch::Receiver<Mode>,
) -> std::io::Result<()> {
    while let Some((due, piece)) = underway.recv().await {
        tokio::time::sleep_until(due).await;
        let mut rest = piece.as_slice();
        while !rest.is_empty() {
            let mode = *modes.borrow();
            let part = match mode {
                Mode::HalfOpen => break,
                Mode::Throttle(rate) => {
                    tokio::time::sleep(DRIP).await;
                    (rate as usize / 20).clamp(1, rest.len())
                }
                Mode::Pass | Mode::Cut | Mode::Delay(_) => rest.len(),
            };
            to.write_all(&rest[..part]).await?;
            rest = &rest[part..];
        }
    }
    to.shutdown().await
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    const SHORT: Duration = Duration::from_millis(200);

    /// A proxy before a server that says everything again.
    fn echo() -> Proxy {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let port = listener.local_addr().expect("a bound address").port();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
            }
        });
        Proxy::before(&[format!("redis://127.0.0.1:{port}/0")])
    }

    fn connect(proxy: &Proxy) -> TcpStream {
        let port = Url::parse(proxy.url()).expect("a url").port();
        let stream = TcpStream::connect(("127.0.0.1", port.expect("a port"))).expect("it listens");
        stream.set_read_timeout(Some(20 * SHORT)).expect("a socket");
        stream
    }

    /// Sends that many bytes and waits for them to come back.
    fn round_trip(mut stream: &TcpStream, size: usize) -> std::io::Result<Duration> {
        let began = std::time::Instant::now();
        stream.write_all(&vec![7; size])?;
        stream.read_exact(&mut vec![0; size])?;
        Ok(began.elapsed())
    }

    #[test]
    fn bytes_pass_late_or_in_drops() {
        let proxy = echo();
        let stream = connect(&proxy);
        round_trip(&stream, 100_000).expect("they pass");
        proxy.set(Mode::Delay(SHORT));
        assert!(round_trip(&stream, 10).expect("they pass late") >= 2 * SHORT);
        proxy.set(Mode::Throttle(10_000));
        assert!(round_trip(&stream, 4_000).expect("they drip") >= 2 * SHORT);
        proxy.set(Mode::Pass);
        round_trip(&stream, 100_000).expect("the same connection has lost nothing");
    }

    #[test]
    fn a_cut_is_a_reset_and_half_open_is_silence_with_a_reset_at_its_end() {
        let proxy = echo();
        let old = connect(&proxy);
        round_trip(&old, 1).expect("it passes");
        proxy.set(Mode::HalfOpen);
        let young = connect(&proxy);
        for mut stream in [&old, &young] {
            stream.set_read_timeout(Some(SHORT)).expect("a socket");
            stream.write_all(&[7]).expect("it is taken");
            let silence = stream.read(&mut [0]).expect_err("nothing comes back");
            assert_eq!(silence.kind(), std::io::ErrorKind::WouldBlock);
        }
        proxy.set(Mode::Pass);
        let reset = |stream: &TcpStream| {
            stream.set_read_timeout(Some(20 * SHORT)).expect("a socket");
            let mut stream = stream;
            let error = stream.read(&mut [0]).expect_err("it is reset");
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        };
        reset(&old);
        reset(&young);
        let third = connect(&proxy);
        round_trip(&third, 1).expect("a new connection passes");
        proxy.set(Mode::Cut);
        reset(&third);
    }
}
