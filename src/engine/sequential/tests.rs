mod real;

use strum::VariantArray;

use super::*;

/// Orders that are drawn of each population.
const ORDERS: usize = 20_000;
/// Of the differences around their mean.
const SPREAD: f64 = 0.02;
/// Loss of every window before.
const LOSS: f64 = 3.0;
const BATCH: usize = 8;

/// A generator of numbers that is fast without optimisation.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Above 0, below 1.
    fn uniform(&mut self) -> f64 {
        let bits = u32::try_from(self.next() >> 32).unwrap();
        (f64::from(bits) + 0.5) / 2f64.powi(32)
    }

    fn normal(&mut self) -> f64 {
        let (radius, angle) = (self.uniform(), self.uniform());
        (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
    }

    fn below(&mut self, limit: usize) -> usize {
        let below = (self.next() >> 32) * limit as u64;
        usize::try_from(below >> 32).unwrap()
    }

    fn shuffle(&mut self, all: &mut [usize]) {
        for at in 1..all.len() {
            all.swap(at, self.below(at + 1));
        }
    }
}

/// How the differences of a plan's windows are distributed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::VariantArray)]
enum Shape {
    Normal,
    /// A few large losses.
    SkewedDown,
    /// A few large gains.
    SkewedUp,
    /// Student's t with three degrees of freedom.
    HeavyTails,
    /// Two kinds of windows.
    Clusters,
    /// Nine in ten hardly differ.
    Sparse,
    /// One window gains as much as may be assumed, the others lose.
    AtTheLimit,
    /// One window in 64 gains, the others lose.
    OneIn64,
    /// One window gains what all others lose.
    OneInAll,
    /// One large loss, two large gains, the others lose very little: until one of the three is seen, nothing tells.
    Three,
}

impl Shape {
    fn draw(self, windows: usize, random: &mut Random) -> Vec<f64> {
        let one_in = |rare: usize, at: usize| match at % rare {
            0 => real(rare) - 1.0,
            _ => -1.0,
        };
        let all = (0..windows).map(|at| match self {
            Self::Normal => random.normal(),
            Self::SkewedDown => random.uniform().ln(),
            Self::SkewedUp => -random.uniform().ln(),
            Self::HeavyTails => {
                let squares: f64 = (0..3).map(|_| random.normal().powi(2)).sum();
                random.normal() / (squares / 3.0).sqrt()
            }
            Self::Clusters => random.normal() * 0.3 + one_in(4, at),
            Self::Sparse => random.normal() * if at % 10 == 0 { 1.0 } else { 0.01 },
            Self::AtTheLimit => one_in(limit(windows), at),
            Self::OneIn64 => one_in(64, at),
            Self::OneInAll => one_in(windows, at),
            Self::Three => match at {
                0 => -1.0,
                1 | 2 => 0.56,
                _ => 0.0,
            },
        });
        all.collect()
    }
}

/// The limit, as a whole number.
fn limit(windows: usize) -> usize {
    (1..)
        .take_while(|n| real(*n) <= gain_limit(windows))
        .count()
}

fn mean(all: &[f64]) -> f64 {
    all.iter().sum::<f64>() / real(all.len())
}

fn rms(all: &[f64]) -> f64 {
    mean(&all.iter().map(|d| d * d).collect::<Vec<f64>>()).sqrt()
}

/// Shifted and scaled: their mean, and their spread around it.
fn scaled(all: &[f64], to: f64, spread: f64) -> Vec<f64> {
    let middle = mean(all);
    let around: Vec<f64> = all.iter().map(|d| d - middle).collect();
    let factor = spread / rms(&around);
    around.iter().map(|d| d * factor + to).collect()
}

/// Whether no window gains more than is assumed. Windows that differ about as much as the largest gain would hide it,
/// where they are as rare.
fn is_assumed(differences: &[f64]) -> bool {
    let largest = differences.iter().copied().fold(0.0, f64::max);
    let others: Vec<f64> = differences
        .iter()
        .copied()
        .filter(|d| d.abs() < largest / 2.0)
        .collect();
    largest <= gain_limit(differences.len()) * rms(&others)
}

/// A population, and what its candidates are asked to stop for.
struct Cell {
    differences: Vec<f64>,
    stop: Stop,
    /// Whether its windows gain no more than is assumed, in nearly all orders.
    within: bool,
    told: String,
}

impl Cell {
    /// Whose delta is the margin, exactly.
    fn at_the_margin(shape: Shape, windows: usize, stop: Stop) -> Self {
        let drawn = scaled(&shape.draw(windows, &mut Random(28)), stop.margin, SPREAD);
        let largest = drawn.iter().copied().fold(0.0, f64::max);
        let differences = match stop.proven {
            // Small differences prove nothing: they are as large as a loss allows.
            true => drawn.iter().map(|d| d * 0.95 * LOSS / largest).collect(),
            false => drawn,
        };
        Self {
            within: stop.proven || is_assumed(&differences),
            differences,
            stop,
            told: format!("{windows} windows, {shape:?}, {stop:?}"),
        }
    }

    /// Windows after which this order is stopped; all of them, if it is not.
    fn end(&self, alpha: f64, after: &[f64]) -> usize {
        let decided = self.test(alpha, after).decided();
        decided.map_or(after.len(), |decided| decided.windows)
    }

    fn test(&self, alpha: f64, after: &[f64]) -> SequentialTest {
        let stop = Stop { alpha, ..self.stop };
        let mut test = SequentialTest::new(stop, vec![LOSS; after.len()], BATCH, false);
        test.measured(after);
        test
    }

    /// Whether, in this order, no window still to be measured gains more than is assumed, after the first look.
    fn keeps(&self, order: &[usize]) -> bool {
        let differences: Vec<f64> = order.iter().map(|at| self.differences[*at]).collect();
        let mut most = differences.clone();
        for at in (1..most.len()).rev() {
            most[at - 1] = most[at - 1].max(most[at]);
        }
        let mut spread = Spread::default();
        most.iter()
            .zip(differences)
            .enumerate()
            .all(|(at, (most, difference))| {
                if at % look(BATCH) == 0 && at > 0 {
                    spread.look();
                }
                let assumed = spread.known().map(|known| known.max(self.stop.margin));
                spread.add(difference);
                assumed.is_none_or(|known| *most <= gain_limit(order.len()) * known)
            })
    }

    fn in_order(&self, order: &[usize]) -> Vec<f64> {
        order
            .iter()
            .map(|at| LOSS - self.differences[*at])
            .collect()
    }
}

/// How many of so many orders stop in a cell, at 0.05 and at 0.01.
#[derive(Clone, Copy, Default)]
struct Stops {
    all: [usize; 2],
    /// Those in which what is assumed holds.
    kept: [usize; 2],
}

fn stops(windows: usize, cells: &[Cell], orders: usize) -> Vec<Stops> {
    let mut random = Random(windows as u64);
    let mut order: Vec<usize> = (0..windows).collect();
    let mut stopped = vec![Stops::default(); cells.len()];
    for _ in 0..orders {
        random.shuffle(&mut order);
        for (cell, stopped) in cells.iter().zip(&mut stopped) {
            let after = cell.in_order(&order);
            if cell.end(0.05, &after) < windows {
                // What stops at 0.01 stops at 0.05.
                let stops = [1, usize::from(cell.end(0.01, &after) < windows)];
                let kept = usize::from(cell.within || cell.keeps(&order));
                for (at, stop) in stops.into_iter().enumerate() {
                    stopped.all[at] += stop;
                    stopped.kept[at] += stop * kept;
                }
            }
        }
    }
    stopped
}

const DEFAULT: Stop = Stop {
    alpha: 0.05,
    margin: 0.0,
    proven: false,
};
const PROVEN: Stop = Stop {
    proven: true,
    ..DEFAULT
};
const FUTILE: Stop = Stop {
    margin: SPREAD / 2.0,
    ..DEFAULT
};

/// No cell stops more often than alpha allows, up to two standard errors; where windows gain more than is assumed, in
/// orders in which that holds all the same.
fn check_errors(windows: usize, cells: &[Cell]) {
    for (cell, stopped) in cells.iter().zip(stops(windows, cells, ORDERS)) {
        let share = |stopped: usize| real(stopped) / real(ORDERS);
        let (all, kept) = (stopped.all.map(share), stopped.kept.map(share));
        println!(
            "{}, within what is assumed: {}: {all:.4?}, of orders that keep it {kept:.4?}",
            cell.told, cell.within
        );
        for (alpha, share) in [0.05, 0.01].into_iter().zip(kept) {
            let doubt = 2.0 * (alpha * (1.0 - alpha) / real(ORDERS)).sqrt();
            assert!(share <= alpha + doubt, "{}: {share}", cell.told);
        }
    }
}

fn cells(windows: usize, shapes: &[Shape], stop: Stop) -> impl Iterator<Item = Cell> {
    shapes
        .iter()
        .map(move |shape| Cell::at_the_margin(*shape, windows, stop))
}

/// Those in which most orders stop, and one that breaks what is assumed.
const WORST: [Shape; 4] = [
    Shape::OneIn64,
    Shape::SkewedUp,
    Shape::Sparse,
    Shape::AtTheLimit,
];

#[test]
fn short_plans_stop_no_more_often_than_alpha_where_a_candidate_helps() {
    for windows in [16, 64] {
        let all = [DEFAULT, PROVEN, FUTILE].into_iter();
        let all = all.flat_map(|stop| cells(windows, Shape::VARIANTS, stop));
        check_errors(windows, &all.collect::<Vec<Cell>>());
    }
}

#[test]
fn usual_plans_stop_no_more_often_than_alpha_where_a_candidate_helps() {
    let all = cells(256, Shape::VARIANTS, DEFAULT).chain(cells(256, &WORST, PROVEN));
    let all = all.chain(cells(256, &WORST[1..], FUTILE));
    check_errors(256, &all.collect::<Vec<Cell>>());
}

#[test]
fn long_plans_stop_no_more_often_than_alpha_where_a_candidate_helps() {
    let all = cells(1024, &WORST[1..], DEFAULT).chain(cells(1024, &WORST[..2], PROVEN));
    check_errors(1024, &all.collect::<Vec<Cell>>());
}

/// The median share of windows measured, of candidates whose delta is so many standard errors.
fn median_share(windows: usize, alpha: f64, z: f64) -> f64 {
    let mut random = Random(7);
    let mut order: Vec<usize> = (0..windows).collect();
    let mut ends = Vec::new();
    for shape in [
        Shape::Normal,
        Shape::SkewedDown,
        Shape::SkewedUp,
        Shape::HeavyTails,
    ] {
        for _ in 0..20 {
            let drawn = shape.draw(windows, &mut random);
            let delta = z * SPREAD / real(windows).sqrt();
            let cell = Cell {
                differences: scaled(&drawn, delta, SPREAD),
                stop: DEFAULT,
                within: true,
                told: String::new(),
            };
            for _ in 0..5 {
                random.shuffle(&mut order);
                ends.push(cell.end(alpha, &cell.in_order(&order)));
            }
        }
    }
    ends.sort_unstable();
    real(ends[ends.len() / 2]) / real(windows)
}

#[test]
fn what_is_clearly_harmful_is_stopped_after_a_part_of_its_windows() {
    for (windows, alpha, z, most) in [
        (64, 0.05, -8.0, 0.50),
        (64, 0.01, -8.0, 0.63),
        (256, 0.05, -16.0, 0.20),
        (256, 0.05, -8.0, 0.30),
        (256, 0.01, -16.0, 0.30),
        (256, 0.01, -8.0, 0.40),
        (1024, 0.05, -16.0, 0.12),
        (1024, 0.05, -8.0, 0.20),
        (1024, 0.01, -16.0, 0.16),
        (1024, 0.01, -8.0, 0.28),
    ] {
        let share = median_share(windows, alpha, z);
        println!("{windows} windows, alpha {alpha}, z {z}: {share:.3}");
        assert!(
            share <= most,
            "{windows} windows, alpha {alpha}, z {z}: {share}"
        );
    }
}

#[test]
fn what_clearly_helps_is_never_stopped() {
    let mut random = Random(3);
    let mut order: Vec<usize> = (0..256).collect();
    let drawn = Shape::Normal.draw(256, &mut random);
    let cell = Cell {
        differences: scaled(&drawn, 3.0 * SPREAD / 16.0, SPREAD),
        stop: DEFAULT,
        within: true,
        told: String::new(),
    };
    for _ in 0..8000 {
        random.shuffle(&mut order);
        assert_eq!(cell.end(0.05, &cell.in_order(&order)), 256);
    }
}

#[test]
fn the_upper_bound_is_below_the_delta_no_more_often_than_alpha() {
    const TRIED: usize = 4000;
    let mut random = Random(4);
    let mut order: Vec<usize> = (0..256).collect();
    for (shape, stop) in [
        (Shape::Normal, DEFAULT),
        (Shape::SkewedUp, DEFAULT),
        (Shape::Normal, FUTILE),
    ] {
        let delta = stop.margin - 8.0 * SPREAD / 16.0;
        let cell = Cell {
            differences: scaled(&shape.draw(256, &mut random), delta, SPREAD),
            stop,
            within: true,
            told: String::new(),
        };
        let mut below = 0;
        for _ in 0..TRIED {
            random.shuffle(&mut order);
            let test = cell.test(0.05, &cell.in_order(&order));
            let Some(Decided { decision, .. }) = test.decided() else {
                continue;
            };
            let upper = test.upper(decision);
            assert!(upper <= decision.bound(stop.margin));
            below += usize::from(upper < delta);
        }
        assert!(
            real(below) <= (0.05 + 0.007) * real(TRIED),
            "{shape:?}: {below}"
        );
    }
}

/// The test of these differences, in this order and so many at a time.
fn tested(stop: Stop, differences: &[f64], batch: usize, may_be_negative: bool) -> SequentialTest {
    let after: Vec<f64> = differences.iter().map(|d| LOSS - d).collect();
    let mut test = SequentialTest::new(stop, vec![LOSS; after.len()], batch, may_be_negative);
    after.chunks(batch).for_each(|after| test.measured(after));
    test
}

fn decide(stop: Stop, differences: &[f64], batch: usize, may_be_negative: bool) -> Option<Decided> {
    tested(stop, differences, batch, may_be_negative).decided()
}

/// Where all windows lose the same, the wealth is a product that needs no program.
#[test]
fn the_wealth_is_the_product_of_the_bets() {
    let (windows, lost) = (256, 0.6);
    let test = tested(PROVEN, &vec![-lost; windows], BATCH, false);
    let (decided, upper) = (test.decided().unwrap(), test.upper(Decision::Worse));
    let mut wealth = 1.0;
    let wins = (0..windows).take_while(|measured| {
        let needed = lost * real(*measured) / real(windows - measured);
        wealth *= (LOSS + lost) / (LOSS - needed);
        wealth < 20.0
    });
    let needed = wins.count() + 1;
    assert_eq!(decided.windows, needed.next_multiple_of(BATCH));
    assert_eq!(decided.decision, Decision::Worse);
    // What is left can at most gain its whole loss.
    assert!(-lost < upper && upper < 0.0, "{upper}");
}

/// What the documents say of the price of a proof.
#[test]
fn a_proof_takes_so_many_windows_of_even_harm() {
    for (share_of_loss, alpha, most) in [(0.1, 0.05, 32), (0.1, 0.01, 48), (0.02, 0.05, 120)] {
        let stop = Stop { alpha, ..PROVEN };
        let decided = decide(stop, &[-share_of_loss * LOSS; 256], BATCH, false);
        let windows = decided.map(|decided| decided.windows);
        assert!(
            windows.is_some_and(|windows| windows <= most),
            "{share_of_loss}, {alpha}: {windows:?}"
        );
    }
}

#[test]
fn worse_is_said_where_both_are_decided() {
    let stop = Stop {
        margin: 0.05,
        ..DEFAULT
    };
    for (delta, expected) in [(-1.0, Decision::Worse), (0.0, Decision::Futile)] {
        let mut random = Random(5);
        let drawn: Vec<f64> = (0..256).map(|_| delta + 0.02 * random.normal()).collect();
        assert_eq!(
            decide(stop, &drawn, BATCH, false).unwrap().decision,
            expected
        );
    }
}

/// Differences that stop soon as they are, and what is done to them; after how many windows they still do.
#[test]
fn what_is_unlike_the_rest_is_not_decided_on() {
    let mut random = Random(6);
    let usual: Vec<f64> = (0..256).map(|_| -0.02 + 0.01 * random.normal()).collect();
    let end = |bend: &dyn Fn(&mut Vec<f64>)| {
        let mut differences = usual.clone();
        bend(&mut differences);
        decide(DEFAULT, &differences, BATCH, false).map(|decided| decided.windows)
    };
    assert_eq!(end(&|_| ()), Some(48));
    // A gain beyond what is assumed, a loss that is no number, and one beyond all numbers.
    assert_eq!(end(&|all| all[20] = 0.5), None);
    assert_eq!(end(&|all| all[20] = f64::NAN), None);
    assert_eq!(end(&|all| all[20] = f64::NEG_INFINITY), None);
    // A loss that large decides nothing by itself, and the rest must win anew, at a higher ceiling.
    let later = end(&|all| all[47] = -0.5);
    assert!(later.is_none_or(|windows| windows > 100), "{later:?}");
    // One that explodes is stopped all the same.
    assert_eq!(end(&|all| all.fill(-50.0)), Some(48));
    assert_eq!(end(&|all| all.truncate(31)), None, "too short");
}

#[test]
fn where_losses_may_be_negative_only_differences_tell() {
    let mut random = Random(8);
    let harmful: Vec<f64> = (0..256).map(|_| -1.0 + 0.1 * random.normal()).collect();
    let end = |stop| decide(stop, &harmful, BATCH, true).map(|decided| decided.windows);
    assert_eq!(end(PROVEN), None);
    assert!(end(DEFAULT).is_some());
}

#[test]
fn looks_come_after_whole_micro_batches_of_at_least_eight_windows() {
    for (batch, expected) in [(1, 8), (3, 9), (5, 10), (7, 14), (8, 8), (12, 12), (64, 64)] {
        assert_eq!(look(batch), expected, "{batch}");
    }
    let harmful = vec![-1.0; 256];
    for batch in [1, 3, 5, 8, 12, 64, 128, 256] {
        let end = decide(PROVEN, &harmful, batch, false).map(|decided| decided.windows);
        // Not at the first look, and not at the end.
        let expected =
            (batch <= 64).then(|| 16_usize.next_multiple_of(look(batch)).max(2 * look(batch)));
        assert_eq!(end, expected, "{batch}");
    }
}

#[test]
fn the_ratio_is_of_a_gain_to_the_differences_before_it() {
    let mut differences = vec![-1.0; 64];
    assert_eq!(gain_ratio(&differences, 8), Some(0.0), "nothing gains");
    differences[40] = 5.0;
    assert_eq!(gain_ratio(&differences, 8), Some(5.0));
    differences[3] = 99.0;
    differences.truncate(31);
    assert_eq!(gain_ratio(&differences, 8), None, "too short");
}
