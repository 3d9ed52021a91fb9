//! The command line.

pub mod check;
pub mod cloud;
pub mod demo;
pub mod edge;
mod files;
mod node;
pub mod pull;
pub mod push;
mod rates;
mod requirements;
mod signals;

use std::{fmt, io, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, Parser, Subcommand};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use crate::{
    config::ConfigError,
    node::{TaskEnded, limits::SystemLimits, logging::LogError},
};

/// Live video from one cloud node to many edge nodes: RTMP in, RTP over UDP between with lost
/// packets repaired over QUIC, HTTP-FLV out.
#[derive(Debug, Parser)]
#[command(name = "downpour", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    /// The command's [`Failure`].
    pub fn run(self) -> Result<(), Failure> {
        match self.command {
            Command::Cloud(args) => cloud::run(&args),
            Command::Edge(args) => edge::run(&args),
            Command::Demo(args) => demo::run(&args),
            Command::Push(args) => push::run(&args),
            Command::Pull(args) => pull::run(&args),
            Command::Check(args) => check::run(&args, &SystemLimits::read(), &mut io::stdout()),
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    Cloud(CloudArgs),
    Edge(EdgeArgs),
    Demo(DemoArgs),
    Push(PushArgs),
    Pull(PullArgs),
    Check(check::CheckArgs),
}

/// Run a cloud node: receive RTMP, send RTP to the edges, repair lost packets, serve viewers
///
/// It listens for encoders on rtmp.addr (:1935), for edges on downstream.quic_addr (:4242) and for
/// HTTP on http.addr (:8090). Edges subscribe to streams; addresses in downstream.targets get every
/// stream. SIGTERM and SIGINT shut it down in order, SIGHUP reloads the settings file as far as
/// `downpour check` says, and SIGUSR1 opens the log file again. The exit code is 2 if the settings
/// are at fault, and 1 for all other failures.
///
/// Example: downpour cloud --config /etc/downpour/config.yaml
#[derive(Debug, Clone, Args)]
#[command(verbatim_doc_comment)]
pub struct CloudArgs {
    /// The settings file; without it, config.yaml in the working directory. If the file is missing, it
    /// is created with the defaults
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Run an edge node: receive RTP, request lost packets, serve viewers
///
/// It receives RTP on rtp.addr (:5222) and serves viewers on http.addr (:8092) as
/// http://HOST:8092/APP/NAME.flv. Signals and exit codes are those of `downpour cloud`. An edge
/// that starts before its network is there waits for it.
///
/// Example: downpour edge --config /etc/downpour/edge.yaml
#[derive(Debug, Clone, Args)]
#[command(verbatim_doc_comment)]
pub struct EdgeArgs {
    /// The settings file; without it, edge.yaml in the working directory. If the file is missing, it
    /// is created with the defaults
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Run a demo on this machine: a cloud, edges, a lossy network between them, and a test stream
///
/// Everything runs in one process on loopback, on free ports if the default ones are in use. It
/// prints the URLs to watch, and once per second the packets lost and repaired. Ctrl-C ends it.
///
/// Example: downpour demo --edges 3 --loss 20
#[derive(Debug, Clone, Args)]
#[command(verbatim_doc_comment)]
pub struct DemoArgs {
    /// The FLV file to play in a loop, instead of the built-in test stream
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Number of edges, 1 to 64
    #[arg(long, value_name = "N", default_value = "1", value_parser = count::<64>)]
    pub edges: usize,
    /// Share of the packets that is lost between cloud and edges, 0 to 1. The argument is in percent.
    #[arg(
        long,
        value_name = "P",
        default_value = "5",
        value_parser = percent,
        help = "Packet loss between cloud and edges in percent, 0 to 100"
    )]
    pub loss: f64,
}

/// Publish an FLV file over RTMP, at its own timestamps
///
/// At the end it prints how much was sent and how fast.
///
/// Example: downpour push movie.flv 'rtmp://127.0.0.1/live/cam{i}' --count 100 --loop
#[derive(Debug, Clone, Args)]
#[command(verbatim_doc_comment)]
#[allow(
    rustdoc::broken_intra_doc_links,
    reason = "[:PORT] is no link, and the help shows it as it is"
)]
pub struct PushArgs {
    /// The FLV file to publish
    pub file: PathBuf,
    /// URL of the server
    #[arg(
        help = "The server: rtmp://HOST[:PORT]/APP/NAME; {i} becomes the number of the connection, \
                from 0"
    )]
    pub url: String,
    /// Number of connections to publish over at once, 1 to 10000
    #[arg(long, value_name = "N", default_value = "1", value_parser = count::<10_000>)]
    pub count: usize,
    /// Restart at the end of the file, with increasing timestamps
    #[arg(long = "loop")]
    pub repeat: bool,
}

/// Receive a stream over HTTP-FLV or RTMP
///
/// It runs until the stream ends, the duration is over or Ctrl-C, and prints how much was received
/// and how fast.
///
/// Example: downpour pull http://127.0.0.1:8092/live/movie.flv --output movie.flv --duration 10
#[derive(Debug, Clone, Args)]
#[command(verbatim_doc_comment)]
#[allow(
    rustdoc::broken_intra_doc_links,
    reason = "[:PORT] is no link, and the help shows it as it is"
)]
pub struct PullArgs {
    /// URL of the server
    #[arg(
        help = "The server: http://HOST[:PORT]/APP/NAME.flv or rtmp://HOST[:PORT]/APP/NAME; {i} \
                becomes the number of the connection, from 0"
    )]
    pub url: String,
    /// The FLV file to write; with --count, the stream of the first connection
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Number of connections to receive over at once, 1 to 10000
    #[arg(long, value_name = "N", default_value = "1", value_parser = count::<10_000>)]
    pub count: usize,
    /// Seconds to receive; without it, until the stream ends
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub duration: Option<Duration>,
}

/// Why a command failed, as one line for standard error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The settings or the arguments are at fault, and a restart with the same ones fails too: exit
    /// code 2.
    Usage(String),
    /// It failed while running, or the machine is at fault, as when a port is in use: exit code 1.
    Run(String),
}

impl Failure {
    /// The exit code of the process.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage(_) => ExitCode::from(2),
            Self::Run(_) => ExitCode::from(1),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(message) | Self::Run(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for Failure {}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::Usage(error.to_string())
    }
}

impl From<LogError> for Failure {
    fn from(error: LogError) -> Self {
        Self::Usage(error.to_string())
    }
}

impl From<TaskEnded> for Failure {
    fn from(error: TaskEnded) -> Self {
        Self::Run(error.to_string())
    }
}

/// Runs `work` on a new runtime. SIGTERM and SIGINT cancel its token.
fn block_on<F>(work: impl FnOnce(CancellationToken) -> F) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>>,
{
    run_on(runtime()?, work)
}

fn runtime() -> Result<Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Run(format!("cannot start the runtime: {error}")))
}

/// Runs `work` on `runtime`. SIGTERM and SIGINT cancel its token.
fn run_on<F>(runtime: Runtime, work: impl FnOnce(CancellationToken) -> F) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>>,
{
    let outcome = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        tokio::spawn(signals::shut_down(shutdown.clone()));
        work(shutdown).await
    });
    // A task that does not end, such as a name resolution, must not delay the exit.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

fn count<const MAX: usize>(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|count| (1..=MAX).contains(count))
        .ok_or_else(|| format!("must be a whole number from 1 to {MAX}"))
}

/// Parses a percentage as a share, 0 to 1.
fn percent(text: &str) -> Result<f64, String> {
    text.strip_suffix('%')
        .unwrap_or(text)
        .parse::<f64>()
        .ok()
        .filter(|percent| (0.0..=100.0).contains(percent))
        .map(|percent| percent / 100.0)
        .ok_or_else(|| "must be a number from 0 to 100".into())
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse::<f64>()
        .ok()
        .filter(|seconds| *seconds > 0.0 && *seconds <= 1e9)
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "must be a number of seconds above 0".into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[derive(Debug, Parser)]
    #[command(name = "downpour")]
    enum Every {
        Cloud(CloudArgs),
        Edge(EdgeArgs),
        Demo(DemoArgs),
        Push(PushArgs),
        Pull(PullArgs),
        Check(check::CheckArgs),
    }

    #[test]
    fn help_of_each_command_has_an_example() {
        Cli::command().debug_assert();
        let mut every = Every::command();
        every.build();
        every.clone().debug_assert();
        for command in every.get_subcommands_mut().filter(|c| c.get_name() != "help") {
            let help = command.render_long_help().to_string();
            assert!(help.contains(&format!("Example: downpour {}", command.get_name())), "{help}");
        }
    }

    #[test]
    fn invalid_arguments_exit_with_code_2() {
        let parse = |line: &str| Every::try_parse_from(line.split(' '));
        let Ok(Every::Demo(demo)) = parse("downpour demo --loss 20% --edges 3") else { panic!() };
        assert_eq!((demo.loss, demo.edges, demo.file), (0.2, 3, None));
        let Ok(Every::Push(push)) = parse("downpour push a.flv rtmp://h/a/b --loop --count 2")
        else {
            panic!()
        };
        assert_eq!((push.count, push.repeat, &push.url[..]), (2, true, "rtmp://h/a/b"));
        let Ok(Every::Pull(pull)) = parse("downpour pull http://h/a/b.flv --duration 0.5") else {
            panic!()
        };
        assert_eq!(pull.duration, Some(Duration::from_millis(500)));
        assert_eq!((pull.count, pull.output), (1, None));
        for line in [
            "downpour demo --loss 101",
            "downpour demo --loss NaN",
            "downpour demo --edges 0",
            "downpour push a.flv",
            "downpour push a.flv rtmp://h/a/b --count 10001",
            "downpour pull http://h/a/b.flv --duration -1",
            "downpour pull http://h/a/b.flv --duration inf",
            "downpour cloud config.yaml",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
