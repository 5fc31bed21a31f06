//! A guest that sends any frames into user-mode networking: see [`terem_net::fuzz`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| terem_net::fuzz::play(bytes));
