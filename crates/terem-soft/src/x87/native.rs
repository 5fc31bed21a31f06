//! x87 instructions on the host's own x87: the guest's whole x87 state goes to the host (`frstor`), the one
//! instruction runs, and the state comes back (`fnsave`, which leaves the host's x87 as after `fninit`).
//!
//! So tags, stack faults, the condition bits, scaled results of unmasked overflows and the rest are the
//! hardware's. An exception that the guest has not masked is only recorded: the host would report it at
//! the next waiting instruction, and there is none before `fnsave`, which does not wait.

use core::arch::asm;

use super::Fpu;

/// What `fnsave` stores in 64-bit mode (the 32-bit protected-mode format, Intel SDM vol. 1, figure 8-9).
#[repr(C)]
struct Frame {
    control: u32,
    status: u32,
    tag: u32,
    pointers: [u32; 4],
    /// From ST(0) on.
    stack: [[u8; 10]; 8],
}

impl Frame {
    fn new(fpu: &Fpu) -> Self {
        // Tags are 0 for valid and 3 for empty; the processor finds out the rest.
        let tag = (0..8).filter(|i| fpu.valid >> i & 1 == 0).fold(0, |t, i| t | 3 << (2 * i));
        let stack = core::array::from_fn(|i| {
            let mut bytes = [0; 10];
            bytes.copy_from_slice(&fpu.st(i as u8).to_le_bytes()[..10]);
            bytes
        });
        // With CR0.NE clear a guest may run on over a pending exception. It must not stop the host.
        let pending = fpu.status & !fpu.control & 0x3f;
        let control = u32::from(fpu.control | pending);
        Self { control, status: fpu.status.into(), tag, pointers: [0; 4], stack }
    }

    fn take(self, fpu: &mut Fpu) {
        fpu.status = self.status as u16 & !super::SUMMARY;
        fpu.valid = (0..8).filter(|i| self.tag >> (2 * i) & 3 != 3).fold(0, |v, i| v | 1 << i);
        for (i, bytes) in self.stack.iter().enumerate() {
            let mut wide = [0; 16];
            wide[..10].copy_from_slice(bytes);
            fpu.set_st(i as u8, u128::from_le_bytes(wide));
        }
    }
}

/// Runs the instruction without memory operand whose two bytes are `0xd8 + encoding / 64` and
/// `0xc0 + encoding % 64`. `ax` is OF (0 or 1) below the flags that `sahf` takes; what they are afterwards
/// is returned in the same way.
///
/// Not for those that access the control and status words (`fnclex`, `fninit`, `fnstsw`).
pub(super) fn register_form(fpu: &mut Fpu, encoding: u16, mut ax: u16) -> u16 {
    let mut frame = Frame::new(fpu);
    // SAFETY: the host's x87 is empty and has no exception pending, so `frstor` loads without fault, and
    // `fnsave` makes it so again. The jump lands on one of the 512 entries of 8 bytes.
    unsafe {
        asm!(
            "frstor [{f}]",
            "lea {t}, [rip + 2f]",
            "lea {t}, [{t} + {i} * 8]",
            "add al, 0x7f",
            "sahf",
            "jmp {t}",
            ".balign 8",
            "2:",
            ".set .Lterem_x87, 0",
            ".rept 512",
            ".byte 0xd8 + (.Lterem_x87 >> 6), 0xc0 + (.Lterem_x87 & 63)",
            "jmp 3f",
            ".balign 8",
            ".set .Lterem_x87, .Lterem_x87 + 1",
            ".endr",
            "3:",
            "lahf",
            "seto al",
            "fnsave [{f}]",
            f = in(reg) &raw mut frame,
            i = in(reg) u64::from(encoding & 511),
            t = out(reg) _,
            inout("ax") ax,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            out("mm0") _, out("mm1") _, out("mm2") _, out("mm3") _,
            out("mm4") _, out("mm5") _, out("mm6") _, out("mm7") _,
            options(nostack)
        );
    }
    frame.take(fpu);
    ax
}

/// Runs the instruction with memory operand whose first byte is `0xd8 + encoding / 8` and whose ModRM.reg
/// is `encoding % 8`, on `operand`.
///
/// Not for those that load and store control word or environment.
pub(super) fn memory_form(fpu: &mut Fpu, encoding: u16, operand: &mut [u8; 16]) {
    let mut frame = Frame::new(fpu);
    // SAFETY: as in `register_form`; the instructions access up to 10 bytes at `operand`.
    unsafe {
        asm!(
            "frstor [{f}]",
            "lea {t}, [rip + 2f]",
            "lea {t}, [{t} + {i} * 8]",
            "jmp {t}",
            ".balign 8",
            "2:",
            ".set .Lterem_x87, 0",
            ".rept 64",
            // ModRM 0x07: [rdi]
            ".byte 0xd8 + (.Lterem_x87 >> 3), 0x07 + ((.Lterem_x87 & 7) << 3)",
            "jmp 3f",
            ".balign 8",
            ".set .Lterem_x87, .Lterem_x87 + 1",
            ".endr",
            "3:",
            "fnsave [{f}]",
            f = in(reg) &raw mut frame,
            i = in(reg) u64::from(encoding & 63),
            t = out(reg) _,
            in("rdi") operand.as_mut_ptr(),
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            out("mm0") _, out("mm1") _, out("mm2") _, out("mm3") _,
            out("mm4") _, out("mm5") _, out("mm6") _, out("mm7") _,
            options(nostack)
        );
    }
    frame.take(fpu);
}
