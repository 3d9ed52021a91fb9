//! A page that plays the node's streams in a browser.
//!
//! The player is mpegts.js, from the npm registry; `assets/page/` has it and its licence.

use std::fmt::Write;

use axum::{
    Router,
    extract::{Query, State},
    http::{
        HeaderName,
        header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS},
    },
    response::{IntoResponse, Response},
    routing::get,
};
use downpour_hub::Hub;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

/// Returns the router of `/` and of the files of the page.
pub fn router(hub: Hub) -> Router {
    let file = |kind: &'static str, text: &'static str| {
        get(move || async move { ([(CONTENT_TYPE, kind), (CACHE_CONTROL, "max-age=600")], text) })
    };
    Router::new()
        .route("/", get(index))
        .with_state(hub)
        .route("/page/player.js", file("text/javascript; charset=utf-8", PLAYER))
        .route("/page/mpegts.js", file("text/javascript; charset=utf-8", MPEGTS))
        .route("/page/mpegts.js.LICENSE", file("text/plain; charset=utf-8", MPEGTS_LICENSE))
}

#[derive(Deserialize)]
struct IndexQuery {
    stream: Option<String>,
}

/// The page: the streams, and a player of the one that was asked for, or of the only one.
async fn index(State(hub): State<Hub>, Query(query): Query<IndexQuery>) -> Response {
    let mut names: Vec<_> = hub.streams().iter().map(|stream| stream.key().to_string()).collect();
    names.sort();
    names.truncate(STREAMS_MAX);
    let playing = query.stream.or_else(|| match &names[..] {
        [only] => Some(only.clone()),
        _ => None,
    });
    (HEADERS, html(&names, playing.as_deref())).into_response()
}

fn html(names: &[String], playing: Option<&str>) -> String {
    let shown = escaped(playing.unwrap_or_default());
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>Downpour</title>\n\
         <style>body{{font:16px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}}\
         video{{width:100%;background:#000}}</style>\n<body data-stream=\"{shown}\">\n"
    );
    if playing.is_some() {
        html += &format!("<h1>{shown}</h1>\n<video controls autoplay playsinline></video>\n");
    }
    html += "<p id=\"status\"></p>\n";
    html += match (names.is_empty(), playing) {
        (true, None) => "<meta http-equiv=\"refresh\" content=\"2\">\n<p>No stream is live.</p>\n",
        (true, Some(_)) => "<p>No stream is live.</p>\n",
        (false, _) => "<ul>\n",
    };
    for name in names {
        let link = utf8_percent_encode(name, NON_ALPHANUMERIC);
        // Writing to a String does not fail.
        let _ = writeln!(html, "<li><a href=\"/?stream={link}\">{}</a>", escaped(name));
    }
    html += if names.is_empty() { "" } else { "</ul>\n" };
    html +=
        "<script src=\"/page/mpegts.js\"></script>\n<script src=\"/page/player.js\"></script>\n";
    html
}

/// Text for HTML, inside elements and quoted attributes. Names of streams come from the network.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            c => escaped.push(c),
        }
    }
    escaped
}

const HEADERS: [(HeaderName, &str); 4] = [
    (CONTENT_TYPE, "text/html; charset=utf-8"),
    (CACHE_CONTROL, "no-store"),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (
        CONTENT_SECURITY_POLICY,
        "default-src 'self'; media-src 'self' blob:; style-src 'unsafe-inline'",
    ),
];
/// Links on one page.
const STREAMS_MAX: usize = 1000;
const PLAYER: &str = include_str!("../../assets/page/player.js");
const MPEGTS: &str = include_str!("../../assets/page/mpegts.js");
const MPEGTS_LICENSE: &str = include_str!("../../assets/page/mpegts.js.LICENSE");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_streams_are_text_on_the_page() {
        let name = "live/<script>\"&'#".to_owned();
        let html = html(std::slice::from_ref(&name), Some(&name));
        assert!(html.contains("<h1>live/&lt;script&gt;&quot;&amp;'#</h1>"), "{html}");
        assert!(html.contains("data-stream=\"live/&lt;script&gt;&quot;&amp;'#\""), "{html}");
        assert!(html.contains("href=\"/?stream=live%2F%3Cscript%3E%22%26%27%23\""), "{html}");
        assert_eq!(html.matches("<script").count(), 2);
    }

    #[test]
    fn page_without_a_stream_has_no_player() {
        let html = html(&[], None);
        assert!(html.contains("No stream is live.") && !html.contains("<video"), "{html}");
    }

    #[test]
    fn licence_of_the_player_is_that_of_the_package() {
        assert!(MPEGTS_LICENSE.contains("Apache License"));
        assert!(MPEGTS.len() > 100_000 && !MPEGTS.contains("sourceMappingURL"));
    }
}
