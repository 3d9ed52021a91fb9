//! Application, stream name and query, which encoders put in different places.

use downpour_media::{InvalidStreamKey, StreamKey, amf0::Value};

/// The application and query of a `connect` command.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ConnectTarget {
    app: String,
    /// The path of `tcUrl`, which may have the stream's name at its end.
    url_path: String,
    query: String,
}

impl ConnectTarget {
    /// Parses the command object of `connect`. The query may follow `app` or be part of `tcUrl`;
    /// the latter may be quoted or spelled `tcurl`; either may contain a second `?`.
    pub(super) fn new(object: &Value) -> Self {
        let text = |name| object.property(name).and_then(Value::as_str).map(unquote);
        let (app, app_query) = split_query(text("app").unwrap_or_default());
        let (url, url_query) =
            split_query(text("tcUrl").or_else(|| text("tcurl")).unwrap_or_default());
        let url_path = path(url);
        let app = if app.trim_matches('/').is_empty() { url_path } else { app };
        let mut query = app_query;
        join(&mut query, url_query);
        Self { app: app.to_owned(), url_path: url_path.to_owned(), query }
    }

    /// Returns the key and the whole query of the stream `name`. If `name` is empty, the stream's name is
    /// the end of the application: users put the whole URL into the field for the server.
    ///
    /// # Errors
    /// If application and name are not a valid key, or the query is over [`MAX_QUERY_LEN`].
    pub(super) fn resolve(&self, name: &str) -> Result<(StreamKey, String), InvalidTarget> {
        let (name, name_query) = split_query(unquote(name));
        let name = name.trim();
        let mut query = self.query.clone();
        join(&mut query, name_query);
        if query.len() > MAX_QUERY_LEN {
            return Err(InvalidTarget::QueryTooLong);
        }
        let key = match name.trim_matches('/') {
            "" => self.key_without_name(),
            name => StreamKey::new(&self.app, name),
        };
        Ok((key?, query))
    }

    fn key_without_name(&self) -> Result<StreamKey, InvalidStreamKey> {
        let whole = [&self.app, &self.url_path];
        let mut halves = whole.iter().filter_map(|path| path.trim_matches('/').rsplit_once('/'));
        let (app, name) = halves.next().unwrap_or((&self.app, ""));
        StreamKey::new(app, name)
    }
}

/// Why a stream name is refused.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum InvalidTarget {
    /// Application and name are not a valid key.
    #[error(transparent)]
    Key(#[from] InvalidStreamKey),
    /// A truncated query could lose its signature, so a long one is refused.
    #[error("the query is longer than {MAX_QUERY_LEN} bytes")]
    QueryTooLong,
}

/// The longest query in bytes: enough for a signed URL, and a bound on the memory of a connection.
pub(super) const MAX_QUERY_LEN: usize = 4096;

fn unquote(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || matches!(c, '"' | '\''))
}

/// Splits at the first `?`. Later ones separate parameters like `&`.
fn split_query(text: &str) -> (&str, String) {
    let (path, query) = text.split_once('?').unwrap_or((text, ""));
    (path, query.replace('?', "&").trim_matches(['&', '/']).to_owned())
}

/// Returns the path of a URL, without the leading slash.
fn path(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split_once('/').map_or("", |(_, path)| path)
}

/// Appends `more` to `query`, unless they are equal: encoders repeat the query.
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

    fn resolve(app: &str, url: &str, name: &str) -> Result<(String, String), InvalidTarget> {
        let object = Value::object([("app", app.into()), ("tcUrl", url.into())]);
        let (key, query) = ConnectTarget::new(&object).resolve(name)?;
        Ok((key.to_string(), query))
    }

    #[test]
    fn the_query_is_found_in_every_place() {
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
            let found = resolve(app, url, name).unwrap();
            assert_eq!(found, ("live/x".into(), "k=1".into()), "{app} {url} {name}");
        }
    }

    #[test]
    fn different_queries_are_joined() {
        assert_eq!(resolve("live", "rtmp://h/live?a=1?b=2", "x?c=3").unwrap().1, "a=1&b=2&c=3");
    }

    #[test]
    fn the_application_is_taken_from_the_url_if_missing() {
        let object = Value::object([("tcurl", "rtmp://h/a/b".into())]);
        assert_eq!(ConnectTarget::new(&object).resolve("c").unwrap().0.to_string(), "a/b/c");
    }

    #[test]
    fn a_whole_url_in_the_server_field_names_the_stream() {
        for (app, url, name) in [
            ("live/x", "rtmp://h/live/x", ""),
            ("live/x?k=1", "rtmp://h/live/x?k=1", ""),
            ("live", "rtmp://h/live/x", ""),
            ("", "rtmp://h/live/x/", "?k=1"),
        ] {
            let (key, _) = resolve(app, url, name).unwrap();
            assert_eq!(key, "live/x", "{app} {url} {name}");
        }
        assert_eq!(resolve("a/b/c", "", "").unwrap().0, "a/b/c");
    }

    #[test]
    fn names_with_spaces_and_hashes_are_kept() {
        assert_eq!(resolve("live", "", " my cam #1 ?k=1").unwrap().0, "live/my cam #1");
    }

    #[test]
    fn a_target_without_a_valid_key_is_refused() {
        assert!(resolve("live", "", "").is_err());
        assert!(resolve("live", "", "?k=1").is_err());
        assert!(resolve("", "rtmp://h", "x").is_err());
        assert!(resolve("", "", "x").is_err());
        assert!(resolve("live", "", "../x").is_err());
        assert!(resolve("live", "", &format!("x?{}", "k".repeat(MAX_QUERY_LEN + 1))).is_err());
        assert!(ConnectTarget::new(&Value::Null).resolve("x").is_err());
    }
}
