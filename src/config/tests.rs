//! Whole files: valid ones, refused ones with the position of the fault, and the shipped samples.

use proptest::prelude::*;

use super::*;

mod flat;

use flat::{FLAT_CLOUD, FLAT_EDGE};

fn cloud(text: &str) -> Result<Loaded<CloudConfig>, String> {
    CloudConfig::parse(Path::new("config.yaml"), text).map_err(|error| error.to_string())
}

fn edge(text: &str) -> Result<Loaded<EdgeConfig>, String> {
    EdgeConfig::parse(Path::new("edge.yaml"), text).map_err(|error| error.to_string())
}

/// The settings as a file in sections, without comments.
fn written<T: Settings>(config: &T) -> String {
    let section = |section: Section| {
        let keys = section.keys.iter();
        let keys = keys.map(|key| format!("  {}: {}\n", key.spec.name, key.value));
        format!("{}:\n{}", section.name, keys.collect::<String>())
    };
    config.sections().into_iter().map(section).collect()
}

#[test]
fn empty_file_means_defaults() {
    for text in ["", "\n", "# nothing\n", "---\n", "rtmp:\nhttp: {}\nstreams: ~\n"] {
        assert_eq!(cloud(text).unwrap().config, CloudConfig::default(), "{text:?}");
        let warned = cloud(text).unwrap().warnings.len();
        assert_eq!(warned, usize::from(!text.contains("rtmp")), "{text:?}");
    }
}

#[test]
fn sections_and_flat_keys_may_be_mixed() {
    let config = cloud(
        "rtmp: {addr: ':1936'}\nrtp_cache_size: 7\nstreams:\n  max: 3\ndownstream:\n  targets:\n  \
         - 10.0.0.7:5222\n  - addr: 10.0.0.8:5222\n    fec: auto\n",
    );
    let config = config.unwrap().config;
    assert_eq!(config.rtmp_addr, ListenAddr::any(1936));
    assert_eq!(config.downstream.rtp_cache_size, 7);
    assert_eq!(config.stream_limits.max, 3);
    let targets: Vec<_> = config.downstream.targets.iter().map(ToString::to_string).collect();
    assert_eq!(targets, ["10.0.0.7:5222", "10.0.0.8:5222"]);
    assert_eq!(config.downstream.targets[1].fec, Some(downpour_repair::fec::Fec::Auto));
}

#[test]
fn the_edges_streams_are_a_list_and_a_section() {
    let config = edge("streams: [live/a]\nmax_streams: 3").unwrap().config;
    assert_eq!((config.streams.len(), config.stream_limits.max), (1, 3));
    let config = edge("streams: {max: 3}\nupstream: {streams: [live/a, live/b]}").unwrap().config;
    assert_eq!((config.streams.len(), config.stream_limits.max), (2, 3));
}

#[test]
fn a_downstream_section_makes_an_edge_a_parent() {
    for (text, parent) in [
        ("", false),
        ("downstream:", true),
        ("downstream: {}", true),
        ("downstream: {rtp_port: 5320}", true),
        ("downstream: {enabled: false, rtp_port: 5320}", false),
        ("downstream: {enabled: true}", true),
        // The edge's flat keys are about the cloud.
        ("quic_addr: :4243", false),
    ] {
        assert_eq!(edge(text).unwrap().config.downstream_enabled, parent, "{text}");
    }
    let config = edge("quic_addr: :4243\ndownstream: {quic_addr: ':4244'}").unwrap().config;
    assert_eq!(config.quic_addr, ListenAddr::any(4243));
    assert_eq!(config.downstream.quic_addr, ListenAddr::any(4244));
    assert_eq!(config.downstream.targets, []);
}

/// A cloud's file is refused with one line that begins with a place and a message.
#[track_caller]
fn refused(text: &str, expected: &str) {
    let error = cloud(text).unwrap_err();
    assert!(error.starts_with(&format!("config.yaml:{expected}")), "{text}\n{error}");
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn a_fault_is_one_line_with_place_key_and_remedy() {
    for (text, expected) in [
        (
            "debug: true\nrtp_cache_size:  99999 # many\n",
            "2:18: rtp_cache_size: 99999 is not valid; use a whole number from 1 to 32768",
        ),
        (
            "downstream:\n  # many\n  rtp_cache_size: 99999\n",
            "3:19: downstream.rtp_cache_size: 99999 is not valid; \
             use a whole number from 1 to 32768",
        ),
        (
            "{downstream: {debug: true, rtp_port: -1}}",
            "1:38: downstream.rtp_port: -1 is not valid; use a whole number from 0 to 65535",
        ),
        ("debug: yes", "1:8: debug: \"yes\" is not valid; use true or false"),
        ("rtmp:\n  addr:\n", "2:3: rtmp.addr: has no value; use an address such as :4242, "),
        ("rtmp: 5", "1:7: rtmp: 5 is not valid; use a section, with keys and values below it"),
        ("quic_addr: 4242", "1:12: quic_addr: 4242 is not valid; use an address such as :4242, "),
        (
            "downstream:\n  targets:\n  - 10.0.0.1:5222\n  - 10.0.0.2",
            "4:5: downstream.targets[1]: \"10.0.0.2\" is not valid; use an address such as 10.0.0.7",
        ),
        (
            "downstream:\n  targets:\n  - addr: 10.0.0.1:5222\n    fec: on\n",
            "4:10: downstream.targets[0].fec: \"on\" is not valid; use off, auto, or {columns",
        ),
        (
            "client_addr_list: [{addr: a:1}, {fec: auto}]",
            "1:33: client_addr_list[1]: the key addr is missing",
        ),
        (
            "log_level: loud",
            "1:12: log_level: \"loud\" is not valid; use trace, debug, info, warn or error",
        ),
    ] {
        refused(text, expected);
    }
}

#[test]
fn a_fault_in_a_list_or_map_has_the_place_of_the_item() {
    for (text, expected) in [
        (
            "client_addr_list:\n- {adr: a:1}",
            "2:4: client_addr_list[0]: unknown key adr; did you mean addr?",
        ),
        (
            "downstream: {targets: [a:1, b:2, a:1]}",
            "1:23: downstream.targets: a:1 is listed twice; remove one",
        ),
        (
            "fec: {columns: 40, rows: 5}",
            "1:16: fec.columns: 40 is not valid; use a whole number from 1 to 32",
        ),
        (
            "fec: auto\nclient_addr_list: [10.0.0.7:5222, 10.0.0.7:5224]",
            "2:19: client_addr_list: parity for 10.0.0.7:5222 goes to its port + 2, 5224, and an \
             entry of downstream.targets receives media on that port; change one of them, or set \
             the fec of 10.0.0.7:5222 to off",
        ),
        ("downstream:\n  fec: auto", "2:8: downstream.fec: parity for 239.0.0.1:5222 goes to"),
        (
            "client_addr_list: [{addr: 10.0.0.7:65534, fec: {columns: 5, rows: 1}}]",
            "1:19: client_addr_list: parity for 10.0.0.7:65534 would go to its port + 2, which is \
             over 65535; use a lower port, or set its fec to off",
        ),
        (
            "downstream: {key_file: a, cert_file: a}",
            "1:24: downstream.key_file: is the same file as cert_file; use another",
        ),
        (
            "log: {file: a/b}",
            "1:13: log.file: \"a/b\" is not valid; use a file name without / and %",
        ),
        ("- a\n- b", "1:1: the file must hold lines of the form `key: value`"),
        ("{[a]: b}", "1:2: a key must be one word"),
    ] {
        refused(text, expected);
    }
}

#[test]
fn an_address_in_brackets_without_quotes_gets_a_hint() {
    let error = cloud("debug: true\napi_addr: [::]:80").unwrap_err();
    assert!(error.starts_with("config.yaml:2:"), "{error}");
    assert!(error.ends_with("; an address in brackets needs quotes: \"[::]:4242\""), "{error}");
    let error = cloud("client_addr_list: [a:1").unwrap_err();
    assert!(!error.contains("needs quotes"), "{error}");
}

#[test]
fn the_first_fault_of_the_file_is_reported() {
    let error = cloud("log_level: loud\nhttp: {adr: 1}\nrtmp: {addr: 1}").unwrap_err();
    assert!(error.starts_with("config.yaml:1:12: log_level"), "{error}");
    let error = cloud("zzz: 1\nlog_level: loud").unwrap_err();
    assert!(error.starts_with("config.yaml:1:1: unknown key zzz"), "{error}");
}

#[test]
fn a_key_that_is_set_twice_is_refused_with_both_places() {
    for (text, expected) in [
        ("debug: true\ndebug: true", "2:1: debug is set twice, first in line 1; remove one"),
        (
            "rtmp:\n  addr: :1\n  max_connections: 5\n  addr: :2\n",
            "4:3: rtmp.addr is set twice, first in line 2; remove one",
        ),
        ("rtmp: {}\nhttp: {}\nrtmp: {}", "3:1: rtmp is set twice, first in line 1; remove one"),
        (
            "client_addr_list:\n- a:1\n- addr: b:1\n  addr: c:1\n",
            "4:3: client_addr_list[1].addr is set twice, first in line 3; remove one",
        ),
        (
            "rtmp:\n  addr: :1\n\nrtmp_addr: :2\n",
            "4:1: rtmp_addr is set twice, first in line 2 as rtmp.addr; remove one",
        ),
        (
            "rtmp_addr: :2\nrtmp:\n  addr: :1\n",
            "3:3: rtmp.addr is set twice, first in line 1 as rtmp_addr; remove one",
        ),
    ] {
        assert_eq!(cloud(text).unwrap_err(), format!("config.yaml:{expected}"));
    }
}

#[test]
fn an_unknown_key_is_refused_with_a_suggestion() {
    for (text, expected) in [
        ("rtp_cach_size: 1", "1:1: unknown key rtp_cach_size; did you mean rtp_cache_size?"),
        ("rtpm: {addr: 1}", "1:1: unknown key rtpm; did you mean rtmp?"),
        ("rtmp:\n  adr: :1\n", "2:3: unknown key rtmp.adr; did you mean rtmp.addr?"),
        (
            "rtmp:\n  rtmp_addr: :1\n",
            "2:3: unknown key rtmp.rtmp_addr; did you mean rtmp: {addr: …}?",
        ),
        ("rtmp.addr: :1", "1:1: unknown key rtmp.addr; did you mean rtmp: {addr: …}?"),
        ("grace_ms: 1", "1:1: unknown key grace_ms; did you mean shutdown: {grace_ms: …}?"),
        (
            "http:\n  rtp_port: 1\n",
            "2:3: unknown key http.rtp_port; did you mean downstream: {rtp_port: …}?",
        ),
        (
            "flv_addr: :80",
            "1:1: unknown key flv_addr; it belongs in the file of an edge, and this is the file of \
             a cloud",
        ),
        (
            "upstream: {host: a}",
            "1:1: unknown key upstream; it belongs in the file of an edge, and this is the file of \
             a cloud",
        ),
        (
            "downstream: {enabled: true}",
            "1:14: unknown key downstream.enabled; it belongs in the file of an edge, and this is \
             the file of a cloud",
        ),
        ("cheese: 1", "1:1: unknown key cheese; docs/configuration.md lists the cloud's keys"),
        ("1: 1", "1:1: unknown key 1; docs/configuration.md lists the cloud's keys"),
        (
            "rtmp:\n  \"a\\nb\": 1",
            "2:3: unknown key rtmp.a\\nb; docs/configuration.md lists the cloud's keys",
        ),
    ] {
        assert_eq!(cloud(text).unwrap_err(), format!("config.yaml:{expected}"));
    }
    let error = edge("rtmp_addr: :1935").unwrap_err();
    assert!(error.contains("it belongs in the file of a cloud, and this is"), "{error}");
}

#[test]
fn settings_that_contradict_each_other_are_refused() {
    for (text, expected) in [
        (
            "insecure: true\nca_file: ca.pem",
            "1:11: insecure: it switches off the check against ca_file; remove one of the two",
        ),
        (
            "upstream: {rtp_addr_2: 'a:1'}",
            "1:24: upstream.rtp_addr_2: it needs rtp.addr_2, which is not set",
        ),
        ("rtp: {addr: ':9', addr_2: ':9'}", "1:27: rtp.addr_2: use an address that differs"),
        ("streams: []", "1:10: streams: use 1 to 1000 patterns"),
        ("downstream: {cert_file: ''}", "1:25: downstream.cert_file: is empty; use a path"),
        ("fingerprint: zz", "1:14: fingerprint: \"zz\" is not valid; use 64 hexadecimal digits"),
        ("streams: [li*e]", "1:11: streams[0]: \"li*e\" is not valid; use app/name"),
    ] {
        let error = edge(text).unwrap_err();
        assert!(error.starts_with(&format!("edge.yaml:{expected}")), "{text}\n{error}");
    }
    let warnings = edge("hls: {enabled: true}").unwrap().warnings;
    assert_eq!(warnings, ["edge.yaml: hls.enabled: HLS is not served yet; viewers have HTTP-FLV"]);
}

#[test]
fn a_port_that_is_set_twice_is_refused() {
    for (text, expected) in [
        (
            "rtmp: {addr: ':8090'}",
            "1:14: rtmp.addr: rtmp.addr and http.addr both use port 8090; change one of them",
        ),
        (
            "downstream:\n  rtp_port: 4242\n",
            "2:13: downstream.rtp_port: downstream.quic_addr and downstream.rtp_port both use port \
             4242; change one of them",
        ),
    ] {
        refused(text, expected);
    }
    // TCP and UDP have separate ports, and 0 is a free one.
    cloud("http: {addr: ':4242'}").unwrap();
    cloud("rtmp: {addr: ':0'}\nhttp: {addr: ':0'}").unwrap();
    let error = edge("rtp: {addr_2: '239.0.0.1:5222'}").unwrap_err();
    assert!(error.contains("rtp.addr and rtp.addr_2 both use port 5222"), "{error}");
    edge("rtp: {addr: '10.0.0.1:5222', addr_2: '239.0.0.1:5222'}").unwrap();
    assert!(edge("downstream: {rtp_port: 5222}").is_err());
}

#[test]
fn a_host_may_have_brackets() {
    for text in ["upstream: {host: '[::1]'}", "cloud_host: ::1"] {
        assert_eq!(edge(text).unwrap().config.cloud_host, "::1", "{text}");
    }
    for text in ["cloud_host: '[::1'", "cloud_host: '[::1]:80'", "cloud_host: '[a]'"] {
        let error = edge(text).unwrap_err();
        assert!(error.contains(" is not valid; use a host name or an address"), "{error}");
    }
}

#[test]
fn a_generated_file_that_was_cut_off_is_refused() {
    let whole = CloudConfig::sample();
    for cut in [whole.len() / 3, whole.len() / 2, whole.len() - 40, whole.len() - 2] {
        let error = cloud(&whole[..cut]).unwrap_err();
        assert!(error.contains("the file ends in the middle"), "{error}");
    }
    // Lines may be added, changed and removed.
    cloud(&whole.replace("addr: :1935", "addr: :1936")).unwrap();
    cloud(&format!("{whole}\n\n")).unwrap();
    cloud(whole.lines().skip(1).map(|line| format!("{line}\n")).collect::<String>().as_str())
        .unwrap();
}

#[test]
fn missing_file_means_defaults_and_the_sample_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.yaml");
    let first = load::<CloudConfig>(None, &file).unwrap();
    assert_eq!((first.config.clone(), first.file), (CloudConfig::default(), None));
    assert_eq!((first.notes.len(), first.warnings.len()), (1, 0));
    assert_eq!(fs::read_to_string(&file).unwrap(), CloudConfig::sample());
    let second = load::<CloudConfig>(None, &file).unwrap();
    assert_eq!((second.config, second.file), (first.config, Some(file)));
    assert!(second.notes.is_empty());
    // The defaults run even if nothing can be written.
    let nowhere = load::<CloudConfig>(None, &dir.path().join("no/config.yaml")).unwrap();
    assert_eq!((nowhere.notes.len(), nowhere.warnings.len()), (0, 1));
}

#[test]
fn a_named_file_that_is_missing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mine.yaml");
    let loaded = EdgeConfig::load(Some(&file)).unwrap();
    assert_eq!(loaded.config, EdgeConfig::default());
    assert_eq!(fs::read_to_string(&file).unwrap(), EdgeConfig::sample());
    let error = EdgeConfig::load(Some(&dir.path().join("no/mine.yaml"))).unwrap_err().to_string();
    assert!(
        error.contains("mine.yaml: it does not exist and cannot be created: No such"),
        "{error}"
    );
    fs::write(&file, [0xff, 0xfe]).unwrap();
    let error = EdgeConfig::load(Some(&file)).unwrap_err();
    assert_eq!(error.file(), file);
    assert!(error.to_string().contains("cannot read it"), "{error}");
}

#[test]
fn keys_decide_the_role_of_a_file() {
    for (text, role) in [
        (&CloudConfig::sample()[..], Some(Role::Cloud)),
        (&EdgeConfig::sample(), Some(Role::Edge)),
        (FLAT_CLOUD, Some(Role::Cloud)),
        (FLAT_EDGE, Some(Role::Edge)),
        ("flv_addr: :80", Some(Role::Edge)),
        ("rtmp: {max_connections: 5}", Some(Role::Cloud)),
        ("upstream: {host: a}", Some(Role::Edge)),
        ("streams: [a/b]", Some(Role::Edge)),
        ("sr_api: a", Some(Role::Cloud)),
        ("log_level: info", None),
        ("log: {level: info}", None),
        ("]", None),
        ("- a", None),
    ] {
        assert_eq!(Role::detect(text), role, "{text}");
    }
}

#[test]
fn a_live_key_is_marked_in_the_sample_and_the_docs() {
    let live: Vec<_> = schema::keys(&Toy::default().sections())
        .filter(|key| key.spec.reload == Reload::Live)
        .map(|key| key.spec.path())
        .collect();
    assert_eq!(live, ["part.depth"]);
    let file = Path::new("no/such/toy.yaml");
    assert!(Toy::load(Some(file)).is_err());
    assert_eq!(Toy::parse(file, "depth: 4").unwrap().config.depth, 4);
    let sample = Toy::sample();
    assert!(sample.contains("  # How deep. Range: 1 to 9. (live)\n  depth: 3\n"), "{sample}");
    assert!(sample.contains("  # How wide.\n  width: []\n"), "{sample}");
    let docs = sample::with_table::<Toy>("<!-- cloud settings -->\n<!-- end -->");
    assert!(docs.contains("| `part.depth` | `3` | live | `depth` | How deep. Range: 1 to 9. |\n"));
    assert!(docs.contains("| `part.width` | `[]` | restart |  | How wide. |\n"), "{docs}");
    assert!(docs.contains("| `part.width[].addr` | required | restart | | Where RTP goes"));
}

schema::settings! {
    /// Settings with a live key.
    pub struct Toy(Role::Cloud, "toy.yaml", retired: []) {
        /// A part.
        part {
            /// How deep.
            live depth -> depth: u8 = 3, in 1..=9, also [depth];
            /// How wide.
            restart width -> width: Vec<ClientAddr> = Vec::new();
        }
    }
}

impl Toy {
    fn settle(&mut self, _: &Given) {}

    fn check(&self) -> Result<(), Conflict> {
        Ok(())
    }

    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }
}

/// The repository's files as they should be. To write them:
/// `cargo test --lib -- --ignored write_samples_and_docs`.
fn shipped() -> [(PathBuf, String); 3] {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = root.join("docs/configuration.md");
    let text = fs::read_to_string(&docs).unwrap();
    let text = sample::with_table::<CloudConfig>(&text);
    let text = sample::with_table::<EdgeConfig>(&text);
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

/// A value as a file might have it: a scalar, a list or a map, in flow style.
fn any_value() -> impl Strategy<Value = String> {
    let scalar = prop_oneof![
        "-?[0-9]{1,25}",
        "[0-9.]{1,12}",
        "[a-z:./*]{1,12}",
        "\"(\\PC){0,10}\"",
        "'[^']{0,10}'",
        Just("null".to_owned()),
        Just("true".to_owned()),
        Just(":4242".to_owned()),
        Just("10.0.0.7:5222".to_owned()),
        Just("auto".to_owned()),
    ];
    scalar.prop_recursive(3, 12, 4, |inner| {
        let key = prop_oneof![Just("addr"), Just("fec"), Just("columns"), Just("rows"), Just("x")];
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4)
                .prop_map(|items| format!("[{}]", items.join(", "))),
            proptest::collection::vec((key, inner), 0..4).prop_map(|entries| {
                let entries: Vec<_> = entries.iter().map(|(k, v)| format!("{k}: {v}")).collect();
                format!("{{{}}}", entries.join(", "))
            }),
        ]
    })
}

/// Sections with known and unknown keys and any values, in block or flow style.
fn any_document() -> impl Strategy<Value = String> {
    let sections = EdgeConfig::default().sections();
    let names = schema::keys(&sections).map(|key| (key.spec.section, key.spec.name));
    let names: Vec<_> = names.chain([("rtp", "adr"), ("zzz", "x")]).collect();
    let entry = (proptest::sample::select(names), any_value(), any::<bool>());
    proptest::collection::vec(entry, 0..6).prop_map(|entries| {
        let entry = |((section, name), value, flow): ((&str, &str), String, bool)| match flow {
            true => format!("{section}: {{{name}: {value}}}\n"),
            false => format!("{section}:\n  {name}: {value}\n"),
        };
        entries.into_iter().map(entry).collect()
    })
}

proptest! {
    #[test]
    fn any_text_gives_a_config_or_one_line(text in "(\\PC|\n){0,200}") {
        if let Err(error) = cloud(&text) {
            prop_assert!(!error.contains('\n'));
        }
    }

    #[test]
    fn any_nested_document_gives_a_config_or_one_line_with_a_place(text in any_document()) {
        match EdgeConfig::parse(Path::new("edge.yaml"), &text) {
            Ok(loaded) => {
                let again = written(&loaded.config);
                prop_assert_eq!(edge(&again).map(|loaded| loaded.config), Ok(loaded.config));
            }
            Err(error) => {
                let (line, column) = error.position().expect("a place");
                let text = text.replace("\r\n", "\n").replace('\r', "\n");
                let text = text.lines().nth(line - 1).unwrap_or_default();
                prop_assert!(column <= text.chars().count() + 1, "{} in {:?}", error, text);
                prop_assert!(!error.to_string().contains('\n'));
            }
        }
    }

    #[test]
    fn any_value_of_a_known_key_gives_a_config_or_one_line(
        index in 0usize..200,
        value in any_value(),
    ) {
        let sections = EdgeConfig::default().sections();
        let names: Vec<_> = schema::keys(&sections).flat_map(|key| key.spec.aliases).collect();
        let name = names[index % names.len()];
        if let Err(error) = edge(&format!("{name}: {value}\n")) {
            prop_assert!(!error.contains('\n'));
            prop_assert!(error.starts_with("edge.yaml:"), "{}", error);
        }
    }
}
