//! The command line.

pub mod check;
pub mod cloud;
pub mod demo;
pub mod edge;
mod needs;
pub mod pull;
pub mod push;
mod rates;

use std::{
    fmt, io,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::{
    config::ConfigError,
    node::{StartError, TaskEnded, limits::SystemLimits, logging::LogError},
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
    /// Does what the command line says.
    pub fn run(self) -> Result<(), Failure> {
        match self.command {
            Command::Cloud(args) => cloud::run(&args),
            Command::Edge(args) => edge::run(&args),
            Command::Demo(args) => demo::run(&args),
            Command::Push(args) => push::run(&args),
            Command::Pull(args) => pull::run(&args),
            Command::Check(args) => check::run(&args, &SystemLimits::take(), &mut io::stdout()),
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

/// Run a cloud node: take RTMP, send RTP to the edges, repair what they lose
///
/// It listens for encoders on rtmp_addr (:1935), for edges' repair requests on quic_addr (:4242)
/// and for HTTP on api_addr (:8090), and sends every stream to client_addr_list. SIGTERM and
/// SIGINT end it in order.
///
/// Example: downpour cloud --config /etc/downpour/config.yaml
#[derive(Debug, Clone, Args)]
#[command(verbatim_doc_comment)]
pub struct CloudArgs {
    /// The settings. Without it config.yaml of the working directory is read; if that is missing,
    /// the defaults are used and written there
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Run an edge node: take RTP, ask for what was lost, serve viewers
///
/// It takes RTP on udp_addr (:5222) and serves viewers on flv_addr (:8092) as
/// http://HOST:8092/APP/NAME.flv. SIGTERM and SIGINT end it in order.
///
/// Example: downpour edge --config /etc/downpour/edge.yaml
#[derive(Debug, Clone, Args)]
#[command(verbatim_doc_comment)]
pub struct EdgeArgs {
    /// The settings. Without it edge.yaml of the working directory is read; if that is missing,
    /// the defaults are used and written there
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Show it all on this machine: a cloud, edges, a looping test stream and a bad network between
///
/// Everything runs in one process on loopback, on free ports where the usual ones are taken.
/// It prints the URLs to watch and a live line of what is lost and repaired. Ctrl-C ends it.
///
/// Example: downpour demo --edges 3 --loss 20
#[derive(Debug, Clone, Args)]
#[command(verbatim_doc_comment)]
pub struct DemoArgs {
    /// The FLV to play in a loop, instead of the built-in test stream
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// How many edges to run, 1 to 64
    #[arg(long, value_name = "N", default_value = "1", value_parser = count::<64>)]
    pub edges: usize,
    /// Packets to lose between cloud and edges, in percent, 0 to 100. (As a share, 0 to 1, here.)
    #[arg(
        long,
        value_name = "P",
        default_value = "5",
        value_parser = percent,
        help = "Packets to lose between cloud and edges, in percent, 0 to 100"
    )]
    pub loss: f64,
}

/// Publish an FLV file over RTMP, at its own timestamps
///
/// At the end it reports how much was sent and how fast.
///
/// Example: downpour push movie.flv 'rtmp://127.0.0.1/live/cam{i}' --count 100 --loop
#[derive(Debug, Clone, Args)]
#[command(verbatim_doc_comment)]
pub struct PushArgs {
    /// The FLV to publish
    pub file: PathBuf,
    /// Where to: rtmp://HOST[:PORT]/APP/NAME; {i} becomes the connection's number, from 0
    pub url: String,
    /// How many connections to publish over at once, 1 to 10000
    #[arg(long, value_name = "N", default_value = "1", value_parser = count::<10_000>)]
    pub count: usize,
    /// Begin anew at the end of the file, with timestamps that go on
    #[arg(long = "loop")]
    pub repeat: bool,
}

/// Receive a stream over HTTP-FLV or RTMP
///
/// It runs until the stream ends, the duration is over or Ctrl-C, and reports how much came and
/// how fast.
///
/// Example: downpour pull http://127.0.0.1:8092/live/movie.flv --output movie.flv --duration 10
#[derive(Debug, Clone, Args)]
#[command(verbatim_doc_comment)]
pub struct PullArgs {
    /// From where: http://HOST[:PORT]/APP/NAME.flv or rtmp://HOST[:PORT]/APP/NAME; {i} becomes the
    /// connection's number, from 0
    pub url: String,
    /// The FLV to write; with --count, the first connection's stream
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// How many connections to receive over at once, 1 to 10000
    #[arg(long, value_name = "N", default_value = "1", value_parser = count::<10_000>)]
    pub count: usize,
    /// Seconds to receive for; without it, until the stream ends
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub duration: Option<Duration>,
}

/// Why a command failed, in one line for standard error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The settings, the arguments or the machine (a port that is taken) are at fault, and a start
    /// with the same ones fails again: exit code 2.
    Usage(String),
    /// Something went wrong under way: exit code 1.
    Run(String),
}

impl Failure {
    /// What the process exits with.
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

/// Runs `work` on a runtime of its own. SIGTERM and SIGINT cancel the token that it gets.
fn block_on<F>(work: impl FnOnce(CancellationToken) -> F) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>>,
{
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Run(format!("cannot start the runtime: {error}")))?;
    let outcome = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        tokio::spawn(signals(shutdown.clone()));
        work(shutdown).await
    });
    // A task that does not end by itself, a name look-up for one, must not hold up the exit.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

/// Cancels `shutdown` at the first SIGTERM or SIGINT; a second one ends the process at once.
async fn signals(shutdown: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("signals cannot be handled: SIGTERM will not drain");
        return;
    };
    loop {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        if shutdown.is_cancelled() {
            std::process::exit(130);
        }
        tracing::info!("shutting down");
        shutdown.cancel();
    }
}

/// A start that failed, with the file that the settings came from.
fn start_failure(file: Option<&Path>, error: &StartError) -> Failure {
    let file = file.map(|file| format!("{}: ", file.display())).unwrap_or_default();
    Failure::Usage(format!("{file}{error}"))
}

fn count<const MAX: usize>(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|count| (1..=MAX).contains(count))
        .ok_or_else(|| format!("give a whole number from 1 to {MAX}"))
}

/// A percentage as a share, 0 to 1.
fn percent(text: &str) -> Result<f64, String> {
    text.strip_suffix('%')
        .unwrap_or(text)
        .parse::<f64>()
        .ok()
        .filter(|percent| (0.0..=100.0).contains(percent))
        .map(|percent| percent / 100.0)
        .ok_or_else(|| "give a number from 0 to 100".into())
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse::<f64>()
        .ok()
        .filter(|seconds| *seconds > 0.0 && *seconds <= 1e9)
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "give a number of seconds over 0".into())
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
    fn definitions_are_sound_and_each_help_has_an_example() {
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
    fn arguments_are_checked() {
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
