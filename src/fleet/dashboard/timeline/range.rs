//! How far a chart looks back, and how finely.

use serde::Serialize;

/// How far the charts look back.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    strum::VariantArray,
    strum::EnumString,
    strum::IntoStaticStr,
    Serialize,
)]
pub(in crate::fleet::dashboard) enum Range {
    #[strum(serialize = "10m")]
    #[serde(rename = "10m")]
    TenMinutes,
    #[strum(serialize = "1h")]
    #[serde(rename = "1h")]
    Hour,
    #[strum(serialize = "8h")]
    #[serde(rename = "8h")]
    EightHours,
    #[strum(serialize = "1d")]
    #[serde(rename = "1d")]
    Day,
}

impl Range {
    /// Between two points, milliseconds.
    pub(super) fn every_ms(self) -> u64 {
        match self {
            Self::TenMinutes => 2_000,
            Self::Hour => 10_000,
            Self::EightHours => 60_000,
            Self::Day => 300_000,
        }
    }

    /// Times before one that fill every range with the fewest looks, oldest first.
    pub(in crate::fleet::dashboard) fn looks_before(now_ms: u64) -> impl Iterator<Item = u64> {
        let ranges = [Self::Day, Self::EightHours, Self::Hour, Self::TenMinutes];
        let ends = ranges.into_iter().skip(1).map(Self::millis);
        let parts = ranges.into_iter().zip(ends.chain([0]));
        let ago = parts.flat_map(|(range, end)| {
            let looks = (range.millis() - end) / range.every_ms();
            (1..=looks)
                .rev()
                .map(move |look| end + look * range.every_ms())
        });
        ago.map(move |ago| now_ms.saturating_sub(ago))
    }

    fn millis(self) -> u64 {
        self.every_ms() * self.points() as u64
    }

    /// Points in it.
    pub(super) fn points(self) -> usize {
        match self {
            Self::TenMinutes => 300,
            Self::Hour => 360,
            Self::EightHours => 480,
            Self::Day => 288,
        }
    }
}
