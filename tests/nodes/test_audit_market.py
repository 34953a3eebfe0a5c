"""A market is audited through its own calls: honest ones pass, and each way to cheat that an audit can see is named."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node.matcher import Matcher
from nodes.audit.market import audit_market, broken_chains, copies, implausible
from nodes.command import build
from nodes.market_client import MarketClient
from protocol.admission import AdmissionPolicy
from protocol.features import default_map
from protocol.notices import Kind, Notice
from protocol.release import Card, sign_release
from tests.market_node.market import running_market
from tests.protocol.worlds import release_of, small_map

MAP, WIDE = small_map(), default_map()


def honest(count: int, seed: int = 0) -> list:
    return [release_of(MAP, Ed25519PrivateKey.generate(), seed=seed + n) for n in range(count)]


def copied(release, extra: float = 0.0, scale: float = 1.0):
    """Another owner's release with somebody's sums, scaled, and so much of their noise added on top."""
    sums = np.rint(scale * release.specification.noisy_sums).astype(np.int64)
    sums += np.rint(np.random.default_rng(1).normal(0, extra * release.specification.noise_variance**0.5, sums.shape)).astype(np.int64)
    key = Ed25519PrivateKey.generate()
    specification = replace(release.specification, noisy_sums=sums.astype(np.int32))
    return key, replace(release, owner=key.public_key().public_bytes_raw(), specification=specification, card=Card("copy"))


def chain(*keys: Ed25519PrivateKey) -> list:
    """A release of each key, one after the other, as an owner makes them that rotates."""
    releases = []
    for number, key in enumerate(keys, 1):
        release = release_of(MAP, key, number=number, seed=number)
        releases.append(replace(release, previous=releases[-1].release_id if releases else b""))
    return releases


def test_a_key_that_signed_two_releases_of_one_number_leaves_a_trace_in_the_next():
    key, new = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    honest, elsewhere = chain(key, key, key), chain(key, key)
    assert broken_chains(honest[:1] + honest[2:], []) == [], "what lies at another market may be missing"
    assert broken_chains(honest, []) == []
    (flag,) = broken_chains([honest[0], elsewhere[1]], [])
    assert (flag.title, honest[0].title in flag.reason) == (elsewhere[1].title, True)
    # Numbers go on under another key; who does not look at rotations sees nothing.
    public, successor = (one.public_key().public_bytes_raw() for one in (key, new))
    rotation = Notice(Kind.ROTATION, bytes(32), public, (successor,))
    rotated, other = chain(key, new), chain(key, new)
    assert broken_chains(rotated, [rotation]) == broken_chains([rotated[0], other[1]], []) == []
    assert len(broken_chains([rotated[0], other[1]], [rotation])) == 1


def failed(audit) -> list[str]:
    return [check.name for check in audit.checks if not check.holds]


def test_an_honest_market_passes_and_its_growth_is_followed(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        keys = [Ed25519PrivateKey.generate() for _ in range(5)]
        for seed, key in enumerate(keys[:4]):
            client.publish(sign_release(release_of(MAP, key, seed=seed), key))
        first = audit_market(client, MAP, 2)
        assert (failed(first), first.flags, first.size) == ([], (), 4)
        with MarketClient(address, ca, tmp_path / "other") as other:
            other.publish(sign_release(release_of(MAP, keys[4], seed=9), keys[4]))
        second = audit_market(client, MAP, 0)
        assert (second.known_size, second.size, failed(second)) == (4, 5, [])


def test_an_empty_market_passes(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        assert failed(audit_market(client, MAP)) == []


def test_wrong_answers_are_shown(tmp_path, monkeypatch):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        for seed in range(3):
            key = Ed25519PrivateKey.generate()
            client.publish(sign_release(release_of(MAP, key, seed=seed), key))
        real = Matcher.answer

        def flattering(self, version, queries):
            """Signs the answer to another query: wrong for all but the first."""
            answers = real(self, version, queries)
            from protocol.proof import sign_statement, statement_of

            first = self.__dict__.setdefault("first", answers[0].data)
            head = version.head if hasattr(version, "head") else self._store.head()
            return [
                replace(a, data=first, signature=sign_statement(statement_of(q, MAP.map_id, head, a.index, first), self._key))
                for a, q in zip(answers, queries, strict=True)
            ]

        monkeypatch.setattr(Matcher, "answer", flattering)
        audit = audit_market(client, MAP, 3)
    assert failed(audit) == ["answers"]
    assert "proven wrong" in next(check.evidence for check in audit.checks if not check.holds)


def test_a_copy_is_flagged_and_the_first_one_is_not():
    releases = honest(20)
    _, copy = copied(releases[3])
    (flag,) = copies([*releases, copy])
    assert flag.title == copy.title
    assert releases[3].title in flag.reason


@pytest.mark.parametrize(("scale", "extra"), [(0.5, 0.0), (1.5, 0.0), (20.0, 0.0), (100.0, 1.0)])
def test_a_copy_that_claims_another_number_of_records_is_flagged(scale, extra):
    """The copy that pays: scaled by 100 and with honest noise on top it is admitted, and would come first."""
    releases = [release_of(WIDE, Ed25519PrivateKey.generate(), seed=n) for n in range(20)]
    _, copy = copied(releases[3], extra, scale)
    (flag,) = copies([*releases, copy])
    assert flag.title == copy.title
    # The control: by their distance alone the two have nothing in common.
    sums = [release.specification.noisy_sums[1:].astype(float) for release in (releases[3], copy)]
    assert ((sums[0] - sums[1]) ** 2).sum() > 2 * WIDE.dimension * copy.specification.noise_variance


def test_an_owner_may_publish_the_same_twice():
    release = honest(1)[0]
    assert copies([release, replace(release, card=Card("again"))]) == []


def test_two_owners_of_the_same_data_are_no_copies():
    """Their noises are independent: the smallest distance that honest owners can have."""
    releases = [release_of(MAP, Ed25519PrivateKey.generate(), seed=5) for _ in range(150)]
    assert copies(releases) == []


def test_a_market_says_by_its_policy_what_is_implausible():
    releases = honest(3)
    assert implausible(releases, AdmissionPolicy(largest_epsilon=2.0)) == []
    assert len(implausible(releases, AdmissionPolicy(largest_epsilon=0.5))) == 3


def test_the_command_names_what_it_flags(tmp_path, capsys):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        (tmp_path / "small.map").write_bytes(MAP.manifest)
        release = honest(1)[0]
        key = Ed25519PrivateKey.generate()
        release = replace(release, owner=key.public_key().public_bytes_raw())
        client.publish(sign_release(release, key))
        thief, copy = copied(release)
        client.publish(sign_release(copy, thief))
        words = ["audit", "market", "--market", address, "--ca", str(ca), "--home", str(tmp_path / "auditor"), "--answers", "1"]
        code = build(None)([*words, "--map", str(tmp_path / "small.map"), "--json"], standalone_mode=False)
    shown = json.loads(capsys.readouterr().out)
    assert (code or 0, shown["refuted"], [flag["title"] for flag in shown["flags"]]) == (0, False, [copy.title])


def test_ten_thousand_releases_are_compared_in_seconds():
    count, base = 10_000, honest(1)[0]
    rng = np.random.default_rng(0)
    spread = base.specification.noise_variance**0.5
    releases = [
        replace(base, owner=n.to_bytes(32, "big")[::-1], specification=replace(base.specification, noisy_sums=sums))
        for n, sums in enumerate((base.specification.noisy_sums + rng.normal(0, 3 * spread, (count, 5))).astype(np.int32))
    ]
    start = time.process_time()
    copies(releases)
    assert time.process_time() - start < 20
