//! How an edge verifies its cloud's certificate.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use rustls::{
    DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};

use super::{Fingerprint, TlsError, read};

/// How an edge verifies its cloud.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// No verification.
    Insecure,
    /// The certificate must have this fingerprint.
    Pinned(Fingerprint),
    /// The certificate must be the one of the first connection. This file holds the fingerprints of
    /// known clouds.
    TrustOnFirstUse(PathBuf),
    /// The certificate must be valid for the cloud's host name and signed by an authority in this PEM
    /// file.
    Ca(PathBuf),
}

/// Verifies a cloud's certificate by its fingerprint. For all kinds of [`Trust`] but `Ca`.
///
/// A cloud that is not in the file of known clouds passes through these states:
///
/// | state | next |
/// |---|---|
/// | unknown | `check` accepts the certificate and keeps its fingerprint: seen |
/// | seen | the handshake completes and `pin` writes the file: known |
/// | known | `check` accepts only that certificate |
#[derive(Debug)]
pub(super) struct CloudVerifier {
    trust: Trust,
    /// `host:port`
    cloud: String,
    provider: Arc<CryptoProvider>,
    /// The certificate of an unknown cloud's latest handshake.
    seen: Mutex<Option<Fingerprint>>,
    /// The certificate of the latest full handshake.
    verified: Mutex<Option<Fingerprint>>,
    refusal: Mutex<Option<String>>,
}

impl CloudVerifier {
    pub(super) fn new(trust: Trust, cloud: String, provider: Arc<CryptoProvider>) -> Self {
        let (seen, verified, refusal) = Default::default();
        Self { trust, cloud, provider, seen, verified, refusal }
    }

    /// Checks a fingerprint. The error says why it is refused, for an operator.
    pub(super) fn check(&self, seen: Fingerprint) -> Result<(), String> {
        let cloud = &self.cloud;
        match &self.trust {
            Trust::Insecure | Trust::Ca(_) => Ok(()),
            Trust::Pinned(pinned) if *pinned == seen => Ok(()),
            Trust::Pinned(pinned) => Err(format!(
                "the certificate of cloud {cloud} has the fingerprint {seen}, but {pinned} is \
                 pinned: if the cloud has a new certificate, change the fingerprint in the \
                 configuration; if not, this may be a man-in-the-middle attack"
            )),
            Trust::TrustOnFirstUse(path) => {
                let known = self.find(path).map_err(|error| error.to_string())?;
                match known {
                    Some((_, known)) if known == seen => Ok(()),
                    Some((line, known)) => Err(format!(
                        "the certificate of cloud {cloud} has changed from {known} to {seen}: if the \
                         cloud has a new certificate, remove line {line} of {}; if not, this may be \
                         a man-in-the-middle attack",
                        path.display()
                    )),
                    None => {
                        *self.seen.lock() = Some(seen);
                        Ok(())
                    }
                }
            }
        }
    }

    /// `true` if the certificate of the latest full handshake would be refused today.
    pub(super) fn would_refuse(&self) -> bool {
        let verified = *self.verified.lock();
        verified.is_some_and(|fingerprint| self.check(fingerprint).is_err())
    }

    /// Adds the certificate of the latest handshake to the file of known clouds, if it is not known.
    pub(super) fn pin(&self) -> Result<(), TlsError> {
        let Trust::TrustOnFirstUse(path) = &self.trust else { return Ok(()) };
        let mut unpinned = self.seen.lock();
        let Some(seen) = *unpinned else { return Ok(()) };
        if self.find(path)?.is_some() {
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
        // Only after the write: if it failed, a resumed session must try again.
        *unpinned = None;
        tracing::warn!(
            cloud = self.cloud, fingerprint = %seen, file = %path.display(),
            "first connection to the cloud; its certificate is now trusted",
        );
        Ok(())
    }

    /// Removes and returns the reason of the latest refusal.
    pub(super) fn take_refusal(&self) -> Option<String> {
        self.refusal.lock().take()
    }

    /// This cloud's entry in the file of known clouds: line number, from 1, and fingerprint.
    fn find(&self, path: &Path) -> Result<Option<(usize, Fingerprint)>, TlsError> {
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
        *self.refusal.lock() = None;
        let seen = Fingerprint::of(end_entity);
        self.check(seen).map_err(|refusal| {
            *self.refusal.lock() = Some(refusal);
            rustls::Error::from(rustls::CertificateError::ApplicationVerificationFailure)
        })?;
        *self.verified.lock() = Some(seen);
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // QUIC requires TLS 1.3 (RFC 9001 §4.2).
        Err(rustls::Error::General("TLS 1.2 is not supported".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // Without authentication the signature proves nothing, and the key of an existing cloud may be
        // too short for ring to verify.
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

/// The authorities in a PEM file.
pub(super) fn roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let broken = |reason: String| TlsError::Broken { path: path.into(), reason };
    let pem = fs::read(path).map_err(|error| TlsError::File { path: path.into(), error })?;
    let mut roots = RootCertStore::empty();
    for cert in CertificateDer::pem_slice_iter(&pem) {
        let cert = cert.map_err(|error| broken(error.to_string()))?;
        roots.add(cert).map_err(|error| broken(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(broken("no PEM certificate in it".into()));
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::{super::provider, *};

    #[test]
    fn the_first_certificate_is_pinned_only_after_the_handshake() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("known");
        let verifier = |cloud: &str| {
            CloudVerifier::new(Trust::TrustOnFirstUse(file.clone()), cloud.into(), provider())
        };
        let (one, two) = (Fingerprint([1; 32]), Fingerprint([2; 32]));

        let cloud = verifier("cloud:4242");
        cloud.check(one).unwrap();
        assert!(!file.exists());
        cloud.pin().unwrap();
        cloud.pin().unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), format!("cloud:4242 {one}\n"));
        cloud.check(one).unwrap();
        let refusal = cloud.check(two).unwrap_err();
        assert!(refusal.contains("has changed") && refusal.contains("remove line 1 of"));

        let other = verifier("other:4242");
        other.check(two).unwrap();
        other.pin().unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap().lines().count(), 2);

        fs::write(&file, "cloud:4242 zz\n").unwrap();
        assert!(cloud.check(one).unwrap_err().contains("line 1"));
    }
}
