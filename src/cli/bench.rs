//! `scorer bench`: the engine alone, no broker and no Redis.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::{Fault, Outcome, answer, answer_json, busy, offline};
use crate::config::Config;
use crate::model::onnx::synthetic::Decoder;
use crate::selftest::bench::{Report, run};
use crate::selftest::parts::Costs;
use crate::selftest::synthetic_model::{HUNDRED_MILLION, SIX_HUNDRED_MILLION, make};

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct Subject {
    /// Directory of the model package.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Generate a model with random weights.
    #[arg(long)]
    synthetic: Option<Synthetic>,
}

/// Sizes of generated models.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Synthetic {
    /// 100 million parameters, 12 layers.
    #[value(name = "100m")]
    HundredMillion,
    /// 600 million parameters, 20 layers: 2.4 GB.
    #[value(name = "600m")]
    SixHundredMillion,
}

impl Synthetic {
    fn decoder(self) -> Decoder {
        match self {
            Self::HundredMillion => HUNDRED_MILLION,
            Self::SixHundredMillion => SIX_HUNDRED_MILLION,
        }
    }
}

pub(super) async fn bench(config: &Config, subject: Subject, seconds: u64, json: bool) -> Outcome {
    let (made, dir);
    let model: &Path = match (&subject.model, subject.synthetic) {
        (Some(dir), _) => dir,
        (None, Some(synthetic)) => {
            made = tempfile::tempdir().map_err(Fault::internal)?;
            dir = made.path().to_owned();
            make(synthetic.decoder(), &dir).map_err(Fault::unavailable)?;
            &dir
        }
        (None, None) => return Err(Fault::usage("--model or --synthetic: missing")),
    };
    let bar = busy(format!("measuring, for about {} s", seconds + seconds / 2));
    let report = run(model, config, Duration::from_secs(seconds))
        .await
        .map_err(|e| offline::fault(&e))?;
    bar.finish_and_clear();
    if json {
        answer_json(&report)
    } else {
        answer(&table(&report))
    }
}

fn table(report: &Report) -> String {
    let mut lines = vec![
        format!(
            "{} on {}, {} windows, weights of {:.1} MB, {} interleaved repetitions, medians",
            report.provider,
            report.device,
            report.windows,
            megabytes(report.weights_bytes),
            report.repetitions
        ),
        format!("bare session             {:10.2} ms", report.bare_ms),
    ];
    for (density, ms) in &report.evaluate_ms {
        lines.push(format!(
            "candidate, density {density:<6}{ms:10.2} ms   {:.3} x bare",
            report.ratio[density]
        ));
    }
    lines.extend(by_part(&report.costs));
    lines.push("stages of a candidate by itself, density 0.01:".into());
    for stage in ["fetch", "decode", "check", "patch", "forward", "restore"] {
        lines.push(format!("  {stage:<22} {:10.2} ms", report.stages_ms[stage]));
    }
    lines.extend([
        format!(
            "patch + restore          {:10.2} % of the forward pass",
            100.0 * report.patch_restore_share
        ),
        format!(
            "decoding and checking    {:10.2} x the speed of inflating alone",
            report.decode_speed
        ),
        format!(
            "stream                   {:10.2} candidates/s, device idle {:.2} %",
            report.candidates_per_s,
            100.0 * report.idle_share
        ),
        format!(
            "first candidate          {:10.2} ms   {:.2} x the median {:.2} ms",
            report.first_ms, report.first_ratio, report.median_ms
        ),
        format!(
            "peak memory              {:10.1} MB   {:.2} x weights {:.1} MB and bare session {:.1} MB",
            megabytes(report.peak_rss_bytes),
            report.memory_ratio,
            megabytes(report.weights_bytes),
            megabytes(report.bare_peak_rss_bytes)
        ),
    ]);
    lines.join("\n")
}

/// What a candidate costs by the part that it starts at.
fn by_part(costs: &Costs) -> Vec<String> {
    let mut lines = vec![format!(
        "in one part              {:10.3} x bare, every tensor touched",
        costs.ratio_whole
    )];
    let begins = std::iter::once("the start").chain(costs.cuts.iter().map(String::as_str));
    for (number, (begin, ratio)) in (1..).zip(begins.zip(&costs.ratio_from)) {
        let count = costs.ratio_from.len();
        lines.push(format!(
            "from part {number:<2} of {count:<2}       {ratio:10.3} x bare, from {begin} on"
        ));
    }
    for (windows, mixed) in [("known", costs.mixed), ("half new", costs.mixed_fresh)] {
        lines.push(format!(
            "mixed, windows {windows:<8}  {:10.3} x bare, predicted {:.3}",
            mixed.measured, mixed.predicted
        ));
    }
    lines.push(format!(
        "kept between the parts   {:10.1} MB",
        megabytes(costs.activation_bytes)
    ));
    lines
}

#[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
