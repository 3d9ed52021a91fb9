//! The head of a request, as far as it must be known to tell viewers from the rest.

use downpour_media::StreamKey;

/// What the bytes of a connection so far ask for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// `/{app}/{name}.flv`
    Flv { method: Method, key: StreamKey },
    /// A whole head that asks for something else.
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Head,
    Options,
    /// None that a stream answers to.
    Other,
}

/// Why a head will never be a good one: the status to answer with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadHead {
    #[error("400 Bad Request")]
    Malformed,
    #[error("431 Request Header Fields Too Large")]
    TooLarge,
}

/// Reads a head (RFC 9112 §2.1); `None` while it is not whole.
pub(super) fn parse(bytes: &[u8]) -> Result<Option<Request>, BadHead> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD_LEN => return Ok(None),
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return Err(BadHead::TooLarge);
        }
        Err(_) => return Err(BadHead::Malformed),
    }
    let Some(key) = request.path.and_then(flv_key) else { return Ok(Some(Request::Other)) };
    let method = match request.method {
        Some("GET") => Method::Get,
        Some("HEAD") => Method::Head,
        Some("OPTIONS") => Method::Options,
        _ => Method::Other,
    };
    Ok(Some(Request::Flv { method, key }))
}

/// The key in a request target in origin form or absolute form (RFC 9112 §3.2), if it names one.
fn flv_key(target: &str) -> Option<StreamKey> {
    let path = match target.split_once("://") {
        Some((_, rest)) => rest.split_once('/')?.1,
        None => target.strip_prefix('/')?,
    };
    let path = path.split(['?', '#']).next()?.strip_suffix(".flv")?;
    let (app, name) = path.split_once('/')?;
    StreamKey::new(&percent_decode(app)?, &percent_decode(name)?).ok()
}

/// Decodes `%XX` (RFC 3986 §2.1); `None` if that is cut short, no number, or not UTF-8 in the end.
fn percent_decode(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut decoded = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let digits =
            part.get(..2).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))?;
        decoded.push(u8::from_str_radix(digits, 16).ok()?);
        decoded.extend_from_slice(part.get(2..)?.as_bytes());
    }
    String::from_utf8(decoded).ok()
}

/// The longest head that is read: players send a few hundred bytes, browsers with cookies a few KB.
pub(super) const MAX_HEAD_LEN: usize = 8 * 1024;
const MAX_HEADERS: usize = 64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn targets_that_name_a_stream() {
        let key = |target| flv_key(target).map(|key| key.to_string());
        assert_eq!(key("/live/movie.flv").as_deref(), Some("live/movie"));
        assert_eq!(key("/live/a/b.flv?token=1.flv").as_deref(), Some("live/a/b"));
        assert_eq!(key("http://edge:8080/live/movie.flv").as_deref(), Some("live/movie"));
        assert_eq!(key("/live/%e6%b0%b4.flv").as_deref(), Some("live/水"));
        for target in [
            "/live.flv",
            "/live/.flv",
            "/live/movie.m3u8",
            "/live/%2e%2e.flv",
            "/live/%2.flv",
            "/live/%zz.flv",
            "/live/%+1.flv",
            "/live/%ff.flv",
            "/live/a%20b.flv",
            "*",
            "live/movie.flv",
            "http://edge.flv",
        ] {
            assert_eq!(key(target), None, "{target}");
        }
    }

    #[test]
    fn heads() {
        let head = b"HEAD /live/movie.flv HTTP/1.1\r\nHost: x\r\n\r\n";
        let key: StreamKey = "live/movie".parse().unwrap();
        assert_eq!(parse(head), Ok(Some(Request::Flv { method: Method::Head, key })));
        for len in 0..head.len() {
            assert_eq!(parse(&head[..len]), Ok(None));
        }
        assert_eq!(parse(b"GET /metrics HTTP/1.1\r\n\r\n"), Ok(Some(Request::Other)));
        assert_eq!(parse(b"\x16\x03\x01\x02\x00"), Err(BadHead::Malformed));
        let mut endless = b"GET / HTTP/1.1\r\nA: ".to_vec();
        endless.resize(MAX_HEAD_LEN, b'a');
        assert_eq!(parse(&endless), Err(BadHead::TooLarge));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MAX_HEADERS + 1));
        assert_eq!(parse(many.as_bytes()), Err(BadHead::TooLarge));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_an_error(bytes: Vec<u8>, target in "\\PC*") {
            let _ = parse(&bytes);
            let _ = flv_key(&target);
        }
    }
}
