//! Requests: redirects followed by hand, so that the token goes to nobody but the Hub.
//!
//! TLS is rustls with Mozilla's roots, or those in the file that `SSL_CERT_FILE` names; proxies
//! are those of `HTTPS_PROXY` and its kin.

use std::{io::Read, path::Path, sync::Arc, thread, time::Duration};

use ureq::{
    Agent, Body,
    http::{HeaderMap, Response, StatusCode, header},
    tls::{PemItem, RootCerts, TlsConfig, parse_pem},
};

use crate::{Error, Result};

/// More redirects than this are a loop.
const REDIRECTS: usize = 10;
/// How long to wait before asking again for something short.
const PAUSES: [Duration; 2] = [Duration::from_millis(250), Duration::from_millis(1000)];
/// A server that says nothing for so long is gone.
const SILENCE: Duration = Duration::from_secs(60);

/// Why nothing, or not everything, came back.
#[derive(Debug)]
pub enum Failure {
    /// The server answered with an error.
    Status {
        /// What was asked for.
        url: String,
        /// HTTP's code.
        code: u16,
        /// The Hub's own name for the error (`X-Error-Code`).
        name: Option<String>,
    },
    /// There was no answer, or it broke off.
    Network {
        /// What was asked for.
        url: String,
        /// What happened.
        why: String,
    },
    /// It is not the server's fault.
    Local(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Local(error)
    }
}

impl Failure {
    pub(super) fn network(url: &str, why: impl ToString) -> Self {
        Self::Network { url: url.to_owned(), why: why.to_string() }
    }

    /// Whether asking again may help.
    pub(super) fn passes(&self) -> bool {
        match self {
            Self::Status { code, .. } => passing(*code),
            Self::Network { .. } => true,
            Self::Local(_) => false,
        }
    }

    /// As an error of the command, where nothing more is known about what was asked for.
    pub fn into_error(self) -> Error {
        match self {
            Self::Status { url, code, .. } => {
                Error::User(format!("{url} answers {code} ({}); check the address", reason(code)))
            }
            Self::Network { url, why } => Error::Device(format!(
                "cannot fetch {url}: {why}; check the network, then run the same again: what has \
                 arrived is kept"
            )),
            Self::Local(error) => error,
        }
    }
}

/// Whether a server that answers `code` may answer otherwise later.
pub(super) fn passing(code: u16) -> bool {
    matches!(code, 408 | 429 | 500..)
}

/// HTTP's words for a status code.
pub(super) fn reason(code: u16) -> &'static str {
    let status = StatusCode::from_u16(code).ok();
    status.and_then(|status| status.canonical_reason()).unwrap_or("unknown")
}

/// A client.
pub struct Http {
    agent: Agent,
    /// The token, and the only scheme, host and port that are told it.
    token: Option<(String, String)>,
}

/// What the Hub says about a file before sending it.
#[derive(Debug)]
pub struct Head {
    /// What names the content: for large files its SHA-256, for others git's hash of it.
    pub etag: Option<String>,
    /// Bytes.
    pub size: Option<u64>,
}

impl Http {
    /// A client that shows `token` to the server of `endpoint` only.
    ///
    /// # Errors
    /// `Data` if `SSL_CERT_FILE` names no file of certificates.
    pub fn new(endpoint: &str, token: Option<&str>) -> Result<Self> {
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(SILENCE))
            .timeout_connect(Some(SILENCE / 2))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .user_agent(concat!("allreel/", env!("CARGO_PKG_VERSION")))
            // Lengths, ranges and checksums are of the file itself.
            .accept_encoding("identity");
        if let Some(path) = std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty()) {
            let roots = RootCerts::Specific(Arc::new(certificates(Path::new(&path))?));
            config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
        let token = token.map(|token| (token.to_owned(), origin(endpoint).to_owned()));
        Ok(Self { agent: config.build().into(), token })
    }

    /// One request, without following where it leads.
    fn once(&self, head: bool, url: &str, from: u64) -> Result<Response<Body>, Failure> {
        let mut request = if head { self.agent.head(url) } else { self.agent.get(url) };
        if let Some((token, home)) = &self.token
            && origin(url) == home
        {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        request.call().map_err(|e| Failure::network(url, e))
    }

    /// The file at `url` from byte `from` on, wherever redirects lead.
    ///
    /// # Errors
    /// `Status` for anything but 200, 206 and 416 (nothing lies beyond `from`).
    pub(super) fn get(&self, url: &str, from: u64) -> Result<Response<Body>, Failure> {
        let mut at = url.to_owned();
        for _ in 0..REDIRECTS {
            let response = self.once(false, &at, from)?;
            match target(&at, &response) {
                Some(next) => at = next,
                None if matches!(response.status().as_u16(), 200 | 206 | 416) => {
                    return Ok(response);
                }
                None => return Err(refused(url, &response)),
            }
        }
        Err(Failure::network(url, "it redirects in a circle"))
    }

    /// A short text.
    ///
    /// # Errors
    /// As its parts.
    pub(super) fn text(&self, url: &str) -> Result<String, Failure> {
        patiently(|| self.text_once(url))
    }

    fn text_once(&self, url: &str) -> Result<String, Failure> {
        let mut text = String::new();
        let response = self.get(url, 0)?;
        let mut body = response.into_body().into_reader();
        body.read_to_string(&mut text).map_err(|e| Failure::network(url, e))?;
        Ok(text)
    }

    /// What the Hub says about the file at `url`. Redirects within its server (a renamed model) are
    /// followed; one to another server is the store of large files, which knows less.
    ///
    /// # Errors
    /// `Status` if there is no such file.
    pub(super) fn head(&self, url: &str) -> Result<Head, Failure> {
        patiently(|| self.head_once(url))
    }

    fn head_once(&self, url: &str) -> Result<Head, Failure> {
        let mut at = url.to_owned();
        let (mut etag, mut size) = (None, None);
        for _ in 0..REDIRECTS {
            let response = self.once(true, &at, 0)?;
            let headers = response.headers();
            etag = etag.or_else(|| value(headers, "x-linked-etag"));
            size = size.or_else(|| value(headers, "x-linked-size"));
            let next = target(&at, &response);
            let status = response.status();
            if next.is_none() && !status.is_success() {
                return Err(refused(url, &response));
            }
            if status.is_success() {
                size = size.or_else(|| value(headers, header::CONTENT_LENGTH.as_str()));
            }
            match next {
                Some(next) if origin(&next) == origin(&at) => at = next,
                _ => {
                    let etag = etag.or_else(|| value(headers, header::ETAG.as_str()));
                    return Ok(Head {
                        etag: etag.map(|etag| bare(&etag)),
                        size: size.and_then(|size| size.parse().ok()),
                    });
                }
            }
        }
        Err(Failure::network(url, "it redirects in a circle"))
    }
}

/// Asks again after failures that pass.
fn patiently<T>(ask: impl Fn() -> Result<T, Failure>) -> Result<T, Failure> {
    for pause in PAUSES {
        match ask() {
            Err(failure) if failure.passes() => thread::sleep(pause),
            answer => return answer,
        }
    }
    ask()
}

/// The certificates in a PEM file.
fn certificates(path: &Path) -> Result<Vec<ureq::tls::Certificate<'static>>> {
    let pem = std::fs::read(path).map_err(|e| Error::reading(path, e))?;
    let all: Vec<_> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if all.is_empty() {
        let message = "holds no certificate; SSL_CERT_FILE must name a PEM file with some";
        return Err(Error::Data(format!("{} {message}", path.display())));
    }
    Ok(all)
}

/// A header as text.
fn value(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

fn refused(url: &str, response: &Response<Body>) -> Failure {
    Failure::Status {
        url: url.to_owned(),
        code: response.status().as_u16(),
        name: value(response.headers(), "x-error-code"),
    }
}

/// Where a redirect leads.
fn target(from: &str, response: &Response<Body>) -> Option<String> {
    let redirects = matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308);
    let location = value(response.headers(), header::LOCATION.as_str()).filter(|_| redirects)?;
    Some(join(from, &location))
}

/// `location` as seen from the page `from`.
fn join(from: &str, location: &str) -> String {
    let origin = origin(from);
    if location.starts_with("http://") || location.starts_with("https://") {
        return location.to_owned();
    }
    if location.starts_with("//") {
        let scheme = origin.split("//").next().unwrap_or_default();
        return format!("{scheme}{location}");
    }
    if location.starts_with('/') {
        return format!("{origin}{location}");
    }
    let path = from.split(['?', '#']).next().unwrap_or(from);
    let folder = path.rfind('/').filter(|at| *at >= origin.len()).map_or(path, |at| &path[..at]);
    format!("{folder}/{location}")
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |at| host + at);
    &url[..end]
}

/// An ETag without quotes and the mark of a weak one.
fn bare(etag: &str) -> String {
    etag.trim_start_matches("W/").trim_matches('"').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_joined_as_browsers_do() {
        let from = "https://hub.co:8/a/b/c?x=/y";
        for (location, want) in [
            ("https://cdn.co/x", "https://cdn.co/x"),
            ("//cdn.co/x", "https://cdn.co/x"),
            ("/x?u=http://y", "https://hub.co:8/x?u=http://y"),
            ("x", "https://hub.co:8/a/b/x"),
        ] {
            assert_eq!(join(from, location), want);
        }
        assert_eq!(join("http://hub.co", "x"), "http://hub.co/x");
    }

    #[test]
    fn another_port_or_scheme_is_another_origin() {
        assert_eq!(origin("https://hub.co:8/a"), "https://hub.co:8");
        assert_eq!(origin("https://hub.co?x"), "https://hub.co");
        assert_ne!(origin("https://hub.co/a"), origin("http://hub.co/a"));
        assert_ne!(origin("https://hub.co/a"), origin("https://hub.co.evil.org/a"));
        assert_ne!(origin("https://hub.co/a"), origin("https://hub.co@evil.org/a"));
    }

    #[test]
    fn etags_lose_their_quotes() {
        assert_eq!(bare("\"abc\""), "abc");
        assert_eq!(bare("W/\"abc\""), "abc");
    }
}
