//! What went wrong with a model, and what to do about it.

use super::{
    files,
    http::{self, Failure},
    name::ModelId,
    settings::Settings,
};
use crate::Error;

/// The Hub, or the way to it, failed.
pub(super) fn failure(failure: Failure, id: &ModelId, settings: &Settings) -> Error {
    let endpoint = &settings.endpoint;
    match failure {
        Failure::Status { code: 404, url, name } => missing(id, &url, name.as_deref(), endpoint),
        Failure::Status { code: code @ (401 | 403), .. } => refused(id, code, settings),
        Failure::Status { url, code, .. } => Error::Device(format!(
            "cannot fetch {id}: {url} answers {code} ({}); try again later",
            http::reason(code)
        )),
        Failure::Network { url, why } => Error::Device(format!(
            "cannot fetch {id}: no answer from {url} ({why}); check the network, HF_ENDPOINT, \
             HTTPS_PROXY and SSL_CERT_FILE, then run the same again: what has arrived is kept. On a \
             machine without a network, copy the cache of one that has fetched it and set \
             HF_HUB_OFFLINE=1"
        )),
        Failure::Local(error) => error,
    }
}

fn refused(id: &ModelId, code: u16, settings: &Settings) -> Error {
    let Settings { endpoint, token, .. } = settings;
    let repo = &id.repo;
    Error::User(match token {
        None => format!(
            "{endpoint} does not give {repo} without a token ({code}): it is gated, private, or \
             misspelt; look at {endpoint}/{repo}, accept its terms if it has some, and set HF_TOKEN \
             to a token from {endpoint}/settings/tokens"
        ),
        Some(_) => format!(
            "{endpoint} does not give {repo} to the token in HF_TOKEN ({code}): it is gated, private, \
             or misspelt, or the token is not valid; look at {endpoint}/{repo} and accept its terms \
             if it has some"
        ),
    })
}

fn missing(id: &ModelId, url: &str, name: Option<&str>, endpoint: &str) -> Error {
    let ModelId { repo, revision } = id;
    Error::User(match name {
        Some("EntryNotFound") => {
            format!("{repo} has no file {url}, though it lists it; try again later")
        }
        Some("RevisionNotFound") => format!(
            "{repo} has no revision {revision:?}; see {endpoint}/{repo}/tree/main for those there are"
        ),
        _ => format!(
            "{repo} is neither a directory here nor a model on {endpoint} (404 for {revision:?}); \
             check the path, or look for the model's name at {endpoint}/models"
        ),
    })
}

/// It may not be fetched, and is not in the cache.
pub(super) fn absent(id: &ModelId, lacks: &str, settings: &Settings) -> Error {
    let why = match settings.offline {
        true => "HF_HUB_OFFLINE is set, so it is not fetched",
        false => "it was not fetched",
    };
    Error::User(format!(
        "{id} is no directory here, and as a model of the Hub: {lacks}, and {why}; check the path, \
         or run `allreel fetch {id}` where there is a network"
    ))
}

/// It is not a model with weights that are read here.
pub(super) fn no_model(id: &ModelId, listed: &[String], settings: &Settings) -> Error {
    const SHOWN: usize = 6;
    let mut shown: Vec<&str> = listed.iter().take(SHOWN).map(String::as_str).collect();
    if listed.len() > SHOWN {
        shown.push("...");
    }
    Error::User(format!(
        "{id} on {} lacks {} or weights ({}); it has {}; choose a model with both",
        settings.endpoint,
        files::CONFIG,
        files::WEIGHTS.join(", "),
        if shown.is_empty() { "no files".to_owned() } else { shown.join(", ") }
    ))
}
