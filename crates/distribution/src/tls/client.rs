//! The edge's side of TLS, with its session cache.

use std::sync::Arc;

use quinn::crypto::rustls::QuicClientConfig;
use rustls::{
    client::{ClientSessionMemoryCache, ClientSessionStore, Resumption, WebPkiServerVerifier},
    pki_types::ServerName,
};

use super::{
    TlsError, Trust, provider,
    trust::{CloudVerifier, roots},
};

/// An edge's TLS settings and sessions for one cloud.
#[derive(Clone)]
pub struct ClientTls {
    crypto: Arc<QuicClientConfig>,
    sessions: Arc<ClientSessionMemoryCache>,
    /// `None` with [`Trust::Ca`], where rustls verifies the certificate.
    verifier: Option<Arc<CloudVerifier>>,
}

impl ClientTls {
    /// Settings for `cloud`, a `host:port`. `protocols` are the ALPN names to offer.
    ///
    /// # Errors
    /// If the file of [`Trust::Ca`] cannot be read or has no certificate.
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
                let verifier = CloudVerifier::new(trust.clone(), cloud.to_owned(), provider);
                let verifier = Arc::new(verifier);
                let config = builder
                    .dangerous()
                    .with_custom_certificate_verifier(verifier.clone())
                    .with_no_client_auth();
                (config, Some(verifier))
            }
        };
        config.alpn_protocols = protocols.iter().map(|alpn| alpn.to_vec()).collect();
        // When the edge reconnects, its hello is in its first packet.
        config.enable_early_data = true;
        let sessions = Arc::new(ClientSessionMemoryCache::new(MAX_HOSTS));
        config.resumption = Resumption::store(sessions.clone());
        let crypto = QuicClientConfig::try_from(config)
            .map_err(|error| TlsError::Crypto(error.to_string()))?;
        Ok(Self { crypto: Arc::new(crypto), sessions, verifier })
    }

    /// Drops the sessions with `host` if their certificate would be refused today, since a resumed
    /// session presents no certificate. To be called before each connection.
    pub fn revalidate(&self, host: &str) {
        let Some(verifier) = &self.verifier else { return };
        if verifier.would_refuse()
            && let Ok(host) = ServerName::try_from(host.to_owned())
        {
            while self.sessions.take_tls13_ticket(&host).is_some() {}
        }
    }

    /// The argument of `quinn::ClientConfig::new`. Its connections share the session cache.
    pub fn crypto(&self) -> Arc<QuicClientConfig> {
        self.crypto.clone()
    }

    /// With [`Trust::TrustOnFirstUse`], pins the certificate of the latest handshake unless one is
    /// pinned. To be called after the handshake: only then has the cloud proven that it owns the
    /// certificate.
    ///
    /// # Errors
    /// If the file cannot be written. The connection should not be used then.
    pub fn pin(&self) -> Result<(), TlsError> {
        self.verifier.as_ref().map_or(Ok(()), |verifier| verifier.pin())
    }

    /// Removes and returns the reason for which the latest certificate was refused.
    pub fn take_refusal(&self) -> Option<String> {
        self.verifier.as_ref()?.take_refusal()
    }
}

/// Hosts in an edge's session cache.
const MAX_HOSTS: usize = 16;

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    #[test]
    fn an_authority_file_without_a_certificate_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ca.pem");
        let error = |file: &Path| {
            ClientTls::new(&Trust::Ca(file.into()), "c:1", &[b"x"]).err().unwrap().to_string()
        };
        assert!(error(&file).contains("ca.pem"));
        fs::write(&file, "").unwrap();
        assert!(error(&file).contains("no PEM certificate in it"));
    }
}
