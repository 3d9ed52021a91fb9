//! The files in `supervisor/` under a real supervisord: the node starts without a settings file, as
//! another user than root, takes signals, and is started again after a crash.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use crate::common::{SOON, http, node::loopback, ports, process, wait_for};

/// The user that runs the node, `nobody` on every Linux.
const NOBODY: u32 = 65_534;

/// supervisord, which is asked to end when the test does.
struct Supervisord(Child);

impl Drop for Supervisord {
    fn drop(&mut self) {
        process::signal(self.0.id(), "TERM");
        // Both fail if it has ended, which is as well.
        let _ = self.0.wait();
    }
}

#[test]
fn nodes_run_under_supervisord_as_the_heads_of_their_files_say() {
    if Command::new("supervisord").arg("--version").output().is_err() {
        eprintln!("SKIPPED: supervisord is not installed (apt-get install supervisor)");
        return;
    }
    for (role, settings, health) in [("cloud", "config.yaml", 0), ("edge", "edge.yaml", 1)] {
        let dir = tempfile::tempdir().unwrap();
        let config = write_config(dir.path(), role);
        let child = Command::new("supervisord")
            .args(["--nodaemon", "--configuration"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let _supervisord = Supervisord(child);
        let control = |args: &[&str]| control(&config, args);

        // The ports of the defaults may be in use here. The file is written in any case.
        let settings = dir.path().join("node").join(settings);
        wait_for("the settings file is written", SOON, || settings.exists().then_some(()));
        let addrs = [(); 5].map(|()| loopback(ports::free()));
        let mut text = format!("http: {{addr: \"{}\"}}\n", addrs[0]);
        text += &match health {
            0 => format!(
                "rtmp: {{addr: \"{}\"}}\ndownstream: {{quic_addr: \"{}\", rtp_port: {}}}\n",
                addrs[1],
                addrs[2],
                addrs[3].port()
            ),
            _ => format!("rtp: {{addr: \"{}\"}}\n", addrs[1]),
        };
        fs::write(&settings, &text).unwrap();
        control(&["restart", role]);
        let healthy = |what: &str| {
            wait_for(what, SOON, || {
                http::get_json(addrs[0], "/healthz").ok().filter(|(status, _)| *status == 200)
            });
        };
        healthy("the node answers");
        let pid = || String::from_utf8(control(&["pid", role]).stdout).unwrap().trim().to_owned();
        let first = pid();
        if is_root() {
            let status = fs::read_to_string(format!("/proc/{first}/status")).unwrap();
            assert!(status.contains(&format!("Uid:\t{NOBODY}\t")), "{status}");
        }

        fs::write(&settings, format!("{text}log: {{level: debug}}\n")).unwrap();
        control(&["signal", "HUP", role]);
        let log = dir.path().join(format!("log/{role}.err.log"));
        wait_for("the settings are reloaded", SOON, || {
            fs::read_to_string(&log).ok()?.contains("settings reloaded").then_some(())
        });
        assert_eq!(pid(), first, "SIGHUP ended the node");

        // A crash after startsecs.
        wait_for("the node counts as started", SOON, || {
            let status = control(&["status", role]).stdout;
            String::from_utf8_lossy(&status).contains("RUNNING").then_some(())
        });
        control(&["signal", "KILL", role]);
        wait_for("the node is started again", SOON, || {
            (pid() != first && pid() != "0").then_some(())
        });
        healthy("the node answers again");
        control(&["stop", role]);
        let log = fs::read_to_string(&log).unwrap();
        assert!(log.contains(&format!("{role} stopped")), "{log}");
    }
}

/// Writes a configuration of supervisord with the shipped program, whose paths are moved into `dir`.
fn write_config(dir: &Path, role: &str) -> std::path::PathBuf {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("supervisor/{role}.conf"));
    let mut program = fs::read_to_string(shipped).unwrap();
    for (path, own) in [("/opt/downpour", "node"), ("/var/log/downpour", "log")] {
        fs::create_dir(dir.join(own)).unwrap();
        assert!(program.contains(path), "{program}");
        program = program.replace(path, &dir.join(own).display().to_string());
    }
    // Another user may not be able to read the directory of the build.
    let binary = dir.join("downpour");
    let built = env!("CARGO_BIN_EXE_downpour");
    fs::copy(built, &binary).unwrap();
    program = program.replace("/usr/local/bin/downpour", &binary.display().to_string());
    assert!(program.contains("\nuser=downpour\n"), "{program}");
    if is_root() {
        program = program.replace("\nuser=downpour\n", "\nuser=nobody\n");
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
        chown(dir.join("node"), Some(NOBODY), None).unwrap();
    } else {
        program = program.replace("\nuser=downpour\n", "\n");
    }
    let dir = dir.display();
    let text = format!(
        "[supervisord]\nlogfile={dir}/supervisord.log\npidfile={dir}/supervisord.pid\n\
         [unix_http_server]\nfile={dir}/socket\n\
         [rpcinterface:supervisor]\n\
         supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n\
         [supervisorctl]\nserverurl=unix://{dir}/socket\n{program}"
    );
    let config = Path::new(&dir.to_string()).join("supervisord.conf");
    fs::write(&config, text).unwrap();
    config
}

fn control(config: &Path, args: &[&str]) -> Output {
    let mut command = Command::new("supervisorctl");
    command.arg("--configuration").arg(config).args(args).stdin(Stdio::null());
    command.output().expect("cannot run supervisorctl")
}

fn is_root() -> bool {
    // The owner of a process's directory there is its effective user.
    std::os::unix::fs::MetadataExt::uid(&fs::metadata("/proc/self").unwrap()) == 0
}
