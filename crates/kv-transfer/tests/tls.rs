//! `tcp` over TLS: the same suite, and who is let in.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tandem_chassis::seam;
use tandem_kv_transfer::{
    ByteRange, Denied, Error, Gate, Options, Peer, Permit, Row, TRANSPORTS, Tls, TlsError, conformance,
};
use tandem_memory::Region;
use tandem_types::{ClaimId, Incarnation};

fn tcp() -> &'static Row {
    TRANSPORTS.iter().find(|row| row.name == "tcp").expect("a row")
}

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        let path = std::env::temp_dir().join(format!("tandem-tls-{:x}", seam::random_u64()));
        std::fs::create_dir(&path).expect("a folder");
        Folder(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, text).expect("a file");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// An authority of its own, and an identity that it vouches for.
struct Domain {
    folder: Folder,
    authority: CertifiedIssuer<'static, KeyPair>,
}

impl Domain {
    fn new() -> Domain {
        let mut params = CertificateParams::new(Vec::<String>::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let authority = CertifiedIssuer::self_signed(params, key).expect("an authority");
        Domain { folder: Folder::new(), authority }
    }

    /// An identity for a host of this name.
    fn identity(&self, host: &str) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![host.to_owned()]).expect("a name");
        let certificate = params.signed_by(&key, &self.authority).expect("a certificate");
        let certificate = self.folder.write(&format!("{host}.pem"), &certificate.pem());
        (certificate, self.folder.write(&format!("{host}.key"), &key.serialize_pem()))
    }

    fn authority(&self) -> PathBuf {
        self.folder.write("authority.pem", &self.authority.pem())
    }

    fn options(&self, host: &str) -> Options {
        let (certificate, key) = self.identity(host);
        Options { tls: Some(Tls::load(&certificate, &key, &self.authority()).expect("good files")) }
    }
}

struct Open;

impl Gate for Open {
    fn begin(&self, _: ClaimId, _: &[ByteRange]) -> Result<Permit, Denied> {
        Ok(Box::new(()))
    }
}

/// Whether a puller with these options reaches an owner with those.
async fn connect(owner: &Options, puller: &Options) -> Result<Arc<dyn Peer>, Error> {
    let region = Arc::new(Region::anonymous(4096).expect("memory"));
    let bind = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let exported = (tcp().make)(owner).export(region, Arc::new(Open), Incarnation(7), bind).await;
    let exported = exported.expect("it exports");
    (tcp().make)(puller).connect(exported.export(), seam::now() + Duration::from_secs(15)).await
}

#[tokio::test]
async fn tcp_over_tls_holds_what_a_transport_must() {
    conformance::run(tcp(), &Domain::new().options("127.0.0.1")).await;
}

#[tokio::test]
async fn only_those_whom_the_authority_vouches_for_are_let_in() {
    let (ours, theirs) = (Domain::new(), Domain::new());
    let own = ours.options("127.0.0.1");
    assert!(connect(&own, &own).await.is_ok());
    assert!(connect(&own, &theirs.options("127.0.0.1")).await.is_err(), "a stranger");
    let (certificate, key) = theirs.identity("127.0.0.1");
    let pretender = Tls::load(&certificate, &key, &ours.authority()).expect("good files");
    let pretender = Options { tls: Some(pretender) };
    assert!(connect(&own, &pretender).await.is_err(), "who believes us, but is not ours");
    assert!(connect(&pretender, &own).await.is_err(), "the same as an owner");
    assert!(connect(&ours.options("10.1.2.3"), &own).await.is_err(), "an owner of another host's name");
}

#[tokio::test]
async fn one_side_without_tls_is_no_connection() {
    let own = Domain::new().options("127.0.0.1");
    assert!(connect(&own, &Options::default()).await.is_err());
    assert!(connect(&Options::default(), &own).await.is_err());
}

#[test]
fn a_file_that_is_no_good_is_named() {
    let domain = Domain::new();
    let ((certificate, key), (_, other)) = (domain.identity("a.test"), domain.identity("b.test"));
    let empty = domain.folder.write("empty.pem", "");
    let missing = domain.folder.0.join("missing");
    for (files, named) in [
        ([&empty, &key, &domain.authority()], &empty),
        ([&certificate, &empty, &domain.authority()], &empty),
        ([&certificate, &key, &missing], &missing),
    ] {
        match Tls::load(files[0], files[1], files[2]).err() {
            Some(TlsError::File { file, .. }) => assert_eq!(&file, named),
            other => panic!("{other:?}"),
        }
    }
    let mixed = Tls::load(&certificate, &other, &domain.authority()).err();
    assert!(matches!(mixed, Some(TlsError::Identity(_))), "{mixed:?}");
}
