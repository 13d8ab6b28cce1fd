//! Handles: who has which bytes, in which incarnation and form, under which lease.

use serde::{Deserialize, Serialize};

use crate::{Incarnation, LeaseId, WorkerId};

/// A page and the generation it had when it was named. A page's generation rises whenever it is given to a
/// new use, so a stale reference can be told from a good one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageRef {
    /// Index in the owner's pool of this group.
    pub page: u32,
    /// How often the page had been given out.
    pub generation: u32,
}

/// What the bytes are: equal identities hold interchangeable KV.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KvIdentity {
    /// Digest of the weights' content, the KV element type, rope and block size; hexadecimal.
    pub digest: String,
    /// The numerics class: device kind, kernel set, packed form. Within one class results are bit-equal.
    pub numerics: String,
}

/// How the bytes are arranged. Equal forms copy raw; others convert, or are refused before a byte moves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KvForm {
    /// Name of the arrangement inside a page, e.g. `rows` (the wire form).
    pub layout: String,
    /// Element type, e.g. `bf16`.
    pub element: String,
    /// Bytes of one page of each group.
    pub page_bytes: Vec<u64>,
    /// How many tensor-parallel shards the KV heads are cut into; 1 is whole.
    pub shards: u32,
}

/// One way to reach the owner's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Export {
    /// The transport's name, e.g. `tcp`.
    pub transport: String,
    /// Opaque to everybody but that transport; it names the owner's incarnation.
    pub blob: Vec<u8>,
}

/// The pages of one KV group (and shard) of a sequence, in order from its first block.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GroupPages {
    /// The KV group.
    pub group: u32,
    /// The shard; 0 where KV is whole.
    pub shard: u32,
    /// Pages, one per block.
    pub pages: Vec<PageRef>,
}

/// Grants access to pages until its lease ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handle {
    /// The lease.
    pub lease: LeaseId,
    /// Who has the bytes.
    pub owner: WorkerId,
    /// Which start of its process.
    pub incarnation: Incarnation,
    /// `host:port` of the owner's `Lender` service.
    pub lender: String,
    /// Ways to reach its memory, best first.
    pub exports: Vec<Export>,
    /// What the bytes are.
    pub identity: KvIdentity,
    /// How they are arranged.
    pub form: KvForm,
    /// Where they are.
    pub groups: Vec<GroupPages>,
    /// Tokens whose KV the handle will hold once sealed.
    pub tokens: u32,
}
