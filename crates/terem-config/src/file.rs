//! Machine files: TOML with every mistake told at its line.
//!
//! A file is read twice. First each top-level key, and each element of its lists, is read alone: so one mistake does not hide
//! the others. If there is none, the whole is read at once.

use crate::error::{ConfigError, ConfigErrors, Place};
use crate::machine::MachineConfig;
use serde::Deserialize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

/// Largest machine file that is read, in bytes: a file of this size is a mistake, most likely a disk image.
const MAX_FILE: u64 = 1 << 20;

/// Reads a machine file; relative paths in it start at the file's directory.
///
/// # Errors
/// The file cannot be read, or all its mistakes of syntax, keys and types.
pub fn load(path: &Path) -> Result<MachineConfig, ConfigErrors> {
    let unreadable = |why: String| {
        ConfigErrors::from(ConfigError::missing(
            "",
            format!("cannot read the machine file {}: {why}", path.display()),
            "a readable TOML file",
        ))
    };
    let size = std::fs::metadata(path).map_err(|error| unreadable(error.to_string()))?.len();
    if size > MAX_FILE {
        return Err(unreadable(format!("its {size} bytes are more than a machine file has")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
    let mut config = from_toml(&text, path)?;
    let base = path
        .parent()
        .filter(|base| !base.as_os_str().is_empty())
        .map_or_else(PathBuf::new, Path::to_path_buf);
    config.resolve_paths(&base);
    Ok(config)
}

/// Reads the text of a machine file; `file` is its name in errors.
///
/// # Errors
/// All mistakes of syntax, keys and types.
pub fn from_toml(text: &str, file: &Path) -> Result<MachineConfig, ConfigErrors> {
    let reader = Reader { text, file };
    let table = DeTable::parse(text).map_err(|error| reader.syntax(&error))?;
    let mut errors = Vec::new();
    for (key, value) in table.get_ref() {
        match value.get_ref() {
            DeValue::Array(elements) => {
                for (index, element) in elements.iter().enumerate() {
                    let name = format!("{}[{index}]", key.get_ref());
                    let alone = DeValue::Array(std::iter::once(element.clone()).collect());
                    errors.extend(reader.check(&name, key, element, Spanned::new(value.span(), alone)));
                }
            }
            _ => errors.extend(reader.check(key.get_ref(), key, value, value.clone())),
        }
    }
    ConfigErrors::check(errors)?;
    MachineConfig::deserialize(toml::de::Deserializer::from(table))
        .map_err(|error| reader.mistake("", None, &error, None).into())
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

    fn syntax(&self, error: &toml::de::Error) -> ConfigErrors {
        let message = error.message().lines().next().unwrap_or_default();
        ConfigErrors::from(ConfigError {
            key: String::new(),
            value: None,
            why: format!("it is no TOML: {message}"),
            expected: "lines such as memory = \"4G\"".into(),
            place: self.place(error.span()),
        })
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
