//! Reading.

use super::{Below, BlockMap, Blocks, Place, Run};
use crate::IoError;
use crate::engine::View;
use crate::executor::{LocalFuture, join_all};
use crate::file::to_usize;

impl<M: BlockMap> Blocks<M> {
    /// Fills `view` from `offset` on. Absent blocks are what is `below`, or zeroes.
    pub(crate) async fn read(
        &self,
        offset: u64,
        view: View,
        below: Option<Below<'_>>,
    ) -> Result<(), IoError> {
        let end = offset + view.len() as u64;
        let mut parts: Vec<(Run, View)> = Vec::new();
        let mut at = offset;
        while at < end {
            let run = self.run(at, end - at).await?;
            parts.push((run, view.part(to_usize(at - offset), to_usize(run.length))));
            at += run.length;
        }
        match <[_; 1]>::try_from(parts) {
            Ok([(run, view)]) => self.read_run(run, view, below).await,
            Err(parts) => {
                let reads = parts
                    .into_iter()
                    .map(|(run, view)| Box::pin(self.read_run(run, view, below)) as LocalFuture<'_, _>);
                join_all(reads.collect()).await
            }
        }
    }

    async fn read_run(&self, run: Run, view: View, below: Option<Below<'_>>) -> Result<(), IoError> {
        match run.place {
            Place::Data(host) => self.map.file().read(host, &[view]).await,
            Place::Packed(host) => {
                let bytes = self.map.unpack(host).await?;
                let within = to_usize(run.offset % self.map.block_size());
                let Some(bytes) = bytes.get(within..within + view.len()) else {
                    return Err(IoError::Corrupt(format!(
                        "the compressed block at {host:#x} has only {} bytes",
                        bytes.len()
                    )));
                };
                view.put(bytes);
                Ok(())
            }
            Place::Absent if below.is_some() => match below {
                Some(below) => Box::pin(below.node.read(below.start + run.offset, view)).await,
                None => Ok(()),
            },
            Place::Absent | Place::Zero => {
                view.zero();
                Ok(())
            }
        }
    }
}
