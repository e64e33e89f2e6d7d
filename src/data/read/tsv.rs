//! Tab-separated tables: Kaggle's "Bag of Words Meets Bags of Popcorn" and GLUE's SST-2.
//!
//! Kaggle's quoting is its own: id and review are wrapped in double quotes, a quote inside is
//! written `\"`, and a backslash itself is not escaped. So only `\"` is undone; an escape-aware
//! parser would eat the backslashes that are part of the text. GLUE has no quoting at all. The
//! two are told apart by the `id` column, which only Kaggle has. Neither has line breaks or tabs
//! inside a field.

use std::borrow::Cow;

use super::{Columns, Rows};
use crate::Result;

pub(super) fn read(text: &str, rows: &mut Rows<'_>) -> Result<()> {
    // Not `str::lines`, which would also eat a `\r` that ends a review in an LF file.
    let crlf = text.lines().next().is_some_and(|first| text[first.len()..].starts_with('\r'));
    let mut lines = text
        .split('\n')
        .map(|line| if crlf { line.strip_suffix('\r').unwrap_or(line) } else { line })
        .enumerate()
        .map(|(i, line)| (i + 1, line))
        .filter(|(_, line)| !line.is_empty());
    let Some((number, header)) = lines.next() else {
        return Ok(());
    };
    let names = header.split('\t').map(|name| unquote(name).unwrap_or_default().into_owned());
    let columns = Columns::from_header(rows, number, names.collect())?;
    for (number, line) in lines {
        if columns.id.is_none() {
            columns.push(rows, number, &line.split('\t').collect::<Vec<_>>())?;
            continue;
        }
        let Some(fields) = line.split('\t').map(unquote).collect::<Option<Vec<_>>>() else {
            return Err(rows.wrong(
                number,
                "a field opens with a quote and does not close with one; wrap it in quotes, \
                 write inner quotes as \\\" and keep each row on one line",
            ));
        };
        let fields: Vec<&str> = fields.iter().map(AsRef::as_ref).collect();
        columns.push(rows, number, &fields)?;
    }
    Ok(())
}

/// A Kaggle field without its wrapping; `None` if the wrapping does not close.
fn unquote(field: &str) -> Option<Cow<'_, str>> {
    let Some(opened) = field.strip_prefix('"') else {
        return Some(Cow::Borrowed(field));
    };
    let inner = opened.strip_suffix('"')?;
    Some(match inner.contains("\\\"") {
        true => Cow::Owned(inner.replace("\\\"", "\"")),
        false => Cow::Borrowed(inner),
    })
}

#[cfg(test)]
mod tests {
    use crate::data::fixtures::{file, read_error, real_data};
    use crate::data::read::read;
    use std::io::Read;

    #[test]
    fn kaggle_quoting_keeps_every_backslash() {
        let dir = tempfile::tempdir().unwrap();
        let table = concat!(
            "id\tsentiment\treview\n",
            "\"1_9\"\t1\t\"he said \\\"wow\\\" \\o/ C:\\new\"\n",
            "\"2_1\"\t0\t\"ends in a backslash\\\"\n",
            "\"3_1\"\t0\t\"\"\n",
            "\"4_8\"\t1\t\"next\u{85}line and \\\\\"\n",
        );
        let reviews = read(&file(&dir, "k.tsv", table)).unwrap();
        let texts: Vec<&str> = reviews.iter().map(|r| r.text.as_str()).collect();
        assert_eq!(
            texts,
            [
                "he said \"wow\" \\o/ C:\\new",
                "ends in a backslash\\",
                "",
                "next\u{85}line and \\\\"
            ]
        );
        let ids: Vec<&str> = reviews.iter().map(|r| r.id.as_str()).collect();
        assert_eq!(ids, ["1_9", "2_1", "3_1", "4_8"]);
        assert_eq!(reviews.iter().filter_map(|r| r.label).collect::<Vec<_>>(), [1, 0, 0, 1]);
    }

    #[test]
    fn glue_has_no_quoting_and_crlf_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let lf = read(&file(&dir, "s.tsv", "sentence\tlabel\n\"so\" \\\" bad\"\t0\n")).unwrap();
        assert_eq!((lf[0].text.as_str(), lf[0].label), ("\"so\" \\\" bad\"", Some(0)));
        let crlf = read(&file(&dir, "c.tsv", "id\treview\r\n\"a\"\t\"b\"\r\n\r\n")).unwrap();
        assert_eq!((crlf[0].id.as_str(), crlf[0].text.as_str(), crlf[0].label), ("a", "b", None));
    }

    #[test]
    fn rows_that_do_not_fit_name_their_line() {
        let dir = tempfile::tempdir().unwrap();
        let head = "id\tsentiment\treview\n\"1\"\t1\t\"a\"\n";
        let message = read_error(&file(&dir, "two.tsv", [head, "\"2\"\t\"b\"\n"].concat()));
        assert!(
            message.contains("two.tsv, line 3: 2 columns where the header names 3"),
            "{message}"
        );
        let message = read_error(&file(&dir, "open.tsv", [head, "\"2\"\t1\t\"b\nc\"\n"].concat()));
        assert!(message.contains("open.tsv, line 3: a field opens"), "{message}");
    }

    /// Quoting every field again must give back the file, byte for byte.
    #[test]
    fn the_real_training_file_survives_byte_for_byte() {
        let Some(root) = real_data("the_real_training_file_survives_byte_for_byte") else {
            return;
        };
        for (name, rows, backslashes) in [
            ("labeledTrainData", 25_000, Some((14, 17))),
            ("testData", 25_000, None),
            ("unlabeledTrainData", 49_730, None),
        ] {
            let path = root.join("imdb").join(format!("{name}.tsv.gz"));
            let mut raw = String::new();
            let bytes = std::fs::read(&path).unwrap();
            flate2::read::GzDecoder::new(bytes.as_slice()).read_to_string(&mut raw).unwrap();
            let reviews = read(&path).unwrap();
            assert_eq!(reviews.len(), rows, "{name}");
            let quote = |text: &str| format!("\"{}\"", text.replace('"', "\\\""));
            let (header, body) = raw.split_once('\n').unwrap();
            let mut again = String::with_capacity(body.len());
            for review in &reviews {
                again += &quote(&review.id);
                again.push('\t');
                if let Some(label) = review.label {
                    again += &format!("{label}\t");
                }
                again += &quote(&review.text);
                again.push('\n');
            }
            assert_eq!(header.contains("sentiment"), reviews[0].label.is_some(), "{name}");
            assert!(again == body, "{name}: quoted again, the rows differ from the file");
            if let Some(expected) = backslashes {
                let in_each = reviews.iter().map(|r| r.text.matches('\\').count());
                let in_each: Vec<usize> = in_each.filter(|&n| n > 0).collect();
                assert_eq!((in_each.len(), in_each.iter().sum::<usize>()), expected, "{name}");
                assert_eq!(reviews.iter().filter(|r| r.label == Some(1)).count(), rows / 2);
            }
        }
    }

    #[test]
    fn the_real_sst2_has_its_known_size() {
        let Some(root) = real_data("the_real_sst2_has_its_known_size") else {
            return;
        };
        assert_eq!(read(&root.join("sst2/train.tsv")).unwrap().len(), 67_349);
        assert_eq!(read(&root.join("sst2/dev.tsv")).unwrap().len(), 872);
    }
}
