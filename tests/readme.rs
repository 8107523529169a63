//! What README.md and docs/ say of the code: functions, files, exit codes, make targets, keys.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use clap::CommandFactory;

#[test]
fn functions_are_in_the_files_named() {
    for page in pages() {
        for (function, file) in functions(&read(&page)) {
            let defined = read(&file).lines().any(|line| {
                line.split_once("fn ").is_some_and(|(_, rest)| {
                    rest.strip_prefix(&function[..]).is_some_and(|rest| rest.starts_with(['(', '<']))
                })
            });
            assert!(defined, "{page}: {file} has no function {function}");
        }
    }
}

/// Every claim of these pages is a test's, which is run.
#[test]
fn tests_that_pages_claim_are_tests() {
    for page in ["docs/threat-model.md", "docs/reliability.md"] {
        for (test, file) in functions(&read(page)) {
            let source = read(&file);
            let lines: Vec<&str> = source.lines().map(str::trim).collect();
            let at = lines.iter().position(|line| line.starts_with(&format!("fn {test}(")));
            let at = at.unwrap_or_else(|| panic!("{page}: {file} has no function {test}"));
            let attributes: Vec<&str> =
                lines[..at].iter().rev().copied().take_while(|line| line.starts_with("#[")).collect();
            // Property tests are cases of a macro.
            assert!(attributes.contains(&"#[test]"), "{page}: {test} ({file}) is no test");
        }
    }
}

#[test]
fn every_fault_has_its_row_and_every_test_of_a_fault_its_place() {
    let page = read("docs/reliability.md");
    for row in 1..=22 {
        let start = format!("| {row} | ");
        let line = page.lines().find(|line| line.starts_with(&start));
        let line = line.unwrap_or_else(|| panic!("docs/reliability.md has no row {row}"));
        assert!(!functions(line).is_empty() || line.contains("waits for"), "row {row} names no test");
    }
    let named: BTreeSet<(String, String)> = functions(&page).into_iter().collect();
    let of_faults = [
        "tests/lengths.rs",
        "tests/signals.rs",
        "tests/netns/clock.rs",
        "tests/netns/faults.rs",
        "tests/netns/faults/client.rs",
        "tests/netns/faults/guard.rs",
        "tests/netns/faults/holder.rs",
        "tests/netns/faults/worker.rs",
        "tests/netns/frozen.rs",
        "tests/netns/kill.rs",
        "tests/netns/lessons.rs",
        "tests/netns/scarce.rs",
        "tests/netns/strangers.rs",
        "tests/netns/unread.rs",
        "tests/netns/weather.rs",
    ];
    for file in of_faults {
        let source = read(file);
        let tests = source.split("#[test]").skip(1).filter_map(|rest| rest.split_once("fn "));
        for (_, rest) in tests {
            let test = rest.split('(').next().unwrap_or_default().to_owned();
            assert!(
                named.contains(&(test.clone(), file.to_owned())),
                "docs/reliability.md lacks {test} ({file})"
            );
        }
    }
}

#[test]
fn the_picture_and_the_journey_name_every_hop() {
    let readme = read("README.md");
    let named = functions(&readme);
    assert!(named.len() > 30, "the journey names its functions as `name` (file): {named:?}");
    let picture = code_blocks(&readme).find(|block| block.contains("GUARD")).expect("a picture");
    for hop in [
        "tun_to_worker",
        "guard_to_client",
        "server_to_tun",
        "tun_to_server",
        "client_to_guard",
        "worker_to_tun",
    ] {
        assert!(picture.contains(hop), "the picture lacks {hop}");
        assert!(named.iter().any(|(function, _)| function == hop), "no file is named for {hop}");
    }
}

#[test]
fn files_and_pages_exist() {
    for page in pages() {
        let text = read(&page);
        let folder = Path::new(&page).parent().expect("a file has a folder");
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or_default();
            if !target.is_empty() && !target.contains("://") {
                assert!(root().join(folder).join(target).exists(), "{page} links to {target}");
            }
        }
        // Source files by their path from the root.
        for word in text.split(|c: char| c.is_whitespace() || "`()[],;|".contains(c)) {
            let source = [
                "src/",
                "guard/src/",
                "worker/src/",
                "tests/",
                "scripts/",
                "packaging/",
                "bench/",
                "benches/",
                "guard/benches/",
            ];
            let word = word.trim_end_matches(['.', ':']);
            if source.iter().any(|folder| word.starts_with(folder)) && !word.contains(['*', '{', '<']) {
                assert!(root().join(word).exists(), "{page} names {word}");
            }
        }
    }
}

#[test]
fn exit_codes_are_those_of_the_code() {
    let code: BTreeSet<(u8, String)> = read("src/exit.rs")
        .lines()
        .skip_while(|line| !line.starts_with("pub enum Exit"))
        .take_while(|line| *line != "}")
        .filter_map(|line| line.trim().strip_suffix(',')?.split_once(" = "))
        .map(|(name, number)| (number.parse().expect("a number"), name.to_owned()))
        .collect();
    let readme: BTreeSet<(u8, String)> = read("README.md")
        .lines()
        .skip_while(|line| *line != "## Exit codes")
        .skip(1)
        .take_while(|line| !line.starts_with("## "))
        .filter_map(|line| {
            let mut cells = line.strip_prefix('|')?.split('|').map(str::trim);
            Some((cells.next()?.parse().ok()?, cells.next()?.to_owned()))
        })
        .collect();
    assert!(code.len() > 10);
    assert_eq!(readme, code);
    let help = tunguard::cli::Cli::command().render_help().to_string();
    let (_, table) = help.split_once("Exit codes:").expect("a table");
    for (number, name) in &code {
        assert!(
            table.split_whitespace().any(|word| word == number.to_string()),
            "`tunguard --help` lacks exit code {number}, {name}"
        );
    }
}

#[test]
fn make_targets_exist() {
    let makefile = read("Makefile");
    let targets: BTreeSet<&str> = makefile
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(target, _)| target)
        .filter(|target| !target.is_empty() && target.bytes().all(|b| b.is_ascii_lowercase() || b == b'-'))
        .collect();
    let mut named = 0;
    for page in pages() {
        let text = read(&page);
        // In code only: prose may make something, too.
        for code in text.split('`').skip(1).step_by(2).flat_map(str::lines).filter(|code| !code.is_empty()) {
            let Some(rest) = code.trim_start().strip_prefix("make ") else { continue };
            let Some(target) = rest.split_whitespace().next() else { continue };
            assert!(targets.contains(target), "{page}: make {target}");
            named += 1;
        }
    }
    assert!(named > 10, "{named}");
    let readme = read("README.md");
    for target in targets.iter().filter(|target| **target != "help") {
        assert!(readme.contains(&format!("make {target}")), "README.md doesn't name make {target}");
    }
}

#[test]
fn every_key_is_explained() {
    let page = read("docs/configuration.md");
    for example in ["packaging/server.example.toml", "packaging/client.example.toml"] {
        for line in read(example).lines() {
            let Some((key, _)) = line.trim_start_matches('#').split_once(" = ") else { continue };
            if key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') {
                assert!(page.contains(&format!("`{key}`")), "docs/configuration.md lacks {key} of {example}");
            }
        }
    }
}

#[test]
fn every_drop_is_explained() {
    let page = read("docs/operation.md");
    for reason in tunguard::drops::DropReason::ALL {
        assert!(page.contains(&format!("`{}`", reason.name())), "docs/operation.md lacks {}", reason.name());
    }
}

#[test]
fn every_direct_dependency_has_its_reason() {
    let page = read("docs/dependencies.md");
    let manifest = read("Cargo.toml");
    let names = manifest
        .lines()
        .skip_while(|line| *line != "[workspace.dependencies]")
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split_once(" = "))
        .map(|(name, _)| name)
        .filter(|name| *name != "tunguard");
    for name in names {
        assert!(page.contains(&format!("| `{name}` |")), "docs/dependencies.md lacks {name}");
    }
}

/// Every `name` (file.rs) of a page, over line ends as well.
fn functions(text: &str) -> Vec<(String, String)> {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let parts: Vec<&str> = text.split('`').collect();
    parts
        .windows(2)
        .filter_map(|pair| {
            let file = pair[1].strip_prefix(" (")?.split(')').next()?;
            file.ends_with(".rs").then(|| (pair[0].to_owned(), file.to_owned()))
        })
        .collect()
}

fn code_blocks(text: &str) -> impl Iterator<Item = &str> {
    text.split("```").skip(1).step_by(2)
}

fn pages() -> Vec<String> {
    let docs = fs::read_dir(root().join("docs")).expect("docs/");
    let mut pages: Vec<String> = docs
        .filter_map(|entry| entry.expect("an entry").file_name().into_string().ok())
        .filter(|name| name.ends_with(".md"))
        .map(|name| format!("docs/{name}"))
        .collect();
    pages.extend(["README.md", "CHANGELOG.md", "certs/README.md"].map(str::to_owned));
    pages.sort();
    pages
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
