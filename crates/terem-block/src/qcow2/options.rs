//! What can be chosen for a new qcow2 image, as text.

use crate::encryption::QCOW2_OPTIONS as ENCRYPT;
use crate::format::{CreateOption, size};
use crate::{Compression, CreateOptions, Preallocation};

/// The options, by the names that QEMU gives them.
pub(super) static OPTIONS: [CreateOption; 16] = [
    CreateOption {
        name: "compat",
        help: "version of the format: v2 (0.10) or v3 (1.1)",
        set: |options: &mut CreateOptions, text| {
            options.qcow2.version = match text {
                "v2" | "0.10" => 2,
                "v3" | "1.1" => 3,
                _ => return Err("v2, v3, 0.10 or 1.1".into()),
            };
            Ok(())
        },
    },
    CreateOption {
        name: "cluster_size",
        help: "bytes of a cluster, a power of two from 512 to 2M",
        set: |options, text| {
            options.qcow2.cluster_size = u32::try_from(size(text)?).map_err(|_| "2M at most".to_owned())?;
            Ok(())
        },
    },
    CreateOption {
        name: "refcount_bits",
        help: "bits of a reference count, a power of two from 1 to 64",
        set: |options, text| {
            options.qcow2.refcount_bits = text.parse().map_err(|_| "a number".to_owned())?;
            Ok(())
        },
    },
    CreateOption {
        name: "lazy_refcounts",
        help: "on: let reference counts be behind while the image is open",
        set: |options, text| on_off(text).map(|on| options.qcow2.lazy_refcounts = on),
    },
    CreateOption {
        name: "extended_l2",
        help: "on: subclusters, a 32nd of a cluster each",
        set: |options, text| on_off(text).map(|on| options.qcow2.extended_l2 = on),
    },
    CreateOption {
        name: "compression_type",
        help: "method of compressed clusters: zlib or zstd",
        set: |options, text| {
            options.qcow2.compression = match text {
                "zlib" => Compression::Zlib,
                "zstd" => Compression::Zstd,
                _ => return Err("zlib or zstd".into()),
            };
            Ok(())
        },
    },
    CreateOption {
        name: "data_file",
        help: "a file beside the image that holds the data",
        set: |options, text| {
            options.qcow2.data_file = Some(text.to_owned());
            Ok(())
        },
    },
    CreateOption {
        name: "data_file_raw",
        help: "on: keep the data file readable as a raw image",
        set: |options, text| on_off(text).map(|on| options.qcow2.data_file_raw = on),
    },
    CreateOption {
        name: "preallocation",
        help: "what gets its place at once: off, metadata, falloc or full",
        set: |options, text| {
            options.preallocation =
                Preallocation::from_name(text).ok_or_else(|| "off, metadata, falloc or full".to_owned())?;
            Ok(())
        },
    },
    ENCRYPT[0],
    ENCRYPT[1],
    ENCRYPT[2],
    ENCRYPT[3],
    ENCRYPT[4],
    ENCRYPT[5],
    ENCRYPT[6],
];

fn on_off(text: &str) -> Result<bool, String> {
    match text {
        "on" | "true" | "yes" => Ok(true),
        "off" | "false" | "no" => Ok(false),
        _ => Err("on or off".into()),
    }
}
