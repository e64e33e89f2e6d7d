//! A sparse matrix by rows (CSR), and its product with a vector.

use rayon::prelude::*;

/// Rows of one task: enough work to be worth handing over.
const ROWS: usize = 256;

/// A sparse matrix.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Matrix {
    /// Where each row begins, and where the last ends.
    pub offsets: Vec<usize>,
    /// The column of each entry.
    pub columns: Vec<u32>,
    /// Its value.
    pub values: Vec<f32>,
}

impl Matrix {
    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.offsets.len() - 1
    }

    /// `X·v`, in f64. Every row is summed in its own order: threads change nothing.
    pub fn times(&self, v: &[f64]) -> Vec<f64> {
        (0..self.rows()).into_par_iter().with_min_len(ROWS).map(|row| self.dot(row, v)).collect()
    }

    fn dot(&self, row: usize, v: &[f64]) -> f64 {
        let range = self.offsets[row]..self.offsets[row + 1];
        let (columns, values) = (&self.columns[range.clone()], &self.values[range]);
        columns.iter().zip(values).map(|(column, x)| f64::from(*x) * v[*column as usize]).sum()
    }

    /// The transpose, of a matrix with `columns` columns.
    pub fn transposed(&self, columns: usize) -> Self {
        let mut offsets = vec![0; columns + 1];
        self.columns.iter().for_each(|column| offsets[*column as usize + 1] += 1);
        (0..columns).for_each(|column| offsets[column + 1] += offsets[column]);
        let mut next = offsets.clone();
        let mut transposed = Self {
            offsets,
            columns: vec![0; self.columns.len()],
            values: vec![0.0; self.values.len()],
        };
        for row in 0..self.rows() {
            for entry in self.offsets[row]..self.offsets[row + 1] {
                let at = &mut next[self.columns[entry] as usize];
                transposed.columns[*at] = row as u32;
                transposed.values[*at] = self.values[entry];
                *at += 1;
            }
        }
        transposed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_a_matrix_and_its_transpose() {
        // [[1, 0, 2], [0, 0, 0], [0, 3, 4]]
        let matrix = Matrix {
            offsets: vec![0, 2, 2, 4],
            columns: vec![0, 2, 1, 2],
            values: vec![1.0, 2.0, 3.0, 4.0],
        };
        assert_eq!(matrix.times(&[1.0, 10.0, 100.0]), [201.0, 0.0, 430.0]);
        let transposed = matrix.transposed(3);
        assert_eq!(transposed.times(&[1.0, 10.0, 100.0]), [1.0, 300.0, 402.0]);
        assert_eq!(transposed.transposed(3), matrix);
    }
}
