//! Who may see the page. On the loopback address: this machine, under its own name. Elsewhere: whoever
//! has the token, which is part of the address printed at the start.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Redirect, Response};
use sha2::{Digest, Sha256};

const COOKIE: &str = "scorer_token";
/// The page loads nothing from elsewhere, and cannot be framed.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

/// Who may see the page.
#[derive(Debug)]
pub enum Access {
    /// Requests that name this machine: a foreign page whose own name resolves to this machine
    /// (DNS rebinding) is refused.
    Loopback,
    /// Whoever has the token.
    Token(String),
}

impl Access {
    fn check(&self, headers: &HeaderMap, query: Option<&str>) -> Decision {
        let Self::Token(token) = self else {
            return match is_local(headers) {
                true => Decision::Yes,
                false => {
                    Decision::No("open this page as localhost, or pass another address to --listen")
                }
            };
        };
        let given = query.and_then(|query| query.strip_prefix("token="));
        if given.is_some_and(|given| same(given, token)) {
            return Decision::WithNewCookie(token.clone());
        }
        let known = cookie(headers).or_else(|| bearer(headers));
        match known.is_some_and(|known| same(known, token)) {
            true => Decision::Yes,
            false => {
                Decision::No("open the address that scorer dashboard printed, including its token")
            }
        }
    }
}

enum Decision {
    Yes,
    WithNewCookie(String),
    No(&'static str),
}

/// Middleware of every route.
pub(super) async fn guard(
    State(access): State<Arc<Access>>,
    request: Request,
    next: Next,
) -> Response {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return (StatusCode::METHOD_NOT_ALLOWED, "this page is read-only\n").into_response();
    }
    let mut response = match access.check(request.headers(), request.uri().query()) {
        Decision::Yes => next.run(request).await,
        Decision::WithNewCookie(token) => {
            let cookie = format!("{COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/");
            ([(header::SET_COOKIE, cookie)], Redirect::to("/")).into_response()
        }
        Decision::No(why) => (StatusCode::FORBIDDEN, format!("{why}\n")).into_response(),
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
        access: &Access,
        headers: &[(header::HeaderName, &'static str)],
        query: Option<&str>,
    ) -> bool {
        let headers = headers.iter();
        let headers = headers.map(|(name, value)| (name.clone(), HeaderValue::from_static(value)));
        match access.check(&headers.collect(), query) {
            Decision::Yes | Decision::WithNewCookie(_) => true,
            Decision::No(_) => false,
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
                opened(&Access::Loopback, &[(header::HOST, host)], None),
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
                !opened(&Access::Loopback, &[(header::HOST, host)], None),
                "{host}"
            );
        }
        assert!(!opened(&Access::Loopback, &[], None));
    }

    #[test]
    fn elsewhere_the_token_is_asked_for() {
        let access = Access::Token("secret".into());
        assert!(opened(&access, &[], Some("token=secret")));
        assert!(opened(
            &access,
            &[(header::COOKIE, "a=b; scorer_token=secret")],
            None
        ));
        assert!(opened(
            &access,
            &[(header::AUTHORIZATION, "Bearer secret")],
            None
        ));
        for wrong in ["", "secre", "secret2"] {
            assert!(
                !opened(&access, &[], Some(&format!("token={wrong}"))),
                "{wrong}"
            );
        }
        assert!(!opened(&access, &[(header::HOST, "localhost")], None));
    }
}
