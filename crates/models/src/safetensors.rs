//! One safetensors file in a memory map: eight bytes of header length, a JSON header, data. The header is checked
//! whole when the file is opened, so that reading a tensor cannot fail.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::error::Error;

/// Longer headers are taken for damage. The format's own limit.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Longer names of tensors are taken for damage; they would fill every message.
const NAME_BYTES_MAX: usize = 1024;
/// What Git LFS leaves in place of a file that was not fetched begins with this.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// A file in memory.
pub(crate) struct File {
    path: PathBuf,
    content: Content,
    entries: HashMap<String, Entry>,
}

enum Content {
    Mapped(Mmap),
    Given(Vec<u8>),
}

/// A tensor as the header describes it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    /// Element type as the file spells it.
    pub dtype: String,
    pub shape: Vec<usize>,
    /// Where in the file; inside it, and as long as dtype and shape want where the dtype is known.
    pub bytes: Range<usize>,
}

impl File {
    /// Maps a file and reads its header.
    pub fn open(path: &Path) -> Result<File, Error> {
        let unreadable = |source| Error::Unreadable { file: path.to_owned(), source };
        // A pipe would be waited for.
        if !fs::metadata(path).map_err(unreadable)?.is_file() {
            return Err(unreadable(io::Error::other("is not an ordinary file")));
        }
        let file = fs::File::open(path).map_err(unreadable)?;
        // SAFETY: the map is read-only and private to this process. That nobody truncates or rewrites the file
        // while it is mapped is kept by whoever runs the process: checkpoints are replaced as whole files.
        let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
        File::of(path, Content::Mapped(map))
    }

    /// The same of a file's bytes; the path is what errors name.
    pub fn given(path: &Path, bytes: Vec<u8>) -> Result<File, Error> {
        File::of(path, Content::Given(bytes))
    }

    fn of(path: &Path, content: Content) -> Result<File, Error> {
        let entries =
            read_header(content.bytes()).map_err(|fact| Error::Broken { file: path.to_owned(), fact })?;
        Ok(File { path: path.to_owned(), content, entries })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The bytes of one of this file's entries.
    pub fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.content.bytes()[entry.bytes.clone()]
    }
}

impl Content {
    fn bytes(&self) -> &[u8] {
        match self {
            Content::Mapped(map) => map,
            Content::Given(bytes) => bytes,
        }
    }
}

/// Bits of an element, for every type the format knows.
fn element_bits(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// Reads and checks the header of a whole file. Ranges in the result count from the start of the file; together
/// they cover everything behind the header, without holes or overlaps.
pub(crate) fn read_header(file: &[u8]) -> Result<HashMap<String, Entry>, String> {
    if file.starts_with(LFS_POINTER) {
        return Err("is a Git LFS pointer; the file itself was not fetched".to_owned());
    }
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!("is truncated: {} bytes, too short for a safetensors file", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_BYTES_MAX {
        return Err(format!(
            "header too long: it claims {length} bytes, at most {HEADER_BYTES_MAX} are allowed"
        ));
    }
    let length = length as usize;
    let Some((header, data)) = rest.split_at_checked(length) else {
        return Err(format!("is truncated: the header takes {length} bytes, {} are there", rest.len()));
    };
    let Header(tensors) =
        serde_json::from_slice(header).map_err(|error| format!("the header is not valid: {error}"))?;

    let mut entries = HashMap::with_capacity(tensors.len());
    let mut order = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let [begin, end] = tensor.data_offsets;
        if begin > end || end > data.len() as u64 {
            return Err(format!(
                "tensor {name} lies at bytes {begin} to {end} of the data, which has {}: the file is truncated or \
                 its header damaged",
                data.len()
            ));
        }
        let bits = element_bits(&tensor.dtype);
        let elements = tensor.shape.iter().try_fold(1_usize, |product, size| product.checked_mul(*size));
        if let Some(bits) = bits {
            let wanted =
                elements.and_then(|elements| elements.checked_mul(bits)).map(|bits| bits.div_ceil(8));
            if wanted.map(|bytes| bytes as u64) != Some(end - begin) {
                return Err(format!(
                    "tensor {name} has {} bytes, which does not fit {} of shape {:?}",
                    end - begin,
                    tensor.dtype,
                    tensor.shape
                ));
            }
        }
        order.push((begin, end, name.clone()));
        let first = 8 + length;
        let bytes = first + begin as usize..first + end as usize;
        entries.insert(name, Entry { dtype: tensor.dtype, shape: tensor.shape, bytes });
    }
    covers(order, data.len() as u64)?;
    Ok(entries)
}

/// Whether ranges cover the data exactly.
fn covers(mut ranges: Vec<(u64, u64, String)>, data: u64) -> Result<(), String> {
    ranges.sort();
    let mut covered = 0;
    for (begin, end, name) in ranges {
        if begin < covered {
            return Err(format!(
                "tensor {name} overlaps another: it begins at byte {begin}, {covered} are taken"
            ));
        }
        if begin > covered {
            return Err(format!(
                "bytes {covered} to {begin} of the data, before tensor {name}, belong to no tensor"
            ));
        }
        covered = end;
    }
    if covered < data {
        return Err(format!("{} bytes after the last tensor belong to no tensor", data - covered));
    }
    Ok(())
}

#[derive(Deserialize)]
struct TensorHeader {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// The header's tensors in file order. A name that comes twice is refused, which an ordinary map would not do.
struct Header(Vec<(String, TensorHeader)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        struct Tensors;

        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut tensors = Vec::new();
                let mut seen = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name.len() > NAME_BYTES_MAX {
                        let fact = format!("the name of a tensor has {} bytes", name.len());
                        return Err(serde::de::Error::custom(fact));
                    }
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                        continue;
                    }
                    if !seen.insert(name.clone()) {
                        return Err(serde::de::Error::custom(format!("tensor {name} is described twice")));
                    }
                    let tensor = map
                        .next_value()
                        .map_err(|error| serde::de::Error::custom(format!("tensor {name}: {error}")))?;
                    tensors.push((name, tensor));
                }
                Ok(Header(tensors))
            }
        }

        deserializer.deserialize_map(Tensors)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Written, file, safetensors};

    fn good() -> Vec<u8> {
        safetensors(&[
            Written { name: "a".into(), dtype: "BF16", shape: vec![2, 3], bytes: (0..12).collect() },
            Written { name: "scalar".into(), dtype: "F32", shape: vec![], bytes: vec![9; 4] },
            Written { name: "empty".into(), dtype: "F16", shape: vec![0, 5], bytes: vec![] },
            Written { name: "packed".into(), dtype: "F4", shape: vec![3], bytes: vec![1, 2] },
        ])
    }

    #[test]
    fn a_good_header_gives_every_tensor_its_bytes() {
        let file = good();
        let entries = read_header(&file).unwrap();
        assert_eq!(entries.len(), 4);
        assert_eq!(file[entries["a"].bytes.clone()], (0..12).collect::<Vec<u8>>());
        assert_eq!(entries["a"].shape, [2, 3]);
        assert_eq!(file[entries["scalar"].bytes.clone()], [9; 4]);
        assert!(entries["empty"].bytes.is_empty());
    }

    #[track_caller]
    fn refused(file: &[u8], fact: &str) {
        let error = read_header(file).unwrap_err();
        assert!(error.contains(fact), "{error:?} does not say {fact:?}");
    }

    #[test]
    fn every_fault_of_a_file_is_named() {
        let with = |header: &str, data: usize| file(header, &vec![0; data]);
        let tensor = |dtype: &str, shape: &str, begin: u64, end: u64| {
            format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
        };
        refused(b"", "is truncated: 0 bytes");
        refused(b"1234567", "is truncated: 7 bytes");
        refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer");
        refused(&(1_u64 << 63).to_le_bytes(), "it claims 9223372036854775808 bytes, at most 100000000");
        refused(&u64::MAX.to_le_bytes(), "header too long: it claims 18446744073709551615 bytes");
        refused(
            &[100_u64.to_le_bytes().as_slice(), b"{}"].concat(),
            "the header takes 100 bytes, 2 are there",
        );
        refused(&with("{", 0), "the header is not valid: EOF");
        refused(&with("[]", 0), "expected an object of tensors");
        refused(&with("\u{1}", 0), "the header is not valid");
        let name = format!(r#"{{"{}":{{}}}}"#, "a".repeat(1025));
        refused(&with(&name, 0), "the name of a tensor has 1025 bytes");
        refused(&file(r#"{"a":{"dtype":"F32"}}"#, b""), "tensor a: missing field `shape`");
        refused(
            &with(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4),
            "tensor a: invalid value",
        );
        let one = tensor("F32", "[2]", 0, 8);
        refused(
            &with(&format!(r#"{{"a":{one}}}"#), 7),
            "tensor a lies at bytes 0 to 8 of the data, which has 7",
        );
        refused(&with(&format!(r#"{{"a":{one},"a":{one}}}"#), 8), "tensor a is described twice");
        refused(&with(&format!(r#"{{"a":{one},"b":{one}}}"#), 8), "tensor b overlaps another");
        let later = tensor("F32", "[1]", 4, 8);
        refused(&with(&format!(r#"{{"a":{one},"b":{later}}}"#), 8), "tensor b overlaps another");
        refused(&with(&format!(r#"{{"b":{later}}}"#), 8), "bytes 0 to 4 of the data, before tensor b");
        refused(&with(&format!(r#"{{"a":{one}}}"#), 9), "1 bytes after the last tensor");
        let backwards = tensor("F32", "[1]", 8, 4);
        refused(&with(&format!(r#"{{"a":{backwards}}}"#), 8), "tensor a lies at bytes 8 to 4");
        let short = tensor("BF16", "[2, 3]", 0, 8);
        refused(&with(&format!(r#"{{"a":{short}}}"#), 8), "8 bytes, which does not fit BF16 of shape [2, 3]");
        let huge = tensor("F32", "[4294967296, 4294967296]", 0, 0);
        refused(&with(&format!(r#"{{"a":{huge}}}"#), 0), "0 bytes, which does not fit F32");
    }

    #[test]
    fn an_element_type_nobody_knows_does_not_spoil_the_other_tensors() {
        let header = r#"{"a":{"dtype":"NEW3","shape":[5],"data_offsets":[0,3]}}"#;
        assert_eq!(read_header(&file(header, &[0; 3])).unwrap()["a"].dtype, "NEW3");
    }

    proptest! {
        #[test]
        fn a_truncated_file_is_always_refused(cut in 0..good().len()) {
            prop_assert!(read_header(&good()[..cut]).is_err());
        }

        #[test]
        fn damage_is_refused_or_leaves_every_range_inside_the_file(
            hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)
        ) {
            let mut file = good();
            for (place, value) in hits {
                let place = place.index(file.len());
                file[place] = value;
            }
            for entry in read_header(&file).unwrap_or_default().values() {
                prop_assert!(entry.bytes.start <= entry.bytes.end && entry.bytes.end <= file.len());
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_header(&bytes);
            let _ = read_header(&file(&String::from_utf8_lossy(&bytes), &bytes));
        }

        #[test]
        fn arbitrary_offsets_and_shapes_never_panic(
            tensors in prop::collection::vec((any::<[u64; 2]>(), prop::collection::vec(any::<u64>(), 0..4)), 0..4),
            small in any::<bool>(),
        ) {
            let shrink = |number: u64| if small { number % 9 } else { number };
            let mut header = serde_json::Map::new();
            for (number, (offsets, shape)) in tensors.iter().enumerate() {
                let shape: Vec<_> = shape.iter().map(|size| shrink(*size)).collect();
                header.insert(
                    number.to_string(),
                    serde_json::json!({"dtype": "U8", "shape": shape, "data_offsets": offsets.map(shrink)}),
                );
            }
            let file = file(&serde_json::Value::Object(header).to_string(), &[0; 8]);
            for entry in read_header(&file).unwrap_or_default().values() {
                prop_assert!(entry.bytes.start <= entry.bytes.end && entry.bytes.end <= file.len());
            }
        }
    }
}
