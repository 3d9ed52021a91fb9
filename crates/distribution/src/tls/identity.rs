//! A node's certificate and private key, and the QUIC server settings made from them.

use std::{
    fmt, fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::Arc,
};

use quinn::crypto::rustls::QuicServerConfig;
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::ServerSessionMemoryCache,
};

use super::{Fingerprint, TlsError, provider, read};

/// Default path of the cloud's certificate.
pub const DEFAULT_CERT_FILE: &str = "downpour-cert.pem";
/// Default path of the cloud's private key.
pub const DEFAULT_KEY_FILE: &str = "downpour-key.pem";

/// A node's certificate chain and private key.
#[derive(Debug)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    fingerprint: Fingerprint,
}

impl Identity {
    /// Reads a certificate and key, or creates and saves a self-signed pair if neither file exists.
    /// A key file that it creates is readable by its owner only.
    ///
    /// # Errors
    /// If only one of the files exists, a file cannot be read or written, a file is not PEM, or the
    /// certificate and the key do not belong together.
    pub fn load_or_create(cert_file: &Path, key_file: &Path) -> Result<Self, TlsError> {
        match (read(cert_file)?, read(key_file)?) {
            (Some(cert), Some(key)) => Self::parse(cert_file, &cert, key_file, &key),
            (None, None) => Self::create(cert_file, key_file),
            (Some(_), None) => {
                Err(TlsError::HalfPair { there: cert_file.into(), missing: key_file.into() })
            }
            (None, Some(_)) => {
                Err(TlsError::HalfPair { there: key_file.into(), missing: cert_file.into() })
            }
        }
    }

    /// Reads a certificate and key.
    ///
    /// # Errors
    /// Those of [`Identity::load_or_create`], and if neither file exists.
    pub fn load(cert_file: &Path, key_file: &Path) -> Result<Self, TlsError> {
        if read(cert_file)?.is_none() && read(key_file)?.is_none() {
            let error = io::ErrorKind::NotFound.into();
            return Err(TlsError::File { path: cert_file.into(), error });
        }
        Self::load_or_create(cert_file, key_file)
    }

    /// Creates a self-signed pair in memory only.
    ///
    /// # Errors
    /// If the system has no random numbers.
    pub fn generate() -> Result<Self, TlsError> {
        let (chain, key) = self_signed()?;
        Self::new(vec![chain.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
    }

    /// QUIC server settings with this identity. `protocols` are ALPN names in order of preference.
    ///
    /// # Errors
    /// If the key cannot sign.
    pub fn server_config(&self, protocols: &[&[u8]]) -> Result<quinn::ServerConfig, TlsError> {
        self.resuming_server_config(protocols, 0)
    }

    /// As [`Identity::server_config`], with session resumption for about `peers` peers, which may send
    /// early data when they reconnect (0-RTT, RFC 9001 §4.6).
    ///
    /// Sessions are stored in memory, not in the tickets: each can be resumed once, so replayed early
    /// data is rejected (RFC 8446 §8.1).
    ///
    /// # Errors
    /// If the key cannot sign.
    pub fn resuming_server_config(
        &self,
        protocols: &[&[u8]],
        peers: usize,
    ) -> Result<quinn::ServerConfig, TlsError> {
        let mut config = self.rustls_config()?;
        if peers > 0 {
            config.send_tls13_tickets = SESSIONS_PER_PEER;
            config.session_storage =
                ServerSessionMemoryCache::new(peers.min(MAX_PEERS) * SESSIONS_PER_PEER);
            // QUIC allows only this value or 0 (RFC 9001 §4.6.1).
            config.max_early_data_size = u32::MAX;
        }
        config.alpn_protocols = protocols.iter().map(|alpn| alpn.to_vec()).collect();
        let config = QuicServerConfig::try_from(config)
            .map_err(|error| TlsError::Crypto(error.to_string()))?;
        Ok(quinn::ServerConfig::with_crypto(Arc::new(config)))
    }

    /// QUIC endpoint settings with which a restarted node can reset the connections of its previous run
    /// (stateless reset, RFC 9000 §10.3): the keys of reset tokens and connection IDs are derived from
    /// the private key.
    pub fn endpoint_config(&self) -> quinn::EndpointConfig {
        let root = hmac::Key::new(hmac::HMAC_SHA256, self.key.secret_der());
        let reset = hmac::sign(&root, b"downpour stateless reset");
        let cid = hmac::sign(&root, b"downpour connection id");
        let cid = cid.as_ref().first_chunk().copied().map_or(0, u64::from_be_bytes);
        let mut config =
            quinn::EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, reset.as_ref())));
        config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(cid)));
        config
    }

    /// The fingerprint of the certificate, which edges may pin.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    fn create(cert_file: &Path, key_file: &Path) -> Result<Self, TlsError> {
        let (cert, key) = self_signed()?;
        write_new(key_file, &key.serialize_pem(), 0o600)?;
        if let Err(error) = write_new(cert_file, &cert.pem(), 0o644) {
            // The next start would fail with half a pair.
            let _ = fs::remove_file(key_file);
            return Err(error);
        }
        let identity =
            Self::new(vec![cert.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))?;
        tracing::info!(
            cert = %cert_file.display(), key = %key_file.display(),
            fingerprint = %identity.fingerprint, "self-signed certificate created",
        );
        Ok(identity)
    }

    fn parse(cert_file: &Path, cert: &[u8], key_file: &Path, key: &[u8]) -> Result<Self, TlsError> {
        let broken = |path: &Path, reason: &dyn fmt::Display| TlsError::Broken {
            path: path.into(),
            reason: reason.to_string(),
        };
        let chain = CertificateDer::pem_slice_iter(cert)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| broken(cert_file, &error))?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| broken(key_file, &error))?;
        let identity =
            Self::new(chain, key).map_err(|_| broken(cert_file, &"no PEM certificate in it"))?;
        identity.rustls_config().map_err(|error| TlsError::Mismatch {
            cert: cert_file.into(),
            key: key_file.into(),
            reason: error.to_string(),
        })?;
        Ok(identity)
    }

    fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, TlsError> {
        let leaf = chain.first().ok_or_else(|| TlsError::Crypto("no certificate".into()))?;
        let fingerprint = Fingerprint::of(leaf);
        Ok(Self { chain, key, fingerprint })
    }

    fn rustls_config(&self) -> Result<rustls::ServerConfig, TlsError> {
        rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| TlsError::Crypto(error.to_string()))?
            .with_no_client_auth()
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| TlsError::Crypto(error.to_string()))
    }
}

fn self_signed() -> Result<(rcgen::Certificate, rcgen::KeyPair), TlsError> {
    let crypto = |error: rcgen::Error| TlsError::Crypto(error.to_string());
    let key = rcgen::KeyPair::generate().map_err(crypto)?;
    let mut params = rcgen::CertificateParams::new(["downpour".to_owned(), "localhost".to_owned()])
        .map_err(crypto)?;
    params.distinguished_name.push(rcgen::DnType::CommonName, "downpour");
    let cert = params.self_signed(&key).map_err(crypto)?;
    Ok((cert, key))
}

fn write_new(path: &Path, content: &str, mode: u32) -> Result<(), TlsError> {
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(content.as_bytes()).and_then(|()| file.sync_all()))
        .map_err(|error| TlsError::File { path: path.into(), error })
}

/// Tickets per connection. A ticket is used once; the second one is for a connection that fails
/// half-way.
const SESSIONS_PER_PEER: usize = 2;
/// Most peers with stored sessions, of about 200 bytes each. Further peers make a full handshake.
const MAX_PEERS: usize = 100_000;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_pair_is_created_once_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
        let made = Identity::load_or_create(&cert, &key).unwrap();
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        let kept = Identity::load_or_create(&cert, &key).unwrap();
        assert_eq!(made.fingerprint(), kept.fingerprint());
        assert_eq!(kept.fingerprint().to_string().parse(), Ok(kept.fingerprint()));
        kept.server_config(&[b"x"]).unwrap();
    }

    #[test]
    fn a_broken_pair_is_a_clear_error() {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
        Identity::load_or_create(&cert, &key).unwrap();
        let error =
            |cert: &Path, key: &Path| Identity::load_or_create(cert, key).unwrap_err().to_string();

        let missing = dir.path().join("none.pem");
        assert!(error(&cert, &missing).contains("none.pem does not: restore the missing file"));
        assert!(error(&missing, &key).contains("none.pem does not: restore the missing file"));

        let (cert2, key2) = (dir.path().join("cert2.pem"), dir.path().join("key2.pem"));
        Identity::load_or_create(&cert2, &key2).unwrap();
        assert!(error(&cert, &key2).contains("do not work together"));

        fs::write(&cert2, "not PEM").unwrap();
        assert!(error(&cert2, &key2).contains("cert2.pem: no PEM certificate in it"));
        fs::write(&key, "").unwrap();
        assert!(error(&cert, &key).contains("key.pem"));
        assert!(error(dir.path(), &key).contains("directory"));
    }
}
