//! The descriptor (specification, "The Text Descriptor").

use std::ops::Range;

/// How a descriptor in a file of its own begins.
pub(super) const FIRST_LINE: &[u8] = b"# Disk DescriptorFile";
/// Most bytes of a descriptor.
pub(super) const MAX_LENGTH: u64 = 1 << 20;
/// Most extents.
const MAX_EXTENTS: usize = 4096;
/// "No parent".
pub(super) const NO_PARENT: u32 = 0xffff_ffff;

/// What an extent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExtentKind {
    /// The disk's bytes from this sector of the file on.
    Flat { start: u64 },
    /// Grains.
    Sparse,
    /// Zeroes, without a file.
    Zero,
}

/// A line of the extent description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ExtentLine {
    /// "RW", not "RDONLY".
    pub(super) writable: bool,
    pub(super) sectors: u64,
    pub(super) kind: ExtentKind,
    /// The kind as written.
    pub(super) kind_name: String,
    /// The file's name, relative to the descriptor's directory.
    pub(super) name: String,
}

/// A descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// The content ID.
    pub(super) cid: u32,
    /// Where its digits are in the text.
    pub(super) cid_at: Range<usize>,
    pub(super) parent_cid: u32,
    pub(super) create_type: String,
    /// The parent's file name.
    pub(super) parent: Option<String>,
    pub(super) extents: Vec<ExtentLine>,
}

/// What is wrong with a descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wrong {
    Corrupt(String),
    Unsupported(String),
}

impl Descriptor {
    /// Reads a descriptor; what follows a NUL byte is padding.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Wrong> {
        let corrupt = |what: &str| Wrong::Corrupt(what.to_owned());
        let bytes = bytes.split(|&b| b == 0).next().unwrap_or_default();
        let text = std::str::from_utf8(bytes).map_err(|_| corrupt("its descriptor is not UTF-8"))?;
        let (mut cid, mut parent_cid, mut create_type, mut parent) = (None, None, None, None);
        let mut extents = Vec::new();
        let mut at = 0;
        for line in text.split_inclusive('\n') {
            let (start, trimmed) = (at, line.trim());
            at += line.len();
            if trimmed.is_empty() || trimmed.starts_with('#') {
                continue;
            }
            if let Some(extent) = extent(trimmed)? {
                extents.push(extent);
                if extents.len() > MAX_EXTENTS {
                    return Err(Wrong::Unsupported(format!("a disk of more than {MAX_EXTENTS} extents")));
                }
                continue;
            }
            let Some((key, value)) = trimmed.split_once('=') else { continue };
            let value = value.trim();
            let unquoted = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value);
            match key.trim().to_ascii_lowercase().as_str() {
                "cid" if cid.is_none() => {
                    // The value is a part of the line, so it is found.
                    let within = line.rfind(value).unwrap_or(0);
                    cid = Some((id(value)?, start + within..start + within + value.len()));
                }
                "parentcid" if parent_cid.is_none() => parent_cid = Some(id(value)?),
                "createtype" if create_type.is_none() => create_type = Some(unquoted.to_owned()),
                "parentfilenamehint" if parent.is_none() && !unquoted.is_empty() => {
                    parent = Some(unquoted.to_owned());
                }
                _ => {}
            }
        }
        let (cid, cid_at) = cid.ok_or_else(|| corrupt("its descriptor has no content ID"))?;
        Ok(Self {
            cid,
            cid_at,
            parent_cid: parent_cid.unwrap_or(NO_PARENT),
            create_type: create_type.ok_or_else(|| corrupt("its descriptor does not say createType"))?,
            parent,
            extents,
        })
    }
}

fn id(text: &str) -> Result<u32, Wrong> {
    let digits = !text.is_empty() && text.len() <= 8 && text.bytes().all(|b| b.is_ascii_hexdigit());
    let number = if digits { u32::from_str_radix(text, 16).ok() } else { None };
    number.ok_or_else(|| Wrong::Corrupt(format!("{text:?} is no content ID")))
}

/// Reads `RW 4192256 SPARSE "name.vmdk"` and the like; `None` for what is no such line.
fn extent(line: &str) -> Result<Option<ExtentLine>, Wrong> {
    let mut words = line.splitn(4, char::is_whitespace);
    let writable = match words.next() {
        Some("RW") => true,
        Some("RDONLY") => false,
        Some("NOACCESS") => return Err(Wrong::Unsupported("an extent without access".into())),
        _ => return Ok(None),
    };
    let bad = || Wrong::Corrupt(format!("the extent line {line:?}"));
    let sectors: u64 = words.next().and_then(|n| n.parse().ok()).filter(|&n| n > 0).ok_or_else(bad)?;
    let kind_name = words.next().ok_or_else(bad)?.to_owned();
    let rest = words.next().unwrap_or("").trim();
    if sectors > i64::MAX as u64 / 512 {
        return Err(bad());
    }
    if kind_name == "ZERO" {
        let kind = ExtentKind::Zero;
        return Ok(Some(ExtentLine { writable, sectors, kind, kind_name, name: String::new() }));
    }
    let (name, after) = rest.strip_prefix('"').and_then(|r| r.split_once('"')).ok_or_else(bad)?;
    let start = after.trim();
    let start = if start.is_empty() { None } else { Some(start.parse::<u64>().map_err(|_| bad())?) };
    let kind = match (kind_name.as_str(), start) {
        ("FLAT", Some(start)) if start <= i64::MAX as u64 / 512 => ExtentKind::Flat { start },
        ("VMFS", None | Some(0)) => ExtentKind::Flat { start: 0 },
        ("SPARSE", None) => ExtentKind::Sparse,
        ("FLAT" | "VMFS" | "SPARSE", _) => return Err(bad()),
        _ => return Err(Wrong::Unsupported(format!("a VMDK extent of type {kind_name}"))),
    };
    if name.is_empty() {
        return Err(bad());
    }
    Ok(Some(ExtentLine { writable, sectors, kind, kind_name, name: name.to_owned() }))
}
