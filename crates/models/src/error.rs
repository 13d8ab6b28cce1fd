//! What can be wrong with a checkpoint: one variant per thing its owner can do about it.

use std::io;
use std::path::PathBuf;

/// Why a checkpoint cannot be opened. Every message begins with the file and ends with the fact.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder is missing or cannot be read: look at the path and its permissions.
    #[error("{file}: {source}", file = .file.display())]
    Unreadable {
        /// The file or folder.
        file: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file is not what it should be (truncated, malformed, contradicting another): fetch it again.
    #[error("{file}: {fact}", file = .file.display())]
    Broken {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        fact: String,
    },
    /// The file is in order but asks for something that this version does not have: choose another model.
    #[error("{file}: {fact}", file = .file.display())]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// What is not supported, and where useful what is.
        fact: String,
    },
}
