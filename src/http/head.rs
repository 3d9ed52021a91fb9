//! Parses the head of a request, as far as needed to choose between a viewer and the router.

use percent_encoding::percent_decode_str;

use downpour_media::StreamKey;

/// The head of one request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) request: Request,
    /// Bytes of the head, including the empty line.
    pub(super) len: usize,
    pub(super) body: BodyLen,
    /// `true` if the client wants to send another request on the connection (RFC 9112 §9.3).
    pub(super) keep_alive: bool,
}

/// The target of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// `/{app}/{name}.flv`
    Flv { method: Method, key: StreamKey, query: String },
    /// A request of monitoring: see [`MONITORING`].
    Monitoring,
    /// Any other target.
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Head,
    Options,
    /// Not allowed for a stream.
    Other,
}

/// The length of a request's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BodyLen {
    /// In bytes.
    Known(u64),
    /// Left to hyper: the body is chunked, its length is ambiguous, or the connection changes its
    /// protocol. No request may follow on the connection, because a mistake about where it starts
    /// would be request smuggling (RFC 9112 §11.2).
    Unknown,
}

/// Why a head is refused, as the status to answer with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadHead {
    #[error("400 Bad Request")]
    Malformed,
    #[error("431 Request Header Fields Too Large")]
    TooLarge,
}

/// Parses the head at the beginning of `bytes` (RFC 9112 §2.1). Returns `None` if it is incomplete.
pub(super) fn parse(bytes: &[u8]) -> Result<Option<Head>, BadHead> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let len = match request.parse(bytes) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD_LEN => return Ok(None),
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return Err(BadHead::TooLarge);
        }
        Err(_) => return Err(BadHead::Malformed),
    };
    let target = match request.path.and_then(flv_key) {
        Some(key) => {
            let method = match request.method {
                Some("GET") => Method::Get,
                Some("HEAD") => Method::Head,
                Some("OPTIONS") => Method::Options,
                _ => Method::Other,
            };
            let query = request.path.and_then(|path| path.split_once('?'));
            let query = query.map_or_else(String::new, |(_, query)| query.to_owned());
            Request::Flv { method, key, query }
        }
        None if request.path.is_some_and(is_monitoring) => Request::Monitoring,
        None => Request::Other,
    };
    let body = match request.method {
        Some("CONNECT") => BodyLen::Unknown,
        _ => body_len(request.headers),
    };
    let keep_alive = request.version == Some(1) && !asks_to_close(request.headers);
    Ok(Some(Head { request: target, len, body, keep_alive }))
}

/// The length of the body according to the header fields (RFC 9112 §6.3).
fn body_len(headers: &[httparse::Header<'_>]) -> BodyLen {
    let mut length = None;
    for header in headers {
        let name = header.name;
        if name.eq_ignore_ascii_case("transfer-encoding") || name.eq_ignore_ascii_case("upgrade") {
            return BodyLen::Unknown;
        }
        if name.eq_ignore_ascii_case("content-length") {
            let value = std::str::from_utf8(header.value).ok().map(str::trim);
            let digits = value.filter(|value| value.bytes().all(|b| b.is_ascii_digit()));
            match (length, digits.and_then(|digits| digits.parse().ok())) {
                (None, Some(value)) => length = Some(value),
                _ => return BodyLen::Unknown,
            }
        }
    }
    BodyLen::Known(length.unwrap_or(0))
}

fn asks_to_close(headers: &[httparse::Header<'_>]) -> bool {
    headers.iter().filter(|header| header.name.eq_ignore_ascii_case("connection")).any(|header| {
        header
            .value
            .split(|b| *b == b',')
            .any(|option| option.trim_ascii().eq_ignore_ascii_case(b"close"))
    })
}

fn is_monitoring(target: &str) -> bool {
    target.split('?').next().is_some_and(|path| MONITORING.contains(&path))
}

/// The stream key in a request target in origin form or absolute form (RFC 9112 §3.2); `None` if the
/// target is not that of a stream.
fn flv_key(target: &str) -> Option<StreamKey> {
    let path = match target.split_once("://") {
        Some((_, rest)) => rest.split_once('/')?.1,
        None => target.strip_prefix('/')?,
    };
    let path = path.split(['?', '#']).next()?.strip_suffix(".flv")?;
    let (app, name) = path.split_once('/')?;
    let decode = |text| percent_decode_str(text).decode_utf8().ok();
    StreamKey::new(&decode(app)?, &decode(name)?).ok()
}

/// Maximum bytes of a head: players send a few hundred bytes, browsers with cookies a few KB.
pub(super) const MAX_HEAD_LEN: usize = 8 * 1024;
const MAX_HEADERS: usize = 64;
/// Paths that are served even if all connections are in use.
const MONITORING: [&str; 3] = ["/healthz", "/readyz", "/metrics"];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn flv_paths_give_a_stream_key() {
        let key = |target| flv_key(target).map(|key| key.to_string());
        assert_eq!(key("/live/movie.flv").as_deref(), Some("live/movie"));
        assert_eq!(key("/live/a/b.flv?token=1.flv").as_deref(), Some("live/a/b"));
        assert_eq!(key("http://edge:8080/live/movie.flv").as_deref(), Some("live/movie"));
        assert_eq!(key("/live/%e6%b0%b4.flv").as_deref(), Some("live/水"));
        assert_eq!(key("/live/my%20cam%231.flv").as_deref(), Some("live/my cam#1"));
        // A % without two hexadecimal digits is kept (URL standard, "percent-decode").
        assert_eq!(key("/live/%2.flv").as_deref(), Some("live/%2"));
        assert_eq!(key("/live/%zz%+1.flv").as_deref(), Some("live/%zz%+1"));
        for target in [
            "/live.flv",
            "/live/.flv",
            "/live/movie.m3u8",
            "/live/%2e%2e.flv",
            "/live/%ff.flv",
            "/live/a%20.flv",
            "/live/a%0Ab.flv",
            "*",
            "live/movie.flv",
            "http://edge.flv",
        ] {
            assert_eq!(key(target), None, "{target}");
        }
    }

    #[test]
    fn head_is_parsed_once_it_is_complete() {
        let head = b"HEAD /live/movie.flv HTTP/1.1\r\nHost: x\r\n\r\n";
        let key: StreamKey = "live/movie".parse().unwrap();
        let expected = Head {
            request: Request::Flv { method: Method::Head, key, query: String::new() },
            len: head.len(),
            body: BodyLen::Known(0),
            keep_alive: true,
        };
        let followed = [head, &b"GET /"[..]].concat();
        assert_eq!(parse(&followed), Ok(Some(expected)));
        for len in 0..head.len() {
            assert_eq!(parse(&head[..len]), Ok(None));
        }
    }

    #[test]
    fn malformed_and_long_heads_are_refused() {
        assert_eq!(parse(b"\x16\x03\x01\x02\x00"), Err(BadHead::Malformed));
        let mut endless = b"GET / HTTP/1.1\r\nA: ".to_vec();
        endless.resize(MAX_HEAD_LEN, b'a');
        assert_eq!(parse(&endless), Err(BadHead::TooLarge));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MAX_HEADERS + 1));
        assert_eq!(parse(many.as_bytes()), Err(BadHead::TooLarge));
    }

    fn head(line: &str, fields: &[&str]) -> Head {
        let head = format!("{line}\r\n{}\r\n\r\n", fields.join("\r\n"));
        parse(head.as_bytes()).unwrap().unwrap()
    }

    #[test]
    fn body_length_is_unknown_unless_it_is_unambiguous() {
        let body = |fields: &[&str]| head("POST /a HTTP/1.1", fields).body;
        assert_eq!(body(&["A: b"]), BodyLen::Known(0));
        assert_eq!(body(&["content-length: 12 "]), BodyLen::Known(12));
        for unknown in [
            &["Transfer-Encoding: chunked"][..],
            &["Content-Length: 1", "Transfer-Encoding: chunked"],
            &["Content-Length: 1", "Content-Length: 1"],
            &["Content-Length: +1"],
            &["Content-Length: 1, 1"],
            &["Content-Length: 99999999999999999999"],
            &["Upgrade: websocket"],
        ] {
            assert_eq!(body(unknown), BodyLen::Unknown, "{unknown:?}");
        }
        assert_eq!(head("CONNECT host:1 HTTP/1.1", &["A: b"]).body, BodyLen::Unknown);
    }

    #[test]
    fn http_1_1_connections_are_kept_alive_unless_the_client_closes() {
        let keep = |version, field| head(&format!("GET / HTTP/1.{version}"), &[field]).keep_alive;
        assert!(keep(1, "A: b") && keep(1, "Connection: keep-alive, TE"));
        assert!(!keep(1, "Connection: close") && !keep(1, "connection: TE , Close"));
        assert!(!keep(0, "A: b"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_an_error(bytes: Vec<u8>, target in "\\PC*") {
            let _ = parse(&bytes);
            let _ = flv_key(&target);
        }
    }
}
