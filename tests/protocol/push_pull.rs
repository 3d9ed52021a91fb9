//! `downpour push` and `downpour pull` through an RTMP server, a hub and an HTTP server.

use std::{
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::common::http_node::HttpNode;
use downpour::{
    cli::{Failure, PullArgs, PushArgs, pull, push},
    http::ViewerSettings,
    rtmp::listener::{Server, ServerSettings},
};
use downpour_hub::Hub;
use downpour_media::flv::{FlvTags, FlvWriter, Tag, TagKind};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pull_receives_every_pushed_tag() {
    let node = PushPull::start().await;
    let tags = clip(25);
    let file = node.write("in.flv", &tags);
    let output = node.dir.path().join("out.flv");
    let pulled = node.pull("live/movie.flv", Some(output.clone()), None);
    let pushed = node.push(&file, "live/movie", 1, false).await.unwrap();
    assert_eq!(pushed.0.tags as usize, tags.len());
    assert!(pushed.1.contains("total: 1 connections"), "{}", pushed.1);
    let (totals, _) = pulled.await.unwrap().unwrap();
    assert_eq!(read(&output), tags);
    assert_eq!(totals.tags, pushed.0.tags);
    assert_eq!(totals.bytes, pushed.0.bytes);
    // Real time: 24 frames of 40 ms.
    assert!(pushed.0.elapsed >= Duration::from_millis(960), "{:?}", pushed.0.elapsed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn looped_push_continues_the_timeline_on_every_connection() {
    let node = PushPull::start().await;
    let tags = clip(5);
    let file = node.write("in.flv", &tags);
    let stop = CancellationToken::new();
    let pushing = tokio::spawn({
        let (url, stop) = (node.rtmp("live/cam{i}"), stop.clone());
        let args = PushArgs { file, url, count: 3, repeat: true };
        async move { push::publish_all(&args, stop, &mut Vec::new()).await }
    });
    let output = node.dir.path().join("out.flv");
    let a_while = Some(Duration::from_secs(3));
    let pulled = node.pull("live/cam2.flv", Some(output.clone()), a_while);
    pulled.await.unwrap().unwrap();
    assert_eq!(node.hub.len(), 3);
    stop.cancel();
    pushing.await.unwrap().unwrap();
    let read = read(&output);
    assert!(read.last().unwrap().timestamp() > 400, "{read:?}");
    assert!(read.is_sorted_by_key(Tag::timestamp), "{read:?}");
    let headers = read.iter().filter(|tag| tag.is_sequence_header()).count();
    assert_eq!(headers, 2, "{read:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn push_and_pull_report_failures() {
    let node = PushPull::start_waiting(Duration::ZERO).await;
    let file = node.write("in.flv", &clip(5));
    let taken = node.hub.publish("live/movie".parse().unwrap()).unwrap();
    let error = node.push(&file, "live/movie", 1, false).await.unwrap_err();
    assert!(matches!(&error, Failure::Run(text) if text.contains("BadName")), "{error}");
    let error = node.push(&file, "live/movie", 2, false).await.unwrap_err();
    assert!(matches!(&error, Failure::Run(text) if text.starts_with("2 of 2")), "{error}");
    drop(taken);

    let error = node.pull("live/none.flv", None, None).await.unwrap().unwrap_err();
    assert!(matches!(&error, Failure::Run(text) if text.contains("404")), "{error}");
    let _silent = node.hub.publish("live/silent".parse().unwrap()).unwrap();
    let shortly = Some(Duration::from_millis(100));
    let error = node.pull("live/silent.flv", None, shortly).await.unwrap().unwrap_err();
    assert_eq!(error, Failure::Run("nothing was received".into()));

    let missing = node.dir.path().join("missing.flv");
    let error = node.push(&missing, "live/movie", 1, false).await.unwrap_err();
    assert!(matches!(&error, Failure::Usage(text) if text.contains("missing.flv")), "{error}");
    let output = Some(node.dir.path().join("no/such/dir.flv"));
    let error = node.pull("live/movie.flv", output, None).await.unwrap().unwrap_err();
    assert!(matches!(error, Failure::Usage(_)), "{error}");
}

/// A node with RTMP input and HTTP-FLV output.
struct PushPull {
    hub: Hub,
    dir: tempfile::TempDir,
    http: HttpNode,
    /// Address of the RTMP server, which ends with the HTTP server.
    rtmp: String,
}

type Outcome = Result<(pull::Totals, String), Failure>;

impl PushPull {
    async fn start() -> Self {
        Self::start_waiting(Duration::from_secs(20)).await
    }

    /// Starts a node that lets viewers wait for `play_wait` until their stream is live.
    async fn start_waiting(play_wait: Duration) -> Self {
        let http = HttpNode::start_with(ViewerSettings::default(), play_wait).await;
        let hub = http.hub.clone();
        let rtmp_server =
            Server::bind("127.0.0.1:0".parse().unwrap(), ServerSettings::default()).unwrap();
        let rtmp = rtmp_server.local_addr().unwrap().to_string();
        tokio::spawn(rtmp_server.run(http.admission.clone(), http.shutdown.clone()));
        Self { hub, dir: tempfile::tempdir().unwrap(), http, rtmp }
    }

    fn rtmp(&self, path: &str) -> String {
        format!("rtmp://{}/{path}", self.rtmp)
    }

    fn write(&self, name: &str, tags: &[Tag]) -> PathBuf {
        let path = self.dir.path().join(name);
        let mut writer = FlvWriter::new(File::create(&path).unwrap()).unwrap();
        tags.iter().for_each(|tag| writer.write(tag).unwrap());
        path
    }

    async fn push(&self, file: &Path, path: &str, count: usize, repeat: bool) -> Outcome {
        let args = PushArgs { file: file.into(), url: self.rtmp(path), count, repeat };
        let mut out = Vec::new();
        let totals = push::publish_all(&args, CancellationToken::new(), &mut out).await?;
        Ok((totals, String::from_utf8(out).unwrap()))
    }

    fn pull(
        &self,
        path: &str,
        output: Option<PathBuf>,
        duration: Option<Duration>,
    ) -> JoinHandle<Outcome> {
        let url = format!("http://{}/{path}", self.http.address);
        let args = PullArgs { url, output, count: 1, duration };
        tokio::spawn(async move {
            let mut out = Vec::new();
            let totals = pull::receive_all(&args, CancellationToken::new(), &mut out).await?;
            Ok((totals, String::from_utf8(out).unwrap()))
        })
    }
}

/// Headers, then one frame per 40 ms, each followed by audio.
fn clip(frames: u32) -> Vec<Tag> {
    let tag = |kind, timestamp, body: &[u8]| Tag::new(kind, timestamp, body).unwrap();
    let metadata = b"\x02\0\x0aonMetaData\x08\0\0\0\0\0\0\x09";
    let mut tags = vec![
        tag(TagKind::Script, 0, metadata),
        tag(TagKind::Video, 0, &[0x17, 0, 0, 0, 0, 1, 2, 3]),
        tag(TagKind::Audio, 0, &[0xaf, 0, 0x12, 0x10]),
    ];
    for i in 0..frames {
        let mut frame = vec![i as u8; if i == 0 { 100_000 } else { 3_000 }];
        frame[..5].copy_from_slice(&[if i == 0 { 0x17 } else { 0x27 }, 1, 0, 0, 0]);
        tags.push(tag(TagKind::Video, i * 40, &frame));
        tags.push(tag(TagKind::Audio, i * 40, &[0xaf, 1, i as u8]));
    }
    tags
}

fn read(path: &Path) -> Vec<Tag> {
    FlvTags::new(File::open(path).unwrap()).map(Result::unwrap).collect()
}
