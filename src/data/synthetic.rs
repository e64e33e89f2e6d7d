//! Built-in reviews for the quickstart and for tests: written by a small grammar, seeded.
//!
//! The label is the polarity every opinion in the review ends up with, and no single word gives
//! it away: praise occurs negated ("not dull at all") and conceded ("although the plot was
//! moving, the ending was flat"), so a model has to read the words in their order. Facts without
//! an opinion fill the rest.

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::Review;

/// Changes whenever the same (count, seed) gives other reviews, so that caches notice.
pub(super) const VERSION: u32 = 1;

const ASPECTS: [&str; 10] = [
    "acting",
    "plot",
    "script",
    "dialogue",
    "music",
    "pacing",
    "ending",
    "photography",
    "humour",
    "casting",
];

/// Adjectives by polarity: 0 blame, 1 praise.
const ADJECTIVES: [[&str; 8]; 2] = [
    ["dull", "clumsy", "awful", "boring", "weak", "silly", "shallow", "predictable"],
    ["wonderful", "moving", "clever", "charming", "brilliant", "fresh", "honest", "convincing"],
];

const PEOPLE: [&str; 8] = [
    "a teacher",
    "two sisters",
    "a retired sailor",
    "a young doctor",
    "a detective",
    "a farmer",
    "three students",
    "a pianist",
];

const PLACES: [&str; 8] = [
    "a small town",
    "the harbour",
    "an old hotel",
    "the mountains",
    "a railway station",
    "the suburbs",
    "a fishing village",
    "the capital",
];

const TIMES: [&str; 8] = [
    "on a Monday evening",
    "last winter",
    "in the afternoon",
    "during the holidays",
    "at a festival",
    "on television",
    "after work",
    "in a nearly empty cinema",
];

/// `count` labelled reviews with the ids `s0`, `s1`, ...; of every two in a row one is positive.
/// The first n of a longer list with the same seed are the list of n.
pub fn reviews(count: usize, seed: u64) -> Vec<Review> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut first_of_pair = 0;
    (0..count)
        .map(|i| {
            let label = match i % 2 {
                0 => {
                    first_of_pair = random.random_range(0..2);
                    first_of_pair
                }
                _ => 1 - first_of_pair,
            };
            let text = review(label as usize, &mut random);
            Review { id: format!("s{i}"), text, label: Some(label) }
        })
        .collect()
}

/// Opinions and facts in random order, 15 to 120 words.
fn review(label: usize, random: &mut StdRng) -> String {
    // The product of three draws: most reviews are short, a few long.
    let spread: f64 = (0..3).map(|_| random.random::<f64>()).product();
    let wanted = 15 + (90.0 * spread) as usize;
    let mut sentences = vec![opinion(label, random)];
    let words = |sentences: &[String]| -> usize {
        sentences.iter().map(|s| s.split_whitespace().count()).sum()
    };
    while words(&sentences) < wanted {
        let next = match random.random_bool(0.6) {
            true => opinion(label, random),
            false => fact(random),
        };
        let place = random.random_range(0..=sentences.len());
        sentences.insert(place, next);
    }
    sentences.join(" ")
}

/// One sentence whose verdict is `polarity`.
fn opinion(polarity: usize, random: &mut StdRng) -> String {
    let (against, verdict) = (claim(1 - polarity, random), claim(polarity, random));
    let text = match random.random_range(0..10) {
        0 => format!("although {against}, {verdict}"),
        1 => format!("{against}, but {verdict}"),
        _ => verdict,
    };
    sentence(&text)
}

/// One clause of the given polarity: said straight, or as the negation of its opposite.
fn claim(polarity: usize, random: &mut StdRng) -> String {
    let aspect = pick(&ASPECTS, random);
    if random.random_bool(0.75) {
        let adjective = pick(&ADJECTIVES[polarity], random);
        match random.random_range(0..3) {
            0 => format!("the {aspect} was {adjective}"),
            1 => format!("I found the {aspect} really {adjective}"),
            _ => format!("the {aspect} felt {adjective} to me"),
        }
    } else {
        let adjective = pick(&ADJECTIVES[1 - polarity], random);
        match random.random_range(0..3) {
            0 => format!("the {aspect} was not {adjective} at all"),
            1 => format!("I did not find the {aspect} {adjective}"),
            _ => format!("the {aspect} was never {adjective}"),
        }
    }
}

/// A sentence without an opinion.
fn fact(random: &mut StdRng) -> String {
    let (people, place, time) =
        (pick(&PEOPLE, random), pick(&PLACES, random), pick(&TIMES, random));
    let text = match random.random_range(0..6) {
        0 => format!("we saw it {time}"),
        1 => format!("it is about {people} in {place}"),
        2 => format!("the story begins in {place} and follows {people}"),
        3 => format!("I watched it {time} with some friends"),
        4 => format!("most of it takes place in {place}"),
        _ => format!("it runs for about two hours and was shown {time}"),
    };
    sentence(&text)
}

fn pick<'a>(choices: &[&'a str], random: &mut StdRng) -> &'a str {
    choices.choose(random).expect("the word lists are not empty")
}

fn sentence(text: &str) -> String {
    let (first, rest) = text.split_at(1);
    format!("{}{rest}.", first.to_uppercase())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn words(text: &str) -> Vec<String> {
        text.to_lowercase().split_whitespace().map(|w| w.replace(['.', ','], "")).collect()
    }

    /// Reads a review as its grammar means it, sentence by sentence.
    fn verdicts(text: &str) -> Vec<u32> {
        let polarity = |clause: &str| {
            let clause = words(clause);
            let found =
                (0..2).find(|&p| ADJECTIVES[p].iter().any(|a| clause.contains(&a.to_string())));
            let negated = clause.iter().any(|w| w == "not" || w == "never");
            found.map(|p| if negated { 1 - p as u32 } else { p as u32 })
        };
        text.split('.')
            .filter_map(|sentence| polarity(sentence.split(", ").last().unwrap_or_default()))
            .collect()
    }

    #[test]
    fn the_grammar_decides_the_label() {
        for review in reviews(3000, 5) {
            let verdicts = verdicts(&review.text);
            assert!(!verdicts.is_empty(), "no opinion: {}", review.text);
            let label = review.label.unwrap();
            assert!(verdicts.iter().all(|&v| v == label), "{label}: {}", review.text);
        }
    }

    #[test]
    fn no_single_word_decides() {
        let reviews = reviews(6000, 1);
        let mut seen: BTreeMap<String, [usize; 2]> = BTreeMap::new();
        for review in &reviews {
            for word in words(&review.text).into_iter().collect::<BTreeSet<_>>() {
                seen.entry(word).or_default()[review.label.unwrap() as usize] += 1;
            }
        }
        assert!(seen.len() > 80 && seen.len() < 400, "{} words", seen.len());
        // "Positive if and only if the word occurs", or the reverse.
        let half = reviews.len() / 2;
        for (word, [bad, good]) in seen {
            let right = (good + half - bad).max(bad + half - good);
            let accuracy = right as f64 / reviews.len() as f64;
            assert!(accuracy < 0.75, "\"{word}\" alone reaches {accuracy}");
        }
    }

    #[test]
    fn reviews_are_seeded_balanced_and_of_the_stated_length() {
        let long = reviews(2000, 9);
        assert_eq!(long[..301], reviews(301, 9));
        assert_ne!(long, reviews(2000, 10));
        for pair in long.chunks(2) {
            assert_eq!(pair[0].label.unwrap() + pair[1].label.unwrap(), 1);
        }
        let lengths: Vec<usize> = long.iter().map(|r| words(&r.text).len()).collect();
        let (low, high) = (lengths.iter().min().unwrap(), lengths.iter().max().unwrap());
        assert!(*low >= 15 && *low < 20 && *high > 80 && *high <= 120, "{low} to {high}");
        assert_eq!((long[0].id.as_str(), long[1999].id.as_str()), ("s0", "s1999"));
        let distinct: BTreeSet<&str> = long.iter().map(|r| r.text.as_str()).collect();
        assert!(distinct.len() > 1990, "{} distinct", distinct.len());
    }
}
