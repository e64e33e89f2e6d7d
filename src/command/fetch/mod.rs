//! `allreel fetch`: models of the Hugging Face Hub, or the IMDB reviews, for later without a network.

mod imdb;

use std::path::{Path, PathBuf};

use crate::{
    Error, Result,
    hub::{Hub, ModelId},
};

/// Arguments of `allreel fetch`.
#[derive(clap::Args)]
pub struct Args {
    /// Models of the Hub (org/name or org/name@revision), or imdb for the reviews
    #[arg(required = true, value_name = "MODEL|imdb")]
    what: Vec<String>,
    /// Branch, tag or commit of the model [default: main]
    #[arg(long)]
    revision: Option<String>,
    /// Put the files there [default: the Hub's cache ($HF_HOME); data/aclImdb for imdb]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// imdb: another address of the archive [default: $ALLREEL_IMDB_URL, or Stanford's]
    #[arg(long)]
    url: Option<String>,
    /// imdb: the MD5 of an archive other than Stanford's
    #[arg(long, value_name = "HEX", requires = "url")]
    md5: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// As its parts.
pub fn run(args: &Args) -> Result<()> {
    let imdb = args.what.iter().any(|what| what == "imdb");
    if args.what.len() > 1 && (imdb || args.out.is_some() || args.revision.is_some()) {
        return Err(Error::User(
            "imdb, --out and --revision are for one thing at a time; run fetch once for each"
                .into(),
        ));
    }
    if imdb {
        if args.revision.is_some() {
            return Err(Error::User("--revision is of a model; imdb has none".into()));
        }
        return imdb::run(args.out.as_deref(), args.url.as_deref(), args.md5.as_deref());
    }
    if args.url.is_some() {
        return Err(Error::User(
            "--url is for imdb; another address for models is HF_ENDPOINT".into(),
        ));
    }
    let hub = Hub::from_env()?;
    for what in &args.what {
        model(&hub, &parse(what, args.revision.as_deref())?, args.out.as_deref())?;
    }
    Ok(())
}

fn parse(what: &str, revision: Option<&str>) -> Result<ModelId> {
    let id = ModelId::parse(what).ok_or_else(|| {
        Error::User(format!(
            "{what} is no name of a model on the Hub; write org/name or org/name@revision, or imdb"
        ))
    })?;
    match revision {
        None => Ok(id),
        Some(revision) => id.at(revision).ok_or_else(|| {
            Error::User(format!("--revision {revision} is no branch, tag or commit"))
        }),
    }
}

/// Fetches a model, and shows the setting that uses it.
fn model(hub: &Hub, id: &ModelId, out: Option<&Path>) -> Result<()> {
    let fetched = match out {
        Some(dir) => hub.fetch_to(id, dir)?,
        None => hub.fetch(id)?,
    };
    let dir = fetched.dir.display();
    match fetched.new {
        0 => println!("{id} is there already: {dir}"),
        1 => println!("{id}: fetched 1 file into {dir}"),
        new => println!("{id}: fetched {new} files into {dir}"),
    }
    let path = out.map_or_else(|| id.to_string(), |dir| dir.display().to_string());
    println!("\n[model]\npath = {path:?}");
    Ok(())
}
