//! The server side of the control socket. `minivmm_client` defines the requests and answers.

use std::{
    io,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use migration_transport::listen_private;
use minivmm_client::{
    Request,
    server::{self, Limits},
};
use serde_json::Value;

use crate::instance::Instance;

/// A bound control socket. Its path is removed when a process that serves it ends.
pub(crate) struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ControlSocket {
    /// Binds `path` for this user only: the socket has mode 0600 whatever the umask is. A socket
    /// file on which nobody listens is replaced.
    ///
    /// A socket is bound before it listens, so it gets its name last. The file thus appears only
    /// when clients can connect to it.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        let context = |e: io::Error| io::Error::new(e.kind(), format!("control socket {}: {e}", path.display()));
        let listener = listen_private(path).map_err(context)?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Serves clients on separate threads until the process ends.
    pub(crate) fn serve(self, instance: Arc<Instance>) -> io::Result<()> {
        instance.remove_at_exit(self.path);
        let listener = self.listener;
        let body = move || server::serve(&listener, &instance, Limits::default());
        thread::Builder::new().name("control".into()).spawn(body)?;
        Ok(())
    }
}

/// Returns the answer of another minivmm to a request of a process that has a VM. Returns an error
/// if the other minivmm does not answer because it is stopped.
pub(crate) fn ask_peer(path: &Path, request: &Request) -> Result<Value, String> {
    Ok(minivmm_client::ask_peer(path, request)?)
}
