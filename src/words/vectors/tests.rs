//! Each format, packed and plain, what is said about damaged ones, and the table made of one.

mod pickles;

use std::{
    fs,
    io::{Cursor, Write},
    path::PathBuf,
};

use base64::{Engine, engine::general_purpose::STANDARD};

use super::*;

const TEXT: &str = "the 0.5 -1\nfilm\t1e-2 2\n. . 3 4\n";

fn file(dir: &tempfile::TempDir, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zip(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = ::zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in members {
        archive.start_file(*name, ::zip::write::SimpleFileOptions::default()).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

fn binary(rows: &[(&str, [f32; 2])], end: &[u8]) -> Vec<u8> {
    let mut bytes = format!("{} 2\n", rows.len()).into_bytes();
    for (word, row) in rows {
        bytes.extend(format!("{word} ").bytes());
        row.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
        bytes.extend(end);
    }
    bytes
}

/// The rows in the order of their words.
fn rows(path: &Path) -> Vec<(String, Vec<f32>)> {
    let vectors = read(path, |word| word != "unwanted").unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(vectors.dimensions, 2);
    let mut rows: Vec<_> = vectors.rows.into_iter().collect();
    rows.sort_by(|a, b| a.0.cmp(&b.0));
    rows
}

fn refusal(path: &Path) -> String {
    let error = read(path, |word| word != "unwanted").unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    let message = error.to_string();
    assert_eq!(message.lines().count(), 1, "{message}");
    message
}

#[test]
fn text_has_a_header_or_not_and_may_be_packed() {
    let dir = tempfile::tempdir().unwrap();
    let want: Vec<_> = [(". .", [3.0, 4.0]), ("film", [0.01, 2.0]), ("the", [0.5, -1.0])]
        .map(|(word, row)| (word.to_owned(), row.to_vec()))
        .into();
    let headed = format!("3 2\n{TEXT}");
    let windows = headed.replace('\n', " \r\n");
    let packed = zip(&[("inner.txt", TEXT.as_bytes())]);
    let several = zip(&[("a/x.txt", b"no".as_slice()), ("a/y.txt", headed.as_bytes())]);
    for (name, bytes) in [
        ("glove.txt", TEXT.as_bytes().to_vec()),
        ("word2vec.txt", headed.clone().into_bytes()),
        ("windows.vec", windows.into_bytes()),
        ("none", TEXT.trim_end().into()),
        ("twice.txt", format!("{TEXT}film 7 7\n\nunwanted x nan\n").into_bytes()),
        ("glove.txt.gz", gzip(TEXT.as_bytes())),
        ("packed.ZIP", packed),
    ] {
        assert_eq!(rows(&file(&dir, name, bytes)), want, "{name}");
    }
    let several = file(&dir, "several.zip", several).display().to_string();
    assert_eq!(rows(Path::new(&format!("{several}#a/y.txt"))), want);
    let message = refusal(Path::new(&several));
    assert!(message.contains("several.zip: it holds 2 files; name one of them"), "{message}");
    assert!(message.contains("several.zip#a/x.txt (there are: a/x.txt, a/y.txt)"), "{message}");
    let message = refusal(Path::new(&format!("{several}#b.txt")));
    assert!(message.contains("it holds no b.txt"), "{message}");
}

#[test]
fn malformed_text_names_its_line_and_value() {
    let dir = tempfile::tempdir().unwrap();
    for (text, said) in [
        ("a 1 2\nb 1\n", "v.txt, line 2: 1 numbers behind the word where 2 are expected"),
        ("a 1 2\nb 1 2 3\n", "v.txt, line 2: 3 numbers behind the word where 2 are expected"),
        ("a 1 2\nunwanted 1\n", "line 2: 1 numbers"),
        ("a 1 2\nb 1 x2\n", "line 2: \"x2\" (number 2) is not a finite number; correct it"),
        ("1 2\na nan 2\n", "line 2: \"nan\" (number 1) is not a finite number"),
        ("a 1 2\nb 1 1e99\n", "line 2: \"1e99\" (number 2) is not"),
        ("a\nb\n", "line 1: there is no number behind the word"),
        ("3 2\na 1 2\nb 1 2\n", "v.txt: line 1 promises 3 words, but 2 follow; fetch"),
        ("", "v.txt: it is empty"),
    ] {
        let message = refusal(&file(&dir, "v.txt", text));
        assert!(message.contains(said), "{text:?}: {message}");
    }
    let whole = gzip(TEXT.repeat(100).as_bytes());
    let message = refusal(&file(&dir, "cut.txt.gz", &whole[..whole.len() - 9]));
    assert!(message.contains("cut.txt.gz: ") && message.contains("again"), "{message}");
    let message = refusal(&file(&dir, "no.zip", "x"));
    assert!(message.contains("no.zip: broken zip archive"), "{message}");
    assert!(refusal(&dir.path().join("gone.txt")).contains("gone.txt does not exist"));
    assert!(refusal(dir.path()).contains("is a directory; name a file"));
}

#[test]
fn binary_is_read_with_and_without_line_breaks() {
    let dir = tempfile::tempdir().unwrap();
    let entries =
        [("the", [0.5, -1.0]), ("unwanted", [f32::NAN, 0.0]), ("d\u{e9}j\u{e0}", [1.0, 2.0])];
    let want =
        vec![("d\u{e9}j\u{e0}".to_owned(), vec![1.0, 2.0]), ("the".to_owned(), vec![0.5, -1.0])];
    let ended = binary(&entries, b"\n");
    let bare = binary(&entries, b"");
    assert_eq!(rows(&file(&dir, "a.bin", &ended)), want);
    assert_eq!(rows(&file(&dir, "b.bin", &bare)), want);
    assert_eq!(rows(&file(&dir, "c.bin.gz", gzip(&bare))), want);
    for (bytes, said) in [
        (
            bare[..bare.len() - 3].to_vec(),
            "x.bin, word 3 of 3: its vector (\"d\u{e9}j\u{e0}\") breaks off",
        ),
        (bare[..22].to_vec(), "word 2: there is no word with a space behind it"),
        ([&bare[..], b"more"].concat(), "x.bin: more follows the 3 words that line 1 promises"),
        (binary(&[("a", [0.0, f32::INFINITY])], b""), "word 1 of 1: number 2 of \"a\" is inf"),
        (
            b"the 1 2\n".to_vec(),
            "line 1: \"the 1 2\" is not two numbers, of words and of dimensions",
        ),
    ] {
        let message = refusal(&file(&dir, "x.bin", bytes));
        assert!(message.contains(said), "{message}");
    }
}

#[test]
fn the_students_pickle_is_read_in_every_form() {
    let dir = tempfile::tempdir().unwrap();
    let decode = |text: &str| STANDARD.decode(text).unwrap();
    let want = vec![("Good".to_owned(), vec![0.5, -1.0]), ("film".to_owned(), vec![0.25, 2.0])];
    for (name, text) in [
        ("numpy 2", pickles::NUMPY_2),
        ("numpy 3", pickles::NUMPY_3),
        ("numpy 4, f64 by columns", pickles::NUMPY_4_F8_COLUMNS),
        ("numpy 5", pickles::NUMPY_5),
        ("torch 3", pickles::TORCH_3),
        ("torch, a view", pickles::TORCH_VIEW),
    ] {
        let path = file(&dir, "imdb_glove.pickle3", decode(text));
        assert_eq!(rows(&path), want, "{name}: rows of zeros are words without a vector");
    }
    let whole = decode(pickles::NUMPY_3);
    for (bytes, said) in [
        (
            decode(pickles::TORCH_TRANSPOSED),
            "x.pkl: weight is a PyTorch tensor that is no contiguous",
        ),
        (whole[..200].to_vec(), "x.pkl: value weight of train_X, train_y"),
        (b"\x80\x03]K\x01a.".to_vec(), "x.pkl: it holds one value, which is no list of train_X"),
        (b"\x80\x03\xff".to_vec(), "opcode 0xff is not one of protocols 2 to 5"),
        (b"(I1\n.".to_vec(), "opcode 0x49"),
        (b"a.".to_vec(), "it takes more values than it has"),
        (b"B\xff\xff\xff\xffx".to_vec(), "4294967295 bytes announced, 1 there"),
    ] {
        let message = refusal(&file(&dir, "x.pkl", bytes));
        assert!(message.contains(said), "{message}");
    }
    let nan: Vec<u8> = whole
        .windows(4)
        .position(|bytes| bytes == 0.25f32.to_le_bytes())
        .map(|at| [&whole[..at], &f32::NAN.to_le_bytes(), &whole[at + 4..]].concat())
        .unwrap();
    let message = refusal(&file(&dir, "x.pkl", nan));
    assert!(message.contains("weight: the vector of \"film\" holds NaN"), "{message}");
}

#[test]
fn a_table_has_a_row_for_every_token() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let words: Vec<String> = (0..500).map(|i| format!("known{i:03}")).collect();
    let absent: Vec<String> = (0..2000).map(|i| format!("absent{i:04}")).collect();
    let text = [&words[..], &absent[..]].concat().join(" ");
    let tokenizer = Tokenizer::train_words(&[text], 1, None)?;
    let lines: Vec<String> = words
        .iter()
        .enumerate()
        .map(|(i, word)| format!("{word} {} 7 {}", (i % 2) * 2, i as f64 / 100.0))
        .collect();
    let path = file(&dir, "v.txt", lines.join("\n"));
    let made = table(&path, &tokenizer, 1)?;
    assert_eq!((made.found, made.words), (500, 2501), "[UNK] is one of them, [PAD] is none");
    let rows = made.values.to_vec2::<f32>()?;
    assert_eq!((rows.len(), rows[0].len()), (2502, 3));
    assert_eq!(rows[0], [0.0; 3]);
    for (token, id) in tokenizer.entries() {
        if let Some(i) = words.iter().position(|word| *word == token) {
            assert_eq!(rows[id as usize], [(i % 2 * 2) as f32, 7.0, (i as f64 / 100.0) as f32]);
        }
    }
    let unknown: Vec<&Vec<f32>> = tokenizer
        .entries()
        .iter()
        .filter(|(token, _)| token.starts_with("absent") || token == "[UNK]")
        .map(|(_, id)| &rows[*id as usize])
        .collect();
    // Means within four of their own deviations, of 2,001 values: 1 +- 4 / sqrt(2001), and so on.
    let mean =
        |column: usize| unknown.iter().map(|row| f64::from(row[column])).sum::<f64>() / 2001.0;
    assert!(
        (mean(0) - 1.0).abs() < 0.09 && (mean(2) - 2.495).abs() < 0.13,
        "{} {}",
        mean(0),
        mean(2)
    );
    assert!(unknown.iter().all(|row| row[1] == 7.0), "a column that does not vary");
    let variance = unknown.iter().map(|row| f64::from(row[0] - 1.0).powi(2)).sum::<f64>() / 2001.0;
    // The deviation of a variance of n normal values is sqrt(2 / n).
    assert!((variance - 1.0).abs() < 0.13, "{variance}");
    assert_eq!(table(&path, &tokenizer, 1)?.values.to_vec2::<f32>()?, rows);
    assert_ne!(table(&path, &tokenizer, 2)?.values.to_vec2::<f32>()?, rows);
    Ok(())
}

#[test]
fn a_token_is_looked_up_as_it_is_then_in_lower_case() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let json = r#"{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel",
        "vocab": {"[UNK]": 0, "Good": 1, "good": 2, "Film": 3}, "unk_token": "[UNK]"}}"#;
    let tokenizer = Tokenizer::load(&file(&dir, "tokenizer.json", json))?;
    let path = file(&dir, "v.txt", "Good 1 1\nfilm 3 3\ngood 2 2\n");
    let made = table(&path, &tokenizer, 1)?;
    let rows = made.values.to_vec2::<f32>()?;
    assert_eq!((made.found, &rows[1..]), (3, &[vec![1., 1.], vec![2., 2.], vec![3., 3.]][..]));
    let error = table(&file(&dir, "v.txt", "other 1 1\n"), &tokenizer, 1).unwrap_err();
    assert!(error.to_string().contains("v.txt has a vector for none of the 4 words"), "{error}");
    Ok(())
}
