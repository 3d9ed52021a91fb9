//! Permissions on files: faccessat(2).

use std::{ffi::CString, io, os::unix::ffi::OsStrExt, path::Path};

/// Checks that this process may create files in a directory. Creates nothing.
///
/// # Errors
/// Those of faccessat(2), such as `EACCES` and `EROFS`.
pub fn may_write_in(dir: &Path) -> io::Result<()> {
    let path = CString::new(dir.as_os_str().as_bytes())?;
    let mode = libc::W_OK | libc::X_OK;
    // SAFETY: `path` ends with a zero and outlives the call, which only reads it.
    let result = unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), mode, libc::AT_EACCESS) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_without_permission_or_that_is_missing_is_an_error() {
        may_write_in(&std::env::temp_dir()).unwrap();
        let error = may_write_in(Path::new("/no/such/directory")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        // Not even root may.
        assert!(
            may_write_in(Path::new("/proc/sys")).is_err()
                || may_write_in(Path::new("/sys")).is_err()
        );
    }
}
