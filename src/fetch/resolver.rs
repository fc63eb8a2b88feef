//! DNS look-ups that hand out only addresses that may be connected to.

use std::net::{IpAddr, SocketAddr};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::allow::is_public;

/// Resolves a host once and returns only allowed addresses, so that a second look-up cannot lead
/// elsewhere (DNS rebinding).
pub(super) struct CheckedResolver {
    pub(super) may: fn(IpAddr) -> bool,
    pub(super) look_up: fn(String) -> BoxFuture<'static, std::io::Result<Vec<SocketAddr>>>,
}

#[derive(Debug, thiserror::Error)]
#[error("resolves to {0}, which is not a public address (candidates.allow_private)")]
pub(super) struct NotPublic(IpAddr);

impl CheckedResolver {
    pub(super) fn of_the_system(allow_private: bool) -> Self {
        Self {
            may: if allow_private { |_| true } else { is_public },
            look_up: |name| {
                async move { Ok(tokio::net::lookup_host((name, 0)).await?.collect()) }.boxed()
            },
        }
    }
}

impl Resolve for CheckedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (may, found) = (self.may, (self.look_up)(name.as_str().to_owned()));
        Box::pin(async move {
            let addresses = found.await?;
            match addresses.iter().find(|a| !may(a.ip())) {
                Some(private) => Err(NotPublic(private.ip()).into()),
                None => Ok(Box::new(addresses.into_iter()) as Addrs),
            }
        })
    }
}
