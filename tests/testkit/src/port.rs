//! Ports on the loopback.

use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A port that was free a moment ago and is given to nobody else: below those that the system hands out, and from
/// another place on for each process, since some run side by side.
pub fn free_port() -> u16 {
    const LOWEST: u32 = 11_000;
    const PROCESSES: u32 = 100;
    const EACH: u32 = 200;
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id() % PROCESSES * EACH;
    loop {
        let given = GIVEN.fetch_add(1, Ordering::Relaxed);
        let port = LOWEST + (first + given) % (PROCESSES * EACH);
        let port = u16::try_from(port).expect("a port");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Whether somebody listens on the port.
pub(crate) fn listening(port: u16) -> bool {
    let address = ([127, 0, 0, 1], port).into();
    TcpStream::connect_timeout(&address, Duration::from_millis(500)).is_ok()
}
