//! Where passphrases come from: files, descriptors, the terminal. Never from the command line, which everybody can read.

use crate::text::{TextError, text_type};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

const EXPECTED: &str = "file:PATH, fd:NUMBER or ask; a passphrase itself is not taken from here";

/// Where a passphrase comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PassphraseSource {
    /// All bytes of a file.
    File(PathBuf),
    /// All bytes that can be read from an inherited descriptor.
    Descriptor(u32),
    /// What the user types.
    Ask,
}

impl FromStr for PassphraseSource {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        // What stands there may be the passphrase itself, so no message repeats it.
        let wrong = || TextError::new("it is no place of a passphrase", EXPECTED);
        match text.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("fd", number)) => number.parse().map(Self::Descriptor).map_err(|_| wrong()),
            None if text == "ask" => Ok(Self::Ask),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for PassphraseSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Descriptor(number) => write!(f, "fd:{number}"),
            Self::Ask => f.write_str("ask"),
        }
    }
}

/// A source of a passphrase, for one image or for all: `[IMAGE=]file:PATH`, `[IMAGE=]fd:NUMBER` or `[IMAGE=]ask`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImagePassphrase {
    /// The image; `None` for all that have none of their own.
    pub image: Option<PathBuf>,
    /// Where it comes from.
    pub source: PassphraseSource,
}

impl ImagePassphrase {
    /// All paths in it.
    pub(crate) fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let file = match &mut self.source {
            PassphraseSource::File(path) => Some(path),
            PassphraseSource::Descriptor(_) | PassphraseSource::Ask => None,
        };
        self.image.iter_mut().chain(file)
    }
}

impl FromStr for ImagePassphrase {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        // `file:/a=b` is a file whose name has a `=`.
        let every: Result<PassphraseSource, _> = text.parse();
        match (every, text.split_once('=')) {
            (Err(_), Some((image, source))) if !image.is_empty() => {
                Ok(Self { image: Some(image.into()), source: source.parse()? })
            }
            (every, _) => Ok(Self { image: None, source: every? }),
        }
    }
}

impl fmt::Display for ImagePassphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(image) = &self.image {
            write!(f, "{}=", image.display())?;
        }
        self.source.fmt(f)
    }
}

text_type!(
    ImagePassphrase,
    "ImagePassphrase",
    "^(.+=)?(file:.+|fd:[0-9]+|ask)$",
    "Where a passphrase comes from: [IMAGE=]file:PATH, fd:NUMBER or ask"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources() {
        assert_eq!("file:/a=b".parse(), Ok(PassphraseSource::File("/a=b".into())));
        assert_eq!("fd:3".parse(), Ok(PassphraseSource::Descriptor(3)));
        assert_eq!("ask".parse(), Ok(PassphraseSource::Ask));
        for wrong in ["", "secret", "file:", "fd:x", "pass:secret", "a=secret"] {
            let error = wrong.parse::<ImagePassphrase>().unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
        let image = "base.qcow2=fd:3".parse::<ImagePassphrase>().unwrap();
        let source = PassphraseSource::Descriptor(3);
        assert_eq!(image, ImagePassphrase { image: Some("base.qcow2".into()), source });
        let every = "file:/a=b".parse::<ImagePassphrase>().unwrap();
        let source = PassphraseSource::File("/a=b".into());
        assert_eq!(every, ImagePassphrase { image: None, source });
        for text in ["ask", "x=ask", "file:a=b", "x=file:a=b", "y=fd:7"] {
            assert_eq!(text.parse::<ImagePassphrase>().unwrap().to_string(), text);
        }
    }
}
