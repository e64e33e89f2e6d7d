//! Token ids equal Hugging Face's: on the golden examples, from `tokenizer.json` and from
//! vocabulary files alike, and on the real vocabularies of BERT, GPT-2 and ModernBERT.
//!
//! `ALLREEL_GOLDEN` and `ALLREEL_DATA` name the two folders; without them these tests skip,
//! loudly, and under `CI=true` they fail.

use std::fs;
use std::path::Path;

use allreel::data::{Cleaning, Limit, TokenSet, Tokenizer, Truncation, read};
use serde_json::Value;

use crate::support::reference;

const UNLIMITED: Limit = Limit { max_length: usize::MAX, truncation: Truncation::Head };

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Checks one tokenizer, which puts `special` tokens before and after a text, against every example
/// of its golden folder.
fn check_examples(source: &Path, examples: &Path, special: (usize, usize)) {
    let tokenizer = Tokenizer::load(source).unwrap();
    let examples: Value = serde_json::from_slice(&fs::read(examples).unwrap()).unwrap();
    let max_length = examples["max_length"].as_u64().unwrap() as usize;
    let truncated = Limit { max_length, truncation: Truncation::Head };
    let mut shortened = 0;
    for (kind, limit) in
        [("plain", &UNLIMITED), ("no_special", &UNLIMITED), ("truncated", &truncated)]
    {
        let cases = examples[kind].as_array().unwrap();
        assert!(!cases.is_empty(), "{kind}");
        let texts: Vec<&str> = cases.iter().map(|case| case["text"].as_str().unwrap()).collect();
        let found = tokenizer.encode_all(&texts, limit).unwrap();
        for ((case, text), found) in cases.iter().zip(&texts).zip(&found) {
            let compared = match kind {
                "no_special" => &found[special.0..found.len() - special.1],
                _ => found,
            };
            assert_eq!(compared, ids(&case["ids"]), "{}: {kind}: {text:?}", source.display());
            shortened += usize::from(kind == "truncated" && found.len() == max_length);
        }
    }
    assert!(shortened > 0, "no example reaches the limit");
}

/// `files` are the vocabulary's; they are copied, so that nothing else beside them is read.
fn check_golden(name: &str, files: &[&str], special: (usize, usize)) {
    let Some(root) = reference("ALLREEL_GOLDEN") else {
        return;
    };
    let golden = root.join("tokenizers").join(name);
    let examples = golden.join("examples.json");
    check_examples(&golden.join("tokenizer.json"), &examples, special);
    check_examples(&golden, &examples, special);
    let alone = tempfile::tempdir().unwrap();
    for file in files {
        fs::copy(golden.join(file), alone.path().join(file)).unwrap();
    }
    check_examples(alone.path(), &examples, special);
    // What is saved must load as what it was.
    let saved = tempfile::tempdir().unwrap();
    Tokenizer::load(alone.path()).unwrap().save(saved.path()).unwrap();
    check_examples(saved.path(), &examples, special);
}

#[test]
fn golden_wordpiece_bert() {
    check_golden("wordpiece_bert", &["vocab.txt"], (1, 1));
}

#[test]
fn golden_bytebpe_gpt2() {
    let files = ["vocab.json", "merges.txt"];
    check_golden("bytebpe_gpt2", &files, (0, 0));
}

#[test]
fn golden_bytebpe_roberta() {
    let files = ["vocab.json", "merges.txt"];
    check_golden("bytebpe_roberta", &files, (1, 1));
}

/// Texts with markup, odd spaces, other scripts, an emoji and a backslash; the ids are those of
/// transformers 5 and tokenizers 0.23 in Python.
const TEXTS: [&str; 4] = [
    "I can't believe it's NOT better!<br /><br />10/10, naïve café…",
    "  Zwei  Räume\tand\nTabs \u{85} 日本 😀 \\o/ ",
    "unbelievablyextraordinarily antidisestablishmentarianism",
    "",
];

#[test]
fn golden_real_bert_base_uncased() {
    let Some(root) = reference("ALLREEL_DATA") else {
        return;
    };
    let files = root.join("tokenizers/bert-base-uncased");
    let expected: [&[u32]; 4] = [
        BERT_0,
        &[
            101, 1062, 19845, 10958, 17897, 1998, 21628, 2015, 1864, 1876, 100, 1032, 1051, 1013,
            102,
        ],
        BERT_2,
        &[101, 102],
    ];
    // The saved tokenizer.json pads and cuts to 256; neither may show.
    let long = "dull ".repeat(300);
    let reviews = read::read(&root.join("imdb/labeledTrainData.tsv.gz")).unwrap();
    let mut sets = Vec::new();
    for source in ["tokenizer.json", "vocab.txt"] {
        let tokenizer = Tokenizer::load(&files.join(source)).unwrap();
        assert_eq!(tokenizer.encode_all(&TEXTS, &UNLIMITED).unwrap(), expected, "{source}");
        assert_eq!(tokenizer.encode_all(&[&long], &UNLIMITED).unwrap()[0].len(), 302);
        assert_eq!(tokenizer.vocab_size(), 30_522);
        let limit = Limit { max_length: 256, truncation: Truncation::HeadTail };
        sets.push(TokenSet::build(&reviews[..300], Cleaning::None, &tokenizer, &limit).unwrap());
    }
    assert_eq!(sets[0], sets[1]);
    let lengths = sets[0].lengths();
    assert_eq!(lengths.iter().max(), Some(&256));
    assert!(lengths.iter().any(|&length| length < 256));
}

const BERT_0: &[u32] = &[
    101, 1045, 2064, 1005, 1056, 2903, 2009, 1005, 1055, 2025, 2488, 999, 1026, 7987, 1013, 1028,
    1026, 7987, 1013, 1028, 2184, 1013, 2184, 1010, 15743, 7668, 1529, 102,
];

const BERT_2: &[u32] = &[
    101, 4895, 8671, 2666, 3567, 6321, 10288, 6494, 8551, 3981, 11272, 3424, 10521, 4355, 7875,
    13602, 3672, 12199, 2964, 102,
];

#[test]
fn golden_real_gpt2() {
    let Some(root) = reference("ALLREEL_DATA") else {
        return;
    };
    let tokenizer = Tokenizer::load(&root.join("tokenizers/gpt2")).unwrap();
    let expected: [&[u32]; 4] = [
        &[
            40, 460, 470, 1975, 340, 338, 5626, 1365, 0, 27, 1671, 1220, 6927, 1671, 11037, 940,
            14, 940, 11, 41492, 40304, 1399,
        ],
        &[
            220, 1168, 42990, 220, 371, 11033, 2454, 197, 392, 198, 51, 8937, 1587, 227, 10545,
            245, 98, 17312, 105, 30325, 222, 3467, 78, 14, 220,
        ],
        &[403, 6667, 11203, 1346, 26086, 585, 21565, 1885, 29207, 44390, 3699, 1042],
        &[],
    ];
    assert_eq!(tokenizer.encode_all(&TEXTS, &UNLIMITED).unwrap(), expected);
    let inside = tokenizer.encode_all(&["a <|endoftext|> b"], &UNLIMITED).unwrap();
    assert_eq!(inside, [[64, 220, 50_256, 275]]);
    assert_eq!(tokenizer.vocab_size(), 50_257);
}

#[test]
fn golden_real_modernbert() {
    let Some(root) = reference("ALLREEL_DATA") else {
        return;
    };
    let tokenizer = Tokenizer::load(&root.join("tokenizers/modernbert")).unwrap();
    let expected: [&[u32]; 4] = [
        &[
            50281, 42, 476, 626, 2868, 352, 434, 5803, 1805, 2, 29, 1288, 19884, 1288, 4725, 740,
            16, 740, 13, 36060, 36241, 2866, 50282,
        ],
        &[
            50281, 50276, 59, 26981, 50276, 51, 1392, 2123, 186, 395, 187, 53, 5375, 1191, 216,
            209, 49868, 49042, 211, 393, 80, 16, 209, 50282,
        ],
        &[
            50281, 328, 21002, 87, 1598, 24124, 29664, 3441, 1331, 30861, 15425, 8922, 6656, 1204,
            50282,
        ],
        &[50281, 50282],
    ];
    assert_eq!(tokenizer.encode_all(&TEXTS, &UNLIMITED).unwrap(), expected);
    assert_eq!(tokenizer.vocab_size(), 50_368);
}
