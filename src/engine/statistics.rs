//! From per-window losses to a verdict: paired differences, their standard error and interval.
//! Pure arithmetic in f64, windows in plan order, so equal losses give equal bits.

use statrs::distribution::{ContinuousCDF, StudentsT};

/// A candidate's effect, measured on the same windows before and after.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Paired {
    /// Mean loss before, nats per target.
    pub loss_before: f64,
    /// Mean loss after, nats per target.
    pub loss_after: f64,
    /// Mean of the per-window differences, before minus after; positive is an improvement.
    pub delta: f64,
    /// Standard error of `delta`; none below two windows.
    pub stderr: Option<f64>,
    /// 95 % confidence interval of `delta` by Student's t; none below two windows.
    pub ci95: Option<[f64; 2]>,
}

/// A mean over windows, and how far they leave it open.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The mean.
    pub value: f64,
    /// Its standard error; none below two windows.
    pub stderr: Option<f64>,
    /// Its 95 % confidence interval by Student's t; none below two windows.
    pub ci95: Option<[f64; 2]>,
}

/// The unweighted mean of per-window losses. The caller guarantees at least one window.
#[expect(
    clippy::cast_precision_loss,
    reason = "window counts are far below 2^52"
)]
pub fn mean(losses: &[f64]) -> f64 {
    losses.iter().sum::<f64>() / losses.len() as f64
}

/// The mean of one value of each window. The caller guarantees at least one window.
#[expect(
    clippy::cast_precision_loss,
    reason = "window counts are far below 2^52"
)]
pub fn estimate(values: &[f64]) -> Estimate {
    let value = mean(values);
    let n = values.len() as f64;
    let stderr = (values.len() >= 2).then(|| {
        let squares: f64 = values.iter().map(|v| (v - value).powi(2)).sum();
        (squares / (n - 1.0) / n).sqrt()
    });
    let ci95 = stderr.and_then(|stderr| {
        let t = StudentsT::new(0.0, 1.0, n - 1.0).ok()?.inverse_cdf(0.975);
        Some([value - t * stderr, value + t * stderr])
    });
    Estimate {
        value,
        stderr,
        ci95,
    }
}

/// The differences of equal windows, before minus after.
pub fn differences(before: &[f64], after: &[f64]) -> Vec<f64> {
    debug_assert_eq!(before.len(), after.len());
    before.iter().zip(after).map(|(b, a)| b - a).collect()
}

/// Pairs the losses of equal windows.
pub fn paired(before: &[f64], after: &[f64]) -> Paired {
    let Estimate {
        value: delta,
        stderr,
        ci95,
    } = estimate(&differences(before, after));
    Paired {
        loss_before: mean(before),
        loss_after: mean(after),
        delta,
        stderr,
        ci95,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_losses_give_exactly_zero() {
        let losses = [2.1, 3.7, 1.9];
        let paired = paired(&losses, &losses);
        assert_eq!(paired.delta.to_bits(), 0.0_f64.to_bits());
        assert_eq!(paired.stderr, Some(0.0));
        assert_eq!(paired.ci95, Some([0.0, 0.0]));
    }

    #[test]
    fn one_window_has_no_standard_error() {
        let paired = paired(&[2.0], &[1.5]);
        assert_eq!(
            (paired.delta, paired.stderr, paired.ci95),
            (0.5, None, None)
        );
    }

    #[test]
    fn interval_is_students_t() {
        // Differences 1, 2, 3: mean 2, sd 1, se 1/sqrt(3), t(0.975, 2) = 4.302652729911275.
        let paired = paired(&[1.0, 2.0, 3.0], &[0.0, 0.0, 0.0]);
        let half = 4.302_652_729_911_275 / 3.0_f64.sqrt();
        let [low, high] = paired.ci95.unwrap();
        assert!((low - (2.0 - half)).abs() < 1e-9 && (high - (2.0 + half)).abs() < 1e-9);
    }

    /// Differences of one true mean, many times: how often the interval has the mean in it.
    #[test]
    fn the_interval_covers_the_truth_as_often_as_it_says() {
        use rand::{Rng, SeedableRng};
        const TRIALS: u32 = 40_000;
        const TRUTH: f64 = 0.01;
        let mut random = rand::rngs::StdRng::seed_from_u64(95);
        // Box and Muller: two uniforms make a normal.
        let mut normal = || -> f64 {
            let (radius, angle) = (1.0 - random.random::<f64>(), random.random::<f64>());
            (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
        };
        for windows in [5, 8, 64] {
            let mut covered = 0;
            for _ in 0..TRIALS {
                // Windows differ much more than what a candidate does to them: hence the pairs.
                let before: Vec<f64> = (0..windows).map(|_| 3.0 + 0.5 * normal()).collect();
                let after: Vec<f64> = before.iter().map(|b| b - TRUTH - 0.02 * normal()).collect();
                let [low, high] = paired(&before, &after).ci95.unwrap();
                covered += u32::from(low <= TRUTH && TRUTH <= high);
            }
            let share = f64::from(covered) / f64::from(TRIALS);
            assert!((0.94..=0.96).contains(&share), "{windows} windows: {share}");
        }
    }
}
