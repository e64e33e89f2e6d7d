//! Tokenizers on small vocabularies; equality with Hugging Face is in `tests/golden_tokenizers.rs`.

use std::fs;

use super::*;
use crate::data::fixtures::file;
use crate::data::synthetic;

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
    file(&dir, "spm.model", "x");
    assert!(error(dir.path()).contains("holds only spm.model"));
    assert!(error(&dir.path().join("spm.model")).contains("is no tokenizer file"));
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
