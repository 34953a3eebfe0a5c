"""Which SuperNodes are registered, and what the campaign commands say without a SuperLink."""

import json
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from market_node import superlink as superlink_module
from market_node.campaigns import asked_of, bundle_folder
from market_node.members import Member, Members
from market_node.server import register_members
from market_node.superlink import _json_in, address, flower_home, forget_supernode, hand_over_supernode, register_supernode, registered
from nodes.bundle import FOLDER
from nodes.supernode import supernode_key
from protocol.errors import FormatError, UsageError

OPENSSH = (Encoding.OpenSSH, PublicFormat.OpenSSH)


def key_on_another_curve() -> str:
    """Return a key on P-256 under the name of P-384, as a stranger may write it."""
    line = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(*OPENSSH).decode()
    return line.replace("ecdsa-sha2-nistp256 ", "ecdsa-sha2-nistp384 ")


def test_a_supernode_is_registered_once_and_listed(tmp_path):
    key = supernode_key(tmp_path / "clinic")
    first = register_supernode(tmp_path, key, "clinic-a", b"\x07" * 32)
    assert register_supernode(tmp_path, key + " a comment", "clinic-a", b"\x07" * 32) == first
    assert registered(tmp_path) == [first]
    (asked,) = asked_of(registered(tmp_path))
    assert bytes.fromhex(asked.key).startswith(b"-----BEGIN PUBLIC KEY-----")
    assert (asked.name, asked.owner) == ("clinic-a", "07" * 32)


def test_a_name_or_a_key_belongs_to_one_node(tmp_path):
    key, other = supernode_key(tmp_path / "a"), supernode_key(tmp_path / "b")
    register_supernode(tmp_path, key, "clinic-a")
    for line, name, owner in ((other, "clinic-a", b""), (key, "clinic-b", b""), (key, "clinic-a", b"\x01" * 32)):
        with pytest.raises(UsageError, match="registered already"):
            register_supernode(tmp_path, line, name, owner)
    assert len(registered(tmp_path)) == 1


def test_another_supernode_of_an_owner_takes_the_place_of_the_first_and_one_that_is_forgotten_is_asked_no_more(tmp_path):
    key, other = supernode_key(tmp_path / "a"), supernode_key(tmp_path / "b")
    register_supernode(tmp_path, key, "clinic-a", b"\x01" * 32)
    register_supernode(tmp_path, other, "clinic-a", b"\x01" * 32)
    assert [node.public_key for node in registered(tmp_path)] == [other]
    forget_supernode(tmp_path, b"\x01" * 32)
    assert registered(tmp_path) == []
    assert register_supernode(tmp_path, key, "clinic-a", b"\x01" * 32) in registered(tmp_path), "a member may come back"


def test_a_supernode_goes_over_to_the_key_that_its_owner_goes_on_under(tmp_path):
    key, other = supernode_key(tmp_path / "a"), supernode_key(tmp_path / "b")
    register_supernode(tmp_path, key, "clinic-a", b"\x01" * 32)
    register_supernode(tmp_path, other, "clinic-b", b"\x03" * 32)
    for _ in range(2):
        hand_over_supernode(tmp_path, b"\x01" * 32, b"\x02" * 32)
        assert [node.owner for node in registered(tmp_path)] == ["02" * 32, "03" * 32]
    assert register_supernode(tmp_path, key, "clinic-a-new", b"\x02" * 32) in registered(tmp_path), "as the next start does"
    assert len(registered(tmp_path)) == 2


@pytest.mark.parametrize(
    "key",
    ["", "ssh-ed25519 AAAA", "ecdsa-sha2-nistp384 AA\nBB", "ecdsa-sha2-nistp384 A;B", "ecdsa-sha2-nistp384 AAAA", key_on_another_curve()],
)
def test_another_kind_of_key_is_refused(tmp_path, key):
    with pytest.raises(UsageError, match="P-384"):
        register_supernode(tmp_path, key, "clinic-a")


@pytest.mark.parametrize("name", ["", "-x", "A", "a b", "../x", "x" * 64])
def test_a_name_is_plain(tmp_path, name):
    with pytest.raises(UsageError, match="name"):
        register_supernode(tmp_path, supernode_key(tmp_path / "n"), name)


def test_a_superlink_is_told_of_a_node_once_and_anew_when_it_lost_its_database(tmp_path, monkeypatch):
    told = []

    class Running:
        def __init__(self, programs, on_end) -> None: ...
        def __enter__(self):
            return self

        def __exit__(self, *error) -> None: ...
        def pids(self):
            return {}

    monkeypatch.setattr(superlink_module, "Supervisor", Running)
    monkeypatch.setattr(superlink_module, "wait_for_port", lambda *what: None)
    monkeypatch.setattr(superlink_module, "flwr", lambda home, *words: told.append(words[-1]) or {})
    register_supernode(tmp_path, supernode_key(tmp_path / "a"), "clinic-a")

    def start() -> None:
        with superlink_module.superlink(tmp_path, tmp_path / "ca", tmp_path / "crt", tmp_path / "key"):
            (flower_home(tmp_path) / "state.db").touch()

    start()
    start()
    assert told == ["clinic-a"]
    register_supernode(tmp_path, supernode_key(tmp_path / "b"), "clinic-b")
    start()
    assert told == ["clinic-a", "clinic-b"]
    (flower_home(tmp_path) / "state.db").unlink()
    start()
    assert told[2:] == ["clinic-a", "clinic-b"]


def test_a_damaged_list_is_said_to_be_one(tmp_path):
    flower_home(tmp_path).mkdir(parents=True)
    (flower_home(tmp_path) / "nodes.json").write_text('{"nodes": [{"name": 1, "what": 2}]}')
    with pytest.raises(FormatError, match="registered SuperNodes"):
        registered(tmp_path)


def test_a_superlink_that_ended_has_no_address(tmp_path):
    flower_home(tmp_path).mkdir(parents=True)
    state = flower_home(tmp_path) / "superlink.json"
    assert address(tmp_path) == ""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    state.write_text(json.dumps({"address": "127.0.0.1:1", "pid": ended.pid}))
    assert address(tmp_path) == ""


def test_json_is_found_among_the_remarks_of_flowers_command_line():
    assert _json_in('Loading...\n{\n "success": true,\n "run-id": "7"\n}\ndone {') == {"success": True, "run-id": "7"}
    assert _json_in("no { json [") == {}


def test_the_bundle_is_found_without_importing_the_other_side():
    code = "import sys; from market_node.campaigns import bundle_folder; print(bundle_folder()); assert 'nodes' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert bundle_folder().resolve() == FOLDER.resolve()


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # what flwr calls
def test_the_bundle_carries_two_modules_and_nothing_else(tmp_path):
    """Flower packs every text file below a folder unless it is told otherwise."""
    import io
    import zipfile

    from flwr.cli.build import build_fab_from_disk

    names = set(zipfile.ZipFile(io.BytesIO(build_fab_from_disk(FOLDER))).namelist())
    assert {name for name in names if not name.startswith(".info")} == {"client_app.py", "server_app.py", "pyproject.toml"}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("campaign", "run", "--market", "a:1"), 6, "no SuperLink"),
        (("campaign", "show", "../../etc"), 2, "expected an id"),
        (("campaign", "show", "20260102-101500-a1b2c3"), 3, "there is none"),
        (("campaign", "list"), 0, "campaign"),
        (("node", "up", "--data", "x.jsonl", "--flower", "a:1"), 2, "--ca"),
        (("node", "up", "--data", "x.jsonl", "--flower", "a:1", "--ca", "ca.crt"), 2, "--app-user"),
    ],
)
def test_wrong_use_gets_one_clear_line(tmp_path, words, code, said):
    command = [sys.executable, "-m", "nodes.command", *words, "--home", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_who_enrolled_while_no_superlink_ran_is_registered_when_the_market_starts_with_one(tmp_path):
    members, key = Members.open(tmp_path), supernode_key(tmp_path / "clinic")
    gone, later = b"\1" * 32, 1 << 40
    members.enrol(members.invite("Gone", later), gone, key, 1)
    members.remove(gone.hex(), 2)
    members.enrol(members.invite("Broken", later), b"\2" * 32, "no key at all", 3)
    good = members.enrol(members.invite("City Hospital", later), b"\3" * 32, key, 4)

    def register(member: Member) -> str:
        return register_supernode(tmp_path, member.supernode_key, member.node_name, member.owner).name

    register_members(members, register)
    register_members(members, register)  # every start
    members.close()
    assert [(node.name, node.owner) for node in registered(tmp_path)] == [(good.node_name, good.owner.hex())]
