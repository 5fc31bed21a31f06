//! What the tests of whole guests share: starting `terem run`, reading a guest's console, waiting for what it says.
//!
//! The guests come from `guest/` (`make guests` has made them before the tests run). A check in the minimal guest
//! says `TEREM: KEY VALUE` lines on the console (`guest/minimal-init`).

#![allow(clippy::panic, reason = "this is test code: a panic is how a test fails")]

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a guest may take for one thing that it is asked for, on a slow and busy host.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// The folder of kernels and guests.
#[must_use]
pub fn cache() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/".into()));
    let cache = || std::env::var_os("XDG_CACHE_HOME").map_or_else(|| home().join(".cache"), PathBuf::from);
    std::env::var_os("TEREM_CACHE").map_or_else(|| cache().join("terem"), PathBuf::from)
}

/// The program under test, built beside the tests.
///
/// # Panics
/// When it has not been built.
#[must_use]
pub fn terem() -> PathBuf {
    let me = std::env::current_exe().unwrap_or_else(|e| panic!("no path of the test itself: {e}"));
    let built = me.ancestors().nth(2).map(|d| d.join("terem"));
    built
        .filter(|p| p.exists())
        .unwrap_or_else(|| panic!("terem is not built beside {}: `make guests` does it", me.display()))
}

/// A file of the cache.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn cached(name: &str) -> PathBuf {
    let path = cache().join(name);
    assert!(path.exists(), "{} is missing: `make guests` makes it", path.display());
    path
}

/// Runs a command to its end, with its output.
///
/// # Panics
/// When it cannot be started.
pub fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"))
}

/// Runs a command that must succeed; its standard output.
///
/// # Panics
/// When it fails.
pub fn succeed(command: &mut Command) -> String {
    let output = run(command);
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    assert!(
        output.status.success(),
        "{command:?} ended with {}\n{}\n{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// One guest at a time in a test program: two cores do not run more to anybody's use.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Default)]
struct Console {
    text: Mutex<(String, bool)>,
    more: Condvar,
}

impl Console {
    /// Prompts have no end of line, so everything counts as it comes.
    fn fill(&self, mut from: impl Read) {
        let mut piece = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut piece) {
            let text = String::from_utf8_lossy(&piece[..count]).replace('\r', "");
            self.text.lock().unwrap_or_else(PoisonError::into_inner).0.push_str(&text);
            self.more.notify_all();
        }
        self.text.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.more.notify_all();
    }
}

/// A running guest.
pub struct Guest {
    child: Child,
    console: Arc<Console>,
    errors: Arc<Console>,
}

/// A guest that has ended.
pub struct Ended {
    /// The exit code of `terem run`; minus the signal that killed it.
    pub code: i32,
    /// What the guest printed.
    pub console: String,
    /// What terem said.
    pub errors: String,
}

impl Ended {
    /// The value of the console's first `TEREM: KEY VALUE` line.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn value(&self, key: &str) -> &str {
        let prefix = format!("TEREM: {key} ");
        self.console
            .lines()
            .find_map(|l| l.strip_prefix(&prefix))
            .unwrap_or_else(|| panic!("the guest did not say {key}:\n{}\n{}", self.console, self.errors))
    }

    /// Asserts that the guest ended with `code`, that each check that was asked for came to its end, and that none
    /// failed.
    ///
    /// # Panics
    /// When it is not so.
    pub fn assert_clean(&self, code: i32) {
        let failed: Vec<&str> = self.console.lines().filter(|l| l.contains("TEREM: FAIL")).collect();
        assert!(failed.is_empty(), "{failed:?}\n{}\n{}", self.console, self.errors);
        assert_eq!(self.code, code, "exit code\n{}\n{}", self.console, self.errors);
        assert!(!self.console.contains("Kernel panic"), "{}", self.console);
    }
}

impl Guest {
    /// Starts `terem run` with these arguments.
    ///
    /// # Panics
    /// When the program cannot be started.
    pub fn start<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        let mut command = Command::new(terem());
        command.arg("run").args(arguments);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"));
        let (console, errors): (Arc<Console>, Arc<Console>) = Default::default();
        if let (Some(out), Some(err)) = (child.stdout.take(), child.stderr.take()) {
            let (c, e) = (Arc::clone(&console), Arc::clone(&errors));
            std::thread::spawn(move || c.fill(out));
            std::thread::spawn(move || e.fill(err));
        }
        Self { child, console, errors }
    }

    /// Starts the minimal guest with kernel `series` (see `guest/kernel`) for `checks` (see `guest/minimal-init`), with more
    /// words for its command line and more arguments for terem.
    ///
    /// # Panics
    /// When its files are missing.
    #[must_use]
    pub fn minimal(series: &str, checks: &str, words: &str, arguments: &[&str]) -> Self {
        let kernel = cached(&format!("kernel-{series}/vmlinuz")).display().to_string();
        let initrd = cached(&format!("minimal-{series}/initramfs")).display().to_string();
        let cmdline = format!("console=ttyS0 quiet panic=-1 terem.test={checks} {words}");
        let fixed = ["--kernel", &kernel, "--initrd", &initrd, "--cmdline", &cmdline];
        Self::start(fixed.into_iter().chain(arguments.iter().copied()))
    }

    /// Types into the console.
    ///
    /// # Panics
    /// When the program does not take it.
    pub fn type_in(&mut self, text: &str) {
        let stdin = self.child.stdin.as_mut().unwrap_or_else(|| panic!("no standard input"));
        stdin
            .write_all(text.as_bytes())
            .and_then(|()| stdin.flush())
            .unwrap_or_else(|e| panic!("cannot type {text:?}: {e}"));
    }

    /// Waits until the console has said `text` after its first `from` bytes; where that ends.
    ///
    /// # Panics
    /// When the guest ends, or takes too long, without saying it.
    pub fn wait_after(&self, from: usize, text: &str) -> usize {
        let found =
            |all: &str| all.get(from..).and_then(|rest| rest.find(text)).map(|at| from + at + text.len());
        self.wait_until(text, found)
    }

    /// The process id of `terem run`.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the console has `text`, and returns everything up to then.
    ///
    /// # Panics
    /// When the guest ends, or takes too long, without saying it.
    pub fn wait_for(&self, text: &str) -> String {
        self.wait_until(text, |all| all.contains(text).then(|| all.to_owned()))
    }

    fn wait_until<T>(&self, text: &str, found: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut guard = self.console.text.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(found) = found(&guard.0) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !guard.1 && !left.is_zero(),
                "the guest did not say {text:?}:\n{}\n{}",
                guard.0,
                self.errors.text.lock().unwrap_or_else(PoisonError::into_inner).0
            );
            guard = self.console.more.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Kills the process as a power cut would.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// When it takes too long.
    #[must_use]
    pub fn finish(mut self) -> Ended {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
                other => {
                    let _ = self.child.kill();
                    panic!(
                        "the guest did not end ({other:?}):\n{}\n{}",
                        Self::text(&self.console),
                        Self::text(&self.errors)
                    );
                }
            }
        };
        let code = status.code().unwrap_or_else(|| -status.signal().unwrap_or(0));
        Ended { code, console: Self::text(&self.console), errors: Self::text(&self.errors) }
    }

    /// What was read, once the stream has ended.
    fn text(console: &Console) -> String {
        let mut guard = console.text.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = Instant::now() + Duration::from_secs(5);
        while !guard.1 && Instant::now() < deadline {
            guard = console
                .more
                .wait_timeout(guard, Duration::from_millis(100))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        guard.0.clone()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The sha256 of a file, by the system's own tool.
///
/// # Panics
/// When it cannot be read.
#[must_use]
pub fn sha256(path: &Path) -> String {
    let text = succeed(Command::new("sha256sum").arg(path));
    text.split_whitespace().next().unwrap_or_default().to_owned()
}
