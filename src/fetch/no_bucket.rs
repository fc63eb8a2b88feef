//! Stands in for `bucket` in a build without the feature `buckets`.

use std::convert::Infallible;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use url::Url;

use super::{FetchError, forbidden, place};

/// The bytes of an object; never constructed.
pub(super) type Stream = BoxStream<'static, Result<Bytes, Infallible>>;

/// An opened object; never constructed.
pub(super) struct Object {
    pub(super) from: u64,
    pub(super) tag: Option<String>,
    pub(super) bytes: Stream,
}

/// Refuses every object.
#[derive(Debug, Clone, Default)]
pub(super) struct Buckets(());

impl Buckets {
    /// Always `Forbidden`.
    pub(super) async fn open(
        &self,
        url: &Url,
        _from: u64,
        _unless: Option<&str>,
    ) -> Result<Option<Object>, FetchError> {
        let place = place(url);
        Err(forbidden(format!(
            "{place}: this scorer is built without the feature `buckets`"
        )))
    }
}
