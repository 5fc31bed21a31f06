//! How fast the ciphers are in memory, on one core: `cargo run --release -p terem-crypt --example speed [CIPHER
//! SECTOR]`: all, or one.

use std::time::Instant;

use terem_crypt::{CipherSpec, SectorCipher};

/// Bytes encrypted at once.
const PIECE: usize = 64 << 10;
/// Bytes in all.
const TOTAL: usize = 1 << 30;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let only: Vec<String> = std::env::args().skip(1).collect();
    println!("{:<28} {:>6} {:>14} {:>14}", "cipher", "sector", "encrypt GB/s", "decrypt GB/s");
    for (name, bits, sector) in [
        ("aes-xts-plain64", 256, 512),
        ("aes-xts-plain64", 512, 512),
        ("aes-xts-plain64", 512, 4096),
        ("aes-cbc-essiv:sha256", 256, 512),
        ("aes-cbc-plain64", 128, 512),
        ("serpent-xts-plain64", 512, 512),
    ] {
        if let [cipher, wanted, ..] = only.as_slice()
            && (cipher != name || bits != 512 || *wanted != sector.to_string())
        {
            continue;
        }
        let cipher = SectorCipher::new(CipherSpec::parse(name)?, &vec![7; bits / 8], sector)?;
        let mut data = vec![0; PIECE];
        let total = if name.starts_with("aes") { TOTAL } else { TOTAL / 16 };
        let mut rates = [0.0; 2];
        for (rate, decrypt) in rates.iter_mut().zip([false, true]) {
            let start = Instant::now();
            for i in 0..total / PIECE {
                let first = (i * PIECE / 512) as u64;
                if decrypt { cipher.decrypt(first, &mut data) } else { cipher.encrypt(first, &mut data) }
            }
            *rate = total as f64 / start.elapsed().as_secs_f64() / 1e9;
        }
        println!("{:<28} {sector:>6} {:>14.4} {:>14.4}", format!("{name} {bits}"), rates[0], rates[1]);
    }
    Ok(())
}
