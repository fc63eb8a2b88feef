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

use super::{FetchError, forbidden, place, plain, unavailable, uncoded};

/// Retries are for whoever fetches to decide: jobs have a ladder, updates have mirrors.
const RETRIES: usize = 1;
const RETRY_TIMEOUT: Duration = Duration::from_secs(10);

/// An object's bytes.
pub(super) type Stream = BoxStream<'static, object_store::Result<Bytes>>;

/// An object that is read.
pub(super) struct Object {
    pub(super) from: u64,
    pub(super) tag: Option<String>,
    pub(super) bytes: Stream,
}

/// Clients, one for each bucket; as many as the configuration allows.
#[derive(Debug, Clone, Default)]
pub(super) struct Buckets(Arc<Mutex<HashMap<String, Arc<dyn ObjectStore>>>>);

impl Buckets {
    /// Opens an object at byte `from`; none where it still has the tag.
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
                // The bucket's own words may hold anything, a stranger's included.
                tracing::debug!(%error, place, "what the bucket said");
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

/// Asks as [`plain`] does, whatever else the environment says of connections.
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
    Ok(match scheme {
        "s3" => {
            let builder = AmazonS3Builder::from_env().with_url(bucket);
            Arc::new(
                builder
                    .with_retry(retry)
                    .with_http_connector(Plain)
                    .build()?,
            )
        }
        "gs" => {
            let builder = GoogleCloudStorageBuilder::from_env().with_url(bucket);
            Arc::new(
                builder
                    .with_retry(retry)
                    .with_http_connector(Plain)
                    .build()?,
            )
        }
        _ => {
            let builder = MicrosoftAzureBuilder::from_env().with_url(bucket);
            Arc::new(
                builder
                    .with_retry(retry)
                    .with_http_connector(Plain)
                    .build()?,
            )
        }
    })
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "a foreign enum: the others say nothing more to who fetches"
)]
fn kind(error: &object_store::Error) -> &'static str {
    match error {
        object_store::Error::NotFound { .. } => "not found",
        object_store::Error::PermissionDenied { .. }
        | object_store::Error::Unauthenticated { .. } => "not allowed with these credentials",
        _ => "the request failed",
    }
}
