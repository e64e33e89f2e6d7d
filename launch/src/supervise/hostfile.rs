//! The hostfile, read only for what the launcher must know: how many ranks land on one node.
//!
//! mpirun reads it again for itself. Refuses a file without hosts, and slots that are no number.

use crate::LaunchError;
use std::path::Path;

/// The slots of each host, in the file's order; `None` where the line leaves them to mpirun.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Hosts(Vec<Option<usize>>);

impl Hosts {
    pub(super) fn read(path: &Path) -> Result<Self, LaunchError> {
        let bad =
            |line, reason: String| LaunchError::Hostfile { path: path.to_path_buf(), line, reason };
        let text = std::fs::read_to_string(path)
            .map_err(|error| bad(0, format!("cannot read this hostfile: {error}")))?;
        let mut hosts = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            let Some(host) = line.split_whitespace().next() else {
                continue;
            };
            // Open MPI writes `node slots=4`, MPICH `node:4`.
            let slots = line
                .split_whitespace()
                .find_map(|word| word.strip_prefix("slots="))
                .or_else(|| host.split_once(':').map(|(_, slots)| slots));
            let slots = match slots.map(|slots| (slots, slots.parse())) {
                None => None,
                Some((_, Ok(number @ 1..))) => Some(number),
                Some((text, _)) => {
                    let reason = format!(
                        "{text:?} is no number of slots; write `{} slots=4`",
                        host.split(':').next().unwrap_or(host)
                    );
                    return Err(bad(index + 1, reason));
                }
            };
            hosts.push(slots);
        }
        if hosts.is_empty() {
            return Err(bad(0, "no host in it; write one a line, as `node1 slots=4`".into()));
        }
        Ok(Self(hosts))
    }

    /// All slots together, if every line gives its own.
    pub(super) fn slots(&self) -> Option<usize> {
        self.0.iter().copied().sum()
    }

    /// Ranks on the fullest node, filling each node's slots in turn as mpirun does; a node that
    /// leaves its slots open has `cores` of them.
    pub(super) fn fullest(&self, ranks: usize, cores: usize) -> usize {
        let mut left = ranks;
        let mut fullest = 1;
        for slots in &self.0 {
            let here = slots.unwrap_or(cores).min(left);
            fullest = fullest.max(here);
            left -= here;
        }
        fullest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Hosts, LaunchError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        std::fs::write(&path, text).unwrap();
        Hosts::read(&path)
    }

    #[test]
    fn both_dialects_and_comments() {
        let hosts = read("# two nodes\nnode1 slots=4 # big\n\nnode2:2\nnode3\n").unwrap();
        assert_eq!(hosts, Hosts(vec![Some(4), Some(2), None]));
        assert_eq!(hosts.slots(), None);
        assert_eq!(read("a slots=4\nb max_slots=8 slots=3\n").unwrap().slots(), Some(7));
    }

    #[test]
    fn the_fullest_node_counts() {
        let hosts = read("a slots=2\nb slots=4\nc\n").unwrap();
        assert_eq!(hosts.fullest(1, 8), 1);
        assert_eq!(hosts.fullest(3, 8), 2);
        assert_eq!(hosts.fullest(6, 8), 4);
        assert_eq!(hosts.fullest(14, 8), 8);
    }

    #[test]
    fn errors_name_file_line_value_and_remedy() {
        for text in ["a slots=2\nb slots=two\n", "a\nb slots=0\n", "a\nb:x\n"] {
            let message = read(text).unwrap_err().to_string();
            assert!(message.contains("hosts:2: "), "{message}");
            assert!(message.contains("write `b slots=4`"), "{message}");
        }
        assert!(read("# nobody\n").unwrap_err().to_string().contains("no host in it"));
        let message = Hosts::read(Path::new("/no/such/hosts")).unwrap_err().to_string();
        assert!(message.contains("/no/such/hosts: cannot read"), "{message}");
    }
}
