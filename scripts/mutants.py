#!/usr/bin/env python3
"""scripts/mutants.py [--again] CRATE RESULTS FILE...: all mutants of some files in one test program

CRATE is a directory of scripts/cutdown.sh, FILEs are patterns for files of one package in it. cargo-mutants says what
the mutants are, and has its own options in CRATE/.cargo/mutants.toml.
Here each function gets all its changed bodies beside its own, and the variable MUTANT of the environment picks one.
So the crate is built a few times (until those that don't compile are found) instead of once for each mutant. What can't
be picked at run time, as constants, is built by itself.

Writes one line for each mutant to RESULTS: caught, slow (stopped after its time, which counts as caught), missed or
wrong (doesn't compile). Ends with 1 if there are any that were missed. With --again, only those that RESULTS has as
missed are run.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

PICK = """
pub(crate) fn mutant() -> u32 {
    static MUTANT: std::sync::LazyLock<u32> =
        std::sync::LazyLock::new(|| std::env::var("MUTANT").map_or(0, |n| n.parse().expect("MUTANT is a number")));
    *MUTANT
}
"""


def main(crate, results, again, patterns):
    os.chdir(crate)
    mutants = listed(patterns)
    if again:
        before = Path(results).read_text().splitlines()
        missed = {unplaced(line[8:]) for line in before if line.startswith("missed")}
        mutants = [mutant for mutant in mutants if unplaced(mutant["name"]) in missed]
        if not mutants:
            sys.exit(f"none of these was missed, as {results} says: run them without AGAIN=1")
    originals = {file: Path(file).read_text() for file in {mutant["file"] for mutant in mutants}}
    package = Package(mutants[0])
    root = package.root.read_text()
    try:
        package.root.write_text(root + PICK)
        wrong = set()
        while True:
            places = {file: write(file, text, mutants, wrong) for file, text in originals.items()}
            program, errors = package.build()
            if program:
                break
            found = {places[file].get(line) for file, line in errors if file in places} - {None}
            if not found:
                sys.exit(f"{crate} doesn't compile, and no mutant is why: run cargo test there")
            wrong |= found
    finally:
        package.root.write_text(root)
        for file, text in originals.items():
            Path(file).write_text(text)
    # Others are built in its place.
    program = shutil.copy(program, Path("together").absolute())

    began = time.monotonic()
    if package.run(program, 0, [], None) != "missed":
        sys.exit(f"the tests in {crate} fail without any mutant")
    limit = max(30, 10 * (time.monotonic() - began))
    counts = dict.fromkeys(["caught", "slow", "missed", "wrong"], 0)
    with open(results, "w", buffering=1) as lines:
        for n, mutant in enumerate(mutants, 1):
            if not mutant["function"] or n in wrong and "impl " in mutant["function"]["return_type"]:
                outcome = package.alone(mutant, limit)
            else:
                outcome = "wrong" if n in wrong else package.verdict(program, n, mutant, limit)
            counts[outcome] += 1
            print(f"{outcome:7} {mutant['name']}", file=lines)
            if outcome == "missed":
                print(f"missed  {mutant['name']}", flush=True)
    print(f"{len(mutants)} mutants: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if counts["missed"] else 0


class Package:
    """Where the mutants are, with its unit tests."""

    def __init__(self, mutant):
        file = Path(mutant["file"])
        self.name, self.sources = mutant["package"], Path(*file.parts[: file.parts.index("src") + 1])
        self.root = self.sources / "lib.rs"
        self.target = "--lib"
        if not self.root.exists():
            self.root, self.target = self.sources / "main.rs", "--bins"

    def verdict(self, program, n, mutant, limit):
        """What the tests of the module say, which take next to no time, or else all others."""
        module = Path(mutant["file"]).relative_to(self.sources).with_suffix("").parts[0] + "::"
        first = self.run(program, n, [module], limit)
        return self.run(program, n, ["--skip", module], limit) if first == "missed" else first

    def alone(self, mutant, limit):
        """What the tests say of one that nothing can pick at run time: a constant, or a type of its own."""
        file = Path(mutant["file"])
        text = file.read_text()
        first, last = span(text, mutant)
        try:
            file.write_text(text[:first] + mutant["replacement"] + text[last:])
            program, _ = self.build()
            return self.verdict(program, 0, mutant, limit) if program else "wrong"
        finally:
            file.write_text(text)

    def build(self):
        """The test program; or else the places of errors, as file and line."""
        # With the system's OpenSSL; and what is noticed by a lint is for the tests to notice.
        command = ["cargo", "test", "--package", self.name, self.target, "--no-default-features", "--no-run"]
        environment = {**os.environ, "RUSTFLAGS": "--cap-lints=allow"}
        done = subprocess.run([*command, "--message-format=json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True, env=environment)
        program, errors = None, []
        for line in done.stdout.splitlines():
            message = json.loads(line)
            program = message.get("executable") or program
            message = message.get("message")
            if message and message["level"] == "error":
                spans = message["spans"] + [span for child in message["children"] for span in child["spans"]]
                errors += [(span["file_name"], span["line_start"]) for span in spans if span.get("is_primary")]
        return (program if done.returncode == 0 else None), errors

    def run(self, program, n, tests, limit):
        environment = {**os.environ, "MUTANT": str(n), "PROPTEST_MAX_SHRINK_ITERS": "0",
                       "PROPTEST_DISABLE_FAILURE_PERSISTENCE": "1"}
        try:
            done = subprocess.run([program, "--quiet", *tests], cwd=self.sources.parent, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=limit, env=environment)
        except subprocess.TimeoutExpired:
            return "slow"
        return "caught" if done.returncode else "missed"


def span(text, of):
    """Where in the text something begins and ends."""
    lines = text.splitlines(keepends=True)

    def at(place):
        return sum(map(len, lines[: place["line"] - 1])) + place["column"] - 1

    return at(of["span"]["start"]), at(of["span"]["end"])


def unplaced(name):
    """A mutant's name without line and column, which change with what stands before."""
    return re.sub(r":\d+:\d+", "", name, count=1)


def listed(patterns):
    """What cargo-mutants would change in the files."""
    files = [option for pattern in patterns for option in ("-f", pattern)]
    command = ["cargo", "mutants", "--list", "--json", "--workspace", *files]
    mutants = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    if not mutants:
        sys.exit(f"nothing to change in {' '.join(patterns)}")
    return mutants


def write(file, text, mutants, wrong):
    """Writes `file` with the mutants in it but for those that are wrong. Returns which is in which line."""
    functions = {}
    for n, mutant in enumerate(mutants, 1):
        if mutant["file"] == file and mutant["function"] and n not in wrong:
            functions.setdefault(span(text, mutant["function"]), []).append((n, mutant))

    out, done, places = "", 0, {}
    for (begin, end), inside in sorted(functions.items()):
        # After what is said about it.
        body = begin + re.match(r"(\s*(//|#\[).*\n)*[^{]*", text[begin:end]).end()
        # Different iterators are different types.
        boxed = re.search(r"-> impl (Iterator<.*>)", text[begin:body])
        open_, close = (f"(Box::new({{", f"}}) as Box<dyn {boxed[1]} + '_>)") if boxed else ("{", "}")
        out += text[done:body] + "{ match crate::mutant() {\n"
        for n, mutant in inside:
            first, last = span(text, mutant)
            changed = text[body + 1:first] + mutant["replacement"] + text[last:end - 1]
            line = out.count("\n") + 1
            out += f"{n} => {open_}{changed}\n{close},\n"
            places.update(dict.fromkeys(range(line, out.count("\n") + 1), n))
        out += f"_ => {open_}{text[body + 1:end - 1]}\n{close}\n}} }}"
        done = end
    Path(file).write_text(out + text[done:])
    return places


if __name__ == "__main__":
    options = [option for option in sys.argv[1:] if option == "--again"]
    crate, results, *patterns = [argument for argument in sys.argv[1:] if argument not in options]
    sys.exit(main(crate, os.path.abspath(results), bool(options), patterns))
