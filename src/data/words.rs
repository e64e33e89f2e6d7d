//! What a word is: for vocabularies of whole words, and for the vectors trained on them.
//!
//! A run of letters and digits, in which an apostrophe may stand between two of them (`don't`); every
//! other character that is not white space is a word of its own (`great!` is `great` and `!`).
//! Everything is in lower case, and a typographic apostrophe is a plain one.

use std::collections::HashMap;

use rayon::prelude::*;

/// What [`split`] does, as a regular expression for `tokenizer.json`.
pub const PATTERN: &str = r"[\p{Alphabetic}\p{N}]+(?:'[\p{Alphabetic}\p{N}]+)*|\S";

/// The text as [`split`] wants it.
pub fn lower(text: &str) -> String {
    // By the character, as the `tokenizers` crate and Hugging Face's do: the case of a final sigma
    // depends on what is around it for `str::to_lowercase`.
    text.chars()
        .map(|c| if c == '\u{2019}' { '\'' } else { c })
        .flat_map(char::to_lowercase)
        .collect()
}

/// The words of a text in lower case.
pub fn split(lower: &str) -> impl Iterator<Item = &str> {
    let mut rest = lower;
    std::iter::from_fn(move || {
        rest = rest.trim_start();
        let (word, after) = rest.split_at(first(rest)?);
        rest = after;
        Some(word)
    })
}

/// The bytes of the word that `text` starts with; `None` if there is no text.
fn first(text: &str) -> Option<usize> {
    let run = |from: usize| {
        let rest = &text[from..];
        from + rest.find(|c: char| !c.is_alphanumeric()).unwrap_or(rest.len())
    };
    let mut end = run(0);
    if end == 0 {
        return text.chars().next().map(char::len_utf8);
    }
    while text[end..].starts_with('\'') {
        let further = run(end + 1);
        if further == end + 1 {
            break;
        }
        end = further;
    }
    Some(end)
}

/// How often each word occurs in texts of any case; in parallel.
pub fn count<T: AsRef<str> + Sync>(texts: &[T]) -> HashMap<String, u64> {
    let add = |counts: &mut HashMap<String, u64>, word: &str, n: u64| match counts.get_mut(word) {
        Some(count) => *count += n,
        None => {
            counts.insert(word.to_owned(), n);
        }
    };
    texts
        .par_iter()
        .fold(HashMap::new, |mut counts, text| {
            split(&lower(text.as_ref())).for_each(|word| add(&mut counts, word, 1));
            counts
        })
        .reduce(HashMap::new, |mut all, mut counts| {
            if all.len() < counts.len() {
                std::mem::swap(&mut all, &mut counts);
            }
            counts.iter().for_each(|(word, n)| add(&mut all, word, *n));
            all
        })
}

/// The words that occur at least `min_count` times with their counts, the most frequent first, equally
/// frequent ones in alphabetical order.
pub fn ranked(counts: HashMap<String, u64>, min_count: u64) -> Vec<(String, u64)> {
    let mut ranked: Vec<_> = counts.into_iter().filter(|(_, n)| *n >= min_count).collect();
    ranked.sort_unstable_by(|(a, n), (b, m)| m.cmp(n).then_with(|| a.cmp(b)));
    ranked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_keep_their_apostrophes_and_lose_their_punctuation() {
        for (text, words) in [
            ("Don\u{2019}t go!", "don't|go|!"),
            ("'great' rock'n'roll, it''s o' '", "'|great|'|rock'n'roll|,|it|'|'|s|o|'|'"),
            ("10/10... \u{a0}CAF\u{c9}\u{85}_x_", "10|/|10|.|.|.|café|_|x|_"),
            ("\u{3a3}\u{391}\u{3a3} \u{130}", "\u{3c3}\u{3b1}\u{3c3}|i|\u{307}"),
            (" ", ""),
        ] {
            let lower = lower(text);
            assert_eq!(split(&lower).collect::<Vec<_>>().join("|"), words, "{text}");
        }
    }

    #[test]
    fn the_frequent_come_first_then_the_alphabet_decides() {
        let texts: Vec<String> = (0..40).map(|i| format!("B a c{} A b! b", i % 30)).collect();
        let ranked = ranked(count(&texts), 2);
        let shown: Vec<String> = ranked[..5].iter().map(|(w, n)| format!("{w}{n}")).collect();
        assert_eq!(shown, ["b120", "a80", "!40", "c02", "c12"]);
        assert_eq!(ranked.len(), 3 + 10, "c10 to c29 occur once");
    }
}
