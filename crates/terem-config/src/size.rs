//! Sizes in bytes, written with a binary unit: `512M`, `4G`, `1T`.

use crate::text::{TextError, text_type};
use std::fmt;
use std::str::FromStr;

const EXPECTED: &str = "a whole number with a unit K, M, G, T or P (powers of 1024), such as 512M or 4G";

/// A number of bytes. Reads `4096`, `512M`, `4G`, `4GiB` (units are powers of 1024); prints the largest unit that is exact.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// Kibibytes.
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }

    /// Mebibytes.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// Gibibytes.
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(TextError::new("it is no size", EXPECTED));
        }
        let shift = match unit.to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            "K" | "KB" | "KIB" => 10,
            "M" | "MB" | "MIB" => 20,
            "G" | "GB" | "GIB" => 30,
            "T" | "TB" | "TIB" => 40,
            "P" | "PB" | "PIB" => 50,
            _ => return Err(TextError::new(format!("`{unit}` is no unit of size"), EXPECTED)),
        };
        number
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(1 << shift))
            .map(Self)
            .ok_or_else(|| TextError::new("it is beyond 64 bits", EXPECTED))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(50, "P"), (40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

text_type!(
    ByteSize,
    "ByteSize",
    "^[0-9]+([KkMmGgTtPp]([iI]?[bB])?|[bB])?$",
    "A size: a whole number with a unit K, M, G, T or P (powers of 1024), such as 512M or 4G"
);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn units_are_powers_of_1024() {
        for (text, bytes) in
            [("0", 0), ("512", 512), ("1k", 1024), ("512M", 512 << 20), ("4GiB", 4 << 30), ("1T", 1 << 40)]
        {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "M", "-1M", "1.5G", "4X", "4 G", "18446744073709551616", "16777216T", "1²"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        assert_eq!(
            "4X".parse::<ByteSize>().unwrap_err().to_string(),
            "`X` is no unit of size; expected a whole number with a unit K, M, G, T or P (powers of 1024), such as 512M or 4G"
        );
    }

    proptest! {
        #[test]
        fn print_and_parse(bytes: u64, shift in 0u32..64) {
            let size = ByteSize(bytes >> shift << (shift % 51));
            prop_assert_eq!(size.to_string().parse(), Ok(size));
        }
    }
}
