//! What a worker reads, and the ways to it: past the source's I/O thread where data lie in a file, as they are or
//! compressed; else by requests.

use std::sync::Arc;

use terem_memory::IoMemory;

use super::buffers::Buffers;
use super::copy::Window;
use super::{Copying, request};
use crate::file::{PlainFile, to_usize};
use crate::node::{Node, Packed, Unpacker};
use crate::{Disk, Extent, ExtentKind, Format, IoError, Op, OpenError};

/// Compressed bytes that are read at once, if several clusters lie together.
const TOGETHER: u64 = 2 << 20;

/// What is tried by itself where the source is hard to read.
const SECTOR: usize = 512;

/// What workers can read by themselves of an image of the source's chain.
pub(super) struct Part {
    /// Data as it is.
    plain: Option<PlainFile>,
    /// Compressed clusters.
    packed: Option<(PlainFile, Unpacker)>,
}

/// The images of the source's chain, by depth.
pub(super) fn parts(copying: &Copying<'_>) -> Result<Vec<Part>, OpenError> {
    let parts = copying.from.with_node(|node| {
        Box::pin(async move {
            let chain = std::iter::successors(Some(&*node), |node| node.backing());
            let part = |node: &Node| Part {
                plain: node.image().plain_data().and_then(crate::file::File::plain),
                packed: node.image().unpacking().and_then(|(file, how)| Some((file.plain()?, how))),
            };
            Ok::<_, IoError>(chain.map(part).collect())
        })
    });
    parts.map_err(|e| request(copying.source(), "looking at its files", e))
}

/// The largest cluster that workers decompress.
pub(super) fn largest_packed(parts: &[Part]) -> u64 {
    parts.iter().filter_map(|part| Some(part.packed.as_ref()?.1.unit)).max().unwrap_or(0)
}

/// Whether the format has compressed clusters, which are best read by several readers.
fn wants_readers(format: Format) -> bool {
    !matches!(format, Format::Raw | Format::Luks)
}

/// How a part of a window is read.
enum Way<'a> {
    Zero,
    Plain(&'a PlainFile, u64),
    Packed(&'a PlainFile, Unpacker),
    Request,
}

/// Reads windows.
pub(super) struct Reader<'a> {
    copying: &'a Copying<'a>,
    parts: &'a [Part],
    /// The source opened once more, when it is needed: decompression takes time.
    own: Option<Disk>,
    buffers: Buffers,
    /// Compressed bytes.
    packed: Vec<u8>,
    /// A cluster of which only a part is wanted.
    cluster: Vec<u8>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(copying: &'a Copying<'a>, parts: &'a [Part]) -> Self {
        let buffers = Buffers::default();
        Self { copying, parts, own: None, buffers, packed: Vec::new(), cluster: Vec::new() }
    }

    fn failed(&self, source: impl Into<IoError>) -> OpenError {
        request(self.copying.source(), "reading the source", source.into())
    }

    /// Fills the buffer with the window's contents; what follows is zeroes. Of units (of `unit` bytes) that are known to
    /// hold nothing but zeroes anything may be in the buffer.
    pub(super) fn read(&mut self, window: &Window, buffer: &mut [u8], unit: usize) -> Result<(), OpenError> {
        let mut at = 0;
        let mut extents = window.extents.as_slice();
        while let [first, ..] = extents {
            let n = match self.way(first) {
                // All that takes requests, in one.
                Way::Request => extents.iter().take_while(|e| matches!(self.way(e), Way::Request)).count(),
                _ => 1,
            };
            let length: u64 = extents[..n].iter().map(|e| e.length).sum();
            let part = &mut buffer[at..at + to_usize(length)];
            let read = match self.way(first) {
                // Where zeroes are not told apart, they are written as what is in the buffer.
                Way::Zero if self.copying.options.sparse == 0 => {
                    part.fill(0);
                    Ok(())
                }
                Way::Zero => {
                    zero_edges(part, at, unit);
                    Ok(())
                }
                Way::Plain(file, host) => file.read(host, part).map_err(|e| self.failed(e)),
                Way::Packed(file, how) => self.unpack(file, how, first, part),
                Way::Request => self.read_by_request(first.offset, part),
            };
            match read {
                Err(_) if self.copying.options.salvage => self.salvage(first.offset, part),
                result => result?,
            }
            at += to_usize(length);
            extents = &extents[n..];
        }
        buffer[at..].fill(0);
        Ok(())
    }

    /// Where an extent's data lies in a file as it is.
    pub(super) fn plain(&self, extent: &Extent) -> Option<(&'a PlainFile, u64)> {
        match self.way(extent) {
            Way::Plain(file, host) => Some((file, host)),
            _ => None,
        }
    }

    /// Reads what can be read, a sector at a time; the rest is zeroes.
    fn salvage(&mut self, offset: u64, part: &mut [u8]) {
        for (i, sector) in part.chunks_mut(SECTOR).enumerate() {
            let at = offset + (i * SECTOR) as u64;
            if let Err(error) = self.read_by_request(at, sector) {
                sector.fill(0);
                (self.copying.options.warn)(&format!(
                    "error while reading offset {at}: {error}; it is zeroes in the copy"
                ));
            }
        }
    }

    fn way(&self, extent: &Extent) -> Way<'a> {
        let part = self.parts.get(extent.depth as usize);
        match (extent.kind, extent.host) {
            (ExtentKind::Zero | ExtentKind::Unallocated, _) => Way::Zero,
            (ExtentKind::Data, Some(host)) => match part.and_then(|part| part.plain.as_ref()) {
                Some(file) => Way::Plain(file, host),
                None => Way::Request,
            },
            (ExtentKind::Compressed, _) => match part.and_then(|part| part.packed.as_ref()) {
                Some((file, how)) => Way::Packed(file, *how),
                None => Way::Request,
            },
            _ => Way::Request,
        }
    }

    fn read_by_request(&mut self, offset: u64, part: &mut [u8]) -> Result<(), OpenError> {
        if self.own.is_none() && wants_readers(self.copying.from.facts().format) {
            self.own = Some(Disk::open_sources(self.copying.sources.to_vec())?);
        }
        let disk = self.own.as_ref().unwrap_or(&self.copying.from);
        let memory = self.buffers.take(part.len());
        disk.run(Op::Read { offset, memory: Arc::clone(&memory) as _ }).map_err(|e| self.failed(e))?;
        memory.read_at(0, part);
        Ok(())
    }

    /// Decompresses an extent.
    fn unpack(
        &mut self,
        file: &PlainFile,
        how: Unpacker,
        extent: &Extent,
        to: &mut [u8],
    ) -> Result<(), OpenError> {
        let &Extent { offset, length, depth, .. } = extent;
        let places = self.copying.from.with_node(move |node| {
            Box::pin(async move {
                let mut image = Some(&*node);
                for _ in 0..depth {
                    image = image.and_then(Node::backing);
                }
                let image = image.ok_or(IoError::Closed)?;
                image.image().packed(offset, length).await
            })
        });
        let places = places.map_err(|e| self.failed(e))?;
        let clusters = (offset / how.unit..(offset + length).div_ceil(how.unit)).map(|n| n * how.unit);
        if !places.iter().map(|place| place.offset).eq(clusters) {
            return Err(self.failed(IoError::Corrupt("its clusters changed while it was read".into())));
        }
        let mut rest = places.as_slice();
        while let [first, ..] = rest {
            let together = together(rest);
            let (run, after) = rest.split_at(together);
            let end = run.last().map_or(0, |last| last.host + last.length);
            let mut bytes = std::mem::take(&mut self.packed);
            bytes.resize(to_usize(end - first.host), 0);
            file.read(first.host, &mut bytes).map_err(|e| self.failed(e))?;
            for place in run {
                let at = to_usize(place.host - first.host);
                let packed = &bytes[at..at + to_usize(place.length)];
                self.unpack_cluster(how, packed, place, offset, to)?;
            }
            self.packed = bytes;
            rest = after;
        }
        Ok(())
    }

    /// Decompresses a cluster into `to`, which begins at `offset` on the disk and may hold only a part of it.
    fn unpack_cluster(
        &mut self,
        how: Unpacker,
        packed: &[u8],
        place: &Packed,
        offset: u64,
        to: &mut [u8],
    ) -> Result<(), OpenError> {
        let damaged = |e| IoError::Corrupt(format!("the compressed cluster at {:#x}: {e}", place.host));
        let unit = to_usize(how.unit);
        let start = to_usize(place.offset.saturating_sub(offset));
        let skip = to_usize(offset.saturating_sub(place.offset));
        let whole = to.get_mut(start..start + unit).filter(|_| skip == 0);
        if let Some(whole) = whole {
            return (how.decompress)(packed, whole).map_err(|e| self.failed(damaged(e)));
        }
        let mut cluster = std::mem::take(&mut self.cluster);
        cluster.resize(unit, 0);
        (how.decompress)(packed, &mut cluster).map_err(|e| self.failed(damaged(e)))?;
        let part = to.get_mut(start..).unwrap_or_default();
        let n = part.len().min(unit - skip);
        part[..n].copy_from_slice(&cluster[skip..skip + n]);
        self.cluster = cluster;
        Ok(())
    }
}

/// Zeroes what lies in units that may hold something else too: the beginning and the end of `part`, which is `at` bytes
/// after the beginning of the first unit.
fn zero_edges(part: &mut [u8], at: usize, unit: usize) {
    let head = (at.next_multiple_of(unit) - at).min(part.len());
    let tail = ((at + part.len()) % unit).min(part.len() - head);
    let whole = part.len() - tail;
    part[..head].fill(0);
    part[whole..].fill(0);
}

/// How many of these clusters, the first ones, lie so that one read brings them all.
fn together(places: &[Packed]) -> usize {
    let [first, ..] = places else { return 0 };
    let mut end = first.host + first.length;
    let follows = |place: &&Packed| {
        // Each begins in the last sector of the one before, or after it.
        let next = place.host + place.length;
        let near = (first.host..=end).contains(&place.host) && next >= end && next - first.host <= TOGETHER;
        end = if near { next } else { end };
        near
    };
    1 + places[1..].iter().take_while(follows).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_units_that_are_zero_as_a_whole_stay_as_they_are() {
        for (at, length, stays) in
            [(0, 32, 0..32), (3, 4, 0..0), (3, 20, 8..16), (8, 9, 8..16), (7, 2, 0..0), (0, 3, 0..0)]
        {
            let mut buffer = [1; 40];
            zero_edges(&mut buffer[at..at + length], at, 8);
            for (i, byte) in buffer.into_iter().enumerate() {
                let zeroed = (at..at + length).contains(&i) && !stays.contains(&i);
                assert_eq!(byte == 0, zeroed, "{at} {length} {i}");
            }
        }
    }

    #[test]
    fn what_lies_together() {
        let place = |host, length| Packed { offset: 0, host, length };
        assert_eq!(together(&[]), 0);
        assert_eq!(together(&[place(100, 412), place(300, 212), place(500, 100), place(601, 1)]), 3);
        assert_eq!(together(&[place(100, 50), place(50, 50)]), 1);
        assert_eq!(together(&[place(0, 1 << 20), place(1 << 20, 1 << 20), place(2 << 20, 1)]), 2);
    }
}
