//! Tokenizers on small vocabularies; equality with Hugging Face is in `tests/golden_tokenizers.rs`.

use std::fs;

use super::*;
use crate::data::fixtures::{file, real_data};
use crate::data::{Cleaning, Review, TokenSet, read, synthetic, words};

fn head(max_length: usize) -> Limit {
    Limit { max_length, truncation: Truncation::Head }
}

fn synthetic_texts(count: usize) -> Vec<String> {
    synthetic::reviews(count, 1).into_iter().map(|r| r.text).collect()
}

const VOCAB: &str = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfilm\nFilm\n##s\ngood\n";

#[test]
fn training_twice_gives_the_same_tokenizer() {
    let texts = synthetic_texts(150);
    // Many sizes: an unstable trainer shows where the vocabulary ends between two equally
    // frequent merges.
    for size in (140..340).step_by(10) {
        let once = Tokenizer::train_wordpiece(&texts, size).unwrap();
        let again = Tokenizer::train_wordpiece(&texts, size).unwrap();
        let json = |tokenizer: &Tokenizer| tokenizer.inner.to_string(false).unwrap();
        assert_eq!(json(&once), json(&again), "vocabulary of {size}");
        assert_eq!(once.fingerprint(), again.fingerprint());
        assert_eq!(once.vocab_size(), size);
    }
    let trained = Tokenizer::train_wordpiece(&texts, 8192).unwrap();
    let ids = trained.encode_all(&["The plot was NOT dull!", ""], &head(64)).unwrap();
    assert_eq!((ids[0][0], *ids[0].last().unwrap()), (2, 3));
    assert!(ids[0].len() > 6 && !ids[0][1..6].contains(&1), "{ids:?}");
    assert_eq!(ids[1], [2, 3]);
    assert!(trained.inner.token_to_id("wonderful").is_some());
}

#[test]
fn a_vocabulary_too_small_for_its_characters_is_refused() {
    let error = Tokenizer::train_wordpiece(&["abc ab".to_owned()], 10).unwrap_err().to_string();
    assert!(error.contains("use at least 11"), "{error}");
    assert_eq!(Tokenizer::train_wordpiece(&["abc ab".to_owned()], 11).unwrap().vocab_size(), 11);
}

#[test]
fn saved_tokenizers_load_and_encode_alike() {
    let texts = synthetic_texts(200);
    let trained = Tokenizer::train_wordpiece(&texts, 400).unwrap();
    let dir = tempfile::tempdir().unwrap();
    trained.save(dir.path()).unwrap();
    let loaded = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(loaded.fingerprint(), trained.fingerprint());
    let limit = head(40);
    assert_eq!(
        loaded.encode_all(&texts, &limit).unwrap(),
        trained.encode_all(&texts, &limit).unwrap()
    );
    let config = read_object(&dir.path().join("tokenizer_config.json")).unwrap();
    assert_eq!(config["cls_token"], "[CLS]");
    assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast");
    assert_eq!(loaded.config, config);
}

#[test]
fn saved_padding_and_truncation_are_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let plain = Tokenizer::load(&file(&dir, "vocab.txt", VOCAB)).unwrap();
    let mut json: Value = serde_json::from_str(&plain.inner.to_string(false).unwrap()).unwrap();
    json["padding"] = serde_json::json!({
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"
    });
    json["truncation"] = serde_json::json!({
        "direction": "Left", "max_length": 3, "strategy": "LongestFirst", "stride": 0
    });
    let padded = Tokenizer::load(&file(&dir, "tokenizer.json", json.to_string())).unwrap();
    assert_eq!(padded.encode_all(&["film good"], &head(8)).unwrap(), [[2, 5, 8, 3]]);
    assert_eq!(padded.fingerprint(), plain.fingerprint());
}

#[test]
fn case_comes_from_the_config_beside_the_vocabulary() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "vocab.txt", VOCAB);
    let ids = |path| Tokenizer::load(path).unwrap().encode_all(&["Films"], &head(8)).unwrap();
    assert_eq!(ids(&path), [[2, 5, 7, 3]]);
    file(&dir, "tokenizer_config.json", "{\"do_lower_case\": false}");
    assert_eq!(ids(dir.path()), [[2, 6, 7, 3]]);
    file(&dir, "tokenizer_config.json", "[]");
    let error = Tokenizer::load(&path).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json is not a JSON object"), "{error}");
}

#[test]
fn the_files_beside_a_vocabulary_name_its_special_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let vocabulary =
        r#"{"<s>": 0, "<pad>": 1, "</s>": 2, "<mask>": 3, "a": 4, "\u0120": 5, "<c>": 6}"#;
    let path = file(&dir, "vocab.json", vocabulary);
    file(&dir, "merges.txt", "#version: 0.2\n");
    let encode = |text: &str| {
        let tokenizer = Tokenizer::load(&path).unwrap();
        tokenizer.encode_all(&[text], &head(16)).unwrap().remove(0)
    };
    assert_eq!(encode("a <mask>a"), [0, 4, 5, 3, 4, 2]);
    let special = r#"{"cls_token": "<c>", "mask_token": {"content": "<mask>", "lstrip": true}}"#;
    file(&dir, "special_tokens_map.json", special);
    assert_eq!(encode("a <mask>a"), [6, 4, 3, 4, 2]);
    file(&dir, "added_tokens.json", "{\"<new>\": 7}");
    assert_eq!(encode("a<new><s>"), [6, 4, 7, 0, 2]);
    // The config wins over the map.
    let config = r#"{"cls_token": "<s>", "add_prefix_space": true,
        "added_tokens_decoder": {"3": {"content": "<mask>", "rstrip": true, "special": true}}}"#;
    file(&dir, "tokenizer_config.json", config);
    assert_eq!(encode("a <mask> a"), [0, 5, 4, 5, 3, 5, 4, 2]);
    Tokenizer::load(&path).unwrap().save(dir.path()).unwrap();
    let saved = read_object(&dir.path().join("tokenizer_config.json")).unwrap();
    assert_eq!((&saved["cls_token"], &saved["pad_token"]), (&"<s>".into(), &"<pad>".into()));
    assert_eq!(saved["mask_token"], "<mask>");
    file(&dir, "added_tokens.json", "{\"<new>\": 9}");
    let error = Tokenizer::load(&path).unwrap_err().to_string();
    assert!(error.contains("\"<new>\" the id 9, but it comes out as 7"), "{error}");
    file(&dir, "added_tokens.json", "{\"<new>\": \"7\"}");
    let error = Tokenizer::load(&path).unwrap_err().to_string();
    assert!(error.contains("added_tokens.json: token \"<new>\" has the id \"7\""), "{error}");
}

#[test]
fn a_text_without_tokens_has_a_filler_where_nothing_is_put_around_it() {
    let dir = tempfile::tempdir().unwrap();
    file(&dir, "merges.txt", "");
    let filler =
        |vocabulary: &str| Tokenizer::load(&file(&dir, "vocab.json", vocabulary)).unwrap().filler();
    assert_eq!(filler(r#"{"a": 0, "<|endoftext|>": 1}"#), Some(1));
    assert_eq!(filler(r#"{"a": 0, "<pad>": 1}"#), Some(1));
    assert_eq!(filler(r#"{"a": 0}"#), None);
    assert_eq!(filler(r#"{"<s>": 0, "</s>": 1, "<|endoftext|>": 2}"#), None);
}

#[test]
fn truncation_keeps_the_special_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::load(&file(&dir, "vocab.txt", VOCAB)).unwrap();
    let text = "film Good films good film good";
    let encode = |max_length, truncation| {
        tokenizer.encode_all(&[text], &Limit { max_length, truncation }).unwrap().remove(0)
    };
    let whole = [2, 5, 8, 5, 7, 8, 5, 8, 3];
    for truncation in [Truncation::Head, Truncation::HeadTail] {
        assert_eq!(encode(9, truncation), whole);
    }
    assert_eq!(encode(8, Truncation::Head), [2, 5, 8, 5, 7, 8, 5, 3]);
    assert_eq!(encode(8, Truncation::HeadTail), [2, 5, 8, 7, 8, 5, 8, 3]);
    assert_eq!(encode(3, Truncation::Head), [2, 5, 3]);
    assert_eq!(encode(3, Truncation::HeadTail), [2, 8, 3]);
    let ids: Vec<u32> = (0..1000).collect();
    let (head, tail) = kept(&ids, 510, Truncation::HeadTail);
    assert_eq!((head.len(), tail.len(), tail[381]), (128, 382, 999));
    let error = tokenizer
        .encode_all(&[text], &super::Limit { max_length: 2, truncation: Truncation::Head });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("data.max_length = 2") && error.contains("at least 3"), "{error}");
}

#[test]
fn truncation_is_named_as_in_the_config() {
    let name = |t: Truncation| serde_json::to_string(&t).unwrap();
    assert_eq!(
        (name(Truncation::Head), name(Truncation::HeadTail)),
        ("\"head\"".into(), "\"head+tail\"".into())
    );
}

#[test]
fn a_text_used_twice_by_the_post_processor_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let plain = Tokenizer::load(&file(&dir, "vocab.txt", VOCAB)).unwrap();
    let mut json: Value = serde_json::from_str(&plain.inner.to_string(false).unwrap()).unwrap();
    let single = json["post_processor"]["single"].as_array_mut().unwrap();
    single.push(serde_json::json!({"Sequence": {"id": "A", "type_id": 0}}));
    let error = Tokenizer::load(&file(&dir, "tokenizer.json", json.to_string())).unwrap_err();
    assert!(error.to_string().contains("post-processor"), "{error}");
}

#[test]
fn broken_and_missing_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = |path: &Path| Tokenizer::load(path).unwrap_err().to_string();
    assert!(error(&dir.path().join("gone.json")).contains("gone.json does not exist"));
    assert!(error(dir.path()).contains("holds no tokenizer"));
    file(&dir, "spiece.model", "x");
    assert!(error(dir.path()).contains("holds only spiece.model, which is not read"));
    assert!(error(&file(&dir, "tokenizer.bin", "x")).contains("is no tokenizer file"));
    assert!(
        error(&file(&dir, "v.txt", "[UNK]\n[CLS]\nfilm\n")).contains("v.txt has no line [SEP]")
    );
    assert!(error(&file(&dir, "tokenizer.json", "{\"model\": ")).contains("not a JSON object"));
    assert!(error(&file(&dir, "tokenizer.json", "{}")).contains("holds no tokenizer"));
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    file(&dir, "vocab.json", "{\"a\": 0, \"b\": 1, \"ab\": 2}");
    assert!(error(dir.path()).contains("merges.txt"));
    file(&dir, "merges.txt", "#version: 0.2\na b\na c\n");
    let message = error(dir.path());
    assert!(message.contains("merges.txt, line 3: \"a c\" needs \"c\""), "{message}");
    file(&dir, "merges.txt", "a b\nab\n");
    assert!(error(dir.path()).contains("line 2: \"ab\" is not two tokens"));
    file(&dir, "vocab.json", "{\"a\": 0, \"b\": -1}");
    assert!(error(dir.path()).contains("token \"b\" has the id -1"));
}

#[test]
fn a_padded_tokenizer_fills_up_to_the_limit_and_is_another_one() {
    let plain = Tokenizer::train_wordpiece(&["good bad film".to_owned()], 40).unwrap();
    let before = plain.fingerprint();
    let ids = plain.encode_all(&["good"], &head(9)).unwrap().remove(0);
    let padded = plain.padded().unwrap();
    let filled = padded.encode_all(&["good"], &head(9)).unwrap().remove(0);
    assert_eq!((&filled[..ids.len()], filled.len()), (&ids[..], 9));
    assert!(filled[ids.len()..].iter().all(|id| *id == 0), "[PAD] is 0: {filled:?}");
    assert_ne!(padded.fingerprint(), before, "it makes other tokens, which the cache must know");
}

#[test]
fn words_have_ids_by_frequency_and_the_rest_is_unknown() {
    let texts = ["a b, a!", "A c don\u{2019}t b", "don't once"].map(str::to_owned);
    let tokenizer = Tokenizer::train_words(&texts, 2, None).unwrap();
    let entries: Vec<String> =
        tokenizer.entries().into_iter().map(|(token, id)| format!("{id} {token}")).collect();
    assert_eq!(entries, ["0 [PAD]", "1 [UNK]", "2 a", "3 b", "4 don't"]);
    assert_eq!(
        (tokenizer.pad_id(), tokenizer.filler(), tokenizer.vocab_size()),
        (Some(0), Some(1), 5)
    );
    let review = |text: &str| Review { id: "1".into(), text: text.into(), label: None };
    let reviews = ["A DON'T, b", "once more!", "", "<br />"].map(review);
    let set = TokenSet::build(&reviews, Cleaning::Html, &tokenizer, &head(5)).unwrap();
    let sequences: Vec<&[u32]> = (0..4).map(|i| set.sequence(i)).collect();
    assert_eq!(sequences, [&[2, 4, 1, 3][..], &[1, 1, 1], &[1], &[1]]);
    let all = Tokenizer::train_words(&texts, 1, None).unwrap();
    assert_eq!(all.vocab_size(), 2 + 7, "a b don't ! , c once");
    let capped = Tokenizer::train_words(&texts, 1, Some(4)).unwrap();
    let tokens: Vec<String> = capped.entries().into_iter().map(|(token, _)| token).collect();
    assert_eq!(tokens, ["[PAD]", "[UNK]", "a", "b"]);
    let error = Tokenizer::train_words(&texts, 9, None).unwrap_err().to_string();
    assert!(error.starts_with("data.min_count = 9: no word"), "{error}");
    let error = Tokenizer::train_words(&texts, 2, Some(2)).unwrap_err().to_string();
    assert!(error.starts_with("model.vocab_size = 2 leaves no room"), "{error}");
}

#[test]
fn saved_words_load_and_encode_alike() {
    let texts = synthetic_texts(200);
    let trained = Tokenizer::train_words(&texts, 2, None).unwrap();
    let again = Tokenizer::train_words(&texts, 2, None).unwrap();
    assert_eq!(trained.fingerprint(), again.fingerprint());
    let dir = tempfile::tempdir().unwrap();
    trained.save(dir.path()).unwrap();
    let loaded = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(loaded.fingerprint(), trained.fingerprint());
    assert_eq!((loaded.filler(), loaded.pad_id()), (Some(1), Some(0)));
    let limit = head(40);
    assert_eq!(
        loaded.encode_all(&texts, &limit).unwrap(),
        trained.encode_all(&texts, &limit).unwrap()
    );
}

/// What `words::split` counts is what the crate's regular expression finds.
#[test]
fn words_are_the_same_to_the_counter_and_to_the_tokenizer() {
    let mut texts: Vec<String> = synthetic_texts(20);
    texts.push(
        "o'neil's ''x'' _a_ 3\u{bd}\u{301}e\u{301} \u{130} \u{2019}T \u{e01}\u{e33}\u{e01}\u{85}z"
            .into(),
    );
    if let Some(root) = real_data("words_are_the_same_to_the_counter_and_to_the_tokenizer") {
        let reviews = read::read(&root.join("imdb/unlabeledTrainData.tsv.gz")).unwrap();
        let some = reviews.iter().step_by(25);
        texts.extend(some.map(|review| Cleaning::Html.clean(&review.text).into_owned()));
    }
    let tokenizer = Tokenizer::train_words(&texts, 1, None).unwrap();
    let ids = tokenizer.encode_all(&texts, &head(1_000_000)).unwrap();
    let entries = tokenizer.entries();
    for (text, ids) in texts.iter().zip(ids) {
        let lower = words::lower(text);
        let counted: Vec<&str> = words::split(&lower).collect();
        let found: Vec<&str> = ids.iter().map(|id| entries[*id as usize].0.as_str()).collect();
        assert_eq!(found, counted);
    }
}
