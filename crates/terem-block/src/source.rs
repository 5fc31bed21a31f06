//! Images named as QEMU's tools name them: `json:{…}`, lists of options, and the older forms of NBD addresses.
//!
//! ```text
//!  {"driver": "qcow2", "file": {"driver": "file", "filename": "a.qcow2"}, "backing": {…}}
//!  driver=qcow2,file.driver=file,file.filename=a.qcow2,backing.driver=…
//! ```
//!
//! Both are a tree of nodes; its leaves are `file`, `host_device` and `nbd`. What an [`Opening`](crate::chain::Opening)
//! can do with such a tree is taken over into [`OpenOptions`]; what it cannot do is refused, and so is every option that
//! nobody knows: none is silently left out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::chain::resolve_backing;
use crate::node::directory_of;
use crate::{BackingPolicy, Below, Cache, FilePart, Format, Keys, OpenError, OpenOptions, Source, nbd};

/// What a name that is a tree begins with.
pub(crate) const JSON: &str = "json:";
/// Deepest nesting of nodes.
const MAX_DEPTH: usize = 32;
/// Most bytes of a name.
const MAX_NAME: usize = 1 << 20;

/// Options that only say how QEMU's own caches, threads and graph are to be, and change nothing of what a disk holds.
const TUNING: [&str; 17] = [
    "node-name",
    "auto-read-only",
    "detect-zeroes",
    "aio",
    "locking",
    "lazy-refcounts",
    "overlap-check",
    "l2-cache-size",
    "refcount-cache-size",
    "cache-size",
    "l2-cache-entry-size",
    "cache-clean-interval",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "x-check-cache-dropped",
    "aio-max-batch",
];

impl Source {
    /// A name of any kind: `json:` and a tree, an address, or a file's path, perhaps with `file:` before it. `base` has
    /// what is not said there.
    ///
    /// # Errors
    /// [`OpenError::Limit`] says what of a tree is not understood.
    pub fn named(name: &str, base: &OpenOptions) -> Result<Self, OpenError> {
        if name.starts_with(JSON) {
            return Self::json(name, base);
        }
        let path = match old_nbd(name) {
            Some(address) => address.into(),
            None => name.strip_prefix("file:").unwrap_or(name).into(),
        };
        Ok(Self { path, options: base.clone() })
    }

    /// `json:` and a tree.
    ///
    /// # Errors
    /// As [`Self::named`].
    pub fn json(name: &str, base: &OpenOptions) -> Result<Self, OpenError> {
        let wrong = |what: String| wrong(name, what);
        let text = name.strip_prefix(JSON).unwrap_or(name);
        if text.len() > MAX_NAME {
            return Err(wrong("it is too long".into()));
        }
        let value: Value = serde_json::from_str(&with_double_quotes(text))
            .map_err(|error| wrong(format!("it is no JSON: {error}")))?;
        let mut options = Tree::default();
        if !value.is_object() {
            return Err(wrong("it is no JSON object".into()));
        }
        options.add("", &value, 0).map_err(wrong)?;
        Self::from_tree(name, options, base)
    }

    /// A list of options, names and values.
    ///
    /// # Errors
    /// As [`Self::named`].
    pub fn from_options(
        name: &str,
        options: impl IntoIterator<Item = (String, String)>,
        base: &OpenOptions,
    ) -> Result<Self, OpenError> {
        let options = options.into_iter().map(|(name, value)| (name, Some(value))).collect();
        Self::from_tree(name, Tree(options), base)
    }

    fn from_tree(name: &str, mut tree: Tree, base: &OpenOptions) -> Result<Self, OpenError> {
        let source = node(&mut tree, base, 0).map_err(|what| match what {
            Refused::Text(what) => wrong(name, what),
            Refused::Open(error) => *error,
        })?;
        Ok(source)
    }
}

fn wrong(name: &str, what: String) -> OpenError {
    // A tree can be long, and its beginning says which it is.
    let short: String = name.chars().take(200).collect();
    OpenError::Limit { path: short.into(), what }
}

/// Why a tree is refused.
enum Refused {
    Text(String),
    Open(Box<OpenError>),
}

impl From<String> for Refused {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&str> for Refused {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<OpenError> for Refused {
    fn from(error: OpenError) -> Self {
        Self::Open(Box::new(error))
    }
}

/// A tree with the names of its branches put together by dots; `None` is JSON's `null`.
#[derive(Default)]
struct Tree(BTreeMap<String, Option<String>>);

impl Tree {
    fn add(&mut self, name: &str, value: &Value, depth: usize) -> Result<(), String> {
        if depth > MAX_DEPTH {
            return Err("it is nested too deeply".into());
        }
        let inner = |key: &str| if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
        let text = match value {
            Value::Object(map) => {
                return map.iter().try_for_each(|(key, value)| self.add(&inner(key), value, depth + 1));
            }
            Value::Array(items) => {
                return items
                    .iter()
                    .enumerate()
                    .try_for_each(|(i, v)| self.add(&inner(&i.to_string()), v, depth + 1));
            }
            Value::Null => None,
            Value::Bool(on) => Some(if *on { "on" } else { "off" }.to_owned()),
            Value::Number(number) => Some(number.to_string()),
            Value::String(text) => Some(text.clone()),
        };
        self.0.insert(name.to_owned(), text);
        Ok(())
    }

    fn take(&mut self, name: &str) -> Option<String> {
        self.0.remove(name).flatten()
    }

    /// Takes the branch `name` out; `None` where there is none.
    fn branch(&mut self, name: &str) -> Option<Self> {
        let prefix = format!("{name}.");
        let keys: Vec<String> = self.0.keys().filter(|key| key.starts_with(&prefix)).cloned().collect();
        let taken = keys.into_iter().filter_map(|key| {
            let value = self.0.remove(&key)?;
            Some((key[prefix.len()..].to_owned(), value))
        });
        let taken: BTreeMap<_, _> = taken.collect();
        (!taken.is_empty()).then_some(Self(taken))
    }

    fn flag(&mut self, name: &str) -> Result<Option<bool>, Refused> {
        match self.take(name).as_deref() {
            None => Ok(None),
            Some("on" | "true" | "yes" | "y") => Ok(Some(true)),
            Some("off" | "false" | "no" | "n") => Ok(Some(false)),
            Some(other) => Err(format!("{name}={other}: it is on or off").into()),
        }
    }

    fn bytes(&mut self, name: &str) -> Result<Option<u64>, Refused> {
        let Some(text) = self.take(name) else { return Ok(None) };
        let number =
            crate::format::size(&text).map_err(|_| format!("{name}={text}: it is a number of bytes"))?;
        Ok(Some(number))
    }
}

/// A node: its options, and those of what is below it.
fn node(tree: &mut Tree, base: &OpenOptions, depth: usize) -> Result<Source, Refused> {
    if depth > MAX_DEPTH {
        return Err("it is nested too deeply".into());
    }
    let mut options = base.clone();
    common(tree, &mut options)?;
    let driver = tree.take("driver");
    let mut source = match driver.as_deref() {
        Some("file" | "host_device") => Source { path: filename(tree)?, options: with(options, Format::Raw) },
        Some("nbd") => {
            Source { path: address(tree, &options.keys)?.into(), options: with(options, Format::Raw) }
        }
        Some(name) => {
            let format = Format::from_name(name).ok_or_else(|| format!("Unknown driver '{name}'"))?;
            let file = file(tree, base, depth)?;
            options.part = file.options.part;
            format_node(tree, format, Source { path: file.path, options }, depth)?
        }
        None => {
            let file = file(tree, base, depth)?;
            options.part = file.options.part;
            Source { path: file.path, options }
        }
    };
    if source.options.format.is_none() && driver.is_some() {
        source.options.format = Some(Format::Raw);
    }
    match tree.0.keys().next() {
        None => Ok(source),
        Some(left) => {
            let driver = driver.as_deref().unwrap_or("file");
            Err(format!("Block driver '{driver}' does not support the option '{left}'").into())
        }
    }
}

fn with(options: OpenOptions, format: Format) -> OpenOptions {
    OpenOptions { format: Some(format), ..options }
}

/// The options that every node has.
fn common(tree: &mut Tree, options: &mut OpenOptions) -> Result<(), Refused> {
    if tree.flag("read-only")? == Some(true) {
        options.read_only = true;
    }
    if tree.flag("force-share")? == Some(true) {
        if !options.read_only {
            // As QEMU: what others may write is not written here.
            options.read_only = true;
        }
        options.lock = false;
    }
    if let Some(discard) = tree.take("discard") {
        options.discard = match discard.as_str() {
            "unmap" | "on" => true,
            "ignore" | "off" => false,
            other => return Err(format!("discard={other}: it is unmap or ignore").into()),
        };
    }
    let (direct, no_flush) = (tree.flag("cache.direct")?, tree.flag("cache.no-flush")?);
    tree.flag("cache.writeback")?;
    match (direct, no_flush) {
        (Some(true), _) => options.cache = Cache::Direct,
        (_, Some(true)) => options.cache = Cache::Unsafe,
        _ => {}
    }
    if tree.0.get("locking").is_some_and(|value| value.as_deref() == Some("off")) {
        options.lock = false;
    }
    for name in TUNING {
        tree.0.remove(name);
    }
    tree.branch("overlap-check");
    Ok(())
}

fn filename(tree: &mut Tree) -> Result<PathBuf, Refused> {
    let name = tree.take("filename").ok_or("a file name is missing ('filename')")?;
    Ok(name.strip_prefix("file:").unwrap_or(&name).into())
}

/// The branch `file` of a node with a format: a file, an address, or a part of a file.
fn file(tree: &mut Tree, base: &OpenOptions, depth: usize) -> Result<Source, Refused> {
    if depth > MAX_DEPTH {
        return Err("it is nested too deeply".into());
    }
    if let Some(node) = tree.take("file") {
        return Err(format!("Cannot find device='' nor node-name='{node}'").into());
    }
    let Some(mut branch) = tree.branch("file") else {
        let name = tree.take("filename").ok_or("A block device must be specified for \"file\"")?;
        return Ok(Source::named(&name, base)?);
    };
    // What is said of the file is said of the image.
    let mut below = base.clone();
    common(&mut branch, &mut below)?;
    let source = match branch.take("driver").as_deref() {
        None => {
            let nbd =
                ["host", "path", "export", "server.type"].iter().any(|name| branch.0.contains_key(*name));
            if nbd {
                Source { path: address(&mut branch, &below.keys)?.into(), options: below }
            } else {
                Source::named(&filename(&mut branch)?.display().to_string(), &below)?
            }
        }
        Some("file" | "host_device") => Source { path: filename(&mut branch)?, options: below },
        Some("nbd") => Source { path: address(&mut branch, &below.keys)?.into(), options: below },
        Some("raw") => {
            let inner = file(&mut branch, &below, depth + 1)?;
            let part = part(&mut branch)?;
            if part.is_some() && inner.options.part.is_some() {
                return Err("a part of a part of a file cannot be opened".into());
            }
            let options = OpenOptions { part: part.or(inner.options.part), ..below };
            Source { path: inner.path, options }
        }
        Some(other) if Format::from_name(other).is_some() => {
            return Err(format!(
                "an image in a {other} image cannot be opened; copy the inner one out first"
            )
            .into());
        }
        Some(other) => return Err(format!("Unknown driver '{other}'").into()),
    };
    match branch.0.keys().next() {
        None => Ok(source),
        Some(left) => Err(format!("Block driver 'file' does not support the option '{left}'").into()),
    }
}

fn part(tree: &mut Tree) -> Result<Option<FilePart>, Refused> {
    let (offset, size) = (tree.bytes("offset")?, tree.bytes("size")?);
    let part = FilePart { offset: offset.unwrap_or(0), size };
    Ok((part != FilePart::default()).then_some(part))
}

/// What only one format has.
fn format_node(tree: &mut Tree, format: Format, mut source: Source, depth: usize) -> Result<Source, Refused> {
    source.options.format = Some(format);
    if format == Format::Raw {
        let part = part(tree)?;
        if part.is_some() && source.options.part.is_some() {
            return Err("a part of a part of a file cannot be opened".into());
        }
        source.options.part = part.or(source.options.part);
        return Ok(source);
    }
    let key = match format {
        Format::Luks => tree.take("key-secret"),
        Format::Qcow2 => {
            if let Some(method) = tree.take("encrypt.format")
                && !matches!(method.as_str(), "luks" | "aes")
            {
                return Err(format!("encrypt.format={method}: it is luks or aes").into());
            }
            tree.take("encrypt.key-secret")
        }
        _ => None,
    };
    // Who wants no data needs no passphrase.
    if let Some(id) = key.filter(|_| !source.options.keys.is_locked()) {
        let passphrase = secret(&source.options.keys, &id)?;
        source.options.keys.set(source.path.clone(), passphrase);
    }
    if format == Format::Luks {
        if let Some(mut header) = tree.branch("header") {
            let header = file(&mut Tree(prefixed(&mut header)), &source.options, depth)?;
            source.options.keys.set_header(source.path.clone(), header.path);
        }
        return Ok(source);
    }
    if matches!(format, Format::Qcow2 | Format::Vmdk) {
        below(tree, &mut source, depth)?;
    }
    Ok(source)
}

/// A branch as the branch `file` of a node.
fn prefixed(tree: &mut Tree) -> BTreeMap<String, Option<String>> {
    std::mem::take(&mut tree.0).into_iter().map(|(key, value)| (format!("file.{key}"), value)).collect()
}

pub(crate) fn secret(keys: &Keys, id: &str) -> Result<crate::Passphrase, String> {
    keys.secret(id).cloned().ok_or_else(|| format!("No secret with id '{id}'"))
}

/// The branch `backing`.
fn below(tree: &mut Tree, source: &mut Source, depth: usize) -> Result<(), Refused> {
    match tree.0.remove("backing") {
        None => {}
        Some(None) => {
            source.options.below = Below::Nothing;
            return Ok(());
        }
        Some(Some(name)) if name.is_empty() => {
            source.options.below = Below::Nothing;
            return Ok(());
        }
        Some(Some(name)) => return Err(format!("Cannot find device='' nor node-name='{name}'").into()),
    }
    let Some(mut branch) = tree.branch("backing") else { return Ok(()) };
    let base = OpenOptions { read_only: true, format: None, ..source.options.of_below() };
    let named = branch.0.keys().any(|key| key == "filename" || key.starts_with("file.")) || {
        branch.0.get("driver").is_some_and(|driver| matches!(driver.as_deref(), Some("nbd" | "file")))
    };
    if !named {
        // Only how the file is to be opened that the image names.
        let info = crate::info(&source.path, source.options.format)?;
        let written = info.qcow2.and_then(|qcow2| Some((qcow2.backing_filename?, qcow2.backing_format)));
        let (name, format) = written.ok_or("options for a backing file, and the image has none")?;
        let path = resolve_backing(&source.path, &name, &BackingPolicy::Any)?;
        branch.0.insert("file.filename".into(), Some(path.display().to_string()));
        if let Some(format) = format {
            branch.0.entry("driver".into()).or_insert(Some(format));
        }
    }
    source.options.below = Below::Image(Box::new(node(&mut branch, &base, depth + 1)?));
    Ok(())
}

/// The address of an `nbd` node.
fn address(tree: &mut Tree, keys: &Keys) -> Result<String, Refused> {
    let mut server = tree.branch("server").unwrap_or_default();
    let kind = server.take("type");
    let mut either = |name: &str| server.take(name).or_else(|| tree.take(name));
    let (path, host, port) = (either("path"), either("host"), either("port"));
    for ignored in ["ipv4", "ipv6", "numeric", "to", "keep-alive", "mptcp", "abstract", "tight"] {
        server.0.remove(ignored);
    }
    if let Some(left) = server.0.keys().next() {
        return Err(format!("Block driver 'nbd' does not support the option 'server.{left}'").into());
    }
    if let Some(kind) = kind.filter(|kind| !matches!(kind.as_str(), "inet" | "unix")) {
        return Err(format!("server.type={kind}: it is inet or unix").into());
    }
    let export = escape(&tree.take("export").unwrap_or_default());
    let mut query = Vec::new();
    let tls = match tree.take("tls-creds") {
        None => false,
        Some(id) => {
            let directory =
                keys.certificates(&id).ok_or_else(|| format!("No TLS credentials with id '{id}'"))?;
            query.push(format!("tls-certificates={}", escape(&directory.display().to_string())));
            true
        }
    };
    if let Some(name) = tree.take("tls-hostname") {
        query.push(format!("tls-hostname={}", escape(&name)));
    }
    if let Some(seconds) = tree.take("reconnect-delay") {
        query.push(format!("reconnect-delay={seconds}"));
    }
    tree.take("open-timeout");
    let scheme = if tls { "nbds" } else { "nbd" };
    let place = match (path, host) {
        (Some(path), None) => {
            query.insert(0, format!("socket={}", escape(&path)));
            format!("{scheme}+unix:///{export}")
        }
        (None, Some(host)) => {
            let host = if host.contains(':') { format!("[{host}]") } else { host };
            format!("{scheme}://{host}:{}/{export}", port.as_deref().unwrap_or("10809"))
        }
        (Some(_), Some(_)) => return Err("path and host may not be used at the same time".into()),
        (None, None) => return Err("one of path and host must be specified".into()),
    };
    Ok(if query.is_empty() { place } else { format!("{place}?{}", query.join("&")) })
}

/// `nbd:HOST:PORT` and `nbd:unix:SOCKET`, both perhaps with `:exportname=NAME` after it.
fn old_nbd(name: &str) -> Option<String> {
    let rest = name.strip_prefix("nbd:").filter(|rest| !rest.starts_with("//"))?;
    let (place, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
    let export = escape(export);
    Some(match place.strip_prefix("unix:") {
        Some(socket) => format!("nbd+unix:///{export}?socket={}", escape(socket)),
        None => format!("nbd://{place}/{export}"),
    })
}

/// Percent signs for what means something in an address.
fn escape(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' | b'~' | b':' => {
                char::from(byte).to_string()
            }
            byte => format!("%{byte:02x}"),
        })
        .collect()
}

/// QEMU's JSON has strings in single quotes, too.
fn with_double_quotes(text: &str) -> String {
    let (mut result, mut quote, mut escaped) = (String::with_capacity(text.len()), None, false);
    for c in text.chars() {
        match (quote, c) {
            (None, '\'') => {
                quote = Some('\'');
                result.push('"');
            }
            (None, '"') => {
                quote = Some('"');
                result.push('"');
            }
            (Some(_), '\'') if escaped => {
                // JSON has no such escape.
                result.pop();
                result.push('\'');
            }
            (Some(open), c) if c == open && !escaped => {
                quote = None;
                result.push('"');
            }
            (Some('\''), '"') if !escaped => result.push_str("\\\""),
            _ => result.push(c),
        }
        escaped = quote.is_some() && c == '\\' && !escaped;
    }
    result
}

/// Where a name inside an image leads: from the image's directory, unless it is an address or a tree.
#[must_use]
pub fn beside(image: &Path, name: &str) -> PathBuf {
    if name.starts_with(JSON) || nbd::is_address(Path::new(name)) || old_nbd(name).is_some() {
        return name.into();
    }
    match directory_of(image) {
        here if here == Path::new(".")
            && image.parent().is_none_or(|parent| parent.as_os_str().is_empty()) =>
        {
            name.into()
        }
        directory => directory.join(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Source, String> {
        Source::named(text, &OpenOptions::default()).map_err(|error| error.to_string())
    }

    #[test]
    fn trees_say_which_image() {
        let file =
            |text: &str| parse(text).map(|source| (source.path, source.options.format, source.options.part));
        let part = |offset, size| Some(FilePart { offset, size });
        for (text, path, format, at) in [
            ("a.img", "a.img", None, None),
            ("file:a:b", "a:b", None, None),
            (
                r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a"}}"#,
                "a",
                Some(Format::Qcow2),
                None,
            ),
            ("json:{'driver':'qcow2','file.filename':'a'}", "a", Some(Format::Qcow2), None),
            ("json:{'file':{'filename':'a \\'\"b'}}", "a '\"b", None, None),
            (
                r#"json:{"driver":"raw","offset":512,"file":{"filename":"a"}}"#,
                "a",
                Some(Format::Raw),
                part(512, None),
            ),
            (
                r#"json:{"driver":"vmdk","file":{"driver":"raw","offset":"1K","size":2048,"file":{"filename":"a"}}}"#,
                "a",
                Some(Format::Vmdk),
                part(1024, Some(2048)),
            ),
            (
                r#"json:{"driver":"nbd","server":{"type":"unix","path":"/s k"},"export":"x"}"#,
                "nbd+unix:///x?socket=/s%20k",
                Some(Format::Raw),
                None,
            ),
            (
                r#"json:{"driver":"raw","file":{"driver":"nbd","host":"h","port":7}}"#,
                "nbd://h:7/",
                Some(Format::Raw),
                None,
            ),
            ("nbd:unix:/s:exportname=x", "nbd+unix:///x?socket=/s", None, None),
            ("nbd:h:10", "nbd://h:10/", None, None),
        ] {
            assert_eq!(file(text), Ok((path.into(), format, at)), "{text}");
        }
        let source = parse(r#"json:{"driver":"qcow2","file.filename":"a","backing":null}"#).expect("good");
        assert!(matches!(source.options.below, Below::Nothing));
        let source = parse(
            r#"json:{"driver":"qcow2","file.filename":"a","backing":{"driver":"raw","file.filename":"b"}}"#,
        );
        let Below::Image(below) = source.expect("good").options.below else {
            panic!("it has a backing file")
        };
        assert_eq!((below.path, below.options.format), ("b".into(), Some(Format::Raw)));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (text, part) in [
            ("json:", "no JSON"),
            ("json:[]", "no JSON object"),
            ("json:{}", "must be specified"),
            (r#"json:{"driver":"quorum"}"#, "Unknown driver"),
            (r#"json:{"driver":"raw","file":"node0"}"#, "node-name='node0'"),
            (r#"json:{"driver":"raw","file.filename":"a","frob":1}"#, "'frob'"),
            (r#"json:{"driver":"raw","file":{"driver":"file","filename":"a","frob":1}}"#, "'frob'"),
            (r#"json:{"driver":"luks","key-secret":"s","file.filename":"a"}"#, "No secret with id 's'"),
            (r#"json:{"driver":"raw","offset":"x","file.filename":"a"}"#, "number of bytes"),
            (r#"json:{"driver":"raw","file":{"driver":"qcow2","file.filename":"a"}}"#, "copy the inner one"),
            (r#"json:{"driver":"nbd"}"#, "one of path and host"),
            (r#"json:{"driver":"vdi","file.filename":"a","backing":{"filename":"b"}}"#, "'backing.filename'"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
        let deep = format!("json:{}1{}", "{\"a\":".repeat(100), "}".repeat(100));
        assert!(parse(&deep).expect_err("deep").contains("deep"));
    }

    #[test]
    fn options_are_taken_over() {
        let mut base = OpenOptions::default();
        base.keys.add_secret("s", crate::Passphrase::new(b"pass".to_vec()));
        let text = "driver=luks,key-secret=s,file.filename=a,file.locking=off,cache.direct=on,read-only=on";
        let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
        let pairs = pairs.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let source = Source::from_options(text, pairs, &base).expect("good");
        assert_eq!(source.options.cache, Cache::Direct);
        assert!(source.options.read_only);
        assert_eq!(source.options.keys.of(Path::new("a")).expect("has one").bytes(), b"pass");
    }
}
