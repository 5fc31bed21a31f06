//! fw_cfg: named items from the host for firmware and kernels (QEMU's `docs/specs/fw_cfg`).
//!
//! Registers, from the base port: a 16-bit selector (0), an 8-bit data register (1), and a 64-bit
//! big-endian DMA address (4), whose second half starts the transfer.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use terem_bus::{DeviceState, Registers, StateError};
use terem_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

/// Bytes of registers.
pub const LENGTH: u64 = 12;

/// Selector keys.
const SIGNATURE: u16 = 0x00;
const ID: u16 = 0x01;
const FILE_DIR: u16 = 0x19;
/// The first file.
const FILE_FIRST: u16 = 0x20;
/// Keys have 14 bits; bit 14 chooses writing in the old way, bit 15 architecture-specific items.
const KEY_MASK: u16 = 0xbfff;
/// The most files that keys allow for.
const FILES: usize = 0x4000 - FILE_FIRST as usize;
/// Bytes of a file's name with its final zero.
const NAME_LEN: usize = 56;

/// ID bits: the traditional interface, and DMA.
const FEATURES: u32 = 1 << 0 | 1 << 1;
/// What the DMA address register reads as.
const DMA_SIGNATURE: u64 = 0x5145_4d55_2043_4647;

/// DMA control bits; the upper half is a key to select.
const DMA_ERROR: u32 = 1 << 0;
const DMA_READ: u32 = 1 << 1;
const DMA_SKIP: u32 = 1 << 2;
const DMA_SELECT: u32 = 1 << 3;
const DMA_WRITE: u32 = 1 << 4;

/// Bytes that are copied at a time.
const CHUNK: usize = 64 << 10;

/// An item that is read where the guest asks for it: a kernel image, say.
pub trait ItemSource: Send + Sync {
    /// Bytes.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` with the bytes from `offset` on, which are inside the item; false when they cannot
    /// be read.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> bool;
}

impl ItemSource for Vec<u8> {
    fn len(&self) -> u64 {
        Vec::len(self) as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> bool {
        let start = usize::try_from(offset).ok();
        let bytes = start.and_then(|s| self.get(s..s.checked_add(buf.len())?));
        bytes.map(|b| buf.copy_from_slice(b)).is_some()
    }
}

/// Told when the guest has written to a writable item: all of its bytes.
pub type OnWrite = Box<dyn Fn(&[u8]) + Send>;

enum Content {
    Fixed(Arc<dyn ItemSource>),
    Writable { bytes: Vec<u8>, on_write: OnWrite },
}

impl Content {
    fn len(&self) -> u64 {
        match self {
            Self::Fixed(source) => source.len(),
            Self::Writable { bytes, .. } => bytes.len() as u64,
        }
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> bool {
        match self {
            Self::Fixed(source) => source.read_at(offset, buf),
            Self::Writable { bytes, .. } => bytes.read_at(offset, buf),
        }
    }
}

struct Item {
    key: u16,
    name: Option<String>,
    content: Content,
}

/// Why an item was not added: a mistake of the board, not the guest's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FwCfgError {
    /// Names are 1 to 55 bytes of ASCII.
    #[error("fw_cfg file name {0:?} is not 1 to 55 ASCII characters")]
    Name(String),
    /// The key or name is there already.
    #[error("fw_cfg item {0} is there already")]
    Taken(String),
    /// There are as many files as keys.
    #[error("fw_cfg has no room for file {0:?}")]
    Full(String),
    /// The directory has 32 bits for sizes.
    #[error("fw_cfg item {0} is 4 GiB or more")]
    Large(String),
}

/// The device.
pub struct FwCfg {
    memory: GuestMemory,
    items: Vec<Item>,

    key: u16,
    offset: u64,
    dma: u64,
}

impl fmt::Debug for FwCfg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.items.iter().map(|i| (i.key, i.name.as_deref().unwrap_or("")));
        f.debug_map().entries(names).finish()
    }
}

impl FwCfg {
    /// The device with its fixed items, copying to and from `memory`.
    #[must_use]
    pub fn new(memory: GuestMemory) -> Self {
        let mut f = Self { memory, items: Vec::new(), key: 0, offset: 0, dma: 0 };
        f.put(SIGNATURE, None, Content::Fixed(Arc::new(b"QEMU".to_vec())));
        f.put(ID, None, Content::Fixed(Arc::new(FEATURES.to_le_bytes().to_vec())));
        f.put(FILE_DIR, None, Content::Fixed(Arc::new(0_u32.to_be_bytes().to_vec())));
        f
    }

    fn put(&mut self, key: u16, name: Option<String>, content: Content) {
        self.items.push(Item { key, name, content });
    }

    /// Adds the item with the fixed key `key` (below the files'): kernel sizes, CPU counts and so on.
    ///
    /// # Errors
    /// [`FwCfgError::Taken`] when it is there already or belongs to a file.
    pub fn add_item(&mut self, key: u16, content: Arc<dyn ItemSource>) -> Result<(), FwCfgError> {
        let file = (FILE_FIRST..0x4000).contains(&key);
        if file || key & !KEY_MASK != 0 || self.item(key).is_some() {
            return Err(FwCfgError::Taken(format!("{key:#x}")));
        }
        self.put(key, None, Content::Fixed(content));
        Ok(())
    }

    /// Adds a file, such as `etc/acpi/tables`. Keys follow the order of adding.
    ///
    /// # Errors
    /// See [`FwCfgError`].
    pub fn add_file(&mut self, name: &str, content: Arc<dyn ItemSource>) -> Result<(), FwCfgError> {
        self.add(name, Content::Fixed(content))
    }

    /// Adds a file that a guest may write (by DMA, inside its length); `on_write` sees the result.
    ///
    /// # Errors
    /// See [`FwCfgError`].
    pub fn add_writable(&mut self, name: &str, bytes: Vec<u8>, on_write: OnWrite) -> Result<(), FwCfgError> {
        self.add(name, Content::Writable { bytes, on_write })
    }

    fn add(&mut self, name: &str, content: Content) -> Result<(), FwCfgError> {
        if name.is_empty() || name.len() >= NAME_LEN || !name.is_ascii() {
            return Err(FwCfgError::Name(name.into()));
        }
        let files = self.items.iter().filter(|i| i.name.is_some()).count();
        if self.items.iter().any(|i| i.name.as_deref() == Some(name)) {
            return Err(FwCfgError::Taken(name.into()));
        }
        if u32::try_from(content.len()).is_err() {
            return Err(FwCfgError::Large(name.into()));
        }
        let key = u16::try_from(files).ok().filter(|_| files < FILES).map(|n| FILE_FIRST + n);
        let key = key.ok_or_else(|| FwCfgError::Full(name.into()))?;
        self.put(key, Some(name.into()), content);
        let directory: Arc<dyn ItemSource> = Arc::new(self.directory());
        if let Some(i) = self.items.iter_mut().find(|i| i.key == FILE_DIR) {
            i.content = Content::Fixed(directory);
        }
        Ok(())
    }

    /// The file directory: a count, and size, key and name of each file, big-endian.
    fn directory(&self) -> Vec<u8> {
        let files = || self.items.iter().filter_map(|i| Some((i, i.name.as_ref()?)));
        let mut out = u32::try_from(files().count()).unwrap_or(0).to_be_bytes().to_vec();
        for (item, name) in files() {
            out.extend(u32::try_from(item.content.len()).unwrap_or(0).to_be_bytes());
            out.extend(item.key.to_be_bytes());
            out.extend([0; 2]);
            let end = out.len() + NAME_LEN;
            out.extend(name.as_bytes());
            out.resize(end, 0);
        }
        out
    }

    fn item(&self, key: u16) -> Option<&Item> {
        self.items.iter().find(|i| i.key == key)
    }

    fn select(&mut self, key: u16) {
        self.key = key & KEY_MASK;
        self.offset = 0;
    }

    /// The next byte; zero past the end or where there is no item.
    fn read_byte(&mut self) -> u8 {
        let mut byte = [0];
        self.read_item(&mut byte);
        byte[0]
    }

    /// Fills `buf` from the selected item and moves on: zeroes past its end.
    fn read_item(&mut self, buf: &mut [u8]) {
        buf.fill(0);
        if let Some(item) = self.item(self.key) {
            let left = item.content.len().saturating_sub(self.offset);
            let n = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
            if n > 0 && !item.content.read_at(self.offset, &mut buf[..n]) {
                tracing::warn!("fw_cfg item {:#x} cannot be read at {}", self.key, self.offset);
            }
        }
        self.offset = self.offset.saturating_add(buf.len() as u64);
    }

    /// A DMA transfer, as its structure in guest memory says.
    fn transfer(&mut self) {
        let at = GuestAddress(std::mem::take(&mut self.dma));
        let mut access = [0; 16];
        if let Err(e) = self.memory.read_slice(&mut access, at) {
            tracing::warn!("fw_cfg DMA structure at {:#x} is not in RAM: {e}", at.0);
            return;
        }
        let [c0, c1, c2, c3, l0, l1, l2, l3, rest @ ..] = access;
        let control = u32::from_be_bytes([c0, c1, c2, c3]);
        let len = u32::from_be_bytes([l0, l1, l2, l3]);
        if control & DMA_SELECT != 0 {
            self.select(u16::from_be_bytes([c0, c1]));
        }
        let done = if control & DMA_READ != 0 {
            self.dma_read(u64::from_be_bytes(rest), len)
        } else if control & DMA_WRITE != 0 {
            self.dma_write(u64::from_be_bytes(rest), len)
        } else {
            if control & DMA_SKIP != 0 {
                self.offset = self.offset.saturating_add(u64::from(len));
            }
            true
        };
        let status = if done { 0 } else { DMA_ERROR };
        if self.memory.write_slice(&status.to_be_bytes(), at).is_err() {
            tracing::warn!("fw_cfg DMA result cannot be written to {:#x}", at.0);
        }
    }

    fn dma_read(&mut self, mut to: u64, len: u32) -> bool {
        // Checked first, so that a bad address costs no copying.
        if len > 0 && !self.memory.is_ram(to, u64::from(len)) {
            return false;
        }
        let mut buf = vec![0; CHUNK.min(usize::try_from(len).unwrap_or(CHUNK))];
        let mut left = u64::from(len);
        while left > 0 {
            let n = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
            self.read_item(&mut buf[..n]);
            if self.memory.write_slice(&buf[..n], GuestAddress(to)).is_err() {
                return false;
            }
            to = to.saturating_add(n as u64);
            left -= n as u64;
        }
        true
    }

    fn dma_write(&mut self, from: u64, len: u32) -> bool {
        let (key, offset) = (self.key, self.offset);
        let Some(item) = self.items.iter_mut().find(|i| i.key == key) else { return false };
        let Content::Writable { bytes, on_write } = &mut item.content else { return false };
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(usize::try_from(len).unwrap_or(usize::MAX));
        let Some(target) = bytes.get_mut(start..end) else { return false };
        if self.memory.read_slice(target, GuestAddress(from)).is_err() {
            return false;
        }
        on_write(bytes);
        self.offset = offset.saturating_add(u64::from(len));
        true
    }

    /// A write to half of the DMA address, which is big-endian on the bus.
    fn write_dma(&mut self, offset: u64, size: u8, value: u64) -> bool {
        let [a, b, c, d, ..] = value.to_le_bytes();
        let half = u64::from(u32::from_be_bytes([a, b, c, d]));
        match (offset, size) {
            (4, 4) => self.dma = half << 32,
            (8, 4) => {
                self.dma = self.dma & !0xffff_ffff | half;
                self.transfer();
            }
            (4, 8) => {
                self.dma = value.swap_bytes();
                self.transfer();
            }
            _ => return false,
        }
        true
    }
}

impl Registers for FwCfg {
    fn read(&mut self, offset: u64, size: u8) -> Option<u64> {
        match (offset, size) {
            (1, 1) => Some(u64::from(self.read_byte())),
            (4..LENGTH, 1 | 2 | 4 | 8) => {
                let [a, b, c, d, e, f, g, h] = DMA_SIGNATURE.to_be_bytes();
                let value = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
                Some(value >> (8 * (offset - 4)))
            }
            _ => None,
        }
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) -> bool {
        match (offset, size) {
            (0, 2) => {
                let [a, b, ..] = value.to_le_bytes();
                self.select(u16::from_le_bytes([a, b]));
                true
            }
            (4..LENGTH, _) => self.write_dma(offset, size, value),
            // Writing through the data register was given up long ago.
            _ => false,
        }
    }
}

/// Saved state: the position, and the writable items, by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FwCfgState {
    key: u16,
    offset: u64,
    dma: u64,
    written: Vec<(String, Vec<u8>)>,
}

impl DeviceState for FwCfg {
    const NAME: &'static str = "fw-cfg";
    type State = FwCfgState;

    fn save(&self) -> FwCfgState {
        let Self { memory: _, items, key, offset, dma } = self;
        let written = items.iter().filter_map(|i| match (&i.content, &i.name) {
            (Content::Writable { bytes, .. }, Some(name)) => Some((name.clone(), bytes.clone())),
            _ => None,
        });
        FwCfgState { key: *key, offset: *offset, dma: *dma, written: written.collect() }
    }

    fn restore(&mut self, state: FwCfgState) -> Result<(), StateError> {
        let FwCfgState { key, offset, dma, written } = state;
        for (name, saved) in written {
            let item = self.items.iter_mut().find(|i| i.name.as_deref() == Some(&name));
            match item.map(|i| &mut i.content) {
                Some(Content::Writable { bytes, .. }) if bytes.len() == saved.len() => *bytes = saved,
                _ => return Err(Self::invalid(format!("there is no writable item {name} of that size"))),
            }
        }
        (self.key, self.offset, self.dma) = (key & KEY_MASK, offset, dma);
        Ok(())
    }

    /// What was written stays, as firmware's own notes would.
    fn reset(&mut self) {
        (self.key, self.offset, self.dma) = (0, 0, 0);
    }
}

#[cfg(test)]
#[path = "fw_cfg_tests.rs"]
mod tests;
