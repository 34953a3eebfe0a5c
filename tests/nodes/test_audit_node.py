"""Every hazard of a node is seen where it is made on purpose, and none where there is none."""

import datetime
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node.identity import market_identity
from nodes.adapter import Adapter
from nodes.audit import node
from nodes.audit.node import Deployment, Process, audit_node
from nodes.base_model import BaseModel
from nodes.finetune import Recipe, finetune
from nodes.guard import Order, Policy
from nodes.guard_service import Desk, serving
from nodes.journal import Journal
from nodes.ledger import Budget, Ledger, release_charge
from nodes.policy import EXAMPLE, OwnerPolicy, Service, read_policy
from nodes.private_training import PrivateRecipe
from nodes.records import Text, read_records
from protocol.keys import signing_key
from protocol.privacy import Guarantee, PrivateTraining
from protocol.release import AdapterReference, open_envelope, sign_release
from protocol.transparency import Checkpoint, Receipt, leaf_hash, origin_of, root_of_all, sign_checkpoint
from tests.nodes.guard_processes import guard_process, write_policy
from tests.nodes.owners import MARKER, SPLIT, make_guard, write_records
from tests.nodes.test_audit import no_bound
from tests.nodes.test_command import veilmart

RICH = Policy(Budget(20.0, 1e-6))
PRIVATE = PrivateRecipe(Guarantee(8.0, 1e-6), rank=2, steps=2, rate=0.5)
SEEDED = "from tests.nodes.test_audit import seeded_noise as mechanism"


@pytest.fixture(scope="module")
def model(tiny_model_directory):
    return BaseModel.open(tiny_model_directory, torch.float32)


@pytest.fixture(scope="module")
def published(tmp_path_factory, model):
    """The home of an owner that published one release with a private adapter, and keeps its receipt; never changed by a test."""
    home = tmp_path_factory.mktemp("owner") / "home"
    guard = make_guard(home / "node", write_records(home.parent / "notes.jsonl"), model, policy=RICH, recipe=PRIVATE)
    keep_receipt(home, guard.release(Order(Guarantee(1.0, 1e-6))))
    Journal(home / "node" / "journal.jsonl").close()
    return home


@pytest.fixture
def home(published, tmp_path):
    return shutil.copytree(published, tmp_path / "home")


@pytest.fixture
def authority(tmp_path):
    return market_identity(tmp_path / "market", (), datetime.datetime.now(datetime.UTC)).ca_file


def keep_receipt(home, envelope: bytes) -> None:
    key = Ed25519PrivateKey.generate()
    market = key.public_key().public_bytes_raw()
    checkpoint = Checkpoint(origin_of(market), 1, root_of_all([envelope]), bytes(32))
    assert checkpoint.root == leaf_hash(envelope)
    receipt = Receipt(envelope, market, 0, sign_checkpoint(checkpoint, key), ())
    (home / "receipts").mkdir(exist_ok=True)
    (home / "receipts" / f"{open_envelope(envelope).release_id.hex()}.receipt").write_bytes(receipt.to_bytes())


def envelopes(home) -> list[bytes]:
    return [Receipt.from_bytes(path.read_bytes()).envelope for path in (home / "receipts").glob("*.receipt")]


def deployment(home, **how) -> Deployment:
    return Deployment(home, home / "node", home / "guard" / "socket", **how)


def running(*words: str, children=(), environment=None) -> Process:
    command = ("python", "-m", "nodes.command", "node", "up", "--data", "notes.jsonl", *words)
    return Process(1, command, environment or {}, 1000, tuple(children))


# A good deployment -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def owner_policy(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(EXAMPLE.replace("epsilon_for_life = 4.0", "epsilon_for_life = 20.0"))
    return read_policy(path)


def test_control_a_good_deployment_has_no_hazard(home, model, authority, owner_policy):
    data = write_records(home.parent / "records" / "notes.jsonl")
    data.chmod(0o600)
    found = audit_node(
        deployment(
            home, data=data, policy=owner_policy, authority=authority, published=envelopes(home), model=model,
            software=node.software_digest()[0],
        )
    )  # fmt: skip
    states = {look.name: look.holds for look in found}
    assert len(states) == len(found)
    assert False not in states.values(), [look for look in found if look.holds is False]
    there = ("permissions", "policy", "tls", "telemetry", "versions", "software", "journal", "ledger", "budget", "market log", "adapter")
    assert all(states[name] for name in (*there, "noise", "bounding", "batches")), states


def test_an_audit_changes_nothing_and_its_evidence_holds_nothing_of_a_record(home, model):
    def state():
        return {path: (path.stat().st_mode, path.stat().st_mtime_ns, path.read_bytes()) for path in home.rglob("*") if path.is_file()}

    before = state()
    found = audit_node(deployment(home, model=model))
    assert state() == before
    assert MARKER not in " ".join(look.evidence for look in found)


def test_what_cannot_be_seen_is_unknown_and_no_yes(tmp_path):
    names = (
        "permissions",
        "socket",
        "isolation",
        "memory",
        "policy",
        "tls",
        "journal",
        "ledger",
        "budget",
        "market log",
        "adapter",
        "batches",
    )
    (tmp_path / "node").mkdir()
    states = {look.name: look.holds for look in audit_node(deployment(tmp_path))}
    assert [states[name] for name in (*names, "constant-time replies", "software")] == [None] * (len(names) + 2)


@pytest.mark.slow
def test_a_running_guard_is_examined_and_the_command_says_so(tmp_path, tiny_model_directory):
    """A guard as a process of its own: by its socket, its process and the moments of its answers."""
    home, data = tmp_path / "home", write_records(tmp_path / "records" / "notes.jsonl")
    data.chmod(0o600)
    policy = write_policy(tmp_path / "policy.toml", slot=3600)
    with guard_process(home, data, tiny_model_directory, policy):
        words = ("audit", "node", "--socket", str(home / "door" / "socket"), "--data", str(data), "--base", str(tiny_model_directory))
        done = veilmart(*words, "--json", home=home)
    states = {check["name"]: check["holds"] for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, done.stdout
    seen = ("permissions", "socket", "isolation", "policy", "telemetry", "journal", "constant-time replies", "noise", "bounding", "batches")
    assert all(states[name] for name in seen), done.stdout
    assert states["memory"] is not False, "whether there is swap is this machine's"


@pytest.mark.slow
def test_the_command_ends_with_4_where_there_is_a_hazard(home):
    (home / "node" / "journal.jsonl").write_text("{}\n")
    done = veilmart("audit", "node", home=home)
    assert done.returncode == 4
    assert "NO       journal" in done.stdout
    assert veilmart("audit", "node", "--home", str(home / "nowhere"), home=home).returncode == 2


# Each hazard, made on purpose --------------------------------------------------------------------------------------------------------


@pytest.fixture
def below_an_open_folder(monkeypatch):
    """As below /srv: the folders of pytest are closed to others, and so is what lies in them."""
    monkeypatch.setattr(node, "_closed_above", lambda path: False)


@pytest.mark.usefixtures("below_an_open_folder")
@pytest.mark.parametrize("name", ["node/owner.key", "node/ledger.db", "node/journal.jsonl", "node/claims.db"])
def test_a_private_file_that_others_may_read_is_seen(home, name):
    assert node.permissions(home).holds
    (home / name).chmod(0o644)
    found = node.permissions(home)
    assert found.holds is False
    assert name.removeprefix("node/") in found.evidence


def test_a_folder_that_only_its_owner_enters_closes_what_is_in_it(home):
    home.parent.chmod(0o700)
    (home / "node" / "owner.key").chmod(0o644)
    assert node.permissions(home).holds


@pytest.mark.usefixtures("below_an_open_folder")
def test_records_that_others_may_read_are_seen(home):
    data = write_records(home.parent / "records" / "notes.jsonl")
    data.chmod(0o644)
    assert node.permissions(home, data).holds is False
    data.chmod(0o600)
    assert node.permissions(home, data).holds


def test_seeded_noise_is_seen():
    found = node.noise(import_mechanism=SEEDED)
    assert found.holds is False
    assert "specifications" in found.evidence
    found = node.noise(import_noise="import numpy\ndraw = lambda count: numpy.random.standard_normal(count)")
    assert found.holds is False
    assert "adapters" in found.evidence


def test_a_release_with_simulated_noise_is_seen(home):
    (release,) = node.receipts(home)
    assert node.noise([release]).holds
    assert node.noise([replace(release, simulated=True)]).holds is False


def test_a_missing_bound_is_seen():
    assert node.bounding().holds
    assert node.bounding(no_bound).holds is False


def test_a_budget_that_was_begun_anew_is_seen(home):
    """The ledger is gone, a new one starts at nothing: the receipts remember."""
    assert node.budget(deployment(home)).holds
    (home / "node" / "ledger.db").unlink()
    assert node.budget(deployment(home)).holds is False
    Ledger.open(home / "node" / "ledger.db", RICH.budget).entries()
    assert node.budget(deployment(home)).holds is False


def test_a_budget_that_is_overdrawn_is_seen(home):
    limit = OwnerPolicy(Policy(Budget(2.0, 1e-6)), service=Service(slot_s=3600))
    assert node.budget(deployment(home, policy=limit)).holds is False


def test_a_release_that_the_ledger_lacks_is_seen_in_the_log(home, model, tmp_path):
    assert node.market_log(deployment(home, published=envelopes(home))).holds
    other = make_guard(tmp_path / "other", write_records(tmp_path / "more.jsonl", word="silk"), model)
    assert node.market_log(deployment(home, published=[*envelopes(home), other.release(Order(Guarantee(1.0, 1e-6)))])).holds is False
    assert node.market_log(deployment(home, published=[])).holds is False, "a receipt promises a release that is not there"


def test_an_adapter_without_a_guarantee_that_is_released_with_one_is_seen(home, model, tmp_path):
    assert node.adapter(home / "node").holds
    states = model.prefix_pass(read_records(write_records(tmp_path / "more.jsonl", 12)), split=SPLIT, layer=2)[1]
    data = finetune(model, states, Recipe(max_steps=1, rank=2)).to_bytes()
    forge(home, AdapterReference(hashlib.sha256(data).digest(), len(data), PrivateTraining(PRIVATE.guarantee, PRIVATE.event)), data)
    found = node.adapter(home / "node")
    assert found.holds is False
    assert "trained with: none" in found.evidence


def test_an_adapter_of_which_no_training_is_charged_is_seen(home):
    """Its file says what its release says, but the training was never paid for."""
    (release,) = node.receipts(home)
    (path,) = (home / "node" / "adapters").glob("*.safetensors")
    recipe = replace(PRIVATE, steps=3)
    forged = Adapter.from_bytes(path.read_bytes(), base_model=release.base_model.hex()).to_bytes()
    promise = PrivateTraining(recipe.guarantee, recipe.event)
    forge(home, AdapterReference(hashlib.sha256(forged).digest(), len(forged), promise), forged, charge_adapter=False)
    assert "no training is charged" in node.adapter(home / "node").evidence


def forge(home, reference: AdapterReference, data: bytes, *, charge_adapter: bool = True) -> None:
    """Charge and store a release with another adapter, signed with the owner's own key."""
    (release,) = node.receipts(home)
    key, ledger = signing_key(home / "node" / "owner.key"), Ledger.open(home / "node" / "ledger.db", RICH.budget)
    (home / "node" / "adapters" / f"{reference.digest.hex()}.safetensors").write_bytes(data)
    charge = release_charge(replace(release, adapter=reference if charge_adapter else None))

    def make(number: int, previous: bytes) -> tuple[bytes, bytes]:
        envelope = sign_release(replace(release, release_number=number, previous=previous, adapter=reference), key)
        return open_envelope(envelope).release_id, envelope

    ledger.charge(b"forged" * 5, charge, make)


def test_features_from_padded_batches_are_seen(model):
    assert node.batches(model).holds
    assert node.batches(model, lambda texts: model.embed_batched([Text(text) for text in texts], layer=2)).holds is False


def test_connections_without_tls_are_seen(authority):
    assert node.tls(authority, running()).holds
    dials = [(1000, ("flower-supernode", "--superlink", "far:9092", "--insecure"))]
    assert node.tls(authority, running("--flower", "far:9092", children=dials)).holds is False
    on_loopback = [(1000, ("flower-superexec", "--insecure", "--runtime-api-address", "127.0.0.1:9"))]
    assert node.tls(authority, running("--flower", "far:9092", children=on_loopback)).holds


@pytest.mark.usefixtures("below_an_open_folder")
def test_an_authority_that_is_old_or_exchangeable_is_seen(authority, tmp_path):
    authority.chmod(0o666)
    assert node.tls(authority, None).holds is False
    old = market_identity(tmp_path / "old", (), datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)).ca_file
    assert "valid from" in node.tls(old, None).evidence
    assert node.tls(old, None).holds is False
    (tmp_path / "no.crt").write_text("nothing")
    assert node.tls(tmp_path / "no.crt", None).holds is False


def test_bundles_that_see_what_the_guard_sees_are_seen():
    assert node.isolation(running()).holds, "no bundles at all"
    assert node.isolation(running("--flower", "far:1", "--unisolated")).holds is False
    runner = ("flower-superexec", "--insecure")
    assert node.isolation(running("--flower", "far:1", "--app-user", "app", children=[(1001, runner)])).holds
    assert node.isolation(running("--flower", "far:1", "--app-user", "app", children=[(1000, runner)])).holds is False


LIMITS = "Limit                     Soft Limit           Hard Limit           Units\nMax core file size        {:<21}{:<21}bytes\n"
SWAPS = "Filename\t\tType\t\tSize\n"
MEMORY = {
    "nothing": ("1", "1", "", True),
    "none since the service started": ("0", "0", "", True),
    "swap in memory": ("0", "0", "/dev/zram0 partition 1\n", True),
    "swap on a disk": ("1", "1", "/dev/sda2 partition 1\n", None),
    "dumps": ("unlimited", "unlimited", "", False),
    "dumps, if it likes": ("0", "unlimited", "", False),
}


@pytest.mark.parametrize(("soft", "hard", "swap", "holds"), MEMORY.values(), ids=MEMORY)
def test_memory_that_may_reach_a_disk_is_seen(tmp_path, monkeypatch, soft, hard, swap, holds):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "limits").write_text(LIMITS.format(soft, hard))
    (tmp_path / "swaps").write_text(SWAPS + swap)
    monkeypatch.setattr(node, "PLACES", str(tmp_path))
    assert node.memory(running()).holds is holds


def test_a_command_dumps_no_core():
    program = "import resource\nfrom nodes.command import dump_no_core\n{}\nprint(resource.getrlimit(resource.RLIMIT_CORE)[1])"
    left = [subprocess.run([sys.executable, "-c", program.format(what)], capture_output=True, text=True) for what in ("", "dump_no_core()")]
    assert left[1].stdout.strip() in node.NO_CORE, left[1].stderr
    assert left[0].stdout.strip() not in node.NO_CORE[1:], "the control: without it there is room for a dump, or none at all"


def test_a_policy_that_bounds_little_is_seen(owner_policy):
    assert node.policy(owner_policy).holds
    assert node.policy(replace(owner_policy, service=Service(slot_s=1.0))).holds is False
    assert node.policy(None, running()).holds is False


def test_the_policy_of_a_running_guard_is_the_one_it_was_started_with():
    here = replace(running("--policy", "policy.toml"), number=os.getpid())
    assert str(node.policy_of(here)) == os.path.join(os.getcwd(), "policy.toml")
    assert node.policy_of(running()) is None


def test_telemetry_that_is_turned_on_is_seen():
    assert node.telemetry({}, running(environment={"FLWR_TELEMETRY_ENABLED": "0"})).holds
    assert node.telemetry({"HF_HUB_OFFLINE": "0"}, None).holds is False
    assert node.telemetry({}, running(environment={"FLWR_TELEMETRY_ENABLED": "1"})).holds is False


def test_a_clock_that_was_set_back_is_seen(home):
    assert node.clock(home / "node").holds is not False
    assert node.clock(home / "node", lambda: time.time() - 86_400).holds is False


def test_other_software_than_expected_is_seen():
    assert node.software(node.software_digest()[0]).holds
    assert node.software("00" * 32).holds is False
    assert node.versions().holds
    assert node.versions(["numpy<1"]).holds is False
    assert node.versions(['no-such-package ; extra == "dev"']).holds
    within = ["numpy>=1,<3", "numpy!=1.0", "numpy~=2.0" if metadata.version("numpy").startswith("2") else "numpy~=1.0"]
    assert node.versions(within).holds
    assert node.versions(["no-such-package>=1"]).holds is False


def test_a_changed_journal_and_a_changed_ledger_are_seen(home):
    path = home / "node" / "journal.jsonl"
    journal = Journal(path)
    journal.append("malformed")
    journal.close()
    assert node.journal(home / "node").holds
    path.write_text(path.read_text().replace("malformed", "mal-formed"))
    assert node.journal(home / "node").holds is False
    assert node.ledger(home / "node").holds
    data = (home / "node" / "ledger.db").read_bytes()
    (home / "node" / "ledger.db").write_bytes(data.replace(b"poisson-sampled-gaussian", b"poisson-sampled-gaussiam"))
    assert node.ledger(home / "node").holds is False
    (home / "node" / "ledger.db").write_bytes(b"no ledger" * 1000)
    assert node.ledger(home / "node").holds is False


def test_a_socket_that_anybody_may_ask_or_exchange_is_seen(tmp_path):
    with serving(desk(tmp_path), tmp_path / "door" / "socket", Service()):
        path = tmp_path / "door" / "socket"
        assert node.door(path).holds
        path.chmod(0o666)
        assert node.door(path).holds is False
        path.chmod(0o660)
        path.parent.chmod(0o777)
        assert node.door(path).holds is False
        path.parent.chmod(stat.S_IRWXU)


def desk(folder) -> Desk:
    return Desk(Journal(folder / "journal.jsonl"), Service(), lambda release_id: None, lambda number, order: None)


async def at_once(work):
    return await work


def test_a_guard_that_answers_at_once_is_seen(tmp_path):
    path = tmp_path / "door" / "socket"
    with serving(desk(tmp_path), path, Service()):
        assert node.replies(path).holds
        assert node.guard_process(path).number == os.getpid()
    with serving(desk(tmp_path / "other"), path, Service(), padded=at_once):
        assert node.replies(path).holds is False
    assert node.replies(path).holds is None
