//! `amend` of key slots: of LUKS images, and of LUKS within qcow2.

use super::{Failed, Named};
use std::time::Duration;
use terem_block::{Cost, Format, KeyOptions, Keys, Passphrase, SlotChange};

/// What `amend -o` says of key slots.
#[derive(Default)]
pub struct Slots {
    state: Option<bool>,
    new_secret: Option<String>,
    old_secret: Option<String>,
    slot: Option<usize>,
    cost: Option<u64>,
}

impl Slots {
    /// Takes an option; false if it is none of key slots.
    pub fn take(&mut self, format: Format, name: &str, value: &str) -> Result<bool, Failed> {
        let name = match format {
            Format::Luks => name,
            Format::Qcow2 => match name.strip_prefix("encrypt.") {
                Some(name) => name,
                None => return Ok(false),
            },
            _ => return Ok(false),
        };
        let wrong = || Failed::new(format!("Invalid parameter '{value}' for {name}"));
        match name {
            "state" => {
                self.state = Some(match value {
                    "active" => true,
                    "inactive" => false,
                    _ => return Err(wrong()),
                });
            }
            "new-secret" => self.new_secret = Some(value.to_owned()),
            "old-secret" => self.old_secret = Some(value.to_owned()),
            "keyslot" => {
                let slot = value.parse().ok().filter(|slot| *slot < 8);
                self.slot = Some(slot.ok_or_else(|| {
                    Failed::new(format!("Invalid keyslot {value} specified, must be between 0 and 7"))
                })?);
            }
            "iter-time" => self.cost = Some(value.parse().map_err(|_| wrong())?),
            "format" if value == "luks" => {}
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether anything is to be done.
    pub fn is_asked(&self) -> bool {
        self.state.is_some()
            || self.new_secret.is_some()
            || self.old_secret.is_some()
            || self.slot.is_some()
            || self.cost.is_some()
    }

    pub fn apply(&self, named: &Named, keys: &Keys, force: bool) -> Result<(), Failed> {
        let secret = |id: &str| -> Result<&Passphrase, Failed> {
            keys.secret(id).ok_or_else(|| Failed::new(format!("No secret with id '{id}'")))
        };
        let path = named.whole()?;
        let cost = self.cost.map_or_else(Cost::default, |ms| Cost::Time(Duration::from_millis(ms.max(1))));
        let options = KeyOptions { format: named.format(), slot: self.slot, cost };
        // The image must be open, which takes one of its passphrases.
        let opened = named.options().keys.of_image(path);
        let opened = opened.ok_or_else(|| {
            Failed::new("Parameter 'key-secret' is required: give the image with --image-opts and its secret")
        })?;
        let change = match self.state {
            None => return Err(Failed::new("Parameter 'state' is missing")),
            Some(true) => {
                let new = self.new_secret.as_deref();
                let new = new.ok_or_else(|| Failed::new("'new-secret' is required to activate a keyslot"))?;
                let known = match &self.old_secret {
                    Some(id) => secret(id)?,
                    None => opened,
                };
                SlotChange::Use { known, new: secret(new)?, force }
            }
            Some(false) if self.new_secret.is_some() => {
                return Err(Failed::new("'new-secret' must not be given when erasing keyslots"));
            }
            Some(false) if self.cost.is_some() => {
                return Err(Failed::new("'iter-time' must not be given when erasing keyslots"));
            }
            Some(false) => match (&self.old_secret, self.slot) {
                (Some(id), _) => SlotChange::DestroyAll(secret(id)?),
                (None, Some(_)) => SlotChange::Destroy,
                (None, None) => {
                    return Err(Failed::new(
                        "To erase keyslot(s), either 'keyslot' or 'old-secret' must be given",
                    ));
                }
            },
        };
        terem_block::change_slots(path, change, &options)?;
        Ok(())
    }
}
