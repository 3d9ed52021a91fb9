//! Files without sections: older ones of ours, and those of the Go nodes.

use super::*;
use downpour_distribution::downstream::fanout::Pacing;

/// Values that differ from the defaults, by flat name, for every key of the files from before there
/// were sections.
const CLOUD_VALUES: &[(&str, &str)] = &[
    ("rtmp_addr", ":1936"),
    ("quic_addr", "127.0.0.1:4243"),
    ("api_addr", "\"[::1]:8091\""),
    ("rtp_port", "0"),
    ("client_addr_list", "[10.0.0.7:5222, {addr: 'edge:5232', fec: {columns: 5, rows: 1}}]"),
    ("rtp_cache_size", "7"),
    ("rtp_cache_ms", "100"),
    ("rtp_payload_max", "1180"),
    ("fec", "{columns: 10, rows: 5}"),
    ("pacing", "{factor: 2}"),
    ("fanout_workers", "3"),
    ("multicast_ttl", "255"),
    ("multicast_loop", "false"),
    ("multicast_interface", "127.0.0.1"),
    ("debug", "true"),
    ("max_streams", "5"),
    ("rtmp_max_connections", "6"),
    ("publisher_silence_ms", "700"),
    ("gop_cache_max_ms", "8000"),
    ("gop_cache_max_bytes", "9000000"),
    ("cert_file", "a.crt"),
    ("key_file", "a.key"),
    ("edge_token", "'1234'"),
    ("max_edges", "11"),
    ("repair_budget", "12"),
    ("v0_repair", "false"),
    ("v0_allow", "[10.0.0.0/8, 192.0.2.7]"),
    ("enable_record", "true"),
    ("record_dir", "r"),
    ("log_level", "warn"),
    ("enable_log_file", "true"),
    ("log_dir", "l"),
    ("log_file", "l.log"),
    ("log_file_max_bytes", "70000"),
    ("log_file_count", "13"),
    ("shutdown_grace_ms", "14"),
];
const EDGE_VALUES: &[(&str, &str)] = &[
    ("udp_addr", "239.0.0.1:5222"),
    ("udp_addr_2", ":5230"),
    ("multicast_interface", "127.0.0.1"),
    ("flv_addr", ":8093"),
    ("cloud_host", "cloud.example"),
    ("quic_addr", ":4243"),
    ("api_addr", "api.example:8091"),
    ("rtp_subscribe", "false"),
    ("cloud_rtp_addr", "10.0.0.1:5220"),
    ("cloud_rtp_addr_2", "10.0.0.2:5220"),
    ("repair_protocol", "v0"),
    ("disable_quic", "true"),
    ("node_name", "edge-7"),
    ("token", "'1234'"),
    ("streams", "[live/a, 'live/*']"),
    ("fingerprint", "0101010101010101010101010101010101010101010101010101010101010101"),
    ("ca_file", "ca.pem"),
    ("known_clouds", "known"),
    ("insecure", "false"),
    ("latency_ms", "501"),
    ("fec", "false"),
    ("udp_recv_buffer", "65536"),
    ("pack_loss", "0.5"),
    ("max_viewers", "1"),
    ("merge_write_ms", "350"),
    ("max_streams", "2"),
    ("gop_cache_max_ms", "3000"),
    ("gop_cache_max_bytes", "4000000"),
    ("enable_hls", "true"),
    ("hls_addr", ":7003"),
    ("cert_file", "a.crt"),
    ("key_file", "a.key"),
    ("enable_record", "true"),
    ("record_dir", "r"),
    ("log_level", "warn"),
    ("enable_log_file", "true"),
    ("log_dir", "l"),
    ("log_file", "l.log"),
    ("log_file_max_bytes", "70000"),
    ("log_file_count", "13"),
    ("shutdown_grace_ms", "14"),
];
pub(super) const FLAT_CLOUD: &str = include_str!("../fixtures/flat-cloud.yaml");
pub(super) const FLAT_EDGE: &str = include_str!("../fixtures/flat-edge.yaml");

/// The keys of a flat file, in order.
fn flat_keys(text: &str) -> Vec<&str> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|l| Some(l.split_once(':')?.0))
        .collect()
}

/// Each flat key sets the same value as its key in a section, and so does the whole flat file.
fn flat_keys_load<T: Settings + PartialEq + std::fmt::Debug>(
    parse: fn(&str) -> Result<Loaded<T>, String>,
    values: &[(&str, &str)],
) {
    let sections = T::default().sections();
    let mut flat = String::new();
    let mut nested = String::new();
    for (name, value) in values {
        let key = schema::keys(&sections).find(|key| key.spec.aliases.contains(name));
        let spec = key.unwrap_or_else(|| panic!("{name} is unknown")).spec;
        // Two keys are not valid without another.
        if !["cloud_rtp_addr_2", "fec"].contains(name) {
            let of_flat = parse(&format!("{name}: {value}")).map(|loaded| loaded.config);
            let of_nested = parse(&format!("{}: {{{}: {value}}}", spec.section, spec.name));
            assert_eq!(of_flat, of_nested.map(|loaded| loaded.config), "{name}");
        }
        flat += &format!("{name}: {value}\n");
        nested += &format!("{}.{}: {value}\n", spec.section, spec.name);
    }
    let flat = parse(&flat).unwrap().config;
    let mut sectioned = String::new();
    for section in &sections {
        sectioned += &format!("{}:\n", section.name);
        let prefix = format!("{}.", section.name);
        let keys = nested.lines().filter_map(|line| line.strip_prefix(&prefix));
        sectioned.extend(keys.map(|line| format!("  {line}\n")));
        // A parent edge's section turns it on.
        if section.keys.iter().any(|key| key.spec.path() == "downstream.enabled") {
            sectioned += "  enabled: false\n";
        }
    }
    assert_eq!(parse(&sectioned).unwrap().config, flat);
    for key in schema::keys(&flat.sections()).filter(|key| !key.spec.aliases.is_empty()) {
        let default = schema::keys(&sections).find(|default| default.spec == key.spec).unwrap();
        let same = key.value == default.value;
        // `insecure: true` excludes `ca_file`. The other is newer than flat files, and has a flat name for
        // those who keep one.
        let other = ["insecure", "publish_grace_ms"].contains(&key.spec.name);
        assert!(!same || other, "{}: {}", key.spec.path(), key.value);
    }
}

#[test]
fn every_flat_key_sets_its_key_in_a_section() {
    assert_eq!(flat_keys(FLAT_CLOUD), CLOUD_VALUES.iter().map(|(k, _)| *k).collect::<Vec<_>>());
    assert_eq!(flat_keys(FLAT_EDGE), EDGE_VALUES.iter().map(|(k, _)| *k).collect::<Vec<_>>());
    flat_keys_load(cloud, CLOUD_VALUES);
    flat_keys_load(edge, EDGE_VALUES);
}

#[test]
fn the_flat_samples_are_the_defaults() {
    let mut before = CloudConfig::default();
    // Paced by default since then; a file that says otherwise keeps its word.
    before.downstream.pacing = Pacing::Off;
    assert_eq!(cloud(FLAT_CLOUD).unwrap().config, before);
    assert_eq!(edge(FLAT_EDGE).unwrap().config, EdgeConfig::default());
}

#[test]
fn every_flat_name_means_one_key() {
    for sections in [CloudConfig::default().sections(), EdgeConfig::default().sections()] {
        let mut seen = std::collections::HashSet::new();
        for key in schema::keys(&sections) {
            assert!(seen.insert(key.spec.path()), "{}", key.spec.path());
            for alias in key.spec.aliases {
                assert!(seen.insert((*alias).into()), "{alias}");
                // A section that is also a flat name is recognised by its value, a list.
                let section = sections.iter().any(|section| section.name == *alias);
                assert!(!section || *alias == "streams", "{alias}");
            }
        }
    }
}

#[test]
fn the_go_clouds_generated_file_loads() {
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
enable_sr:        false
sr_api:           \"\"
";
    let loaded = cloud(text).unwrap();
    let mut expected = CloudConfig::default();
    expected.log.level = LogLevel::Debug;
    expected.log.to_file = true;
    // The Go cloud knows no time: only the number of packets limits its cache.
    expected.downstream.rtp_cache_ms = 600_000;
    assert_eq!(loaded.config, expected);
    assert_eq!(
        loaded.warnings,
        [
            "config.yaml:13:1: enable_sr has no effect and can be removed",
            "config.yaml:14:1: sr_api has no effect and can be removed",
        ]
    );
}

#[test]
fn the_size_of_the_cache_alone_means_no_shorter_time() {
    for (text, ms) in [
        ("rtp_cache_size: 9", 600_000),
        ("downstream: {rtp_cache_size: 9}", 600_000),
        ("{rtp_cache_size: 9, rtp_cache_ms: 700}", 700),
        ("rtp_cache_ms: 700", 700),
        ("rtp_port: 1", 10_000),
    ] {
        assert_eq!(cloud(text).unwrap().config.downstream.rtp_cache_ms, ms, "{text}");
    }
    let parent = edge("downstream: {rtp_cache_size: 9}").unwrap();
    assert_eq!(parent.config.downstream.rtp_cache_ms, 600_000);
}

#[test]
fn keys_of_livego_load_or_are_named() {
    let text = "\
level: debug
flv_archive: true
flv_dir: ./tmp
rtmp_addr: \":1935\"
httpflv_addr: \":7001\"
hls_addr: \":7002\"
api_addr: \":8090\"
rtmp_noauth: true
gop_num: 1
jwt:
  secret: testing
server:
  - appname: live
    live: true
";
    let loaded = cloud(text).unwrap();
    assert_eq!(loaded.config.log.level, LogLevel::Debug);
    assert!(loaded.config.record.enabled);
    assert_eq!(loaded.config.record.dir.to_str(), Some("./tmp"));
    let named = |key: &str| loaded.warnings.iter().any(|w| w.contains(&format!(": {key} ")));
    for key in
        ["level", "flv_archive", "flv_dir", "httpflv_addr", "hls_addr", "rtmp_noauth", "gop_num"]
    {
        assert!(named(key), "{key}: {:?}", loaded.warnings);
    }
    assert!(named("jwt") && named("server") && !named("rtmp_addr"));
    assert!(
        loaded
            .warnings
            .contains(&"config.yaml:1:8: level is livego's name; it sets log.level".into())
    );
}

#[test]
fn certificates_of_an_edge_are_answered_with_a_loud_warning() {
    let loaded = edge("{cert_file: a.crt, key_file: a.key, flv_addr: ':7001'}").unwrap();
    let warning = loaded.warnings.iter().find(|w| w.contains("cert_file")).unwrap();
    assert!(warning.contains("HTTPS IS NOT SERVED") && warning.contains(":7001"), "{warning}");
}

#[test]
fn the_go_edges_generated_file_loads() {
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
    assert_eq!(loaded.config.log.level, LogLevel::Info);
    assert_eq!(loaded.config.pack_loss, 0.001);
    for key in ["padding_size", "chan_size", "init", "protect"] {
        let warning = format!("{key} has no effect and can be removed");
        assert!(loaded.warnings.iter().any(|w| w.ends_with(&warning)), "{key}");
    }
}
