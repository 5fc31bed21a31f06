//! A LUKS header from anywhere, opened and changed: see [`terem_crypt::fuzz`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| terem_crypt::fuzz::header(bytes));
