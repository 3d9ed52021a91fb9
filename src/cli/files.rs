//! Files and directories that the settings name, as they are on this machine.

use std::{fs, io, os::unix::fs::PermissionsExt, path::Path};

use super::node::NodeConfig;

/// Returns, for each directory that a node could not write to, its key and the reason.
pub(super) fn unwritable<T: NodeConfig>(config: &T) -> Vec<String> {
    let mut dirs = config.state_files();
    dirs.extend(config.record().dir().map(|dir| ("record.dir", dir)));
    let log = config.log();
    if log.to_file {
        dirs.push(("log.dir", &log.dir));
    }
    if let Some(downstream) = config.downstream()
        && !downstream.cert_file.exists()
        && !downstream.key_file.exists()
    {
        let in_dir = |file| Path::parent(file).unwrap_or(Path::new(""));
        dirs.push(("downstream.cert_file", in_dir(&downstream.cert_file)));
        dirs.push(("downstream.key_file", in_dir(&downstream.key_file)));
    }
    let fault = |(key, dir): (&str, &Path)| {
        let error = may_create_in(dir).err()?;
        Some(format!("{key}: cannot write in {}: {error}; use another, or permit it", shown(dir)))
    };
    dirs.into_iter().filter_map(fault).collect()
}

/// Returns a warning for each secret that other users of the machine can read.
pub(super) fn exposed<T: NodeConfig>(config: &T, file: &Path) -> Vec<String> {
    let mode = |path: &Path| fs::metadata(path).map_or(0, |file| file.permissions().mode());
    let mut warnings = Vec::new();
    let downstream = config.downstream();
    if let Some(key) = downstream.map(|downstream| &downstream.key_file)
        && mode(key) & 0o077 != 0
    {
        let path = key.display();
        warnings.push(format!("downstream.key_file: others can read it; run: chmod 600 {path}"));
    }
    let token = downstream.is_some_and(|downstream| !downstream.edge_token.is_empty());
    if (token || config.has_token()) && mode(file) & 0o007 != 0 {
        let path = file.display();
        warnings.push(format!("others can read the token in it; run: chmod 640 {path}"));
    }
    warnings
}

/// Checks that a directory is there and can be written to, or that it can be created.
fn may_create_in(dir: &Path) -> io::Result<()> {
    let here = Path::new(".");
    let nearest = dir
        .ancestors()
        .map(|dir| if dir.as_os_str().is_empty() { here } else { dir })
        .find(|dir| dir.exists())
        .unwrap_or(here);
    if !nearest.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    downpour_sys::access::may_write_in(nearest)
}

fn shown(dir: &Path) -> String {
    match dir.as_os_str().is_empty() {
        true => "the working directory".into(),
        false => dir.display().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CloudConfig;

    #[test]
    fn directory_below_a_file_cannot_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = CloudConfig::default();
        config.downstream.cert_file = dir.path().join("new/cert.pem");
        config.downstream.key_file = dir.path().join("new/key.pem");
        config.record.enabled = true;
        config.record.dir = dir.path().join("records/of/today");
        assert_eq!(unwritable(&config), [""; 0]);
        fs::write(dir.path().join("records"), "a file").unwrap();
        config.log.to_file = true;
        config.log.dir = dir.path().join("records");
        let faults = unwritable(&config);
        assert_eq!(faults.len(), 2, "{faults:?}");
        assert!(faults[0].starts_with("record.dir: cannot write in "), "{faults:?}");
        assert!(faults[1].starts_with("log.dir: cannot write in "), "{faults:?}");
    }

    #[test]
    fn secrets_that_others_can_read_are_warnings() {
        let dir = tempfile::tempdir().unwrap();
        let (file, key) = (dir.path().join("c.yaml"), dir.path().join("key.pem"));
        for file in [&file, &key] {
            fs::write(file, "").unwrap();
            fs::set_permissions(file, fs::Permissions::from_mode(0o644)).unwrap();
        }
        let mut config = CloudConfig::default();
        config.downstream.key_file = key.clone();
        assert_eq!(exposed(&config, &file).len(), 1);
        config.downstream.edge_token = "secret".into();
        let warnings = exposed(&config, &file);
        assert!(warnings[0].contains("run: chmod 600 "), "{warnings:?}");
        assert!(warnings[1].contains("run: chmod 640 "), "{warnings:?}");
        for (file, mode) in [(&file, 0o640), (&key, 0o600)] {
            fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
        }
        assert_eq!(exposed(&config, &file), [""; 0]);
    }
}
