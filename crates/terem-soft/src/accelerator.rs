//! The accelerator as the machine sees it.

use std::sync::Arc;

use terem_bus::{ApicBus, Bus, MsiSink};
use terem_cpu::{
    Accelerator, Counters, CpuError, CpuModel, Cpuid, DebugControl, MpState, SmmState, Stop, Topology, Trace,
    Vcpu, VcpuState,
};
use terem_memory::GuestMemory;

use crate::apic::ApicSystem;
use crate::block::BlockCache;
use crate::cpu::{Cpu, Ymm};
use crate::decode::InstructionSet;
use crate::direct::{Direct, Shared};
use crate::low::{Low, Room};
use crate::mmu::Tlb;
use crate::stats::Stats;
use crate::translate::Native;
use crate::x87::Fpu;

/// The TSC's frequency: virtual nanoseconds.
pub const TSC_KHZ: u32 = 1_000_000;

/// Which programs (64-bit user mode) run on the host's processor directly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Directly {
    /// None.
    Never,
    /// Those that compute for long between two entries into their kernel.
    WorthIt,
    /// All that can.
    Always,
}

/// What a software machine's processors are.
#[derive(Debug, Clone)]
pub struct SoftConfig {
    /// The model that guests see.
    pub model: CpuModel,
    /// How many, and how grouped.
    pub topology: Topology,
    /// Width of guest-physical addresses in bits.
    pub phys_bits: u8,
    /// Whether hot code is translated, or all of it interpreted.
    pub translate: bool,
    /// Which programs run on the host's processor directly. (None where nothing is translated.)
    pub direct: Directly,
    /// What vCPUs tell of what they do.
    pub trace: Option<Trace>,
}

/// Runs vCPUs in software.
pub struct SoftAccelerator {
    config: SoftConfig,
    bus: Arc<Bus>,
    memory: GuestMemory,
    apics: Arc<ApicSystem>,
    instruction_set: Arc<InstructionSet>,
    stats: Vec<Arc<Stats>>,
    direct: Option<Arc<Shared>>,
}

impl SoftAccelerator {
    /// An accelerator for one machine.
    ///
    /// # Errors
    /// [`CpuError::Unsupported`] lists the model's features that this host's CPU lacks and the interpreter
    /// takes from it.
    pub fn new(bus: Arc<Bus>, memory: GuestMemory, mut config: SoftConfig) -> Result<Self, CpuError> {
        let host = crate::supported_features();
        config.model.leave_out_what_is_not_in(&host);
        let missing: Vec<&str> = config.model.features.missing_from(&host);
        if !missing.is_empty() {
            let reason = format!(
                "this host's processor lacks {}; switch {} off, as in --cpu {},-{}",
                missing.join(", "),
                if missing.len() == 1 { "it" } else { "them" },
                config.model.name,
                missing.join(",-"),
            );
            return Err(CpuError::Unsupported { accelerator: "the software CPU", reason });
        }
        let t = config.topology;
        let ids: Vec<u32> = (0..t.cpus()).map(|i| t.apic_id(i)).collect();
        let apics = ApicSystem::new(&ids, Arc::clone(&bus));
        let listening = Arc::downgrade(&apics);
        memory.marks().on_change(move || {
            if let Some(apics) = listening.upgrade() {
                apics.look_again();
            }
        });
        let instruction_set = Arc::new(InstructionSet::new(&config.model.features));
        let stats = ids.iter().map(|_| Arc::default()).collect();
        let on = config.translate && config.direct != Directly::Never;
        let always = config.direct == Directly::Always;
        let direct = on.then(|| Arc::new(Shared::new(Arc::clone(&apics), memory.clone(), always)));
        Ok(Self { config, bus, memory, apics, instruction_set, stats, direct })
    }

    pub(crate) fn make(&self, id: u32) -> Result<Low<Cpu>, CpuError> {
        let apic =
            self.apics.apic(id as usize).ok_or_else(|| CpuError::State(format!("there is no vCPU {id}")))?;
        let stats: Arc<Stats> = self.stats.get(id as usize).map(Arc::clone).unwrap_or_default();
        let c = &self.config;
        let cpuid = Cpuid::new(c.model.clone(), c.topology, id, TSC_KHZ, c.phys_bits);
        let fresh = VcpuState::power_on(cpuid.apic_id(), id == 0);
        let (vcpus, avx) = (self.apics.count(), c.model.features.has("avx"));
        let room = Room::new().map_err(|e| CpuError::Host { action: "take memory for a vCPU", source: e })?;
        let native = Native::new(apic.words(), self.config.translate, vcpus, avx, room.low());
        if let Some(translator) = &native.translator {
            stats.code_capacity.set(translator.code_capacity());
        }
        let mut cpu = room.put(Cpu {
            gpr: [0; 18],
            rip: 0,
            ah: 0,
            of: 0,
            system_flags: 0,
            segment_base: [0; 8],
            segments: fresh.segments,
            cpl: 0,
            ymm: [Ymm::default(); 16],
            uppers: false,
            mxcsr: 0x1f80,
            mxcsr_on_host: false,
            fpu: Fpu::default(),
            op_end: std::ptr::null(),
            window: self.memory.window_base() as u64,
            low_ram: self.memory.ram().iter().find(|r| r.base == 0).map_or(0, |r| r.size),
            marks: self.memory.marks().as_ptr(),
            tlb: Tlb::new(),
            mode: crate::decode::Mode::REAL,
            mode_key: crate::decode::Mode::REAL.key(),
            instruction_set: Arc::clone(&self.instruction_set),
            cr0: fresh.cr0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            xcr0: 1,
            pkru: 0,
            debug: fresh.debug,
            ldtr: fresh.ldtr,
            tr: fresh.tr,
            gdtr: fresh.gdtr,
            idtr: fresh.idtr,
            msrs: fresh.msrs.clone(),
            tsc_offset: 0,
            watches: crate::watch::Watches::default(),
            interrupt_shadow: false,
            shadow_of_stack: false,
            steps_over: false,
            deferred: None,
            nmi_masked: false,
            smm: fresh.smm,
            halted: false,
            monitored: None,
            waiting_for_start_up: false,
            shut_down: false,
            id,
            cpuid,
            bus: Arc::clone(&self.bus),
            memory: self.memory.clone(),
            apic,
            blocks: BlockCache::new(),
            native,
            direct: self.direct.as_ref().map(|shared| Direct::new(Arc::clone(shared), id)),
            runs_directly_here: false,
            kernel_entries: 0,
            stats,
            tracing: c.trace.clone().map(crate::trace::Tracing::new),
            #[cfg(test)]
            catches: false,
            #[cfg(test)]
            caught: None,
        });
        cpu.power_on()?;
        Ok(cpu)
    }
}

impl Accelerator for SoftAccelerator {
    fn name(&self) -> &'static str {
        "software CPU"
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, CpuError> {
        Ok(Box::new(self.make(id)?))
    }

    fn apic_bus(&self) -> Arc<dyn ApicBus> {
        Arc::clone(&self.apics) as _
    }

    fn msi_sink(&self) -> Arc<dyn MsiSink> {
        Arc::clone(&self.apics) as _
    }

    fn kick(&self, id: u32) {
        if let Some(apic) = self.apics.apic(id as usize) {
            apic.kick();
        }
    }

    fn counters(&self, id: u32) -> Option<Counters> {
        self.stats.get(id as usize).map(|stats| stats.read(self.bus.clock.now()))
    }
}

impl Cpu {
    fn power_on(&mut self) -> Result<(), CpuError> {
        let mut state = VcpuState::power_on(self.cpuid.apic_id(), self.id == 0);
        // EDX holds the signature after reset (Intel SDM vol. 3, 10.1.2).
        state.gpr[2] = u64::from(self.cpuid.query(1, 0).registers[0]);
        self.load_state(&state)
    }

    fn load_state(&mut self, s: &VcpuState) -> Result<(), CpuError> {
        self.load_registers(s)?;
        self.tsc_offset = s.tsc.wrapping_sub(self.bus.clock.now());
        self.halted = s.mp_state == MpState::Halted;
        self.waiting_for_start_up = s.mp_state == MpState::WaitForStartUp;
        self.interrupt_shadow = s.interrupt_shadow;
        self.shadow_of_stack = false;
        self.deferred = None;
        self.monitored = None;
        self.nmi_masked = s.nmi_masked;
        self.smm = s.smm;
        self.shut_down = false;
        self.apic
            .restore(&s.apic, s.nmi_pending, s.smm, &self.bus, self.tsc_offset)
            .map_err(CpuError::State)?;
        self.blocks.clear();
        Ok(())
    }

    fn load_registers(&mut self, s: &VcpuState) -> Result<(), CpuError> {
        let bad = |what: &str| Err(CpuError::State(what.into()));
        let protected = s.cr0 & crate::cpu::cr0::PE != 0;
        if s.cr0 & crate::cpu::cr0::PG != 0 && !protected {
            return bad("paging without protection (CR0.PG without PE)");
        }
        if s.rflags >> 22 != 0 || s.rip as i64 as u64 != s.rip {
            return bad("RFLAGS has bits that do not exist");
        }
        self.load_xsave(&s.xsave).map_err(|e| CpuError::State(e.to_string()))?;
        self.gpr[..16].copy_from_slice(&s.gpr);
        self.rip = s.rip;
        self.segments = s.segments;
        (self.ldtr, self.tr, self.gdtr, self.idtr) = (s.ldtr, s.tr, s.gdtr, s.idtr);
        (self.cr0, self.cr2, self.cr3, self.cr4, self.xcr0) = (s.cr0, s.cr2, s.cr3, s.cr4, s.xcr0);
        self.debug = s.debug;
        self.msrs = s.msrs.clone();
        self.cpl = if !protected {
            0
        } else if s.rflags & terem_cpu::rflags::VM != 0 {
            3
        } else {
            (s.segments[VcpuState::SS].access >> 5 & 3) as u8
        };
        self.set_rflags(s.rflags);
        self.flush_tlb();
        self.refresh_watches();
        self.refresh_mode();
        Ok(())
    }
}

impl Vcpu for Cpu {
    fn run(&mut self) -> Stop {
        let stop = Cpu::run(self);
        self.take_mxcsr();
        tracing::debug!(vcpu = self.id, ?stop, stats = ?self.stats, "vCPU stopped");
        stop
    }

    fn reset(&mut self) {
        if let Err(e) = self.power_on() {
            // The power-on state is a constant of ours.
            tracing::error!("vCPU {}: {e}", self.id);
        }
    }

    fn save(&self) -> VcpuState {
        let (smi, init) = self.apic.smi_and_init_pending();
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.gpr[..16]);
        VcpuState {
            gpr,
            rip: self.rip,
            rflags: self.rflags(),
            segments: self.segments,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            xcr0: self.xcr0,
            debug: self.debug,
            msrs: self.msrs.clone(),
            tsc: self.tsc(),
            xsave: self.save_xsave(),
            apic: self.apic.save(),
            mp_state: self.mp_state(),
            interrupt_shadow: self.interrupt_shadow,
            nmi_masked: self.nmi_masked,
            nmi_pending: self.apic.nmi_pending(),
            smm: SmmState { pending: smi, init_pending: init, ..self.smm },
        }
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), CpuError> {
        self.load_state(state)
    }

    fn set_registers(&mut self, state: &VcpuState) -> Result<(), CpuError> {
        self.load_registers(state)
    }

    fn translate(&self, linear: u64) -> Option<u64> {
        self.probe(linear)
    }

    fn debug(&mut self, control: &DebugControl) -> Result<(), CpuError> {
        self.set_debugger(control)
    }
}
