//! A console behind a real transport.

use terem_bus::Device;

use super::super::testing::backends::Terminal;
use super::super::testing::driver::Guest;
use super::*;

fn guest() -> (Guest, Arc<Console>, Arc<Terminal>) {
    let terminal = Arc::new(Terminal::default());
    let console = Arc::new(Console::new(Arc::clone(&terminal) as _));
    (Guest::new(Arc::clone(&console) as _), console, terminal)
}

#[test]
fn bytes_go_both_ways() {
    for (packed, event_idx) in [(false, false), (false, true), (true, false), (true, true)] {
        let (mut g, console, terminal) = guest();
        g.start(packed, event_idx, 8, 0);
        let text = "teremok\n".repeat(2000);
        let at = g.put(text.as_bytes());
        let id = g.submit(TX, &[(at, 10, false), (at + 10, u32::try_from(text.len() - 10).unwrap(), false)]);
        assert_eq!(g.wait_used(TX), (id, 0));
        g.wait_vector(2);
        assert_eq!(std::mem::take(&mut *locked(&terminal.shown)), text.as_bytes());
        // Input before there are buffers waits in the backend, and so does what does not fit.
        locked(&terminal.typed).extend(b"hello");
        console.input_ready();
        let (a, b) = (g.alloc(4), g.alloc(4));
        let first = g.submit(RX, &[(a, 4, true)]);
        assert_eq!(g.wait_used(RX), (first, 4));
        assert_eq!(g.get(a, 4), b"hell");
        let second = g.submit(RX, &[(b, 4, true)]);
        assert_eq!(g.wait_used(RX), (second, 1));
        assert_eq!(g.get(b, 1), b"o");
        g.vectors();
        // Buffers before there is input stay the device's.
        let third = g.submit(RX, &[(a, 4, true)]);
        assert!(g.rings[0].take_used().is_none() && g.vectors().is_empty());
        locked(&terminal.typed).extend(b"!");
        console.input_ready();
        assert_eq!(g.wait_used(RX), (third, 1));
        assert_eq!(g.vectors(), [1]);
    }
}

#[test]
fn the_size_changes_and_emergency_writes_work_without_a_driver() {
    let (mut g, console, terminal) = guest();
    g.write(g.device.0 + 8, 4, u64::from(b'!'));
    assert_eq!(*locked(&terminal.shown), b"!");
    g.start(true, true, 8, 0);
    let generation = g.read(g.common.0 + 0x15, 1);
    console.resize(132, 50);
    assert_eq!(g.vectors(), [0]);
    assert_ne!(g.read(g.common.0 + 0x15, 1), generation);
    assert_eq!((g.read(g.device.0, 2), g.read(g.device.0 + 2, 2), g.read(g.device.0 + 4, 4)), (132, 50, 1));
    console.resize(132, 50);
    assert!(g.vectors().is_empty());
}

#[test]
fn hostile_buffers() {
    let (mut g, console, terminal) = guest();
    g.start(false, true, 8, 0);
    locked(&terminal.typed).extend(b"abc");
    let at = g.alloc(16);
    let id = g.submit(RX, &[(at, 16, false)]);
    assert_eq!(g.wait_used(RX), (id, 0), "a receive buffer that cannot be written");
    let id = g.submit(TX, &[(at, 16, true)]);
    assert_eq!(g.wait_used(TX), (id, 0), "a transmit buffer that cannot be read");
    assert!(locked(&terminal.shown).is_empty());
    // The same 4 MiB thirty times over in one chain.
    let id = g.submit(TX, &[(0x80_0000, 4 << 20, false); 30]);
    assert_eq!(g.wait_used(TX), (id, 0));
    assert_eq!(std::mem::take(&mut *locked(&terminal.shown)).len() as u64, MAX_OUTPUT);
    g.submit(TX, &[(0xffff_0000, 16, false)]);
    assert!(g.needs_reset());
    console.input_ready();
    g.start(false, true, 8, 0);
    let id = g.submit(RX, &[(at, 16, true)]);
    assert_eq!(g.wait_used(RX), (id, 3), "input survives a reset");
}

#[test]
fn a_saved_console_goes_on() {
    let (mut g, console, _) = guest();
    g.start(true, true, 8, 0);
    console.resize(80, 24);
    let at = g.alloc(16);
    let id = g.submit(RX, &[(at, 16, true)]);
    g.transport.pause();
    let saved = g.transport.save().unwrap();
    let (mut fresh, console, terminal) = {
        let terminal = Arc::new(Terminal::default());
        let console = Arc::new(Console::new(Arc::clone(&terminal) as _));
        (Guest::with_memory(Arc::clone(&console) as _, g.memory.clone()), console, terminal)
    };
    fresh.transport.restore(&saved).unwrap();
    fresh.rings = g.rings;
    fresh.features = g.features;
    assert_eq!(fresh.read(fresh.device.0, 4), 80 | 24 << 16);
    locked(&terminal.typed).extend(b"on");
    console.input_ready();
    assert_eq!(fresh.wait_used(RX), (id, 2));
    fresh.wait_vector(1);
}
