//! AMF0 values: commands, and script data.

use bytes::BytesMut;
use downpour_media::amf0::{Amf0Error, Decoder, MAX_VALUES, Value, leading_string};

use super::{Random, memory};

/// Decoding terminates, its memory stays within the limits, and the decoded values survive a round
/// trip. Truncated input yields a prefix of the values.
pub fn check(data: &[u8]) {
    // A longer name may exceed 65,535 bytes after invalid UTF-8 is replaced.
    let data = &data[..data.len().min(20_000)];
    let ((values, error), held) = memory::peak(|| decode(data));
    let most = 4 * MAX_VALUES * size_of::<(String, Value)>() + 16 * data.len();
    assert!(held <= most, "{held} bytes held for {} of input", data.len());

    let mut encoded = BytesMut::new();
    for value in &values {
        value.encode(&mut encoded).expect("a decoded value can be encoded");
        for (name, _) in value.properties().unwrap_or_default() {
            assert!(value.property(name).is_some(), "{name}");
        }
    }
    // Compares encodings, because NaN is not equal to itself.
    let mut again = BytesMut::new();
    let (decoded, nothing) = decode(&encoded);
    assert_eq!((decoded.len(), nothing), (values.len(), None));
    for value in decoded {
        value.encode(&mut again).expect("a decoded value can be encoded");
    }
    assert_eq!(again, encoded);

    let cut = Random::of(data).below(data.len() + 1);
    let (head, cut_error) = decode(&data[..cut]);
    assert!(head.len() <= values.len());
    assert_eq!(format!("{head:?}"), format!("{:?}", &values[..head.len()]));
    assert!(matches!(cut_error, None | Some(Amf0Error::Truncated)) || cut_error == error);

    if let Some((text, rest)) = leading_string(data) {
        let mut decoder = Decoder::new(data);
        let first = decoder.next().expect("the input starts with a string");
        assert_eq!(first, Ok(Value::String(String::from_utf8_lossy(text).into_owned())));
        assert_eq!(decoder.remaining(), rest);
    }
}

fn decode(data: &[u8]) -> (Vec<Value>, Option<Amf0Error>) {
    let mut values = Vec::new();
    for value in Decoder::new(data) {
        match value {
            Ok(value) => values.push(value),
            Err(error) => return (values, Some(error)),
        }
    }
    (values, None)
}
