//! Several images one after the other as one disk that can be read.

use std::path::PathBuf;
use std::rc::Rc;

use crate::chain::open_chain;
use crate::engine::{Engine, View};
use crate::extent::Extent;
use crate::file::{File, to_usize};
use crate::node::{Answer, Image, Node};
use crate::{Format, IoError, OpenError, OpenOptions, Source};

/// Disks in a row.
struct Joined {
    /// Where each begins, and the disk.
    parts: Vec<(u64, Node)>,
    size: u64,
}

/// Opens the images, read-only: a single one as it is.
pub(crate) fn open_joined(engine: &Rc<Engine>, sources: &[Source]) -> Result<Node, OpenError> {
    if let [source] = sources {
        return open_chain(engine, &source.path, &source.options);
    }
    let (mut parts, mut size) = (Vec::new(), 0u64);
    for source in sources {
        let options = OpenOptions { read_only: true, ..source.options.clone() };
        let node = open_chain(engine, &source.path, &options)?;
        let start = size;
        size =
            size.checked_add(node.size()).filter(|&size| i64::try_from(size).is_ok()).ok_or_else(|| {
                OpenError::Limit {
                    path: source.path.clone(),
                    what: "together they are more than a disk can have".into(),
                }
            })?;
        parts.push((start, node));
    }
    Ok(Node::new(Joined { parts, size }))
}

impl Joined {
    /// The disk at `offset`, and the place on it.
    fn part(&self, offset: u64) -> Option<(&Node, u64)> {
        let index = self.parts.partition_point(|(start, _)| *start <= offset);
        // Disks of no bytes begin where the next one does, and come before it.
        self.parts[..index].last().map(|(start, node)| (node, offset - start))
    }
}

impl Image for Joined {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn file(&self) -> Option<&File> {
        None
    }

    fn path(&self) -> PathBuf {
        self.parts.first().map(|(_, node)| node.path()).unwrap_or_default()
    }

    fn unit(&self) -> u64 {
        0
    }

    fn read(&self, offset: u64, view: View) -> Answer<'_> {
        Box::pin(async move {
            let mut at = 0;
            while at < view.len() {
                let Some((node, place)) = self.part(offset + at as u64) else { break };
                let there = to_usize(node.size().saturating_sub(place)).min(view.len() - at);
                if there == 0 {
                    break;
                }
                node.read(place, view.part(at, there)).await?;
                at += there;
            }
            Ok(())
        })
    }

    fn write(&self, _offset: u64, _view: View) -> Answer<'_> {
        Box::pin(async { Err(IoError::ReadOnly) })
    }

    fn flush(&self) -> Answer<'_> {
        Box::pin(async { Ok(()) })
    }

    fn discard(&self, _offset: u64, _length: u64) -> Answer<'_> {
        Box::pin(async { Err(IoError::ReadOnly) })
    }

    fn write_zeroes(&self, _offset: u64, _length: u64, _unmap: bool) -> Answer<'_> {
        Box::pin(async { Err(IoError::ReadOnly) })
    }

    fn status(&self, offset: u64, length: u64) -> Answer<'_, Extent> {
        Box::pin(async move {
            let Some((node, place)) = self.part(offset) else {
                return Err(IoError::Unsupported("no such place"));
            };
            let found = node.status(place, length.min(node.size() - place)).await?;
            // Where it lies in one of several files is nothing that this disk could say.
            Ok(Extent { offset, depth: 0, host: None, ..found })
        })
    }

    fn close(&self) -> Answer<'_> {
        Box::pin(async move {
            for (_, node) in &self.parts {
                node.close().await?;
            }
            Ok(())
        })
    }
}
