//! What comes out of mpirun, sorted by who said it: whole lines of each rank, prefixed with its
//! number, and mpirun's own words, of which those about a death are read and dropped.
//!
//! mpirun tags what it forwards as `[job,rank]<stream>:`. A rank that wrote half a line leaves a
//! tag in the middle of the next rank's, so a line here is cut at every tag and put together
//! again per rank.

use super::death::Deaths;
use super::mpirun::Flavour;
use std::collections::BTreeMap;
use std::io::{self, Write};

/// Which of mpirun's two pipes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stream {
    Out,
    Err,
}

/// Who wrote a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Speaker {
    Mpirun,
    Rank(usize),
}

/// Where the sorted lines go.
pub(super) struct Sinks<'a> {
    pub(super) out: &'a mut dyn Write,
    pub(super) err: &'a mut dyn Write,
}

impl Sinks<'_> {
    pub(super) fn line(&mut self, stream: Stream, speaker: Speaker, line: &[u8]) -> io::Result<()> {
        let mut whole = match speaker {
            Speaker::Mpirun => b"[mpirun] ".to_vec(),
            Speaker::Rank(rank) => format!("[rank {rank}] ").into_bytes(),
        };
        whole.extend_from_slice(line);
        whole.push(b'\n');
        // In one write, so that lines of other processes on the same terminal stay apart.
        let sink = match stream {
            Stream::Out => &mut self.out,
            Stream::Err => &mut self.err,
        };
        sink.write_all(&whole)?;
        sink.flush()
    }
}

/// The lines begun and the banners open, of every speaker on either pipe.
pub(super) struct Output {
    flavour: Flavour,
    begun: BTreeMap<(Stream, Speaker), Vec<u8>>,
    filters: BTreeMap<(Stream, Speaker), Filter>,
    pub(super) deaths: Deaths,
    /// Whether mpirun said something we did not understand, and so have shown.
    pub(super) mpirun_spoke: bool,
}

impl Output {
    pub(super) fn new(flavour: Flavour) -> Self {
        Self {
            flavour,
            begun: BTreeMap::new(),
            filters: BTreeMap::new(),
            deaths: Deaths::default(),
            mpirun_spoke: false,
        }
    }

    /// Takes what one pipe gave up to and including the next line break (or its end).
    pub(super) fn feed(
        &mut self,
        stream: Stream,
        bytes: &[u8],
        sinks: &mut Sinks<'_>,
    ) -> io::Result<()> {
        let (line, ended) = match bytes.strip_suffix(b"\n") {
            Some(line) => (line, true),
            None => (bytes, false),
        };
        let mut speaker = Speaker::Mpirun;
        let mut rest = line;
        while let Some(cut) = next_cut(rest, self.flavour) {
            let before = &rest[..cut.at];
            if !before.is_empty() {
                self.begun.entry((stream, speaker)).or_default().extend_from_slice(before);
            }
            speaker = cut.speaker;
            rest = &rest[cut.after..];
        }
        let key = (stream, speaker);
        self.begun.entry(key).or_default().extend_from_slice(rest);
        if ended {
            let line = self.begun.remove(&key).unwrap_or_default();
            self.whole_line(key, line, sinks)?;
        }
        Ok(())
    }

    /// Takes what no line break ended, and banners that nothing closed.
    pub(super) fn finish(&mut self, sinks: &mut Sinks<'_>) -> io::Result<()> {
        for (key, mut line) in std::mem::take(&mut self.begun) {
            // PRRTE ends a stream with a NUL now and then.
            line.retain(|&byte| byte != 0);
            if !line.is_empty() {
                self.whole_line(key, line, sinks)?;
            }
        }
        for (key, filter) in std::mem::take(&mut self.filters) {
            if let Some(line) = filter.finish(&mut self.deaths) {
                sinks.line(key.0, key.1, &line)?;
            }
        }
        Ok(())
    }

    fn whole_line(
        &mut self,
        key: (Stream, Speaker),
        mut line: Vec<u8>,
        sinks: &mut Sinks<'_>,
    ) -> io::Result<()> {
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        let (stream, speaker) = key;
        // Open MPI 5 and MPICH report an abort through the rank's stderr; no rank's stdout is
        // ever ours to drop.
        if stream == Stream::Out && speaker != Speaker::Mpirun {
            return sinks.line(stream, speaker, &line);
        }
        let alone = speaker == Speaker::Mpirun || line.starts_with(b"Abort(");
        let filter = self.filters.entry(key).or_default();
        let kept = filter.push(line, alone, &mut self.deaths);
        self.mpirun_spoke |= speaker == Speaker::Mpirun && !kept.is_empty();
        kept.iter().try_for_each(|line| {
            // mpirun's complaints belong to stderr, on whichever pipe it made them.
            let stream = if speaker == Speaker::Mpirun { Stream::Err } else { stream };
            sinks.line(stream, speaker, line)
        })
    }
}

/// Holds a ruled-off banner back until it is clear whether it is about a death.
#[derive(Debug, Default)]
enum Filter {
    #[default]
    Plain,
    /// A rule has come; the next line decides.
    Rule(Vec<u8>),
    /// Inside a banner that will be dropped.
    Banner(String),
}

impl Filter {
    /// Takes one line and gives back those to show. `alone`: it may be an aside of mpirun's.
    fn push(&mut self, line: Vec<u8>, alone: bool, deaths: &mut Deaths) -> Vec<Vec<u8>> {
        let text = String::from_utf8_lossy(&line);
        match std::mem::take(self) {
            Self::Banner(mut banner) => {
                if is_rule(&line) {
                    deaths.banner(&banner);
                } else {
                    banner.push('\n');
                    banner.push_str(&text);
                    *self = Self::Banner(banner);
                }
                Vec::new()
            }
            Self::Rule(_) if Deaths::opens_banner(&text) => {
                *self = Self::Banner(text.into_owned());
                Vec::new()
            }
            Self::Rule(rule) => {
                let mut kept = self.push(line, alone, deaths);
                kept.insert(0, rule);
                kept
            }
            Self::Plain if is_rule(&line) => {
                *self = Self::Rule(line);
                Vec::new()
            }
            Self::Plain if alone && deaths.line(&text) => Vec::new(),
            Self::Plain => vec![line],
        }
    }

    /// A banner cut short still says what it says; a rule without one was somebody's line.
    fn finish(self, deaths: &mut Deaths) -> Option<Vec<u8>> {
        match self {
            Self::Plain => None,
            Self::Rule(rule) => Some(rule),
            Self::Banner(banner) => {
                deaths.banner(&banner);
                None
            }
        }
    }
}

fn is_rule(line: &[u8]) -> bool {
    line.len() >= 60 && (line.iter().all(|&b| b == b'-') || line.iter().all(|&b| b == b'='))
}

/// A place in a line where another speaker begins.
struct Cut {
    at: usize,
    after: usize,
    speaker: Speaker,
}

fn next_cut(line: &[u8], flavour: Flavour) -> Option<Cut> {
    (0..line.len()).filter(|&at| line[at] == b'[').find_map(|at| {
        if flavour == Flavour::Mpich && line[at..].starts_with(b"[mpiexec@") {
            // Hydra's own line, run into a rank's unfinished one; its name is part of the text.
            return (at > 0).then_some(Cut { at, after: at, speaker: Speaker::Mpirun });
        }
        let (rank, length) = tag(&line[at..])?;
        // PRRTE puts a blank between its tag and the text.
        let blank = flavour == Flavour::OpenMpi5 && line.get(at + length) == Some(&b' ');
        let after = at + length + usize::from(blank);
        Some(Cut { at, after, speaker: Speaker::Rank(rank) })
    })
}

/// The rank in a tag `[1,0]<stdout>:` at the start, and the tag's length.
fn tag(text: &[u8]) -> Option<(usize, usize)> {
    let end = text.iter().take(40).position(|&byte| byte == b':')?;
    let inside = std::str::from_utf8(&text[1..end]).ok()?;
    let (ids, stream) = inside.split_once("]<")?;
    let (job, rank) = ids.split_once(',')?;
    if !matches!(stream, "stdout>" | "stderr>" | "rank>") || job.parse::<u64>().is_err() {
        return None;
    }
    Some((rank.parse().ok()?, end + 1))
}

#[cfg(test)]
mod tests {
    use super::super::death::{Death, How};
    use super::*;

    /// Feeds both pipes' texts and returns what came out, with the deaths learnt.
    fn sort(flavour: Flavour, out: &str, err: &str) -> (String, String, Output) {
        let (mut to_out, mut to_err) = (Vec::new(), Vec::new());
        let mut output = Output::new(flavour);
        let mut sinks = Sinks { out: &mut to_out, err: &mut to_err };
        for (stream, text) in [(Stream::Out, out), (Stream::Err, err)] {
            for line in text.split_inclusive('\n') {
                output.feed(stream, line.as_bytes(), &mut sinks).unwrap();
            }
        }
        output.finish(&mut sinks).unwrap();
        (String::from_utf8(to_out).unwrap(), String::from_utf8(to_err).unwrap(), output)
    }

    #[test]
    fn half_lines_of_several_ranks_are_put_together_again() {
        let out = "[1,0]<stdout>:abc[1,1]<stdout>:abc[1,0]<stdout>:def0\n\
                   [1,1]<stdout>:def1\n[1,0]<stdout>:\n[1,1]<stdout>:end";
        let (out, err, _) = sort(Flavour::OpenMpi4, out, "");
        assert_eq!(out, "[rank 0] abcdef0\n[rank 1] abcdef1\n[rank 0] \n[rank 1] end\n");
        assert_eq!(err, "");
    }

    #[test]
    fn a_tags_blank_is_cut_for_open_mpi_5_only() {
        let out = "[1,0]<stdout>:  two\n";
        assert_eq!(sort(Flavour::OpenMpi4, out, "").0, "[rank 0]   two\n");
        assert_eq!(sort(Flavour::OpenMpi5, out, "").0, "[rank 0]  two\n");
    }

    #[test]
    fn text_that_only_resembles_a_tag_is_left_alone() {
        let out = "[1,0]<stdout>:x[1,2] = [3,4]<other>: [a,1]<stdout>:\n";
        assert_eq!(
            sort(Flavour::OpenMpi4, out, "").0,
            "[rank 0] x[1,2] = [3,4]<other>: [a,1]<stdout>:\n"
        );
    }

    const RULE: &str = "--------------------------------------------------------------------------";

    #[test]
    fn banners_about_a_death_are_read_and_dropped_and_others_shown() {
        let err = format!(
            "{RULE}\nWARNING: something about the network\n{RULE}\n[1,1]<stderr>:error: bad\n\
             {RULE}\nPrimary job  terminated normally, but 1 process returned\na non-zero exit \
             code.\n{RULE}\n{RULE}\nmpirun detected that one or more processes exited\nProcess \
             name: [[20126,1],1]\n  Exit code:    2\n{RULE}\n"
        );
        let (out, err, output) = sort(Flavour::OpenMpi4, "", &err);
        assert_eq!(out, "");
        assert_eq!(
            err,
            format!(
                "[mpirun] {RULE}\n[mpirun] WARNING: something about the network\n\
                 [rank 1] error: bad\n[mpirun] {RULE}\n"
            )
        );
        assert_eq!(output.deaths.verdict(2), Death { rank: Some(1), how: How::Exited(2) });
        assert!(output.mpirun_spoke);
    }

    #[test]
    fn an_abort_reported_through_the_ranks_stderr_is_dropped_but_their_rules_are_not() {
        let err = format!(
            "[1,0]<stderr>: {RULE}\n[1,0]<stderr>: a table\n[1,1]<stderr>: error: bad\n\
             [1,1]<stderr>: {RULE}\n[1,1]<stderr>: MPI_ABORT was invoked on rank 1 in \
             communicator MPI_COMM_WORLD\n[1,1]<stderr>:   Errorcode: 4\n[1,1]<stderr>: {RULE}\n\
             [1,1]<stderr>: \0"
        );
        let (_, err, output) = sort(Flavour::OpenMpi5, "", &err);
        assert_eq!(err, format!("[rank 0] {RULE}\n[rank 0] a table\n[rank 1] error: bad\n"));
        assert_eq!(output.deaths.verdict(4), Death { rank: Some(1), how: How::Aborted(4) });
        assert!(!output.mpirun_spoke);
    }

    #[test]
    fn hydras_words_after_an_unfinished_line_are_its_own() {
        let out = "[1,1]<rank>:half[mpiexec@vm] Exit codes: [vm] 0,512\n";
        let (out, err, output) = sort(Flavour::Mpich, out, "");
        assert_eq!((out.as_str(), err.as_str()), ("[rank 1] half\n", ""));
        assert_eq!(output.deaths.verdict(2), Death { rank: Some(1), how: How::Exited(2) });
    }
}
