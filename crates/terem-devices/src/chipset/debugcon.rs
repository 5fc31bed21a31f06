//! The debug console port: a byte out is a byte of log (Bochs' port `E9h`, OVMF's `402h`).

use std::fmt;
use std::sync::Mutex;

use terem_bus::{Handler, locked};

use super::uart::CharBackend;

/// What a read gives, which is how a guest finds the port.
const PRESENT: u64 = 0xe9;

/// The port. It has no state.
pub struct Debugcon {
    backend: Mutex<Box<dyn CharBackend>>,
}

impl fmt::Debug for Debugcon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Debugcon")
    }
}

impl Debugcon {
    /// The port, writing to `backend`.
    #[must_use]
    pub fn new(backend: Box<dyn CharBackend>) -> Self {
        Self { backend: Mutex::new(backend) }
    }
}

impl Handler for Debugcon {
    fn read(&self, _offset: u64, size: u8) -> Option<u64> {
        (size == 1).then_some(PRESENT)
    }

    fn write(&self, _offset: u64, size: u8, value: u64) -> bool {
        if size == 1 {
            locked(&self.backend).write(&value.to_le_bytes()[..1]);
        }
        size == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};

    struct Pipe(Sender<Vec<u8>>);

    impl CharBackend for Pipe {
        fn write(&mut self, bytes: &[u8]) {
            self.0.send(bytes.to_vec()).unwrap();
        }
    }

    #[test]
    fn bytes_go_out() {
        let (tx, rx) = channel();
        let d = Debugcon::new(Box::new(Pipe(tx)));
        assert!(d.write(0, 1, 0x41) && !d.write(0, 2, 0x4242));
        assert_eq!((d.read(0, 1), d.read(0, 4)), (Some(0xe9), None));
        drop(d);
        assert_eq!(rx.iter().collect::<Vec<_>>(), [b"A"]);
    }
}
