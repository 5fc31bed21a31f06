//! The pair of 8259A interrupt controllers (Intel 8259A datasheet, order 231468) with the edge/level
//! control registers of PC chipsets (ICH9 datasheet section 13.4).
//!
//! Input 2 of the first chip is the second one's output; inputs are numbered 0–15 over both.

use std::fmt;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use terem_bus::{ApicBus, DeviceState, Handler, InterruptAcknowledge, LineSink, StateError, locked};

/// ICW1 bit 4: this is an ICW1 and starts initialisation; otherwise bit 3 tells OCW3 from OCW2.
const ICW1: u8 = 1 << 4;
/// ICW1 bit 0: ICW4 follows.
const ICW1_IC4: u8 = 1 << 0;
/// ICW1 bit 1: no cascade, so no ICW3.
const ICW1_SNGL: u8 = 1 << 1;
/// ICW4 bit 1: automatic end of interrupt.
const ICW4_AEOI: u8 = 1 << 1;
/// ICW4 bit 4: special fully nested mode.
const ICW4_SFNM: u8 = 1 << 4;
/// OCW3 marker.
const OCW3: u8 = 1 << 3;
/// The input of the first chip that the second one drives.
const CASCADE: u8 = 2;
/// ELCR bits that can be set: not the timer, keyboard and cascade (ICH9 section 13.4.10).
const ELCR_FIRST: u8 = 0xf8;
/// The same for the second chip: not the RTC and the coprocessor (section 13.4.11).
const ELCR_SECOND: u8 = 0xde;

/// Which word an initialising chip expects at its odd port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Expect {
    Nothing,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Chip {
    /// Levels of the inputs.
    lines: u8,
    /// Interrupt request, in-service and mask registers.
    irr: u8,
    isr: u8,
    imr: u8,
    /// Inputs that are level-triggered.
    elcr: u8,
    /// Bits 7:3 of the vectors.
    base: u8,
    /// The input of the lowest priority; the next one has the highest.
    lowest: u8,
    expect: Expect,
    icw1: u8,
    icw4: u8,
    special_mask: bool,
    rotate_on_aeoi: bool,
    /// The even port reads ISR, not IRR.
    read_isr: bool,
    /// The next read is a poll.
    poll: bool,
}

impl Chip {
    const fn new() -> Self {
        Self {
            lines: 0,
            irr: 0,
            isr: 0,
            imr: 0,
            elcr: 0,
            base: 0,
            lowest: 7,
            expect: Expect::Nothing,
            icw1: 0,
            icw4: 0,
            special_mask: false,
            rotate_on_aeoi: false,
            read_isr: false,
            poll: false,
        }
    }

    fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << (input & 7);
        let rose = high && self.lines & bit == 0;
        if high {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if self.elcr & bit != 0 {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if rose {
            self.irr |= bit;
        } else if !high {
            // The input must stay high until it is acknowledged; gone, it leaves a spurious interrupt.
            self.irr &= !bit;
        }
    }

    /// Inputs from the highest priority down.
    fn priorities(&self) -> impl Iterator<Item = u8> + use<> {
        let first = self.lowest.wrapping_add(1);
        (0..8).map(move |i| first.wrapping_add(i) & 7)
    }

    /// The request that is to be served now. `cascade` is the input of a slave in special fully nested
    /// mode, which does not block itself.
    fn pending(&self, cascade: Option<u8>) -> Option<u8> {
        let requests = self.irr & !self.imr;
        if requests == 0 {
            return None;
        }
        for input in self.priorities() {
            let bit = 1 << input;
            let nests = cascade == Some(input) && self.icw4 & ICW4_SFNM != 0;
            // In special mask mode only an unmasked input in service blocks itself.
            if requests & bit != 0 && (self.isr & bit == 0 || nests) {
                return Some(input);
            }
            if self.isr & bit != 0 && !self.special_mask && !nests {
                return None;
            }
        }
        None
    }

    /// The request goes into service.
    fn serve(&mut self, input: u8) {
        let bit = 1 << input;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if self.icw4 & ICW4_AEOI == 0 {
            self.isr |= bit;
        } else if self.rotate_on_aeoi {
            self.lowest = input;
        }
    }

    fn highest_in_service(&self) -> Option<u8> {
        // Masked inputs are passed over in special mask mode (datasheet, "Special Mask Mode").
        let isr = if self.special_mask { self.isr & !self.imr } else { self.isr };
        self.priorities().find(|i| isr & 1 << i != 0)
    }

    fn write_command(&mut self, value: u8) {
        if value & ICW1 != 0 {
            let Self { lines, elcr, base, .. } = *self;
            *self = Self { lines, elcr, base, icw1: value, expect: Expect::Icw2, ..Self::new() };
            // Edge detection starts anew; level inputs are seen as they are.
            self.irr = lines & elcr;
        } else if value & OCW3 != 0 {
            self.poll = value & 1 << 2 != 0;
            match value & 3 {
                2 => self.read_isr = false,
                3 => self.read_isr = true,
                _ => {}
            }
            match value >> 5 & 3 {
                2 => self.special_mask = false,
                3 => self.special_mask = true,
                _ => {}
            }
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let level = value & 7;
        match value >> 5 {
            0 => self.rotate_on_aeoi = false,
            4 => self.rotate_on_aeoi = true,
            command @ (1 | 5) => {
                if let Some(input) = self.highest_in_service() {
                    self.isr &= !(1 << input);
                    if command == 5 {
                        self.lowest = input;
                    }
                }
            }
            3 => self.isr &= !(1 << level),
            6 => self.lowest = level,
            7 => {
                self.isr &= !(1 << level);
                self.lowest = level;
            }
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        let icw4 = if self.icw1 & ICW1_IC4 != 0 { Expect::Icw4 } else { Expect::Nothing };
        match self.expect {
            Expect::Nothing => self.imr = value,
            Expect::Icw2 => {
                self.base = value & 0xf8;
                self.expect = if self.icw1 & ICW1_SNGL == 0 { Expect::Icw3 } else { icw4 };
            }
            // The wiring that ICW3 describes is fixed in a PC.
            Expect::Icw3 => self.expect = icw4,
            Expect::Icw4 => {
                self.icw4 = value;
                self.expect = Expect::Nothing;
            }
        }
    }

    fn write_elcr(&mut self, value: u8) {
        self.elcr = value;
        self.irr = self.irr & !value | self.lines & value;
    }
}

/// The pair. Its INTR output goes to the local APICs' LINT0 ([`ApicBus::set_intr`]), called with the
/// pair locked so that levels arrive in their order.
pub struct Pic {
    first: Chip,
    second: Chip,
    intr: bool,
    apic: Arc<dyn ApicBus>,
}

impl fmt::Debug for Pic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, second, intr, apic: _ } = self;
        f.debug_struct("Pic").field("first", first).field("second", second).field("intr", intr).finish()
    }
}

impl Pic {
    /// The pair in its state after power-on, driving `apic`'s INTR.
    #[must_use]
    pub fn new(apic: Arc<dyn ApicBus>) -> Self {
        Self { first: Chip::new(), second: Chip::new(), intr: false, apic }
    }

    /// Sets input `line` (0–15; there is no input 2, others are ignored).
    pub fn set_line(&mut self, line: u8, high: bool) {
        match line {
            CASCADE | 16.. => return,
            0..8 => self.first.set_line(line, high),
            8..16 => self.second.set_line(line & 7, high),
        }
        self.update();
    }

    /// An interrupt acknowledge cycle: the vector. With no request left it is the spurious one, input
    /// 7 of the chip that was asked.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.first.pending(Some(CASCADE)) {
            Some(CASCADE) => {
                self.first.serve(CASCADE);
                match self.second.pending(None) {
                    Some(input) => {
                        self.second.serve(input);
                        self.second.base | input
                    }
                    None => self.second.base | 7,
                }
            }
            Some(input) => {
                self.first.serve(input);
                self.first.base | input
            }
            None => self.first.base | 7,
        };
        self.update();
        vector
    }

    fn update(&mut self) {
        let cascade = self.second.pending(None).is_some();
        // The cascade input follows the second chip's output: seen as a level, since the output goes
        // low for less than any instruction between two requests.
        let bit = 1 << CASCADE;
        self.first.lines = self.first.lines & !bit | u8::from(cascade) << CASCADE;
        self.first.irr = self.first.irr & !bit | self.first.lines & bit;
        let intr = self.first.pending(Some(CASCADE)).is_some();
        if intr != self.intr {
            self.intr = intr;
            self.apic.set_intr(intr);
        }
    }

    fn chip(&mut self, second: bool) -> &mut Chip {
        if second { &mut self.second } else { &mut self.first }
    }

    fn read(&mut self, second: bool, odd: bool) -> u8 {
        let cascade = (!second).then_some(CASCADE);
        let chip = self.chip(second);
        if chip.poll {
            chip.poll = false;
            let pending = chip.pending(cascade);
            if let Some(input) = pending {
                chip.serve(input);
            }
            self.update();
            return pending.map_or(0, |input| 0x80 | input);
        }
        match (odd, chip.read_isr) {
            (true, _) => chip.imr,
            (false, true) => chip.isr,
            (false, false) => chip.irr,
        }
    }

    fn write(&mut self, second: bool, odd: bool, value: u8) {
        let chip = self.chip(second);
        if odd {
            chip.write_data(value);
        } else {
            chip.write_command(value);
        }
        self.update();
    }
}

/// Which registers of the pair a [`PicPorts`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PicBlock {
    /// The first chip: ports `20h`–`21h`.
    First,
    /// The second chip: ports `A0h`–`A1h`.
    Second,
    /// Edge/level control: ports `4D0h`–`4D1h`.
    EdgeLevel,
}

/// A block of the pair's registers, two ports.
#[derive(Debug)]
pub struct PicPorts {
    pic: Arc<Mutex<Pic>>,
    block: PicBlock,
}

impl PicPorts {
    /// The registers of `block`.
    #[must_use]
    pub fn new(pic: Arc<Mutex<Pic>>, block: PicBlock) -> Self {
        Self { pic, block }
    }

    fn read_byte(&self, odd: bool) -> u8 {
        let mut pic = locked(&self.pic);
        match self.block {
            PicBlock::First => Pic::read(&mut pic, false, odd),
            PicBlock::Second => Pic::read(&mut pic, true, odd),
            PicBlock::EdgeLevel => pic.chip(odd).elcr,
        }
    }

    fn write_byte(&self, odd: bool, value: u8) {
        let mut pic = locked(&self.pic);
        match self.block {
            PicBlock::First => Pic::write(&mut pic, false, odd, value),
            PicBlock::Second => Pic::write(&mut pic, true, odd, value),
            PicBlock::EdgeLevel => {
                let mask = if odd { ELCR_SECOND } else { ELCR_FIRST };
                pic.chip(odd).write_elcr(value & mask);
                pic.update();
            }
        }
    }
}

impl Handler for PicPorts {
    fn read(&self, offset: u64, size: u8) -> Option<u64> {
        // A word access is two byte cycles, as on the ISA bus.
        match size {
            1 => Some(u64::from(self.read_byte(offset & 1 != 0))),
            2 => Some(u64::from(self.read_byte(false)) | u64::from(self.read_byte(true)) << 8),
            _ => None,
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> bool {
        let [a, b, ..] = value.to_le_bytes();
        match size {
            1 => self.write_byte(offset & 1 != 0, a),
            2 => {
                self.write_byte(false, a);
                self.write_byte(true, b);
            }
            _ => return false,
        }
        true
    }
}

/// The pair's inputs and its answer to acknowledge cycles.
#[derive(Debug, Clone)]
pub struct PicLines(pub Arc<Mutex<Pic>>);

impl LineSink for PicLines {
    fn set_line(&self, line: u32, high: bool) {
        locked(&self.0).set_line(u8::try_from(line).unwrap_or(u8::MAX), high);
    }
}

impl InterruptAcknowledge for PicLines {
    fn acknowledge(&self) -> u8 {
        locked(&self.0).acknowledge()
    }
}

/// Saved state of one chip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChipState {
    lines: u8,
    irr: u8,
    isr: u8,
    imr: u8,
    elcr: u8,
    base: u8,
    lowest: u8,
    expect: Expect,
    icw1: u8,
    icw4: u8,
    special_mask: bool,
    rotate_on_aeoi: bool,
    read_isr: bool,
    poll: bool,
}

impl Chip {
    fn save(&self) -> ChipState {
        let Self {
            lines,
            irr,
            isr,
            imr,
            elcr,
            base,
            lowest,
            expect,
            icw1,
            icw4,
            special_mask,
            rotate_on_aeoi,
            read_isr,
            poll,
        } = self.clone();
        ChipState {
            lines,
            irr,
            isr,
            imr,
            elcr,
            base,
            lowest,
            expect,
            icw1,
            icw4,
            special_mask,
            rotate_on_aeoi,
            read_isr,
            poll,
        }
    }

    fn from_saved(state: ChipState) -> Self {
        let ChipState {
            lines,
            irr,
            isr,
            imr,
            elcr,
            base,
            lowest,
            expect,
            icw1,
            icw4,
            special_mask,
            rotate_on_aeoi,
            read_isr,
            poll,
        } = state;
        Self {
            lines,
            irr,
            isr,
            imr,
            elcr,
            base,
            lowest,
            expect,
            icw1,
            icw4,
            special_mask,
            rotate_on_aeoi,
            read_isr,
            poll,
        }
    }
}

/// Saved state of the pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PicState {
    first: ChipState,
    second: ChipState,
}

impl DeviceState for Pic {
    const NAME: &'static str = "pic";
    type State = PicState;

    fn save(&self) -> PicState {
        let Self { first, second, intr: _, apic: _ } = self;
        PicState { first: first.save(), second: second.save() }
    }

    fn restore(&mut self, state: PicState) -> Result<(), StateError> {
        let PicState { first, second } = state;
        let (mut first, mut second) = (Chip::from_saved(first), Chip::from_saved(second));
        for chip in [&mut first, &mut second] {
            chip.base &= 0xf8;
            chip.lowest &= 7;
        }
        first.elcr &= ELCR_FIRST;
        second.elcr &= ELCR_SECOND;
        (self.first, self.second) = (first, second);
        // Tell the accelerator even when the level seems known: it was restored, too.
        self.intr = false;
        self.apic.set_intr(false);
        self.update();
        Ok(())
    }

    fn reset(&mut self) {
        // Levels belong to whoever drives the lines.
        let (first, second) = (self.first.lines, self.second.lines);
        self.first = Chip { lines: first, ..Chip::new() };
        self.second = Chip { lines: second, ..Chip::new() };
        self.update();
    }
}

#[cfg(test)]
#[path = "pic_tests.rs"]
mod tests;
