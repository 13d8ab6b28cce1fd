//! Names of blocks: a chain of hashes, so that a block's name stands for everything before it too.
//!
//! BLAKE3 truncated to 128 bits; the seed separates what must never be shared: other weights or KV types,
//! other numerics where that is wanted, other tenants, other adapters.

use tandem_types::{BLOCK_TOKENS, BlockHash, KvIdentity, TokenId};

const BLOCK: usize = BLOCK_TOKENS as usize;

/// Where a chain starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChainSeed([u8; 16]);

/// The seed for KV of this identity. `strict` puts the numerics class into it, `salt` is the tenant's.
pub fn chain_seed(identity: &KvIdentity, strict: bool, salt: &[u8], adapter: &str) -> ChainSeed {
    let mut hasher = blake3::Hasher::new();
    let numerics = if strict { identity.numerics.as_bytes() } else { b"" };
    for part in [identity.digest.as_bytes(), numerics, salt, adapter.as_bytes()] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    ChainSeed(truncated(hasher.finalize()))
}

fn truncated(hash: blake3::Hash) -> [u8; 16] {
    hash.as_bytes()[..16].try_into().expect("a hash has 32 bytes")
}

/// The hashes of a sequence's full blocks, as its tokens become known.
#[derive(Clone, Debug)]
pub struct HashChain {
    last: [u8; 16],
    hashes: Vec<BlockHash>,
    open: Vec<TokenId>,
}

impl HashChain {
    /// An empty chain.
    pub fn new(seed: ChainSeed) -> HashChain {
        HashChain { last: seed.0, hashes: Vec::new(), open: Vec::with_capacity(BLOCK) }
    }

    /// Appends tokens; every block they fill gets its hash.
    pub fn extend(&mut self, tokens: &[TokenId]) {
        let mut rest = tokens;
        if !self.open.is_empty() {
            let (first, others) = rest.split_at(rest.len().min(BLOCK - self.open.len()));
            self.open.extend_from_slice(first);
            rest = others;
            if let Ok(block) = <&[TokenId; BLOCK]>::try_from(&self.open[..]) {
                let block = *block;
                self.close(&block);
                self.open.clear();
            }
        }
        let (blocks, rest) = rest.as_chunks::<BLOCK>();
        self.hashes.reserve(blocks.len());
        for block in blocks {
            self.close(block);
        }
        self.open.extend_from_slice(rest);
    }

    fn close(&mut self, block: &[TokenId; BLOCK]) {
        let mut input = [0; 16 + 4 * BLOCK];
        let (before, tokens) = input.split_at_mut(16);
        before.copy_from_slice(&self.last);
        for (bytes, token) in tokens.chunks_exact_mut(4).zip(block) {
            bytes.copy_from_slice(&token.to_le_bytes());
        }
        // All at once: a hasher that takes input bit by bit has more to do than one that hashes so little.
        self.last = truncated(blake3::hash(&input));
        self.hashes.push(BlockHash(u128::from_be_bytes(self.last)));
    }

    /// Hashes of the full blocks, in order.
    pub fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(seed: ChainSeed, tokens: &[TokenId]) -> Vec<BlockHash> {
        let mut chain = HashChain::new(seed);
        chain.extend(tokens);
        chain.hashes().to_vec()
    }

    fn seed(digest: &str, numerics: &str, strict: bool, salt: &[u8]) -> ChainSeed {
        chain_seed(&KvIdentity { digest: digest.into(), numerics: numerics.into() }, strict, salt, "")
    }

    #[test]
    fn a_hash_stands_for_everything_before_it_and_nothing_after() {
        let seed = seed("w", "cpu", true, b"");
        let tokens: Vec<TokenId> = (0..100).collect();
        let whole = hashes(seed, &tokens);
        assert_eq!(whole.len(), 3, "the open block has none");
        assert_eq!(hashes(seed, &tokens[..64]), whole[..2]);
        let mut other = tokens.clone();
        other[0] = 7;
        assert!(hashes(seed, &other).iter().zip(&whole).all(|(a, b)| a != b));
    }

    #[test]
    fn hashes_do_not_depend_on_how_tokens_arrive() {
        let seed = seed("w", "cpu", true, b"");
        let tokens: Vec<TokenId> = (0..97).collect();
        let mut chain = HashChain::new(seed);
        for chunk in tokens.chunks(5) {
            chain.extend(chunk);
        }
        assert_eq!(chain.hashes(), hashes(seed, &tokens));
    }

    #[test]
    fn a_block_is_named_by_the_name_before_it_and_its_tokens() {
        // Routers and workers of different versions must agree on this.
        let seed = seed("w", "cpu", true, b"");
        let tokens: Vec<TokenId> = (1000..1064).collect();
        let mut before = seed.0;
        for (block, name) in tokens.chunks(BLOCK).zip(hashes(seed, &tokens)) {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&before);
            for token in block {
                hasher.update(&token.to_le_bytes());
            }
            before.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
            assert_eq!(name, BlockHash(u128::from_be_bytes(before)));
        }
    }

    #[test]
    fn weights_tenants_and_strict_numerics_have_chains_of_their_own() {
        let tokens: Vec<TokenId> = (0..32).collect();
        let first = |seed| hashes(seed, &tokens)[0];
        let base = first(seed("w", "cpu", true, b""));
        assert_ne!(base, first(seed("v", "cpu", true, b"")));
        assert_ne!(base, first(seed("w", "gpu", true, b"")));
        assert_ne!(base, first(seed("w", "cpu", true, b"tenant")));
        let mixed = |numerics| first(seed("w", numerics, false, b""));
        assert_eq!(mixed("cpu"), mixed("gpu"));
    }
}
