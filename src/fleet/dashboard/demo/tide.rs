//! What the fleet is asked to do and what it can do, at any moment of the story. Moments are seconds from
//! its start; negative ones are the past.

/// How long an epoch of the training lasts, seconds.
const EPOCH: f64 = 180.0;
/// The epoch in which the story starts, and how far it has come by then.
const FIRST_EPOCH: f64 = 1118.0;
const INTO_EPOCH: f64 = 30.0;
/// Most updates of an epoch come soon after it has begun: for how long, and the rates then and later.
const RUSH: f64 = 60.0;
const RUSHED: f64 = 1.6;
const CALM: f64 = 0.7;
/// When a rack lost its GPUs, for how long, and after how long it loses them again.
pub(super) const RACK_LOST: f64 = -15.0 * MINUTE;
pub(super) const RACK_AWAY: f64 = 30.0 * MINUTE;
pub(super) const RACK_AGAIN: f64 = 80.0 * MINUTE;
/// More jobs than usual come around this moment, for about so long, and how many more.
const SURGE: f64 = -8.0 * MINUTE;
const SURGE_LASTS: f64 = 12.0 * MINUTE;
const SURGED: f64 = 0.1;
/// An older shortage, over since long: from when, to when, and how much of the fleet was left.
const OUTAGE: (f64, f64, f64) = (-9.3 * HOUR, -8.8 * HOUR, 0.7);
const MINUTE: f64 = 60.0;
const HOUR: f64 = 60.0 * MINUTE;
/// How far the story reaches back.
pub(super) const DAY: f64 = 24.0 * HOUR;

/// Demand and capacity over time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tide {
    /// When the story starts, unix milliseconds.
    pub(super) start_ms: u64,
    /// Jobs per second in the busiest hour, which is that of the start.
    pub(super) rate: f64,
    /// Jobs per second of which the whole fleet is capable, but for those that are sick for long.
    pub(super) capable: f64,
    /// The rack's share of that.
    pub(super) rack: f64,
}

impl Tide {
    /// The moment at this time.
    pub(super) fn moment(&self, at_ms: u64) -> f64 {
        (at_ms as f64 - self.start_ms as f64) / 1000.0
    }

    /// The time of this moment.
    pub(super) fn at_ms(&self, moment: f64) -> u64 {
        (self.start_ms as f64 + moment * 1000.0).max(0.0) as u64
    }

    /// Jobs per second that arrive.
    pub(super) fn demand(&self, moment: f64) -> f64 {
        let day = 0.76 + 0.24 * (moment / DAY * std::f64::consts::TAU).cos();
        let into = (moment + INTO_EPOCH).rem_euclid(EPOCH);
        let burst = if into < RUSH { RUSHED } else { CALM };
        let surge = SURGED * (-((moment - SURGE) / SURGE_LASTS).powi(2)).exp();
        self.rate * (day + surge) * burst
    }

    /// Jobs per second that could be done.
    pub(super) fn capacity(&self, moment: f64) -> f64 {
        let (from, to, left) = OUTAGE;
        let outage = if (from..to).contains(&moment) {
            left
        } else {
            1.0
        };
        let rack = if moment >= RACK_LOST { self.rack } else { 0.0 };
        self.capable * (outage - rack)
    }

    /// The epoch whose jobs arrive.
    pub(super) fn epoch(&self, moment: f64) -> u64 {
        (FIRST_EPOCH + ((moment + INTO_EPOCH) / EPOCH).floor()).max(0.0) as u64
    }
}
