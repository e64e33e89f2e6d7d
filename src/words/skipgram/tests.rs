//! What is learnt, that it can be repeated, and what is refused.

use rand::Rng;

use super::*;

fn settings() -> Settings {
    Settings {
        dimensions: 20,
        epochs: 8,
        window: 3,
        negative: 5,
        min_count: 2,
        subsample: 0.0,
        learning_rate: 0.05,
        seed: 7,
    }
}

/// Reviews of 60 words drawn from `a0` to `a9`, and as many of words from `b0` to `b9`.
fn texts() -> Vec<String> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut word = |review: usize| format!("{}{}", ["a", "b"][review % 2], rng.random_range(0..10));
    let mut review = |i| (0..60).map(|_| word(i)).collect::<Vec<_>>().join(" ");
    (0..400).map(&mut review).chain(["once".to_owned()]).collect()
}

fn train(settings: &Settings, threads: usize) -> Trained {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let prepared = Prepared::new(&texts(), settings).unwrap();
        assert_eq!((prepared.vocabulary(), prepared.words()), (20, 400 * 60));
        prepared.train(settings, |done| assert!(done <= 8 * 400 * 60)).unwrap()
    })
}

fn cosine(trained: &Trained, i: usize, j: usize) -> f32 {
    let row = |i: usize| &trained.values[i * 20..][..20];
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    dot(row(i), row(j)) / (dot(row(i), row(i)) * dot(row(j), row(j))).sqrt()
}

#[test]
fn words_that_stand_together_become_alike() {
    for threads in [1, 3] {
        let trained = train(&settings(), threads);
        for i in 0..20 {
            for j in (0..20).filter(|j| *j != i) {
                let together = trained.words[i][..1] == trained.words[j][..1];
                let alike = cosine(&trained, i, j);
                let (a, b) = (&trained.words[i], &trained.words[j]);
                assert!(if together { alike > 0.5 } else { alike < 0.3 }, "{a} {b}: {alike}");
            }
        }
    }
}

#[test]
fn one_thread_repeats_itself_to_the_last_bit() {
    let subsampled = Settings { subsample: 0.005, ..settings() };
    let once = train(&subsampled, 1);
    assert_eq!(once.to_text(), train(&subsampled, 1).to_text());
    assert_ne!(once, train(&Settings { seed: 8, ..subsampled.clone() }, 1));
    assert_ne!(once, train(&settings(), 1));
}

#[test]
fn the_text_is_read_back() {
    let trained = train(&Settings { epochs: 1, ..settings() }, 1);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vectors.txt");
    std::fs::write(&path, trained.to_text()).unwrap();
    let read = crate::words::vectors::read(&path, |_| true).unwrap();
    assert_eq!((read.dimensions, read.rows.len()), (20, 20));
    for (word, row) in trained.words.iter().zip(trained.values.chunks_exact(20)) {
        assert_eq!(read.rows[word], row);
    }
}

#[test]
fn too_few_words_and_too_much_haste_are_refused() {
    let error = Prepared::new(&["a a a", "b"], &settings()).err().unwrap().to_string();
    assert!(error.starts_with("--min-count 2: 1 of the reviews' words"), "{error}");
    let hasty = Settings { learning_rate: 1e30, ..settings() };
    let prepared = Prepared::new(&texts(), &hasty).unwrap();
    let error = prepared.train(&hasty, |_| ()).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().starts_with("--learning-rate "), "{error}");
}
