//! The key under which a result that any worker would repeat is stored.

use rmpv::Value;
use sha2::{Digest, Sha256};

use crate::protocol::job::{Candidate, Rule};
use crate::protocol::result::{JobRef, ResultOrigin};
use crate::protocol::tree::packed;

/// What a job asks, exactly: hex SHA-256 of a MessagePack array.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key(pub String);

impl Key {
    /// The key of a job on these weights and windows. `sha256` is the claimed digest for a URL,
    /// the real one for inline data.
    pub fn new(
        answerer: &ResultOrigin,
        job_ref: &JobRef,
        candidate: Option<(&Candidate, &[u8; 32])>,
        plan: &[u8; 32],
    ) -> Self {
        let nil = Value::Nil;
        let text = |t: &str| Value::from(t);
        let rule = candidate.map(|(c, _)| c.rule);
        let parts = Value::Array(vec![
            text(job_ref.kind.as_str()),
            text(&job_ref.submission_id),
            Value::from(job_ref.model_version.unwrap_or(answerer.model_version)),
            text(&answerer.package_id),
            text(&answerer.weights_id),
            candidate.map_or(nil.clone(), |(_, sha256)| text(&hex::encode(sha256))),
            candidate.map_or(nil.clone(), |(c, _)| text(c.format.as_str())),
            rule.map_or(nil.clone(), |r| text(r.semantics().as_str())),
            rule.and_then(Rule::learning_rate).map_or(nil, Value::from),
            text(&hex::encode(plan)),
        ]);
        Self(hex::encode(Sha256::digest(packed(&parts))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
}
