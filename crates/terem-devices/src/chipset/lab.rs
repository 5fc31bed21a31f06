//! What the tests of this folder connect devices to: sinks that remember.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use terem_bus::{ApicBus, ApicMessage, IrqLine, LineSink, MsiMessage, MsiSink, locked};

use super::{BoardEvents, GuestPanic};

/// Local APICs.
#[derive(Default)]
pub struct Apics {
    intr: AtomicBool,
    messages: Mutex<Vec<ApicMessage>>,
}

impl Apics {
    pub fn intr(&self) -> bool {
        self.intr.load(Ordering::SeqCst)
    }

    pub fn take(&self) -> Vec<ApicMessage> {
        std::mem::take(&mut locked(&self.messages))
    }
}

impl ApicBus for Apics {
    fn deliver(&self, message: ApicMessage) {
        locked(&self.messages).push(message);
    }

    fn set_intr(&self, high: bool) {
        self.intr.store(high, Ordering::SeqCst);
    }

    fn pulse_nmi(&self) {}

    fn pulse_smi(&self) {}
}

/// 32 lines: levels, and rising edges counted.
#[derive(Default)]
pub struct Lines {
    levels: AtomicU32,
    edges: [AtomicU32; 32],
}

impl Lines {
    pub fn level(&self, line: usize) -> bool {
        self.levels.load(Ordering::SeqCst) & 1 << line != 0
    }

    pub fn edges(&self, line: usize) -> u32 {
        self.edges[line].load(Ordering::SeqCst)
    }

    pub fn line(self: &Arc<Self>, line: u32) -> IrqLine {
        IrqLine::new(Arc::clone(self) as _, line)
    }
}

impl LineSink for Lines {
    fn set_line(&self, line: u32, high: bool) {
        let bit = 1 << line;
        if high {
            if self.levels.fetch_or(bit, Ordering::SeqCst) & bit == 0 {
                self.edges[line as usize].fetch_add(1, Ordering::SeqCst);
            }
        } else {
            self.levels.fetch_and(!bit, Ordering::SeqCst);
        }
    }
}

/// Messages.
#[derive(Default)]
pub struct Messages(Mutex<Vec<MsiMessage>>);

impl Messages {
    pub fn take(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut locked(&self.0))
    }
}

impl MsiSink for Messages {
    fn send_msi(&self, message: MsiMessage) {
        locked(&self.0).push(message);
    }
}

/// Board events, as words.
#[derive(Default)]
pub struct Events(Mutex<Vec<String>>);

impl Events {
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut locked(&self.0))
    }

    fn push(&self, word: String) {
        locked(&self.0).push(word);
    }
}

impl BoardEvents for Events {
    fn power_off(&self) {
        self.push("power off".into());
    }

    fn reset(&self) {
        self.push("reset".into());
    }

    fn guest_panicked(&self, kind: GuestPanic) {
        self.push(format!("{kind:?}"));
    }

    fn exit(&self, value: u32) {
        self.push(format!("exit {value}"));
    }
}
