//! What every listener shares: threads for connections.

pub mod shards;
