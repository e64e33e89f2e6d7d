//! How far training is: a bar on a terminal, else a plain line now and then; on standard error,
//! so that standard output stays free for results.
//!
//! Failing to show progress never stops a run: a closed terminal is no reason to lose an epoch.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::StepRecord;
use super::pace::{Pace, clock};

/// How far apart plain lines are: a log of a day stays readable.
const EVERY: Duration = Duration::from_secs(10);

/// The progress shown on rank 0.
pub struct Progress {
    total: usize,
    pace: Pace,
    output: Output,
}

enum Output {
    Hidden,
    Bar(ProgressBar),
    Lines(Lines),
}

struct Lines {
    sink: Box<dyn Write + Send>,
    every: Duration,
    shown: Option<Instant>,
    /// The latest line, if it has not been shown.
    latest: Option<String>,
}

impl Progress {
    /// Progress over `total` optimizer steps, of which a resumed run has `done` behind it.
    pub fn new(total: usize, done: usize) -> Self {
        if std::io::stderr().is_terminal() {
            Self::bar(total, done, ProgressDrawTarget::stderr())
        } else {
            Self::lines(total, Box::new(std::io::stderr()), EVERY)
        }
    }

    /// Progress that shows nothing: for every rank but 0.
    pub fn hidden() -> Self {
        Self { total: 0, pace: Pace::default(), output: Output::Hidden }
    }

    fn bar(total: usize, done: usize, target: ProgressDrawTarget) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total as u64), target)
            .with_position(done as u64)
            .with_style(
                ProgressStyle::with_template("{wide_bar} {msg}")
                    .unwrap_or_else(|_| ProgressStyle::default_bar()),
            );
        Self { total, pace: Pace::default(), output: Output::Bar(bar) }
    }

    fn lines(total: usize, sink: Box<dyn Write + Send>, every: Duration) -> Self {
        let lines = Lines { sink, every, shown: None, latest: None };
        Self { total, pace: Pace::default(), output: Output::Lines(lines) }
    }

    /// Shows that a step is done.
    pub fn step(&mut self, record: &StepRecord) {
        if matches!(self.output, Output::Hidden) {
            return;
        }
        self.pace.add(record.samples, record.seconds);
        let text = format!(
            "step {}/{}  epoch {}  loss {:.4}  {:.1} samples/s  {} left",
            record.step,
            self.total,
            record.epoch,
            record.loss,
            self.pace.samples_per_second(),
            clock(self.pace.seconds_for(self.total.saturating_sub(record.step))),
        );
        match &mut self.output {
            Output::Hidden => {}
            Output::Bar(bar) => {
                bar.set_position(record.step as u64);
                bar.set_message(text);
            }
            Output::Lines(lines) => lines.offer(text),
        }
    }

    /// Shows a line of its own, above the bar if there is one.
    pub fn line(&mut self, text: &str) {
        match &mut self.output {
            Output::Hidden => {}
            Output::Bar(bar) => bar.println(text),
            Output::Lines(lines) => lines.print(text),
        }
    }

    /// Shows the last step, if it has not been, and leaves it standing.
    pub fn finish(self) {
        match self.output {
            Output::Hidden => {}
            // Not `finish`: a run that stops early has not reached the end of its bar.
            Output::Bar(bar) => bar.abandon(),
            Output::Lines(mut lines) => {
                if let Some(latest) = lines.latest.take() {
                    lines.print(&latest);
                }
            }
        }
    }
}

impl Lines {
    fn offer(&mut self, text: String) {
        if self.shown.is_some_and(|shown| shown.elapsed() < self.every) {
            self.latest = Some(text);
            return;
        }
        self.print(&text);
        self.latest = None;
        self.shown = Some(Instant::now());
    }

    fn print(&mut self, text: &str) {
        // One write per line, so that lines of several processes do not mix.
        let _ = self.sink.write_all(format!("{text}\n").as_bytes());
        let _ = self.sink.flush();
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use indicatif::TermLike;

    use super::*;

    fn record(step: usize) -> StepRecord {
        StepRecord {
            step,
            epoch: 2,
            loss: 0.5,
            learning_rate: 1e-5,
            grad_norm: 1.0,
            samples: 16,
            tokens: 4000,
            seconds: 2.0,
        }
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Sink {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    #[test]
    fn plain_lines_come_now_and_then_and_at_the_end() {
        let sink = Sink::default();
        let hour = Duration::from_secs(3600);
        let mut progress = Progress::lines(100, Box::new(sink.clone()), hour);
        for step in 1..=10 {
            progress.step(&record(step));
        }
        progress.line("epoch 2: better");
        progress.finish();
        assert_eq!(
            sink.text(),
            "step 1/100  epoch 2  loss 0.5000  8.0 samples/s  00:03:18 left\n\
             epoch 2: better\n\
             step 10/100  epoch 2  loss 0.5000  8.0 samples/s  00:03:00 left\n"
        );
    }

    #[test]
    fn plain_lines_come_as_often_as_asked_and_never_twice() {
        let sink = Sink::default();
        let mut progress = Progress::lines(3, Box::new(sink.clone()), Duration::ZERO);
        for step in 1..=3 {
            progress.step(&record(step));
        }
        progress.finish();
        let text = sink.text();
        let steps: Vec<&str> = text.lines().map(|line| &line[..8]).collect();
        assert_eq!(steps, ["step 1/3", "step 2/3", "step 3/3"]);
    }

    #[test]
    fn a_closed_output_does_not_stop_anything() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
        let mut progress = Progress::lines(3, Box::new(Closed), Duration::ZERO);
        progress.step(&record(1));
        progress.line("still here");
        progress.finish();
    }

    /// Columns of a [`Screen`].
    const WIDTH: usize = 100;

    /// A terminal of which only the rows are kept. Like a real one it goes on in the next row
    /// when one is full, which is how the bar ends its lines.
    #[derive(Debug, Clone, Default)]
    struct Screen(Arc<Mutex<(Vec<String>, usize)>>);

    impl Screen {
        fn rows(&self) -> Vec<String> {
            let rows = self.0.lock().unwrap().0.clone();
            rows.iter().map(|row| row.trim_end().to_owned()).filter(|row| !row.is_empty()).collect()
        }

        fn up(&self, rows: usize) {
            let mut screen = self.0.lock().unwrap();
            screen.1 = screen.1.saturating_sub(rows);
        }

        fn put(&self, text: &str) {
            let (rows, at) = &mut *self.0.lock().unwrap();
            for (index, part) in text.split('\n').enumerate() {
                *at += usize::from(index > 0);
                if rows.len() <= *at {
                    rows.resize(*at + 1, String::new());
                }
                for character in part.chars() {
                    if rows[*at].chars().count() == WIDTH {
                        *at += 1;
                        rows.resize(rows.len().max(*at + 1), String::new());
                    }
                    rows[*at].push(character);
                }
            }
        }
    }

    impl TermLike for Screen {
        fn width(&self) -> u16 {
            WIDTH as u16
        }
        fn move_cursor_up(&self, n: usize) -> io::Result<()> {
            self.up(n);
            Ok(())
        }
        fn move_cursor_down(&self, n: usize) -> io::Result<()> {
            self.put(&"\n".repeat(n));
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> io::Result<()> {
            self.put(&format!("{text}\n"));
            Ok(())
        }
        fn write_str(&self, text: &str) -> io::Result<()> {
            self.put(text);
            Ok(())
        }
        fn clear_line(&self) -> io::Result<()> {
            let (rows, at) = &mut *self.0.lock().unwrap();
            if let Some(row) = rows.get_mut(*at) {
                row.clear();
            }
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_stand_whole_above_one_bar() {
        let screen = Screen::default();
        let target = ProgressDrawTarget::term_like(Box::new(screen.clone()));
        let mut progress = Progress::bar(10, 4, target);
        progress.step(&record(5));
        progress.line("epoch 1: better\nsaved");
        progress.step(&record(6));
        progress.line("epoch 2: worse");
        progress.step(&record(7));
        progress.finish();
        let rows = screen.rows();
        assert_eq!(rows[..3], ["epoch 1: better", "saved", "epoch 2: worse"], "{rows:#?}");
        assert_eq!(rows.len(), 4, "{rows:#?}");
        let bar = "step 7/10  epoch 2  loss 0.5000  8.0 samples/s  00:00:06 left";
        assert!(rows[3].starts_with('█') && rows[3].ends_with(bar), "{rows:#?}");
    }

    #[test]
    fn hidden_progress_takes_everything_silently() {
        let mut progress = Progress::hidden();
        progress.step(&record(1));
        progress.line("not shown");
        assert_eq!(progress.pace.samples_per_second(), 0.0, "nothing is even counted");
        progress.finish();
    }
}
