//! The host's processor as the oracle: runs one instruction natively and by its handler on the same state,
//! and compares everything: registers, flags, x87, MXCSR, XMM, memory, and the exception.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions, Instruction, OpKind};
use terem_bus::Bus;
use terem_cpu::{CpuModel, Segment, Topology, VcpuState};
use terem_memory::{GuestMemory, RamRange};

use crate::accelerator::{SoftAccelerator, SoftConfig};
use crate::cpu::{Cpu, cr0, cr4, efer};
use crate::decode::{CodeSize, InstructionSet, Mode, decode};

/// Bytes of memory that an instruction may use, and where the guest has them.
pub(crate) const BUFFER: usize = 1024;
const GUEST_BUFFER: u64 = 0x1000;

/// All that an instruction of user mode can see.
#[derive(Clone, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct State {
    /// An FXSAVE64 image.
    pub fx: [u8; 512],
    /// RAX … R15; RDI is an offset into the buffer, RSP is not used.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub flags: u64,
    /// The exception's vector, or 0xff.
    pub vector: u64,
    /// Memory at RDI.
    pub buffer: [u8; BUFFER],
    /// The flags in MXCSR after the instruction are not compared, if it faults.
    pub loose_mxcsr: bool,
}

impl State {
    pub(crate) fn new() -> Self {
        let mut s = Self {
            fx: [0; 512],
            gpr: [0; 16],
            flags: 2,
            vector: 0xff,
            buffer: [0; BUFFER],
            loose_mxcsr: false,
        };
        s.set_fx(0, &0x37f_u16.to_le_bytes());
        s.set_fx(24, &0x1f80_u32.to_le_bytes());
        s
    }

    pub(crate) fn set_fx(&mut self, at: usize, bytes: &[u8]) {
        self.fx[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn mxcsr(&self) -> u32 {
        u32::from_le_bytes([self.fx[24], self.fx[25], self.fx[26], self.fx[27]])
    }

    /// What need not be the same: pointers to the last x87 instruction, which processors keep as they
    /// like, the mask of MXCSR, and bytes that software owns.
    fn comparable(mut self) -> Self {
        self.fx[6..24].fill(0);
        self.fx[28..32].fill(0);
        if self.loose_mxcsr && self.vector == u64::from(crate::fault::vector::XM) {
            self.fx[24] &= !0x3f;
        }
        self.fx[416..].fill(0);
        for i in 0..8 {
            self.fx[32 + 16 * i + 10..48 + 16 * i].fill(0);
        }
        self.flags &= 0x8d5;
        self
    }
}

/// Runs instructions both ways. One at a time in a process: the signal handler knows one code page.
pub(crate) struct Oracle {
    code: *mut u8,
    /// Where the instruction goes.
    place: u64,
    set: InstructionSet,
    cpu: crate::low::Low<Cpu>,
    _one: MutexGuard<'static, ()>,
}

static ONE: Mutex<()> = Mutex::new(());
/// The code page.
static PAGE: AtomicU64 = AtomicU64::new(0);
/// Where a faulting instruction goes on.
static AFTER: AtomicU64 = AtomicU64::new(0);
/// Its exception.
static VECTOR: AtomicU64 = AtomicU64::new(0xff);

const PAGE_SIZE: usize = 4096;
const NOP: u8 = 0x90;
/// Bytes of the longest instruction.
const LONGEST: usize = 15;
/// In the code page: the state's address, and RDI as the instruction left it.
const STATE_SLOT: u64 = 4000;
const RDI_SLOT: u64 = 4008;

extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a context to a handler installed with SA_SIGINFO.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize] as u64;
    let page = PAGE.load(Ordering::Relaxed);
    if !(page..page + PAGE_SIZE as u64).contains(&rip) {
        // SAFETY: a plain call; the fault will come again and end the process.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    VECTOR.store(registers[libc::REG_TRAPNO as usize] as u64, Ordering::Relaxed);
    registers[libc::REG_RIP as usize] = AFTER.load(Ordering::Relaxed) as i64;
}

impl Oracle {
    pub(crate) fn new() -> Self {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: a fresh private mapping.
        let code = unsafe {
            let rwx = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            // Low, so that an absolute address fits in a displacement.
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
            libc::mmap(std::ptr::null_mut(), PAGE_SIZE, rwx, flags, -1, 0)
        };
        assert_ne!(code, libc::MAP_FAILED);
        let (bytes, place, after) = Self::build(code as u64).unwrap();
        // SAFETY: the mapping is larger than the code.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), code.cast(), bytes.len()) };
        PAGE.store(code as u64, Ordering::Relaxed);
        AFTER.store(after, Ordering::Relaxed);
        // SAFETY: the handler accesses atomics and its context only.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            for signal in [libc::SIGFPE, libc::SIGSEGV, libc::SIGILL, libc::SIGBUS] {
                assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
            }
        }
        let mut model = CpuModel::find("x86-64-v2", &[]).unwrap();
        model.features = crate::supported_features();
        let set = InstructionSet::new(&model.features);
        let memory = GuestMemory::new(&[RamRange { base: 0, size: 0x10000 }]).unwrap();
        let config = SoftConfig {
            model,
            topology: Topology::flat(1),
            phys_bits: 40,
            translate: true,
            direct: crate::Directly::Never,
            trace: None,
        };
        let bus = Arc::new(Bus::new(terem_bus::Clock::manual()));
        let mut cpu = SoftAccelerator::new(bus, memory, config).unwrap().make(0).unwrap();
        cpu.cr0 = cr0::PE | cr0::NE | cr0::MP;
        cpu.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        cpu.xcr0 = 3;
        cpu.msrs.efer = efer::LMA | efer::LME;
        cpu.segments[VcpuState::CS].access |= Segment::LONG;
        cpu.segment_base = [0; 8];
        Self { code: code.cast(), place, set, cpu, _one: one }
    }

    /// Whether the interpreter has a handler for it.
    pub(crate) fn has(&self, insn: &Instruction, bytes: &[u8]) -> bool {
        let mode = Mode { code: CodeSize::Code64, ..Mode::REAL };
        let (mut op, _) = decode(bytes, 0, mode, &self.set).unwrap();
        super::handler(insn, mode, &mut op).or_else(|| crate::x87::handler(insn, mode, &mut op)).is_some()
    }

    /// Writes the code around the instruction; returns where the instruction goes and where it goes on.
    fn build(page: u64) -> Result<(Vec<u8>, u64, u64), iced_x86::IcedError> {
        let mut a = CodeAssembler::new(64)?;
        let others = [rax, rcx, rdx, rbx, rbp, rsi, r8, r9, r10, r11, r12, r13, r14, r15];
        let numbers = [0, 1, 2, 3, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15];
        let at = |i: usize| 512 + 8 * i as i32;
        for r in [rbx, rbp, r12, r13, r14, r15] {
            a.push(r)?;
        }
        a.mov(qword_ptr(page + STATE_SLOT), rdi)?;
        a.fxrstor64(ptr(rdi))?;
        a.push(qword_ptr(rdi + at(16)))?;
        a.popfq()?;
        for (r, i) in others.into_iter().zip(numbers) {
            a.mov(r, qword_ptr(rdi + at(i)))?;
        }
        a.mov(rdi, qword_ptr(rdi + at(7)))?;
        let mut place = a.create_label();
        a.set_label(&mut place)?;
        a.db(&[NOP; LONGEST])?;
        let mut after = a.create_label();
        a.set_label(&mut after)?;
        a.mov(qword_ptr(page + RDI_SLOT), rdi)?;
        a.mov(rdi, qword_ptr(page + STATE_SLOT))?;
        for (r, i) in others.into_iter().zip(numbers) {
            a.mov(qword_ptr(rdi + at(i)), r)?;
        }
        a.mov(rax, qword_ptr(page + RDI_SLOT))?;
        a.mov(qword_ptr(rdi + at(7)), rax)?;
        a.pushfq()?;
        a.pop(qword_ptr(rdi + at(16)))?;
        a.cld()?;
        a.fxsave64(ptr(rdi))?;
        a.fninit()?;
        a.mov(dword_ptr(page + RDI_SLOT), 0x1f80)?;
        a.ldmxcsr(dword_ptr(page + RDI_SLOT))?;
        for r in [r15, r14, r13, r12, rbp, rbx] {
            a.pop(r)?;
        }
        a.ret()?;
        let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let done = a.assemble_options(page, options)?;
        let (place, after) = (done.label_ip(&place)?, done.label_ip(&after)?);
        Ok((done.inner.code_buffer, place, after))
    }

    /// Runs it natively.
    pub(crate) fn native(&self, bytes: &[u8], state: &State) -> State {
        let mut state = state.clone();
        VECTOR.store(0xff, Ordering::Relaxed);
        let offset = state.gpr[7];
        let buffer = (&raw const state.buffer) as u64;
        state.gpr[7] = buffer + offset;
        // SAFETY: the page is writable, and has room for an instruction at `place`; the code keeps to the C
        // calling convention (all vector and x87 registers are the callee's) and writes to `state` only.
        unsafe {
            let place = self.place as *mut u8;
            place.write_bytes(NOP, LONGEST);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len());
            let run: extern "C" fn(*mut State) = std::mem::transmute(self.code);
            run(&raw mut state);
        }
        if state.gpr[7] == buffer + offset {
            state.gpr[7] = offset;
        }
        state.vector = VECTOR.load(Ordering::Relaxed);
        state
    }

    /// Runs it by its handler.
    pub(crate) fn interpreted(&mut self, bytes: &[u8], state: &State) -> State {
        let cpu = &mut self.cpu;
        let mut area = state.fx.to_vec();
        area.resize(terem_cpu::XSAVE_SIZE, 0);
        area[512] = 3;
        cpu.load_xsave(&area).unwrap();
        cpu.gpr[..16].copy_from_slice(&state.gpr);
        cpu.gpr[7] = GUEST_BUFFER + state.gpr[7];
        cpu.ah = state.flags as u8 & 0xd5;
        cpu.of = (state.flags >> 11 & 1) as u8;
        // SAFETY: guest memory that nobody else uses.
        let buffer = unsafe {
            let at = cpu.memory.window_base().add(GUEST_BUFFER as usize);
            std::ptr::copy_nonoverlapping(state.buffer.as_ptr(), at, BUFFER);
            at
        };
        let mode = Mode { code: CodeSize::Code64, ..Mode::REAL };
        let (op, _) = decode(bytes, 0, mode, &self.set).unwrap();
        let result = (op.run)(cpu, &op);
        let mut out = State { loose_mxcsr: state.loose_mxcsr, ..State::new() };
        out.fx.copy_from_slice(&cpu.save_xsave()[..512]);
        out.gpr.copy_from_slice(&cpu.gpr[..16]);
        if out.gpr[7] == GUEST_BUFFER + state.gpr[7] {
            out.gpr[7] = state.gpr[7];
        }
        out.flags = u64::from(cpu.ah & 0xd5) | u64::from(cpu.of) << 11;
        out.vector = result.map_or_else(|f| u64::from(f.vector), |()| 0xff);
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(buffer, out.buffer.as_mut_ptr(), BUFFER) };
        out
    }

    /// The CPU after these instructions, none of which faults.
    pub(crate) fn cpu_after(&mut self, program: &[&[u8]], prepare: impl FnOnce(&mut Cpu)) -> &mut Cpu {
        prepare(&mut self.cpu);
        let mode = Mode { code: CodeSize::Code64, ..Mode::REAL };
        for bytes in program {
            let (op, _) = decode(bytes, 0, mode, &self.set).unwrap();
            (op.run)(&mut self.cpu, &op).unwrap();
        }
        &mut self.cpu
    }

    /// Whether both ways give the same; what differs if not.
    pub(crate) fn compare(&mut self, bytes: &[u8], state: &State) -> Result<(), String> {
        let want = self.native(bytes, state).comparable();
        let got = self.interpreted(bytes, state).comparable();
        if want == got {
            return Ok(());
        }
        let insn = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        let mut text =
            format!("{:?} {bytes:02x?} rdi {:#x} mxcsr {:#x}\n", insn.code(), state.gpr[7], state.mxcsr());
        let mut line = |what: &str, before: &[u8], want: &[u8], got: &[u8]| {
            if want != got {
                let hex = |b: &[u8]| b.iter().rev().map(|b| format!("{b:02x}")).collect::<String>();
                let (b, w, g) = (hex(before), hex(want), hex(got));
                text.push_str(&format!("  {what}: before {b}\n    native {w}\n    handler {g}\n"));
            }
        };
        line("vector", &[], &want.vector.to_le_bytes(), &got.vector.to_le_bytes());
        line("flags", &state.flags.to_le_bytes(), &want.flags.to_le_bytes(), &got.flags.to_le_bytes());
        for i in 0..16 {
            let g = |s: &State| s.gpr[i].to_le_bytes();
            line(&format!("gpr {i}"), &g(state), &g(&want), &g(&got));
        }
        for (name, from, to) in [("fcw", 0, 2), ("fsw", 2, 4), ("ftw", 4, 5), ("mxcsr", 24, 28)] {
            line(name, &state.fx[from..to], &want.fx[from..to], &got.fx[from..to]);
        }
        for i in 0..24 {
            let r = 32 + 16 * i..48 + 16 * i;
            let name = if i < 8 { format!("st{i}") } else { format!("xmm{}", i - 8) };
            line(&name, &state.fx[r.clone()], &want.fx[r.clone()], &got.fx[r]);
        }
        for i in 0..BUFFER / 16 {
            let r = 16 * i..16 * i + 16;
            line(
                &format!("[{:#x}]", 16 * i),
                &state.buffer[r.clone()],
                &want.buffer[r.clone()],
                &got.buffer[r],
            );
        }
        let at = usize::from(insn.op_count() > 0) * state.gpr[7] as usize;
        let operand: String = state.buffer[at..at + 16].iter().rev().map(|b| format!("{b:02x}")).collect();
        let fcw = u16::from_le_bytes([state.fx[0], state.fx[1]]);
        let fsw = u16::from_le_bytes([state.fx[2], state.fx[3]]);
        text.push_str(&format!(
            "  before: fcw {fcw:04x} fsw {fsw:04x} ftw {:02x} operand {operand}\n",
            state.fx[4]
        ));
        for i in insn_registers(&insn) {
            let hex: String =
                state.fx[32 + 16 * i..48 + 16 * i].iter().rev().map(|b| format!("{b:02x}")).collect();
            text.push_str(&format!("  before: {} {hex}\n", if i < 8 { "st" } else { "xmm" }));
        }
        Err(text)
    }
}

/// A small generator: cases are the same in every run.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Bits that mean something as floating-point number of 32 bits, or nothing in particular.
    fn single(&mut self) -> u32 {
        const SPECIAL: [u32; 16] = [
            0,
            0x8000_0000,
            0x3f80_0000,
            0xbf80_0000,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0x7fa0_1234,
            1,
            0x807f_ffff,
            0x0080_0000,
            0x7f7f_ffff,
            0x4f00_0000,
            0x3f00_0000,
            0x0080_0001,
            0xcf00_0000,
        ];
        match self.below(4) {
            0 => self.pick(&SPECIAL),
            1 => ((self.below(400) as i32 - 200) as f32 / 8.0).to_bits(),
            2 => self.next() as u32,
            _ => self.next() as u32 & 0x807f_ffff | (self.below(254) as u32) << 23,
        }
    }

    fn double(&mut self) -> u64 {
        const SPECIAL: [u64; 14] = [
            0,
            1 << 63,
            0x3ff0_0000_0000_0000,
            0xbff0_0000_0000_0000,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0x7ff4_0000_0000_1234,
            1,
            0x0010_0000_0000_0000,
            0x7fef_ffff_ffff_ffff,
            0x41e0_0000_0000_0000,
            0x43e0_0000_0000_0000,
            0x8000_0000_0000_ffff,
        ];
        match self.below(4) {
            0 => self.pick(&SPECIAL),
            1 => ((self.below(400) as i32 - 200) as f64 / 8.0).to_bits(),
            2 => self.next(),
            _ => f64::from(f32::from_bits(self.single())).to_bits() ^ self.below(4),
        }
    }

    /// 80 bits as x87 has them, unnormals and pseudo-denormals among them.
    fn extended(&mut self) -> u128 {
        let sign = u128::from(self.below(2)) << 79;
        let top = 1_u128 << 63;
        sign | match self.below(8) {
            0 => self.pick(&[0, top, 0x3fff << 64 | top, 0x7fff << 64 | top, 0x7fff << 64 | top | 1 << 62]),
            1 => u128::from(self.next()) & 0x7fff_ffff_ffff_ffff,
            2 => 0x7fff << 64 | u128::from(self.next()),
            3 => u128::from(self.below(0x8000)) << 64 | u128::from(self.next()),
            4 => (0x3fff + u128::from(self.below(70))) << 64 | top | u128::from(self.below(16)) << 59,
            5 => u128::from(self.below(80)) << 64 | top | u128::from(self.next()),
            _ => (0x3fff - 40 + u128::from(self.below(110))) << 64 | top | u128::from(self.next()),
        }
    }

    pub(crate) fn vector(&mut self) -> u128 {
        match self.below(4) {
            0 => u128::from(self.next()) << 64 | u128::from(self.next()),
            1 => u128::from(self.double()) << 64 | u128::from(self.double()),
            2 => (0..4).fold(0, |v, _| v << 32 | u128::from(self.single())),
            _ => (0..16)
                .fold(0, |v, _| v << 8 | u128::from(self.pick(&[0_u8, 1, 0x7f, 0x80, 0xff, 0x61, 0x62]))),
        }
    }

    /// A state in which everything may be anything, usual things more often.
    pub(crate) fn state(&mut self) -> State {
        let mut s = State::new();
        for g in &mut s.gpr {
            *g = match self.below(3) {
                0 => self.below(40),
                1 => self.next(),
                _ => self.pick(&[0, u64::MAX, 0x7fff_ffff, 0x8000_0000, 1 << 63, i64::MAX as u64]),
            };
        }
        s.gpr[7] = 64 + 16 * self.below(8) + if self.below(8) == 0 { self.below(16) } else { 0 };
        s.flags = self.next() & 0x8d5 | 2;
        let masks = if self.below(3) == 0 { self.next() as u32 & 0x1f80 } else { 0x1f80 };
        let controls = if self.below(2) == 0 { self.next() as u32 & 0xe040 } else { 0 };
        s.set_fx(24, &(masks | controls | self.next() as u32 & 0x3f).to_le_bytes());
        let unmasked = if self.below(3) == 0 { self.next() as u16 & 0x3f } else { 0 };
        let fcw = 0x7f & !unmasked | if self.below(2) == 0 { 0x300 } else { self.next() as u16 & 0xf00 };
        s.set_fx(0, &fcw.to_le_bytes());
        let mut fsw = self.next() as u16 & 0x7f7f;
        if self.below(8) != 0 {
            fsw &= !unmasked;
        }
        s.set_fx(2, &fsw.to_le_bytes());
        s.fx[4] = if self.below(2) == 0 { 0xff } else { self.next() as u8 };
        if self.below(4) == 0 {
            s.fx[4] &= self.next() as u8;
        }
        for i in 0..8 {
            let v = self.extended();
            s.set_fx(32 + 16 * i, &v.to_le_bytes());
        }
        for i in 0..16 {
            let v = self.vector();
            s.set_fx(160 + 16 * i, &v.to_le_bytes());
        }
        for piece in s.buffer.chunks_mut(16) {
            let v = if self.below(3) == 0 { self.extended() } else { self.vector() };
            piece.copy_from_slice(&v.to_le_bytes());
        }
        s
    }
}

/// Every encoding with these prefixes in these opcode maps that decodes to what `wanted` says, with a
/// memory operand `[rdi]` and with registers.
pub(crate) fn encodings(
    prefixes: &[&[u8]],
    escapes: &[&[u8]],
    wanted: fn(&Instruction) -> bool,
) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    for prefix in prefixes {
        for escape in escapes {
            for opcode in 0..=255_u8 {
                for modrm in 0..=255_u8 {
                    let escapes_on = **escape == [0x0f] && matches!(opcode, 0x38 | 0x3a);
                    if escapes_on || (modrm < 0xc0 && modrm & 0xc7 != 7) {
                        continue;
                    }
                    let mut bytes: Vec<u8> = [prefix, *escape, &[opcode, modrm]].concat();
                    bytes.push(0);
                    let insn = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
                    let modrm_at = bytes.len() - 2;
                    if insn.is_invalid() || insn.len() < modrm_at || !wanted(&insn) || uses_pointers(&insn) {
                        continue;
                    }
                    bytes.truncate(insn.len());
                    if found.last() != Some(&bytes) {
                        found.push(bytes);
                    }
                }
            }
        }
    }
    found
}

/// Whether it has RSP or RDI as an operand, which are not the same in both worlds, or memory elsewhere than
/// at RDI.
fn uses_pointers(insn: &Instruction) -> bool {
    use iced_x86::Register::{RDI, RSP};
    let full = |i| insn.op_register(i).full_register();
    let elsewhere = |i| insn.op_kind(i) == OpKind::Memory && insn.memory_base() != RDI;
    (0..insn.op_count())
        .any(|i| elsewhere(i) || (insn.op_kind(i) == OpKind::Register && matches!(full(i), RDI | RSP)))
}

/// Places in an FXSAVE area of the x87 and vector registers that it names.
fn insn_registers(insn: &Instruction) -> Vec<usize> {
    let registers =
        (0..insn.op_count()).filter(|&i| insn.op_kind(i) == OpKind::Register).map(|i| insn.op_register(i));
    let place = |r: iced_x86::Register| {
        if r.is_xmm() { Some(8 + r.number()) } else { (r.is_st() || r.is_mm()).then(|| r.number()) }
    };
    registers.filter_map(place).collect()
}

/// Whether the last byte is an immediate.
pub(crate) fn has_immediate(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Immediate8)
}
