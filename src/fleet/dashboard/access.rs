//! Who may see the page. On the loopback address: this machine, under its own name. Elsewhere: whoever
//! has the token, which the address that is printed at the start carries.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Redirect, Response};
use sha2::{Digest, Sha256};

const COOKIE: &str = "scorer_token";
/// Nothing but what this server sends is loaded, and nobody frames it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

/// Who is let in.
#[derive(Debug)]
pub enum Door {
    /// Whoever asks for this machine by its own name: a page of somebody else's that has its name
    /// point here does not.
    Loopback,
    /// Whoever has the token.
    Token(String),
}

impl Door {
    fn opens(&self, headers: &HeaderMap, query: Option<&str>) -> Opened {
        let Self::Token(token) = self else {
            return match is_local(headers) {
                true => Opened::Yes,
                false => {
                    Opened::No("ask for this page as localhost, or give --listen another address")
                }
            };
        };
        let given = query.and_then(|query| query.strip_prefix("token="));
        if given.is_some_and(|given| same(given, token)) {
            return Opened::WithNewCookie(token.clone());
        }
        let known = cookie(headers).or_else(|| bearer(headers));
        match known.is_some_and(|known| same(known, token)) {
            true => Opened::Yes,
            false => {
                Opened::No("open the address that scorer dashboard has printed, with its token")
            }
        }
    }
}

enum Opened {
    Yes,
    WithNewCookie(String),
    No(&'static str),
}

/// Stands before every route.
pub(super) async fn guard(State(door): State<Arc<Door>>, request: Request, next: Next) -> Response {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return (StatusCode::METHOD_NOT_ALLOWED, "this page is only read\n").into_response();
    }
    let mut response = match door.opens(request.headers(), request.uri().query()) {
        Opened::Yes => next.run(request).await,
        Opened::WithNewCookie(token) => {
            let cookie = format!("{COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/");
            ([(header::SET_COOKIE, cookie)], Redirect::to("/")).into_response()
        }
        Opened::No(why) => (StatusCode::FORBIDDEN, format!("{why}\n")).into_response(),
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

fn is_local(headers: &HeaderMap) -> bool {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    let name = host.map(|host| match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        Some(_) | None => host,
    });
    matches!(name, Some("localhost" | "127.0.0.1" | "[::1]"))
}

fn cookie(headers: &HeaderMap) -> Option<&str> {
    let cookies = headers.get(header::COOKIE)?.to_str().ok()?;
    let mut cookies = cookies
        .split(';')
        .filter_map(|cookie| cookie.trim().split_once('='));
    cookies
        .find(|(name, _)| *name == COOKIE)
        .map(|(_, value)| value)
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers
        .get(header::AUTHORIZATION)?
        .to_str()
        .ok()?
        .strip_prefix("Bearer ")
}

/// Compares digests, so that the time it takes tells nothing of the token.
fn same(given: &str, token: &str) -> bool {
    Sha256::digest(given) == Sha256::digest(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(
        door: &Door,
        headers: &[(header::HeaderName, &'static str)],
        query: Option<&str>,
    ) -> bool {
        let headers = headers.iter();
        let headers = headers.map(|(name, value)| (name.clone(), HeaderValue::from_static(value)));
        match door.opens(&headers.collect(), query) {
            Opened::Yes | Opened::WithNewCookie(_) => true,
            Opened::No(_) => false,
        }
    }

    #[test]
    fn on_the_loopback_address_only_its_own_names_are_answered() {
        for host in [
            "localhost:8088",
            "127.0.0.1:8088",
            "[::1]:8088",
            "localhost",
        ] {
            assert!(
                opened(&Door::Loopback, &[(header::HOST, host)], None),
                "{host}"
            );
        }
        for host in [
            "evil.example:8088",
            "localhost.evil.example",
            "127.0.0.1.evil.example:80",
            "",
        ] {
            assert!(
                !opened(&Door::Loopback, &[(header::HOST, host)], None),
                "{host}"
            );
        }
        assert!(!opened(&Door::Loopback, &[], None));
    }

    #[test]
    fn elsewhere_the_token_is_asked_for() {
        let door = Door::Token("secret".into());
        assert!(opened(&door, &[], Some("token=secret")));
        assert!(opened(
            &door,
            &[(header::COOKIE, "a=b; scorer_token=secret")],
            None
        ));
        assert!(opened(
            &door,
            &[(header::AUTHORIZATION, "Bearer secret")],
            None
        ));
        for wrong in ["", "secre", "secret2"] {
            assert!(
                !opened(&door, &[], Some(&format!("token={wrong}"))),
                "{wrong}"
            );
        }
        assert!(!opened(&door, &[(header::HOST, "localhost")], None));
    }
}
