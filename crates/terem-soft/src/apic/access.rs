//! How software reaches the registers: by MMIO (xAPIC), by MSRs (x2APIC), by CR8.

use super::registers::highest;
use super::*;

impl Apic {
    /// The register index for a physical address, if the APIC is memory-mapped there.
    #[inline]
    pub(crate) fn mmio_offset(&self, physical: u64) -> Option<usize> {
        let from = physical.wrapping_sub(self.mapped.load(Ordering::Relaxed));
        (from < 0x1000).then_some(from as usize)
    }

    /// A memory-mapped read, aligned to 16 bytes as the manual demands.
    pub(crate) fn read(&self, bus: &Bus, offset: usize) -> u32 {
        if offset & 15 != 0 { 0 } else { self.read_register(bus, offset >> 4) }
    }

    pub(super) fn read_register(&self, bus: &Bus, index: usize) -> u32 {
        let r = locked(&self.registers);
        match index {
            reg::ID if r.x2apic() => self.id,
            reg::LDR if r.x2apic() => (self.id & 0xffff_fff0) << 12 | 1 << (self.id & 15),
            reg::PPR => r.ppr(),
            reg::CURRENT => r.current_count(bus.clock.now()),
            reg::EOI | reg::SELF_IPI => 0,
            i if i < 64 => r.r[i],
            _ => 0,
        }
    }

    /// A memory-mapped write.
    pub(crate) fn write(&self, bus: &Bus, offset: usize, value: u32) {
        if offset & 15 == 0 {
            self.write_register(bus, offset >> 4, value);
        }
    }

    pub(super) fn write_register(&self, bus: &Bus, index: usize, value: u32) {
        let mut r = locked(&self.registers);
        match index {
            reg::ID => r.r[reg::ID] = value & 0xff00_0000,
            reg::TPR => r.r[reg::TPR] = value & 0xff,
            reg::EOI => {
                if let Some(vector) = highest(&r.r[reg::ISR..reg::ISR + 8]) {
                    r.set_bit(reg::ISR, vector, false);
                    let level = r.r[reg::TMR + usize::from(vector >> 5)] & 1 << (vector & 31) != 0;
                    let more = r.waits();
                    drop(r);
                    if level {
                        bus.end_of_interrupt(vector);
                    }
                    if more {
                        self.attend();
                    }
                    return;
                }
            }
            reg::LDR => r.r[reg::LDR] = value & 0xff00_0000,
            reg::DFR => r.r[reg::DFR] = value | 0x0fff_ffff,
            reg::SVR => {
                r.r[reg::SVR] = value & 0x11ff;
                if value & SOFTWARE_ENABLED == 0 {
                    for lvt in &mut r.r[reg::LVT_TIMER..=reg::LVT_ERROR] {
                        *lvt |= MASKED;
                    }
                }
            }
            reg::ESR => r.r[reg::ESR] = 0,
            reg::ICR2 => r.r[reg::ICR2] = value & 0xff00_0000,
            reg::ICR => {
                r.r[reg::ICR] = value & !(1 << 12); // delivery is never pending
                let destination = r.r[reg::ICR2] >> 24;
                let x2 = r.x2apic();
                drop(r);
                return self.send(value, destination, x2);
            }
            reg::LVT_TIMER => {
                let now = bus.clock.now();
                let before = r.timer_mode();
                let mask = r.forced_mask();
                r.r[reg::LVT_TIMER] = value & 0x0007_00ff | mask;
                if before != r.timer_mode() {
                    r.tsc_deadline = 0;
                    if before == 2 || r.timer_mode() == 2 {
                        r.r[reg::INITIAL] = 0;
                    }
                    self.arm(&r, now, 0);
                }
            }
            0x2f | 0x33..=reg::LVT_ERROR => {
                let mask = r.forced_mask();
                r.r[index] = value & 0x0001_f7ff & !(1 << 12) & !(1 << 14) | mask;
            }
            reg::INITIAL if r.timer_mode() != 2 => {
                let now = bus.clock.now();
                r.r[reg::INITIAL] = value;
                r.timer_start = now;
                self.arm(&r, now, 0);
            }
            reg::DIVIDE => {
                // A running count goes on at the new rate from where it is.
                let now = bus.clock.now();
                let left = u64::from(r.r[reg::INITIAL] - r.current_count(now).min(r.r[reg::INITIAL]));
                r.r[reg::DIVIDE] = value & 0xb;
                r.timer_start = now.saturating_sub(left * r.tick());
                self.arm(&r, now, 0);
            }
            _ => {}
        }
        let more = r.waits();
        drop(r);
        if more {
            self.attend();
        }
    }

    pub(crate) fn base_msr(&self) -> u64 {
        locked(&self.registers).base
    }

    /// Writes `IA32_APIC_BASE`. False: the transition is not allowed (`#GP`).
    pub(crate) fn set_base_msr(&self, value: u64, x2apic_allowed: bool) -> bool {
        let mut r = locked(&self.registers);
        let known = base::ADDRESS | base::ENABLED | base::X2APIC | base::BOOT;
        let (was_x2, on, x2) = (r.x2apic(), value & base::ENABLED != 0, value & base::X2APIC != 0);
        let refused = value & !known != 0 || (x2 && !(on && x2apic_allowed)) || (was_x2 && on && !x2);
        // From disabled straight to x2APIC is refused as well.
        if refused || (x2 && r.base & base::ENABLED == 0) {
            return false;
        }
        r.base = value;
        let mapped = if on && !x2 { value & base::ADDRESS } else { u64::MAX };
        self.mapped.store(mapped, Ordering::Relaxed);
        drop(r);
        self.attend();
        true
    }

    /// Reads MSR 800h + `index` (x2APIC). `None`: `#GP`.
    pub(crate) fn read_msr(&self, bus: &Bus, index: usize) -> Option<u64> {
        if !locked(&self.registers).x2apic() {
            return None;
        }
        match index {
            reg::ICR => {
                let r = locked(&self.registers);
                Some(u64::from(r.r[reg::ICR]) | u64::from(r.r[reg::ICR2]) << 32)
            }
            reg::ID | reg::VERSION | reg::TPR | reg::PPR | reg::LDR | reg::SVR..=reg::ESR | 0x2f => {
                Some(u64::from(self.read_register(bus, index)))
            }
            reg::LVT_TIMER..=reg::CURRENT | reg::DIVIDE => Some(u64::from(self.read_register(bus, index))),
            _ => None,
        }
    }

    /// Writes MSR 800h + `index` (x2APIC). False: `#GP`.
    pub(crate) fn write_msr(&self, bus: &Bus, index: usize, value: u64) -> bool {
        if !locked(&self.registers).x2apic() || (index != reg::ICR && value >> 32 != 0) {
            return false;
        }
        let low = value as u32;
        match index {
            reg::ICR => {
                {
                    let mut r = locked(&self.registers);
                    r.r[reg::ICR] = low & !(1 << 12);
                    r.r[reg::ICR2] = (value >> 32) as u32;
                }
                self.send(low, (value >> 32) as u32, true);
            }
            reg::SELF_IPI => self.send(low & 0xff | 1 << 18 | 1 << 14, 0, true),
            reg::EOI | reg::ESR if low != 0 => return false,
            reg::TPR | reg::EOI | reg::SVR | reg::ESR | 0x2f | reg::DIVIDE => {
                self.write_register(bus, index, low);
            }
            reg::LVT_TIMER..=reg::INITIAL => self.write_register(bus, index, low),
            _ => return false,
        }
        true
    }

    pub(crate) fn tsc_deadline(&self) -> u64 {
        locked(&self.registers).tsc_deadline
    }

    /// Writes `IA32_TSC_DEADLINE`; ignored unless the timer is in that mode.
    pub(crate) fn set_tsc_deadline(&self, bus: &Bus, value: u64, tsc_offset: u64) {
        let mut r = locked(&self.registers);
        if r.timer_mode() == 2 {
            r.tsc_deadline = value;
            self.arm(&r, bus.clock.now(), tsc_offset);
        }
    }

    /// TPR bits 7:4, as CR8 shows them.
    pub(crate) fn cr8(&self) -> u64 {
        u64::from(locked(&self.registers).r[reg::TPR] >> 4 & 15)
    }

    pub(crate) fn set_cr8(&self, value: u64) {
        locked(&self.registers).r[reg::TPR] = (value as u32 & 15) << 4;
        self.attend();
    }
}
