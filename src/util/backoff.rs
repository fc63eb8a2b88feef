//! Back-off with jitter.

use std::time::Duration;

/// Delays that double from `first` to `most`, each shortened by up to a quarter so that a fleet does not
/// retry at the same moment.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    /// 1 s doubling to 30 s, as the contract has it for packages, providers and brokers.
    pub fn new() -> Self {
        Self::between(Duration::from_secs(1), Duration::from_secs(30))
    }

    /// Doubling from `first` to `most`.
    pub fn between(first: Duration, most: Duration) -> Self {
        Self {
            first,
            most,
            next: first,
        }
    }

    /// The next delay.
    pub fn next_delay(&mut self) -> Duration {
        let wait = self.next;
        self.next = (self.next * 2).min(self.most);
        wait.mul_f64(rand::random_range(0.75..=1.0))
    }

    /// Begins again after a success.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_to_the_bound_and_begin_again_after_a_success() {
        let mut backoff = Backoff::new();
        for expected in [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0] {
            let wait = backoff.next_delay().as_secs_f64();
            assert!(
                (0.75 * expected..=expected).contains(&wait),
                "{wait} for {expected}"
            );
        }
        backoff.reset();
        assert!(backoff.next_delay() <= Duration::from_secs(1));
    }
}
