//! A min-hash sketch of the weights that a candidate changes, small enough to travel with every
//! result: who compares sketches finds copies without fetching a single candidate.
//!
//! Every changed weight has a hash of 64 bits: the output number `index` of the `SplitMix64` generator
//! whose seed is the first eight bytes, big endian, of SHA-256 of the plan's hash and the tensor's name.
//! Its upper 6 bits choose one of 64 bins, its lower 53 are kept where they are the smallest of their
//! bin. (Li, Owen, Zhang: One Permutation Hashing, 2012.)
//!
//! The plan is the salt: whoever knew the hashes could add the few weights that fill all bins, to hide
//! a copy or to look like one. A nonce that is chosen when the candidates are in keeps them unknown.

use crate::protocol::result::SKETCH_BINS as BINS;
use sha2::{Digest, Sha256};

/// Whole numbers up to here are read exactly by every JSON reader.
const MASK: u64 = (1 << 53) - 1;

/// The smallest hash of each bin; none where no changed weight fell into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sketch {
    /// [`BINS`] of them.
    pub values: Vec<Option<u64>>,
    salt: [u8; 32],
}

impl Sketch {
    /// Of nothing yet; only sketches with the same salt can be compared.
    pub fn salted(salt: &[u8; 32]) -> Self {
        Self {
            values: vec![None; BINS],
            salt: *salt,
        }
    }

    /// Takes note of the changed weights of a tensor.
    pub fn note(&mut self, name: &str, indices: impl Iterator<Item = u32>) {
        let digest = Sha256::new_with_prefix(self.salt).chain_update(name);
        let digest = digest.finalize();
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
    use crate::protocol::result::similarity;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    /// So many weights of a layer with a million, chosen by the seed.
    fn chosen(seed: u64, count: usize) -> Vec<u32> {
        let mut random = StdRng::seed_from_u64(seed);
        let mut indices: Vec<u32> = Vec::new();
        indices.resize_with(count, || random.random_range(0..1_000_000));
        indices
    }

    const SALT: [u8; 32] = [7; 32];

    fn sketch(parts: &[&[u32]]) -> Vec<Option<u64>> {
        let mut sketch = Sketch::salted(&SALT);
        for part in parts {
            sketch.note("layer.weight", part.iter().copied());
        }
        sketch.values
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
            let similar = |other: &[_]| similarity(&original, other).unwrap();
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
        assert!(few.iter().flatten().count() <= 3);
        assert_eq!(similarity(&few, &sketch(&[&[3, 2, 1]])), Some(1.0));
        assert_eq!(similarity(&few, &sketch(&[&[4, 5, 6]])), Some(0.0));
        assert_eq!(similarity(&sketch(&[]), &sketch(&[])), None);
    }

    #[test]
    fn tensors_with_other_names_are_other_weights() {
        let mut other = Sketch::salted(&SALT);
        other.note("other.weight", 0..1000);
        let indices: Vec<u32> = (0..1000).collect();
        assert!(similarity(&sketch(&[&indices]), &other.values).unwrap() < 0.1);
    }

    /// For one salt, 64 weights of a million own all bins: whoever adds them to a copy seems to be a
    /// stranger, and whoever adds another's seems to be the other. For the next salt they own nothing.
    #[test]
    fn weights_that_were_chosen_for_one_salt_hide_nothing_under_another() {
        let mut owners = [(u64::MAX, 0); BINS];
        for index in 0..1_000_000 {
            let mut one = Sketch::salted(&SALT);
            one.note("layer.weight", std::iter::once(index));
            let at = one.values.iter().position(Option::is_some).unwrap();
            owners[at] = owners[at].min((one.values[at].unwrap(), index));
        }
        let owners = owners.map(|(_, index)| index);
        let mine = chosen(1, 10_000);
        let under = |salt: u8| {
            let of = |parts: &[&[u32]]| {
                let mut sketch = Sketch::salted(&[salt; 32]);
                for part in parts {
                    sketch.note("layer.weight", part.iter().copied());
                }
                sketch.values
            };
            similarity(&of(&[&mine]), &of(&[&mine, &owners])).unwrap()
        };
        assert!(
            under(7) < 0.1 && under(8) > 0.9,
            "{}, {}",
            under(7),
            under(8)
        );
    }
}
