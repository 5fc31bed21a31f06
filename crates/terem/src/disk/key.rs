//! `terem disk key`: the key slots of encrypted images.

use super::arguments::{Image, KeyCommand, KeyCost};
use super::failed;
use super::passphrase::{HINT, Passphrases};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::{print, print_json};
use std::time::Duration;
use terem_block::{Cost, KeyOptions};

/// Carries out a command.
pub fn run(command: &KeyCommand, passphrases: &Passphrases) -> Result<Exit, Failure> {
    match command {
        KeyCommand::List { image, json } => list(image, *json),
        KeyCommand::Add { image, slot, cost } => {
            let (known, new) = (passphrases.of(&image.path)?, new(passphrases, image)?);
            let slot = terem_block::add_key(&image.path, &known, &new, &options(image, *slot, cost));
            tell(image, "added", slot)
        }
        KeyCommand::Change { image, slot, cost } => {
            let (old, new) = (passphrases.of(&image.path)?, new(passphrases, image)?);
            let slot = terem_block::change_key(&image.path, &old, &new, &options(image, *slot, cost));
            tell(image, "now has the new passphrase", slot)
        }
        KeyCommand::Remove { image, slot } => {
            let known = passphrases.of(&image.path)?;
            let options = options(image, *slot, &KeyCost::default());
            tell(image, "removed", terem_block::remove_key(&image.path, &known, &options))
        }
    }
}

fn options(image: &Image, slot: Option<usize>, cost: &KeyCost) -> KeyOptions {
    let cost = match (cost.iterations, cost.iter_time) {
        (Some(iterations), _) => Cost::Iterations(iterations),
        (None, Some(ms)) => Cost::Time(Duration::from_millis(ms)),
        (None, None) => Cost::default(),
    };
    KeyOptions { format: image.format, slot, cost }
}

fn new(passphrases: &Passphrases, image: &Image) -> Result<terem_block::Passphrase, Failure> {
    let name = image.path.display().to_string();
    passphrases.new_passphrase(&name)?.ok_or_else(|| {
        Failure::configuration("the new passphrase is missing")
            .hint(HINT.replace("--passphrase", "--new-passphrase"))
    })
}

fn tell(image: &Image, what: &str, slot: Result<usize, terem_block::OpenError>) -> Result<Exit, Failure> {
    let slot = slot.map_err(|error| failed("change the keys of", &image.path, &error))?;
    print(&format!("key slot {slot} {what}\n"))
}

fn list(image: &Image, json: bool) -> Result<Exit, Failure> {
    let info = terem_block::info(&image.path, image.format);
    let info = info.map_err(|error| failed("read", &image.path, &error))?;
    let slots = info.encryption.and_then(|e| e.luks).map(|luks| luks.slots).unwrap_or_default();
    if json {
        return print_json(&slots);
    }
    let mut text = format!("{:<5} {:<10} {:>12} {:>12}\n", "slot", "derived by", "iterations", "memory");
    for slot in slots {
        let memory = slot.memory.map_or_else(String::new, |kib| super::human(u64::from(kib) << 10));
        text += &format!("{:<5} {:<10} {:>12} {memory:>12}\n", slot.slot, slot.kdf, slot.iterations);
    }
    print(&text)
}
