//! TLS of the repair connection: the cloud's certificate, and how an edge verifies it.
//!
//! - [`Identity`]: a node's certificate and key, and the server side of QUIC, with session tickets.
//! - [`Trust`]: how an edge verifies its cloud: a pinned fingerprint, the file of known clouds, or an
//!   authority.
//! - [`ClientTls`]: the client side of QUIC, with its session cache.

mod client;
mod fingerprint;
mod identity;
mod trust;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::crypto::CryptoProvider;

pub use self::{
    client::ClientTls,
    fingerprint::{Fingerprint, InvalidFingerprint},
    identity::{DEFAULT_CERT_FILE, DEFAULT_KEY_FILE, Identity},
    trust::Trust,
};

/// Why TLS cannot be set up, or a cloud is not trusted.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or written.
    #[error("{path}: {error}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        error: io::Error,
    },
    /// Only one file of a certificate and its key exists.
    #[error(
        "{there} exists but {missing} does not: restore the missing file, or remove both to create \
         a new pair", there = there.display(), missing = missing.display()
    )]
    HalfPair {
        /// The file that exists.
        there: PathBuf,
        /// The file that does not.
        missing: PathBuf,
    },
    /// A file has the wrong content.
    #[error("{path}: {reason}", path = path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// The problem.
        reason: String,
    },
    /// The certificate and the key do not belong together, or TLS cannot use them.
    #[error("{cert} and {key} do not work together: {reason}", cert = cert.display(), key = key.display())]
    Mismatch {
        /// The certificate file.
        cert: PathBuf,
        /// The key file.
        key: PathBuf,
        /// The error of the TLS library.
        reason: String,
    },
    /// The TLS library failed.
    #[error("TLS: {0}")]
    Crypto(String),
}

/// The content of a file; `None` if it does not exist.
fn read(path: &Path) -> Result<Option<Vec<u8>>, TlsError> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TlsError::File { path: path.into(), error }),
    }
}

/// *ring*, regardless of the process's default provider.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
