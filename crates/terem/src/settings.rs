//! From arguments to a machine's configuration.

use crate::arguments::{RunArguments, Switch};
use crate::failure::Failure;
use std::path::Path;
use std::str::FromStr;
use terem_config::{
    ConfigError, ConfigErrors, DiskConfig, KeyValue, MachineConfig, TextError, from_key_values,
};

/// The machine that the arguments describe, checked.
///
/// # Errors
/// Every mistake in them and in the machine file.
pub fn machine(arguments: &RunArguments) -> Result<MachineConfig, Failure> {
    let file = arguments.machine.as_deref().filter(|path| is_machine_file(path));
    let (mut config, mut errors) = file.map(terem_config::load).unwrap_or_default();
    if let Some(disk) = arguments.machine.as_deref().filter(|_| file.is_none()) {
        config.disks.push(DiskConfig::new(disk));
    }
    apply(arguments, &mut config, &mut errors);
    config.validate_besides(&mut errors);
    ConfigErrors::check(errors)?;
    Ok(config)
}

fn is_machine_file(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "toml")
}

fn apply(arguments: &RunArguments, config: &mut MachineConfig, errors: &mut Vec<ConfigError>) {
    let mut take = Taker(errors);
    take.word("memory", arguments.memory.as_deref(), &mut config.memory);
    take.word("serial", arguments.serial.as_deref(), &mut config.serial);
    take.word("virtio_console", arguments.virtio_console.as_deref(), &mut config.virtio_console);
    take.table("cpus", arguments.cpus.as_deref(), &mut config.cpus);
    take.table("cpu", arguments.cpu.as_deref(), &mut config.cpu);
    take.table("accel", arguments.accel.as_deref(), &mut config.accel);
    if !arguments.numa.is_empty() {
        config.numa.clear();
        take.list("numa", &arguments.numa, &mut config.numa);
    }
    take.list("disk", &arguments.disk, &mut config.disks);
    take.optional("gdb", arguments.gdb.as_deref(), &mut config.gdb);
    take.list("trace", &arguments.trace, &mut config.traces);
    if !arguments.net.is_empty() {
        config.nets.clear();
        take.list("net", &arguments.net, &mut config.nets);
    }
    replace(arguments.name.as_ref(), &mut config.name);
    replace(arguments.kernel.as_ref(), &mut config.kernel);
    replace(arguments.initrd.as_ref(), &mut config.initrd);
    replace(arguments.cmdline.as_ref(), &mut config.cmdline);
    if let Some(rng) = arguments.rng {
        config.rng = rng == Switch::On;
    }
    config.no_reboot |= arguments.no_reboot;
}

fn replace<T: Clone>(given: Option<&T>, target: &mut Option<T>) {
    if let Some(value) = given {
        *target = Some(value.clone());
    }
}

/// Reads values and gathers what is wrong with them.
struct Taker<'a>(&'a mut Vec<ConfigError>);

impl Taker<'_> {
    fn word<T: FromStr<Err = TextError>>(&mut self, key: &str, given: Option<&str>, target: &mut T) {
        match given.map(T::from_str) {
            Some(Ok(value)) => *target = value,
            Some(Err(TextError { why, expected })) => {
                self.0.push(ConfigError::value(
                    key,
                    format!("\"{}\"", given.unwrap_or_default()),
                    why,
                    expected,
                ));
            }
            None => {}
        }
    }

    fn table<T: KeyValue>(&mut self, key: &str, given: Option<&str>, target: &mut T) {
        match given.map(from_key_values) {
            Some(Ok(value)) => *target = value,
            Some(Err(error)) => self.0.push(error.within(key)),
            None => {}
        }
    }

    fn optional<T: KeyValue>(&mut self, key: &str, given: Option<&str>, target: &mut Option<T>) {
        match given.map(from_key_values) {
            Some(Ok(value)) => *target = Some(value),
            Some(Err(error)) => self.0.push(error.within(key)),
            None => {}
        }
    }

    fn list<T: KeyValue>(&mut self, key: &str, given: &[String], target: &mut Vec<T>) {
        for text in given {
            match from_key_values(text) {
                Ok(value) => target.push(value),
                Err(error) => self.0.push(error.within(&format!("{key}[{}]", target.len()))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arguments::{Arguments, Command};
    use clap::Parser;

    fn parse(words: &[&str]) -> Result<MachineConfig, Failure> {
        let words = ["terem", "run"].iter().chain(words);
        let Command::Run(run) = Arguments::try_parse_from(words).unwrap().command else { unreachable!() };
        machine(&run)
    }

    #[test]
    fn flags_go_before_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m.toml");
        std::fs::write(
            &file,
            "memory = \"1G\"\nkernel = \"k\"\ncpus = 2\ndisk = [\"a\"]\nnet = [\"user\", \"tap=t\"]",
        )
        .unwrap();
        let file = file.to_str().unwrap();
        let config =
            parse(&["--memory", "2G", "--disk", "b,readonly", "--net", "none", "--rng", "off", file])
                .unwrap();
        assert_eq!(config.memory.bytes(), 2 << 30);
        assert_eq!(config.cpus.count, 2);
        assert_eq!(config.kernel, Some(dir.path().join("k")));
        assert_eq!(config.disks.len(), 2);
        assert_eq!((config.disks[1].path.to_str(), config.disks[1].readonly), (Some("b"), true));
        assert_eq!((config.nets.len(), config.nics().count(), config.rng), (1, 0, false));
    }

    #[test]
    fn debugging_is_part_of_the_machine() {
        let config = parse(&["--kernel", "k", "--gdb", "1234,wait", "--trace", "exits,file=x"]).unwrap();
        let text = config.to_toml().unwrap();
        assert!(text.contains("listen = \"127.0.0.1:1234\"") && text.contains("what = \"exits\""), "{text}");
        assert_eq!(terem_config::from_toml(&text, Path::new("m.toml")).unwrap(), config);
        let failure =
            parse(&["--gdb", "x", "--trace", "ports", "--trace", "exits,fle=x"]).unwrap_err().to_string();
        for part in ["gdb.listen = \"x\"", "trace[0].what = \"ports\"", "(did you mean `file`?)"] {
            assert!(failure.contains(part), "no `{part}` in\n{failure}");
        }
        let twice =
            parse(&["--kernel", "k", "--trace", "exits", "--trace", "exits"]).unwrap_err().to_string();
        assert!(twice.contains("trace[1].what"), "{twice}");
    }

    #[test]
    fn disk_comes_first() {
        let config = parse(&["--kernel", "k", "--disk", "second", "first,odd.qcow2"]).unwrap();
        let paths: Vec<_> = config.disks.iter().map(|disk| disk.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["first,odd.qcow2", "second"]);
    }

    #[test]
    fn all_mistakes_of_all_flags() {
        let failure = parse(&["--memory", "4X", "--cpus", "two", "--disk", "a,fromat=raw", "--net", "lan"])
            .unwrap_err();
        let text = failure.to_string();
        let parts = [
            "memory = \"4X\"",
            "cpus.count = \"two\"",
            "disk[0].fromat",
            "net[0].type = \"lan\"",
            "kernel: ",
        ];
        for part in parts {
            assert!(text.contains(part), "no `{part}` in\n{text}");
        }
        assert_eq!(text.lines().count(), 6, "{text}");
    }

    #[test]
    fn what_can_be_read_is_checked_besides_what_cannot() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m.toml");
        let text = "name = \"a b\"\nmemory = \"12X\"\ncolour = 1\ncpus = { count = 3, sockets = 2 }\nnet = [\"tap\", \"lan\"]";
        std::fs::write(&file, text).unwrap();
        let text = parse(&["--kernel", "k", file.to_str().unwrap()]).unwrap_err().to_string();
        let parts = ["colour: ", "memory = \"12X\"", "net[1] = \"lan\"", "name = \"a b\"", "cpus.count = 3"];
        for part in parts {
            assert!(text.contains(part), "no `{part}` in\n{text}");
        }
        // A file that is no TOML at all lacks nothing else.
        std::fs::write(&file, "memory").unwrap();
        let text = parse(&[file.to_str().unwrap()]).unwrap_err().to_string();
        assert!(text.contains("no TOML") && !text.contains("kernel"), "{text}");
    }
}
