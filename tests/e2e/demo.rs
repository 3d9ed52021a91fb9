//! `downpour demo`.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use crate::common::{
    SOON, http, media,
    process::Guard,
    viewer::{Viewer, save},
    wait_for,
};

#[test]
fn demo_prints_urls_of_a_whole_stream() {
    let mut demo = Command::new(env!("CARGO_BIN_EXE_downpour"))
        .args(["demo", "--edges", "2", "--loss", "10"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("cannot start the demo");
    let stdout = demo.stdout.take().unwrap();
    let demo = Guard::new(demo);
    let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
    let urls: Vec<String> = lines
        .by_ref()
        .take_while(|line| !line.starts_with("Publish"))
        .filter_map(|line| Some(line.split_once("http://")?.1.to_owned()))
        .collect();
    let (urls, pages): (Vec<_>, Vec<_>) = urls.into_iter().partition(|url| url.ends_with(".flv"));
    assert_eq!((urls.len(), pages.len()), (2, 2), "{urls:?} {pages:?}");
    let page = pages[0].strip_suffix("/   in a browser").expect("no URL for a browser");
    let page = wait_for("the page plays the stream", SOON, || {
        let text = http::get(page.parse().ok()?, "/").ok()?.body;
        text.contains("data-stream=\"live/demo\"").then_some(text)
    });
    assert!(page.contains("<video"), "{page}");
    // The reports must be read, or the pipe fills.
    let reports = std::thread::spawn(move || lines.collect::<Vec<_>>());

    let dir = tempfile::tempdir().unwrap();
    let viewers = urls.iter().map(|url| {
        let (addr, path) = url.split_once('/').expect("no path in the URL");
        let key = path.strip_suffix(".flv").expect("not FLV");
        let addr = addr.parse().expect("no address in the URL");
        Viewer::watch(addr, key)
    });
    // All viewers start before the test waits for the first.
    let viewers: Vec<_> = viewers.collect();
    for (number, viewer) in viewers.into_iter().enumerate() {
        viewer.wait_tags(200, Duration::from_secs(30));
        let file = dir.path().join(format!("{number}.flv"));
        save(&viewer.leave(), &file);
        media::assert_decodes(&file, &["h264", "aac"]);
    }

    let output = demo.interrupt();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let reports = reports.join().unwrap();
    let repaired = |line: &String| {
        let count = line.split_once("repaired ")?.1.split_whitespace().next()?;
        count.parse::<u64>().ok()
    };
    assert!(reports.iter().filter_map(repaired).max() > Some(0), "{reports:?}");
    let longest = reports.iter().map(|line| line.chars().count()).max();
    assert!(longest <= Some(80), "{reports:?}");
}
