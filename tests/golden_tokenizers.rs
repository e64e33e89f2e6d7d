//! Token ids equal Hugging Face's: on the golden examples, from `tokenizer.json` and from
//! vocabulary files alike, and on the real vocabularies of BERT, GPT-2 and ModernBERT. The ids of
//! DeBERTa's `spm.model` equal sentencepiece's.
//!
//! `ALLREEL_GOLDEN` and `ALLREEL_DATA` name the two folders; without them these tests skip,
//! loudly, and under `CI=true` they fail.

use std::fs;
use std::path::{Path, PathBuf};

use allreel::data::{Cleaning, Limit, TokenSet, Tokenizer, Truncation, read};
use serde_json::Value;

use crate::support::reference;

const UNLIMITED: Limit = Limit { max_length: usize::MAX, truncation: Truncation::Head };

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Checks one tokenizer against every example of its golden folder.
fn check_examples(source: &Path, examples: &Path) {
    let tokenizer = Tokenizer::load(source).unwrap();
    let examples: Value = serde_json::from_slice(&fs::read(examples).unwrap()).unwrap();
    let max_length = examples["max_length"].as_u64().unwrap() as usize;
    let truncated = Limit { max_length, truncation: Truncation::Head };
    // All that is put around a text: as much before it as after.
    let special = tokenizer.encode_all(&[""], &UNLIMITED).unwrap()[0].len() / 2;
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
                "no_special" => &found[special..found.len() - special],
                _ => found,
            };
            assert_eq!(compared, ids(&case["ids"]), "{}: {kind}: {text:?}", source.display());
            shortened += usize::from(kind == "truncated" && found.len() == max_length);
        }
    }
    assert!(shortened > 0, "no example reaches the limit");
}

/// The golden tokenizers: each is a folder, whatever they are called.
fn golden_folders(needed: &str) -> Option<Vec<PathBuf>> {
    let root = reference("ALLREEL_GOLDEN")?.join("tokenizers");
    let entries = fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path());
    let folders: Vec<_> = entries.filter(|path| path.join(needed).exists()).collect();
    assert!(!folders.is_empty(), "no {needed} below {}", root.display());
    Some(folders)
}

#[test]
fn golden_examples_of_every_tokenizer() {
    let Some(folders) = golden_folders("examples.json") else {
        return;
    };
    for golden in folders {
        let examples = golden.join("examples.json");
        check_examples(&golden.join("tokenizer.json"), &examples);
        check_examples(&golden, &examples);
        // The vocabulary's files are copied, so that nothing else beside them is read.
        let alone = tempfile::tempdir().unwrap();
        for file in ["vocab.txt", "vocab.json", "merges.txt", "spm.model"] {
            if golden.join(file).exists() {
                fs::copy(golden.join(file), alone.path().join(file)).unwrap();
            }
        }
        check_examples(alone.path(), &examples);
        // What is saved must load as what it was.
        let saved = tempfile::tempdir().unwrap();
        Tokenizer::load(alone.path()).unwrap().save(saved.path()).unwrap();
        check_examples(saved.path(), &examples);
    }
}

/// Where two segmentations are equally likely, sentencepiece's f32 sums decide by their rounding:
/// such a text may differ, if the likelihoods do not.
#[test]
fn golden_sentencepiece_examples() {
    let Some(folders) = golden_folders("sentencepiece_examples.json") else {
        return;
    };
    for golden in folders {
        let read = |name: &str| -> Value {
            serde_json::from_slice(&fs::read(golden.join(name)).unwrap()).unwrap()
        };
        let (examples, json) = (read("sentencepiece_examples.json"), read("tokenizer.json"));
        let score = |id: &u32| json["model"]["vocab"][*id as usize][1].as_f64().unwrap();
        let tokenizer = Tokenizer::load(&golden.join("spm.model")).unwrap();
        let (mut compared, mut ties) = (0, 0);
        for case in examples["examples"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            // The library has no special tokens inside a text.
            if ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"].iter().any(|t| text.contains(t)) {
                continue;
            }
            let found = tokenizer.encode_all(&[text], &UNLIMITED).unwrap().remove(0);
            let (found, expected) = (&found[1..found.len() - 1], ids(&case["ids"]));
            compared += 1;
            if found != expected {
                ties += 1;
                let sum = |ids: &[u32]| ids.iter().map(score).sum::<f64>();
                let (found_sum, expected_sum) = (sum(found), sum(&expected));
                // One rounding for each term, each of at most the whole sum.
                let rounding = expected.len() as f64 * f64::from(f32::EPSILON) * -expected_sum;
                assert_eq!(found.len(), expected.len(), "{text:?}: {found:?}, not {expected:?}");
                assert!((found_sum - expected_sum).abs() <= rounding, "{text:?}: {found:?}");
            }
        }
        assert!(compared > 10 * ties, "{ties} ties in {compared} texts");
    }
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
    assert_eq!(tokenizer.filler(), Some(50_256));
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

/// Texts whose characters sentencepiece maps, drops, composes or spells in bytes, with the ids of
/// the library itself (0.2.3).
const MAPPED: &[(&str, &[u32])] = &[
    ("It was\u{2026}  fine", &[325, 284, 260, 260, 260, 1399]),
    ("\u{fb01}lm \u{fb02}op", &[933, 27003]),
    ("a\u{a0}b\u{3000}c", &[266, 2165, 2285]),
    ("\u{85} one\u{85}two \u{85}", &[507, 198, 137, 311, 198, 137, 8196, 507, 198, 137]),
    ("  two  spaces\u{9}and\u{a}lines  ", &[375, 3654, 263, 1728]),
    (
        "I'd give it \u{bd} a \u{2605}, \u{1f600}\u{1f44d}\u{1f3fd}!",
        &[273, 280, 407, 527, 278, 14624, 266, 35662, 261, 54783, 117545, 122786, 300],
    ),
    (
        "\u{65e5}\u{672c}\u{306e}\u{6620}\u{753b} \u{d55c}\u{ad6d}",
        &[507, 100868, 9456, 122921, 90005, 118120],
    ),
    ("Ti\u{1ebf}ng e\u{301} Vie\u{323}\u{302}t", &[11643, 101018, 948, 14287, 108809]),
    (
        "NFD \u{1112}\u{1161}\u{11ab} \u{fb01}\u{301} \u{bd}\u{fe0f}",
        &[22262, 691, 80597, 16466, 79139, 14624, 25377],
    ),
    (
        "zero\u{200b}width\u{200d}\u{feff} soft\u{ad}hyphen",
        &[3911, 6459, 2052, 198, 177, 14855, 39939],
    ),
    (
        "x\u{b2} \u{2122} \u{2167} \u{fdfa}",
        &[1204, 445, 15043, 22636, 507, 113526, 88157, 101079, 114443],
    ),
    ("\u{344}a\u{344}", &[34198, 79139, 452, 125092, 79139]),
    ("", &[]),
    ("   \u{9}", &[]),
    ("\u{0}\u{1} \u{7f}", &[507, 4]),
    ("<br /><br />10/10", &[2569, 8981, 840, 1504, 4052, 8981, 840, 1504, 894, 320, 894]),
];

#[test]
fn golden_real_deberta_v3() {
    let Some(root) = reference("ALLREEL_DATA") else {
        return;
    };
    let tokenizer = Tokenizer::load(&root.join("tokenizers/deberta-v3")).unwrap();
    for (text, expected) in MAPPED {
        let found = tokenizer.encode_all(&[text], &UNLIMITED).unwrap().remove(0);
        assert_eq!(found, [&[1], *expected, &[2]].concat(), "{text:?}");
    }
    let inside = tokenizer.encode_all(&["a [MASK] film"], &UNLIMITED).unwrap();
    assert_eq!(inside, [[1, 266, 128_000, 933, 2]]);
    assert_eq!(tokenizer.vocab_size(), 128_001);
    // sentencepiece's ids of the first reviews, 1 before and 2 after each, as little-endian bytes.
    let reviews = read::read(&root.join("imdb/labeledTrainData.tsv.gz")).unwrap();
    let set = TokenSet::build(&reviews[..2000], Cleaning::None, &tokenizer, &UNLIMITED).unwrap();
    assert_eq!(set.tokens.len(), 608_025 + 2 * 2000);
    let bytes: Vec<u8> = set.tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
    let digest = "9f0f98271bcf5aa3e9f9d9b718bd724324e09bb635c293e34e8d1918c81cde7f";
    assert_eq!(blake3::hash(&bytes).to_hex().as_str(), digest);
}
