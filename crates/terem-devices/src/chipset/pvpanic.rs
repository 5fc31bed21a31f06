//! pvpanic, the ISA port through which a guest's kernel tells of its panic (QEMU's `docs/specs/pvpanic`).

use std::fmt;
use std::sync::Arc;

use terem_bus::Handler;

use super::{BoardEvents, GuestPanic};

/// Event bits. A read says which of them are understood.
const PANICKED: u64 = 1 << 0;
const CRASH_LOADED: u64 = 1 << 1;
const SHUTDOWN: u64 = 1 << 2;

/// The port. It has no state.
pub struct Pvpanic {
    events: Arc<dyn BoardEvents>,
}

impl fmt::Debug for Pvpanic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pvpanic")
    }
}

impl Pvpanic {
    /// The port, telling `events`.
    #[must_use]
    pub fn new(events: Arc<dyn BoardEvents>) -> Self {
        Self { events }
    }
}

impl Handler for Pvpanic {
    fn read(&self, _offset: u64, size: u8) -> Option<u64> {
        (size == 1).then_some(PANICKED | CRASH_LOADED | SHUTDOWN)
    }

    fn write(&self, _offset: u64, size: u8, value: u64) -> bool {
        // A panic counts more than a crash kernel, and that more than a shutdown.
        let kind = match value {
            v if v & PANICKED != 0 => GuestPanic::Panicked,
            v if v & CRASH_LOADED != 0 => GuestPanic::CrashLoaded,
            v if v & SHUTDOWN != 0 => GuestPanic::Shutdown,
            _ => return size == 1,
        };
        if size == 1 {
            self.events.guest_panicked(kind);
        }
        size == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::lab::Events;

    #[test]
    fn events_are_told_apart() {
        let events = Arc::new(Events::default());
        let p = Pvpanic::new(Arc::clone(&events) as _);
        assert_eq!((p.read(0, 1), p.read(0, 2)), (Some(7), None));
        for v in [1, 2, 4, 3, 8, 0] {
            assert!(p.write(0, 1, v));
        }
        assert!(!p.write(0, 4, 1));
        assert_eq!(events.take(), ["Panicked", "CrashLoaded", "Shutdown", "Panicked"]);
    }
}
