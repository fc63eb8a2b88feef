//! `[amqp.tls]` and `[redis.tls]`: CA and client certificate, in PEM files.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Installs the crypto provider for TLS clients that leave the choice to the program.
pub fn install_provider() {
    // Fails only when a provider is installed already, which is as good.
    let _installed_before = rustls::crypto::ring::default_provider().install_default();
}

/// PEM files of a TLS connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct TlsConfig {
    /// CA certificate: for RabbitMQ trusted in addition to the system's CAs, for Redis instead of them.
    pub ca: Option<PathBuf>,
    /// Client certificate, with the chain to its CA.
    pub cert: Option<PathBuf>,
    /// Its private key, without a password.
    pub key: Option<PathBuf>,
}

/// The contents of the files that are set.
#[derive(Clone, PartialEq, Eq)]
pub struct Pem {
    /// Certificate authority.
    pub ca: Option<String>,
    /// Client certificate and its private key.
    pub identity: Option<(String, String)>,
}

impl TlsConfig {
    /// Reads the files. A renewed certificate is used by the next connection to RabbitMQ; connections to
    /// Redis keep the certificate they started with.
    ///
    /// # Errors
    /// The key of the configuration without its section, and what is wrong with its file.
    pub fn read(&self) -> Result<Pem, (&'static str, String)> {
        let identity = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Some((
                pem("cert", cert, "CERTIFICATE-----")?,
                pem("key", key, "PRIVATE KEY-----")?,
            )),
            (None, None) => None,
            (Some(_), None) => {
                return Err(("key", "missing: tls.cert needs its private key".into()));
            }
            (None, Some(_)) => {
                return Err(("cert", "missing: tls.key needs its certificate".into()));
            }
        };
        let ca = self.ca.as_deref();
        Ok(Pem {
            ca: ca.map(|ca| pem("ca", ca, "CERTIFICATE-----")).transpose()?,
            identity,
        })
    }

    /// Whether any file is named.
    pub(super) fn is_set(&self) -> bool {
        *self != Self::default()
    }
}

fn pem(key: &'static str, path: &Path, mark: &str) -> Result<String, (&'static str, String)> {
    let place = path.display();
    let text = std::fs::read_to_string(path).map_err(|e| (key, format!("{place}: {e}")))?;
    match text.contains(mark) {
        true => Ok(text),
        false => Err((
            key,
            format!("{place}: not PEM, it does not contain \"{mark}\""),
        )),
    }
}
