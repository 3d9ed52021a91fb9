//! Why a repair connection ended.

use quinn::{Connection, ConnectionError};
use tokio::time::timeout;

use super::CLOSE_TIMEOUT;
use crate::protocol::close;

/// Why a connection ended or could not be made. The text is for the log, and for the cloud where
/// the edge closes the connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum Disconnect {
    #[error("cannot resolve {0}: {1}")]
    Resolve(String, String),
    #[error("{0}")]
    Connect(String),
    /// The cloud's certificate is not trusted.
    #[error("{0}")]
    Certificate(String),
    #[error("cloud {0} does not speak the protocol that was asked for")]
    Protocol(String),
    /// The cloud refused this edge; `token` if because of its token.
    #[error("{message}")]
    Refused { token: bool, message: String },
    #[error("{0}")]
    Lost(String),
    #[error("{0}")]
    Timeout(&'static str),
    #[error("the cloud broke the protocol: {0}")]
    Malformed(String),
    /// The receiver of the events or the handle is gone.
    #[error("stopped")]
    Stopped,
}

impl Disconnect {
    /// Replaces the error of a lost stream by the reason with which the cloud closes the
    /// connection, if that arrives soon.
    pub(super) async fn explain(
        result: Result<(), Self>,
        connection: &Connection,
    ) -> Result<(), Self> {
        if matches!(result, Err(Self::Lost(_)))
            && let Ok(reason) = timeout(CLOSE_TIMEOUT, connection.closed()).await
        {
            return Err(reason.into());
        }
        result
    }
}

impl From<ConnectionError> for Disconnect {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) if close.error_code == close::REFUSED => {
                let message = String::from_utf8_lossy(&close.reason).into_owned();
                Self::Refused { token: false, message }
            }
            ConnectionError::ApplicationClosed(close) if !close.reason.is_empty() => {
                Self::Lost(String::from_utf8_lossy(&close.reason).into_owned())
            }
            error => Self::Lost(error.to_string()),
        }
    }
}

impl From<Stopped> for Disconnect {
    fn from(_: Stopped) -> Self {
        Self::Stopped
    }
}

/// The receiver of the events or the handle is gone.
pub(super) struct Stopped;
