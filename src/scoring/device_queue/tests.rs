use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// A line in which each window takes a second with the margin, and the jobs' numbers are 0, 1, ...
fn line(windows: &[u32], now: Instant) -> Line {
    let mut line = Line::default();
    line.set_pace(SECOND * 4 / 5);
    for (number, windows) in windows.iter().enumerate() {
        line.enter(&format!("job-{number}"), whole(*windows), now);
    }
    line
}

fn whole(windows: u32) -> Length {
    let (least, most, passes) = (windows, windows, 1);
    Length {
        least,
        most,
        passes,
    }
}

/// The numbers of those that were sent back.
fn sent_back(line: &Line) -> Vec<u64> {
    let gone = line.waiters.iter().filter(|w| w.sent_back.is_cancelled());
    gone.map(|waiter| waiter.number).collect()
}

#[test]
fn jobs_that_cannot_finish_by_the_deadline_are_sent_back() {
    // Windows of the jobs, seconds that the first has computed for, seconds left; who is sent back.
    type Case = (&'static [u32], Option<u32>, u32, &'static [u64]);
    let table: &[Case] = &[
        (&[], None, 0, &[]),
        (&[10], None, 10, &[]),
        (&[10], None, 9, &[0]),
        // The third does not fit, and leaves its time to the fourth.
        (&[10, 1, 10, 1], None, 15, &[2]),
        (&[10, 1, 10, 1], None, 0, &[0, 1, 2, 3]),
        // What computes counts with what is left of it, and is never sent back.
        (&[10, 1, 10, 1], Some(9), 3, &[2]),
        (&[10, 1, 10, 1], Some(1), 0, &[1, 2, 3]),
        // It takes longer than estimated: it may be done at any moment.
        (&[10, 1, 10, 1], Some(99), 1, &[2, 3]),
    ];
    for (windows, computed_for, left, expected) in table {
        let began = Instant::now();
        let mut line = line(windows, began);
        if computed_for.is_some() {
            assert!(line.begin(0, began));
        }
        let now = began + SECOND * computed_for.unwrap_or(0);
        line.deadline = Some(now + SECOND * *left);
        assert_eq!(line.send_back_late(now), expected.len());
        assert_eq!(sent_back(&line), *expected, "{windows:?}, {left} s left");
    }
}

#[test]
fn a_job_that_comes_after_the_queue_was_closed_waits_only_if_it_fits() {
    let queue = DeviceQueue::default();
    queue.set_pace(SECOND);
    let enter = |job, windows| queue.enter(job, whole(windows), Duration::MAX).unwrap();
    let first = enter("first", 10);
    assert_eq!(queue.close(Instant::now() + SECOND * 15), (1, 0));
    let (long, short) = (enter("long", 10), enter("short", 1));
    assert!(long.sent_back.is_cancelled() && !short.sent_back.is_cancelled());
    assert!(!first.sent_back.is_cancelled());
    queue.open();
    assert!(!enter("again", 10).sent_back.is_cancelled());
    drop((first, long, short));
    assert_eq!(
        queue.line().waiters.len(),
        0,
        "whoever goes leaves the line"
    );
}

#[test]
fn a_job_does_not_begin_when_those_before_it_took_its_time() {
    let now = Instant::now();
    let mut line = line(&[1, 10], now);
    line.deadline = Some(now + SECOND * 12);
    assert!(line.begin(0, now));
    let late = now + SECOND * 5;
    line.leave(0);
    assert!(!line.begin(1, late));
    assert_eq!(sent_back(&line), [1]);
}

#[test]
fn without_a_measure_every_job_fits_until_the_time_is_over() {
    let now = Instant::now();
    let mut line = line(&[1000], now);
    line.paces.clear();
    line.deadline = Some(now + SECOND);
    assert_eq!(line.send_back_late(now), 0);
    assert_eq!(line.send_back_late(now + SECOND * 2), 1);
}

#[test]
fn a_job_stalls_when_it_has_waited_for_long_or_comes_back_after_that_but_not_for_ever() {
    let now = Instant::now();
    // Seconds that it has waited, how often it was sent back for that, whether it computes or was
    // sent back already; whether it has stalled.
    for (waited, times, computes, gone, expected) in [
        (0, 0, false, false, false),
        (1, 0, false, false, true),
        (9, 0, false, false, true),
        (0, 1, false, false, true),
        (0, MOST_TIMES - 1, false, false, true),
        (9, MOST_TIMES, false, false, false),
        (9, 1, true, false, false),
        (9, 1, false, true, false),
    ] {
        let mut line = line(&[1], now);
        line.remembered = vec!["job-0".to_owned(); times].into();
        line.remembered.push_back("another".into());
        if computes {
            assert!(line.begin(0, now));
        }
        if gone {
            line.waiters[0].sent_back.cancel();
        }
        let stalled = line.stalled(SECOND, now + SECOND * waited).count();
        let case = (waited, times, computes, gone);
        assert_eq!(stalled == 1, expected, "{case:?}");
    }
}

#[test]
fn the_longest_wait_is_sent_back_first_and_remembered() {
    let now = Instant::now();
    let mut line = line(&[1, 1, 1], now);
    assert!(line.begin(0, now));
    assert_eq!(line.send_back(Duration::ZERO, 1, now), 1);
    assert_eq!(sent_back(&line), [1]);
    assert_eq!(line.remembered, ["job-1"]);
    line.remembered = vec!["another".to_owned(); MOST_REMEMBERED].into();
    assert_eq!(line.send_back(Duration::ZERO, 9, now), 1);
    assert_eq!(line.remembered.len(), MOST_REMEMBERED);
    assert_eq!(line.remembered.back().map(String::as_str), Some("job-2"));
}

#[test]
fn the_slowest_of_recent_jobs_is_the_estimate() {
    let now = Instant::now();
    let mut line = line(&[10, 1], now);
    let paces = |line: &Line| line.paces.iter().map(|p| p.per_window).collect::<Vec<_>>();
    line.computed(1, now + SECOND);
    assert_eq!(paces(&line), [SECOND * 4 / 5], "it never began");
    assert!(line.begin(0, now));
    line.computed(0, now + SECOND * 50);
    assert_eq!(paces(&line), [SECOND * 4 / 5, SECOND * 5]);
    line.leave(0);
    let next = |line: &Line| line.estimate(&line.waiters[0], now);
    assert_eq!(next(&line), SECOND * 25 / 4, "with the margin");
    for _ in 0..RECENT {
        let (number, _) = line.enter("quick", whole(1), now);
        assert!(line.begin(number, now));
        line.computed(number, now);
        line.leave(number);
    }
    assert_eq!(next(&line), Duration::ZERO, "what was slow is forgotten");
}

#[test]
fn what_a_job_needs_counts_those_before_it_and_what_they_have_left() {
    // Windows of the jobs before it, seconds that the first has computed for, who was sent back, the
    // job's own windows; the windows that it is to wait for and to compute.
    type Case = (&'static [u32], u32, Option<usize>, u32, u32);
    let table: &[Case] = &[
        (&[], 0, None, 0, 0),
        (&[], 0, None, 10, 10),
        (&[10, 5], 0, None, 10, 25),
        (&[10, 5], 4, None, 10, 21),
        // It takes longer than it should: it may be done at any moment.
        (&[10, 5], 99, None, 10, 15),
        (&[10, 5], 0, Some(1), 10, 20),
    ];
    for (before, computed_for, gone, own, expected) in table {
        let began = Instant::now();
        let mut line = line(before, began);
        line.set_pace(SECOND);
        if *computed_for > 0 {
            assert!(line.begin(0, began));
        }
        gone.iter()
            .for_each(|n| line.waiters[*n].sent_back.cancel());
        let needs = line.needs(whole(*own), began + SECOND * *computed_for);
        assert_eq!(needs, SECOND * *expected, "{before:?}, {gone:?}");
    }
}

#[test]
fn what_a_job_needs_is_measured_on_jobs_that_are_no_shorter() {
    let now = Instant::now();
    let mut line = Line::default();
    assert_eq!(
        line.needs(whole(1000), now),
        Duration::ZERO,
        "nothing is known"
    );
    line.set_pace(SECOND);
    let mut computed = |windows, per_window: Duration| {
        let (number, _) = line.enter("job", whole(windows), now);
        assert!(line.begin(number, now));
        line.computed(number, now + per_window * windows);
        line.leave(number);
        line.needs(whole(100), now)
    };
    // With both passes it takes twice as long as in the warm-up, and a single window ten times.
    assert_eq!(computed(100, SECOND * 2), SECOND * 100);
    for _ in 0..RECENT {
        assert!(computed(1, SECOND * 10) >= SECOND * 100);
    }
    assert_eq!(computed(1, SECOND * 10), SECOND * 100, "as in the warm-up");
    assert_eq!(computed(100, SECOND * 2), SECOND * 200);
    assert_eq!(computed(500, SECOND * 3 / 2), SECOND * 150, "the fastest");
}

#[test]
fn one_that_may_end_early_is_short_to_those_behind_it_and_long_to_a_drain() {
    let table = [
        (31, true, whole(31)),
        (
            64,
            true,
            Length {
                least: 16,
                most: 64,
                passes: 1,
            },
        ),
        (64, false, whole(64)),
    ];
    for (windows, may_stop, expected) in table {
        assert_eq!(Length::of(windows, may_stop), expected);
    }
    let now = Instant::now();
    let mut line = Line::default();
    line.set_pace(SECOND);
    line.enter("job", Length::of(64, true), now);
    assert_eq!(line.needs(whole(64), now), SECOND * (16 + 64));
    assert_eq!(
        line.estimate(&line.waiters[0], now),
        SECOND * (64 + 16),
        "with the margin"
    );
}

#[test]
fn a_job_that_would_need_too_long_does_not_enter() {
    let queue = DeviceQueue::default();
    let enter = |windows| queue.enter("job", whole(windows), SECOND * 15);
    let unknown = enter(1_000_000);
    assert!(unknown.is_ok());
    drop(unknown);
    queue.set_pace(SECOND);
    let first = enter(15);
    assert!(first.is_ok());
    assert_eq!(enter(1).err(), Some(NoTurn::TooLong(SECOND * 16)));
    drop(first);
    assert_eq!(enter(16).err(), Some(NoTurn::TooLong(SECOND * 16)));
    assert_eq!(queue.line().waiters.len(), 0);
}

/// A merge on a plan of ten windows, as of four members.
fn merge() -> Length {
    Length::of_merge(10, 9)
}

#[test]
fn a_merge_counts_with_all_of_its_passes() {
    let now = Instant::now();
    let mut line = line(&[], now);
    assert_eq!(line.needs(merge(), now), SECOND * 4 / 5 * 90);
    line.enter("merge", merge(), now);
    line.enter("behind", whole(10), now);
    let (behind, late) = (now + SECOND * 100, now + SECOND * 99);
    for (deadline, gone) in [(behind, &[][..]), (late, &[1]), (now + SECOND * 89, &[0])] {
        for waiter in &mut line.waiters {
            waiter.sent_back = CancellationToken::new();
        }
        line.deadline = Some(deadline);
        line.send_back_late(now);
        assert_eq!(sent_back(&line), gone);
    }
}

#[test]
fn a_merge_that_computes_is_forecast_by_its_passes_and_left_between_two_of_them() {
    let now = Instant::now();
    let at = |seconds: u32| now + SECOND * seconds;
    let passes = |done| Passes { done, most: 9 };
    let mut line = line(&[], now);
    line.enter("merge", merge(), now);
    assert!(line.begin(0, now));
    assert!(line.passed(0, passes(0), now));
    // Its passes take two seconds each instead of ten.
    assert!(line.passed(0, passes(2), at(4)));
    assert_eq!(line.needs(whole(0), at(4)), SECOND * 14, "for those behind");
    line.deadline = Some(at(4) + SECOND * 14 + SECOND * 18 / 4);
    assert!(line.passed(0, passes(2), at(4)));
    line.deadline = Some(at(4) + SECOND * 14);
    assert!(
        !line.passed(0, passes(2), at(4)),
        "a quarter slower, it would be late"
    );
    assert_eq!(sent_back(&line), [0]);
}

#[test]
fn a_merge_whose_passes_are_counted_later_is_forecast_by_them_from_then_on() {
    let now = Instant::now();
    let mut line = line(&[], now);
    line.enter("suspect", Length::of_merge(10, 1), now);
    assert!(line.begin(0, now));
    assert_eq!(line.needs(whole(0), now), SECOND * 8);
    let needed = SECOND * 4 / 5 * 90;
    assert_eq!(line.resize(0, merge()), needed);
    assert_eq!(line.needs(whole(0), now), needed, "for those behind");
}
