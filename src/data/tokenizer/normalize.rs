//! What happens to a text before it is split: the `tokenizers` crate's normalizers, and
//! sentencepiece's, exactly.
//!
//! The crate's `Precompiled` takes a map's shortest match where sentencepiece takes the longest,
//! and drops what the match leaves of a grapheme: decomposed Vietnamese loses its tone marks
//! (huggingface/tokenizers, issues 2116 and 2334). So here the map is applied as sentencepiece
//! does. In `tokenizer.json` that stands as a sequence of the crate's own steps which gives the
//! same text for everything but rare sequences of marks, so that transformers can read it; that
//! sequence is read back as what it stands for. Any other normalizer is the crate's.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::{Value, json};
use tokenizers::{NormalizedString, Normalizer, NormalizerWrapper};

/// The normalizer of a tokenizer.
#[derive(Debug, Clone)]
pub(super) enum Normalize {
    Library(NormalizerWrapper),
    Sentencepiece(Box<Sentencepiece>),
}

impl Normalizer for Normalize {
    fn normalize(&self, text: &mut NormalizedString) -> tokenizers::Result<()> {
        match self {
            Self::Library(normalizer) => normalizer.normalize(text)?,
            // Without the way back to the original's offsets: nothing here asks for them.
            Self::Sentencepiece(normalizer) => {
                *text = NormalizedString::from(normalizer.apply(text.get()));
            }
        }
        Ok(())
    }
}

impl Serialize for Normalize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Library(normalizer) => normalizer.serialize(serializer),
            Self::Sentencepiece(normalizer) => normalizer.to_json().serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Normalize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = Value::deserialize(deserializer)?;
        let steps = match &json["normalizers"] {
            Value::Array(steps) => steps.as_slice(),
            _ => std::slice::from_ref(&json),
        };
        let mut charsmap = None;
        for step in steps.iter().filter(|step| step["type"] == "Precompiled") {
            // Checked even where the crate applies the map: it panics on a damaged one.
            let coded = step["precompiled_charsmap"].as_str().unwrap_or_default();
            let bytes = STANDARD.decode(coded).map_err(de::Error::custom)?;
            charsmap = Some(Charsmap::parse(bytes).map_err(de::Error::custom)?);
        }
        if let Some(charsmap) = charsmap {
            let has = |kind: &str| steps.iter().any(|step| step["type"] == kind);
            let (lowercase, tidy) = (has("Lowercase"), has("Replace"));
            let candidate = Sentencepiece { charsmap, lowercase, tidy };
            if candidate.to_json() == json {
                return Ok(Self::Sentencepiece(Box::new(candidate)));
            }
        }
        NormalizerWrapper::deserialize(json).map(Self::Library).map_err(de::Error::custom)
    }
}

/// The crate's steps for sentencepiece's normalization. `charsmap` may be empty: no map. `tidy`
/// (`remove_extra_whitespaces`) leaves one space where there are several, none at the ends.
pub(super) fn steps(charsmap: &[u8], lowercase: bool, tidy: bool) -> Value {
    let replace = |pattern: &str, content: &str| json!({"type": "Replace", "pattern": {"Regex": pattern}, "content": content});
    let mut steps = Vec::new();
    if lowercase {
        steps.push(json!({"type": "Lowercase"}));
    }
    if !charsmap.is_empty() {
        // NFC first: what it composes, the crate's `Precompiled` need not match.
        steps.push(json!({"type": "NFC"}));
        let coded = STANDARD.encode(charsmap);
        steps.push(json!({"type": "Precompiled", "precompiled_charsmap": coded}));
    }
    if tidy {
        steps.extend([replace(" {2,}", " "), replace("^ +| +$", "")]);
    }
    json!({"type": "Sequence", "normalizers": steps})
}

/// Sentencepiece's normalization (`normalizer.cc`), spaces not yet written as "▁".
#[derive(Debug, Clone)]
pub(super) struct Sentencepiece {
    charsmap: Charsmap,
    lowercase: bool,
    tidy: bool,
}

impl Sentencepiece {
    fn apply(&self, text: &str) -> String {
        let lowered: String;
        let mut rest = text;
        if self.lowercase {
            lowered = text.chars().flat_map(char::to_lowercase).collect();
            rest = &lowered;
        }
        let mut normal = String::with_capacity(rest.len());
        let mut after_space = true;
        while let Some(first) = rest.chars().next() {
            let unmapped = (first.len_utf8(), &rest[..first.len_utf8()]);
            let (length, mut piece) = self.charsmap.longest(rest).unwrap_or(unmapped);
            rest = &rest[length..];
            if self.tidy && after_space {
                piece = piece.trim_start_matches(' ');
            }
            if let Some(last) = piece.chars().next_back() {
                after_space = last == ' ';
            }
            normal.push_str(piece);
        }
        if self.tidy {
            normal.truncate(normal.trim_end_matches(' ').len());
        }
        normal
    }

    fn to_json(&self) -> Value {
        steps(&self.charsmap.bytes, self.lowercase, self.tidy)
    }
}

/// Sentencepiece's precompiled character map: the bytes of a double-array trie (darts-clone) as
/// u32s, little-endian, behind their length in bytes; then the replacements, each ended by NUL.
/// A leaf's value is the offset of its replacement.
#[derive(Debug, Clone)]
pub(super) struct Charsmap {
    bytes: Vec<u8>,
    units: Vec<u32>,
    replacements: String,
}

impl Charsmap {
    pub(super) fn parse(bytes: Vec<u8>) -> Result<Self, &'static str> {
        const DAMAGED: &str = "its character map is damaged";
        let (size, rest) = bytes.split_first_chunk::<4>().ok_or(DAMAGED)?;
        let size = u32::from_le_bytes(*size) as usize;
        let (trie, replacements) = rest.split_at_checked(size).ok_or(DAMAGED)?;
        let (units, []) = trie.as_chunks::<4>() else {
            return Err(DAMAGED);
        };
        let units: Vec<u32> = units.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
        let replacements = str::from_utf8(replacements).map_err(|_| DAMAGED)?.to_owned();
        // Without a last NUL or a root there is no map.
        if units.is_empty() || !replacements.ends_with('\0') {
            return Err(DAMAGED);
        }
        Ok(Self { bytes, units, replacements })
    }

    /// The longest key that `text` begins with: its length in bytes, and what replaces it.
    fn longest(&self, text: &str) -> Option<(usize, &str)> {
        let offset = |unit: u32| ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize;
        let mut node = offset(self.units[0]);
        let mut found = None;
        for (i, byte) in text.bytes().enumerate() {
            node ^= usize::from(byte);
            // The sign bit marks a leaf, which is no byte's node.
            let Some(&unit) = self.units.get(node).filter(|u| **u & 0x8000_00ff == u32::from(byte))
            else {
                break;
            };
            node ^= offset(unit);
            if (unit >> 8) & 1 == 1 && text.is_char_boundary(i + 1) {
                let leaf = self.units.get(node)?;
                found = Some((i + 1, (leaf & 0x7fff_ffff) as usize));
            }
        }
        let (length, start) = found?;
        let (replacement, _) = self.replacements.get(start..)?.split_once('\0')?;
        Some((length, replacement))
    }
}
