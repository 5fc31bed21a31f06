//! qemu-img's commands and options, exit codes and JSON, for scripts and programs that call it.
//!
//! `terem qemu-img …` or `terem` under the name `qemu-img` comes here. What is printed for people is not word for
//! word the same; what programs read is.

mod arguments;
mod change;
mod convert;
mod copy;
mod describe;
mod facts;
mod keyslots;
mod objects;
mod show;
mod text;

use arguments::{Arguments, Command, Common};
use clap::FromArgMatches;
use std::ffi::OsString;
use std::fmt::Display;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use terem_block::{BackingPolicy, Format, Keys, OpenError, OpenOptions, Source};

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
    // As getopt_long: names of options may be cut short, and the last of several counts.
    let command = <Arguments as clap::CommandFactory>::command();
    let command = command.mut_subcommands(|command| command.infer_long_args(true).args_override_self(true));
    let parsed = command.try_get_matches_from(arguments);
    let parsed = parsed.and_then(|matches| {
        let mut arguments = Arguments::from_arg_matches(&matches)?;
        if let (Command::Bitmap(bitmap), Some((_, matches))) = (&mut arguments.command, matches.subcommand())
        {
            bitmap.read_order(matches);
        }
        Ok(arguments)
    });
    let parsed = match parsed {
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
        Command::Convert(convert) => convert::convert(convert),
        Command::Create(create) => change::create(create),
        Command::Dd(dd) => copy::dd(dd),
        Command::Info(info) => describe::info(info),
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

/// An image as given: a file name or `json:{…}`, or with `--image-opts` a list of options.
struct Named {
    /// The name as given.
    text: String,
    source: Source,
}

/// How a name is to be understood.
struct Naming<'a> {
    format: Option<&'a String>,
    image_opts: bool,
    force_share: bool,
    keys: &'a Keys,
}

impl<'a> Naming<'a> {
    /// What the options of most commands say.
    fn of(common: &'a Common, keys: &'a Keys) -> Self {
        let Common { format, image_opts, force_share, .. } = common;
        Self { format: format.as_ref(), image_opts: *image_opts, force_share: *force_share, keys }
    }
}

impl Named {
    fn new(filename: &str, common: &Common) -> Result<Self, Failed> {
        let keys = objects::keys(&common.object)?;
        Self::parse(filename, &Naming::of(common, &keys))
    }

    fn parse(filename: &str, naming: &Naming<'_>) -> Result<Self, Failed> {
        let base = OpenOptions {
            lock: !naming.force_share,
            backing: BackingPolicy::Any,
            keys: naming.keys.clone(),
            ..OpenOptions::default()
        };
        let failed = |error: OpenError| {
            Failed::new(format!("Could not open '{filename}': {}", crate::failure::chain(&error)))
        };
        let mut source = if naming.image_opts {
            Source::from_options(filename, text::options(filename), &base)
        } else {
            Source::named(filename, &base)
        }
        .map_err(failed)?;
        if let Some(format) = maybe_format(naming.format)? {
            if source.options.format.is_some_and(|found| found != format) {
                return Err(Failed::new(format!(
                    "Could not open '{filename}': Cannot specify both -f and another driver"
                )));
            }
            source.options.format = Some(format);
        }
        Ok(Self { text: filename.to_owned(), source })
    }

    fn path(&self) -> &Path {
        &self.source.path
    }

    fn options(&self) -> &OpenOptions {
        &self.source.options
    }

    fn format(&self) -> Option<Format> {
        self.source.options.format
    }

    fn read_only(&self) -> OpenOptions {
        OpenOptions { read_only: true, ..self.source.options.clone() }
    }

    /// The image, if it is a whole file: what is changed in place must be.
    fn whole(&self) -> Result<&Path, Failed> {
        if self.source.options.part.is_some() {
            return Err(Failed::new(format!("'{}': a part of a file cannot be changed by this", self.text)));
        }
        Ok(self.path())
    }

    /// The name as it is printed.
    fn shown(&self) -> String {
        describe::name_of(&self.source)
    }

    /// "Could not open …", as qemu-img says it.
    fn failed(&self, error: &OpenError) -> Failed {
        let image = self.shown();
        if let OpenError::NotFound { path } = error {
            let path = path.display();
            return Failed::new(format!(
                "Could not open '{image}': Could not open '{path}': No such file or directory"
            ));
        }
        Failed::new(format!("Could not open '{image}': {}", crate::failure::chain(error)))
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
