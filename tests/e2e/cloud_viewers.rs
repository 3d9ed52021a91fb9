//! The cloud serves HTTP-FLV at its API address, as an edge does.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use crate::common::{
    SOON,
    compare::{
        Timestamps, assert_same_to_the_end, assert_same_while_it_lasted, media as without_script,
        metadata,
    },
    http::{self, Head, get_json},
    media,
    node::{Site, SiteSettings},
    viewer::Viewer,
};
use serde_json::Value;

const KEY: &str = "live/movie";
const PUSH: Duration = Duration::from_secs(40);

#[test]
fn cloud_sends_viewers_every_tag() {
    let site = cloud().start();
    let early = [(); 3].map(|()| watch(&site));
    let push = site.push(media::short(), KEY);
    let four_groups = without_script(&media::short().tags);
    let four_groups = four_groups.iter().filter(|tag| tag.timestamp() < 2000).count();
    early[0].wait_tags(four_groups, PUSH);
    let late = [(); 2].map(|()| watch(&site));
    for viewer in early {
        let pulled = viewer.until_end(PUSH);
        let from = assert_same_to_the_end(&media::short().tags, &pulled, Timestamps::Exact);
        let joined = without_script(&media::short().tags)[from].timestamp();
        assert!(joined < 500, "a viewer from the start was served from {joined} ms on");
        assert_eq!(metadata(&pulled), metadata(&media::short().tags), "metadata");
    }
    for viewer in late {
        let pulled = viewer.until_end(PUSH);
        let from = assert_same_to_the_end(&media::short().tags, &pulled, Timestamps::Exact);
        let joined = without_script(&media::short().tags)[from].timestamp();
        assert!(joined >= 1500, "a late viewer was served from {joined} ms on");
    }
    push.until_done(PUSH);
    let metrics = site.cloud.node.metrics();
    assert_eq!(metrics.sum("downpour_http_viewers_total", &[]), 5.0);
    assert_eq!(metrics.sum("downpour_http_viewers", &[]), 0.0);
}

#[test]
fn cloud_ends_viewers_with_their_publisher() {
    let site = cloud().start();
    let viewers = [(); 2].map(|()| watch(&site));
    let push = site.push(media::full_at(2), KEY);
    for viewer in &viewers {
        viewer.wait_tags(50, SOON);
    }
    push.kill();
    for viewer in viewers {
        let pulled = viewer.until_end(SOON);
        assert_same_while_it_lasted(&media::full_at(2).tags, &pulled, Timestamps::Exact);
    }
    // The next publication of the same name serves the next viewer from its first group on.
    let viewer = watch(&site);
    site.push(media::short(), KEY).until_done(PUSH);
    let from =
        assert_same_to_the_end(&media::short().tags, &viewer.until_end(PUSH), Timestamps::Exact);
    assert!(without_script(&media::short().tags)[from].timestamp() < 500);
}

#[test]
fn connection_serves_health_statistics_and_a_stream() {
    let site = cloud().start();
    let viewer = watch(&site);
    let _push = site.push(media::full_at(2), KEY);
    viewer.wait_tags(10, SOON);
    let mut client = Client::connect(site.cloud.node.http);
    for _ in 0..2 {
        let (status, health) = client.get_json("/healthz");
        assert_eq!((status, &health["streams"]), (200, &1.into()), "{health}");
        let (status, stat) = client.get_json("/stat/livestat");
        assert_eq!((status, &stat["data"]["publishers"][0]["key"]), (200, &KEY.into()), "{stat}");
        let head = client.request("HEAD", "/live/none.flv");
        assert_eq!(head.status, 404, "{}", head.fields);
    }
    // The last request of the connection plays the stream.
    let head = client.request("GET", &format!("/{KEY}.flv"));
    assert_eq!(head.status, 200, "{}", head.fields);
    let mut signature = [0; 3];
    client.socket.read_exact(&mut signature).expect("no FLV");
    assert_eq!(&signature, b"FLV");
}

#[test]
fn head_and_get_return_whether_a_stream_is_live() {
    let site = cloud().start();
    let viewer = watch(&site);
    let _push = site.push(media::full_at(2), KEY);
    viewer.wait_tags(10, SOON);
    let api = site.cloud.node.http;
    // A stream ends with its connection, so HEAD closes the connection as GET does.
    let head = Client::connect(api).request("HEAD", &format!("/{KEY}.flv"));
    assert_eq!(head.status, 200, "{}", head.fields);
    assert!(head.fields.contains("content-type: video/x-flv"), "{}", head.fields);
    let (status, body) =
        http::get(api, "/live/none.flv").map(|answer| (answer.status, answer.body)).unwrap();
    assert_eq!(status, 404, "{body}");
    assert!(body.contains("live/none is not live"), "{body}");
}

#[test]
fn cloud_without_flv_returns_404_for_streams() {
    let site = cloud().with_cloud("http: {flv: false}").start();
    let edge = site.start_edge();
    edge.until_connected();
    let viewer = edge.watch(KEY);
    let _push = site.push(media::full_at(2), KEY);
    viewer.wait_tags(10, SOON);
    let api = site.cloud.node.http;
    let (status, answer) = get_json(api, &format!("/{KEY}.flv")).expect("no answer");
    assert_eq!(status, 404);
    let (_, nothing) = get_json(api, "/no/such/path").expect("no answer");
    assert_eq!(answer, nothing, "the router's answer");
    let (status, answer) = get_json(api, "/stat/livestat").expect("no answer");
    assert_eq!((status, &answer["data"]["publishers"][0]["key"]), (200, &KEY.into()));
}

/// A cloud without edges.
fn cloud() -> SiteSettings {
    SiteSettings { edges: 0, ..SiteSettings::default() }
}

fn watch(site: &Site) -> Viewer {
    Viewer::watch(site.cloud.node.http, KEY)
}

/// One connection for many requests.
struct Client {
    socket: TcpStream,
}

impl Client {
    fn connect(addr: SocketAddr) -> Self {
        let socket = TcpStream::connect(addr).expect("cannot connect");
        socket.set_read_timeout(Some(SOON)).expect("no timeout");
        Self { socket }
    }

    /// Sends a request and reads the answer's head. Only a live stream closes the connection.
    #[track_caller]
    fn request(&mut self, method: &str, path: &str) -> Head {
        write!(self.socket, "{method} {path} HTTP/1.1\r\nHost: cloud\r\n\r\n").expect("not sent");
        let head = http::read_head(&mut self.socket).expect("no answer");
        let is_stream = head.status == 200 && path.ends_with(".flv");
        let closes = head.fields.contains("connection: close");
        assert_eq!(closes, is_stream, "{method} {path}: {}", head.fields);
        head
    }

    /// Reads a body with the length of the head's `content-length`.
    #[track_caller]
    fn body(&mut self, head: &Head) -> Vec<u8> {
        let len = head.fields.lines().find_map(|line| line.strip_prefix("content-length: "));
        let len = len.unwrap_or_else(|| panic!("no length: {}", head.fields));
        let mut body = vec![0; len.parse().expect("the length is a number")];
        self.socket.read_exact(&mut body).expect("no whole body");
        body
    }

    #[track_caller]
    fn get_json(&mut self, path: &str) -> (u16, Value) {
        let head = self.request("GET", path);
        let body = self.body(&head);
        (head.status, serde_json::from_slice(&body).expect("not JSON"))
    }
}
