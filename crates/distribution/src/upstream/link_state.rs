//! Whether streams can arrive from the node above, for its readiness check.

use std::sync::Arc;

use parking_lot::Mutex;

/// State of the connection to the cloud and of the RTP sockets. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct LinkState(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// `true` if the connection is made only when a packet is missing: its absence means nothing.
    is_lazy: bool,
    /// Why there is no connection; `None` while there is one, or none is wanted.
    disconnected: Option<String>,
    /// Indices of RTP sockets that are broken.
    broken: Vec<usize>,
}

impl LinkState {
    /// The state of an upstream that connects only when a packet is missing, as to a v0 cloud.
    pub fn lazy() -> Self {
        Self(Arc::new(Mutex::new(State { is_lazy: true, ..State::default() })))
    }

    /// Returns why streams cannot arrive, one reason each; empty if they can.
    pub fn reasons(&self) -> Vec<String> {
        let state = self.0.lock();
        let broken = state.broken.iter().map(|i| format!("RTP socket {i} is broken"));
        state.disconnected.clone().into_iter().chain(broken).collect()
    }

    pub(super) fn connected(&self) {
        self.0.lock().disconnected = None;
    }

    pub(super) fn disconnected(&self, reason: String) {
        let mut state = self.0.lock();
        if !state.is_lazy {
            state.disconnected = Some(reason);
        }
    }

    pub(super) fn socket_broken(&self, i: usize) {
        self.0.lock().broken.push(i);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_those_that_hold_now() {
        let link = LinkState::default();
        assert_eq!(link.reasons(), [""; 0]);
        link.disconnected("no connection".into());
        link.socket_broken(1);
        assert_eq!(link.clone().reasons(), ["no connection", "RTP socket 1 is broken"]);
        link.connected();
        assert_eq!(link.reasons(), ["RTP socket 1 is broken"]);
        let lazy = LinkState::lazy();
        lazy.disconnected("no connection".into());
        assert_eq!(lazy.reasons(), [""; 0]);
    }
}
