//! What this machine can do at most, for benches: how fast memory is read, and how fast the products of an
//! instruction set go when nothing else is to be done. Both work on the calling thread alone.

use crate::Isa;

/// Reads all bytes. The result means nothing; it keeps the reads.
pub fn read(bytes: &[u8]) -> u64 {
    let mut lanes = [0_u64; 16];
    for chunk in bytes.as_chunks::<8>().0.as_chunks::<16>().0 {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane ^= u64::from_ne_bytes(*word);
        }
    }
    lanes.iter().fold(0, |all, lane| all ^ lane)
}

/// Multiplies and adds in registers; returns how many multiplications and additions that were. The arithmetic is
/// what bf16 weights are multiplied with on that instruction set.
pub fn products(isa: Isa, turns: u64) -> u64 {
    let per_turn = match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: (of all) the caller runs kernels on this instruction set, which were found available.
        Isa::Avx2 if isa.available() => unsafe { x86::fused(turns) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512Fma if isa.available() => unsafe { x86::fused_wide(turns) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512 if isa.available() => unsafe { x86::paired(turns) },
        _ => plain(turns),
    };
    per_turn * turns
}

/// As [`products`], of the whole numbers that quantised rows and weights in 8 bits are.
pub fn whole_products(isa: Isa, turns: u64) -> u64 {
    let per_turn = match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: (of all) the caller runs kernels on this instruction set, which were found available.
        Isa::Avx2 if isa.available() => unsafe { x86::pairs(turns) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512Fma | Isa::Avx512 if isa.available() => unsafe { x86::bytes(turns) },
        _ => plain(turns),
    };
    per_turn * turns
}

fn plain(turns: u64) -> u64 {
    let mut sums = [1.0_f32; 32];
    let factor = std::hint::black_box(0.999_f32);
    for _ in 0..turns {
        for sum in &mut sums {
            *sum = *sum * factor + factor;
        }
        std::hint::black_box(&mut sums);
    }
    2 * 32
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// As many chains as keep two units busy that take four or five cycles.
    const CHAINS: usize = 12;

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn fused(turns: u64) -> u64 {
        let factor = _mm256_set1_ps(black_box(0.999));
        let mut sums = [_mm256_set1_ps(black_box(1.0)); CHAINS];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
        2 * 8 * CHAINS as u64
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn fused_wide(turns: u64) -> u64 {
        let factor = _mm512_set1_ps(black_box(0.999));
        let mut sums = [_mm512_set1_ps(black_box(1.0)); CHAINS];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
        2 * 16 * CHAINS as u64
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn pairs(turns: u64) -> u64 {
        let factor = _mm256_set1_epi16(black_box(3));
        let mut sums = [_mm256_set1_epi32(black_box(1)); CHAINS];
        for _ in 0..turns {
            for sum in &mut sums {
                // What is multiplied changes, or else it would be multiplied once.
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(*sum, factor));
            }
        }
        black_box(sums);
        4 * 8 * CHAINS as u64
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn bytes(turns: u64) -> u64 {
        let factor = _mm512_set1_epi32(black_box(0x0103_0201));
        let mut sums = [_mm512_set1_epi32(black_box(1)); CHAINS];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, factor, factor);
            }
        }
        black_box(sums);
        8 * 16 * CHAINS as u64
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn paired(turns: u64) -> u64 {
        // SAFETY: vectors of equal size are the same bits.
        let factor =
            unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(black_box(0x3f7f_3f7f))) };
        let mut sums = [_mm512_set1_ps(black_box(1.0)); CHAINS];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
        4 * 16 * CHAINS as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_whole_line_is_read() {
        let mut bytes = vec![0; 1280];
        assert_eq!(read(&bytes), 0);
        bytes[1279] = 1;
        assert_ne!(read(&bytes), 0);
    }

    #[test]
    fn products_are_counted_by_the_vectors_that_make_them() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            let per_turn = products(isa, 1);
            assert_eq!(products(isa, 10), 10 * per_turn);
            assert_eq!(per_turn, [64, 192, 384, 768][isa as usize]);
            let per_turn = whole_products(isa, 1);
            assert_eq!(whole_products(isa, 10), 10 * per_turn);
            assert_eq!(per_turn, [64, 384, 1536, 1536][isa as usize]);
        }
    }
}
