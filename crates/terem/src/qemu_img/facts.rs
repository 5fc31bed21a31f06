//! What only one format has, as `info` prints it.

use super::describe::Described;
use serde_json::{Map, Value, json as value};
use std::fmt::Write;
use terem_block::{EncryptionInfo, Format, LuksInfo, Qcow2Info, VmdkInfo, beside};

/// The order in which qemu-img prints facts for people.
const ORDER: [&str; 35] = [
    "compat",
    "compression-type",
    "lazy-refcounts",
    "bitmaps",
    "refcount-bits",
    "encrypt",
    "data-file",
    "data-file-raw",
    "corrupt",
    "extended-l2",
    "cid",
    "parent-cid",
    "create-type",
    "extents",
    "compressed",
    "virtual-size",
    "ivgen-alg",
    "detached-header",
    "hash-alg",
    "cipher-alg",
    "uuid",
    "ivgen-hash-alg",
    "filename",
    "cluster-size",
    "format",
    "cipher-mode",
    "slots",
    "payload-offset",
    "master-key-iters",
    "active",
    "iters",
    "key-offset",
    "stripes",
    "flags",
    "name",
];

/// What is printed as `format-specific`.
pub fn format_specific(described: &Described) -> Option<Map<String, Value>> {
    let info = &described.info;
    let facts = if let Some(qcow2) = &info.qcow2 {
        qcow2_facts(qcow2, info.encryption.as_ref())
    } else if let Some(vmdk) = &info.vmdk {
        vmdk_facts(vmdk, described)
    } else if info.format == Format::Luks {
        luks_facts(info.encryption.as_ref()?.luks.as_ref()?)
    } else {
        return None;
    };
    match facts {
        Value::Object(facts) => Some(facts),
        _ => None,
    }
}

fn qcow2_facts(qcow2: &Qcow2Info, encryption: Option<&EncryptionInfo>) -> Value {
    let mut facts = if qcow2.version < 3 {
        value!({ "compat": "0.10", "compression-type": qcow2.compression_type, "refcount-bits": qcow2.refcount_bits })
    } else {
        value!({
            "compat": "1.1", "compression-type": qcow2.compression_type, "lazy-refcounts": qcow2.lazy_refcounts,
            "refcount-bits": qcow2.refcount_bits, "corrupt": qcow2.corrupt, "extended-l2": qcow2.extended_l2,
        })
    };
    if let Some(encryption) = encryption {
        let mut encrypt = encryption.luks.as_ref().map_or_else(|| value!({}), luks_facts);
        encrypt["format"] = encryption.method.into();
        facts["encrypt"] = encrypt;
    }
    if !qcow2.bitmaps.is_empty() {
        facts["bitmaps"] = qcow2
            .bitmaps
            .iter()
            .map(|bitmap| {
                let flags = [(bitmap.in_use, "in-use"), (bitmap.enabled, "auto")];
                let flags: Vec<_> = flags.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect();
                value!({ "name": bitmap.name, "granularity": bitmap.granularity, "flags": flags })
            })
            .collect();
    }
    if let Some(name) = &qcow2.data_file {
        facts["data-file"] = value!(name);
        facts["data-file-raw"] = qcow2.data_file_raw.into();
    }
    facts
}

fn vmdk_facts(vmdk: &VmdkInfo, described: &Described) -> Value {
    let extents: Vec<Value> = vmdk
        .extents
        .iter()
        .map(|extent| {
            // QEMU gives the extent in the image's own file no format.
            let own = extent.filename.is_empty();
            let file = match own {
                true => described.name.clone().into(),
                false => beside(&described.info.filename, &extent.filename),
            };
            let format = if own { "" } else { &extent.format };
            let mut facts =
                value!({ "virtual-size": extent.virtual_size, "filename": file, "format": format });
            if let Some(size) = extent.cluster_size {
                facts["cluster-size"] = size.into();
            }
            if extent.compressed {
                facts["compressed"] = true.into();
            }
            facts
        })
        .collect();
    value!({
        "cid": vmdk.cid, "parent-cid": vmdk.parent_cid, "create-type": vmdk.create_type, "extents": extents,
    })
}

fn luks_facts(luks: &LuksInfo) -> Value {
    // `aes-xts-plain64`, `aes-cbc-essiv:sha256`.
    let mut words = luks.cipher.splitn(3, '-');
    let (cipher, mode) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (iv, iv_hash) = match words.next().unwrap_or_default().split_once(':') {
        Some((iv, hash)) => (iv.to_owned(), Some(hash.to_owned())),
        None => (luks.cipher.rsplit('-').next().unwrap_or_default().to_owned(), None),
    };
    let bits = if mode == "xts" { luks.key_bits / 2 } else { luks.key_bits };
    let mut facts = value!({
        "cipher-alg": format!("{cipher}-{bits}"), "cipher-mode": mode, "ivgen-alg": iv, "hash-alg": luks.hash,
        "uuid": luks.uuid, "payload-offset": luks.payload_offset, "detached-header": false,
    });
    if let Some(hash) = iv_hash {
        facts["ivgen-hash-alg"] = hash.into();
    }
    if let Some(header) = &luks.luks1 {
        facts["master-key-iters"] = header.digest_iterations.into();
        let slot = |(used, offset): &(Option<(u32, u32)>, u64)| match used {
            Some((iterations, stripes)) => {
                value!({ "active": true, "iters": iterations, "stripes": stripes, "key-offset": offset })
            }
            None => value!({ "active": false, "key-offset": offset }),
        };
        facts["slots"] = header.slots.iter().map(slot).collect();
    } else {
        facts["slots"] = luks
            .slots
            .iter()
            .map(|slot| value!({ "active": true, "iters": slot.iterations, "key-offset": slot.offset }))
            .collect();
    }
    facts
}

/// Writes facts as indented lines.
pub fn people(text: &mut String, facts: &Map<String, Value>, depth: usize) {
    let mut facts: Vec<_> = facts.iter().collect();
    facts.sort_by_key(|(name, _)| ORDER.iter().position(|known| known == name).unwrap_or(ORDER.len()));
    for (name, value) in facts {
        let (indent, name) = ("    ".repeat(depth), name.replace('-', " "));
        match value {
            Value::String(value) => {
                let _ = writeln!(text, "{indent}{name}: {value}");
            }
            Value::Object(inner) => {
                let _ = writeln!(text, "{indent}{name}:");
                people(text, inner, depth + 1);
            }
            Value::Array(items) => {
                let _ = writeln!(text, "{indent}{name}:");
                for (i, item) in items.iter().enumerate() {
                    if let Value::Object(item) = item {
                        let _ = writeln!(text, "{indent}    [{i}]:");
                        people(text, item, depth + 2);
                    } else {
                        let _ = writeln!(text, "{indent}    [{i}]: {}", item.as_str().unwrap_or_default());
                    }
                }
            }
            value => {
                let _ = writeln!(text, "{indent}{name}: {value}");
            }
        }
    }
}
