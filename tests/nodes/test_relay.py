"""The relay: what the market can and cannot do to questions that it passes on, and what guard and querier do about it."""

import hashlib
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node import relay as market_relay
from market_node.certificates import Certificates
from market_node.members import Members
from market_node.service import MarketService, answering
from nodes import relay
from nodes.answerer import Answerer, Rate
from nodes.base_model import BaseModel
from nodes.market_client import MarketClient
from nodes.membership import Membership
from nodes.policy import RelayRules
from nodes.relay import RelayLine, ask_relayed, asker_key
from protocol import sealing
from protocol.certificates import proves
from protocol.errors import GuardUnreachable, InvalidSignature, NotFound, QuotaExceeded, Unauthorised, UsageError, VeilmartError
from protocol.notices import Kind, Notice, sign_notice
from protocol.release import open_envelope
from protocol.sealing import Introduction, OpeningKey, Reply, open_introduction, open_question, sign_introduction
from protocol.wire import market_pb2 as pb
from tests.market_node.market import running_market
from tests.nodes.guard_processes import wait_for
from tests.nodes.owners import tiny_map
from tests.nodes.relays import EVERYTHING, RULES, ThreadWorker, owner_with_adapter, publish, relayed

QUESTION, ANSWER = "CANARY-QUESTION-4417 of a private person", "CANARY-ANSWER-5528 for a private person"


@pytest.fixture(scope="module")
def model(tiny_model_directory):
    return BaseModel.open(tiny_model_directory)


@pytest.fixture(scope="module")
def owner(model, tmp_path_factory):
    return owner_with_adapter(tmp_path_factory.mktemp("owner"), model)


class KeepingMarket(MarketService):
    """Keeps and logs all that passes, as a curious operator's build would."""

    kept: list[bytes]

    @answering
    async def Ask(self, request, context):
        self.kept.append(bytes(request.sealed))
        sealed = await self._relay.ask(bytes(request.release_id), bytes(request.sealed), context.time_remaining())
        self.kept.append(sealed)
        logging.getLogger("past.the.events").info("passed %r %r", bytes(request.sealed), sealed)
        return pb.SealedAnswer(sealed=sealed)


class SaysTheCanary(Answerer):
    """Answers a text that can be looked for; all else is the real answerer."""

    def _reply(self, question, release, ends):
        return Reply(ANSWER, 5, True)


@dataclass
class World:
    """A market with one published release whose guard is connected, and a querier."""

    address: str
    ca: object
    client: MarketClient
    home: object
    model: BaseModel
    worker: ThreadWorker
    envelope: bytes
    rules: RelayRules

    def ask(self, text=QUESTION, tokens=8, **how):
        return ask_relayed("wool", text, tokens, self.client, self.home, tiny_map(self.model), **how)


@pytest.fixture
def world(owner, model, tmp_path, request):
    """How it differs from the usual one is in the test's mark `world`."""
    how = {"service": MarketService, "rules": RULES, "worker": None} | getattr(request, "param", {})
    guard, envelope = owner
    worker = how["worker"] or ThreadWorker(guard.answerer(how["rules"]))
    with running_market(tmp_path / "market", tiny_map(model), policy=EVERYTHING, service_type=how["service"]) as (address, ca, _):
        publish(envelope, address, ca, tmp_path / "owner")
        with relayed(envelope, worker, address, ca, tmp_path / "owner", how["rules"]):
            with MarketClient(address, ca, tmp_path / "querier") as client:
                yield World(address, ca, client, tmp_path / "querier", model, worker, envelope, how["rules"])


def test_the_answer_is_that_of_the_adapter(world, owner):
    from nodes.adapter import Adapter

    guard, envelope = owner
    adapter = Adapter.from_bytes(guard.adapter_file(open_envelope(envelope)).read_bytes(), base_model=world.model.model_id)
    relayed_answer = world.ask(tokens=16)
    assert relayed_answer.reply.text.strip() == world.model.generate(QUESTION, adapter, 16)
    assert relayed_answer.reply.tokens == 16


@pytest.mark.parametrize("world", [{"service": KeepingMarket}], indirect=True)
def test_a_market_that_keeps_everything_never_holds_a_text(world, monkeypatch, caplog):
    KeepingMarket.kept = []
    monkeypatch.setattr(world.worker.answerer, "_reply", lambda *_: Reply(ANSWER, 5, True))
    with caplog.at_level(logging.DEBUG):
        assert world.ask().reply.text == ANSWER
    everything = b"".join(KeepingMarket.kept) + caplog.text.encode()
    assert len(everything) > 8000
    assert b"CANARY" not in everything


@pytest.mark.parametrize("world", [{"service": KeepingMarket}], indirect=True)
def test_control_builds_that_do_not_seal_are_caught_by_that_test(world, monkeypatch, caplog):
    KeepingMarket.kept = []
    monkeypatch.setattr(world.worker.answerer, "_reply", lambda *_: Reply(ANSWER, 5, True))
    monkeypatch.setattr(sealing, "seal", lambda suite, public, content, info, least_bytes=0: sealing._padded(content, least_bytes))
    monkeypatch.setattr(OpeningKey, "open", lambda self, sealed, info: sealing._unpadded(sealed))
    with caplog.at_level(logging.DEBUG):
        assert world.ask().reply.text == ANSWER
    assert QUESTION.encode() in KeepingMarket.kept[0]
    assert ANSWER.encode() in KeepingMarket.kept[1]
    assert "CANARY" in caplog.text


class SwappingMarket(MarketService):
    """Shows a key of its own in the owner's place, and reads and answers what comes."""

    key = OpeningKey.generate()
    signer = Ed25519PrivateKey.generate()
    read: list[str]
    shown: bytes

    @answering
    async def GetIntroduction(self, request, context):
        del context
        honest = open_introduction(await self._relay.introduction(bytes(request.release_id)))
        body = Introduction(
            self.signer.public_key().public_bytes_raw(), honest.release_id, self.key.suite, self.key.public, honest.expires, False, 100, 32
        )
        SwappingMarket.shown = sign_introduction(body, self.signer)
        return pb.Introduction(introduction=self.shown)

    @answering
    async def Ask(self, request, context):
        del context
        question = open_question(bytes(request.sealed), self.shown, self.key)
        self.read.append(question.text)
        return pb.SealedAnswer(sealed=question.seal(Reply("from the market", 3, True)))


@pytest.mark.parametrize("world", [{"service": SwappingMarket}], indirect=True)
def test_a_market_that_shows_its_own_key_gets_no_question(world):
    SwappingMarket.read = []
    with pytest.raises(InvalidSignature, match="another owner"):
        world.ask()
    assert SwappingMarket.read == []


@pytest.mark.parametrize("world", [{"service": SwappingMarket}], indirect=True)
def test_control_a_querier_that_does_not_compare_the_owner_is_read(world, monkeypatch):
    SwappingMarket.read = []
    monkeypatch.setattr(relay, "require_introduction", lambda data, *_: open_introduction(data))
    assert world.ask().reply.text == "from the market"
    assert SwappingMarket.read == [QUESTION]


def test_a_question_that_comes_again_is_not_answered_again(world):
    world.ask()
    (sealed,) = world.worker.seen
    with pytest.raises(GuardUnreachable, match="no answer"):
        world.client.ask(open_envelope(world.envelope).release_id, sealed, 10)
    for opening in world.worker.answerer._openings.values():
        opening.seen.clear()  # control: what was remembered is what refused it
    assert world.client.ask(open_envelope(world.envelope).release_id, sealed, 10)


def test_what_does_not_open_gets_the_same_nothing(world):
    release_id = open_envelope(world.envelope).release_id
    for sealed in (bytes(100), hashlib.sha256(world.client.introduction(release_id)).digest() + bytes(5232)):
        with pytest.raises(GuardUnreachable, match="no answer"):
            world.client.ask(release_id, sealed, 10)


def test_a_stranger_does_not_take_the_owners_place_with_its_introduction(world, monkeypatch):
    release_id = open_envelope(world.envelope).release_id
    copied = world.client.introduction(release_id)

    def dial_in():
        for message in world.client.relay(iter([pb.FromGuard(introduction=copied, signature=bytes(64))]), 10):
            if message.connected:
                return "connected"

    import grpc

    with pytest.raises(grpc.RpcError) as caught:
        dial_in()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert world.ask().reply.tokens == 8
    # Control: a market that does not ask for the owner's signature gives the place away.
    monkeypatch.setattr(market_relay, "verify_announcement", lambda *_: None)
    assert dial_in() == "connected"


def test_an_owner_who_answers_known_askers_alone_tells_others_how_to_become_one(owner, model, tmp_path):
    guard, envelope = owner
    me = asker_key(tmp_path / "querier").public_key().public_bytes_raw()
    with running_market(tmp_path / "market", tiny_map(model), policy=EVERYTHING) as (address, ca, _):
        publish(envelope, address, ca, tmp_path / "owner")
        for askers, taken in ((frozenset([bytes(32)]), False), (frozenset([me]), True)):
            rules = RelayRules(askers, 100, 100, 32)
            with relayed(envelope, ThreadWorker(guard.answerer(rules)), address, ca, tmp_path / "owner", rules):
                with MarketClient(address, ca, tmp_path / "querier") as client:
                    if taken:
                        assert ask_relayed("wool", "hello", 4, client, tmp_path / "querier", tiny_map(model)).reply.tokens == 4
                        continue
                    with pytest.raises(Unauthorised) as caught:
                        ask_relayed("wool", "hello", 4, client, tmp_path / "querier", tiny_map(model))
                    assert me.hex() in caught.value.hint


@pytest.mark.parametrize("world", [{"rules": RelayRules(questions_per_hour=2, longest_question=100, most_tokens=32)}], indirect=True)
def test_beyond_the_owners_rate_and_length_nothing_is_answered(world):
    with pytest.raises(UsageError, match="1 to 100 bytes"):
        world.ask("x" * 101)
    with pytest.raises(UsageError, match="at most 32"):
        world.ask(tokens=33)
    for _ in range(2):
        world.ask(tokens=2)
    with pytest.raises(QuotaExceeded):
        world.ask(tokens=2)


@pytest.mark.parametrize("world", [{"rules": RelayRules(questions_per_hour=1, longest_question=100, most_tokens=32)}], indirect=True)
def test_nonsense_uses_nothing_of_the_owners_rate_up(world):
    release_id = open_envelope(world.envelope).release_id
    for _ in range(5):
        with pytest.raises(GuardUnreachable):
            world.client.ask(release_id, bytes(5000), 10)
    assert world.ask(tokens=2).reply.tokens == 2


def test_a_guard_refuses_what_its_querier_should_not_have_sent(world, monkeypatch):
    # The introduction says what is taken; a querier that does not care is refused inside the seal.
    monkeypatch.setattr(sealing, "open_introduction", lambda data: _generous(open_introduction(data)))
    with pytest.raises(UsageError, match="longer"):
        world.ask("x" * 101)


def _generous(introduction):
    object.__setattr__(introduction, "longest_question", 4000)
    return introduction


def test_a_rate_fills_up_again():
    now = [0.0]
    rate = Rate(60, lambda: now[0])
    assert [rate.take() for _ in range(61)] == [True] * 60 + [False]
    now[0] = 61.0
    assert [rate.take() for _ in range(2)] == [True, False]


class NeverAnswers(ThreadWorker):
    def answer(self, sealed, patience_s):
        self.seen.append(sealed)
        return Future()


def test_a_guard_that_does_not_answer_holds_a_bounded_number_of_questions_for_a_bounded_time(owner, model, tmp_path):
    guard, envelope = owner
    worker, release_id = NeverAnswers(guard.answerer(RULES)), open_envelope(envelope).release_id
    with running_market(tmp_path / "market", tiny_map(model), policy=EVERYTHING) as (address, ca, _):
        publish(envelope, address, ca, tmp_path / "owner")
        with relayed(envelope, worker, address, ca, tmp_path / "owner"), MarketClient(address, ca, tmp_path / "querier") as client:
            errors: list[VeilmartError] = []

            def ask(_):
                try:
                    client.ask(release_id, bytes(5000), 3)
                except VeilmartError as error:
                    errors.append(error)

            began = time.monotonic()
            with ThreadPoolExecutor(20) as pool:
                list(pool.map(ask, range(20)))
            assert time.monotonic() - began < 10
            assert sum(isinstance(error, QuotaExceeded) for error in errors) == 20 - market_relay.UNANSWERED
            assert sum(isinstance(error, GuardUnreachable) for error in errors) == market_relay.UNANSWERED
            assert len(worker.seen) == market_relay.UNANSWERED


def test_the_line_comes_back_after_the_market_was_away(owner, model, tmp_path):
    guard, envelope = owner
    worker = ThreadWorker(guard.answerer(RULES))
    with running_market(tmp_path / "market", tiny_map(model), policy=EVERYTHING) as (address, ca, _):
        publish(envelope, address, ca, tmp_path / "owner")
        port = int(address.rpartition(":")[2])
    with RelayLine(address, ca, tmp_path / "owner", lambda: envelope, worker, RULES):
        time.sleep(1)
        with running_market(tmp_path / "market", tiny_map(model), policy=EVERYTHING, port=port):
            with MarketClient(address, ca, tmp_path / "querier") as client:
                wait_for(lambda: answered(client, tmp_path, model), 15)


def answered(client, tmp_path, model) -> bool:
    try:
        return ask_relayed("wool", "hello", 4, client, tmp_path / "querier", tiny_map(model)).reply.tokens == 4
    except GuardUnreachable:
        return False


def test_a_line_on_which_nothing_is_heard_is_given_up_and_dialled_again(world, monkeypatch, caplog):
    monkeypatch.setattr(relay, "SILENCE_S", 1.0)  # the market's signs of life come every 20 s
    with caplog.at_level(logging.INFO, "veilmart.market"):
        wait_for(lambda: caplog.text.count("RelayConnected") >= 1, 20)
        wait_for(lambda: "RelayClosed" in caplog.text, 20)


def test_a_new_line_takes_over_and_the_old_one_still_delivers(world, monkeypatch):
    monkeypatch.setattr(relay, "RENEW_S", 0.5)
    release_id = open_envelope(world.envelope).release_id
    first, changed, asked = world.client.introduction(release_id), 0, 0
    while changed < 3 or asked <= 10:  # any question that falls between two lines would raise; a busy machine asks few between them
        world.ask(tokens=2)
        asked += 1
        now = world.client.introduction(release_id)
        changed, first = changed + (now != first), now


def test_a_member_that_was_removed_is_asked_no_more(owner, model, tmp_path):
    guard, envelope = owner
    worker = ThreadWorker(guard.answerer(RULES))
    with running_market(tmp_path / "market", tiny_map(model), policy=EVERYTHING, enrolled_only=True) as (address, ca, _):
        members = Members.open(tmp_path / "market")
        members.enrol(members.invite("City", int(time.time()) + 60), guard.owner, "", int(time.time()))
        publish(envelope, address, ca, tmp_path / "owner")
        with relayed(envelope, worker, address, ca, tmp_path / "owner"), MarketClient(address, ca, tmp_path / "querier") as client:
            assert answered(client, tmp_path, model)
            members.remove(guard.owner.hex()[:16], int(time.time()))
            with pytest.raises(GuardUnreachable):
                client.introduction(open_envelope(envelope).release_id)
        members.close()


def member_of(home, guard) -> Membership:
    """Enrol the guard's owner at the market in a folder."""
    members = Members.open(home)
    members.enrol(members.invite("City", int(time.time()) + 60), guard.owner, "", int(time.time()))
    members.close()
    return Membership(home.parent / "owner" / "node", guard.owner, proves(guard._key))


def test_a_guard_keeps_its_line_under_its_certificate_until_that_is_revoked(owner, model, tmp_path, caplog):
    guard, envelope = owner
    worker, home = ThreadWorker(guard.answerer(RULES)), tmp_path / "market"
    with running_market(home, tiny_map(model), policy=EVERYTHING, enrolled_only=True, members_port=True) as (address, ca, _):
        membership = member_of(home, guard)
        with MarketClient(address, ca, tmp_path / "owner", membership) as client:
            client.publish(envelope)
        desk = Membership(tmp_path / "owner" / "desk", guard.owner, worker.prove)  # asks the worker, which has the owner's key
        with caplog.at_level(logging.INFO, "veilmart.guard"), relayed(envelope, worker, address, ca, tmp_path / "owner", membership=desk):
            with MarketClient(address, ca, tmp_path / "querier") as client:
                assert answered(client, tmp_path, model)
                certificates = Certificates.open(home)
                certificates.revoke(guard.owner.hex(), int(time.time()))
                certificates.close()
                with pytest.raises(GuardUnreachable):  # the stream is open still: it is looked at with every question
                    client.introduction(open_envelope(envelope).release_id)
                # It dials again, and is told why; from then on nobody is connected.
                wait_for(lambda: "not connected code=unauthorised" in caplog.text, 30)
                with pytest.raises(GuardUnreachable):
                    client.introduction(open_envelope(envelope).release_id)


def test_another_members_certificate_opens_no_line_for_a_release(owner, model, tmp_path, caplog):
    guard, envelope = owner
    worker, home = ThreadWorker(guard.answerer(RULES)), tmp_path / "market"
    with running_market(home, tiny_map(model), policy=EVERYTHING, enrolled_only=True, members_port=True) as (address, ca, _):
        with MarketClient(address, ca, tmp_path / "owner", member_of(home, guard)) as client:
            client.publish(envelope)
        key = Ed25519PrivateKey.generate()
        members = Members.open(home)
        members.enrol(members.invite("Town", int(time.time()) + 60), key.public_key().public_bytes_raw(), "", int(time.time()))
        members.close()
        other = Membership(tmp_path / "town" / "node", key.public_key().public_bytes_raw(), proves(key))
        with caplog.at_level(logging.INFO, "veilmart.guard"):
            with RelayLine(address, ca, tmp_path / "town", lambda: envelope, worker, RULES, membership=other):
                wait_for(lambda: "not connected code=unauthorised" in caplog.text, 20)


def test_a_release_that_was_taken_back_is_asked_no_more(world, owner):
    guard, envelope = owner
    release = open_envelope(envelope)
    world.ask(tokens=2)
    notice = Notice(Kind.WITHDRAWAL, world.client.describe().market_key, guard.owner, (release.release_id,))
    world.client.submit(sign_notice(notice, guard._key))
    with pytest.raises(NotFound, match="taken back"):
        world.ask()
    with pytest.raises(GuardUnreachable):  # by a querier that does not look at notices
        world.client.introduction(release.release_id)


def test_a_key_is_forgotten_when_its_introduction_is_over(owner):
    guard, envelope = owner
    now = [1_800_000_000.0]
    answerer = Answerer(guard._key, guard._model, RULES, guard.adapter_file, lambda: now[0])
    introduction, _ = answerer.introduce(envelope, bytes(32), bytes(32))
    first, second = (sealing.ask(introduction, "hello", 2).sealed for _ in range(2))
    assert answerer.answer(first, 30)
    now[0] = open_introduction(introduction).expires
    assert answerer.answer(second, 30) == b""
    assert not answerer._openings


def test_an_introduction_is_for_the_owners_own_releases_with_an_adapter_here(owner, model, tmp_path):
    guard, envelope = owner
    other, foreign = owner_with_adapter(tmp_path, model)
    answerer = guard.answerer(RULES)
    assert len(answerer.introduce(envelope, bytes(32), bytes(32))) == 2
    with pytest.raises(NotFound):
        answerer.introduce(foreign, bytes(32), bytes(32))
    other.adapter_file(open_envelope(foreign)).unlink()
    with pytest.raises(NotFound):
        other.answerer(RULES).introduce(foreign, bytes(32), bytes(32))
