//! Compressed clusters (specification, "Compressed Clusters Descriptor").

use std::collections::VecDeque;
use std::io::Read;
use std::rc::Rc;

use super::Qcow2;
use super::header::Compression;
use crate::IoError;
use crate::file::to_usize;

/// Decompressed clusters kept, since guests read neighbouring sectors one after the other.
const KEPT: usize = 2;

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
        if host >= self.file.len() {
            return Err(IoError::Corrupt(format!(
                "a compressed cluster at {host:#x} is beyond the end of the file"
            )));
        }
        let data = self.file.read_bytes(host, to_usize(length)).await?;
        let bytes = decompress(self.header.compression, &data, to_usize(self.cluster_size()))
            .map_err(|e| IoError::Corrupt(format!("the compressed cluster at {host:#x}: {e}")))?;
        let bytes = Rc::new(bytes);
        self.decompressed.borrow_mut().put(host, &bytes);
        Ok(bytes)
    }
}

/// Decompresses `data` to exactly `size` bytes; what follows in `data` is ignored.
fn decompress(compression: Compression, data: &[u8], size: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; size];
    match compression {
        // "Raw deflate", without zlib's header.
        Compression::Zlib => flate2::read::DeflateDecoder::new(data).read_exact(&mut bytes)?,
        Compression::Zstd => zstd::stream::read::Decoder::with_buffer(data)?.read_exact(&mut bytes)?,
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn both_methods_and_damage() {
        let plain: Vec<u8> = (0..65536u32).map(|i| (i / 7).to_le_bytes()[0]).collect();
        let mut deflate = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
        deflate.write_all(&plain).expect("in memory");
        let mut zlib = deflate.finish().expect("in memory");
        let mut zstd = zstd::encode_all(&plain[..], 3).expect("in memory");
        for (method, data) in [(Compression::Zlib, &mut zlib), (Compression::Zstd, &mut zstd)] {
            data.extend([0xa5; 300]);
            assert_eq!(decompress(method, data, plain.len()).expect("decompressed"), plain);
            assert!(decompress(method, &data[..20], plain.len()).is_err());
            data[10..40].fill(0xff);
            assert!(decompress(method, data, plain.len()).map_or(true, |bytes| bytes != plain));
        }
    }
}
