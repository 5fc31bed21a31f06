//! A guest that does anything to PCI configuration space, BARs and interrupts: see [`terem_devices::pci::fuzz`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| terem_devices::pci::fuzz::play(bytes));
