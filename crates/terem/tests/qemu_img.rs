//! The same commands to QEMU's qemu-img and to ours: the same exit codes, JSON and contents.
#![allow(clippy::unwrap_used)] // Here too a panic is how a test fails, also outside of test functions.

use serde_json::Value;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// One of the two.
struct Side {
    directory: TempDir,
    ours: bool,
}

impl Side {
    fn run(&self, words: &[&str]) -> (i32, String) {
        let mut command = if self.ours {
            let mut command = Command::new(env!("CARGO_BIN_EXE_terem"));
            command.arg("qemu-img");
            command
        } else {
            Command::new("qemu-img")
        };
        let output = command.args(words).current_dir(self.directory.path()).output();
        let output = output.expect("qemu-img is needed for this test (Debian: qemu-utils)");
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }
}

/// Both sides.
struct Both([Side; 2]);

impl Both {
    fn new() -> Self {
        Self([false, true].map(|ours| Side { directory: tempfile::tempdir().unwrap(), ours }))
    }

    /// Runs a command on both sides, which must exit with this code.
    fn run(&self, code: i32, words: &str) -> [String; 2] {
        let words: Vec<&str> =
            words.split_whitespace().map(|word| if word == "''" { "" } else { word }).collect();
        self.0.each_ref().map(|side| {
            let (found, text) = side.run(&words);
            assert_eq!(found, code, "{words:?}, ours: {}: {text}", side.ours);
            text
        })
    }

    /// The same, and what is printed must be the same JSON, but for what depends on the order of clusters in the file.
    fn json(&self, code: i32, words: &str) {
        let [theirs, ours] = self.run(code, words).map(|text| {
            let value: Result<Value, _> = serde_json::from_str(&text);
            assert!(value.is_ok(), "{words}: {value:?}: {text}");
            let mut value = value.unwrap_or_default();
            forget(&mut value);
            value
        });
        assert_eq!(theirs, ours, "{words}");
    }

    /// What is printed must be the same.
    fn text(&self, code: i32, words: &str) {
        let [theirs, ours] = self.run(code, words);
        assert_eq!(theirs, ours, "{words}");
    }

    fn write(&self, name: &str, commands: &[&str]) {
        for side in &self.0 {
            let mut io = Command::new("qemu-io");
            for command in commands {
                io.args(["-c", command]);
            }
            assert!(io.arg(side.path(name)).output().unwrap().status.success());
        }
    }

    /// A disk must hold the same on both sides, as QEMU reads it.
    fn same_contents(&self, name: &str) {
        let [a, b] = self.0.each_ref().map(|side| side.path(name));
        let same = Command::new("qemu-img").arg("compare").args([a, b]).output().unwrap();
        assert!(same.status.success(), "{name}: {}", String::from_utf8_lossy(&same.stdout));
    }
}

/// Drops what may differ: dates, and how much of a file is taken and how long it is.
fn forget(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for name in
                ["actual-size", "date-sec", "date-nsec", "image-end-offset", "fragmented-clusters", "offset"]
            {
                map.remove(name);
            }
            if map.get("format") == Some(&Value::from("file")) {
                map.remove("virtual-size");
            }
            map.values_mut().for_each(forget);
        }
        Value::Array(items) => items.iter_mut().for_each(forget),
        _ => {}
    }
}

#[test]
fn images_are_made_and_described() {
    let both = Both::new();
    for (i, shape) in [
        "-f qcow2 -o cluster_size=4k",
        "-f qcow2 -o compat=v2",
        "-f qcow2 -o extended_l2=on,compression_type=zstd",
        "-f qcow2 -o refcount_bits=64,lazy_refcounts=on",
        "-f qcow2 -o preallocation=metadata",
        "-f raw",
        "",
    ]
    .iter()
    .enumerate()
    {
        both.text(0, &format!("create {shape} {i} 1.5M"));
        both.json(0, &format!("info --output=json {i}"));
        if i < 5 {
            both.json(0, &format!("check --output=json {i}"));
        } else {
            both.run(63, &format!("check {i}"));
        }
    }
    both.text(0, "create -f qcow2 -b 0 -F qcow2 top");
    both.run(1, "create -f qcow2 -b 0 top2");
    both.run(1, "create -f qcow2 -o nonsense=1 x 1M");
    both.run(1, "create -f nonsense x 1M");
    both.run(1, "create -f qcow2 x");
    both.run(1, "create -f qcow2 -o cluster_size=1000 x 1M");
    both.text(0, "create -u -f qcow2 -b nowhere -F raw u 1M");
    both.text(0, "snapshot -c s1 0");
    both.text(0, "bitmap --add 0 bm");
    both.run(1, "bitmap --remove 0 nothing");
    both.json(0, "info --output=json --backing-chain top");
    both.run(1, "info nowhere");
    both.run(1, "info -f qcow2 5");
}

#[test]
fn disks_are_copied_and_compared() {
    let both = Both::new();
    both.run(0, "create -q -f qcow2 -o cluster_size=4k base 2M");
    both.run(0, "create -q -f qcow2 -b base -F qcow2 top");
    both.write("base", &["write -P 1 64k 100k", "write -P 3 1M 300k"]);
    both.write("top", &["write -P 2 300k 100k", "write -z 1100k 64k"]);
    for command in ["map top", "map --start-offset 128k --max-length 256k base"] {
        both.json(0, &format!("{command} --output=json"));
        both.text(0, command);
    }
    for (name, how) in [
        ("raw", "-O raw"),
        ("qcow2", "-O qcow2 -m 16 -W"),
        ("packed", "-c -O qcow2"),
        ("overlay", "-O qcow2 -B base -F qcow2"),
        ("small", "-O qcow2 -o cluster_size=512,compat=v2 -S 0"),
    ] {
        both.run(0, &format!("convert {how} top {name}"));
        both.same_contents(name);
        both.run(0, &format!("compare top {name}"));
        both.json(0, &format!("info --output=json {name}"));
    }
    both.run(0, "convert -n -O qcow2 top qcow2");
    both.same_contents("qcow2");
    both.run(1, "map packed");
    both.text(1, "compare base top");
    both.run(2, "compare nowhere top");
    both.run(1, "convert -O qcow2 nowhere x");
    both.run(1, "convert -O nonsense top x");
    for options in ["-O qcow2 top", "-O raw top", "-O qcow2 --size 1G", "-O qcow2 -o cluster_size=4k top"] {
        both.json(0, &format!("measure --output=json {options}"));
        both.text(0, &format!("measure {options}"));
    }
    both.run(0, "dd if=raw of=part bs=1k count=600 skip=64");
    both.same_contents("part");
    both.json(0, "check --output=json packed");
}

#[test]
fn images_are_changed() {
    let both = Both::new();
    both.run(0, "create -q -f qcow2 base 2M");
    both.run(0, "create -q -f qcow2 -b base -F qcow2 top");
    both.write("base", &["write -P 1 64k 100k"]);
    both.write("top", &["write -P 2 300k 100k"]);
    both.run(0, "snapshot -c s1 top");
    both.write("top", &["write -P 5 0 1M"]);
    both.run(0, "snapshot -c s2 top");
    both.run(0, "snapshot -a s1 top");
    both.same_contents("top");
    both.run(0, "snapshot -d s1 top");
    both.run(1, "snapshot -d s1 top");
    both.text(0, "resize top +1M");
    both.run(1, "resize top 1M");
    both.text(0, "resize --shrink top 2560k");
    both.json(0, "info --output=json top");
    both.run(0, "snapshot -d s2 top");
    both.run(0, "create -q -f raw other 1M");
    both.run(0, "rebase -b other -F raw top");
    both.same_contents("top");
    both.run(0, "rebase -u -b base -F qcow2 top");
    both.text(0, "commit top");
    both.same_contents("base");
    both.json(0, "check --output=json base");
    both.run(1, "commit base");
    both.run(0, "amend -o compat=v2 base");
    both.json(0, "info --output=json base");
    both.run(0, "amend -o compat=v3,lazy_refcounts=on,refcount_bits=8 base");
    both.json(0, "info --output=json base");
    both.run(0, "rebase -u -b '' top");
    both.json(0, "info --output=json top");
    both.text(1, "nonsense");
    for side in &both.0 {
        assert!(Path::new(&side.path("top")).exists());
    }
}

#[test]
fn options_of_copies_do_what_they_say() {
    let both = Both::new();
    both.run(0, "create -q -f raw a 1M");
    both.run(0, "create -q -f raw b 512k");
    for side in &both.0 {
        for (name, command) in [("a", "write -P 1 100k 300k"), ("b", "write -P 2 0 64k")] {
            let io = Command::new("qemu-io").args(["-f", "raw", "-c", command]).arg(side.path(name)).output();
            assert!(io.unwrap().status.success());
        }
    }
    for (name, how) in [
        ("joined", "-f raw -O qcow2 a b a"),
        ("joined.vdi", "-O vdi a b"),
        ("offloaded", "-C -O raw a"),
        ("full", "-S 0 -O raw b"),
        ("full.qcow2", "-S 0 -O qcow2 b"),
        ("slow", "-r 100M -m 3 -W -O qcow2 a"),
        ("salvaged", "--salvage -O raw a"),
        ("part", "-O raw --image-opts driver=raw,offset=64k,size=128k,file.filename=a"),
        ("tree", r#"-O qcow2 json:{"driver":"raw","offset":65536,"file":{"driver":"file","filename":"a"}}"#),
    ] {
        both.run(0, &format!("convert {how} {name}"));
        both.same_contents(name);
    }
    for side in &both.0 {
        let [a, b] = ["a", "b"].map(|name| std::fs::read(side.path(name)).unwrap());
        side.run(&["convert", "-O", "raw", "joined", "joined.raw"]);
        assert!(std::fs::read(side.path("joined.raw")).unwrap() == [a.clone(), b, a].concat());
        use std::os::unix::fs::MetadataExt;
        // Everything has its place on the storage.
        assert!(std::fs::metadata(side.path("full")).unwrap().blocks() * 512 >= 512 << 10);
    }
    both.run(0, "create -q -f raw there 1M");
    both.run(0, "convert -n --target-is-zero -O raw a there");
    both.same_contents("there");
    both.run(0, "convert -n --target-image-opts b driver=raw,file.filename=there");
    both.same_contents("there");
    for wrong in [
        "convert -C -c -O qcow2 a x",
        "convert -C -S 4k a x",
        "convert -C --salvage a x",
        "convert --target-is-zero a x",
        "convert --target-image-opts a driver=raw,file.filename=there",
        "convert --skip-broken-bitmaps a x",
        "convert -S 1000 a x",
        "convert -m 17 a x",
        "convert -n a b",
        "convert -l s a b x",
        "convert -B a -F raw -O qcow2 a b x",
        "convert --bitmaps -O qcow2 a b x",
        "convert -c -O raw a x",
        "convert -r x a x",
        "convert a",
    ] {
        both.run(1, wrong);
    }
}

#[test]
fn keys_and_chains_are_changed() {
    let both = Both::new();
    let secrets = "--object secret,id=s,data=old --object secret,id=n,data=new";
    let opened = "--image-opts driver=luks,key-secret=s,file.filename=l";
    both.run(0, "create -q -f qcow2 data 1M");
    both.write("data", &["write -P 7 100k 300k"]);
    both.run(0, &format!("convert {secrets} -O luks -o key-secret=s,iter-time=10 data l"));
    both.run(0, &format!("amend {secrets} {opened} -o state=active,new-secret=n,iter-time=10,keyslot=3"));
    both.run(1, &format!("amend {secrets} {opened} -o state=active,new-secret=n,iter-time=10,keyslot=3"));
    both.run(1, &format!("amend {secrets} {opened} -o state=inactive,keyslot=5"));
    both.run(0, &format!("amend {secrets} {opened} -o state=inactive,keyslot=0"));
    both.run(1, &format!("amend {secrets} {opened} -o state=inactive,keyslot=3"));
    let opened = opened.replace("=s,", "=n,");
    both.run(1, &format!("amend {secrets} {opened} -o state=inactive,old-secret=n"));
    both.run(0, &format!("convert {secrets} {opened} -O raw out"));
    both.same_contents("out");
    // Our image opens with QEMU, and the other way round.
    let [theirs, ours] = &both.0;
    std::fs::rename(ours.path("l"), theirs.path("other")).unwrap();
    std::fs::rename(theirs.path("l"), ours.path("other")).unwrap();
    both.run(0, &format!("convert {secrets} {} -O raw out", opened.replace("filename=l", "filename=other")));

    both.run(0, "create -q -f qcow2 base 4M");
    both.run(0, "create -q -f qcow2 -b base -F qcow2 mid");
    both.run(0, "create -q -f qcow2 -b mid -F qcow2 top");
    both.write("base", &["write -P 1 0 2M"]);
    both.write("mid", &["write -P 2 512k 1M"]);
    both.write("top", &["write -P 3 1M 1M"]);
    both.run(0, "commit -q -d -r 100M top");
    both.same_contents("mid");
    both.run(0, "commit -q -b base top");
    both.same_contents("base");
    both.run(1, "commit -b nowhere top");
    both.run(0, "rebase -c -b '' top");
    both.same_contents("top");
    both.json(0, "check --output=json top");
    both.run(0, "bitmap --add top one");
    both.run(0, "bitmap --remove --add top one");
    both.run(0, "bitmap --add --merge one --disable top two");
    both.json(0, "info --output=json top");
}
