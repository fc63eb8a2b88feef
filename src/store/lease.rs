//! The lease that lets one worker of a fleet swap its weights at a time.

use std::time::Duration;

use super::health::Errand;
use super::{Reply, STORE_TIMEOUT, Store};
use crate::util::clock::millis;

impl Store {
    /// Takes or renews the lease; false = another worker has it.
    pub async fn hold_swap(&self, holder: &str, life: Duration) -> Reply<bool> {
        let mut call = self.scripts.hold.key(self.keys.swap());
        call.arg(holder).arg(millis(life));
        self.script(Errand::Lease, STORE_TIMEOUT, call).await
    }

    /// Gives the lease up.
    pub async fn let_go_of_swap(&self, holder: &str) -> Reply<()> {
        let mut call = self.scripts.let_go.key(self.keys.swap());
        call.arg(holder);
        self.script(Errand::Lease, STORE_TIMEOUT, call).await
    }
}
