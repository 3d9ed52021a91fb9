//! AMF3 values inside AMF0, behind the marker `avmplus-object-marker` (AMF0 §3.1).
//!
//! Source: *Action Message Format – AMF 3*, Adobe 2013. Section numbers refer to it. Clients that
//! connect with `objectEncoding` 3 put names and objects in this form.

use crate::{
    amf0::{Amf0Error, MAX_DEPTH, MAX_LEN, MAX_VALUES, Value},
    input::take_chunk,
};

/// Reads one AMF3 value at the start of `input`. Returns it as its nearest AMF0 value, with the rest of
/// the input. `values` counts the values of the message, `depth` is the level of nesting.
///
/// References to strings and traits are followed. References to objects, byte arrays, vectors of
/// numbers and dictionaries are read past and become [`Value::Undefined`].
///
/// # Errors
/// As those of [`Decoder`](crate::amf0::Decoder). [`Amf0Error::Unsupported`] for externalizable objects,
/// whose length only their class knows.
pub(crate) fn read<'a>(
    input: &'a [u8],
    values: &mut usize,
    depth: usize,
) -> Result<(Value, &'a [u8]), Amf0Error> {
    let mut reader =
        Reader { input, values, strings: Vec::new(), traits: Vec::new(), text_left: MAX_LEN };
    let value = reader.value(depth)?;
    Ok((value, reader.input))
}

struct Reader<'a, 'b> {
    input: &'a [u8],
    values: &'b mut usize,
    /// §2.2: strings and traits are sent once and referred to by their index.
    strings: Vec<String>,
    traits: Vec<Traits>,
    /// Bytes of text that may still be made. A reference of two bytes copies a long string.
    text_left: usize,
}

/// Class and property names of an object (§3.12).
#[derive(Clone)]
struct Traits {
    class: String,
    names: Vec<String>,
    is_dynamic: bool,
}

impl<'a> Reader<'a, '_> {
    fn value(&mut self, depth: usize) -> Result<Value, Amf0Error> {
        if depth >= MAX_DEPTH {
            return Err(Amf0Error::TooDeep);
        }
        *self.values += 1;
        if *self.values > MAX_VALUES {
            return Err(Amf0Error::TooMany);
        }
        let [marker] = self.array()?;
        Ok(match marker {
            UNDEFINED => Value::Undefined,
            NULL => Value::Null,
            FALSE => Value::Boolean(false),
            TRUE => Value::Boolean(true),
            // §3.6: 29 bits in two's complement.
            INTEGER => Value::Number(f64::from((self.u29()? << 3).cast_signed() >> 3)),
            DOUBLE => Value::Number(f64::from_be_bytes(self.array()?)),
            STRING => Value::String(self.text()?),
            XML_DOCUMENT | XML => match self.inline()? {
                Some(len) => Value::Xml(self.counted_text(len)?),
                None => Value::Undefined,
            },
            DATE => match self.inline()? {
                Some(_) => Value::Date { millis: f64::from_be_bytes(self.array()?), time_zone: 0 },
                None => Value::Undefined,
            },
            ARRAY => self.array_value(depth)?,
            OBJECT => self.object(depth)?,
            BYTE_ARRAY => self.skip_elements(0, 1)?,
            VECTOR_INT | VECTOR_UINT => self.skip_elements(1, 4)?,
            VECTOR_DOUBLE => self.skip_elements(1, 8)?,
            VECTOR_OBJECT => self.vector(depth)?,
            DICTIONARY => self.dictionary(depth)?,
            _ => return Err(Amf0Error::Unsupported(marker)),
        })
    }

    /// §3.11.
    fn array_value(&mut self, depth: usize) -> Result<Value, Amf0Error> {
        let Some(count) = self.inline()? else { return Ok(Value::Undefined) };
        let mut named = self.named_values(depth)?;
        let dense = self.values(count, depth)?;
        if named.is_empty() {
            return Ok(Value::StrictArray(dense));
        }
        named.extend(dense.into_iter().enumerate().map(|(i, value)| (i.to_string(), value)));
        Ok(Value::EcmaArray(named))
    }

    /// §3.12.
    fn object(&mut self, depth: usize) -> Result<Value, Amf0Error> {
        let Some(header) = self.inline()? else { return Ok(Value::Undefined) };
        let traits = if header & 1 == 0 {
            let traits = self.traits.get(header >> 1).cloned().ok_or(Amf0Error::Truncated)?;
            let copied = traits.names.iter().map(String::len).sum::<usize>() + traits.class.len();
            self.charge(copied)?;
            traits
        } else if header & 2 != 0 {
            return Err(Amf0Error::Unsupported(OBJECT));
        } else {
            let (is_dynamic, count) = (header & 4 != 0, header >> 3);
            let class = self.text()?;
            self.check_count(count)?;
            let names = (0..count).map(|_| self.text()).collect::<Result<_, _>>()?;
            let traits = Traits { class, names, is_dynamic };
            self.traits.push(traits.clone());
            traits
        };
        let mut properties = Vec::new();
        for name in traits.names {
            properties.push((name, self.value(depth + 1)?));
        }
        if traits.is_dynamic {
            properties.extend(self.named_values(depth)?);
        }
        Ok(match traits.class.is_empty() {
            true => Value::Object(properties),
            false => Value::TypedObject { class: traits.class, properties },
        })
    }

    /// §3.15, of objects.
    fn vector(&mut self, depth: usize) -> Result<Value, Amf0Error> {
        let Some(count) = self.inline()? else { return Ok(Value::Undefined) };
        self.array::<1>()?;
        self.text()?;
        Ok(Value::StrictArray(self.values(count, depth)?))
    }

    /// §3.16.
    fn dictionary(&mut self, depth: usize) -> Result<Value, Amf0Error> {
        let Some(count) = self.inline()? else { return Ok(Value::Undefined) };
        self.array::<1>()?;
        self.values(count.saturating_mul(2), depth)?;
        Ok(Value::Undefined)
    }

    /// Reads past elements of a fixed length, behind `before` more bytes.
    fn skip_elements(&mut self, before: usize, len: usize) -> Result<Value, Amf0Error> {
        if let Some(count) = self.inline()? {
            self.take(count.saturating_mul(len).saturating_add(before))?;
        }
        Ok(Value::Undefined)
    }

    /// Named values up to an empty name.
    fn named_values(&mut self, depth: usize) -> Result<Vec<(String, Value)>, Amf0Error> {
        let mut named = Vec::new();
        loop {
            let name = self.text()?;
            if name.is_empty() {
                return Ok(named);
            }
            named.push((name, self.value(depth + 1)?));
        }
    }

    fn values(&mut self, count: usize, depth: usize) -> Result<Vec<Value>, Amf0Error> {
        self.check_count(count)?;
        (0..count).map(|_| self.value(depth + 1)).collect()
    }

    /// Each counted item takes at least one byte, so a larger count is false.
    fn check_count(&self, count: usize) -> Result<(), Amf0Error> {
        if count > self.input.len() { Err(Amf0Error::Truncated) } else { Ok(()) }
    }

    /// §3.8.
    fn text(&mut self) -> Result<String, Amf0Error> {
        let header = self.u29()? as usize;
        if header & 1 == 0 {
            let text = self.strings.get(header >> 1).cloned().ok_or(Amf0Error::Truncated)?;
            self.charge(text.len())?;
            return Ok(text);
        }
        let text = self.counted_text(header >> 1)?;
        // §1.3.2: the empty string is never sent by reference.
        if !text.is_empty() {
            self.strings.push(text.clone());
        }
        Ok(text)
    }

    fn counted_text(&mut self, len: usize) -> Result<String, Amf0Error> {
        Ok(String::from_utf8_lossy(self.take(len)?).into_owned())
    }

    fn charge(&mut self, bytes: usize) -> Result<(), Amf0Error> {
        self.text_left = self.text_left.checked_sub(bytes).ok_or(Amf0Error::TooLong)?;
        Ok(())
    }

    /// Reads the header of a value that may be a reference (its lowest bit is 0). Returns the bits
    /// above, or `None` for a reference.
    fn inline(&mut self) -> Result<Option<usize>, Amf0Error> {
        let header = self.u29()? as usize;
        Ok((header & 1 != 0).then_some(header >> 1))
    }

    /// §1.3.1: up to four bytes, 7 bits in each of the first three, 8 in the fourth.
    fn u29(&mut self) -> Result<u32, Amf0Error> {
        let mut value = 0;
        for _ in 0..3 {
            let [byte] = self.array()?;
            value = value << 7 | u32::from(byte & 0x7f);
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        let [byte] = self.array()?;
        Ok(value << 8 | u32::from(byte))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Amf0Error> {
        take_chunk(&mut self.input).ok_or(Amf0Error::Truncated)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Amf0Error> {
        self.input.split_off(..len).ok_or(Amf0Error::Truncated)
    }
}

const UNDEFINED: u8 = 0x00;
const NULL: u8 = 0x01;
const FALSE: u8 = 0x02;
const TRUE: u8 = 0x03;
const INTEGER: u8 = 0x04;
const DOUBLE: u8 = 0x05;
const STRING: u8 = 0x06;
const XML_DOCUMENT: u8 = 0x07;
const DATE: u8 = 0x08;
const ARRAY: u8 = 0x09;
const OBJECT: u8 = 0x0a;
const XML: u8 = 0x0b;
const BYTE_ARRAY: u8 = 0x0c;
const VECTOR_INT: u8 = 0x0d;
const VECTOR_UINT: u8 = 0x0e;
const VECTOR_DOUBLE: u8 = 0x0f;
const VECTOR_OBJECT: u8 = 0x10;
const DICTIONARY: u8 = 0x11;

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn decode(input: &[u8]) -> Result<(Value, usize), Amf0Error> {
        read(input, &mut 0, 0).map(|(value, rest)| (value, rest.len()))
    }

    #[test]
    fn integers_have_29_bits_and_a_sign() {
        for (bytes, number) in [
            (&[INTEGER, 0x05][..], 5.0),
            (&[INTEGER, 0x85, 0x00], 640.0),
            (&[INTEGER, 0xbf, 0xff, 0xff, 0xff], 268_435_455.0),
            (&[INTEGER, 0xff, 0xff, 0xff, 0xff], -1.0),
        ] {
            assert_eq!(decode(bytes), Ok((Value::Number(number), 0)));
        }
    }

    #[test]
    fn objects_refer_to_strings_and_traits_of_earlier_ones() {
        // An array of two objects of class "P" with the sealed property "w" and a dynamic "note".
        let mut input = vec![ARRAY, 0x05, 0x01];
        input.extend([OBJECT, 0x1b, 0x03, b'P', 0x03, b'w', INTEGER, 7]);
        input.extend(b"\x09note");
        input.extend([STRING, 0x00, 0x01]);
        input.extend([OBJECT, 0x01, INTEGER, 8, 0x01, 0xee]);
        let object = |w: f64, more: Option<(String, Value)>| Value::TypedObject {
            class: "P".into(),
            properties: [("w".to_owned(), w.into())].into_iter().chain(more).collect(),
        };
        let note = ("note".to_owned(), Value::from("P"));
        let objects = vec![object(7.0, Some(note)), object(8.0, None)];
        assert_eq!(decode(&input), Ok((Value::StrictArray(objects), 1)));
    }

    #[test]
    fn values_without_an_equal_in_amf0_are_read_past() {
        for skipped in [
            &[BYTE_ARRAY, 0x07, 1, 2, 3][..],
            &[VECTOR_INT, 0x05, 0, 0, 0, 0, 1, 0, 0, 0, 2],
            &[VECTOR_DOUBLE, 0x03, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[DICTIONARY, 0x03, 0, NULL, TRUE],
            &[OBJECT, 0x00],
        ] {
            assert_eq!(decode(&[skipped, &[9]].concat()), Ok((Value::Undefined, 1)), "{skipped:?}");
        }
        assert_eq!(decode(&[OBJECT, 0x07, 0x03, b'X']), Err(Amf0Error::Unsupported(OBJECT)));
    }

    #[test]
    fn repeated_references_to_a_long_string_are_bounded() {
        // 1984 strings: one of 65,536 bytes, and references to it.
        let mut input = vec![ARRAY, 0x9f, 0x01, 0x01, STRING, 0x88, 0x80, 0x01];
        input.extend([b'x'; 65_536]);
        input.extend([STRING, 0x00].repeat(1983));
        assert_eq!(decode(&input), Err(Amf0Error::TooLong));
    }

    #[test]
    fn false_counts_and_deep_nesting_are_errors() {
        assert_eq!(decode(&[ARRAY, 0xff, 0xff, 0xff, 0xff, 0x01]), Err(Amf0Error::Truncated));
        assert_eq!(decode(&[VECTOR_INT, 0xff, 0xff, 0xff, 0xff, 0]), Err(Amf0Error::Truncated));
        assert_eq!(decode(&[ARRAY, 0x03, 0x01].repeat(1000)), Err(Amf0Error::TooDeep));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_a_value_or_an_error(
            input in vec(prop_oneof![0u8..=0x12, any::<u8>()], 0..200),
        ) {
            let _ = decode(&input);
        }
    }
}
