"""The operator's Flower processes: a SuperLink that serves organisations, and the SuperExec that runs ServerApps.

The SuperLink's control API knows no passwords: whoever reaches its port can run code on every SuperNode.  So it listens on loopback
only, and a TLS proxy in front of it lets /v1/fleet/* through and nothing else (docs/deploy/nginx.conf).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from market_node.events import tell_of_end
from protocol.errors import FormatError, MarketUnreachable, UsageError, VeilmartError
from protocol.keys import write_durably
from protocol.processes import (
    SECRET,
    Program,
    Supervisor,
    dies_with_us,
    flower_environment,
    flower_program,
    free_port,
    wait_for_port,
)

TOLD = "told.json"
LINK = "market"  # name of the connection in Flower's own configuration
HOST = "127.0.0.1"
COMMAND_TIMEOUT_S = 60.0
NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
PUBLIC_KEY = re.compile(r"ecdsa-sha2-nistp384 [A-Za-z0-9+/=]{1,400}(?: .*)?")


@dataclass(frozen=True, slots=True)
class RegisteredNode:
    """A SuperNode that may connect, and the owner whose releases it brings."""

    name: str
    public_key: str  # one line of OpenSSH, without a comment
    owner: str = ""  # the owner's release key in hexadecimal; "" if nobody said


def flower_home(market_home: Path) -> Path:
    """Return the folder of everything Flower keeps for a market: HOME/market/flower."""
    return market_home / "flower"


def registered(market_home: Path) -> list[RegisteredNode]:
    """Return the SuperNodes that are registered here, in the order of their registration."""
    path = flower_home(market_home) / "nodes.json"
    if not path.exists():
        return []
    try:
        return [RegisteredNode(**node) for node in json.loads(path.read_text())["nodes"]]
    except (ValueError, KeyError, TypeError):
        raise FormatError(f"{path}: expected the list of registered SuperNodes", hint="restore it from a backup") from None


def canonical_key(public_key: str) -> str:
    """Return a SuperNode's public key as one line of OpenSSH without a comment; raise UsageError unless it is a point on P-384.

    It is a stranger's: one that only looks like a key would stop every campaign, and every start of the SuperLink.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    words = public_key.strip()
    try:
        key = serialization.load_ssh_public_key(words.encode()) if PUBLIC_KEY.fullmatch(words) else None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise UsageError("SuperNode key: expected one line of OpenSSH with an ECDSA key on P-384", hint="`veilmart node join` makes one")
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def register_supernode(market_home: Path, public_key: str, name: str, owner: bytes = b"") -> RegisteredNode:
    """Let a SuperNode connect, now if the SuperLink runs and else from its next start on; the same again changes nothing."""
    node = list_supernode(market_home, public_key, name, owner)
    if address(market_home):
        _tell_superlink(market_home, node)
    return node


def list_supernode(market_home: Path, public_key: str, name: str, owner: bytes = b"") -> RegisteredNode:
    """Note a SuperNode, which may connect from the SuperLink's next start on; it takes the place of another one of its owner.

    public_key: one line of OpenSSH, ECDSA on P-384.  owner: the release key whose envelopes this node brings; with it an envelope of
    another owner is refused in a campaign.  Raises UsageError for another kind of key, and where name or key belong to another node.
    """
    if not NAME.fullmatch(name):
        raise UsageError("SuperNode name: expected 1 to 63 of a-z, 0-9, '.', '_', '-' between letters or digits")
    node = RegisteredNode(name, canonical_key(public_key), owner.hex())
    with _writing(market_home):
        nodes = registered(market_home)
        if node in nodes:
            return node
        others = [known for known in nodes if not owner or known.owner != node.owner]
        if any(known.name == node.name or known.public_key == node.public_key for known in others):
            raise UsageError(f"SuperNode {name}: name or key is registered already, with another owner, key or name")
        _keep(market_home, [*others, node])
    return node


def forget_supernode(market_home: Path, owner: bytes) -> None:
    """Ask the SuperNodes of an owner no more.  Flower would never take a key again that it was told to forget, so it is not told."""
    with _writing(market_home):
        _keep(market_home, [known for known in registered(market_home) if known.owner != owner.hex()])


def hand_over_supernode(market_home: Path, owner: bytes, successor: bytes) -> None:
    """Let the SuperNodes of an owner bring the releases of the key that it goes on under; again it changes nothing."""
    if not any(known.owner == owner.hex() for known in registered(market_home)):
        return
    with _writing(market_home):
        nodes = registered(market_home)
        _keep(market_home, [replace(known, owner=successor.hex()) if known.owner == owner.hex() else known for known in nodes])


def _keep(market_home: Path, nodes: list[RegisteredNode]) -> None:
    text = json.dumps({"schema": "veilmart.supernodes/1", "nodes": [asdict(known) for known in nodes]}, indent=1)
    write_durably(flower_home(market_home) / "nodes.json", text.encode())


def address(market_home: Path) -> str:
    """Return where this market's SuperLink listens on loopback, or "" if it does not run."""
    path = flower_home(market_home) / "superlink.json"
    try:
        known = json.loads(path.read_text())
        os.kill(int(known["pid"]), 0)
    except (OSError, ValueError, KeyError):
        return ""
    return str(known["address"])


def flwr(market_home: Path, *words: str, timeout_s: float = COMMAND_TIMEOUT_S) -> dict[str, Any]:
    """Run Flower's own command line against this market's SuperLink and return its JSON; raise MarketUnreachable with its words."""
    home = flower_home(market_home)
    command = [flower_program("flwr"), *words, "--format", "json"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=flower_environment(home), stdin=subprocess.DEVNULL, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise MarketUnreachable(f"SuperLink: no answer to `flwr {words[0]}` within {timeout_s:.0f} s") from None
    answer = _json_in(done.stdout)
    if not answer.get("success"):
        said = str(answer.get("error-message") or done.stderr or done.stdout)
        said = " ".join("".join(c if c.isprintable() else " " for c in said).split())[-400:]
        raise MarketUnreachable(f"SuperLink: `flwr {words[0]}` failed: {said}", hint="is `veilmart market up --flower` running?")
    return answer


@contextmanager
def superlink(market_home: Path, ca: Path, certificate: Path, key: Path, *, port: int = 0) -> Iterator[str]:
    """Run a SuperLink and its SuperExec; yield the address on loopback when nodes may connect.

    Both are started again when they end.  Its database is Flower's: a campaign's account and envelopes are kept elsewhere, durably.
    """
    home = flower_home(market_home)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    port = port or free_port()
    where = f"{HOST}:{port}"
    secret = secrets.token_bytes(32)
    environment = flower_environment(home)
    _write_configuration(home, where, ca)
    link = Program(
        "flower-superlink",
        (
            *dies_with_us(), flower_program("flower-superlink"), "--host", HOST, "--port", str(port), "--database", str(home / "state.db"),
            "--ssl-ca-certfile", str(ca), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--enable-supernode-auth",
            "--disable-runtime-dependency-installation", "--isolation", "process", "--superexec-auth-secret-file", SECRET,
        ),
        environment, home / "superlink.log", secret,
    )  # fmt: skip
    exec_ = Program(
        "flower-superexec",
        (
            *dies_with_us(), flower_program("flower-superexec"), "--runtime-api-address", where, "--root-certificates", str(ca),
            "--superexec-auth-secret-file", SECRET,
        ),
        environment, home / "superexec.log", secret,
    )  # fmt: skip
    state = home / "superlink.json"
    if not (home / "state.db").exists():
        (home / TOLD).unlink(missing_ok=True)  # a SuperLink that begins anew knows nobody
    with Supervisor([link, exec_], tell_of_end) as supervisor:
        wait_for_port(supervisor, link, HOST, port)
        write_durably(state, json.dumps({"address": where, "pid": os.getpid(), "processes": supervisor.pids()}).encode())
        try:
            told = _told(market_home)
            for node in registered(market_home):
                if node.public_key not in told:
                    _tell_superlink(market_home, node)
            yield where
        finally:
            state.unlink(missing_ok=True)


def _tell_superlink(market_home: Path, node: RegisteredNode) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".pub") as file:
        file.write(node.public_key + "\n")
        file.flush()
        try:
            flwr(market_home, "supernode", "register", file.name, LINK, "--name", node.name)
        except VeilmartError as error:
            # Flower answers the second registration of a key with an error; the first one is all that is needed.
            if "already in use" not in str(error).lower():
                raise
    with _writing(market_home):
        text = json.dumps({"schema": "veilmart.supernodes-told/1", "keys": sorted(_told(market_home) | {node.public_key})}, indent=1)
        write_durably(flower_home(market_home) / TOLD, text.encode())


def _told(market_home: Path) -> set[str]:
    """Return the keys that the SuperLink's database holds: telling it again costs two CPU-seconds a node, minutes for a hundred."""
    try:
        return set(json.loads((flower_home(market_home) / TOLD).read_text())["keys"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _write_configuration(home: Path, where: str, ca: Path) -> None:
    text = (
        f'[superlink]\ndefault = "{LINK}"\n\n[superlink.{LINK}]\naddress = "{where}"\nroot-certificates = {json.dumps(str(ca.resolve()))}\n'
    )
    write_durably(home / "config.toml", text.encode())


@contextmanager
def _writing(market_home: Path) -> Iterator[None]:
    home = flower_home(market_home)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "nodes.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _json_in(text: str) -> dict[str, Any]:
    """Return the JSON object in the output of `flwr`, which prints remarks around it."""
    for start in (match.start() for match in re.finditer(r"^\s*\{", text, re.MULTILINE)):
        try:
            value, _ = json.JSONDecoder().raw_decode(text[start:].lstrip())
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return {}
