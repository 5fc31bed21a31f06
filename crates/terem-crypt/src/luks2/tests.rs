//! Metadata that contradict themselves or ask for too much.

use serde_json::{Value, json};

use super::binary::{Binary, LENGTH};
use crate::memory::Memory;
use crate::*;

/// An image whose JSON is `change`d, with right checksums.
fn image(change: impl Fn(&mut Value)) -> Memory {
    let options = Luks2Options {
        spec: CipherSpec::DEFAULT,
        key_len: 64,
        hash: Hash::Sha256,
        cost: Cost::Iterations(1000),
        sector_size: 512,
        data_offset: 512 << 10,
    };
    let area = Memory::new(vec![0; 512 << 10]);
    format_luks2(&area, &options, &Passphrase::new(b"one".to_vec())).unwrap();
    let mut bytes = area.bytes();
    for copy in 0..2 {
        let at = copy * 16384;
        let binary = Binary::parse(&bytes[at..at + LENGTH], copy, at as u64).unwrap();
        let text = bytes[at + LENGTH..at + 16384].split(|&b| b == 0).next().unwrap().to_vec();
        let mut json = serde_json::from_slice(&text).unwrap();
        change(&mut json);
        let mut text = json.to_string().into_bytes();
        text.resize(16384 - LENGTH, 0);
        bytes[at..at + 16384].copy_from_slice(&binary.encode(copy, &text).unwrap());
    }
    Memory::new(bytes)
}

fn open(area: &Memory) -> Result<(), CryptError> {
    let luks = Luks::read(area)?;
    let (key, _) = luks.unlock(area, &Passphrase::new(b"one".to_vec()), None, Limits::default())?;
    luks.cipher(&key).map(drop)
}

#[test]
fn the_unchanged_one_opens() {
    open(&image(|_| {})).unwrap();
    // Fields that nobody knows are nobody's business.
    open(&image(|json| json["config"]["flags"] = json!(["allow-discards"]))).unwrap();
    open(&image(|json| json["of our own"] = json!({ "a": [1, 2, 3] }))).unwrap();
}

#[test]
fn contradictions_and_demands_are_refused() {
    let cases: [(&str, Value, &str); 24] = [
        ("/segments/0/integrity", json!({ "type": "hmac(sha256)" }), "authenticated encryption"),
        ("/segments/0/type", json!("linear"), "data segment of type linear"),
        ("/segments/1", json!({ "type": "crypt" }), "several segments"),
        ("/segments/0/encryption", json!("cipher_null-ecb"), "cipher_null-ecb"),
        ("/segments/0/sector_size", json!(3), "sectors of 3 bytes"),
        ("/segments/0/sector_size", json!(1u64 << 40), "sectors of"),
        ("/segments/0/offset", json!("4096"), "reach into the data"),
        ("/segments/0/offset", json!("-1"), "offset of its data"),
        ("/segments/0/offset", json!("524289"), "begin and end with a sector"),
        ("/segments/0/size", json!("99999999999999999999"), "size of its data"),
        ("/config/requirements", json!({ "mandatory": ["opal"] }), "requires (opal)"),
        ("/config/requirements", json!({ "mandatory": ["online-reencrypt-v2"] }), "re-encryption"),
        ("/config/keyslots_size", json!("99999999"), "beyond the end"),
        ("/digests/0/type", json!("sha1"), "digest of type sha1"),
        ("/digests/0/segments", json!(["7"]), "no digest"),
        ("/digests/0/iterations", json!(u32::MAX), "iterations of PBKDF2"),
        ("/digests/0/salt", json!("not base64!"), "not base64"),
        ("/keyslots/0/kdf/iterations", json!(u32::MAX), "iterations of PBKDF2"),
        ("/keyslots/0/kdf/type", json!("scrypt"), "key derivation scrypt"),
        ("/keyslots/0/af/stripes", json!(u32::MAX), "stripes"),
        ("/keyslots/0/area/offset", json!("0"), "outside of its area"),
        ("/keyslots/0/area/size", json!("1000"), "larger than its area"),
        ("/keyslots/0/key_size", json!(1 << 20), "a key of"),
        ("/keyslots/77", json!({ "area": { "offset": "32768", "size": "4096" } }), "key slot 77"),
    ];
    for (place, value, expected) in cases {
        let (parent, name) = place.rsplit_once('/').unwrap();
        let area = image(|json| {
            json.pointer_mut(parent).unwrap()[name] = value.clone();
        });
        let error = open(&area).expect_err(place).to_string();
        assert!(error.contains(expected), "{place}: {error}");
    }
    let argon2 = |memory: u32, time: u32| {
        image(|json| {
            let kdf = &mut json["keyslots"]["0"]["kdf"];
            kdf["type"] = json!("argon2id");
            (kdf["memory"], kdf["time"], kdf["cpus"]) = (json!(memory), json!(time), json!(1));
        })
    };
    for (memory, time) in [(u32::MAX, 1), (64, u32::MAX), (4 << 20, 100)] {
        let error = open(&argon2(memory, time)).expect_err("too much");
        assert!(matches!(error, CryptError::Limit(_)), "{error}");
    }
}

/// A slot that cannot be used does not keep others from being used.
#[test]
fn slots_of_unknown_types_are_left_alone() {
    let area = image(|json| {
        json["keyslots"]["5"] = json!({
            "type": "of tomorrow", "key_size": 64, "area": { "type": "raw", "offset": "400000", "size": "4096" },
        });
        json["digests"]["0"]["keyslots"] = json!(["0", "5"]);
    });
    open(&area).unwrap();
    let mut luks = Luks::read(&area).unwrap();
    assert_eq!(luks.info().unwrap().slots.len(), 2);
    // It does not count as one that is left.
    assert!(matches!(luks.remove_key(&area, 0), Err(CryptError::LastSlot(0))));
}
