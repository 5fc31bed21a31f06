//! The interpreter's side: a vCPU in 64-bit user mode with the same pages.

use std::sync::Arc;

use terem_bus::{Bus, Clock};
use terem_cpu::{CpuModel, Segment, Topology, VcpuState, XSAVE_SIZE};
use terem_memory::{GuestMemory, RamRange};

use super::case::{CODE, Case, DATA, DATA_LEN, END, FxArea, Outcome, READ_ONLY, Uppers, fill};
use crate::cpu::{Cpu, cr0, cr4, efer};
use crate::decode::{CodeSize, Unit, decode};
use crate::fault::Fault;
use crate::op::IP_REG;
use crate::translate::NO_LINK;
use crate::{SoftAccelerator, SoftConfig};

const PRESENT_USER: u64 = 5;
const WRITABLE: u64 = 2;
/// Physical addresses of the pages.
const CODE_PAGE: usize = 0x10000;
const DATA_PAGES: usize = 0x11000;
const READ_ONLY_PAGE: usize = 0x14000;
/// Where the upper halves of YMM registers are in an XSAVE area.
const UPPERS: usize = 576;
/// Rounds of one instruction before it is taken to be endless.
const PATIENCE: usize = 1_000_000;

/// A vCPU for experiments.
pub(crate) struct Guest {
    pub(crate) cpu: crate::low::Low<Cpu>,
}

impl Guest {
    /// In 64-bit user mode, with the pages of an experiment.
    pub(crate) fn new() -> Self {
        let mut guest = Self::after_reset();
        guest.long_mode();
        guest
    }

    /// In real mode, or protected mode with flat 32-bit segments; no paging, 1 MiB of memory.
    pub(crate) fn unpaged(size: CodeSize) -> Self {
        let mut guest = Self::after_reset();
        let cpu = &mut guest.cpu;
        cpu.gpr = [0; 18];
        for (i, s) in cpu.segments.iter_mut().enumerate() {
            *s = match size {
                CodeSize::Code16 => Segment::real_mode(0, i == VcpuState::CS),
                _ => Segment::flat(8, i == VcpuState::CS, false),
            };
        }
        if size != CodeSize::Code16 {
            cpu.cr0 |= cr0::PE;
        }
        cpu.refresh_mode();
        guest
    }

    fn after_reset() -> Self {
        let memory = GuestMemory::new(&[RamRange { base: 0, size: 1 << 20 }]).unwrap();
        let model = CpuModel::find("max", &[]).unwrap();
        let config = SoftConfig {
            model,
            topology: Topology::flat(1),
            phys_bits: 40,
            translate: true,
            direct: crate::Directly::Never,
            trace: None,
        };
        let bus = Arc::new(Bus::new(Clock::manual()));
        Self { cpu: SoftAccelerator::new(bus, memory, config).unwrap().make(0).unwrap() }
    }

    /// Physical memory.
    pub(crate) fn ram(&mut self) -> &mut [u8] {
        // SAFETY: 1 MiB of RAM at 0, and nobody else has this vCPU or its memory.
        unsafe { std::slice::from_raw_parts_mut(self.cpu.memory.window_base(), 1 << 20) }
    }

    fn long_mode(&mut self) {
        let table = |address: u64, level: u32| (address >> (12 + 9 * level) & 0x1ff) as usize * 8;
        let user = PRESENT_USER | WRITABLE | 0x60; // accessed and dirty, so that no walk writes
        let mut entries = vec![
            (0x1000 + table(CODE, 3), 0x2000 | user),
            (0x2000 + table(CODE, 2), 0x3000 | user),
            (0x3000 + table(CODE, 1), 0x4000 | user),
            (0x3000 + table(DATA, 1), 0x5000 | user),
            (0x4000 + table(CODE, 0), CODE_PAGE as u64 | PRESENT_USER | 0x60),
            (0x5000 + table(READ_ONLY, 0), READ_ONLY_PAGE as u64 | PRESENT_USER | 0x60),
        ];
        for page in (0..DATA_LEN).step_by(0x1000) {
            entries.push((0x5000 + table(DATA + page as u64, 0), (DATA_PAGES + page) as u64 | user));
        }
        let ram = self.ram();
        for (at, entry) in entries {
            ram[at..at + 8].copy_from_slice(&entry.to_le_bytes());
        }
        ram[CODE_PAGE..CODE_PAGE + 0x1000].fill(0xcc);
        fill(0, &mut ram[READ_ONLY_PAGE..READ_ONLY_PAGE + 0x1000]);
        let cpu = &mut self.cpu;
        cpu.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
        cpu.cr3 = 0x1000;
        cpu.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        cpu.xcr0 = terem_cpu::xstate::components(&cpu.cpuid.model().features);
        cpu.msrs.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        let ring3 = 3 << 5;
        for s in &mut cpu.segments {
            *s = Segment::flat(0x2b, false, false);
            s.access |= ring3;
        }
        cpu.segments[VcpuState::CS] = Segment::flat(0x33, true, true);
        cpu.segments[VcpuState::CS].access |= ring3;
        cpu.cpl = 3;
        cpu.gpr = [0; 18];
        cpu.flush_tlb();
        cpu.refresh_mode();
    }

    /// Runs a case in the interpreter.
    pub(super) fn run(&mut self, case: &Case) -> Outcome {
        self.set_up(case);
        let (rip, fault) = self.execute(CODE, &case.code[..case.len]);
        self.outcome(rip, fault)
    }

    /// Runs a case in translated code.
    pub(super) fn run_translated(&mut self, case: &Case) -> Outcome {
        self.set_up(case);
        let cpu = &mut self.cpu;
        cpu.memory.marks().written(CODE_PAGE as u64 >> 12);
        cpu.rip = CODE;
        cpu.native.link = NO_LINK;
        cpu.caught = None;
        cpu.catches = true;
        for _ in 0..PATIENCE {
            if cpu.caught.is_some() {
                break;
            }
            cpu.follow_changes();
            let block = match cpu.find_block() {
                Ok(block) => block,
                Err(fault) => {
                    cpu.caught = Some((fault, cpu.rip));
                    break;
                }
            };
            // SAFETY: blocks are dropped only by `find_block`.
            let block = unsafe { &*block };
            block.runs.set(crate::translate::HOT);
            match cpu.translation(block).filter(|_| !std::mem::take(&mut cpu.native.interpret)) {
                Some(code) => cpu.run_translated(block, code),
                None => {
                    cpu.native.link = NO_LINK;
                    let _ = cpu.execute(block);
                }
            }
        }
        cpu.catches = false;
        cpu.shut_down = false;
        let (fault, rip) = cpu.caught.take().map_or((None, cpu.rip), |(f, rip)| (Some(f), rip));
        self.outcome(rip, fault)
    }

    fn set_up(&mut self, case: &Case) {
        let ram = self.ram();
        fill(case.seed, &mut ram[DATA_PAGES..DATA_PAGES + DATA_LEN]);
        ram[CODE_PAGE..CODE_PAGE + case.code.len()].fill(0xcc);
        ram[CODE_PAGE..CODE_PAGE + case.len].copy_from_slice(&case.code[..case.len]);
        let cpu = &mut self.cpu;
        cpu.gpr[..16].copy_from_slice(&case.gpr);
        cpu.set_rflags(case.rflags);
        load_vectors(cpu, &case.fx, &case.uppers, case.present as u8);
    }

    fn outcome(&mut self, rip: u64, fault: Option<Fault>) -> Outcome {
        let mut outcome = Outcome { vector: END, ..Outcome::NONE };
        if let Some(fault) = fault {
            outcome.vector = u32::from(fault.vector);
            outcome.code = fault.code;
            outcome.cr2 = self.cpu.cr2;
        }
        let cpu = &mut self.cpu;
        outcome.rip = rip;
        outcome.gpr.copy_from_slice(&cpu.gpr[..16]);
        outcome.rflags = cpu.rflags();
        let area = cpu.save_xsave();
        outcome.fx.0.copy_from_slice(&area[..512]);
        outcome.uppers.copy_from_slice(&area[UPPERS..UPPERS + 256]);
        outcome.data.copy_from_slice(&self.ram()[DATA_PAGES..DATA_PAGES + DATA_LEN]);
        outcome
    }

    /// Executes `code`, which lies at offset `start` of CS, until it is left or faults. Gives RIP and the
    /// fault.
    pub(crate) fn execute(&mut self, start: u64, code: &[u8]) -> (u64, Option<Fault>) {
        let cpu = &mut self.cpu;
        let mut rip = start;
        for _ in 0..PATIENCE {
            let at = rip.wrapping_sub(start);
            if at >= code.len() as u64 {
                break;
            }
            let decoded = decode(&code[at as usize..], at as u16, cpu.mode, &cpu.instruction_set);
            let (op, _) = decoded.expect("the code ends with an instruction");
            cpu.gpr[usize::from(IP_REG)] = start;
            cpu.rip = start + u64::from(op.next);
            if let Err(fault) = (op.run)(cpu, &op) {
                return (rip, Some(fault));
            }
            rip = cpu.rip;
        }
        (rip, None)
    }
}

fn load_vectors(cpu: &mut Cpu, fx: &FxArea, uppers: &Uppers, present: u8) {
    let mut area = vec![0; XSAVE_SIZE];
    area[..512].copy_from_slice(&fx.0);
    area[512] = present & 3;
    if cpu.mode.avx == Unit::On {
        area[UPPERS..UPPERS + 256].copy_from_slice(uppers);
        area[512] = present & 7;
    }
    cpu.load_xsave(&area).expect("a case's FXSAVE area is valid");
    // MXCSR is in no component of its own.
    cpu.set_mxcsr(u32::from_le_bytes(std::array::from_fn(|i| fx.0[24 + i])));
}
