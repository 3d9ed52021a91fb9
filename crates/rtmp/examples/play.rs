//! Plays a stream of an RTMP server into an FLV file, over a blocking socket, until it ends.
//!
//! ```console
//! $ cargo run -p downpour-rtmp --example play -- rtmp://localhost/live/movie copy.flv
//! ```

use std::{
    env,
    error::Error,
    fs::File,
    io::{BufWriter, Read, Write},
    net::TcpStream,
    process::{self, ExitCode},
    time::Duration,
};

use downpour_media::{flv::FlvWriter, timeline::Timeline};
use downpour_rtmp::{
    session::{ClientEvent, ClientSession, Purpose},
    url::RtmpUrl,
};

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let [url, path] = &arguments[..] else {
        eprintln!("usage: play rtmp://HOST[:PORT]/APP/NAME[?QUERY] FILE.flv");
        return ExitCode::from(2);
    };
    match play(url, path) {
        Ok(count) => {
            println!("wrote {count} tags to {path}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("cannot play {url}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the number of tags written.
fn play(url: &str, path: &str) -> Result<u64, Box<dyn Error>> {
    let url: RtmpUrl = url.parse()?;
    let mut socket = TcpStream::connect((url.host(), url.port()))?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    let mut session = ClientSession::new(url, Purpose::Play, process::id().into());
    let mut file = FlvWriter::new(BufWriter::new(File::create(path)?))?;
    let mut timeline = Timeline::default();
    let (mut buffer, mut count) = (vec![0; 64 << 10], 0);
    'stream: loop {
        socket.write_all(&session.take_output())?;
        let len = socket.read(&mut buffer)?;
        if len == 0 {
            if count == 0 {
                return Err("the server closed the connection".into());
            }
            break;
        }
        let mut input = &buffer[..len];
        while let Some(event) = session.receive(&mut input)? {
            match event {
                ClientEvent::Started => {}
                ClientEvent::Tag(tag) => {
                    file.write_at(&tag, timeline.rebase(tag.timestamp()))?;
                    count += 1;
                }
                ClientEvent::Ended => break 'stream,
            }
        }
    }
    file.flush()?;
    Ok(count)
}

/// The longest silence of the server.
const TIMEOUT: Duration = Duration::from_secs(30);
