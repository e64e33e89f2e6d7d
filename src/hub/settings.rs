//! What the environment says about the Hub, under the names that Python's `huggingface_hub` reads.
//!
//! | variable | meaning |
//! |---|---|
//! | `HF_HUB_CACHE`, `HF_HOME` | where models are kept: the first, or `hub/` in the second; default `$XDG_CACHE_HOME/huggingface/hub` or `~/.cache/huggingface/hub` |
//! | `HF_ENDPOINT` | the Hub's address; default `https://huggingface.co` |
//! | `HF_TOKEN`, `HF_TOKEN_PATH` | the token for gated and private models; default the file `token` in `HF_HOME`, where `hf auth login` puts it |
//! | `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE` | `1`: ask nobody, use what is there |

use std::{ffi::OsString, path::PathBuf};

use crate::{Error, Result};

/// The Hub's own address.
const ENDPOINT: &str = "https://huggingface.co";

/// Where the Hub is, where its models are kept, and who asks.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The cache: a directory with one `models--org--name` for each model.
    pub cache: PathBuf,
    /// Scheme and host, and perhaps a path, without a slash at the end.
    pub endpoint: String,
    /// The user's token.
    pub token: Option<String>,
    /// Use only what is in the cache.
    pub offline: bool,
}

impl Settings {
    /// Those of this process.
    ///
    /// # Errors
    /// `User` if there is no place for a cache or the address is none.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| std::env::var_os(name))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let path = |name| variable(name).map(PathBuf::from);
        let text = |name| variable(name).map(|value| value.to_string_lossy().trim().to_owned());
        let home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|dir| dir.join("huggingface")))
            .or_else(|| path("HOME").map(|dir| dir.join(".cache/huggingface")));
        let cache = path("HF_HUB_CACHE").or_else(|| home.as_ref().map(|home| home.join("hub")));
        let Some(cache) = cache else {
            let message = "there is no $HOME to keep models in; set HF_HOME to a directory";
            return Err(Error::User(message.into()));
        };
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into());
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(Error::User(format!(
                "HF_ENDPOINT = {endpoint} is no address; write one such as {ENDPOINT}"
            )));
        }
        let token = text("HF_TOKEN").or_else(|| {
            let file = path("HF_TOKEN_PATH").or_else(|| home.map(|home| home.join("token")))?;
            Some(std::fs::read_to_string(file).ok()?.trim().to_owned())
        });
        let offline = text("HF_HUB_OFFLINE").or_else(|| text("TRANSFORMERS_OFFLINE"));
        Ok(Self {
            cache,
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.filter(|token| !token.is_empty()),
            offline: offline.is_some_and(|value| {
                ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str())
            }),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings> {
        let variables: HashMap<&str, &str> = variables.iter().copied().collect();
        Settings::from_variables(|name| variables.get(name).map(OsString::from))
    }

    #[test]
    fn the_cache_is_where_python_has_it() -> Result<()> {
        let all = [
            ("HF_HUB_CACHE", "/c", "/c"),
            ("HF_HOME", "/h", "/h/hub"),
            ("XDG_CACHE_HOME", "/x", "/x/huggingface/hub"),
            ("HOME", "/home/u", "/home/u/.cache/huggingface/hub"),
        ];
        for first in 0..all.len() {
            let set: Vec<_> = all[first..].iter().map(|(name, value, _)| (*name, *value)).collect();
            assert_eq!(settings(&set)?.cache, PathBuf::from(all[first].2));
        }
        let error = settings(&[("HF_HOME", "")]).unwrap_err();
        assert!(error.to_string().contains("set HF_HOME"), "{error}");
        Ok(())
    }

    #[test]
    fn address_and_offline_are_read_as_python_reads_them() -> Result<()> {
        let plain = settings(&[("HOME", "/nowhere")])?;
        assert_eq!((plain.endpoint.as_str(), plain.offline), (ENDPOINT, false));
        for (value, offline) in [("1", true), ("TRUE", true), ("0", false), ("", false)] {
            let read = settings(&[("HOME", "/nowhere"), ("HF_HUB_OFFLINE", value)])?;
            assert_eq!(read.offline, offline, "{value}");
        }
        let mirror = settings(&[("HOME", "/nowhere"), ("HF_ENDPOINT", "http://mirror:80/hf/")])?;
        assert_eq!(mirror.endpoint, "http://mirror:80/hf");
        let error = settings(&[("HOME", "/nowhere"), ("HF_ENDPOINT", "mirror")]).unwrap_err();
        assert!(error.to_string().contains("HF_ENDPOINT = mirror"), "{error}");
        Ok(())
    }

    #[test]
    fn the_token_is_the_variable_or_the_file() -> Result<()> {
        let home = tempfile::tempdir().expect("a directory");
        let path = home.path().to_str().expect("UTF-8");
        assert_eq!(settings(&[("HF_HOME", path)])?.token, None);
        std::fs::write(home.path().join("token"), "from-file\n").expect("written");
        assert_eq!(settings(&[("HF_HOME", path)])?.token.as_deref(), Some("from-file"));
        let both = settings(&[("HF_HOME", path), ("HF_TOKEN", "from-variable")])?;
        assert_eq!(both.token.as_deref(), Some("from-variable"));
        Ok(())
    }
}
