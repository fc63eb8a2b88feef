//! The signature of a manifest: detached, Ed25519, over its exact bytes.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::signature::{
    ED25519, ED25519_PUBLIC_KEY_LEN, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey,
};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject as _;

/// The key that manifests must be signed with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdateKey([u8; ED25519_PUBLIC_KEY_LEN]);

impl UpdateKey {
    /// Reads a public key: its 32 bytes as base64.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, String> {
        let bytes = BASE64.decode(text.trim()).map_err(|e| e.to_string())?;
        match bytes.try_into() {
            Ok(key) => Ok(Self(key)),
            Err(bytes) => Err(format!(
                "{} bytes, an Ed25519 public key has {ED25519_PUBLIC_KEY_LEN}",
                bytes.len()
            )),
        }
    }

    /// Checks a detached signature, base64 text, of these exact bytes.
    ///
    /// # Errors
    /// Why nobody vouches for them.
    pub fn verify(&self, message: &[u8], signature: &[u8]) -> Result<(), String> {
        let signature = BASE64
            .decode(signature.trim_ascii())
            .map_err(|e| format!("the signature is not base64: {e}"))?;
        UnparsedPublicKey::new(&ED25519, self.0)
            .verify(message, &signature)
            .map_err(|_| "the signature is not that of model.update_key".to_owned())
    }
}

/// The key that signs manifests.
#[derive(Debug)]
pub struct SigningKey(Ed25519KeyPair);

impl SigningKey {
    /// Reads a private key as `openssl genpkey -algorithm ed25519` writes it: PKCS#8, PEM.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(pem: &[u8]) -> Result<Self, String> {
        const WANTED: &str =
            "no Ed25519 key as PKCS#8 in PEM, which `openssl genpkey -algorithm ed25519` writes";
        let key = PrivatePkcs8KeyDer::from_pem_slice(pem).map_err(|e| format!("{WANTED}: {e}"))?;
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(key.secret_pkcs8_der());
        pair.map(Self).map_err(|e| format!("{WANTED}: {e}"))
    }

    /// A detached signature of these bytes, base64 text.
    pub fn sign(&self, message: &[u8]) -> String {
        BASE64.encode(self.0.sign(message))
    }

    /// What `model.update_key` must be.
    pub fn public(&self) -> String {
        BASE64.encode(self.0.public_key())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring::signature::{Ed25519KeyPair, KeyPair};

    #[test]
    fn only_the_holder_of_the_key_vouches_and_only_for_these_bytes() {
        let pair = |seed: u8| Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap();
        let signed = |seed, message: &[u8]| BASE64.encode(pair(seed).sign(message).as_ref());
        let key = UpdateKey::parse(&BASE64.encode(pair(1).public_key().as_ref())).unwrap();
        let line = format!("{}\n", signed(1, b"manifest"));
        assert_eq!(key.verify(b"manifest", line.as_bytes()), Ok(()));
        for (message, signature) in [
            (&b"manifesto"[..], signed(1, b"manifest")),
            (b"manifest", signed(2, b"manifest")),
            (b"manifest", BASE64.encode([0; 64])),
            (b"manifest", "not base64!".into()),
            (b"manifest", String::new()),
        ] {
            assert!(
                key.verify(message, signature.as_bytes()).is_err(),
                "{signature}"
            );
        }
    }

    #[test]
    fn a_key_has_32_bytes() {
        assert!(
            UpdateKey::parse("c2hvcnQ=")
                .unwrap_err()
                .contains("5 bytes")
        );
        assert!(UpdateKey::parse("???").is_err());
    }
}
