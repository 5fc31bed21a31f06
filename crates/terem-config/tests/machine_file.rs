//! Machine files as users write them: round trips, equivalence with the command line's form, and the texts of errors.
#![allow(clippy::unwrap_used)] // Here too a panic is how a test fails, also outside of test functions.

use proptest::prelude::*;
use std::path::Path;
use terem_config::{
    AccelConfig, AccelKind, AioMode, ByteSize, CacheMode, CharConfig, CpuConfig, CpuFlag, CpusConfig,
    DirectPrograms, DiscardMode, DiskConfig, DiskFormat, Forward, GdbAddress, GdbConfig, ImagePassphrase,
    MacAddress, MachineConfig, NetConfig, NetKind, PassphraseSource, Protocol, ThrottleConfig, TraceConfig,
    TraceWhat, from_key_values, from_toml,
};

fn errors(text: &str) -> Vec<String> {
    from_toml(text, Path::new("m.toml")).unwrap_err().0.iter().map(ToString::to_string).collect()
}

fn mistakes(text: &str) -> Vec<String> {
    let config = from_toml(text, Path::new("m.toml")).unwrap();
    config.validate().unwrap_err().0.iter().map(ToString::to_string).collect()
}

#[test]
fn short_and_long_forms_are_the_same() {
    let short = r#"
        memory = "512M"
        cpus = 4
        cpu = "host,-avx2"
        accel = "soft,translate=off"
        disk = ["a.qcow2,readonly", { path = "b.img", format = "raw" }]
        net = ["user,forward=tcp:2222:22"]
    "#;
    let long = r#"
        memory = 536870912
        [cpus]
        count = 4
        [cpu]
        model = "host"
        flags = ["-avx2"]
        [accel]
        type = "soft"
        translate = false
        [[disk]]
        path = "a.qcow2"
        readonly = true
        [[disk]]
        path = "b.img"
        format = "raw"
        [[net]]
        type = "user"
        forward = ["tcp:2222:22"]
    "#;
    let place = Path::new("m.toml");
    assert_eq!(from_toml(short, place).unwrap(), from_toml(long, place).unwrap());
}

#[test]
fn no_file_is_the_default_machine() {
    assert_eq!(from_toml("", Path::new("m.toml")).unwrap(), MachineConfig::default());
}

#[test]
fn every_mistake_is_told_with_its_line() {
    let text = r#"memmory = "4G"
memory = "4X"
cpus = "2,thread=2"
[[disk]]
path = "a.qcow2"
fromat = "raw"
[[disk]]
path = "b.qcow2"
format = "vfd"
[[disk]]
readonly = true
[[net]]
type = "user"
mtu = "big"
"#;
    let errors = errors(text);
    let wanted = [
        "m.toml:1: memmory: there is no such key",
        "(did you mean `memory`?)",
        "m.toml:2: memory = \"4X\": `X` is no unit of size; expected a whole number with a unit",
        "m.toml:3: cpus",
        "(did you mean `threads`?)",
        "m.toml:6: disk[0].fromat: there is no such key",
        "(did you mean `format`?)",
        "m.toml:9: disk[1].format = \"vfd\": it is none of the choices; expected one of `probe`, `raw`",
        "m.toml:10: disk[2].path: it is needed and was not given",
        "m.toml:14: net[0].mtu = \"big\": invalid type: string \"big\"; expected u16",
    ];
    let all = errors.join("\n");
    for part in wanted {
        assert!(all.contains(part), "no `{part}` in\n{all}");
    }
    assert_eq!(errors.len(), 7, "{all}");
}

#[test]
fn broken_toml_names_its_line() {
    let errors = errors("memory = \"4G\"\ncpus = = 3\n");
    assert_eq!(errors.len(), 1);
    assert!(errors[0].starts_with("m.toml:2: it is no TOML: "), "{}", errors[0]);
}

#[test]
fn wrong_types_are_told() {
    for text in [
        "disk = 3",
        "net = [true]",
        "cpus = [1]",
        "memory = 1.5",
        "kernel = 5",
        "rng = \"yes\"",
        "disk = [[1]]",
    ] {
        assert_eq!(errors(text).len(), 1, "{text}");
    }
}

#[test]
fn validation_tells_everything_at_once() {
    let found = mistakes(
        r#"
        name = "-x"
        memory = "1500K"
        serial = "stdio"
        virtio_console = "stdio"
        cpus = 0
        cpu = "default,+aes,-aes"
        disk = ["a.img,queues=0", "a.img,serial=123456789012345678901"]
        net = ["tap", "tap=t,forward=tcp:1:1", "user,mac=01:00:00:00:00:00,mtu=20", "none"]
    "#,
    );
    let wanted = [
        "name = \"-x\": it cannot be the name of a machine; expected up to 64 letters, digits, `-`, `_` and `.`, the first a letter or digit",
        "memory = \"1500K\": it is not whole mebibytes; expected a multiple of 1M",
        "kernel: it is needed: this version boots kernels directly, not yet through firmware from the disk; expected the path of a Linux kernel, an ELF kernel with a PVH note, or a multiboot image",
        "virtio_console = \"stdio\": the serial port goes there already; expected different places, such as serial = \"none\"",
        "cpus.count = 0: a machine needs a vCPU; expected 1 to 254",
        "cpu.flags[1] = -aes: it is switched both on and off; expected each feature once",
        "disk[0].queues = 0: a disk cannot have so many queues; expected 1 to 64",
        "disk[1].serial = \"123456789012345678901\": the guest cannot be given such a serial number; expected up to 20 printable ASCII characters",
        "disk[1].path = \"a.img\": disk[0] is the same image, and one of them writes to it; expected another image, or `readonly` on both",
        "net[0].tap: it is needed and was not given; expected the name of a tap device, or `fd`",
        "net[1].forward = \"tcp:1:1\": only user-mode networking forwards ports; expected no forward here, or type = \"user\"",
        "net[2].mac = \"01:00:00:00:00:00\": no interface can have a group address or none; expected an address whose first byte is even, such as 52:54:00:12:34:56",
        "net[2].mtu = 20: IPv4 needs more; expected 68 to 65535",
        "net[3].type = \"none\": there are other network interfaces; expected `none` alone",
    ];
    assert_eq!(found, wanted);
}

#[test]
fn relative_paths_start_at_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.toml");
    std::fs::write(
        &file,
        "kernel = \"vmlinuz\"\nserial = \"file:log\"\ndisk = [\"/abs.img\", \"rel.img,backing=base\"]",
    )
    .unwrap();
    let (config, errors) = terem_config::load(&file);
    assert_eq!(errors, []);
    assert_eq!(config.kernel, Some(dir.path().join("vmlinuz")));
    assert_eq!(config.serial, CharConfig::File(dir.path().join("log")));
    assert_eq!(config.disks[0].path, Path::new("/abs.img"));
    assert_eq!(config.disks[1].path, dir.path().join("rel.img"));
    assert_eq!(config.disks[1].backing, [dir.path().join("base")]);
}

#[test]
fn unreadable_files_are_told() {
    let (_, errors) = terem_config::load(Path::new("/nonexistent/m.toml"));
    let error = errors[0].to_string();
    assert!(error.starts_with("cannot read the machine file /nonexistent/m.toml: No such file"), "{error}");
    assert_eq!(terem_config::load(Path::new("/")).1.len(), 1);
}

#[test]
fn schema_knows_every_key() {
    let schema = terem_config::schema();
    let keys: Vec<&str> = schema["properties"].as_object().unwrap().keys().map(String::as_str).collect();
    for key in [
        "disk", "net", "cpus", "cpu", "accel", "memory", "kernel", "initrd", "cmdline", "serial", "rng",
        "name",
    ] {
        assert!(keys.contains(&key), "{key}");
        assert!(schema["properties"][key]["description"].is_string(), "{key} is not described");
    }
    assert_eq!(schema["additionalProperties"], false);
}

fn word() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9 ,=+\"'\\\\#/._-]{1,12}"
}

fn passphrase() -> impl Strategy<Value = ImagePassphrase> {
    let source = prop_oneof![
        word().prop_map(|path| PassphraseSource::File(path.into())),
        any::<u32>().prop_map(PassphraseSource::Descriptor),
        Just(PassphraseSource::Ask),
    ];
    let image = prop::option::of("[a-z.]{1,8}".prop_map(Into::into));
    (image, source).prop_map(|(image, source)| ImagePassphrase { image, source })
}

fn throttle() -> impl Strategy<Value = ThrottleConfig> {
    let rate = || prop::option::of(0..u64::MAX >> 1);
    (rate(), rate(), prop::option::of(any::<u32>()), rate(), rate()).prop_map(|(a, b, length, c, d)| {
        ThrottleConfig {
            bps: a.map(ByteSize),
            bps_write_max: b.map(ByteSize),
            iops_read_max_length: length,
            iops_write: c,
            iops_size: d.map(ByteSize),
            ..ThrottleConfig::default()
        }
    })
}

fn disk() -> impl Strategy<Value = DiskConfig> {
    let choices = (
        prop::sample::select(vec![DiskFormat::Probe, DiskFormat::Raw, DiskFormat::Qcow2, DiskFormat::Vpc]),
        prop::sample::select(vec![CacheMode::Writeback, CacheMode::None, CacheMode::Unsafe]),
        prop::sample::select(vec![DiscardMode::Unmap, DiscardMode::Ignore]),
        prop::sample::select(vec![AioMode::Auto, AioMode::IoUring, AioMode::Threads]),
    );
    let rest = (
        word(),
        prop::option::of(any::<u16>()),
        prop::option::of(word()),
        prop::collection::vec(word(), 0..3),
    );
    let new = (
        prop::collection::vec(passphrase(), 0..3),
        prop::option::of(word().prop_map(Into::into)),
        throttle(),
        prop::option::of(word()),
    );
    (choices, rest, any::<[bool; 3]>(), new).prop_map(
        |((format, cache, discard, aio), (path, queues, serial, backing), switches, new)| {
            let (passphrase, luks_header, throttle, throttle_group) = new;
            let [readonly, locking, snapshot] = switches;
            let backing = backing.into_iter().map(Into::into).collect();
            DiskConfig {
                path: path.into(),
                format,
                readonly,
                cache,
                discard,
                aio,
                queues,
                serial,
                locking,
                backing,
                snapshot,
                passphrase,
                luks_header,
                throttle,
                throttle_group,
            }
        },
    )
}

fn net() -> impl Strategy<Value = NetConfig> {
    let forward = (
        any::<bool>(),
        any::<Option<std::net::IpAddr>>(),
        any::<(std::num::NonZeroU16, std::num::NonZeroU16)>(),
    )
        .prop_map(|(tcp, host_address, (host_port, guest_port))| Forward {
            protocol: if tcp { Protocol::Tcp } else { Protocol::Udp },
            host_address,
            host_port,
            guest_port,
        });
    let kind = prop::sample::select(vec![None, Some(NetKind::User), Some(NetKind::Tap), Some(NetKind::None)]);
    (
        kind,
        prop::option::of(word()),
        any::<Option<i32>>(),
        prop::collection::vec(forward, 0..3),
        any::<Option<[u8; 6]>>(),
        any::<Option<u16>>(),
    )
        .prop_map(|(kind, tap, fd, forward, mac, mtu)| NetConfig {
            kind,
            tap,
            fd,
            forward,
            mac: mac.map(MacAddress),
            mtu,
        })
}

fn gdb() -> impl Strategy<Value = GdbConfig> {
    let tcp = any::<(std::net::IpAddr, u16)>()
        .prop_map(|(host, port)| GdbAddress::Tcp { host: host.to_string(), port });
    let listen = prop_oneof![tcp, word().prop_map(|path| GdbAddress::Unix(path.into()))];
    (listen, any::<bool>()).prop_map(|(listen, wait)| GdbConfig { listen, wait })
}

fn trace() -> impl Strategy<Value = TraceConfig> {
    let what = prop::sample::select(vec![TraceWhat::Instructions, TraceWhat::Interrupts, TraceWhat::Exits]);
    (what, prop::option::of(word())).prop_map(|(what, file)| TraceConfig { what, file: file.map(Into::into) })
}

prop_compose! {
    fn machine()(
        texts in prop::collection::vec(prop::option::of(word()), 4),
        memory in 0u64..1 << 50,
        cpus in (any::<u32>(), any::<[Option<u32>; 4]>()),
        model in word(),
        flags in prop::collection::vec(("[a-z0-9_.-]{1,8}", any::<bool>()), 0..4),
        kind in prop::sample::select(vec![AccelKind::Auto, AccelKind::Kvm, AccelKind::Soft]),
        translate: Option<bool>,
        serial in prop_oneof![
            Just(CharConfig::Stdio), Just(CharConfig::None), Just(CharConfig::Pty),
            word().prop_map(|p| CharConfig::File(p.into())), word().prop_map(|p| CharConfig::Socket(p.into())),
        ],
        switches: [bool; 2],
        disks in prop::collection::vec(disk(), 0..3),
        nets in prop::collection::vec(net(), 0..3),
        gdb in prop::option::of(gdb()),
        traces in prop::collection::vec(trace(), 0..3),
    ) -> MachineConfig {
        let [sockets, dies, cores, threads] = cpus.1;
        let mut texts = texts.into_iter();
        let mut text = || texts.next().flatten();
        MachineConfig {
            name: text(),
            memory: ByteSize(memory),
            kernel: text().map(Into::into),
            initrd: text().map(Into::into),
            cmdline: text(),
            serial: serial.clone(),
            virtio_console: serial,
            rng: switches[0],
            no_reboot: switches[1],
            cpus: CpusConfig { sockets, dies, cores, threads, l3: (cpus.0 % 2 == 0).then_some(ByteSize::mib(32)), ..CpusConfig::new(cpus.0) },
            cpu: CpuConfig { model, flags: flags.into_iter().map(|(name, on)| CpuFlag { name, on }).collect(), enforce: cpus.0 % 3 != 0 },
            numa: Vec::new(),
            accel: AccelConfig {
                kind,
                translate,
                direct: translate.map(|on| if on { DirectPrograms::Always } else { DirectPrograms::Off }),
            },
            disks,
            nets,
            gdb,
            traces,
        }
    }
}

/// Writes a table in the command line's form.
fn key_values(table: &toml::Table) -> String {
    let mut words = Vec::new();
    for (key, value) in table {
        let values = match value {
            toml::Value::Array(values) => values.clone(),
            value => vec![value.clone()],
        };
        for value in values {
            let text = match value {
                toml::Value::String(text) => text.replace(',', ",,"),
                toml::Value::Table(inner) => {
                    words.push(key_values(&inner));
                    continue;
                }
                toml::Value::Boolean(value) => if value { "on" } else { "off" }.to_string(),
                value => value.to_string(),
            };
            words.push(format!("{key}={text}"));
        }
    }
    words.join(",")
}

proptest! {
    #[test]
    fn printed_machines_read_back(config in machine()) {
        let text = config.to_toml().unwrap();
        prop_assert_eq!(from_toml(&text, Path::new("m.toml")).unwrap(), config);
    }

    #[test]
    fn key_values_are_the_same_tables(disk in disk(), net in net()) {
        let text = key_values(&toml::Table::try_from(&disk).unwrap());
        prop_assert_eq!(from_key_values::<DiskConfig>(&text).unwrap(), disk, "{}", text);
        let text = key_values(&toml::Table::try_from(&net).unwrap());
        prop_assert_eq!(from_key_values::<NetConfig>(&text).unwrap(), net, "{}", text);
    }

    #[test]
    fn no_text_panics(text in "\\PC{0,60}") {
        let _ = from_toml(&text, Path::new(""));
        let _ = from_key_values::<DiskConfig>(&text);
        let _ = from_key_values::<CpuConfig>(&text);
    }

    #[test]
    fn no_machine_panics_the_checks(config in machine()) {
        let _ = config.validate();
    }
}

#[test]
fn limits_of_disks() {
    let errors = |disks: &str| {
        let text = format!("kernel = \"k\"\ndisk = [{disks}]");
        let config = from_toml(&text, Path::new("m.toml")).unwrap();
        config.validate().err().map_or_else(String::new, |errors| errors.to_string())
    };
    assert_eq!(
        errors("\"a,bps=10M,bps-max=20M,bps-max-length=5,iops-read=1,iops-write=2,iops-size=4K\""),
        ""
    );
    assert_eq!(
        errors("{ path = \"a\", throttle = { iops = 5 }, throttle_group = \"g\" }, \"b,throttle-group=g\""),
        ""
    );
    for (disks, error) in [
        ("\"a,bps=1M,bps-read=1M\"", "disk[0].throttle.bps = "),
        ("\"a,iops=0\"", "disk[0].throttle.iops = 0: it is no rate"),
        ("\"a,iops-max=5\"", "disk[0].throttle.iops_max = 5: a burst needs a limit"),
        ("\"a,iops=6,iops-max=5\"", "disk[0].throttle.iops_max = 5: a burst would be slower"),
        ("\"a,iops=6,iops-max-length=5\"", "disk[0].throttle.iops_max_length = 5: there is no burst"),
        ("\"a,iops=6,iops-max=7,iops-max-length=0\"", "disk[0].throttle.iops_max_length = 0"),
        ("\"a,bps=6,bps-max=1P,bps-max-length=5\"", "disk[0].throttle.bps_max = "),
        ("\"a,bps=6,iops-size=512\"", "disk[0].throttle.iops_size = 512"),
        ("\"a,throttle-group=g\"", "disk[0].throttle_group = \"g\": no disk of the group has limits"),
        (
            "\"a,iops=1,throttle-group=g\", \"b,iops=2,throttle-group=g\"",
            "disk[1].throttle_group = \"g\": disk[0] gives",
        ),
        ("\"a,iops=1,throttle-group=\"", "disk[0].throttle_group = \"\": it is empty"),
    ] {
        let found = errors(disks);
        assert!(found.contains(error), "{disks}: {found}");
    }
}

#[test]
fn passphrases_are_never_in_the_configuration() {
    let file = "kernel = \"k\"\ndisk = [\"a,passphrase=file:key,passphrase=base=fd:3,luks-header=h\"]";
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.toml");
    std::fs::write(&path, file).unwrap();
    let (config, errors) = terem_config::load(&path);
    assert!(errors.is_empty(), "{errors:?}");
    let disk = &config.disks[0];
    let texts: Vec<_> = disk.passphrase.iter().map(ToString::to_string).collect();
    let at = |name: &str| dir.path().join(name).display().to_string();
    assert_eq!(texts, [format!("file:{}", at("key")), format!("{}=fd:3", at("base"))]);
    assert_eq!(disk.luks_header, Some(dir.path().join("h")));
    let error = from_key_values::<DiskConfig>("a,passphrase=secret").unwrap_err().to_string();
    assert!(error.contains("file:PATH, fd:NUMBER or ask"), "{error}");
}
