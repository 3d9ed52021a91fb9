//! Settings: YAML files in, checked values out.
//!
//! A file holds sections of keys. A key stands in one place, the `settings!` block of its role, with
//! its section, type, default, bounds and meaning, when a change takes effect, and its flat names,
//! which files without sections use. The sample files and the tables of `docs/configuration.md` are
//! generated from there, and tests compare them.

mod address;
mod cloud;
mod common;
mod downstream;
mod edge;
mod fec;
mod invalid;
mod pacing;
mod parse;
mod record;
mod sample;
mod schema;

#[cfg(test)]
#[allow(unreachable_pub, reason = "the macros declare public types")]
mod tests;
mod tree;
mod value;

pub use address::{InterfaceAddr, ListenAddr};
pub use cloud::CloudConfig;
pub use common::{LogConfig, RecordConfig, ShutdownConfig, StreamLimits};
pub use downstream::DownstreamConfig;
pub use edge::EdgeConfig;
pub use fec::ClientAddr;
pub use invalid::Invalid;
pub use parse::Given;
pub use record::Field;
pub use schema::{Conflict, Key, Reload, Section, Settings, Slot, Spec, Visitor};
pub use tree::{Entry, Node, Place, Value};
pub use value::{LogLevel, RepairProtocol, Setting};

use std::{
    fmt, fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

/// What a node is, and so which keys it knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// Takes RTMP and sends RTP.
    Cloud,
    /// Takes RTP and serves viewers.
    Edge,
}

impl Role {
    /// Returns the role that knows more of the file's keys; `None` for a tie, or if the text is no
    /// configuration.
    pub fn detect(text: &str) -> Option<Self> {
        let root = tree::parse(text).ok()?;
        let Value::Map(entries) = &root.value else { return None };
        let cloud = parse::known_keys::<CloudConfig>(entries);
        let edge = parse::known_keys::<EdgeConfig>(entries);
        match cloud.cmp(&edge) {
            std::cmp::Ordering::Greater => Some(Self::Cloud),
            std::cmp::Ordering::Less => Some(Self::Edge),
            std::cmp::Ordering::Equal => None,
        }
    }

    fn with_article(self) -> &'static str {
        match self {
            Self::Cloud => "a cloud",
            Self::Edge => "an edge",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cloud => "cloud",
            Self::Edge => "edge",
        })
    }
}

/// A checked configuration, and messages for the log.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded<T> {
    /// The settings.
    pub config: T,
    /// The file that they were read from; `None` for the defaults.
    pub file: Option<PathBuf>,
    /// One line each, for the log at info, such as that a sample was written.
    pub notes: Vec<String>,
    /// One line each, for the log at warn, such as keys that have no effect.
    pub warnings: Vec<String>,
}

/// A fault of a configuration on one line: file, line and column, key, and valid values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    file: PathBuf,
    place: Option<Place>,
    message: String,
}

impl ConfigError {
    fn new(file: &Path, place: Option<Place>, message: impl fmt::Display) -> Self {
        Self { file: file.to_owned(), place, message: message.to_string().replace('\n', " ") }
    }

    /// The file at fault.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Line and column of the fault, from 1; `None` if the file as a whole is at fault.
    pub fn position(&self) -> Option<(usize, usize)> {
        self.place.map(|place| (place.line, place.column))
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(place) = self.place {
            write!(f, ":{place}")?;
        }
        write!(f, ": {}", self.message)
    }
}

impl std::error::Error for ConfigError {}

/// Reads the named file, or `default`. If it is missing, uses the defaults and writes the sample there.
/// If that fails, a named file is an error and `default` a warning.
pub(crate) fn load<T: Settings>(
    named: Option<&Path>,
    default: &Path,
) -> Result<Loaded<T>, ConfigError> {
    let file = named.unwrap_or(default);
    let fail = |message| Err(ConfigError::new(file, None, message));
    match read(file) {
        Ok(text) => return parse(file, &text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return fail(format!("cannot read it: {error}")),
    }
    let config = T::default();
    let (mut notes, mut warnings) = (Vec::new(), Vec::new());
    match (write_new(file, &sample::sample(&config)), named) {
        (Ok(()), _) => notes.push(format!(
            "{} does not exist; using the defaults, which are now written there",
            file.display()
        )),
        (Err(error), None) => warnings.push(format!(
            "{} does not exist; using the defaults, which cannot be written there: {error}",
            file.display()
        )),
        (Err(error), Some(_)) => {
            return fail(format!("it does not exist and cannot be created: {error}"));
        }
    }
    Ok(Loaded { config, file: None, notes, warnings })
}

/// Checks a text; `file` is named in errors.
///
/// # Errors
/// One line: the file, line and column, the key, and what would be right.
pub(crate) fn parse<T: Settings>(file: &Path, text: &str) -> Result<Loaded<T>, ConfigError> {
    parse::parse(file, text)
}

/// Keeps a file that was created in the meantime.
fn write_new(file: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::File::options().write(true).create_new(true).open(file)?;
    file.write_all(text.as_bytes())
}

/// Reads a configuration's text, 1 MiB at most.
///
/// # Errors
/// If it cannot be read, is too long or is not UTF-8.
pub fn read(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(file)?.take(FILE_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is over 1 MiB"));
    }
    Ok(text)
}

/// Checks that the addresses of these keys, all TCP or all UDP, can be listened on at one time.
fn check_ports(addrs: &[(&'static str, &ListenAddr)]) -> Result<(), Conflict> {
    for (i, (key, addr)) in addrs.iter().enumerate() {
        if let Some((other, _)) = addrs.iter().take(i).find(|(_, other)| addr.overlaps(other)) {
            let message =
                format!("{other} and {key} both use port {}; change one of them", addr.port());
            return Err(Conflict::new(&[*key, *other], message));
        }
    }
    Ok(())
}

fn check_pair(cert: &Path, key: &Path) -> Result<(), Conflict> {
    let fail = |keys: &[&'static str], message: &str| Err(Conflict::new(keys, message));
    match (cert.as_os_str().is_empty(), key.as_os_str().is_empty()) {
        (true, _) => fail(&["downstream.cert_file"], "is empty; use a path"),
        (_, true) => fail(&["downstream.key_file"], "is empty; use a path"),
        _ if cert == key => fail(
            &["downstream.key_file", "downstream.cert_file"],
            "is the same file as cert_file; use another",
        ),
        _ => Ok(()),
    }
}

/// Bytes of a configuration file: far over any real one.
const FILE_MAX: u64 = 1 << 20;
