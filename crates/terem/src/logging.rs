//! The log: to standard error, and readable while the terminal is raw.

use crate::failure::Failure;
use crate::terminal;
use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tracing::callsite::Identifier;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::{EnvFilter, FilterExt};
use tracing_subscriber::layer::{Context, Filter, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// So many messages of one place in the program are shown in a [`PERIOD`].
const MOST: u32 = 20;
const PERIOD: Duration = Duration::from_secs(60);

/// Starts the log. `filter` is a level or a list of `module=level`.
pub fn start(filter: &str) -> Result<(), Failure> {
    let filter = EnvFilter::builder().parse(filter).map_err(|error| {
        Failure::configuration(format!("--log {filter}: it cannot be read: {error}"))
            .hint("error, warn, info, debug or trace; or a list such as info,terem_block=debug")
    })?;
    let lines = tracing_subscriber::fmt::layer().with_writer(|| Lines).with_ansi(false).without_time();
    tracing_subscriber::registry().with(lines.with_filter(filter.and(Limit::default()))).init();
    Ok(())
}

/// Holds back a message that comes again and again. A guest can cause most of ours as often as it likes, such as by a
/// triple fault right after each reset, and must not fill the host's disk with them. Who asks for `debug` or `trace` gets
/// all of those.
#[derive(Default)]
struct Limit(Mutex<HashMap<Identifier, Said>>);

/// What one place in the program has said.
struct Said {
    since: Instant,
    count: u32,
}

impl Said {
    /// Counts one more message, and returns which one of the period it is.
    fn more(&mut self, now: Instant) -> u32 {
        if now.saturating_duration_since(self.since) >= PERIOD {
            *self = Self { since: now, count: 0 };
        }
        self.count = self.count.saturating_add(1);
        self.count
    }
}

impl<S: Subscriber> Filter<S> for Limit {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let place = event.metadata();
        if *place.level() > Level::INFO {
            return true;
        }
        let now = Instant::now();
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = places.entry(place.callsite()).or_insert(Said { since: now, count: 0 }).more(now);
        if count == MOST + 1 {
            let text =
                format!("{:>5} {}: more of these are not shown for a while\n", place.level(), place.target());
            let _ = Lines.write_all(text.as_bytes());
        }
        count <= MOST
    }
}

/// Standard error; in a raw terminal a new line needs a carriage return as well.
struct Lines;

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if terminal::is_raw() {
            for line in bytes.split_inclusive(|&byte| byte == b'\n') {
                io::stderr().write_all(line)?;
                if line.ends_with(b"\n") {
                    io::stderr().write_all(b"\r")?;
                }
            }
        } else {
            io::stderr().write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_may_speak_again_in_the_next_period() {
        let began = Instant::now();
        let mut said = Said { since: began, count: 0 };
        for n in 1..=MOST + 5 {
            assert_eq!(said.more(began + PERIOD / 2), n);
        }
        assert_eq!(said.more(began + PERIOD), 1);
        assert_eq!(said.more(began + PERIOD + PERIOD / 2), 2);
    }
}
