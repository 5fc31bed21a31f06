//! TLS with X.509 certificates, out of a directory as QEMU and libvirt lay it out.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection};

/// The certificates that the system trusts, in Debian and its kin.
const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Why TLS cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing or cannot be read.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The certificates do not fit together.
    #[error("the certificates in {}: {reason}", path.display())]
    Setup {
        /// Their directory.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// A server's certificates.
#[derive(Debug, Clone)]
pub struct ServerTls(Arc<ServerConfig>);

impl ServerTls {
    /// Reads `server-cert.pem` and `server-key.pem` in `directory`. With `verify` a client needs a certificate that
    /// `ca-cert.pem` there has signed.
    ///
    /// # Errors
    /// [`TlsError`] says which file, and why.
    pub fn load(directory: &Path, verify: bool) -> Result<Self, TlsError> {
        let setup = |reason: String| TlsError::Setup { path: directory.to_owned(), reason };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| setup(e.to_string()))?;
        let builder = if verify {
            let roots = Arc::new(roots(&directory.join("ca-cert.pem"))?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                .build()
                .map_err(|e| setup(e.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let (chain, key) = identity(directory, "server")?;
        let config = builder.with_single_cert(chain, key).map_err(|e| setup(e.to_string()))?;
        Ok(Self(Arc::new(config)))
    }

    /// A new session.
    pub(crate) fn session(&self) -> io::Result<Connection> {
        ServerConnection::new(Arc::clone(&self.0)).map(Connection::Server).map_err(io::Error::other)
    }
}

/// What a client trusts, and who it is.
#[derive(Debug, Clone)]
pub(crate) struct ClientTls(Arc<ClientConfig>);

impl ClientTls {
    /// Trusts `ca-cert.pem` in `directory` (without one: what the system trusts); shows `client-cert.pem`, if that is there.
    pub(crate) fn load(directory: Option<&Path>) -> Result<Self, TlsError> {
        let path = directory.map_or_else(|| PathBuf::from(SYSTEM_ROOTS), |dir| dir.join("ca-cert.pem"));
        let setup = |reason: String| TlsError::Setup { path: path.clone(), reason };
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|e| setup(e.to_string()))?
            .with_root_certificates(roots(&path)?);
        let config = match directory.filter(|dir| dir.join("client-cert.pem").exists()) {
            Some(directory) => {
                let (chain, key) = identity(directory, "client")?;
                builder.with_client_auth_cert(chain, key).map_err(|e| setup(e.to_string()))?
            }
            None => builder.with_no_client_auth(),
        };
        Ok(Self(Arc::new(config)))
    }

    /// A new session with the server of that name.
    pub(crate) fn session(&self, host: &str) -> io::Result<Connection> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| io::Error::other(format!("{host} is no name that a certificate could have")))?;
        ClientConnection::new(Arc::clone(&self.0), name).map(Connection::Client).map_err(io::Error::other)
    }
}

fn file_error(path: &Path, error: &rustls::pki_types::pem::Error) -> TlsError {
    let reason = match error {
        rustls::pki_types::pem::Error::Io(error) => error.to_string(),
        _ => "is not a PEM file with what is expected there".into(),
    };
    TlsError::File { path: path.to_owned(), reason }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    CertificateDer::pem_file_iter(path).and_then(Iterator::collect).map_err(|error| file_error(path, &error))
}

fn roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    let (added, _) = store.add_parsable_certificates(certificates(path)?);
    if added == 0 {
        return Err(TlsError::File { path: path.to_owned(), reason: "has no certificate in it".into() });
    }
    Ok(store)
}

/// `WHO-cert.pem` and `WHO-key.pem`.
fn identity(
    directory: &Path,
    who: &str,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
    let chain = certificates(&directory.join(format!("{who}-cert.pem")))?;
    let path = directory.join(format!("{who}-key.pem"));
    let key = PrivateKeyDer::from_pem_file(&path).map_err(|error| file_error(&path, &error))?;
    Ok((chain, key))
}
