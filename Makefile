# `make` or `make help` lists the targets.
#
# Variables: PREFIX, DESTDIR (install); NAME, REMOTE (client, certs); PROFILE (run-client); CONFIG, CERTS
# (run-server, client, certs); SESSIONS, SECONDS, LOSS (soak); CYCLES, SECONDS (endure);
# SECONDS, ARGS (fuzz).

PREFIX ?= /usr/local
DESTDIR ?=
export NAME REMOTE CERTS CONFIG SESSIONS SECONDS LOSS CYCLES

TARGET := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
RELEASE := $(TARGET)/release
PROGRAMS := tunguard tunguard-guard tunguard-worker

.DEFAULT_GOAL := help
.PHONY: help build run-server run-client client certs demo test check soak endure bench bench-roam bench-attacks bench-ondemand bench-floods bench-hold bench-micro fuzz sanitize mutants install clean

help: ## Lists the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

# Where `tunguard` looks for the other two when they are not beside it.
build: export TUNGUARD_LIBEXEC ?= $(PREFIX)/libexec/tunguard
build: ## Builds the three programs (release)
	@scripts/build.sh release

run-server: build ## Runs a server here, with new certificates and server.toml if there are none (root; REMOTE=)
	@scripts/run-server.sh run $(RELEASE)/tunguard

certs: build ## Makes the authority and the server's certificate in certs/ (REMOTE=HOST ...)
	@scripts/run-server.sh certs $(RELEASE)/tunguard

client: build ## Writes a client's profile: NAME=laptop REMOTE=HOST[:PORT]
	@scripts/client-profile.sh $(RELEASE)/tunguard

run-client: build ## Connects with a profile: PROFILE=laptop.toml (root)
	@test -n "$(PROFILE)" || { echo "usage: make run-client PROFILE=laptop.toml" >&2; exit 2; }
	@exec $(RELEASE)/tunguard client --config "$(PROFILE)"

demo: build ## Shows a server, a LAN behind it and two clients in network namespaces (root)
	@scripts/packages.sh run lab
	@scripts/demo.sh $(RELEASE)

test: ## Everything: format, lints, docs, unit, property and e2e tests (e2e as root only)
	@scripts/test.sh all

check: ## Quick: format, lints, unit tests
	@scripts/test.sh quick

# CI: where there can be no lab it fails, rather than pass without one.
soak: build ## Mixed traffic over a lossy network, every packet accounted for (root; SESSIONS=100 SECONDS=120 LOSS=10)
	@scripts/packages.sh run lab
	@CI=true TUNGUARD_TEST_BINARIES="$(abspath $(RELEASE))" cargo test --locked --test netns -- \
		--ignored --exact soak::every_packet_is_accounted_for_at_length --nocapture

endure: build ## Ten thousand connects and disconnects, and an hour's sleep of each end (root; CYCLES=10000 SECONDS=3600)
	@scripts/packages.sh run lab
	@CI=true TUNGUARD_TEST_BINARIES="$(abspath $(RELEASE))" cargo test --locked --test netns -- \
		--ignored --nocapture any_number_of_connects_leaves_nothing slept_for_long

bench: build ## Measures tunguard beside the bare link, OpenVPN, ocserv and wireguard-go (root; ARGS="--rounds 1 ...")
	@BIN=$(RELEASE) bench/run.sh --scale $(ARGS)

bench-roam: build ## Measures how long VPNs are silent when their client moves (root; ARGS="--moves 2 --outage 5 ...")
	@BIN=$(RELEASE) bench/roam.sh $(ARGS)

bench-ondemand: build ## Measures how long the first packet waits for a tunnel on demand (root; ARGS="--cycles 20 ...")
	@BIN=$(RELEASE) bench/ondemand.sh $(ARGS)

bench-attacks: build ## Measures whose traffic somebody without keys can move (root; ARGS="--times 1 ...")
	@BIN=$(RELEASE) bench/attacks.sh $(ARGS)

bench-floods: build ## Measures what clients notice while their server is flooded (root; ARGS="--rounds 1 ...")
	@BIN=$(RELEASE) bench/floods.sh $(ARGS)

bench-hold: build ## Holds 1000 idle and 100 active sessions for 30 minutes, and fails if the server grows (root; ARGS="--minutes 5 ...")
	@BIN=$(RELEASE) bench/hold.sh $(ARGS)

bench-micro: ## Times each step of the data path, and what a worker's filters cost, without a network (ARGS="--quick seal")
	@scripts/packages.sh build
	cargo bench --locked -p tunguard -p tunguard-guard --bench data_path --bench routes --bench sandbox -- $(ARGS)

fuzz: ## Runs the fuzz targets, one after the other (SECONDS=30 for each; ARGS="session control" for some)
	@scripts/fuzz.sh $(or $(SECONDS),30) $(ARGS)

sanitize: ## Tests the unsafe layer under the address sanitizer
	@scripts/sanitize.sh

mutants: ## Changes the code in small ways, and lists the changes that no test notices (ARGS="src/replay.rs ...")
	@scripts/mutants.sh $(ARGS)

install: build ## Installs to PREFIX=/usr/local, below DESTDIR= if set
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/libexec/tunguard"
	install -m 755 $(RELEASE)/tunguard "$(DESTDIR)$(PREFIX)/bin/"
	install -m 755 $(RELEASE)/tunguard-guard $(RELEASE)/tunguard-worker "$(DESTDIR)$(PREFIX)/libexec/tunguard/"
	install -d "$(DESTDIR)$(PREFIX)/lib/systemd/system" "$(DESTDIR)$(PREFIX)/share/doc/tunguard"
	sed 's|@PREFIX@|$(PREFIX)|' packaging/tunguard.service >"$(DESTDIR)$(PREFIX)/lib/systemd/system/tunguard.service"
	chmod 644 "$(DESTDIR)$(PREFIX)/lib/systemd/system/tunguard.service"
	install -m 644 packaging/server.example.toml packaging/client.example.toml README.md CHANGELOG.md \
		LICENSE-MIT LICENSE-APACHE "$(DESTDIR)$(PREFIX)/share/doc/tunguard/"

clean: ## Removes what the build made; certificates and configuration stay
	cargo clean
