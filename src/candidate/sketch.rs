//! A min-hash sketch of the weights that a candidate changes, small enough to travel with every
//! result: who compares sketches finds copies without fetching a single candidate.
//!
//! Every changed weight has a hash of 64 bits: the output number `index` of the `SplitMix64` generator
//! whose seed is the first eight bytes, big endian, of SHA-256 of the tensor's name. Its upper 6 bits
//! choose one of 64 bins, its lower 53 are kept where they are the smallest of their bin. (Li, Owen,
//! Zhang: One Permutation Hashing, 2012.)

use sha2::{Digest, Sha256};

/// How many values a sketch has.
pub const BINS: usize = 64;
/// Whole numbers up to here are read exactly by every JSON reader.
const MASK: u64 = (1 << 53) - 1;

/// The smallest hash of each bin; none where no changed weight fell into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sketch {
    /// [`BINS`] of them.
    pub values: Vec<Option<u64>>,
}

impl Default for Sketch {
    fn default() -> Self {
        Self {
            values: vec![None; BINS],
        }
    }
}

impl Sketch {
    /// Takes note of the changed weights of a tensor.
    pub fn note(&mut self, name: &str, indices: impl Iterator<Item = u32>) {
        let digest = Sha256::digest(name.as_bytes());
        let seed = digest.first_chunk().map_or(0, |b| u64::from_be_bytes(*b));
        let mut smallest = [u64::MAX; BINS];
        for index in indices {
            let hash = split_mix(seed, index.into());
            let bin = &mut smallest[(hash >> 58) as usize];
            *bin = (*bin).min(hash & MASK);
        }
        for (value, found) in self.values.iter_mut().zip(smallest) {
            let found = Some(found).filter(|found| *found <= MASK);
            *value = match (*value, found) {
                (Some(known), Some(found)) => Some(known.min(found)),
                (known, found) => known.or(found),
            };
        }
    }

    /// An estimate of how many of the weights that either changes both change, 0 to 1, with a
    /// standard error of at most 1/16; none where neither changes any.
    pub fn similarity(&self, other: &Self) -> Option<f64> {
        let pairs = || self.values.iter().zip(&other.values);
        let filled = pairs().filter(|(a, b)| a.is_some() || b.is_some()).count();
        let equal = pairs().filter(|(a, b)| a.is_some() && a == b).count();
        #[expect(clippy::cast_precision_loss, reason = "at most 64")]
        let ratio = |a: usize, b: usize| a as f64 / b as f64;
        (filled > 0).then(|| ratio(equal, filled))
    }
}

/// Output number `index`, from 0, of the generator with this seed.
fn split_mix(seed: u64, index: u64) -> u64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let z = seed.wrapping_add(STEP.wrapping_mul(index + 1));
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    /// So many weights of a layer with a million, chosen by the seed.
    fn chosen(seed: u64, count: usize) -> Vec<u32> {
        let mut random = StdRng::seed_from_u64(seed);
        let mut indices: Vec<u32> = Vec::new();
        indices.resize_with(count, || random.random_range(0..1_000_000));
        indices
    }

    fn sketch(parts: &[&[u32]]) -> Sketch {
        let mut sketch = Sketch::default();
        for part in parts {
            sketch.note("layer.weight", part.iter().copied());
        }
        sketch
    }

    #[test]
    fn the_generator_is_the_published_one() {
        // The first outputs for seed 1234567, as its author's program prints them.
        let outputs = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973];
        for (index, output) in (0..).zip(outputs) {
            assert_eq!(split_mix(1_234_567, index), output);
        }
    }

    #[test]
    fn copies_half_copies_and_strangers_are_told_apart() {
        for seed in 0..100 {
            let (mine, yours) = (chosen(seed, 10_000), chosen(1000 + seed, 10_000));
            let original = sketch(&[&mine]);
            let similar = |other: &Sketch| original.similarity(other).unwrap();
            assert!((similar(&sketch(&[&mine])) - 1.0).abs() < f64::EPSILON);
            // Half of it and as much of something else: a third of what either changes.
            let half = similar(&sketch(&[&mine[..5000], &yours[..5000]]));
            assert!((0.1..0.6).contains(&half), "{seed}: {half}");
            let padded = similar(&sketch(&[&mine, &yours[..2000]]));
            assert!(padded > 0.6, "{seed}: {padded}");
            // One of a hundred weights is in both by chance: 0.5 % of what either changes.
            let stranger = similar(&sketch(&[&yours]));
            assert!(stranger < 0.1, "{seed}: {stranger}");
        }
    }

    #[test]
    fn a_sketch_of_few_weights_says_where_it_knows_nothing() {
        let few = sketch(&[&[1, 2, 3]]);
        assert!(few.values.iter().flatten().count() <= 3);
        assert_eq!(few.similarity(&sketch(&[&[3, 2, 1]])), Some(1.0));
        assert_eq!(few.similarity(&sketch(&[&[4, 5, 6]])), Some(0.0));
        assert_eq!(sketch(&[]).similarity(&sketch(&[])), None);
    }

    #[test]
    fn tensors_with_other_names_are_other_weights() {
        let mut other = Sketch::default();
        other.note("other.weight", 0..1000);
        let indices: Vec<u32> = (0..1000).collect();
        assert!(sketch(&[&indices]).similarity(&other).unwrap() < 0.1);
    }
}
