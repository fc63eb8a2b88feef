//! `scorer manifest add` and `live`: one entry, or another live version.

use std::path::{Path, PathBuf};

use clap::Args;
use sha2::{Digest, Sha256};
use url::Url;

use super::package;
use super::published::{self, Signature, key, read};
use crate::cli::offline::word;
use crate::cli::{Fault, Outcome, answer, complain, format, plain};
use crate::config::Config;
use crate::model::package::Package;
use crate::protocol::job::{Compression, Format};
use crate::protocol::message::V1;
use crate::protocol::update_manifest::{Canary, Delta, FullWeights, UpdateManifest};
use crate::update::build;
use crate::update::route::Step;

/// The tolerance of a canary that is given without one, nats per target.
const TOLERANCE: f64 = 1e-3;

#[derive(Debug, Args)]
pub(super) struct AddArgs {
    /// The manifest's file; made if there is none.
    manifest: PathBuf,
    /// Whole weights: a safetensors file, as `--weights` of `scorer package` takes it.
    #[arg(
        long,
        value_name = "FILE",
        requires = "weights_version",
        required_unless_present = "delta",
        conflicts_with = "delta"
    )]
    weights: Option<PathBuf>,
    /// The version that the weights are.
    #[arg(
        long = "version",
        id = "weights_version",
        requires = "weights",
        value_name = "VERSION"
    )]
    version: Option<u64>,
    /// A difference: added to the weights of one version, it gives those of another.
    #[arg(long, value_name = "FILE", requires_all = ["from", "to", "format"])]
    delta: Option<PathBuf>,
    /// The version that the difference is added to.
    #[arg(long, requires = "delta", value_name = "VERSION")]
    from: Option<u64>,
    /// The version that it gives.
    #[arg(long, requires = "delta", value_name = "VERSION")]
    to: Option<u64>,
    /// Format of the difference: `binary_v2`, `safetensors` or `pt_chunks`.
    #[arg(long, requires = "delta", value_parser = word::<Format>)]
    format: Option<Format>,
    /// Compression of the difference's whole file: `zstd`.
    #[arg(long, requires = "delta", value_parser = word::<Compression>)]
    compression: Option<Compression>,
    /// Where workers find the file: a URL, or a path that starts at the manifest; repeatable, mirrors are tried in
    /// order [default: its path, if it lies beside the manifest].
    #[arg(long = "url", value_name = "URL")]
    urls: Vec<String>,
    /// The version's loss on all windows with an empty nonce, and how far a worker's may be from it [tolerance: 0.001].
    /// `scorer manifest check` measures it.
    #[arg(long, value_name = "LOSS[,TOLERANCE]", value_parser = canary, allow_hyphen_values = true)]
    canary: Option<Canary>,
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

fn canary(text: &str) -> Result<Canary, String> {
    let number = |name: &str, text: &str| match text.trim().parse::<f64>() {
        Ok(number) if number.is_finite() => Ok(number),
        Ok(_) | Err(_) => Err(format!("{name}: {text:?} is not a number")),
    };
    let (loss, tolerance) = text
        .split_once(',')
        .map_or((text, None), |(loss, rest)| (loss, Some(rest)));
    let canary = Canary {
        loss: number("loss", loss)?,
        tolerance: tolerance.map_or(Ok(TOLERANCE), |text| number("tolerance", text))?,
    };
    canary.check().map(|()| canary)
}

/// A file that an entry names.
struct Content {
    urls: Vec<String>,
    sha256: String,
    size: u64,
}

pub(super) fn add(config: &Config, args: AddArgs) -> Outcome {
    let key = args.key.as_deref().map(key).transpose()?;
    let package = package(config, args.model.clone())?;
    let first = args.version.or(args.to).unwrap_or_default();
    let mut manifest = read(&args.manifest)?.unwrap_or_else(|| UpdateManifest {
        v: V1,
        name: package.manifest.name.clone(),
        // Nobody follows it yet.
        live_version: first,
        full: Vec::new(),
        updates: Vec::new(),
    });
    let (is_for, name) = (&manifest.name, &package.manifest.name);
    if is_for != name {
        let manifest = args.manifest.display();
        return Err(Fault::data(format!(
            "{manifest}: is for the model {is_for:?}, and the package holds {name:?}"
        )));
    }
    let (said, version) = match (&args.weights, &args.delta) {
        (Some(file), _) => add_weights(&args, file, &package, &mut manifest)?,
        (None, Some(file)) => add_delta(&args, file, &package, &mut manifest)?,
        (None, None) => return Err(Fault::usage("--weights or --delta: missing")),
    };
    if args.live {
        manifest.live_version = version;
    }
    let signature = published::write(&args.manifest, &manifest, key.as_ref())?;
    let live = match manifest.live_version == version {
        true => format!("workers are to serve version {version}"),
        false => {
            let live = manifest.live_version;
            format!("workers are to serve version {live} as before; --live makes it {version}")
        }
    };
    report(vec![said, live], signature)
}

pub(super) fn live(args: &LiveArgs) -> Outcome {
    let key = args.key.as_deref().map(key).transpose()?;
    let manifest = args.manifest.display();
    let missing = || Fault::data(format!("{manifest}: no such file"));
    let mut read = read(&args.manifest)?.ok_or_else(missing)?;
    let before = std::mem::replace(&mut read.live_version, args.version);
    let signature = published::write(&args.manifest, &read, key.as_ref())?;
    let live = args.version;
    report(
        vec![format!(
            "{manifest}: workers are to serve version {live}, before it was {before}"
        )],
        signature,
    )
}

fn report(mut lines: Vec<String>, signature: Signature) -> Outcome {
    match signature {
        Signature::None => {}
        Signature::Outdated(path) => complain(&format!(
            "note: {} is the signature of the manifest before; workers with model.update_key refuse this one until it is \
             signed: --key",
            path.display()
        )),
        Signature::Made(path, public) => lines.push(format!(
            "signed in {}, for workers with model.update_key = \"{public}\"",
            path.display()
        )),
    }
    let lines: Vec<_> = lines.iter().map(|line| plain(line)).collect();
    answer(&lines.join("\n"))
}

fn add_weights(
    args: &AddArgs,
    file: &Path,
    package: &Package,
    manifest: &mut UpdateManifest,
) -> Result<(String, u64), Fault> {
    let version = args
        .version
        .ok_or_else(|| Fault::usage("--version: missing"))?;
    let content = content(args, file)?;
    let entry = FullWeights {
        version,
        urls: content.urls,
        sha256: content.sha256,
        size: content.size,
        graph_sha256: package.manifest.graph.sha256.clone(),
        canary: args.canary,
    };
    usable("--weights", package, Step::Full(&entry), file)?;
    let said = format!("version {version}: {}", described(Step::Full(&entry)));
    let same = |known: &&mut FullWeights| {
        known.version == version && known.graph_sha256 == entry.graph_sha256
    };
    match manifest.full.iter_mut().find(same) {
        None => manifest.full.push(entry),
        Some(known) if known.sha256 == entry.sha256 => {
            (known.urls, known.canary) = (entry.urls, entry.canary.or(known.canary));
        }
        Some(known) => return Err(other_bytes(&format!("version {version}"), &known.sha256)),
    }
    Ok((said, version))
}

fn add_delta(
    args: &AddArgs,
    file: &Path,
    package: &Package,
    manifest: &mut UpdateManifest,
) -> Result<(String, u64), Fault> {
    let (Some(from), Some(to), Some(format)) = (args.from, args.to, args.format) else {
        return Err(Fault::usage("--from, --to and --format: missing"));
    };
    let named = format!("--delta {}", file.display());
    format::check_file(&named, file, (format, args.compression))?;
    let content = content(args, file)?;
    let entry = Delta {
        from,
        to,
        urls: content.urls,
        format,
        compression: args.compression,
        sha256: content.sha256,
        size: content.size,
        canary: args.canary,
    };
    usable("--delta", package, Step::Delta(&entry), file)?;
    let said = format!("{from} to {to}: {}", described(Step::Delta(&entry)));
    let container = |delta: &Delta| (delta.from, delta.to, delta.format, delta.compression);
    match manifest
        .updates
        .iter_mut()
        .find(|known| container(known) == container(&entry))
    {
        None => manifest.updates.push(entry),
        Some(known) if known.sha256 == entry.sha256 => {
            (known.urls, known.canary) = (entry.urls, entry.canary.or(known.canary));
        }
        Some(known) => return Err(other_bytes(&format!("{from} to {to}"), &known.sha256)),
    }
    Ok((said, to))
}

fn usable(flag: &str, package: &Package, step: Step<'_>, file: &Path) -> Result<(), Fault> {
    let usable = build::check(package, step, file);
    usable.map_err(|why| {
        Fault::data(format!(
            "{flag} {}: no worker could use it: {why}",
            file.display()
        ))
    })
}

fn described(step: Step<'_>) -> String {
    let (urls, size, sha256) = (step.urls().join(", "), step.size(), step.sha256());
    format!("{urls}, {size} bytes, SHA-256 {sha256}")
}

fn other_bytes(what: &str, sha256: &str) -> Fault {
    Fault::data(format!(
        "{what} is in the manifest already, with another file (SHA-256 {sha256}); a version stands for the same weights \
         for ever, so take a new number"
    ))
}

/// Hashes a file, and says where workers find it.
fn content(args: &AddArgs, file: &Path) -> Result<Content, Fault> {
    let at = |why: &dyn std::fmt::Display| Fault::data(format!("{}: {why}", file.display()));
    let mut digest = Sha256::new();
    let mut opened = std::fs::File::open(file).map_err(|e| at(&e))?;
    let size = std::io::copy(&mut opened, &mut digest).map_err(|e| at(&e))?;
    let urls = match args.urls.is_empty() {
        true => vec![beside(&args.manifest, file).ok_or_else(|| {
            at(&"does not lie beside the manifest; say where workers find it: --url")
        })?],
        false => args.urls.clone(),
    };
    let sha256 = hex::encode(digest.finalize());
    Ok(Content { urls, sha256, size })
}

/// The path from the manifest's folder to a file in or below it, as a relative URL.
fn beside(manifest: &Path, file: &Path) -> Option<String> {
    let folder = manifest
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new(".")).canonicalize().ok()?;
    let file = file.canonicalize().ok()?;
    let below = file.strip_prefix(&folder).ok()?;
    let (base, full) = (
        Url::from_directory_path(&folder).ok()?,
        Url::from_file_path(folder.join(below)).ok()?,
    );
    base.make_relative(&full)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_canary_is_a_loss_and_perhaps_a_tolerance() {
        let of = |loss, tolerance| Ok(Canary { loss, tolerance });
        assert_eq!(canary("3.25"), of(3.25, TOLERANCE));
        assert_eq!(canary("3.25, 0"), of(3.25, 0.0));
        for (wrong, named) in [
            ("", "loss: "),
            ("nan", "loss: "),
            ("3,", "tolerance: "),
            ("3,inf", "tolerance: "),
            ("3,-1", "canary.tolerance"),
        ] {
            let why = canary(wrong).unwrap_err();
            assert!(why.starts_with(named), "{wrong:?}: {why}");
        }
    }

    #[test]
    fn what_lies_beside_the_manifest_is_named_from_there() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at("models/v 9")).unwrap();
        for file in [
            "models/full.safetensors",
            "models/v 9/a:b.json",
            "other.json",
        ] {
            std::fs::write(at(file), b"x").unwrap();
        }
        let found = |file: &str| beside(&at("models/manifest.json"), &at(file));
        assert_eq!(
            found("models/full.safetensors").as_deref(),
            Some("full.safetensors")
        );
        assert_eq!(
            found("models/v 9/a:b.json").as_deref(),
            Some("v%209/a:b.json")
        );
        assert_eq!(found("other.json"), None);
        assert_eq!(found("models/missing"), None);
    }
}
