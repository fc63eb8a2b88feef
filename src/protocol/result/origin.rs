//! Who answers which job, and whether a stored result is the answer to it.

use crate::protocol::context::Context;
use crate::protocol::document::from_json;
use crate::protocol::failure::Status;
use crate::protocol::job::{Job, Kind};
use crate::protocol::result::{Body, ResultMessage};

/// Who answers, with which weights: one immutable snapshot per job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResultOrigin {
    /// The model's name.
    pub model: String,
    /// The worker's version.
    pub model_version: u64,
    /// Its weights.
    pub weights_id: String,
    /// Its package.
    pub package_id: String,
    /// Its name.
    pub worker_id: String,
    /// Which start of it.
    pub incarnation: String,
}

/// Whose job is answered.
#[derive(Debug, Clone, PartialEq)]
pub struct JobRef {
    /// The job's name.
    pub submission_id: String,
    /// Its kind.
    pub kind: Kind,
    /// The version it names.
    pub model_version: Option<u64>,
    /// Its context.
    pub context: Option<Context>,
    /// Which try this is, from 1.
    pub attempt: u32,
}

impl JobRef {
    /// Of a job in its so-manieth try, from 1.
    pub fn new(job: &Job, attempt: u32) -> Self {
        Self {
            submission_id: job.submission_id.clone(),
            kind: job.task.kind(),
            model_version: job.task.model_version(),
            context: job.context.clone(),
            attempt,
        }
    }
}

impl ResultOrigin {
    /// A stored result, if it is what this worker would have answered: Redis is shared, and what is
    /// read from it is published.
    ///
    /// # Errors
    /// Why it is not.
    pub fn read(&self, text: &str, job_ref: &JobRef) -> Result<ResultMessage, String> {
        let read = from_json::<ResultMessage>(text.as_bytes());
        let message = read.map_err(|e| format!("it cannot be read: {e}"))?;
        let version = job_ref.model_version.unwrap_or(self.model_version);
        let same_job = message.submission_id == job_ref.submission_id
            && message.kind == job_ref.kind
            && (&message.model, message.model_version) == (&self.model, version)
            && message.weights_id.as_ref() == Some(&self.weights_id);
        if !same_job {
            return Err("it answers another job".into());
        }
        let fits = match (&message.body, message.status) {
            (Body::Score(_), Status::Scored) => message.kind == Kind::Score,
            (Body::Loss(_), Status::Scored) => message.kind == Kind::Validate,
            (Body::Merge(_), Status::Scored) => message.kind == Kind::Merge,
            (Body::Error { error }, status) => error.code.status() == status,
            (
                Body::Score(_) | Body::Loss(_) | Body::Merge(_),
                Status::Rejected | Status::Failed,
            ) => false,
        };
        if !fits || !message.may_be_stored() {
            return Err("its parts contradict each other".into());
        }
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::failure::{Code, Failure};
    use crate::protocol::result::LossBody;
    use crate::protocol::result::tests::{answerer, job_ref};

    #[test]
    fn a_stored_result_is_read_only_for_its_own_job() {
        let body = |kind| match kind {
            Kind::Validate => Body::Loss(LossBody {
                loss: 0.5,
                windows: 3,
                tokens: 9,
                plan: "x".into(),
            }),
            Kind::Score | Kind::Merge => Body::Error {
                error: Failure::new(Code::OutOfMemory, "x").to_error(),
            },
        };
        let sound = ResultMessage::new(&answerer(), job_ref(), Ok(body(Kind::Validate)));
        let sound = ResultMessage {
            context: None,
            ..sound
        };
        let read = |message: &ResultMessage| {
            answerer().read(&serde_json::to_string(message).unwrap(), &job_ref())
        };
        assert_eq!(read(&sound).as_ref(), Ok(&sound));
        let changes: [fn(&mut ResultMessage); 6] = [
            |m| m.submission_id = "t".into(),
            |m| m.kind = Kind::Score,
            |m| m.model_version = 8,
            |m| m.model = "n".into(),
            |m| m.weights_id = None,
            |m| m.status = Status::Rejected,
        ];
        for change in changes {
            let mut other = sound.clone();
            change(&mut other);
            assert!(read(&other).is_err(), "{other:?}");
        }
        let failed = ResultMessage {
            status: Status::Failed,
            body: body(Kind::Score),
            ..sound
        };
        assert!(read(&failed).is_err(), "what may not be stored");
        assert!(answerer().read("[]", &job_ref()).is_err());
    }
}
