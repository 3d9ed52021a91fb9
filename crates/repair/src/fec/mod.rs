//! Forward error correction: parity packets from which an edge recovers lost packets without a
//! request. XOR parity in the format of RFC 8627 ([`crate::rtp::flexfec`]).
//!
//! For paths without a return channel, and for round trips longer than the latency budget.

pub mod adaptation;
pub mod decoder;
pub mod encoder;
pub mod matrix_selector;

pub use decoder::Decoder;
pub use encoder::Encoder;
pub use matrix_selector::MatrixSelector;

use std::fmt;

use serde::Serialize;

/// The parity sent to a receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fec {
    /// No parity.
    #[default]
    Off,
    /// Adapted to the receiver's reports; a fixed matrix by stream rate while there are none.
    Auto,
    /// Always this matrix.
    Fixed(Matrix),
}

/// Offset from the RTP port to the parity port, for multicast groups and listed addresses. Receivers
/// that do not know parity never see it. As in SMPTE ST 2022-1 for columns.
pub const PARITY_PORT_OFFSET: u16 = 2;

/// The packets that each parity packet protects, in the terms of SMPTE ST 2022-1: packets fill a
/// block of L columns and D rows, row by row.
///
/// Row parity covers the L consecutive packets of a row and recovers one lost packet per row. It is
/// sent directly after the row. Column parity covers the D packets of a column, L packets apart, so
/// that all columns together recover a burst of L packets. It is sent during the next block, so that
/// one burst cannot hit a block and its parity. With both (2-D), each recovered packet may complete
/// another row or column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Matrix {
    columns: u8,
    rows: u8,
    row_parity: bool,
}

impl Matrix {
    /// The most columns, and the most rows.
    pub const SIDE_LIMIT: u8 = 32;

    /// The most packets in a block. A decoder's window holds two blocks.
    pub const AREA_LIMIT: usize = 400;

    /// Creates a matrix with row parity, and with column parity if there is more than one row.
    ///
    /// # Errors
    /// If a side is not in 1..=[`Self::SIDE_LIMIT`], or the block exceeds [`Self::AREA_LIMIT`].
    pub const fn new(columns: u8, rows: u8) -> Result<Self, MatrixError> {
        Self { columns, rows, row_parity: true }.checked()
    }

    /// Creates a matrix with column parity only: less overhead, for paths that lose only in bursts.
    ///
    /// # Errors
    /// As [`Self::new`], and if there is only one row.
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

    /// Returns L, the packets per row.
    pub const fn columns(self) -> usize {
        self.columns as usize
    }

    /// Returns D, the packets per column.
    pub const fn rows(self) -> usize {
        self.rows as usize
    }

    /// Returns the packets per block.
    pub const fn area(self) -> usize {
        self.columns() * self.rows()
    }

    /// `true` if rows have parity.
    pub const fn has_row_parity(self) -> bool {
        self.row_parity
    }

    /// `true` if columns have parity.
    pub const fn has_column_parity(self) -> bool {
        self.rows > 1
    }

    /// Returns the most media packets sent between a packet and its last parity packet: a row, or two
    /// blocks with column parity.
    pub const fn delay(self) -> usize {
        if self.has_column_parity() { 2 * self.area() } else { self.columns() }
    }

    /// Returns the number of parity packets per media packet.
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

/// Error of creating a [`Matrix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// Columns or rows are out of range.
    #[error("columns and rows must be 1 to {}", Matrix::SIDE_LIMIT)]
    Side,
    /// The block is too large.
    #[error("columns times rows must be at most {}", Matrix::AREA_LIMIT)]
    Area,
    /// Column parity with only one row.
    #[error("column parity needs at least two rows")]
    OneRow,
}

#[cfg(test)]
mod tests;
