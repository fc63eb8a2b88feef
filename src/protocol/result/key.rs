//! The key under which a result that any worker would repeat is stored.

use rmpv::Value;
use sha2::{Digest, Sha256};

use crate::protocol::job::{Candidate, Rule};
use crate::protocol::result::{JobRef, ResultOrigin};
use crate::protocol::stop::Stop;
use crate::protocol::tree::packed;

/// The candidate that is asked about, with its digest: the claimed one of a URL, the real one of inline data. And whether
/// its evaluation may end early.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// What is to be judged.
    pub candidate: &'a Candidate,
    /// Of its bytes.
    pub sha256: &'a [u8; 32],
    /// As the job has it.
    pub stop: Option<Stop>,
}

/// What a job asks, exactly: hex SHA-256 of a MessagePack array.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key(pub String);

impl Key {
    /// The key of a job on these weights and windows.
    pub fn new(
        answerer: &ResultOrigin,
        job_ref: &JobRef,
        asked: Option<Asked<'_>>,
        plan: &[u8; 32],
    ) -> Self {
        let nil = Value::Nil;
        let text = |t: &str| Value::from(t);
        let candidate = asked.map(|asked| asked.candidate);
        let rule = candidate.map(|candidate| candidate.rule);
        let mut parts = vec![
            text(job_ref.kind.as_str()),
            text(&job_ref.submission_id),
            Value::from(job_ref.model_version.unwrap_or(answerer.model_version)),
            text(&answerer.package_id),
            text(&answerer.weights_id),
            asked.map_or(nil.clone(), |asked| text(&hex::encode(asked.sha256))),
            candidate.map_or(nil.clone(), |candidate| text(candidate.format.as_str())),
            rule.map_or(nil.clone(), |r| text(r.semantics().as_str())),
            rule.and_then(Rule::learning_rate)
                .map_or(nil.clone(), Value::from),
            text(&hex::encode(plan)),
        ];
        // Jobs that give neither have the keys that they always had.
        let compression = candidate.and_then(|candidate| candidate.compression);
        let stop = asked.and_then(|asked| asked.stop);
        if compression.is_some() || stop.is_some() {
            parts.push(compression.map_or(nil.clone(), |c| text(c.as_str())));
            parts.push(stop.map_or(nil, |stop| {
                Value::Array(vec![
                    stop.alpha.into(),
                    stop.margin.into(),
                    stop.proven.into(),
                ])
            }));
        }
        Self(hex::encode(Sha256::digest(packed(&Value::Array(parts)))))
    }

    /// A number of at least 0 and below 1, the same for everybody who has the key, by which some of the jobs are drawn.
    pub fn lot(&self) -> f64 {
        let digits = self
            .0
            .get(..8)
            .and_then(|digits| u32::from_str_radix(digits, 16).ok());
        digits.map_or(1.0, |drawn| f64::from(drawn) / 2f64.powi(32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::job::{Compression, Format, Kind, Source};
    use crate::protocol::result::tests::{answerer, job_ref};

    #[test]
    fn the_key_depends_on_what_is_asked_and_not_on_who_answers() {
        let key = |answerer: &ResultOrigin, plan| Key::new(answerer, &job_ref(), None, plan);
        let other = ResultOrigin {
            worker_id: "b".into(),
            incarnation: "j".into(),
            ..answerer()
        };
        assert_eq!(key(&answerer(), &[0; 32]), key(&other, &[0; 32]));
        assert_ne!(key(&answerer(), &[0; 32]), key(&answerer(), &[1; 32]));
        let newer = ResultOrigin {
            weights_id: "w2".into(),
            ..answerer()
        };
        assert_ne!(key(&answerer(), &[0; 32]), key(&newer, &[0; 32]));
    }

    /// The digests were computed from the contract's words by another program.
    #[test]
    fn compression_and_stop_are_part_of_the_key_where_either_is_given() {
        let job_ref = JobRef {
            kind: Kind::Score,
            model_version: Some(7),
            ..job_ref()
        };
        type Case = (Option<Compression>, Option<(f64, f64, bool)>, &'static str);
        let table: [Case; 4] = [
            (
                None,
                None,
                "70b182eff38bff7f2805cfc09ef7694f8bd71744bc78e2e56079e0526ecb9c22",
            ),
            (
                Some(Compression::Zstd),
                None,
                "45a3fd6615770ed0328562e2d0abe8e386345804b4004b5164d74362dc720ebc",
            ),
            (
                None,
                Some((0.01, 0.0, false)),
                "5a2c88d20e8f679170ba2ccf9ccafe606aca1cf3c9cd3f33f8e323de8b5634c2",
            ),
            (
                Some(Compression::Zstd),
                Some((0.05, 0.0005, true)),
                "c197a24a43038ec5be735f05b7166b3e4530b4cc37e7d8be956607cc6d378653",
            ),
        ];
        for (compression, stop, expected) in table {
            let candidate = Candidate {
                format: Format::BinaryV2,
                compression,
                rule: Rule::Gradient { learning_rate: 0.5 },
                source: Source::Inline(bytes::Bytes::new()),
                sha256: None,
                size: None,
            };
            let asked = Asked {
                candidate: &candidate,
                sha256: &[0xab; 32],
                stop: stop.map(|(alpha, margin, proven)| Stop {
                    alpha,
                    margin,
                    proven,
                }),
            };
            let key = Key::new(&answerer(), &job_ref, Some(asked), &[0; 32]);
            assert_eq!(key.0, expected, "{compression:?}, {stop:?}");
        }
    }

    #[test]
    fn lots_are_drawn_evenly() {
        let lot = |n: u64| Key(hex::encode(Sha256::digest(n.to_be_bytes()))).lot();
        let drawn = (0..10_000).filter(|n| lot(*n) < 0.05).count();
        assert!((430..570).contains(&drawn), "{drawn}");
        assert!(Key("f".repeat(64)).lot() < 1.0);
        assert_eq!(Key("0".repeat(64)).lot().to_bits(), 0);
    }
}
