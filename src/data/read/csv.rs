//! Comma-separated tables with a header, quoted as RFC 4180 has it.

use super::{Columns, Rows};
use crate::Result;

pub(super) fn read(text: &str, rows: &mut Rows<'_>) -> Result<()> {
    let mut reader = ::csv::ReaderBuilder::new()
        .has_headers(false)
        // Row lengths are checked here, so that the error can name the columns.
        .flexible(true)
        .from_reader(text.as_bytes());
    let mut columns: Option<Columns> = None;
    let mut last = (1, false);
    for record in reader.records() {
        let record = record.map_err(|e| rows.wrong(last.0, &format!("unreadable row: {e}")))?;
        let line = record.position().map_or(0, |p| p.line() as usize);
        last = (line, record.iter().any(|field| field.contains('\n')));
        match &columns {
            None => {
                let names = record.iter().map(str::to_owned).collect();
                columns = Some(Columns::from_header(rows, line, names)?);
            }
            Some(columns) => columns.push(rows, line, &record.iter().collect::<Vec<_>>())?,
        }
    }
    // The parser takes everything after an unclosed quote as one field; without this check the
    // rest of the file would become part of the last review.
    let (line, spans_lines) = last;
    if spans_lines && text.bytes().filter(|&b| b == b'"').count() % 2 == 1 {
        return Err(rows.wrong(
            line,
            "the quote opened in this row is never closed; close it, and write quotes inside a \
             field twice",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::data::fixtures::{file, read_error};
    use crate::data::read::read;

    #[test]
    fn columns_are_found_by_name_and_labels_may_be_words() {
        let dir = tempfile::tempdir().unwrap();
        let table = concat!(
            "Review,Sentiment\n",
            "\"so \"\"good\"\", \\o/\nreally\",Positive\n",
            "bad,NEG\n",
            "\"\",pos\n",
        );
        let reviews = read(&file(&dir, "a.csv", table)).unwrap();
        assert_eq!(reviews[0].text, "so \"good\", \\o/\nreally");
        assert_eq!(reviews[2].text, "");
        assert_eq!(reviews.iter().filter_map(|r| r.label).collect::<Vec<_>>(), [1, 0, 1]);
        assert_eq!(reviews.iter().map(|r| r.id.as_str()).collect::<Vec<_>>(), ["0", "1", "2"]);
        let reviews = read(&file(&dir, "b.csv", "label,id,text,extra\n0,x7,hm,9\n")).unwrap();
        assert_eq!((reviews[0].id.as_str(), reviews[0].label), ("x7", Some(0)));
    }

    #[test]
    fn a_short_row_names_its_line_after_a_row_of_two_lines() {
        let dir = tempfile::tempdir().unwrap();
        let message = read_error(&file(&dir, "s.csv", "id,text,label\n1,\"a\nb\",1\n2,c\n"));
        assert!(message.contains("s.csv, line 4: 2 columns where the header names 3"), "{message}");
    }

    #[test]
    fn an_unclosed_quote_does_not_swallow_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let message = read_error(&file(&dir, "q.csv", "label,text\n1,fine\n0,\"bad\n1,good\n"));
        assert!(message.contains("q.csv, line 3: the quote opened"), "{message}");
    }
}
