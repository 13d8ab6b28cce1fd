//! The checksum of a page's bytes.

/// XXH3, 64 bits: far faster than memory, and good against faults. Not against forgers, who are kept out by
/// other means.
pub fn checksum(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}
