//! `scorer manifest add` and `live`: one entry more, or another live version.

use std::path::PathBuf;

use clap::Args;

use super::entry::{Entry, EntryArgs, beside, described};
use super::package;
use super::published::{Published, Signature, folder, key};
use crate::cli::{Fault, Outcome, answer, complain, plain};
use crate::config::Config;
use crate::protocol::message::V1;
use crate::protocol::update_manifest::UpdateManifest;

#[derive(Debug, Args)]
pub(super) struct AddArgs {
    /// The manifest's file; made if there is none.
    manifest: PathBuf,
    #[command(flatten)]
    entry: EntryArgs,
    /// Workers are to serve this version.
    #[arg(long)]
    live: bool,
    /// Signs the manifest with this private Ed25519 key: PKCS#8 in PEM, as `openssl genpkey -algorithm ed25519` writes
    /// it.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// Directory of the model package that workers serve [default: model.dir].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct LiveArgs {
    /// The manifest's file.
    manifest: PathBuf,
    /// The version that workers are to serve.
    version: u64,
    /// Signs the manifest with this private Ed25519 key.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
}

pub(super) fn add(config: &Config, args: AddArgs) -> Outcome {
    let key = args.key.as_deref().map(key).transpose()?;
    let package = package(config, args.model)?;
    let (published, known) = Published::open(&args.manifest)?;
    let (path, name) = (args.manifest.display(), &package.manifest.name);
    if let Some(UpdateManifest { name: other, .. }) = &known
        && other != name
    {
        return Err(Fault::data(format!(
            "{path}: is for the model {other:?}, and the package holds {name:?}"
        )));
    }
    let (entry, file) = Entry::read(&args.entry, &package)?;
    let version = entry.step().to();
    let mut manifest = known.unwrap_or_else(|| UpdateManifest {
        v: V1,
        name: name.clone(),
        // Nobody follows it yet.
        live_version: version,
        full: Vec::new(),
        updates: Vec::new(),
    });
    let nowhere = || {
        let file = file.display();
        Fault::data(format!(
            "{file}: does not lie beside {path}; say where workers find it: --url"
        ))
    };
    let step = entry.put_into(&mut manifest, || {
        beside(folder(&args.manifest), &file).ok_or_else(nowhere)
    })?;
    let canary = step.canary().map_or_else(
        || "no canary".to_owned(),
        |canary| format!("canary {} +- {}", canary.loss, canary.tolerance),
    );
    let said = format!(
        "{}: {}, {} bytes, SHA-256 {}, {canary}",
        described(step),
        step.urls().join(", "),
        step.size(),
        step.sha256()
    );
    if args.live {
        manifest.live_version = version;
    }
    let signature = published.write(&manifest, key.as_ref())?;
    let live = match manifest.live_version {
        live if live == version => format!("workers are to serve version {live}"),
        live => format!("workers are to serve version {live} as before; --live makes it {version}"),
    };
    report(config, vec![said, live], signature)
}

pub(super) fn live(config: &Config, args: &LiveArgs) -> Outcome {
    let key = args.key.as_deref().map(key).transpose()?;
    let (path, live) = (args.manifest.display(), args.version);
    let (published, known) = Published::open(&args.manifest)?;
    let mut manifest = known.ok_or_else(|| Fault::data(format!("{path}: no such file")))?;
    let versions = manifest.versions();
    if !versions.contains(&live) {
        let known: Vec<String> = versions.iter().map(u64::to_string).collect();
        let known = match known.is_empty() {
            true => "there is none at all".to_owned(),
            false => format!("only {}", known.join(", ")),
        };
        return Err(Fault::data(format!(
            "{path}: no entry leads to or from version {live}, {known}; scorer manifest add --weights FILE --version \
             {live} adds one, also of the package's own weights"
        )));
    }
    let before = std::mem::replace(&mut manifest.live_version, live);
    let signature = published.write(&manifest, key.as_ref())?;
    let before = match live == before {
        true => "as before".to_owned(),
        false => format!("before it was {before}"),
    };
    let said = format!("{path}: workers are to serve version {live}, {before}");
    report(config, vec![said], signature)
}

/// What was done, and whether workers with this configuration take the signature.
fn report(config: &Config, mut lines: Vec<String>, signature: Signature) -> Outcome {
    let expected = config.model.update_key.as_ref();
    match signature {
        Signature::None if expected.is_some() => {
            complain(
                "note: model.update_key is set, so workers refuse this manifest until it is signed: --key",
            );
        }
        Signature::None => {}
        Signature::Outdated(path) => complain(&format!(
            "note: {} is the signature of the manifest before; workers with model.update_key refuse this one until it is \
             signed: --key",
            path.display()
        )),
        Signature::Made(path, public) => {
            let path = path.display();
            if let Some(other) = expected.filter(|expected| **expected != public) {
                complain(&format!(
                    "note: model.update_key is {other:?}, and {path} was made with another key"
                ));
            }
            lines.push(format!(
                "signed in {path}, for workers with model.update_key = \"{public}\""
            ));
        }
    }
    let lines: Vec<_> = lines.iter().map(|line| plain(line)).collect();
    answer(&lines.join("\n"))
}
