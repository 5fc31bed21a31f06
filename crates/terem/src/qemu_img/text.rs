//! The small languages of qemu-img: sizes, option lists, JSON as it prints it.

use super::Failed;
use serde::Serialize;
use terem_block::Format;

/// A number of bytes: decimal or hexadecimal, perhaps with a fraction, and with a suffix of `bkKMGTPE`.
pub fn size(text: &str) -> Result<u64, Failed> {
    let wrong =
        || Failed::new(format!("Invalid size '{text}'; it is a number with an optional suffix of bkKMGTPE"));
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).map_err(|_| wrong());
    }
    let (number, shift) = match text.char_indices().last() {
        Some((at, suffix)) if suffix.is_ascii_alphabetic() => {
            let power = "bkmgtpe".find(suffix.to_ascii_lowercase()).ok_or_else(wrong)?;
            (&text[..at], 10 * power)
        }
        _ => (text, 0),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let unit = 1u128 << shift;
    let whole = if whole.is_empty() && !fraction.is_empty() {
        0
    } else {
        whole.parse::<u64>().map_err(|_| wrong())?
    };
    let mut bytes = u128::from(whole) * unit;
    if !fraction.is_empty() {
        let digits = &fraction[..fraction.len().min(18)];
        let part: u64 = digits.parse().map_err(|_| wrong())?;
        bytes += u128::from(part) * unit / 10u128.pow(u32::try_from(digits.len()).unwrap_or(0));
    }
    u64::try_from(bytes).ok().filter(|&bytes| i64::try_from(bytes).is_ok()).ok_or_else(wrong)
}

/// The items of `name=value,name=value`; a comma in a value is doubled. A name alone is `on`.
pub fn options(text: &str) -> Vec<(String, String)> {
    let mut items = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        if c != ',' {
            items.last_mut().unwrap_or(&mut String::new()).push(c);
        } else if rest.peek() == Some(&',') {
            rest.next();
            items.last_mut().unwrap_or(&mut String::new()).push(',');
        } else {
            items.push(String::new());
        }
    }
    let pair = |item: String| match item.split_once('=') {
        Some((name, value)) => (name.to_owned(), value.to_owned()),
        None => (item, "on".to_owned()),
    };
    items.into_iter().filter(|item| !item.is_empty()).map(pair).collect()
}

/// The items of all `-o` of a command line, which must be lists.
pub fn option_items(lists: &[String]) -> Result<Vec<(String, String)>, Failed> {
    let mut items = Vec::new();
    for list in lists {
        // Put together by commas they must not run into each other.
        let trailing = list.bytes().rev().take_while(|&b| b == b',').count();
        let leading = list.bytes().take_while(|&b| b == b',').count();
        if list.is_empty() || trailing % 2 == 1 || leading > 0 {
            return Err(Failed::new(format!("Invalid option list: {list}")));
        }
        items.append(&mut options(list));
    }
    Ok(items)
}

/// The name that qemu-img has for a format.
pub fn format_name(format: Format) -> &'static str {
    match format.name() {
        "vhd" => "vpc",
        name => name,
    }
}

/// JSON with an indentation of four, and a line's end.
pub fn json(value: &impl Serialize) -> Result<String, Failed> {
    let mut bytes = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    value.serialize(&mut serializer).map_err(Failed::new)?;
    bytes.push(b'\n');
    String::from_utf8(bytes).map_err(Failed::new)
}

/// A size as qemu-img prints it: three digits, `1 MiB`, `28.5 KiB`.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    // Up a unit from 1000 on, so that three digits are enough.
    let (mut unit, mut divisor) = (0, 1u128);
    while u128::from(bytes) >= 1000 * divisor && unit + 1 < UNITS.len() {
        unit += 1;
        divisor <<= 10;
    }
    // Thousandths, rounded to three significant digits.
    let thousandths = u128::from(bytes) * 1000 / divisor;
    let step = match thousandths {
        0..10_000 => 10,
        10_000..100_000 => 100,
        _ => 1000,
    };
    let rounded = (thousandths + step / 2) / step * step;
    let (whole, fraction) = (rounded / 1000, rounded % 1000);
    let number = if fraction == 0 { whole.to_string() } else { format!("{whole}.{fraction:03}") };
    let number = if number.contains('.') { number.trim_end_matches('0') } else { &number };
    format!("{number} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let read = |text| size(text).ok();
        assert_eq!(read("1024"), Some(1024));
        assert_eq!(read("1.5G"), Some(3 << 29));
        assert_eq!(read("0x200"), Some(512));
        assert_eq!((read("7b"), read("2T"), read(".5k")), (Some(7), Some(2 << 40), Some(512)));
        for bad in ["", "x", "-1", "1Q", "9E", "1..2", "k"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn option_lists() {
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(options("a=1,b=x,,y,c"), [pair("a", "1"), pair("b", "x,y"), pair("c", "on")]);
    }

    #[test]
    fn sizes_for_people() {
        for (bytes, text) in
            [(0, "0 B"), (29184, "28.5 KiB"), (1 << 20, "1 MiB"), (197_120, "193 KiB"), (1000, "0.98 KiB")]
        {
            assert_eq!(human(bytes), text);
        }
    }
}
