//! Whether a node can do its work, for `/readyz`.

use downpour_distribution::upstream::link_state::LinkState;
use tokio_util::sync::CancellationToken;

/// What a node needs beside itself. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    /// The connection to the node above; `None` on a node without an upstream.
    pub upstream: Option<LinkState>,
    /// Cancelled when the node begins to shut down.
    pub draining: CancellationToken,
}

impl Readiness {
    /// Returns why the node cannot do its work now, one reason each; empty if it can.
    pub fn reasons(&self) -> Vec<String> {
        let draining = self.draining.is_cancelled().then(|| "the node is shutting down".to_owned());
        let upstream = self.upstream.as_ref().map(LinkState::reasons).unwrap_or_default();
        draining.into_iter().chain(upstream).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_shuts_down_is_not_ready() {
        let readiness = Readiness::default();
        assert_eq!(readiness.reasons(), [""; 0]);
        readiness.draining.cancel();
        assert_eq!(readiness.clone().reasons(), ["the node is shutting down"]);
    }
}
