//! The isa-debug-exit port: a test guest ends its machine with a value.

use std::fmt;
use std::sync::Arc;

use terem_bus::Handler;

use super::BoardEvents;

/// The port. It has no state.
pub struct DebugExit {
    events: Arc<dyn BoardEvents>,
}

impl fmt::Debug for DebugExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DebugExit")
    }
}

impl DebugExit {
    /// The port, telling `events`.
    #[must_use]
    pub fn new(events: Arc<dyn BoardEvents>) -> Self {
        Self { events }
    }
}

impl Handler for DebugExit {
    fn read(&self, _offset: u64, _size: u8) -> Option<u64> {
        Some(0)
    }

    fn write(&self, _offset: u64, size: u8, value: u64) -> bool {
        let [a, b, c, d, ..] = value.to_le_bytes();
        if size <= 4 {
            self.events.exit(u32::from_le_bytes([a, b, c, d]));
        }
        size <= 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::lab::Events;

    #[test]
    fn a_write_of_any_width_exits() {
        let events = Arc::new(Events::default());
        let d = DebugExit::new(Arc::clone(&events) as _);
        assert!(d.write(0, 1, 0x10) && d.write(0, 4, 0xffff_ffff) && !d.write(0, 8, 1));
        assert_eq!(events.take(), ["exit 16", "exit 4294967295"]);
        assert_eq!(d.read(0, 4), Some(0));
    }
}
