//! Child processes, the ports they listen on, and what they cost.

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

/// A program that runs until this is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
}

impl Process {
    /// Starts it in `dir` with its output in `NAME.log` there.
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
        // SAFETY: prctl is async-signal-safe and touches no memory of ours.
        unsafe {
            command.pre_exec(|| {
                // A bench that is interrupted leaves nothing running.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let child = command
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))?;
        Ok(Self { name: name.into(), child })
    }

    /// Starts this program itself with `--child ROLE` and `args`, and its output in `NAME.log`.
    pub fn start_child(dir: &Path, name: &str, role: &str, args: &[&str]) -> io::Result<Self> {
        let own = std::env::current_exe()?;
        Self::start(dir, name, &own.to_string_lossy(), &[&["--child", role], args].concat())
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Seconds of processor time so far, in user mode and in the kernel; not a number once it has
    /// ended.
    pub fn cpu_seconds(&self) -> f64 {
        cpu::of_process(self.child.id()).unwrap_or(f64::NAN)
    }

    /// Bytes of memory that it holds (`VmRSS`, proc(5)); 0 once it has ended.
    pub fn resident_bytes(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).unwrap_or_default();
        let kib =
            status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
        kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
    }

    /// # Errors
    /// If it has ended.
    pub fn check(&mut self) -> io::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(io::Error::other(format!("{} ended: {status}", self.name))),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail if it has ended, which is as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A loopback address that nobody listens on and that this process has not given out yet.
///
/// It lies below the range from which the kernel takes ports for those who ask for any.
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

/// Asks again and again until it is so.
///
/// # Errors
/// If it was not within `patience`, or those of `so`.
pub fn wait_for(
    what: &str,
    patience: Duration,
    mut so: impl FnMut() -> io::Result<bool>,
) -> io::Result<()> {
    let began = Instant::now();
    while began.elapsed() < patience {
        if so()? {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err(io::Error::other(format!("waited too long until {what}")))
}

/// The body of what a local HTTP server answers.
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

/// The samples of a Prometheus text: name with labels, and value.
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
