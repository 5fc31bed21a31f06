//! Code that must not run directly: instructions that say something about the host where a model decides what guests see,
//! and do not trap in user mode.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};

/// Bytes of the next page that an instruction may go on to.
pub(super) const TAIL: usize = 16;
/// Bytes before an instruction from which decoding is begun to find where instructions begin.
const LEAD: usize = 64;

/// Whether a page has such an instruction. `bytes`: the page and, where they are known, the first [`TAIL`] of the next one.
///
/// Found by their opcodes; what looks like one in the middle of another instruction is told apart by decoding towards it
/// from several places, since x86 code falls into step after a few instructions. Who jumps into the middle of an instruction on
/// purpose can run it: what it learns is this host's, and harms nobody.
pub(super) fn must_not_run(bytes: &[u8]) -> bool {
    let page = bytes.len().min(0x1000);
    let mut at = 0;
    while let Some(found) = bytes[at..page].iter().position(|&b| b == 0x0f) {
        let here = at + found;
        if may_be(bytes, here) && begins(bytes, here) {
            return true;
        }
        at = here + 1;
    }
    false
}

/// Whether the opcode at `at`, which begins with 0Fh, is one of them.
fn may_be(bytes: &[u8], at: usize) -> bool {
    let Some(&second) = bytes.get(at + 1) else { return true };
    let modrm = bytes.get(at + 2).copied();
    let memory = modrm.is_none_or(|m| m < 0xc0);
    let reg = modrm.map(|m| m >> 3 & 7);
    let one_of = |of: &[u8]| reg.is_none_or(|r| of.contains(&r));
    match second {
        0x00 => one_of(&[0, 1, 4, 5]),
        0x01 if memory => one_of(&[0, 1, 4]),
        0x01 => reg == Some(4) || matches!(modrm, Some(0xd0 | 0xee | 0xef | 0xf9)),
        0x02 | 0x03 | 0x31 | 0x34 | 0xa2 => true,
        0xae => memory && one_of(&[4, 5, 6]),
        0xc7 => (memory && one_of(&[3, 4, 5])) || (!memory && reg == Some(7)),
        _ => false,
    }
}

fn is_one(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Cpuid
            | Mnemonic::Rdtsc
            | Mnemonic::Rdtscp
            | Mnemonic::Rdpid
            | Mnemonic::Sysenter
            | Mnemonic::Xgetbv
            | Mnemonic::Rdpkru
            | Mnemonic::Wrpkru
            | Mnemonic::Xsave
            | Mnemonic::Xsave64
            | Mnemonic::Xsaveopt
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xsavec
            | Mnemonic::Xsavec64
            | Mnemonic::Xrstor
            | Mnemonic::Xrstor64
            | Mnemonic::Lar
            | Mnemonic::Lsl
            | Mnemonic::Verr
            | Mnemonic::Verw
            | Mnemonic::Sldt
            | Mnemonic::Str
            | Mnemonic::Sgdt
            | Mnemonic::Sidt
            | Mnemonic::Smsw
    )
}

/// Whether an instruction begins so that its opcode is at `at`, as far as decoding from before it tells.
fn begins(bytes: &[u8], at: usize) -> bool {
    let first = at.saturating_sub(LEAD);
    // What comes in from the page before may begin anywhere.
    (first..=(first + 15).min(at)).any(|start| reaches(bytes, start, at))
}

fn reaches(bytes: &[u8], start: usize, at: usize) -> bool {
    let mut decoder = Decoder::new(64, &bytes[start..], DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while start + decoder.position() <= at && decoder.can_decode() {
        let from = start + decoder.position();
        decoder.decode_out(&mut instruction);
        let end = start + decoder.position();
        if at < end {
            // Only prefixes lie before an opcode.
            let prefixes = bytes[from..at].iter().all(|&b| is_prefix(b));
            return prefixes && (instruction.is_invalid() || is_one(&instruction));
        }
    }
    false
}

fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page of `nop`s with `code` at `at`.
    fn page(at: usize, code: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x90; 0x1000 + TAIL];
        bytes[at..at + code.len()].copy_from_slice(code);
        bytes
    }

    #[test]
    fn what_tells_of_the_host_is_found() {
        let codes: [&[u8]; 11] = [
            &[0x0f, 0xa2],                   // cpuid
            &[0x0f, 0x31],                   // rdtsc
            &[0x0f, 0x01, 0xf9],             // rdtscp
            &[0xf3, 0x0f, 0xc7, 0xf8],       // rdpid rax
            &[0xf3, 0x41, 0x0f, 0xc7, 0xf9], // rdpid r9
            &[0x0f, 0x01, 0xd0],             // xgetbv
            &[0x0f, 0x34],                   // sysenter
            &[0x0f, 0xc7, 0x64, 0x24, 0x40], // xsavec [rsp+40h]
            &[0x48, 0x0f, 0xae, 0x27],       // xsave64 [rdi]
            &[0x0f, 0x03, 0xc0],             // lsl eax, eax
            &[0x0f, 0x01, 0x44, 0x24, 0xf0], // sgdt [rsp-10h]
        ];
        for code in codes {
            for at in [0, 1, 7, 100, 0x1000 - code.len(), 0xfff] {
                // Prefixes alone at the end are for the next page to be found on.
                if at + code.iter().take_while(|&&b| is_prefix(b)).count() < 0x1000 {
                    assert!(must_not_run(&page(at, code)), "{code:x?} at {at:#x}");
                }
            }
        }
    }

    #[test]
    fn what_only_looks_like_it_is_not() {
        let codes: [&[u8]; 6] = [
            &[0x90; 4],
            &[0xb8, 0x0f, 0xa2, 0, 0],       // mov eax, a20fh
            &[0x83, 0xe0, 0x0f, 0x03, 0xc1], // and eax, 15; add eax, ecx
            &[0x0f, 0xae, 0xe8],             // lfence
            &[0x0f, 0xc7, 0xf0],             // rdrand eax
            &[0x0f, 0x05],                   // syscall
        ];
        for code in codes {
            assert!(!must_not_run(&page(200, code)), "{code:x?}");
        }
    }

    #[test]
    fn what_goes_on_to_an_unknown_page_is_kept() {
        let bytes = page(0xfff, &[0x0f]);
        assert!(must_not_run(&bytes[..0x1000]));
        let mut bytes = page(0xfff, &[0x0f]);
        bytes[0x1000] = 0x05;
        assert!(!must_not_run(&bytes));
    }
}
