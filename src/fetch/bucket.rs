//! Objects in buckets: `s3://`, `gs://` and `az://`. Credentials and endpoints come from the
//! environment variables that the clouds' own tools read.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::{HttpClient, HttpConnector, ReqwestConnector};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path;
use object_store::{Attribute, ClientOptions, GetOptions, GetRange, ObjectStore, RetryConfig};
use url::Url;

use super::downloader::plain;
use super::stream::uncoded;
use super::{FetchError, forbidden, place, unavailable};

/// Callers decide about retries: jobs have delay queues, updates have mirrors.
const RETRIES: usize = 1;
const RETRY_TIMEOUT: Duration = Duration::from_secs(10);

/// An object's bytes.
pub(super) type Stream = BoxStream<'static, object_store::Result<Bytes>>;

/// An opened object.
pub(super) struct Object {
    pub(super) from: u64,
    pub(super) tag: Option<String>,
    pub(super) bytes: Stream,
}

/// One client per bucket. The allowed prefixes bound their number.
#[derive(Debug, Clone, Default)]
pub(super) struct Buckets(Arc<Mutex<HashMap<String, Arc<dyn ObjectStore>>>>);

impl Buckets {
    /// Opens an object at byte `from`; `None` if it still has the tag `unless`.
    pub(super) async fn open(
        &self,
        url: &Url,
        from: u64,
        unless: Option<&str>,
    ) -> Result<Option<Object>, FetchError> {
        let place = place(url);
        let path = Path::from_url_path(url.path());
        let path = path.map_err(|e| forbidden(format!("{place}: {e}")))?;
        let options = GetOptions {
            range: (from > 0).then_some(GetRange::Offset(from)),
            if_none_match: unless.map(str::to_owned),
            ..GetOptions::default()
        };
        let got = self.store(url)?.get_opts(&path, options).await;
        let got = match got {
            Ok(got) => got,
            Err(object_store::Error::NotModified { .. }) => return Ok(None),
            Err(error) => {
                // The provider's error text may hold anything, including untrusted content.
                tracing::debug!(%error, place, "the bucket refused a request");
                return Err(unavailable(format!("{place}: {}", kind(&error))));
            }
        };
        let coding = got.attributes.get(&Attribute::ContentEncoding);
        uncoded(&place, coding.iter().map(|coding| coding.as_ref()))?;
        Ok(Some(Object {
            from: got.range.start,
            tag: got.meta.e_tag.clone(),
            bytes: got.into_stream().boxed(),
        }))
    }

    fn store(&self, url: &Url) -> Result<Arc<dyn ObjectStore>, FetchError> {
        let name = format!("{}://{}", url.scheme(), url.host_str().unwrap_or_default());
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = known.get(&name) {
            return Ok(Arc::clone(store));
        }
        let made = make(url.scheme(), &name);
        let made = made.map_err(|e| unavailable(format!("{name}: {e}")))?;
        known.insert(name, Arc::clone(&made));
        Ok(made)
    }
}

/// Connects with the headers of [`plain`], whatever the environment sets for connections.
#[derive(Debug)]
struct Plain;

impl HttpConnector for Plain {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let options = options.clone().with_default_headers(plain());
        ReqwestConnector::default().connect(&options)
    }
}

fn make(scheme: &str, bucket: &str) -> object_store::Result<Arc<dyn ObjectStore>> {
    let retry = RetryConfig {
        max_retries: RETRIES,
        retry_timeout: RETRY_TIMEOUT,
        ..RetryConfig::default()
    };
    macro_rules! build {
        ($builder:expr) => {
            Arc::new(
                $builder
                    .with_retry(retry)
                    .with_http_connector(Plain)
                    .build()?,
            )
        };
    }
    Ok(match scheme {
        "s3" => build!(AmazonS3Builder::from_env().with_url(bucket)),
        "gs" => build!(GoogleCloudStorageBuilder::from_env().with_url(bucket)),
        _ => build!(MicrosoftAzureBuilder::from_env().with_url(bucket)),
    })
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "a foreign enum: the other variants make no difference to the caller"
)]
fn kind(error: &object_store::Error) -> &'static str {
    match error {
        object_store::Error::NotFound { .. } => "not found",
        object_store::Error::PermissionDenied { .. }
        | object_store::Error::Unauthenticated { .. } => "not allowed with these credentials",
        _ => "the request failed",
    }
}
