//! What must hold for any bytes whatever: nothing panics, and what is taken is sound. Each function is
//! a fuzz target, and is run by the ordinary tests on the seeds and on whatever was found.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use scorer::candidate::{Update, decode};
use scorer::config::{CandidatesConfig, Config, Layers};
use scorer::engine::trial::build;
use scorer::fetch::Downloader;
use scorer::model::build::Recipe;
use scorer::model::manifest::Objective;
use scorer::model::package::Package;
use scorer::protocol::encoding::Encoding;
use scorer::protocol::failure::Failure;
use scorer::protocol::job::{Compression, Format};
use scorer::protocol::update_manifest;
use scorer::protocol::{control, job};
use tempfile::TempDir;
use url::Url;

/// Characters of a message, cut as they are, and the dots.
const LONGEST_MESSAGE: usize = 403;

/// A body in the encoding that its first byte chooses: a job, or a control message.
pub fn job(data: &[u8]) {
    let Some((choice, body)) = data.split_first() else {
        return;
    };
    let encoding = match choice % 2 {
        0 => Encoding::Json,
        _ => Encoding::MessagePack,
    };
    if let Ok(job) = job::decode(body, encoding) {
        assert!(scorer::protocol::names::is_submission_id(
            &job.submission_id
        ));
    }
    drop(control::decode(body, encoding));
}

/// An update manifest.
pub fn manifest(data: &[u8]) {
    drop(update_manifest::decode(data));
}

/// JSON of packed tensors.
pub fn binary_v2(data: &[u8]) {
    candidate(Format::BinaryV2, data);
}

/// A safetensors file.
pub fn safetensors(data: &[u8]) {
    candidate(Format::Safetensors, data);
}

/// A torch zip.
pub fn pt_chunks(data: &[u8]) {
    candidate(Format::PtChunks, data);
}

/// A URL where a few prefixes are allowed.
pub fn url(data: &[u8]) {
    static GETTER: OnceLock<Downloader> = OnceLock::new();
    let allow = ["https://a.example/c/", "s3://bucket/", "file:///srv/"];
    let getter = GETTER.get_or_init(|| {
        Downloader::new(&allow.map(str::to_owned), false).expect("TLS can be set up")
    });
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(url) = getter.check(text) else {
        return;
    };
    assert_eq!(Url::parse(url.as_str()), Ok(url.clone()), "another URL");
    assert!(url.username().is_empty() && url.password().is_none());
    assert!(
        allow.iter().any(|prefix| url.as_str().starts_with(prefix)),
        "{url}"
    );
    assert!(
        url.path_segments()
            .is_none_or(|mut parts| parts.all(|part| part != "..")),
        "{url}"
    );
}

/// The first byte says whether zstd is around it.
fn candidate(format: Format, data: &[u8]) {
    let Some((choice, bytes)) = data.split_first() else {
        return;
    };
    let (package, limits) = model();
    let compression = (choice % 2 == 1).then_some(Compression::Zstd);
    match decode(bytes, format, compression, package, limits.into()) {
        Ok(update) => check(&update, package, limits),
        Err(Failure { message, .. }) => {
            assert!(message.chars().count() <= LONGEST_MESSAGE, "{message}");
        }
    }
}

fn check(update: &Update, package: &Package, limits: &CandidatesConfig) {
    assert!(!update.tensors.is_empty());
    assert!(update.entries() <= limits.max_entries);
    assert!(update.tensors.is_sorted_by(|a, b| a.tensor < b.tensor));
    for touched in &update.tensors {
        let numel = package.weights.tensors[touched.tensor].numel;
        assert_eq!(touched.indices.len(), touched.values.len());
        assert!(touched.indices.is_sorted_by(|a, b| a < b));
        assert!(
            touched
                .indices
                .iter()
                .all(|index| (*index as usize) < numel)
        );
        assert!(touched.values.iter().all(|value| value.is_finite()));
    }
}

/// The tests' language model, and limits that some kilobytes can reach.
fn model() -> &'static (Package, CandidatesConfig) {
    static MODEL: OnceLock<(Package, CandidatesConfig)> = OnceLock::new();
    MODEL.get_or_init(|| {
        let folder = TempDir::new().expect("a folder for a moment");
        let (sources, out) = (sources(), folder.path().join("package"));
        let recipe = Recipe {
            exclude: Vec::new(),
            graph: sources.join("graph-named.onnx"),
            weights: Some(sources.join("checkpoint.safetensors")),
            shards: sources.join("shards"),
            name: "model".into(),
            version: 7,
            out: out.clone(),
            objective: Objective::causal_lm(128),
        };
        build(&recipe).expect("a package");
        let package = Package::load(&out, false, &[]).expect("a package");
        let set = [
            "candidates.max_inflated_bytes=256KiB",
            "candidates.max_entries=20000",
        ];
        let set = set.map(str::to_owned);
        let layers = Layers {
            set: &set,
            ..Layers::default()
        };
        let config = Config::load(&layers).expect("a configuration");
        (package, config.candidates)
    })
}

/// `tests/model`, from whichever package this is built in.
fn sources() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = here.ancestors().map(|folder| folder.join("tests/model"));
    found
        .find(|folder| folder.is_dir())
        .expect("the repository is whole")
}
