//! Who this process is to its peers, and whom it believes. The same on both sides: every worker shows a
//! certificate, and accepts those of one authority.
//!
//! A puller also checks that the owner's certificate is for the host that it has connected to: the one in
//! the handle, which is the owner's `--advertise` or bind address. A build without the feature `tls` has the type,
//! so that nobody else needs to know, but no value of it.

use std::io;
use std::path::{Path, PathBuf};

use tokio::net::TcpStream;

use crate::tcp::Socket;

/// Certificate, key and authority, read and checked.
#[derive(Clone)]
pub struct Tls {
    #[cfg(feature = "tls")]
    accepts: tokio_rustls::TlsAcceptor,
    #[cfg(feature = "tls")]
    connects: tokio_rustls::TlsConnector,
    #[cfg(not(feature = "tls"))]
    never: std::convert::Infallible,
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Not in this build.
    #[error("this build has no TLS between workers; build with `--features tls`")]
    NotBuilt,
    /// A file cannot be used.
    #[error("{file}: {reason}")]
    File {
        /// Which.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Certificate and key do not make an identity.
    #[error("certificate and key: {0}")]
    Identity(String),
}

#[cfg(not(feature = "tls"))]
impl Tls {
    /// Reads PEM files: the own certificate with its chain, its key, and the authorities to believe.
    ///
    /// # Errors
    /// Always, in a build without the feature.
    pub fn load(_certificate: &Path, _key: &Path, _authority: &Path) -> Result<Tls, TlsError> {
        Err(TlsError::NotBuilt)
    }

    pub(crate) async fn accept(&self, _stream: TcpStream) -> io::Result<Socket> {
        match self.never {}
    }

    pub(crate) async fn connect(&self, _stream: TcpStream, _host: &str) -> io::Result<Socket> {
        match self.never {}
    }
}

#[cfg(feature = "tls")]
impl Tls {
    /// Reads PEM files: the own certificate with its chain, its key, and the authorities to believe.
    ///
    /// # Errors
    /// The file that is no good, or that certificate and key are not a pair.
    pub fn load(certificate: &Path, key: &Path, authority: &Path) -> Result<Tls, TlsError> {
        use std::sync::Arc;

        use tokio_rustls::rustls::pki_types::PrivateKeyDer;
        use tokio_rustls::rustls::pki_types::pem::PemObject;
        use tokio_rustls::rustls::server::WebPkiClientVerifier;
        use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig, crypto};

        let wrong = |file: &Path, reason: String| TlsError::File { file: file.to_owned(), reason };
        let identity = |error: tokio_rustls::rustls::Error| TlsError::Identity(error.to_string());
        let chain = certificates(certificate)?;
        let private = || PrivateKeyDer::from_pem_file(key).map_err(|error| wrong(key, error.to_string()));
        let mut roots = RootCertStore::empty();
        for root in certificates(authority)? {
            roots.add(root).map_err(|error| wrong(authority, error.to_string()))?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|error| wrong(authority, error.to_string()))?;
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(identity)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), private()?)
            .map_err(identity)?;
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(identity)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, private()?)
            .map_err(identity)?;
        Ok(Tls { accepts: Arc::new(server).into(), connects: Arc::new(client).into() })
    }

    pub(crate) async fn accept(&self, stream: TcpStream) -> io::Result<Socket> {
        let stream = self.accepts.accept(stream).await?;
        Ok(Socket::Tls(Box::new(stream.into())))
    }

    /// `host` as in the address that was connected to.
    pub(crate) async fn connect(&self, stream: TcpStream, host: &str) -> io::Result<Socket> {
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = host.try_into().map_err(|_| io::Error::other("the address names no host"))?;
        let stream = self.connects.connect(name, stream).await?;
        Ok(Socket::Tls(Box::new(stream.into())))
    }
}

#[cfg(feature = "tls")]
fn certificates(
    file: &Path,
) -> Result<Vec<tokio_rustls::rustls::pki_types::CertificateDer<'static>>, TlsError> {
    use tokio_rustls::rustls::pki_types::CertificateDer;
    use tokio_rustls::rustls::pki_types::pem::PemObject;

    let wrong = |reason: String| TlsError::File { file: file.to_owned(), reason };
    let read = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(none) if none.is_empty() => Err(wrong("it holds no certificate".into())),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(wrong(error.to_string())),
    }
}
