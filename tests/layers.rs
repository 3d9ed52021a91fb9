//! Checks the layers: dependencies between crates, crates without I/O, and imports between the modules
//! of this package. docs/architecture.md describes the same layers.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The crates of the workspace, their allowed dependencies in the workspace, and their I/O.
const CRATES: &[(&str, &[&str], Io)] = &[
    ("downpour-sys", &[], Io::Sockets),
    ("downpour-netem", &[], Io::Sockets),
    ("downpour-media", &["downpour-sys"], Io::None),
    ("downpour-rtmp", &["downpour-media", "downpour-sys"], Io::None),
    ("downpour-repair", &["downpour-media", "downpour-sys"], Io::None),
    ("downpour-hub", &["downpour-media", "downpour-sys"], Io::Waiting),
    (
        "downpour-distribution",
        &["downpour-hub", "downpour-media", "downpour-repair", "downpour-sys"],
        Io::Sockets,
    ),
    (
        "downpour",
        &[
            "downpour-distribution",
            "downpour-hub",
            "downpour-media",
            "downpour-netem",
            "downpour-repair",
            "downpour-rtmp",
            "downpour-sys",
        ],
        Io::Sockets,
    ),
];

#[derive(Clone, Copy, PartialEq)]
enum Io {
    /// State machines and formats: neither sockets nor a runtime.
    None,
    /// Locks, channels and timers of tokio, and no sockets.
    Waiting,
    /// Anything.
    Sockets,
}

/// Dependencies of a crate with sockets.
const IO_CRATES: &[&str] = &[
    "axum",
    "hyper",
    "hyper-util",
    "libc",
    "mio",
    "quinn",
    "quinn-udp",
    "socket2",
    "tokio-rustls",
];
/// Dependencies of a crate that waits.
const ASYNC_CRATES: &[&str] = &["async-trait", "futures", "tokio", "tokio-util"];
/// The features of tokio that a crate may have that waits and has no sockets. `rt` is for the timer of
/// a stream that waits for its encoder.
const WAITING_FEATURES: &[&str] = &["rt", "sync", "time"];

/// The modules of this package, and the other modules, or parts of them, that they may import.
const MODULES: &[(&str, &[&str])] = &[
    ("cli", &["config", "http", "net", "node", "record", "rtmp"]),
    ("node", &["config", "http", "net", "record", "rtmp"]),
    ("http", &["net", "node::metrics"]),
    ("rtmp", &["net"]),
    ("record", &[]),
    ("net", &["node::limits"]),
    ("config", &[]),
];

#[test]
fn crates_depend_on_lower_layers_only() {
    let packages = packages();
    let names: BTreeSet<_> = packages.iter().map(|package| package.name.as_str()).collect();
    assert_eq!(
        names,
        CRATES.iter().map(|(name, ..)| *name).collect(),
        "the table lists all crates"
    );
    for package in &packages {
        let (_, allowed, _) = CRATES.iter().find(|(name, ..)| *name == package.name).unwrap();
        for dependency in package.dependencies.iter().filter(|dependency| !dependency.is_dev) {
            let name = dependency.name.as_str();
            assert!(
                !names.contains(name) || allowed.contains(&name),
                "{} depends on {name}: it is not a lower layer",
                package.name
            );
        }
    }
}

#[test]
fn crates_without_io_have_no_runtime_and_no_sockets() {
    for package in packages() {
        let (name, _, io) = CRATES.iter().find(|(name, ..)| *name == package.name).unwrap();
        for dependency in package.dependencies.iter().filter(|dependency| !dependency.is_dev) {
            let is = |names: &[&str]| names.contains(&dependency.name.as_str());
            let only = |features: &[&str]| {
                dependency.features.iter().all(|feature| features.contains(&feature.as_str()))
            };
            let fits = match io {
                Io::Sockets => true,
                Io::None if is(ASYNC_CRATES) => false,
                Io::Waiting if is(&["tokio"]) => only(WAITING_FEATURES),
                Io::None | Io::Waiting if is(&["downpour-sys"]) => only(&[]),
                Io::None | Io::Waiting => !is(IO_CRATES),
            };
            assert!(fits, "{name} has {} with {:?}", dependency.name, dependency.features);
        }
    }
}

#[test]
fn only_the_crate_sys_has_unsafe_code() {
    let unsafe_files = |folder: &str| -> Vec<PathBuf> {
        let has_unsafe = |file: &PathBuf| {
            let code = code_of(&fs::read_to_string(file).unwrap());
            words(&code).any(|word| word == "unsafe")
        };
        rust_files(&root().join(folder)).into_iter().filter(has_unsafe).collect()
    };
    let sys = root().join("crates/sys");
    let (in_sys, elsewhere): (Vec<_>, Vec<_>) =
        unsafe_files("crates").into_iter().partition(|file| file.starts_with(&sys));
    assert!(!in_sys.is_empty());
    assert_eq!(elsewhere, [""; 0].map(PathBuf::from));
    assert_eq!(unsafe_files("src"), [""; 0].map(PathBuf::from));
}

#[test]
fn modules_import_lower_layers_only() {
    let src = root().join("src");
    let listed: BTreeSet<_> = MODULES.iter().map(|(module, _)| (*module).to_owned()).collect();
    let found: BTreeSet<_> = rust_files(&src).iter().map(|file| module_of(&src, file)).collect();
    let roots = ["lib", "main"].map(str::to_owned);
    assert_eq!(
        found,
        listed.into_iter().chain(roots.clone()).collect(),
        "the table lists all modules"
    );
    for file in rust_files(&src) {
        let module = module_of(&src, &file);
        if roots.contains(&module) {
            continue;
        }
        let (_, allowed) = MODULES.iter().find(|(name, _)| *name == module).unwrap();
        for import in imports(&code_of(&fs::read_to_string(&file).unwrap())) {
            let fits = |allowed: &str| {
                import
                    .strip_prefix(allowed)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
            };
            assert!(
                fits(&module) || allowed.iter().any(|allowed| fits(allowed)),
                "{} imports crate::{import}: the layers of {module} are {allowed:?}",
                file.display()
            );
        }
    }
}

#[test]
fn imports_are_found_in_every_form() {
    let code = r##"
        use crate::net;
        use crate::{cli::run, node::{self, limits as l}, http, };
        // use crate::comment;
        /* use crate::block /* nested */ ; */
        const TEXT: &str = "crate::string \" crate::more"; const RAW: &str = r#"crate::raw "x" "#;
        fn f<'a>(c: &'a str) -> char { crate::rtmp::client::run(c); '"' }
        pub(crate) fn g() { $crate::record::write() }
    "##;
    let found: Vec<_> = imports(&code_of(code)).into_iter().collect();
    let expected =
        ["cli::run", "http", "net", "node::limits", "node::self", "record::write", "rtmp::client"];
    assert_eq!(found, expected);
}

struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

struct Dependency {
    name: String,
    features: Vec<String>,
    is_dev: bool,
}

/// The workspace as cargo reads it: features of `[workspace.dependencies]` are merged in.
fn packages() -> Vec<Package> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let dependency = |value: &serde_json::Value| Dependency {
        name: text(&value["name"]),
        features: value["features"].as_array().unwrap().iter().map(text).collect(),
        is_dev: value["kind"] == "dev",
    };
    let package = |value: &serde_json::Value| Package {
        name: text(&value["name"]),
        dependencies: value["dependencies"].as_array().unwrap().iter().map(dependency).collect(),
    };
    metadata["packages"].as_array().unwrap().iter().map(package).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// The top-level module of a file in `src`.
fn module_of(src: &Path, file: &Path) -> String {
    let first = file.strip_prefix(src).unwrap().components().next().unwrap();
    Path::new(first.as_os_str()).file_stem().unwrap().to_str().unwrap().to_owned()
}

/// The first two segments of each path that starts with `crate::`.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, prefix) in code.match_indices("crate::") {
        if code[..at].ends_with(is_word) {
            continue;
        }
        let path = &code[at + prefix.len()..];
        let path = path.split(';').next().unwrap_or(path).replace(" as ", "\u{0}");
        let path: String = path.split_whitespace().collect();
        for (first, end) in heads(&path) {
            match path[end..].strip_prefix("::") {
                Some(rest) => {
                    found.extend(
                        heads(rest).into_iter().map(|(name, _)| format!("{first}::{name}")),
                    );
                }
                None => _ = found.insert(first),
            }
        }
    }
    found
}

/// The first segments of a path or of a group of paths, each with where it ends.
fn heads(path: &str) -> Vec<(String, usize)> {
    let word_at = |start: usize| {
        let word: String = path[start..].chars().take_while(|c| is_word(*c)).collect();
        (!word.is_empty()).then(|| (word.clone(), start + word.len()))
    };
    if !path.starts_with('{') {
        return word_at(0).into_iter().collect();
    }
    let (mut depth, mut heads) = (0, Vec::new());
    for (at, c) in path.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        match (c, depth) {
            ('}', 0) => break,
            ('{' | ',', 1) => heads.extend(word_at(at + 1)),
            _ => {}
        }
    }
    heads
}

fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c| !is_word(c))
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Rust code without its comments, and with nothing in its strings and characters.
fn code_of(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let (mut code, mut at) = (String::new(), 0);
    let find = |from: usize, end: &str| {
        let end: Vec<char> = end.chars().collect();
        (from..chars.len()).find(|at| chars[*at..].starts_with(&end)).map(|at| at + end.len())
    };
    while at < chars.len() {
        let rest = &chars[at..];
        let is_raw = rest[0] == 'r' && !code.ends_with(|c| is_word(c) && c != 'b');
        let hashes = rest[1..].iter().take_while(|c| **c == '#').count();
        if rest.starts_with(&['/', '/']) {
            at = find(at, "\n").unwrap_or(chars.len());
            code.push('\n');
        } else if rest.starts_with(&['/', '*']) {
            let mut depth = 1;
            at += 2;
            while depth > 0 && at < chars.len() {
                match chars[at..] {
                    ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
                    ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
                    _ => at += 1,
                }
            }
        } else if is_raw && rest.get(1 + hashes) == Some(&'"') {
            let end = format!("\"{}", "#".repeat(hashes));
            at = find(at + hashes + 2, &end).unwrap_or(chars.len());
        } else if rest[0] == '"' {
            at += 1;
            while at < chars.len() && chars[at] != '"' {
                at += if chars[at] == '\\' { 2 } else { 1 };
            }
            at += 1;
        } else if rest.starts_with(&['\'', '\\']) {
            at = find(at + 3, "'").unwrap_or(chars.len());
        } else if rest[0] == '\'' && rest.get(2) == Some(&'\'') {
            at += 3;
        } else {
            code.push(rest[0]);
            at += 1;
        }
    }
    code
}
