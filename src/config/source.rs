//! A config file and its overrides, key by key, each remembering where it was written.
//!
//! Owns the errors of this level: TOML syntax, unknown sections and keys, wrong types. It knows
//! no single setting: the names come from serialising the sections, the types from reading each
//! key into its section on its own.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;
use serde::de::IntoDeserializer;
use toml::{Table, Value};

use super::{File, flatten};
use crate::{Error, Result};

/// Every key that was given, in the order written.
pub(super) struct Source {
    /// The file, as errors call it.
    name: String,
    /// All keys there are, as `section.key`.
    known: Vec<String>,
    /// Sections that were given, with keys or without.
    sections: BTreeSet<String>,
    entries: Vec<Entry>,
}

struct Entry {
    section: String,
    key: String,
    value: Value,
    /// How an error begins: `file:line: section.key = value`, or `--set section.key=value`.
    place: String,
}

impl Source {
    /// Takes the file apart; every key in it is known and of the right type.
    pub(super) fn parse(text: &str, path: &Path) -> Result<Self> {
        let known = flatten(&File::default())?.into_keys().collect();
        let name = path.display().to_string();
        let mut source = Self { name, known, sections: BTreeSet::new(), entries: Vec::new() };
        let line = |at| text.bytes().take(at).filter(|&byte| byte == b'\n').count() + 1;
        let tree = toml::de::DeTable::parse(text).map_err(|error| {
            let line = line(error.span().map_or(0, |span| span.start));
            let shown = text.lines().nth(line - 1).unwrap_or_default().trim();
            let message = error.message();
            Error::User(format!("{}:{line}: {message}, in `{shown}`", source.name))
        })?;
        for (section, body) in tree.into_inner() {
            let place = format!("{}:{}", source.name, line(section.span().start));
            let section = section.into_inner().into_owned();
            let known = source.is_section(&section);
            if !body.get_ref().is_table() {
                return Err(Error::User(if known {
                    format!("{place}: {section} is a section; write [{section}] and its keys below")
                } else {
                    let nearest = source.nearest("", &section);
                    format!("{place}: unknown key {section}; the nearest known one is {nearest}")
                }));
            }
            if !known {
                let nearest = source.nearest_section(&section);
                return Err(Error::User(format!(
                    "{place}: unknown section [{section}]; the nearest known one is [{nearest}]"
                )));
            }
            let toml::de::DeValue::Table(body) = body.into_inner() else {
                continue;
            };
            source.sections.insert(section.clone());
            for (key, value) in body {
                let written = text.get(value.span()).and_then(|text| text.lines().next());
                let place = format!(
                    "{}:{}: {section}.{} = {}",
                    source.name,
                    line(key.span().start),
                    key.get_ref(),
                    written.unwrap_or_default()
                );
                // What is TOML and yet no value of ours is an integer of more than 64 bits.
                let value = Value::deserialize(value.into_deserializer())
                    .map_err(|_| Error::User(format!("{place}: too large a number")))?;
                let key = key.into_inner().into_owned();
                source.add(Entry { section: section.clone(), key, value, place })?;
            }
        }
        Ok(source)
    }

    /// Applies `section.key=value`. The value is read as TOML; what is not TOML, or not of the
    /// key's type as TOML (a directory named `2024`), is the string itself.
    pub(super) fn set(&mut self, argument: &str) -> Result<()> {
        let place = format!("--set {argument}");
        let refused = |why: &str| Error::User(format!("{place}: {why}"));
        let (name, text) =
            argument.split_once('=').ok_or_else(|| refused("no value; write section.key=value"))?;
        let (section, key) = name
            .trim()
            .split_once('.')
            .ok_or_else(|| refused("no section; write section.key=value"))?;
        let text = text.trim();
        if text.is_empty() {
            return Err(refused("no value; write section.key=value, or \"\" for an empty string"));
        }
        let string = Value::String(text.to_owned());
        let parsed = toml::de::ValueDeserializer::parse(text).and_then(Value::deserialize);
        let value = match parsed {
            Ok(value) => {
                let fits = |value: &Value| misfit(section, key, value).is_none();
                if !fits(&value) && fits(&string) { string } else { value }
            }
            Err(error) if text.starts_with(['"', '\'']) => return Err(refused(error.message())),
            Err(_) => string,
        };
        self.add(Entry { section: section.to_owned(), key: key.to_owned(), value, place })
    }

    /// Takes `entry` in, in place of an earlier one for the same key.
    fn add(&mut self, entry: Entry) -> Result<()> {
        let Entry { section, key, value, place } = &entry;
        let name = format!("{section}.{key}");
        if !self.known.contains(&name) {
            let nearest = self.nearest(section, key);
            return Err(Error::User(format!(
                "{place}: unknown key {name}; the nearest known one is {nearest}"
            )));
        }
        if let Some(why) = misfit(section, key, value) {
            return Err(Error::User(format!("{place}: {why}")));
        }
        self.entries.retain(|old| old.section != *section || old.key != *key);
        self.sections.insert(section.clone());
        self.entries.push(entry);
        Ok(())
    }

    /// Whether `section.key` was given.
    pub(super) fn has(&self, name: &str) -> bool {
        self.entry(name).is_some()
    }

    /// Whether `[section]` was given.
    pub(super) fn has_section(&self, section: &str) -> bool {
        self.sections.contains(section)
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        let (section, key) = name.split_once('.')?;
        self.entries.iter().find(|entry| entry.section == section && entry.key == key)
    }

    /// The sections, with the defaults of what was not given.
    pub(super) fn file(&self) -> Result<File> {
        let mut table = Table::new();
        for entry in &self.entries {
            let section =
                table.entry(entry.section.clone()).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(section) = section {
                section.insert(entry.key.clone(), entry.value.clone());
            }
        }
        // Every key has been read on its own by now.
        table.try_into().map_err(|error| Error::Bug(format!("config: {error}")))
    }

    /// `message` about `name`, beginning with where it was written, or with its default.
    pub(super) fn error(
        &self,
        message: &str,
        name: &str,
        defaults: &BTreeMap<String, String>,
    ) -> Error {
        let default = defaults.get(name).filter(|value| *value != "unset");
        Error::User(match (self.entry(name), default) {
            (Some(entry), _) => format!("{}: {message}", entry.place),
            (None, Some(default)) => {
                format!("{}: {name} = {default} (the default): {message}", self.name)
            }
            (None, None) => format!("{}: {name}: {message}", self.name),
        })
    }

    fn is_section(&self, name: &str) -> bool {
        self.known.iter().any(|known| known.split_once('.').is_some_and(|(s, _)| s == name))
    }

    fn nearest_section(&self, name: &str) -> &str {
        let sections = self.known.iter().filter_map(|known| known.split_once('.'));
        closest(sections.map(|(section, _)| (likeness(section, name), section)))
    }

    /// The known key most like `key`. One of the same section wins unless another section has
    /// almost exactly the name.
    fn nearest(&self, section: &str, key: &str) -> &str {
        closest(self.known.iter().filter_map(|known| {
            let (known_section, known_key) = known.split_once('.')?;
            let bonus = if known_section == section { 0.05 } else { 0.0 };
            Some((likeness(known_key, key) + bonus, known.as_str()))
        }))
    }
}

fn closest<'a>(scored: impl Iterator<Item = (f64, &'a str)>) -> &'a str {
    scored.max_by(|a, b| a.0.total_cmp(&b.0)).map_or("", |(_, name)| name)
}

/// How alike two names are, from 0 to 1. A name within the other counts as a near miss, so that
/// `num_train_epochs` finds `epochs`; not one of a single letter, which is within most.
fn likeness(a: &str, b: &str) -> f64 {
    let (shorter, longer) = if a.len() < b.len() { (a, b) } else { (b, a) };
    if shorter.len() > 1 && longer.contains(shorter) {
        return 0.9 + 0.1 * shorter.len() as f64 / longer.len() as f64;
    }
    strsim::jaro_winkler(a, b)
}

/// Why `value` is not one of `section.key`, if it is not: the key is read with all others left
/// at their defaults, so an error can only be about it.
fn misfit(section: &str, key: &str, value: &Value) -> Option<String> {
    let message = type_error(section, key, value)?;
    let expected = match message.split_once("expected ") {
        Some((_, "usize" | "u64")) => "a whole number, 0 or more",
        Some((_, "f64")) => "a number",
        Some((_, "a boolean")) => "true or false",
        Some((_, "a string")) if section != "data" => "text, in quotes",
        Some((_, "path string" | "a string")) => "a path, in quotes",
        Some((_, "a sequence")) => "a list, in brackets",
        // Only a string makes serde list the names there are.
        Some((_, "string only")) => return misfit(section, key, &Value::String(String::new())),
        Some((_, expected)) => expected,
        None => &message,
    };
    let mut text = format!("expected {expected}");
    let given = value.as_str().filter(|given| !given.is_empty());
    if let (Some(given), Some(names)) = (given, expected.strip_prefix("one of ")) {
        let names = names.split(", ").map(|name| name.trim_matches('`'));
        let nearest = closest(names.map(|name| (likeness(name, given), name)));
        text.push_str(&format!("; the nearest is `{nearest}`"));
    }
    Some(text)
}

/// Serde's message about `value` as `section.key`.
fn type_error(section: &str, key: &str, value: &Value) -> Option<String> {
    let keys = Table::from_iter([(key.to_owned(), value.clone())]);
    let sections = Table::from_iter([(section.to_owned(), Value::Table(keys))]);
    sections.try_into::<File>().err().map(|error| error.message().to_owned())
}
