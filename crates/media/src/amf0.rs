//! AMF0, the encoding of RTMP commands and FLV script data.
//!
//! Source: *Action Message Format – AMF 0*, Adobe 2007. Section numbers refer to it.

use bytes::{BufMut, BytesMut};

use crate::{amf3, input::take_chunk};

/// One AMF0 value.
///
/// Objects keep their properties in wire order. Names may repeat; lookups return the first.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// §2.2.
    Number(f64),
    /// §2.3.
    Boolean(bool),
    /// §2.4, or the long string of §2.14 for 65,536 bytes and more. Decoding replaces bytes that
    /// are not UTF-8: older encoders send the system's code page.
    String(String),
    /// §2.5.
    Object(Vec<(String, Value)>),
    /// §2.7.
    Null,
    /// §2.8.
    Undefined,
    /// §2.10: named values. The count on the wire is only a hint and is discarded.
    EcmaArray(Vec<(String, Value)>),
    /// §2.12.
    StrictArray(Vec<Value>),
    /// §2.13.
    Date {
        /// Milliseconds since the Unix epoch, UTC.
        millis: f64,
        /// Reserved by the specification, normally 0.
        time_zone: i16,
    },
    /// §2.17: the text of an XML document.
    Xml(String),
    /// §2.18.
    TypedObject {
        /// The name of the registered class.
        class: String,
        /// As in [`Value::Object`].
        properties: Vec<(String, Value)>,
    },
}

impl Value {
    /// Returns an object with the given properties.
    pub fn object<const N: usize>(properties: [(&str, Value); N]) -> Self {
        Self::Object(properties.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }

    /// Appends the value's encoding to `out`.
    ///
    /// # Errors
    /// [`Amf0Error::TooDeep`] over [`MAX_DEPTH`] levels of nesting, [`Amf0Error::TooLong`] for a
    /// property name over 65,535 bytes. `out` then holds a part of the value.
    pub fn encode(&self, out: &mut BytesMut) -> Result<(), Amf0Error> {
        self.encode_at(0, out)
    }

    /// Returns the text, if this is a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }

    /// Returns the number, if this is one.
    pub fn as_number(&self) -> Option<f64> {
        match self {
            Self::Number(number) => Some(*number),
            _ => None,
        }
    }

    /// Returns the properties of an object, a typed object or an ECMA array.
    pub fn properties(&self) -> Option<&[(String, Value)]> {
        match self {
            Self::Object(properties)
            | Self::EcmaArray(properties)
            | Self::TypedObject { properties, .. } => Some(properties),
            _ => None,
        }
    }

    /// Returns the value of the property `name`.
    pub fn property(&self, name: &str) -> Option<&Value> {
        self.properties()?.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    fn encode_at(&self, depth: usize, out: &mut BytesMut) -> Result<(), Amf0Error> {
        if depth >= MAX_DEPTH {
            return Err(Amf0Error::TooDeep);
        }
        match self {
            Self::Number(number) => {
                out.put_u8(NUMBER);
                out.put_f64(*number);
            }
            Self::Boolean(value) => out.put_slice(&[BOOLEAN, (*value).into()]),
            Self::String(text) => match u16::try_from(text.len()) {
                Ok(len) => {
                    out.put_u8(STRING);
                    out.put_u16(len);
                    out.put_slice(text.as_bytes());
                }
                Err(_) => put_long(LONG_STRING, text, out)?,
            },
            Self::Object(properties) => {
                out.put_u8(OBJECT);
                put_properties(properties, depth, out)?;
            }
            Self::Null => out.put_u8(NULL),
            Self::Undefined => out.put_u8(UNDEFINED),
            Self::EcmaArray(properties) => {
                out.put_u8(ECMA_ARRAY);
                put_count(properties.len(), out)?;
                put_properties(properties, depth, out)?;
            }
            Self::StrictArray(values) => {
                out.put_u8(STRICT_ARRAY);
                put_count(values.len(), out)?;
                for value in values {
                    value.encode_at(depth + 1, out)?;
                }
            }
            Self::Date { millis, time_zone } => {
                out.put_u8(DATE);
                out.put_f64(*millis);
                out.put_i16(*time_zone);
            }
            Self::Xml(text) => put_long(XML_DOCUMENT, text, out)?,
            Self::TypedObject { class, properties } => {
                out.put_u8(TYPED_OBJECT);
                put_name(class, out)?;
                put_properties(properties, depth, out)?;
            }
        }
        Ok(())
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.to_owned())
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

/// Iterator over the consecutive values of a message. Ends after the first error.
///
/// AMF3 values are converted. Movie clips, references and record sets become [`Value::Undefined`]. An
/// object ends at a property that cannot be read, and the message with it.
///
/// Safe on hostile input: at most [`MAX_DEPTH`] levels of nesting, [`MAX_VALUES`] values and
/// [`MAX_LEN`] bytes, and no allocation is sized by a count from the input.
#[derive(Debug, Clone)]
pub struct Decoder<'a> {
    input: &'a [u8],
    values: usize,
    /// `true` once the input was given up at a property that cannot be read.
    is_cut: bool,
}

impl<'a> Decoder<'a> {
    /// A decoder at the start of `input`.
    pub fn new(input: &'a [u8]) -> Self {
        Self { input, values: 0, is_cut: false }
    }

    /// Returns the input that has not been decoded yet.
    pub fn remaining(&self) -> &'a [u8] {
        self.input
    }

    fn value(&mut self, depth: usize) -> Result<Value, Amf0Error> {
        if depth >= MAX_DEPTH {
            return Err(Amf0Error::TooDeep);
        }
        self.values += 1;
        if self.values > MAX_VALUES {
            return Err(Amf0Error::TooMany);
        }
        let [marker] = self.array()?;
        Ok(match marker {
            NUMBER => Value::Number(f64::from_be_bytes(self.array()?)),
            BOOLEAN => Value::Boolean(self.array::<1>()? != [0]),
            STRING => Value::String(self.short_text()?),
            OBJECT => Value::Object(self.properties(depth)?),
            NULL => Value::Null,
            UNDEFINED | UNSUPPORTED => Value::Undefined,
            ECMA_ARRAY => {
                // §2.10: the count is a hint; the end marker decides.
                self.array::<4>()?;
                Value::EcmaArray(self.properties(depth)?)
            }
            STRICT_ARRAY => {
                let count = u32::from_be_bytes(self.array()?) as usize;
                // Each value takes at least one byte, so a larger count is false.
                if count > self.input.len() {
                    return Err(Amf0Error::Truncated);
                }
                let mut values = Vec::new();
                for _ in 0..count {
                    values.push(self.value(depth + 1)?);
                    if self.is_cut {
                        break;
                    }
                }
                Value::StrictArray(values)
            }
            // §2.6, §2.9, §2.16: reserved or a reference, none of which RTMP needs.
            MOVIE_CLIP | RECORD_SET => Value::Undefined,
            REFERENCE => {
                self.array::<2>()?;
                Value::Undefined
            }
            DATE => Value::Date {
                millis: f64::from_be_bytes(self.array()?),
                time_zone: i16::from_be_bytes(self.array()?),
            },
            LONG_STRING => Value::String(self.long_text()?),
            XML_DOCUMENT => Value::Xml(self.long_text()?),
            TYPED_OBJECT => Value::TypedObject {
                class: self.short_text()?,
                properties: self.properties(depth)?,
            },
            AVM_PLUS => {
                let (value, rest) = amf3::read(self.input, &mut self.values, depth)?;
                self.input = rest;
                value
            }
            _ => return Err(Amf0Error::Unsupported(marker)),
        })
    }

    /// Reads properties up to the end marker, or to a value that cannot be read: nothing behind it can
    /// be found, and the properties before it are worth having.
    fn properties(&mut self, depth: usize) -> Result<Vec<(String, Value)>, Amf0Error> {
        let mut properties = Vec::new();
        loop {
            let name = self.short_text()?;
            if name.is_empty() && self.input.first() == Some(&OBJECT_END) {
                self.take(1)?;
                return Ok(properties);
            }
            match self.value(depth + 1) {
                Ok(value) => properties.push((name, value)),
                Err(Amf0Error::Unsupported(_)) => {
                    (self.input, self.is_cut) = (&[], true);
                    return Ok(properties);
                }
                Err(error) => return Err(error),
            }
            if self.is_cut {
                return Ok(properties);
            }
        }
    }

    fn short_text(&mut self) -> Result<String, Amf0Error> {
        let len = u16::from_be_bytes(self.array()?);
        self.text(len.into())
    }

    fn long_text(&mut self) -> Result<String, Amf0Error> {
        let len = u32::from_be_bytes(self.array()?);
        self.text(len as usize)
    }

    fn text(&mut self, len: usize) -> Result<String, Amf0Error> {
        Ok(String::from_utf8_lossy(self.take(len)?).into_owned())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Amf0Error> {
        take_chunk(&mut self.input).ok_or(Amf0Error::Truncated)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Amf0Error> {
        self.input.split_off(..len).ok_or(Amf0Error::Truncated)
    }
}

impl Iterator for Decoder<'_> {
    type Item = Result<Value, Amf0Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.input.is_empty() {
            return None;
        }
        let value =
            if self.input.len() > MAX_LEN { Err(Amf0Error::TooLong) } else { self.value(0) };
        if value.is_err() {
            self.input = &[];
        }
        Some(value)
    }
}

/// Splits `input` after its leading string, the name of a data message, without decoding the rest.
/// Returns `None` if it does not begin with a string.
pub fn leading_string(input: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&[marker, high, low], rest) = input.split_first_chunk()?;
    if marker != STRING {
        return None;
    }
    rest.split_at_checked(u16::from_be_bytes([high, low]).into())
}

/// Why AMF0 cannot be decoded or encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Amf0Error {
    /// The input ends inside a value.
    #[error("an AMF0 value is truncated")]
    Truncated,
    /// More than [`MAX_DEPTH`] levels of nesting.
    #[error("AMF0 values are nested deeper than {MAX_DEPTH} levels")]
    TooDeep,
    /// More than [`MAX_VALUES`] values.
    #[error("there are more than {MAX_VALUES} AMF0 values")]
    TooMany,
    /// More than [`MAX_LEN`] bytes of input, or a text longer than its length field can express.
    #[error("the AMF0 data is too long")]
    TooLong,
    /// An undefined marker, or an AMF3 value that cannot be read.
    #[error("AMF0 marker {0:#04x} is not supported")]
    Unsupported(u8),
}

/// Levels of nesting that are decoded and encoded. Unlimited nesting could exhaust the stack.
pub const MAX_DEPTH: usize = 16;
/// Values per message, nested ones included.
pub const MAX_VALUES: usize = 4096;
/// Bytes of input per [`Decoder`].
pub const MAX_LEN: usize = 1 << 20;

fn put_properties(
    properties: &[(String, Value)],
    depth: usize,
    out: &mut BytesMut,
) -> Result<(), Amf0Error> {
    for (name, value) in properties {
        put_name(name, out)?;
        value.encode_at(depth + 1, out)?;
    }
    out.put_slice(&[0, 0, OBJECT_END]);
    Ok(())
}

fn put_name(name: &str, out: &mut BytesMut) -> Result<(), Amf0Error> {
    out.put_u16(u16::try_from(name.len()).map_err(|_| Amf0Error::TooLong)?);
    out.put_slice(name.as_bytes());
    Ok(())
}

fn put_long(marker: u8, text: &str, out: &mut BytesMut) -> Result<(), Amf0Error> {
    out.put_u8(marker);
    put_count(text.len(), out)?;
    out.put_slice(text.as_bytes());
    Ok(())
}

fn put_count(count: usize, out: &mut BytesMut) -> Result<(), Amf0Error> {
    out.put_u32(u32::try_from(count).map_err(|_| Amf0Error::TooLong)?);
    Ok(())
}

const NUMBER: u8 = 0x00;
const BOOLEAN: u8 = 0x01;
const STRING: u8 = 0x02;
const OBJECT: u8 = 0x03;
const MOVIE_CLIP: u8 = 0x04;
const NULL: u8 = 0x05;
const UNDEFINED: u8 = 0x06;
const REFERENCE: u8 = 0x07;
const ECMA_ARRAY: u8 = 0x08;
const OBJECT_END: u8 = 0x09;
const STRICT_ARRAY: u8 = 0x0a;
const DATE: u8 = 0x0b;
const LONG_STRING: u8 = 0x0c;
const UNSUPPORTED: u8 = 0x0d;
const RECORD_SET: u8 = 0x0e;
const XML_DOCUMENT: u8 = 0x0f;
const TYPED_OBJECT: u8 = 0x10;
/// An AMF3 value follows (§3.1).
const AVM_PLUS: u8 = 0x11;

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn decode(input: &[u8]) -> Result<Vec<Value>, Amf0Error> {
        Decoder::new(input).collect()
    }

    fn encode(value: &Value) -> BytesMut {
        let mut out = BytesMut::new();
        value.encode(&mut out).unwrap();
        out
    }

    #[test]
    fn a_connect_command_decodes() {
        let mut input =
            b"\x02\0\x07connect\0\x3f\xf0\0\0\0\0\0\0\x03\0\x03app\x02\0\x04live".to_vec();
        input.extend(b"\0\x04fpad\x01\0\0\x0afourCcList\x0a\0\0\0\x01\x02\0\x04hvc1\0\0\x09");
        let values = decode(&input).unwrap();
        assert_eq!(values[0].as_str(), Some("connect"));
        assert_eq!(values[1].as_number(), Some(1.0));
        assert_eq!(values[2].property("app").and_then(Value::as_str), Some("live"));
        assert_eq!(values[2].property("fpad"), Some(&Value::Boolean(false)));
        assert_eq!(
            values[2].property("fourCcList"),
            Some(&Value::StrictArray(vec!["hvc1".into()]))
        );
        assert_eq!(values[2].property("missing"), None);
    }

    #[test]
    fn nesting_beyond_the_limit_is_an_error() {
        let mut arrays = [STRICT_ARRAY, 0, 0, 0, 1].repeat(100_000);
        arrays.push(NULL);
        assert_eq!(decode(&arrays), Err(Amf0Error::TooDeep));
        assert_eq!(decode(&[OBJECT, 0, 1, b'a'].repeat(100_000)), Err(Amf0Error::TooDeep));
        assert_eq!(decode(&[STRICT_ARRAY, 0, 0, 0, 1].repeat(400_000)), Err(Amf0Error::TooLong));

        let nested = |levels| (1..levels).fold(Value::Null, |v, _| Value::StrictArray(vec![v]));
        assert_eq!(decode(&encode(&nested(MAX_DEPTH))), Ok(vec![nested(MAX_DEPTH)]));
        assert_eq!(nested(MAX_DEPTH + 1).encode(&mut BytesMut::new()), Err(Amf0Error::TooDeep));
    }

    #[test]
    fn false_counts_allocate_nothing() {
        assert_eq!(decode(&[STRICT_ARRAY, 255, 255, 255, 255, NULL]), Err(Amf0Error::Truncated));
        assert_eq!(decode(&[LONG_STRING, 255, 255, 255, 255, b'a']), Err(Amf0Error::Truncated));
        assert_eq!(
            decode(&[ECMA_ARRAY, 255, 255, 255, 255, 0, 0, OBJECT_END]),
            Ok(vec![Value::EcmaArray(vec![])])
        );
        assert_eq!(decode(&[NULL; MAX_VALUES + 1]), Err(Amf0Error::TooMany));
    }

    #[test]
    fn an_unsupported_marker_is_named_in_the_error() {
        for marker in [OBJECT_END, 0x12, 0xff] {
            assert_eq!(decode(&[marker, 0, 0]), Err(Amf0Error::Unsupported(marker)));
        }
        assert_eq!(decode(&[AVM_PLUS, 0x12]), Err(Amf0Error::Unsupported(0x12)));
    }

    #[test]
    fn reserved_markers_references_and_amf3_do_not_cost_the_rest_of_an_object() {
        for odd in [
            &[MOVIE_CLIP][..],
            &[RECORD_SET],
            &[REFERENCE, 0, 3],
            &[AVM_PLUS, 0x06, 0x05, b'h', b'i'],
            &[AVM_PLUS, 0x0a, 0x0b, 0x01, 0x03, b'w', 0x04, 0x85, 0x00, 0x01],
        ] {
            let mut input = vec![OBJECT, 0, 1, b'r'];
            input.extend(odd);
            input.extend(b"\0\x03app\x02\0\x04live\0\0\x09\x05");
            let values = decode(&input).unwrap();
            assert_eq!(values[0].property("app"), Some(&"live".into()), "{odd:?}");
            assert_eq!(values[1], Value::Null);
        }
    }

    #[test]
    fn an_object_keeps_the_properties_before_one_that_cannot_be_read() {
        let mut input = b"\x03\0\x03app\x02\0\x04live\0\x01o\x03\0\x01p".to_vec();
        input.extend([AVM_PLUS, 0x0a, 0x07, 0x03, b'X', 1, 2, 3]);
        let values = decode(&input).unwrap();
        assert_eq!(values.len(), 1);
        assert_eq!(values[0].property("app"), Some(&"live".into()));
        assert_eq!(values[0].property("o"), Some(&Value::Object(vec![])));
    }

    #[test]
    fn a_decoder_stops_after_an_error() {
        let mut decoder = Decoder::new(&[NULL, 0xff, NULL]);
        assert_eq!(decoder.next(), Some(Ok(Value::Null)));
        assert_eq!(decoder.next(), Some(Err(Amf0Error::Unsupported(0xff))));
        assert_eq!(decoder.next(), None);
    }

    #[test]
    fn leading_string_splits_off_the_name() {
        assert_eq!(leading_string(b"\x02\0\x01ab"), Some((&b"a"[..], &b"b"[..])));
        assert_eq!(leading_string(b"\x02\0\x02a"), None);
        assert_eq!(leading_string(b"\x05\0\0"), None);
    }

    #[test]
    fn strings_over_65535_bytes_use_the_long_form() {
        let long = Value::String("x".repeat(65_536));
        assert_eq!(encode(&long)[0], LONG_STRING);
        assert_eq!(decode(&encode(&long)), Ok(vec![long]));
        let name = Value::Object(vec![("x".repeat(65_536), Value::Null)]);
        assert_eq!(name.encode(&mut BytesMut::new()), Err(Amf0Error::TooLong));
    }

    fn value() -> impl Strategy<Value = Value> {
        use proptest::num::f64::{INFINITE, NEGATIVE, NORMAL, POSITIVE, SUBNORMAL, ZERO};
        let number = || POSITIVE | NEGATIVE | NORMAL | SUBNORMAL | ZERO | INFINITE;
        let leaf = prop_oneof![
            number().prop_map(Value::Number),
            any::<bool>().prop_map(Value::Boolean),
            ".{0,20}".prop_map(Value::String),
            ".{0,20}".prop_map(Value::Xml),
            Just(Value::Null),
            Just(Value::Undefined),
            (number(), any::<i16>())
                .prop_map(|(millis, time_zone)| Value::Date { millis, time_zone }),
        ];
        leaf.prop_recursive(8, 64, 6, |inner| {
            let properties = vec((".{0,8}", inner.clone()), 0..6);
            prop_oneof![
                properties.clone().prop_map(Value::Object),
                properties.clone().prop_map(Value::EcmaArray),
                vec(inner, 0..6).prop_map(Value::StrictArray),
                (".{0,8}", properties)
                    .prop_map(|(class, properties)| Value::TypedObject { class, properties }),
            ]
        })
    }

    proptest! {
        #[test]
        fn decoding_reverses_encoding(values in vec(value(), 0..4)) {
            let mut out = BytesMut::new();
            for value in &values {
                value.encode(&mut out).unwrap();
            }
            prop_assert_eq!(decode(&out).unwrap(), values);
        }

        #[test]
        fn a_truncated_value_is_an_error(value in value(), cut: prop::sample::Index) {
            let out = encode(&value);
            // A single byte cannot be truncated to a non-empty prefix.
            if out.len() == 1 {
                return Ok(());
            }
            let cut = 1 + cut.index(out.len() - 1);
            prop_assert_eq!(decode(&out[..cut]), Err(Amf0Error::Truncated));
        }

        #[test]
        fn arbitrary_bytes_decode_or_fail_cleanly(input in vec(0u8..=0x12, 0..200)) {
            for value in Decoder::new(&input) {
                let Ok(value) = value else { break };
                prop_assert!(value.encode(&mut BytesMut::new()).is_ok());
            }
        }
    }
}
