//! The transport's registers and life, seen by a driver.

use super::super::Rng;
use super::super::testing::backends::{MemoryDisk, Terminal};
use super::super::testing::driver::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, Guest, NEEDS_RESET, RAM};
use super::super::{Blk, Console};
use super::*;

fn guest() -> Guest {
    Guest::new(Arc::new(Blk::new(Arc::new(MemoryDisk::new(1 << 20)), 2, "")))
}

#[test]
fn identities_are_those_of_the_specification() {
    let disk = guest();
    assert_eq!(disk.config_read(0, 4), 0x1042_1af4);
    assert_eq!(disk.config_read(8, 4), 0x0100_0001);
    let clock = terem_bus::Clock::manual();
    let rng = Guest::new(Arc::new(Rng::new(&clock)));
    assert_eq!((rng.config_read(2, 2), rng.device), (0x1044, (0, 0)));
    assert_eq!(Guest::new(Arc::new(Console::new(Arc::new(Terminal::default())))).config_read(2, 2), 0x1043);
    assert_eq!(disk.notify, (0x3000, 8));
}

#[test]
fn features_are_refused_and_frozen_as_they_must_be() {
    let g = guest();
    let offered = g.offered();
    let transport = feature::VERSION_1 | feature::RING_PACKED | feature::EVENT_IDX;
    assert_eq!(offered & transport, transport);
    let refused = |features: u64| {
        g.set_status(0);
        g.set_status(ACKNOWLEDGE | DRIVER);
        g.choose(features);
        g.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        g.status() & FEATURES_OK == 0
    };
    assert!(refused(0), "the legacy interface");
    assert!(refused(offered & !feature::VERSION_1));
    assert!(refused(feature::VERSION_1 | 1 << 63), "never offered");
    assert!(refused(feature::VERSION_1 | 1 << 33), "IOMMU_PLATFORM was not offered");
    g.set_status(ACKNOWLEDGE | DRIVER | DRIVER_OK);
    assert_eq!(g.status() & DRIVER_OK, 0, "no DRIVER_OK without FEATURES_OK");
    assert!(!refused(feature::VERSION_1));
    g.choose(offered);
    assert_eq!(g.read(g.common.0 + 0xc, 4), feature::VERSION_1 >> 32, "frozen");
    g.set_status(ACKNOWLEDGE);
    assert_eq!(g.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK, "bits are only added");
    g.set_status(NEEDS_RESET | ACKNOWLEDGE);
    assert!(!g.needs_reset(), "only the device sets that");
    g.write(g.common.0 + 4, 4, 0);
    g.write(g.common.0, 4, 2);
    assert_eq!(g.read(g.common.0 + 4, 4), 0, "features above 63");
}

#[test]
fn registers_have_their_widths() {
    let g = guest();
    let c = g.common.0;
    let float = |size: u8| terem_bus::all_ones(size);
    assert_eq!(g.read(c + 0x12, 2), 2);
    for (offset, size) in [(0x12, 1), (0x12, 4), (0x14, 2), (0x13, 1), (0x21, 4), (0x22, 2), (0x3c, 4)] {
        assert_eq!(g.read(c + offset, size), float(size), "{offset:#x} with {size} bytes");
    }
    g.write(c + 0x16, 2, 1);
    g.write(c + 0x20, 8, 0x1_2345_6780);
    assert_eq!((g.read(c + 0x24, 4), g.read(c + 0x20, 4)), (1, 0x2345_6780));
    g.write(c + 0x24, 4, 7);
    assert_eq!(g.read(c + 0x20, 8), 0x7_2345_6780);
    g.write(c + 0x22, 2, 0xffff);
    assert_eq!(g.read(c + 0x20, 8), 0x7_2345_6780);
    g.write(c + 0x16, 2, 0);
    assert_eq!(g.read(c + 0x20, 8), 0, "each queue has its own");
    g.write(c + 0x16, 2, 2);
    assert_eq!((g.read(c + 0x18, 2), g.read(c + 0x1c, 2), g.read(c + 0x1a, 2)), (0, 0, 0xffff));
    g.write(c + 0x20, 8, 0x1000);
    g.write(c + 0x1c, 2, 1);
    assert_eq!(g.read(c + 0x20, 8), 0, "there is no queue 2");
    g.write(c + 0x16, 2, 1);
    assert_eq!(g.read(c + 0x1e, 2), 1);
    g.write(c + 0x1a, 2, 3);
    assert_eq!(g.read(c + 0x1a, 2), 0xffff, "there are vectors 0 to 2");
    g.write(c + 0x1a, 2, 2);
    g.write(c + 0x10, 2, 1);
    assert_eq!((g.read(c + 0x1a, 2), g.read(c + 0x10, 2)), (2, 1));
    g.set_status(0);
    assert_eq!((g.read(c + 0x10, 2), g.read(c + 0x16, 2)), (0xffff, 0), "reset");
}

/// What a hostile driver does while it sets up queue 0; each must end in `DEVICE_NEEDS_RESET`.
type Hostile = (&'static str, fn(&Guest, u64));

const HOSTILE: &[Hostile] = &[
    ("size 0", |g, c| g.write(c + 0x18, 2, 0)),
    ("a size that is no power of two", |g, c| g.write(c + 0x18, 2, 100)),
    ("a size above the largest", |g, c| g.write(c + 0x18, 2, 512)),
    ("a table outside RAM", |g, c| g.write(c + 0x20, 8, RAM)),
    ("a table that wraps round", |g, c| g.write(c + 0x20, 8, u64::MAX - 15)),
    ("a table that is not aligned", |g, c| g.write(c + 0x20, 8, 0x1_0008)),
    ("an available ring outside RAM", |g, c| g.write(c + 0x28, 8, RAM - 8)),
    ("a used ring that is not aligned", |g, c| g.write(c + 0x30, 8, 0x3_0002)),
];

#[test]
fn rings_that_cannot_be_stop_the_device() {
    for (name, act) in HOSTILE {
        let mut g = guest();
        g.negotiate(false, false, 0);
        let c = g.common.0;
        for (at, address) in [(0x20, 0x1_0000), (0x28, 0x2_0000), (0x30, 0x3_0000)] {
            g.write(c + at, 8, address);
        }
        act(&g, c);
        g.write(c + 0x1c, 2, 1);
        assert!(g.needs_reset(), "{name}");
        assert!(g.vectors().is_empty(), "{name}: no interrupt before DRIVER_OK");
        g.set_status(0);
        assert_eq!(g.status(), 0, "{name}: a reset heals");
    }
}

#[test]
fn queues_run_between_their_enabling_and_reset_only() {
    let mut g = guest();
    let c = g.common.0;
    g.write(c + 0x1c, 2, 1);
    assert_eq!(g.read(c + 0x1c, 2), 0, "not before FEATURES_OK");
    g.negotiate(false, false, 0);
    g.enable_queue(0, 8);
    let before = g.read(c + 0x20, 8);
    g.write(c + 0x20, 8, 0x5000);
    g.write(c + 0x18, 2, 4);
    assert_eq!((g.read(c + 0x20, 8), g.read(c + 0x18, 2)), (before, 8), "fixed while it is enabled");
    g.write(c + 0x1c, 2, 0);
    assert_eq!(g.read(c + 0x1c, 2), 1, "a queue is not switched off so");
    let at = g.put(&[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    g.add(0, &[(at, 16, false), (at + 64, 1, true)]);
    g.kick(0);
    g.kick(1);
    g.kick(7);
    assert!(g.rings[0].take_used().is_none(), "nothing is taken before DRIVER_OK");
    g.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert!(g.rings[0].take_used().is_some(), "what was there before is taken then");
    assert!(!g.needs_reset());
}

#[test]
fn without_msix_the_pin_and_the_isr_register_are_used() {
    let mut g = guest();
    g.use_intx();
    g.start(false, true, 8, 0);
    let high = |g: &Guest| *locked(&g.line.0);
    let at = g.put(&[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let flush = [(at, 16, false), (at + 64, 1, true)];
    assert!(!high(&g));
    g.submit(0, &flush);
    assert!(high(&g) && g.vectors().is_empty());
    assert_eq!(g.read(g.isr.0, 1), 1);
    assert!(!high(&g));
    assert_eq!(g.read(g.isr.0, 1), 0, "reading clears");
    g.wait_used(0);
    g.add(0, &[(at, 16, false)]);
    g.kick(0);
    assert!(g.needs_reset() && high(&g));
    assert_eq!(g.read(g.isr.0, 1), 2, "a configuration change");
    g.start(false, true, 8, 0);
    g.submit(0, &flush);
    assert!(high(&g));
    g.set_status(0);
    assert!(!high(&g), "a reset lowers the pin");
}

#[test]
fn the_configuration_access_capability_reaches_the_structures() {
    let g = guest();
    let at = g.access;
    let point = |offset: u64, length| {
        g.config_write(at + 4, 1, 4);
        g.config_write(at + 8, 4, u32::try_from(offset).unwrap());
        g.config_write(at + 12, 4, length);
    };
    point(g.common.0 + 0x14, 1);
    g.config_write(at + 16, 1, u32::from(ACKNOWLEDGE | DRIVER));
    assert_eq!(g.status(), ACKNOWLEDGE | DRIVER);
    assert_eq!(g.config_read(at + 16, 1), 3);
    assert_eq!(g.config_read(at + 16, 4), 3, "no more than the length");
    point(g.device.0, 4);
    assert_eq!(g.config_read(at + 16, 4), 2048);
    assert_eq!(g.config_read(at + 17, 1), 8);
    // What is no access does nothing and reads as it was written.
    for (bar, offset, length) in
        [(0, 0, 4), (4, 0x4000, 4), (4, 0xffff_fffc, 4), (4, 2, 4), (4, 0, 3), (4, 0, 0)]
    {
        g.config_write(at + 4, 1, bar);
        g.config_write(at + 8, 4, offset);
        g.config_write(at + 12, 4, length);
        g.config_write(at + 16, 4, 0x1122_3344);
        assert_eq!(g.config_read(at + 16, 4), 0x1122_3344);
    }
    assert_eq!(g.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn a_machine_reset_takes_everything_back() {
    let mut g = guest();
    g.start(true, true, 8, 0);
    Device::reset(&*g.transport);
    assert_eq!(g.config_read(4, 2), 0);
    assert_eq!(g.read(g.common.0 + 0x12, 2), 0xffff, "the BAR is gone");
    let device = locked(&g.transport.common).registers().clone();
    assert_eq!(device, locked(&guest().transport.common).registers().clone());
}

#[test]
fn states_that_do_not_fit_are_refused() {
    let mut g = guest();
    g.start(true, true, 8, 0);
    let saved = g.transport.save().unwrap();
    let one = Guest::new(Arc::new(Blk::new(Arc::new(MemoryDisk::new(1 << 20)), 1, "")));
    let error = one.transport.restore(&saved).unwrap_err();
    assert!(error.to_string().contains("queues"), "{error}");
    let clock = terem_bus::Clock::manual();
    let rng = Guest::new(Arc::new(Rng::new(&clock)));
    assert!(rng.transport.restore(&saved).unwrap_err().to_string().contains("virtio-blk"));
    let mut readonly = MemoryDisk::new(1 << 20);
    readonly.geometry.read_only = true;
    let readonly = Guest::new(Arc::new(Blk::new(Arc::new(readonly), 2, "")));
    let error = readonly.transport.restore(&saved).unwrap_err();
    assert!(error.to_string().contains("not offered here"), "{error}");
    let mut bent = saved.clone();
    bent.state["registers"]["queues"][0]["descriptors"] = serde_json::json!(RAM);
    let h = guest();
    assert!(h.transport.restore(&bent).is_err());
    assert_eq!(locked(&h.transport.common).registers(), locked(&guest().transport.common).registers());
    // A failed device can be saved, and is failed when it comes back.
    let mut broken = guest();
    broken.start(true, true, 8, 0);
    broken.add(0, &[(0x1000, 16, false)]);
    broken.kick(0);
    assert!(broken.needs_reset());
    let other = guest();
    other.transport.restore(&broken.transport.save().unwrap()).unwrap();
    assert!(other.needs_reset());
    other.kick(0);
    other.set_status(0);
    assert_eq!(other.status(), 0);
    // Saving does not stop a device that was running.
    let at = g.put(&[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    g.submit(0, &[(at, 16, false), (at + 64, 1, true)]);
    g.wait_used(0);
}
