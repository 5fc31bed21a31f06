//! Passphrases: from files, descriptors, the terminal; never from the command line, which everybody can read.

use crate::failure::Failure;
use rustix::fs::{Mode, OFlags};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::OnceLock;
use terem_block::{Keys, Passphrase};
use terem_config::{ImagePassphrase, PassphraseSource as Source};

/// Reads a passphrase; `what` says to the user which one. A new one is asked for twice.
fn read(source: &Source, what: &str, new: bool) -> Result<Passphrase, Failure> {
    let failed =
        |from: String, e: std::io::Error| Failure::host(format!("cannot read a passphrase from {from}: {e}"));
    match source {
        Source::File(path) => {
            let mut file = File::open(path).map_err(|e| failed(path.display().to_string(), e))?;
            Passphrase::read(&mut file).map_err(|e| failed(path.display().to_string(), e))
        }
        Source::Descriptor(number) => {
            // Opening it again needs no descriptor to be taken from whoever may own it.
            let path = format!("/proc/self/fd/{number}");
            let mut file = File::open(&path).map_err(|e| failed(format!("descriptor {number}"), e))?;
            Passphrase::read(&mut file).map_err(|e| failed(format!("descriptor {number}"), e))
        }
        Source::Ask => {
            let first = ask(what).map_err(|e| failed("the terminal".into(), e))?;
            if new {
                let again = ask(&format!("{what}, again")).map_err(|e| failed("the terminal".into(), e))?;
                if again != first {
                    return Err(Failure::configuration("the two passphrases are not the same"));
                }
            }
            Ok(first)
        }
    }
}

/// Reads the passphrases of a disk and of the images below it; `name` is the disk's for the user.
pub fn read_keys(sources: &[ImagePassphrase], name: &str) -> Result<Keys, Failure> {
    let mut keys = Keys::default();
    for one in sources.iter().filter(|one| one.image.is_none()) {
        let what = if name.is_empty() { "Passphrase".into() } else { format!("Passphrase of {name}") };
        keys = Keys::every(read(&one.source, &what, false)?);
    }
    for one in sources {
        if let Some(image) = &one.image {
            keys.set(image, read(&one.source, &format!("Passphrase of {}", image.display()), false)?);
        }
    }
    Ok(keys)
}

/// Asks on the terminal, without showing what is typed.
fn ask(what: &str) -> std::io::Result<Passphrase> {
    let fd = rustix::fs::open("/dev/tty", OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
    let _silent = Silent::new(fd.try_clone()?)?;
    let mut terminal = File::from(fd);
    write!(terminal, "{what}: ")?;
    let typed = Passphrase::read(&mut Line { terminal: &mut terminal, ended: false });
    writeln!(terminal)?;
    typed
}

/// A terminal that does not show what is typed, until dropped.
struct Silent(OwnedFd, rustix::termios::Termios);

impl Silent {
    fn new(fd: OwnedFd) -> std::io::Result<Self> {
        let before = tcgetattr(&fd)?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        silent.local_modes.insert(LocalModes::ICANON);
        tcsetattr(&fd, OptionalActions::Flush, &silent)?;
        Ok(Self(fd, before))
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.0, OptionalActions::Now, &self.1);
    }
}

/// What a terminal gives up to the end of the line, which is not part of it.
struct Line<'a> {
    terminal: &'a mut File,
    ended: bool,
}

impl Read for Line<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let Some(first) = buf.get_mut(..1).filter(|_| !self.ended) else { return Ok(0) };
        let n = self.terminal.read(first)?;
        self.ended = n == 0 || first[0] == b'\n';
        Ok(if self.ended { 0 } else { n })
    }
}

/// What the command line says of passphrases.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Passphrases {
    /// Where the passphrase of an encrypted image comes from: all bytes of a file or an inherited descriptor, or the
    /// terminal. With IMAGE= for that image only, such as a backing file; can be repeated.
    #[arg(long, global = true, value_name = "[IMAGE=]file:PATH|fd:NUMBER|ask")]
    passphrase: Vec<ImagePassphrase>,
    /// The same for the passphrase of a new image or key slot.
    #[arg(long, global = true, value_name = "file:PATH|fd:NUMBER|ask")]
    new_passphrase: Option<Source>,
    /// A file with the LUKS header, where that is not in the image.
    #[arg(long, global = true, value_name = "IMAGE=FILE")]
    luks_header: Vec<String>,
}

static KEYS: OnceLock<Keys> = OnceLock::new();

impl Passphrases {
    /// Reads the passphrases of images that are there, for [`keys`].
    pub fn load(&self) -> Result<(), Failure> {
        let mut keys = read_keys(&self.passphrase, "")?;
        for text in &self.luks_header {
            let (image, header) = text.split_once('=').ok_or_else(|| {
                Failure::configuration(format!("--luks-header {text}: no image")).hint("IMAGE=FILE")
            })?;
            keys.set_header(image, header);
        }
        let _ = KEYS.set(keys);
        Ok(())
    }

    /// The passphrase of something new.
    pub fn new_passphrase(&self, what: &str) -> Result<Option<Passphrase>, Failure> {
        self.new_passphrase
            .as_ref()
            .map(|source| read(source, &format!("New passphrase of {what}"), true))
            .transpose()
    }

    /// The passphrase of the image at `path`.
    pub fn of(&self, path: &Path) -> Result<Passphrase, Failure> {
        let own = self.passphrase.iter().rev().find(|one| one.image.as_deref() == Some(path));
        let every = self.passphrase.iter().rev().find(|one| one.image.is_none());
        let one = own.or(every).ok_or_else(|| {
            Failure::configuration(format!("{}: its passphrase is missing", path.display())).hint(HINT)
        })?;
        read(&one.source, &format!("Passphrase of {}", path.display()), false)
    }
}

/// What to do where a passphrase is missing.
pub const HINT: &str = "--passphrase file:PATH, --passphrase fd:NUMBER, or --passphrase ask";

/// The passphrases that the command line gave.
pub fn keys() -> Keys {
    KEYS.get().cloned().unwrap_or_default()
}
