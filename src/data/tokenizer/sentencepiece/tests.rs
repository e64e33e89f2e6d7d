//! `spm.model` files of a few pieces, made here; the real one is in `tests/golden_tokenizers.rs`.

use std::path::PathBuf;

use super::*;
use crate::data::fixtures::file;
use crate::data::{Limit, Tokenizer, Truncation};

const LIMIT: Limit = Limit { max_length: 64, truncation: Truncation::Head };

/// A character map in sentencepiece's format.
fn charsmap(rules: &[(&str, &str)]) -> Vec<u8> {
    // Every node that has children owns 256 units, so that none can collide.
    let mut units = vec![0u32; 256];
    let mut replacements = String::new();
    for (key, replacement) in rules {
        let mut node = 0;
        for byte in key.bytes() {
            let base = children(&mut units, node);
            node = base ^ usize::from(byte);
            units[node] |= u32::from(byte);
        }
        let leaf = children(&mut units, node);
        units[node] |= 1 << 8;
        units[leaf] = 1 << 31 | replacements.len() as u32;
        replacements.push_str(replacement);
        replacements.push('\0');
    }
    let trie: Vec<u8> = units.iter().flat_map(|unit| unit.to_le_bytes()).collect();
    [&(trie.len() as u32).to_le_bytes(), trie.as_slice(), replacements.as_bytes()].concat()
}

/// Where the children of `node` begin; makes room for them first.
fn children(units: &mut Vec<u32>, node: usize) -> usize {
    if units[node] >> 10 == 0 {
        units[node] |= ((units.len() ^ node) as u32) << 10;
        units.resize(units.len() + 256, 0);
    }
    (units[node] >> 10) as usize ^ node
}

fn model() -> ModelProto {
    let special = [("[PAD]", 3), ("[CLS]", 3), ("[SEP]", 3), ("[UNK]", 2)];
    let normal = ["▁", "a", "b", "▁ab", "...", "fi", "á", "ấ", "\u{301}", "A", ",", "▁a"];
    let special = special.map(|(piece, kind)| (piece, 0.0, Some(kind)));
    let normal = normal.iter().enumerate().map(|(i, piece)| (*piece, -1.0 - 0.1 * i as f32, None));
    let pieces = special.into_iter().chain(normal).map(|(piece, score, kind)| Piece {
        piece: Some(piece.to_owned()),
        score: Some(score),
        kind,
    });
    let rules = [
        ("\u{a0}", " "),
        ("…", "..."),
        ("ﬁ", "fi"),
        ("\u{1}", ""),
        ("a\u{301}", "á"),
        ("a\u{301}\u{302}", "ấ"),
    ];
    ModelProto {
        pieces: pieces.collect(),
        trainer: Some(Trainer { algorithm: Some(1), ..Trainer::default() }),
        normalizer: Some(Normalizer { charsmap: Some(charsmap(&rules)), ..Normalizer::default() }),
    }
}

fn write(dir: &tempfile::TempDir, model: &ModelProto) -> PathBuf {
    file(dir, "spm.model", model.encode_to_vec())
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let all = tokenizer.encode_all(&[text], &LIMIT).unwrap().remove(0);
    assert_eq!((all[0], all[all.len() - 1]), (1, 2), "{text:?}");
    all[1..all.len() - 1].to_vec()
}

/// Each line is checked as loaded and as saved and loaded again.
#[test]
fn the_character_map_is_applied_as_sentencepiece_does() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::load(&write(&dir, &model())).unwrap();
    let saved = tempfile::tempdir().unwrap();
    tokenizer.save(saved.path()).unwrap();
    assert!(!saved.path().join("spm.model").exists());
    let again = Tokenizer::load(saved.path()).unwrap();
    assert_eq!(again.fingerprint(), tokenizer.fingerprint());
    for (text, expected) in [
        ("ab", &[7][..]),
        ("\u{a0} ab\u{1}  \u{a0}\u{1} ab \u{a0}", &[7, 7]),
        ("ab…", &[7, 8]),
        // The map's longest match, "ấ", not the "á" that is within it.
        ("ba\u{301}\u{302}", &[4, 6, 11]),
        ("ba\u{301}b", &[4, 6, 10, 6]),
        // One grapheme of which the map takes the first character: the mark stays.
        ("bﬁ\u{301}", &[4, 6, 9, 12]),
        ("A", &[4, 13]),
        ("b?", &[4, 6, 3]),
        ("a [MASK]\u{a0} ab[SEP]", &[15, 16, 7, 2]),
        ("", &[]),
        (" \u{a0}\u{1} ", &[]),
    ] {
        assert_eq!(ids(&tokenizer, text), expected, "{text:?}");
        assert_eq!(ids(&again, text), expected, "saved: {text:?}");
    }
    assert_eq!(tokenizer.vocab_size(), 17);
}

#[test]
fn the_settings_inside_and_beside_the_file_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(&dir, &model());
    let load = || Tokenizer::load(&path).unwrap();
    assert_eq!(ids(&load(), "A a,b"), [4, 13, 15, 14, 6]);
    file(&dir, "tokenizer_config.json", "{\"do_lower_case\": true, \"split_by_punct\": true}");
    assert_eq!(ids(&load(), "A a,b"), [15, 15, 4, 14, 4, 6]);
    file(&dir, "tokenizer_config.json", "{}");
    let mut plain = model();
    plain.normalizer = Some(Normalizer {
        add_dummy_prefix: Some(false),
        remove_extra_whitespaces: Some(false),
        ..Normalizer::default()
    });
    write(&dir, &plain);
    assert_eq!(ids(&load(), "b  ab "), [6, 4, 7, 4]);
    // Unknown characters as their bytes: "é" is C3 A9.
    let mut bytes = model();
    bytes.trainer.as_mut().unwrap().byte_fallback = Some(true);
    bytes.pieces.extend((0..256).map(|byte| Piece {
        piece: Some(format!("<0x{byte:02X}>")),
        score: Some(0.0),
        kind: Some(Kind::Byte as i32),
    }));
    write(&dir, &bytes);
    assert_eq!(ids(&load(), "bé"), [4, 6, 16 + 0xc3, 16 + 0xa9]);
    assert_eq!(ids(&load(), "[MASK]"), [272]);
    file(&dir, "added_tokens.json", "{\"[MASK]\": 300}");
    let error = Tokenizer::load(&path).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("give \"[MASK]\" the id 300, but it comes out as 272"));
}

#[test]
fn what_is_not_debertas_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |change: &dyn Fn(&mut ModelProto), expected: &str| {
        let mut changed = model();
        change(&mut changed);
        let error = Tokenizer::load(&write(&dir, &changed)).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let message = error.to_string();
        assert!(message.contains("spm.model") && message.contains(expected), "{message}");
    };
    let bpe = |m: &mut ModelProto| m.trainer.as_mut().unwrap().algorithm = Some(2);
    refused(&bpe, "is a Bpe model; only DeBERTa's are read");
    let suffix = |m: &mut ModelProto| m.trainer.as_mut().unwrap().whitespace_as_suffix = Some(true);
    refused(&suffix, "marks spaces in another way");
    refused(&|m| m.pieces[5].kind = Some(4), "has the UserDefined piece \"a\"");
    refused(&|m| m.pieces[6].score = Some(f32::NAN), "gives \"b\" the score NaN");
    refused(&|m| m.pieces[1].piece = Some("<s>".into()), "has no piece [CLS]");
    refused(&|m| m.pieces[3].kind = None, "has 0 pieces for the unknown");
    refused(&|m| m.pieces.clear(), "has no piece [CLS]");
    let map = |m: &mut ModelProto, bytes: &[u8]| {
        m.normalizer.as_mut().unwrap().charsmap = Some(bytes.to_vec());
    };
    for bytes in [&[1][..], &[8, 0, 0, 0, 1], &[0, 0, 0, 0, 0], &[4, 0, 0, 0, 0, 0, 0, 0, b'x']] {
        refused(&|m| map(m, bytes), "its character map is damaged");
    }
}

/// Every beginning of a file is refused; a file with one bit turned is refused or encodes
/// something, without a panic.
#[test]
fn damaged_files_are_one_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut small = model();
    small.normalizer.as_mut().unwrap().charsmap = Some(charsmap(&[("…", "...")]));
    let whole = small.encode_to_vec();
    let load = |bytes: &[u8]| Tokenizer::load(&file(&dir, "spm.model", bytes));
    load(&whole).unwrap();
    let ends = (0..400).chain((400..whole.len()).step_by(97)).chain([whole.len() - 1]);
    for end in ends {
        let error = load(&whole[..end]).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let message = error.to_string();
        assert!(message.contains("spm.model is damaged") && message.contains("fetch it again"));
    }
    let mut refused = 0;
    for at in 0..400 {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        match load(&damaged) {
            Ok(tokenizer) => _ = tokenizer.encode_all(&["ab… [MASK]é"], &LIMIT).unwrap(),
            Err(error) => refused += usize::from(error.exit_code() == 2),
        }
    }
    assert!(refused > 0);
}

#[test]
fn a_damaged_map_in_a_tokenizer_json_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    Tokenizer::load(&write(&dir, &model())).unwrap().save(dir.path()).unwrap();
    let path = dir.path().join("tokenizer.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    json["normalizer"]["normalizers"][1]["precompiled_charsmap"] = "AAAA".into();
    fs::write(&path, json.to_string()).unwrap();
    let error = Tokenizer::load(&path).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("its character map is damaged"), "{error}");
}
