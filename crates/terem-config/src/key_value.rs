//! The `key=value,key=value` form of a table: one deserializer into the same serde types that TOML fills.
//!
//! The first word may stand without a key: it belongs to the type's main key (`debian.qcow2,readonly`). A later word without
//! a value means `on`. A key that takes several values is repeated. A comma inside a value is doubled. A `-` in a key is the
//! same as `_`.

use crate::error::{ConfigError, quote};
use serde::de::value::{MapAccessDeserializer, StrDeserializer};
use serde::de::{
    self, Deserialize, DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, Visitor,
};
use std::fmt;
use std::marker::PhantomData;

/// A table which can also be written as `key=value,key=value`.
pub trait KeyValue: DeserializeOwned {
    /// The key of the first word if it has none.
    const MAIN_KEY: &'static str;
    /// The key of words that begin with `+` or `-`, if there is one.
    const SIGNED_KEY: Option<&'static str> = None;
    /// A table within this one whose keys stand beside this one's: its name, and what those keys begin with.
    const INNER: Option<(&'static str, &'static [&'static str])> = None;
}

/// Reads the `key=value` form of a `T`.
///
/// # Errors
/// The first mistake, its key relative to `T`.
pub fn from_key_values<T: KeyValue>(text: &str) -> Result<T, ConfigError> {
    let fields = split::<T>(text)?;
    T::deserialize(Fields { fields: fields.into_iter(), values: None }).map_err(|error| error.0)
}

/// One key with all values given for it; `None` is a key alone.
type Field = (String, Vec<Option<String>>);

fn split<T: KeyValue>(text: &str) -> Result<Vec<Field>, ConfigError> {
    let mut fields: Vec<Field> = Vec::new();
    for (index, word) in split_words(text).into_iter().enumerate() {
        // An address may have a `=` in its query: `nbd+unix:///?socket=PATH`.
        let pair = word.split_once('=').filter(|(key, _)| !key.contains("://"));
        let (key, value) = match (pair, T::SIGNED_KEY) {
            (_, Some(key)) if word.starts_with(['+', '-']) => (key.to_string(), Some(word)),
            (Some((key, value)), _) => (key.to_string(), Some(value.to_string())),
            (None, _) if index == 0 => (T::MAIN_KEY.to_string(), Some(word)),
            (None, _) => (word, None),
        };
        if key.is_empty() {
            return Err(ConfigError::missing("", "a word has no key", "key=value,key=value"));
        }
        let key = key.replace('-', "_");
        if let Some((table, _)) = T::INNER.filter(|(_, keys)| keys.iter().any(|k| within(&key, k))) {
            let word = match value {
                Some(value) => format!("{key}={}", value.replace(',', ",,")),
                None => format!("{key}="),
            };
            match fields.iter_mut().find(|(k, _)| k == table) {
                Some((_, values)) => match values.first_mut() {
                    Some(Some(text)) => *text = format!("{text},{word}"),
                    _ => values.push(Some(word)),
                },
                None => fields.push((table.to_string(), vec![Some(word)])),
            }
            continue;
        }
        match fields.iter_mut().find(|(k, _)| *k == key) {
            Some((_, values)) => values.push(value),
            None => fields.push((key, vec![value])),
        }
    }
    Ok(fields)
}

/// Whether `key` is `first`, or begins with it and an underscore.
fn within(key: &str, first: &str) -> bool {
    key.strip_prefix(first).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
}

/// Splits at single commas; a doubled comma is one that belongs to the word. No text is no words.
fn split_words(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        match (letter, words.last_mut()) {
            (',', _) if letters.next_if_eq(&',').is_none() => words.push(String::new()),
            (_, Some(word)) => word.push(letter),
            (_, None) => {}
        }
    }
    if text.is_empty() { Vec::new() } else { words }
}

/// A mistake on its way out of serde.
#[derive(Debug)]
struct Mistake(ConfigError);

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Mistake {}

impl de::Error for Mistake {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(ConfigError::from_serde("", None, &message.to_string()))
    }
}

struct Fields {
    fields: std::vec::IntoIter<Field>,
    values: Option<Values>,
}

impl<'de> Deserializer<'de> for Fields {
    type Error = Mistake;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mistake> {
        visitor.visit_map(self)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct seq
        tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<'de> de::MapAccess<'de> for Fields {
    type Error = Mistake;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Mistake> {
        let Some((key, values)) = self.fields.next() else { return Ok(None) };
        let deserializer: StrDeserializer<'_, Mistake> = key.as_str().into_deserializer();
        let found = seed.deserialize(deserializer)?;
        self.values = Some(Values { key, values });
        Ok(Some(found))
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Mistake> {
        let values = self.values.take().ok_or_else(|| de::Error::custom("a value without a key"))?;
        let (key, given) = (values.key.clone(), values.given());
        seed.deserialize(values).map_err(|Mistake(mut error)| {
            error.value = error.value.or(given);
            Mistake(error.within(&key))
        })
    }
}

struct Values {
    key: String,
    values: Vec<Option<String>>,
}

impl Values {
    /// What the user wrote.
    fn given(&self) -> Option<String> {
        self.values.iter().rev().find_map(|value| value.as_ref().map(quote))
    }

    fn one(self) -> Result<Option<String>, Mistake> {
        let mut values = self.values.into_iter();
        match (values.next(), values.next()) {
            (Some(value), None) => Ok(value),
            _ => Err(de::Error::custom("it is given more than once; expected one value")),
        }
    }

    fn text(self) -> Result<String, Mistake> {
        self.one()?.ok_or_else(|| de::Error::custom("it stands without a value; expected key=value"))
    }

    fn number(self, range: &str) -> Result<i128, Mistake> {
        let text = self.text()?;
        text.parse().map_err(|_| de::Error::custom(format!("it is no whole number; expected {range}")))
    }
}

macro_rules! whole_numbers {
    ($($method:ident $visit:ident $type:ty),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mistake> {
            let range = format!("a whole number from {} to {}", <$type>::MIN, <$type>::MAX);
            let number = self.number(&range)?;
            let number = <$type>::try_from(number).map_err(|_| {
                de::Error::custom(format!("the number is out of range; expected {range}"))
            })?;
            visitor.$visit(number)
        }
    )*};
}

impl<'de> Deserializer<'de> for Values {
    type Error = Mistake;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mistake> {
        visitor.visit_string(self.text()?)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mistake> {
        match self.one()?.as_deref() {
            None | Some("on" | "true") => visitor.visit_bool(true),
            Some("off" | "false") => visitor.visit_bool(false),
            Some(_) => Err(de::Error::custom("it is no switch; expected on or off")),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mistake> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Mistake> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mistake> {
        let Self { key, values } = self;
        visitor.visit_seq(de::value::SeqDeserializer::new(
            values.into_iter().map(move |value| Self { key: key.clone(), values: vec![value] }),
        ))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Mistake> {
        visitor.visit_enum(de::value::StringDeserializer::<Mistake>::new(self.text()?))
    }

    whole_numbers! {
        deserialize_u8 visit_u8 u8, deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32, deserialize_u64 visit_u64 u64,
        deserialize_i8 visit_i8 i8, deserialize_i16 visit_i16 i16, deserialize_i32 visit_i32 i32, deserialize_i64 visit_i64 i64
    }

    serde::forward_to_deserialize_any! {
        f32 f64 char str string bytes byte_buf unit unit_struct tuple tuple_struct map struct identifier ignored_any
    }
}

impl IntoDeserializer<'_, Mistake> for Values {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// A field's `deserialize_with`: a table, or its `key=value` form as a string (or number, for `cpus = 4`).
pub(crate) fn one<'de, T: KeyValue, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    struct Either<T>(PhantomData<T>);

    impl<'de, T: KeyValue> Visitor<'de> for Either<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a table or its key=value,key=value form")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            from_key_values(text).map_err(E::custom)
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map))
        }
    }

    deserializer.deserialize_any(Either(PhantomData))
}

/// The same for a field that need not be there.
pub(crate) fn optional<'de, T: KeyValue, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    one(deserializer).map(Some)
}

/// The same for a list of them.
pub(crate) fn many<'de, T: KeyValue, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    struct One<T>(T);

    impl<'de, T: KeyValue> Deserialize<'de> for One<T> {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            one(deserializer).map(One)
        }
    }

    Ok(Vec::<One<T>>::deserialize(deserializer)?.into_iter().map(|one| one.0).collect())
}

/// What the JSON schema says of a field read by [`one`].
#[derive(schemars::JsonSchema)]
#[schemars(untagged)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) enum OrText<T> {
    /// The table.
    Table(T),
    /// Its `key=value,key=value` form.
    Text(String),
    /// The main key's value, where that is a number.
    Number(u64),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CpuConfig, DiskConfig, DiskFormat, NetConfig};

    fn disk_error(text: &str) -> String {
        from_key_values::<DiskConfig>(text).unwrap_err().to_string()
    }

    #[test]
    fn first_word_is_the_main_key() {
        let disk: DiskConfig = from_key_values("a,,b.img,readonly").unwrap();
        assert_eq!((disk.path.to_str(), disk.readonly), (Some("a,b.img"), true));
        // A first word with `=` is a key: a path with `=` in it is written with its key.
        assert!(from_key_values::<DiskConfig>("a=c.img").is_err());
        let nbd: DiskConfig = from_key_values("nbd+unix:///a?socket=/run/b,readonly").unwrap();
        assert_eq!((nbd.path.to_str(), nbd.readonly), (Some("nbd+unix:///a?socket=/run/b"), true));
    }

    #[test]
    fn doubled_commas_belong_to_the_word() {
        assert_eq!(split_words("a,,b,c"), ["a,b", "c"]);
        assert_eq!(split_words("a,"), ["a", ""]);
        assert!(split_words("").is_empty());
        let disk: DiskConfig =
            from_key_values("path=a,,b=c.img,readonly,locking=off,format=raw,backing=/x,backing=/y").unwrap();
        assert_eq!(disk.path.to_str(), Some("a,b=c.img"));
        assert!(disk.readonly && !disk.locking);
        assert_eq!(disk.format, DiskFormat::Raw);
        assert_eq!(disk.backing.len(), 2);
    }

    #[test]
    fn keys_of_a_table_within() {
        let disk: DiskConfig =
            from_key_values("a,bps-read=10M,readonly,iops_write_max=7,throttle-group=g").unwrap();
        assert_eq!(disk.throttle.bps_read, Some(crate::ByteSize::mib(10)));
        assert_eq!((disk.throttle.iops_write_max, disk.readonly), (Some(7), true));
        assert_eq!(disk.throttle_group.as_deref(), Some("g"));
        let whole: DiskConfig = from_key_values("a,throttle=bps=1K,,iops=5,iops-size=4K").unwrap();
        let (kib, four) = (crate::ByteSize::kib(1), crate::ByteSize::kib(4));
        assert_eq!(
            (whole.throttle.bps, whole.throttle.iops, whole.throttle.iops_size),
            (Some(kib), Some(5), Some(four))
        );
        for (wrong, expected) in [
            ("a,bps", "throttle = \"bps=\": bps = \"\": it is no size"),
            ("a,iops=1x", "throttle = \"iops=1x\": iops = \"1x\": it is no whole number"),
            ("a,bps_raed=1", "bps_raed: there is no such key"),
            ("a,bps=1,bps=2", "bps = \"2\": it is given more than once"),
        ] {
            let error = disk_error(wrong);
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn signed_words() {
        let cpu: CpuConfig = from_key_values("host,-avx2,+aes").unwrap();
        assert_eq!(cpu.model, "host");
        assert_eq!(cpu.flags.iter().map(ToString::to_string).collect::<Vec<_>>(), ["-avx2", "+aes"]);
    }

    #[test]
    fn mistakes_name_key_value_and_remedy() {
        assert_eq!(disk_error("a.img,fromat=raw").split(" (did").nth(1), Some(" you mean `format`?)"));
        assert_eq!(
            disk_error("a.img,format=parallels"),
            "format = \"parallels\": it is none of the choices; expected one of `probe`, `raw`, `qcow2`, `luks`, `vmdk`, `vdi`, `vhd`, `vpc`, `vhdx`"
        );
        assert_eq!(
            disk_error("a.img,readonly=yes"),
            "readonly = \"yes\": it is no switch; expected on or off"
        );
        assert_eq!(
            disk_error("a.img,queues=70000"),
            "queues = \"70000\": the number is out of range; expected a whole number from 0 to 65535"
        );
        assert_eq!(disk_error("a.img,queues"), "queues: it stands without a value; expected key=value");
        assert_eq!(
            disk_error("a.img,path=b"),
            "path = \"b\": it is given more than once; expected one value"
        );
        assert_eq!(
            disk_error("readonly=on"),
            "path: it is needed and was not given; expected a value for it"
        );
        assert_eq!(disk_error("a.img,"), "a word has no key; expected key=value,key=value");
        assert_eq!(
            from_key_values::<NetConfig>("user,forward=tcp:22").unwrap_err().to_string(),
            "forward = \"tcp:22\": it has no guest port; expected tcp:[HOSTADDR:]HOSTPORT:GUESTPORT or udp:…, such as tcp:2222:22 or tcp:[::1]:8080:80"
        );
    }
}
