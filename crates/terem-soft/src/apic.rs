//! The local APICs (Intel SDM vol. 3, chapter "Advanced Programmable Interrupt Controller"): xAPIC and
//! x2APIC, timer with one-shot, periodic and TSC-deadline modes, inter-processor interrupts.
//!
//! Each vCPU has one, shared between its own thread (register accesses, taking interrupts) and everybody
//! who delivers. `attention` is the one word that a running vCPU looks at between blocks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use terem_bus::{ApicBus, ApicMessage, Bus, DeliveryMode, MsiMessage, MsiSink, Timer, locked};
use terem_cpu::ApicState;

/// `IA32_APIC_BASE` bits.
pub(crate) mod base {
    pub(crate) const BOOT: u64 = 1 << 8;
    pub(crate) const X2APIC: u64 = 1 << 10;
    pub(crate) const ENABLED: u64 = 1 << 11;
    pub(crate) const ADDRESS: u64 = 0xf_ffff_f000;
}

/// Register indices: xAPIC offset / 16, x2APIC MSR - 800h.
mod reg {
    pub(super) const ID: usize = 0x02;
    pub(super) const VERSION: usize = 0x03;
    pub(super) const TPR: usize = 0x08;
    pub(super) const PPR: usize = 0x0a;
    pub(super) const EOI: usize = 0x0b;
    pub(super) const LDR: usize = 0x0d;
    pub(super) const DFR: usize = 0x0e;
    pub(super) const SVR: usize = 0x0f;
    pub(super) const ISR: usize = 0x10;
    pub(super) const TMR: usize = 0x18;
    pub(super) const IRR: usize = 0x20;
    pub(super) const ESR: usize = 0x28;
    pub(super) const ICR: usize = 0x30;
    pub(super) const ICR2: usize = 0x31;
    pub(super) const LVT_TIMER: usize = 0x32;
    pub(super) const LVT_LINT0: usize = 0x35;
    pub(super) const LVT_LINT1: usize = 0x36;
    pub(super) const LVT_ERROR: usize = 0x37;
    pub(super) const INITIAL: usize = 0x38;
    pub(super) const CURRENT: usize = 0x39;
    pub(super) const DIVIDE: usize = 0x3e;
    pub(super) const SELF_IPI: usize = 0x3f;
}

const MASKED: u32 = 1 << 16;
/// SVR: the APIC is software-enabled.
const SOFTWARE_ENABLED: u32 = 1 << 8;
/// ESR: an illegal register address, and an illegal vector was sent.
const ESR_SEND_VECTOR: u32 = 1 << 5;

/// What changes under the lock.
#[derive(Debug)]
struct Registers {
    base: u64,
    r: [u32; 64],
    timer_start: u64,
    tsc_deadline: u64,
    intr: bool,
    nmi: bool,
    init: bool,
    start_up: Option<u8>,
    kick: bool,
}

/// One local APIC.
pub(crate) struct Apic {
    id: u32,
    registers: Mutex<Registers>,
    wake: Condvar,
    /// Somebody wants something of this vCPU.
    attention: AtomicBool,
    /// Physical base if memory-mapped and enabled, else all ones: read on each MMIO access.
    mapped: std::sync::atomic::AtomicU64,
    timer: OnceLock<Timer>,
    system: OnceLock<Weak<ApicSystem>>,
}

/// What [`Apic::next`] has for its vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    Kick,
    Init,
    StartUp(u8),
    Nmi,
    /// Take an interrupt of this vector.
    Vector(u8),
    /// Take one from the PIC.
    External,
    Nothing,
}

/// What the vCPU can take now.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Accepts {
    pub(crate) interrupts: bool,
    pub(crate) nmi: bool,
    pub(crate) waiting_for_start_up: bool,
}

fn highest(words: &[u32]) -> Option<u8> {
    let i = words.iter().rposition(|w| *w != 0)?;
    Some((i as u32 * 32 + 31 - words[i].leading_zeros()) as u8)
}

impl Registers {
    fn x2apic(&self) -> bool {
        self.base & base::X2APIC != 0
    }

    fn enabled(&self) -> bool {
        self.base & base::ENABLED != 0 && self.r[reg::SVR] & SOFTWARE_ENABLED != 0
    }

    fn set_bit(&mut self, bank: usize, vector: u8, on: bool) {
        let (word, bit) = (bank + usize::from(vector >> 5), 1 << (vector & 31));
        if on {
            self.r[word] |= bit;
        } else {
            self.r[word] &= !bit;
        }
    }

    fn ppr(&self) -> u32 {
        let in_service = highest(&self.r[reg::ISR..reg::ISR + 8]).map_or(0, u32::from);
        let tpr = self.r[reg::TPR] & 0xff;
        if tpr >> 4 >= in_service >> 4 { tpr } else { in_service & 0xf0 }
    }

    /// The vector that may interrupt now.
    fn deliverable(&self) -> Option<u8> {
        let vector = highest(&self.r[reg::IRR..reg::IRR + 8])?;
        (self.enabled() && u32::from(vector >> 4) > self.ppr() >> 4).then_some(vector)
    }

    fn request(&mut self, vector: u8, level: bool) {
        if vector >= 16 && self.enabled() {
            self.set_bit(reg::IRR, vector, true);
            self.set_bit(reg::TMR, vector, level);
        }
    }

    /// Acts as an LVT entry says, for the timer and the pins.
    fn local(&mut self, lvt: usize) {
        let entry = self.r[lvt];
        if entry & MASKED == 0 && self.base & base::ENABLED != 0 {
            match DeliveryMode::from_bits((entry >> 8) as u8) {
                DeliveryMode::Nmi => self.nmi = true,
                DeliveryMode::Fixed => self.request(entry as u8, false),
                _ => {}
            }
        }
    }

    fn external(&self) -> bool {
        let entry = self.r[reg::LVT_LINT0];
        let passes = self.base & base::ENABLED == 0
            || (entry & MASKED == 0 && DeliveryMode::from_bits((entry >> 8) as u8) == DeliveryMode::ExtInt);
        self.intr && passes
    }

    /// Nanoseconds of one timer tick: the timer's clock is 1 GHz before the divider.
    fn tick(&self) -> u64 {
        let d = self.r[reg::DIVIDE];
        let shift = ((d & 3 | d >> 1 & 4) + 1) & 7;
        1 << shift
    }

    /// The mask bit that LVT entries keep while the APIC is software-disabled.
    fn forced_mask(&self) -> u32 {
        if self.r[reg::SVR] & SOFTWARE_ENABLED == 0 { MASKED } else { 0 }
    }

    fn timer_mode(&self) -> u32 {
        self.r[reg::LVT_TIMER] >> 17 & 3
    }

    fn current_count(&self, now: u64) -> u32 {
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
    fn timer_due(&self, now: u64, tsc_offset: u64) -> Option<u64> {
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

impl Apic {
    pub(crate) fn new(id: u32, boot: bool) -> Self {
        let power_on = terem_cpu::VcpuState::power_on(id, boot).apic;
        let mut r = [0; 64];
        r.copy_from_slice(&power_on.registers);
        let registers = Registers {
            base: power_on.base,
            r,
            timer_start: 0,
            tsc_deadline: 0,
            intr: false,
            nmi: false,
            init: false,
            start_up: None,
            kick: false,
        };
        Self {
            id,
            registers: Mutex::new(registers),
            wake: Condvar::new(),
            attention: AtomicBool::new(true),
            mapped: std::sync::atomic::AtomicU64::new(power_on.base & base::ADDRESS),
            timer: OnceLock::new(),
            system: OnceLock::new(),
        }
    }

    fn connect(self: &Arc<Self>, system: &Arc<ApicSystem>) {
        let _ = self.system.set(Arc::downgrade(system));
        let me = Arc::downgrade(self);
        let timer = system.bus.clock.timer(move |now| {
            if let Some(apic) = me.upgrade() {
                apic.timer_fired(now);
            }
        });
        let _ = self.timer.set(timer);
    }

    fn timer_fired(&self, now: u64) {
        let mut r = locked(&self.registers);
        // A timer that was stopped or set anew meanwhile is not due.
        let due = match r.timer_mode() {
            2 => std::mem::take(&mut r.tsc_deadline) != 0,
            1 => r.r[reg::INITIAL] != 0,
            _ => r.r[reg::INITIAL] != 0 && r.current_count(now) == 0,
        };
        if due {
            r.local(reg::LVT_TIMER);
            if r.timer_mode() == 1
                && let (Some(next), Some(timer)) = (r.timer_due(now, 0), self.timer.get())
            {
                timer.arm(next);
            }
        }
        drop(r);
        self.attend();
    }

    fn arm(&self, r: &Registers, now: u64, tsc_offset: u64) {
        if let Some(timer) = self.timer.get() {
            match r.timer_due(now, tsc_offset) {
                Some(at) => timer.arm(at),
                None => timer.cancel(),
            }
        }
    }

    /// Asks the vCPU to look at what is pending.
    pub(crate) fn attend(&self) {
        self.attention.store(true, Ordering::SeqCst);
        // The lock orders this against a vCPU that has just looked and is about to sleep.
        drop(locked(&self.registers));
        self.wake.notify_all();
    }

    /// The same from the vCPU's own thread, which does not sleep now.
    #[inline]
    pub(crate) fn look_again(&self) {
        self.attention.store(true, Ordering::Release);
    }

    #[inline(always)]
    pub(crate) fn wants_attention(&self) -> bool {
        self.attention.load(Ordering::Acquire)
    }

    pub(crate) fn kick(&self) {
        locked(&self.registers).kick = true;
        self.attend();
    }

    /// What there is for the vCPU, taking it. [`Next::Nothing`] clears the attention.
    pub(crate) fn next(&self, accepts: Accepts) -> Next {
        self.attention.store(false, Ordering::SeqCst);
        let mut r = locked(&self.registers);
        let found = Self::take(&mut r, accepts);
        if found != Next::Nothing {
            self.look_again();
        }
        found
    }

    fn take(r: &mut MutexGuard<'_, Registers>, accepts: Accepts) -> Next {
        // INIT and start-up before a kick: they are not part of a saved state.
        if std::mem::take(&mut r.init) {
            return Next::Init;
        }
        let start_up = r.start_up.take().filter(|_| accepts.waiting_for_start_up);
        if let Some(page) = start_up {
            return Next::StartUp(page);
        }
        if std::mem::take(&mut r.kick) {
            return Next::Kick;
        }
        if accepts.waiting_for_start_up {
            return Next::Nothing;
        }
        if r.nmi && accepts.nmi {
            r.nmi = false;
            return Next::Nmi;
        }
        if accepts.interrupts {
            if r.external() {
                return Next::External;
            }
            if let Some(vector) = r.deliverable() {
                r.set_bit(reg::IRR, vector, false);
                r.set_bit(reg::ISR, vector, true);
                return Next::Vector(vector);
            }
        }
        Next::Nothing
    }

    /// Sleeps until there may be something to do.
    pub(crate) fn sleep(&self) {
        let mut r = locked(&self.registers);
        while !self.attention.load(Ordering::SeqCst) {
            r = self.wake.wait(r).unwrap_or_else(PoisonError::into_inner);
        }
    }

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

    fn read_register(&self, bus: &Bus, index: usize) -> u32 {
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

    fn write_register(&self, bus: &Bus, index: usize, value: u32) {
        let mut r = locked(&self.registers);
        match index {
            reg::ID => r.r[reg::ID] = value & 0xff00_0000,
            reg::TPR => r.r[reg::TPR] = value & 0xff,
            reg::EOI => {
                if let Some(vector) = highest(&r.r[reg::ISR..reg::ISR + 8]) {
                    r.set_bit(reg::ISR, vector, false);
                    let level = r.r[reg::TMR + usize::from(vector >> 5)] & 1 << (vector & 31) != 0;
                    drop(r);
                    if level {
                        bus.end_of_interrupt(vector);
                    }
                    return self.look_again();
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
        drop(r);
        self.look_again();
    }

    /// Sends an inter-processor interrupt as an ICR value says.
    fn send(&self, icr: u32, destination: u32, x2apic: bool) {
        let Some(system) = self.system.get().and_then(Weak::upgrade) else { return };
        let mode = DeliveryMode::from_bits((icr >> 8) as u8);
        let level = icr & 1 << 14 != 0;
        let message = ApicMessage {
            destination: if destination == 0xff && !x2apic { u32::MAX } else { destination },
            logical: icr & 1 << 11 != 0,
            mode,
            vector: icr as u8,
            level_triggered: false,
            assert: level || mode != DeliveryMode::Init,
        };
        if mode == DeliveryMode::Fixed && message.vector < 16 {
            locked(&self.registers).r[reg::ESR] |= ESR_SEND_VECTOR;
            return;
        }
        match icr >> 18 & 3 {
            0 => system.deliver(message),
            1 => self.accept(message),
            shorthand => {
                for apic in system.apics.iter().filter(|a| shorthand == 2 || a.id != self.id) {
                    apic.accept(message);
                }
            }
        }
    }

    /// Takes a message that is for this APIC.
    fn accept(&self, message: ApicMessage) {
        {
            let mut r = locked(&self.registers);
            match message.mode {
                DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                    r.request(message.vector, message.level_triggered);
                }
                DeliveryMode::Nmi => r.nmi = true,
                DeliveryMode::Init if message.assert => {
                    // A start-up that comes after it counts even if the vCPU sees both at once.
                    r.init = true;
                    r.start_up = None;
                }
                DeliveryMode::StartUp => r.start_up = Some(message.vector),
                DeliveryMode::Init | DeliveryMode::Smi | DeliveryMode::ExtInt => {}
            }
        }
        self.attend();
    }

    /// Whether a message's destination names this APIC.
    fn is_named_by(&self, message: &ApicMessage) -> bool {
        let r = locked(&self.registers);
        let (d, all) = (message.destination, message.destination == u32::MAX);
        match (message.logical, r.x2apic()) {
            _ if all => true,
            // External sources (8-bit destinations) broadcast with ffh.
            _ if d == 0xff && message.level_triggered => true,
            (false, _) => d == self.id || (d == 0xff && !r.x2apic()),
            (true, true) => {
                let logical = (self.id & 0xffff_fff0) << 12 | 1 << (self.id & 15);
                d >> 16 == logical >> 16 && d & logical & 0xffff != 0
            }
            (true, false) => {
                let ldr = r.r[reg::LDR] >> 24;
                if r.r[reg::DFR] >> 28 == 0xf {
                    d & ldr & 0xff != 0
                } else {
                    d >> 4 & 15 == ldr >> 4 && d & ldr & 15 != 0
                }
            }
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
        self.look_again();
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
        self.look_again();
    }

    pub(crate) fn nmi_pending(&self) -> bool {
        locked(&self.registers).nmi
    }

    pub(crate) fn save(&self) -> ApicState {
        let r = locked(&self.registers);
        ApicState {
            base: r.base,
            registers: r.r.to_vec(),
            timer_start: r.timer_start,
            tsc_deadline: r.tsc_deadline,
            intr: r.intr,
        }
    }

    /// Loads a state, and the NMI latch.
    pub(crate) fn restore(
        &self,
        state: &ApicState,
        nmi: bool,
        bus: &Bus,
        tsc_offset: u64,
    ) -> Result<(), String> {
        let registers: [u32; 64] = state
            .registers
            .as_slice()
            .try_into()
            .map_err(|_| format!("a local APIC with {} registers, not 64", state.registers.len()))?;
        let mut r = locked(&self.registers);
        r.base = state.base;
        r.r = registers;
        r.timer_start = state.timer_start;
        r.tsc_deadline = state.tsc_deadline;
        r.intr = state.intr;
        r.nmi = nmi;
        (r.init, r.start_up) = (false, None);
        let mapped = state.base & (base::ENABLED | base::X2APIC) == base::ENABLED;
        self.mapped.store(if mapped { state.base & base::ADDRESS } else { u64::MAX }, Ordering::Relaxed);
        self.arm(&r, bus.clock.now(), tsc_offset);
        drop(r);
        self.attend();
        Ok(())
    }

    /// INIT: registers as after power-on, but for the ID and the base.
    pub(crate) fn init(&self) {
        let mut r = locked(&self.registers);
        let fresh = terem_cpu::VcpuState::power_on(self.id, r.base & base::BOOT != 0).apic;
        r.r.copy_from_slice(&fresh.registers);
        r.tsc_deadline = 0;
        if let Some(timer) = self.timer.get() {
            timer.cancel();
        }
    }
}

/// All local APICs of a machine.
pub(crate) struct ApicSystem {
    apics: Vec<Arc<Apic>>,
    bus: Arc<Bus>,
}

impl ApicSystem {
    pub(crate) fn new(ids: &[u32], bus: Arc<Bus>) -> Arc<Self> {
        let apics = ids.iter().enumerate().map(|(i, &id)| Arc::new(Apic::new(id, i == 0))).collect();
        let system = Arc::new(Self { apics, bus });
        for apic in &system.apics {
            apic.connect(&system);
        }
        system
    }

    pub(crate) fn apic(&self, index: usize) -> Option<Arc<Apic>> {
        self.apics.get(index).cloned()
    }
}

impl ApicBus for ApicSystem {
    fn deliver(&self, message: ApicMessage) {
        let named = self.apics.iter().filter(|a| a.is_named_by(&message));
        if message.mode == DeliveryMode::LowestPriority {
            // The named one with the lowest task priority; the first of equals.
            let priority = |a: &&Arc<Apic>| locked(&a.registers).ppr();
            if let Some(apic) = named.min_by_key(priority) {
                apic.accept(message);
            }
            return;
        }
        for apic in named {
            apic.accept(message);
        }
    }

    fn set_intr(&self, high: bool) {
        for apic in &self.apics {
            let mut r = locked(&apic.registers);
            let news = r.intr != high;
            r.intr = high;
            drop(r);
            if news && high {
                apic.attend();
            }
        }
    }

    fn pulse_nmi(&self) {
        for apic in &self.apics {
            locked(&apic.registers).local(reg::LVT_LINT1);
            apic.attend();
        }
    }
}

impl MsiSink for ApicSystem {
    fn send_msi(&self, message: MsiMessage) {
        self.deliver(message.to_apic());
    }
}
