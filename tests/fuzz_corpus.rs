//! Checks the properties of the fuzz targets on every file of the committed corpus and on mutations of
//! them. It takes seconds and is deterministic; `docs/fuzzing.md` describes longer runs.

#[path = "../fuzz/properties/mod.rs"]
mod properties;

use std::{collections::BTreeSet, fs, panic, path::Path};

use properties::Random;

#[test]
fn amf0() {
    check_corpus("amf0");
}

#[test]
fn config() {
    check_corpus("config");
}

#[test]
fn flv() {
    check_corpus("flv");
}

#[test]
fn repair_control() {
    check_corpus("repair_control");
}

#[test]
fn repair_datagram() {
    check_corpus("repair_datagram");
}

#[test]
fn repair_receiver() {
    check_corpus("repair_receiver");
}

#[test]
fn rtmp_chunks() {
    check_corpus("rtmp_chunks");
}

#[test]
fn rtmp_client() {
    check_corpus("rtmp_client");
}

#[test]
fn rtmp_server() {
    check_corpus("rtmp_server");
}

#[test]
fn rtp() {
    check_corpus("rtp");
}

#[test]
fn every_property_has_a_target_a_corpus_and_a_test() {
    let names: BTreeSet<String> =
        properties::ALL.iter().map(|(name, _)| name.to_string()).collect();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let entries = |path: &str| -> BTreeSet<String> {
        let entries = fs::read_dir(root.join(path)).expect(path).map(|entry| entry.unwrap().path());
        entries.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
    };
    assert_eq!(entries("fuzz/corpus"), names);
    assert_eq!(entries("fuzz/fuzz_targets"), names);
    let shared = BTreeSet::from(["mod", "memory", "rtmp"].map(String::from));
    assert_eq!(entries("fuzz/properties"), &names | &shared);
    let (manifest, tests) = (include_str!("../fuzz/Cargo.toml"), include_str!("fuzz_corpus.rs"));
    for name in names {
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
        assert!(
            tests.contains(&format!("fn {name}() {{\n    check_corpus(\"{name}\");")),
            "{name}"
        );
    }
}

/// Checks a property on its corpus and on mutations of it.
fn check_corpus(target: &str) {
    let (_, check) = properties::ALL.iter().find(|(name, _)| *name == target).expect("a property");
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut paths: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let corpus: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(corpus.len() >= 5, "{target} has no corpus");

    for (path, input) in paths.iter().zip(&corpus) {
        if panic::catch_unwind(|| check(input)).is_err() {
            panic!("{target}: {} violates the property", path.display());
        }
    }
    let mut random = Random::of(target.as_bytes());
    for round in 0..MUTATIONS {
        let from = round % corpus.len();
        let input = mutated(&corpus[from], &corpus[random.below(corpus.len())], &mut random);
        if panic::catch_unwind(|| check(&input)).is_err() {
            let found = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{target}-{round}"));
            fs::write(&found, &input).unwrap();
            panic!(
                "{target}: {}, a mutation of {}, violates the property",
                found.display(),
                paths[from].display()
            );
        }
    }
}

/// Returns a copy of `input` with a few changes that are typical of fuzzers.
fn mutated(input: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        let range = at..bytes.len().min(at + 1 + random.below(32));
        match random.below(8) {
            0 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << random.below(8)),
            1 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = random.below(256) as u8),
            2 => {
                let edge = [[0, 0, 0], [0xff; 3], [0x7f, 0xff, 0xff], [0x80, 0, 0]];
                let edge = edge[random.below(4)].into_iter().take(1 + random.below(3));
                bytes.iter_mut().skip(at).zip(edge).for_each(|(byte, edge)| *byte = edge);
            }
            3 => drop(bytes.drain(range)),
            4 => drop(bytes.splice(at..at, [random.below(256) as u8])),
            5 => {
                let copy = bytes[range].to_vec();
                let to = random.below(bytes.len() + 1);
                bytes.splice(to..to, copy);
            }
            6 => {
                bytes.truncate(at);
                bytes.extend_from_slice(&other[random.below(other.len() + 1)..]);
            }
            _ => bytes.truncate(at),
        }
    }
    bytes.truncate(MAX_LEN);
    bytes
}

/// Mutations per target.
const MUTATIONS: usize = 5000;
/// Maximum length of a mutation in bytes, the same as of the fuzzer's inputs.
const MAX_LEN: usize = 8192;
