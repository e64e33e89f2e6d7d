//! Killing runs at random moments, seeded, and holding what they end in to an unbroken run.

use std::{fs, path::Path, time::Duration};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use super::run::{End, Process, Ranks, Run, STEPS, signal, text};

/// When a run is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    StartUp,
    Training,
    /// While a checkpoint is being written.
    Checkpoint,
    /// While the best model is being written or exchanged.
    Best,
}

/// Which of its processes are killed.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Rank(usize),
    /// Ranks, mpirun and launcher.
    All,
}

const MOMENTS: [Moment; 4] = [Moment::StartUp, Moment::Checkpoint, Moment::Training, Moment::Best];

/// A run that nothing disturbed: what all others have to end in.
pub struct Unbroken {
    pub end: End,
    /// Records in its `metrics.jsonl`.
    lines: usize,
    /// How many of them there were when the model was better than ever before.
    better: Vec<usize>,
}

impl Unbroken {
    pub fn new(root: &Path, ranks: Ranks) -> Self {
        let run = Run::new(root, &format!("unbroken-{ranks:?}"), ranks);
        let ended = run.start(false).wait();
        assert_eq!(ended.code, Some(0), "{}", ended.said);
        let end = run.end();
        let lines: Vec<Value> = text(&end["metrics.jsonl"])
            .lines()
            .map(|line| serde_json::from_str(line).expect("a record"))
            .collect();
        let steps: Vec<u64> = (lines.iter().filter(|line| line["event"] == "step"))
            .filter_map(|line| line["step"].as_u64())
            .collect();
        assert_eq!(steps, (1..=STEPS as u64).collect::<Vec<_>>(), "each step exactly once");
        let (mut best, mut better) = ((f64::NEG_INFINITY, f64::NEG_INFINITY), Vec::new());
        for (number, line) in lines.iter().enumerate() {
            if let (Some(accuracy), Some(loss)) =
                (line["val_accuracy"].as_f64(), line["val_loss"].as_f64())
                && (accuracy, -loss) > best
            {
                best = (accuracy, -loss);
                better.push(number);
            }
        }
        assert!(better.len() > 1, "the best model is never replaced: {better:?}");
        Self { end, lines: lines.len(), better }
    }

    /// Kills `process`, a start or resume of `run`, at a random moment of that kind. `false` if it
    /// ended first.
    fn kill(
        &self,
        (run, mut process): (&Run, Process),
        (moment, victim): (Moment, Victim),
        random: &mut ChaCha8Rng,
    ) -> bool {
        let victims = |process: &Process| match victim {
            Victim::Rank(rank) => process.pid_of(rank).into_iter().collect(),
            Victim::All => process.pids(),
        };
        let first = run.lines().min(self.lines - 20);
        let line = random.random_range(first..self.lines - 10);
        let reached = match moment {
            Moment::StartUp => process.until(|process| !victims(process).is_empty()),
            Moment::Training | Moment::Checkpoint => process.until(|_| run.lines() > line),
            Moment::Best => {
                let ahead: Vec<usize> =
                    self.better.iter().copied().filter(|line| *line > first).collect();
                let line = ahead.get(random.random_range(0..ahead.len().max(1)));
                process.until(|_| run.lines() >= *line.unwrap_or(&usize::MAX))
            }
        };
        // Looked up before a write begins, which may last no longer than the search.
        let mut pids = victims(&process);
        let (reached, micros) = match moment {
            Moment::StartUp => (reached, if run.ranks != Ranks::One { 600_000 } else { 120_000 }),
            Moment::Training => (reached, 15_000),
            Moment::Checkpoint => (reached && process.until(|_| run.is_writing("step")), 5_000),
            Moment::Best => (reached && process.until(|_| run.is_writing("best")), 3_000),
        };
        // Half of the blows fall at once.
        let pause = random.random_range(-micros..micros).max(0);
        std::thread::sleep(Duration::from_micros(pause as u64));
        if matches!(moment, Moment::StartUp) {
            pids = victims(&process);
        }
        if !reached || process.has_ended() {
            let ended = process.wait();
            assert_eq!(ended.code, Some(0), "{}", ended.said);
            return false;
        }
        signal("KILL", &pids);
        match victim {
            Victim::All => process.kill_all(),
            Victim::Rank(rank) => {
                let ended = process.wait();
                let verdict = format!("rank {rank} died: killed by signal 9 (SIGKILL)");
                let story = format!("{moment:?} of rank {rank}: {}", ended.said);
                assert_eq!(ended.code, Some(128 + 9), "{story}");
                assert!(ended.said.contains(&verdict), "{story}");
            }
        }
        true
    }
}

/// Kills `count` runs, some of them again when they resume, and holds each to an unbroken one.
pub fn kills(ranks: Ranks, count: usize, seed: u64) {
    let root = tempfile::tempdir().expect("a directory");
    let unbroken = Unbroken::new(root.path(), ranks);
    let world = ranks.count();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let (mut killed, mut again, mut writing) = (0, 0, 0);
    for attempt in 0.. {
        if killed == count {
            break;
        }
        assert!(attempt < 2 * count, "only {killed} of {attempt} runs met their moment");
        let any = |random: &mut ChaCha8Rng| match random.random_range(0..=world) {
            rank if world > 1 && rank < world => Victim::Rank(rank),
            _ => Victim::All,
        };
        let victim = match killed % (world + 1) {
            rank if world > 1 && rank < world => Victim::Rank(rank),
            _ => Victim::All,
        };
        let moment = MOMENTS[killed % MOMENTS.len()];
        let run = Run::new(root.path(), &format!("run-{attempt}"), ranks);
        let mut story = format!("run {attempt}, {victim:?} killed at {moment:?}");
        let process = run.start(false);
        if unbroken.kill((&run, process), (moment, victim), &mut random) {
            killed += 1;
            writing += usize::from(run.is_writing(""));
            if killed % 5 < 2 {
                let blow = (MOMENTS[random.random_range(0..4)], any(&mut random));
                story += &format!(", then {blow:?}");
                again += usize::from(unbroken.kill((&run, run.start(true)), blow, &mut random));
            }
            let said = run.resume();
            assert!(!said.contains("warning"), "{story}: {said}");
        }
        eprintln!("{story}");
        run.must_end_as(&unbroken.end, &story);
        fs::remove_dir_all(&run.dir).expect("removed");
    }
    eprintln!("{killed} runs killed, {writing} of them while writing; {again} killed again");
    assert!(writing > 0 && again > 0, "no kill met a write, or none a resume");
}
