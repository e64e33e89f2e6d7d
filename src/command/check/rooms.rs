//! Every op of `allreel_kernels` against its CPU implementation in f64: small sizes that divide nothing, then
//! those of DeBERTa-v3-base on reviews.

use allreel_kernels::common::check::{Checker, Finding, ROOMS, Room, Sizes};
use candle_core::DType;

use crate::{Error, Result, device::Placement};

/// The op called `filter`, or all.
///
/// # Errors
/// `User` if there is no such op.
pub(super) fn selected(filter: Option<&str>) -> Result<Vec<Room>> {
    let Some(filter) = filter else { return Ok(ROOMS.into()) };
    match ROOMS.into_iter().find(|room| room.name == filter) {
        Some(room) => Ok(vec![room]),
        None => Err(Error::User(format!(
            "--filter {filter}: there is no such op; use one of {}",
            ROOMS.map(|room| room.name).join(", ")
        ))),
    }
}

/// All comparisons of `rooms`. Vectors and gradients are f32 on every device, so a device that stores bf16
/// is checked in both.
pub(super) fn check(
    placement: &Placement,
    rooms: &[Room],
    quick: bool,
    say: impl Fn(&str),
) -> Vec<Finding> {
    let stored = match placement.dtype {
        DType::F32 => vec![DType::F32],
        dtype => vec![DType::F32, dtype],
    };
    let mut checker = Checker::new(placement.device.clone(), stored);
    let sizes = if quick { &[Sizes::Odd][..] } else { &[Sizes::Odd, Sizes::Real][..] };
    let mut findings = Vec::new();
    for room in rooms {
        say(room.name);
        for sizes in sizes {
            findings.extend(checker.run(*room, *sizes));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_op_that_there_is_not_is_named_with_those_that_there_are() {
        let error = selected(Some("atention")).err().expect("refused");
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(text.contains("--filter atention") && text.contains("attention, dis"), "{text}");
        assert_eq!(selected(Some("norm")).expect("an op").len(), 1);
        assert_eq!(selected(None).expect("all").len(), ROOMS.len());
    }
}
