//! RTMP and HTTP-FLV over real sockets.

#[path = "../common/mod.rs"]
mod common;

mod http_client;
mod http_flv;
mod http_keep_alive;
mod http_viewers;
mod one_admission;
mod push_pull;
mod rtmp_claimed_lengths;
mod rtmp_descriptors;
mod rtmp_hostile;
mod rtmp_idle_connections;
mod rtmp_play;
mod rtmp_publish;
