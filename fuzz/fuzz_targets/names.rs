//! Names of images as QEMU's tools take them, trees of nodes among them: any text is understood or refused.

#![no_main]

use terem_block::{OpenOptions, Passphrase, Source};

libfuzzer_sys::fuzz_target!(|text: &str| {
    // What has a backing file that is not named is looked at on the disk: not here.
    if text.contains("backing") {
        return;
    }
    let mut options = OpenOptions::default();
    options.keys.add_secret("s", Passphrase::new(b"pass".to_vec()));
    let _ = Source::named(text, &options);
    let _ = terem_block::parse_size(text);
    let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
    let pairs = pairs.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let _ = Source::from_options(text, pairs, &options);
});
