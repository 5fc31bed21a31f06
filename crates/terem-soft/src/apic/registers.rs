//! What the registers say: priorities, requests, the timer's count.

use super::*;

pub(super) fn highest(words: &[u32]) -> Option<u8> {
    let i = words.iter().rposition(|w| *w != 0)?;
    Some((i as u32 * 32 + 31 - words[i].leading_zeros()) as u8)
}

impl Registers {
    pub(super) fn x2apic(&self) -> bool {
        self.base & base::X2APIC != 0
    }

    pub(super) fn enabled(&self) -> bool {
        self.base & base::ENABLED != 0 && self.r[reg::SVR] & SOFTWARE_ENABLED != 0
    }

    pub(super) fn set_bit(&mut self, bank: usize, vector: u8, on: bool) {
        let (word, bit) = (bank + usize::from(vector >> 5), 1 << (vector & 31));
        if on {
            self.r[word] |= bit;
        } else {
            self.r[word] &= !bit;
        }
    }

    pub(super) fn ppr(&self) -> u32 {
        let in_service = highest(&self.r[reg::ISR..reg::ISR + 8]).map_or(0, u32::from);
        let tpr = self.r[reg::TPR] & 0xff;
        if tpr >> 4 >= in_service >> 4 { tpr } else { in_service & 0xf0 }
    }

    /// The vector that may interrupt now.
    pub(super) fn deliverable(&self) -> Option<u8> {
        let vector = highest(&self.r[reg::IRR..reg::IRR + 8])?;
        (self.enabled() && u32::from(vector >> 4) > self.ppr() >> 4).then_some(vector)
    }

    /// Whether an interrupt, NMI or SMI waits, for a vCPU that takes them.
    pub(super) fn waits(&self) -> bool {
        self.nmi || self.smi || self.external() || self.deliverable().is_some()
    }

    pub(super) fn request(&mut self, vector: u8, level: bool) {
        if vector >= 16 && self.enabled() {
            self.set_bit(reg::IRR, vector, true);
            self.set_bit(reg::TMR, vector, level);
        }
    }

    /// Acts as an LVT entry says, for the timer and the pins.
    pub(super) fn local(&mut self, lvt: usize) {
        let entry = self.r[lvt];
        if entry & MASKED == 0 && self.base & base::ENABLED != 0 {
            match DeliveryMode::from_bits((entry >> 8) as u8) {
                DeliveryMode::Nmi => self.nmi = true,
                DeliveryMode::Smi => self.smi = true,
                DeliveryMode::Fixed => self.request(entry as u8, false),
                _ => {}
            }
        }
    }

    pub(super) fn external(&self) -> bool {
        let entry = self.r[reg::LVT_LINT0];
        let passes = self.base & base::ENABLED == 0
            || (entry & MASKED == 0 && DeliveryMode::from_bits((entry >> 8) as u8) == DeliveryMode::ExtInt);
        self.intr && passes
    }

    /// Nanoseconds of one timer tick: the timer's clock is 1 GHz before the divider.
    pub(super) fn tick(&self) -> u64 {
        let d = self.r[reg::DIVIDE];
        let shift = ((d & 3 | d >> 1 & 4) + 1) & 7;
        1 << shift
    }

    /// The mask bit that LVT entries keep while the APIC is software-disabled.
    pub(super) fn forced_mask(&self) -> u32 {
        if self.r[reg::SVR] & SOFTWARE_ENABLED == 0 { MASKED } else { 0 }
    }

    pub(super) fn timer_mode(&self) -> u32 {
        self.r[reg::LVT_TIMER] >> 17 & 3
    }

    pub(super) fn current_count(&self, now: u64) -> u32 {
        let initial = u64::from(self.r[reg::INITIAL]);
        if initial == 0 || self.timer_mode() == 2 {
            return 0;
        }
        let ticks = now.saturating_sub(self.timer_start) / self.tick();
        match self.timer_mode() {
            1 => (initial - ticks % initial) as u32,
            _ => initial.saturating_sub(ticks) as u32,
        }
    }

    /// The virtual time at which the timer fires next.
    pub(super) fn timer_due(&self, now: u64, tsc_offset: u64) -> Option<u64> {
        let initial = u64::from(self.r[reg::INITIAL]);
        match self.timer_mode() {
            2 => (self.tsc_deadline != 0).then(|| self.tsc_deadline.wrapping_sub(tsc_offset)),
            _ if initial == 0 => None,
            1 => {
                let period = initial * self.tick();
                let passed = now.saturating_sub(self.timer_start) / period;
                Some(self.timer_start + (passed + 1) * period)
            }
            _ => Some(self.timer_start + initial * self.tick()).filter(|&t| t > now),
        }
    }
}
