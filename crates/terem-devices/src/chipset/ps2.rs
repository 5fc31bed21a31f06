//! A PS/2 keyboard and mouse, as far as the bytes they exchange with their controller (IBM PS/2 Hardware
//! Interface Technical Reference, "Keyboard" and "Mouse").

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Answers of a device.
const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;

/// Commands that both devices have.
const RESET: u8 = 0xff;
const DEFAULTS: u8 = 0xf6;
const DISABLE: u8 = 0xf5;
const ENABLE: u8 = 0xf4;
const SET_RATE: u8 = 0xf3;
const IDENTIFY: u8 = 0xf2;

/// Keyboard commands.
const SCANCODE_SET: u8 = 0xf0;
const ECHO: u8 = 0xee;
const LEDS: u8 = 0xed;

/// Mouse commands.
const REMOTE: u8 = 0xf0;
const WRAP: u8 = 0xee;
const RESET_WRAP: u8 = 0xec;
const READ_DATA: u8 = 0xeb;
const STREAM: u8 = 0xea;
const STATUS: u8 = 0xe9;
const RESOLUTION: u8 = 0xe8;
const SCALING_2: u8 = 0xe7;
const SCALING_1: u8 = 0xe6;

/// Bytes that a device keeps for a controller which does not take them.
const BUFFER: usize = 64;

/// A keyboard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Keyboard {
    scanning: bool,
    leds: u8,
    rate: u8,
    set: u8,
    /// The command whose parameter is to come.
    command: Option<u8>,
    out: VecDeque<u8>,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self { scanning: true, leds: 0, rate: 0x2b, set: 2, command: None, out: VecDeque::new() }
    }
}

impl Keyboard {
    pub(super) fn is_valid(&self) -> bool {
        self.out.len() <= BUFFER
    }

    fn send(&mut self, bytes: &[u8]) {
        if self.out.len() + bytes.len() <= BUFFER {
            self.out.extend(bytes);
        }
    }

    /// The next byte for the controller.
    pub(super) fn take(&mut self) -> Option<u8> {
        self.out.pop_front()
    }

    /// Scancodes of set 1 from a user; all of them or none, so that no sequence is cut.
    pub(super) fn press(&mut self, codes: &[u8]) {
        if self.scanning {
            self.send(codes);
        }
    }

    /// A byte from the controller, which translates (or not) what is answered.
    pub(super) fn command(&mut self, value: u8, translated: bool) {
        if let Some(command) = self.command.take() {
            self.parameter(command, value, translated);
            return;
        }
        match value {
            RESET => {
                *self = Self::default();
                self.send(&[ACK, SELF_TEST_PASSED]);
            }
            DEFAULTS | DISABLE => {
                let out = std::mem::take(&mut self.out);
                *self = Self { scanning: value == DEFAULTS, leds: self.leds, out, ..Self::default() };
                self.send(&[ACK]);
            }
            ENABLE => {
                self.scanning = true;
                self.out.clear();
                self.send(&[ACK]);
            }
            // An MF2 keyboard: ABh 83h, the latter translated like a scancode.
            IDENTIFY => self.send(&[ACK, 0xab, if translated { 0x41 } else { 0x83 }]),
            SET_RATE | SCANCODE_SET | LEDS => {
                self.command = Some(value);
                self.send(&[ACK]);
            }
            ECHO => self.send(&[ECHO]),
            // Key types of set 3: accepted, without effect.
            0xf7..=0xfa => self.send(&[ACK]),
            _ => self.send(&[RESEND]),
        }
    }

    fn parameter(&mut self, command: u8, value: u8, translated: bool) {
        match (command, value) {
            (LEDS, _) => self.leds = value & 7,
            (SET_RATE, _) => self.rate = value & 0x7f,
            (SCANCODE_SET, 0) => {
                let shown = match (self.set, translated) {
                    (1, true) => 0x43,
                    (2, true) => 0x41,
                    (3, true) => 0x3f,
                    (set, _) => set,
                };
                self.send(&[ACK, shown]);
                return;
            }
            (SCANCODE_SET, 1..=3) => self.set = value,
            _ => {
                self.send(&[RESEND]);
                return;
            }
        }
        self.send(&[ACK]);
    }
}

/// A mouse with three buttons and no wheel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mouse {
    reporting: bool,
    remote: bool,
    wrap: bool,
    scaling: bool,
    resolution: u8,
    rate: u8,
    /// Movement that was not reported yet, and the buttons.
    dx: i16,
    dy: i16,
    buttons: u8,
    command: Option<u8>,
    out: VecDeque<u8>,
}

impl Default for Mouse {
    fn default() -> Self {
        Self {
            reporting: false,
            remote: false,
            wrap: false,
            scaling: false,
            resolution: 2,
            rate: 100,
            dx: 0,
            dy: 0,
            buttons: 0,
            command: None,
            out: VecDeque::new(),
        }
    }
}

impl Mouse {
    pub(super) fn is_valid(&self) -> bool {
        self.out.len() <= BUFFER
    }

    fn send(&mut self, bytes: &[u8]) {
        if self.out.len() + bytes.len() <= BUFFER {
            self.out.extend(bytes);
        }
    }

    /// The next byte for the controller.
    pub(super) fn take(&mut self) -> Option<u8> {
        self.out.pop_front()
    }

    /// The user moved it or changed its buttons.
    pub(super) fn moved(&mut self, dx: i16, dy: i16, buttons: u8) {
        self.dx = self.dx.saturating_add(dx);
        self.dy = self.dy.saturating_add(dy);
        self.buttons = buttons & 7;
        if self.reporting && !self.remote && !self.wrap && self.out.len() + 3 <= BUFFER {
            let packet = self.packet();
            self.send(&packet);
        }
    }

    /// A movement packet: nine-bit two's complement values, their signs in the first byte.
    fn packet(&mut self) -> [u8; 3] {
        let (dx, dy) = (self.dx.clamp(-256, 255), self.dy.clamp(-256, 255));
        self.dx = self.dx.saturating_sub(dx);
        self.dy = self.dy.saturating_sub(dy);
        let sign = |v: i16, bit: u8| if v < 0 { 1 << bit } else { 0 };
        let low = |v: i16| v.to_le_bytes()[0];
        [1 << 3 | self.buttons | sign(dx, 4) | sign(dy, 5), low(dx), low(dy)]
    }

    /// A byte from the controller.
    pub(super) fn command(&mut self, value: u8) {
        if let Some(command) = self.command.take() {
            match command {
                RESOLUTION => self.resolution = value & 3,
                _ => self.rate = value,
            }
            self.send(&[ACK]);
            return;
        }
        if self.wrap && value != RESET_WRAP && value != RESET {
            self.send(&[value]);
            return;
        }
        let mut answer = vec![ACK];
        match value {
            RESET => {
                *self = Self::default();
                answer.extend([SELF_TEST_PASSED, 0]);
            }
            DEFAULTS => *self = Self { out: std::mem::take(&mut self.out), ..Self::default() },
            DISABLE => self.reporting = false,
            ENABLE => self.reporting = true,
            SET_RATE | RESOLUTION => self.command = Some(value),
            // A plain PS/2 mouse.
            IDENTIFY => answer.push(0),
            REMOTE => self.remote = true,
            STREAM => self.remote = false,
            WRAP => self.wrap = true,
            RESET_WRAP => self.wrap = false,
            READ_DATA => answer.extend(self.packet()),
            STATUS => {
                let flags = u8::from(self.remote) << 6
                    | u8::from(self.reporting) << 5
                    | u8::from(self.scaling) << 4
                    | self.buttons;
                answer.extend([flags, self.resolution, self.rate]);
            }
            SCALING_1 | SCALING_2 => self.scaling = value == SCALING_2,
            _ => answer = vec![RESEND],
        }
        self.send(&answer);
    }
}

/// Saved state of a keyboard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct KeyboardState {
    scanning: bool,
    leds: u8,
    rate: u8,
    set: u8,
    command: Option<u8>,
    out: VecDeque<u8>,
}

impl Keyboard {
    pub(super) fn save(&self) -> KeyboardState {
        let Self { scanning, leds, rate, set, command, out } = self.clone();
        KeyboardState { scanning, leds, rate, set, command, out }
    }

    pub(super) fn from_saved(state: KeyboardState) -> Self {
        let KeyboardState { scanning, leds, rate, set, command, out } = state;
        Self { scanning, leds, rate, set, command, out }
    }
}

/// Saved state of a mouse.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MouseState {
    reporting: bool,
    remote: bool,
    wrap: bool,
    scaling: bool,
    resolution: u8,
    rate: u8,
    dx: i16,
    dy: i16,
    buttons: u8,
    command: Option<u8>,
    out: VecDeque<u8>,
}

impl Mouse {
    pub(super) fn save(&self) -> MouseState {
        let Self { reporting, remote, wrap, scaling, resolution, rate, dx, dy, buttons, command, out } =
            self.clone();
        MouseState { reporting, remote, wrap, scaling, resolution, rate, dx, dy, buttons, command, out }
    }

    pub(super) fn from_saved(state: MouseState) -> Self {
        let MouseState { reporting, remote, wrap, scaling, resolution, rate, dx, dy, buttons, command, out } =
            state;
        Self { reporting, remote, wrap, scaling, resolution, rate, dx, dy, buttons, command, out }
    }
}
