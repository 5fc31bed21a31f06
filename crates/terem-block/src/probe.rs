//! Which format an image has, by its first bytes.

/// Bytes at a file's beginning that a probe looks at.
pub(crate) const HEAD: usize = 512;

/// "QFI\xfb", the first bytes of a qcow2 image (specification, "Header").
pub(crate) const QCOW_MAGIC: [u8; 4] = *b"QFI\xfb";

/// Signatures of image formats: offset, bytes, name.
const SIGNATURES: [(usize, &[u8], &str); 10] = [
    (0, &QCOW_MAGIC, "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk (ESX)"),
    (0, b"# Disk DescriptorFile", "vmdk (descriptor)"),
    (0x40, &[0x7f, 0x10, 0xda, 0xbe], "vdi"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"QED\0", "qed"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
];

/// The format whose signature is in `head`, or `None` for what can only be raw.
pub(crate) fn foreign_format(head: &[u8]) -> Option<&'static str> {
    SIGNATURES
        .iter()
        .find(|(at, bytes, _)| head.get(*at..).is_some_and(|rest| rest.starts_with(bytes)))
        .map(|&(_, _, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures() {
        assert_eq!(foreign_format(b"QFI\xfb\0\0\0\x03"), Some("qcow2"));
        assert_eq!(foreign_format(b"QFI"), None);
        let mut vdi = [0; HEAD];
        vdi[0x40..0x44].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
        assert_eq!(foreign_format(&vdi), Some("vdi"));
        assert_eq!(foreign_format(&[0; HEAD]), None);
    }
}
