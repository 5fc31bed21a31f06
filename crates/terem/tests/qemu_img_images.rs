//! What is told of images: every format and shape that QEMU makes, read by its qemu-img and by ours. The JSON must be the
//! same, field for field, and so must exit codes and texts that programs read.
#![allow(clippy::unwrap_used)] // Here too a panic is how a test fails, also outside of test functions.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;

/// How each image is made, by QEMU's own tools: `I` is qemu-img, `W` writes with qemu-io. The first word names it.
const IMAGES: &[(&str, &[&str])] = &[
    ("raw", &["I create -q -f raw raw 3M", "W raw raw write -P 7 1M 300k", "W raw raw write -P 1 0 4k"]),
    ("plain.qcow2", &["I create -q -f qcow2 plain.qcow2 3M", "W qcow2 plain.qcow2 write -P 7 1M 300k"]),
    ("v2", &["I create -q -f qcow2 -o compat=v2 v2 3M", "W qcow2 v2 write -P 7 1M 300k"]),
    ("c512", &["I create -q -f qcow2 -o cluster_size=512 c512 1M", "W qcow2 c512 write -P 7 100k 30k"]),
    ("c2m", &["I create -q -f qcow2 -o cluster_size=2M c2m 9M", "W qcow2 c2m write -P 7 5M 300k"]),
    (
        "subclusters",
        &[
            "I create -q -f qcow2 -o extended_l2=on,cluster_size=128k subclusters 3M",
            "W qcow2 subclusters write -P 7 1028k 12k",
            "W qcow2 subclusters write -z 2M 100k",
        ],
    ),
    ("packed", &["I convert -c -O qcow2 plain.qcow2 packed"]),
    ("zstd", &["I convert -c -O qcow2 -o compression_type=zstd plain.qcow2 zstd"]),
    (
        "refcounts1",
        &["I create -q -f qcow2 -o refcount_bits=1 refcounts1 3M", "W qcow2 refcounts1 write 0 1M"],
    ),
    ("refcounts64", &["I create -q -f qcow2 -o refcount_bits=64,lazy_refcounts=on refcounts64 3M"]),
    (
        "metadata",
        &["I create -q -f qcow2 -o preallocation=metadata metadata 3M", "W qcow2 metadata write 1M 64k"],
    ),
    ("falloc", &["I create -q -f qcow2 -o preallocation=falloc falloc 3M"]),
    ("full", &["I create -q -f qcow2 -o preallocation=full full 3M"]),
    ("data", &["I create -q -f qcow2 -o data_file=data.raw data 3M", "W qcow2 data write -P 7 1M 300k"]),
    (
        "data2",
        &[
            "I create -q -f qcow2 -o data_file=data2.raw,data_file_raw=on data2 3M",
            "W qcow2 data2 write 1M 3k",
        ],
    ),
    (
        "snapshots",
        &[
            "I create -q -f qcow2 snapshots 3M",
            "W qcow2 snapshots write -P 1 0 1M",
            "I snapshot -c one snapshots",
            "W qcow2 snapshots write -P 2 0 64k",
            "I snapshot -c two snapshots",
        ],
    ),
    (
        "bitmaps",
        &[
            "I create -q -f qcow2 bitmaps 3M",
            "I bitmap --add bitmaps b1",
            "I bitmap --add --disable -g 4k bitmaps b2",
            "W qcow2 bitmaps write -P 1 0 1M",
        ],
    ),
    (
        "middle",
        &["I create -q -f qcow2 -b plain.qcow2 -F qcow2 middle", "W qcow2 middle write -P 9 1200k 100k"],
    ),
    ("top", &["I create -q -f qcow2 -b middle -F qcow2 top 5M", "W qcow2 top write -z 1M 64k"]),
    ("over-raw", &["I create -q -f qcow2 -b raw -F raw over-raw"]),
    ("vdi", &["I convert -O vdi plain.qcow2 vdi"]),
    ("vdi-static", &["I convert -O vdi -o static=on plain.qcow2 vdi-static"]),
    ("vhd", &["I convert -O vpc plain.qcow2 vhd"]),
    ("vhdx", &["I convert -O vhdx plain.qcow2 vhdx"]),
    ("vhdx-fixed", &["I convert -O vhdx -o subformat=fixed plain.qcow2 vhdx-fixed"]),
    ("vmdk", &["I convert -O vmdk plain.qcow2 vmdk"]),
    ("vmdk-flat", &["I convert -O vmdk -o subformat=monolithicFlat plain.qcow2 vmdk-flat"]),
    ("vmdk-split", &["I convert -O vmdk -o subformat=twoGbMaxExtentSparse plain.qcow2 vmdk-split"]),
    ("vmdk-split-flat", &["I convert -O vmdk -o subformat=twoGbMaxExtentFlat plain.qcow2 vmdk-split-flat"]),
    ("vmdk-stream", &["I convert -O vmdk -o subformat=streamOptimized plain.qcow2 vmdk-stream"]),
    ("parent.vmdk", &["I create -q -f vmdk parent.vmdk 4M"]),
    ("child.vmdk", &["I create -q -f vmdk -b parent.vmdk -F vmdk child.vmdk"]),
    ("luks", &["I create -q -f luks --object secret,id=s,data=pass -o key-secret=s,iter-time=10 luks 3M"]),
    (
        "luks-cbc",
        &[
            "I create -q -f luks --object secret,id=s,data=pass -o key-secret=s,iter-time=10,cipher-alg=aes-128,\
         cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha1 luks-cbc 3M",
        ],
    ),
    (
        "encrypted",
        &["I create -q -f qcow2 --object secret,id=s,data=pass -o encrypt.format=luks,encrypt.key-secret=s,\
         encrypt.iter-time=10 encrypted 3M"],
    ),
    (
        "aes",
        &[
            "I create -q -f qcow2 --object secret,id=s,data=pass -o encrypt.format=aes,encrypt.key-secret=s aes 3M",
        ],
    ),
];

/// What is asked of each image; `X` is its name.
const QUESTIONS: &[&str] = &[
    "info --output=json X",
    "info -U --backing-chain X",
    "map --output=json X",
    "map X",
    "measure --output=json -O qcow2 -o cluster_size=4k,compat=0.10 X",
    "compare X plain.qcow2",
];

/// What is asked of some of them.
const MORE: &[&str] = &[
    "info --output=json -U --backing-chain top",
    "info plain.qcow2",
    "map --output=json -s 1M -l 512k plain.qcow2",
    "map --output=json -s 5M plain.qcow2",
    "map --output=json -s 4k middle",
    "measure --output=json -O raw top",
    "measure --output=json -O qcow2 bitmaps",
    "measure --output=json -O qcow2 -o compat=1.1 snapshots",
    "measure -O qcow2 -l one snapshots",
    "measure -O qcow2 -l three snapshots",
    "measure --output=json -O qcow2 -o extended_l2=on,preallocation=falloc plain.qcow2",
    "measure -O qcow2 -o backing_file=x,backing_fmt=raw plain.qcow2",
    "measure -O qcow2 -o nonsense=1 plain.qcow2",
    "measure -O vmdk plain.qcow2",
    "measure -O vdi plain.qcow2",
    "measure -O raw --size 5G",
    "measure -O qcow2 --size 5G --output=json",
    "measure -O qcow2 --size 5G plain.qcow2",
    "measure -O qcow2",
    "measure -O luks --size 5G",
    "measure -O qcow2 --output=xml --size 5G",
    "snapshot -l snapshots",
    "snapshot plain.qcow2",
    "snapshot -l vmdk",
    "compare -s plain.qcow2 packed",
    "compare -s plain.qcow2 v2",
    "compare -s plain.qcow2 top",
    "compare -U -q plain.qcow2 top",
    "compare plain.qcow2 nowhere",
    "compare plain.qcow2 plain.qcow2 plain.qcow2",
    "compare -T nonsense plain.qcow2 v2",
    "compare -f raw plain.qcow2 v2",
    "check raw",
    "check nowhere",
    "check -f raw plain.qcow2",
    "check -r nonsense plain.qcow2",
    "check -q plain.qcow2",
    "info nowhere",
    "info --output=xml plain.qcow2",
    "info -f nonsense plain.qcow2",
    "info plain.qcow2 v2",
    "info",
    "map",
    "frobnicate",
    "info --frobnicate plain.qcow2",
];

/// And of these, what they need to be opened.
const WITH_KEYS: &[(&str, &str)] = &[
    ("luks", "driver=luks,key-secret=s,file.filename=luks"),
    ("luks-cbc", "driver=luks,key-secret=s,file.driver=file,file.filename=luks-cbc"),
    ("encrypted", "driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename=encrypted"),
    ("aes", "driver=qcow2,encrypt.key-secret=s,file.filename=aes"),
    ("raw", "driver=raw,file.filename=raw"),
    ("raw", "driver=raw,offset=1048576,size=65536,file.filename=raw"),
    ("raw", "driver=raw,offset=1M,size=1000,file.filename=raw"),
    ("raw", "driver=raw,offset=1M,size=1G,file.filename=raw"),
    ("raw", "driver=raw,frob=1,file.filename=raw"),
    ("top", "driver=qcow2,file.filename=top,backing.driver=raw,backing.file.filename=raw"),
    ("top", "driver=qcow2,file.filename=top,backing="),
    ("top", "driver=qcow2,file.filename=nowhere"),
    ("top", "driver=nonsense,file.filename=top"),
    ("vhdx", "file.filename=vhdx"),
];

/// Our program, as qemu-img.
fn ours() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_terem"));
    command.arg("qemu-img");
    command
}

struct Images(TempDir);

impl Images {
    fn new() -> Self {
        let images = Self(tempfile::tempdir().unwrap());
        for command in IMAGES.iter().flat_map(|(_, commands)| commands.iter()) {
            let words: Vec<&str> = command.split_whitespace().collect();
            let output = match words[0] {
                "I" => images.run(Command::new("qemu-img").args(&words[1..])),
                _ => {
                    let io = words[3..].join(" ");
                    images.run(Command::new("qemu-io").args(["-f", words[1], "-c", &io, words[2]]))
                }
            };
            assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        }
        images
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn run(&self, command: &mut Command) -> Output {
        command.current_dir(self.path()).output().expect("QEMU's tools are needed for this test (qemu-utils)")
    }

    /// The same question to both; how the answers differ, if they do.
    fn ask(&self, words: &[&str]) -> Option<String> {
        let theirs = self.run(Command::new("qemu-img").args(words));
        let ours = self.run(ours().args(words));
        let text = |output: &Output| String::from_utf8_lossy(&output.stdout).into_owned();
        let (a, b) = (text(&theirs), text(&ours));
        if theirs.status.code() != ours.status.code() {
            let why = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
            return Some(format!(
                "exit {:?}: {}, ours {:?}: {}",
                theirs.status.code(),
                why(&theirs),
                ours.status.code(),
                why(&ours)
            ));
        }
        let json = words.contains(&"--output=json") && theirs.status.success();
        let same = if json { parsed(&a) == parsed(&b) } else { a == b };
        (!same).then(|| format!("theirs: {a}\nours: {b}"))
    }
}

/// JSON with the names of images that are JSON themselves read as such: their order says nothing.
fn parsed(text: &str) -> Value {
    fn unfold(value: &mut Value) {
        match value {
            Value::String(text) => {
                if let Some(inner) =
                    text.strip_prefix("json:").and_then(|text| serde_json::from_str(text).ok())
                {
                    *value = inner;
                    strings(value);
                }
            }
            Value::Array(items) => items.iter_mut().for_each(unfold),
            Value::Object(map) => map.values_mut().for_each(unfold),
            _ => {}
        }
    }
    // What was said by options is text there.
    fn strings(value: &mut Value) {
        match value {
            Value::Number(number) => *value = number.to_string().into(),
            Value::Object(map) => map.values_mut().for_each(strings),
            _ => {}
        }
    }
    let mut value = serde_json::from_str(text).unwrap_or_else(|_| Value::from(text));
    unfold(&mut value);
    value
}

/// What is known to be told differently, and why.
fn known(name: &str, question: &str) -> bool {
    let verb = question.split_whitespace().next().unwrap_or_default();
    match (name, verb) {
        // QEMU also looks for holes of the file where such an image has data, and tells where an unallocated subcluster
        // would be.
        ("metadata", "map" | "measure") | ("subclusters", "map") => true,
        // QEMU does not know where a VHDX image has nothing.
        ("vhdx" | "vhdx-fixed", "measure") => true,
        _ => false,
    }
}

#[test]
fn every_image_is_told_of_and_read_as_qemu_does() {
    // One set of images: making them takes longer than all that is asked of them.
    let images = Images::new();
    described(&images);
    read(&images);
    served(&images);
}

/// Every image, and what is wrong, is told of as QEMU does.
fn described(images: &Images) {
    let mut different = Vec::new();
    for (name, _) in IMAGES {
        for question in QUESTIONS {
            if known(name, question) {
                continue;
            }
            let words: Vec<&str> =
                question.split_whitespace().map(|word| if word == "X" { name } else { word }).collect();
            if let Some(how) = images.ask(&words) {
                different.push(format!("{name}: {question}\n{how}"));
            }
        }
        // QEMU wants a passphrase for that.
        if !matches!(*name, "encrypted" | "aes" | "luks" | "luks-cbc") {
            different.extend(
                images.ask(&["check", "--output=json", name]).map(|how| format!("check {name}\n{how}")),
            );
        }
    }
    for question in MORE {
        let words: Vec<&str> = question.split_whitespace().collect();
        different.extend(images.ask(&words).map(|how| format!("{question}\n{how}")));
    }
    for (name, options) in WITH_KEYS {
        for verb in ["info", "map", "measure", "check"] {
            let words = [verb, "--output=json", "--object", "secret,id=s,data=pass", "--image-opts", options];
            // The names of secrets are no part of an image's name here.
            let backing = options.contains("backing");
            if verb == "info" && (options.contains("key-secret") || backing) {
                continue;
            }
            if let Some(how) = images.ask(&words) {
                different.push(format!("{name}: {verb} {options}\n{how}"));
            }
        }
    }
    assert!(different.is_empty(), "{} answers differ:\n{}", different.len(), different.join("\n\n"));
}

/// Every image has the same contents.
fn read(images: &Images) {
    let object = ["--object", "secret,id=s,data=pass"];
    for (name, _) in IMAGES {
        let options = WITH_KEYS.iter().find(|(of, options)| of == name && options.contains("key-secret"));
        let read = |mut program: Command, target: &str| {
            program.arg("convert").args(object);
            match options {
                Some((_, options)) => program.args(["--image-opts", options]),
                None => program.arg(name),
            };
            let output = images.run(program.args(["-O", "raw", target]));
            assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
            std::fs::read(images.path().join(target)).unwrap()
        };
        let theirs = read(Command::new("qemu-img"), "theirs.out");
        let ours = read(ours(), "ours.out");
        assert!(theirs == ours, "{name}");
    }
}

/// A server that ends with its first connection, as qemu-nbd is unless told otherwise.
fn serve(images: &Images) -> std::process::Child {
    let socket = images.path().join("socket");
    let _ = std::fs::remove_file(&socket);
    let mut command = Command::new("qemu-nbd");
    let words = ["-k", "socket", "-f", "qcow2", "-r", "plain.qcow2"];
    // It takes absolute paths only.
    let words = words.map(|word| if word == "socket" { socket.to_str().unwrap() } else { word });
    let server = command.args(words).current_dir(images.path()).spawn().unwrap();
    for _ in 0..1000 {
        if socket.exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    server
}

/// An export is reached by one connection, whatever is asked.
fn served(images: &Images) {
    let socket = images.path().join("socket").display().to_string();
    let address = format!("nbd+unix:///?socket={socket}");
    let tree = format!("driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={socket}");
    let json = format!(r#"json:{{"driver":"nbd","server":{{"type":"unix","path":"{socket}"}}}}"#);
    let old = format!("nbd:unix:{socket}");
    for question in [
        vec!["info", "--output=json", &address],
        vec!["map", "--output=json", &address],
        vec!["map", "--output=json", &old],
        vec!["map", "--output=json", &json],
        vec!["map", "--output=json", "--image-opts", &tree],
        vec!["measure", "--output=json", "-O", "raw", &address],
        vec!["compare", &address, "plain.qcow2"],
        vec!["compare", "plain.qcow2", &old],
        vec!["convert", "-f", "raw", "-O", "raw", &address, "copy"],
    ] {
        let mut answers = [Command::new("qemu-img"), ours()].map(|mut command| {
            let mut server = serve(images);
            let output = images.run(command.args(&question));
            let _ = server.kill();
            let _ = server.wait();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let copy = std::fs::read(images.path().join("copy")).ok();
            assert!(output.status.success(), "{question:?}: {}", String::from_utf8_lossy(&output.stderr));
            (if text.starts_with(['{', '[']) { parsed(&text) } else { text.into() }, copy)
        });
        let [theirs, ours] = &mut answers;
        assert!(theirs == ours, "{question:?}: {} {}", theirs.0, ours.0);
    }
}
