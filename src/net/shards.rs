//! Threads that serve connections, each with an event loop of its own.
//!
//! An encoder sends some 70 small messages a second. On a runtime of several threads each of them
//! is likely to wake a thread, and threads that look for work take each other's; here, one
//! `epoll_wait` serves all the connections of a thread that have something to say.

use std::{
    cell::Cell,
    convert::Infallible,
    io,
    pin::Pin,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tokio::{runtime, sync::mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// What a thread is given to do. A panic ends it alone.
pub type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Threads that run tasks, which stay where they were begun. They end when this is dropped and
/// their tasks have ended.
#[derive(Debug)]
pub struct Shards {
    shards: Vec<Shard>,
    /// Cancelled when the first thread ends.
    ending: CancellationToken,
    /// Closes when the last thread has ended.
    alive: mpsc::Receiver<Infallible>,
}

#[derive(Debug)]
struct Shard {
    /// Bounded by who sends: as many tasks as there may be.
    tasks: mpsc::UnboundedSender<Job>,
    load: Arc<Load>,
}

/// What a shard's tasks share: as many references as tasks, and one.
#[derive(Debug)]
struct Load;

enum Job {
    Run(Task, Arc<Load>),
    #[cfg(test)]
    Panic,
}

impl Shards {
    /// Starts `count` threads, one at least.
    ///
    /// # Errors
    /// If a thread or its event loop cannot be had.
    pub fn spawn(count: usize) -> io::Result<Self> {
        let ending = CancellationToken::new();
        let (living, alive) = mpsc::channel(1);
        let shards = (0..count.max(1)).map(|number| {
            let (tasks, jobs) = mpsc::unbounded_channel();
            let (started, result) = std::sync::mpsc::sync_channel(1);
            // Both are dropped however the thread ends.
            let signs = (ending.clone().drop_guard(), living.clone());
            thread::Builder::new().name(format!("rtmp-{number}")).spawn(move || {
                let _signs = signs;
                // Made here, because it could not be dropped in the caller's runtime.
                match event_loop() {
                    Ok(runtime) => {
                        let _ = started.send(Ok(()));
                        runtime.block_on(run(jobs));
                    }
                    Err(error) => {
                        let _ = started.send(Err(error));
                    }
                }
            })?;
            result.recv().map_err(io::Error::other)??;
            Ok(Shard { tasks, load: Arc::new(Load) })
        });
        Ok(Self { shards: shards.collect::<io::Result<_>>()?, ending, alive })
    }

    /// Runs a task on the thread that has fewest. If that thread has ended, so has the task.
    pub fn run(&self, task: Task) {
        if let Some(shard) = self.shards.iter().min_by_key(|shard| Arc::strong_count(&shard.load)) {
            let _ = shard.tasks.send(Job::Run(task, shard.load.clone()));
        }
    }

    /// Waits for a thread to end, which only a bug can cause before [`Shards::join`]: its tasks are
    /// gone.
    pub async fn failed(&self) {
        self.ending.cancelled().await;
    }

    /// Takes no more tasks, and waits until all have ended.
    pub async fn join(self) {
        let Self { shards, mut alive, .. } = self;
        drop(shards);
        // Nobody can send; it ends with the last sender.
        let _ = alive.recv().await;
    }
}

fn event_loop() -> io::Result<runtime::Runtime> {
    runtime::Builder::new_current_thread()
        .enable_all()
        .on_thread_park(nap)
        .on_thread_unpark(woken)
        .build()
}

async fn run(mut jobs: mpsc::UnboundedReceiver<Job>) {
    let tasks = TaskTracker::new();
    while let Some(job) = jobs.recv().await {
        match job {
            Job::Run(task, load) => {
                tasks.spawn(async move {
                    task.await;
                    drop(load);
                });
            }
            #[cfg(test)]
            Job::Panic => panic!("as asked"),
        }
    }
    tasks.close();
    tasks.wait().await;
}

/// Before the thread waits for events. Where they come so quickly that the last wait was short, it
/// sleeps a little first, and then finds several at once: a switch to another thread and back costs
/// more than what one message takes.
fn nap() {
    if BUSY.get() {
        thread::sleep(NAP);
    }
    PARKED.set(Some(Instant::now()));
}

/// After it.
fn woken() {
    BUSY.set(PARKED.get().is_some_and(|at| at.elapsed() < NAP));
}

thread_local! {
    static PARKED: Cell<Option<Instant>> = const { Cell::new(None) };
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// What a message may be held up by on a busy thread, to which the system adds some 50 µs.
const NAP: Duration = Duration::from_micros(150);

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, sync::Mutex, thread::ThreadId};

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        sync::Semaphore,
        time::timeout,
    };

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn tasks_are_spread_evenly_and_freed_places_are_taken_again() {
        let shards = Shards::spawn(3).unwrap();
        let places = Arc::<Mutex<HashMap<ThreadId, usize>>>::default();
        let (go, running) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let task = || -> Task {
            let (places, go, running) = (places.clone(), go.clone(), running.clone());
            Box::pin(async move {
                *places.lock().unwrap().entry(thread::current().id()).or_default() += 1;
                running.add_permits(1);
                let _permit = go.acquire().await.unwrap();
            })
        };
        for _ in 0..30 {
            shards.run(task());
        }
        timeout(SOON, running.acquire_many(30)).await.unwrap().unwrap().forget();
        let counts: Vec<_> = places.lock().unwrap().values().copied().collect();
        assert_eq!(counts, [10; 3]);

        // Those of one thread end; the next ones go there.
        shards.shards[1].tasks.send(Job::Run(task(), shards.shards[1].load.clone())).unwrap();
        timeout(SOON, running.acquire()).await.unwrap().unwrap().forget();
        assert_eq!(Arc::strong_count(&shards.shards[1].load), 12);
        shards.run(task());
        shards.run(task());
        timeout(SOON, running.acquire_many(2)).await.unwrap().unwrap().forget();
        assert!(shards.shards.iter().all(|shard| Arc::strong_count(&shard.load) == 12));
        go.add_permits(100);
        timeout(SOON, shards.join()).await.unwrap();
    }

    #[tokio::test]
    async fn a_panic_ends_its_task_and_no_other() {
        let shards = Shards::spawn(1).unwrap();
        shards.run(Box::pin(async { panic!("as asked") }));
        let (done, finished) = tokio::sync::oneshot::channel();
        shards.run(Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(10)).await;
            let _ = done.send(());
        }));
        timeout(SOON, finished).await.unwrap().unwrap();
        // It ends a moment after it has said so.
        let ended = async {
            while Arc::strong_count(&shards.shards[0].load) > 1 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(SOON, ended).await.unwrap();
        assert!(!shards.ending.is_cancelled());
    }

    #[tokio::test]
    async fn the_end_of_a_thread_is_told_and_takes_its_tasks_along() {
        let shards = Shards::spawn(2).unwrap();
        let (held, gone) = tokio::sync::oneshot::channel::<()>();
        shards.run(Box::pin(async move {
            let _held = held;
            std::future::pending().await
        }));
        assert!(timeout(Duration::from_millis(20), shards.failed()).await.is_err());
        shards.shards[0].tasks.send(Job::Panic).unwrap();
        timeout(SOON, shards.failed()).await.unwrap();
        assert!(timeout(SOON, gone).await.unwrap().is_err());
        timeout(SOON, shards.join()).await.unwrap();
    }

    #[tokio::test]
    async fn a_thread_that_naps_serves_what_comes() {
        let shards = Shards::spawn(1).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut near =
            tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let far = listener.accept().await.unwrap().0.into_std().unwrap();
        shards.run(Box::pin(async move {
            let mut far = tokio::net::TcpStream::from_std(far).unwrap();
            let mut byte = [0];
            while far.read_exact(&mut byte).await.is_ok() {
                // Whether it naps before it looks for the next one.
                far.write_all(&[byte[0], u8::from(BUSY.get())]).await.unwrap();
            }
        }));
        // An answer to each byte comes, however quickly they follow one another, and naps take their
        // time.
        let began = Instant::now();
        let mut naps = 0;
        for byte in (0..=255).cycle() {
            near.write_all(&[byte]).await.unwrap();
            let mut answer = [0; 2];
            timeout(SOON, near.read_exact(&mut answer)).await.unwrap().unwrap();
            assert_eq!(answer[0], byte);
            if naps == 200 {
                break;
            }
            naps += u32::from(answer[1]);
            // So that it has nothing to do, and naps before it waits.
            thread::sleep(Duration::from_micros(10));
            assert!(began.elapsed() < SOON, "{naps} naps");
        }
        // Where this thread was quicker all the same, a nap is left out.
        assert!(began.elapsed() > NAP * naps * 3 / 4, "{:?}", began.elapsed());
        drop(near);
        timeout(SOON, shards.join()).await.unwrap();
    }
}
