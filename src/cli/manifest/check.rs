//! `scorer manifest check`: what a worker would find, without one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use indicatif::{HumanBytes, ProgressBar};
use serde_json::json;
use url::Url;

use super::entry::described;
use super::package;
use crate::cli::finding::{Finding, Verdict};
use crate::cli::{Exit, Fault, Outcome, answer, answer_json, busy, signals};
use crate::config::Config;
use crate::engine::trial::{Trial, trial};
use crate::fetch::place;
use crate::model::package::Package;
use crate::protocol::signature::UpdateKey;
use crate::protocol::update_manifest::{Canary, UpdateManifest, decode};
use crate::update::download::Mirrors;
use crate::update::inspection::{Inspection, Reached, Unreached};
use crate::update::route::{Route, Step};

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
    /// That of the package's own version, if that is another.
    package_loss: Option<f64>,
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
    // Without the query, which may hold a token.
    let at = place(&url);
    let bar = busy(format!("reading {at}"));
    let mut report = Report::default();
    let mirrors = Mirrors::new(url, &config.candidates).map_err(Fault::internal)?;
    let manifest = published(config, &mirrors, &package, &mut report).await;
    if let Some(manifest) = &manifest {
        let inspection = Inspection::new(&mirrors, manifest, Arc::clone(&package), folder.path());
        follow(config, inspection, manifest, &bar, &mut report).await?;
    }
    bar.finish_and_clear();
    if args.json {
        answer_json(&json!({
            "manifest": at, "model": package.manifest.name, "live_version": manifest.map(|m| m.live_version),
            "loss": report.loss, "package_loss": report.package_loss, "findings": report.findings,
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
    // Links stay: relative URLs start where a worker finds the manifest.
    let found = Path::new(text)
        .metadata()
        .and_then(|_| std::path::absolute(text));
    let path = found.map_err(|e| Fault::data(format!("{text}: {e}")))?;
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
            "scorer manifest add and live sign it with --key",
        ),
    }
}

/// The steps of a manifest, each with its place in it.
fn steps(manifest: &UpdateManifest) -> Vec<(String, Step<'_>)> {
    let full = (0..manifest.full.len()).map(|at| format!("full[{at}]"));
    let updates = (0..manifest.updates.len()).map(|at| format!("updates[{at}]"));
    full.chain(updates).zip(Step::all(manifest)).collect()
}

/// Every file, then the ways to the live version, then its loss.
async fn follow<'m>(
    config: &Config,
    mut inspection: Inspection<'m>,
    manifest: &'m UpdateManifest,
    bar: &ProgressBar,
    report: &mut Report,
) -> Result<(), Fault> {
    let steps = steps(manifest);
    for (part, step) in &steps {
        bar.set_message(format!("fetching {part}"));
        look_at(&mut inspection, part, *step, report).await;
    }
    let live = manifest.live_version;
    bar.set_message(format!("making version {live}"));
    let Some((route, reached)) = reach(&mut inspection, live, report).await else {
        return Ok(());
    };
    let to_live = || {
        let to_live = steps.iter().filter(|(_, step)| step.to() == live);
        to_live.filter(|(_, step)| route.steps.last() != Some(step))
    };
    for (part, step) in to_live() {
        compare(&mut inspection, part, *step, &reached.package, report).await;
    }
    bar.set_message("measuring the live version on the CPU");
    let Some(loss) = measure(config, &reached.package, report).await? else {
        return Ok(());
    };
    if !route.steps.is_empty() {
        bar.set_message("measuring the package's version on the CPU");
        let own = measure(config, inspection.package(), report).await?;
        report.package_loss = own;
    }
    report.loss = Some(loss);
    let own = (route.steps.is_empty()).then_some(reached.package.manifest.canary);
    let usable = steps.iter().filter(|(_, step)| step.to() == live);
    let usable = usable.filter(|(_, step)| inspection.passed_over(*step).is_none());
    let canaries = own.into_iter().chain(usable.map(|(_, step)| step.canary()));
    weigh(loss, &canaries.flatten().collect::<Vec<_>>(), report);
    Ok(())
}

async fn look_at(inspection: &mut Inspection<'_>, part: &str, step: Step<'_>, report: &mut Report) {
    let (what, size) = (described(step), HumanBytes(step.size()));
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

/// Takes one route after the other, as a worker does, until one leads to the live version.
async fn reach<'m>(
    inspection: &mut Inspection<'m>,
    live: u64,
    report: &mut Report,
) -> Option<(Route<'m>, Reached)> {
    loop {
        let route = match inspection.route() {
            Ok(route) => route,
            Err(why) => {
                let advice = "new workers stay at the package's version";
                report.add("route", Verdict::Fail, why, advice);
                return None;
            }
        };
        match inspection.follow(&route).await {
            Ok(reached) => {
                report.ok("route", went(&route, live));
                return Some((route, reached));
            }
            Err(Unreached::File(why)) => {
                report.add(
                    "route",
                    Verdict::Fail,
                    why,
                    "workers look for another route",
                );
            }
            Err(Unreached::Disk(why)) => {
                report.add(
                    "route",
                    Verdict::Fail,
                    why,
                    "TMPDIR names a folder with more room",
                );
                return None;
            }
        }
    }
}

fn went(route: &Route<'_>, live: u64) -> String {
    let bytes = HumanBytes(route.steps.iter().map(|step| step.size()).sum());
    let files = route.steps.len();
    match route.from {
        Some(_) if files == 0 => format!("version {live} is the package's own"),
        Some(from) => {
            format!("from the package's version {from} to {live}: {bytes}, files: {files}")
        }
        None => format!("to version {live} from whole weights: {bytes}, files: {files}"),
    }
}

/// Whether another way leads to the same weights: workers go by what they have.
async fn compare<'m>(
    inspection: &mut Inspection<'m>,
    part: &str,
    step: Step<'m>,
    reached: &Package,
    report: &mut Report,
) {
    let Some(route) = inspection.route_by(step) else {
        return;
    };
    let (what, one) = (described(step), reached.weights.weights_id.as_str());
    match inspection.follow(&route).await {
        Ok(other) if other.package.weights.weights_id == one => {}
        Ok(other) => {
            let other = &other.package.weights.weights_id;
            let found = format!(
                "{what}: leads to other weights ({other}) than the route of a new worker ({one})"
            );
            let advice = "a version stands for the same weights for ever, whichever way a worker comes to it";
            report.add(part, Verdict::Fail, found, advice);
        }
        Err(Unreached::File(why) | Unreached::Disk(why)) => {
            report.add(part, Verdict::Fail, format!("{what}: {why}"), "");
        }
    }
}

/// The loss of the live version, if this machine can run it.
async fn measure(
    config: &Config,
    live: &Arc<Package>,
    report: &mut Report,
) -> Result<Option<f64>, Fault> {
    let (live, engine) = (Arc::clone(live), config.engine.clone());
    let tried = tokio::task::spawn_blocking(move || trial(live, &engine));
    match tried.await.map_err(Fault::internal)? {
        Ok(Trial::Ran(loss)) => {
            return Ok(Some(loss));
        }
        Ok(Trial::NotTried(why)) => {
            report.add("loss", Verdict::Skip, format!("not measured: {why}"), "");
        }
        Err(error) => report.add("loss", Verdict::Fail, error.to_string(), ""),
    }
    Ok(None)
}

/// Compares the loss with every known answer for the live version: each is that of some worker.
fn weigh(loss: f64, canaries: &[Canary], report: &mut Report) {
    let measured = report.package_loss.map_or_else(
        || format!("{loss}"),
        |own| format!("{loss} (the package's version: {own})"),
    );
    let said = |canary: &Canary| format!("the canary says {} +- {}", canary.loss, canary.tolerance);
    let wrong = canaries.iter().filter(|canary| !canary.is_met_by(loss));
    for canary in wrong.clone() {
        let found = format!("{measured}, but {}", said(canary));
        let advice = "workers take this version back: canary_mismatch";
        report.add("loss", Verdict::Fail, found, advice);
    }
    if wrong.count() > 0 {
        return;
    }
    match canaries.first() {
        Some(canary) => report.ok("loss", format!("{measured}, {}", said(canary))),
        None => {
            let advice = format!(
                "with --canary {loss} a worker that measures something else takes the version back"
            );
            report.add("loss", Verdict::Ok, measured, &advice);
        }
    }
}
