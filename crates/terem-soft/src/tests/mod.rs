//! What the whole vCPU does: paging, events, interrupts, code that changes. Guest programs are written with
//! iced's assembler and run through [`terem_cpu::Vcpu::run`] until they write to the exit port.

mod apic;
mod code_changes;
mod cross_changes;
mod debug;
mod events;
mod keys;
mod many;
mod mappings;
mod monitor;
mod msr;
mod outside;
mod paging;
mod self_changes;
mod smm;
mod team;

use std::sync::{Arc, Mutex, OnceLock, Weak};

use iced_x86::code_asm::CodeAssembler;
use terem_bus::{Bus, Clock, Registers};
use terem_cpu::{Accelerator, CpuModel, Segment, Stop, Topology, Vcpu, VcpuState};
use terem_memory::vm_memory::{Bytes, GuestAddress};
use terem_memory::{GuestMemory, RamRange};

use crate::cpu::{cr0, cr4, efer};
use crate::{SoftAccelerator, SoftConfig};

/// Where things are. The first 2 MiB are mapped to themselves; from [`WINDOW`] on are pages for experiments.
const CODE: u64 = 0x1_0000;
const USER_CODE: u64 = 0x20_0000;
const HANDLERS: u64 = 0x2_0000;
const STACK: u64 = 0x8_0000;
const INNER_STACK: u64 = 0x9_0000;
const IST: u64 = 0xa_0000;
const GDT: u64 = 0x6000;
const IDT: u64 = 0xb000;
const TSS: u64 = 0x7000;
const PAGE_TABLE: u64 = 0x4000;
/// Linear address of the pages of [`PAGE_TABLE`], which map to physical [`PAGES`] and on.
const WINDOW: u64 = 0x20_0000;
const PAGES: u64 = 0x10_0000;
/// A write ends the run.
const EXIT_PORT: u16 = 0xf4;
/// Bytes of a handler.
const HANDLER_SIZE: u64 = 16;

/// Kicks the vCPU that wrote.
struct ExitPort(OnceLock<Weak<SoftAccelerator>>);

impl Registers for ExitPort {
    fn read(&mut self, _: u64, _: u8) -> Option<u64> {
        None
    }

    fn write(&mut self, _: u64, _: u8, value: u64) -> bool {
        if let Some(accelerator) = self.0.get().and_then(Weak::upgrade) {
            accelerator.kick(u32::try_from(value).unwrap());
        }
        true
    }
}

/// A machine of processors, memory and an exit port.
struct Rig {
    accelerator: Arc<SoftAccelerator>,
    bus: Arc<Bus>,
    memory: GuestMemory,
    vcpu: Box<dyn Vcpu>,
}

impl Rig {
    /// In 64-bit mode at privilege 0, interrupts off, every vector's handler at [`HANDLERS`] writing the
    /// exit port.
    fn new() -> Self {
        Self::with(1, Clock::manual())
    }

    fn with(cpus: u32, clock: Clock) -> Self {
        Self::traced(cpus, clock, None)
    }

    fn traced(cpus: u32, clock: Clock, trace: Option<terem_cpu::Trace>) -> Self {
        Self::made(cpus, clock, trace, true)
    }

    fn made(cpus: u32, clock: Clock, trace: Option<terem_cpu::Trace>, translate: bool) -> Self {
        Self::modelled("terem64", cpus, clock, trace, translate)
    }

    /// A model and, after commas, what of it is switched on or off.
    fn modelled(
        model: &str,
        cpus: u32,
        clock: Clock,
        trace: Option<terem_cpu::Trace>,
        translate: bool,
    ) -> Self {
        let memory = GuestMemory::new(&[RamRange { base: 0, size: 4 << 20 }]).unwrap();
        let mut words = model.split(',');
        let model = words.next().unwrap();
        let flags: Vec<String> = words.map(str::to_owned).collect();
        let bus = Arc::new(Bus::new(clock));
        let model = CpuModel::find(model, &flags).unwrap();
        let config = SoftConfig {
            model,
            topology: Topology::flat(cpus),
            phys_bits: 40,
            translate,
            direct: crate::Directly::Never,
            trace,
        };
        let accelerator = Arc::new(SoftAccelerator::new(Arc::clone(&bus), memory.clone(), config).unwrap());
        let port = ExitPort(OnceLock::new());
        port.0.set(Arc::downgrade(&accelerator)).unwrap();
        bus.ports.map(u64::from(EXIT_PORT), 1, "exit", Arc::new(Mutex::new(port))).unwrap();
        let vcpu = accelerator.create_vcpu(0).unwrap();
        let mut rig = Self { accelerator, bus, memory, vcpu };
        rig.tables();
        let state = rig.kernel_state();
        rig.vcpu.restore(&state).unwrap();
        rig
    }

    fn put<T: terem_memory::vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get(&self, at: u64) -> u64 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn tables(&mut self) {
        self.put(0x1000, 0x2007_u64);
        self.put(0x2000, 0x3007_u64);
        self.put(0x3000, 0x83_u64); // 2 MiB, supervisor, writable
        self.put(0x3008, PAGE_TABLE | 7);
        for (i, descriptor) in [
            0_u64,
            0x00af_9b00_0000_ffff, // 08: code, 64-bit, privilege 0
            0x00cf_9300_0000_ffff, // 10: data, privilege 0
            0x00cf_f300_0000_ffff, // 18: data, privilege 3
            0x00af_fb00_0000_ffff, // 20: code, 64-bit, privilege 3
            0x0000_8b00_7000_0067, // 28: TSS at 7000h
            0,
        ]
        .into_iter()
        .enumerate()
        {
            self.put(GDT + i as u64 * 8, descriptor);
        }
        self.put(TSS + 4, INNER_STACK);
        self.put(TSS + 0x24, IST);
        for v in 0..256_u64 {
            let handler = HANDLERS + v * HANDLER_SIZE;
            self.gate(v, handler, 0x8e, 0);
            let code = assemble(handler, |a| {
                a.xor(iced_x86::code_asm::eax, iced_x86::code_asm::eax)?;
                a.out(u32::from(EXIT_PORT), iced_x86::code_asm::al)?;
                let mut here = a.create_label();
                a.set_label(&mut here)?;
                a.jmp(here)
            });
            self.memory.write_slice(&code, GuestAddress(handler)).unwrap();
        }
    }

    /// An IDT entry: type and attributes byte, and IST index.
    fn gate(&self, vector: u64, handler: u64, access: u64, ist: u64) {
        let low = handler & 0xffff | 8 << 16 | ist << 32 | access << 40 | (handler >> 16 & 0xffff) << 48;
        self.put(IDT + vector * 16, low);
        self.put(IDT + vector * 16 + 8, handler >> 32);
    }

    /// Maps page `n` of the window with these entry bits.
    fn page(&self, n: u64, bits: u64) {
        self.put(PAGE_TABLE + n * 8, (PAGES + n * 0x1000) | bits);
    }

    fn kernel_state(&self) -> VcpuState {
        let mut s = self.vcpu.save();
        s.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
        s.cr3 = 0x1000;
        s.cr4 = cr4::PAE | cr4::OSFXSR;
        s.msrs.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        for (i, seg) in s.segments.iter_mut().enumerate() {
            *seg = Segment::flat(if i == 1 { 8 } else { 0x10 }, i == 1, i == 1);
        }
        s.gdtr = terem_cpu::DescriptorTable { base: GDT, limit: 7 * 8 - 1 };
        s.idtr = terem_cpu::DescriptorTable { base: IDT, limit: 0xfff };
        s.tr = Segment { selector: 0x28, base: TSS, limit: 0x67, access: 0x8b };
        s.rip = CODE;
        s.gpr[4] = STACK;
        s.rflags = 2;
        s
    }

    fn change(&mut self, f: impl FnOnce(&mut VcpuState)) {
        let mut s = self.vcpu.save();
        f(&mut s);
        self.vcpu.restore(&s).unwrap();
    }

    fn load(&self, at: u64, program: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) {
        let physical = if at >= WINDOW { at - WINDOW + PAGES } else { at };
        self.memory.write_slice(&assemble(at, program), GuestAddress(physical)).unwrap();
    }

    /// Runs `program` at privilege 0 until something ends it.
    fn run(&mut self, program: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Stop {
        self.load(CODE, program);
        self.vcpu.run()
    }

    /// Goes to privilege 3 at [`USER_CODE`], which is page 0 of the window.
    fn user(&mut self) {
        self.page(0, 7);
        self.page(1, 7);
        self.change(|s| {
            for (i, seg) in s.segments.iter_mut().enumerate() {
                *seg = Segment::flat(if i == 1 { 0x23 } else { 0x1b }, i == 1, i == 1);
                seg.access |= 3 << 5;
            }
            s.rip = USER_CODE;
            s.gpr[4] = WINDOW + 0x2000;
        });
    }

    /// The vector whose handler ended the run, and the error code if it has one.
    fn vector(&self) -> u64 {
        (self.vcpu.save().rip - HANDLERS) / HANDLER_SIZE
    }

    fn stack(&self, slot: u64) -> u64 {
        self.get(self.vcpu.save().gpr[4] + slot * 8)
    }
}

fn assemble(at: u64, program: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    program(&mut a).unwrap();
    a.assemble(at).unwrap()
}
