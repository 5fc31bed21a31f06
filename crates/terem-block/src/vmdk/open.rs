//! Opening an image with its extents and its parent.

use std::cell::Cell;
use std::rc::Rc;

use super::descriptor::{Descriptor, ExtentKind, ExtentLine, MAX_LENGTH, Wrong};
use super::grains::Grains;
use super::image::{ContentId, Part, Piece, Vmdk};
use super::sparse::{COWD_MAGIC, MAGIC, SECTOR, SparseHeader};
use crate::OpenError;
use crate::blocks::Blocks;
use crate::chain::{ImageFile, Opening};
use crate::flat::Flat;
use crate::range_lock::RangeLock;

/// An image's main file, read.
pub(super) struct Head {
    /// The text, and where it begins in the file. There is none in an extent of a split image.
    pub(super) descriptor: Option<(Descriptor, u64)>,
    /// The extent in the same file, if there is one.
    pub(super) sparse: Option<SparseHeader>,
}

impl Head {
    pub(super) fn read(image: &ImageFile) -> Result<Self, OpenError> {
        let head = image.head()?;
        if head.starts_with(COWD_MAGIC) {
            return Err(OpenError::Unsupported {
                path: image.path().to_owned(),
                feature: "a sparse extent of ESX (COWD)".into(),
                hint: "convert it with vmkfstools",
            });
        }
        if !head.starts_with(MAGIC) {
            if image.len() > MAX_LENGTH {
                return Err(OpenError::corrupt(image.path(), "it has no VMDK header, and is no descriptor"));
            }
            let text = image.read(0, image.len(), "the descriptor")?;
            let descriptor = parse(image, &text)?;
            if descriptor.extents.is_empty() {
                return Err(OpenError::corrupt(image.path(), "its descriptor has no extents"));
            }
            return Ok(Self { descriptor: Some((descriptor, 0)), sparse: None });
        }
        let sparse = SparseHeader::read(image)?;
        let mut found = None;
        if let Some(place) = &sparse.descriptor {
            let text = image.read(place.start, place.end - place.start, "the descriptor")?;
            if text.first().is_some_and(|&b| b != 0) {
                found = Some((parse(image, &text)?, place.start));
            }
        }
        Ok(Self { descriptor: found, sparse: Some(sparse) })
    }

    /// The extents that lie in files of their own.
    pub(super) fn extents(&self) -> &[ExtentLine] {
        match (&self.descriptor, &self.sparse) {
            (Some((descriptor, _)), None) => &descriptor.extents,
            _ => &[],
        }
    }
}

fn parse(image: &ImageFile, text: &[u8]) -> Result<Descriptor, OpenError> {
    Descriptor::parse(text).map_err(|wrong| match wrong {
        Wrong::Corrupt(what) => OpenError::corrupt(image.path(), what),
        Wrong::Unsupported(feature) => OpenError::Unsupported {
            path: image.path().to_owned(),
            feature,
            hint: "convert it with VMware's vmware-vdiskmanager or vmkfstools",
        },
    })
}

pub(super) fn open(mut opening: Opening<'_>) -> Result<Vmdk, OpenError> {
    let head = Head::read(&opening.image)?;
    let path = opening.image.path().to_owned();
    let backing = match &head.descriptor {
        Some((Descriptor { parent: Some(name), parent_cid, .. }, _)) => {
            let node = opening.open_below(Some((name, Some("vmdk"))))?;
            let found = node.as_ref().and_then(|node| node.of::<Vmdk>()).and_then(Vmdk::content_id);
            if node.is_some() && found != Some(*parent_cid) {
                let what = "its parent was written since this image was made on it";
                return Err(OpenError::corrupt(&path, what));
            }
            node
        }
        _ => None,
    };
    let cid = head.descriptor.as_ref().map(|(descriptor, start)| ContentId {
        value: descriptor.cid,
        at: start + descriptor.cid_at.start as u64..start + descriptor.cid_at.end as u64,
    });
    let mut pieces = Vec::new();
    let lines = head.extents();
    let sparse = lines.iter().filter(|line| line.kind == ExtentKind::Sparse).count();
    let memory = opening.table_cache() / sparse.max(1);
    let mut start: u64 = 0;
    for line in lines {
        let (part, size) = open_extent(&mut opening, line, memory)?;
        pieces.push(Piece { start, part, writable: line.writable });
        start = start
            .checked_add(size)
            .filter(|&end| i64::try_from(end).is_ok())
            .ok_or_else(|| OpenError::corrupt(&path, "its extents are more than a disk can have"))?;
    }
    let whole = match head.sparse {
        Some(header) => Some((writable(&opening, &opening.image, &header)?, header)),
        None => None,
    };
    let options = opening.options;
    let file = Rc::new(opening.storage()?);
    if let Some((directories, header)) = whole {
        let size = header.size;
        let grains = Grains::new(Rc::clone(&file), header, directories, memory);
        let part = Part::Sparse(Box::new(Blocks::new(grains, size, options)));
        pieces.push(Piece { start: 0, part, writable: true });
    }
    let (started, starting) = (Cell::new(false), RangeLock::default());
    Ok(Vmdk { file, pieces, backing, cid, started, starting })
}

type Directories = (Vec<u32>, Option<Vec<u32>>);

/// The directories of a sparse extent that may be opened as is wanted.
fn writable(
    opening: &Opening<'_>,
    image: &ImageFile,
    header: &SparseHeader,
) -> Result<Directories, OpenError> {
    if let Some(feature) = header.read_only_reason().filter(|_| opening.writing) {
        return Err(OpenError::Unsupported {
            path: image.path().to_owned(),
            feature: feature.into(),
            hint: "open it with readonly=on, or convert it",
        });
    }
    header.directories(image)
}

/// Opens an extent in a file of its own: what it is, and its bytes.
fn open_extent(
    opening: &mut Opening<'_>,
    line: &ExtentLine,
    memory: usize,
) -> Result<(Part, u64), OpenError> {
    let size = line.sectors * SECTOR;
    if line.kind == ExtentKind::Zero {
        return Ok((Part::Zero { size }, size));
    }
    let path = opening.image.path().to_owned();
    let image = opening.open_part(&line.name).map_err(|error| match error {
        OpenError::BackingCycle { .. } => {
            OpenError::corrupt(&path, format!("two of its extents are in {:?}", line.name))
        }
        other => other,
    })?;
    let options = opening.options;
    let engine = opening.engine;
    if let ExtentKind::Flat { start } = line.kind {
        let end = start.checked_mul(SECTOR).and_then(|start| start.checked_add(size));
        if end.is_none_or(|end| end > image.len()) {
            let what = format!("it has {} bytes, its image needs {size} from sector {start} on", image.len());
            return Err(OpenError::truncated(image.path(), what));
        }
        let file = image.into_storage(engine, options.cache)?;
        return Ok((Part::Flat(Flat::new(file, start * SECTOR, size, options.discard)), size));
    }
    if !image.head()?.starts_with(MAGIC) {
        return Err(OpenError::corrupt(image.path(), "it is no sparse VMDK extent"));
    }
    let header = SparseHeader::read(&image)?;
    let directories = writable(opening, &image, &header)?;
    let size = header.size;
    let file = Rc::new(image.into_storage(engine, options.cache)?);
    let grains = Grains::new(file, header, directories, memory);
    Ok((Part::Sparse(Box::new(Blocks::new(grains, size, options))), size))
}
