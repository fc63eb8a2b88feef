//! The key under which a result that any worker would repeat is stored.

use rmpv::Value;
use sha2::{Digest, Sha256};

use crate::protocol::job::{Candidate, Compression, Member};
use crate::protocol::merge::OnRejected;
use crate::protocol::result::{JobRef, ResultOrigin};
use crate::protocol::stop::Stop;
use crate::protocol::tree::packed;

/// What is asked about, beside the windows. A digest is the claimed one of a URL, the real one of inline data.
#[derive(Debug, Clone, Copy)]
pub enum Asked<'a> {
    /// The current model.
    Model,
    /// A candidate.
    Candidate {
        /// What is to be judged.
        candidate: &'a Candidate,
        /// Of its bytes.
        sha256: &'a [u8; 32],
        /// Whether its evaluation may end early, as the job has it.
        stop: Option<Stop>,
    },
    /// A merge.
    Merge {
        /// In ascending order of their ids.
        members: &'a [Member],
        /// Of the bytes of each.
        sha256s: &'a [[u8; 32]],
        /// As the job has it.
        on_rejected: OnRejected,
    },
}

/// What a job asks, exactly: hex SHA-256 of a MessagePack array.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key(pub String);

impl Key {
    /// The key of a job on these weights and windows.
    pub fn new(
        answerer: &ResultOrigin,
        job_ref: &JobRef,
        asked: Asked<'_>,
        plan: &[u8; 32],
    ) -> Self {
        let mut parts = vec![
            job_ref.kind.as_str().into(),
            job_ref.submission_id.as_str().into(),
            Value::from(job_ref.model_version.unwrap_or(answerer.model_version)),
            answerer.package_id.as_str().into(),
            answerer.weights_id.as_str().into(),
        ];
        parts.extend(asked.subject());
        parts.push(hex::encode(plan).into());
        parts.extend(asked.options());
        Self(digest(parts))
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

impl Asked<'_> {
    /// Digest, format, semantics and learning rate, as far as there are any.
    fn subject(self) -> [Value; 4] {
        match self {
            Self::Model => [Value::Nil, Value::Nil, Value::Nil, Value::Nil],
            Self::Candidate {
                candidate, sha256, ..
            } => [
                hex::encode(sha256).into(),
                candidate.format.as_str().into(),
                candidate.rule.semantics().as_str().into(),
                or_nil(candidate.rule.learning_rate()),
            ],
            Self::Merge {
                members, sha256s, ..
            } => {
                let members = members.iter().zip(sha256s);
                let members = members.map(|(member, sha256)| described(member, sha256));
                let digest = digest(members.collect());
                [digest.into(), Value::Nil, Value::Nil, Value::Nil]
            }
        }
    }

    /// What came later: jobs of before have the keys that they always had.
    fn options(self) -> Vec<Value> {
        match self {
            Self::Model => Vec::new(),
            Self::Candidate {
                candidate, stop, ..
            } => match (candidate.compression, stop) {
                (None, None) => Vec::new(),
                (compression, stop) => {
                    let numbers = |stop: Stop| -> Value {
                        Value::Array(vec![
                            stop.alpha.into(),
                            stop.margin.into(),
                            stop.proven.into(),
                        ])
                    };
                    let compression = compression.map(Compression::as_str);
                    vec![or_nil(compression), or_nil(stop.map(numbers))]
                }
            },
            Self::Merge { on_rejected, .. } => vec![on_rejected.as_str().into()],
        }
    }
}

fn described(member: &Member, sha256: &[u8; 32]) -> Value {
    let Candidate {
        format,
        compression,
        rule,
        ..
    } = &member.candidate;
    let parts: Vec<Value> = vec![
        member.id.as_str().into(),
        hex::encode(sha256).into(),
        format.as_str().into(),
        or_nil(compression.map(Compression::as_str)),
        rule.semantics().as_str().into(),
        or_nil(rule.learning_rate()),
        member.weight.into(),
    ];
    parts.into()
}

fn or_nil(part: Option<impl Into<Value>>) -> Value {
    part.map_or(Value::Nil, Into::into)
}

fn digest(parts: Vec<Value>) -> String {
    hex::encode(Sha256::digest(packed(&Value::Array(parts))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::job::{Format, Kind, Rule, Source};
    use crate::protocol::result::tests::{answerer, job_ref};

    #[test]
    fn the_key_depends_on_what_is_asked_and_not_on_who_answers() {
        let key =
            |answerer: &ResultOrigin, plan| Key::new(answerer, &job_ref(), Asked::Model, plan);
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
            let asked = Asked::Candidate {
                candidate: &candidate,
                sha256: &[0xab; 32],
                stop: stop.map(|(alpha, margin, proven)| Stop {
                    alpha,
                    margin,
                    proven,
                }),
            };
            let key = Key::new(&answerer(), &job_ref, asked, &[0; 32]);
            assert_eq!(key.0, expected, "{compression:?}, {stop:?}");
        }
    }

    /// The digests were computed from the contract's words by another program.
    #[test]
    fn members_weights_and_what_becomes_of_a_refusal_are_part_of_the_key_of_a_merge() {
        let job_ref = JobRef {
            kind: Kind::Merge,
            model_version: Some(7),
            ..job_ref()
        };
        let member = |id: &str, weight, format, compression, rule| Member {
            id: id.into(),
            weight,
            candidate: Candidate {
                format,
                compression,
                rule,
                source: Source::Inline(bytes::Bytes::new()),
                sha256: None,
                size: None,
            },
        };
        let (gradient, zstd) = (Rule::Gradient { learning_rate: 0.5 }, Compression::Zstd);
        let members = [
            member("a", 0.25, Format::BinaryV2, None, gradient),
            member("b", -1.0, Format::Safetensors, Some(zstd), Rule::ParamDiff),
        ];
        for (on_rejected, expected) in [
            (
                OnRejected::Drop,
                "25fa00a0ea046dd5b1d972ec1c11f839edd7eeb924ce661f21c5d4a4f9c1d608",
            ),
            (
                OnRejected::Fail,
                "1492a6f5bf120124b019811d1d2633d5461c9dffeae2bcf8b8f26c7848e662fb",
            ),
        ] {
            let asked = Asked::Merge {
                members: &members,
                sha256s: &[[0xab; 32], [0xcd; 32]],
                on_rejected,
            };
            let key = Key::new(&answerer(), &job_ref, asked, &[0; 32]);
            assert_eq!(key.0, expected, "{on_rejected:?}");
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
