//! 16550A serial port (National PC16550D datasheet, section 8).
//!
//! The transmitter is infinitely fast: a byte that is written goes to the backend at once, so the
//! transmitter is always empty, and only the order of interrupts is that of the chip. Received bytes
//! wait in the FIFO; below the trigger level they are reported by the time-out interrupt without the
//! four characters' delay.

use std::collections::VecDeque;
use std::fmt;

use serde::{Deserialize, Serialize};
use terem_bus::{DeviceState, IrqLine, Registers, StateError};

/// Where a character device's output goes. Called from a vCPU thread for every byte that the guest
/// writes: it buffers or drops, and never waits.
pub trait CharBackend: Send {
    /// Takes bytes.
    fn write(&mut self, bytes: &[u8]);
}

/// Bytes that each FIFO holds.
pub const FIFO_SIZE: usize = 16;

/// Registers by offset (section 8.0); with DLAB set, 0 and 1 are the divisor.
const DATA: u64 = 0;
const IER: u64 = 1;
const IIR_FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

/// Interrupt enable (section 8.7).
const IER_DATA: u8 = 1 << 0;
const IER_THRE: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;

/// Interrupt identification (section 8.6), highest priority first.
const IIR_LINE: u8 = 0x06;
const IIR_DATA: u8 = 0x04;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_THRE: u8 = 0x02;
const IIR_MODEM: u8 = 0x00;
const IIR_NONE: u8 = 0x01;
const IIR_FIFOS: u8 = 0xc0;

/// FIFO control (section 8.5).
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVE: u8 = 1 << 1;

/// Line control (section 8.1): divisor latch access.
const LCR_DLAB: u8 = 1 << 7;

/// Modem control (section 8.8).
const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
/// Gates the interrupt output in a PC.
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;

/// Line status (section 8.4).
const LSR_DATA: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_BREAK: u8 = 1 << 4;
const LSR_EMPTY: u8 = 1 << 5 | 1 << 6;
/// Bits that cause a line status interrupt, and that reading clears.
const LSR_ERRORS: u8 = 0x1e;

/// Modem status (section 8.9): the lines, and what changed.
const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;
/// What a connected terminal asserts.
const CONNECTED: u8 = MSR_CTS | MSR_DSR | MSR_DCD;

/// 9600 baud from 1.8432 MHz.
const DIVISOR: u16 = 12;

/// A serial port.
pub struct Uart {
    irq: IrqLine,
    backend: Box<dyn CharBackend>,

    registers: UartRegisters,
}

impl fmt::Debug for Uart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.registers.fmt(f)
    }
}

/// What the chip holds.
#[derive(Debug, Clone, PartialEq, Eq)]
struct UartRegisters {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    /// Error bits only; the rest of LSR is computed.
    errors: u8,
    /// Modem lines and their change bits.
    msr: u8,
    scr: u8,
    divisor: u16,
    received: VecDeque<u8>,
    /// The transmitter became empty and nobody has taken notice yet.
    thre: bool,
}

impl UartRegisters {
    fn new() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            errors: 0,
            msr: CONNECTED,
            scr: 0,
            divisor: DIVISOR,
            received: VecDeque::new(),
            thre: false,
        }
    }

    fn fifos(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.fifos() { FIFO_SIZE } else { 1 }
    }

    /// Bytes at which the receive FIFO asks for service (FCR bits 7:6).
    fn trigger(&self) -> usize {
        match (self.fifos(), self.fcr >> 6) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        }
    }

    /// The enabled interrupt of the highest priority, as IIR shows it.
    fn interrupt(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.errors != 0 {
            IIR_LINE
        } else if self.ier & IER_DATA != 0 && !self.received.is_empty() {
            if self.received.len() >= self.trigger() { IIR_DATA } else { IIR_TIMEOUT }
        } else if self.ier & IER_THRE != 0 && self.thre {
            IIR_THRE
        } else if self.ier & IER_MODEM != 0 && self.msr & 0x0f != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    fn loopback(&self) -> bool {
        self.mcr & MCR_LOOP != 0
    }

    /// A byte arrives.
    fn push(&mut self, byte: u8) {
        if self.received.len() < self.capacity() {
            self.received.push_back(byte);
        } else {
            self.errors |= LSR_OVERRUN;
            if !self.fifos() {
                // The holding register is overwritten; a FIFO keeps what it has.
                self.received[0] = byte;
            }
        }
    }

    /// The modem lines as they are: the terminal's, or in loopback the chip's own outputs.
    fn modem_lines(&self) -> u8 {
        if !self.loopback() {
            return CONNECTED;
        }
        let pairs = [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)];
        pairs.into_iter().filter(|(out, _)| self.mcr & out != 0).fold(0, |v, (_, line)| v | line)
    }

    fn update_modem(&mut self) {
        let (old, new) = (self.msr & 0xf0, self.modem_lines());
        let mut changed = (old ^ new) >> 4;
        if new & MSR_RI != 0 {
            // Ring indicator reports its trailing edge only.
            changed &= !(MSR_RI >> 4);
        }
        self.msr = self.msr & 0x0f | changed | new;
    }
}

impl Uart {
    /// A port that interrupts on `irq` and prints to `backend`.
    #[must_use]
    pub fn new(irq: IrqLine, backend: Box<dyn CharBackend>) -> Self {
        Self { irq, backend, registers: UartRegisters::new() }
    }

    /// Bytes that [`Self::receive`] would take now.
    #[must_use]
    pub fn room(&self) -> usize {
        let r = &self.registers;
        if r.loopback() { 0 } else { r.capacity() - r.received.len().min(r.capacity()) }
    }

    /// Input from the terminal: takes as many bytes as there is room for, and says how many.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(self.room());
        self.registers.received.extend(&bytes[..n]);
        self.update();
        n
    }

    /// A break on the line: a zero byte with its flag.
    pub fn receive_break(&mut self) {
        if self.room() > 0 {
            self.registers.received.push_back(0);
            self.registers.errors |= LSR_BREAK;
            self.update();
        }
    }

    /// In a PC, OUT2 gates the chip's interrupt output; in loopback it is off.
    fn update(&self) {
        let r = &self.registers;
        let on = r.mcr & MCR_OUT2 != 0 && !r.loopback();
        self.irq.set(on && r.interrupt() != IIR_NONE);
    }

    fn read_register(&mut self, offset: u64) -> u8 {
        let r = &mut self.registers;
        let dlab = r.lcr & LCR_DLAB != 0;
        match offset {
            DATA if dlab => return r.divisor.to_le_bytes()[0],
            IER if dlab => return r.divisor.to_le_bytes()[1],
            LSR => {
                let data = if r.received.is_empty() { 0 } else { LSR_DATA };
                let status = data | std::mem::take(&mut r.errors) | LSR_EMPTY;
                if status & LSR_ERRORS != 0 {
                    self.update();
                }
                return status;
            }
            DATA => {
                let byte = r.received.pop_front().unwrap_or(0);
                self.update();
                return byte;
            }
            IIR_FCR => {
                let id = r.interrupt();
                let fifos = if r.fifos() { IIR_FIFOS } else { 0 };
                if id == IIR_THRE {
                    // Reading IIR is taking notice, if it was this interrupt that it showed.
                    r.thre = false;
                    self.update();
                }
                return id | fifos;
            }
            MSR => {
                let status = r.msr;
                r.msr &= 0xf0;
                self.update();
                return status;
            }
            _ => {}
        }
        match offset {
            IER => r.ier,
            LCR => r.lcr,
            MCR => r.mcr,
            _ => r.scr,
        }
    }

    fn transmit(&mut self, byte: u8) {
        let r = &mut self.registers;
        if r.loopback() {
            r.push(byte);
        } else {
            self.backend.write(&[byte]);
        }
        // The holding register was full for a moment: with the interrupt enabled, that is an edge.
        let asked = self.registers.interrupt() == IIR_THRE;
        self.registers.thre = false;
        if asked {
            self.update();
        }
        self.registers.thre = true;
        if self.registers.ier != 0 || self.registers.loopback() {
            self.update();
        }
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        let r = &mut self.registers;
        let dlab = r.lcr & LCR_DLAB != 0;
        match offset {
            DATA if dlab => r.divisor = r.divisor & 0xff00 | u16::from(value),
            IER if dlab => r.divisor = r.divisor & 0x00ff | u16::from(value) << 8,
            DATA => return self.transmit(value),
            IER => {
                // Enabling the interrupt while the transmitter is empty raises it (section 8.6).
                r.thre |= value & !r.ier & IER_THRE != 0;
                r.ier = value & 0x0f;
            }
            IIR_FCR => {
                if (r.fcr ^ value) & FCR_ENABLE != 0 || value & FCR_CLEAR_RECEIVE != 0 {
                    r.received.clear();
                }
                // Without bit 0 the other bits are not programmed.
                r.fcr = if value & FCR_ENABLE != 0 { value & 0xc9 } else { 0 };
            }
            LCR => r.lcr = value,
            MCR => {
                r.mcr = value & 0x1f;
                r.update_modem();
            }
            SCR => r.scr = value,
            // LSR and MSR: the datasheet leaves writes to factory tests.
            _ => return,
        }
        self.update();
    }
}

impl Registers for Uart {
    fn read(&mut self, offset: u64, size: u8) -> Option<u64> {
        (size == 1 && offset <= SCR).then(|| u64::from(self.read_register(offset)))
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) -> bool {
        let known = size == 1 && offset <= SCR;
        if known {
            self.write_register(offset, value.to_le_bytes()[0]);
        }
        known
    }
}

/// Saved state of a [`Uart`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UartState {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    errors: u8,
    msr: u8,
    scr: u8,
    divisor: u16,
    received: VecDeque<u8>,
    thre: bool,
}

impl DeviceState for Uart {
    const NAME: &'static str = "uart";
    type State = UartState;

    fn save(&self) -> UartState {
        let Self { irq: _, backend: _, registers } = self;
        let UartRegisters { ier, fcr, lcr, mcr, errors, msr, scr, divisor, received, thre } =
            registers.clone();
        UartState { ier, fcr, lcr, mcr, errors, msr, scr, divisor, received, thre }
    }

    fn restore(&mut self, state: UartState) -> Result<(), StateError> {
        let UartState { ier, fcr, lcr, mcr, errors, msr, scr, divisor, received, thre } = state;
        let errors = errors & LSR_ERRORS;
        let registers = UartRegisters { ier, fcr, lcr, mcr, errors, msr, scr, divisor, received, thre };
        if registers.received.len() > registers.capacity() {
            return Err(Self::invalid("more bytes than its FIFO holds"));
        }
        self.registers = registers;
        self.update();
        Ok(())
    }

    fn reset(&mut self) {
        self.registers = UartRegisters::new();
        self.update();
    }
}

#[cfg(test)]
#[path = "uart_tests.rs"]
mod tests;
