//! RTMP URLs.

use std::{fmt, str::FromStr};

/// An RTMP URL, `rtmp://host[:port]/app/name[?query]`.
///
/// The last path segment is the stream's name, the ones before it are the application. The text is
/// taken as it is: RTMP servers do not percent-decode it.
///
/// ```
/// use downpour_rtmp::url::RtmpUrl;
/// let url: RtmpUrl = "rtmp://[::1]:1936/live/eu/movie?token=1".parse().unwrap();
/// assert_eq!((url.host(), url.port()), ("::1", 1936));
/// assert_eq!((url.app(), url.name(), url.query()), ("live/eu", "movie", "token=1"));
/// assert!("http://host/live/movie".parse::<RtmpUrl>().is_err());
/// assert!("rtmp://host/live".parse::<RtmpUrl>().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RtmpUrl {
    host: String,
    port: u16,
    app: String,
    name: String,
    query: String,
}

impl RtmpUrl {
    /// The port of a URL without one.
    pub const DEFAULT_PORT: u16 = 1935;

    /// Returns the host name or address, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Returns the TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the application, which is not empty.
    pub fn app(&self) -> &str {
        &self.app
    }

    /// Returns the stream's name without the query; it is not empty.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the part after `?`, empty if there is none.
    pub fn query(&self) -> &str {
        &self.query
    }

    /// Returns the URL of the application, the `tcUrl` of `connect`.
    pub fn tc_url(&self) -> String {
        let (open, close) = if self.host.contains(':') { ("[", "]") } else { ("", "") };
        match self.port {
            Self::DEFAULT_PORT => format!("rtmp://{open}{}{close}/{}", self.host, self.app),
            port => format!("rtmp://{open}{}{close}:{port}/{}", self.host, self.app),
        }
    }

    /// Returns name and query, the argument of `publish` and `play`.
    pub fn stream_name(&self) -> String {
        match self.query.as_str() {
            "" => self.name.clone(),
            query => format!("{}?{query}", self.name),
        }
    }
}

impl FromStr for RtmpUrl {
    type Err = InvalidRtmpUrl;

    fn from_str(text: &str) -> Result<Self, InvalidRtmpUrl> {
        let rest = text
            .split_at_checked(7)
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("rtmp://"))
            .ok_or(InvalidRtmpUrl("it does not begin with rtmp://"))?
            .1;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) =
            rest.split_once('/').ok_or(InvalidRtmpUrl("it names no application"))?;
        let (app, name) = path
            .trim_matches('/')
            .rsplit_once('/')
            .ok_or(InvalidRtmpUrl("it needs an application and a name, as in /live/movie"))?;

        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (host, rest) = rest
                    .split_once(']')
                    .ok_or(InvalidRtmpUrl("the [ of an IPv6 address is not closed"))?;
                match rest.strip_prefix(':') {
                    Some(port) => (host, Some(port)),
                    None if rest.is_empty() => (host, None),
                    None => {
                        return Err(InvalidRtmpUrl("after ] only a colon and a port may follow"));
                    }
                }
            }
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            },
        };
        if host.is_empty() {
            return Err(InvalidRtmpUrl("it names no host"));
        }
        if host.contains('@') {
            return Err(InvalidRtmpUrl("a user name and password are not supported"));
        }
        let port = match port {
            Some(port) => match port.parse() {
                Ok(port) if port > 0 => port,
                _ => return Err(InvalidRtmpUrl("its port is not a number from 1 to 65535")),
            },
            None => Self::DEFAULT_PORT,
        };
        Ok(Self {
            host: host.to_owned(),
            port,
            app: app.to_owned(),
            name: name.to_owned(),
            query: query.to_owned(),
        })
    }
}

impl fmt::Display for RtmpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tc_url(), self.stream_name())
    }
}

/// The error for a text that is not an RTMP URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an RTMP URL: {0}")]
pub struct InvalidRtmpUrl(&'static str);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_print_as_they_parse() {
        for text in [
            "rtmp://host/live/movie",
            "rtmp://127.0.0.1:1936/live/eu/movie?a=1&b=/x",
            "rtmp://[::1]/live/movie",
        ] {
            assert_eq!(text.parse::<RtmpUrl>().unwrap().to_string(), text);
        }
        let url: RtmpUrl = "RTMP://host:1935/live/movie/".parse().unwrap();
        assert_eq!(url.tc_url(), "rtmp://host/live");
        assert_eq!(url.stream_name(), "movie");
    }

    #[test]
    fn errors_name_the_mistake() {
        for (text, expected) in [
            ("rtmps://host/live/movie", "rtmp://"),
            ("rtmp:/", "rtmp://"),
            ("rtmp://host", "application"),
            ("rtmp://host/live/", "application and a name"),
            ("rtmp:///live/movie", "host"),
            ("rtmp://host:0/live/movie", "port"),
            ("rtmp://host:x/live/movie", "port"),
            ("rtmp://[::1/live/movie", "closed"),
            ("rtmp://[::1]1935/live/movie", "colon"),
            ("rtmp://a:b@host/live/movie", "port"),
            ("rtmp://a@host/live/movie", "password"),
        ] {
            let error = text.parse::<RtmpUrl>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
