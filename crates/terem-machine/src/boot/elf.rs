//! ELF images: segments to load, and the PVH note.

use super::image::Fields;
use super::space::Space;
use super::{Image, Problem};

/// More program headers than any kernel has.
const MAX_SEGMENTS: u16 = 256;
/// More bytes of notes than any kernel has.
const MAX_NOTES: u64 = 1 << 20;

/// `e_machine` of 32-bit and 64-bit x86 (System V ABI).
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY` (xen/include/public/elfnote.h).
const PHYS32_ENTRY: u32 = 18;

/// One loadable segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) virtual_address: u64,
    pub(super) physical_address: u64,
    pub(super) file_size: u64,
    pub(super) memory_size: u64,
}

/// What is used of an ELF header.
#[derive(Debug)]
pub(super) struct Elf {
    pub(super) is_64: bool,
    pub(super) entry: u64,
    pub(super) segments: Vec<Segment>,
    notes: Vec<(u64, u64)>,
}

pub(super) fn is_elf(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF")
}

impl Elf {
    /// Reads headers; checks that each segment is in the file.
    pub(super) fn parse(image: &dyn Image) -> Result<Self, Problem> {
        let header = image.read_vec(0, 52)?;
        let is_64 = match (header[4], header[5]) {
            (1, 1) => false,
            (2, 1) => true,
            _ => return Err(Problem::Unsupported("it is an ELF image, but not a little-endian one".into())),
        };
        let header = if is_64 { image.read_vec(0, 64)? } else { header };
        let machine = header.u16_at(18);
        if machine != if is_64 { EM_X86_64 } else { EM_386 } {
            return Err(Problem::Unsupported(format!(
                "it is an ELF image for another processor (machine {machine}); one for x86 is needed"
            )));
        }
        let (entry, at, tail) = if is_64 {
            (header.u64_at(24), header.u64_at(32), 54)
        } else {
            (header.u32_at(24).into(), header.u32_at(28).into(), 42)
        };
        let (size, count) = (header.u16_at(tail), header.u16_at(tail + 2));
        let least = if is_64 { 56 } else { 32 };
        if count > MAX_SEGMENTS || (count > 0 && size < least) {
            return Err(Problem::Damaged(format!(
                "its ELF header has {count} program headers of {size} bytes"
            )));
        }
        let headers = image.read_vec(at, u64::from(size) * u64::from(count))?;
        let mut elf = Self { is_64, entry, segments: Vec::new(), notes: Vec::new() };
        for h in headers.chunks_exact(usize::from(size).max(1)) {
            elf.program_header(image, h)?;
        }
        if elf.segments.is_empty() {
            return Err(Problem::Unsupported(
                "this ELF image has nothing to load: it is an object file or library, not a kernel".into(),
            ));
        }
        Ok(elf)
    }

    fn program_header(&mut self, image: &dyn Image, h: &[u8]) -> Result<(), Problem> {
        let segment = if self.is_64 {
            Segment {
                offset: h.u64_at(8),
                virtual_address: h.u64_at(16),
                physical_address: h.u64_at(24),
                file_size: h.u64_at(32),
                memory_size: h.u64_at(40),
            }
        } else {
            Segment {
                offset: h.u32_at(4).into(),
                virtual_address: h.u32_at(8).into(),
                physical_address: h.u32_at(12).into(),
                file_size: h.u32_at(16).into(),
                memory_size: h.u32_at(20).into(),
            }
        };
        match h.u32_at(0) {
            PT_LOAD if segment.memory_size > 0 => {
                image.check("an ELF segment", segment.offset, segment.file_size)?;
                if segment.file_size > segment.memory_size {
                    return Err(Problem::Damaged("an ELF segment has more bytes than room".into()));
                }
                self.segments.push(segment);
            }
            PT_NOTE => self.notes.push((segment.offset, segment.file_size)),
            _ => {}
        }
        Ok(())
    }

    /// The entry point of the PVH note, if there is one.
    pub(super) fn pvh_entry(&self, image: &dyn Image) -> Result<Option<u32>, Problem> {
        for &(offset, size) in &self.notes {
            if size > MAX_NOTES {
                return Err(Problem::Damaged(format!("it has {size} bytes of ELF notes")));
            }
            let notes = image.read_vec(offset, size)?;
            if let Some(entry) = phys32_entry(&notes) {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    /// Puts the segments into RAM.
    pub(super) fn load(&self, image: &dyn Image, space: &mut Space<'_>) -> Result<(), Problem> {
        for s in &self.segments {
            space.claim("the kernel", s.physical_address, s.memory_size)?;
            space.copy(image, s.offset, s.file_size, s.physical_address)?;
            space.zero(s.physical_address + s.file_size, s.memory_size - s.file_size)?;
        }
        Ok(())
    }

    /// The entry point as a physical address: it may be given as a virtual one of a segment.
    pub(super) fn physical_entry(&self) -> u64 {
        let physical = |s: &Segment| {
            let offset = self.entry.checked_sub(s.virtual_address).filter(|&o| o < s.memory_size)?;
            s.physical_address.checked_add(offset)
        };
        self.segments.iter().find_map(physical).unwrap_or(self.entry)
    }

    /// Whether `addr` is in a segment.
    pub(super) fn covers(&self, addr: u64) -> bool {
        let inside = |s: &Segment| addr.checked_sub(s.physical_address).is_some_and(|o| o < s.memory_size);
        self.segments.iter().any(inside)
    }
}

/// Walks a list of notes: sizes of name and descriptor, type, name, descriptor, each padded to 4 bytes.
fn phys32_entry(notes: &[u8]) -> Option<u32> {
    let mut rest = notes;
    while rest.len() >= 12 {
        let padded = |n: u32| usize::try_from(n).ok()?.checked_next_multiple_of(4);
        let (name_size, size, kind) = (rest.u32_at(0), rest.u32_at(4), rest.u32_at(8));
        let name_end = padded(name_size)?.checked_add(12)?;
        let end = padded(size)?.checked_add(name_end)?;
        if kind == PHYS32_ENTRY && name_size == 4 && rest.get(12..16) == Some(b"Xen\0") && size >= 4 {
            rest.get(name_end..end)?;
            return Some(rest.u32_at(name_end));
        }
        rest = rest.get(end..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(kind: u32, name: &[u8; 4], value: &[u8]) -> Vec<u8> {
        let mut n = [4, u32::try_from(value.len()).unwrap(), kind].map(u32::to_le_bytes).concat();
        n.extend(name);
        n.extend(value);
        n
    }

    #[test]
    fn the_pvh_note_is_found_among_others() {
        let other = note(3, b"GNU\0", &[1; 20]);
        let pvh = note(18, b"Xen\0", &0x100_0650_u64.to_le_bytes());
        assert_eq!(phys32_entry(&[other.clone(), pvh.clone()].concat()), Some(0x100_0650));
        assert_eq!(phys32_entry(&note(18, b"Xen\0", &7_u32.to_le_bytes())), Some(7));
        assert_eq!(phys32_entry(&other), None);
        assert_eq!(phys32_entry(&note(18, b"Xem\0", &[0; 4])), None);
        for cut in 0..pvh.len() {
            assert_eq!(phys32_entry(&pvh[..cut]), None, "cut at {cut}");
        }
        assert_eq!(phys32_entry(&[0xff; 64]), None);
    }
}
