//! `terem stat`: what a machine's vCPUs have done, in numbers.

use crate::exit::Exit;
use crate::failure::Failure;
use crate::machines::{connect, refused};
use crate::{print, print_json};
use serde_json::{Value, json};
use std::fmt::Write;
use std::thread;
use std::time::Duration;
use terem_machine::control::{Counters, Stat};

/// A row: its title, its number, and whether it counts (or else tells how something is now).
struct Row {
    title: &'static str,
    key: &'static str,
    of: fn(&Counters) -> u64,
    counts: bool,
}

macro_rules! rows {
    ($($title:literal $field:ident $counts:literal),* $(,)?) => {
        [$(Row { title: $title, key: stringify!($field), of: |c| c.$field, counts: $counts }),*]
    };
}

const ROWS: [Row; 16] = rows![
    "instructions interpreted" instructions_interpreted true,
    "blocks decoded" blocks_decoded true,
    "blocks translated" blocks_translated true,
    "code bytes" code_bytes false,
    "code bytes at most" code_capacity false,
    "code flushes" code_flushes true,
    "stores to code pages" code_writes true,
    "page walks" page_walks true,
    "TLB flushes" tlb_flushes true,
    "TLB page flushes" tlb_page_flushes true,
    "interrupts" interrupts true,
    "exceptions" exceptions true,
    "port accesses" port_accesses true,
    "MMIO accesses" mmio_accesses true,
    "direct runs" direct_runs true,
    "pages mapped for them" direct_pages true,
];

/// Shows them: as they are, or as they change in `interval` seconds.
pub fn show(name: &str, interval: Option<u64>, json: bool) -> Result<Exit, Failure> {
    let mut client = connect("ask", name)?;
    let mut sample = || client.stat().map_err(|error| refused("ask", name, &error));
    let first = sample()?;
    let Some(interval) = interval else {
        return if json { print_json(&first) } else { print(&totals(&first)) };
    };
    thread::sleep(Duration::from_secs(interval));
    let second = sample()?;
    if json { print_json(&rates_json(&first, &second)) } else { print(&rates(&first, &second)) }
}

fn percent(part: u64, whole: u64) -> String {
    // Per mille first, so that whole numbers do.
    let part = part.saturating_mul(1000).checked_div(whole).unwrap_or(0);
    format!("{}.{}%", part / 10, part % 10)
}

fn head(text: &mut String, vcpus: usize) {
    let _ = write!(text, "{:<26}", "");
    for vcpu in 0..vcpus {
        let _ = write!(text, "{:>16}", format!("vCPU {vcpu}"));
    }
    text.push('\n');
}

fn line(text: &mut String, title: &str, values: impl Iterator<Item = String>) {
    let _ = write!(text, "{title:<26}");
    values.for_each(|value| {
        let _ = write!(text, "{value:>16}");
    });
    text.push('\n');
}

fn totals(stat: &Stat) -> String {
    let mut text = String::new();
    head(&mut text, stat.vcpus.len());
    let state = |c: &Counters| if c.halted { "halted" } else { "running" }.to_string();
    line(&mut text, "state", stat.vcpus.iter().map(state));
    line(&mut text, "halted", stat.vcpus.iter().map(|c| percent(c.halted_ns, stat.time_ns)));
    for row in &ROWS {
        line(&mut text, row.title, stat.vcpus.iter().map(|c| (row.of)(c).to_string()));
    }
    text
}

/// How often something happened in a second of the guest's time, to one decimal.
fn per_second(before: u64, after: u64, ns: u64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "a rate for people")]
    let rate = after.saturating_sub(before) as f64 * 1e9 / ns.max(1) as f64;
    (rate * 10.0).round() / 10.0
}

fn rates(first: &Stat, second: &Stat) -> String {
    let ns = second.time_ns.saturating_sub(first.time_ns);
    let pairs = || first.vcpus.iter().zip(&second.vcpus);
    let mut text = String::new();
    head(&mut text, second.vcpus.len());
    let halted = |(a, b): (&Counters, &Counters)| percent(b.halted_ns.saturating_sub(a.halted_ns), ns);
    line(&mut text, "halted", pairs().map(halted));
    for row in &ROWS {
        let title = if row.counts { format!("{}/s", row.title) } else { row.title.into() };
        let value = |(a, b): (&Counters, &Counters)| {
            let (a, b) = ((row.of)(a), (row.of)(b));
            if row.counts { format!("{:.1}", per_second(a, b, ns)) } else { b.to_string() }
        };
        line(&mut text, &title, pairs().map(value));
    }
    text
}

fn rates_json(first: &Stat, second: &Stat) -> Value {
    let ns = second.time_ns.saturating_sub(first.time_ns);
    let rates = |(a, b): (&Counters, &Counters)| -> Value {
        let counted = ROWS.iter().filter(|row| row.counts);
        let mut rates: serde_json::Map<String, Value> =
            counted.map(|row| (row.key.into(), json!(per_second((row.of)(a), (row.of)(b), ns)))).collect();
        rates.insert("halted_ns".into(), json!(per_second(a.halted_ns, b.halted_ns, ns)));
        Value::Object(rates)
    };
    let per_second: Vec<Value> = first.vcpus.iter().zip(&second.vcpus).map(rates).collect();
    json!({
        "time_ns": second.time_ns,
        "vcpus": second.vcpus,
        "interval_ns": ns,
        "per_second": per_second,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> (Stat, Stat) {
        let first = Counters { page_walks: 100, halted_ns: 0, code_bytes: 7, ..Counters::default() };
        let second = Counters {
            page_walks: 150,
            halted_ns: 500_000_000,
            code_bytes: 9,
            halted: true,
            ..first.clone()
        };
        (
            Stat { time_ns: 1_000_000_000, vcpus: vec![first] },
            Stat { time_ns: 3_000_000_000, vcpus: vec![second] },
        )
    }

    #[test]
    fn rates_are_of_the_guests_seconds() {
        let (first, second) = samples();
        let text = rates(&first, &second);
        let row = |title: &str| {
            let line = text.lines().find(|l| l.starts_with(title)).unwrap();
            line.split_whitespace().last().unwrap().to_string()
        };
        assert_eq!((row("page walks/s").as_str(), row("code bytes ").as_str()), ("25.0", "9"));
        assert_eq!(row("halted"), "25.0%");
        let json = rates_json(&first, &second);
        assert_eq!(json["per_second"][0]["page_walks"], 25.0);
        assert_eq!(json["vcpus"][0]["page_walks"], 150);
    }

    #[test]
    fn every_counter_has_a_row() {
        let keys = serde_json::to_value(Counters::default()).unwrap();
        for key in keys.as_object().unwrap().keys().filter(|k| !matches!(k.as_str(), "halted" | "halted_ns"))
        {
            assert!(ROWS.iter().any(|row| row.key == key), "{key}");
        }
        assert!(totals(&samples().1).contains("16.6%"));
    }
}
