//! The reset control register at port `CF9h` (ICH9 datasheet section 13.7.5).

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use terem_bus::{DeviceState, Registers, StateError};

use super::BoardEvents;

/// Bit 2: a change from 0 to 1 resets, as bits 1 (hard) and 3 (with power cycle) say. All kinds of
/// reset are one here.
const RST_CPU: u8 = 1 << 2;
/// Bits that keep what is written.
const WRITABLE: u8 = 0x0e;

/// The register.
pub struct ResetControl {
    events: Arc<dyn BoardEvents>,

    value: u8,
}

impl fmt::Debug for ResetControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ResetControl({:#x})", self.value)
    }
}

impl ResetControl {
    /// The register, telling `events`.
    #[must_use]
    pub fn new(events: Arc<dyn BoardEvents>) -> Self {
        Self { events, value: 0 }
    }
}

impl Registers for ResetControl {
    fn read(&mut self, _offset: u64, size: u8) -> Option<u64> {
        (size == 1).then(|| u64::from(self.value))
    }

    fn write(&mut self, _offset: u64, size: u8, value: u64) -> bool {
        if size != 1 {
            return false;
        }
        let value = value.to_le_bytes()[0] & WRITABLE;
        let rises = value & !self.value & RST_CPU != 0;
        self.value = value;
        if rises {
            self.events.reset();
        }
        true
    }
}

/// Saved state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResetControlState {
    value: u8,
}

impl DeviceState for ResetControl {
    const NAME: &'static str = "reset-control";
    type State = ResetControlState;

    fn save(&self) -> ResetControlState {
        let Self { events: _, value } = self;
        ResetControlState { value: *value }
    }

    fn restore(&mut self, state: ResetControlState) -> Result<(), StateError> {
        self.value = state.value & WRITABLE;
        Ok(())
    }

    fn reset(&mut self) {
        self.value = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::lab::Events;

    #[test]
    fn the_rising_bit_resets() {
        let events = Arc::new(Events::default());
        let mut r = ResetControl::new(Arc::clone(&events) as _);
        assert!(r.write(0, 1, 2) && events.take().is_empty());
        assert!(r.write(0, 1, 0xf6));
        assert_eq!(events.take(), ["reset"]);
        assert!(r.write(0, 1, 6) && events.take().is_empty(), "it must rise");
        assert!(!r.write(0, 2, 6));
        assert_eq!(r.read(0, 1), Some(6));
        let mut b = ResetControl::new(Arc::clone(&events) as _);
        b.restore(r.save()).unwrap();
        assert!(b.write(0, 1, 6) && events.take().is_empty());
        DeviceState::reset(&mut b);
        assert!(b.write(0, 1, 6));
        assert_eq!(events.take(), ["reset"]);
    }
}
