//! qemu-img's commands and options, exit codes and JSON, for scripts and programs that call it.
//!
//! `terem qemu-img …` or `terem` under the name `qemu-img` comes here. What is printed for people is not word for
//! word the same; what programs read is.

mod arguments;
mod change;
mod copy;
mod show;
mod text;

use arguments::{Arguments, Command, Common};
use clap::Parser;
use std::ffi::OsString;
use std::fmt::Display;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use terem_block::{BackingPolicy, Format, OpenError, OpenOptions};

/// The version of qemu-img that this is like: programs look at it to know what there is.
const VERSION: &str = "10.0.2";

/// Why a command failed: what is printed, and the exit code.
pub struct Failed {
    text: String,
    code: u8,
}

impl Failed {
    fn new(text: impl Display) -> Self {
        Self { text: text.to_string(), code: 1 }
    }

    fn code(self, code: u8) -> Self {
        Self { code, ..self }
    }
}

impl From<OpenError> for Failed {
    fn from(error: OpenError) -> Self {
        Self::new(crate::failure::chain(&error))
    }
}

/// The exit code, or why there is none.
type Outcome = Result<u8, Failed>;

/// Carries out a command line whose first word is the program's name.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    match arguments.get(1).and_then(|word| word.to_str()) {
        Some("-V" | "--version") => {
            return out(&format!("qemu-img version {VERSION} (terem {})\n", env!("CARGO_PKG_VERSION")));
        }
        Some("-h" | "--help") => {
            let help = <Arguments as clap::CommandFactory>::command().render_long_help();
            let formats: Vec<_> = Format::all().map(text::format_name).collect();
            return out(&format!("{help}\nSupported image formats:\n  {}\n", formats.join(" ")));
        }
        _ => {}
    }
    let parsed = match Arguments::try_parse_from(arguments) {
        Ok(parsed) => parsed,
        Err(error) => {
            let named = error.get(clap::error::ContextKind::InvalidSubcommand);
            if let Some(clap::error::ContextValue::String(name)) = named {
                eprintln!("qemu-img: Command not found: {name}\nTry 'qemu-img --help' for more info");
                return ExitCode::FAILURE;
            }
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    match run(&parsed.command) {
        Ok(code) => ExitCode::from(code),
        Err(failed) => {
            eprintln!("qemu-img: {}", failed.text);
            ExitCode::from(failed.code)
        }
    }
}

fn run(command: &Command) -> Outcome {
    match command {
        Command::Amend(amend) => change::amend(amend),
        Command::Bench(bench) => copy::bench(bench),
        Command::Bitmap(bitmap) => change::bitmap(bitmap),
        Command::Check(check) => show::check(check),
        Command::Commit(commit) => change::commit(commit),
        Command::Compare(compare) => copy::compare(compare),
        Command::Convert(convert) => copy::convert(convert),
        Command::Create(create) => change::create(create),
        Command::Dd(dd) => copy::dd(dd),
        Command::Info(info) => show::info(info),
        Command::Map(map) => show::map(map),
        Command::Measure(measure) => show::measure(measure),
        Command::Rebase(rebase) => change::rebase(rebase),
        Command::Resize(resize) => change::resize(resize),
        Command::Snapshot(snapshot) => change::snapshot(snapshot),
    }
}

/// Writes to standard output; a reader that has gone away is no error.
fn out(text: &str) -> ExitCode {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    ExitCode::SUCCESS
}

/// A format by the name that the user gave.
fn format_of(name: &str) -> Result<Format, Failed> {
    Format::from_name(name).ok_or_else(|| Failed::new(format!("Unknown file format '{name}'")))
}

fn maybe_format(name: Option<&String>) -> Result<Option<Format>, Failed> {
    name.map(|name| format_of(name)).transpose()
}

/// An image as given: a file name, or with `--image-opts` a list of options.
struct Named {
    path: PathBuf,
    options: OpenOptions,
}

impl Named {
    fn new(filename: &str, common: &Common) -> Result<Self, Failed> {
        if !common.object.is_empty() {
            return Err(Failed::new("--object: objects such as secrets are not supported yet"));
        }
        Self::parse(filename, common.format.as_ref(), common.image_opts, common.force_share)
    }

    fn parse(
        filename: &str,
        format: Option<&String>,
        image_opts: bool,
        force_share: bool,
    ) -> Result<Self, Failed> {
        let mut named = Self {
            path: filename.strip_prefix("file:").unwrap_or(filename).into(),
            options: OpenOptions {
                format: maybe_format(format)?,
                lock: !force_share,
                backing: BackingPolicy::Any,
                ..OpenOptions::default()
            },
        };
        if image_opts {
            named.read_image_opts(filename)?;
        }
        Ok(named)
    }

    /// `driver=qcow2,file.filename=disk.img` and the like.
    fn read_image_opts(&mut self, text: &str) -> Result<(), Failed> {
        let mut file = None;
        for (name, value) in text::options(text) {
            match name.as_str() {
                "driver" if value == "file" => self.options.format = Some(Format::Raw),
                "driver" => self.options.format = Some(format_of(&value)?),
                "filename" | "file.filename" | "file.file.filename" => file = Some(value),
                "file.driver" | "file.file.driver" if value == "file" || value == "raw" => {}
                "read-only" | "cache.direct" | "cache.no-flush" | "file.locking" | "discard" => {}
                "force-share" => self.options.lock = value != "on",
                _ => return Err(Failed::new(format!("--image-opts: '{name}={value}' is not supported"))),
            }
        }
        self.path = file.ok_or_else(|| Failed::new("--image-opts: a file name is missing"))?.into();
        Ok(())
    }

    fn read_only(&self) -> OpenOptions {
        OpenOptions { read_only: true, ..self.options.clone() }
    }

    /// "Could not open …", as qemu-img says it.
    fn failed(&self, error: &OpenError) -> Failed {
        if let OpenError::NotFound { path } = error {
            let (image, path) = (self.path.display(), path.display());
            return Failed::new(format!(
                "Could not open '{image}': Could not open '{path}': No such file or directory"
            ));
        }
        Failed::new(format!("Could not open '{}': {}", self.path.display(), crate::failure::chain(error)))
    }
}

/// Whether JSON is wanted.
fn is_json(output: &str) -> Result<bool, Failed> {
    match output {
        "json" => Ok(true),
        "human" => Ok(false),
        _ => Err(Failed::new("--output expects 'human' or 'json'")),
    }
}
