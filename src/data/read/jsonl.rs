//! One JSON object a line, with the columns' names as keys.

use serde_json::{Map, Value};

use super::{ID, LABEL, Rows, TEXT};
use crate::Result;

pub(super) fn read(text: &str, rows: &mut Rows<'_>) -> Result<()> {
    for (i, line) in text.split('\n').enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let number = i + 1;
        let object: Map<String, Value> = serde_json::from_str(line).map_err(|e| {
            // serde_json counts lines within what it was given, which is always line 1.
            let e = e.to_string().replace(" at line 1 column", ", column");
            rows.wrong(number, &format!("not a JSON object ({e}); write one object a line"))
        })?;
        let find = |known: &[&str]| {
            known.iter().find_map(|k| {
                object.iter().find(|(key, _)| key.eq_ignore_ascii_case(k)).map(|(_, value)| value)
            })
        };
        let Some(Value::String(text)) = find(&TEXT) else {
            let keys = object.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let problem = format!("no text among its keys ({keys})");
            return Err(rows.wrong(number, &format!("{problem}; give a string as text or review")));
        };
        let label = find(&LABEL).and_then(plain);
        rows.push(number, find(&ID).and_then(plain), text.clone(), label.as_deref())?;
    }
    Ok(())
}

/// A value as it would stand in a table's cell; nothing for null.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use crate::data::fixtures::{file, read_error};
    use crate::data::read::read;

    #[test]
    fn keys_labels_and_ids_are_flexible() {
        let dir = tempfile::tempdir().unwrap();
        let lines = concat!(
            "{\"review\": \"a \\\"b\\\" \\\\ \\u00e9\", \"sentiment\": \"positive\", \"id\": 12}\n",
            "\n",
            "{\"label\": 0, \"id\": \"x\", \"text\": \"\", \"stars\": [1]}\n",
            "{\"label\": \"1\", \"text\": \"c\"}",
        );
        let reviews = read(&file(&dir, "a.jsonl", lines)).unwrap();
        assert_eq!(reviews[0].text, "a \"b\" \\ é");
        assert_eq!(reviews.iter().map(|r| r.id.as_str()).collect::<Vec<_>>(), ["12", "x", "2"]);
        assert_eq!(reviews.iter().filter_map(|r| r.label).collect::<Vec<_>>(), [1, 0, 1]);
        let reviews = read(&file(&dir, "u.jsonl", "{\"text\":\"a\",\"label\":null}")).unwrap();
        assert_eq!(reviews[0].label, None);
    }

    #[test]
    fn broken_rows_name_their_line() {
        let dir = tempfile::tempdir().unwrap();
        let good = "{\"text\":\"a\",\"label\":1}\n";
        let message = read_error(&file(&dir, "b.jsonl", [good, "{\"text\": \"b\n"].concat()));
        assert!(message.contains("b.jsonl, line 2: not a JSON object"), "{message}");
        let message = read_error(&file(&dir, "k.jsonl", [good, "{\"txt\":\"b\"}\n"].concat()));
        assert!(message.contains("k.jsonl, line 2: no text among its keys (txt)"), "{message}");
    }
}
