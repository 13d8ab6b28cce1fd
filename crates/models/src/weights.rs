//! Weights as they lie in the checkpoint: a single file or shards with an index, and one tensor's typed view.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::Value;

use crate::config::Config;
use crate::error::Error;
use crate::safetensors::{Entry, File};

/// Element types that weights may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// The upper half of a single: 8 exponent and 7 fraction bits.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }

    /// The short word: `bf16`, `f16`, `f32`.
    pub fn as_str(self) -> &'static str {
        match self {
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
            Dtype::F32 => "f32",
        }
    }

    /// Reads the spelling of safetensors.
    pub(crate) fn from_safetensors(name: &str) -> Option<Dtype> {
        Some(match name {
            "BF16" => Dtype::Bf16,
            "F16" => Dtype::F16,
            "F32" => Dtype::F32,
            _ => return None,
        })
    }
}

/// A weight in the file: a view that copies nothing.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// Its element type.
    pub dtype: Dtype,
    /// `[rows, columns]` of a matrix, `[columns]` of a vector.
    pub shape: &'a [usize],
    /// The elements in little-endian order, row after row; not aligned to anything.
    pub bytes: &'a [u8],
}

impl<'a> Tensor<'a> {
    /// Rows; a vector is one row.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The bytes of one row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row_bytes(&self, row: usize) -> &'a [u8] {
        let width = self.columns() * self.dtype.bytes();
        &self.bytes[row * width..(row + 1) * width]
    }

    /// Converts one row to float32, exactly: all three element types are subsets of it.
    ///
    /// # Panics
    /// If there is no such row, or `out` does not have its length.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.columns(), "a row is read into a slice of its length");
        let bytes = self.row_bytes(row);
        fn each<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
            let (elements, _) = bytes.as_chunks::<N>();
            for (out, element) in out.iter_mut().zip(elements) {
                *out = value(*element);
            }
        }
        match self.dtype {
            Dtype::Bf16 => each(bytes, out, |element| bf16::from_le_bytes(element).to_f32()),
            Dtype::F16 => each(bytes, out, |element| f16::from_le_bytes(element).to_f32()),
            Dtype::F32 => each(bytes, out, f32::from_le_bytes),
        }
    }

    /// All elements in float32, row after row.
    pub fn to_f32(&self) -> Vec<f32> {
        let columns = self.columns();
        let mut values = vec![0.0; self.rows() * columns];
        if columns > 0 {
            for (row, out) in values.chunks_exact_mut(columns).enumerate() {
                self.read_row(row, out);
            }
        }
        values
    }
}

/// All tensors of a checkpoint by name.
pub(crate) struct Weights {
    files: Vec<File>,
    /// Which file has a tensor; the file's header has it for certain.
    places: BTreeMap<String, usize>,
    /// The file to name when a tensor is missing: the index, or the single file.
    listing: PathBuf,
}

impl Weights {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
    pub fn open(dir: &Path) -> Result<Weights, Error> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        if exists(&single) {
            return Ok(Weights::single(File::open(&single)?));
        }
        if exists(&index) {
            return Weights::open_shards(dir, &index);
        }
        Err(Error::Broken {
            file: dir.to_owned(),
            fact: "has neither model.safetensors nor model.safetensors.index.json; other weight files are not read"
                .to_owned(),
        })
    }

    /// The weights of one file.
    pub fn single(file: File) -> Weights {
        let places = file.names().map(|name| (name.to_owned(), 0)).collect();
        let listing = file.path().to_owned();
        Weights { files: vec![file], places, listing }
    }

    fn open_shards(dir: &Path, index: &Path) -> Result<Weights, Error> {
        let listed = Config::read(index)?;
        let Some(Value::Object(map)) = listed.get("weight_map") else {
            return Err(listed.broken("has no weight_map, an object of tensor names and files"));
        };
        let mut files: Vec<File> = Vec::new();
        let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
        let mut places = BTreeMap::new();
        for (tensor, shard) in map {
            let Some(shard) = shard.as_str().filter(|shard| is_plain(shard)) else {
                return Err(
                    listed.broken(format!("says tensor {tensor} is in {shard}, which is no file name"))
                );
            };
            let number = match numbers.get(shard) {
                Some(number) => *number,
                None => {
                    files.push(File::open(&dir.join(shard))?);
                    numbers.insert(shard, files.len() - 1);
                    files.len() - 1
                }
            };
            if files[number].entry(tensor).is_none() {
                return Err(Error::Broken {
                    file: files[number].path().to_owned(),
                    fact: format!("has no tensor {tensor}, which the index says is in it"),
                });
            }
            places.insert(tensor.clone(), number);
        }
        Ok(Weights { files, places, listing: index.to_owned() })
    }

    fn find(&self, name: &str) -> Option<(&File, &Entry)> {
        let file = &self.files[*self.places.get(name)?];
        Some((file, file.entry(name).expect("places name entries that exist")))
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// The element type of a tensor as the file spells it, if there is one of this name.
    pub fn dtype(&self, name: &str) -> Option<&str> {
        Some(&self.find(name)?.1.dtype)
    }

    /// A tensor as it is, if there is one of this name.
    pub fn any(&self, name: &str) -> Option<Raw<'_>> {
        let (file, entry) = self.find(name)?;
        Some(Raw { name: name.to_owned(), file: file.path(), entry, bytes: file.bytes(entry) })
    }

    /// A tensor that must be there in one of some element types and shapes.
    pub fn raw(&self, name: &str, dtypes: &[&str], shapes: &[&[usize]]) -> Result<Raw<'_>, Error> {
        let Some((file, entry)) = self.find(name) else {
            let fact = format!("tensor {name} is missing; the config asks for it with shape {:?}", shapes[0]);
            return Err(Error::Broken { file: self.listing.clone(), fact });
        };
        let broken = |fact| Error::Broken { file: file.path().to_owned(), fact };
        if !dtypes.contains(&entry.dtype.as_str()) {
            let (dtype, wanted) = (&entry.dtype, dtypes.join(", "));
            return Err(broken(format!("tensor {name} has dtype {dtype}; its format asks for {wanted}")));
        }
        if !shapes.contains(&entry.shape.as_slice()) {
            let (shape, wanted) = (&entry.shape, shapes[0]);
            return Err(broken(format!("tensor {name} has shape {shape:?}; the config asks for {wanted:?}")));
        }
        Ok(Raw { name: name.to_owned(), file: file.path(), entry, bytes: file.bytes(entry) })
    }

    /// A tensor that must be there in a supported element type and with this shape; of a tensor that holds several
    /// weights, its share of the rows.
    pub fn tensor<'a>(
        &'a self,
        name: &str,
        shape: &'a [usize],
        (share, shares): (usize, usize),
    ) -> Result<Tensor<'a>, Error> {
        let Some((file, entry)) = self.find(name) else {
            return Err(Error::Broken {
                file: self.listing.clone(),
                fact: format!("tensor {name} is missing; the config asks for it with shape {shape:?}"),
            });
        };
        let path = || file.path().to_owned();
        let Some(dtype) = Dtype::from_safetensors(&entry.dtype) else {
            return Err(Error::Unsupported {
                file: path(),
                fact: format!("tensor {name} has dtype {}; supported are BF16, F16 and F32", entry.dtype),
            });
        };
        let mut whole = shape.to_vec();
        whole[0] *= shares;
        if entry.shape != whole {
            return Err(Error::Broken {
                file: path(),
                fact: format!("tensor {name} has shape {:?}; the config asks for {whole:?}", entry.shape),
            });
        }
        let bytes = file.bytes(entry);
        let width = bytes.len() / shares;
        Ok(Tensor { dtype, shape, bytes: &bytes[share * width..][..width] })
    }
}

/// A tensor as the file has it, of any element type.
pub(crate) struct Raw<'a> {
    pub name: String,
    file: &'a Path,
    entry: &'a Entry,
    pub bytes: &'a [u8],
}

impl Raw<'_> {
    /// Element type as the file spells it.
    pub fn dtype(&self) -> &str {
        &self.entry.dtype
    }

    pub fn shape(&self) -> &[usize] {
        &self.entry.shape
    }

    /// An error about the file it is in.
    pub fn broken(&self, fact: String) -> Error {
        Error::Broken { file: self.file.to_owned(), fact }
    }

    /// The elements in float32.
    ///
    /// # Panics
    /// If they are of a type that is no [`Dtype`].
    pub fn numbers(&self) -> Vec<f32> {
        let dtype = Dtype::from_safetensors(&self.entry.dtype).expect("asked for with such a type");
        Tensor { dtype, shape: &self.entry.shape, bytes: self.bytes }.to_f32()
    }
}

/// Whether something is at a path, a dangling link included (which then cannot be read, and says so).
fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Whether a name stays in its folder.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn all_three_element_types_convert_to_the_same_values() {
        let values = [0.0_f32, -0.0, 1.0, -2.5, 0.0078125, 384.0];
        let bf16: Vec<u8> = values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect();
        let f16: Vec<u8> = values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect();
        let f32: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        for (dtype, bytes) in [(Dtype::Bf16, bf16), (Dtype::F16, f16), (Dtype::F32, f32)] {
            // One byte in front, so that nothing is aligned.
            let shifted = [&[0], bytes.as_slice()].concat();
            let tensor = Tensor { dtype, shape: &[3, 2], bytes: &shifted[1..] };
            assert_eq!(tensor.to_f32(), values, "{dtype:?}");
            assert_eq!((tensor.rows(), tensor.columns()), (3, 2));
            let mut row = [0.0; 2];
            tensor.read_row(1, &mut row);
            assert_eq!(row, [1.0, -2.5]);
            assert_eq!(tensor.row_bytes(2), &bytes[4 * dtype.bytes()..]);
        }
    }

    #[test]
    fn a_vector_is_one_row() {
        let tensor = Tensor { dtype: Dtype::F32, shape: &[2], bytes: &[0, 0, 128, 63, 0, 0, 0, 64] };
        assert_eq!((tensor.rows(), tensor.columns()), (1, 2));
        assert_eq!(tensor.to_f32(), [1.0, 2.0]);
    }

    #[test]
    fn a_shard_name_that_leaves_the_folder_is_no_plain_name() {
        for name in ["", ".", "..", "../a", "/etc/passwd", "a/b", "a\\b", "a\0b"] {
            assert!(!is_plain(name), "{name:?}");
        }
        assert!(is_plain("model-00001-of-00003.safetensors"));
    }

    proptest! {
        #[test]
        fn half_precision_converts_as_the_library_does(bits in any::<[u16; 8]>()) {
            let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
            let as_bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            for (dtype, wanted) in [
                (Dtype::Bf16, bits.map(|bits| bf16::from_bits(bits).to_f32())),
                (Dtype::F16, bits.map(|bits| f16::from_bits(bits).to_f32())),
            ] {
                let tensor = Tensor { dtype, shape: &[2, 4], bytes: &bytes };
                prop_assert_eq!(as_bits(&tensor.to_f32()), as_bits(&wanted));
            }
        }
    }
}
