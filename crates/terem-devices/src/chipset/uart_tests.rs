use super::*;
use crate::chipset::lab::Lines;
use proptest::prelude::*;
use std::sync::{Arc, Mutex};
use terem_bus::locked;

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl CharBackend for Screen {
    fn write(&mut self, bytes: &[u8]) {
        locked(&self.0).extend(bytes);
    }
}

struct Lab {
    uart: Uart,
    lines: Arc<Lines>,
    screen: Screen,
}

impl Lab {
    fn new() -> Self {
        let (lines, screen) = (Arc::new(Lines::default()), Screen::default());
        Self { uart: Uart::new(lines.line(4), Box::new(screen.clone())), lines, screen }
    }

    fn out(&mut self, offset: u64, value: u64) {
        assert!(Registers::write(&mut self.uart, offset, 1, value));
    }

    fn in_(&mut self, offset: u64) -> u64 {
        Registers::read(&mut self.uart, offset, 1).unwrap()
    }

    fn irq(&self) -> bool {
        self.lines.level(4)
    }

    /// FIFOs of 14, interrupts through OUT2.
    fn open(&mut self, ier: u64) {
        self.out(IIR_FCR, 0xc7);
        self.out(MCR, 0x0b);
        self.out(IER, ier);
    }
}

#[test]
fn bytes_go_out_and_the_line_is_always_ready() {
    let mut l = Lab::new();
    for b in b"hi\n" {
        assert_eq!(l.in_(LSR), 0x60);
        l.out(DATA, u64::from(*b));
    }
    assert_eq!(*locked(&l.screen.0), b"hi\n");
    assert!(!l.irq());
    l.out(LCR, 0x83);
    l.out(0, 0x01);
    l.out(1, 0x00);
    assert_eq!((l.in_(0), l.in_(1)), (1, 0));
    l.out(LCR, 0x03);
    assert_eq!((l.in_(LCR), l.in_(MSR), l.in_(1)), (3, 0xb0, 0));
    assert_eq!(Registers::read(&mut l.uart, 0, 2), None);
}

#[test]
fn an_empty_transmitter_interrupts_until_noticed() {
    let mut l = Lab::new();
    l.open(2);
    assert!(l.irq(), "enabling it raises it");
    assert_eq!(l.in_(IIR_FCR), 0xc2);
    assert!(!l.irq());
    assert_eq!(l.in_(IIR_FCR), 0xc1);
    let edges = l.lines.edges(4);
    l.out(DATA, 65);
    l.out(DATA, 66);
    assert!(l.irq());
    assert_eq!(l.lines.edges(4), edges + 2, "each byte is an edge of its own");
    l.out(IER, 0);
    assert!(!l.irq());
    l.out(MCR, 0);
    l.out(IER, 2);
    assert!(!l.irq(), "OUT2 gates it");
}

#[test]
fn received_bytes_wait_for_the_trigger_or_time_out() {
    let mut l = Lab::new();
    assert_eq!(l.uart.receive(b"ab"), 1, "without FIFOs there is room for one");
    l.open(1);
    assert_eq!(l.uart.receive(b"0123456789abcdefXYZ"), 16);
    assert!(l.irq());
    assert_eq!((l.in_(IIR_FCR), l.in_(LSR), l.uart.room()), (0xc4, 0x61, 0));
    for b in b"012" {
        assert_eq!(l.in_(DATA), u64::from(*b));
    }
    assert_eq!(l.in_(IIR_FCR), 0xcc, "13 bytes: time-out");
    assert_eq!(l.uart.room(), 3);
    l.out(IIR_FCR, 0xc3);
    assert_eq!((l.in_(IIR_FCR), l.in_(LSR), l.irq()), (0xc1, 0x60, false));
}

#[test]
fn priorities_are_line_data_transmitter_modem() {
    let mut l = Lab::new();
    l.open(0x0f);
    l.out(MCR, 0x10); // loopback: all modem lines fall
    l.out(MCR, 0x0b);
    l.uart.receive_break();
    let mut seen = vec![l.in_(IIR_FCR)];
    assert_eq!(l.in_(LSR), 0x71);
    seen.push(l.in_(IIR_FCR));
    l.in_(DATA);
    seen.push(l.in_(IIR_FCR));
    seen.push(l.in_(IIR_FCR));
    assert_eq!(seen, [0xc6, 0xcc, 0xc2, 0xc0]);
    assert_eq!((l.in_(MSR), l.in_(IIR_FCR), l.irq()), (0xbb, 0xc1, false));
}

/// Linux' autoconfig(): loopback with OUT2 and RTS reads back as DCD and CTS.
#[test]
fn loopback_returns_bytes_and_lines() {
    let mut l = Lab::new();
    l.out(MCR, 0x1a);
    assert_eq!(l.in_(MSR) & 0xf0, 0x90);
    l.out(DATA, 0x55);
    assert_eq!((l.in_(LSR) & 1, l.in_(DATA)), (1, 0x55));
    l.out(DATA, 1);
    l.out(DATA, 2);
    assert_eq!((l.in_(LSR), l.in_(DATA)), (0x63, 2), "overrun");
    assert!(locked(&l.screen.0).is_empty());
    assert_eq!(l.uart.receive(b"x"), 0, "the terminal is cut off");
    l.out(IER, 0x0f);
    assert!(!l.irq());
}

#[test]
fn a_saved_port_goes_on() {
    let mut a = Lab::new();
    a.open(3);
    a.uart.receive(b"xyz");
    a.in_(DATA);
    let mut b = Lab::new();
    b.uart.restore(a.uart.save()).unwrap();
    assert!(b.irq());
    assert_eq!((b.in_(IIR_FCR), b.in_(DATA), b.in_(DATA)), (0xcc, 0x79, 0x7a));
    assert_eq!(b.in_(IIR_FCR), 0xc2);
    let mut bad = a.uart.save();
    bad.received.extend([0; 20]);
    assert!(b.uart.restore(bad).is_err());
    b.uart.reset();
    assert_eq!((b.irq(), b.in_(IER)), (false, 0));
}

proptest! {
    /// The line is what IIR says, gated; the FIFO never overfills; every byte that was taken comes out.
    #[test]
    fn the_line_follows_iir(ops in prop::collection::vec((0_u8..10, any::<u8>()), 0..100)) {
        let mut l = Lab::new();
        for (op, value) in ops {
            match op {
                0..=7 => l.out(u64::from(op), u64::from(value)),
                8 => { l.uart.receive(&[value; 5]); }
                _ => { l.in_(u64::from(value & 7)); }
            }
            let r = &l.uart.registers;
            prop_assert!(r.received.len() <= r.capacity());
            let expected = r.interrupt() != IIR_NONE && r.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2;
            prop_assert_eq!(l.irq(), expected);
        }
    }
}
