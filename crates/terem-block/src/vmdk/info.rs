//! Facts about an image.

use std::os::unix::fs::MetadataExt;

use serde::Serialize;

use super::descriptor::{ExtentKind, NO_PARENT};
use super::open::Head;
use super::sparse::{SECTOR, SparseHeader};
use crate::chain::{ImageFile, resolve_backing};
use crate::{BackingPolicy, ImageInfo, OpenError};

/// Facts about a VMDK image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmdkInfo {
    /// The content ID, which changes when the image is written.
    pub cid: u32,
    /// The parent's content ID when this image was made; all ones: none.
    pub parent_cid: u32,
    /// How the disk lies in its files.
    pub create_type: String,
    /// The parent as written in the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// What the disk consists of.
    pub extents: Vec<VmdkExtent>,
}

/// A part of a VMDK disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmdkExtent {
    /// Its file as written in the image, or empty for the image's own and where there is none.
    pub filename: String,
    /// `FLAT`, `SPARSE` and so on, as in the descriptor.
    pub format: String,
    /// Its bytes of the disk.
    pub virtual_size: u64,
    /// Bytes of a grain, if it has such.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// Whether its grains are compressed.
    pub compressed: bool,
}

impl VmdkExtent {
    fn sparse(header: &SparseHeader, filename: &str) -> Self {
        Self {
            filename: filename.to_owned(),
            format: "SPARSE".into(),
            virtual_size: header.size,
            cluster_size: Some(header.grain),
            compressed: header.compressed,
        }
    }
}

/// The file of an extent. It may only be where a backing file may be.
pub(super) fn open_part(image: &ImageFile, name: &str, lock: bool) -> Result<ImageFile, OpenError> {
    let path = resolve_backing(image.path(), name, &BackingPolicy::SameDirectory)?;
    ImageFile::open(&path, false, lock, &mut Vec::new())
}

pub(super) fn describe(image: &ImageFile, info: &mut ImageInfo) -> Result<(), OpenError> {
    let head = Head::read(image)?;
    let mut extents: Vec<VmdkExtent> =
        head.sparse.iter().map(|header| VmdkExtent::sparse(header, "")).collect();
    for line in head.extents() {
        let flat = VmdkExtent {
            filename: line.name.clone(),
            format: line.kind_name.clone(),
            virtual_size: line.sectors * SECTOR,
            cluster_size: None,
            compressed: false,
        };
        if line.kind == ExtentKind::Zero {
            extents.push(flat);
            continue;
        }
        let part = open_part(image, &line.name, false)?;
        let meta =
            part.plain().metadata().map_err(|e| OpenError::io(part.path(), "looking at the image", e))?;
        info.actual_size += meta.blocks() * 512;
        extents.push(match line.kind {
            ExtentKind::Sparse => VmdkExtent::sparse(&SparseHeader::read(&part)?, &line.name),
            _ => flat,
        });
    }
    info.virtual_size = extents.iter().map(|extent| extent.virtual_size).fold(0, u64::saturating_add);
    info.cluster_size = extents.iter().find_map(|extent| extent.cluster_size);
    let (cid, parent_cid, create_type, parent) = match head.descriptor {
        Some((d, _)) => (d.cid, d.parent_cid, d.create_type, d.parent),
        None => (0, NO_PARENT, String::new(), None),
    };
    info.vmdk = Some(VmdkInfo { cid, parent_cid, create_type, parent, extents });
    Ok(())
}
