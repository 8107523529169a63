//! SIGKILL of a client's processes at each state (row 11 of the fault matrix).

use std::fs;

use nix::sys::signal::Signal;

use super::{Baseline, Bystander, gone, halt, halted, kill_and_wait};
use crate::lab::{Config, INNER_V4, Lab, same_lines};
use crate::process::Process;

/// From the start to the tunnel.
const SETTING_UP: &[&str] = &[
    "supervisor.device-made",
    "supervisor.tunnel-started",
    "supervisor.dialling",
    "supervisor.dialled",
    "supervisor.addressed",
    "supervisor.host-routes-noted",
    "supervisor.host-routes-half",
    "supervisor.routes-half",
    "supervisor.dns-noted",
    "supervisor.dns-written",
    "supervisor.configured",
];
/// From the signal to the host as it was.
const LEAVING: &[&str] = &[
    "supervisor.stopping",
    "supervisor.tunnel-gone",
    "supervisor.dns-back",
    "supervisor.routes-half-gone",
    "supervisor.cleared",
];
const CONNECTING: &[&str] =
    &["tunnel.locked-in", "tunnel.dialling", "tunnel.connecting", "tunnel.configuring", "tunnel.established"];
/// Of a session whose keys are renewed every two seconds.
const AT_WORK: &[&str] = &["tunnel.rekeying", "tunnel.rekeyed"];
const MOVING: &[&str] = &["tunnel.moving"];
const ENDING: &[&str] = &["tunnel.leaving"];
/// Of a client that connects on demand.
const ON_DEMAND: &[&str] = &["supervisor.asleep", "supervisor.woken", "supervisor.asleep-again"];
const ON_DEMAND_TUNNEL: &[&str] = &["tunnel.early-arrived", "tunnel.idle"];
pub const TABLES: &[&[&str]] =
    &[SETTING_UP, LEAVING, CONNECTING, AT_WORK, MOVING, ENDING, ON_DEMAND, ON_DEMAND_TUNNEL];

/// Fault: SIGKILL of the supervisor at each step of setting the host up. Pass: its tunnel process dies with it and the
/// device is gone; the next start has a tunnel whatever it finds, and after its end routes and resolvers are what they
/// were; the bystander loses nothing, and the server holds what it held.
#[test]
fn a_client_killed_while_it_sets_the_host_up_is_repaired_by_the_next_start() {
    let Some(lab) = Lab::rigged("kcup", 2) else { return };
    let mut scene = Scene::set(&lab);
    for point in SETTING_UP {
        lab.order(&[&halt(point)]);
        let mut client = scene.try_client();
        client.wait_for_log(&halted(point));
        scene.kill_client(&mut client, point);
    }
}

/// Fault: SIGKILL of the supervisor at each step of putting the host back. Pass: as above.
#[test]
fn a_client_killed_while_it_leaves_is_repaired_by_the_next_start() {
    let Some(lab) = Lab::rigged("kcleave", 2) else { return };
    let mut scene = Scene::set(&lab);
    for point in LEAVING {
        let mut client = scene.try_client();
        lab.wait_for_tunnel(1, &mut client);
        lab.order(&[&halt(point)]);
        client.signal(Signal::SIGTERM);
        client.wait_for_log(&halted(point));
        scene.kill_client(&mut client, point);
    }
}

/// Fault: SIGKILL of the tunnel process at each state up to the session. Pass: the supervisor says that it died and
/// starts another, which makes the tunnel; after the client's end its host is what it was; the bystander loses nothing,
/// and the server holds what it held.
#[test]
fn a_tunnel_process_killed_on_the_way_to_a_session_is_replaced() {
    let Some(lab) = Lab::rigged("kctunnel", 2) else { return };
    let mut scene = Scene::set(&lab);
    for point in CONNECTING {
        lab.order(&[&halt(point)]);
        let mut client = scene.try_client();
        scene.kill_tunnel(&mut client, point);
    }
}

/// Fault: SIGKILL of the tunnel process while keys are renewed. Pass: as above.
#[test]
fn a_tunnel_process_killed_while_keys_are_renewed_is_replaced() {
    let Some(lab) = Lab::rigged("kcrekey", 2) else { return };
    let mut scene = Scene::set(&lab);
    scene.config = scene.config.set("data.rekey", "'2s'");
    for point in AT_WORK {
        lab.order(&[&halt(point)]);
        let mut client = scene.try_client();
        scene.kill_tunnel(&mut client, point);
    }
}

/// Fault: SIGKILL of the tunnel process while it takes over the sockets of a new address. Pass: as above.
#[test]
fn a_tunnel_process_killed_while_its_host_moves_is_replaced() {
    let Some(lab) = Lab::rigged("kcmove", 2) else { return };
    let mut scene = Scene::set(&lab);
    for point in MOVING {
        lab.order(&[&halt(point)]);
        let mut client = scene.try_client();
        lab.wait_for_tunnel(1, &mut client);
        lab.c(1).ip(&["addr", "add", "198.18.1.77/24", "dev", "eth0"]);
        lab.c(1).ip(&["route", "replace", "default", "via", "198.18.1.1", "src", "198.18.1.77"]);
        lab.c(1).ip(&["addr", "del", "198.18.1.2/24", "dev", "eth0"]);
        // The second address of the network becomes its first.
        lab.c(1).ip(&["addr", "replace", "198.18.1.77/24", "dev", "eth0"]);
        lab.c(1).ip(&["route", "replace", "default", "via", "198.18.1.1"]);
        scene.routes = None;
        scene.kill_tunnel(&mut client, point);
    }
}

/// Fault: SIGKILL of the tunnel process as it is about to say goodbye. Pass: the supervisor puts the host back and ends
/// well; the server is rid of the session when the next one takes over.
#[test]
fn a_tunnel_process_killed_before_its_goodbye_holds_nothing_up() {
    let Some(lab) = Lab::rigged("kcbye", 2) else { return };
    let mut scene = Scene::set(&lab);
    for point in ENDING {
        lab.order(&[&halt(point)]);
        let mut client = scene.try_client();
        lab.wait_for_tunnel(1, &mut client);
        lab.order(&[]);
        let tunnel = client.wait_for_children(1)[0];
        client.signal(Signal::SIGTERM);
        client.wait_for_log(&halted(point));
        kill_and_wait(tunnel);
        assert_eq!(client.exit(), 0, "{}", client.log());
        scene.host_is_back(point);
        scene.next_start_is_good(point);
    }
}

/// Fault: SIGKILL of the supervisor of a client on demand that sleeps, is woken, or has just fallen asleep again. Pass: as
/// for any client; the next start sleeps, and wakes.
#[test]
fn a_client_on_demand_killed_at_any_point_is_repaired_by_the_next_start() {
    let Some(lab) = Lab::rigged("kcdemand", 2) else { return };
    let mut scene = Scene::set(&lab);
    scene.connects_on_demand();
    for point in ON_DEMAND {
        lab.order(&[&halt(point)]);
        let mut client = scene.try_client();
        client.wait_for_log("asleep: waits for packets");
        // It may not be answered.
        lab.c(1).run(&["ping", "-n", "-c", "1", "-W", "1", INNER_V4]);
        client.wait_for_log(&halted(point));
        scene.kill_client(&mut client, point);
    }
}

/// Fault: SIGKILL of the tunnel process of a client on demand when its first packets have arrived with the Hello, or as it
/// begins to leave. Pass: the client sleeps or connects again, and either way there is a tunnel for the next packet.
#[test]
fn a_tunnel_process_on_demand_killed_at_any_point_is_replaced() {
    let Some(lab) = Lab::rigged("kctdemand", 2) else { return };
    let mut scene = Scene::set(&lab);
    scene.connects_on_demand();
    for point in ON_DEMAND_TUNNEL {
        lab.order(&[&halt(point)]);
        let mut client = scene.try_client();
        client.wait_for_log("asleep: waits for packets");
        lab.c(1).run(&["ping", "-n", "-c", "1", "-W", "1", INNER_V4]);
        client.wait_for_log(&halted(point));
        lab.order(&[]);
        kill_and_wait(client.wait_for_children(1)[0]);
        lab.wait_for_tunnel(1, &mut client);
        scene.ends_well(&mut client, point);
    }
}

/// A server that pushes everything, a bystander, and the host of client 1 as it was.
struct Scene<'a> {
    lab: &'a Lab,
    config: Config,
    server: Process,
    bystander: Bystander,
    baseline: Baseline,
    /// Of client 1; none where the test changes them itself.
    routes: Option<Vec<String>>,
}

impl<'a> Scene<'a> {
    fn set(lab: &'a Lab) -> Scene<'a> {
        let pushed = lab.server().set("nat", true).set("push.dns", "['10.9.0.1']");
        let server = lab.start_server(&pushed.set("push.routes", "['0.0.0.0/0', '::/0']"));
        let bystander = Bystander::start(lab);
        let baseline = Baseline::of(lab, &server);
        lab.wait_for_carrier(1);
        let routes = Some(lab.c(1).routes());
        Scene { lab, config: lab.client(1).without("dns"), server, bystander, baseline, routes }
    }

    /// And has done so once: the server's place and the addresses are known.
    fn connects_on_demand(&mut self) {
        self.config = self.config.clone().set("on_demand.enabled", true).set("on_demand.idle", "'1s'");
        self.next_start_is_good("learning");
    }

    fn try_client(&self) -> Process {
        self.lab.client_with_own_etc(1, "", &self.config)
    }

    /// The supervisor is halted at `point`.
    fn kill_client(&mut self, client: &mut Process, point: &str) {
        self.lab.order(&[]);
        let children = client.children();
        client.kill();
        gone(&children);
        let lab = self.lab;
        assert!(lab.c(1).addresses("tg0").is_empty(), "{point}: the device is left");
        assert_eq!(lab.c(1).pids(), Vec::<i32>::new(), "{point}: processes are left");
        self.bystander.is_unharmed(lab, point);
        self.next_start_is_good(point);
    }

    /// The tunnel process is about to halt at `point`.
    fn kill_tunnel(&mut self, client: &mut Process, point: &str) {
        client.wait_for_log(&halted(point));
        self.lab.order(&[]);
        let tunnel = client.wait_for_children(1)[0];
        kill_and_wait(tunnel);
        client.wait_for_log("the tunnel process died: signal: 9");
        self.bystander.is_unharmed(self.lab, point);
        let lab = self.lab;
        client.eventually(&format!("{point}: another tunnel process"), || {
            client_has_another(lab, tunnel).then_some(())
        });
        lab.wait_for_tunnel(1, client);
        self.ends_well(client, point);
    }

    fn next_start_is_good(&mut self, point: &str) {
        let mut again = self.try_client();
        self.lab.wait_for_tunnel(1, &mut again);
        self.ends_well(&mut again, point);
    }

    fn ends_well(&mut self, client: &mut Process, point: &str) {
        assert_eq!(client.stop(), 0, "{point}: {}", client.log());
        self.host_is_back(point);
        self.bystander.is_unharmed(self.lab, point);
        self.baseline.is_back(self.lab, &self.server, point);
    }

    fn host_is_back(&self, point: &str) {
        if let Some(routes) = &self.routes {
            same_lines(routes, &self.lab.c(1).routes(), &format!("the client's routes after {point}"));
        }
        let resolvers = fs::read_to_string(self.lab.path("etc/resolv.conf")).expect("resolv.conf");
        assert_eq!(resolvers, "nameserver 198.18.100.53\n", "{point}");
    }
}

/// Client 1's host has a tunnel process that isn't this one.
fn client_has_another(lab: &Lab, tunnel: i32) -> bool {
    let named = |pid: &i32| crate::process::field(*pid, "Name").is_some_and(|name| name == "tunguard-tunnel");
    lab.c(1).pids().iter().any(|pid| *pid != tunnel && named(pid))
}
