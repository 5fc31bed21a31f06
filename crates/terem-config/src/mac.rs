//! Ethernet addresses.

use crate::text::{TextError, text_type};
use std::fmt;
use std::str::FromStr;

const EXPECTED: &str = "six pairs of hexadecimal digits, such as 52:54:00:12:34:56";

/// An Ethernet address (IEEE 802, EUI-48), written `52:54:00:12:34:56`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Whether it names a group of stations (lowest bit of the first byte): no NIC can have such an address.
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl FromStr for MacAddress {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let wrong = || TextError::new("it is no Ethernet address", EXPECTED);
        let separator = if text.contains('-') { '-' } else { ':' };
        let mut bytes = [0; 6];
        let mut pairs = text.split(separator);
        for byte in &mut bytes {
            let pair = pairs.next().ok_or_else(wrong)?;
            if pair.len() != 2 || !pair.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
        }
        if pairs.next().is_some() { Err(wrong()) } else { Ok(Self(bytes)) }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

text_type!(
    MacAddress,
    "MacAddress",
    "^[0-9A-Fa-f]{2}([:-][0-9A-Fa-f]{2}){5}$",
    "An Ethernet address: six pairs of hexadecimal digits, such as 52:54:00:12:34:56"
);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:0:12:34:56",
            "52:54:00:12:34:g6",
            "+2:54:00:12:34:56",
        ] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
        assert_eq!("52-54-00-AB-cd-EF".parse(), Ok(MacAddress([0x52, 0x54, 0, 0xab, 0xcd, 0xef])));
    }

    proptest! {
        #[test]
        fn print_and_parse(bytes: [u8; 6]) {
            let mac = MacAddress(bytes);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
        }
    }
}
