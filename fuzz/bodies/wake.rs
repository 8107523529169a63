//! What brings a tunnel up: rules from the configuration, packets of this host and what becomes of them.

use std::time::Duration;

use tunguard::client::on_demand::{Ended, OnDemand, Verdict};
use tunguard::client::wake::{Wake, WakeRule, describe, destination};
use tunguard::segment::{addresses, is_noise};
use tunguard::time::Time;
use tunguard::wire::vnet::VNET_LEN;

use super::input::Input;

/// Rules as text, then packets and events.
pub fn body(data: &[u8]) {
    let mut input = Input::new(data);
    let text = String::from_utf8_lossy(input.chunk()).into_owned();
    let mut rules = Vec::new();
    for line in text.lines() {
        match line.parse::<WakeRule>() {
            Ok(rule) => {
                assert_eq!(rule.to_string().parse(), Ok(rule.clone()), "{line:?} was shown as {rule}");
                rules.push(rule);
            }
            Err(why) => assert!(!why.is_empty() && !why.contains(char::is_control), "{why:?}"),
        }
    }
    let (wake, all) = (Wake::new(rules), Wake::new(Vec::new()));
    let mut now = Time::default() + Duration::from_secs(1);
    let mut demand = OnDemand::new(wake.clone(), Duration::from_secs(10), input.u8() & 1 != 0, now);
    let net = |text: &str| text.parse().expect("a network");
    demand.set_networks(&[net("10.9.0.2/24"), net("fd09::2/64")], &[net("192.168.7.0/24")]);
    demand.set_servers(vec![([198, 51, 100, 1], 55_555).into()]);
    while !input.is_empty() {
        match input.u8() % 10 {
            0..4 => {
                let read = [&[0; VNET_LEN], input.chunk()].concat();
                let packet = &read[VNET_LEN..];
                assert!(!wake.matches(packet) || all.matches(packet));
                assert!(!wake.matches(packet) || !is_noise(packet));
                assert!(!describe(packet).contains(char::is_control));
                if let (Some((_, to)), Some((ip, _))) = (addresses(packet), destination(packet)) {
                    assert_eq!(to, ip);
                }
                let listened = demand.listens();
                if listened && demand.handle_packet(now, &read) == Verdict::Wakes {
                    assert!(wake.matches(packet));
                    assert!(matches!(demand.held(), [held] if *held == read));
                    assert!(!demand.listens());
                }
            }
            4 => demand.handle_established(),
            5 => demand.handle_lost(now),
            6 => demand.handle_leaving(now),
            7 => {
                let ended = demand.handle_ended(now);
                assert_eq!(demand.listens(), ended != Ended::Again, "{ended:?}");
            }
            8 => demand.handle_network_changed(),
            _ => {
                let wait = Duration::from_millis(u64::from(input.u16()) * 2);
                now = demand.poll_timeout().unwrap_or(now + wait).max(now + wait);
            }
        }
        if demand.poll_timeout().is_some_and(|at| at <= now) {
            demand.handle_timeout(now);
            assert!(demand.poll_timeout().is_none_or(|at| at > now), "its deadline stays in the past");
        }
        while let Some(answer) = demand.poll_answer() {
            assert!(addresses(&answer).is_some());
        }
        // Never more than one is held back, however long it takes.
        assert!(demand.held().len() <= 1);
    }
}
