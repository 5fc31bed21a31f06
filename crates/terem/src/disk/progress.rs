//! Progress bars, and what `Ctrl-C` means for long operations.

use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A long operation as its user sees it.
pub struct Progress {
    bar: ProgressBar,
    /// Set by a signal.
    stop: Arc<AtomicBool>,
}

impl Progress {
    /// On standard error, and only on a terminal. From now on signals do not end the program at once.
    pub fn start() -> Self {
        let bar = ProgressBar::new(0);
        let template = "{bar:40} {percent:>3} %  {bytes} of {total_bytes}  {bytes_per_sec}  {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // A second one ends the program in the ordinary way.
            let _ = signal_hook::flag::register_conditional_default(signal, Arc::clone(&stop));
            let _ = signal_hook::flag::register(signal, Arc::clone(&stop));
        }
        Self { bar, stop }
    }

    /// To be told as `terem_block::Progress` asks for.
    pub fn tell(&self, done: u64, total: u64) -> bool {
        if total > 0 {
            self.bar.set_length(total);
        }
        self.bar.set_position(done);
        self.goes_on()
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// The same as qemu-img shows it with `-p`: percents, on standard output.
    pub fn tell_plainly(&self, show: bool, done: u64, total: u64) -> bool {
        if show && total > 0 {
            let hundredths = u128::from(done) * 10_000 / u128::from(total);
            print!("    ({}.{:02}/100%)\r", hundredths / 100, hundredths % 100);
            let _ = std::io::stdout().flush();
        }
        self.goes_on()
    }

    /// The end of that.
    pub fn end_plainly(&self, show: bool) {
        if show {
            println!();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
