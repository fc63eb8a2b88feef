//! The manifest that was read last, what is known about following it, and what to do about it.

use std::time::Duration;

use tokio::time::Instant;

use super::outcome::UpdateError;
use super::prepare::BlockedFiles;
use super::state::Refused;
use crate::fetch::Revision;
use crate::protocol::update_manifest::UpdateManifest;

/// The longest back-off after failures.
const LONGEST_BACKOFF: Duration = Duration::from_secs(3600);

#[derive(Debug)]
pub(super) struct KnownManifest {
    pub(super) manifest: UpdateManifest,
    pub(super) sha256: String,
    pub(super) revision: Option<Revision>,
    /// Files with the wrong content: they will not get better.
    pub(super) unfit: BlockedFiles,
    failed: Option<Failure>,
}

/// The last attempt, and when the next one is.
#[derive(Debug)]
struct Failure {
    why: String,
    attempts: u32,
    retry_at: Instant,
}

/// What to do about the live version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decision {
    /// Nothing: it is served.
    Served,
    /// Nothing: this very manifest named it before, and it did not prove itself.
    Refused(String),
    /// Nothing yet: the last attempt failed a short while ago.
    BackOff(String),
    /// Get it.
    Get,
}

impl KnownManifest {
    pub(super) fn new(
        manifest: UpdateManifest,
        sha256: String,
        revision: Option<Revision>,
    ) -> Self {
        Self {
            manifest,
            sha256,
            revision,
            unfit: BlockedFiles::new(),
            failed: None,
        }
    }

    /// What to do about the live version, for a worker that serves this one and that has `refused`
    /// another. An order (`asked`) overrides the back-off, but not the refusal.
    pub(super) fn decide(&self, served: u64, refused: Option<Refused>, asked: bool) -> Decision {
        if served == self.manifest.live_version {
            return Decision::Served;
        }
        if let Some(refused) = refused.filter(|refused| self.is_refused(refused)) {
            return Decision::Refused(refused.why);
        }
        match &self.failed {
            Some(failed) if !asked && Instant::now() < failed.retry_at => {
                Decision::BackOff(failed.why.clone())
            }
            Some(_) | None => Decision::Get,
        }
    }

    fn is_refused(&self, refused: &Refused) -> bool {
        refused.version == self.manifest.live_version && refused.manifest_sha256 == self.sha256
    }

    /// Why the live version is not served, if that is known.
    pub(super) fn why_not_served(&self, served: u64, refused: Option<Refused>) -> Option<String> {
        match self.decide(served, refused, false) {
            Decision::Served => None,
            Decision::Refused(why) => {
                Some(UpdateError::Refused(self.manifest.live_version, why).to_string())
            }
            Decision::BackOff(_) | Decision::Get => {
                self.failed.as_ref().map(|failed| failed.why.clone())
            }
        }
    }

    /// Notes how an attempt ended: each failure doubles the time to the next one.
    pub(super) fn note(&mut self, error: Option<&UpdateError>, interval: Duration) {
        let attempts = self.failed.take().map_or(0, |failed| failed.attempts);
        let longer = interval.saturating_mul(1 << attempts.min(16));
        self.failed = error.map(|error| Failure {
            why: error.to_string(),
            attempts: attempts + 1,
            retry_at: Instant::now() + longer.min(LONGEST_BACKOFF.max(interval)),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::message::V1;

    const INTERVAL: Duration = Duration::from_secs(60);

    /// A manifest whose live version is 9.
    fn known() -> KnownManifest {
        let manifest = UpdateManifest {
            v: V1,
            name: "tiny".into(),
            live_version: 9,
            full: Vec::new(),
            updates: Vec::new(),
        };
        KnownManifest::new(manifest, "m".into(), None)
    }

    fn refused(version: u64, manifest_sha256: &str) -> Option<Refused> {
        Some(Refused {
            version,
            why: "canary".into(),
            at_ms: 1,
            manifest_sha256: manifest_sha256.into(),
        })
    }

    fn failed(known: &mut KnownManifest) {
        known.note(Some(&UpdateError::Disk("full".into())), INTERVAL);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_done_about_each_published_version() {
        let (fresh, mut failing) = (known(), known());
        failed(&mut failing);
        let nothing = || [const { Decision::Served }; 4];
        let no = || std::array::from_fn(|_| Decision::Refused("canary".into()));
        let back_off = || Decision::BackOff("model.state_dir: full".into());
        let get = || [Decision::Get, Decision::Get, back_off(), Decision::Get];
        // The version that is served, the one that was refused; then what a look and an order lead to,
        // at first and after a failure.
        let table = [
            (9, None, nothing()),
            (9, refused(9, "m"), nothing()),
            (7, None, get()),
            // An older version can be live again.
            (12, None, get()),
            (7, refused(9, "m"), no()),
            // From another manifest, or another version.
            (7, refused(9, "old"), get()),
            (7, refused(8, "m"), get()),
        ];
        for (served, refused, expected) in table {
            let found = [
                (&fresh, false),
                (&fresh, true),
                (&failing, false),
                (&failing, true),
            ]
            .map(|(known, asked)| known.decide(served, refused.clone(), asked));
            assert_eq!(found, expected, "{served} {refused:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_back_off_doubles_up_to_an_hour_and_ends_with_a_success() {
        let mut known = known();
        for expected in [60, 120, 240, 480, 960, 1920, 3600, 3600] {
            failed(&mut known);
            let expected = Duration::from_secs(expected);
            tokio::time::advance(expected - Duration::from_millis(1)).await;
            assert!(matches!(known.decide(7, None, false), Decision::BackOff(_)));
            tokio::time::advance(Duration::from_millis(1)).await;
            assert_eq!(known.decide(7, None, false), Decision::Get, "{expected:?}");
        }
        known.note(None, INTERVAL);
        assert_eq!(known.why_not_served(7, None), None);
        failed(&mut known);
        tokio::time::advance(INTERVAL).await;
        assert_eq!(known.decide(7, None, false), Decision::Get);
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_known_reason_is_remembered() {
        let mut known = known();
        assert_eq!(known.why_not_served(7, None), None);
        failed(&mut known);
        tokio::time::advance(INTERVAL * 2).await;
        let why = |served, refused| known.why_not_served(served, refused);
        assert_eq!(why(7, None).as_deref(), Some("model.state_dir: full"));
        let refusal = why(7, refused(9, "m")).unwrap_or_default();
        assert!(
            refusal.starts_with("version 9 is not tried again until"),
            "{refusal}"
        );
        assert_eq!(why(9, refused(9, "m")), None);
    }
}
