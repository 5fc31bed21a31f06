//! Why a kernel or initrd could not be loaded.

use std::fmt;
use std::path::{Path, PathBuf};

/// Which of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The kernel.
    Kernel,
    /// The initial RAM disk, or multiboot module.
    Initrd,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
        })
    }
}

/// A file that could not be loaded, and why.
#[derive(Debug, thiserror::Error)]
#[error("cannot load the {role} {}: {problem}", path.display())]
pub struct BootError {
    /// Which file.
    pub role: Role,
    /// Its path.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: Problem,
}

/// The host's answer, and what to do about it.
fn way_out(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such file; check the path".into(),
        std::io::ErrorKind::PermissionDenied => {
            "it may not be read; give yourself the right to, or copy it".into()
        }
        _ => error.to_string(),
    }
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The host's answer to opening or reading it.
    #[error("{}", way_out(.0))]
    Io(#[from] std::io::Error),
    /// It is no regular file.
    #[error("it is a {0}, not a file; give the path of the image itself")]
    NotAFile(&'static str),
    /// It has no bytes.
    #[error("the file is empty")]
    Empty,
    /// A header speaks of bytes past the end.
    #[error(
        "the file is cut short: {what} needs {needed:#x} bytes, the file has {length:#x}; fetch it again"
    )]
    Truncated {
        /// What lies past the end.
        what: &'static str,
        /// Where that would end.
        needed: u64,
        /// Bytes of the file.
        length: u64,
    },
    /// None of the known formats.
    #[error(
        "this is no kernel ({found}); a Linux bzImage (vmlinuz), an x86 ELF image (vmlinux, PVH) or a \
         multiboot image is needed"
    )]
    NotAKernel {
        /// What it looks like.
        found: String,
    },
    /// A kernel for something else.
    #[error("{0}")]
    Unsupported(String),
    /// Fields that contradict each other.
    #[error("the file is damaged: {0}")]
    Damaged(String),
    /// It does not fit into RAM.
    #[error(
        "{what} needs {needed} MiB of guest memory at {at:#x}, the guest has {have} MiB; give it more (--memory)"
    )]
    TooBig {
        /// What does not fit.
        what: &'static str,
        /// Where it has to go.
        at: u64,
        /// MiB of it.
        needed: u64,
        /// MiB of RAM.
        have: u64,
    },
    /// It would lie on something else.
    #[error("{what} would be loaded at {at:#x}+{len:#x}, where {other} is")]
    Overlap {
        /// What.
        what: &'static str,
        /// First address.
        at: u64,
        /// Bytes.
        len: u64,
        /// What is there.
        other: &'static str,
    },
    /// The command line is longer than the kernel takes.
    #[error(
        "the kernel command line has {length} bytes and this kernel takes {max}; make it shorter (--cmdline)"
    )]
    CmdlineTooLong {
        /// Bytes of it.
        length: usize,
        /// Bytes that the kernel takes.
        max: usize,
    },
    /// The command line has a zero byte.
    #[error("the kernel command line holds a zero byte")]
    CmdlineZero,
}

impl Problem {
    /// The error for a file.
    #[must_use]
    pub fn in_file(self, role: Role, path: &Path) -> BootError {
        BootError { role, path: path.into(), problem: self }
    }
}

/// What files that are no kernels usually are, from their first bytes.
pub(super) fn describe(head: &[u8]) -> String {
    let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
    let known = [
        (0, &b"QFI\xfb"[..], "a qcow2 disk image: give it as --disk"),
        (0, b"\x1f\x8b", "gzip data: perhaps an initrd, or a kernel that must be unpacked first"),
        (0, b"\x28\xb5\x2f\xfd", "zstd data: perhaps an initrd, or a kernel that must be unpacked first"),
        (0, b"\xfd7zXZ", "xz data: perhaps an initrd, or a kernel that must be unpacked first"),
        (0, b"0707", "a cpio archive: give it as --initrd"),
        (0x8001, b"CD001", "an ISO image: give it as --disk"),
        (0, b"MZ", "a Windows or UEFI program"),
        (0, b"#!", "a script"),
        (510, b"\x55\xaa", "a disk or a boot sector: give it as --disk"),
    ];
    match known.iter().find(|(offset, magic, _)| at(*offset, magic)) {
        Some((_, _, text)) => (*text).into(),
        None => {
            let first: Vec<String> = head.iter().take(4).map(|b| format!("{b:02x}")).collect();
            format!("it begins with {}", first.join(" "))
        }
    }
}
