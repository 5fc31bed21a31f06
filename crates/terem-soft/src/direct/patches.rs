//! What is known of pages of code, and copies of those instructions that must not run are breakpoints.
//!
//! Programs execute the copy and read the copy; what such an instruction does is then the interpreter's, from the page itself.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::space::Use;

/// Copies of one vCPU, at most.
const MOST: u64 = 2048;
/// Pages that are remembered, at most.
const MOST_KNOWN: usize = 1 << 16;
const BREAKPOINT: u8 = 0xcc;

/// The copy of a page.
#[derive(Debug)]
struct Copy {
    /// The mark that the page had.
    word: u32,
    /// Offset of the copy in the file.
    offset: u64,
    /// Offsets in the page where breakpoints are.
    at: Vec<u16>,
}

/// The copies of one vCPU.
#[derive(Debug, Default)]
pub(super) struct Patches {
    /// How pages are used that were looked at, and the marks under which that is so.
    known: HashMap<u64, (u32, Use)>,
    file: Option<File>,
    copies: HashMap<u64, Copy>,
}

impl Patches {
    /// The file that the copies are in.
    pub(super) fn file(&mut self) -> io::Result<BorrowedFd<'_>> {
        if self.file.is_none() {
            let file = memfd_create("terem-copies", MemfdFlags::CLOEXEC)?;
            ftruncate(&file, MOST * 4096)?;
            self.file = Some(File::from(file));
        }
        self.file.as_ref().map(AsFd::as_fd).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Makes a copy of `page` as it was under the mark `word`, with breakpoints at these offsets; its offset in the file.
    /// `None` where there are too many.
    ///
    /// Where there is an older one it takes its place: whoever still has that mapped takes it away before the next run, since the
    /// mark is another.
    pub(super) fn put(&mut self, page: u64, word: u32, bytes: &[u8], at: Vec<u16>) -> Option<u64> {
        if let Some(copy) = self.copies.get(&page).filter(|c| c.word == word && c.at == at) {
            return Some(copy.offset);
        }
        let next = self.copies.len() as u64;
        let offset = self.copies.get(&page).map_or(next * 4096, |c| c.offset);
        if offset >= MOST * 4096 {
            return None;
        }
        let mut copy = bytes.to_vec();
        at.iter().for_each(|&at| copy[usize::from(at)] = BREAKPOINT);
        self.file.as_ref()?.write_all_at(&copy, offset).ok()?;
        self.copies.insert(page, Copy { word, offset, at });
        Some(offset)
    }

    /// How `page` is used under this mark, if it has been looked at.
    pub(super) fn known(&self, page: u64, word: u32) -> Option<Use> {
        self.known.get(&page).filter(|known| known.0 == word).map(|known| known.1)
    }

    /// Remembers it.
    pub(super) fn remember(&mut self, page: u64, word: u32, usage: Use) {
        if self.known.len() >= MOST_KNOWN {
            self.known.clear();
        }
        self.known.insert(page, (word, usage));
    }

    /// Has the page looked at again.
    pub(super) fn forget(&mut self, page: u64) {
        self.known.remove(&page);
    }

    /// Whether there is a breakpoint of ours in the copy of `page`.
    pub(super) fn has(&self, page: u64, offset: u16) -> bool {
        self.copies.get(&page).is_some_and(|c| c.at.contains(&offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_have_breakpoints_and_follow_the_page() {
        let mut patches = Patches::default();
        patches.file().unwrap();
        let first = patches.put(7, 1, &[0x90; 4096], vec![5, 9]).unwrap();
        let other = patches.put(8, 1, &[0x91; 4096], vec![]).unwrap();
        assert_ne!(first, other);
        let again = patches.put(7, 3, &[0x92; 4096], vec![6]).unwrap();
        assert_eq!(first, again);
        let mut bytes = [0; 16];
        patches.file.as_ref().unwrap().read_exact_at(&mut bytes, again).unwrap();
        assert_eq!(bytes[4..8], [0x92, 0x92, 0xcc, 0x92]);
        assert!(patches.has(7, 6) && !patches.has(7, 5) && !patches.has(9, 6));
    }
}
