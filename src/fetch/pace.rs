//! Enforces `candidates.min_rate`, so that a slow server cannot hold up a worker.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout};

use super::{ByteStream, FetchError};

/// The window over which a server's rate is measured.
const OVER: Duration = Duration::from_secs(5);

/// The rate of one response. Only time spent waiting for the server counts, not the time that the
/// disk and the digest take in between.
#[derive(Debug)]
pub struct Pace {
    /// `candidates.min_rate`
    least: u64,
    over: Duration,
    /// Time waited since the last measurement.
    waited: Duration,
    /// Bytes received since the last measurement.
    came: u64,
}

impl Pace {
    /// Starts measuring a response that must bring at least `least` bytes per second.
    pub fn new(least: u64) -> Self {
        Self {
            least,
            over: OVER,
            waited: Duration::ZERO,
            came: 0,
        }
    }

    /// The stream's next chunk; `None` at the end.
    ///
    /// # Errors
    /// As [`ByteStream::chunk`]; `Slow` when too few bytes arrived.
    pub async fn next(&mut self, body: &mut ByteStream) -> Result<Option<Bytes>, FetchError> {
        loop {
            if self.waited >= self.over {
                self.judge(body.place())?;
            }
            let (began, most) = (Instant::now(), self.over.saturating_sub(self.waited));
            let next = timeout(most, body.chunk()).await;
            // Capped, so that a suspended or starved process does not blame the server.
            self.waited += began.elapsed().min(most);
            if let Ok(chunk) = next {
                let chunk = chunk?;
                self.came += chunk.as_ref().map_or(0, |chunk| chunk.len() as u64);
                return Ok(chunk);
            }
        }
    }

    fn judge(&mut self, place: &str) -> Result<(), FetchError> {
        let (came, least, over) = (self.came, self.least, self.over.as_secs());
        (self.waited, self.came) = (Duration::ZERO, 0);
        if came >= least.saturating_mul(over) {
            return Ok(());
        }
        Err(FetchError::Slow(format!(
            "{place}: sent {came} bytes in {over} s; candidates.min_rate = {least} bytes per second"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::stream::Transport;
    use futures_util::StreamExt;

    const SECOND: Duration = Duration::from_secs(1);

    /// A body of which a byte comes each time the pause is over.
    fn dripping(pause: Duration, bytes: usize) -> ByteStream {
        let drops = futures_util::stream::iter(0..bytes).then(move |_| async move {
            tokio::time::sleep(pause).await;
            Ok(Bytes::from_static(b"x"))
        });
        ByteStream {
            place: "http://h/f".into(),
            from: 0,
            at: 0,
            most: u64::MAX,
            revision: None,
            transport: Transport::Http(drops.boxed()),
        }
    }

    /// How many bytes come at this least rate, judged over a second, each with so much to do afterwards;
    /// and what ends them.
    async fn take(least: u64, mut body: ByteStream, busy: Duration) -> (usize, Option<FetchError>) {
        let mut pace = Pace {
            over: SECOND,
            ..Pace::new(least)
        };
        for came in 0.. {
            match pace.next(&mut body).await {
                Ok(Some(_)) => tokio::time::sleep(busy).await,
                Ok(None) => return (came, None),
                Err(error) => return (came, Some(error)),
            }
        }
        unreachable!("a body ends")
    }

    #[tokio::test]
    async fn who_sends_less_than_the_least_is_left_and_the_key_is_named() {
        let (came, error) = take(100, dripping(SECOND / 10, 30), Duration::ZERO).await;
        let Some(FetchError::Slow(why)) = error else {
            panic!("{error:?}");
        };
        assert!((1..=10).contains(&came), "{came}");
        let named = "bytes in 1 s; candidates.min_rate = 100 bytes per second";
        assert!(
            why.starts_with("http://h/f: sent ") && why.ends_with(named),
            "{why}"
        );
        assert_eq!(
            take(0, dripping(SECOND / 10, 15), Duration::ZERO).await,
            (15, None)
        );
        let silent = dripping(SECOND * 60, 1);
        let (came, error) = take(1, silent, Duration::ZERO).await;
        assert!(came == 0 && matches!(error, Some(FetchError::Slow(_))));
    }

    #[tokio::test]
    async fn what_the_disk_takes_is_not_the_servers_slowness() {
        // Over all it is 5 bytes per second; while somebody waits for them it is far more.
        let quick = dripping(Duration::from_millis(1), 12);
        assert_eq!(take(20, quick, SECOND / 5).await, (12, None));
    }
}
