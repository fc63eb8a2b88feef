//! Numbers as a row of bars.

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The last numbers, as many as there is room for.
pub(super) fn sparkline(numbers: impl Iterator<Item = f64>, room: u16) -> String {
    let numbers: Vec<f64> = numbers.collect();
    let surplus = numbers.len().saturating_sub(room.into());
    let last = || numbers.iter().skip(surplus);
    let most = last().copied().fold(0.0, f64::max);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "0 to 7"
    )]
    let bar = |number: &f64| match most > 0.0 {
        true => BARS[((number / most * 7.0).round() as usize).min(7)],
        false => BARS[0],
    };
    last().map(bar).collect()
}
