//! Jobs as the rest of the crate sees them, and how a body becomes one, or an error with whom to answer.
//! Messages and their checks are in `message`. Every job that leaves here is valid.

use crate::protocol::encoding::Encoding;
use crate::protocol::names::is_submission_id;
use rmpv::Value;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::protocol::context::Context;
use crate::protocol::document::from_document;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::label::Label;
use crate::protocol::merge::OnRejected;
use crate::protocol::message::{MergeMessage, ScoreMessage, ValidateMessage};
use crate::protocol::stop::Stop;
use crate::protocol::word::words;

words! {
    /// The container of a candidate's bytes.
    pub enum Format {
        /// JSON of base64(zlib(values ++ int32 indices)) per tensor.
        BinaryV2,
        /// A safetensors file, dense or indexed.
        Safetensors,
        /// A torch zip with chunks.
        PtChunks,
    }
}

words! {
    /// How the whole body of a candidate is compressed.
    pub enum Compression {
        /// Zstandard.
        Zstd,
    }
}

words! {
    /// What the values of a candidate mean, as the wire says it.
    pub enum Semantics {
        /// `w <- w - learning_rate * g`.
        Gradient,
        /// `w <- w + d`.
        ParamDiff,
    }
}

/// Which windows of the held-out data a job is measured on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Validation {
    /// Shard ids, order kept, none twice; default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    pub shards: Option<Vec<u64>>,
    /// Chooses the windows; 0 to 64 characters.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub nonce: String,
}

words! {
    /// What kind of job it is.
    pub enum Kind {
        /// Judge a candidate.
        Score,
        /// Measure the current model.
        Validate,
        /// Judge candidates together.
        Merge,
    }
}

/// How a candidate's values change the weights. Computed in f32, rounded once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// `w <- w - learning_rate * g`.
    Gradient {
        /// Finite and positive.
        learning_rate: f64,
    },
    /// `w <- w + d`.
    ParamDiff,
}

impl Rule {
    /// The rule of these semantics.
    ///
    /// # Errors
    /// What is wrong with the learning rate.
    pub fn new(semantics: Semantics, learning_rate: Option<f64>) -> Result<Self, &'static str> {
        match (semantics, learning_rate) {
            (Semantics::Gradient, Some(learning_rate))
                if learning_rate.is_finite() && learning_rate > 0.0 =>
            {
                Ok(Self::Gradient { learning_rate })
            }
            (Semantics::Gradient, Some(_)) => Err("must be finite and greater than 0"),
            (Semantics::Gradient, None) => Err("missing, a gradient needs one"),
            (Semantics::ParamDiff, None) => Ok(Self::ParamDiff),
            (Semantics::ParamDiff, Some(_)) => Err("not allowed with param_diff"),
        }
    }

    /// The wire's word for it.
    pub fn semantics(self) -> Semantics {
        match self {
            Self::Gradient { .. } => Semantics::Gradient,
            Self::ParamDiff => Semantics::ParamDiff,
        }
    }

    /// The learning rate, where the rule has one.
    pub fn learning_rate(self) -> Option<f64> {
        match self {
            Self::Gradient { learning_rate } => Some(learning_rate),
            Self::ParamDiff => None,
        }
    }
}

/// Where a candidate's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// In the job itself.
    Inline(bytes::Bytes),
    /// To be fetched.
    Url(String),
}

/// A candidate whose description is sound; its bytes are still a stranger's.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// The container.
    pub format: Format,
    /// Compression of the whole body.
    pub compression: Option<Compression>,
    /// What the values do.
    pub rule: Rule,
    /// Where the bytes are.
    pub source: Source,
    /// What the sender says the digest is; always there for a URL.
    pub sha256: Option<[u8; 32]>,
    /// What the sender says the size is in bytes; always there for a URL.
    pub size: Option<u64>,
}

/// A candidate with its weight in a merge.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Its name in the job.
    pub id: String,
    /// Its weight.
    pub weight: f64,
    /// The update to judge.
    pub candidate: Candidate,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Task {
    /// Judge a candidate against this version of the weights.
    Score {
        /// The version the candidate was made from.
        model_version: u64,
        /// The update to judge.
        candidate: Box<Candidate>,
        /// Lets the evaluation end early.
        stop: Option<Stop>,
    },
    /// Measure the current model, if it has this version.
    Validate {
        /// The version asked for, if any.
        model_version: Option<u64>,
    },
    /// Judge candidates together, and each in the company of the others.
    Merge {
        /// The version the candidates were made from.
        model_version: u64,
        /// At least two, in ascending order of their ids, none twice.
        members: Vec<Member>,
        /// What becomes of the merge if one of them is refused.
        on_rejected: OnRejected,
    },
}

impl Task {
    /// What kind of job it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Score { .. } => Kind::Score,
            Self::Validate { .. } => Kind::Validate,
            Self::Merge { .. } => Kind::Merge,
        }
    }

    /// Whether its evaluation may end before the plan does.
    pub fn may_stop(&self) -> bool {
        match self {
            Self::Score { stop, .. } => stop.is_some(),
            Self::Validate { .. } | Self::Merge { .. } => false,
        }
    }

    /// The version the job names.
    pub fn model_version(&self) -> Option<u64> {
        match self {
            Self::Score { model_version, .. } | Self::Merge { model_version, .. } => {
                Some(*model_version)
            }
            Self::Validate { model_version } => *model_version,
        }
    }
}

/// A sound job.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Names the job.
    pub submission_id: String,
    /// The model it is for, if it says so.
    pub model: Option<String>,
    /// What is asked for.
    pub task: Task,
    /// The windows to use.
    pub validation: Validation,
    /// Unix milliseconds after which the answer is of no use.
    pub deadline_ms: Option<u64>,
    /// Echoed untouched.
    pub context: Option<Context>,
}

/// A body that is no sound job.
#[derive(Debug, Clone, PartialEq)]
pub enum Undecodable {
    /// Nobody to answer under a name of their own: not a map, or no readable `submission_id`.
    Anonymous(Failure),
    /// The schema is broken but the sender can be answered.
    Named {
        /// The job's name.
        submission_id: String,
        /// Its kind, as far as it can be read.
        kind: Kind,
        /// The version it names, as far as it can be read.
        model_version: Option<u64>,
        /// Its context, if that is sound.
        context: Option<Context>,
        /// What is wrong with it.
        failure: Failure,
    },
}

pub(super) fn invalid(message: impl Into<String>) -> Failure {
    Failure::new(Code::InvalidJob, message)
}

/// Decodes and checks a job. `said` is what its message says of the body.
///
/// # Errors
/// Says who can be answered and what is wrong, naming the field.
#[expect(clippy::result_large_err, reason = "one refusal per body, moved once")]
pub fn decode(body: &[u8], said: impl Into<Label>) -> Result<Job, Undecodable> {
    let label = said.into();
    let encoding = label.encoding();
    let anonymous = |why: String| Undecodable::Anonymous(invalid(why));
    let document = label.decode(body).map_err(anonymous)?;
    let Value::Map(fields) = document else {
        let found = crate::protocol::tree::kind(&document);
        return Err(anonymous(format!("the body is not a map but {found}")));
    };
    let submission_id = text_field(&fields, "submission_id").filter(|id| is_submission_id(id));
    let Some(submission_id) = submission_id.map(str::to_owned) else {
        return Err(anonymous(
            "submission_id: must be given once, 1 to 128 of the characters A-Z a-z 0-9 . _ : -"
                .into(),
        ));
    };
    let kind = match text_field(&fields, "kind") {
        Some("validate") => Kind::Validate,
        Some("merge") => Kind::Merge,
        Some(_) | None => Kind::Score,
    };
    let model_version = field(&fields, "model_version").and_then(Value::as_u64);
    let text = encoding.context_text(body);
    let context = field(&fields, "context")
        .and_then(|context| from_document(context).ok())
        .and_then(|context| Context::new(context, text.clone()).ok());
    parse(fields, encoding, text).map_err(|failure| Undecodable::Named {
        submission_id,
        kind,
        model_version,
        context,
        failure,
    })
}

fn parse(
    mut fields: Vec<(Value, Value)>,
    encoding: Encoding,
    text: Option<Box<RawValue>>,
) -> Result<Job, Failure> {
    crate::protocol::tree::check_unique(&fields).map_err(invalid)?;
    let kind = match fields.iter().position(|(k, _)| k.as_str() == Some("kind")) {
        Some(at) if !fields[at].1.is_nil() => fields.remove(at).1,
        Some(_) | None => {
            return Err(invalid(
                "kind: missing, it must be \"score\", \"validate\" or \"merge\"",
            ));
        }
    };
    let fields = Value::Map(fields);
    if encoding == Encoding::MessagePack {
        check_bytes(&fields)?;
    }
    match kind.as_str() {
        Some("score") => read::<ScoreMessage>(&fields)?.check(text),
        Some("validate") => read::<ValidateMessage>(&fields)?.check(text),
        Some("merge") => read::<MergeMessage>(&fields)?.check(text),
        Some(_) | None => Err(invalid(format!(
            "kind: {kind} is none of \"score\", \"validate\" and \"merge\""
        ))),
    }
}

/// Refuses text for bytes, which the types cannot: to them, text is how JSON carries bytes.
fn check_bytes(fields: &Value) -> Result<(), Failure> {
    let text = |holder: &Value| holder["candidate"]["data"].is_str();
    let refused = |holder: &str| {
        let message = format!("{holder}candidate.data: must be MessagePack bin, not text");
        Err(invalid(message))
    };
    if text(fields) {
        return refused("");
    }
    let members = fields["members"].as_array();
    match members.and_then(|members| members.iter().position(text)) {
        Some(at) => refused(&format!("members[{at}].")),
        None => Ok(()),
    }
}

fn read<T: DeserializeOwned>(fields: &Value) -> Result<T, Failure> {
    from_document(fields).map_err(invalid)
}

/// What is given once. Of two values neither can be said to be meant.
fn field<'a>(fields: &'a [(Value, Value)], name: &str) -> Option<&'a Value> {
    let mut found = fields.iter().filter(|(key, _)| key.as_str() == Some(name));
    match (found.next(), found.next()) {
        (Some((_, value)), None) => Some(value),
        (None | Some(_), None | Some(_)) => None,
    }
}

fn text_field<'a>(fields: &'a [(Value, Value)], name: &str) -> Option<&'a str> {
    field(fields, name).and_then(Value::as_str)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::protocol::encoding::MAX_NESTING;
    use serde_json::json;

    pub(in crate::protocol) const BOTH: [Encoding; 2] = [Encoding::Json, Encoding::MessagePack];

    pub(in crate::protocol) type Fields = Vec<(Value, Value)>;

    /// A sound job as the encoding carries it.
    pub(in crate::protocol) fn sound(encoding: Encoding) -> Fields {
        let mut job = fields(json!({
            "v": 1, "kind": "score", "submission_id": "s-1", "model_version": 7,
            "candidate": {"format": "binary_v2", "semantics": "gradient", "learning_rate": 0.5, "data": "e30="},
            "validation": {"shards": [3, 1], "nonce": "n"},
            "context": {"miner_id": 5}
        }));
        if encoding == Encoding::MessagePack {
            put(&mut job, "candidate.data", Value::Binary(b"{}".to_vec()));
        }
        job
    }

    pub(in crate::protocol) fn value(json: serde_json::Value) -> Value {
        rmpv::ext::to_value(json).unwrap()
    }

    pub(in crate::protocol) fn fields(json: serde_json::Value) -> Fields {
        let Value::Map(fields) = value(json) else {
            panic!("not a map")
        };
        fields
    }

    /// The map that holds the last name of a dotted path, and that name.
    pub(in crate::protocol) fn holder<'a>(
        mut fields: &'a mut Fields,
        path: &'a str,
    ) -> (&'a mut Fields, &'a str) {
        let mut names = path.split('.');
        let last = names.next_back().unwrap();
        for name in names {
            let (_, inner) = fields
                .iter_mut()
                .find(|(key, _)| key.as_str() == Some(name))
                .unwrap();
            let Value::Map(inner) = inner else {
                panic!("{name} is not a map")
            };
            fields = inner;
        }
        (fields, last)
    }

    pub(in crate::protocol) fn remove(job: &mut Fields, path: &str) {
        let (fields, name) = holder(job, path);
        fields.retain(|(key, _)| key.as_str() != Some(name));
    }

    pub(in crate::protocol) fn put(job: &mut Fields, path: &str, value: Value) {
        remove(job, path);
        let (fields, name) = holder(job, path);
        fields.push((name.into(), value));
    }

    #[expect(clippy::result_large_err, reason = "as the function it calls")]
    pub(in crate::protocol) fn decoded(
        job: Fields,
        encoding: Encoding,
    ) -> Result<Job, Undecodable> {
        decode(&encoding.encode(&Value::Map(job)).unwrap(), encoding)
    }

    /// What the sender is told, and under which name.
    pub(in crate::protocol) fn refusal(
        job: Fields,
        encoding: Encoding,
    ) -> (Option<String>, String) {
        match decoded(job, encoding) {
            Ok(job) => panic!("accepted: {job:?}"),
            Err(Undecodable::Anonymous(failure)) => (None, failure.message),
            Err(Undecodable::Named {
                submission_id,
                failure,
                ..
            }) => (Some(submission_id), failure.message),
        }
    }

    #[test]
    fn the_same_job_decodes_equally_from_json_and_messagepack() {
        let [json, packed] = BOTH.map(|encoding| {
            let job = decoded(sound(encoding), encoding).unwrap();
            let context = read_back(encoding, job.context);
            (
                Job {
                    context: None,
                    ..job
                },
                context,
            )
        });
        assert_eq!(json, packed);
        let (json, _) = json;
        assert_eq!(json.validation.shards, Some(vec![3, 1]), "order kept");
    }

    #[test]
    fn a_body_without_a_name_is_anonymous() {
        for body in [&b"\xc1"[..], b"[1]", b"{}", b"{\"submission_id\": 5}", b""] {
            for encoding in BOTH {
                assert!(
                    matches!(decode(body, encoding), Err(Undecodable::Anonymous(_))),
                    "{body:?}"
                );
            }
        }
        for name in [
            json!("a b"),
            json!(""),
            json!("a".repeat(129)),
            json!(5),
            json!(null),
        ] {
            for encoding in BOTH {
                let mut job = sound(encoding);
                put(&mut job, "submission_id", value(name.clone()));
                let (answered, message) = refusal(job, encoding);
                assert_eq!(answered, None, "{name}");
                assert!(message.starts_with("submission_id: "), "{message}");
            }
        }
    }

    #[test]
    fn a_job_of_two_names_is_answered_under_neither() {
        for encoding in BOTH {
            let mut job = sound(encoding);
            job.push(("submission_id".into(), "s-2".into()));
            assert_eq!(refusal(job, encoding).0, None);
        }
    }

    #[test]
    fn a_refusal_carries_what_could_be_read() {
        for encoding in BOTH {
            let mut job = sound(encoding);
            put(&mut job, "v", 2.into());
            let Err(Undecodable::Named {
                submission_id,
                kind,
                model_version,
                context,
                ..
            }) = decoded(job, encoding)
            else {
                panic!("not named")
            };
            assert_eq!((submission_id.as_str(), kind), ("s-1", Kind::Score));
            assert_eq!(model_version, Some(7));
            assert_eq!(read_back(encoding, context), value(json!({"miner_id": 5})));
        }
    }

    fn read_back(encoding: Encoding, context: Option<Context>) -> Value {
        encoding
            .decode(&encoding.encode(&context).unwrap())
            .unwrap()
    }

    #[test]
    fn a_context_that_cannot_be_echoed_is_left_out_of_the_refusal() {
        for context in [
            value(json!([1])),
            value(json!({"long": "x".repeat(5000)})),
            Value::Map(vec![("a".into(), 1.into()), ("a".into(), 2.into())]),
        ] {
            for encoding in BOTH {
                let mut job = sound(encoding);
                put(&mut job, "context", context.clone());
                let refused = decoded(job, encoding);
                assert!(
                    matches!(refused, Err(Undecodable::Named { context: None, .. })),
                    "{refused:?}"
                );
            }
        }
    }

    #[test]
    fn a_refusal_does_not_repeat_a_long_word() {
        let long = "x".repeat(1_000_000);
        for path in ["kind", "candidate.format", &long] {
            for encoding in BOTH {
                let mut job = sound(encoding);
                put(&mut job, path, long.as_str().into());
                let (_, message) = refusal(job, encoding);
                assert!(message.len() < 500, "{} bytes", message.len());
            }
        }
    }

    #[test]
    fn deeply_nested_bodies_are_refused_not_followed() {
        let json = "[".repeat(100_000);
        assert!(Encoding::Json.decode(json.as_bytes()).is_err());
        assert!(Encoding::MessagePack.decode(&vec![0x91; 100_000]).is_err());
    }

    #[test]
    fn both_encodings_end_at_the_same_depth() {
        // The body is one level, its context another.
        for (lists, accepted) in [(MAX_NESTING - 2, true), (MAX_NESTING - 1, false)] {
            for leaf in [Value::Nil, "text".into(), Value::Array(vec![])] {
                let lists = lists - usize::from(leaf.is_array());
                let deep = (0..lists).fold(leaf, |inner, _| Value::Array(vec![inner]));
                for encoding in BOTH {
                    let mut job = sound(encoding);
                    let context = Value::Map(vec![("deep".into(), deep.clone())]);
                    put(&mut job, "context", context);
                    assert_eq!(decoded(job, encoding).is_ok(), accepted, "{encoding:?}");
                }
            }
        }
    }

    #[test]
    fn what_the_body_is_instead_of_a_map_is_said() {
        for (body, found) in [
            ("[1]", "a list"),
            ("\"{}\"", "text"),
            ("7", "a number"),
            ("null", "null"),
        ] {
            let refused = decode(body.as_bytes(), Encoding::Json);
            let Err(Undecodable::Anonymous(failure)) = refused else {
                panic!("{refused:?}")
            };
            assert_eq!(
                failure.message,
                format!("the body is not a map but {found}")
            );
        }
    }

    #[test]
    fn a_job_without_a_content_type_hears_what_it_looks_like() {
        let refused = decode(br#"{"v":1}"#, Label::default());
        let Err(Undecodable::Anonymous(failure)) = refused else {
            panic!("{refused:?}")
        };
        let expected = "looks like JSON; content_type is missing, application/json is needed";
        assert!(failure.message.starts_with(expected), "{failure}");
    }
}
