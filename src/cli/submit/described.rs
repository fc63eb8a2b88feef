//! Jobs made from the command's arguments: one per candidate, or one merge.

use std::collections::HashSet;
use std::path::Path;

use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::SubmitArgs;
use super::job::Submission;
use crate::candidate::fetch::{Claims, Fetched, Fetcher};
use crate::cli::merge::MemberArg;
use crate::cli::offline::rule;
use crate::cli::{Fault, format};
use crate::config::{CandidatesConfig, Config};
use crate::protocol::encoding::Encoding;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::job::{Compression, Format, Kind};

/// The context as given, with every digit.
fn read_context(text: &str) -> Result<Box<RawValue>, Fault> {
    let named = |why: &dyn std::fmt::Display| Fault::data(format!("--context: {why}"));
    let read = Encoding::Json.decode(text.as_bytes());
    match read.map_err(|e| named(&e))?.is_map() {
        true => serde_json::from_str(text).map_err(|e| named(&e)),
        false => Err(named(&"must be a JSON object")),
    }
}

/// A job made from the arguments.
#[derive(Serialize)]
struct Described<'a> {
    #[serde(flatten)]
    job: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    context: Option<&'a RawValue>,
}

/// What all jobs of a command have in common.
struct Common {
    version: u64,
    context: Option<Box<RawValue>>,
    validation: Value,
    /// Of every candidate.
    content: Map<String, Value>,
}

impl Common {
    fn new(config: &Config, args: &SubmitArgs) -> Result<Self, Fault> {
        let semantics = args
            .semantics
            .ok_or_else(|| Fault::usage("--semantics: missing, must be gradient or param_diff"))?;
        rule(semantics, args.learning_rate)?;
        let mut content = Map::new();
        content.insert("format".into(), json!(args.format.as_str()));
        if let Some(compression) = args.compression {
            content.insert("compression".into(), json!(compression));
        }
        content.insert("semantics".into(), json!(semantics.as_str()));
        if let Some(rate) = args.learning_rate {
            content.insert("learning_rate".into(), json!(rate));
        }
        let mut validation = json!({ "nonce": args.windows.nonce });
        if let Some(shards) = &args.windows.shards {
            validation["shards"] = json!(shards);
        }
        if let Some(stop) = &args.stop.stop {
            validation["stop"] = json!(stop);
        }
        Ok(Self {
            version: version(config, args)?,
            context: args.context.as_deref().map(read_context).transpose()?,
            validation,
            content,
        })
    }

    /// A job of this kind and name; `subject` is what it is about.
    fn job(
        &self,
        kind: Kind,
        id: String,
        subject: Map<String, Value>,
    ) -> Result<Submission, Fault> {
        let mut job = json!({
            "v": 1, "kind": kind.as_str(), "submission_id": id, "model_version": self.version,
            "validation": self.validation,
        });
        if let Value::Object(job) = &mut job {
            job.extend(subject);
        }
        let context = self.context.as_deref();
        let body = serde_json::to_string(&Described { job, context });
        let body = body.map_err(Fault::internal)?;
        Ok(Submission { id, body })
    }
}

pub(super) async fn describe(config: &Config, args: &SubmitArgs) -> Result<Vec<Submission>, Fault> {
    let common = Common::new(config, args)?;
    let mut names = HashSet::new();
    let mut jobs = Vec::with_capacity(args.candidate.len());
    for place in &args.candidate {
        let room = room(config, args);
        let said = (args.format, args.compression);
        let candidate = candidate(config, "--candidate", place, (room, said));
        let (stem, mut candidate, _) = candidate.await?;
        candidate.extend(common.content.clone());
        let id = unique(&stem, &mut names);
        let subject = Map::from_iter([("candidate".into(), Value::Object(candidate))]);
        jobs.push(common.job(Kind::Score, id, subject)?);
    }
    Ok(jobs)
}

/// One merge job of all members.
pub(super) async fn describe_merge(
    config: &Config,
    args: &SubmitArgs,
    id: &str,
) -> Result<Submission, Fault> {
    let common = Common::new(config, args)?;
    let mut room = room(config, args);
    let mut members = Vec::with_capacity(args.members.len());
    for MemberArg { id, place, weight } in &args.members {
        let said = (args.format, args.compression);
        let candidate = candidate(config, "--member", place, (room, said));
        let (_, mut candidate, inline) = candidate.await?;
        // What workers take is bounded by the sum.
        room = room.map(|room| room.saturating_sub(inline));
        candidate.extend(common.content.clone());
        let mut member = json!({"id": id, "candidate": candidate});
        if let Some(weight) = weight {
            member["weight"] = json!(weight);
        }
        members.push(member);
    }
    let mut subject = Map::from_iter([("members".into(), Value::Array(members))]);
    if let Some(on_rejected) = args.on_rejected {
        subject.insert("on_rejected".into(), json!(on_rejected));
    }
    common.job(Kind::Merge, id.to_owned(), subject)
}

/// How many bytes a job may carry; none where it shall carry them all.
fn room(config: &Config, args: &SubmitArgs) -> Option<u64> {
    (!args.inline).then_some(config.candidates.max_inline_bytes)
}

pub(super) fn version(config: &Config, args: &SubmitArgs) -> Result<u64, Fault> {
    match (args.model_version, &config.model.dir) {
        (Some(version), _) => Ok(version),
        (None, Some(dir)) => {
            let read = crate::model::package::Package::read_manifest(dir);
            read.map(|(manifest, _)| manifest.version)
                .map_err(Fault::data)
        }
        (None, None) => Err(Fault::usage(
            "--model-version: missing, and model.dir is not set",
        )),
    }
}

/// A free name: the second candidate of a name gets `-2` and so on, since results are told apart by name.
fn unique(stem: &str, names: &mut HashSet<String>) -> String {
    let numbered = (2..).map(|n| format!("{stem}-{n}"));
    let mut all = std::iter::once(stem.to_owned()).chain(numbered);
    let free = all.find(|name| !names.contains(name)).unwrap_or_default();
    names.insert(free.clone());
    free
}

/// A name for the job, the fields that say where its candidate's bytes are, and how many of them the job carries: a file's
/// where there is room, all of them where no bound is given. `flag` names who gave the place, and `said` what is there.
async fn candidate(
    config: &Config,
    flag: &str,
    place: &str,
    (room, said): (Option<u64>, (Format, Option<Compression>)),
) -> Result<(String, Map<String, Value>, u64), Fault> {
    use base64::Engine as _;
    let url = match place.contains("://") {
        true => url::Url::parse(place).map_err(|e| Fault::data(format!("{flag} {place}: {e}")))?,
        false => {
            let path = Path::new(place)
                .canonicalize()
                .map_err(|e| Fault::data(format!("{flag} {place}: {e}")))?;
            url::Url::from_file_path(&path)
                .map_err(|()| Fault::data(format!("{flag} {place}: not a path")))?
        }
    };
    let fetched = fetch(config, &url).await;
    let fetched = fetched.map_err(|e| {
        let whose = match e.code == Code::CandidateTooLarge {
            true => " (the limit of this command; workers have their own)",
            false => "",
        };
        Fault::data(format!("{flag} {place}: {}{whose}", e.message))
    })?;
    format::check(&format!("{flag} {place}"), &fetched.bytes, said)?;
    let size = fetched.bytes.len() as u64;
    let mut fields = Map::new();
    fields.insert("sha256".into(), json!(hex::encode(fetched.sha256)));
    fields.insert("size".into(), json!(size));
    let fits = room.is_none_or(|room| size <= room && !place.contains("://"));
    if fits {
        let base64 = base64::engine::general_purpose::STANDARD;
        fields.insert("data".into(), json!(base64.encode(&fetched.bytes)));
    } else {
        fields.insert("url".into(), json!(url.as_str()));
    }
    Ok((name(&url), fields, if fits { size } else { 0 }))
}

/// Fetches the bytes once, from wherever the user says: the job needs their size and digest.
async fn fetch(config: &Config, url: &url::Url) -> Result<Fetched, Failure> {
    let limits = CandidatesConfig {
        allow: vec![url.as_str().to_owned()],
        allow_private: true,
        ..config.candidates.clone()
    };
    let fetcher = Fetcher::new(limits, None);
    let fetcher = fetcher.map_err(|e| Failure::new(Code::CandidateUnavailable, e.to_string()))?;
    fetcher.fetch_url(url.as_str(), Claims::default()).await
}

/// The last part of the path, without its ending, in the characters of a `submission_id`.
fn name(url: &url::Url) -> String {
    let last = url.path_segments().and_then(|mut parts| parts.next_back());
    let stem = Path::new(last.unwrap_or_default()).file_stem();
    let stem = stem.unwrap_or_default().to_string_lossy();
    let legal = |c: char| c.is_ascii_alphanumeric() || "._:-".contains(c);
    let name: String = stem.replace(|c| !legal(c), "-").chars().take(120).collect();
    if name.is_empty() {
        "candidate".into()
    } else {
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Exit;

    #[test]
    fn no_two_jobs_get_one_name() {
        let mut names = HashSet::new();
        let given = ["a", "a", "a-2", "a", "b"].map(|stem| unique(stem, &mut names));
        assert_eq!(given, ["a", "a-2", "a-2-2", "a-3", "b"]);
    }

    #[test]
    fn a_context_goes_into_the_job_as_it_was_given() {
        let given = r#"{"a": [1.10, 1e400, 123456789012345678901234567890]}"#;
        let context = read_context(given).unwrap();
        let job = json!({"v": 1});
        let described = Described {
            job,
            context: Some(&context),
        };
        let body = serde_json::to_string(&described).unwrap();
        assert_eq!(body, format!(r#"{{"v":1,"context":{given}}}"#));
        for unfit in ["[1]", "7", "null", "{", ""] {
            assert_eq!(read_context(unfit).unwrap_err().exit, Exit::Data, "{unfit}");
        }
    }
}
