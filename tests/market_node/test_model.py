"""The market against a model of it: requests and answers are lost at any call, days pass, and each thing is there once.

Every release is of a data set of its own: one coordinate of its mean is one, the others are zero, and the specification is that sum as it
is.  So a query for everything scores each release that is there with one: a lost one shows as zero, one that counts twice as two.
"""

import hashlib
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from market_node import service as services
from market_node.members import Members
from market_node.quotas import WINDOW_S, Limits, Quotas
from market_node.service import answering
from market_node.store import RELEASES, Store
from nodes import market_client
from nodes.market_client import MarketClient
from protocol.enrolment import sign_enrolment
from protocol.errors import AlreadyPublished, MarketUnreachable, QuotaExceeded, Unauthorised, VeilmartError
from protocol.features import EmbeddingKind, FeatureMap, View
from protocol.notices import Kind, Notice, sign_notice
from protocol.privacy import noise_variance
from protocol.release import AdapterReference, Card, Release, open_envelope, sign_release
from protocol.specification import COUNT_STEP, FEATURE_SCALE, NORM_SQUARED, Specification
from protocol.transparency import root_of_all
from protocol.window import ALWAYS
from tests.market_node.local import LocalStub, QuietService
from tests.protocol.worlds import CONSTANTS, ONE

UNITS, DIMENSION = 300, 64
LIMITS = Limits(releases=3)
OWNERS, CLIENTS = 4, 3
INVITE_S = 3 * 86_400


def flat_map() -> FeatureMap:
    """A map whose centre is nowhere, so that products with its coordinates are the means themselves."""
    half, ones = DIMENSION // 2, np.ones(DIMENSION, np.float32)
    views = tuple(View(0 * ones, ones, 0 * ones, np.eye(DIMENSION, half, k, np.float32)) for k in (0, -half))
    centre = np.zeros(DIMENSION, np.int64)
    return FeatureMap("flat", "ab" * 32, EmbeddingKind.HIDDEN_STATES, 6, (60, 40), views, centre, CONSTANTS, CONSTANTS, ("public",))


MAP = flat_map()


class Lost(grpc.RpcError):
    """A call that the network swallowed."""

    def code(self):
        return grpc.StatusCode.UNAVAILABLE

    def details(self):
        return "lost"

    def trailing_metadata(self):
        return ()


class LossyStub:
    """A real stub whose next calls lose the request (nothing arrives) or the response (it was done all the same)."""

    def __init__(self, stub) -> None:
        self._stub, self.losses = stub, []

    def __getattr__(self, name):
        real = getattr(self._stub, name)

        def call(*args, **how):
            loss = self.losses.pop(0) if self.losses else None
            if loss == "request":
                raise Lost
            answer = real(*args, **how)
            if loss == "response":
                raise Lost
            return answer

        return call


class Channel:
    """Of a client without a network."""

    def close(self) -> None:
        pass


class MarketMachine(RuleBasedStateMachine):
    """Clients of one market, each with its own memory.  The model: what was sent, what was acknowledged, who is a member, and the time."""

    service_type = QuietService
    folder = None
    number = 0
    releases = Bundle("releases")
    losses = st.lists(st.sampled_from([None, None, "request", "response"]), max_size=4)
    who, whose = st.integers(0, CLIENTS - 1), st.integers(0, OWNERS - 1)

    @initialize()
    def start(self):
        type(self).number += 1
        self.home = self.folder / f"world{self.number}"
        template = self.folder / "template"
        if not template.exists():
            Store.open(template).close()
            Quotas.open(template, LIMITS).close()
        shutil.copytree(template, self.home / "m")
        self.clock, self.ca = SimpleNamespace(time=lambda: self.now, monotonic=time.monotonic), self.home / "ca"
        self.ca.write_bytes(b"nobody looks")
        self.now = 1_800_000_000.0
        services.time = self.clock
        self.store, self.members = Store.open(self.home / "m"), Members.open(self.home / "m")
        self.quotas = Quotas.open(self.home / "m", LIMITS)
        key = Ed25519PrivateKey.generate()
        self.market_key = key.public_key().public_bytes_raw()
        self.service = self.service_type(self.store, MAP, key, simulation=False, members=self.members, quotas=self.quotas)
        self.local = LocalStub(self.service)
        self.stubs = [LossyStub(self.local) for _ in range(CLIENTS)]
        self.clients = []
        for n in range(CLIENTS):
            market_client.connect, market_client.MarketStub = lambda address, ca, apart: Channel(), lambda channel, n=n: self.stubs[n]
            self.clients.append(MarketClient("nowhere:1", self.ca, self.home / f"client{n}"))
        self.keys = [Ed25519PrivateKey.generate() for _ in range(OWNERS)]
        self.invites: dict[int, tuple[bytes, float]] = {}
        self.joined: set[int] = set()  # acknowledged
        self.asked: set[int] = set()
        self.sent: dict[bytes, int] = {}  # envelope, whose
        self.acknowledged, self.positions, self.charged = set(), {}, {}
        self.withdrawing, self.withdrawn = set(), set()
        self.files: dict[bytes, bytes] = {}

    def teardown(self):
        if hasattr(self, "local"):
            self.service.close()
            for part in (self.store, self.members, self.quotas, self.local):
                part.close()
            shutil.rmtree(self.home)

    def attempt(self, who, losses, what):
        client = self.clients[who]
        self.stubs[who].losses = list(losses)
        try:
            return what(client)
        except MarketUnreachable:
            return None
        finally:
            self.stubs[who].losses = []

    # Time and members ----------------------------------------------------------------------------------------------------

    @rule(hours=st.sampled_from([1, 13, 25]))
    def time_passes(self, hours):
        self.now += 3600 * hours

    @rule(who=who, whose=whose, losses=losses)
    def enrol(self, who, whose, losses):
        if whose not in self.invites:
            self.invites[whose] = self.members.invite(f"clinic {whose}", int(self.now) + INVITE_S), self.now + INVITE_S
        secret, expires = self.invites[whose]
        key = self.keys[whose]
        owner, signature = key.public_key().public_bytes_raw(), sign_enrolment(self.market_key, secret, key, "")
        try:
            self.asked.add(whose)
            if self.attempt(who, losses, lambda client: client.enrol(secret, owner, "", signature)) is not None:
                self.joined.add(whose)
        except Unauthorised:
            assert self.now >= expires, "an invite that is good is taken, by its owner as often as it comes"
            assert whose not in self.joined

    # Releases ------------------------------------------------------------------------------------------------------------

    @rule(target=releases, who=who, whose=whose, losses=losses)
    def publish(self, who, whose, losses):
        envelope = self.new_release(whose)
        self.sent[envelope] = whose
        self.send(who, envelope, losses)
        return envelope

    @rule(who=who, envelope=releases, losses=losses)
    def publish_again(self, who, envelope, losses):
        self.send(who, envelope, losses)

    def new_release(self, whose: int) -> bytes:
        """Return a release like no other: one coordinate of its mean is one."""
        number = 1 + sum(other == whose for other in self.sent.values())
        sums = np.zeros(DIMENSION + 1, np.int32)
        place = len(self.sent)
        sums[0], sums[1 + place] = UNITS * COUNT_STEP, UNITS * FEATURE_SCALE
        specification = Specification(MAP.map_id, sums, noise_variance(ONE, NORM_SQUARED), ONE)
        key = self.keys[whose]
        data = f"weights {place}".encode()
        reference = AdapterReference(hashlib.sha256(data).digest(), len(data))
        self.files[reference.digest] = data
        owner, previous = key.public_key().public_bytes_raw(), b"" if number == 1 else bytes([1]) * 32
        base, card = bytes.fromhex(MAP.base_model), Card(f"release-{place}")
        return sign_release(Release(owner, number, previous, base, specification, reference, card, False, ALWAYS), key)

    def send(self, who, envelope, losses):
        whose = self.sent[envelope]
        try:
            receipt = self.attempt(who, losses, lambda client: client.publish(envelope))
        except Unauthorised:
            assert whose not in self.joined
            return
        except QuotaExceeded:
            assert len(self.recent(whose)) >= LIMITS.releases
            return
        finally:
            if self.store.holds(open_envelope(envelope).release_id):
                self.charged.setdefault(envelope, self.now)
        if receipt is not None:
            self.acknowledged.add(envelope)
            assert self.positions.setdefault(envelope, receipt.index) == receipt.index, "the same place, however often it is sent"

    def recent(self, whose: int) -> list[bytes]:
        return [one for one, at in self.charged.items() if self.sent[one] == whose and at > self.now - WINDOW_S]

    @rule(who=who, envelope=releases, losses=losses)
    def hand_in_the_adapter(self, who, envelope, losses):
        adapter = open_envelope(envelope).adapter
        if envelope in self.acknowledged - self.withdrawing:
            self.attempt(who, losses, lambda client: client.upload_adapter(adapter, self.files[adapter.digest]) or True)
            if self.store.has_adapter(adapter.digest):
                data = self.attempt(who, losses, lambda client: client.download_adapter(adapter))
                assert data in (None, self.files[adapter.digest])

    @rule(who=who, envelope=releases, losses=losses)
    def withdraw(self, who, envelope, losses):
        if envelope not in self.acknowledged:
            return
        release, key = open_envelope(envelope), self.keys[self.sent[envelope]]
        notice = sign_notice(Notice(Kind.WITHDRAWAL, self.market_key, release.owner, (release.release_id,)), key)
        self.withdrawing.add(envelope)
        index = self.attempt(who, losses, lambda client: client.submit(notice))
        if index is not None:
            self.withdrawn.add(envelope)
            assert self.store.notices()[index] == notice

    # Looking -------------------------------------------------------------------------------------------------------------

    @rule(who=who, losses=losses)
    def score_everything(self, who, losses):
        mirror = self.attempt(who, losses, lambda client: client.mirror(MAP))
        if mirror is not None:
            scores = sum((release.specification.mean for release in mirror.releases), np.zeros(DIMENSION))
            self.compare(scores)

    def compare(self, scores) -> None:
        for envelope in self.sent:
            (coordinate,) = np.flatnonzero(open_envelope(envelope).specification.noisy_sums[1:])
            low, high = envelope in self.acknowledged - self.withdrawing, envelope not in self.withdrawn
            assert low <= scores[coordinate] <= high, "once if acknowledged, never if withdrawn, never twice"

    @rule(who=who, envelope=releases, losses=losses, what=st.sampled_from(["envelopes", "catalogue", "receipt", "conflict"]))
    def look(self, who, envelope, losses, what):
        if what == "envelopes":
            seen = self.attempt(who, losses, lambda client: client.envelopes(MAP))
            if seen is not None:
                assert self.acknowledged <= set(seen) <= set(self.sent)
                assert all(seen[at] == envelope for envelope, at in self.positions.items())
        elif what == "catalogue":
            catalogue = self.attempt(who, losses, lambda client: client.sync(MAP))
            ids = {open_envelope(envelope).release_id for envelope in self.acknowledged}
            assert catalogue is None or ids <= set(catalogue.release_ids)
        elif envelope in self.acknowledged and what == "receipt":
            release_id = open_envelope(envelope).release_id
            receipt = self.attempt(who, losses, lambda client: client.receipt(release_id, self.positions[envelope]))
            assert receipt is None or receipt.envelope == envelope
        elif envelope in self.acknowledged:
            release, key = open_envelope(envelope), self.keys[self.sent[envelope]]
            other = sign_release(replace(release, card=Card("another")), key)
            with pytest.raises((AlreadyPublished, QuotaExceeded)):
                self.clients[who].publish(other)

    @invariant()
    def the_log_holds_each_release_once(self):
        if not hasattr(self, "local"):
            return
        held = self.store.envelopes(0, self.store.head().size)
        assert len(set(held)) == len(held)
        assert self.acknowledged <= set(held) <= set(self.sent)
        assert self.store.log()[1].root == root_of_all(held)
        assert all(len(self.recent(whose)) <= LIMITS.releases for whose in range(OWNERS))
        members = [member.owner for member in self.members.all()]
        assert len(set(members)) == len(members)
        assert len(self.joined) <= len(members) <= len(self.asked)
        notices = self.store.notices()
        assert len(set(notices)) == len(notices)
        assert len(self.withdrawn) <= len(notices) <= len(self.withdrawing)


@pytest.fixture
def run(folder_in_memory, monkeypatch):
    for module, name in ((services, "time"), (market_client, "connect"), (market_client, "MarketStub")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back what the machines put there

    def run(machine, examples: int, steps: int) -> None:
        machine.folder = folder_in_memory
        how = settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, database=None, suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )  # fmt: skip
        run_state_machine_as_test(machine, settings=how)

    return run


def test_a_few_histories(run):
    run(type("Some", (MarketMachine,), {}), 15, 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_hundred_histories(run):
    run(type("Many", (MarketMachine,), {}), 500, 20)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_ten_thousand_histories(run):
    run(type("Most", (MarketMachine,), {}), 10_000, 40)


def test_a_market_that_counts_a_repeated_release_twice_is_caught(run, folder_in_memory):
    """Control: a Publish without memory of what it stored."""

    @answering
    async def forgetful(self, request, context):
        head = await self._store_call(self._store.head)
        for position, envelope in enumerate(await self._store_call(self._store.envelopes, 0, head.size)):
            if envelope == request.envelope:  # stored again, under an id of its own
                with self._store._writing.begin() as db:
                    row = dict(db.execute(RELEASES.select().where(RELEASES.c.position == position)).mappings().one())
                    row |= {"position": head.size, "release_id": head.size.to_bytes(32, "big"), "release_number": 1 + head.size}
                    db.execute(RELEASES.insert().values(row))
                break
        return await QuietService.Publish.__wrapped__(self, request, context)

    broken = type("Broken", (MarketMachine,), {"service_type": type("Forgetful", (QuietService,), {"Publish": forgetful})})
    one_release_twice(MarketMachine, folder_in_memory / "honest")
    with pytest.raises((AssertionError, VeilmartError)):
        one_release_twice(broken, folder_in_memory / "broken")


def one_release_twice(machine, folder) -> None:
    """One of the histories, by hand: what hypothesis comes upon is chance."""
    machine.folder = folder
    history = machine()
    history.start()
    try:
        history.enrol(who=0, whose=0, losses=[])
        envelope = history.publish(who=0, whose=0, losses=[])
        history.publish_again(who=1, envelope=envelope, losses=[])
        history.the_log_holds_each_release_once()
    finally:
        history.teardown()
