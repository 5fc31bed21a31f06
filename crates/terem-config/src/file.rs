//! Machine files: TOML with every mistake told at its line.
//!
//! A file is read twice. First each top-level key, and each element of its lists, is read alone: so one mistake does not hide
//! the others. Then the whole is read at once, without the keys that have a mistake.

use crate::error::{ConfigError, ConfigErrors, Place};
use crate::machine::MachineConfig;
use serde::Deserialize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

/// Largest machine file that is read, in bytes: a file of this size is a mistake, most likely a disk image.
const MAX_FILE: u64 = 1 << 20;

/// Reads a machine file; relative paths in it start at the file's directory. Returns the machine as far as it could be
/// read, and all mistakes of syntax, keys and types; the key of a mistake of the whole file is empty.
#[must_use]
pub fn load(path: &Path) -> (MachineConfig, Vec<ConfigError>) {
    let unreadable = |why: String| {
        let why = format!("cannot read the machine file {}: {why}", path.display());
        (MachineConfig::default(), vec![ConfigError::missing("", why, "a readable TOML file")])
    };
    match std::fs::metadata(path) {
        Err(error) => return unreadable(error.to_string()),
        Ok(meta) if meta.len() > MAX_FILE => {
            return unreadable(format!("its {} bytes are more than a machine file has", meta.len()));
        }
        Ok(_) => {}
    }
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => return unreadable(error.to_string()),
    };
    let (mut config, errors) = read(&text, path);
    let base = path
        .parent()
        .filter(|base| !base.as_os_str().is_empty())
        .map_or_else(PathBuf::new, Path::to_path_buf);
    config.resolve_paths(&base);
    (config, errors)
}

/// Reads the text of a machine file; `file` is its name in errors.
///
/// # Errors
/// All mistakes of syntax, keys and types.
pub fn from_toml(text: &str, file: &Path) -> Result<MachineConfig, ConfigErrors> {
    let (config, errors) = read(text, file);
    ConfigErrors::check(errors).map(|()| config)
}

/// What can be read of `text`, without the keys that have a mistake, and the mistakes.
fn read(text: &str, file: &Path) -> (MachineConfig, Vec<ConfigError>) {
    let reader = Reader { text, file };
    let table = match DeTable::parse(text) {
        Ok(table) => table,
        Err(error) => return (MachineConfig::default(), vec![reader.syntax(&error)]),
    };
    let (mut errors, mut readable, span) = (Vec::new(), DeTable::new(), table.span());
    for (key, value) in table.into_inner() {
        let found = reader.check_key(&key, &value);
        if found.is_empty() {
            readable.insert(key, value);
        }
        errors.extend(found);
    }
    match MachineConfig::deserialize(toml::de::Deserializer::from(Spanned::new(span, readable))) {
        Ok(config) => (config, errors),
        Err(error) => {
            errors.push(reader.mistake("", None, &error, None));
            (MachineConfig::default(), errors)
        }
    }
}

struct Reader<'a> {
    text: &'a str,
    file: &'a Path,
}

impl Reader<'_> {
    fn place(&self, span: Option<Range<usize>>) -> Option<Place> {
        let start = span?.start;
        let before = self.text.as_bytes().get(..start)?;
        Some(Place { file: self.file.into(), line: 1 + before.iter().filter(|&&b| b == b'\n').count() })
    }

    fn syntax(&self, error: &toml::de::Error) -> ConfigError {
        let message = error.message().lines().next().unwrap_or_default();
        ConfigError {
            key: String::new(),
            value: None,
            why: format!("it is no TOML: {message}"),
            expected: "lines such as memory = \"4G\"".into(),
            place: self.place(error.span()),
        }
    }

    /// The mistakes in one key of the file: each element of a list is read alone.
    fn check_key<'i>(&self, key: &Spanned<DeString<'i>>, value: &Spanned<DeValue<'i>>) -> Vec<ConfigError> {
        let DeValue::Array(elements) = value.get_ref() else {
            return self.check(key.get_ref(), key, value, value.clone()).into_iter().collect();
        };
        let alone = |element: &Spanned<DeValue<'i>>| {
            Spanned::new(value.span(), DeValue::Array(std::iter::once(element.clone()).collect()))
        };
        let check = |(index, element)| {
            self.check(&format!("{}[{index}]", key.get_ref()), key, element, alone(element))
        };
        elements.iter().enumerate().filter_map(check).collect()
    }

    /// Reads a machine that has nothing but `key = alone`; `value` is what is looked at.
    fn check<'i>(
        &self,
        name: &str,
        key: &Spanned<DeString<'i>>,
        value: &Spanned<DeValue<'i>>,
        alone: Spanned<DeValue<'i>>,
    ) -> Option<ConfigError> {
        let mut table = DeTable::new();
        table.insert(key.clone(), alone);
        let reader = toml::de::Deserializer::from(Spanned::new(value.span(), table));
        let error = MachineConfig::deserialize(reader).err()?;
        // A key the machine does not have is found here too, and its name is in the message already.
        let top = error.message().starts_with("unknown field") && error.span() == Some(key.span());
        let (name, inner) = if top { ("", None) } else { (name, key_at(value.get_ref(), error.span())) };
        Some(self.mistake(name, inner, &error, Some(value.span())))
    }

    fn mistake(
        &self,
        name: &str,
        inner: Option<(String, Range<usize>)>,
        error: &toml::de::Error,
        value: Option<Range<usize>>,
    ) -> ConfigError {
        let key = match &inner {
            Some((key, _)) => format!("{name}.{key}"),
            None => name.to_string(),
        };
        let span = inner.map(|(_, span)| span).or_else(|| value.clone());
        let text = span.and_then(|span| self.text.get(span)).filter(|text| !text.contains('\n'));
        let mut mistake = ConfigError::from_serde(&key, text.map(String::from), error.message());
        mistake.place = self.place(error.span().or(value));
        mistake
    }
}

/// The key of a table whose value is at `span`, and that value's place.
fn key_at(value: &DeValue<'_>, span: Option<Range<usize>>) -> Option<(String, Range<usize>)> {
    let (DeValue::Table(table), Some(span)) = (value, span) else { return None };
    table
        .iter()
        .map(|(key, value)| (key.get_ref().to_string(), value.span()))
        .find(|(_, value)| value.start <= span.start && span.end <= value.end)
}
