//! Comma-separated tables with a header, quoted as RFC 4180 has it.

use super::{Columns, Rows};
use crate::Result;

pub(super) fn read(text: &str, rows: &mut Rows<'_>) -> Result<()> {
    let mut reader = ::csv::ReaderBuilder::new()
        .has_headers(false)
        // Row lengths are checked here, so that the error can name the columns.
        .flexible(true)
        .from_reader(text.as_bytes());
    check_quotes(text, rows)?;
    let mut columns: Option<Columns> = None;
    let mut last = 1;
    for record in reader.records() {
        let record = record.map_err(|e| rows.wrong(last, &format!("unreadable row: {e}")))?;
        let line = record.position().map_or(0, |p| p.line() as usize);
        last = line;
        match &columns {
            None => {
                let names = record.iter().map(str::to_owned).collect();
                columns = Some(Columns::from_header(rows, line, names)?);
            }
            Some(columns) => columns.push(rows, line, &record.iter().collect::<Vec<_>>())?,
        }
    }
    Ok(())
}

/// Fails at a quoted field that is not closed properly. The parser is lenient: it would make the rows
/// up to the next quote, or to the end of the file, part of one review.
fn check_quotes(text: &str, rows: &Rows<'_>) -> Result<()> {
    let mut bytes = text.bytes().peekable();
    let (mut line, mut at_start) = (1, true);
    while let Some(byte) = bytes.next() {
        if at_start && byte == b'"' {
            let opened = line;
            loop {
                match bytes.next() {
                    Some(b'"') if bytes.peek() == Some(&b'"') => {
                        bytes.next();
                    }
                    Some(b'"') if matches!(bytes.peek(), None | Some(b',' | b'\r' | b'\n')) => {
                        break;
                    }
                    Some(b'\n') => line += 1,
                    Some(b'"') | None => {
                        return Err(rows.wrong(
                            opened,
                            "the quote opened in this row is never closed, or closed before the \
                             field ends; write quotes inside a field twice",
                        ));
                    }
                    Some(_) => {}
                }
            }
        }
        line += usize::from(byte == b'\n');
        at_start = matches!(byte, b',' | b'\n' | b'\r');
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
    fn a_stray_quote_does_not_join_rows_up_to_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let message = read_error(&file(&dir, "q.csv", "label,text\n0,\"bad\n1,good\n0,\"x\n"));
        assert!(message.contains("q.csv, line 2: the quote opened in this row"), "{message}");
        let inside = file(&dir, "i.csv", "label,text\n0,so \"good\" it was\n");
        assert_eq!(read(&inside).unwrap()[0].text, "so \"good\" it was");
    }

    #[test]
    fn an_unclosed_quote_does_not_swallow_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let message = read_error(&file(&dir, "q.csv", "label,text\n1,fine\n0,\"bad\n1,good\n"));
        assert!(message.contains("q.csv, line 3: the quote opened"), "{message}");
    }
}
