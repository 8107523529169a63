//! What each step of the data path costs, with no network and no system call, in the order a packet meets them:
//! `make bench-micro`. The guard's own step, finding the session, is in guard/benches/routes.rs.
//!
//! Each bench asserts first that it does what its name says: a step that fails is usually a fast one.

mod batch;
mod coalesce;
mod packets;
mod replay;
mod seal;
mod segment;
mod session;

use std::time::Duration;

use criterion::Criterion;

fn main() {
    let mut criterion = Criterion::default()
        .without_plots()
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    batch::benches(&mut criterion);
    segment::benches(&mut criterion);
    seal::benches(&mut criterion);
    replay::benches(&mut criterion);
    session::benches(&mut criterion);
    coalesce::benches(&mut criterion);
    criterion.final_summary();
}
