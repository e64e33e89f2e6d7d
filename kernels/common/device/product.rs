//! Matrix products on a device: cuBLAS, accumulating in f32. On the host they are computed in f32 and
//! rounded once, as there.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor, bail};

#[cfg(feature = "cuda")]
use super::cuda;

/// Row-major matrices of one shape inside a tensor, one a group.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(super) tensor: &'a Tensor,
    /// Elements of the tensor before the first.
    pub(super) start: usize,
    /// Of one group, in memory.
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Elements from one row to the next, and from one group to the next.
    pub(super) row_stride: usize,
    pub(super) group_stride: usize,
    pub(super) transposed: bool,
}

impl<'a> Matrix<'a> {
    /// All of a `[rows, columns]` tensor.
    pub(crate) fn of(tensor: &'a Tensor) -> Result<Self> {
        Self::groups_of_rows(tensor, 1)
    }

    /// Each group has its own rows.
    pub(crate) fn groups_of_rows(tensor: &'a Tensor, groups: usize) -> Result<Self> {
        let (rows, columns) =
            (tensor.dim(0)? / groups, tensor.elem_count() / tensor.dim(0)?.max(1));
        let group_stride = rows * columns;
        let (start, row_stride) = (0, columns);
        Ok(Self { tensor, start, rows, columns, row_stride, group_stride, transposed: false })
    }

    /// Each group has its own columns.
    pub(crate) fn groups_of_columns(tensor: &'a Tensor, groups: usize) -> Result<Self> {
        let (rows, all) = tensor.dims2()?;
        let columns = all / groups;
        let (start, row_stride, group_stride) = (0, all, columns);
        Ok(Self { tensor, start, rows, columns, row_stride, group_stride, transposed: false })
    }

    /// Some columns of a `[rows, _]` tensor.
    pub(crate) fn columns(tensor: &'a Tensor, columns: Range<usize>) -> Result<Self> {
        let (rows, all) = tensor.dims2()?;
        if columns.end > all {
            bail!("columns {columns:?} of {:?}", tensor.dims());
        }
        let whole = Self::of(tensor)?;
        Ok(Self { start: columns.start, rows, columns: columns.len(), row_stride: all, ..whole })
    }

    /// The transpose, in the same memory.
    pub(crate) fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// Rows and columns as the product sees them.
    fn shape(self) -> (usize, usize) {
        if self.transposed { (self.columns, self.rows) } else { (self.rows, self.columns) }
    }
}

/// The sizes of a product `[m, k]·[k, n]`, of each of `groups`.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) groups: usize,
}

/// `to = a·b`, or `to += a·b`, for each group. `to` is not transposed; `a` and `b` hold one dtype, bf16
/// or f32, and `to` that or f32.
pub(crate) fn product(
    op: &'static str,
    [a, b, to]: [Matrix<'_>; 3],
    groups: usize,
    accumulate: bool,
) -> Result<()> {
    let ((m, k), (kb, n)) = (a.shape(), b.shape());
    if k != kb || to.shape() != (m, n) || to.transposed {
        bail!("{op}: a product of {:?} and {:?} is no {:?}", a.shape(), b.shape(), to.shape());
    }
    let dtype = a.tensor.dtype();
    let fits = b.tensor.dtype() == dtype && [dtype, DType::F32].contains(&to.tensor.dtype());
    if !fits || ![DType::F32, DType::BF16].contains(&dtype) {
        let dtypes = [a, b, to].map(|matrix| matrix.tensor.dtype());
        bail!("{op}: no product of {:?} and {:?} into {:?}", dtypes[0], dtypes[1], dtypes[2]);
    }
    if let Some(odd) = [a, b, to].into_iter().find(|matrix| !matrix.tensor.is_contiguous()) {
        bail!("{op}: a matrix {:?} that is not contiguous", odd.tensor.dims());
    }
    let sizes = Sizes { m, n, k, groups };
    match to.tensor.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::product(device, [a, b, to], sizes, accumulate),
        #[cfg(feature = "host-kernels")]
        Device::Cpu => on_the_host([a, b, to], sizes, accumulate),
        other => bail!("{op}: no products on {other:?}"),
    }
}

#[cfg(feature = "host-kernels")]
fn on_the_host([a, b, to]: [Matrix<'_>; 3], sizes: Sizes, accumulate: bool) -> Result<()> {
    let flat =
        |matrix: Matrix<'_>| matrix.tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let at = |matrix: Matrix<'_>, group: usize, row: usize, column: usize| {
        let (row, column) = if matrix.transposed { (column, row) } else { (row, column) };
        matrix.start + group * matrix.group_stride + row * matrix.row_stride + column
    };
    let (from_a, from_b, mut sums) = (flat(a)?, flat(b)?, flat(to)?);
    for group in 0..sizes.groups {
        for (i, j) in (0..sizes.m).flat_map(|i| (0..sizes.n).map(move |j| (i, j))) {
            let terms =
                (0..sizes.k).map(|p| from_a[at(a, group, i, p)] * from_b[at(b, group, p, j)]);
            let (sum, out) = (terms.sum::<f32>(), &mut sums[at(to, group, i, j)]);
            *out = if accumulate { *out + sum } else { sum };
        }
    }
    let sums = Tensor::from_vec(sums, to.tensor.dims(), &Device::Cpu)?;
    crate::common::host_run::overwrite(to.tensor, &sums.to_dtype(to.tensor.dtype())?)
}
