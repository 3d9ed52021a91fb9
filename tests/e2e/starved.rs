//! A machine without processor time to spare: what the kernel delivered is not lost.

use std::{
    fs,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::common::{
    compare::{Timestamps, assert_same_to_the_end},
    media,
    node::{Site, SiteSettings},
    process::{Guard, signal},
};
use downpour_netem::LinkSettings;

const KEY: &str = "live/movie";
const PUSH: Duration = Duration::from_secs(120);

/// The receiver thread gets a processor for moments only, while the thread that knows the deadlines and
/// hears what was sent runs as ever.
#[test]
fn starved_receiver_threads_lose_nothing() {
    let site = site();
    let _spinner = starve(&site, "rtp-receiver-0");
    watch_one_push(&site);
    assert_eq!(site.edges[0].packets("lost"), 0.0);
}

/// The edge stands still for longer than any deadline, again and again.
#[test]
fn edge_that_stands_still_loses_nothing() {
    let site = site();
    let viewer = site.watch(KEY);
    let push = site.push(media::full(), KEY);
    let pid = site.edges[0].node.pid();
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(300));
        signal(pid, "STOP");
        thread::sleep(Duration::from_millis(900));
        signal(pid, "CONT");
    }
    let pulled = viewer.until_end(PUSH);
    push.until_done(PUSH);
    assert_same_to_the_end(&media::full().tags, &pulled, Timestamps::Exact);
    assert_eq!(site.edges[0].packets("lost"), 0.0);
}

/// Ten minutes of it, or as many seconds as `DOWNPOUR_STARVED_SECONDS` says: `scripts/soak starved`.
#[test]
#[ignore = "takes minutes"]
fn starved_threads_lose_nothing_for_minutes() {
    let seconds = std::env::var(SECONDS).map_or(600, |text| text.parse().expect(SECONDS));
    let until = Instant::now() + Duration::from_secs(seconds);
    let site = site();
    let _spinners =
        ["rtp-receiver-0", "rtp-control", "tokio-rt-worker"].map(|thread| starve(&site, thread));
    let mut rounds = 0;
    while Instant::now() < until {
        watch_one_push(&site);
        rounds += 1;
        println!("{rounds} rounds, {} packets lost", site.edges[0].packets("lost"));
    }
    assert_eq!(site.edges[0].packets("lost"), 0.0);
}

fn site() -> Site {
    // A path that loses nothing; the relays are threads of this process, which is not starved.
    let site = SiteSettings { dynamic: true, ..SiteSettings::over(LinkSettings::default(), 1) };
    let site = site.start();
    site.edges[0].until_connected();
    site.until_targets(1);
    site
}

fn watch_one_push(site: &Site) {
    let viewer = site.watch(KEY);
    let push = site.push(media::full(), KEY);
    let pulled = viewer.until_end(PUSH);
    push.until_done(PUSH);
    assert_same_to_the_end(&media::full().tags, &pulled, Timestamps::Exact);
}

/// Lets the edge's threads of a name run only while nothing else wants their processor (sched(7),
/// SCHED_IDLE), and keeps that processor busy until the guard is dropped.
fn starve(site: &Site, name: &str) -> Guard {
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().expect("needs util-linux");
        assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    };
    let mut found = 0;
    for task in fs::read_dir(format!("/proc/{}/task", site.edges[0].node.pid())).unwrap() {
        let task = task.unwrap();
        let comm = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if comm.trim() == name {
            let thread = task.file_name().into_string().unwrap();
            run("chrt", &["--idle", "--pid", "0", &thread]);
            run("taskset", &["--cpu-list", "--pid", "0", &thread]);
            found += 1;
        }
    }
    assert!(found > 0, "no thread {name}");
    let spin = ["--cpu-list", "0", "sh", "-c", "while :; do :; done"];
    let spinner = Command::new("taskset").args(spin).stdin(Stdio::null()).spawn();
    Guard::new(spinner.expect("needs util-linux"))
}

const SECONDS: &str = "DOWNPOUR_STARVED_SECONDS";
