//! The local APICs (Intel SDM vol. 3, chapter "Advanced Programmable Interrupt Controller"): xAPIC and
//! x2APIC, timer with one-shot, periodic and TSC-deadline modes, inter-processor interrupts.
//!
//! Each vCPU has one, shared between its own thread (register accesses, taking interrupts) and everybody
//! who delivers. `attention` is the one word that a running vCPU looks at between blocks.

mod access;
mod registers;
mod system;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use terem_bus::{ApicBus, ApicMessage, Bus, DeliveryMode, Timer, locked};
use terem_cpu::{ApicState, SmmState};

pub(crate) use system::ApicSystem;

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
    smi: bool,
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
    /// Something waits that the vCPU may not have been able to take. May say so wrongly, but never the other way round.
    pending: AtomicBool,
    /// Physical base if memory-mapped and enabled, else all ones: read on each MMIO access.
    mapped: std::sync::atomic::AtomicU64,
    /// The process in which the vCPU runs a program directly; 0: it does not.
    process: std::sync::atomic::AtomicI32,
    timer: OnceLock<Timer>,
    system: OnceLock<Weak<ApicSystem>>,
}

/// What [`Apic::next`] has for its vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    Kick,
    Init,
    StartUp(u8),
    Smi,
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
    pub(crate) smi: bool,
    /// INIT waits in system management mode.
    pub(crate) init: bool,
    pub(crate) waiting_for_start_up: bool,
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
            smi: false,
            init: false,
            start_up: None,
            kick: false,
        };
        Self {
            id,
            registers: Mutex::new(registers),
            wake: Condvar::new(),
            attention: AtomicBool::new(true),
            pending: AtomicBool::new(true),
            mapped: std::sync::atomic::AtomicU64::new(power_on.base & base::ADDRESS),
            process: std::sync::atomic::AtomicI32::new(0),
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
        self.pending.store(true, Ordering::SeqCst);
        self.attention.store(true, Ordering::SeqCst);
        // The lock orders this against a vCPU that has just looked and is about to sleep.
        drop(locked(&self.registers));
        self.stop_direct_run();
        self.wake.notify_all();
    }

    /// The vCPU is about to run a program in this process. It looks at [`Self::wants_attention`] after this: who asks for attention
    /// looks for a process afterwards.
    pub(crate) fn begin_direct_run(&self, process: i32) {
        self.process.store(process, Ordering::SeqCst);
    }

    /// The program has stopped.
    pub(crate) fn end_own_direct_run(&self) {
        self.process.store(0, Ordering::SeqCst);
    }

    /// Whether the vCPU runs a program directly.
    pub(crate) fn runs_directly(&self) -> bool {
        self.process.load(Ordering::SeqCst) != 0
    }

    /// Stops the program that the vCPU may be running directly.
    pub(crate) fn stop_direct_run(&self) {
        if self.runs_directly() {
            // Under the lock, so that the process is not waited for meanwhile.
            let _registers = locked(&self.registers);
            let process = self.process.load(Ordering::SeqCst);
            if process != 0 {
                crate::direct::stop(process);
            }
        }
    }

    /// To be called before a process is waited for that the vCPU ran programs in: nobody is about to signal it after this.
    pub(crate) fn forget_process(&self) {
        drop(locked(&self.registers));
    }

    /// The same from the vCPU's own thread, which does not sleep now.
    #[inline]
    pub(crate) fn look_again(&self) {
        self.attention.store(true, Ordering::Release);
    }

    /// To be called by the vCPU's thread when it can take more than before (IF was set, an NMI handler returned): asks
    /// for attention if something waits.
    #[inline]
    pub(crate) fn accepts_more(&self) {
        if self.pending.load(Ordering::Acquire) {
            self.look_again();
        }
    }

    /// The words of [`Self::look_again`] and [`Self::accepts_more`], for code that looks at them itself; they live as
    /// long as the APIC.
    pub(crate) fn words(&self) -> [*const AtomicBool; 2] {
        [&raw const self.attention, &raw const self.pending]
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
        self.pending.store(found != Next::Nothing || r.waits(), Ordering::Release);
        if found != Next::Nothing {
            self.look_again();
        }
        found
    }

    fn take(r: &mut MutexGuard<'_, Registers>, accepts: Accepts) -> Next {
        // INIT and start-up before a kick: start-up is not part of a saved state.
        if r.init && accepts.init {
            r.init = false;
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
        if r.smi && accepts.smi {
            r.smi = false;
            return Next::Smi;
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

    /// Sleeps for `time`, unless there may be something to do, or with `masked_too` an interrupt waits that cannot be
    /// taken: false then.
    pub(crate) fn doze(&self, time: Duration, masked_too: bool) -> bool {
        let r = locked(&self.registers);
        if self.attention.load(Ordering::SeqCst) || (masked_too && r.waits()) {
            return false;
        }
        let r = self.wake.wait_timeout(r, time).map_or_else(|e| e.into_inner().0, |(r, _)| r);
        !(self.attention.load(Ordering::SeqCst) || (masked_too && r.waits()))
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
                DeliveryMode::Smi => r.smi = true,
                DeliveryMode::Init if message.assert => {
                    // A start-up that comes after it counts even if the vCPU sees both at once.
                    r.init = true;
                    r.start_up = None;
                }
                DeliveryMode::StartUp => r.start_up = Some(message.vector),
                DeliveryMode::Init | DeliveryMode::ExtInt => {}
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

    pub(crate) fn nmi_pending(&self) -> bool {
        locked(&self.registers).nmi
    }

    /// Whether an SMI and an INIT wait.
    pub(crate) fn smi_and_init_pending(&self) -> (bool, bool) {
        let r = locked(&self.registers);
        (r.smi, r.init)
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

    /// Loads a state, and the latches of NMI and what `smm` has.
    pub(crate) fn restore(
        &self,
        state: &ApicState,
        nmi: bool,
        smm: SmmState,
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
        r.smi = smm.pending;
        (r.init, r.start_up) = (smm.init_pending, None);
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
