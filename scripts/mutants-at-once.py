#!/usr/bin/env python3
"""All mutants of a package in one program: scripts/mutants-at-once.py PACKAGE DIRECTORY FILE...

cargo-mutants builds once for each mutant. Here each function that is changed gets all its changed bodies in front of
its own, and a variable of the environment (MUTANT) picks one, so there is one build, and a mutant costs what the tests
take that notice it. Bodies that don't compile are taken out by the compiler's word. What can't be picked at run time
(a constant, `-> impl Trait`) and what didn't compile in company is built by itself.

The mutants are those that `cargo mutants --list` knows; PACKAGE's own unit tests are run. DIRECTORY gets a copy of
what git tracks, the build, and the results: results.tsv, and missed.txt. With SKIP, an expression for names, those
mutants are left out; with ONLY=FILE, a missed.txt, only those are run.
"""

import collections
import json
import os
import pathlib
import re
import subprocess
import sys

ROOTS = {
    "tunguard": "src/lib.rs",
    "tunguard-guard": "guard/src/main.rs",
    "tunguard-worker": "worker/src/main.rs",
}
LONGEST = 60  # seconds for one run of the tests
SWITCH = """
/// Which mutant runs.
pub mod mutant_switch {
    /// None: 0.
    pub fn picked() -> u32 {
        static PICKED: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
        *PICKED.get_or_init(|| {
            // The first test that fails ends the run: what is asked is only whether one does.
            std::panic::set_hook(Box::new(|panic| {
                eprintln!("{panic}");
                std::process::exit(101);
            }));
            std::env::var("MUTANT").ok().and_then(|n| n.parse().ok()).unwrap_or(0)
        })
    }
}
"""


class File:
    """One source file, by characters."""

    def __init__(self, path):
        self.path = path
        self.text = path.read_text()
        self.lines = [0]
        for line in self.text.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))

    def at(self, place):
        return self.lines[place["line"] - 1] + place["column"] - 1

    def span(self, span):
        return self.at(span["start"]), self.at(span["end"])

    def changed(self, mutant, start=0, end=None):
        """The text from start to end, with the mutant in it."""
        a, b = self.span(mutant["span"])
        end = len(self.text) if end is None else end
        return self.text[start:a] + mutant["replacement"] + self.text[b:end]

    def body(self, function):
        """Where a function's body starts and ends, braces included."""
        at, end = self.span(function["span"])
        depth = 0
        while at < end:
            c = self.text[at]
            if self.text.startswith("//", at):
                at = self.text.find("\n", at)
            elif c == "{" and depth == 0:
                return at, end
            depth += (c in "([") - (c in ")]")
            at += 1
        raise SystemExit(f"no body: {function}")


def together(file, mutants):
    """The file with all these mutants, and which lines are whose."""
    functions = collections.OrderedDict()
    for mutant in mutants:
        functions.setdefault(file.span(mutant["function"]["span"]), []).append(mutant)
    text, done, line_of = "", 0, []
    for span, own in sorted(functions.items()):
        start, end = file.body(own[0]["function"])
        text += file.text[done:start] + "{\n match crate::mutant_switch::picked() {\n"
        for mutant in own:
            first = text.count("\n") + 1
            text += f"{mutant['number']} => return {file.changed(mutant, start, end)},\n"
            line_of.append((first, text.count("\n"), mutant["number"]))
        text += "_ => {}\n }\n"
        done = start + 1
    return text + file.text[done:], line_of


def build(copy, package, environment, fast=False):
    """The test program of a package, or None; and what the compiler says against it."""
    target = "--lib" if ROOTS[package].endswith("lib.rs") else "--bins"
    command = ["cargo", "test", "--package", package, target, "--no-run", "--message-format=json"]
    if fast:
        command += ["--config", f"profile.dev.package.{package}.opt-level=1"]
    run = subprocess.run(command, cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    messages = [line["message"] for line in said if line["reason"] == "compiler-message"]
    errors = [message for message in messages if message["level"].startswith("error")]
    if run.returncode and not errors:
        raise SystemExit(run.stderr)
    built = [line for line in said if line["reason"] == "compiler-artifact" and line["profile"]["test"]]
    programs = [line["executable"] for line in built if line["executable"]]
    return (None if run.returncode else programs[-1]), errors


def verdict(program, number, module, folder):
    """What the tests say: those of the module first, then all others."""
    environment = dict(
        os.environ,
        MUTANT=str(number),
        PROPTEST_MAX_SHRINK_ITERS="0",
        PROPTEST_DISABLE_FAILURE_PERSISTENCE="1",
    )
    for arguments in ([module], ["--skip", module]):
        try:
            run = subprocess.run([program, *arguments], cwd=folder, env=environment, timeout=LONGEST,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return "timeout"
        if run.returncode:
            return "caught"
    return "missed"


def main():
    package, out, names = sys.argv[1], pathlib.Path(sys.argv[2]).absolute(), sys.argv[3:]
    copy, sources = out / "copy", pathlib.Path(ROOTS[package]).parent
    folder = copy / sources.parent
    copy.mkdir(parents=True, exist_ok=True)
    listed = subprocess.run(["git", "ls-files"], stdout=subprocess.PIPE, text=True, check=True).stdout
    packed = subprocess.run(["tar", "-cT", "-"], input=listed.encode(), stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-xmC", str(copy)], input=packed, check=True)
    environment = dict(os.environ, CARGO_TARGET_DIR=str(out / "build"))

    found = []
    for name in names:
        command = ["cargo", "mutants", "--list", "--json", "--package", package, "--file", name]
        found += json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    if skip := os.environ.get("SKIP"):
        found = [mutant for mutant in found if not re.search(skip, mutant["name"])]
    if only := os.environ.get("ONLY"):
        wanted = set(pathlib.Path(only).read_text().splitlines())
        found = [mutant for mutant in found if mutant["name"] in wanted]
    for number, mutant in enumerate(found, 1):
        mutant["number"] = number
    files = {mutant["file"]: File(copy / mutant["file"]) for mutant in found}

    root = copy / ROOTS[package]
    plain = root.read_text()
    root.write_text(plain + SWITCH)

    def is_alone(mutant):
        function = mutant["function"]
        return function is None or "impl" in function["return_type"]

    company, alone = [m for m in found if not is_alone(m)], [m for m in found if is_alone(m)]
    program, unviable = None, []
    while program is None:
        lines = {}
        for name, file in files.items():
            text, lines[name] = together(file, [m for m in company if m["file"] == name])
            file.path.write_text(text)
        program, errors = build(copy, package, environment, fast=True)
        bad = set()
        for error in errors:
            for span in error["spans"]:
                for first, last, number in lines.get(span["file_name"], []):
                    if first <= span["line_start"] <= last:
                        bad.add(number)
        if program is None and not bad:
            raise SystemExit("\n".join(error["rendered"] for error in errors))
        unviable += [m for m in company if m["number"] in bad]
        company = [m for m in company if m["number"] not in bad]
        print(f"{len(company)} together, {len(alone)} by themselves, {len(unviable)} don't compile", flush=True)

    results = open(out / "results.tsv", "w", buffering=1)
    outcomes = collections.defaultdict(collections.Counter)

    def note(mutant, outcome):
        outcomes[mutant["file"]][outcome] += 1
        print(outcome, mutant["name"], sep="\t", file=results)

    def module(mutant):
        name = str(pathlib.Path(mutant["file"]).relative_to(sources)).removesuffix(".rs").removesuffix("/mod")
        return name.replace("/", "::") + "::"

    kept = out / "program"
    kept.write_bytes(pathlib.Path(program).read_bytes())
    kept.chmod(0o755)
    if (before := verdict(str(kept), 0, "none::", folder)) != "missed":
        raise SystemExit(f"without a mutant: {before}")
    for mutant in unviable:
        note(mutant, "unviable")
    for mutant in company:
        note(mutant, verdict(str(kept), mutant["number"], module(mutant), folder))
    for file in files.values():
        file.path.write_text(file.text)
    for mutant in alone:
        file = files[mutant["file"]]
        file.path.write_text(file.changed(mutant))
        program, _ = build(copy, package, environment)
        note(mutant, verdict(program, 0, module(mutant), folder) if program else "unviable")
        file.path.write_text(file.text)
    root.write_text(plain)
    results.close()
    missed = [line.split("\t")[1] for line in (out / "results.tsv").read_text().splitlines() if line.startswith("missed")]
    (out / "missed.txt").write_text("".join(name + "\n" for name in missed))
    for name, counted in outcomes.items():
        print(name, dict(counted))
    print("\n".join(missed))


main()
