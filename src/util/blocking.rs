//! Keeps CPU-heavy work on untrusted bytes off the async threads.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Up to this size, switching threads costs more than the work: even inflated a thousand times, so many
/// bytes are decoded in some milliseconds.
const IN_PLACE: usize = 4 * 1024;

/// Runs small work here and large work on another thread. `None` = it panicked.
pub async fn by_size<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    if bytes <= IN_PLACE {
        catch_unwind(AssertUnwindSafe(work)).ok()
    } else {
        tokio::task::spawn_blocking(work).await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn small_work_stays_and_large_work_goes_to_another_thread() {
        let here = std::thread::current().id();
        let thread = || std::thread::current().id();
        assert_eq!(by_size(IN_PLACE, thread).await, Some(here));
        assert_ne!(by_size(IN_PLACE + 1, thread).await, Some(here));
    }

    #[tokio::test]
    async fn a_panic_is_no_answer_wherever_it_happens() {
        for bytes in [0, IN_PLACE + 1] {
            let panicking = by_size(bytes, move || assert_eq!(bytes, 7, "on purpose"));
            assert_eq!(panicking.await, None);
        }
    }
}
