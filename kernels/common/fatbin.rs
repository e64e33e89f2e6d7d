//! The kernels' device code as nvcc made it when this crate was built (`build/fatbin.rs`): embedded, one
//! fatbin a room, ready for `cuModuleLoadData`. Loading and launching are not this file's.
//!
//! A fatbin holds code for sm_80, which runs on all of 8.x, for sm_90, and PTX of compute_90, which
//! the driver compiles for anything newer.

/// One room's device code.
#[derive(Debug)]
pub struct Fatbin {
    /// The room: the folder of its `op.cu`.
    pub room: &'static str,
    /// Names of its kernels (`KERNEL` of `common/device.cuh`), sorted. No other room has them.
    pub kernels: &'static [&'static str],
    /// What `nvcc -fatbin` wrote.
    pub image: &'static [u8],
}

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

#[cfg(test)]
mod test {
    use super::*;
    use std::collections::BTreeSet;
    use std::path::Path;

    const PTX: u16 = 1;
    const ELF: u16 = 2;

    /// Kind and architecture of each image of a fatbin: a header of 16 bytes, then images with a
    /// header each (kind at 0, its size at 4, that of what follows at 8, architecture at 28).
    fn images(fatbin: &[u8]) -> Vec<(u16, u32)> {
        let at = |from: usize| -> [u8; 8] { fatbin[from..from + 8].try_into().unwrap() };
        let half = |from: usize| u16::from_le_bytes(at(from)[..2].try_into().unwrap());
        let word = |from: usize| u32::from_le_bytes(at(from)[..4].try_into().unwrap());
        assert_eq!(word(0), 0xBA55_ED50, "the magic number");
        let (mut from, mut found) = (16, Vec::new());
        while from < fatbin.len() {
            found.push((half(from), word(from + 28)));
            from += word(from + 4) as usize
                + usize::try_from(u64::from_le_bytes(at(from + 8))).unwrap();
        }
        assert_eq!(from, fatbin.len(), "ends with its last image");
        found.sort_unstable();
        found
    }

    #[test]
    fn every_room_has_code_for_ampere_and_hopper_and_ptx() {
        for fatbin in FATBINS {
            let expected = [(PTX, 90), (ELF, 80), (ELF, 90)];
            assert_eq!(images(fatbin.image), expected, "{}", fatbin.room);
        }
    }

    #[test]
    fn every_room_with_a_source_is_embedded_and_no_two_kernels_share_a_name() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let rooms = std::fs::read_dir(folder).unwrap().map(|room| room.unwrap().path());
        let rooms = rooms.filter(|room| room.join("op.cu").exists());
        let rooms: BTreeSet<_> = rooms.map(|room| room.file_name().unwrap().to_owned()).collect();
        let embedded: BTreeSet<_> = FATBINS.iter().map(|fatbin| fatbin.room.into()).collect();
        assert_eq!(rooms, embedded);
        let mut names = BTreeSet::new();
        for fatbin in FATBINS {
            assert!(!fatbin.kernels.is_empty(), "{} has no kernel", fatbin.room);
            for kernel in fatbin.kernels {
                assert!(names.insert(kernel), "{kernel} is in two rooms");
            }
        }
    }
}
