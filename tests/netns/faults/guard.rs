//! SIGKILL of the guard at each state, and its next start (row 10 of the fault matrix).

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{Baseline, Bystander, gone, halt, halted};
use crate::kill::host;
use crate::lab::{Config, Lab, same_lines};
use crate::process::Process;
use crate::resume::cut;

/// Setting the host up, before anybody is served.
const SETTING_UP: &[&str] = &[
    "guard.device-made",
    "guard.addressed",
    "guard.routed",
    "guard.forwarding-noted",
    "guard.forwarding-half",
    "guard.forwarding",
    "guard.table-installed",
];
/// From a connection to a session with packets.
const TAKING_IN: &[&str] = &[
    "guard.accepted",
    "guard.worker-started",
    "guard.granted",
    "guard.queues-opened",
    "guard.routes-entered",
    "guard.client-heard",
];
const SWITCHING: &[&str] = &["guard.switching"];
const RELOADING: &[&str] = &["guard.reloading", "guard.reloaded"];
/// Saying goodbye, and putting the host back.
const STOPPING: &[&str] = &[
    "guard.stopping",
    "guard.workers-gone",
    "guard.table-removed",
    "guard.forwarding-half-back",
    "guard.host-restored",
];
pub const TABLES: &[&[&str]] = &[SETTING_UP, TAKING_IN, SWITCHING, RELOADING, STOPPING];

/// Fault: SIGKILL of the guard at each step of setting the host up. Pass: no process is left and the device is gone; what
/// remains is taken over by the next start, and after its end the host is what it was before the first.
#[test]
fn a_guard_killed_while_it_sets_the_host_up_is_cleaned_up_after() {
    let Some(lab) = Lab::rigged("kgup", 1) else { return };
    let config = all_of_the_host(&lab);
    let before = host(&lab);
    for point in SETTING_UP {
        lab.order(&[&halt(point)]);
        let mut server = lab.try_server(&config);
        server.wait_for_log(&halted(point));
        lab.order(&[]);
        kill_server(&lab, &mut server);
        let mut again = lab.start_server(&config);
        assert_eq!(again.stop(), 0, "{point}");
        same_lines(&before, &host(&lab), &format!("the server's host after {point}"));
    }
}

/// Fault: SIGKILL of the guard at each step from an accepted connection to a session that is heard. Pass: workers die
/// with it; after the next start both clients are back by themselves with the addresses they had, the bystander's
/// connection loses no byte, and then the server holds what it held.
#[test]
fn a_guard_killed_at_any_point_of_a_sessions_beginning_is_found_again() {
    let Some(lab) = Lab::rigged("kgenter", 2) else { return };
    let mut scene = Scene::set(&lab);
    for point in TAKING_IN {
        lab.order(&[&halt(point)]);
        let mut client = lab.try_client(1, &lab.client(1));
        scene.kill_and_start_again(point);
        lab.wait_for_tunnel(1, &mut client);
        scene.bystander_is_back(point);
        scene.is_left_by(&mut client, point);
    }
}

/// Fault: SIGKILL of the guard while a client's newer session takes over from its older one. Pass: as above.
#[test]
fn a_guard_killed_while_a_session_takes_over_is_found_again() {
    let Some(lab) = Lab::rigged("kgswitch", 2) else { return };
    Scene::set(&lab).lives_through(SWITCHING, |scene| cut(scene.lab));
}

/// Fault: SIGKILL of the guard while it reads certificates and lists again. Pass: as above.
#[test]
fn a_guard_killed_while_it_reloads_is_found_again() {
    let Some(lab) = Lab::rigged("kgreload", 2) else { return };
    Scene::set(&lab).lives_through(RELOADING, |scene| scene.server.signal(Signal::SIGHUP));
}

/// Fault: SIGKILL of the guard at each step of its end. Pass: workers die with it; the next start takes over what is
/// left, the bystander's connection goes on there, and after an end that nobody disturbs the host is what it was.
#[test]
fn a_guard_killed_while_it_stops_is_cleaned_up_after() {
    let Some(lab) = Lab::rigged("kgstop", 2) else { return };
    let before = host(&lab);
    let mut scene = Scene::set(&lab);
    for point in STOPPING {
        lab.order(&[&halt(point)]);
        scene.server.signal(Signal::SIGTERM);
        scene.kill_and_start_again(point);
        scene.bystander_is_back(point);
        assert_eq!(scene.server.stop(), 0, "{point}");
        same_lines(&before, &host(&lab), &format!("the server's host after {point}"));
        scene.start_again();
        scene.bystander_is_back(point);
    }
}

/// A server with a bystander, killed and started again and again.
struct Scene<'a> {
    lab: &'a Lab,
    config: Config,
    server: Process,
    bystander: Bystander,
    addresses: Vec<std::net::IpAddr>,
    baseline: Baseline,
    started: Instant,
}

impl<'a> Scene<'a> {
    fn set(lab: &'a Lab) -> Scene<'a> {
        let config = all_of_the_host(lab);
        let server = lab.start_server(&config);
        let bystander = Bystander::start(lab);
        let baseline = Baseline::of(lab, &server);
        let addresses = lab.inner(2);
        Scene { lab, config, server, bystander, addresses, baseline, started: Instant::now() }
    }

    /// A client that is connected when `lead_there` makes the guard come by each of `points` is found again as well.
    fn lives_through(&mut self, points: &[&str], lead_there: impl Fn(&Scene)) {
        for point in points {
            let mut client = self.lab.start_client(1, &self.lab.client(1));
            let addresses = self.lab.inner(1);
            self.lab.order(&[&halt(point)]);
            lead_there(self);
            self.kill_and_start_again(point);
            self.lab.wait_for_tunnel(1, &mut client);
            assert_eq!(self.lab.inner(1), addresses, "{point}");
            self.bystander_is_back(point);
            self.is_left_by(&mut client, point);
        }
    }

    /// At `point`, which was ordered.
    fn kill_and_start_again(&mut self, point: &str) {
        self.server.wait_for_log(&halted(point));
        self.lab.order(&[]);
        kill_server(self.lab, &mut self.server);
        self.start_again();
    }

    fn start_again(&mut self) {
        self.started = Instant::now();
        self.server = self.lab.start_server(&self.config);
    }

    fn bystander_is_back(&mut self, point: &str) {
        self.lab.wait_for_tunnel(2, &mut self.bystander.client);
        println!("{point}: clients are back {:?} after the next start", self.started.elapsed());
        assert!(self.started.elapsed() < Duration::from_secs(20), "{point}: it took too long");
        self.bystander.talk.exchange(100_000);
        assert_eq!(self.lab.inner(2), self.addresses, "{point}");
        assert_eq!(self.bystander.client.try_exit(), None, "{point}");
    }

    fn is_left_by(&mut self, client: &mut Process, point: &str) {
        assert_eq!(client.stop(), 0, "{point}");
        self.baseline.is_back(self.lab, &self.server, point);
    }
}

/// A server that changes everything that one may change on its host.
fn all_of_the_host(lab: &Lab) -> Config {
    lab.write("clients.d/c1.toml", "subnets = ['172.16.1.0/24', 'fd16:1::/64']\n");
    lab.server().set("nat", true).set("push.routes", "['192.168.50.0/24', 'fd50::/64']")
}

/// With everything that lives by it: workers, nursery, device.
fn kill_server(lab: &Lab, server: &mut Process) {
    let children = crate::process::children(server.pid());
    server.kill();
    gone(&children);
    assert!(lab.srv().addresses("tg0").is_empty(), "the device is left");
    assert_eq!(lab.srv().pids(), Vec::<i32>::new(), "processes are left");
}
