//! The HTTP API of a node: streams and edges, health, and metrics.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use axum::{
    Json, Router,
    extract::{Query, State},
    http::{
        HeaderMap, HeaderName, StatusCode,
        header::{
            ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
            ACCESS_CONTROL_ALLOW_ORIGIN, CACHE_CONTROL, CONTENT_TYPE, HOST,
        },
    },
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus::Registry;
use serde::{Deserialize, Serialize};

use super::readiness::Readiness;
use crate::node::metrics;
use downpour_distribution::downstream::{
    edges::{EdgeInfo, Edges},
    outgoing::OutgoingStreams,
};
use downpour_hub::Hub;
use downpour_media::PublicationId;
use downpour_repair::receiver::DELAY_BOUNDS_MS;

/// State that the API reads.
#[derive(Clone)]
pub struct ApiState {
    /// The live streams.
    pub hub: Hub,
    /// The metrics of `/metrics`.
    pub registry: Registry,
    /// When the node started.
    pub started: Instant,
    /// Whether the node can do its work.
    pub readiness: Readiness,
    /// `None` on a node without a downstream.
    pub downstream: Option<DownstreamApi>,
}

/// State of the downstream that the API reads.
#[derive(Clone)]
pub struct DownstreamApi {
    /// The streams that are sent to edges.
    pub outgoing: OutgoingStreams,
    /// The connected edges.
    pub edges: Edges,
    /// TCP port of the RTMP listener, for the `url` of each publisher in `/stat/livestat`.
    pub rtmp_port: Option<u16>,
}

/// Returns the router of `/stats/time`, `/healthz`, `/readyz` and `/metrics`; with a downstream also of
/// `/stat/livestat` and `/api/v1/edges`.
pub fn router(state: ApiState) -> Router {
    let ApiState { hub, registry, started, readiness, downstream } = state;
    let healthy = hub.clone();
    let mut router = Router::new()
        .route("/stats/time", get(stream_time).options(preflight))
        .with_state(hub.clone())
        .route("/healthz", get(move || async move { health(&healthy, started) }).options(preflight))
        .route("/readyz", get(move || async move { ready(&readiness) }).options(preflight))
        .route("/metrics", get(move || async move { scrape(&registry) }));
    if let Some(downstream) = downstream {
        let serving = Router::new()
            .route("/stat/livestat", get(live_stat))
            .route("/api/v1/edges", get(edges))
            .with_state(Arc::new((hub, downstream)));
        router = router.merge(serving);
    }
    router.fallback(not_found)
}

/// The state of `/stat/livestat` and `/api/v1/edges`.
type Serving = State<Arc<(Hub, DownstreamApi)>>;

/// An answer of wire v0: the HTTP status, and the result or a message.
#[derive(Serialize)]
struct Answer<T> {
    status: u16,
    data: T,
}

#[derive(Serialize)]
struct LiveStat {
    /// `null` if there is none: existing edges check for that.
    publishers: Option<Vec<StreamStat>>,
    /// Players over RTMP, which this node does not serve: `null`, as where there are none.
    players: Option<Vec<StreamStat>>,
}

/// One publication in wire v0. Speeds are in bytes per millisecond.
#[derive(Serialize)]
struct StreamStat {
    key: String,
    url: String,
    start_time: u64,
    ssrc: u32,
    /// Id of the RTMP message stream.
    stream_id: u32,
    video_total_bytes: u64,
    video_speed: u64,
    audio_total_bytes: u64,
    audio_speed: u64,
}

#[derive(Deserialize)]
struct LiveStatQuery {
    room: Option<String>,
}

async fn live_stat(
    State(state): Serving,
    Query(query): Query<LiveStatQuery>,
    headers: HeaderMap,
) -> Response {
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or("localhost");
    let room = query.room.as_deref().map(|room| room.trim_matches('/'));
    let (hub, downstream) = &*state;
    let mut publishers: Vec<_> = downstream
        .outgoing
        .streams()
        .iter()
        .filter(|stream| !stream.ended())
        .filter(|stream| room.is_none_or(|room| room == stream.key().as_str()))
        .map(|stream| {
            let key = stream.key();
            let live = hub.stream(key);
            let counted = live.as_ref().map(|live| {
                let counters = live.counters();
                (
                    counters.video_bytes.load(Ordering::Relaxed),
                    counters.audio_bytes.load(Ordering::Relaxed),
                )
            });
            let (video_total_bytes, audio_total_bytes) = counted.unwrap_or_default();
            StreamStat {
                key: key.to_string(),
                url: match downstream.rtmp_port {
                    Some(port) => format!("rtmp://{}:{port}/{key}", host_name(host)),
                    // A parent edge has no RTMP.
                    None => format!("http://{host}/{}.flv", key.to_url_path()),
                },
                start_time: stream.start_unix_ms(),
                ssrc: stream.ssrc().0,
                stream_id: RTMP_MESSAGE_STREAM,
                video_total_bytes,
                video_speed: live.as_ref().map_or(0, |live| live.video_speed()),
                audio_total_bytes,
                audio_speed: live.as_ref().map_or(0, |live| live.audio_speed()),
            }
        })
        .collect();
    publishers.sort_by(|a, b| a.key.cmp(&b.key));
    match room {
        Some(room) if publishers.is_empty() => {
            answer(StatusCode::NOT_FOUND, format!("room {room} is not live"))
        }
        _ => {
            let publishers = Some(publishers).filter(|publishers| !publishers.is_empty());
            answer(StatusCode::OK, LiveStat { publishers, players: None })
        }
    }
}

/// The connected edges, in the order in which they connected.
#[derive(Serialize)]
struct EdgeList {
    /// Upper bounds of the histograms `delays` and `waits` of each stream. The last bucket has no
    /// bound.
    delay_bounds_ms: &'static [u16],
    edges: Vec<EdgeInfo>,
}

async fn edges(State(state): Serving) -> Response {
    // No CORS header: web pages of other origins must not read it.
    let headers = [(CACHE_CONTROL, "no-store")];
    let list = EdgeList { delay_bounds_ms: &DELAY_BOUNDS_MS, edges: state.1.edges.list() };
    (headers, Json(list)).into_response()
}

#[derive(Deserialize)]
struct TimeQuery {
    stream: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StreamTime {
    stream_url: String,
    start_time: u64,
    /// The same at each node that the stream passes; existing players ignore it.
    publication: PublicationId,
}

/// Answers the CORS preflight of a browser (Fetch standard, "CORS-preflight fetch").
async fn preflight() -> impl IntoResponse {
    let headers = [
        (ACCESS_CONTROL_ALLOW_ORIGIN, "*"),
        (ACCESS_CONTROL_ALLOW_METHODS, "GET, HEAD, OPTIONS"),
        (ACCESS_CONTROL_ALLOW_HEADERS, "*"),
    ];
    (StatusCode::NO_CONTENT, headers)
}

async fn stream_time(State(hub): State<Hub>, Query(query): Query<TimeQuery>) -> Response {
    let Some(key) = query.stream.as_deref().map(|key| key.trim_matches('/')) else {
        return answer(StatusCode::BAD_REQUEST, "the query lacks the stream: ?stream=app/name");
    };
    match hub.stream(key) {
        Some(stream) => answer(
            StatusCode::OK,
            StreamTime {
                stream_url: stream.key().to_string(),
                start_time: stream.start_unix_ms(),
                publication: stream.id(),
            },
        ),
        None => answer(StatusCode::NOT_FOUND, format!("stream {key} is not live")),
    }
}

#[derive(Serialize)]
struct Health {
    status: &'static str,
    version: &'static str,
    uptime_seconds: u64,
    streams: usize,
}

fn health(hub: &Hub, started: Instant) -> Response {
    let health = Health {
        status: "ok",
        version: env!("CARGO_PKG_VERSION"),
        uptime_seconds: started.elapsed().as_secs(),
        streams: hub.len(),
    };
    (FOR_EVERYONE, Json(health)).into_response()
}

#[derive(Serialize)]
struct Ready {
    status: &'static str,
    reasons: Vec<String>,
}

fn ready(readiness: &Readiness) -> Response {
    let reasons = readiness.reasons();
    let (code, status) = match reasons.is_empty() {
        true => (StatusCode::OK, "ready"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready"),
    };
    (code, FOR_EVERYONE, Json(Ready { status, reasons })).into_response()
}

fn scrape(registry: &Registry) -> Response {
    match metrics::encode(registry) {
        Ok(text) => ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "metrics cannot be encoded");
            answer(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
        }
    }
}

async fn not_found() -> Response {
    answer(StatusCode::NOT_FOUND, "this path does not exist")
}

fn answer(status: StatusCode, data: impl Serialize) -> Response {
    (status, FOR_EVERYONE, Json(Answer { status: status.as_u16(), data })).into_response()
}

/// The host of a `Host` header (RFC 9110 §7.2), without its port.
fn host_name(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    }
}

/// Headers of an answer that web pages of any origin may read.
const FOR_EVERYONE: [(HeaderName, &str); 2] =
    [(ACCESS_CONTROL_ALLOW_ORIGIN, "*"), (CACHE_CONTROL, "no-store")];
/// RTMP servers number the message streams of a connection from 1, and a publisher creates one.
const RTMP_MESSAGE_STREAM: u32 = 1;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::{body::Body, http::Request};
    use http_body_util::BodyExt;
    use hyper::service::Service;
    use hyper_util::service::TowerToHyperService;
    use serde_json::{Value, json};

    use super::*;
    use downpour_distribution::downstream::{edges::StreamInfo, outgoing::OutgoingStream};
    use downpour_hub::{Admission, LogLimits, PublicationInfo, admission};
    use downpour_media::flv::{Tag, TagKind};
    use downpour_repair::{
        control::StreamReport, history::History, path_validation::PathState, rtp::Ssrc,
    };

    /// The API of a node with a downstream.
    fn serving(hub: &Hub, outgoing: &OutgoingStreams, edges: Edges, rtmp_port: u16) -> Router {
        let rtmp_port = Some(rtmp_port);
        let outgoing = outgoing.clone();
        let downstream = DownstreamApi { outgoing, edges, rtmp_port };
        router(state(hub, Some(downstream)))
    }

    /// The API of a node without a downstream.
    fn without_downstream(hub: &Hub) -> Router {
        router(state(hub, None))
    }

    fn state(hub: &Hub, downstream: Option<DownstreamApi>) -> ApiState {
        let admission = Admission::new(hub.clone(), admission::Settings::default());
        let outgoing = downstream.as_ref().map(|downstream| downstream.outgoing.clone());
        ApiState {
            hub: hub.clone(),
            registry: metrics::registry(&admission, outgoing).unwrap(),
            started: Instant::now(),
            readiness: Readiness::default(),
            downstream,
        }
    }

    #[tokio::test]
    async fn live_stat_answers_in_wire_v0() {
        let hub = hub();
        let outgoing = OutgoingStreams::new();
        let router = serving(&hub, &outgoing, Edges::default(), 1935);
        assert_eq!(
            get_json(&router, "/stat/livestat").await,
            (200, json!({"status": 200, "data": {"publishers": null, "players": null}}))
        );

        let mut publisher = hub.publish("live/movie".parse().unwrap()).unwrap();
        publisher.push(Tag::new(TagKind::Video, 0, &[0x17, 1, 0, 0, 0]).unwrap());
        let history = History::new(10, Duration::from_secs(1));
        let stream = Arc::new(OutgoingStream::new(
            publisher.stream().key().clone(),
            Ssrc(0x89ab_cdef),
            1_700_000_000_000,
            history,
        ));
        outgoing.insert(stream.clone());
        let entry = json!({
            "key": "live/movie",
            "url": "rtmp://cloud:1935/live/movie",
            "start_time": 1_700_000_000_000_u64,
            "ssrc": 0x89ab_cdef_u32,
            "stream_id": 1,
            "video_total_bytes": 5,
            "video_speed": 0,
            "audio_total_bytes": 0,
            "audio_speed": 0,
        });
        let listed = json!({"status": 200, "data": {"publishers": [entry], "players": null}});
        assert_eq!(get_json(&router, "/stat/livestat").await, (200, listed.clone()));
        assert_eq!(get_json(&router, "/stat/livestat?room=live/movie").await, (200, listed));
        let (status, body) = get_json(&router, "/stat/livestat?room=live/none").await;
        assert_eq!((status, &body["status"]), (404, &json!(404)));
        assert!(body["data"].is_string());

        outgoing.end(&stream);
        let (_, body) = get_json(&router, "/stat/livestat").await;
        assert_eq!(body["data"]["publishers"], Value::Null);
    }

    #[tokio::test]
    async fn edges_are_listed_with_their_reports() {
        let (hub, outgoing, edges) = (hub(), OutgoingStreams::new(), Edges::default());
        let router = serving(&hub, &outgoing, edges.clone(), 1935);
        let (status, none) = get_json(&router, "/api/v1/edges").await;
        assert_eq!((status, &none["edges"]), (200, &json!([])));
        let mut info = EdgeInfo::new("10.0.0.7:4000".parse().unwrap(), "downpour");
        info.node = Some("edge-7".into());
        info.connected_unix_ms = 1_700_000_000_000;
        info.patterns = vec!["live/*".parse().unwrap()];
        info.paths = vec![PathState::Up("10.0.0.7:5222".parse().unwrap()).into()];
        let report = StreamReport { ssrc: 9, received: 3, ..Default::default() };
        info.streams = vec![StreamInfo { key: "live/a".parse().unwrap(), fec: None, report }];
        let _listed = edges.insert(info);
        let (_, list) = get_json(&router, "/api/v1/edges").await;
        assert_eq!(list["delay_bounds_ms"][1], 2);
        let mut edge = list["edges"][0].clone();
        let stream = edge["streams"][0].take();
        assert_eq!(
            edge,
            json!({
                "node": "edge-7",
                "peer": "10.0.0.7:4000",
                "protocol": "downpour",
                "connected_unix_ms": 1_700_000_000_000_u64,
                "round_trip_us": null,
                "patterns": ["live/*"],
                "group": null,
                "paths": [{"state": "up", "address": "10.0.0.7:5222"}],
                "reported_unix_ms": null,
                "streams": [null],
            })
        );
        let expected = serde_json::to_value(StreamReport::default()).unwrap();
        for field in expected.as_object().unwrap().keys() {
            assert!(stream.get(field).is_some(), "{field} is not in {stream}");
        }
        assert_eq!((&stream["key"], &stream["ssrc"]), (&json!("live/a"), &json!(9)));
    }

    #[tokio::test]
    async fn node_without_downstream_answers_stream_time_health_and_metrics() {
        let hub = hub();
        let router = without_downstream(&hub);
        let mut info = PublicationInfo::starting_at(1_700_000_000_000);
        info.id = PublicationId(0x0123_4567_89ab_cdef);
        let _publisher = hub.publish_with("live/movie".parse().unwrap(), info).unwrap();
        assert_eq!(
            get_json(&router, "/stats/time?stream=live/movie").await,
            (
                200,
                json!({
                    "status": 200,
                    "data": {
                        "streamUrl": "live/movie",
                        "startTime": 1_700_000_000_000_u64,
                        "publication": "0123456789abcdef",
                    }
                })
            )
        );
        assert_eq!(get_json(&router, "/stats/time?stream=live/none").await.0, 404);
        let preflight = Request::options("/stats/time").body(Body::empty()).unwrap();
        let response = TowerToHyperService::new(router.clone()).call(preflight).await.unwrap();
        assert_eq!(response.status(), StatusCode::NO_CONTENT);
        assert_eq!(response.headers()[ACCESS_CONTROL_ALLOW_ORIGIN], "*");
        assert_eq!(get_json(&router, "/stats/time").await.0, 400);
        let (status, health) = get_json(&router, "/healthz").await;
        assert_eq!((status, &health["streams"]), (200, &json!(1)));
        for path in ["/healthz", "/readyz", "/stats/time?stream=live/movie"] {
            let request = Request::get(path).body(Body::empty()).unwrap();
            let response = TowerToHyperService::new(router.clone()).call(request).await.unwrap();
            assert_eq!(response.headers()[ACCESS_CONTROL_ALLOW_ORIGIN], "*", "{path}");
        }
        let (status, body) = get_json(&router, "/nothing").await;
        assert_eq!((status, &body["status"]), (404, &json!(404)));
        let (status, text) = get_text(&router, "/metrics").await;
        assert_eq!(status, 200);
        assert!(text.contains("downpour_streams 1"), "{text}");
    }

    #[tokio::test]
    async fn readiness_has_its_reasons() {
        let mut state = state(&hub(), None);
        let readiness = Readiness::default();
        state.readiness = readiness.clone();
        let router = router(state);
        let answer = get_json(&router, "/readyz").await;
        assert_eq!(answer, (200, json!({"status": "ready", "reasons": []})));
        readiness.draining.cancel();
        let answer = get_json(&router, "/readyz").await;
        let reasons = json!(["the node is shutting down"]);
        assert_eq!(answer, (503, json!({"status": "not ready", "reasons": reasons})));
    }

    #[test]
    fn host_name_is_the_host_header_without_its_port() {
        for (host, name) in [
            ("cloud:8090", "cloud"),
            ("cloud", "cloud"),
            ("[::1]:8090", "[::1]"),
            ("[::1]", "[::1]"),
        ] {
            assert_eq!(host_name(host), name);
        }
    }

    async fn get_json(router: &Router, uri: &str) -> (u16, Value) {
        let (status, text) = get_text(router, uri).await;
        (status, serde_json::from_str(&text).unwrap())
    }

    async fn get_text(router: &Router, uri: &str) -> (u16, String) {
        let request =
            Request::builder().uri(uri).header(HOST, "cloud:8090").body(Body::empty()).unwrap();
        let response = TowerToHyperService::new(router.clone()).call(request).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    fn hub() -> Hub {
        Hub::new(LogLimits { max_bytes: 1 << 20, max_age: 10_000 })
    }
}
