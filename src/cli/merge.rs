//! `scorer merge`: what candidates are worth together, without broker and Redis.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::offline::{ContentArgs, WindowArgs, pipeline, word};
use super::{Exit, Fault, Outcome, answer_json, busy, format};
use crate::candidate::fetch::Fetched;
use crate::config::{CandidatesConfig, Config};
use crate::engine::coalition::Member;
use crate::engine::merge::Passes;
use crate::protocol::failure::{Code, Failure, Status};
use crate::protocol::job::{Kind, Validation};
use crate::protocol::merge::OnRejected;
use crate::protocol::names::is_submission_id;
use crate::protocol::result::{Body, JobRef, ResultMessage, Verdict};
use crate::scoring::members::{Described, Members, check_sizes};
use crate::scoring::pipeline::Pipeline;
use crate::util::clock::Lap;

#[derive(Debug, Args)]
pub(super) struct MergeArgs {
    /// Directory of the model package.
    #[arg(long)]
    model: PathBuf,
    /// Name and file of a member, and its weight [default: 1 / members]; repeatable.
    #[arg(long = "member", value_name = "ID=FILE[:WEIGHT]", required = true, value_parser = member)]
    members: Vec<MemberArg>,
    #[command(flatten)]
    content: ContentArgs,
    #[command(flatten)]
    windows: WindowArgs,
    /// When a member is refused: `drop` it, with the weights of the others as they are, or `fail`.
    #[arg(long, default_value = "drop", value_parser = word::<OnRejected>)]
    on_rejected: OnRejected,
}

/// A member as the command line names it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct MemberArg {
    pub(super) id: String,
    /// A file, or a URL where the command takes one.
    pub(super) place: String,
    pub(super) weight: Option<f64>,
}

/// Parses the name of a job or member.
pub(super) fn named(id: &str) -> Result<String, String> {
    match is_submission_id(id) {
        true => Ok(id.to_owned()),
        false => Err("ID must be 1 to 128 of the characters A-Z a-z 0-9 . _ : -".into()),
    }
}

/// Parses `ID=FILE|URL[:WEIGHT]`.
pub(super) fn member(text: &str) -> Result<MemberArg, String> {
    let (id, rest) = text
        .split_once('=')
        .ok_or("must be ID=PLACE[:WEIGHT], as in a=a.json:0.25")?;
    let id = named(id)?;
    let after_colon = rest.rsplit_once(':');
    let weighted =
        after_colon.and_then(|(place, weight)| Some((place, weight.parse::<f64>().ok()?)));
    let (place, weight) = weighted.map_or((rest, None), |(place, weight)| (place, Some(weight)));
    if weight.is_some_and(|weight| !weight.is_finite() || weight == 0.0) {
        return Err("WEIGHT must be finite and not 0".into());
    }
    Ok(MemberArg {
        id,
        place: place.into(),
        weight,
    })
}

/// Checks what no member shows by itself.
pub(super) fn check_members(members: &[MemberArg], most: usize) -> Result<(), Fault> {
    if !(2..=most).contains(&members.len()) {
        return Err(Fault::usage(format!(
            "--member: given {} times, it must be 2 to {most} (candidates.max_members) times",
            members.len()
        )));
    }
    let mut seen = HashSet::new();
    match members.iter().find(|member| !seen.insert(&member.id)) {
        Some(twice) => Err(Fault::usage(format!(
            "--member: {} is given twice",
            twice.id
        ))),
        None => Ok(()),
    }
}

/// A member, its file, and the size of that.
#[derive(Debug)]
struct MemberFile {
    described: Described,
    file: PathBuf,
    size: u64,
}

impl MemberFile {
    fn fault(file: &std::path::Path, error: &std::io::Error) -> Fault {
        Fault::data(format!("--member {}: {error}", file.display()))
    }

    fn read(&self) -> Result<Fetched, Fault> {
        let bytes = std::fs::read(&self.file).map_err(|e| Self::fault(&self.file, &e))?;
        Ok(Fetched {
            sha256: Sha256::digest(&bytes).into(),
            bytes: bytes.into(),
        })
    }
}

fn files(args: &MergeArgs) -> Result<Vec<MemberFile>, Fault> {
    let rule = args.content.rule()?;
    #[expect(clippy::cast_precision_loss, reason = "at most 1000")]
    let equal = 1.0 / args.members.len() as f64;
    let file = |member: &MemberArg| {
        let file = PathBuf::from(&member.place);
        let size = std::fs::metadata(&file);
        let size = size.map_err(|e| MemberFile::fault(&file, &e))?.len();
        let said = (args.content.format, args.content.compression);
        format::check_file(&format!("--member {}", file.display()), &file, said)?;
        let described = Described {
            id: member.id.clone(),
            weight: member.weight.unwrap_or(equal),
            format: args.content.format,
            compression: args.content.compression,
            rule,
        };
        Ok(MemberFile {
            described,
            file,
            size,
        })
    };
    args.members.iter().map(file).collect()
}

/// Reads and decodes the files one at a time, and says how long the reading took. The inner error refuses the merge.
fn gather(
    mut members: Members,
    files: Vec<MemberFile>,
    config: &CandidatesConfig,
) -> Result<Result<(Members, f64), Failure>, Fault> {
    let most = config.max_bytes;
    if let Err(failure) = check_sizes(
        files.iter().map(|file| file.size),
        ("candidates.max_bytes", most),
    ) {
        return Ok(Err(failure));
    }
    let mut reading = 0.0;
    for file in files {
        if file.size > most {
            let message = format!("{} bytes, candidates.max_bytes = {most}", file.size);
            let failure = Failure::new(Code::CandidateTooLarge, message);
            members.leave_out(file.described, failure);
            continue;
        }
        let began = Instant::now();
        let fetched = file.read()?;
        reading += Lap::since(began).millis();
        if let Err(failure) = members.add(file.described, fetched) {
            return Ok(Err(failure));
        }
    }
    Ok(Ok((members, reading)))
}

async fn verdict(
    pipeline: &Pipeline,
    files: Vec<MemberFile>,
    config: CandidatesConfig,
    (validation, on_rejected): (Validation, OnRejected),
    passes: watch::Sender<Passes>,
) -> Result<Verdict, Fault> {
    let began = Instant::now();
    let plan = match pipeline.plan(&validation).await {
        Ok(plan) => plan,
        Err(failure) => return Ok(Err(failure)),
    };
    let members = Members::new(Arc::clone(&pipeline.engine().package), (&config).into());
    let gathered = tokio::task::spawn_blocking(move || gather(members, files, &config)).await;
    let (members, reading) = match gathered.map_err(Fault::internal)?? {
        Ok(gathered) => gathered,
        Err(failure) => return Ok(Err(failure)),
    };
    let merging = async {
        let ready = members.ready(on_rejected)?;
        let (turn, limit) = (pipeline.engine().turn().await, pipeline.score_limit());
        let told = move |begun, _: &[&Member]| {
            passes.send_replace(begun);
            Ok(())
        };
        let (members, plan) = (Arc::clone(&ready.members), &plan);
        let merging = turn.merge(members, on_rejected, Arc::clone(plan), limit, told);
        pipeline.merge_body(ready, merging.await?, plan)
    };
    let merged = merging.await;
    Ok(merged.map(|mut body| {
        body.timings_ms.fetch = reading;
        body.timings_ms.total = Lap::since(began).millis();
        Body::Merge(Box::new(body))
    }))
}

pub(super) async fn merge(config: Config, args: MergeArgs) -> Outcome {
    check_members(&args.members, config.candidates.max_members)?;
    let files = files(&args)?;
    let candidates = config.candidates.clone();
    let bar = busy(format!("loading {}", args.model.display()));
    let pipeline = pipeline(config, &args.model).await?;
    bar.set_message(format!("measuring {} members", files.len()));
    let (passes, mut passed) = watch::channel(Passes::default());
    let shown = bar.clone();
    tokio::spawn(async move {
        while passed.changed().await.is_ok() {
            let Passes { done, most } = *passed.borrow_and_update();
            shown.set_message(format!("pass {} of at most {most}", done + 1));
        }
    });
    let asked = (args.windows.into(), args.on_rejected);
    let verdict = verdict(&pipeline, files, candidates, asked, passes).await?;
    bar.finish_and_clear();
    let job_ref = JobRef {
        submission_id: "merge".into(),
        kind: Kind::Merge,
        model_version: Some(pipeline.origin().model_version),
        context: None,
        attempt: 1,
    };
    let message = ResultMessage::new(pipeline.origin(), job_ref, verdict);
    answer_json(&message)?;
    Ok(Exit::of_answer(message.status == Status::Scored))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weight_stands_after_the_last_colon() {
        let parsed = |text: &str| {
            let MemberArg { id, place, weight } = member(text).unwrap();
            (id, place, weight)
        };
        let of = |file: &str, weight| ("a:1".to_owned(), file.to_owned(), weight);
        assert_eq!(parsed("a:1=x.json"), of("x.json", None));
        assert_eq!(parsed("a:1=x.json:-0.5"), of("x.json", Some(-0.5)));
        assert_eq!(parsed("a:1=d:/x=y:1e-3"), of("d:/x=y", Some(1e-3)));
        assert_eq!(parsed("a:1=d:/x.json"), of("d:/x.json", None));
        assert_eq!(parsed("a:1=http://h:80/x"), of("http://h:80/x", None));
        assert_eq!(parsed("a:1=http://h/x:2"), of("http://h/x", Some(2.0)));
        for wrong in ["x.json", "=x", "a b=x", "a=x:0", "a=x:inf", "a=x:NaN"] {
            assert!(member(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn members_are_counted_and_told_apart() {
        let members = |ids: &[&str]| -> Vec<MemberArg> {
            ids.iter()
                .map(|id| member(&format!("{id}=x")).unwrap())
                .collect()
        };
        assert_eq!(check_members(&members(&["a", "b"]), 2), Ok(()));
        for wrong in [&["a"][..], &["a", "a"], &["a", "b", "c"]] {
            let fault = check_members(&members(wrong), 2).unwrap_err();
            assert_eq!(fault.exit, Exit::Usage, "{wrong:?}");
        }
    }
}
