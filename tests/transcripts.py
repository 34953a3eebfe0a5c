"""Transcripts in the documentation, run as they stand there.

In the fenced blocks between `<!-- transcript -->` and `<!-- /transcript -->` a page shows what a person types and what is printed.
`$ LINE` is typed.  The lines below it are all that it prints, standard output and standard error in the order they come, but for what
`...` stands for.  `$ LINE &` goes on beside the others once it has printed its lines, until `$ kill %1`.  A line that fails has to say
so: `$ LINE; echo $?`.

Everything has to be as it is shown but for
* blanks, which count as one: what is a table here is separated by tabs there;
* ids (eight hexadecimal digits or more), words of keys and dates: each stands for one value, wherever it is shown, in commands too;
* numbers that noise or JSON's digits move: with a decimal point by a quarter or 0.3, above 1000 by a twentieth; and where the page has
  a number behind "≈", which noise alone decides, any number.

With VEILMART_RECORD=1 in the environment a page that shows something else is rewritten instead: read the difference before you commit it.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from protocol.console import NO_PROGRESS
from tests.command_line import typed

DESK, HOME, MARKET = "/home/ana", "/home/ana/.local/share/veilmart", "127.0.0.1:7443"  # as the pages show them
ID = r"(?<![\w.])[0-9a-f]{8,}(?!\w)|(?<![\w-])[a-z]+(?:-[a-z]+){3}(?![\w-])|\d{4}-\d\d-\d\d(?:T[\d:]+Z?)?|\d\d:\d\d(?::\d\d)?Z?"
WORD = re.compile(rf"({ID}|\d+(?:,\d\d\d)*(?:\.\d+)?(?:e-\d+)?)")
PATIENCE_S = 600.0


@dataclass
class Step:
    """One typed line, and what is shown below it."""

    typed: str
    shown: list[str] = field(default_factory=list)


def steps_in(page: str) -> list[Step]:
    """Return what is typed in the transcripts of a page, in its order."""
    steps: list[Step] = []
    for part in re.findall(r"<!-- transcript -->\n(.*?)<!-- /transcript -->", page, re.DOTALL):
        for line in "".join(re.findall(r"^```\w*\n(.*?)^```", part, re.DOTALL | re.MULTILINE)).splitlines():
            if line.startswith("$ "):
                steps.append(Step(line.removeprefix("$ ")))
            elif line.strip():
                steps[-1].shown.append(line)
    return steps


@dataclass
class Likeness:
    """What the ids of a page stand for in one run of it."""

    real: dict[str, str] = field(default_factory=dict)

    def same(self, shown: str, printed: str) -> bool:
        """Return whether a printed line is the one that is shown, as this file's first lines say; learn its ids where it is."""
        words, got = shown.split(), printed.split()
        learned = dict(self.real)
        alike = len(words) == len(got) and all(_alike(one, other, learned) for one, other in zip(words, got, strict=True))
        if alike:
            self.real = learned
        return alike

    def differs(self, shown: list[str], printed: list[str]) -> str:
        """Return the first shown line that is not printed in its place, or the first printed one too many; empty if all is as shown."""
        at, gap = 0, False
        for line in shown:
            if line.strip() == "...":
                gap = True
                continue
            while gap and at < len(printed) and not self.same(line, printed[at]):
                at += 1
            if at == len(printed) or not self.same(line, printed[at]):
                return f"shown:   {line}\nprinted: {printed[at] if at < len(printed) else 'nothing more'}"
            at, gap = at + 1, False
        return "" if gap or at == len(printed) else f"not shown: {printed[at]}"

    def as_shown(self, printed: list[str]) -> list[str]:
        """Return printed lines with the ids that the page has for them, tables in columns."""
        shown = {real: name for name, real in self.real.items()}
        return in_columns([re.sub(ID, lambda found: shown.get(found[0], found[0]), line) for line in printed])

    def typed(self, line: str) -> str:
        """Return a typed line with the real ids."""
        return re.sub(ID, lambda found: self.real.get(found[0], found[0]), line)


def _alike(shown: str, printed: str, real: dict[str, str]) -> bool:
    if shown.startswith("≈"):
        return bool(re.fullmatch(r"-?\d+(?:\.\d+)?", printed))
    wanted, got = WORD.split(shown), WORD.split(printed)
    if wanted[::2] != got[::2]:
        return False
    for one, other in zip(wanted[1::2], got[1::2], strict=True):
        if re.fullmatch(ID, one) and re.fullmatch(ID, other):
            if real.setdefault(one, other) != other or list(real.values()).count(other) > 1:
                return False
        elif not _near(one, other):
            return False
    return True


def _near(shown: str, printed: str) -> bool:
    if re.fullmatch(ID, shown) or re.fullmatch(ID, printed):
        return shown == printed
    one, other = (float(text.replace(",", "")) for text in (shown, printed))
    if "." in shown and "." in printed:
        return abs(one - other) <= max(0.25 * abs(one), 0.3)
    return one == other or (one >= 1000 and "." not in shown + printed and abs(one - other) <= 0.05 * one)


def in_columns(lines: list[str]) -> list[str]:
    """Return lines with what tabs separate in columns, as a terminal shows tables."""
    rows = [line.split("\t") for line in lines]
    widths = [max((len(row[at]) for row in rows if at < len(row) > 1), default=0) for at in range(max(map(len, rows), default=0))]
    return ["  ".join(f"{cell:<{widths[at]}}" for at, cell in enumerate(row)).rstrip() if len(row) > 1 else row[0] for row in rows]


def rewritten(page: str, step: Step, printed: list[str]) -> str:
    """Return a page with other lines below what a step typed, the first time that it stands there with those it shows."""
    old, new = ("\n".join([f"$ {step.typed}", *lines]) + "\n" for lines in (step.shown, printed))
    assert old in page, f"blank lines among what is shown below: $ {step.typed}"
    return page.replace(old, new, 1)


class Desk:
    """Where a person sits: a folder to type in, a home, and the address of a market that is there already."""

    def __init__(self, folder: Path, home: Path, market: str = MARKET) -> None:
        self._folder, self._home, self._market, self._likeness = folder, home, market, Likeness()
        self._environment = {**os.environ, "VEILMART_HOME": str(home), NO_PROGRESS: "1"}
        self._beside: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def follow(self, page: str, file: Path | None = None) -> int:
        """Do what a page shows; return how many lines were typed.  Raises AssertionError with the first line that is not as shown.

        file: where the page lies, to be rewritten where the environment asks for it.
        """
        steps = steps_in(page)
        try:
            for step in steps:
                printed = self._type(step)
                difference = self._likeness.differs(step.shown, printed)
                if difference and file is not None and os.environ.get("VEILMART_RECORD"):
                    page = rewritten(page, step, self._likeness.as_shown(printed))
                    file.write_text(page)
                    difference = ""
                assert not difference, f"$ {step.typed}\n{difference}\n\nall that was printed:\n" + "\n".join(printed)
        finally:
            self._leave()
        return len(steps)

    def _type(self, step: Step) -> list[str]:
        line = self._likeness.typed(step.typed).replace(MARKET, self._market)
        if line == "kill %1":
            self._leave()
            return []
        if line.endswith(" &"):
            return self._start(line.removesuffix(" &"), step)
        command, _, asked = line.partition("; echo $")
        words = shlex.split(command, comments=True)
        if words[0] == "veilmart":
            printed, code = typed(words[1:], self._folder, self._environment)  # here, where the libraries are loaded already
        else:
            done = subprocess.run(
                ["bash", "-c", command], cwd=self._folder, env=self._environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
            printed, code = done.stdout, done.returncode
        assert asked or code == 0, f"$ {step.typed}\nended with {code}:\n{printed}"
        return self._as_shown(printed + (f"{code}\n" if asked else ""))

    def _start(self, command: str, step: Step) -> list[str]:
        log = self._folder / f"beside-{len(self._beside)}.log"
        with log.open("wb") as stream:
            words = [sys.executable, "-m", "nodes.command", *shlex.split(command, comments=True)[1:]]
            process = subprocess.Popen(words, cwd=self._folder, env=self._environment, stdout=stream, stderr=subprocess.STDOUT)
        self._beside.append(process)
        until, expected = time.monotonic() + PATIENCE_S, len(step.shown)
        while len(printed := self._as_shown(log.read_text())) < expected and process.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        return printed

    def _as_shown(self, text: str) -> list[str]:
        for real, shown in ((str(self._home), HOME), (str(self._folder), DESK), (self._market, MARKET)):
            text = text.replace(real, shown)
        return [line for line in text.splitlines() if line.strip()]

    def _leave(self) -> None:
        while self._beside:
            process = self._beside.pop()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=PATIENCE_S)
            finally:
                process.kill()  # which does nothing where it ended
