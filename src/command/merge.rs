//! `allreel merge`: an adapter's low-rank updates folded into the weights, as a plain Hugging Face model.

use std::path::{Path, PathBuf};

use super::saved;
use crate::{
    Error, Result,
    checkpoint::files::save_model,
    config::{Adapter, Method},
    device::Placement,
};

/// Arguments of `allreel merge`.
#[derive(clap::Args)]
pub struct Args {
    /// Directory of a run with an adapter, or of a LoRA adapter that PEFT or allreel saved
    dir: PathBuf,
    /// Directory for the model; it must not exist yet
    #[arg(long)]
    out: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// `User` if there is nothing to fold or `--out` exists; as its parts.
pub fn run(args: &Args) -> Result<()> {
    let Args { dir, out } = args;
    if out.exists() {
        return Err(Error::User(format!(
            "--out: {} exists already; name a new directory",
            out.display()
        )));
    }
    let saved = saved::open(&Placement::CPU, dir, None)?;
    match &saved.classifier.training.adapter {
        Some(Adapter { method: Method::Lora(_), .. }) => {}
        Some(_) => return Err(nothing(dir, "its adapter's rows are no update of weights")),
        None => return Err(nothing(dir, "it is a whole model already")),
    }
    // Under another name until it is whole.
    let mut unfinished = out.as_os_str().to_owned();
    unfinished.push(".unfinished");
    let unfinished = PathBuf::from(unfinished);
    std::fs::create_dir_all(&unfinished).map_err(|e| Error::writing(&unfinished, e))?;
    let saved = save_model(&unfinished, &saved.classifier, &saved.tokenizer)
        .and_then(|()| std::fs::rename(&unfinished, out).map_err(|e| Error::writing(out, e)));
    if let Err(error) = saved {
        // Give the space back; the first error is the one to report.
        let _ = std::fs::remove_dir_all(&unfinished);
        return Err(error);
    }
    println!("merged model: {}", out.display());
    Ok(())
}

fn nothing(dir: &Path, why: &str) -> Error {
    Error::User(format!(
        "{}: there is nothing to merge: {why}; `allreel predict` takes it as it is",
        dir.display()
    ))
}
