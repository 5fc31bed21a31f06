use super::*;
use crate::chipset::lab::{Events, Lines};
use proptest::prelude::*;

struct Lab {
    controller: Arc<Mutex<I8042>>,
    data: I8042Ports,
    command: I8042Ports,
    lines: Arc<Lines>,
    events: Arc<Events>,
}

impl Lab {
    fn new() -> Self {
        let (lines, events) = (Arc::new(Lines::default()), Arc::new(Events::default()));
        let c = I8042::new(lines.line(1), lines.line(12), Arc::clone(&events) as _);
        let controller = Arc::new(Mutex::new(c));
        let port = |p| I8042Ports::new(Arc::clone(&controller), p);
        Self { data: port(I8042Port::Data), command: port(I8042Port::Command), controller, lines, events }
    }

    fn command(&self, value: u64) {
        assert!(self.command.write(0, 1, value));
    }

    fn data(&self, value: u64) {
        assert!(self.data.write(0, 1, value));
    }

    fn status(&self) -> u64 {
        self.command.read(0, 1).unwrap()
    }

    /// All bytes that are waiting, and whether the last one was the mouse's.
    fn bytes(&self) -> (Vec<u64>, bool) {
        let (mut bytes, mut mouse) = (vec![], false);
        while self.status() & 1 != 0 {
            mouse = self.status() & 0x20 != 0;
            bytes.push(self.data.read(0, 1).unwrap());
        }
        (bytes, mouse)
    }

    fn ask(&self, command: u64) -> Vec<u64> {
        self.command(command);
        self.bytes().0
    }

    fn keyboard(&self, bytes: &[u64]) -> Vec<u64> {
        bytes
            .iter()
            .flat_map(|&b| {
                self.data(b);
                self.bytes().0
            })
            .collect()
    }

    fn mouse(&self, bytes: &[u64]) -> Vec<u64> {
        let answer = |&b: &u64| {
            self.command(0xd4);
            self.data(b);
            let (bytes, mouse) = self.bytes();
            assert!(bytes.is_empty() || mouse);
            bytes
        };
        bytes.iter().flat_map(answer).collect()
    }
}

#[test]
fn the_controller_answers_as_linux_probes_it() {
    let l = Lab::new();
    assert_eq!(l.ask(0xaa), [0x55]);
    assert_eq!(l.ask(0xab), [0]);
    assert_eq!(l.ask(0xa9), [0]);
    assert_eq!(l.ask(0x20), [0x47]);
    l.command(0x60);
    l.data(0x65);
    assert_eq!(l.ask(0x20), [0x65]);
    l.command(0xa7);
    assert_eq!(l.ask(0x20), [0x65 | 0x20]);
    l.command(0xa8);
    l.command(0xad);
    assert_eq!(l.ask(0x20), [0x55]);
    // The loop test of the mouse port: D3h puts a byte into its output.
    l.command(0xd3);
    l.data(0x5a);
    assert_eq!(l.bytes(), (vec![0x5a], true));
    assert_eq!(l.status() & 0x18, 0x10, "the last write was data");
}

#[test]
fn resets_and_a20() {
    let l = Lab::new();
    l.command(0xfe);
    assert_eq!(l.events.take(), ["reset"]);
    l.command(0xff);
    assert!(l.events.take().is_empty());
    assert!(locked(&l.controller).a20());
    l.command(0xd1);
    l.data(0xdd);
    assert!(!locked(&l.controller).a20());
    let port = Port92(Arc::clone(&l.controller));
    assert_eq!(port.read(0, 1), Some(0));
    port.write(0, 1, 2);
    assert_eq!(l.ask(0xd0), [3]);
    assert!(l.events.take().is_empty());
    port.write(0, 1, 3);
    l.command(0xd1);
    l.data(0x02);
    assert_eq!(l.events.take(), ["reset", "reset"]);
}

#[test]
fn the_keyboard_speaks_ps2() {
    let l = Lab::new();
    assert_eq!(l.keyboard(&[0xff]), [0xfa, 0xaa]);
    assert_eq!(l.keyboard(&[0xf2]), [0xfa, 0xab, 0x41]);
    assert_eq!(l.keyboard(&[0xed, 7]), [0xfa, 0xfa]);
    assert_eq!(l.keyboard(&[0xf0, 0]), [0xfa, 0xfa, 0x41]);
    assert_eq!(l.keyboard(&[0xee, 0x01]), [0xee, 0xfe]);
    assert_eq!(l.keyboard(&[0xf5]), [0xfa]);
    locked(&l.controller).inject_scancodes(&[0x1e]);
    assert!(l.bytes().0.is_empty(), "not scanning");
    assert_eq!(l.keyboard(&[0xf4]), [0xfa]);
    let edges = l.lines.edges(1);
    locked(&l.controller).inject_scancodes(&[0x1e, 0x9e]);
    assert!(l.lines.level(1));
    assert_eq!(l.bytes(), (vec![0x1e, 0x9e], false));
    assert_eq!((l.lines.edges(1) - edges, l.lines.level(1)), (2, false));
}

#[test]
fn the_mouse_speaks_ps2() {
    let l = Lab::new();
    assert_eq!(l.mouse(&[0xff]), [0xfa, 0xaa, 0]);
    assert_eq!(l.mouse(&[0xf2]), [0xfa, 0]);
    assert_eq!(l.mouse(&[0xf3, 200, 0xe8, 3, 0xe7]), [0xfa; 5]);
    assert_eq!(l.mouse(&[0xe9]), [0xfa, 0x10, 3, 200]);
    locked(&l.controller).inject_mouse(1, 1, 0);
    assert!(l.bytes().0.is_empty(), "not reporting");
    assert_eq!(l.mouse(&[0xeb]), [0xfa, 0x08, 1, 1]);
    assert_eq!(l.mouse(&[0xf4]), [0xfa]);
    locked(&l.controller).inject_mouse(-3, 500, 1);
    assert!(l.lines.level(12) && !l.lines.level(1));
    assert_eq!(l.bytes(), (vec![0x19, 0xfd, 0xff], true));
    assert_eq!(l.mouse(&[0xee, 0x55, 0xec]), [0xfa, 0x55, 0xfa]);
}

#[test]
fn a_saved_controller_goes_on() {
    let a = Lab::new();
    a.mouse(&[0xf4]);
    a.data(0xed);
    locked(&a.controller).inject_scancodes(&[0x1e]);
    let b = Lab::new();
    locked(&b.controller).restore(locked(&a.controller).save()).unwrap();
    assert!(b.lines.level(1));
    assert_eq!(b.bytes().0, [0xfa, 0x1e]);
    assert_eq!(b.keyboard(&[7]), [0xfa], "was waiting for the LEDs");
    locked(&b.controller).inject_mouse(1, 0, 0);
    assert_eq!(b.bytes().0, [8, 1, 0]);
    DeviceState::reset(&mut *locked(&b.controller));
    assert_eq!((b.ask(0x20), b.lines.level(1)), (vec![0x47], false));
}

proptest! {
    /// Lines follow the output buffer, and everything that waits can be read out in bounded time.
    #[test]
    fn any_bytes_are_taken(ops in prop::collection::vec((0_u8..5, any::<u8>()), 0..120)) {
        let l = Lab::new();
        for (op, value) in ops {
            match op {
                0 => l.command(u64::from(value)),
                1 => l.data(u64::from(value)),
                2 => { let _ = l.data.read(0, 1); }
                3 => locked(&l.controller).inject_scancodes(&[value; 3]),
                _ => locked(&l.controller).inject_mouse(i16::from(value) * 3, -i16::from(value), value),
            }
            let c = locked(&l.controller);
            let (source, mode) = (c.output.map(|(_, s)| s), c.mode);
            drop(c);
            prop_assert_eq!(l.lines.level(12), source == Some(Source::Mouse) && mode & 2 != 0);
            let keyboard = source.is_some() && source != Some(Source::Mouse);
            prop_assert_eq!(l.lines.level(1), keyboard && mode & 1 != 0);
        }
        prop_assert!(l.bytes().0.len() <= 2 * 64 + 2);
    }
}
