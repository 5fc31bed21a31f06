//! A VDI, VHD, VHDX or VMDK image from anywhere, opened, written to and checked: see [`terem_block::exercise_pieces`].

#![no_main]

use std::hash::{DefaultHasher, Hash, Hasher};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // Where it is written follows from what it is, so that an input alone reproduces what happened.
    let mut seed = DefaultHasher::new();
    bytes.hash(&mut seed);
    let _ = terem_block::exercise_pieces(bytes, seed.finish());
});
