//! Control messages: an operator's commands to workers. None contains a URL or a path.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::protocol::document::from_document;
use crate::protocol::label::Label;
use crate::protocol::message::V1;
use crate::protocol::word::words;

words! {
    /// What is asked.
    #[cfg_attr(feature = "worker", derive(clap::ValueEnum))]
    pub enum Command {
        /// Take no jobs until `resume`.
        Pause,
        /// Take jobs again.
        Resume,
        /// Finish what runs, then exit.
        #[cfg_attr(feature = "worker", value(help = "Finish running jobs, then exit"))]
        Drain,
        /// Look for new weights now.
        Update,
        /// Read the package directory again.
        Reload,
        /// Prove the session again.
        #[cfg_attr(feature = "worker", value(help = "Warm up again"))]
        Rewarm,
    }
}

/// A control message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "control.v1")]
pub struct ControlMessage {
    /// Always 1.
    pub v: V1,
    /// What is asked.
    pub command: Command,
    /// Of whom; default everyone who gets it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker_id: Option<String>,
}

words! {
    /// What became of a command.
    pub enum Outcome {
        /// It was done.
        Done,
        /// It was not tried.
        Refused,
        /// It was tried in vain.
        Failed,
    }
}

/// What one worker answers to a control message with a `reply_to`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "control_answer.v1")]
pub struct ControlAnswer {
    /// Always 1.
    pub v: V1,
    /// What was asked.
    pub command: Command,
    /// Who answers.
    pub worker_id: String,
    /// Which start of it.
    pub incarnation: String,
    /// What it serves.
    pub model: String,
    /// What became of the command.
    pub outcome: Outcome,
    /// What was done, or why not, for a person.
    pub message: String,
}

/// A command on its way through the worker, to be answered once.
#[derive(Debug)]
pub struct Order {
    /// What is asked.
    pub command: Command,
    answer: oneshot::Sender<(Outcome, String)>,
}

impl Order {
    /// An order, and where its answer comes.
    pub fn new(command: Command) -> (Self, oneshot::Receiver<(Outcome, String)>) {
        let (answer, answered) = oneshot::channel();
        (Self { command, answer }, answered)
    }

    /// Answers that it was done.
    pub fn done(self, message: impl Into<String>) {
        self.answer(Outcome::Done, message.into());
    }

    /// Answers that it is not even tried.
    pub fn refuse(self, message: impl Into<String>) {
        self.answer(Outcome::Refused, message.into());
    }

    /// Answers that it was tried in vain.
    pub fn fail(self, message: impl Into<String>) {
        self.answer(Outcome::Failed, message.into());
    }

    fn answer(self, outcome: Outcome, message: String) {
        let (command, said) = (self.command.as_str(), outcome.as_str());
        tracing::info!(
            command,
            outcome = said,
            message,
            "answered a control message"
        );
        if self.answer.send((outcome, message)).is_err() {
            tracing::debug!("nobody waits for the reply");
        }
    }
}

impl ControlAnswer {
    /// Reads what a worker answers.
    ///
    /// # Errors
    /// A sentence that names the field.
    pub fn decode(body: &[u8], said: impl Into<Label>) -> Result<Self, String> {
        from_document(&said.into().decode(body)?)
    }
}

/// Decodes a control message. `said` is what it says of its body.
///
/// # Errors
/// A sentence that names the field.
pub fn decode(body: &[u8], said: impl Into<Label>) -> Result<ControlMessage, String> {
    from_document(&said.into().decode(body)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::encoding::Encoding;

    #[test]
    fn a_message_that_names_a_place_is_refused() {
        assert!(
            decode(
                br#"{"v":1,"command":"reload","url":"http://evil"}"#,
                Encoding::Json
            )
            .is_err()
        );
        assert!(decode(br#"{"v":1,"command":"explode"}"#, Encoding::Json).is_err());
        let message = decode(br#"{"v":1,"command":"rewarm"}"#, Encoding::Json).unwrap();
        assert_eq!(message.command, Command::Rewarm);
    }
}
