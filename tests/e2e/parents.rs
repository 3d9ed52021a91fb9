//! An edge with a `downstream` section is a parent: each hop numbers, sends and repairs its own
//! packets, and the publication stays the same one.

use std::{
    process::{Command, Output},
    time::{Duration, Instant},
};

use crate::common::{
    SOON,
    chain::Chain,
    compare::{
        Timestamps, assert_same_to_the_end, assert_same_while_it_lasted, media as without_script,
        metadata,
    },
    media::{self, Media},
    node::Node,
    wait_for,
};
use downpour_media::flv::Tag;
use downpour_netem::LinkSettings;
use serde_json::Value;

const KEY: &str = "live/movie";
const PUSH: Duration = Duration::from_secs(60);
/// Far below the 10 s of silence after which an edge ends a stream without being notified.
const NOTIFIED: Duration = Duration::from_secs(6);
/// A lost packet is repaired on the first hop first: the second waits for it, too.
const PATIENT: &str = "latency_ms: 1500";

#[test]
fn every_tag_reaches_the_child_under_loss_on_both_hops() {
    every_tag_passes(2);
}

#[test]
fn every_tag_passes_two_parents_under_loss_on_three_hops() {
    every_tag_passes(3);
}

/// Pushes through `edges` hops that lose 5 % both ways, to a viewer from the start and a late one.
#[track_caller]
fn every_tag_passes(edges: usize) {
    let chain = Chain::start(edges, &lossy(), 500, &[PATIENT]);
    let sent = media::short();
    let first = chain.child().watch(KEY);
    let push = chain.push(sent, KEY);
    let four_groups = without_script(&sent.tags);
    let four_groups = four_groups.iter().filter(|tag| tag.timestamp() < 2000).count();
    first.wait_tags(four_groups, PUSH);
    let late = chain.child().watch(KEY);
    late.wait_tags(1, SOON);
    assert_one_publication(&chain);
    let (first, late) = (first.until_end(PUSH), late.until_end(PUSH));
    push.until_done(PUSH);
    assert_from_the_start(sent, &first);
    assert_eq!(metadata(&first), metadata(&sent.tags), "metadata");
    let from = assert_same_to_the_end(&sent.tags, &late, Timestamps::Exact);
    let joined = without_script(&sent.tags)[from].timestamp();
    assert!(joined >= 1500, "the late viewer was served from {joined} ms on");
    for (number, (edge, hop)) in chain.edges.iter().zip(&chain.hops).enumerate() {
        let lost = hop.rtp_stats().dropped();
        let repaired: f64 =
            ["repaired_1", "repaired_2", "repaired_3"].map(|fate| edge.packets(fate)).iter().sum();
        println!("hop {number}: {lost} lost, {repaired} repaired");
        assert!(lost > 10, "hop {number} lost only {lost}");
        assert!(repaired > 5.0, "hop {number} repaired {repaired}");
        assert_eq!(edge.packets("lost"), 0.0, "packets given up on hop {number}");
    }
}

#[test]
fn each_node_lists_the_edge_below_it() {
    let chain = Chain::start(2, &LinkSettings::default(), 1, &[]);
    assert_eq!(Chain::edges_below(&chain.cloud.node), ["edge0"]);
    assert_eq!(Chain::edges_below(&chain.edges[0].node), ["edge1"]);
    let started = started_line(&chain.edges[0].node);
    assert!(started.contains(" quic=127.0.0.1:"), "{started}");
    let started = started_line(&chain.edges[1].node);
    assert!(!started.contains("quic="), "{started}");
}

#[test]
fn viewers_of_the_child_get_the_publication_of_a_restarted_encoder() {
    let chain = Chain::start(2, &lossy(), 900, &[PATIENT]);
    let viewer = chain.child().watch(KEY);
    let push = chain.push(media::full_at(2), KEY);
    viewer.wait_tags(100, SOON);
    let first = assert_one_publication(&chain);
    push.kill();
    let pulled = viewer.until_end(NOTIFIED);
    assert_same_while_it_lasted(&media::full_at(2).tags, &pulled, Timestamps::Exact);

    let viewer = chain.child().watch(KEY);
    let push = chain.push(media::short(), KEY);
    viewer.wait_tags(10, SOON);
    let second = assert_one_publication(&chain);
    assert_ne!(first["publication"], second["publication"]);
    assert_from_the_start(media::short(), &viewer.until_end(PUSH));
    push.until_done(PUSH);
    assert_no_stream(&chain);
}

/// The draining parent notifies the child of the streams' end. The child reconnects to it.
#[test]
fn child_recovers_when_the_parent_restarts() {
    let mut chain = Chain::start(2, &lossy(), 1300, &[PATIENT]);
    let sent = media::full_at(1);
    let [at_parent, at_child] = [0, 1].map(|edge| chain.edges[edge].watch(KEY));
    let push = chain.push(sent, KEY);
    at_child.wait_tags(100, SOON);
    let before = assert_one_publication(&chain);

    let begin = Instant::now();
    let (status, _) = chain.edges[0].node.terminate();
    assert_eq!(status.code(), Some(0), "the parent's exit code");
    let at_parent = at_parent.until_end(NOTIFIED);
    let at_child = at_child.until_end(NOTIFIED.saturating_sub(begin.elapsed()));
    assert_same_while_it_lasted(&sent.tags, &at_parent, Timestamps::Exact);
    // All that the parent had, up to its last tag.
    assert_same_to_the_end(&without_script(&at_parent), &at_child, Timestamps::Exact);

    chain.edges[0].node.restart();
    let viewer = chain.child().watch(KEY);
    viewer.wait_tags(10, SOON);
    assert_eq!(assert_one_publication(&chain), before, "the encoder did not restart");
    let pulled = viewer.until_end(PUSH);
    push.until_done(PUSH);
    assert_same_to_the_end(&sent.tags, &pulled, Timestamps::Exact);
    assert_no_stream(&chain);
}

/// A killed parent does not notify its child.
#[test]
fn child_recovers_when_the_parent_is_killed() {
    // Without a grace: the end of the first stream shows what each viewer got of which one.
    let mut chain = Chain::start(2, &LinkSettings::default(), 1700, &["publish_grace_ms: 0"]);
    let sent = media::full_at(1);
    let viewer = chain.child().watch(KEY);
    let push = chain.push(sent, KEY);
    viewer.wait_tags(100, SOON);
    chain.edges[0].node.kill();
    chain.edges[0].node.restart();
    let pulled = viewer.until_end(SOON);
    assert_same_while_it_lasted(&sent.tags, &pulled, Timestamps::Exact);
    let pulled = chain.child().watch(KEY).until_end(PUSH);
    push.until_done(PUSH);
    assert_same_to_the_end(&sent.tags, &pulled, Timestamps::Exact);
    assert_no_stream(&chain);
}

#[test]
fn check_accepts_a_parents_file_and_names_the_faulty_key_of_its_section() {
    let good = check("udp_addr: :5222\ndownstream:\n  quic_addr: :4343\n  rtp_port: 5230\n");
    let out = String::from_utf8_lossy(&good.stdout);
    assert!(good.status.success(), "{}", String::from_utf8_lossy(&good.stderr));
    assert!(out.contains("node.yaml: good, for an edge"), "{out}");
    let bad = check("udp_addr: :5222\ndownstream:\n  quic_addr: :4343\n  rtp_port: 70000\n");
    let errors = String::from_utf8_lossy(&bad.stderr);
    assert_eq!(bad.status.code(), Some(2), "{errors}");
    assert!(errors.contains("node.yaml:4:13: downstream.rtp_port: 70000"), "{errors}");
}

/// Runs `downpour check` on a file with this text.
fn check(text: &str) -> Output {
    let dir = tempfile::tempdir().expect("no directory for the test");
    std::fs::write(dir.path().join("node.yaml"), text).expect("cannot write a config");
    let mut command = Command::new(env!("CARGO_BIN_EXE_downpour"));
    command.args(["check", "node.yaml"]).current_dir(dir.path());
    command.output().expect("cannot run downpour")
}

/// Asserts that the stream's start time and publication are the same at each node; returns both.
#[track_caller]
fn assert_one_publication(chain: &Chain) -> Value {
    let times: Vec<_> = chain.nodes().map(|node| node.stream_time(KEY)).collect();
    let first = times[0].clone().expect("the stream is not live at the cloud");
    assert!(first["startTime"].as_u64() > Some(0), "{first}");
    assert_eq!(first["publication"].as_str().map(str::len), Some(16), "{first}");
    for (number, time) in times.iter().enumerate() {
        assert_eq!(time.as_ref(), Some(&first), "at node {number}");
    }
    // Each hop numbers its packets under an SSRC that it chose.
    let parents = chain.nodes().take(chain.edges.len());
    let ssrcs: Vec<_> = parents.map(only_ssrc).collect();
    assert!(ssrcs.windows(2).all(|pair| pair[0] != pair[1]), "{ssrcs:?}");
    first
}

#[track_caller]
fn only_ssrc(node: &Node) -> u64 {
    let publications = node.publications();
    let [(key, ssrc)] = &publications[..] else { panic!("{publications:?}") };
    assert_eq!(key, KEY);
    *ssrc
}

#[track_caller]
fn assert_no_stream(chain: &Chain) {
    for node in chain.nodes() {
        wait_for("a stream is gone", SOON, || (node.streams() == 0).then_some(()));
    }
}

/// Asserts that a viewer that joined before the stream got it from its start. A group of pictures is
/// half a second long; on a busy machine, one more may be missing.
#[track_caller]
fn assert_from_the_start(sent: &Media, pulled: &[Tag]) {
    let from = assert_same_to_the_end(&sent.tags, pulled, Timestamps::Exact);
    let joined = without_script(&sent.tags)[from].timestamp();
    assert!(joined <= 1000, "an early viewer was served from {joined} ms on");
}

#[track_caller]
fn started_line(node: &Node) -> String {
    let log = node.log_text();
    let line = log.lines().find(|line| line.contains("edge started"));
    line.unwrap_or_else(|| panic!("no line of the start in\n{log}")).to_owned()
}

/// 5 % loss and 10 ms, both ways.
fn lossy() -> LinkSettings {
    LinkSettings { delay: Duration::from_millis(10), ..LinkSettings::lossy(0.05) }
}
