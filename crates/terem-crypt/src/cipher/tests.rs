use super::*;
use proptest::prelude::*;

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[i * 2..i * 2 + 2], 16).unwrap()).collect()
}

/// Encrypts 00 01 … ff twice, and compares with the first and last block expected.
fn check(spec: &str, key: &[u8], sector: u64, first: &str, last: &str) {
    let cipher = SectorCipher::new(CipherSpec::parse(spec).unwrap(), key, SECTOR).unwrap();
    let plain: Vec<u8> = (0..=255).chain(0..=255).collect();
    let mut data = plain.clone();
    cipher.encrypt(sector, &mut data);
    assert_eq!((&data[..16], &data[496..]), (&unhex(first)[..], &unhex(last)[..]), "{spec} {sector}");
    cipher.decrypt(sector, &mut data);
    assert_eq!(data, plain);
}

/// IEEE 1619-2007, annex B, vectors 4 and 10.
#[test]
fn xts_as_published() {
    let short = "2718281828459045235360287471352631415926535897932384626433832795";
    let long = "2718281828459045235360287471352662497757247093699959574966967627\
                3141592653589793238462643383279502884197169399375105820974944592";
    for (key, sector, first, last) in [
        (short, 0, "27a7479befa1d476489f308cd4cfa6e2", "0a282df920147beabe421ee5319d0568"),
        (long, 0xff, "1c3b3a102f770386e4836c99e370cf9b", "c4f36ffda9fcea70b9c6e693e148c151"),
    ] {
        check("aes-xts-plain64", &unhex(key), sector, first, last);
    }
}

/// Made with OpenSSL, sector 0x12_3456_789a.
#[test]
fn cbc_as_openssl() {
    let key: Vec<u8> = (0..32).collect();
    for (spec, len, first, last) in [
        ("aes-cbc-essiv:sha256", 32, "97be7e93b5e5a78d4148c8997838ac2c", "243096f9a5da121acf470359a4a7f996"),
        ("aes-cbc-plain64", 16, "d6891b3b8f1bdb9b523d68fe490fb9c6", "d07568ef198044c611072d145b4c221a"),
        ("aes-cbc-plain64", 24, "3c28c807b07f41db7497ede421817e5b", "4eb5ec28fd521b7efacb60fb6f931539"),
    ] {
        check(spec, &key[..len], 0x12_3456_789a, first, last);
    }
}

/// The modes as their definitions say, block by block.
fn by_definition<C: BlockCipher>(mode: Mode, key: &[u8], iv: [u8; 16], sector: &mut [u8]) {
    let xor = |a: &mut [u8], b: &[u8]| a.iter_mut().zip(b).for_each(|(a, b)| *a ^= b);
    match mode {
        Mode::Cbc => {
            let cipher = C::new_from_slice(key).unwrap();
            let mut chained = iv;
            for block in sector.chunks_mut(BLOCK) {
                xor(block, &chained);
                cipher.encrypt_block(block.try_into().unwrap());
                chained.copy_from_slice(block);
            }
        }
        Mode::Xts => {
            let (data, tweak) = key.split_at(key.len() / 2);
            let (data, tweak) = (C::new_from_slice(data).unwrap(), C::new_from_slice(tweak).unwrap());
            let mut t = Array(iv);
            tweak.encrypt_block(&mut t);
            for block in sector.chunks_mut(BLOCK) {
                xor(block, &t);
                data.encrypt_block(block.try_into().unwrap());
                xor(block, &t);
                let mut carry = 0;
                for byte in &mut t {
                    (*byte, carry) = (*byte << 1 | carry, *byte >> 7);
                }
                if carry == 1 {
                    t[0] ^= 0x87;
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Any number of sectors of any size at once is as one after the other by the definition, and comes back.
    #[test]
    fn many_sectors_at_once(
        which in 0usize..4,
        xts: bool,
        sector_bits in 9u32..=12,
        sectors in 0usize..150,
        first: u64,
        seed: [u8; 64],
    ) {
        let (algorithm, part) = [
            (Algorithm::Aes, 16), (Algorithm::Aes, 24), (Algorithm::Aes, 32), (Algorithm::Serpent, 32),
        ][which];
        let sectors = if which < 3 { sectors } else { sectors % 5 };
        let mode = if xts { Mode::Xts } else { Mode::Cbc };
        let key = &seed[..if xts { part * 2 } else { part }];
        let spec = CipherSpec { algorithm, mode, iv: IvGenerator::Plain64 };
        let size = 1usize << sector_bits;
        let cipher = SectorCipher::new(spec, key, size).unwrap();
        let plain: Vec<u8> = (0..sectors * size).map(|i| (i / 7) as u8 ^ seed[i % 64]).collect();
        let (mut data, mut expected) = (plain.clone(), plain.clone());
        cipher.encrypt(first, &mut data);
        for (i, sector) in expected.chunks_mut(size).enumerate() {
            let number = first.wrapping_add((i * size / SECTOR) as u64);
            let mut iv = [0; 16];
            iv[..8].copy_from_slice(&number.to_le_bytes());
            match (algorithm, part) {
                (Algorithm::Aes, 16) => by_definition::<Aes128>(mode, key, iv, sector),
                (Algorithm::Aes, 24) => by_definition::<Aes192>(mode, key, iv, sector),
                (Algorithm::Aes, _) => by_definition::<Aes256>(mode, key, iv, sector),
                (Algorithm::Serpent, _) => by_definition::<Serpent>(mode, key, iv, sector),
            }
        }
        prop_assert!(data == expected);
        cipher.decrypt(first, &mut data);
        prop_assert!(data == plain);
    }
}

#[test]
fn names() {
    for name in ["aes-xts-plain64", "serpent-cbc-essiv:sha256", "serpent-xts-plain", "aes-cbc-plain64be"] {
        assert_eq!(CipherSpec::parse(name).unwrap().to_string(), name);
    }
    for name in [
        "",
        "aes",
        "aes-xts",
        "des-cbc-plain",
        "aes-ecb",
        "aes-cbc-essiv:md5",
        "capi:xts(aes)-plain64",
        "a\n-b-c",
    ] {
        let error = CipherSpec::parse(name).unwrap_err();
        assert!(matches!(error, CryptError::Unsupported(_)), "{name}");
        assert!(!error.to_string().contains('\n'));
    }
    let xts = CipherSpec::DEFAULT;
    for len in [0, 16, 31, 40, 33, 128] {
        assert!(SectorCipher::new(xts, &vec![0; len], SECTOR).is_err(), "{len}");
    }
    for sector in [0, 256, 520, 8192, usize::MAX] {
        assert!(SectorCipher::new(xts, &[0; 64], sector).is_err(), "{sector}");
    }
}
