"""An owner's machine, looked at for what would void a guarantee: each hazard absent, present or unknown, with evidence.

Nothing is changed, drawn for a release, charged or sent, and no content of a record is read.  What is examined is what can be seen from
here: files, the guard that answers at its socket and its process, the code of this installation.  A check that has nothing to look at
says so: unknown is no yes.  Run it as the user that runs the guard.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from protocol.errors import GuardUnreachable, UsageError, VeilmartError
from protocol.privacy import Guarantee, PrivateTraining, ledger_epsilon
from protocol.release import Release, open_envelope

if TYPE_CHECKING:
    from nodes.audit.specification import Mechanism
    from nodes.base_model import BaseModel
    from nodes.ledger import Entry
    from nodes.policy import OwnerPolicy

SECRETS = ("*.key", "*.db", "*.db-journal", "*.jsonl", "*.head", "*.state", "*.lock", "token")  # below a home; adapters beside them
CALLS = 12  # to a guard, of which each answer's moment is looked at
JITTER_S = 0.02  # after a multiple of REPLY_S: what a scheduler takes to wake a process
SHORTEST_SLOT_S = 60.0  # a release that takes longer than a slot says so
AHEAD_S = 5.0  # a file's time that is further in the future than this was written by another clock
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
PLACES = "/proc"
NO_CORE = ("0", "1")  # bytes, as nodes/command.py sets them


@dataclass(frozen=True, slots=True)
class Look:
    """One hazard that was looked for: `holds` is True where it is absent, False where it is present, None where it is unknown."""

    name: str
    holds: bool | None
    evidence: str


@dataclass(frozen=True, slots=True)
class Deployment:
    """What there is to look at."""

    home: Path
    folder: Path  # of the population
    socket: Path
    data: Path | None = None
    policy: OwnerPolicy | None = None
    authority: Path | None = None  # certificate of the market's authority
    published: Sequence[bytes] | None = None  # envelopes of this owner in the market's log, if it was asked
    model: BaseModel | None = None
    software: str = ""  # digest that `software()` is expected to have


def audit_node(deployment: Deployment, on_progress: Callable[[str, int, int], None] = lambda stage, done, of: None) -> tuple[Look, ...]:
    """Return every hazard with what was found."""
    process = guard_process(deployment.socket)
    looks: tuple[Callable[[], Look], ...] = (
        lambda: permissions(deployment.home, deployment.data),
        lambda: door(deployment.socket),
        lambda: isolation(process),
        lambda: memory(process),
        lambda: policy(deployment.policy, process),
        lambda: tls(deployment.authority, process),
        lambda: telemetry(os.environ, process),
        lambda: clock(deployment.folder),
        versions,
        lambda: software(deployment.software),
        lambda: journal(deployment.folder),
        lambda: ledger(deployment.folder),
        lambda: budget(deployment),
        lambda: market_log(deployment),
        lambda: adapter(deployment.folder),
        lambda: replies(deployment.socket),
        lambda: noise(receipts(deployment.home)),
        bounding,
        lambda: batches(deployment.model),
    )
    found = []
    for number, look in enumerate(looks, start=1):
        on_progress("checks", number, len(looks))
        found.append(look())
    return tuple(found)


# Files -------------------------------------------------------------------------------------------------------------------------------


def permissions(home: Path, data: Path | None = None) -> Look:
    """Whether keys, ledger, journal, adapters and records are readable by their owner alone."""
    private = [path for pattern in SECRETS for path in home.rglob(pattern) if path.is_file()]
    private += [path for path in home.rglob("*.safetensors") if path.parent.name == "adapters" and "node" in path.relative_to(home).parts]
    if data is not None:
        private.append(data)
    # A file of mode 0644 in a folder that only its owner enters is as closed as the folder.
    open_ones = [path for path in private if stat.S_IMODE(path.stat().st_mode) & 0o077 and not _closed_above(path)]
    foreign = [path for path in private if path.stat().st_uid not in (os.geteuid(), 0)]
    if open_ones or foreign:
        shown = ", ".join(sorted(path.name for path in {*open_ones, *foreign})[:4])
        return Look("permissions", False, f"{len({*open_ones, *foreign})} of {len(private)} private files are open to others: {shown}")
    if not private:
        return Look("permissions", None, "no key, ledger or journal is there yet")
    return Look("permissions", True, f"{len(private)} private files, each readable by its owner alone")


def _closed_above(path: Path) -> bool:
    return any(not folder.stat().st_mode & 0o077 for folder in path.resolve().parents)


def door(path: Path) -> Look:
    """Whether only chosen users can reach the guard's socket, and none can put another in its place."""
    if not path.exists():
        return Look("socket", None, "no guard is running here")
    mode, above = stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)
    if mode & 0o007 or above & 0o002:
        return Look("socket", False, f"the socket has mode {mode:04o} in a folder of mode {above:04o}")
    return Look("socket", True, f"mode {mode:04o} in a folder of mode {above:04o}; callers are checked by user and group")


def journal(folder: Path) -> Look:
    """Whether the journal's chain of hashes verifies."""
    from nodes.journal import read

    path = folder / "journal.jsonl"
    if not path.is_file():
        return Look("journal", None, "no journal yet: no guard ran as a process of its own")
    try:
        entries = read(path)
    except VeilmartError as error:
        return Look("journal", False, str(error))
    head = entries[-1].hash.hex()[:16] if entries else "none"
    return Look("journal", True, f"{len(entries)} lines, chain verified, head {head}")


def ledger(folder: Path) -> Look:
    """Whether the ledger's chain of hashes verifies."""
    try:
        entries = _entries(folder)
    except VeilmartError as error:
        return Look("ledger", False, str(error))
    if entries is None:
        return Look("ledger", None, "no ledger yet: nothing was charged")
    head = entries[-1].hash.hex()[:16] if entries else "none"
    return Look("ledger", True, f"{len(entries)} charges, chain verified, head {head}")


def _entries(folder: Path) -> list[Entry] | None:
    import sqlite3

    from nodes.ledger import inspect

    path = folder / "ledger.db"
    if not path.is_file():
        return None
    try:
        return inspect(path)
    except sqlite3.DatabaseError as error:
        raise UsageError(f"not a ledger ({type(error).__name__})") from None


def receipts(home: Path) -> list[Release]:
    """Return the releases of which this home keeps a receipt that verifies."""
    from protocol.transparency import Receipt

    found = []
    for path in sorted((home / "receipts").glob("*.receipt")):
        try:
            receipt = Receipt.from_bytes(path.read_bytes())
            receipt.verify()
            found.append(open_envelope(receipt.envelope))
        except VeilmartError:
            continue  # `audit release` says what is wrong with it
    return found


def budget(deployment: Deployment) -> Look:
    """Whether everything that was published is charged, within the limit: a ledger that began anew would have forgotten something."""
    try:
        entries = _entries(deployment.folder)
    except VeilmartError:
        return Look("budget", False, "the ledger does not verify, so what is spent is not known")
    ours = [release for release in receipts(deployment.home) if release.owner == owner_in(deployment.folder)]
    charged = {entry.release_id for entry in entries or []}
    missing = [release for release in ours if release.release_id not in charged]
    if missing:
        return Look("budget", False, f"{len(missing)} published releases are not in the ledger: the budget was begun anew")
    if entries is None:
        return Look("budget", None, "no ledger yet: nothing was charged")
    events = [event for entry in entries for event in entry.charge.events]
    delta = min((entry.charge.delta for entry in entries), default=1e-6)
    spent = ledger_epsilon(events, delta) if events else 0.0
    if deployment.policy is None:
        return Look(
            "budget", True, f"epsilon {spent:.2f} at delta {delta:g} is spent; every kept receipt is charged (no --policy to compare)"
        )
    limit = deployment.policy.limits.budget.epsilon
    return Look("budget", spent <= limit, f"epsilon {spent:.2f} of {limit:g} at delta {delta:g} is spent; every kept receipt is charged")


def owner_in(folder: Path) -> bytes:
    """Return the owner's public key; the key is read, never made."""
    from protocol.keys import signing_key

    path = folder / "owner.key"
    try:
        return signing_key(path).public_key().public_bytes_raw() if path.is_file() else b""
    except VeilmartError:
        return b""


def market_log(deployment: Deployment) -> Look:
    """Whether the market's log holds no release of this owner that the ledger lacks, and every one that a receipt promises."""
    try:
        entries = _entries(deployment.folder)
    except VeilmartError:
        return Look("market log", False, "the ledger does not verify")
    if deployment.published is None:
        return Look("market log", None, "no market was asked: --market and --ca")
    from nodes.ledger import not_in

    published = [open_envelope(envelope) for envelope in deployment.published]
    there, unknown = {release.release_id for release in published}, not_in(published, entries or [], [owner_in(deployment.folder)])
    promised = {release.release_id for release in receipts(deployment.home) if release.owner == owner_in(deployment.folder)}
    if unknown:
        return Look("market log", False, f"{len(unknown)} releases in the log are not in the ledger: `veilmart node repair`")
    if promised - there:
        return Look("market log", False, f"{len(promised - there)} releases with a receipt are not in the log that this market shows")
    return Look("market log", True, f"{len(there)} releases in the log, all of them charged; {len(promised)} receipts, all of them kept")


def adapter(folder: Path) -> Look:
    """Whether no adapter is released under a guarantee that its own file, or the ledger, does not know."""
    from nodes.adapter import Adapter

    try:
        entries = _entries(folder) or []
    except VeilmartError:
        return Look("adapter", False, "the ledger does not verify")
    events = {event for entry in entries for event in entry.charge.events}
    private = public = unknown = 0
    for entry in entries:
        release = open_envelope(entry.envelope) if entry.envelope else None
        if release is None or release.adapter is None:
            continue
        stated = release.adapter.guarantee
        path = folder / "adapters" / f"{release.adapter.digest.hex()}.safetensors"
        if not isinstance(stated, PrivateTraining):
            public += 1
            continue
        if stated.event not in events:
            return Look("adapter", False, f"{release.title} states {stated} for its adapter, of which no training is charged")
        if not path.is_file():
            unknown += 1
            continue
        try:
            found = Adapter.from_bytes(path.read_bytes(), base_model=release.base_model.hex())
        except VeilmartError as error:
            return Look("adapter", False, f"{release.title}: {error}")
        if found.guarantee != str(stated):
            return Look("adapter", False, f"{release.title} states {stated} for an adapter that was trained with: {found.guarantee}")
        private += 1
    if not private + public + unknown:
        return Look("adapter", None, "no release with an adapter")
    if unknown:
        return Look("adapter", None, f"{unknown} adapters of releases that state a guarantee are not there any more")
    return Look("adapter", True, f"{private} adapters with a guarantee, as charged and trained; {public} that state none")


# The guard -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Process:
    """A running guard, as the kernel tells of it."""

    number: int
    words: tuple[str, ...]  # its command
    environment: Mapping[str, str]
    user: int = 0
    children: tuple[tuple[int, tuple[str, ...]], ...] = ()  # user and command of everything that it started


def guard_process(path: Path) -> Process | None:
    """Return the process behind a guard's socket, or None if nobody answers there or we may not look at it."""
    from nodes.guard_service import peer_of
    from nodes.machine import family

    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(path))
            number, _, _ = peer_of(asking)
        pairs = _text(number, "environ").split("\0")
        environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        children = tuple(filter(None, (_child(other) for other in sorted(family(number)) if other != number)))
        return Process(number, _words(number), environment, _user(number), children)
    except OSError:
        return None


def _child(number: int) -> tuple[int, tuple[str, ...]] | None:
    try:
        return _user(number), _words(number)
    except OSError:
        return None  # it ended meanwhile


def _text(number: int, name: str) -> str:
    return Path(PLACES, str(number), name).read_bytes().decode(errors="replace")


def _user(number: int) -> int:
    return Path(PLACES, str(number)).stat().st_uid


def _words(number: int) -> tuple[str, ...]:
    return tuple(_text(number, "cmdline").split("\0")[:-1])


def policy_of(process: Process | None) -> Path | None:
    """Return the policy that a running guard was started with."""
    if process is None:
        return None
    for word, following in zip(process.words, (*process.words[1:], ""), strict=True):
        if word == "--policy" or word.startswith("--policy="):
            return Path(os.readlink(f"{PLACES}/{process.number}/cwd")) / (
                following if word == "--policy" else word.removeprefix("--policy=")
            )
    return None


def isolation(process: Process | None) -> Look:
    """Whether what Flower sends to this node can see neither records nor keys."""
    if process is None:
        return Look("isolation", None, "no guard is running here")
    if "--unisolated" in process.words:
        return Look("isolation", False, "bundles run as the guard's own user (--unisolated): they can read records and keys")
    if not any(word.split("=")[0] == "--flower" for word in process.words):
        return Look("isolation", True, "the guard runs no bundles: no code of others comes here")
    runners = [user for user, words in process.children if any("flower-superexec" in word for word in words)]
    if not runners:
        return Look("isolation", None, "no program that runs bundles is seen below the guard")
    if process.user in runners:
        return Look("isolation", False, "bundles run as the guard's own user: they can read records and keys")
    return Look("isolation", True, "bundles run as another user, where records and keys are hidden (nodes/sandbox.py)")


def memory(process: Process | None) -> Look:
    """Whether what the guard holds in memory stays there: no crash and no lack of memory writes it to a disk."""
    if process is None:
        return Look("memory", None, "no guard is running here")
    try:
        limits = next(line for line in _text(process.number, "limits").splitlines() if line.startswith("Max core file size"))
        swaps = [line.split()[0] for line in Path(PLACES, "swaps").read_text().splitlines()[1:]]
    except (OSError, StopIteration):
        return Look("memory", None, "the kernel does not tell of core dumps and swap here")
    if not set(limits.split()[4:6]) <= set(NO_CORE):
        return Look("memory", False, "a crash of the guard would write its memory into a core dump")
    disks = [swap for swap in swaps if not swap.startswith("/dev/zram")]
    if disks:
        return Look("memory", None, f"no core dumps; but memory may be swapped to {', '.join(disks[:4])}: encrypted, or better none?")
    return Look("memory", True, "no core dumps, and no swap on a disk")


def policy(owner: OwnerPolicy | None, process: Process | None = None) -> Look:
    """Whether the owner's limits are written down and bound what others can make the guard do."""
    if owner is None and process is not None:
        return Look("policy", False, "the guard runs without --policy: slots of 1 s show how long it works, and so how much data there is")
    if owner is None:
        return Look("policy", None, "no guard is running here, and no --policy is named")
    limits, slot = owner.limits, owner.service.slot_s
    what = (
        f"epsilon {limits.budget.epsilon:g} for life, at most {limits.largest_epsilon:g} a release, from {limits.minimum_records} units, "
        f"slots of {slot:g} s"
    )
    if slot < SHORTEST_SLOT_S:
        return Look("policy", False, f"{what}: expected slots of at least {SHORTEST_SLOT_S:g} s, or the work shows how much data there is")
    if limits.largest_epsilon > limits.budget.epsilon:
        return Look("policy", False, f"{what}: one release may ask for more than there is")
    return Look("policy", True, what)


def tls(authority: Path | None, process: Process | None) -> Look:
    """Whether every connection that leaves this machine is authenticated, against an authority that nobody else can exchange."""
    for _, words in () if process is None else process.children:
        # The runtime's own hop stays on loopback; a SuperNode that dials the SuperLink without TLS does not.
        if any("flower-supernode" in word for word in words) and "--insecure" in words:
            return Look("tls", False, "the SuperNode dials the SuperLink without TLS")
    if authority is None:
        return Look("tls", None, "no market was joined, and no --ca is named")
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        certificate = x509.load_pem_x509_certificate(authority.read_bytes())
    except (OSError, ValueError):
        return Look("tls", False, "the authority cannot be read: no connection is authenticated")
    if stat.S_IMODE(authority.stat().st_mode) & 0o022 and not _closed_above(authority):
        return Look(
            "tls", False, f"others may exchange the authority: {authority.name} has mode {stat.S_IMODE(authority.stat().st_mode):04o}"
        )
    key, digest = certificate.public_key(), certificate.signature_hash_algorithm
    short = (isinstance(key, rsa.RSAPublicKey) and key.key_size < 2048) or (
        isinstance(key, ec.EllipticCurvePublicKey) and key.key_size < 256
    )
    if short or (digest is not None and digest.digest_size < 32):
        return Look("tls", False, "the authority's key or signature is too weak")
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not first <= datetime.now(UTC) <= last:
        return Look("tls", False, f"the authority is valid from {first:%Y-%m-%d} to {last:%Y-%m-%d}")
    fingerprint = certificate.fingerprint(SHA256()).hex()[:16]
    return Look("tls", True, f"one authority is trusted, SHA-256 {fingerprint}, until {last:%Y-%m-%d}")


def telemetry(environment: Mapping[str, str], process: Process | None) -> Look:
    """Whether no library here is told to report to anybody."""
    for where, variables in (("this command", environment), ("the guard", process.environment if process is not None else {})):
        for name, quiet in QUIET.items():
            if variables.get(name, quiet) != quiet:
                return Look("telemetry", False, f"{where} runs with {name} set to something else than {quiet}")
    return Look("telemetry", True, ", ".join(f"{name}={quiet}" for name, quiet in QUIET.items()))


def clock(folder: Path, now: Callable[[], float] = time.time) -> Look:
    """Whether nothing here was written at a later time than it is, and the kernel knows its clock to be set."""
    ahead = {path.name: path.stat().st_mtime - now() for path in folder.glob("*") if path.is_file()}
    name = max(ahead, key=lambda one: ahead[one], default="")
    if name and ahead[name] > AHEAD_S:
        return Look("clock", False, f"{name} was written {ahead[name]:.0f} s from now: slots and schedules are not where they should be")
    state = _clock_state()
    if state is None or state == 5:  # TIME_ERROR
        return Look("clock", None, "nothing was written in the future; the kernel does not say that anybody sets this clock")
    return Look("clock", True, "nothing was written in the future, and the kernel's clock is synchronised")


def _clock_state() -> int | None:
    """Return what adjtimex says, which is allowed to everybody who changes nothing; None where there is no such call."""
    try:
        return int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)))
    except (OSError, AttributeError):
        return None


REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[^]]*\])?\s*\(?(?P<bounds>[^;)]*)\)?\s*(;(?P<marker>.*))?")
BOUND = re.compile(r"(?P<how>[<>=!~]=|[<>])\s*(?P<version>[0-9][0-9.]*)")


def versions(requirements: Sequence[str] | None = None) -> Look:
    """Whether the packages that veilmart needs are there, in the versions that it asks for."""
    wrong, count = [], 0
    for text in requirements if requirements is not None else metadata.requires("veilmart") or []:
        asked = REQUIREMENT.match(text)
        if asked is None or "extra" in (asked["marker"] or ""):
            continue
        count += 1
        try:
            found = metadata.version(asked["name"])
        except metadata.PackageNotFoundError:
            found = ""
        if not found or not all(_within(found, bound["how"], bound["version"]) for bound in BOUND.finditer(asked["bounds"])):
            wrong.append(f"{asked['name']} {found or 'is missing'}, expected {asked['bounds'] or 'any'}")
    if wrong:
        return Look("versions", False, "; ".join(wrong[:4]))
    python = ".".join(map(str, sys.version_info[:3]))
    return Look(
        "versions", True, f"veilmart {metadata.version('veilmart')} on Python {python}; {count} required packages in their versions"
    )


def _within(found: str, how: str, bound: str) -> bool:
    """Return whether a version is within a bound, by the numbers that both begin with."""
    mine, its = ([int(part) for part in re.findall(r"[0-9]+", re.split(r"[^0-9.]", text)[0])] for text in (found, bound))
    if how == "~=":
        return mine >= its and mine[: len(its) - 1] == its[:-1]
    width = max(len(mine), len(its))
    one, other = (part + [0] * (width - len(part)) for part in (mine, its))
    return {"<": one < other, ">": one > other, "<=": one <= other, ">=": one >= other, "==": one == other, "!=": one != other}[how]


def software_digest() -> tuple[str, int]:
    """Return the digest of everything that is installed here, by each package's own list of files and hashes, and how many there are."""
    listed = {
        f"{one.metadata['Name']}=={one.version} {hashlib.sha256((one.read_text('RECORD') or '').encode()).hexdigest()}"
        for one in metadata.distributions()
    }
    return hashlib.sha256("\n".join(sorted(listed)).encode()).hexdigest(), len(listed)


def software(expected: str = "") -> Look:
    """Whether what is installed is what was expected to be."""
    digest, count = software_digest()
    if not expected:
        return Look("software", None, f"{count} packages, SHA-256 {digest}: compare it with that of a machine you trust (--software)")
    return Look("software", digest == expected.lower(), f"{count} packages, SHA-256 {digest}; expected {expected.lower()}")


def replies(path: Path) -> Look:
    """Whether a running guard answers at multiples of its period alone, so that what an answer took does not show."""
    from nodes.guard_service import REPLY_S, SocketGuard

    if not path.exists():
        return Look("constant-time replies", None, "no guard is running here")
    guard, late = SocketGuard(f"unix:{path}"), []
    try:
        guard.status()
        for _ in range(CALLS):
            began = time.monotonic()
            guard.status()
            late.append((time.monotonic() - began) % REPLY_S if time.monotonic() - began >= REPLY_S else REPLY_S)
    except GuardUnreachable:
        return Look("constant-time replies", None, "nobody answers at the socket, or this user may not ask")
    middle = float(np.median(late))
    period, shown = f"{1000 * REPLY_S:.0f} ms", f"{CALLS} answers"
    if middle > JITTER_S:
        return Look("constant-time replies", False, f"{shown} do not come at multiples of {period}")
    return Look("constant-time replies", True, f"{shown} came at multiples of {period}, {1000 * middle:.1f} ms late in the middle")


# The mechanism of this installation -----------------------------------------------------------------------------------------------------


def noise(published: Sequence[Release] = (), import_mechanism: str | None = None, import_noise: str | None = None) -> Look:
    """Whether noise comes from the operating system: no seed reaches that of specifications or adapters, and no release states it."""
    from nodes.audit import specification, training

    simulated = [release for release in published if release.simulated]
    if simulated:
        return Look("noise", False, f"{len(simulated)} published releases were made with simulated noise")
    for what, found in (
        ("specifications", specification.independent(8, import_mechanism or specification.OURS)),
        ("adapters", training.independent(import_noise or training.OURS)),
    ):
        if not found.holds:
            return Look("noise", False, f"{what}: {found.evidence}")
    return Look("noise", True, "two processes with equal seeds draw other noise, for specifications and for adapters")


def bounding(mechanism: Mechanism | None = None) -> Look:
    """Whether a record that is longer than allowed is refused or cut down."""
    from nodes.audit.specification import bounds, our_mechanism

    holds, evidence = bounds(mechanism or our_mechanism, np.zeros((0, 64)), Guarantee(4.0, 1e-6))
    return Look("bounding", holds, evidence)


Embed = Callable[[Sequence[str]], NDArray[np.float32]]


def batches(model: BaseModel | None, embed: Embed | None = None) -> Look:
    """Whether the features of a record depend on that record alone, bit for bit: in a padded batch they depend on its mates."""
    if model is None:
        return Look("batches", None, "no base model is at hand")
    from nodes.records import Text

    def alone(texts: Sequence[str]) -> NDArray[np.float32]:
        return model.embed_alone([Text(text) for text in texts], layer=min(2, model.layers))

    make = embed or alone
    texts = ["A short text.", "Another text, which is much longer than the first one and would pad it in a batch. " * 4]
    together, apart = make(texts), np.concatenate([make([text]) for text in texts])
    same = together.tobytes() == apart.tobytes()
    return Look(
        "batches",
        same,
        "a record's features are " + ("the same alone and beside others" if same else "others beside a longer record than alone"),
    )
