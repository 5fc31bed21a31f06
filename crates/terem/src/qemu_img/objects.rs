//! `--object`: secrets, and where certificates are.

use super::Failed;
use super::text::options;
use base64ct::{Base64, Encoding};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use terem_block::{Keys, Passphrase};

/// Reads all objects of a command line.
pub fn keys(objects: &[String]) -> Result<Keys, Failed> {
    let mut keys = Keys::default();
    for text in objects {
        let mut object = parse(text)?;
        let kind = object.remove("qom-type").unwrap_or_default();
        let id = object.remove("id").ok_or_else(|| Failed::new("Parameter 'id' is missing"))?;
        match kind.as_str() {
            "secret" => keys.add_secret(id, secret(&mut object)?),
            "tls-creds-x509" => {
                let directory =
                    object.remove("dir").ok_or_else(|| Failed::new("tls-creds-x509: 'dir' is missing"))?;
                object.remove("endpoint");
                object.remove("verify-peer");
                keys.add_certificates(id, directory);
            }
            kind => {
                return Err(Failed::new(format!(
                    "object type '{kind}' is not supported; there are secret and tls-creds-x509"
                )));
            }
        }
        if let Some(left) = object.keys().next() {
            return Err(Failed::new(format!("Property '{kind}.{left}' not found")));
        }
    }
    Ok(keys)
}

/// `TYPE,id=ID,NAME=VALUE,…`, or the same as JSON.
fn parse(text: &str) -> Result<BTreeMap<String, String>, Failed> {
    if text.starts_with('{') {
        let wrong = |what: &dyn std::fmt::Display| Failed::new(format!("--object: {what}"));
        let value: Value = serde_json::from_str(text).map_err(|error| wrong(&error))?;
        let map = value.as_object().ok_or_else(|| wrong(&"it is no JSON object"))?;
        let plain = |(name, value): (&String, &Value)| match value {
            Value::String(text) => (name.clone(), text.clone()),
            value => (name.clone(), value.to_string()),
        };
        return Ok(map.iter().map(plain).collect());
    }
    // The first item may be the type alone.
    let (kind, rest) = text.split_once(',').unwrap_or((text, ""));
    let mut object: BTreeMap<_, _> = options(rest).into_iter().collect();
    object.insert("qom-type".into(), kind.strip_prefix("qom-type=").unwrap_or(kind).into());
    Ok(object)
}

/// A passphrase: `data` itself or what is in `file`, as it is or in Base64.
fn secret(object: &mut BTreeMap<String, String>) -> Result<Passphrase, Failed> {
    if object.contains_key("keyid") {
        return Err(Failed::new(
            "secret: 'keyid', a secret that is encrypted with another one, is not supported",
        ));
    }
    let bytes = match (object.remove("data"), object.remove("file")) {
        (Some(data), None) => Passphrase::new(data.into_bytes()),
        (None, Some(file)) => File::open(&file)
            .and_then(|mut opened| Passphrase::read(&mut opened))
            .map_err(|error| Failed::new(format!("Unable to read {file}: {error}")))?,
        (Some(_), Some(_)) => {
            return Err(Failed::new("'file' and 'data' are mutually exclusive"));
        }
        (None, None) => return Err(Failed::new("Must provide 'file' or 'data'")),
    };
    match object.remove("format").as_deref() {
        None | Some("raw") => Ok(bytes),
        Some("base64") => {
            let text: Vec<u8> = bytes.bytes().iter().copied().filter(|b| !b.is_ascii_whitespace()).collect();
            let text = Passphrase::new(text);
            let text = std::str::from_utf8(text.bytes()).map_err(Failed::new)?;
            Base64::decode_vec(text)
                .map(Passphrase::new)
                .map_err(|_| Failed::new("Base64 data of the secret is not valid"))
        }
        Some(other) => Err(Failed::new(format!("Parameter 'format' does not accept value '{other}'"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(objects: &[&str]) -> Result<Keys, String> {
        let objects: Vec<String> = objects.iter().map(|&text| text.to_owned()).collect();
        keys(&objects).map_err(|failed| failed.text)
    }

    #[test]
    fn secrets() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("secret");
        std::fs::write(&file, "aGFsbG8=\n").expect("written");
        let from_file = format!("secret,id=f,file={},format=base64", file.display());
        let json = r#"{"qom-type":"secret","id":"j","data":"x,y"}"#;
        let keys = read(&["secret,id=s,data=a,,b", &from_file, json]).expect("good");
        for (id, passphrase) in [("s", "a,b"), ("f", "hallo"), ("j", "x,y")] {
            assert_eq!(keys.secret(id).expect(id).bytes(), passphrase.as_bytes());
        }
        assert!(keys.secret("other").is_none());
        for (bad, part) in [
            ("secret,data=x", "'id'"),
            ("secret,id=s", "Must provide"),
            ("secret,id=s,data=x,file=y", "exclusive"),
            ("secret,id=s,data=x,keyid=m", "keyid"),
            ("secret,id=s,data=x,frob=1", "frob"),
            ("secret,id=s,data=*,format=base64", "Base64"),
            ("secret,id=s,file=/nowhere", "Unable to read"),
            ("throttle-group,id=s", "not supported"),
        ] {
            let failed = read(&[bad]).expect_err(bad);
            assert!(failed.contains(part), "{bad}: {failed}");
        }
    }
}
