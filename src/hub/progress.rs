//! How far a download is: a bar on a terminal, else a plain line at its start and now and then.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};

/// How far apart plain lines are.
const EVERY: Duration = Duration::from_secs(10);

/// The progress of one file.
pub(super) struct Meter {
    name: String,
    total: Option<u64>,
    shown: Instant,
    bar: Option<ProgressBar>,
}

impl Meter {
    /// A file of `total` bytes, as far as the server says how many.
    pub(super) fn new(name: &str, total: Option<u64>) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| bar(name, total));
        if bar.is_none() {
            let size = total.map_or(String::new(), |total| format!(" ({})", BinaryBytes(total)));
            eprintln!("fetching {name}{size}");
        }
        Self { name: name.to_owned(), total, shown: Instant::now(), bar }
    }

    /// Shows that `done` bytes are there.
    pub(super) fn at(&mut self, done: u64) {
        match (&self.bar, self.total) {
            (Some(bar), _) => bar.set_position(done),
            (None, Some(total)) if self.shown.elapsed() >= EVERY => {
                let percent = 100 * done / total.max(1);
                let (done, total) = (BinaryBytes(done), BinaryBytes(total));
                eprintln!("fetching {}: {percent}% ({done} of {total})", self.name);
                self.shown = Instant::now();
            }
            _ => {}
        }
    }

    /// Shows a line of its own, above the bar if there is one.
    pub(super) fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

fn bar(name: &str, total: Option<u64>) -> ProgressBar {
    let template =
        "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(template);
    let bar = total.map_or_else(ProgressBar::no_length, ProgressBar::new);
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message(name.to_owned())
}
