//! Several vCPUs that run programs at the same time, each on a thread, and interrupt each other (x2APIC).

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use terem_bus::Clock;
use terem_cpu::{Accelerator, Stop, Vcpu, VcpuState};
use terem_memory::vm_memory::{Bytes, GuestAddress};

use super::{CODE, HANDLER_SIZE, HANDLERS, Rig, STACK, assemble};

/// Where the program of a vCPU is: so far from one to the next, its stack likewise.
const APART: u64 = 0x300;
/// Handlers of vectors that a test brings itself.
const OWN_HANDLERS: u64 = 0x3_0000;
/// `IA32_X2APIC_EOI` and `IA32_X2APIC_ICR`.
const EOI: u32 = 0x80b;
const ICR: u32 = 0x830;

/// Both ways to execute, each of which must do the same.
pub(super) const WAYS: [bool; 2] = [false, true];

/// A machine whose vCPUs all run.
pub(super) struct Team {
    pub(super) rig: Rig,
    others: Vec<Box<dyn Vcpu>>,
}

impl Team {
    /// Each vCPU is as [`Rig::new`] has it, with a stack of its own, and RDI is its number.
    pub(super) fn new(count: u32, translate: bool) -> Self {
        Self::of("terem64", count, translate)
    }

    /// The same of a model, with flags after commas.
    pub(super) fn of(model: &str, count: u32, translate: bool) -> Self {
        let mut rig = Rig::modelled(model, count, Clock::manual(), None, translate);
        let state = rig.kernel_state();
        let prepared = |vcpu: &mut dyn Vcpu, id: u64| {
            let own = vcpu.save();
            let mut s = VcpuState { apic: own.apic, tsc: own.tsc, ..state.clone() };
            s.mp_state = terem_cpu::MpState::Running;
            s.apic.base |= 1 << 10;
            s.apic.registers[0x0f] = 0x1ff;
            s.rip = CODE + id * APART;
            s.gpr[4] = STACK - id * APART;
            s.gpr[7] = id;
            vcpu.restore(&s).unwrap();
        };
        prepared(rig.vcpu.as_mut(), 0);
        let others = (1..count).map(|id| {
            let mut vcpu = rig.accelerator.create_vcpu(id).unwrap();
            prepared(vcpu.as_mut(), u64::from(id));
            vcpu
        });
        let others = others.collect();
        Self { rig, others }
    }

    /// The program of a vCPU.
    pub(super) fn program(&self, id: u64, program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
        let at = CODE + id * APART;
        let code = assemble(at, program);
        assert!(code.len() as u64 <= APART, "the program of vCPU {id} has {} bytes", code.len());
        self.rig.memory.write_slice(&code, GuestAddress(at)).unwrap();
    }

    /// A handler for a vector, which must save what it changes.
    pub(super) fn handler(
        &self,
        vector: u64,
        program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) {
        let at = OWN_HANDLERS + (vector & 0x1f) * 0x100;
        self.rig.load(at, program);
        self.rig.gate(vector, at, 0x8e, 0);
    }

    /// Runs all, until vCPU 0 ends by `int3`; what all are then. The others go on until they are told that it is over,
    /// and must not have failed.
    pub(super) fn run(&mut self) -> Vec<VcpuState> {
        self.run_to(3)
    }

    /// The same with another exception for the end.
    pub(super) fn run_to(&mut self, exception: u64) -> Vec<VcpuState> {
        let Self { rig, others } = self;
        let states: Vec<VcpuState> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                others.iter_mut().map(|v| scope.spawn(|| (v.run(), v.save()))).collect::<Vec<_>>();
            let stop = rig.vcpu.run();
            for id in 0..=threads.len() {
                rig.accelerator.kick(u32::try_from(id).unwrap());
            }
            let others = threads.into_iter().map(|t| t.join().unwrap());
            std::iter::once((stop, rig.vcpu.save()))
                .chain(others)
                .map(|(stop, state)| {
                    assert_eq!(stop, Stop::Kicked);
                    state
                })
                .collect()
        });
        for (id, s) in states.iter().enumerate() {
            let failed = s.rip.wrapping_sub(HANDLERS) / HANDLER_SIZE;
            let wanted = if id == 0 { failed == exception } else { failed > 255 };
            assert!(wanted, "vCPU {id} met exception {failed}, CR2 {:#x}: {:x?}", s.cr2, s.gpr);
        }
        states
    }
}

/// Ends the run.
pub(super) fn end(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.int3()
}

/// Sends `vector` to the vCPU `to`; changes RAX, RCX, RDX.
pub(super) fn send(a: &mut CodeAssembler, to: u32, vector: u32) -> Result<(), IcedError> {
    a.mov(ecx, ICR)?;
    a.mov(edx, to)?;
    a.mov(eax, vector | 1 << 14)?;
    a.wrmsr()
}

/// Ends an interrupt and goes back to what was interrupted, RAX, RCX and RDX having been pushed in this order.
pub(super) fn back(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(ecx, EOI)?;
    a.xor(eax, eax)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.pop(rdx)?;
    a.pop(rcx)?;
    a.pop(rax)?;
    a.iretq()
}

/// What [`back`] takes back.
pub(super) fn keep(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.push(rax)?;
    a.push(rcx)?;
    a.push(rdx)
}

/// Waits until the dword at `at` is `value` (EAX).
pub(super) fn wait_for(a: &mut CodeAssembler, at: u64) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.pause()?;
    a.cmp(dword_ptr(at), eax)?;
    a.jne(again)
}
