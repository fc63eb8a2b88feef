//! From a file to the entry of a manifest that names it.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use sha2::{Digest, Sha256};
use url::Url;

use crate::cli::offline::word;
use crate::cli::{Fault, format};
use crate::config::urls::check_place;
use crate::model::package::Package;
use crate::protocol::job::{Compression, Format};
use crate::protocol::update_manifest::{Canary, Delta, FullWeights, UpdateManifest};
use crate::update::build;
use crate::update::route::Step;

/// The tolerance of a canary that is given without one, nats per target.
const TOLERANCE: f64 = 1e-3;

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("file").required(true).args(["weights", "delta"]))]
pub(super) struct EntryArgs {
    /// Whole weights: a safetensors file, as `--weights` of `scorer package` takes it.
    #[arg(long, value_name = "FILE", requires = "weights_version")]
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
    /// order [default: as in the manifest, else its path, if it lies beside it].
    #[arg(long = "url", value_name = "URL", value_parser = mirror)]
    urls: Vec<String>,
    /// The version's loss on all windows with an empty nonce, and how far a worker's may be from it [default: as in the
    /// manifest, else none; tolerance: 0.001]. `scorer manifest check` measures it.
    #[arg(long, value_name = "LOSS[,TOLERANCE]", value_parser = canary, allow_hyphen_values = true)]
    canary: Option<Canary>,
}

fn mirror(text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        return Err("is empty".into());
    }
    // What is not a URL starts at the manifest, wherever that will be.
    let base = Url::parse("https://manifest/").map_err(|e| e.to_string())?;
    let url = base.join(text).map_err(|e| format!("is no URL: {e}"))?;
    check_place(&url).map(|()| text.to_owned())
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

/// An entry that is not in the manifest yet.
#[derive(Debug)]
pub(super) enum Entry {
    Full(FullWeights),
    Delta(Delta),
}

impl Entry {
    /// Hashes the file, and checks that a worker with this package could use it.
    pub(super) fn read(args: &EntryArgs, package: &Package) -> Result<(Self, PathBuf), Fault> {
        let (entry, file) = match (&args.weights, &args.delta) {
            (Some(file), _) => (Self::full(args, file, package)?, file),
            (None, Some(file)) => (Self::delta(args, file)?, file),
            (None, None) => return Err(Fault::usage("--weights or --delta: missing")),
        };
        build::check(package, entry.step(), file)
            .and_then(|()| entry.is_no_other(package, file))
            .map_err(|why| {
                Fault::data(format!("{}: no worker could use it: {why}", file.display()))
            })?;
        Ok((entry, file.clone()))
    }

    /// The package's own version is known already: other weights cannot be it.
    fn is_no_other(&self, package: &Package, file: &Path) -> Result<(), String> {
        let (own, version) = (&package.manifest, self.step().to());
        match self {
            Self::Full(full) if version == own.version => {
                let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
                // Whole weights are moved where they can be.
                let (copy, out) = (folder.path().join("copy"), folder.path().join("weights"));
                std::fs::copy(file, &copy).map_err(|e| e.to_string())?;
                build::build(package, None, &[(Step::Full(full), copy)], &out)
                    .map_err(|e| e.to_string())?;
                let made = package.with_new_weights(version, out, None);
                let (made, _) = made.map_err(|e| e.to_string())?;
                match made.weights.weights_id == package.weights.weights_id {
                    true => Ok(()),
                    false => Err(format!(
                        "version {version} is the package's own, and these are other weights"
                    )),
                }
            }
            Self::Full(_) | Self::Delta(_) => Ok(()),
        }
    }

    fn full(args: &EntryArgs, file: &Path, package: &Package) -> Result<Self, Fault> {
        let missing = || Fault::usage("--version: missing");
        let (sha256, size) = digest(file)?;
        Ok(Self::Full(FullWeights {
            version: args.version.ok_or_else(missing)?,
            urls: args.urls.clone(),
            sha256,
            size,
            graph_sha256: package.manifest.graph.sha256.clone(),
            canary: args.canary,
        }))
    }

    fn delta(args: &EntryArgs, file: &Path) -> Result<Self, Fault> {
        let (Some(from), Some(to), Some(format)) = (args.from, args.to, args.format) else {
            return Err(Fault::usage("--from, --to and --format: missing"));
        };
        let named = format!("--delta {}", file.display());
        format::check_file(&named, file, (format, args.compression))?;
        let (sha256, size) = digest(file)?;
        Ok(Self::Delta(Delta {
            from,
            to,
            urls: args.urls.clone(),
            format,
            compression: args.compression,
            sha256,
            size,
            canary: args.canary,
        }))
    }

    pub(super) fn step(&self) -> Step<'_> {
        match self {
            Self::Full(full) => Step::Full(full),
            Self::Delta(delta) => Step::Delta(delta),
        }
    }

    /// Adds it, or changes what was said anew of the same file; returns what the manifest has then. `beside` is where the
    /// file is, if nothing says so.
    pub(super) fn put_into(
        mut self,
        manifest: &mut UpdateManifest,
        beside: impl FnOnce() -> Result<String, Fault>,
    ) -> Result<Step<'_>, Fault> {
        // A version stands for the same weights for ever, and so does the way from one to another.
        let way = |step: Step<'_>| match step {
            Step::Full(full) => (Some(full.graph_sha256.clone()), None, full.version),
            Step::Delta(delta) => (None, Some(delta.from), delta.to),
        };
        let same = |step: Step<'_>| way(step) == way(self.step());
        let known = Step::all(manifest).find(|step| same(*step));
        if let Some(other) = known.filter(|known| known.sha256() != self.step().sha256()) {
            let (what, sha256) = (described(other), other.sha256());
            return Err(Fault::data(format!(
                "{what} is in the manifest already, with another file (SHA-256 {sha256}); a version stands for the same \
                 weights for ever, so take a new number"
            )));
        }
        let full = manifest.full.iter().position(|full| same(Step::Full(full)));
        let delta = manifest
            .updates
            .iter()
            .position(|delta| same(Step::Delta(delta)));
        let (Self::Full(FullWeights { urls, canary, .. })
        | Self::Delta(Delta { urls, canary, .. })) = &mut self;
        if let Some(known) = known {
            *canary = canary.or(known.canary());
            if urls.is_empty() {
                *urls = known.urls().to_vec();
            }
        }
        if urls.is_empty() {
            *urls = vec![beside()?];
        }
        Ok(match self {
            Self::Full(entry) => Step::Full(replace(&mut manifest.full, full, entry)),
            Self::Delta(entry) => Step::Delta(replace(&mut manifest.updates, delta, entry)),
        })
    }
}

/// Puts an entry in the place of another, or at the end.
fn replace<T>(list: &mut Vec<T>, at: Option<usize>, entry: T) -> &T {
    let at = at.unwrap_or(list.len());
    if at == list.len() {
        list.push(entry);
    } else {
        list[at] = entry;
    }
    &list[at]
}

/// An entry in words.
pub(super) fn described(step: Step<'_>) -> String {
    match step {
        Step::Full(full) => format!("version {}", full.version),
        Step::Delta(delta) => format!("{} to {}", delta.from, delta.to),
    }
}

/// SHA-256 and bytes of a file.
fn digest(file: &Path) -> Result<(String, u64), Fault> {
    let mut digest = Sha256::new();
    let mut read = || match file.metadata()?.is_file() {
        true => std::io::copy(&mut std::fs::File::open(file)?, &mut digest),
        false => Err(std::io::Error::other("not a regular file")),
    };
    let size =
        read().map_err(|e: std::io::Error| Fault::data(format!("{}: {e}", file.display())))?;
    Ok((hex::encode(digest.finalize()), size))
}

/// The path from the manifest's folder to a file in or below it, as a relative URL.
pub(super) fn beside(folder: &Path, file: &Path) -> Option<String> {
    let folder = folder.canonicalize().ok()?;
    let file = file.canonicalize().ok()?;
    file.strip_prefix(&folder).ok()?;
    let base = Url::from_directory_path(&folder).ok()?;
    let path = base.make_relative(&Url::from_file_path(&file).ok()?)?;
    // What comes before a colon would be a scheme.
    Some(match Url::parse(&path) {
        Ok(_) => format!("./{path}"),
        Err(_) => path,
    })
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
    fn a_mirror_is_a_url_or_a_path() {
        for sound in [
            "full-9",
            "v9/full",
            "./a:b",
            "https://m.example/9?sig=x",
            "s3://bucket/9",
            "file:///srv/9",
        ] {
            assert_eq!(mirror(sound).as_deref(), Ok(sound));
        }
        for wrong in [
            "",
            " ",
            "http://[",
            "ftp://m.example/9",
            "javascript:9",
            "https://u:p@m.example/9",
            "a#b",
        ] {
            assert!(mirror(wrong).is_err(), "{wrong:?}");
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
            "models/a:b.json",
            "other.json",
        ] {
            std::fs::write(at(file), b"x").unwrap();
        }
        let found = |file: &str| beside(&at("models"), &at(file));
        assert_eq!(
            found("models/full.safetensors").as_deref(),
            Some("full.safetensors")
        );
        assert_eq!(
            found("models/v 9/a:b.json").as_deref(),
            Some("v%209/a:b.json")
        );
        assert_eq!(found("models/a:b.json").as_deref(), Some("./a:b.json"));
        assert_eq!(found("other.json"), None);
        assert_eq!(found("models/missing"), None);
    }
}
