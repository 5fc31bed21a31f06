//! Both rings against the driver's model, and against drivers that break the rules.

use std::collections::VecDeque;

use proptest::prelude::*;
use terem_memory::vm_memory::{Bytes, GuestAddress};
use terem_memory::{GuestMemory, RamRange};

use super::super::testing::ring::{Buffer, DriverRing, TABLE};
use super::*;

const RING: u64 = 0x1_0000;
const DATA: u64 = 0x40_0000;
const RAM: u64 = 0x80_0000;

fn memory() -> GuestMemory {
    GuestMemory::new(&[RamRange { base: 0, size: RAM }]).unwrap()
}

fn queue(driver: &DriverRing) -> Queue {
    Queue::new(driver.memory.clone(), driver.config, RingPosition::default()).unwrap()
}

fn flat(chain: &Chain) -> Vec<Buffer> {
    let side = |r: &Ranges, w| r.as_slice().iter().map(move |&(a, l)| (a.0, l, w)).collect::<Vec<_>>();
    [side(&chain.readable, false), side(&chain.writable, true)].concat()
}

#[derive(Debug, Clone)]
enum Step {
    /// Readable and writable buffers, and whether through an indirect table.
    Add(u16, u16, bool),
    Pop,
    /// Pop two and put them back.
    Peek,
    /// Give back the n-th chain in flight (modulo), with this length.
    Publish(usize, u32),
    /// Give back all that is in flight at once.
    PublishAll,
    /// Collect what was used.
    Collect,
    /// Save the queue and go on with a new one, if nothing is in flight.
    Restore,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..4_u16, 0..4_u16, any::<bool>()).prop_map(|(r, w, i)| Step::Add(r, w, i)),
        5 => Just(Step::Pop),
        1 => Just(Step::Peek),
        4 => (any::<usize>(), 0..5000_u32).prop_map(|(i, n)| Step::Publish(i, n)),
        1 => Just(Step::PublishAll),
        2 => Just(Step::Collect),
        1 => Just(Step::Restore),
    ]
}

/// What the model says: chains in the order in which they must be popped, and used in the order in which
/// the driver must find them.
#[derive(Default)]
struct Model {
    available: VecDeque<(u16, Vec<Buffer>)>,
    in_flight: Vec<(Chain, u16)>,
    used: VecDeque<(u16, u32)>,
}

fn play(size: u16, packed: bool, event_idx: bool, steps: &[Step]) {
    let mut driver = DriverRing::new(memory(), RING, size, packed, event_idx);
    let mut queue = queue(&driver);
    let mut model = Model::default();
    let mut next = DATA;
    for step in steps {
        match *step {
            Step::Add(r, w, indirect) => {
                let count = usize::from(r + w).max(1);
                if driver.room() < if indirect { 1 } else { count } {
                    continue;
                }
                let mut buffers = Vec::new();
                for i in 0..count {
                    let len = u32::try_from(next % 4999 + 1).unwrap();
                    buffers.push((next, len, i >= usize::from(r)));
                    next = DATA + (next - DATA + u64::from(len)) % 0x30_0000;
                }
                let id = driver.add(&buffers, indirect);
                model.available.push_back((id, buffers));
            }
            Step::Pop => {
                let popped = queue.pop().unwrap();
                let expected = model.available.pop_front();
                assert_eq!(popped.as_ref().map(flat), expected.as_ref().map(|(_, b)| b.clone()));
                if let (Some(chain), Some((id, _))) = (popped, expected) {
                    assert_eq!(chain.token.id, id);
                    model.in_flight.push((chain, id));
                }
            }
            Step::Peek => {
                let mark = queue.mark();
                for (_, buffers) in model.available.iter().take(2) {
                    assert_eq!(&flat(&queue.pop().unwrap().unwrap()), buffers);
                }
                queue.rewind(mark);
            }
            Step::Publish(which, len) => {
                if !model.in_flight.is_empty() {
                    let (chain, id) = model.in_flight.remove(which % model.in_flight.len());
                    queue.publish(&[(chain.token, len)]).unwrap();
                    model.used.push_back((id, len));
                }
            }
            Step::PublishAll => {
                if model.in_flight.is_empty() {
                    continue;
                }
                let all: Vec<_> = (1..).zip(&model.in_flight).map(|(n, (c, _))| (c.token, n)).collect();
                queue.publish(&all).unwrap();
                model.used.extend((1..).zip(model.in_flight.drain(..)).map(|(n, (_, id))| (id, n)));
            }
            Step::Collect => {
                while let Some(used) = driver.take_used() {
                    assert_eq!(Some(used), model.used.pop_front());
                }
                assert!(model.used.is_empty());
            }
            Step::Restore => {
                let position = queue.position();
                assert_eq!(position.is_some(), model.in_flight.is_empty());
                if let Some(position) = position {
                    let text = serde_json::to_string(&position).unwrap();
                    let position = serde_json::from_str(&text).unwrap();
                    queue = Queue::new(driver.memory.clone(), driver.config, position).unwrap();
                }
            }
        }
        let in_flight = usize::from(queue.in_flight());
        assert!(in_flight >= model.in_flight.len() && in_flight <= usize::from(size));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn split_rings_agree_with_the_model(
        power in 0..5_u32,
        event_idx: bool,
        steps in proptest::collection::vec(step(), 0..400),
    ) {
        play(1 << power, false, event_idx, &steps);
    }

    #[test]
    fn packed_rings_agree_with_the_model(
        size in 1..20_u16,
        event_idx: bool,
        steps in proptest::collection::vec(step(), 0..400),
    ) {
        play(size, true, event_idx, &steps);
    }
}

const KINDS: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

#[test]
fn indices_wrap_round_many_times() {
    // The split ring's index wraps at 2^16, the packed ring's every 3 chains.
    for (packed, event_idx) in KINDS {
        let size = if packed { 3 } else { 4 };
        let mut driver = DriverRing::new(memory(), RING, size, packed, event_idx);
        let mut queue = queue(&driver);
        let rounds = if packed || event_idx { 1000 } else { 70_000 };
        for round in 0..rounds {
            let id = driver.add(&[(DATA, 8, true)], round % 2 == 0);
            let chain = queue.pop().unwrap().unwrap();
            queue.publish(&[(chain.token, round % 9)]).unwrap();
            assert_eq!(driver.take_used(), Some((id, round % 9_u32)));
            assert!(queue.pop().unwrap().is_none());
        }
    }
}

#[test]
fn an_interrupt_comes_exactly_when_it_is_wanted() {
    for (packed, event_idx) in KINDS {
        let size = 8;
        let mut driver = DriverRing::new(memory(), RING, size, packed, event_idx);
        let mut queue = queue(&driver);
        for round in 0..200_u16 {
            let (wanted_after, count) = (round % 5, round / 5 % 4 + 1);
            driver.want_interrupt(Some(wanted_after));
            assert!(!queue.needs_interrupt().unwrap(), "nothing was published");
            for _ in 0..count {
                driver.add(&[(DATA, 8, true)], false);
                let chain = queue.pop().unwrap().unwrap();
                queue.publish(&[(chain.token, 1)]).unwrap();
            }
            let expected = !event_idx || wanted_after < count;
            assert_eq!(
                queue.needs_interrupt().unwrap(),
                expected,
                "packed {packed}, event {event_idx}, round {round}"
            );
            while driver.take_used().is_some() {}
            driver.want_interrupt(None);
            driver.add(&[(DATA, 8, true)], false);
            let chain = queue.pop().unwrap().unwrap();
            queue.publish(&[(chain.token, 1)]).unwrap();
            assert!(!queue.needs_interrupt().unwrap(), "packed {packed}, event {event_idx}, round {round}");
            driver.take_used().unwrap();
        }
    }
}

#[test]
fn the_driver_notifies_exactly_when_it_must() {
    for (packed, event_idx) in KINDS {
        let mut driver = DriverRing::new(memory(), RING, 8, packed, event_idx);
        let mut queue = queue(&driver);
        for round in 0..100 {
            assert!(!queue.enable_notifications().unwrap());
            driver.add(&[(DATA, 8, true)], false);
            assert!(driver.must_notify(), "packed {packed}, event {event_idx}, round {round}");
            queue.disable_notifications().unwrap();
            let first = queue.pop().unwrap().unwrap();
            driver.add(&[(DATA, 8, true)], false);
            assert!(!driver.must_notify(), "packed {packed}, event {event_idx}, round {round}");
            assert!(queue.enable_notifications().unwrap(), "came while notifications were off");
            let second = queue.pop().unwrap().unwrap();
            queue.publish(&[(second.token, 0), (first.token, 0)]).unwrap();
            while driver.take_used().is_some() {}
        }
    }
}

/// What a hostile driver does to its ring, and the error that must come of it.
type Hostile = (&'static str, fn(&mut DriverRing), fn(&QueueError) -> bool);

const HOSTILE_SPLIT: &[Hostile] = &[
    (
        "a chain that is a loop",
        |d| {
            d.put_descriptor(RING, DATA, 16, 1, 1);
            d.put_descriptor(RING + 16, DATA, 16, 1, 0);
            d.make_available(0);
        },
        |e| *e == QueueError::Loop,
    ),
    (
        "a head beyond the table",
        |d| d.make_available(8),
        |e| *e == QueueError::DescriptorIndex { index: 8, size: 8 },
    ),
    (
        "next beyond the table",
        |d| {
            d.put_descriptor(RING, DATA, 16, 1, 0x8000);
            d.make_available(0);
        },
        |e| matches!(e, QueueError::DescriptorIndex { index: 0x8000, .. }),
    ),
    (
        "an available index that jumps",
        |d| d.put16(d.config.driver + 2, 9),
        |e| *e == QueueError::AvailableJump { ahead: 9, size: 8 },
    ),
    (
        "an available index that goes back",
        |d| d.put16(d.config.driver + 2, 0xffff),
        |e| matches!(e, QueueError::AvailableJump { ahead: 0xffff, .. }),
    ),
    (
        "an indirect table with a loop",
        |d| {
            d.put_descriptor(DATA, DATA, 16, 1, 0);
            d.put_descriptor(RING, DATA, 16, 4, 0);
            d.make_available(0);
        },
        |e| *e == QueueError::Loop,
    ),
    (
        "an indirect table with next beyond it",
        |d| {
            d.put_descriptor(DATA, DATA, 16, 1, 5);
            d.put_descriptor(RING, DATA, 32, 4, 0);
            d.make_available(0);
        },
        |e| matches!(e, QueueError::DescriptorIndex { index: 5, size: 2 }),
    ),
];

/// The same through the driver's own functions, for both rings: the descriptors' flags differ only in
/// their place. `put` writes descriptor `index` of the ring.
fn put(d: &DriverRing, index: u64, addr: u64, len: u32, flags: u16) {
    if d.config.packed {
        d.put_descriptor(RING + 16 * index, addr, len, 0, flags | 1 << 7);
    } else {
        d.put_descriptor(RING + 16 * index, addr, len, flags, u16::try_from(index + 1).unwrap());
    }
}

fn put_table(d: &DriverRing, at: u64, addr: u64, len: u32, flags: u16) {
    if d.config.packed {
        d.put_descriptor(at, addr, len, 0, flags);
    } else {
        d.put_descriptor(at, addr, len, flags, 0);
    }
}

fn offer(d: &mut DriverRing) {
    if !d.config.packed {
        d.make_available(0);
    }
}

const HOSTILE_BOTH: &[Hostile] = &[
    ("a buffer behind RAM", |d| put(d, 0, RAM, 1, 0), |e| *e == QueueError::NotRam { addr: RAM, len: 1 }),
    ("a buffer that leaves RAM", |d| put(d, 0, RAM - 8, 9, 2), |e| matches!(e, QueueError::NotRam { .. })),
    (
        "a buffer that wraps round",
        |d| put(d, 0, u64::MAX - 3, 8, 2),
        |e| matches!(e, QueueError::NotRam { .. }),
    ),
    ("an absurd length", |d| put(d, 0, DATA, u32::MAX, 0), |e| matches!(e, QueueError::NotRam { .. })),
    ("an empty buffer", |d| put(d, 0, DATA, 0, 0), |e| *e == QueueError::EmptyBuffer { addr: DATA }),
    (
        "readable after writable",
        |d| {
            put(d, 0, DATA, 8, 1 | 2);
            put(d, 1, DATA, 8, 0);
        },
        |e| *e == QueueError::ReadableAfterWritable,
    ),
    (
        "a buffer over the descriptors",
        |d| put(d, 0, RING - 8, 9, 2),
        |e| matches!(e, QueueError::OverlapsRing { .. }),
    ),
    (
        "a buffer over the driver area",
        |d| put(d, 0, d.config.driver, 1, 0),
        |e| matches!(e, QueueError::OverlapsRing { .. }),
    ),
    (
        "a buffer over the device area",
        |d| put(d, 0, d.config.device, 2, 2),
        |e| matches!(e, QueueError::OverlapsRing { .. }),
    ),
    ("an indirect table outside RAM", |d| put(d, 0, RAM, 16, 4), |e| matches!(e, QueueError::NotRam { .. })),
    ("an indirect table of 15 bytes", |d| put(d, 0, DATA, 15, 4), |e| matches!(e, QueueError::Indirect(_))),
    ("an empty indirect table", |d| put(d, 0, DATA, 0, 4), |e| matches!(e, QueueError::Indirect(_))),
    ("a huge indirect table", |d| put(d, 0, DATA, 16 * 1025, 4), |e| *e == QueueError::ChainTooLong),
    ("indirect and next", |d| put(d, 0, DATA, 16, 4 | 1), |e| matches!(e, QueueError::Indirect(_))),
    (
        "indirect in indirect",
        |d| {
            put_table(d, DATA, DATA, 16, 4);
            put(d, 0, DATA, 16, 4);
        },
        |e| matches!(e, QueueError::Indirect(_)),
    ),
    (
        "4 GiB in one chain",
        |d| {
            for i in 0..1024 {
                let next = u16::from(i < 1023);
                if d.config.packed {
                    d.put_descriptor(DATA + 16 * i, DATA, 0x40_0000, 0, 0);
                } else {
                    let to = u16::try_from(i + 1).unwrap();
                    d.put_descriptor(DATA + 16 * i, DATA, 0x40_0000, next, to);
                }
            }
            put(d, 0, DATA, 16 * 1024, 4);
        },
        |e| *e == QueueError::ChainTooLarge,
    ),
];

#[test]
fn hostile_rings_give_their_errors() {
    for packed in [false, true] {
        let own = if packed { &[][..] } else { HOSTILE_SPLIT };
        for (i, (name, act, is_expected)) in own.iter().chain(HOSTILE_BOTH).enumerate() {
            let mut driver = DriverRing::new(memory(), RING, 8, packed, false);
            let mut queue = queue(&driver);
            act(&mut driver);
            if i >= own.len() {
                offer(&mut driver);
            }
            let error = queue.pop().expect_err(name);
            assert!(is_expected(&error), "{name} (packed: {packed}): {error}");
        }
    }
}

#[test]
fn an_endless_chain_in_a_packed_ring_ends() {
    let driver = DriverRing::new(memory(), RING, 8, true, false);
    for i in 0..8 {
        put(&driver, i, DATA, 8, 1);
    }
    assert_eq!(queue(&driver).pop().unwrap_err(), QueueError::Overcommitted(8));
}

#[test]
fn a_driver_that_reuses_what_is_in_flight_is_stopped() {
    let mut driver = DriverRing::new(memory(), RING, 8, false, false);
    let mut queue = queue(&driver);
    driver.put_descriptor(RING, DATA, 8, 0, 0);
    for _ in 0..8 {
        driver.make_available(0);
        queue.pop().unwrap().unwrap();
    }
    driver.make_available(0);
    assert_eq!(queue.pop().unwrap_err(), QueueError::Overcommitted(8));
}

#[test]
fn indirect_tables_need_to_be_negotiated() {
    for packed in [false, true] {
        let mut driver = DriverRing::new(memory(), RING, 8, packed, false);
        driver.config.indirect = false;
        let mut queue = queue(&driver);
        driver.add(&[(DATA, 8, false)], true);
        assert!(matches!(queue.pop(), Err(QueueError::Indirect(_))));
    }
}

#[test]
fn long_indirect_chains_are_taken_whole() {
    for packed in [false, true] {
        let mut driver = DriverRing::new(memory(), RING, 4, packed, false);
        let mut queue = queue(&driver);
        let buffers: Vec<Buffer> = (0..TABLE).map(|i| (DATA + 64 * u64::from(i), 64, i > 20)).collect();
        driver.add(&buffers, true);
        assert_eq!(flat(&queue.pop().unwrap().unwrap()), buffers);
    }
}

#[test]
fn rings_that_cannot_be_are_refused() {
    let memory = memory();
    let good = DriverRing::new(memory.clone(), RING, 8, false, false).config;
    let new = |config| Queue::new(memory.clone(), config, RingPosition::default()).map(|_| ());
    assert!(new(good).is_ok());
    for size in [0, 3, 0x8001] {
        assert_eq!(new(RingConfig { size, ..good }), Err(QueueError::Size(size)));
    }
    assert!(new(RingConfig { size: 3, packed: true, ..good }).is_ok(), "packed rings have any size");
    for bad in [
        RingConfig { descriptors: RING + 8, ..good },
        RingConfig { descriptors: RAM - 112, ..good },
        RingConfig { driver: good.driver + 1, ..good },
        RingConfig { driver: RAM - 4, ..good },
        RingConfig { device: good.device + 2, ..good },
        RingConfig { device: u64::MAX - 3, ..good },
    ] {
        assert!(matches!(new(bad), Err(QueueError::Placement { .. })), "{bad:?}");
    }
    let at = RingPosition { index: 8, wrap: true };
    assert!(Queue::new(memory.clone(), RingConfig { packed: true, ..good }, at).is_err());
    assert!(memory.write_obj(1_u8, GuestAddress(RING)).is_ok());
}
