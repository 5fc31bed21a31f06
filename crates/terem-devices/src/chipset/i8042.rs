//! Keyboard controller (Intel 8042 as in the PC/AT; IBM PS/2 Hardware Interface Technical Reference,
//! "Keyboard and Auxiliary Device Controller"), with a PS/2 keyboard and mouse, and port 92h.
//!
//! Nothing types yet: [`I8042::inject_scancodes`] and [`I8042::inject_mouse`] are where input will come.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use terem_bus::{DeviceState, Handler, IrqLine, StateError, locked};

use super::BoardEvents;
use super::ps2::{Keyboard, KeyboardState, Mouse, MouseState};

/// Status register.
const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
/// Not inhibited by the keylock.
const STATUS_UNLOCKED: u8 = 1 << 4;
const STATUS_MOUSE: u8 = 1 << 5;

/// Command byte.
const MODE_KEYBOARD_IRQ: u8 = 1 << 0;
const MODE_MOUSE_IRQ: u8 = 1 << 1;
const MODE_SYSTEM: u8 = 1 << 2;
const MODE_KEYBOARD_OFF: u8 = 1 << 4;
const MODE_MOUSE_OFF: u8 = 1 << 5;
const MODE_TRANSLATE: u8 = 1 << 6;
/// Bits that keep what is written.
const MODE_BITS: u8 = 0x77;

/// Output port: not resetting, and the A20 gate open.
const OUT_NOT_RESET: u8 = 1 << 0;
const OUT_A20: u8 = 1 << 1;

/// Port 92h: fast reset and the A20 gate.
const FAST_RESET: u8 = 1 << 0;

/// Who sent the byte in the output buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Source {
    Controller,
    Keyboard,
    Mouse,
}

/// The controller with what is plugged into it.
pub struct I8042 {
    keyboard_irq: IrqLine,
    mouse_irq: IrqLine,
    events: Arc<dyn BoardEvents>,

    mode: u8,
    out_port: u8,
    /// The command whose parameter byte is to come at the data port.
    command: Option<u8>,
    /// The last write was to the command port.
    last_was_command: bool,
    output: Option<(u8, Source)>,
    replies: VecDeque<(u8, Source)>,
    keyboard: Keyboard,
    mouse: Mouse,
}

impl fmt::Debug for I8042 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mode, out_port, output, .. } = self;
        write!(f, "I8042(mode {mode:#x}, out {out_port:#x}, {output:?})")
    }
}

impl I8042 {
    /// A controller with its two interrupts (IRQ 1 and IRQ 12).
    #[must_use]
    pub fn new(keyboard_irq: IrqLine, mouse_irq: IrqLine, events: Arc<dyn BoardEvents>) -> Self {
        Self {
            keyboard_irq,
            mouse_irq,
            events,
            mode: Self::MODE_AT_RESET,
            out_port: OUT_NOT_RESET | OUT_A20,
            command: None,
            last_was_command: false,
            output: None,
            replies: VecDeque::new(),
            keyboard: Keyboard::default(),
            mouse: Mouse::default(),
        }
    }

    /// As firmware leaves it: both ports on, scancodes translated.
    const MODE_AT_RESET: u8 = MODE_KEYBOARD_IRQ | MODE_MOUSE_IRQ | MODE_SYSTEM | MODE_TRANSLATE;

    /// Keys, as scancodes of set 1 (what a guest reads with translation on). Dropped while the
    /// keyboard is switched off or its buffer is full.
    pub fn inject_scancodes(&mut self, codes: &[u8]) {
        self.keyboard.press(codes);
        self.fill();
    }

    /// Mouse movement (right and up are positive) and buttons (bit 0 left, 1 right, 2 middle).
    pub fn inject_mouse(&mut self, dx: i16, dy: i16, buttons: u8) {
        self.mouse.moved(dx, dy, buttons);
        self.fill();
    }

    /// Whether the A20 gate is open. It is only remembered: addresses are never masked.
    #[must_use]
    pub fn a20(&self) -> bool {
        self.out_port & OUT_A20 != 0
    }

    /// Moves the next byte into the empty output buffer.
    fn fill(&mut self) {
        if self.output.is_none() {
            self.output = self.replies.pop_front();
        }
        if self.output.is_none() && self.mode & MODE_KEYBOARD_OFF == 0 {
            self.output = self.keyboard.take().map(|b| (b, Source::Keyboard));
        }
        if self.output.is_none() && self.mode & MODE_MOUSE_OFF == 0 {
            self.output = self.mouse.take().map(|b| (b, Source::Mouse));
        }
        self.update();
    }

    fn update(&self) {
        let source = self.output.map(|(_, s)| s);
        let keyboard = matches!(source, Some(Source::Keyboard | Source::Controller));
        self.keyboard_irq.set(keyboard && self.mode & MODE_KEYBOARD_IRQ != 0);
        self.mouse_irq.set(source == Some(Source::Mouse) && self.mode & MODE_MOUSE_IRQ != 0);
    }

    fn reply(&mut self, byte: u8, source: Source) {
        // Replies to commands that nobody reads overwrite each other, as in one output buffer.
        self.replies.clear();
        self.replies.push_back((byte, source));
    }

    fn read_status(&self) -> u8 {
        let output = match self.output {
            None => 0,
            Some((_, Source::Mouse)) => STATUS_OUTPUT_FULL | STATUS_MOUSE,
            Some(_) => STATUS_OUTPUT_FULL,
        };
        let system = if self.mode & MODE_SYSTEM != 0 { STATUS_SYSTEM } else { 0 };
        let command = if self.last_was_command { STATUS_COMMAND } else { 0 };
        output | system | command | STATUS_UNLOCKED
    }

    fn read_data(&mut self) -> u8 {
        let byte = self.output.take().map_or(0, |(b, _)| b);
        // The line falls between two bytes: each is an edge.
        self.update();
        self.fill();
        byte
    }

    fn write_command(&mut self, value: u8) {
        self.last_was_command = true;
        self.command = None;
        let controller = Source::Controller;
        match value {
            0x20 => self.reply(self.mode, controller),
            // Those that take a byte: command byte, output port, output buffers, mouse.
            0x60 | 0xd1..=0xd4 => self.command = Some(value),
            0xa7 => self.mode |= MODE_MOUSE_OFF,
            0xa8 => self.mode &= !MODE_MOUSE_OFF,
            0xa9 | 0xab => self.reply(0x00, controller),
            0xaa => {
                self.mode |= MODE_SYSTEM;
                self.reply(0x55, controller);
            }
            0xad => self.mode |= MODE_KEYBOARD_OFF,
            0xae => self.mode &= !MODE_KEYBOARD_OFF,
            // Input port: keyboard not inhibited, and a jumper.
            0xc0 => self.reply(0x80, controller),
            0xd0 => self.reply(self.out_port, controller),
            // Pulse output port bits that are 0; bit 0 is the CPU's reset.
            0xf0..=0xff if value & 1 == 0 => self.events.reset(),
            _ => {}
        }
        self.fill();
    }

    fn write_data(&mut self, value: u8) {
        self.last_was_command = false;
        match self.command.take() {
            Some(0x60) => self.mode = value & MODE_BITS,
            Some(0xd1) => self.write_out_port(value),
            Some(0xd2) => self.reply(value, Source::Keyboard),
            Some(0xd3) => self.reply(value, Source::Mouse),
            Some(0xd4) => {
                // Sending to a device switches its port on.
                self.mode &= !MODE_MOUSE_OFF;
                self.mouse.command(value);
            }
            _ => {
                self.mode &= !MODE_KEYBOARD_OFF;
                self.keyboard.command(value, self.mode & MODE_TRANSLATE != 0);
            }
        }
        self.fill();
    }

    fn write_out_port(&mut self, value: u8) {
        self.out_port = value & (OUT_NOT_RESET | OUT_A20) | OUT_NOT_RESET;
        if value & OUT_NOT_RESET == 0 {
            self.events.reset();
        }
    }
}

/// Which port of the controller an [`I8042Ports`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum I8042Port {
    /// Data: port `60h`.
    Data,
    /// Status and commands: port `64h`.
    Command,
}

/// One of the controller's two ports.
#[derive(Debug)]
pub struct I8042Ports {
    controller: Arc<Mutex<I8042>>,
    port: I8042Port,
}

impl I8042Ports {
    /// The port `port` of `controller`.
    #[must_use]
    pub fn new(controller: Arc<Mutex<I8042>>, port: I8042Port) -> Self {
        Self { controller, port }
    }
}

impl Handler for I8042Ports {
    fn read(&self, _offset: u64, size: u8) -> Option<u64> {
        if size != 1 {
            return None;
        }
        let mut controller = locked(&self.controller);
        Some(u64::from(match self.port {
            I8042Port::Data => controller.read_data(),
            I8042Port::Command => controller.read_status(),
        }))
    }

    fn write(&self, _offset: u64, size: u8, value: u64) -> bool {
        let value = value.to_le_bytes()[0];
        if size == 1 {
            let mut controller = locked(&self.controller);
            match self.port {
                I8042Port::Data => controller.write_data(value),
                I8042Port::Command => controller.write_command(value),
            }
        }
        size == 1
    }
}

/// Port 92h: the A20 gate and a reset without the keyboard controller's slowness.
#[derive(Debug)]
pub struct Port92(pub Arc<Mutex<I8042>>);

impl Handler for Port92 {
    fn read(&self, _offset: u64, size: u8) -> Option<u64> {
        (size == 1).then(|| u64::from(locked(&self.0).out_port & OUT_A20))
    }

    fn write(&self, _offset: u64, size: u8, value: u64) -> bool {
        let value = value.to_le_bytes()[0];
        if size == 1 {
            let mut controller = locked(&self.0);
            controller.out_port = controller.out_port & !OUT_A20 | value & OUT_A20;
            if value & FAST_RESET != 0 {
                controller.events.reset();
            }
        }
        size == 1
    }
}

/// Saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct I8042State {
    mode: u8,
    out_port: u8,
    command: Option<u8>,
    last_was_command: bool,
    output: Option<(u8, Source)>,
    replies: VecDeque<(u8, Source)>,
    keyboard: KeyboardState,
    mouse: MouseState,
}

impl DeviceState for I8042 {
    const NAME: &'static str = "i8042";
    type State = I8042State;

    fn save(&self) -> I8042State {
        let Self {
            keyboard_irq: _,
            mouse_irq: _,
            events: _,
            mode,
            out_port,
            command,
            last_was_command,
            output,
            replies,
            keyboard,
            mouse,
        } = self;
        I8042State {
            mode: *mode,
            out_port: *out_port,
            command: *command,
            last_was_command: *last_was_command,
            output: *output,
            replies: replies.clone(),
            keyboard: keyboard.save(),
            mouse: mouse.save(),
        }
    }

    fn restore(&mut self, state: I8042State) -> Result<(), StateError> {
        let I8042State { mode, out_port, command, last_was_command, output, replies, keyboard, mouse } =
            state;
        let (keyboard, mouse) = (Keyboard::from_saved(keyboard), Mouse::from_saved(mouse));
        if replies.len() > 1 || !keyboard.is_valid() || !mouse.is_valid() {
            return Err(Self::invalid("more bytes than its buffers hold"));
        }
        self.mode = mode & MODE_BITS;
        self.out_port = out_port & OUT_A20 | OUT_NOT_RESET;
        self.command = command;
        self.last_was_command = last_was_command;
        self.output = output;
        self.replies = replies;
        self.keyboard = keyboard;
        self.mouse = mouse;
        self.update();
        Ok(())
    }

    fn reset(&mut self) {
        self.mode = Self::MODE_AT_RESET;
        self.out_port = OUT_NOT_RESET | OUT_A20;
        self.command = None;
        self.last_was_command = false;
        self.output = None;
        self.replies.clear();
        self.keyboard = Keyboard::default();
        self.mouse = Mouse::default();
        self.update();
    }
}

#[cfg(test)]
#[path = "i8042_tests.rs"]
mod tests;
