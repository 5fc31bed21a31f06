//! An NBD server that sends anything: see [`terem_block::exercise_nbd_client`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = terem_block::exercise_nbd_client(bytes);
});
