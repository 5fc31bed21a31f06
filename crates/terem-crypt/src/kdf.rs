//! From a passphrase to a key: PBKDF2 and Argon2, within bounds.
//!
//! A header from anywhere says how much work a guess at the passphrase is to cost. [`Limits`] bounds what it can make
//! us do, for one slot and for all slots of an image together.

use std::time::{Duration, Instant};

use argon2::{Algorithm, Argon2, Block, Params, Version};
use zeroize::Zeroize;

use crate::{CryptError, Hash};

/// Shortest salt of Argon2.
const MIN_SALT: usize = 8;
/// Most lanes of Argon2 (cryptsetup makes 4 at most).
const MAX_LANES: u32 = 64;
/// Iterations with which a measurement begins.
const FIRST_ITERATIONS: u32 = 1000;
/// Fewest iterations of a new key slot (as cryptsetup and QEMU).
pub(crate) const MIN_ITERATIONS: u32 = 1000;
/// Fewest passes of Argon2 over its memory (as cryptsetup).
const MIN_PASSES: u32 = 4;
/// Memory that Argon2 is to use in new slots, in KiB, if the host has twice as much (as cryptsetup).
const ARGON2_MEMORY: u32 = 1 << 20;
/// Least memory of Argon2, in KiB, in new slots whose cost is measured (as cryptsetup).
const MIN_ARGON2_MEMORY: u32 = 64 << 10;
/// Lanes of Argon2 in new slots, at most (as cryptsetup).
const ARGON2_LANES: u32 = 4;

/// What a header may cost. Each is far above what anybody's tools make: those take seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Iterations of one PBKDF2, times the blocks of its output.
    pub iterations: u64,
    /// KiB of memory of one Argon2.
    pub memory: u64,
    /// KiB of memory times passes of one Argon2.
    pub memory_passes: u64,
    /// How many such slots may be tried for one passphrase.
    pub slots: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { iterations: 200_000_000, memory: 4 << 20, memory_passes: 64 << 20, slots: 8 }
    }
}

/// What is left of the limits while the slots of an image are tried.
#[derive(Debug)]
pub(crate) struct Budget {
    limits: Limits,
    iterations: u64,
    memory_passes: u64,
}

impl Budget {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            iterations: limits.iterations.saturating_mul(limits.slots),
            memory_passes: limits.memory_passes.saturating_mul(limits.slots),
        }
    }

    fn take(left: &mut u64, work: u64, limit: u64, unit: &str) -> Result<(), CryptError> {
        if work > limit {
            return Err(CryptError::Limit(format!("{work} {unit} ({limit} are allowed)")));
        }
        *left = left.checked_sub(work).ok_or_else(|| {
            CryptError::Limit(format!("too much work in all its key slots together: {work} {unit} more"))
        })?;
        Ok(())
    }

    /// PBKDF2, if it may cost that much.
    pub(crate) fn pbkdf2(
        &mut self,
        hash: Hash,
        passphrase: &[u8],
        salt: &[u8],
        iterations: u32,
        out: &mut [u8],
    ) -> Result<(), CryptError> {
        if iterations == 0 {
            return Err(CryptError::corrupt("PBKDF2 with no iterations"));
        }
        let work = u64::from(iterations).saturating_mul(out.len().div_ceil(hash.size()) as u64);
        Self::take(&mut self.iterations, work, self.limits.iterations, "iterations of PBKDF2")?;
        hash.pbkdf2(passphrase, salt, iterations, out);
        Ok(())
    }
}

/// A key derivation with all its parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kdf {
    Pbkdf2 { hash: Hash, iterations: u32, salt: Vec<u8> },
    Argon2 { variant: Argon2Variant, passes: u32, memory: u32, lanes: u32, salt: Vec<u8> },
}

/// The two kinds of Argon2 in LUKS 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Argon2Variant {
    /// Memory is accessed in an order that does not depend on the passphrase.
    Argon2i,
    /// That in the first half of the first pass only.
    Argon2id,
}

impl Argon2Variant {
    /// Its name in headers.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Argon2i => "argon2i",
            Self::Argon2id => "argon2id",
        }
    }
}

impl Kdf {
    /// Derives a key of `out`'s length from the passphrase.
    pub(crate) fn derive(
        &self,
        passphrase: &[u8],
        budget: &mut Budget,
        out: &mut [u8],
    ) -> Result<(), CryptError> {
        match self {
            Self::Pbkdf2 { hash, iterations, salt } => {
                budget.pbkdf2(*hash, passphrase, salt, *iterations, out)
            }
            Self::Argon2 { variant, passes, memory, lanes, salt } => {
                let work = u64::from(*memory) * u64::from(*passes);
                let limits = budget.limits;
                if u64::from(*memory) > limits.memory {
                    return Err(CryptError::Limit(format!(
                        "{memory} KiB of memory for its key derivation ({} are allowed)",
                        limits.memory
                    )));
                }
                Budget::take(
                    &mut budget.memory_passes,
                    work,
                    limits.memory_passes,
                    "KiB times passes of Argon2",
                )?;
                argon2(*variant, passphrase, salt, (*memory, *passes, *lanes), out)
            }
        }
    }
}

/// Argon2 with `cost` KiB, passes and lanes.
fn argon2(
    variant: Argon2Variant,
    passphrase: &[u8],
    salt: &[u8],
    cost: (u32, u32, u32),
    out: &mut [u8],
) -> Result<(), CryptError> {
    let (memory, passes, lanes) = cost;
    let bad = || {
        CryptError::corrupt(format!(
            "{} with {memory} KiB, {passes} passes, {lanes} lanes and {} bytes of salt",
            variant.name(),
            salt.len()
        ))
    };
    if salt.len() < MIN_SALT || lanes > MAX_LANES {
        return Err(bad());
    }
    let params = Params::new(memory, passes, lanes, Some(out.len())).map_err(|_| bad())?;
    let algorithm = match variant {
        Argon2Variant::Argon2i => Algorithm::Argon2i,
        Argon2Variant::Argon2id => Algorithm::Argon2id,
    };
    if u64::from(memory) > host_memory_kib("MemAvailable:").unwrap_or(u64::MAX) {
        return Err(CryptError::Memory(memory.into()));
    }
    let blocks = params.block_count();
    let mut work: Vec<Block> = Vec::new();
    work.try_reserve_exact(blocks).map_err(|_| CryptError::Memory(memory.into()))?;
    work.resize(blocks, Block::default());
    let derived = Argon2::new(algorithm, Version::V0x13, params).hash_password_into_with_memory(
        passphrase,
        salt,
        out,
        &mut work[..],
    );
    for block in &mut work {
        block.zeroize();
    }
    derived.map_err(|_| bad())
}

/// What a guess at a new key slot's passphrase is to cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    /// So much time on this machine.
    Time(Duration),
    /// PBKDF2 with so many iterations (1000 at the least).
    Iterations(u32),
    /// Argon2 with these numbers.
    Argon2 {
        /// KiB of memory.
        memory: u32,
        /// Passes over it.
        passes: u32,
        /// Lanes that can be computed side by side.
        lanes: u32,
    },
}

impl Default for Cost {
    /// Two seconds, as cryptsetup and QEMU.
    fn default() -> Self {
        Self::Time(Duration::from_secs(2))
    }
}

/// How many iterations of PBKDF2 for a key of `len` bytes take `time` here.
pub(crate) fn measure_pbkdf2(hash: Hash, len: usize, time: Duration) -> u32 {
    let mut out = vec![0; len];
    let mut iterations = FIRST_ITERATIONS;
    loop {
        let start = Instant::now();
        hash.pbkdf2(b"passphrase", b"salt of 16 bytes", iterations, &mut out);
        let took = start.elapsed();
        if took >= Duration::from_millis(50).min(time) || iterations >= 1 << 28 {
            let scaled = f64::from(iterations) * time.as_secs_f64() / took.as_secs_f64().max(1e-9);
            return whole(scaled).clamp(MIN_ITERATIONS, 100_000_000);
        }
        iterations = iterations.saturating_mul(4);
    }
}

/// KiB, passes and lanes of an Argon2 that takes `time` here.
pub(crate) fn measure_argon2(variant: Argon2Variant, time: Duration) -> Result<(u32, u32, u32), CryptError> {
    let lanes = std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1));
    let lanes = lanes.clamp(1, ARGON2_LANES);
    let most = (host_memory_kib("MemTotal:").unwrap_or(0) / 2)
        .clamp(u64::from(MIN_ARGON2_MEMORY), ARGON2_MEMORY.into());
    let most = u32::try_from(most).unwrap_or(MIN_ARGON2_MEMORY);
    let start = Instant::now();
    argon2(variant, b"passphrase", &[7; 32], (MIN_ARGON2_MEMORY, MIN_PASSES, lanes), &mut [0; 64])?;
    let scale = time.as_secs_f64() / start.elapsed().as_secs_f64().max(1e-9);
    let memory = whole(f64::from(MIN_ARGON2_MEMORY) * scale).clamp(MIN_ARGON2_MEMORY, most);
    // What memory does not take of the time goes into passes.
    let left = scale * f64::from(MIN_ARGON2_MEMORY) / f64::from(memory);
    Ok((memory, whole(f64::from(MIN_PASSES) * left).clamp(MIN_PASSES, 1000), lanes))
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float cast saturates")]
fn whole(n: f64) -> u32 {
    n as u32
}

/// A line of `/proc/meminfo`.
fn host_memory_kib(name: &str) -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn published_vectors() {
        let mut out = [0; 20];
        // RFC 6070.
        Hash::Sha1.pbkdf2(b"password", b"salt", 4096, &mut out);
        assert_eq!(hex(&out), "4b007901b765489abead49d926f721d065a429c1");
        // RFC 7914, 11.
        let mut out = [0; 64];
        Hash::Sha256.pbkdf2(b"passwd", b"salt", 1, &mut out);
        assert!(hex(&out).starts_with("55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc"));
        // The reference implementation's own test: argon2i and argon2id, 2 passes, 64 MiB, 1 lane.
        for (variant, passphrase, lanes, expected) in [
            (
                Argon2Variant::Argon2i,
                &b"password"[..],
                1,
                "c1628832147d9720c5bd1cfd61367078729f6dfb6f8fea9ff98158e0d7816ed0",
            ),
            (
                Argon2Variant::Argon2id,
                b"password",
                1,
                "09316115d5cf24ed5a15a31a3ba326e5cf32edc24702987c02b6566f61913cf7",
            ),
        ] {
            let mut out = [0; 32];
            argon2(variant, passphrase, b"somesalt", (65536, 2, lanes), &mut out).unwrap();
            assert_eq!(hex(&out), expected, "{}", variant.name());
        }
    }

    #[test]
    fn hostile_costs_are_refused_before_any_work() {
        let mut budget = Budget::new(Limits::default());
        let mut out = [0; 64];
        let salt = vec![1; 32];
        let pbkdf2 = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: u32::MAX, salt: salt.clone() };
        assert!(matches!(pbkdf2.derive(b"x", &mut budget, &mut out), Err(CryptError::Limit(_))));
        for (memory, passes, lanes) in [(u32::MAX, 1, 1), (4 << 20, 1000, 1), (8, u32::MAX, 1)] {
            let kdf =
                Kdf::Argon2 { variant: Argon2Variant::Argon2i, passes, memory, lanes, salt: salt.clone() };
            let e = kdf.derive(b"x", &mut budget, &mut out).unwrap_err();
            assert!(matches!(e, CryptError::Limit(_)), "{e}");
        }
        for (memory, passes, lanes, salt) in [
            (8, 1, 100, &salt[..]),
            (8, 0, 1, &salt),
            (8, 1, 0, &salt),
            (1, 1, 1, &salt),
            (8, 1, 1, b"short"),
        ] {
            let kdf =
                Kdf::Argon2 { variant: Argon2Variant::Argon2id, passes, memory, lanes, salt: salt.to_vec() };
            let e = kdf.derive(b"x", &mut budget, &mut out).unwrap_err();
            assert!(matches!(e, CryptError::Corrupt(_)), "{e}");
        }
    }

    #[test]
    fn all_slots_together_are_bounded_too() {
        let limits = Limits { iterations: 1000, slots: 2, ..Limits::default() };
        let mut budget = Budget::new(limits);
        let kdf = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 1000, salt: vec![1; 32] };
        let mut out = [0; 32];
        assert!(kdf.derive(b"x", &mut budget, &mut out).is_ok());
        assert!(kdf.derive(b"x", &mut budget, &mut out).is_ok());
        assert!(matches!(kdf.derive(b"x", &mut budget, &mut out), Err(CryptError::Limit(_))));
    }
}
