//! Key slots of both versions: opening, changing, and changes cut off at any point.

use std::collections::BTreeSet;

use crate::memory::{Memory, cuts};
use crate::*;

const CHEAP: Cost = Cost::Iterations(1000);

fn pass(text: &str) -> Passphrase {
    Passphrase::new(text.into())
}

fn luks1() -> (Memory, VolumeKey) {
    let options = Luks1Options {
        spec: CipherSpec::DEFAULT,
        key_len: 32,
        hash: Hash::Sha256,
        cost: CHEAP,
        data_align: 4096,
    };
    let area = Memory::new(vec![0; options.data_offset() as usize]);
    let key = format_luks1(&area, &options, &pass("one")).unwrap();
    (area, key)
}

/// The key slots' area has room for three.
fn luks2(cost: Cost) -> (Memory, VolumeKey) {
    let options = Luks2Options {
        spec: CipherSpec::DEFAULT,
        key_len: 32,
        hash: Hash::Sha256,
        cost,
        sector_size: 512,
        data_offset: (32 << 10) + 3 * (128 << 10),
    };
    let area = Memory::new(vec![0; options.data_offset as usize]);
    let key = format_luks2(&area, &options, &pass("one")).unwrap();
    (area, key)
}

fn both() -> [(Memory, VolumeKey); 2] {
    [luks1(), luks2(CHEAP)]
}

/// The slot that `passphrase` opens, and whether with the right key.
fn opens(area: &Memory, key: &VolumeKey, passphrase: &str) -> Option<usize> {
    let luks = Luks::read(area).unwrap();
    match luks.unlock(area, &pass(passphrase), None, Limits::default()) {
        Ok((found, slot)) => {
            assert_eq!(found, *key);
            Some(slot)
        }
        Err(CryptError::WrongPassphrase) => None,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn slots_are_added_changed_and_removed() {
    for (area, key) in both() {
        let mut luks = Luks::read(&area).unwrap();
        assert_eq!(luks.add_key(&area, &key, &pass("two"), None, CHEAP).unwrap(), 1);
        assert_eq!((opens(&area, &key, "one"), opens(&area, &key, "two")), (Some(0), Some(1)));
        assert!(matches!(
            luks.add_key(&area, &key, &pass("x"), Some(1), CHEAP),
            Err(CryptError::SlotInUse(1))
        ));
        assert!(matches!(
            luks.add_key(&area, &key, &pass("x"), Some(99), CHEAP),
            Err(CryptError::NoSuchSlot(99))
        ));
        let slot = luks.change_key(&area, &key, 0, &pass("three"), CHEAP).unwrap();
        assert_eq!((opens(&area, &key, "one"), opens(&area, &key, "three")), (None, Some(slot)));
        luks.remove_key(&area, slot).unwrap();
        assert_eq!((opens(&area, &key, "three"), opens(&area, &key, "two")), (None, Some(1)));
        assert!(matches!(luks.remove_key(&area, 1), Err(CryptError::LastSlot(1))));
        assert!(matches!(luks.remove_key(&area, 0), Err(CryptError::NoSuchSlot(0))));
        assert_eq!(luks.info().unwrap().slots.len(), 1);
        assert!(matches!(
            Luks::read(&area).unwrap().unlock(&area, &pass("two"), Some(0), Limits::default()),
            Err(CryptError::NoSuchSlot(0))
        ));
    }
}

#[test]
fn slots_and_room_come_to_an_end() {
    let (area, key) = luks1();
    let mut luks = Luks::read(&area).unwrap();
    for slot in 1..8 {
        assert_eq!(luks.add_key(&area, &key, &pass("x"), None, CHEAP).unwrap(), slot);
    }
    assert!(matches!(luks.add_key(&area, &key, &pass("x"), None, CHEAP), Err(CryptError::NoFreeSlot(8))));
    assert_eq!(opens(&area, &key, "one"), Some(0));

    let (area, key) = luks2(CHEAP);
    let mut luks = Luks::read(&area).unwrap();
    for slot in 1..3 {
        assert_eq!(luks.add_key(&area, &key, &pass("x"), None, CHEAP).unwrap(), slot);
    }
    assert!(matches!(luks.add_key(&area, &key, &pass("y"), None, CHEAP), Err(CryptError::NoRoom(_))));
    // A change never overwrites what it replaces, so it needs room too.
    assert!(matches!(luks.change_key(&area, &key, 0, &pass("y"), CHEAP), Err(CryptError::NoRoom(_))));
    assert_eq!(opens(&area, &key, "one"), Some(0));
}

#[test]
fn removed_key_material_is_gone() {
    for (area, key) in both() {
        let mut luks = Luks::read(&area).unwrap();
        let slot = luks.add_key(&area, &key, &pass("two"), None, CHEAP).unwrap();
        let at = luks.info().unwrap().slots[slot].offset as usize;
        let material = |area: &Memory| area.bytes()[at..at + 128_000].to_vec();
        assert!(material(&area).iter().any(|&b| b != 0));
        luks.remove_key(&area, slot).unwrap();
        assert!(material(&area).iter().all(|&b| b == 0));
    }
}

/// Whatever is on the storage after a cut: what must open does, with the same key, and all can be done again.
#[test]
fn changes_survive_a_cut_at_any_point() {
    for (area, key) in both() {
        let mut luks = Luks::read(&area).unwrap();
        luks.add_key(&area, &key, &pass("two"), None, CHEAP).unwrap();
        type Change = fn(&mut Luks, &Memory, &VolumeKey);
        let changes: [(Change, &[&str], &[&str]); 3] = [
            (
                |luks, area, key| {
                    assert_eq!(luks.add_key(area, key, &pass("three"), None, CHEAP).unwrap(), 2);
                },
                &["one", "two"],
                &["one", "two", "three"],
            ),
            (|luks, area, _| luks.remove_key(area, 0).unwrap(), &["one", "two"], &["two"]),
            (
                |luks, area, key| assert!(luks.change_key(area, key, 0, &pass("three"), CHEAP).is_ok()),
                &["one", "two"],
                &["two", "three"],
            ),
        ];
        for (change, before, after) in changes {
            let start = area.bytes();
            let run = Memory::new(start.clone());
            change(&mut Luks::read(&run).unwrap(), &run, &key);
            let (mut seen, mut states) = (BTreeSet::new(), cuts(&start, &run.take_events()));
            states.push(run.bytes());
            for state in &states {
                let cut = Memory::new(state.clone());
                let open: Vec<_> =
                    ["one", "two", "three"].into_iter().filter(|p| opens(&cut, &key, p).is_some()).collect();
                // One or the other, or (LUKS 1 changes by adding and removing) all of both.
                let all = ["one", "two", "three"];
                assert!(open == before || open == after || open == all, "{open:?}");
                seen.insert(open);
            }
            assert!(seen.contains(before) && seen.contains(after), "{seen:?}");
        }
    }
}

/// A removal that was cut off is finished by the next change.
#[test]
fn interrupted_removals_are_finished() {
    for (area, key) in both() {
        let mut luks = Luks::read(&area).unwrap();
        luks.add_key(&area, &key, &pass("two"), None, CHEAP).unwrap();
        let at = luks.info().unwrap().slots[0].offset as usize;
        let start = area.bytes();
        area.take_events();
        luks.remove_key(&area, 0).unwrap();
        for state in cuts(&start, &area.take_events()) {
            let cut = Memory::new(state);
            if opens(&cut, &key, "one").is_some() {
                continue;
            }
            let mut luks = Luks::read(&cut).unwrap();
            // LUKS 1 wipes with any change, LUKS 2 with one that frees something.
            let slot = luks.add_key(&cut, &key, &pass("three"), Some(2), CHEAP).unwrap();
            luks.remove_key(&cut, slot).unwrap();
            assert!(cut.bytes()[at..at + 128_000].iter().all(|&b| b == 0));
            assert_eq!(opens(&cut, &key, "two"), Some(1));
        }
    }
}

#[test]
fn luks2_lives_on_either_copy() {
    let (area, key) = luks2(Cost::Argon2 { memory: 64, passes: 1, lanes: 2 });
    let whole = area.bytes();
    for damaged in [0..16384, 0..1, 5000..5001, 16384..32768, 16384 + 4000..16384 + 4001] {
        let mut bytes = whole.clone();
        bytes[damaged.clone()].iter_mut().for_each(|b| *b ^= 0x55);
        let area = Memory::new(bytes);
        assert_eq!(opens(&area, &key, "one"), Some(0), "{damaged:?}");
        let mut luks = Luks::read(&area).unwrap();
        assert!(luks.info().unwrap().degraded);
        luks.add_key(&area, &key, &pass("two"), None, CHEAP).unwrap();
        let luks = Luks::read(&area).unwrap();
        assert!(!luks.info().unwrap().degraded);
        assert_eq!(opens(&area, &key, "one"), Some(0));
    }
    let mut bytes = whole;
    bytes[100] ^= 1;
    bytes[16384 + 100] ^= 1;
    assert!(matches!(Luks::read(&Memory::new(bytes)), Err(CryptError::Corrupt(_))));
}

#[test]
fn what_is_no_header_is_refused() {
    assert!(matches!(Luks::read(&Memory::new(vec![0; 1 << 20])), Err(CryptError::NotLuks)));
    assert!(matches!(Luks::read(&Memory::new(vec![])), Err(CryptError::NotLuks)));
    let (area, _) = luks1();
    let whole = area.bytes();
    for (at, bytes) in [
        (6, &[0, 3][..]),          // version
        (8, b"enigma\0"),          // cipher
        (72, b"md5\0"),            // hash
        (108, &[0, 0, 0, 7]),      // key length
        (208, &[1, 2, 3, 4]),      // state of slot 0
        (208 + 40, &[0, 0, 0, 0]), // slot 0 within the header
        (208 + 44, &[0xff; 4]),    // stripes
        (208 + 88, &[0, 0, 0, 8]), // slot 1 at slot 0's place
        (104, &[0, 0, 0, 16]),     // data at the slots' place
    ] {
        let mut changed = whole.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        assert!(Luks::read(&Memory::new(changed)).is_err(), "{at}");
    }
    assert!(Luks::read(&Memory::new(whole[..100_000].to_vec())).is_err());
}
