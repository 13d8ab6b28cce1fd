//! The checksum of a page's bytes: XXH3, 64 bits, at the speed of the processor's widest vectors.
//!
//! Far faster than memory, and good against faults. Not against forgers, who are kept out by other means. The
//! long form is written here after the published specification, because it has to be compiled for vectors that
//! only some processors have, and to be taken bit by bit while the bytes arrive and are in the cache; what is
//! short goes to the library. A test holds the two against each other.

use xxhash_rust::const_xxh3::const_custom_default_secret;
use xxhash_rust::xxh3::xxh3_64;

/// Bytes of one stripe: eight lanes of eight.
const STRIPE: usize = 64;
/// Bytes between two scrambles of the lanes.
const BLOCK: usize = 1024;
/// Longer inputs have the long form.
const SHORT_MAX: usize = 240;
static SECRET: [u8; 192] = const_custom_default_secret(0);
/// What the lanes are scrambled with.
const LAST_SECRET: &[u8] = SECRET.split_at(192 - STRIPE).1;

const PRIME32_1: u64 = 0x9E37_79B1;
const PRIME32_2: u64 = 0x85EB_CA77;
const PRIME32_3: u64 = 0xC2B2_AE3D;
const PRIME64_1: u64 = 0x9E37_79B1_85EB_CA87;
const PRIME64_2: u64 = 0xC2B2_AE3D_27D4_EB4F;
const PRIME64_3: u64 = 0x1656_67B1_9E37_79F9;
const PRIME64_4: u64 = 0x85EB_CA77_C2B2_AE63;
const PRIME64_5: u64 = 0x27D4_EB2F_1656_67C5;
const PRIME_MIX: u64 = 0x1656_6791_9E37_79F9;

type Lanes = [u64; 8];

/// The checksum of these bytes.
pub fn checksum(bytes: &[u8]) -> u64 {
    Sum::new(bytes.len()).finish(bytes)
}

/// A checksum that is taken while the bytes arrive, from the first to the last.
#[derive(Clone, Debug)]
pub(crate) struct Sum {
    lanes: Lanes,
    /// Bytes there will be.
    len: usize,
    /// Bytes that are in the lanes: whole blocks.
    done: usize,
}

impl Sum {
    /// Of so many bytes.
    pub(crate) fn new(len: usize) -> Sum {
        let lanes = [PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1];
        Sum { lanes, len, done: 0 }
    }

    /// Takes what is new of the bytes that are here: each call is given all of them, the earlier ones unchanged.
    pub(crate) fn advance(&mut self, here: &[u8]) {
        // The last block is scrambled only if something follows it.
        let blocks = here.len().min(self.len.saturating_sub(1)) / BLOCK * BLOCK;
        if self.len > SHORT_MAX && blocks > self.done {
            take_blocks(&mut self.lanes, &here[self.done..blocks]);
            self.done = blocks;
        }
    }

    /// The checksum, when all bytes are here.
    pub(crate) fn finish(mut self, bytes: &[u8]) -> u64 {
        assert_eq!(bytes.len(), self.len, "the checksum of so many bytes");
        if self.len <= SHORT_MAX {
            return xxh3_64(bytes);
        }
        self.advance(bytes);
        let rest = &bytes[self.done..self.len - 1];
        for (i, stripe) in rest.chunks_exact(STRIPE).enumerate() {
            accumulate(&mut self.lanes, stripe, &SECRET[i * 8..]);
        }
        accumulate(&mut self.lanes, &bytes[self.len - STRIPE..], &SECRET[SECRET.len() - STRIPE - 7..]);
        merge(&self.lanes, self.len)
    }
}

fn take_blocks(lanes: &mut Lanes, blocks: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: this processor has it.
            return unsafe { x86::take_blocks_avx512(lanes, blocks) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: this processor has it.
            return unsafe { x86::take_blocks_avx2(lanes, blocks) };
        }
    }
    take_blocks_plain(lanes, blocks);
}

fn take_blocks_plain(lanes: &mut Lanes, blocks: &[u8]) {
    for block in blocks.chunks_exact(BLOCK) {
        for (i, stripe) in block.chunks_exact(STRIPE).enumerate() {
            accumulate(lanes, stripe, &SECRET[i * 8..]);
        }
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane = (*lane ^ (*lane >> 47) ^ word(LAST_SECRET, i)).wrapping_mul(PRIME32_1);
        }
    }
}

fn accumulate(lanes: &mut Lanes, stripe: &[u8], secret: &[u8]) {
    for i in 0..8 {
        let key = word(stripe, i) ^ word(secret, i);
        lanes[i] = lanes[i].wrapping_add((key & 0xFFFF_FFFF).wrapping_mul(key >> 32));
        lanes[i ^ 1] = lanes[i ^ 1].wrapping_add(word(stripe, i));
    }
}

/// `take_blocks_plain` with all eight lanes, or four and four, in one register. Left to itself the compiler
/// stays four times slower.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BLOCK, LAST_SECRET, Lanes, PRIME32_1, SECRET, STRIPE};

    #[target_feature(enable = "avx512f")]
    pub(super) fn take_blocks_avx512(lanes: &mut Lanes, blocks: &[u8]) {
        // SAFETY: eight words are 64 bytes.
        let mut sums = unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) };
        // SAFETY: the slice has 64 bytes.
        let last = unsafe { _mm512_loadu_si512(LAST_SECRET.as_ptr().cast()) };
        let prime = _mm512_set1_epi64(PRIME32_1 as i64);
        for block in blocks.chunks_exact(BLOCK) {
            for i in 0..BLOCK / STRIPE {
                // SAFETY: stripe `i` is inside the block, and its 64 bytes of the secret begin at most at byte 120.
                let (data, secret) = unsafe {
                    let data = block.as_ptr().add(i * STRIPE);
                    (_mm512_loadu_si512(data.cast()), _mm512_loadu_si512(SECRET.as_ptr().add(i * 8).cast()))
                };
                let key = _mm512_xor_si512(data, secret);
                let product = _mm512_mul_epu32(key, _mm512_srli_epi64::<32>(key));
                let swapped = _mm512_shuffle_epi32::<0b01_00_11_10>(data);
                sums = _mm512_add_epi64(sums, _mm512_add_epi64(product, swapped));
            }
            let mixed = _mm512_xor_si512(_mm512_xor_si512(sums, _mm512_srli_epi64::<47>(sums)), last);
            let high = _mm512_mul_epu32(_mm512_srli_epi64::<32>(mixed), prime);
            sums = _mm512_add_epi64(_mm512_mul_epu32(mixed, prime), _mm512_slli_epi64::<32>(high));
        }
        // SAFETY: eight words are 64 bytes.
        unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), sums) };
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn take_blocks_avx2(lanes: &mut Lanes, blocks: &[u8]) {
        let prime = _mm256_set1_epi64x(PRIME32_1 as i64);
        let at = |bytes: *const u8, half: usize| {
            // SAFETY: all that is asked for has 64 bytes, of which this is one half.
            unsafe { _mm256_loadu_si256(bytes.add(half * 32).cast()) }
        };
        let mut sums = [0, 1].map(|half| at(lanes.as_ptr().cast(), half));
        for block in blocks.chunks_exact(BLOCK) {
            for i in 0..BLOCK / STRIPE {
                for (half, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: stripe `i` is inside the block, and its 64 bytes of the secret begin at most at byte 120.
                    let (data, secret) =
                        unsafe { (block.as_ptr().add(i * STRIPE), SECRET.as_ptr().add(i * 8)) };
                    let data = at(data, half);
                    let key = _mm256_xor_si256(data, at(secret, half));
                    let product = _mm256_mul_epu32(key, _mm256_srli_epi64::<32>(key));
                    let swapped = _mm256_shuffle_epi32::<0b01_00_11_10>(data);
                    *sum = _mm256_add_epi64(*sum, _mm256_add_epi64(product, swapped));
                }
            }
            for (half, sum) in sums.iter_mut().enumerate() {
                let shifted = _mm256_srli_epi64::<47>(*sum);
                let mixed = _mm256_xor_si256(_mm256_xor_si256(*sum, shifted), at(LAST_SECRET.as_ptr(), half));
                let high = _mm256_mul_epu32(_mm256_srli_epi64::<32>(mixed), prime);
                *sum = _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64::<32>(high));
            }
        }
        for (half, sum) in sums.into_iter().enumerate() {
            // SAFETY: eight words are two halves of 32 bytes.
            unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast::<u8>().add(half * 32).cast(), sum) };
        }
    }
}

fn word(bytes: &[u8], i: usize) -> u64 {
    u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().expect("eight bytes"))
}

fn merge(lanes: &Lanes, len: usize) -> u64 {
    let secret = &SECRET[11..];
    let folded = (0..4).map(|i| {
        let (a, b) = (lanes[2 * i] ^ word(secret, 2 * i), lanes[2 * i + 1] ^ word(secret, 2 * i + 1));
        let product = u128::from(a) * u128::from(b);
        product as u64 ^ (product >> 64) as u64
    });
    let mixed = folded.fold((len as u64).wrapping_mul(PRIME64_1), u64::wrapping_add);
    let mixed = (mixed ^ (mixed >> 37)).wrapping_mul(PRIME_MIX);
    mixed ^ (mixed >> 32)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(len: usize) -> Vec<u8> {
        (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect()
    }

    #[test]
    fn it_is_the_library_s_at_every_length() {
        let all = bytes(10_000);
        for len in (0..3000).chain([4096, 4097, 8191, 8192, 10_000]) {
            assert_eq!(checksum(&all[..len]), xxh3_64(&all[..len]), "{len} bytes");
        }
    }

    #[test]
    fn every_width_gives_the_same() {
        let all = bytes(64 * BLOCK);
        let mut plain = Sum::new(0).lanes;
        take_blocks_plain(&mut plain, &all);
        let mut chosen = Sum::new(0).lanes;
        take_blocks(&mut chosen, &all);
        assert_eq!(chosen, plain);
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            let mut wide = Sum::new(0).lanes;
            // SAFETY: this processor has it.
            unsafe { x86::take_blocks_avx2(&mut wide, &all) };
            assert_eq!(wide, plain);
        } else {
            eprintln!("SKIPPED: this processor has no AVX2");
        }
    }

    #[test]
    fn one_bit_makes_another_sum() {
        let good = bytes(5000);
        for at in [0, 63, 64, 1023, 1024, 4095, 4999] {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            assert_ne!(checksum(&bad), checksum(&good), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn it_does_not_matter_in_which_pieces_the_bytes_arrive(
            len in 0usize..9000,
            mut cuts in prop::collection::vec(0usize..9000, 0..20),
        ) {
            let all = bytes(len);
            cuts.sort_unstable();
            let mut sum = Sum::new(len);
            for cut in cuts {
                sum.advance(&all[..cut.min(len)]);
            }
            prop_assert_eq!(sum.finish(&all), xxh3_64(&all));
        }
    }
}
