//! Saved state: what a device writes down so that it, or another program, can go on from there.

use std::sync::Mutex;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::locked;

/// A device's state as it is stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedDevice {
    /// The device type's name ([`DeviceState::NAME`]).
    pub device: String,
    /// The version of the layout of `state`.
    pub version: u32,
    /// The fields.
    pub state: serde_json::Value,
}

/// Why a saved state was not taken.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It is another device's.
    #[error("saved state of a {found} was given to a {expected}")]
    Device {
        /// Who should load it.
        expected: &'static str,
        /// Whose it is.
        found: String,
    },
    /// It was written by a newer program.
    #[error("the state of {device} has version {found}, and this program knows versions up to {known}")]
    Version {
        /// The device.
        device: &'static str,
        /// The state's version.
        found: u32,
        /// The newest version known here.
        known: u32,
    },
    /// Fields are missing, unknown or out of range.
    #[error("the state of {device} is damaged: {reason}")]
    Invalid {
        /// The device.
        device: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// A device whose guest-visible state can be saved, restored and reset.
///
/// [`Self::State`] is a type of its own, so that the device can change inside without breaking what was
/// saved; [`Self::save`] destructures `Self` naming every field, so that a new one cannot be forgotten.
pub trait DeviceState {
    /// The device type's name, as in its documentation.
    const NAME: &'static str;
    /// The version of [`Self::State`] that [`Self::save`] writes.
    const VERSION: u32 = 1;
    /// What is saved.
    type State: Serialize + DeserializeOwned;

    /// The state now. The machine is paused meanwhile.
    fn save(&self) -> Self::State;

    /// Goes on from `state`. Values come from a file and may be anything.
    ///
    /// # Errors
    /// Says what is wrong with the state; the device is then as it was, or reset.
    fn restore(&mut self, state: Self::State) -> Result<(), StateError>;

    /// Back to the state after power-on.
    fn reset(&mut self);

    /// An error for a value that this device cannot have.
    fn invalid(reason: impl Into<String>) -> StateError {
        StateError::Invalid { device: Self::NAME, reason: reason.into() }
    }
}

/// [`DeviceState`] behind a lock and without its types: what a machine keeps a list of.
pub trait Device: Send + Sync {
    /// The device type's name.
    fn name(&self) -> &'static str;

    /// The state now.
    ///
    /// # Errors
    /// [`StateError::Invalid`] when the state cannot be written down.
    fn save(&self) -> Result<SavedDevice, StateError>;

    /// Goes on from a saved state.
    ///
    /// # Errors
    /// See [`StateError`].
    fn restore(&self, saved: &SavedDevice) -> Result<(), StateError>;

    /// Back to the state after power-on.
    fn reset(&self);
}

impl<T: DeviceState + Send> Device for Mutex<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn save(&self) -> Result<SavedDevice, StateError> {
        let state = serde_json::to_value(locked(self).save()).map_err(|e| T::invalid(e.to_string()))?;
        Ok(SavedDevice { device: T::NAME.into(), version: T::VERSION, state })
    }

    fn restore(&self, saved: &SavedDevice) -> Result<(), StateError> {
        if saved.device != T::NAME {
            return Err(StateError::Device { expected: T::NAME, found: saved.device.clone() });
        }
        if saved.version > T::VERSION {
            return Err(StateError::Version { device: T::NAME, found: saved.version, known: T::VERSION });
        }
        let state = T::State::deserialize(&saved.state).map_err(|e| T::invalid(e.to_string()))?;
        locked(self).restore(state)
    }

    fn reset(&self) {
        locked(self).reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Latch(u8);

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct LatchState {
        value: u8,
    }

    impl DeviceState for Latch {
        const NAME: &'static str = "latch";
        const VERSION: u32 = 2;
        type State = LatchState;

        fn save(&self) -> LatchState {
            let Self(value) = *self;
            LatchState { value }
        }

        fn restore(&mut self, state: LatchState) -> Result<(), StateError> {
            if state.value > 100 {
                return Err(Self::invalid("value above 100"));
            }
            self.0 = state.value;
            Ok(())
        }

        fn reset(&mut self) {
            self.0 = 0;
        }
    }

    #[test]
    fn a_state_goes_through_json_and_back() {
        let a = Mutex::new(Latch(42));
        let text = serde_json::to_string(&a.save().unwrap()).unwrap();
        let b = Mutex::new(Latch::default());
        b.restore(&serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(locked(&b).0, 42);
        Device::reset(&b);
        assert_eq!(locked(&b).0, 0);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_reason() {
        let b = Mutex::new(Latch(1));
        let saved = |device: &str, version, state| SavedDevice { device: device.into(), version, state };
        let err = |s| b.restore(&s).unwrap_err().to_string();
        let ok = serde_json::json!({"value": 3});
        assert!(err(saved("pit", 1, ok.clone())).contains("of a pit was given to a latch"));
        assert!(err(saved("latch", 3, ok)).contains("version 3"));
        assert!(err(saved("latch", 2, serde_json::json!({"value": 3, "extra": 1}))).contains("extra"));
        assert!(err(saved("latch", 2, serde_json::json!({"value": 101}))).contains("above 100"));
        assert_eq!(locked(&b).0, 1);
    }
}
