//! The small languages of qemu-img: sizes, option lists, JSON as it prints it.

use super::Failed;
use serde::Serialize;
use serde_json::Value;
use terem_block::Format;

/// A number of bytes: decimal or hexadecimal, perhaps with a fraction, and with a suffix of `bkKMGTPE`.
pub fn size(text: &str) -> Result<u64, Failed> {
    let bytes = terem_block::parse_size(text).ok().filter(|&bytes| i64::try_from(bytes).is_ok());
    bytes.ok_or_else(|| {
        Failed::new(format!("Invalid size '{text}'; it is a number with an optional suffix of bkKMGTPE"))
    })
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

/// The order in which qemu-img prints the members of an object; the rest comes before them, in alphabetical order.
const ORDER: [&str; 46] = [
    "icount",
    "vm-clock-nsec",
    "name",
    "date-sec",
    "date-nsec",
    "vm-clock-sec",
    "id",
    "vm-state-size",
    "info",
    "image-end-offset",
    "total-clusters",
    "check-errors",
    "corruptions",
    "leaks",
    "corruptions-fixed",
    "leaks-fixed",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
    "children",
    "snapshots",
    "bitmaps",
    "required",
    "fully-allocated",
    "backing-filename-format",
    "virtual-size",
    "filename",
    "cluster-size",
    "format",
    "actual-size",
    "type",
    "format-specific",
    "data",
    "full-backing-filename",
    "backing-filename",
    "encrypted",
    "compat",
    "compression-type",
    "lazy-refcounts",
    "refcount-bits",
    "encrypt",
    "data-file",
    "data-file-raw",
    "corrupt",
    "extended-l2",
    "dirty-flag",
];

/// JSON with an indentation of four, and a line's end.
pub fn json(value: &impl Serialize) -> Result<String, Failed> {
    let value = serde_json::to_value(value).map_err(Failed::new)?;
    let mut text = String::new();
    print(&mut text, &value, 0);
    Ok(text + "\n")
}

fn print(text: &mut String, value: &Value, depth: usize) {
    let line = |text: &mut String, depth: usize| {
        text.push('\n');
        text.push_str(&"    ".repeat(depth));
    };
    match value {
        Value::Array(items) => {
            text.push('[');
            for (i, item) in items.iter().enumerate() {
                text.push_str(if i > 0 { "," } else { "" });
                line(text, depth + 1);
                print(text, item, depth + 1);
            }
            line(text, depth);
            text.push(']');
        }
        Value::Object(map) => {
            text.push('{');
            let mut members: Vec<_> = map.iter().collect();
            members
                .sort_by_key(|(name, _)| ORDER.iter().position(|known| known == name).map_or(0, |at| at + 1));
            for (i, (name, item)) in members.into_iter().enumerate() {
                text.push_str(if i > 0 { "," } else { "" });
                line(text, depth + 1);
                text.push_str(&Value::from(name.as_str()).to_string());
                text.push_str(": ");
                print(text, item, depth + 1);
            }
            line(text, depth);
            text.push('}');
        }
        plain => text.push_str(&plain.to_string()),
    }
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
    let whole = u128::from(bytes) / divisor;
    let scale = match whole {
        0..10 => 100,
        10..100 => 10,
        _ => 1,
    };
    // Rounded to three significant digits, a half to the even one, as C's printf does.
    let scaled = u128::from(bytes) * scale;
    let (floor, rest) = (scaled / divisor, scaled % divisor);
    let up = rest * 2 > divisor || rest * 2 == divisor && floor % 2 == 1;
    let rounded = floor + u128::from(up);
    let (whole, fraction) = (rounded / scale, rounded % scale);
    let number = match (scale, fraction) {
        (_, 0) => whole.to_string(),
        (10, fraction) => format!("{whole}.{fraction}"),
        (_, fraction) => format!("{whole}.{fraction:02}").trim_end_matches('0').to_owned(),
    };
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
        for (bytes, text) in [
            (0, "0 B"),
            (29184, "28.5 KiB"),
            (1 << 20, "1 MiB"),
            (197_120, "192 KiB"),
            (328_192, "320 KiB"),
            (1234, "1.21 KiB"),
            (1000, "0.98 KiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
