//! What can be chosen for a new image.

use crate::CreateOptions;
use crate::format::{CreateOption, flag};

/// How a disk lies in its files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum VmdkSubformat {
    /// One file that grows.
    #[default]
    MonolithicSparse,
    /// A descriptor, and a file with the disk's bytes.
    MonolithicFlat,
    /// A descriptor, and files that grow, for 2 GiB of the disk each.
    TwoGbMaxExtentSparse,
    /// A descriptor, and files with 2 GiB of the disk's bytes each.
    TwoGbMaxExtentFlat,
    /// One file with compressed grains.
    StreamOptimized,
}

impl VmdkSubformat {
    const ALL: [Self; 5] = [
        Self::MonolithicSparse,
        Self::MonolithicFlat,
        Self::TwoGbMaxExtentSparse,
        Self::TwoGbMaxExtentFlat,
        Self::StreamOptimized,
    ];

    /// The name in descriptors and options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::MonolithicSparse => "monolithicSparse",
            Self::MonolithicFlat => "monolithicFlat",
            Self::TwoGbMaxExtentSparse => "twoGbMaxExtentSparse",
            Self::TwoGbMaxExtentFlat => "twoGbMaxExtentFlat",
            Self::StreamOptimized => "streamOptimized",
        }
    }

    /// Whether the disk's bytes lie in the files as they are.
    pub(super) fn is_flat(self) -> bool {
        matches!(self, Self::MonolithicFlat | Self::TwoGbMaxExtentFlat)
    }

    /// Whether the disk is in pieces of 2 GiB.
    pub(super) fn is_split(self) -> bool {
        matches!(self, Self::TwoGbMaxExtentSparse | Self::TwoGbMaxExtentFlat)
    }
}

/// What can be chosen for a new VMDK image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmdkOptions {
    /// How the disk lies in its files.
    pub subformat: VmdkSubformat,
    /// The adapter that the disk is for: `ide`, `lsilogic`, `buslogic` or `legacyESX`.
    pub adapter_type: String,
    /// Version of the virtual hardware.
    pub hw_version: String,
    /// Version of VMware's tools in the guest.
    pub tools_version: String,
    /// Whether grains can be marked as zero (version 2 of the sparse extents).
    pub zeroed_grain: bool,
}

impl Default for VmdkOptions {
    fn default() -> Self {
        Self {
            subformat: VmdkSubformat::default(),
            adapter_type: "ide".into(),
            hw_version: "4".into(),
            tools_version: "2147483647".into(),
            zeroed_grain: false,
        }
    }
}

pub(super) const OPTIONS: &[CreateOption] = &[
    CreateOption {
        name: "subformat",
        help: "monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat or streamOptimized",
        set: |options: &mut CreateOptions, text| {
            let found = VmdkSubformat::ALL.into_iter().find(|subformat| subformat.name() == text);
            options.vmdk.subformat = found.ok_or("no such subformat")?;
            Ok(())
        },
    },
    CreateOption {
        name: "adapter_type",
        help: "ide, lsilogic, buslogic or legacyESX",
        set: |options: &mut CreateOptions, text| {
            if !matches!(text, "ide" | "lsilogic" | "buslogic" | "legacyESX") {
                return Err("ide, lsilogic, buslogic or legacyESX".into());
            }
            text.clone_into(&mut options.vmdk.adapter_type);
            Ok(())
        },
    },
    CreateOption {
        name: "hwversion",
        help: "version of the virtual hardware",
        set: |options: &mut CreateOptions, text| {
            options.vmdk.hw_version = number(text)?;
            Ok(())
        },
    },
    CreateOption {
        name: "toolsversion",
        help: "version of VMware's tools in the guest",
        set: |options: &mut CreateOptions, text| {
            options.vmdk.tools_version = number(text)?;
            Ok(())
        },
    },
    CreateOption {
        name: "compat6",
        help: "on: for virtual hardware of version 6",
        set: |options: &mut CreateOptions, text| {
            if flag(text)? {
                options.vmdk.hw_version = "6".into();
            }
            Ok(())
        },
    },
    CreateOption {
        name: "zeroed_grain",
        help: "on: mark grains of zeroes instead of writing them",
        set: |options: &mut CreateOptions, text| {
            options.vmdk.zeroed_grain = flag(text)?;
            Ok(())
        },
    },
];

fn number(text: &str) -> Result<String, String> {
    match text.parse::<u32>() {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err(format!("{text} is no version")),
    }
}
