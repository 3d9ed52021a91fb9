//! TLS for the repair connection: the cloud's own certificate, and whom an edge trusts.

use std::{
    fmt, fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn_proto::HashedConnectionIdGenerator;
use ring::{digest, hmac};
use rustls::{
    DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        ClientSessionMemoryCache, ClientSessionStore, Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::ServerSessionMemoryCache,
};

/// Where the cloud keeps its certificate when no setting says otherwise.
pub const DEFAULT_CERT_FILE: &str = "downpour-cert.pem";
/// Where the cloud keeps its private key when no setting says otherwise.
pub const DEFAULT_KEY_FILE: &str = "downpour-key.pem";

/// A node's certificate chain and private key.
#[derive(Debug)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    fingerprint: Fingerprint,
}

impl Identity {
    /// Reads the pair, or makes a self-signed one and keeps it when neither file is there. The key
    /// file is readable by its owner alone.
    ///
    /// # Errors
    /// If only one of the two files is there, or a file cannot be read or written, or they are not
    /// PEM, or not of one pair.
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

    /// A new self-signed pair that is kept nowhere.
    ///
    /// # Errors
    /// If the system has no random numbers to give.
    pub fn generate() -> Result<Self, TlsError> {
        let (chain, key) = self_signed()?;
        Self::new(vec![chain.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
    }

    /// What a `quinn` endpoint needs to accept connections with this identity and speak `protocols`,
    /// the most wanted first.
    ///
    /// # Errors
    /// If the key is of a kind that cannot sign.
    pub fn server_config(&self, protocols: &[&[u8]]) -> Result<quinn::ServerConfig, TlsError> {
        self.resuming_server_config(protocols, 0)
    }

    /// The same, for a node that so many peers come back to: they resume their sessions, and what
    /// they say first may come as early data (0-RTT, RFC 9001 §4.6).
    ///
    /// Sessions are kept here and not in tickets: each is good for one resumption, so that early
    /// data that someone recorded is not taken a second time (RFC 8446 §8.1).
    ///
    /// # Errors
    /// If the key is of a kind that cannot sign.
    pub fn resuming_server_config(
        &self,
        protocols: &[&[u8]],
        peers: usize,
    ) -> Result<quinn::ServerConfig, TlsError> {
        let mut config = self.rustls_config()?;
        if peers > 0 {
            config.send_tls13_tickets = SESSIONS_PER_PEER;
            config.session_storage =
                ServerSessionMemoryCache::new(peers.min(MAX_PEERS_KEPT) * SESSIONS_PER_PEER);
            // In QUIC it is this or none.
            config.max_early_data_size = u32::MAX;
        }
        config.alpn_protocols = protocols.iter().map(|alpn| alpn.to_vec()).collect();
        let config = QuicServerConfig::try_from(config)
            .map_err(|error| TlsError::Crypto(error.to_string()))?;
        Ok(quinn::ServerConfig::with_crypto(Arc::new(config)))
    }

    /// Settings with which a restarted node can tell its former peers at once that their connections
    /// are gone (RFC 9000 §10.3): the keys behind reset tokens and connection IDs follow from the
    /// private key.
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

    /// What edges may pin.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    fn create(cert_file: &Path, key_file: &Path) -> Result<Self, TlsError> {
        let (cert, key) = self_signed()?;
        write_new(key_file, &key.serialize_pem(), 0o600)?;
        if let Err(error) = write_new(cert_file, &cert.pem(), 0o644) {
            // Half a pair would stop the next start.
            let _ = fs::remove_file(key_file);
            return Err(error);
        }
        let identity =
            Self::new(vec![cert.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))?;
        tracing::info!(
            cert = %cert_file.display(), key = %key_file.display(),
            fingerprint = %identity.fingerprint, "made a self-signed certificate",
        );
        Ok(identity)
    }

    fn parse(cert_file: &Path, cert: &[u8], key_file: &Path, key: &[u8]) -> Result<Self, TlsError> {
        let broken = |path: &Path, what: &dyn fmt::Display| TlsError::Broken {
            path: path.into(),
            reason: what.to_string(),
        };
        let chain = CertificateDer::pem_slice_iter(cert)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| broken(cert_file, &error))?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| broken(key_file, &error))?;
        let identity =
            Self::new(chain, key).map_err(|_| broken(cert_file, &"it holds no PEM certificate"))?;
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

/// The SHA-256 of a certificate in DER, written as hexadecimal pairs with colons between.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// The fingerprint of a certificate.
    pub fn of(cert: &CertificateDer<'_>) -> Self {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest::digest(&digest::SHA256, cert).as_ref());
        Self(hash)
    }
}

impl FromStr for Fingerprint {
    type Err = InvalidFingerprint;

    /// Takes upper and lower case, with or without colons.
    fn from_str(text: &str) -> Result<Self, InvalidFingerprint> {
        let digits: Vec<u32> = text
            .chars()
            .filter(|&c| c != ':')
            .map(|c| c.to_digit(16).ok_or(InvalidFingerprint))
            .collect::<Result<_, _>>()?;
        let (pairs, []) = digits.as_chunks::<2>() else { return Err(InvalidFingerprint) };
        let bytes: Vec<u8> = pairs.iter().map(|[high, low]| (high << 4 | low) as u8).collect();
        bytes.try_into().map(Self).map_err(|_| InvalidFingerprint)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02X}", if i == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no [`Fingerprint`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a fingerprint is 32 hexadecimal pairs, as in 0A:1B:…, as the cloud prints it at start")]
pub struct InvalidFingerprint;

/// How an edge knows its cloud.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// No check at all.
    Insecure,
    /// This one certificate.
    Pinned(Fingerprint),
    /// The certificate that the cloud had the first time, kept in this file.
    TrustOnFirstUse(PathBuf),
    /// What one of the authorities in this PEM file signed for the cloud's host name.
    Ca(PathBuf),
}

/// The edge's side of the handshake with one cloud.
#[derive(Clone)]
pub struct ClientTls {
    crypto: Arc<QuicClientConfig>,
    sessions: Arc<ClientSessionMemoryCache>,
    verifier: Option<Arc<CloudVerifier>>,
}

impl ClientTls {
    /// Trusts `cloud`, a `host:port`, as `trust` says, and offers `protocols`.
    ///
    /// # Errors
    /// If the file of [`Trust::Ca`] cannot be read or holds no certificate.
    pub fn new(trust: &Trust, cloud: &str, protocols: &[&[u8]]) -> Result<Self, TlsError> {
        let provider = provider();
        let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| TlsError::Crypto(error.to_string()))?;
        let (mut config, verifier) = match trust {
            Trust::Ca(path) => {
                let verifier =
                    WebPkiServerVerifier::builder_with_provider(Arc::new(roots(path)?), provider)
                        .build()
                        .map_err(|error| TlsError::Crypto(error.to_string()))?;
                (builder.with_webpki_verifier(verifier).with_no_client_auth(), None)
            }
            _ => {
                let verifier = Arc::new(CloudVerifier {
                    trust: trust.clone(),
                    cloud: cloud.to_owned(),
                    provider,
                    seen: Mutex::default(),
                    verified: Mutex::default(),
                    refusal: Mutex::default(),
                });
                let config = builder
                    .dangerous()
                    .with_custom_certificate_verifier(verifier.clone())
                    .with_no_client_auth();
                (config, Some(verifier))
            }
        };
        config.alpn_protocols = protocols.iter().map(|alpn| alpn.to_vec()).collect();
        // What the edge says first may go with its first packet when it is back.
        config.enable_early_data = true;
        let sessions = Arc::new(ClientSessionMemoryCache::new(CLIENT_SESSIONS));
        config.resumption = Resumption::store(sessions.clone());
        let crypto = QuicClientConfig::try_from(config)
            .map_err(|error| TlsError::Crypto(error.to_string()))?;
        Ok(Self { crypto: Arc::new(crypto), sessions, verifier })
    }

    /// Forgets the sessions with `host` if the certificate that they began with would be refused
    /// today: a resumed session shows none. To be called before each connection.
    pub fn revalidate(&self, host: &str) {
        let Some(verifier) = &self.verifier else { return };
        let verified = *lock(&verifier.verified);
        if verified.is_some_and(|fingerprint| verifier.check(fingerprint).is_err())
            && let Ok(host) = ServerName::try_from(host.to_owned())
        {
            while self.sessions.take_tls13_ticket(&host).is_some() {}
        }
    }

    /// What `quinn::ClientConfig::new` takes. Sessions are resumed across connections.
    pub fn crypto(&self) -> Arc<QuicClientConfig> {
        self.crypto.clone()
    }

    /// Pins the certificate that the last handshake showed, when trusting on first use and nothing
    /// is pinned yet. To be called once a handshake is complete: only then has the cloud proved that
    /// the certificate is its own.
    ///
    /// # Errors
    /// If the file cannot be written; the connection should then not be used.
    pub fn pin(&self) -> Result<(), TlsError> {
        self.verifier.as_ref().map_or(Ok(()), |verifier| verifier.pin())
    }

    /// Why the last certificate was refused, in plain words.
    pub fn take_refusal(&self) -> Option<String> {
        lock(&self.verifier.as_ref()?.refusal).take()
    }
}

/// Why TLS cannot be set up, or a cloud is not trusted.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read or written.
    #[error("{path}: {error}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A certificate without its key, or the other way round.
    #[error(
        "{there} is there but {missing} is not: put the missing file back, or remove both to have \
         a new pair made", there = there.display(), missing = missing.display()
    )]
    HalfPair {
        /// The file that exists.
        there: PathBuf,
        /// The file that does not.
        missing: PathBuf,
    },
    /// Not the PEM that it should be.
    #[error("{path}: {reason}", path = path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Two good files that do not go together, or that TLS cannot use.
    #[error("{cert} and {key} do not work together: {reason}", cert = cert.display(), key = key.display())]
    Mismatch {
        /// The certificate file.
        cert: PathBuf,
        /// The key file.
        key: PathBuf,
        /// What TLS said.
        reason: String,
    },
    /// The TLS library refused.
    #[error("TLS: {0}")]
    Crypto(String),
}

/// Checks a cloud's certificate by its fingerprint.
#[derive(Debug)]
struct CloudVerifier {
    trust: Trust,
    cloud: String,
    provider: Arc<CryptoProvider>,
    /// What a cloud without a pin showed in its last handshake.
    seen: Mutex<Option<Fingerprint>>,
    /// What the last handshake showed that was no resumption.
    verified: Mutex<Option<Fingerprint>>,
    refusal: Mutex<Option<String>>,
}

impl CloudVerifier {
    fn check(&self, seen: Fingerprint) -> Result<(), String> {
        let cloud = &self.cloud;
        match &self.trust {
            Trust::Insecure | Trust::Ca(_) => Ok(()),
            Trust::Pinned(pinned) if *pinned == seen => Ok(()),
            Trust::Pinned(pinned) => Err(format!(
                "the certificate of cloud {cloud} has the fingerprint {seen}, but {pinned} is \
                 pinned: if the cloud has a new certificate, put the new fingerprint into the \
                 configuration; if not, someone stands in between"
            )),
            Trust::TrustOnFirstUse(path) => {
                let pinned = self.pinned(path).map_err(|error| error.to_string())?;
                match pinned {
                    Some((_, pinned)) if pinned == seen => Ok(()),
                    Some((line, pinned)) => Err(format!(
                        "the certificate of cloud {cloud} has changed: it was {pinned} and is now \
                         {seen}. If the cloud has a new certificate, remove line {line} of {}; if \
                         not, someone stands in between",
                        path.display()
                    )),
                    None => {
                        *lock(&self.seen) = Some(seen);
                        Ok(())
                    }
                }
            }
        }
    }

    fn pin(&self) -> Result<(), TlsError> {
        let Trust::TrustOnFirstUse(path) = &self.trust else { return Ok(()) };
        let mut unpinned = lock(&self.seen);
        let Some(seen) = *unpinned else { return Ok(()) };
        if self.pinned(path)?.is_some() {
            *unpinned = None;
            return Ok(());
        }
        let line = format!("{} {seen}\n", self.cloud);
        fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .and_then(|mut file| file.write_all(line.as_bytes()).and_then(|()| file.sync_all()))
            .map_err(|error| TlsError::File { path: path.clone(), error })?;
        // Not before: a session whose certificate could not be pinned may be resumed.
        *unpinned = None;
        tracing::warn!(
            cloud = self.cloud, fingerprint = %seen, file = %path.display(),
            "first connection to this cloud: trusting its certificate from now on",
        );
        Ok(())
    }

    /// The line with this cloud's fingerprint, counted from 1, if there is one.
    fn pinned(&self, path: &Path) -> Result<Option<(usize, Fingerprint)>, TlsError> {
        let Some(text) = read(path)? else { return Ok(None) };
        for (i, line) in String::from_utf8_lossy(&text).lines().enumerate() {
            let Some((cloud, fingerprint)) = line.trim().split_once(char::is_whitespace) else {
                continue;
            };
            if cloud == self.cloud {
                let fingerprint = fingerprint.trim().parse().map_err(|error| TlsError::Broken {
                    path: path.into(),
                    reason: format!("line {}: {error}", i + 1),
                })?;
                return Ok(Some((i + 1, fingerprint)));
            }
        }
        Ok(None)
    }
}

impl ServerCertVerifier for CloudVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *lock(&self.refusal) = None;
        let seen = Fingerprint::of(end_entity);
        self.check(seen).map_err(|refusal| {
            *lock(&self.refusal) = Some(refusal);
            rustls::Error::from(rustls::CertificateError::ApplicationVerificationFailure)
        })?;
        *lock(&self.verified) = Some(seen);
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // QUIC is TLS 1.3 only (RFC 9001 §4.2).
        Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // Without a check of who it is, it does not matter who signed; and an existing cloud's key
        // may be too short for ring to check.
        if self.trust == Trust::Insecure {
            return Ok(HandshakeSignatureValid::assertion());
        }
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
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

fn roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let broken = |reason: String| TlsError::Broken { path: path.into(), reason };
    let pem = fs::read(path).map_err(|error| TlsError::File { path: path.into(), error })?;
    let mut roots = RootCertStore::empty();
    for cert in CertificateDer::pem_slice_iter(&pem) {
        let cert = cert.map_err(|error| broken(error.to_string()))?;
        roots.add(cert).map_err(|error| broken(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(broken("it holds no PEM certificate".into()));
    }
    Ok(roots)
}

/// The file's content, or none if it does not exist.
fn read(path: &Path) -> Result<Option<Vec<u8>>, TlsError> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TlsError::File { path: path.into(), error }),
    }
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

/// *ring*, whatever else the process may have installed.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A session's ticket is used once; a second one is there if a connection fails half-way.
const SESSIONS_PER_PEER: usize = 2;
/// Sessions cost about 200 bytes each; peers beyond these make a full handshake.
const MAX_PEERS_KEPT: usize = 100_000;
/// Hosts with which an edge keeps sessions.
const CLIENT_SESSIONS: usize = 16;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_pair_is_made_once_and_kept() {
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
        assert!(error(&cert, &missing).contains("none.pem is not: put the missing file back"));
        assert!(error(&missing, &key).contains("none.pem is not: put the missing file back"));

        let (cert2, key2) = (dir.path().join("cert2.pem"), dir.path().join("key2.pem"));
        Identity::load_or_create(&cert2, &key2).unwrap();
        assert!(error(&cert, &key2).contains("do not work together"));

        fs::write(&cert2, "not PEM").unwrap();
        assert!(error(&cert2, &key2).contains("cert2.pem: it holds no PEM certificate"));
        fs::write(&key, "").unwrap();
        assert!(error(&cert, &key).contains("key.pem"));
        assert!(error(dir.path(), &key).contains("directory"));
    }

    #[test]
    fn fingerprints_are_read_in_any_case() {
        let text = "ab".repeat(32);
        let fingerprint: Fingerprint = text.parse().unwrap();
        assert_eq!(fingerprint.to_string(), ["AB"; 32].join(":"));
        for bad in ["", "AB", &"a".repeat(63), &"zz".repeat(32), &"ab".repeat(33)] {
            assert_eq!(bad.parse::<Fingerprint>(), Err(InvalidFingerprint), "{bad}");
        }
    }

    #[test]
    fn first_use_is_pinned_only_when_the_handshake_is_done() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("known");
        let trust = Trust::TrustOnFirstUse(file.clone());
        let tls = ClientTls::new(&trust, "cloud:4242", &[b"x"]).unwrap();
        let verifier = tls.verifier.as_ref().unwrap();
        let (one, two) = (Fingerprint([1; 32]), Fingerprint([2; 32]));

        verifier.check(one).unwrap();
        assert!(!file.exists());
        tls.pin().unwrap();
        tls.pin().unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), format!("cloud:4242 {one}\n"));
        verifier.check(one).unwrap();
        let refusal = verifier.check(two).unwrap_err();
        assert!(refusal.contains("has changed") && refusal.contains("remove line 1 of"));

        let other = ClientTls::new(&trust, "other:4242", &[b"x"]).unwrap();
        other.verifier.as_ref().unwrap().check(two).unwrap();
        other.pin().unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap().lines().count(), 2);

        fs::write(&file, "cloud:4242 zz\n").unwrap();
        assert!(verifier.check(one).unwrap_err().contains("line 1"));
    }

    #[test]
    fn an_authority_file_must_hold_one() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ca.pem");
        let error = |file: &Path| {
            ClientTls::new(&Trust::Ca(file.into()), "c:1", &[b"x"]).err().unwrap().to_string()
        };
        assert!(error(&file).contains("ca.pem"));
        fs::write(&file, "").unwrap();
        assert!(error(&file).contains("holds no PEM certificate"));
    }
}
