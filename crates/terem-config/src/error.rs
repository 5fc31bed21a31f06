//! Mistakes in a configuration, each with the key, the value, why it is wrong and what would be right.

use std::fmt;
use std::path::PathBuf;

/// Where in a file a mistake stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file as the user named it; empty for text that came from elsewhere.
    pub file: PathBuf,
    /// Line, counted from 1.
    pub line: usize,
}

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The key as it would be written in a file: `disk[1].format`.
    pub key: String,
    /// The value as the user wrote it; `None` where a value is missing.
    pub value: Option<String>,
    /// Why it cannot be taken.
    pub why: String,
    /// What would be right; empty where `why` says all.
    pub expected: String,
    /// Where it stands, for a file.
    pub place: Option<Place>,
}

impl ConfigError {
    /// A mistake in the value of `key`.
    pub fn value(
        key: impl Into<String>,
        value: impl fmt::Display,
        why: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        Self {
            key: key.into(),
            value: Some(value.to_string()),
            why: why.into(),
            expected: expected.into(),
            place: None,
        }
    }

    /// A value that should be there and is not.
    pub fn missing(key: impl Into<String>, why: impl Into<String>, expected: impl Into<String>) -> Self {
        Self { key: key.into(), value: None, why: why.into(), expected: expected.into(), place: None }
    }

    /// Makes a mistake of a deserializer's message. serde's own messages are reworded, those of our types
    /// (`why; expected what`) are taken apart. `key` is the key at which, or below which, it happened.
    pub(crate) fn from_serde(key: &str, value: Option<String>, message: &str) -> Self {
        let message = message.lines().next().unwrap_or_default();
        if let Some(rest) = message.strip_prefix("unknown field ") {
            let (name, known) = quoted_names(rest);
            return Self {
                key: join(key, &name),
                value: None,
                why: "there is no such key".into(),
                expected: did_you_mean(&name, &known),
                place: None,
            };
        }
        if let Some(rest) = message.strip_prefix("unknown variant ") {
            let (name, known) = quoted_names(rest);
            return Self::value(key, quote(&name), "it is none of the choices", did_you_mean(&name, &known));
        }
        if let Some(name) = message.strip_prefix("missing field ") {
            let key = join(key, name.trim_matches('`'));
            return Self::missing(key, "it is needed and was not given", "a value for it");
        }
        let (why, expected) = match message.split_once("; expected ") {
            Some((why, expected)) => (why, expected),
            None => match message.split_once(", expected ") {
                Some((why, expected)) => (why, expected),
                None => (message, ""),
            },
        };
        Self { key: key.into(), value, why: why.into(), expected: expected.into(), place: None }
    }

    /// Puts `parent` before the key: `format` in `disk[1]` is `disk[1].format`.
    #[must_use]
    pub fn within(mut self, parent: &str) -> Self {
        self.key = join(parent, &self.key);
        self
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            if place.file.as_os_str().is_empty() {
                write!(f, "line {}: ", place.line)?;
            } else {
                write!(f, "{}:{}: ", place.file.display(), place.line)?;
            }
        }
        if !self.key.is_empty() {
            write!(f, "{}", self.key)?;
            if let Some(value) = &self.value {
                write!(f, " = {value}")?;
            }
            write!(f, ": ")?;
        }
        write!(f, "{}", self.why)?;
        if !self.expected.is_empty() {
            write!(f, "; expected {}", self.expected)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// All mistakes of one configuration, in the order of its keys; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl ConfigErrors {
    /// `Ok` if there are no mistakes.
    pub fn check(errors: Vec<ConfigError>) -> Result<(), Self> {
        if errors.is_empty() { Ok(()) } else { Err(Self(errors)) }
    }
}

impl From<ConfigError> for ConfigErrors {
    fn from(error: ConfigError) -> Self {
        Self(vec![error])
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// A value between quotation marks, as it would stand in a file.
pub(crate) fn quote(value: impl fmt::Display) -> String {
    format!("\"{value}\"")
}

fn join(parent: &str, key: &str) -> String {
    match (parent.is_empty(), key.is_empty()) {
        (true, _) => key.into(),
        (_, true) => parent.into(),
        _ => format!("{parent}.{key}"),
    }
}

/// Takes serde's "`name`, expected one of `a`, `b`" apart.
fn quoted_names(text: &str) -> (String, Vec<String>) {
    let mut names = text.split('`').skip(1).step_by(2).map(String::from);
    let name = names.next().unwrap_or_default();
    (name, names.collect())
}

/// What may have been meant: the nearest known name if one is near, all of them otherwise.
fn did_you_mean(name: &str, known: &[String]) -> String {
    let nearest = known.iter().map(|k| (edit_distance(name, k), k)).min();
    let list = known.iter().map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", ");
    match nearest {
        Some((distance, nearest)) if distance <= 1.max(name.chars().count() / 3) => {
            format!("one of {list} (did you mean `{nearest}`?)")
        }
        _ if known.is_empty() => "no keys here".into(),
        _ => format!("one of {list}"),
    }
}

/// Levenshtein distance, with letters compared without case.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.to_lowercase().chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.to_lowercase().chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_edits() {
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("Memory", "memory"), 0);
    }

    #[test]
    fn serde_messages_are_reworded() {
        let text = |m: &str| ConfigError::from_serde("disk[1]", None, m).to_string();
        assert_eq!(
            text("unknown field `fromat`, expected one of `path`, `format`"),
            "disk[1].fromat: there is no such key; expected one of `path`, `format` (did you mean `format`?)"
        );
        assert_eq!(
            text("unknown variant `vdi`, expected `raw` or `qcow2`"),
            "disk[1] = \"vdi\": it is none of the choices; expected one of `raw`, `qcow2`"
        );
        assert_eq!(
            text("missing field `path`"),
            "disk[1].path: it is needed and was not given; expected a value for it"
        );
    }

    #[test]
    fn place_stands_first() {
        let mut error = ConfigError::value("memory", "3", "it is too small", "at least 1M");
        error.place = Some(Place { file: "m.toml".into(), line: 7 });
        assert_eq!(error.to_string(), "m.toml:7: memory = 3: it is too small; expected at least 1M");
    }
}
