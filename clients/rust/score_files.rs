//! Has files judged: `cargo run --package score_files MODEL VERSION FILE...`, each a difference as `binary_v2`.
//! RabbitMQ and Redis are those of the configuration: `SCORER_AMQP__URL`, `SCORER_REDIS__URL`.

use std::path::Path;

use anyhow::Context;
use scorer::config::{Config, Layers};
use scorer::fleet::client::{Client, Outcome};
use scorer::protocol::job::{Format, Semantics};
use scorer::protocol::message::{
    Blob, CandidateMessage, JobMessage, ScoreMessage, ScoreValidation, V1,
};

#[tokio::main]
#[expect(clippy::print_stdout, reason = "its answer")]
async fn main() -> anyhow::Result<()> {
    let mut words = std::env::args().skip(1);
    let model = words.next().context("MODEL is missing")?;
    let version = words.next().context("VERSION is missing")?;
    let version = version.parse().context("VERSION is a number")?;
    let config = Config::load(&Layers {
        environment: std::env::vars_os().collect(),
        ..Layers::default()
    })?;
    let mut client = Client::new(config, &model);
    for file in words {
        client.submit(&job(Path::new(&file), version)?)?;
    }
    while let Some(outcome) = client.next().await {
        match outcome {
            Outcome::Answered(result) => println!("{}", serde_json::to_string(&result)?),
            // Of an earlier run, or of somebody else.
            Outcome::Unasked(_) => {}
            missing @ (Outcome::Overdue { .. }
            | Outcome::Unsent { .. }
            | Outcome::Unreadable { .. }) => println!("{missing:?}"),
        }
    }
    client.close().await;
    Ok(())
}

fn job(file: &Path, version: u64) -> anyhow::Result<JobMessage> {
    let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    Ok(JobMessage::Score(ScoreMessage {
        v: V1,
        submission_id: name.into_owned(),
        model: None,
        model_version: version,
        candidate: CandidateMessage {
            format: Format::BinaryV2,
            compression: None,
            semantics: Semantics::ParamDiff,
            learning_rate: None,
            url: None,
            data: Some(Blob(bytes)),
            sha256: None,
            size: None,
        },
        validation: Some(ScoreValidation {
            nonce: "epoch-1".into(),
            ..ScoreValidation::default()
        }),
        deadline_ms: None,
        context: None,
    }))
}
