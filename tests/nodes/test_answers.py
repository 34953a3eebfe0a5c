"""Signed answers over the wire: what a client refuses, and that `verify answer` finds the market guilty that lied to it."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from market_node.matcher import Answer, Matcher
from market_node.service import QUERIES_A_PASS, MarketService
from market_node.store import Store
from nodes.command import build
from nodes.market_client import MarketClient
from nodes.query import find_encrypted, mirror_is_cheaper, prices
from protocol.catalogue import Head, centred_means, scalars_of
from protocol.encryption import STD128, MatchPlan, QueryKey
from protocol.errors import FormatError, InvalidSignature, StaleCatalogue, UsageError, VeilmartError
from protocol.proof import AnswerProof, Finding, judge, pack_releases, sign_statement, statement_of
from protocol.release import open_envelope
from protocol.scoring import sketch_of
from tests.market_node.market import running_market
from tests.nodes.test_sync import small_pages
from tests.protocol.worlds import envelope_of, features, small_map

MAP = small_map()
SKETCH = sketch_of(features(40, 3), MAP, 2)


def lying(alter):
    """A market whose answers to a list of queries go through alter(matcher, version, queries, honest answers)."""

    class Liar(Matcher):
        def answer(self, version, queries):
            return alter(self, version, queries, super().answer(version, queries))

    class Lying(MarketService):
        def __init__(self, store, feature_map, market_key, **how):
            super().__init__(store, feature_map, market_key, **how)
            self._matcher.__class__ = Liar

    return Lying


def resigned(matcher, version, query, answer: Answer, data: bytes) -> Answer:
    statement = statement_of(query, MAP.map_id, version.head, version.digest, data)
    return replace(answer, data=data, signature=sign_statement(statement, matcher._key))


def alters_a_word(matcher, version, queries, answers):
    return [resigned(matcher, version, q, a, a.data[:-1] + bytes([a.data[-1] ^ 1])) for q, a in zip(queries, answers, strict=True)]


def alters_unsigned(matcher, version, queries, answers):
    return [replace(answer, data=answer.data[:-1] + bytes([answer.data[-1] ^ 1])) for answer in answers]


def replays_the_first(matcher, version, queries, answers):
    matcher.first = getattr(matcher, "first", answers[0])
    return [matcher.first] * len(answers)


def signs_nothing(matcher, version, queries, answers):
    return [replace(answer, signature=b"") for answer in answers]


def names_no_index(matcher, version, queries, answers):
    return [replace(answer, index=b"") for answer in answers]


def another_key(matcher, version, queries, answers):
    matcher._key = Ed25519PrivateKey.generate()
    return [resigned(matcher, version, q, a, a.data) for q, a in zip(queries, answers, strict=True)]


def publish(client: MarketClient, count: int = 3) -> list[bytes]:
    envelopes = [envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed) for seed in range(count)]
    for envelope in envelopes:
        client.publish(envelope)
    return envelopes


LIES = {
    "an altered answer": (alters_unsigned, InvalidSignature),
    "the answer to another query": (replays_the_first, InvalidSignature),
    "no signature": (signs_nothing, InvalidSignature),
    "another key": (another_key, InvalidSignature),
    "no index": (names_no_index, FormatError),
}


@pytest.mark.parametrize(("alter", "error"), LIES.values(), ids=LIES)
def test_an_answer_that_the_market_did_not_sign_for_this_query_is_refused(tmp_path, alter, error):
    market = running_market(tmp_path / "m", MAP, service_type=lying(alter))
    with market as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        publish(client)
        with pytest.raises(error):  # noqa: PT012 - a replay shows at the second query
            find_encrypted(SKETCH, client, MAP)
            find_encrypted(SKETCH, client, MAP)


def verify(*words: str, home) -> tuple[int, dict]:
    done = CliRunner().invoke(build(None), ["verify", "answer", *words, "--home", str(home), "--json"])
    return done.exit_code, json.loads(done.stdout) if done.stdout else {}


@pytest.mark.parametrize(
    ("alter", "code", "finding"),
    [(lambda m, v, q, answers: answers, 0, "honest"), (alters_a_word, 7, "proven wrong")],
    ids=["honest", "lying"],
)
def test_a_kept_proof_convicts_a_liar_and_clears_an_honest_market(tmp_path, alter, code, finding):
    from protocol.features import open_map

    (tmp_path / "small.map").write_bytes(MAP.manifest)
    assert open_map(str(tmp_path / "small.map")).map_id == MAP.map_id
    market = running_market(tmp_path / "m", MAP, service_type=lying(alter))
    with market as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        publish(client)
        head, plan = client.sync(MAP).head, MatchPlan.build(3, MAP.dimension)
        query = QueryKey.fresh(plan).encrypt(SKETCH.centred_mean).to_bytes()
        proof = client.match(MAP.map_id, head, query, plan.answer_bytes).proof
        (tmp_path / "kept.proof").write_bytes(proof.to_bytes())
        publish(client, 1)  # the catalogue grew since
        (tmp_path / "market.releases").write_bytes(pack_releases(client.envelopes(MAP)))
        online = verify(
            str(tmp_path / "kept.proof"), "--market", address, "--ca", str(ca), "--map", str(tmp_path / "small.map"), home=tmp_path / "h"
        )
        assert (online[0], online[1]["finding"]) == (code, finding)
    files = ("--releases", str(tmp_path / "market.releases"), "--map", str(tmp_path / "small.map"))
    offline = verify(str(tmp_path / "kept.proof"), *files, home=tmp_path / "h")
    assert offline == online
    assert offline[1]["market_key"] == proof.market_key.hex()
    forged = replace(proof, answer=bytes(len(proof.answer)))
    (tmp_path / "forged.proof").write_bytes(forged.to_bytes())
    assert verify(str(tmp_path / "forged.proof"), *files, home=tmp_path / "h")[0] == 2
    assert AnswerProof.from_bytes((tmp_path / "kept.proof").read_bytes()) == proof


def test_a_file_that_is_no_proof_convicts_nobody(tmp_path):
    """Exit code 7 is a verdict on a market: files of another kind, torn files and releases with a broken signature are 2."""
    plan = MatchPlan.build(1, MAP.dimension)
    head = Head(1, bytes(32), 1, bytes(32), bytes(32), bytes(64))
    query, answer = bytes(STD128.query_bytes), bytes(plan.answer_bytes)
    proof = AnswerProof(bytes(32), MAP.map_id, STD128.name, head, bytes(32), query, answer, bytes(64)).to_bytes()
    envelope = envelope_of(MAP, Ed25519PrivateKey.generate())
    good, broken = pack_releases([envelope]), pack_releases([envelope[:-1] + bytes([envelope[-1] ^ 1])])
    (tmp_path / "small.map").write_bytes(MAP.manifest)
    for number, (first, second) in enumerate([(b"text", good), (proof[:-1], good), (good, good), (proof, proof), (proof, broken)]):
        (tmp_path / "proof").write_bytes(first)
        (tmp_path / "releases").write_bytes(second)
        words = str(tmp_path / "proof"), "--releases", str(tmp_path / "releases"), "--map", str(tmp_path / "small.map")
        done = CliRunner().invoke(build(None), ["verify", "answer", *words, "--home", str(tmp_path / "h")])
        assert isinstance(done.exception, UsageError), number
        assert done.exception.exit_code == 2


def answers_garbage(matcher, version, queries, answers):
    return [resigned(matcher, version, q, a, b"\xa5" * len(a.data)) for q, a in zip(queries, answers, strict=True)]


def test_an_implausible_answer_is_refused_and_kept_as_evidence(tmp_path):
    market = running_market(tmp_path / "m", MAP, service_type=lying(answers_garbage))
    with market as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        publish(client)
        kept = []
        with pytest.raises(FormatError, match="implausible"):
            find_encrypted(SKETCH, client, MAP, on_exchange=kept.append)
        releases = [open_envelope(envelope) for envelope in client.envelopes(MAP)]
    assert judge(kept[0].proof, releases, MAP).finding is Finding.WRONG


class Recorded:
    """A stub that writes down which calls are made with which bytes, and which were not read to their end."""

    def __init__(self, stub):
        self._stub, self.calls = stub, []

    def __getattr__(self, name):
        def call(request, **how):
            sent = request.SerializeToString() if hasattr(request, "SerializeToString") else b""
            answer = getattr(self._stub, name)(request, **how)
            self.calls.append((name, sent))
            return self._read(name, answer) if hasattr(answer, "cancel") else answer

        return call

    def _read(self, name, answer):
        yield from answer
        self.calls.append((name, b"read to its end"))


def answers_too_long(matcher, version, queries, answers):
    return [resigned(matcher, version, q, a, a.data * 50) for q, a in zip(queries, answers, strict=True)]


def test_the_market_sees_the_same_calls_whatever_its_answer_decrypts_to_and_whether_it_is_refused(tmp_path, monkeypatch):
    """More than a page of releases: cards fetched after an answer would show which scores it decrypted to."""
    small_pages(monkeypatch, 2)
    seen = []
    for name, alter in {"honest": lambda m, v, q, a: a, "garbage": answers_garbage, "too long": answers_too_long}.items():
        market = running_market(tmp_path / f"m-{name}", MAP, service_type=lying(alter))
        with market as (address, ca, _), MarketClient(address, ca, tmp_path / f"home-{name}") as client:
            publish(client, 5)
            client._stub = recorded = Recorded(client._stub)
            with nullcontext() if name == "honest" else pytest.raises(FormatError):
                find_encrypted(SKETCH, client, MAP)
        seen.append(recorded.calls)
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][-1] == ("Match", b"read to its end")


def test_a_release_that_comes_between_sync_and_query_costs_nothing(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        publish(client)
        head, plan = client.sync(MAP).head, MatchPlan.build(3, MAP.dimension)
        publish(client, 2)
        query = QueryKey.fresh(plan).encrypt(SKETCH.centred_mean).to_bytes()
        assert client.match(MAP.map_id, head, query, plan.answer_bytes).proof.head.size == 3


def test_a_state_that_is_not_this_markets_is_stale(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        publish(client)
        head, plan = client.sync(MAP).head, MatchPlan.build(3, MAP.dimension)
        query = QueryKey.fresh(plan).encrypt(SKETCH.centred_mean).to_bytes()
        for other in (replace(head, rows=bytes(32)), replace(head, size=2), replace(head, size=4)):
            with pytest.raises(StaleCatalogue):
                client.match(MAP.map_id, other, query, plan.answer_bytes)


def test_many_queries_at_once_get_each_its_own_answer(tmp_path):
    """They share passes over the tiles; every one decrypts to the scores of its own task."""
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        publish(client, 4)
        catalogue = client.sync(MAP)
        rows = np.sqrt(catalogue.columns(2).norms_squared)
        plan = MatchPlan.build(4, MAP.dimension)
        means = centred_means([release.specification for release in client.mirror(MAP).releases], MAP)
        wrong, errors = [], []

        def ask(seed: int) -> None:
            vector = np.random.default_rng(seed).uniform(-0.4, 0.4, MAP.dimension)
            key = QueryKey.fresh(plan)
            query = key.encrypt(vector).to_bytes()
            try:
                proof = client.match(MAP.map_id, catalogue.head, query, plan.answer_bytes).proof
            except VeilmartError as error:
                errors.append(error)
                return
            if np.abs(key.decrypt(proof.answer, rows) - means @ vector).max() > 1e-2:
                wrong.append(seed)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert not wrong


def test_queries_that_wait_share_a_pass_and_a_pass_is_bounded(tmp_path):
    """The first pass is held up until all thirteen queries are there: the others are then answered by few passes, each bounded."""
    sizes, services = [], []

    class Slow(Matcher):
        def answer(self, version, queries):
            sizes.append(len(queries))
            pause = threading.Event()
            for _ in range(2000):
                if sum(sizes) + sum(map(len, services[0]._waiting.values())) == 13:
                    break
                pause.wait(0.01)
            return super().answer(version, queries)

    class Service(MarketService):
        def __init__(self, store, feature_map, market_key, **how):
            super().__init__(store, feature_map, market_key, **how)
            self._matcher.__class__ = Slow
            services.append(self)

    market = running_market(tmp_path / "m", MAP, service_type=Service)
    with market as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        publish(client)
        head, plan = client.sync(MAP).head, MatchPlan.build(3, MAP.dimension)
        query = QueryKey.fresh(plan).encrypt(SKETCH.centred_mean).to_bytes()
        with ThreadPoolExecutor(13) as pool:
            answers = set(pool.map(lambda _: client.match(MAP.map_id, head, query, plan.answer_bytes).proof.answer, range(13)))
    assert sum(sizes) == 13
    assert max(sizes) <= QUERIES_A_PASS
    assert len(sizes) <= 3
    assert len(answers) == 1, "the same query, whoever it shares a pass with"


def test_a_broken_query_spoils_no_others_pass(tmp_path):
    store = Store.open(tmp_path)
    key = Ed25519PrivateKey.generate()
    release = open_envelope(envelope := envelope_of(MAP, key))
    store.append(release, envelope, scalars_of(release, MAP))
    matcher, head = Matcher(store, MAP, key), store.head()
    version = matcher.index.build(1, head.digest)
    good = QueryKey.fresh(version.index.plan).encrypt(SKETCH.centred_mean).to_bytes()
    first, broken, last = matcher.answer(version, [good, b"\xff" * len(good), good])
    assert isinstance(broken, FormatError)
    assert first.data == last.data
    assert all(isinstance(result, FormatError) for result in matcher.answer(version, [b""]))
    store.close()


def test_the_cheaper_way_is_chosen_by_public_numbers():
    assert mirror_is_cheaper(100, 96)
    assert not mirror_is_cheaper(10_000, 96)
    price = prices(10_000, 96)
    assert price["mirror"] == 13_000_000
    assert price["encrypted"] < 10_000 * 45 + STD128.query_bytes + 16 * 10_000 + 100_000
    assert prices(0, 96) == {"mirror": 0, "encrypted": 0}
