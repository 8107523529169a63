//! Real binaries between network namespaces: what a user would see, on a network made for each test.
//!
//! ```text
//!   <lab>-c1 ----veth---- 198.18.1.1  \
//!   198.18.1.2                         \
//!   2001:db8:1::2       2001:db8:1::1   \
//!                                        <lab>-net ----veth---- <lab>-srv ----veth---- <lab>-lan
//!   <lab>-c2 ----veth---- 198.18.2.1    /  198.18.100.1         198.18.100.2
//!   198.18.2.2                         /   2001:db8:100::1      2001:db8:100::2
//!   2001:db8:2::2       2001:db8:2::1 /                         192.168.50.1           192.168.50.2
//!     ...                            a router                   fd50::1                fd50::2
//!     tg0 10.9.0.x, fd09::x                                     tg0 10.9.0.1, fd09::1  (no default route)
//! ```
//!
//! `<lab>` is `tg<pid>-<test>`: labs don't see each other, tests run in parallel, and what a killed test process
//! left behind is swept away by the next one. Nothing leaves the namespaces.
//!
//! Needs root, /dev/net/tun, and ip, ping and nft. Where these are missing each test says `SKIPPED` on standard
//! error and in `target/tmp/netns-skipped` (a line each, for the Makefile to show) and passes; with `CI` in the
//! environment it fails.
//! Some tests kill processes at named points and need programs that halt there: scripts/rigged.sh builds them.
//! The binaries of the other packages are found beside `tunguard`: `cargo build --workspace` comes first.
//! `TUNGUARD_TEST_BINARIES=target/release` (as an absolute path) tests other binaries than those of this build.
//! `TUNGUARD_TEST_LOG=debug` makes servers and clients say more; what they said is shown when a test fails.

mod lab;

#[path = "../common/mod.rs"]
#[expect(dead_code, reason = "shared with tests/tls/main.rs, which needs the rest")]
mod certificates;

mod books;
mod capture;
mod mix;
mod process;
mod raw_client;
mod traffic;
mod user_namespace;

// The tests, each file about one promise.
mod attacks;
mod away;
mod carriers;
mod churn;
mod client_status;
mod clock;
mod early;
mod faults;
mod frozen;
mod garbage;
mod gate;
mod hardship;
mod identity;
mod key_holder;
mod kill;
mod lessons;
mod many;
mod matrix;
mod moves;
mod mtu;
mod nat;
mod on_demand;
mod plaintext;
mod privileges;
mod rates;
mod red_team;
mod reload;
mod remotes;
mod resume;
mod routing;
mod sandbox;
mod scarce;
mod seats;
mod soak;
mod strangers;
mod tickets;
mod unit;
mod unread;
mod watch;
mod weather;
