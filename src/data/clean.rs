//! What is taken out of a review's text before it is tokenised: one choice out of four.

use std::borrow::Cow;

pub use crate::config::Cleaning;

impl Cleaning {
    /// The name it has in a config.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Html => "html",
            Self::Words => "words",
            Self::Letters => "letters",
        }
    }

    /// The cleaned text.
    pub fn clean(self, text: &str) -> Cow<'_, str> {
        match self {
            Self::None => Cow::Borrowed(text),
            Self::Html => Cow::Owned(html(text)),
            Self::Words => Cow::Owned(words(&html(text))),
            Self::Letters => Cow::Owned(letters(&html(text))),
        }
    }
}

fn html(text: &str) -> String {
    let untagged = without_tags(text);
    // After the tags, so that "&lt;br&gt;", which a reader saw as "<br>", stays.
    single_spaces(&html_escape::decode_html_entities(&untagged))
}

fn words(text: &str) -> String {
    let kept: String = text
        .chars()
        .flat_map(char::to_lowercase)
        .map(|c| match c {
            '\u{2019}' => '\'',
            c if c.is_alphanumeric() || c == '\'' => c,
            _ => ' ',
        })
        .collect();
    single_spaces(&kept)
}

/// What `re.sub("[^a-zA-Z]", " ", text).lower()` leaves in Python.
fn letters(text: &str) -> String {
    let kept = |c: char| if c.is_ascii_alphabetic() { c.to_ascii_lowercase() } else { ' ' };
    single_spaces(&text.chars().map(kept).collect::<String>())
}

fn single_spaces(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(word);
    }
    out
}

/// Replaces every tag by a space.
fn without_tags(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(open) = rest.find('<') {
        out.push_str(&rest[..open]);
        match tag_length(&rest[open..]) {
            Some(length) => {
                out.push(' ');
                rest = &rest[open + length..];
            }
            None => {
                out.push('<');
                rest = &rest[open + 1..];
            }
        }
    }
    out + rest
}

/// The bytes of the tag that `text` starts with. "<3" and "a < b" are not tags: a tag's name
/// begins with a letter right after `<` or `</` (or it is a `<!` comment), and it closes before
/// the next `<`.
fn tag_length(text: &str) -> Option<usize> {
    let inner = text.strip_prefix('<')?;
    let name = inner.strip_prefix('/').unwrap_or(inner);
    if !name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '!') {
        return None;
    }
    let end = inner.find(['<', '>'])?;
    inner[end..].starts_with('>').then_some(end + 2)
}

#[cfg(test)]
mod tests {
    use super::Cleaning::{self, Html, Letters, None, Words};

    #[test]
    fn none_is_untouched() {
        let text = " a<br />b &amp;\u{85}\tc ";
        assert_eq!(None.clean(text), text);
    }

    #[test]
    fn html_removes_tags_entities_and_runs_of_space() {
        for (text, expected) in [
            ("one.<br /><br />Two</p>", "one. Two"),
            ("<a href=\"x\">it</a>'s", "it 's"),
            (
                "Tom &amp; Jerry &quot;hi&quot; it&#39;s &eacute; &#x41;",
                "Tom & Jerry \"hi\" it's é A",
            ),
            ("&lt;br&gt; AT&T &bogus;", "<br> AT&T &bogus;"),
            ("I <3 this > that, a < b", "I <3 this > that, a < b"),
            ("cut <br and <i>go</i> <", "cut <br and go <"),
            (" a \u{85}\u{a0}&nbsp;\n b ", "a b"),
            ("<!-- note -->x", "x"),
            ("", ""),
        ] {
            assert_eq!(Html.clean(text), expected, "{text}");
        }
    }

    #[test]
    fn words_keeps_letters_digits_and_apostrophes() {
        assert_eq!(Words.clean("Don\u{2019}t!<br />It's 10/10 -- CAFÉ."), "don't it's 10 10 café");
        assert_eq!(Words.clean("?!"), "");
    }

    #[test]
    fn letters_keeps_ascii_letters() {
        assert_eq!(Letters.clean("Don't!<br />It's 10/10 -- CAF\u{c9}."), "don t it s caf");
        // A character whose lower case alone is ASCII, as Python's pattern sees it, is none.
        assert_eq!(Letters.clean("300 \u{212a}&amp;B"), "b");
    }

    #[test]
    fn names_are_those_of_the_config() {
        for cleaning in [None, Html, Words, Letters] {
            let json = serde_json::to_string(&cleaning).unwrap();
            assert_eq!(json, format!("\"{}\"", cleaning.name()));
            assert_eq!(serde_json::from_str::<Cleaning>(&json).unwrap(), cleaning);
        }
        assert_eq!(Cleaning::default(), Html);
    }
}
