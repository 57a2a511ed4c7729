//! A Valkey or Redis server of a trial's own, on a Unix socket.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use libtest_mimic::Failed;

use super::{Lab, Outcome, wait_for};

const PROGRAMS: [&str; 2] = ["redis-server", "valkey-server"];

/// A server that ends with this.
pub(crate) struct PageServer {
    name: String,
    socket: PathBuf,
    child: Child,
}

impl PageServer {
    /// Returns why there is none on this host.
    pub(crate) fn missing() -> Option<String> {
        let runs = |program: &&str| {
            let mut command = Command::new(program);
            command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        let found = PROGRAMS.iter().any(runs);
        (!found).then(|| "neither redis-server nor valkey-server is installed".into())
    }

    /// Starts a server for the store of this name.
    pub(crate) fn start(lab: &Lab, name: &str, args: &[&str]) -> Result<Self, Failed> {
        let socket = lab.path(&format!("server-{name}"));
        for program in PROGRAMS {
            let mut command = Command::new(program);
            command.args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"]).arg(&socket);
            for arg in args {
                // an option may have several words
                command.args(arg.split(' '));
            }
            command.current_dir(lab.path("")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let Ok(child) = command.spawn() else { continue };
            let server = Self { name: name.to_owned(), socket, child };
            wait_for("the server answers", || Ok(server.ask("PING").is_ok_and(|pong| pong == "+PONG").then_some(())))?;
            return Ok(server);
        }
        Err("there is no server".into())
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn url(&self) -> String {
        format!("redis+unix:{}", self.socket.display())
    }

    /// Returns the first line of its answer to a command.
    fn ask(&self, command: &str) -> Result<String, Failed> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.write_all(format!("{command}\r\n").as_bytes())?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    /// Returns the number with which it answers a command.
    pub(crate) fn count(&self, command: &str) -> Result<usize, Failed> {
        let answer = self.ask(command)?;
        let number = answer.strip_prefix(':').and_then(|number| number.parse().ok());
        number.ok_or_else(|| format!("{command}: {answer}").into())
    }

    /// Sends it this signal.
    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) -> Outcome {
        Ok(nix::sys::signal::kill(nix::unistd::Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        // it may have ended already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
