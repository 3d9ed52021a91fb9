//! `downpour pull`: receives a stream over HTTP-FLV or RTMP.

use std::{
    fs::File,
    io::{self, BufWriter},
    sync::Arc,
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Failure, PullArgs, block_on, rates::Rates};
use crate::{
    http::client::{FlvClient, FlvClientError, FlvUrl},
    rtmp::client::{ClientError, Player},
};
use downpour_media::flv::{FlvWriter, Tag, Tracks};
use downpour_rtmp::url::RtmpUrl;

pub use super::rates::Totals;

/// Receives streams, and prints rates to standard output. SIGTERM and SIGINT end it in order.
///
/// # Errors
/// Those of [`receive_all`].
pub fn run(args: &PullArgs) -> Result<(), Failure> {
    block_on(|stop| async move {
        receive_all(args, stop, &mut io::stdout()).await?;
        Ok(())
    })
}

/// Receives streams until they end, the duration is over or `stop` is cancelled. Writes the rates to
/// `out` once per second, and the totals at the end.
///
/// # Errors
/// [`Failure::Usage`] for an invalid URL or a file that cannot be created, [`Failure::Run`] if any
/// connection failed or received nothing.
pub async fn receive_all(
    args: &PullArgs,
    stop: CancellationToken,
    out: &mut impl io::Write,
) -> Result<Totals, Failure> {
    let urls = (0..args.count)
        .map(|i| SourceUrl::parse(&args.url.replace("{i}", &i.to_string())))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| Failure::Usage(format!("{}: {error}", args.url)))?;
    let mut output = match &args.output {
        Some(path) => Some(
            Output::create(path)
                .map_err(|error| Failure::Usage(format!("{}: {error}", path.display())))?,
        ),
        None => None,
    };
    let rates = Arc::new(Rates::new(urls.len()));
    let mut connections = JoinSet::new();
    for (i, url) in (0..).zip(urls) {
        let (rates, stop, output) = (rates.clone(), stop.clone(), output.take());
        connections.spawn(async move {
            // Spread over time: a server's queue of connections to accept is short.
            tokio::select! {
                () = sleep(CONNECT_INTERVAL * i) => {}
                () = stop.cancelled() => return,
            }
            let _open = rates.open();
            if let Err(error) = receive(&url, output, &stop, &rates).await {
                rates.error(&error);
            }
        });
    }
    let all = async { while connections.join_next().await.is_some() {} };
    tokio::pin!(all);
    let over = async {
        match args.duration {
            Some(duration) => sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = rates.report(out) => {}
        () = &mut all => {}
        () = over => {
            stop.cancel();
            all.await;
        }
    }
    rates.finish(out)
}

async fn receive(
    url: &SourceUrl,
    mut output: Option<Output>,
    stop: &CancellationToken,
    rates: &Rates,
) -> Result<(), PullError> {
    let mut source = tokio::select! {
        source = Source::connect(url) => source?,
        () = stop.cancelled() => return Err(PullError::Nothing),
    };
    let mut received = false;
    let mut last_tag = Instant::now();
    let result = loop {
        let next = tokio::select! {
            biased;
            () = stop.cancelled() => break Ok(()),
            next = timeout(FLUSH_INTERVAL, source.next()) => next,
        };
        match next {
            Ok(Ok(Some(tag))) => {
                received = true;
                last_tag = Instant::now();
                rates.tag(tag.body().len());
                if let Some(output) = &mut output {
                    output.write(&tag)?;
                }
            }
            Ok(Ok(None)) => break Ok(()),
            Ok(Err(error)) => break Err(error),
            Err(_) => {
                if let Some(output) = &mut output {
                    output.flush()?;
                }
                if last_tag.elapsed() > IDLE_TIMEOUT {
                    break Err(PullError::Silent);
                }
            }
        }
    };
    if let Some(mut output) = output {
        output.flush()?;
    }
    match result {
        Ok(()) if !received => Err(PullError::Nothing),
        result => result,
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum SourceUrl {
    Http(FlvUrl),
    Rtmp(RtmpUrl),
}

impl SourceUrl {
    fn parse(text: &str) -> Result<Self, String> {
        match text.split_once("://") {
            Some(("rtmp", _)) => text.parse().map(Self::Rtmp).map_err(|e| format!("{e}")),
            Some(("http" | "https", _)) => text.parse().map(Self::Http).map_err(|e| format!("{e}")),
            _ => Err("must be an http:// or rtmp:// URL".into()),
        }
    }
}

#[derive(Debug)]
enum Source {
    Http(FlvClient),
    Rtmp(Box<Player>),
}

impl Source {
    async fn connect(url: &SourceUrl) -> Result<Self, PullError> {
        Ok(match url {
            SourceUrl::Http(url) => Self::Http(FlvClient::connect(url, IDLE_TIMEOUT).await?),
            SourceUrl::Rtmp(url) => {
                Self::Rtmp(Box::new(Player::connect(url, SERVER_TIMEOUT).await?))
            }
        })
    }

    /// Waits for the next tag. Cancel-safe, as both clients are.
    async fn next(&mut self) -> Result<Option<Tag>, PullError> {
        Ok(match self {
            Self::Http(client) => client.next().await?,
            Self::Rtmp(player) => player.next().await?,
        })
    }
}

/// The output file. Writes block: this command has nothing else to do.
struct Output {
    writer: FlvWriter<BufWriter<File>>,
    flushed: Instant,
}

impl Output {
    fn create(path: &std::path::Path) -> io::Result<Self> {
        let file = BufWriter::new(File::create(path)?);
        let writer = FlvWriter::with_tracks(file, Tracks::default())?;
        Ok(Self { writer, flushed: Instant::now() })
    }

    fn write(&mut self, tag: &Tag) -> io::Result<()> {
        self.writer.write(tag)?;
        match self.flushed.elapsed() > FLUSH_INTERVAL {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.flushed = Instant::now();
        self.writer.flush_with_flags()
    }
}

#[derive(Debug, thiserror::Error)]
enum PullError {
    #[error(transparent)]
    Http(#[from] FlvClientError),
    #[error(transparent)]
    Rtmp(#[from] ClientError),
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
    #[error("nothing was received")]
    Nothing,
    #[error("the server sent nothing in time")]
    Silent,
}

const SERVER_TIMEOUT: Duration = Duration::from_secs(10);
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
const FLUSH_INTERVAL: Duration = Duration::from_millis(500);
const CONNECT_INTERVAL: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scheme_of_the_url_selects_the_protocol() {
        assert!(matches!(SourceUrl::parse("http://h/live/a.flv"), Ok(SourceUrl::Http(_))));
        assert!(matches!(SourceUrl::parse("rtmp://h/live/a"), Ok(SourceUrl::Rtmp(_))));
        for (text, expected) in [
            ("https://h/live/a.flv", "https"),
            ("rtmp://h/live", "application and a name"),
            ("file.flv", "http:// or rtmp://"),
        ] {
            let error = SourceUrl::parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
