//! Threads that serve connections, each with a separate event loop.
//!
//! An encoder sends about 70 small messages per second. On a multi-threaded runtime nearly each of
//! them wakes a thread, and idle threads steal each other's work. Here one `epoll_wait` returns all
//! readable connections of a thread.

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

/// A task of a thread. A panic ends only this task.
pub type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Threads that run tasks. A task stays on its thread. The threads end once this is dropped and their
/// tasks have ended.
#[derive(Debug)]
pub struct Shards {
    shards: Vec<Shard>,
    /// Cancelled when the first thread ends.
    ending: CancellationToken,
    /// Closes once the last thread has ended.
    alive: mpsc::Receiver<Infallible>,
}

#[derive(Debug)]
struct Shard {
    /// Bounded by the caller: one message per task.
    tasks: mpsc::UnboundedSender<Job>,
    load: Arc<Load>,
}

/// Counts the tasks of a shard: it has one reference per task, and one more.
#[derive(Debug)]
struct Load;

enum Job {
    Run(Task, Arc<Load>),
    #[cfg(test)]
    Panic,
}

impl Shards {
    /// Starts `count` threads, at least one.
    ///
    /// # Errors
    /// If a thread or its event loop cannot be created.
    pub fn spawn(count: usize) -> io::Result<Self> {
        let ending = CancellationToken::new();
        let (living, alive) = mpsc::channel(1);
        let shards = (0..count.max(1)).map(|number| {
            let (tasks, jobs) = mpsc::unbounded_channel();
            let (started, result) = std::sync::mpsc::sync_channel(1);
            // Dropped however the thread ends.
            let alive = (ending.clone().drop_guard(), living.clone());
            thread::Builder::new().name(format!("rtmp-{number}")).spawn(move || {
                let _alive = alive;
                // Created here: a runtime must not be dropped inside the caller's runtime.
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

    /// Runs a task on the thread with the fewest tasks. If that thread has ended, drops the task.
    pub fn run(&self, task: Task) {
        if let Some(shard) = self.shards.iter().min_by_key(|shard| Arc::strong_count(&shard.load)) {
            let _ = shard.tasks.send(Job::Run(task, shard.load.clone()));
        }
    }

    /// Waits until a thread ends. Before [`Shards::join`] only a bug can cause that; the tasks of the
    /// thread are lost.
    pub async fn failed(&self) {
        self.ending.cancelled().await;
    }

    /// Waits until all tasks and threads have ended.
    pub async fn join(self) {
        let Self { shards, mut alive, .. } = self;
        drop(shards);
        // Nothing is ever sent: the channel closes with its last sender.
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
            Job::Panic => panic!("a test ends this thread"),
        }
    }
    tasks.close();
    tasks.wait().await;
}

/// Runs before the thread waits for events. If the last wait was short, it sleeps for [`NAP`], so that
/// the next `epoll_wait` returns several events: a context switch costs more than the work for one
/// message.
fn nap() {
    if BUSY.get() {
        thread::sleep(NAP);
    }
    PARKED.set(Some(Instant::now()));
}

/// Runs after the thread has waited for events.
fn woken() {
    BUSY.set(PARKED.get().is_some_and(|at| at.elapsed() < NAP));
}

thread_local! {
    static PARKED: Cell<Option<Instant>> = const { Cell::new(None) };
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// The most that a message is delayed on a busy thread. The system adds about 50 µs.
const NAP: Duration = Duration::from_micros(150);

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, thread::ThreadId};

    use parking_lot::Mutex;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        sync::Semaphore,
        time::timeout,
    };

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn tasks_run_on_the_thread_with_the_fewest_tasks() {
        let shards = Shards::spawn(3).unwrap();
        let places = Arc::<Mutex<HashMap<ThreadId, usize>>>::default();
        let (go, running) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let task = || -> Task {
            let (places, go, running) = (places.clone(), go.clone(), running.clone());
            Box::pin(async move {
                *places.lock().entry(thread::current().id()).or_default() += 1;
                running.add_permits(1);
                let _permit = go.acquire().await.unwrap();
            })
        };
        for _ in 0..30 {
            shards.run(task());
        }
        timeout(SOON, running.acquire_many(30)).await.unwrap().unwrap().forget();
        let counts: Vec<_> = places.lock().values().copied().collect();
        assert_eq!(counts, [10; 3]);

        // One thread has two tasks more than the others; the next ones run there.
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
    async fn panic_ends_its_task_only() {
        let shards = Shards::spawn(1).unwrap();
        shards.run(Box::pin(async { panic!("a test ends this task") }));
        let (done, finished) = tokio::sync::oneshot::channel();
        shards.run(Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(10)).await;
            let _ = done.send(());
        }));
        timeout(SOON, finished).await.unwrap().unwrap();
        // The task ends shortly after it has sent.
        let ended = async {
            while Arc::strong_count(&shards.shards[0].load) > 1 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(SOON, ended).await.unwrap();
        assert!(!shards.ending.is_cancelled());
    }

    #[tokio::test]
    async fn end_of_a_thread_is_reported_and_ends_its_tasks() {
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
    async fn napping_thread_answers_each_byte() {
        let shards = Shards::spawn(1).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut near =
            tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let far = listener.accept().await.unwrap().0.into_std().unwrap();
        shards.run(Box::pin(async move {
            let mut far = tokio::net::TcpStream::from_std(far).unwrap();
            let mut byte = [0];
            while far.read_exact(&mut byte).await.is_ok() {
                // The second byte is 1 if the thread naps before the next wait.
                far.write_all(&[byte[0], u8::from(BUSY.get())]).await.unwrap();
            }
        }));
        // Each byte gets an answer, however quickly they follow one another.
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
            // Lets the thread become idle, so that it naps before it waits.
            thread::sleep(Duration::from_micros(10));
            assert!(began.elapsed() < SOON, "{naps} naps");
        }
        // A nap is left out if this thread sends the next byte before it. A quarter is the margin.
        assert!(began.elapsed() > NAP * naps * 3 / 4, "{:?}", began.elapsed());
        drop(near);
        timeout(SOON, shards.join()).await.unwrap();
    }
}
