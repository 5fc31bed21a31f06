//! Both sides of NBD against the fuzz targets' seeds, and against what becomes of them when bytes change.
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
#![allow(clippy::panic, reason = "a panic is how a test fails")]
mod peer;

use peer::Random;
use terem_block::{exercise_nbd_client, exercise_nbd_server};

fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/");
    let entries = std::fs::read_dir(format!("{directory}{target}")).expect("there are seeds");
    let mut seeds: Vec<_> = entries
        .map(|entry| {
            let entry = entry.expect("an entry");
            (entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path()).expect("read"))
        })
        .collect();
    seeds.sort();
    seeds
}

/// Changes, drops or repeats some bytes.
fn change(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..1 + random.below(4) {
        let at = random.below(bytes.len() as u64) as usize;
        match random.below(5) {
            0 => bytes[at] = random.next() as u8,
            1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes[at] = [0, 0xff][random.below(2) as usize],
            3 => drop(bytes.drain(at..(at + 1 + random.below(8) as usize).min(bytes.len()))),
            _ => {
                let part = bytes[at..(at + 40).min(bytes.len())].to_vec();
                bytes.splice(at..at, part);
            }
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
    bytes
}

#[test]
fn clients_that_send_anything() {
    let mut random = Random(11);
    for (name, seed) in seeds("nbd_server") {
        let replies = exercise_nbd_server(&seed);
        match name.as_str() {
            // A reply for each request but the good-bye; not told apart from its data in simple replies.
            "structured" | "extended" => assert_eq!(replies, 11, "{name}"),
            "simple" | "export_name" => assert_eq!(replies, 1, "{name}"),
            _ => assert_eq!(replies, 0, "{name}"),
        }
        for _ in 0..150 {
            let _ = exercise_nbd_server(&change(&seed, &mut random));
        }
    }
}

#[test]
fn servers_that_send_anything() {
    let mut random = Random(12);
    for (name, seed) in seeds("nbd_client") {
        assert_eq!(exercise_nbd_client(&seed), name != "negotiate_refused", "{name}");
        for _ in 0..300 {
            let _ = exercise_nbd_client(&change(&seed, &mut random));
        }
    }
}
