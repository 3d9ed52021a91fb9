//! `downpour check`: checks a settings file.

use std::{
    collections::BTreeSet,
    io::Write,
    path::{Path, PathBuf},
};

use clap::Args;

use super::{Failure, files, node::NodeConfig};
use crate::{
    config::{self, CloudConfig, EdgeConfig, Key, Loaded, Reload, Role, Settings},
    node::limits::{self, SystemLimits},
};

/// Check a settings file, and print what is wrong with it and where
///
/// The keys show whether the file is a cloud's or an edge's; --role decides if they do not. Nothing
/// is started or resolved. Directories that a node writes to must be writable for whoever runs this
/// command; a key or a token that others can read is a warning. If a limit of this machine is below what the settings may need (file
/// descriptors, buffers, queues), a warning has the command that raises it. The last line lists the
/// keys that take effect on reload. The exit code is 0 for a good file and 2 for a bad one.
///
/// Example: downpour check config.yaml
#[derive(Debug, Clone, Args)]
#[command(verbatim_doc_comment)]
pub struct CheckArgs {
    /// The file to check
    pub file: PathBuf,
    /// The node that the file is for
    #[arg(long)]
    pub role: Option<Role>,
}

/// Checks a file, and the limits of a machine against its settings. Writes warnings and the verdict to
/// `out`.
///
/// # Errors
/// [`Failure::Usage`] with the first mistake in the file.
pub fn run(args: &CheckArgs, machine: &SystemLimits, out: &mut dyn Write) -> Result<(), Failure> {
    let file = args.file.as_path();
    let text = config::read(file)
        .map_err(|error| Failure::Usage(format!("{}: cannot read it: {error}", file.display())))?;
    let cloud = || check_role(CloudConfig::parse(file, &text)?, file, machine);
    let edge = || check_role(EdgeConfig::parse(file, &text)?, file, machine);
    let role = args.role.or_else(|| Role::detect(&text));
    let (node, warnings) = match role {
        Some(Role::Cloud) => ("a cloud", cloud()?),
        Some(Role::Edge) => ("an edge", edge()?),
        // All keys, if any, are of both.
        None => ("a cloud or an edge", [cloud()?, edge()?].concat()),
    };
    let mut lines =
        warnings.iter().map(|warning| format!("warning: {warning}\n")).collect::<String>();
    lines += &format!("{}: good, for {node}\n", file.display());
    let sections = match role {
        Some(Role::Cloud) => CloudConfig::default().sections(),
        Some(Role::Edge) => EdgeConfig::default().sections(),
        None => [CloudConfig::default().sections(), EdgeConfig::default().sections()].concat(),
    };
    lines += &reload_note(sections.iter().flat_map(|section| &section.keys));
    out.write_all(lines.as_bytes()).map_err(|error| Failure::Run(error.to_string()))
}

/// Checks what the settings of a role need of this machine. Returns warnings.
fn check_role<T: NodeConfig>(
    loaded: Loaded<T>,
    file: &Path,
    machine: &SystemLimits,
) -> Result<Vec<String>, Failure> {
    let Loaded { config, mut warnings, .. } = loaded;
    if let Some(fault) = files::unwritable(&config).into_iter().next() {
        return Err(Failure::Usage(format!("{}: {fault}", file.display())));
    }
    let exposed = files::exposed(&config, file);
    warnings.extend(exposed.into_iter().map(|text| format!("{}: {text}", file.display())));
    let requirements = config.requirements();
    let low =
        [limits::small_buffers(&requirements, machine), limits::advice(&requirements, machine)];
    warnings.extend(low.concat().into_iter().map(|advice| format!("this machine: {advice}")));
    Ok(warnings)
}

/// Returns the line about when a change of the file takes effect.
fn reload_note<'a>(keys: impl Iterator<Item = &'a Key>) -> String {
    let live = keys.filter(|key| key.spec.reload == Reload::Live).map(|key| key.spec.path());
    match live.collect::<BTreeSet<_>>() {
        live if live.is_empty() => "a change takes effect after a restart\n".into(),
        live => {
            let live = live.into_iter().collect::<Vec<_>>().join(", ");
            format!("a change takes effect on reload for {live}; after a restart for the rest\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, role: Option<Role>) -> Result<String, Failure> {
        check_on(&SystemLimits::default(), text, role)
    }

    fn check_on(machine: &SystemLimits, text: &str, role: Option<Role>) -> Result<String, Failure> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("my.yaml");
        std::fs::write(&file, text).unwrap();
        let mut out = Vec::new();
        run(&CheckArgs { file, role }, machine, &mut out)?;
        let out = String::from_utf8(out).unwrap();
        Ok(out.replace(&format!("{}/", dir.path().display()), ""))
    }

    #[test]
    fn verdict_names_the_role_of_the_file() {
        let good = |text: &str| check(text, None).unwrap();
        let verdict = |node: &str| {
            format!(
                "my.yaml: good, for {node}\na change takes effect on reload for \
                 downstream.cert_file, downstream.key_file, downstream.targets, log.level; after a \
                 restart for the rest\n"
            )
        };
        assert_eq!(good(&CloudConfig::sample()), verdict("a cloud"));
        assert_eq!(good(&EdgeConfig::sample()), verdict("an edge"));
        assert_eq!(good("log_level: warn"), verdict("a cloud or an edge"));
        assert_eq!(good("log: {level: warn}"), verdict("a cloud or an edge"));
        assert_eq!(
            good("udp_addr: :5222\nprotect: true"),
            format!(
                "warning: my.yaml:2:1: protect has no effect and can be removed\n{}",
                verdict("an edge")
            )
        );
    }

    #[test]
    fn directory_that_cannot_be_written_is_refused() {
        let text = "record: {enabled: true, dir: /dev/null/records}\nrtmp: {}\n";
        let Failure::Usage(message) = check(text, None).unwrap_err() else { panic!() };
        assert!(
            message.contains("my.yaml: record.dir: cannot write in /dev/null/records"),
            "{message}"
        );
    }

    #[test]
    fn token_that_others_can_read_is_a_warning() {
        let output = check("downstream: {edge_token: secret}\n", Some(Role::Cloud)).unwrap();
        assert!(output.contains("warning: my.yaml: others can read the token in it"), "{output}");
    }

    #[test]
    fn live_keys_are_listed() {
        let mut keys: Vec<_> = CloudConfig::default().sections().remove(0).keys;
        keys[1].spec.reload = Reload::Live;
        assert_eq!(
            reload_note(keys.iter()),
            "a change takes effect on reload for rtmp.max_connections; after a restart for the \
             rest\n"
        );
    }

    #[test]
    fn low_limits_of_the_machine_are_warnings_with_commands() {
        let machine = SystemLimits {
            rmem_max: Some(212_992),
            wmem_max: Some(4 << 20),
            somaxconn: Some(128),
            ..SystemLimits::default()
        };
        let edge = "udp_addr: :5222\nudp_recv_buffer: 4194304\nmax_viewers: 40\n";
        let output = check_on(&machine, edge, None).unwrap();
        let lines: Vec<_> = output.lines().collect();
        assert!(
            lines[0].starts_with("warning: this machine: the kernel gives UDP buffers of 2129")
        );
        assert!(lines[0].ends_with("run: sysctl -w net.core.rmem_max=4194304"), "{output}");
        assert!(
            lines[1].starts_with("warning: this machine: 128 connections may wait"),
            "{output}"
        );
        assert!(lines[1].ends_with("run: sysctl -w net.core.somaxconn=1024"), "{output}");
        assert_eq!(lines[2], "my.yaml: good, for an edge");
        assert_eq!(lines.len(), 4);
        // The cloud receives no RTP.
        let output = check_on(&machine, "rtmp_addr: :1935", None).unwrap();
        assert_eq!(output.lines().count(), 3, "{output}");
    }

    #[test]
    fn error_has_the_line_and_column_of_the_mistake() {
        for (text, role, expected) in [
            ("udp_addr: :5222\nlatency_ms: 5\n", None, "my.yaml:2:13: latency_ms: 5 is not valid"),
            ("log_level: 1", None, "my.yaml:1:12: log_level: 1 is not valid"),
            ("a: b: c", None, "my.yaml:1:"),
            (
                "udp_addr: :5222",
                Some(Role::Cloud),
                "my.yaml:1:1: unknown key udp_addr; it belongs in the file of an edge",
            ),
        ] {
            let Failure::Usage(message) = check(text, role).unwrap_err() else { panic!() };
            assert!(message.contains(expected), "{message}");
            assert!(!message.contains('\n'));
        }
        let args = CheckArgs { file: "/no/such.yaml".into(), role: None };
        let error = run(&args, &SystemLimits::default(), &mut Vec::new()).unwrap_err();
        assert!(error.to_string().starts_with("/no/such.yaml: cannot read it"), "{error}");
    }
}
