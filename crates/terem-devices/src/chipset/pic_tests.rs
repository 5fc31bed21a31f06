use super::*;
use crate::chipset::lab::Apics;
use proptest::prelude::*;

fn pair() -> (Arc<Mutex<Pic>>, Arc<Apics>) {
    let apic = Arc::new(Apics::default());
    (Arc::new(Mutex::new(Pic::new(Arc::clone(&apic) as _))), apic)
}

fn ports(pic: &Arc<Mutex<Pic>>) -> (PicPorts, PicPorts, PicPorts) {
    let block = |b| PicPorts::new(Arc::clone(pic), b);
    (block(PicBlock::First), block(PicBlock::Second), block(PicBlock::EdgeLevel))
}

/// As Linux sets it up: vectors 30h and 38h, all unmasked.
fn started(icw4: u64) -> (Arc<Mutex<Pic>>, Arc<Apics>) {
    let (pic, apic) = pair();
    let (a, b, _) = ports(&pic);
    for (p, icws) in [(&a, [0x30, 4, icw4]), (&b, [0x38, 2, icw4])] {
        p.write(0, 1, 0x11);
        for icw in icws {
            p.write(1, 1, icw);
        }
        p.write(1, 1, 0);
    }
    (pic, apic)
}

fn set(pic: &Arc<Mutex<Pic>>, line: u32, high: bool) {
    PicLines(Arc::clone(pic)).set_line(line, high);
}

fn ack(pic: &Arc<Mutex<Pic>>) -> u8 {
    InterruptAcknowledge::acknowledge(&PicLines(Arc::clone(pic)))
}

#[test]
fn priorities_nest_and_end() {
    let (pic, apic) = started(1);
    let (a, b, _) = ports(&pic);
    set(&pic, 4, true);
    set(&pic, 1, true);
    assert!(apic.intr());
    assert_eq!(ack(&pic), 0x31);
    assert!(!apic.intr(), "4 is below 1, which is in service");
    set(&pic, 0, true);
    assert_eq!(ack(&pic), 0x30);
    a.write(0, 1, 0x20);
    assert!(!apic.intr());
    a.write(0, 1, 0x20);
    assert_eq!(ack(&pic), 0x34);
    a.write(0, 1, 0x0b);
    assert_eq!(a.read(0, 1), Some(0x10), "in service");
    set(&pic, 14, true);
    assert_eq!(ack(&pic), 0x3e);
    b.write(0, 1, 0x66);
    a.write(0, 1, 0x62);
    assert_eq!(a.read(0, 1), Some(0x10), "specific EOI of the cascade");
    set(&pic, 2, true);
    set(&pic, 99, true);
    assert!(!apic.intr());
}

#[test]
fn edges_and_levels() {
    let (pic, apic) = started(1);
    let (a, _, elcr) = ports(&pic);
    elcr.write(0, 2, 0xffff);
    assert_eq!(elcr.read(0, 2), Some(0xdef8));
    set(&pic, 5, true);
    assert_eq!(ack(&pic), 0x35);
    a.write(0, 1, 0x20);
    assert!(apic.intr(), "a level input asks again");
    set(&pic, 5, false);
    assert!(!apic.intr());
    set(&pic, 1, true);
    assert_eq!(ack(&pic), 0x31);
    a.write(0, 1, 0x20);
    assert!(!apic.intr(), "an edge input does not");
    // A request that goes away before it is acknowledged is spurious.
    set(&pic, 3, true);
    set(&pic, 3, false);
    assert!(!apic.intr());
    assert_eq!(ack(&pic), 0x37);
    a.write(0, 1, 0x0b);
    assert_eq!(a.read(0, 1), Some(0), "and not in service");
}

#[test]
fn masks_special_mask_and_poll() {
    let (pic, apic) = started(1);
    let (a, _, _) = ports(&pic);
    a.write(1, 1, 0xff);
    set(&pic, 6, true);
    assert!(!apic.intr());
    assert_eq!(a.read(0, 1), Some(0x40));
    a.write(1, 1, 0x00);
    assert_eq!(ack(&pic), 0x36);
    set(&pic, 7, true);
    assert!(!apic.intr());
    // Special mask mode: with 6 masked, lower ones get through.
    a.write(1, 1, 0x40);
    a.write(0, 1, 0x68);
    assert!(apic.intr());
    a.write(0, 1, 0x0c);
    assert_eq!(a.read(0, 1), Some(0x87), "a poll acknowledges");
    assert!(!apic.intr());
    a.write(0, 1, 0x20);
    a.write(0, 1, 0x0b);
    assert_eq!(a.read(0, 1), Some(0x40), "the masked one is passed over by EOI");
}

#[test]
fn rotation_and_automatic_end() {
    let (pic, _) = started(3);
    let (a, _, _) = ports(&pic);
    a.write(0, 1, 0x80);
    for line in [0, 1] {
        set(&pic, line, true);
    }
    assert_eq!(ack(&pic), 0x30);
    set(&pic, 0, false);
    set(&pic, 0, true);
    assert_eq!(ack(&pic), 0x31, "0 went to the lowest priority");
    assert_eq!(ack(&pic), 0x30);
    let (pic, _) = started(1);
    let (a, _, _) = ports(&pic);
    a.write(0, 1, 0xc4);
    set(&pic, 4, true);
    set(&pic, 5, true);
    assert_eq!(ack(&pic), 0x35, "4 was made the lowest");
    a.write(0, 1, 0xa0);
    assert_eq!(ack(&pic), 0x34);
}

#[test]
fn a_saved_pair_goes_on() {
    let (a, _) = started(1);
    set(&a, 4, true);
    set(&a, 8, true);
    assert_eq!(ack(&a), 0x38);
    let state = locked(&a).save();
    let (b, apic) = pair();
    locked(&b).restore(state.clone()).unwrap();
    assert!(!apic.intr());
    ports(&b).1.write(0, 1, 0x20);
    ports(&b).0.write(0, 1, 0x20);
    assert!(apic.intr());
    assert_eq!(ack(&b), 0x34);
    locked(&b).reset();
    assert!(!apic.intr());
    assert_eq!(locked(&a).save(), state);
}

proptest! {
    /// INTR is high exactly when an acknowledge cycle would find a request; levels are kept.
    #[test]
    fn intr_says_what_acknowledge_gives(ops in prop::collection::vec((0_u8..4, 0_u8..18, any::<u8>()), 0..80)) {
        let (pic, apic) = started(1);
        let (a, b, e) = ports(&pic);
        for (op, n, value) in ops {
            match op {
                0 => set(&pic, u32::from(n), value & 1 != 0),
                1 => { ack(&pic); }
                2 => { for p in [&a, &b, &e] { let _ = p.read(u64::from(n & 1), 1); } }
                _ => { [&a, &b, &e][usize::from(n % 3)].write(u64::from(n & 1), 1, u64::from(value)); }
            }
            let pic = locked(&pic);
            prop_assert_eq!(apic.intr(), pic.first.pending(Some(CASCADE)).is_some());
            prop_assert_eq!(pic.first.irr & pic.first.elcr, pic.first.lines & pic.first.elcr);
            prop_assert_eq!(pic.first.elcr & !ELCR_FIRST, 0);
        }
    }
}
