//! What an encoder names, out of the places where encoders put it.

use downpour_media::{InvalidStreamKey, StreamKey, amf0::Value};

/// The application of a `connect` command, and the query that came with it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConnectTarget {
    app: String,
    query: String,
}

impl ConnectTarget {
    /// Reads a `connect` command's object. The query may stand behind `app` or in `tcUrl`, the
    /// latter may be quoted or spelled `tcurl`, and either may hold a second `?`.
    pub fn new(object: &Value) -> Self {
        let text = |name| object.property(name).and_then(Value::as_str).map(unquote);
        let (app, app_query) = split_query(text("app").unwrap_or_default());
        let (url, url_query) =
            split_query(text("tcUrl").or_else(|| text("tcurl")).unwrap_or_default());
        let app = if app.trim_matches('/').is_empty() { path(url) } else { app };
        let mut query = app_query;
        join(&mut query, url_query);
        Self { app: app.to_owned(), query }
    }

    /// The key and the whole query of the stream `name`.
    ///
    /// # Errors
    /// If the names are no key, or the query is over [`MAX_QUERY_LEN`].
    pub fn stream(&self, name: &str) -> Result<(StreamKey, String), InvalidTarget> {
        let (name, name_query) = split_query(unquote(name));
        let mut query = self.query.clone();
        join(&mut query, name_query);
        if query.len() > MAX_QUERY_LEN {
            return Err(InvalidTarget::QueryTooLong);
        }
        Ok((StreamKey::new(&self.app, name)?, query))
    }
}

/// Why there is no stream of that name.
#[derive(Debug, Clone, thiserror::Error)]
pub enum InvalidTarget {
    #[error(transparent)]
    Key(#[from] InvalidStreamKey),
    /// A cut one could lose a signature, so it is refused.
    #[error("the query is longer than {MAX_QUERY_LEN} bytes")]
    QueryTooLong,
}

/// Room for a signed URL or a token; a limit on what a peer makes us keep.
pub const MAX_QUERY_LEN: usize = 4096;

fn unquote(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || matches!(c, '"' | '\''))
}

/// Cuts at the first `?`; later ones separate parameters like `&`.
fn split_query(text: &str) -> (&str, String) {
    let (path, query) = text.split_once('?').unwrap_or((text, ""));
    (path, query.replace('?', "&").trim_matches(['&', '/']).to_owned())
}

/// What follows the host in a URL.
fn path(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split_once('/').map_or("", |(_, path)| path)
}

/// Adds a query to another, unless it is there already: encoders repeat it.
fn join(query: &mut String, more: String) {
    if more.is_empty() || *query == more {
        return;
    }
    if !query.is_empty() {
        query.push('&');
    }
    query.push_str(&more);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(app: &str, url: &str, name: &str) -> Result<(String, String), InvalidTarget> {
        let object = Value::object([("app", app.into()), ("tcUrl", url.into())]);
        let (key, query) = ConnectTarget::new(&object).stream(name)?;
        Ok((key.to_string(), query))
    }

    #[test]
    fn the_query_is_found_wherever_it_stands() {
        for (app, url, name) in [
            ("live", "rtmp://h/live", "x?k=1"),
            ("live?k=1", "rtmp://h/live", "x"),
            ("live", "rtmp://h/live?k=1", "x"),
            ("live?k=1", "rtmp://h/live?k=1", "x?k=1"),
            ("live/?k=1", "", "/x"),
            ("", "rtmp://h/live/?k=1", "x"),
            ("", "\"rtmp://h:1935/live?k=1\"", "x"),
            (" live?k=1 ", "", "'x'"),
        ] {
            let found = stream(app, url, name).unwrap();
            assert_eq!(found, ("live/x".into(), "k=1".into()), "{app} {url} {name}");
        }
        assert_eq!(stream("live", "rtmp://h/live?a=1?b=2", "x?c=3").unwrap().1, "a=1&b=2&c=3");
        let object = Value::object([("tcurl", "rtmp://h/a/b".into())]);
        assert_eq!(ConnectTarget::new(&object).stream("c").unwrap().0.to_string(), "a/b/c");
    }

    #[test]
    fn what_names_no_stream_is_refused() {
        assert!(stream("live", "", "").is_err());
        assert!(stream("live", "", "?k=1").is_err());
        assert!(stream("", "rtmp://h", "x").is_err());
        assert!(stream("", "", "x").is_err());
        assert!(stream("live", "", "../x").is_err());
        assert!(stream("live", "", &format!("x?{}", "k".repeat(MAX_QUERY_LEN + 1))).is_err());
        assert!(ConnectTarget::new(&Value::Null).stream("x").is_err());
    }
}
