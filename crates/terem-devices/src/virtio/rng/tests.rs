//! Entropy through a real transport.

use terem_bus::Device;

use super::super::testing::driver::Guest;
use super::*;

#[test]
fn requests_are_filled_with_different_bytes() {
    for packed in [false, true] {
        let clock = Clock::manual();
        let mut g = Guest::new(Arc::new(Rng::new(&clock)));
        g.start(packed, true, 8, 0);
        let mut seen = std::collections::HashSet::new();
        for _ in 0..20 {
            let (a, b) = (g.alloc(48), g.alloc(16));
            let id = g.submit(0, &[(a, 48, true), (b, 16, true)]);
            assert_eq!(g.wait_used(0), (id, 64));
            g.wait_vector(1);
            let bytes = [g.get(a, 48), g.get(b, 16)].concat();
            assert!(bytes.as_chunks::<8>().0.iter().all(|c| seen.insert(*c)), "8 bytes came twice");
        }
    }
}

#[test]
fn a_guest_gets_no_more_than_its_share() {
    let clock = Clock::manual();
    let mut g = Guest::new(Arc::new(Rng::new(&clock)));
    g.start(true, true, 64, 0);
    let at = g.alloc(1 << 20);
    let mut total = 0;
    for _ in 0..60 {
        g.submit(0, &[(at, 1 << 20, true)]);
        while let Some((_, len)) = g.rings[0].take_used() {
            assert!(len as usize <= MAX_REQUEST);
            total += u64::from(len);
        }
        g.rings[0].want_interrupt(Some(0));
    }
    assert_eq!(total, BURST);
    // Time gives it more, with no notification.
    g.vectors();
    clock.advance(10_000_000);
    while let Some((_, len)) = g.rings[0].take_used() {
        total += u64::from(len);
    }
    assert!(g.vectors().contains(&1));
    let earned = total - BURST;
    assert!((20_000..=RATE / 100).contains(&earned), "{earned} bytes in 10 ms");
}

#[test]
fn hostile_requests() {
    // A buffer that the device cannot write holds nothing: it is given back with 0 bytes.
    let clock = Clock::manual();
    let mut g = Guest::new(Arc::new(Rng::new(&clock)));
    g.start(false, false, 8, 0);
    let at = g.alloc(64);
    let id = g.submit(0, &[(at, 64, false)]);
    assert_eq!(g.wait_used(0), (id, 0));
    g.submit(0, &[(u64::MAX, 64, true)]);
    assert!(g.needs_reset());
    g.start(false, false, 8, 0);
    let id = g.submit(0, &[(at, 64, true)]);
    assert_eq!(g.wait_used(0), (id, 64));
}

#[test]
fn a_saved_device_goes_on() {
    let clock = Clock::manual();
    let mut g = Guest::new(Arc::new(Rng::new(&clock)));
    g.start(true, true, 8, 0);
    let at = g.alloc(64);
    g.submit(0, &[(at, 64, true)]);
    g.wait_used(0);
    g.transport.pause();
    let id = g.submit(0, &[(at, 8, true)]);
    let saved = g.transport.save().unwrap();
    let mut fresh = Guest::with_memory(Arc::new(Rng::new(&clock)), g.memory.clone());
    fresh.transport.restore(&saved).unwrap();
    fresh.rings = g.rings;
    fresh.features = g.features;
    assert_eq!(fresh.wait_used(0), (id, 8));
    let id = fresh.submit(0, &[(at, 16, true)]);
    assert_eq!(fresh.wait_used(0), (id, 16));
}
