//! URLs of the configuration. No part is ignored: what would have no effect is refused.

use std::collections::BTreeMap;

use url::Url;

/// The URL of a service.
#[derive(Debug)]
pub(crate) struct ServiceUrl {
    pub(crate) url: Url,
    /// Percent-decoded.
    pub(crate) query: BTreeMap<String, String>,
}

impl ServiceUrl {
    /// Parses a URL with one of these schemes, and with each of these query keys at most once.
    ///
    /// # Errors
    /// What is wrong, never quoting what may be a password.
    pub(crate) fn parse(text: &str, schemes: &[&str], keys: &[&str]) -> Result<Self, String> {
        let url = Url::parse(text).map_err(|e| format!("is no URL: {e}"))?;
        if !schemes.contains(&url.scheme()) || url.cannot_be_a_base() {
            let forms: Vec<_> = schemes.iter().map(|s| format!("{s}://")).collect();
            return Err(format!(
                "must be a URL that begins with {}",
                forms.join(" or ")
            ));
        }
        if url.fragment().is_some() {
            return Err(
                "everything after # would be ignored; write %23 for a # in the password".into(),
            );
        }
        let mut query = BTreeMap::new();
        for (key, value) in url.query_pairs() {
            if !keys.contains(&key.as_ref()) {
                let keys = keys.join(", ");
                return Err(format!(
                    "the query key {key:?} is not honoured, only {keys}"
                ));
            }
            if query.insert(key.to_string(), value.into_owned()).is_some() {
                return Err(format!("the query key {key:?} is given twice"));
            }
        }
        Ok(Self { url, query })
    }
}

/// Checks the URL of a manifest.
///
/// # Errors
/// What is wrong with it.
pub(super) fn check_manifest(text: &str) -> Result<(), String> {
    let url = Url::parse(text).map_err(|e| format!("is no URL: {e}"))?;
    check_place(&url)?;
    match (url.scheme(), url.query()) {
        ("http" | "https", _) | (_, None) => Ok(()),
        (scheme, Some(_)) => Err(format!("the query of a {scheme}:// URL would be ignored")),
    }
}

/// Checks a URL prefix of the allow-list.
///
/// # Errors
/// What is wrong with it.
pub(super) fn check_prefix(text: &str) -> Result<(), String> {
    let url = Url::parse(text).map_err(|e| format!("is no URL prefix: {e}"))?;
    check_place(&url)?;
    if url.query().is_some() {
        return Err("the query of a prefix would be ignored".into());
    }
    let wildcard = |part: &str| part == "*" || part == "**";
    let mut segments = url.path_segments().into_iter().flatten();
    if url.host_str().is_some_and(|host| host.contains('*')) || segments.any(wildcard) {
        return Err("* has no meaning: a prefix covers everything below it".into());
    }
    Ok(())
}

/// Checks that hold for every URL that is fetched.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check_place(url: &Url) -> Result<(), String> {
    let bucket = match url.scheme() {
        "http" | "https" | "file" => false,
        "s3" | "gs" | "az" => true,
        _ => return Err("must be an http://, https://, s3://, gs://, az:// or file:// URL".into()),
    };
    if !url.username().is_empty() || url.password().is_some() {
        return Err("user information is not allowed".into());
    }
    if url.fragment().is_some() {
        return Err("everything after # would be ignored".into());
    }
    if has_tricks(url) {
        return Err("encoded dots, slashes and zero bytes are not allowed".into());
    }
    match url.host_str() {
        Some(_) if url.scheme() == "file" => Err("a file:// URL has no host: file:///path".into()),
        None | Some("") if bucket => Err("names no bucket".into()),
        Some(_) if bucket && url.port().is_some() => {
            Err("the port of a bucket would be ignored".into())
        }
        Some(_) | None => Ok(()),
    }
}

/// Whether a server may read the path as another one.
pub(crate) fn has_tricks(url: &Url) -> bool {
    let path = url.path().to_ascii_lowercase();
    let tricks = ["%2e", "%2f", "%5c", "%00", "\\"];
    tricks.iter().any(|trick| path.contains(trick))
}

/// The URLs of a service with their passwords hidden.
pub fn redact_all(urls: &[String]) -> String {
    let shown: Vec<String> = urls.iter().map(|url| redact(url)).collect();
    shown.join(", ")
}

/// The URL with its password hidden, wherever it is.
pub fn redact(text: &str) -> String {
    const HIDDEN: &str = "hidden";
    let secret = |key: &str| ["pass", "password", "sentinel_password"].contains(&key);
    let Ok(mut url) = Url::parse(text) else {
        return HIDDEN.into();
    };
    if url.password().is_some() && url.set_password(Some(HIDDEN)).is_err() {
        return HIDDEN.into();
    }
    if url.query_pairs().any(|(key, _)| secret(&key)) {
        let query = url.query_pairs().into_owned();
        let query: Vec<_> = query
            .map(|(key, value)| match secret(&key) {
                true => (key, HIDDEN.to_owned()),
                false => (key, value),
            })
            .collect();
        url.query_pairs_mut().clear().extend_pairs(query);
    }
    url.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_hidden_wherever_it_stands() {
        for (url, shown) in [
            ("amqp://u:hunter2@h/%2f", "amqp://u:hidden@h/%2f"),
            ("redis://:hunter2@h:1/0", "redis://:hidden@h:1/0"),
            (
                "unix:///run/r.sock?db=1&pass=hunter2",
                "unix:///run/r.sock?db=1&pass=hidden",
            ),
            ("redis://h/0?db=1", "redis://h/0?db=1"),
            (
                "redis://h?sentinel_password=hunter2",
                "redis://h?sentinel_password=hidden",
            ),
            ("amqp://u:hunter2", "hidden"),
        ] {
            assert_eq!(redact(url), shown);
        }
    }

    #[test]
    fn what_a_place_would_ignore_is_refused() {
        for fit in [
            "https://h/m.json?token=x",
            "http://h:8080",
            "s3://bucket/a/b",
            "gs://bucket",
            "file:///srv/a b",
            "file:/srv",
        ] {
            assert_eq!(check_manifest(fit), Ok(()), "{fit}");
        }
        for unfit in [
            "/srv/manifest.json",
            "h:8080/m.json",
            "ftp://h/m.json",
            "https://u:p@h/m.json",
            "https://u@h/m.json",
            "https://h/m.json#v1",
            "https://h/a%2fb",
            "file://srv/m.json",
            "file:///m.json?x",
            "s3://bucket:9000/m.json",
            "s3:///m.json",
            "s3://bucket/m.json?versionId=1",
            "az://key:secret@bucket/m.json",
        ] {
            assert!(check_manifest(unfit).is_err(), "{unfit}");
        }
    }

    #[test]
    fn a_prefix_covers_what_lies_below_it_and_is_no_pattern() {
        for fit in [
            "https://h/c/",
            "https://h",
            "file:///",
            "s3://bucket/",
            "http://[::1]:80/",
        ] {
            assert_eq!(check_prefix(fit), Ok(()), "{fit}");
        }
        for unfit in [
            "https://h/c?x",
            "https://*.h/",
            "https://h/*",
            "file:///srv/**",
            "h/c",
            "https://h/#x",
        ] {
            assert!(check_prefix(unfit).is_err(), "{unfit}");
        }
    }
}
