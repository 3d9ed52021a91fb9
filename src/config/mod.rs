//! Settings: YAML files in, checked values out.
//!
//! A key stands in one place, the [`settings!`](schema) block of its role: its type, default,
//! bounds and meaning. The sample files and the tables of `docs/configuration.md` are made from
//! there, and tests hold them to it.

mod cloud;
mod edge;
mod fec;
mod pacing;
mod schema;
mod value;

pub use cloud::CloudConfig;
pub use edge::EdgeConfig;
pub use fec::ClientAddr;
pub use schema::{Key, Section, Settings};
pub use value::{InterfaceAddr, ListenAddr, LogLevel, RepairProtocol, Setting};

use std::{
    fmt, fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use serde_yaml::{Mapping, Value};

/// What a node is, and so which keys it knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// Takes RTMP and sends RTP.
    Cloud,
    /// Takes RTP and serves viewers.
    Edge,
}

impl Role {
    /// The role whose keys a file's text uses more of; `None` when it is no mapping or a tie.
    pub fn detect(text: &str) -> Option<Self> {
        let keys = serde_yaml::from_str::<Mapping>(text).ok()?;
        let known = |sections: Vec<Section>| {
            let names: Vec<_> = schema::keys(&sections).map(|key| key.name).collect();
            keys.keys().filter_map(Value::as_str).filter(|key| names.contains(key)).count()
        };
        let cloud = known(CloudConfig::default().sections());
        let edge = known(EdgeConfig::default().sections());
        match cloud.cmp(&edge) {
            std::cmp::Ordering::Greater => Some(Self::Cloud),
            std::cmp::Ordering::Less => Some(Self::Edge),
            std::cmp::Ordering::Equal => None,
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

/// A checked configuration and what its owner should be told once logging works.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded<T> {
    /// The settings.
    pub config: T,
    /// The file they came from; `None` for the defaults.
    pub file: Option<PathBuf>,
    /// One line each, for the log at info: for instance that a sample was written.
    pub notes: Vec<String>,
    /// One line each, for the log at warn: keys that are accepted but do nothing.
    pub warnings: Vec<String>,
}

/// What is wrong with a configuration: one line with the file, the place, the key and what would
/// be right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    file: PathBuf,
    /// Line and column, from 1.
    position: Option<(usize, usize)>,
    message: String,
}

impl ConfigError {
    fn new(file: &Path, position: Option<(usize, usize)>, message: impl fmt::Display) -> Self {
        Self { file: file.to_owned(), position, message: message.to_string().replace('\n', " ") }
    }

    /// The file at fault.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Line and column of the fault, from 1, where one can be told.
    pub fn position(&self) -> Option<(usize, usize)> {
        self.position
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some((line, column)) = self.position {
            write!(f, ":{line}:{column}")?;
        }
        write!(f, ": {}", self.message)
    }
}

impl std::error::Error for ConfigError {}

/// Reads the file that was named, or `default` if it is there; else takes the defaults and writes
/// the sample to `default`.
fn load<T: Settings>(named: Option<&Path>, default: &Path) -> Result<Loaded<T>, ConfigError> {
    let file = named.unwrap_or(default);
    match read(file) {
        Ok(text) => parse(file, &text),
        Err(error) if error.kind() == io::ErrorKind::NotFound && named.is_none() => {
            Ok(defaults(default))
        }
        Err(error) => Err(ConfigError::new(file, None, format!("cannot read it: {error}"))),
    }
}

fn defaults<T: Settings>(file: &Path) -> Loaded<T> {
    let config = T::default();
    let mut loaded = Loaded { config, file: None, notes: Vec::new(), warnings: Vec::new() };
    // `create_new`: a file that somebody put there in the meantime stays as it is.
    let written = fs::File::options()
        .write(true)
        .create_new(true)
        .open(file)
        .and_then(|mut sample| sample.write_all(schema::sample::<T>().as_bytes()));
    match written {
        Ok(()) => loaded.notes.push(format!(
            "no {}: running on the defaults, which are now written there",
            file.display()
        )),
        Err(error) => loaded.warnings.push(format!(
            "no {}: running on the defaults, which cannot be written there: {error}",
            file.display()
        )),
    }
    loaded
}

/// Reads a configuration's text, [`FILE_MAX`] bytes at most.
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

fn parse<T: Settings>(file: &Path, text: &str) -> Result<Loaded<T>, ConfigError> {
    let fail = |position, message: String| Err(ConfigError::new(file, position, message));
    let entries = match serde_yaml::from_str::<Value>(text) {
        Ok(Value::Mapping(entries)) => entries,
        Ok(Value::Null) => Mapping::new(),
        Ok(_) => return fail(None, "it must hold lines of the form `key: value`".into()),
        Err(error) => {
            let repeated = repeated_key(text);
            let position = repeated
                .map(|(_, position)| position)
                .or_else(|| error.location().map(|at| (at.line(), at.column())));
            let message = match repeated {
                Some((key, _)) => format!("{key} stands there twice; leave one"),
                // To YAML a bracket begins a list.
                None if top_level(text).any(|(.., value)| value.trim_start().starts_with('[')) => {
                    format!("not YAML: {error}; addresses in brackets need quotes: \"[::]:4242\"")
                }
                None => format!("not YAML: {error}"),
            };
            return fail(position, message);
        }
    };
    let mut config = T::default();
    let mut warnings = Vec::new();
    for (key, value) in &entries {
        let Some(key) = key.as_str() else {
            return fail(None, format!("{} is no key", value::shown(key)));
        };
        if T::RETIRED.contains(&key) {
            warnings.push(format!("{}: {key} has no effect any more", file.display()));
            continue;
        }
        match config.set(key, value) {
            Some(Ok(())) => {}
            Some(Err(wanted)) => {
                let shown = value::shown(value);
                return fail(
                    value_position(text, key),
                    format!("{key}: {shown} will not do; give {wanted}"),
                );
            }
            None => return fail(key_position(text, key), unknown_key::<T>(key)),
        }
    }
    if let Err((key, message)) = config.check() {
        return fail(value_position(text, key), format!("{key}: {message}"));
    }
    warnings.extend(config.warnings().iter().map(|w| format!("{}: {w}", file.display())));
    Ok(Loaded { config, file: Some(file.to_owned()), notes: Vec::new(), warnings })
}

fn check_log_file(name: &str) -> Result<(), (&'static str, String)> {
    // `%` would be a pattern for dates to the rotation.
    if name.is_empty() || name == ".." || name == "." || name.contains(['/', '%', '\0']) {
        return Err((
            "log_file",
            "give a file's name, without / and %; log_dir is its place".into(),
        ));
    }
    Ok(())
}

fn check_pair(cert: &Path, key: &Path) -> Result<(), (&'static str, String)> {
    match (cert.as_os_str().is_empty(), key.as_os_str().is_empty()) {
        (true, _) => Err(("cert_file", "give a path".into())),
        (_, true) => Err(("key_file", "give a path".into())),
        _ if cert == key => Err(("key_file", "give another path than cert_file's".into())),
        _ => Ok(()),
    }
}

fn unknown_key<T: Settings>(key: &str) -> String {
    let (other, sections) = match T::ROLE {
        Role::Cloud => (Role::Edge, EdgeConfig::default().sections()),
        Role::Edge => (Role::Cloud, CloudConfig::default().sections()),
    };
    let own = T::default().sections();
    let nearest = schema::keys(&own)
        .map(|known| (distance(key, known.name), known.name))
        .min()
        .filter(|(distance, name)| *distance <= 2.max(name.len() / 4));
    let role = T::ROLE;
    if schema::keys(&sections).any(|known| known.name == key) {
        format!("unknown key {key}: it is one of the {other}'s, and this is the {role}'s file")
    } else if let Some((_, name)) = nearest {
        format!("unknown key {key}; did you mean {name}?")
    } else {
        format!("unknown key {key}; docs/configuration.md lists the {role}'s keys")
    }
}

/// The Levenshtein distance of two short texts.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate().take(LONGEST_KEY) {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// The top-level keys of a block mapping, with line number from 1 and what follows the colon.
fn top_level(text: &str) -> impl Iterator<Item = (usize, &str, &str)> {
    text.lines().enumerate().filter_map(|(index, line)| {
        let (key, rest) = line.split_once(':')?;
        let key = key.trim_end();
        let plain = key.starts_with(|c: char| c.is_ascii_alphabetic()) && !key.contains(' ');
        plain.then_some((index + 1, key, rest))
    })
}

fn key_position(text: &str, key: &str) -> Option<(usize, usize)> {
    top_level(text).find(|(_, name, _)| *name == key).map(|(line, ..)| (line, 1))
}

fn value_position(text: &str, key: &str) -> Option<(usize, usize)> {
    let (number, _, rest) = top_level(text).find(|(_, name, _)| *name == key)?;
    let line = text.lines().nth(number - 1)?;
    let value = rest.trim_start();
    // A list's items stand below; then the key is the place.
    let bytes = if value.is_empty() { 0 } else { line.len() - value.len() };
    Some((number, line.get(..bytes)?.chars().count() + 1))
}

fn repeated_key(text: &str) -> Option<(&str, (usize, usize))> {
    let mut seen = std::collections::HashSet::new();
    let (line, key, _) = top_level(text).find(|(_, key, _)| !seen.insert(*key))?;
    Some((key, (line, 1)))
}

/// Bytes of a configuration file: far over any real one.
const FILE_MAX: u64 = 1 << 20;
/// Bytes of an unknown key that a suggestion looks at.
const LONGEST_KEY: usize = 64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cloud(text: &str) -> Result<Loaded<CloudConfig>, String> {
        parse(Path::new("config.yaml"), text).map_err(|error| error.to_string())
    }

    fn edge(text: &str) -> Result<Loaded<EdgeConfig>, String> {
        parse(Path::new("edge.yaml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn the_existing_clouds_file_is_understood() {
        let text = "\
rtp_cache_size:   5000      #云端节点缓存的rtp包数量
quic_addr:        :4242     #quic服务的监听地址
client_addr_list:           #边缘节点的地址
- 239.0.0.1:5222
- 127.0.0.1:5224
enable_record:    false
rtp_port:         5220
rtmp_addr:        :1935
api_addr:         :8090
debug:            false
log_level:        debug
enable_log_file:  true
";
        let loaded = cloud(text).unwrap();
        let expected = CloudConfig {
            log_level: LogLevel::Debug,
            enable_log_file: true,
            ..CloudConfig::default()
        };
        assert_eq!(loaded.config, expected);
        assert_eq!(loaded.warnings, Vec::<String>::new());
    }

    #[test]
    fn the_existing_edges_file_is_understood() {
        let text = "\
udp_addr: 239.0.0.1:5222
api_addr: :8090
quic_addr: :4242
padding_size: 100
disable_quic: false
chan_size: 100
record_dir: ./record
pack_loss: 0.001
flv_addr: :7001
enable_hls: false
hls_addr: :7002
enable_record: false
cert_file: certs/server.crt
key_file: certs/server.key
init: false
log_level: \"\"
enable_log_file: false
cloud_host: \"\"
protect: true
";
        let loaded = edge(text).unwrap();
        assert_eq!(loaded.config.udp_addr.to_string(), "239.0.0.1:5222");
        assert_eq!(loaded.config.log_level, LogLevel::Info);
        assert_eq!(loaded.config.pack_loss, 0.001);
        for key in ["padding_size", "chan_size", "init", "protect"] {
            assert!(loaded.warnings.iter().any(|w| w.contains(key)), "{key}");
        }
    }

    #[test]
    fn an_empty_file_is_the_defaults() {
        for text in ["", "\n", "# nothing\n", "---\n"] {
            assert_eq!(cloud(text).unwrap().config, CloudConfig::default());
        }
    }

    #[test]
    fn what_is_wrong_is_one_line_with_place_key_and_remedy() {
        for (text, expected) in [
            (
                "debug: true\nrtp_cache_size:  99999 # many\n",
                "config.yaml:2:18: rtp_cache_size: 99999 will not do; \
                 give a whole number from 1 to 32768",
            ),
            (
                "rtp_port: -1",
                "config.yaml:1:11: rtp_port: -1 will not do; give a whole number from 0 to 65535",
            ),
            ("debug: yes", "config.yaml:1:8: debug: \"yes\" will not do; give true or false"),
            (
                "rtp_cach_size: 1",
                "config.yaml:1:1: unknown key rtp_cach_size; did you mean rtp_cache_size?",
            ),
            (
                "flv_addr: :80",
                "config.yaml:1:1: unknown key flv_addr: it is one of the edge's, and this is the \
                 cloud's file",
            ),
            (
                "cheese: 1",
                "config.yaml:1:1: unknown key cheese; docs/configuration.md lists the cloud's keys",
            ),
            (
                "quic_addr: 4242",
                "config.yaml:1:12: quic_addr: 4242 will not do; give an address such as :4242, \
                 0.0.0.0:4242, [::]:4242 or host:4242",
            ),
            (
                "client_addr_list:\n- 10.0.0.1:5222\n- 10.0.0.2",
                "config.yaml:1:1: client_addr_list: [\"10.0.0.1:5222\", \"10.0.0.2\"] will not \
                 do; give a list in which each item is an address such as 10.0.0.7:5222, \
                 239.0.0.1:5222 or host:5222, or a mapping such as {addr: \"10.0.0.7:5222\", \
                 fec: auto}",
            ),
            (
                "client_addr_list: [a:1, b:2, a:1]",
                "config.yaml:1:19: client_addr_list: a:1 stands there twice; leave one",
            ),
            (
                "fec: {columns: 40, rows: 5}",
                "config.yaml:1:6: fec: {\"columns\":40,\"rows\":5} will not do; give off, auto, \
                 or {columns: 1 to 32, rows: 1 to 32} whose product is at most 400",
            ),
            (
                "fec: auto\nclient_addr_list: [10.0.0.7:5222, 10.0.0.7:5224]",
                "config.yaml:2:19: client_addr_list: parity for 10.0.0.7:5222 goes to port + 2, \
                 5224, at which this list has an edge that might take it for media; change one, or \
                 switch its fec off",
            ),
            (
                "client_addr_list: [{addr: 10.0.0.7:65534, fec: {columns: 5, rows: 1}}]",
                "config.yaml:1:19: client_addr_list: parity for 10.0.0.7:65534 would go to port \
                 + 2, and there is none; take a lower port, or switch its fec off",
            ),
            ("debug: true\ndebug: true", "config.yaml:2:1: debug stands there twice; leave one"),
            ("- a\n- b", "config.yaml: it must hold lines of the form `key: value`"),
            (
                "log_level: loud",
                "config.yaml:1:12: log_level: \"loud\" will not do; \
                 give trace, debug, info, warn or error",
            ),
        ] {
            assert_eq!(cloud(text).unwrap_err(), expected);
        }
        assert!(cloud("debug: [").unwrap_err().starts_with("config.yaml:"));
        assert!(!cloud("debug: [\n\n\n").unwrap_err().contains('\n'));
    }

    #[test]
    fn settings_that_contradict_each_other_are_refused() {
        let error = edge("insecure: true\nca_file: ca.pem").unwrap_err();
        assert_eq!(
            error,
            "edge.yaml:1:11: insecure: it switches off the check that ca_file asks for; leave one"
        );
        let pin = "fingerprint: zz";
        assert!(edge(pin).unwrap_err().contains("give 64 hexadecimal digits"));
        assert!(edge("streams: [li*e]").unwrap_err().contains("each item is app/name"));
        assert!(edge("enable_hls: true").unwrap().warnings[0].contains("HLS is not served"));
    }

    #[test]
    fn no_file_means_defaults_and_a_sample_that_says_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.yaml");
        let first = load::<CloudConfig>(None, &file).unwrap();
        assert_eq!((first.config.clone(), first.file), (CloudConfig::default(), None));
        assert_eq!((first.notes.len(), first.warnings.len()), (1, 0));
        let second = load::<CloudConfig>(None, &file).unwrap();
        assert_eq!((second.config, second.file), (first.config, Some(file)));
        assert!(second.notes.is_empty());
        // Where nothing can be written, the defaults still run.
        let nowhere = load::<CloudConfig>(None, &dir.path().join("no/config.yaml")).unwrap();
        assert_eq!((nowhere.notes.len(), nowhere.warnings.len()), (0, 1));
    }

    #[test]
    fn a_file_that_was_named_must_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("mine.yaml");
        let error = CloudConfig::load(Some(&file)).unwrap_err();
        assert_eq!(error.file(), file);
        assert!(error.to_string().contains("cannot read it: No such file"), "{error}");
        assert!(!file.exists());
        fs::write(&file, [0xff, 0xfe]).unwrap();
        assert!(CloudConfig::load(Some(&file)).is_err());
    }

    #[test]
    fn the_role_is_told_from_the_keys() {
        assert_eq!(Role::detect(&CloudConfig::sample()), Some(Role::Cloud));
        assert_eq!(Role::detect(&EdgeConfig::sample()), Some(Role::Edge));
        assert_eq!(Role::detect("flv_addr: :80"), Some(Role::Edge));
        assert_eq!(Role::detect("log_level: info"), None);
        assert_eq!(Role::detect("]"), None);
    }

    /// What is in the repository, made afresh from the code with
    /// `cargo test --lib -- --ignored write_samples_and_docs`.
    fn shipped() -> [(PathBuf, String); 3] {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let docs = root.join("docs/configuration.md");
        let text = fs::read_to_string(&docs).unwrap();
        let text = schema::with_table::<CloudConfig>(&text);
        let text = schema::with_table::<EdgeConfig>(&text);
        [
            (root.join("config.yaml"), CloudConfig::sample()),
            (root.join("edge.yaml"), EdgeConfig::sample()),
            (docs, text),
        ]
    }

    #[test]
    fn samples_and_docs_list_every_key_with_its_default_in_order() {
        assert_eq!(cloud(&CloudConfig::sample()).unwrap().config, CloudConfig::default());
        assert_eq!(edge(&EdgeConfig::sample()).unwrap().config, EdgeConfig::default());
        for (file, expected) in shipped() {
            let text = fs::read_to_string(&file).unwrap();
            assert!(text == expected, "{} is not what the code says", file.display());
        }
    }

    #[test]
    #[ignore = "writes the repository's files"]
    fn write_samples_and_docs() {
        for (file, expected) in shipped() {
            fs::write(file, expected).unwrap();
        }
    }

    proptest! {
        #[test]
        fn any_text_gives_a_config_or_one_line(text in "(\\PC|\n){0,200}") {
            if let Err(error) = cloud(&text) {
                prop_assert!(!error.contains('\n'));
            }
        }

        #[test]
        fn any_value_of_a_known_key_gives_a_config_or_one_line(
            index in 0usize..64,
            value in "(\\PC){0,40}|-?[0-9]{1,25}|[0-9.]{1,12}|null|~|\\[\\]|\\{\\}",
        ) {
            let sections = EdgeConfig::default().sections();
            let keys: Vec<_> = schema::keys(&sections).collect();
            let name = keys[index % keys.len()].name;
            if let Err(error) = edge(&format!("{name}: {value}\n")) {
                prop_assert!(!error.contains('\n'));
                prop_assert!(error.starts_with("edge.yaml:"), "{}", error);
            }
        }
    }
}
