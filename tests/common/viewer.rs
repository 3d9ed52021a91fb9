//! HTTP-FLV viewers.

use std::{
    collections::HashSet,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use downpour_media::flv::{FILE_HEADER, FlvReader, Tag};

use super::{
    http::{self, Head},
    wait_for,
};

/// A viewer of one stream, from the time it is live until its end.
pub struct Viewer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

#[derive(Default)]
struct Shared {
    tags: Mutex<Vec<Tag>>,
    stop: AtomicBool,
    joined: AtomicBool,
}

impl Viewer {
    /// Requests `/{key}.flv` until the stream is live, and reads it to its end.
    pub fn watch(edge: SocketAddr, key: &str) -> Self {
        Self::watch_sharing(edge, key, &Memory::default())
    }

    /// The same for many viewers, which share the memory of equal tags.
    pub fn watch_sharing(edge: SocketAddr, key: &str, memory: &Memory) -> Self {
        let shared = Arc::<Shared>::default();
        let path = format!("/{key}.flv");
        let (state, memory) = (shared.clone(), memory.clone());
        let thread = std::thread::Builder::new()
            .name(format!("viewer of {key}"))
            .stack_size(512 * 1024)
            .spawn(move || state.run(edge, &path, &memory))
            .expect("no thread for a viewer");
        Self { shared, thread: Some(thread) }
    }

    /// Waits until at least `count` tags were received.
    #[track_caller]
    pub fn wait_tags(&self, count: usize, deadline: Duration) {
        wait_for(&format!("a viewer gets {count} tags"), deadline, || {
            (self.len() >= count).then_some(())
        });
    }

    /// Waits for the stream's end. Returns all received tags.
    #[track_caller]
    pub fn until_end(mut self, deadline: Duration) -> Vec<Tag> {
        let Some(thread) = self.thread.take() else { return self.tags() };
        wait_for("a viewer sees the stream's end", deadline, || thread.is_finished().then_some(()));
        thread.join().expect("a viewer's thread panicked").expect("a viewer's connection failed");
        self.tags()
    }

    /// Disconnects. Returns the tags received so far.
    pub fn leave(mut self) -> Vec<Tag> {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // An error after the disconnect does not matter.
            let _ = thread.join();
        }
        self.tags()
    }

    /// `true` if the stream has ended.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// `true` if the viewer has joined the stream.
    pub fn has_joined(&self) -> bool {
        self.shared.joined.load(Ordering::Relaxed)
    }

    pub fn len(&self) -> usize {
        self.shared.tags().len()
    }

    pub fn tags(&self) -> Vec<Tag> {
        self.shared.tags().clone()
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn run(&self, edge: SocketAddr, path: &str, memory: &Memory) -> io::Result<()> {
        let Some(mut socket) = self.join(edge, path)? else { return Ok(()) };
        socket.set_read_timeout(Some(POLL))?;
        let mut reader = FlvReader::new();
        let mut buffer = vec![0; 64 * 1024];
        while !self.stop.load(Ordering::Relaxed) {
            match socket.read(&mut buffer) {
                Ok(0) if reader.is_inside_tag() => {
                    return Err(io::Error::other("the stream ended inside a tag"));
                }
                Ok(0) => return Ok(()),
                Ok(count) => {
                    reader.push(&buffer[..count]);
                    while let Some(tag) = reader.next_tag().map_err(io::Error::other)? {
                        let tag = memory.intern(tag);
                        self.tags().push(tag);
                    }
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                    ) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Requests the stream until it is live. A restarting node may refuse.
    fn join(&self, edge: SocketAddr, path: &str) -> io::Result<Option<TcpStream>> {
        let until = Instant::now() + JOIN_DEADLINE;
        while !self.stop.load(Ordering::Relaxed) {
            let answer = http::request(edge, path).and_then(|mut socket| {
                let head = http::read_head(&mut socket)?;
                Ok((socket, head))
            });
            match answer {
                Ok((socket, Head { status: 200, fields })) => {
                    if !fields.contains("content-type: video/x-flv") || fields.contains("chunked") {
                        return Err(io::Error::other(format!("not a plain FLV body: {fields}")));
                    }
                    self.joined.store(true, Ordering::Relaxed);
                    return Ok(Some(socket));
                }
                Ok((_, head)) if Instant::now() > until => {
                    return Err(io::Error::other(format!("still refused: {}", head.fields)));
                }
                Err(error) if Instant::now() > until => return Err(error),
                _ => std::thread::sleep(Duration::from_millis(10)),
            }
        }
        Ok(None)
    }

    fn tags(&self) -> std::sync::MutexGuard<'_, Vec<Tag>> {
        self.tags.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Shares equal tags of many viewers.
#[derive(Clone, Default)]
pub struct Memory(Arc<Mutex<HashSet<Held>>>);

impl Memory {
    fn intern(&self, tag: Tag) -> Tag {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(same) = held.get(&tag.framed()[..]) {
            return same.0.clone();
        }
        held.insert(Held(tag.clone()));
        tag
    }
}

struct Held(Tag);

impl std::borrow::Borrow<[u8]> for Held {
    fn borrow(&self) -> &[u8] {
        self.0.framed()
    }
}

impl std::hash::Hash for Held {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.framed()[..].hash(state);
    }
}

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Eq for Held {}

/// Writes tags as an FLV file.
pub fn save(tags: &[Tag], path: &Path) {
    let mut bytes = FILE_HEADER.to_vec();
    for tag in tags {
        bytes.extend_from_slice(tag.framed());
    }
    std::fs::File::create(path)
        .and_then(|mut file| file.write_all(&Bytes::from(bytes)))
        .expect("cannot write an FLV");
}

const POLL: Duration = Duration::from_millis(100);
const JOIN_DEADLINE: Duration = Duration::from_secs(60);
