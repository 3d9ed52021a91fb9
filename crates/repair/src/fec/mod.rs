//! Forward error correction: parity packets from which an edge makes lost packets anew without
//! asking for them. XOR parity in the format of RFC 8627 ([`crate::rtp::flexfec`]).
//!
//! For paths with no way back, and for those whose round trip is longer than the time there is.

pub mod adapt;
pub mod adaptation;
pub mod decoder;
pub mod encoder;

pub use adapt::Adapt;
pub use decoder::Decoder;
pub use encoder::Encoder;

use std::fmt;

use serde::Serialize;

/// What parity a receiver is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fec {
    /// None.
    #[default]
    Off,
    /// As much as reports call for, or what a path without a way back is given.
    Auto,
    /// Always this.
    Fixed(Matrix),
}

/// Where RTP goes to a group or to an address of the cloud's list, parity goes so many ports higher,
/// as SMPTE ST 2022-1 has it for columns: who does not know of it, and listens on another port, sees none.
pub const PARITY_PORT_OFFSET: u16 = 2;

/// How packets are put together for parity, in the terms of SMPTE ST 2022-1: packets are written
/// into a block of L columns and D rows, row by row.
///
/// Row parity is over the L successive packets of a row and repairs one lost packet in each. It is
/// sent right behind the row. Column parity is over the D packets of a column, L packets apart, so
/// that all columns together repair a burst of L packets; it is sent during the next block, so that
/// one burst does not take block and parity. With both (2-D), what one repairs helps the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Matrix {
    columns: u8,
    rows: u8,
    row_parity: bool,
}

impl Matrix {
    /// The most columns, and the most rows.
    pub const SIDE_LIMIT: u8 = 32;

    /// The most packets in a block: a decoder's window holds two.
    pub const AREA_LIMIT: usize = 400;

    /// Row parity, and column parity too if there is more than one row.
    ///
    /// # Errors
    /// If a side is not 1..=[`Self::SIDE_LIMIT`], or the block is over [`Self::AREA_LIMIT`].
    pub const fn new(columns: u8, rows: u8) -> Result<Self, MatrixError> {
        Self { columns, rows, row_parity: true }.checked()
    }

    /// Column parity alone: half a 2-D matrix's overhead, for paths that lose in bursts only.
    ///
    /// # Errors
    /// As [`Self::new`]; besides, if there is but one row.
    pub const fn columns_only(columns: u8, rows: u8) -> Result<Self, MatrixError> {
        if rows < 2 {
            return Err(MatrixError::OneRow);
        }
        Self { columns, rows, row_parity: false }.checked()
    }

    const fn checked(self) -> Result<Self, MatrixError> {
        let Self { columns, rows, .. } = self;
        if columns == 0 || columns > Self::SIDE_LIMIT || rows == 0 || rows > Self::SIDE_LIMIT {
            Err(MatrixError::Side)
        } else if self.area() > Self::AREA_LIMIT {
            Err(MatrixError::Area)
        } else {
            Ok(self)
        }
    }

    /// L: packets in a row.
    pub const fn columns(self) -> usize {
        self.columns as usize
    }

    /// D: packets in a column.
    pub const fn rows(self) -> usize {
        self.rows as usize
    }

    /// Packets in a block.
    pub const fn area(self) -> usize {
        self.columns() * self.rows()
    }

    /// Whether rows have parity.
    pub const fn has_row_parity(self) -> bool {
        self.row_parity
    }

    /// Whether columns have parity.
    pub const fn has_column_parity(self) -> bool {
        self.rows > 1
    }

    /// The most media packets that are sent between a packet and the last parity of it: a row, or a
    /// block and the next one.
    pub const fn delay(self) -> usize {
        if self.has_column_parity() { 2 * self.area() } else { self.columns() }
    }

    /// Parity packets a media packet.
    pub fn overhead(self) -> f64 {
        let rows = if self.has_row_parity() { 1.0 / f64::from(self.columns) } else { 0.0 };
        let columns = if self.has_column_parity() { 1.0 / f64::from(self.rows) } else { 0.0 };
        rows + columns
    }
}

impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}×{}", self.columns, self.rows)
    }
}

/// Why there is no such matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// Too few or too many columns or rows.
    #[error("columns and rows are 1 to {}", Matrix::SIDE_LIMIT)]
    Side,
    /// Too large.
    #[error("columns times rows is at most {}", Matrix::AREA_LIMIT)]
    Area,
    /// Column parity over one row.
    #[error("column parity needs at least two rows")]
    OneRow,
}

#[cfg(test)]
mod tests;
