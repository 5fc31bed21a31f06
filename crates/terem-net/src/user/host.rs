//! What the host tells about its own network: name servers, and whether IPv6 leads anywhere.

use std::net::{IpAddr, SocketAddr};

const RESOLV_CONF: &str = "/etc/resolv.conf";
const ROUTES6: &str = "/proc/net/ipv6_route";
const DNS_PORT: u16 = 53;

/// The host's first name server, as it is now (resolv.conf(5)).
pub(super) fn name_server() -> Option<SocketAddr> {
    first_server(&std::fs::read_to_string(RESOLV_CONF).ok()?)
}

fn first_server(text: &str) -> Option<SocketAddr> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let address = words.next().filter(|&word| word == "nameserver").and_then(|_| words.next())?;
        Some(SocketAddr::new(address.parse::<IpAddr>().ok()?, DNS_PORT))
    })
}

/// Does the host have a default route for IPv6?
pub(super) fn has_ipv6() -> bool {
    default_route6(&std::fs::read_to_string(ROUTES6).unwrap_or_default())
}

/// The kernel's table: destination, its length, source, its length, next hop, metric, two counters, flags, interface.
fn default_route6(table: &str) -> bool {
    /// RTF_REJECT of linux/route.h: a route that leads nowhere.
    const REJECT: u32 = 0x200;
    table.lines().any(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        columns.len() > 9
            && columns[0].bytes().all(|digit| digit == b'0')
            && columns[1] == "00"
            && columns[9] != "lo"
            && u32::from_str_radix(columns[8], 16).is_ok_and(|flags| flags & REJECT == 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_first_name_server() {
        let text = "# nameserver 1.1.1.1\nsearch example.org\nnameserver nonsense\nnameserver  9.9.9.9 # x\n";
        assert_eq!(first_server(text), Some("9.9.9.9:53".parse().unwrap()));
        assert_eq!(first_server("nameserver fd00::1"), Some("[fd00::1]:53".parse().unwrap()));
        assert_eq!(first_server("nameserver"), None);
    }

    #[test]
    fn finds_a_default_route() {
        let lo = "00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
            00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo\n";
        let wlan = "00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
            fd000000000000000000000000000001 00000400 00000001 00000000 00000003    wlan0\n";
        assert!(!default_route6(""));
        assert!(!default_route6(lo));
        assert!(default_route6(&format!("{lo}{wlan}")));
    }
}
