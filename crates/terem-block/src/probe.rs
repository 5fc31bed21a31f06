//! Which format an image has, by its first bytes.

use crate::Format;

/// Bytes at a file's beginning that a probe looks at.
pub(crate) const HEAD: usize = 512;

/// Signatures of image formats that are none of ours: offset, bytes, name.
const FOREIGN: [(usize, &[u8], &str); 3] =
    [(0, b"COWD", "vmdk (ESX)"), (0, b"QED\0", "qed"), (0, b"WithoutFreeSpace", "parallels")];

/// What a file looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Looks {
    /// Nothing that is known: a plain disk.
    Raw,
    /// One of our formats.
    Like(Format),
    /// A format that cannot be opened.
    Foreign(&'static str),
}

impl Looks {
    /// The format's name, or `None` for what can only be raw.
    pub(crate) fn name(self) -> Option<&'static str> {
        match self {
            Self::Raw => None,
            Self::Like(format) => Some(format.name()),
            Self::Foreign(name) => Some(name),
        }
    }
}

/// What a file that begins with `head` looks like.
pub(crate) fn probe(head: &[u8]) -> Looks {
    if let Some(format) = Format::found_in(head) {
        return Looks::Like(format);
    }
    let is_there = |at: usize, bytes| head.get(at..).is_some_and(|rest| rest.starts_with(bytes));
    let foreign = FOREIGN.iter().find(|&&(at, bytes, _)| is_there(at, bytes));
    foreign.map_or(Looks::Raw, |&(_, _, name)| Looks::Foreign(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures() {
        assert_eq!(probe(b"QFI\xfb\0\0\0\x03"), Looks::Like(Format::Qcow2));
        assert_eq!(probe(b"QFI"), Looks::Raw);
        let mut vdi = [0; HEAD];
        vdi[0x40..0x44].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
        assert_eq!(probe(&vdi).name(), Some("vdi"));
        assert_eq!(probe(b"QED\0").name(), Some("qed"));
        assert_eq!(probe(&[0; HEAD]), Looks::Raw);
    }
}
