//! Help and `docs/run.md`, made from the same types that read the configuration.

use crate::arguments::Arguments;
use crate::exit;
use clap::CommandFactory;
use serde_json::Value;
use std::fmt::Write;

/// Flags of `run` whose values are tables, with the table's name in the schema.
const TABLES: [(&str, &str); 8] = [
    ("cpus", "CpusConfig"),
    ("numa", "NumaConfig"),
    ("cpu", "CpuConfig"),
    ("accel", "AccelConfig"),
    ("disk", "DiskConfig"),
    ("net", "NetConfig"),
    ("gdb", "GdbConfig"),
    ("trace", "TraceConfig"),
];

/// A table within one of them, whose keys can stand among that one's on the command line: flag, key, table's name.
const WITHIN: (&str, &str, &str) = ("disk", "throttle", "ThrottleConfig");

/// One key of a table.
struct Key {
    name: String,
    values: String,
    text: String,
}

/// Adds the keys of each table to the long help of its flag.
pub fn with_keys(command: clap::Command) -> clap::Command {
    let schema = terem_config::schema();
    command.mut_subcommand("run", |mut run| {
        for (flag, table) in TABLES {
            let (outer, key, inner) = WITHIN;
            let mut all = keys(&schema, table);
            if flag == outer {
                all.retain(|found| found.name != key);
                all.extend(keys(&schema, inner));
            }
            let keys: String =
                all.iter().map(|key| format!("\n  {}={}: {}", key.name, key.values, key.text)).collect();
            run = run.mut_arg(flag, |argument| {
                let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
                argument.long_help(format!("{help}\n\nThe first word belongs to the main key. Keys:{keys}"))
            });
        }
        run
    })
}

fn keys(schema: &Value, table: &str) -> Vec<Key> {
    properties(schema, &schema["$defs"][table])
}

fn properties(schema: &Value, table: &Value) -> Vec<Key> {
    let Some(properties) = table["properties"].as_object() else { return Vec::new() };
    properties
        .iter()
        .map(|(name, property)| Key {
            name: name.clone(),
            values: values(schema, property),
            text: property["description"].as_str().unwrap_or_default().replace('\n', " "),
        })
        .collect()
}

/// What values a property takes.
fn values(schema: &Value, property: &Value) -> String {
    if let Some(name) = property["$ref"].as_str() {
        let name = name.trim_start_matches("#/$defs/");
        return values(schema, &schema["$defs"][name]);
    }
    if let Some(choices) = property["oneOf"].as_array().or_else(|| property["anyOf"].as_array()) {
        let choices: Vec<String> =
            choices.iter().map(|choice| values(schema, choice)).filter(|text| text != "null").collect();
        return if choices.iter().any(|choice| choice == "TABLE") {
            "table, see below".into()
        } else {
            choices.join("|")
        };
    }
    if let Some(choice) = property["const"].as_str() {
        return choice.into();
    }
    if let Some(choices) = property["enum"].as_array() {
        return choices.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("|");
    }
    let types: Vec<&str> = match &property["type"] {
        Value::String(name) => vec![name],
        Value::Array(names) => {
            names.iter().filter_map(Value::as_str).filter(|name| *name != "null").collect()
        }
        _ => Vec::new(),
    };
    match types.first() {
        Some(&"boolean") => "on|off".into(),
        Some(&"integer") => "NUMBER".into(),
        Some(&"array") => values(schema, &property["items"]),
        Some(&"object") => "TABLE".into(),
        Some(&"null") => "null".into(),
        _ => "TEXT".into(),
    }
}

/// The whole of `docs/run.md`.
pub fn markdown() -> String {
    let schema = terem_config::schema();
    let mut text = String::from(INTRODUCTION);
    flags(&mut text);
    text.push_str("\n## Keys of a machine file\n\n");
    text.push_str(
        "Each table can also be one string in the flag's form: `disk = [\"debian.qcow2,readonly=true\"]`.\n",
    );
    text.push_str(
        "Relative paths start at the file's directory. `terem config schema` prints the JSON schema.\n\n",
    );
    table(&mut text, &properties(&schema, &schema));
    for (flag, name) in TABLES {
        let title = if matches!(flag, "disk" | "net" | "numa" | "trace") {
            format!("[[{flag}]]")
        } else {
            format!("[{flag}]")
        };
        let about = schema["$defs"][name]["description"].as_str().unwrap_or_default();
        let _ = write!(text, "\n### `{title}`, `--{flag}`\n\n{about}\n\n");
        table(&mut text, &keys(&schema, name));
        let (outer, key, inner) = WITHIN;
        if flag == outer {
            let about = schema["$defs"][inner]["description"].as_str().unwrap_or_default();
            let _ = write!(text, "\n### `[{flag}.{key}]`, keys of `--{flag}`\n\n{about}\n\n");
            table(&mut text, &keys(&schema, inner));
        }
    }
    text.push_str("\n## Exit codes\n\n| code | meaning |\n| ---: | --- |\n");
    for (code, meaning) in exit::DESCRIPTIONS {
        let _ = writeln!(text, "| {code} | {meaning} |");
    }
    text.push_str(CLOSING);
    text
}

const INTRODUCTION: &str = "\
<!-- Made by `terem config reference` from the types in crates/terem-config and crates/terem. A test compares; do not edit. -->
# terem run

    terem run [FLAGS] [DISK | MACHINE.toml]

Runs a machine until its guest switches itself off. A positional argument that ends in `.toml` is a machine file, any other
the first disk. Flags go before the file: single values replace the file's, `--disk` and `--trace` add to the file's, `--net`
and `--numa` replace all network interfaces and all nodes of the file. `--print-config` writes the result as a machine file.

Values that are tables are written `key=value,key=value`. The first word may stand alone: it belongs to the main key. A later
word alone means `on`. A key with several values is repeated. A comma inside a value is doubled. A `-` in a key is the same as
`_`. In a machine file `on` and `off` are `true` and `false`, and a key with several values has a list.

## Flags

";

const CLOSING: &str = "
## The terminal

The machine's console is the terminal it was started on. The terminal is raw: every key goes to the guest, but for

| keys | what happens |
| --- | --- |
| `Ctrl-a x` | the machine ends at once, exit code 6 |
| `Ctrl-a h` | help |
| `Ctrl-a Ctrl-a` | the guest gets one Ctrl-a |

Standard input that is no terminal is passed on as it is; its end does not end the guest. SIGTERM presses the power button
and pulls the plug after 10 seconds or with the second SIGTERM; SIGINT, SIGHUP and SIGQUIT pull it at once. SIGTSTP and SIGCONT
give the terminal to the shell and take it back.

## Running machines

A machine answers on `NAME.sock` in `$XDG_RUNTIME_DIR/terem`, else `/run/user/UID/terem`, else `/tmp/terem-UID`: to its owner
and root only. Requests and answers are lines of JSON; `terem config schema --control` prints their schema.

| command | what it does |
| --- | --- |
| `terem ps` | lists the machines, and clears away what dead ones have left |
| `terem inspect NAME` | shows a machine's plan and state |
| `terem stop NAME [--timeout S] [--force]` | presses the power button, and pulls the plug after S seconds (30) or at once |
| `terem stat NAME [--interval S] [--json]` | shows what its vCPUs have done: instructions, translations, TLB, interrupts (see [debugging](debugging.md)) |
| `terem console NAME` | attaches this terminal; `Ctrl-a x` leaves it |

With `--detach` the machine goes on in the background as soon as its guest runs; until then errors and exit codes are those
of `terem run`. Its log is `NAME.log` beside the socket, and its console keeps the last MiB of output.
";

fn flags(text: &mut String) {
    let command = with_keys(Arguments::command());
    let Some(run) = command.find_subcommand("run") else { return };
    text.push_str("| flag | what it does |\n| --- | --- |\n");
    for argument in run.get_arguments().filter(|argument| !argument.is_hide_set()) {
        let Some(long) = argument.get_long() else { continue };
        let takes_value = argument.get_action().takes_values();
        let name = argument.get_value_names().and_then(<[_]>::first).filter(|_| takes_value);
        let value = name.map(|name| format!(" {name}")).unwrap_or_default().replace('|', "\\|");
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        let _ = writeln!(text, "| `--{long}{value}` | {help} |");
    }
}

fn table(text: &mut String, keys: &[Key]) {
    text.push_str("| key | value | meaning |\n| --- | --- | --- |\n");
    for Key { name, values, text: meaning } in keys {
        let values = values.replace('|', " \\| ");
        let _ = writeln!(text, "| `{name}` | {values} | {meaning} |");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_is_up_to_date() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/run.md");
        let there = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            there == markdown(),
            "docs/run.md is old: run `cargo run -p terem -- config reference > docs/run.md`"
        );
    }

    #[test]
    fn every_key_is_described() {
        let schema = terem_config::schema();
        for table in TABLES.map(|(_, table)| table).into_iter().chain([WITHIN.2]) {
            let keys = keys(&schema, table);
            assert!(!keys.is_empty(), "{table}");
            for key in keys {
                assert!(!key.text.is_empty() && !key.values.is_empty(), "{table}.{}", key.name);
            }
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        with_keys(Arguments::command()).debug_assert();
    }
}
