//! Child processes, their ports, processor time and memory.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use super::cpu;

/// A child process, killed on drop.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
}

impl Process {
    /// Starts `program` in `dir`. Its output goes to `NAME.log` there.
    pub fn start(dir: &Path, name: &str, program: &str, args: &[&str]) -> io::Result<Self> {
        let log = File::create(dir.join(format!("{name}.log")))?;
        let mut command = Command::new(program);
        command
            .args(args)
            .current_dir(dir)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        // SAFETY: prctl is async-signal-safe and accesses no memory of this process.
        unsafe {
            command.pre_exec(|| {
                // The child does not outlive an interrupted bench.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let child = command
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))?;
        Ok(Self { name: name.into(), child })
    }

    /// Starts this program with `--child ROLE` and `args`. Its output goes to `NAME.log`.
    pub fn start_child(dir: &Path, name: &str, role: &str, args: &[&str]) -> io::Result<Self> {
        let own = std::env::current_exe()?;
        Self::start(dir, name, &own.to_string_lossy(), &[&["--child", role], args].concat())
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Seconds of processor time so far, in user mode and in the kernel; NaN after the process has
    /// ended.
    pub fn cpu_seconds(&self) -> f64 {
        cpu::of_process(self.child.id()).unwrap_or(f64::NAN)
    }

    /// Bytes of resident memory (`VmRSS`, proc(5)); 0 after the process has ended.
    pub fn resident_bytes(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).unwrap_or_default();
        let kib =
            status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
        kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
    }

    /// # Errors
    /// If the process has ended.
    pub fn check(&mut self) -> io::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(io::Error::other(format!("{} ended: {status}", self.name))),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail if the process has ended, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns a loopback address with a free TCP and UDP port, a different one on each call.
///
/// The port is below the kernel's range of ephemeral ports.
pub fn free_address() -> SocketAddr {
    loop {
        let port = FIRST_PORT + NEXT_PORT.fetch_add(1, Ordering::Relaxed) % PORTS;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if TcpListener::bind(address).is_ok()
            && UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()
        {
            return address;
        }
    }
}

/// Polls `condition` until it is true.
///
/// # Errors
/// If it is not true within `timeout`, or `condition` fails.
pub fn wait_for(
    description: &str,
    timeout: Duration,
    mut condition: impl FnMut() -> io::Result<bool>,
) -> io::Result<()> {
    let began = Instant::now();
    while began.elapsed() < timeout {
        if condition()? {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err(io::Error::other(format!("timed out after {} s: {description}", timeout.as_secs())))
}

/// Returns the body of a local HTTP server's 200 response.
pub fn http_get(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut socket = TcpStream::connect_timeout(&address, HTTP_TIMEOUT)?;
    socket.set_read_timeout(Some(HTTP_TIMEOUT))?;
    write!(socket, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    match head.starts_with("HTTP/1.1 200") {
        true => Ok(body.to_owned()),
        false => Err(io::Error::other(head.lines().next().unwrap_or("no answer").to_owned())),
    }
}

/// The samples of a Prometheus text: name with labels, value.
pub fn samples(text: &str) -> impl Iterator<Item = (&str, f64)> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.rsplit_once(' '))
        .filter_map(|(name, value)| Some((name, value.parse().ok()?)))
}

static NEXT_PORT: AtomicU16 = AtomicU16::new(0);
const FIRST_PORT: u16 = 14_000;
const PORTS: u16 = 16_000;
const HTTP_TIMEOUT: Duration = Duration::from_secs(5);
