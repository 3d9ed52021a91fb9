//! Processor load of the measured processes and of the machine.

use std::{collections::HashMap, fs, io, thread, time::Instant};

/// Load between two snapshots.
#[derive(Debug, Clone)]
pub struct Load {
    /// Name and load in cores of each process.
    processes: Vec<(&'static str, f64)>,
    /// The busiest thread of the nodes, and its load in cores.
    thread: (String, f64),
    /// Share of the machine that the measured processes used.
    ours: f64,
    /// Share of the machine that all other processes used.
    others: f64,
}

impl Load {
    /// The load that limits the throughput: of the busiest thread or of the machine.
    pub fn highest(&self) -> f64 {
        self.thread.1.max(self.ours).max(0.001)
    }

    /// Formats the load for the report.
    pub fn line(&self) -> String {
        let percent = |share: f64| share * 100.0;
        let processes: Vec<_> = self
            .processes
            .iter()
            .map(|(name, share)| format!("{name} {:.0} %", percent(*share)))
            .collect();
        format!(
            "per core {}; busiest thread {} {:.0} %; of the machine {:.0} %, other work {:.0} %",
            processes.join(", "),
            self.thread.0,
            percent(self.thread.1),
            percent(self.ours),
            percent(self.others)
        )
    }
}

/// Processor time used so far, in seconds.
pub struct CpuSnapshot {
    at: Instant,
    /// All processes of the machine.
    machine: f64,
    processes: Vec<(&'static str, Threads)>,
}

impl CpuSnapshot {
    pub fn take(processes: &[(&'static str, u32)]) -> io::Result<Self> {
        let processes = processes
            .iter()
            .map(|(name, id)| Ok((*name, threads(*id)?)))
            .collect::<io::Result<_>>()?;
        Ok(Self { at: Instant::now(), machine: machine_seconds()?, processes })
    }

    /// The load since `before`. The last `children` processes are not nodes: their threads do not
    /// count as the busiest.
    pub fn since(&self, before: &Self, children: usize) -> Load {
        let seconds = self.at.duration_since(before.at).as_secs_f64();
        let cores = thread::available_parallelism().map_or(1, |count| count.get()) as f64;
        let mut load =
            Load { processes: Vec::new(), thread: (String::new(), 0.0), ours: 0.0, others: 0.0 };
        for (index, ((name, now), (_, then))) in
            self.processes.iter().zip(&before.processes).enumerate()
        {
            let mut whole = 0.0;
            for (id, (thread, used)) in now {
                let share = (used - then.get(id).map_or(0.0, |(_, used)| *used)) / seconds;
                whole += share;
                if index < self.processes.len() - children && share > load.thread.1 {
                    load.thread = (format!("{name}/{thread}"), share);
                }
            }
            load.processes.push((name, whole));
        }
        load.ours = load.processes.iter().map(|(_, share)| share).sum::<f64>() / cores;
        load.others = ((self.machine - before.machine) / seconds / cores - load.ours).max(0.0);
        load
    }
}

/// Name and seconds of processor time per thread id.
type Threads = HashMap<u32, (String, f64)>;

/// Reads the threads of a process (`schedstat`, in nanoseconds).
fn threads(process: u32) -> io::Result<Threads> {
    let mut threads = Threads::new();
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let entry = entry?;
        let read = |name| fs::read_to_string(entry.path().join(name));
        // The thread may have ended meanwhile.
        let (Ok(stat), Ok(name)) = (read("schedstat"), read("comm")) else { continue };
        let nanos = stat.split(' ').next().and_then(|nanos| nanos.parse::<f64>().ok());
        let id = entry.file_name().to_string_lossy().parse().ok();
        if let (Some(nanos), Some(id)) = (nanos, id) {
            threads.insert(id, (name.trim().to_owned(), nanos / 1e9));
        }
    }
    Ok(threads)
}

/// Busy seconds of the machine's processors (`/proc/stat`, proc(5)).
fn machine_seconds() -> io::Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let numbers: Vec<f64> = stat
        .lines()
        .next()
        .into_iter()
        .flat_map(str::split_whitespace)
        .filter_map(|word| word.parse().ok())
        .collect();
    // user nice system (idle iowait) irq softirq
    let busy = [0, 1, 2, 5, 6].iter().filter_map(|index| numbers.get(*index)).sum::<f64>();
    Ok(busy / TICKS)
}

/// `USER_HZ`, a constant in Linux.
const TICKS: f64 = 100.0;
