use std::{
    sync::{
        Barrier, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use super::*;

#[derive(Default)]
struct Calls(Mutex<Vec<String>>);

impl Calls {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock())
    }
}

impl OnDemand for Calls {
    fn wanted(&self, key: &StreamKey) {
        self.0.lock().push(format!("+{key}"));
    }

    fn unwanted(&self, key: &StreamKey) {
        self.0.lock().push(format!("-{key}"));
    }
}

fn key(name: &str) -> StreamKey {
    name.parse().unwrap()
}

#[test]
fn a_source_is_notified_of_streams_wanted_before_it_was_added() {
    let (demand, source) = (Arc::new(Demand::default()), Arc::new(Calls::default()));
    let wanted = demand.want(&key("live/a"));
    drop(demand.want(&key("live/b")));
    demand.add(source.clone());
    assert_eq!(source.take(), ["+live/a"]);
    drop(wanted);
    assert_eq!(source.take(), ["-live/a"]);
    assert!(demand.state.lock().keys.is_empty());
}

/// Needs `live/b` to bring `live/a`, as a source that mixes another stream does.
struct Chained {
    demand: Weak<Demand>,
    needs: Mutex<Option<Wanted>>,
    calls: Calls,
}

impl OnDemand for Chained {
    fn wanted(&self, wanted: &StreamKey) {
        self.calls.wanted(wanted);
        if *wanted == key("live/a") {
            *self.needs.lock() = self.demand.upgrade().map(|demand| demand.want(&key("live/b")));
        }
    }

    fn unwanted(&self, unwanted: &StreamKey) {
        self.calls.unwanted(unwanted);
        if *unwanted == key("live/a") {
            let needed = self.needs.lock().take();
            drop(needed);
        }
    }
}

#[test]
fn a_source_may_ask_for_another_stream_while_it_is_called() {
    let demand = Arc::new(Demand::default());
    let (needs, calls) = (Mutex::default(), Calls::default());
    let source = Arc::new(Chained { demand: Arc::downgrade(&demand), needs, calls });
    demand.add(source.clone());
    drop(demand.want(&key("live/a")));
    assert_eq!(source.calls.take(), ["+live/a", "+live/b", "-live/a", "-live/b"]);
}

/// Panics if `wanted` and `unwanted` do not alternate or overlap.
#[derive(Default)]
struct Alternates {
    wanted: AtomicBool,
    called: AtomicBool,
}

impl Alternates {
    fn change(&self, wanted: bool) {
        assert!(!self.called.swap(true, Ordering::SeqCst), "two calls at the same time");
        assert_eq!(self.wanted.swap(wanted, Ordering::SeqCst), !wanted);
        assert!(self.called.swap(false, Ordering::SeqCst));
    }
}

impl OnDemand for Alternates {
    fn wanted(&self, _: &StreamKey) {
        self.change(true);
    }

    fn unwanted(&self, _: &StreamKey) {
        self.change(false);
    }
}

#[test]
fn calls_alternate_while_players_come_and_go_on_many_threads() {
    let (demand, source) = (Arc::new(Demand::default()), Arc::new(Alternates::default()));
    demand.add(source.clone());
    let start = Barrier::new(4);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                start.wait();
                (0..2_000).for_each(|_| drop(demand.want(&key("live/a"))));
            });
        }
    });
    assert!(!source.wanted.load(Ordering::SeqCst));
    let wanted = demand.want(&key("live/a"));
    assert!(source.wanted.load(Ordering::SeqCst));
    drop(wanted);
    assert!(!source.wanted.load(Ordering::SeqCst));
    assert!(demand.state.lock().keys.is_empty());
}
