//! Extended (FourCC) headers of Enhanced RTMP v1 and v2, and the records that configure decoders.

use super::TagKind;
use crate::input::take_chunk;

/// An extended audio or video header, after any `ModEx` prefixes.
pub(super) struct ExHeader<'a> {
    /// The packet type; in a multitrack packet, that of its tracks.
    pub(super) packet_type: u8,
    /// `AvMultitrackType` of a multitrack packet.
    multitrack: Option<u8>,
    /// From the FourCC on.
    rest: &'a [u8],
}

/// One track's share of a packet.
pub(super) struct ExTrack<'a> {
    /// The track's id; `None` outside a multitrack packet.
    pub(super) id: Option<u8>,
    four_cc: [u8; 4],
    pub(super) body: &'a [u8],
}

impl<'a> ExHeader<'a> {
    /// Parses the body of a tag whose first byte marks an extended header. Returns `None` if the
    /// header is truncated.
    pub(super) fn parse(kind: TagKind, body: &'a [u8]) -> Option<Self> {
        let (first, mut rest) = body.split_first()?;
        let mut packet_type = first & 0x0f;
        while packet_type == MOD_EX {
            let (size, tail) = rest.split_first()?;
            let (size, tail) = match size {
                // Sizes from 256 on follow in two more bytes.
                255 => {
                    let (size, tail) = tail.split_first_chunk()?;
                    (usize::from(u16::from_be_bytes(*size)) + 1, tail)
                }
                size => (usize::from(*size) + 1, tail),
            };
            let (next, tail) = tail.get(size..)?.split_first()?;
            packet_type = next & 0x0f;
            rest = tail;
        }
        let multitrack = match kind {
            TagKind::Audio => AUDIO_MULTITRACK,
            _ => VIDEO_MULTITRACK,
        };
        if packet_type != multitrack {
            return Some(Self { packet_type, multitrack: None, rest });
        }
        let (tracks, rest) = rest.split_first()?;
        Some(Self { packet_type: tracks & 0x0f, multitrack: Some(tracks >> 4), rest })
    }

    /// The tracks of the packet. Ends early where the packet is truncated.
    pub(super) fn tracks(&self) -> impl Iterator<Item = ExTrack<'a>> + use<'a> {
        let mut rest = self.rest;
        let multitrack = self.multitrack;
        // All tracks share the codec, unless each one names its own.
        let mut shared = None;
        let mut done = false;
        std::iter::from_fn(move || {
            if done || rest.is_empty() {
                return None;
            }
            let four_cc = match shared {
                Some(four_cc) => four_cc,
                None => take_chunk::<4>(&mut rest)?,
            };
            if multitrack != Some(MANY_TRACKS_MANY_CODECS) {
                shared = Some(four_cc);
            }
            let Some(multitrack) = multitrack else {
                done = true;
                return Some(ExTrack { id: None, four_cc, body: rest });
            };
            let [id] = take_chunk(&mut rest)?;
            let body = match multitrack {
                ONE_TRACK => std::mem::take(&mut rest),
                _ => {
                    let [s0, s1, s2] = take_chunk(&mut rest)?;
                    let size = u32::from_be_bytes([0, s0, s1, s2]) as usize;
                    rest.split_off(..size)?
                }
            };
            Some(ExTrack { id: Some(id), four_cc, body })
        })
    }
}

impl ExTrack<'_> {
    /// `true` if the body can be the codec's configuration. Formats that are not known here count as
    /// sound.
    pub(super) fn is_sound_config(&self) -> bool {
        match &self.four_cc {
            b"avc1" => is_sound_avc(self.body),
            b"hvc1" | b"hev1" => is_sound_hevc(self.body),
            b"mp4a" => is_sound_aac(self.body),
            // Marker bit and version 1.
            b"av01" => self.body.len() >= 4 && self.body.starts_with(&[0x81]),
            _ => true,
        }
    }
}

/// `true` if `record` can be an `AVCDecoderConfigurationRecord` (ISO/IEC 14496-15 §5.3.3.1).
pub(super) fn is_sound_avc(record: &[u8]) -> bool {
    let sets = |mut rest, count: u8| {
        for _ in 0..count {
            take_sized(&mut rest).filter(|set| set.len() > 1)?;
        }
        Some(rest)
    };
    let parse = || {
        let (head, rest) = record.split_first_chunk::<6>()?;
        let sequence_sets = head[5] & 0x1f;
        let rest = sets(rest, sequence_sets).filter(|_| head[0] == 1 && sequence_sets > 0)?;
        let (picture_sets, rest) = rest.split_first()?;
        sets(rest, *picture_sets)
    };
    parse().is_some()
}

/// `true` if `record` can be an `HEVCDecoderConfigurationRecord` (ISO/IEC 14496-15 §8.3.3.1).
pub(super) fn is_sound_hevc(record: &[u8]) -> bool {
    let parse = || {
        let (head, mut rest) = record.split_first_chunk::<23>()?;
        for _ in 0..head[22] {
            let [_, n0, n1] = take_chunk(&mut rest)?;
            for _ in 0..u16::from_be_bytes([n0, n1]) {
                take_sized(&mut rest)?;
            }
        }
        // Early writers left the version at 0.
        (head[0] <= 1 && head[22] > 0).then_some(())
    };
    parse().is_some()
}

/// `true` if `config` can be an `AudioSpecificConfig` (ISO/IEC 14496-3 §1.6.2.1).
pub(super) fn is_sound_aac(config: &[u8]) -> bool {
    let Some(&[first, second]) = config.first_chunk::<2>() else { return false };
    let frequency = (first & 0x7) << 1 | second >> 7;
    first >> 3 != 0 && !matches!(frequency, 13 | 14)
}

/// Takes a u16 and that many bytes.
fn take_sized<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let size = usize::from(u16::from_be_bytes(take_chunk(bytes)?));
    bytes.split_off(..size)
}

pub(super) const SEQUENCE_START: u8 = 0;
pub(super) const CODED_FRAMES: u8 = 1;
pub(super) const CODED_FRAMES_X: u8 = 3;
/// Of video: `Metadata`, as colour information. Of audio: `MultichannelConfig`.
pub(super) const METADATA: u8 = 4;
/// Of video only: an AV1 video descriptor.
pub(super) const MPEG2TS_SEQUENCE_START: u8 = 5;
const AUDIO_MULTITRACK: u8 = 5;
const VIDEO_MULTITRACK: u8 = 6;
const MOD_EX: u8 = 7;
/// `AvMultitrackType`.
const ONE_TRACK: u8 = 0;
const MANY_TRACKS_MANY_CODECS: u8 = 2;
