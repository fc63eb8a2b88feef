//! `scorer manifest check`: what a worker would find, without one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use indicatif::{HumanBytes, ProgressBar};
use serde_json::json;
use url::Url;

use super::package;
use crate::cli::finding::{Finding, Verdict};
use crate::cli::{Exit, Fault, Outcome, answer, answer_json, busy, signals};
use crate::config::Config;
use crate::engine::trial::{Trial, trial};
use crate::model::package::Package;
use crate::protocol::signature::UpdateKey;
use crate::protocol::update_manifest::{UpdateManifest, decode};
use crate::update::download::Mirrors;
use crate::update::inspection::Inspection;
use crate::update::route::Step;

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// The manifest: a file or a URL [default: model.update_url].
    manifest: Option<String>,
    /// Directory of the model package that workers serve [default: model.dir].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

/// What was found so far, and the loss of the live version, if it was measured.
#[derive(Debug, Default)]
struct Report {
    findings: Vec<Finding>,
    loss: Option<f64>,
}

impl Report {
    fn ok(&mut self, part: &str, found: String) {
        self.findings.push(Finding::ok(part, found));
    }

    fn add(&mut self, part: &str, verdict: Verdict, found: String, advice: &str) {
        let advice = (!advice.is_empty()).then(|| advice.to_owned());
        self.findings
            .push(Finding::new(part, verdict, found, advice));
    }
}

pub(super) async fn check(config: &Config, args: CheckArgs) -> Outcome {
    let url = located(
        args.manifest
            .as_deref()
            .or(config.model.update_url.as_deref()),
    )?;
    let package = Arc::new(tokio::task::block_in_place(|| package(config, args.model))?);
    let folder = tempfile::tempdir().map_err(Fault::data)?;
    let (end, left) = (
        signals::end().map_err(Fault::internal)?,
        folder.path().to_owned(),
    );
    tokio::spawn(async move {
        let signal = end.await;
        drop(std::fs::remove_dir_all(left));
        signals::die(signal)
    });
    let bar = busy(format!("reading {url}"));
    let mut report = Report::default();
    let mirrors = Mirrors::new(url.clone(), &config.candidates).map_err(Fault::internal)?;
    let manifest = published(config, &mirrors, &package, &mut report).await;
    if let Some(manifest) = &manifest {
        let inspection = Inspection::new(&mirrors, manifest, Arc::clone(&package), folder.path());
        follow(config, inspection, manifest, &bar, &mut report).await?;
    }
    bar.finish_and_clear();
    if args.json {
        answer_json(&json!({
            "manifest": url.as_str(), "model": package.manifest.name, "live_version": manifest.map(|m| m.live_version),
            "loss": report.loss, "findings": report.findings,
        }))?;
    } else {
        let lines: Vec<String> = report.findings.iter().map(Finding::line).collect();
        answer(&lines.join("\n"))?;
    }
    let failed = |finding: &Finding| finding.verdict == Verdict::Fail;
    Ok(Exit::of_answer(!report.findings.iter().any(failed)))
}

/// A file's path becomes a URL.
fn located(text: Option<&str>) -> Result<Url, Fault> {
    let text = text.ok_or_else(|| {
        Fault::usage("no manifest: name a file or a URL, or set model.update_url")
    })?;
    if text.contains("://") {
        return Url::parse(text).map_err(|e| Fault::usage(format!("{text}: {e}")));
    }
    let path = Path::new(text).canonicalize();
    let path = path.map_err(|e| Fault::data(format!("{text}: {e}")))?;
    Url::from_file_path(path).map_err(|()| Fault::usage(format!("{text}: has no URL")))
}

/// The manifest, if a worker could read it.
async fn published(
    config: &Config,
    mirrors: &Mirrors,
    package: &Package,
    report: &mut Report,
) -> Option<UpdateManifest> {
    let (manifest, bytes) = match read(mirrors, package).await {
        Ok(read) => read,
        Err(why) => {
            report.add("manifest", Verdict::Fail, why, "");
            return None;
        }
    };
    let (name, live) = (&manifest.name, manifest.live_version);
    let (full, updates) = (manifest.full.len(), manifest.updates.len());
    report.ok(
        "manifest",
        format!("{name}, live version {live}; whole weights: {full}, updates: {updates}"),
    );
    signature(config, mirrors, &bytes, report).await;
    Some(manifest)
}

/// The manifest and its exact bytes.
async fn read(mirrors: &Mirrors, package: &Package) -> Result<(UpdateManifest, Vec<u8>), String> {
    let published = mirrors.manifest(None).await.map_err(|e| e.to_string())?;
    let bytes = published.ok_or("nothing was sent")?.bytes;
    let manifest = decode(&bytes)?;
    let (name, ours) = (&manifest.name, &package.manifest.name);
    match name == ours {
        true => Ok((manifest, bytes)),
        false => Err(format!(
            "it is for model {name:?}, the package holds {ours:?}"
        )),
    }
}

async fn signature(config: &Config, mirrors: &Mirrors, bytes: &[u8], report: &mut Report) {
    let Some(key) = &config.model.update_key else {
        return report.ok(
            "signature",
            "none is asked for: model.update_key is not set".into(),
        );
    };
    let signature = mirrors
        .signature()
        .await
        .map_err(|e| format!("no signature: {e}"));
    match signature.and_then(|signature| UpdateKey::parse(key)?.verify(bytes, &signature)) {
        Ok(()) => report.ok("signature", "that of model.update_key".into()),
        Err(why) => report.add(
            "signature",
            Verdict::Fail,
            why,
            "scorer manifest add --key signs",
        ),
    }
}

/// Every file, then the way to the live version.
async fn follow(
    config: &Config,
    mut inspection: Inspection<'_>,
    manifest: &UpdateManifest,
    bar: &ProgressBar,
    report: &mut Report,
) -> Result<(), Fault> {
    let full = (0..manifest.full.len()).map(|at| format!("full[{at}]"));
    let parts = full.chain((0..manifest.updates.len()).map(|at| format!("updates[{at}]")));
    for (part, step) in parts.zip(Step::all(manifest)) {
        bar.set_message(format!("fetching {part}"));
        look_at(&mut inspection, &part, step, report).await;
    }
    let route = match inspection.route() {
        Ok(route) => route,
        Err(why) => {
            report.add(
                "route",
                Verdict::Fail,
                why,
                "new workers stay at the package's version",
            );
            return Ok(());
        }
    };
    let (live, files) = (manifest.live_version, route.steps.len());
    let bytes = HumanBytes(route.steps.iter().map(|step| step.size()).sum());
    bar.set_message(format!("making version {live}"));
    let made = match inspection.follow(&route).await {
        Ok(made) => made,
        Err(why) => {
            report.add("route", Verdict::Fail, why, "");
            return Ok(());
        }
    };
    report.ok(
        "route",
        match route.from {
            Some(_) if files == 0 => format!("version {live} is the package's own"),
            Some(from) => {
                format!("from the package's version {from} to {live}: {bytes}, files: {files}")
            }
            None => format!("to version {live} from whole weights: {bytes}, files: {files}"),
        },
    );
    bar.set_message("measuring the live version on the CPU");
    measure(config, made, report).await
}

async fn look_at(inspection: &mut Inspection<'_>, part: &str, step: Step<'_>, report: &mut Report) {
    let size = HumanBytes(step.size());
    let what = match step {
        Step::Full(full) => format!("version {}", full.version),
        Step::Delta(delta) => format!("{} to {}", delta.from, delta.to),
    };
    let wrong = inspection.look_at(step).await;
    for (url, wrong) in step.urls().iter().zip(wrong) {
        match (wrong, inspection.passed_over(step)) {
            (Some(why), _) => report.add(part, Verdict::Fail, format!("{what}: {why}"), ""),
            (None, Some(why)) => report.add(
                part,
                Verdict::Warn,
                format!("{what}, {url}: {why}"),
                "workers with this package pass it over",
            ),
            (None, None) => report.ok(
                part,
                format!("{what}, {url}: {size}, as the manifest says, fits the model"),
            ),
        }
    }
}

async fn measure(config: &Config, made: Arc<Package>, report: &mut Report) -> Result<(), Fault> {
    let (canary, engine) = (made.manifest.canary, config.engine.clone());
    let tried = tokio::task::spawn_blocking(move || trial(made, &engine));
    let loss = match tried.await.map_err(Fault::internal)? {
        Ok(Trial::Ran(loss)) => loss,
        Ok(Trial::NotTried(why)) => {
            report.add("loss", Verdict::Skip, format!("not measured: {why}"), "");
            return Ok(());
        }
        Err(error) => {
            report.add("loss", Verdict::Fail, error.to_string(), "");
            return Ok(());
        }
    };
    report.loss = Some(loss);
    let Some(canary) = canary else {
        let advice = format!(
            "with --canary {loss} a worker that measures something else takes the version back"
        );
        report.add("loss", Verdict::Ok, loss.to_string(), &advice);
        return Ok(());
    };
    let said = format!(
        "{loss}, the canary says {} +- {}",
        canary.loss, canary.tolerance
    );
    match canary.is_met_by(loss) {
        true => report.ok("loss", said),
        false => report.add(
            "loss",
            Verdict::Fail,
            said,
            "workers take this version back: canary_mismatch",
        ),
    }
    Ok(())
}
