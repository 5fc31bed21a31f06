//! A driver that does anything to a virtio device: see [`terem_devices::virtio::fuzz`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| terem_devices::virtio::fuzz::play(bytes));
