//! Signals from people, shells and supervisors. None of them may end the worker during a job, because
//! that would count as a crash of the job.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::worker::Wish;

/// Signals within this time of the first count as one: a closing terminal, or Ctrl-C in it, reaches the
/// worker in several ways, and systemd sends a pair.
const TOGETHER: Duration = Duration::from_millis(200);

/// What a signal means to a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meaning {
    /// Drain; if sent again, exit now.
    End,
    /// Drain, however often it is sent: the system repeats it while the reason lasts.
    Leave,
    /// Nothing.
    Nothing,
}

/// Every signal that would otherwise end the process, except its own faults and SIGKILL. Rust's runtime
/// ignores SIGPIPE already.
const MEANINGS: [(i32, &str, Meaning); 14] = [
    (libc::SIGTERM, "SIGTERM", Meaning::End),
    (libc::SIGINT, "SIGINT", Meaning::End),
    (libc::SIGHUP, "SIGHUP", Meaning::End),
    (libc::SIGQUIT, "SIGQUIT", Meaning::End),
    // A power failure, or the shutdown of a container's host.
    (libc::SIGPWR, "SIGPWR", Meaning::Leave),
    // A batch system's time limit, sent every second before the kill; a wrapper's time-out.
    (libc::SIGXCPU, "SIGXCPU", Meaning::Leave),
    (libc::SIGALRM, "SIGALRM", Meaning::Leave),
    (libc::SIGUSR1, "SIGUSR1", Meaning::Nothing),
    (libc::SIGUSR2, "SIGUSR2", Meaning::Nothing),
    (libc::SIGVTALRM, "SIGVTALRM", Meaning::Nothing),
    (libc::SIGPROF, "SIGPROF", Meaning::Nothing),
    (libc::SIGIO, "SIGIO", Meaning::Nothing),
    (libc::SIGSTKFLT, "SIGSTKFLT", Meaning::Nothing),
    // The write itself fails, as on a full disk.
    (libc::SIGXFSZ, "SIGXFSZ", Meaning::Nothing),
];

/// Every signal that is handled, with its name and meaning.
fn meanings() -> impl Iterator<Item = (i32, String, Meaning)> {
    let named = MEANINGS.iter();
    let named = named.map(|(signal, name, meaning)| (*signal, (*name).to_owned(), *meaning));
    let first = libc::SIGRTMIN();
    let real_time = (first..=libc::SIGRTMAX()).map(move |signal| {
        let name = format!("SIGRTMIN+{}", signal - first);
        (signal, name, Meaning::Nothing)
    });
    named.chain(real_time)
}

/// Handles signals from now on and passes on what they ask, in order.
///
/// # Errors
/// When the system refuses.
pub(super) fn listen() -> std::io::Result<mpsc::Receiver<Wish>> {
    let (heard, mut hearing) = mpsc::channel(16);
    let (wishing, wishes) = mpsc::channel(2);
    for (number, name, meaning) in meanings() {
        // Signals that were ignored at the start (`nohup`) stay ignored, and those that something else
        // in the process handles (a profiler) are left to it. SIGTERM and SIGINT are always handled.
        let ours = matches!(number, libc::SIGTERM | libc::SIGINT);
        if !ours && !is_default(number) {
            continue;
        }
        let mut signals = signal(SignalKind::from_raw(number))?;
        let heard = heard.clone();
        tokio::spawn(async move {
            let mut times = 0_u64;
            while signals.recv().await.is_some() {
                times += 1;
                if meaning == Meaning::Nothing {
                    ignore(&name, times);
                } else if heard.send((name.clone(), meaning)).await.is_err() {
                    return;
                }
            }
        });
    }
    tokio::spawn(async move {
        let mut ear = Ear::default();
        while let Some((name, meaning)) = hearing.recv().await {
            let Some(wish) = ear.hear(meaning, Instant::now()) else {
                tracing::debug!("{name}: already draining");
                continue;
            };
            match wish {
                Wish::Drain => tracing::info!("{name}: draining"),
                Wish::EndNow => tracing::warn!("{name} again: ending the drain now"),
            }
            if wishing.send(wish).await.is_err() {
                return;
            }
        }
    });
    Ok(wishes)
}

/// The first signal, from now on, that is to end a process other than a worker. Signals that were ignored
/// at the start stay ignored.
///
/// # Errors
/// When the system refuses.
pub(super) fn end() -> std::io::Result<impl Future<Output = i32> + Send> {
    let mut heard = FuturesUnordered::new();
    let ends = MEANINGS.iter().filter(|(.., m)| *m != Meaning::Nothing);
    for (number, ..) in ends.filter(|(number, ..)| is_default(*number)) {
        let mut signals = signal(SignalKind::from_raw(*number))?;
        heard.push(async move {
            signals.recv().await;
            *number
        });
    }
    Ok(async move {
        match heard.next().await {
            Some(number) => number,
            None => std::future::pending().await,
        }
    })
}

/// Ends the process as this signal does by default, so that its parent sees the signal.
pub(super) fn die(signal: i32) -> ! {
    #[expect(unsafe_code, reason = "the standard library raises no signals")]
    // SAFETY: no memory of ours is touched, and the process ends here.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
        // If the signal is blocked.
        libc::_exit(128 + signal)
    }
}

/// Some senders never stop: one line is enough.
fn ignore(name: &str, times: u64) {
    if times == 1 {
        tracing::warn!("{name}: ignored; send SIGTERM to drain the worker");
    } else {
        tracing::debug!(times, "{name}: ignored");
    }
}

/// What was heard so far.
#[derive(Debug, Default)]
struct Ear {
    first: Option<Instant>,
}

impl Ear {
    fn hear(&mut self, meaning: Meaning, now: Instant) -> Option<Wish> {
        match (meaning, self.first) {
            (Meaning::Nothing, _) => None,
            (Meaning::End | Meaning::Leave, None) => {
                self.first = Some(now);
                Some(Wish::Drain)
            }
            (Meaning::End, Some(first)) => {
                (now.duration_since(first) > TOGETHER).then_some(Wish::EndNow)
            }
            (Meaning::Leave, Some(_)) => None,
        }
    }
}

/// Whether the process does with a signal what processes do with it by default.
fn is_default(signal: i32) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    #[expect(unsafe_code, reason = "the standard library does not say it")]
    // SAFETY: nothing is set; what is set is written to our own memory, which zeros are sound for.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_DFL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_that_would_end_the_process_is_listened_to_or_a_fault() {
        let faults = [
            libc::SIGKILL,
            libc::SIGILL,
            libc::SIGABRT,
            libc::SIGBUS,
            libc::SIGFPE,
            libc::SIGSEGV,
            libc::SIGTRAP,
            libc::SIGSYS,
        ];
        // These stop it, go on with it or do nothing; Rust's start has seen to SIGPIPE.
        let harmless = [
            libc::SIGSTOP,
            libc::SIGTSTP,
            libc::SIGTTIN,
            libc::SIGTTOU,
            libc::SIGCONT,
            libc::SIGCHLD,
            libc::SIGURG,
            libc::SIGWINCH,
            libc::SIGPIPE,
        ];
        assert!(!is_default(libc::SIGPIPE));
        // Between the standard and the real-time signals lie those of the C library.
        let all = (1..32).chain(libc::SIGRTMIN()..=libc::SIGRTMAX());
        for number in all {
            let times = meanings().filter(|(listened, ..)| *listened == number);
            let left = faults.contains(&number) || harmless.contains(&number);
            assert_eq!(times.count(), usize::from(!left), "signal {number}");
        }
        let ends = MEANINGS.iter().filter(|(.., m)| *m == Meaning::End);
        let ends: Vec<&str> = ends.map(|(_, name, _)| *name).collect();
        assert_eq!(ends, ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"]);
    }

    #[test]
    fn the_first_drains_and_a_second_ends_the_drain_unless_it_is_the_same() {
        use Meaning::{End, Leave, Nothing};
        let begin = Instant::now();
        let wishes = |heard: &[(Meaning, u64)]| -> Vec<Option<Wish>> {
            let mut ear = Ear::default();
            let heard = heard.iter();
            heard
                .map(|(m, ms)| ear.hear(*m, begin + Duration::from_millis(*ms)))
                .collect()
        };
        let (drain, now) = (Some(Wish::Drain), Some(Wish::EndNow));
        assert_eq!(
            wishes(&[(Nothing, 0), (End, 1), (End, 900)]),
            [None, drain, now]
        );
        // A terminal that closes: the shell and the system each say so.
        assert_eq!(
            wishes(&[(End, 0), (End, 50), (End, 700)]),
            [drain, None, now]
        );
        // A limit on processor time, once a second; then somebody has had enough.
        let repeated = [(Leave, 0), (Leave, 1000), (Leave, 2000), (End, 2500)];
        assert_eq!(wishes(&repeated), [drain, None, None, now]);
    }
}
