//! How fast LUKS images are: `cargo run --release -p terem-block --example luks_speed [DIRECTORY]`.
//!
//! The same requests to a LUKS image and to a raw one in that directory (a tmpfs shows most), in GB/s; what the cipher
//! does in memory on one core, `cargo run --release -p terem-crypt --example speed` tells.

use std::path::Path;

use terem_block::{
    BenchOptions, Cost, CreateOptions, EncryptionOptions, Format, Keys, OpenOptions, Passphrase,
    Preallocation, bench, create,
};

/// Bytes of the disk.
const SIZE: u64 = 512 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = std::env::args().nth(1).unwrap_or_else(|| "/dev/shm".into());
    let keys = Keys::every(Passphrase::new(b"secret".to_vec()));
    println!("{:<8} {:<6} {:>9} {:>6} {:>10}", "image", "what", "bytes", "depth", "GB/s");
    for (name, format) in [("raw", Format::Raw), ("luks", Format::Luks)] {
        let path = Path::new(&directory).join(format!("luks_speed.{}.{name}", std::process::id()));
        let options = CreateOptions {
            encryption: EncryptionOptions { cost: Cost::Iterations(1000), ..EncryptionOptions::default() },
            keys: keys.clone(),
            preallocation: Preallocation::Full,
            ..CreateOptions::new(format, SIZE)
        };
        create(&path, &options)?;
        let open = OpenOptions { format: Some(format), keys: keys.clone(), ..OpenOptions::default() };
        for (size, depth, total) in [
            (1 << 20, 1, 2 << 30),
            (1 << 20, 8, 4 << 30),
            (2 << 20, 8, 4 << 30),
            (65536, 16, 1 << 30),
            (4096, 32, 256 << 20),
        ] {
            for write in [None, Some(7)] {
                let requests = BenchOptions {
                    count: total / size,
                    depth,
                    size: usize::try_from(size)?,
                    step: size,
                    write,
                    ..BenchOptions::default()
                };
                let took = bench(&path, &open, &requests)?;
                let what = if write.is_some() { "write" } else { "read" };
                let rate = total as f64 / took.as_secs_f64() / 1e9;
                println!("{name:<8} {what:<6} {size:>9} {depth:>6} {rate:>10.2}");
            }
        }
        std::fs::remove_file(&path)?;
    }
    Ok(())
}
