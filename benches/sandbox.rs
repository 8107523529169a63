//! What a worker's system call filters cost: to put on, and then for each call. `make bench-micro`; needs no privileges.
//!
//! Nobody can take a filter off, so each figure comes from processes of its own: this program started again with the name
//! of the case, which writes nanoseconds to its stderr, the one descriptor that a filtered worker may write to.

use std::env;
use std::fmt::Display;
use std::hint::black_box;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::prctl;
use nix::unistd::getpid;
use tunguard::sys::seccomp::{Filter, worker};

fn main() {
    let arguments: Vec<String> = env::args().collect();
    if let [_, start, case] = &arguments[..]
        && start == CASE
    {
        return eprintln!("{}", Worker::new().spend(case).as_nanos());
    }
    let mut criterion = Criterion::default()
        .without_plots()
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    compiling(&mut criterion);
    installing(&mut criterion);
    calling(&mut criterion);
    criterion.final_summary();
}

fn compiling(criterion: &mut Criterion) {
    let worker = Worker::new();
    criterion.bench_function("sandbox/compile/both", |bencher| {
        bencher.iter(|| black_box([worker.admission(), worker.carrying()]));
    });
}

/// Each with its compilation, in a process that has just begun.
fn installing(criterion: &mut Criterion) {
    elsewhere(criterion, "sandbox/put on", &["first", "second"]);
}

/// `getpid` is allowed whatever its arguments, which the kernel remembers (Linux 5.11 and newer). Of `fcntl` an argument is
/// looked at by the filters each time, as of all calls that packets pass through.
fn calling(criterion: &mut Criterion) {
    let cases = ["getpid/unfiltered", "getpid/filtered", "fcntl/unfiltered", "fcntl/filtered"];
    elsewhere(criterion, &format!("sandbox/{CALLS} calls"), &cases);
}

/// What processes of their own spend on these cases.
fn elsewhere(criterion: &mut Criterion, name: &str, cases: &[&str]) {
    let mut group = criterion.benchmark_group(name);
    // What is counted is a small part of what it takes, a process for each.
    group.sample_size(50).sampling_mode(SamplingMode::Flat);
    group.warm_up_time(Duration::from_millis(20)).measurement_time(Duration::from_millis(100));
    for case in cases {
        group.bench_function(*case, |bencher| {
            bencher.iter_custom(|count| (0..count).map(|_| in_a_process(case)).sum());
        });
    }
}

fn in_a_process(case: &str) -> Duration {
    let program = env::current_exe().expect("the program's own path");
    let child = Command::new(program).args([CASE, case]).stdin(Stdio::null()).output();
    let child = child.expect("starts itself again");
    let said = String::from_utf8_lossy(&child.stderr);
    let nanoseconds = said.trim().parse().unwrap_or_else(|_| panic!("{case}: {} {said}", child.status));
    Duration::from_nanos(nanoseconds)
}

/// Descriptors that stand for a worker's.
struct Worker([UnixStream; 7]);

impl Worker {
    fn new() -> Worker {
        Worker(std::array::from_fn(|_| UnixStream::pair().expect("a pair of sockets").0))
    }

    /// In a process that ends afterwards.
    fn spend(&self, case: &str) -> Duration {
        prctl::set_no_new_privs().expect("forbids new privileges");
        match case {
            "first" => timed(|| put_on(self.admission())),
            "second" => {
                put_on(self.admission());
                timed(|| put_on(self.carrying()))
            }
            _ => {
                let (call, filtered) = case.split_once('/').expect("a call, and under what");
                if filtered == "filtered" {
                    put_on(self.admission());
                    put_on(self.carrying());
                }
                let make: &dyn Fn() = match call {
                    "getpid" => &|| _ = black_box(getpid()),
                    "fcntl" => &|| _ = ok(fcntl(&self.0[0], FcntlArg::F_GETFD)),
                    _ => panic!("{case}: no such case"),
                };
                timed(|| (0..CALLS).for_each(|_| make()))
            }
        }
    }

    fn admission(&self) -> Filter {
        let [guard, tcp, signing, ..] = self.0.each_ref().map(AsFd::as_fd);
        ok(Filter::compile(&worker::admission(worker::Newborn { guard, tcp, signing })))
    }

    fn carrying(&self) -> Filter {
        let [guard, tcp, _, udp, downlink, tun, epoll] = self.0.each_ref().map(AsFd::as_fd);
        let exit = worker::Exit::Device(tun);
        ok(Filter::compile(&worker::carrying(worker::Carrying { guard, tcp, udp, downlink, exit, epoll })))
    }
}

fn put_on(filter: Filter) {
    ok(filter.install());
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn ok<T>(outcome: Result<T, impl Display>) -> T {
    outcome.unwrap_or_else(|failure| panic!("{failure}"))
}

/// So few that most processes aren't interrupted meanwhile.
const CALLS: u64 = 1_000;
/// What a case's process is started with.
const CASE: &str = "--case";
