//! The control socket, as the server has it. Requests and answers are `minivmm_client`'s.

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

/// A bound control socket, removed with its path when dropped.
pub(crate) struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ControlSocket {
    /// Binds `path`, for this user alone (mode 0600 whatever the umask); a socket file on which
    /// nobody listens is replaced.
    ///
    /// The file appears only when it can be connected to: a socket is bound before it listens, so
    /// it gets its name last.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        let context = |e: io::Error| io::Error::new(e.kind(), format!("control socket {}: {e}", path.display()));
        let listener = listen_private(path).map_err(context)?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Serves clients on threads of their own, until the process ends.
    pub(crate) fn serve(self, instance: Arc<Instance>) -> io::Result<()> {
        instance.remove_at_exit(self.path);
        let listener = self.listener;
        let body = move || server::serve(&listener, &instance, Limits::default());
        thread::Builder::new().name("control".into()).spawn(body)?;
        Ok(())
    }
}

/// Asks another minivmm, on behalf of a process that has a VM: one that is stopped is given up.
pub(crate) fn ask_peer(path: &Path, request: &Request) -> Result<Value, String> {
    Ok(minivmm_client::ask_peer(path, request)?)
}
