//! Compressed clusters (specification, "Compressed Clusters Descriptor"): reading them, and packing them one after the
//! other into host clusters, which several of them share.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, Read};
use std::rc::Rc;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};

use super::Qcow2;
use super::entry::Entry;
use super::image::Dropped;
use crate::engine::View;
use crate::file::to_usize;
use crate::{Compression, IoError};

/// Decompressed clusters kept, since guests read neighbouring sectors one after the other.
const KEPT: usize = 2;
/// log2 of deflate's window: QEMU decompresses with no larger one.
const WINDOW_BITS: u8 = 12;

thread_local! {
    // Making one takes longer than compressing a small cluster.
    static DEFLATE: RefCell<Compress> =
        RefCell::new(Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS));
    // "Raw deflate", without zlib's header.
    static INFLATE: RefCell<Decompress> = RefCell::new(Decompress::new(false));
    static UNZSTD: RefCell<Option<zstd::bulk::Decompressor<'static>>> =
        RefCell::new(zstd::bulk::Decompressor::new().ok());
    static ZSTD: RefCell<Option<zstd::bulk::Compressor<'static>>> =
        RefCell::new(zstd::bulk::Compressor::new(0).ok());
}

/// The clusters that were decompressed last, by their place in the file.
#[derive(Debug, Default)]
pub(super) struct Decompressed(VecDeque<(u64, Rc<Vec<u8>>)>);

impl Decompressed {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    fn get(&self, host: u64) -> Option<Rc<Vec<u8>>> {
        self.0.iter().find(|(at, _)| *at == host).map(|(_, bytes)| Rc::clone(bytes))
    }

    fn put(&mut self, host: u64, bytes: &Rc<Vec<u8>>) {
        if self.get(host).is_none() {
            self.0.truncate(KEPT - 1);
            self.0.push_front((host, Rc::clone(bytes)));
        }
    }
}

impl Qcow2 {
    /// The contents of the cluster that is compressed in `length` bytes at `host`.
    pub(super) async fn read_compressed(&self, host: u64, length: u64) -> Result<Rc<Vec<u8>>, IoError> {
        let kept = self.decompressed.borrow().get(host);
        if let Some(bytes) = kept {
            return Ok(bytes);
        }
        self.check_compressed(host)?;
        let data = self.file.read_bytes(host, to_usize(length)).await?;
        let mut bytes = vec![0; to_usize(self.cluster_size())];
        decompress(self.header.compression, &data, &mut bytes)
            .map_err(|e| IoError::Corrupt(format!("the compressed cluster at {host:#x}: {e}")))?;
        let bytes = Rc::new(bytes);
        self.decompressed.borrow_mut().put(host, &bytes);
        Ok(bytes)
    }

    /// Whether a compressed cluster can be at `host`.
    pub(super) fn check_compressed(&self, host: u64) -> Result<(), IoError> {
        if host < self.file.len() {
            return Ok(());
        }
        Err(IoError::Corrupt(format!("a compressed cluster at {host:#x} is beyond the end of the file")))
    }

    /// Puts in clusters that [`compress`] has compressed: guest cluster and bytes, in ascending order.
    pub(crate) async fn write_compressed(&self, clusters: &[(u64, Vec<u8>)]) -> Result<(), IoError> {
        let ([(first, _), ..], [.., (last, _)]) = (clusters, clusters) else { return Ok(()) };
        if self.l2_format.external {
            return Err(IoError::Unsupported("compressed clusters with a data file"));
        }
        self.begin_write().await?;
        self.mark_dirty(first << self.bits(), (last + 1 - first) << self.bits());
        let _mapped = self.mapping_locks.exclusive(*first..last + 1).await;
        let places = self.pack(clusters).await?;
        let result = self.put_packed(clusters, &places).await;
        if result.is_err() {
            let drop = |(&host, (_, bytes)): (&u64, &(u64, Vec<u8>))| {
                let end = host + bytes.len() as u64 - 1;
                Dropped {
                    first: host >> self.bits(),
                    count: (end >> self.bits()) - (host >> self.bits()) + 1,
                }
            };
            self.reclaimable.borrow_mut().extend(places.iter().zip(clusters).map(drop));
            self.reclaim().await?;
        }
        result?;
        self.limit_dropped().await
    }

    async fn put_packed(&self, clusters: &[(u64, Vec<u8>)], places: &[u64]) -> Result<(), IoError> {
        // What lies together is written together.
        let mut parts: Vec<(u64, Vec<u8>)> = Vec::new();
        for (&host, (_, bytes)) in places.iter().zip(clusters) {
            match parts.last_mut() {
                Some((start, part)) if *start + part.len() as u64 == host => part.extend(bytes),
                _ => parts.push((host, bytes.clone())),
            }
        }
        for (host, bytes) in parts {
            self.file.write(host, &[View::copy_of(&bytes)]).await?;
        }
        let mut at = 0;
        while at < clusters.len() {
            let first = clusters[at].0;
            let end = self.table_end(first);
            let together = clusters[at..].iter().take_while(|c| c.0 < end).count();
            let mut entries: Vec<Option<Entry>> = Vec::new();
            for ((number, bytes), host) in clusters[at..at + together].iter().zip(&places[at..]) {
                entries.resize(to_usize(number - first), None);
                entries.push(Some(self.l2_format.compressed(*host, bytes.len() as u64)));
            }
            self.commit(first, &entries).await?;
            at += together;
        }
        Ok(())
    }

    /// Places for compressed clusters, one after the other where they can be.
    async fn pack(&self, clusters: &[(u64, Vec<u8>)]) -> Result<Vec<u64>, IoError> {
        let cluster_size = self.cluster_size();
        let mut places = Vec::with_capacity(clusters.len());
        let _one = self.allocating.all().await;
        self.reclaim_locked().await?;
        for (_, bytes) in clusters {
            let length = bytes.len() as u64;
            let at = self.packing.get();
            let room = at.next_multiple_of(cluster_size) - at;
            let host = if length <= room && self.count_up(at >> self.bits()).await? {
                at
            } else {
                let (cluster, _) = self.take(1).await?;
                let next = cluster << self.bits();
                // It may begin in the cluster before, if that is ours to fill.
                if room > 0 && at + room == next && self.count_up(at >> self.bits()).await? {
                    at
                } else {
                    next
                }
            };
            self.packing.set(host + length);
            places.push(host);
        }
        Ok(places)
    }
}

/// Compresses a cluster, for the given method; `None` if that does not make it smaller.
pub(crate) fn compress(method: Compression, data: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = vec![0; data.len().checked_sub(1)?];
    let length = match method {
        Compression::Zlib => DEFLATE.with_borrow_mut(|stream| {
            stream.reset();
            match stream.compress(data, &mut bytes, FlushCompress::Finish) {
                Ok(Status::StreamEnd) => usize::try_from(stream.total_out()).ok(),
                _ => None,
            }
        })?,
        Compression::Zstd => ZSTD.with_borrow_mut(|stream| {
            stream.as_mut().and_then(|stream| stream.compress_to_buffer(data, &mut bytes).ok())
        })?,
    };
    bytes.truncate(length);
    Some(bytes)
}

/// Decompresses `data` to exactly as many bytes as `bytes` has; what follows in `data` is ignored.
pub(crate) fn decompress(compression: Compression, data: &[u8], bytes: &mut [u8]) -> io::Result<()> {
    match compression {
        Compression::Zlib => INFLATE.with_borrow_mut(|stream| {
            stream.reset(false);
            match stream.decompress(data, bytes, FlushDecompress::Finish) {
                Ok(_) if stream.total_out() == bytes.len() as u64 => Ok(()),
                Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(e) => Err(io::Error::new(io::ErrorKind::InvalidData, e)),
            }
        }),
        Compression::Zstd => {
            if UNZSTD.with_borrow_mut(|stream| unzstd_frame(stream.as_mut(), data, bytes)).is_some() {
                return Ok(());
            }
            // Several frames, or damage: it says which.
            zstd::stream::read::Decoder::with_buffer(data)?.read_exact(bytes)
        }
    }
}

/// Decompresses a frame that holds exactly these bytes, as nearly all clusters are.
fn unzstd_frame(
    stream: Option<&mut zstd::bulk::Decompressor<'_>>,
    data: &[u8],
    bytes: &mut [u8],
) -> Option<()> {
    let frame = zstd::zstd_safe::find_frame_compressed_size(data).ok()?;
    let length = stream?.decompress_to_buffer(data.get(..frame)?, bytes).ok()?;
    (length == bytes.len()).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_methods_and_damage() {
        let plain: Vec<u8> = (0..65536u32).map(|i| (i / 7).to_le_bytes()[0]).collect();
        for method in [Compression::Zlib, Compression::Zstd] {
            let mut data = compress(method, &plain).expect("smaller");
            data.extend([0xa5; 300]);
            let mut bytes = vec![0; plain.len()];
            decompress(method, &data, &mut bytes).expect("decompressed");
            assert_eq!(bytes, plain);
            assert!(decompress(method, &data[..20], &mut bytes).is_err());
            data[10..40].fill(0xff);
            assert!(decompress(method, &data, &mut bytes).is_err() || bytes != plain);
        }
    }

    #[test]
    fn several_frames() {
        let plain = [7u8; 8192];
        let mut data = compress(Compression::Zstd, &plain[..5000]).expect("smaller");
        data.extend(compress(Compression::Zstd, &plain[5000..]).expect("smaller"));
        let mut bytes = [0; 8192];
        decompress(Compression::Zstd, &data, &mut bytes).expect("decompressed");
        assert_eq!(bytes, plain);
    }

    #[test]
    fn noise_does_not_become_smaller() {
        let mut x = 1u32;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            x.to_be_bytes()[0]
        })
        .take(4096)
        .collect();
        assert_eq!(compress(Compression::Zlib, &noise), None);
        assert_eq!(compress(Compression::Zstd, &noise), None);
        assert_eq!(compress(Compression::Zlib, &[]), None);
    }
}
