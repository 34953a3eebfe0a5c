"""What a sync moves: sixteen bytes a release, cards by whole pages, and nothing that shows what a querier is looking for."""

import math
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nodes.market_client import MarketClient, _read_entries, _write_entries
from nodes.query import Filters, find_encrypted, find_in_mirror
from protocol.catalogue import Terms, scalars_of
from protocol.errors import InvalidProof, UsageError
from protocol.privacy import Guarantee
from protocol.release import Card, sign_release
from protocol.scoring import sketch_of
from tests.market_node.market import running_market
from tests.protocol.worlds import ADAPTER, envelope_of, features, release_of, small_map
from tests.rankings import farthest_exchanged

MAP = small_map()


def many(store, count: int, first: int = 0) -> None:
    """Put synthetic releases into the store past the gate: one signed specification under ever new names."""
    key, made = Ed25519PrivateKey.generate(), release_of(MAP, Ed25519PrivateKey.generate())
    owner = key.public_key().public_bytes_raw()
    for seed in range(first, first + count):
        release = replace(made, owner=owner, release_number=seed + 1, previous=bytes([1]) * 32 if seed else b"", card=Card(f"owner-{seed}"))
        store.append(release, sign_release(release, key), scalars_of(release, MAP))


def received(client: MarketClient) -> dict[str, int]:
    return dict(client.traffic.received)


def small_pages(monkeypatch, size: int) -> None:
    from market_node import service, store
    from nodes import market_client
    from protocol import catalogue

    for module in (service, store, market_client, catalogue):
        monkeypatch.setattr(module, "PAGE_SIZE", size)


def test_a_new_release_costs_sixteen_bytes_of_sync(tmp_path, monkeypatch):
    """Acceptance: at most 16 bytes a new release; beside them one head, and the terms that are new.  Cards are counted apart."""
    small_pages(monkeypatch, 8)
    with running_market(tmp_path / "m", MAP) as (address, ca, store), MarketClient(address, ca, tmp_path / "home") as client:
        many(store, 10)
        client.sync(MAP)
        costs = []
        for count in (0, 1, 100):
            many(store, count, first=store.head().size)
            before = received(client)["catalogue"]
            assert len(client.sync(MAP)) == store.head().size
            costs.append(received(client)["catalogue"] - before)
        assert costs[0] < 600, "a signed head and a checkpoint"
        assert 0 <= costs[1] - costs[0] - 16 <= 3, "the framing of one chunk"
        assert 0 <= costs[2] - costs[0] - 1600 <= 4


def test_all_cards_are_fetched_by_whole_pages_once(tmp_path, monkeypatch):
    small_pages(monkeypatch, 8)
    with running_market(tmp_path / "m", MAP) as (address, ca, store), MarketClient(address, ca, tmp_path / "home") as client:
        many(store, 20)
        assert client.sync(MAP).names == tuple(f"owner-{seed}" for seed in range(20))
        after = received(client)["cards"]
        assert client.sync(MAP).card(15).name == "owner-15"
        assert received(client)["cards"] == after, "kept here"
        many(store, 3, first=20)  # the last page grows: only its new cards come
        before = received(client)["cards"]
        assert client.sync(MAP).card(22).name == "owner-22"
        assert received(client)["cards"] - before < 2 * 120 + 3 * 45


def test_a_damaged_page_of_cards_is_fetched_again(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, store), MarketClient(address, ca, tmp_path / "home") as client:
        many(store, 5)
        client.sync(MAP)
        for name in ("0", "pages", "terms", "rows"):
            (copy,) = (tmp_path / "home" / "catalogues").rglob(name)
            damaged = bytearray(copy.read_bytes())
            damaged[40] ^= 1
            copy.write_bytes(damaged)
            assert client.sync(MAP).names == tuple(f"owner-{seed}" for seed in range(5))


def rewrite_card(store, position: int) -> None:
    """What an operator can do: another card under all chains, signed by the same key."""
    from market_node.store import RELEASES
    from protocol import catalogue

    cards = store.cards(0, store.head().size)
    cards[position] = cards[position][:-1] + b"x"
    pages = []
    with store._writing.begin() as db:
        for at, card in enumerate(cards):
            if at % catalogue.PAGE_SIZE == 0:
                pages.append(catalogue.EMPTY_HEAD)
            pages[-1] = catalogue.extend_head(pages[-1], [card])
            values = {"card": card, "page_chain": pages[-1], "cards_root": catalogue.root_of_pages(pages)}
            db.execute(RELEASES.update().where(RELEASES.c.position == at).values(values))


@pytest.mark.parametrize("news", [0, 1, 5], ids=["nothing new", "the page grew", "several new pages"])
@pytest.mark.parametrize("position", [0, 4], ids=["a full page", "the last page"])
def test_a_card_that_is_rewritten_is_noticed_whatever_is_new(tmp_path, monkeypatch, news, position):
    small_pages(monkeypatch, 3)
    with running_market(tmp_path / "m", MAP) as (address, ca, store), MarketClient(address, ca, tmp_path / "home") as client:
        many(store, 5)
        client.sync(MAP)
        many(store, news, first=5)
        rewrite_card(store, position)
        for _ in range(2):
            with pytest.raises(InvalidProof, match="two histories"):
                client.sync(MAP)


@pytest.mark.parametrize("what", ["terms", "cards/0"])
def test_a_mirror_is_compared_with_terms_and_cards_that_were_synced(tmp_path, what):
    with running_market(tmp_path / "m", MAP) as (address, ca, store), MarketClient(address, ca, tmp_path / "home") as client:
        many(store, 3)
        client.sync(MAP)
        folder = client._folder(client.describe())
        _write_entries(folder / what, [entry[:-1] + b"x" for entry in _read_entries(folder / what)])
        with pytest.raises(InvalidProof, match="two histories"):
            client.mirror(MAP)


def test_mirror_and_encrypted_query_rank_by_the_same_numbers(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        for seed in range(6):
            client.publish(envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed))
        sketch = sketch_of(features(40, 3), MAP, 2)
        encrypted, mirrored = find_encrypted(sketch, client, MAP), find_in_mirror(sketch, client, MAP)
        for name in ("counts", "count_stds", "noise_stds", "norms_squared"):
            assert (getattr(encrypted.catalogue.columns(2), name) == getattr(mirrored.catalogue.columns(2), name)).all()
        # Noise of the ciphertext: 0.003 at most in 36 scores.
        assert farthest_exchanged(encrypted.ranking, mirrored.ranking) < 0.05
        assert encrypted.ranking.verdict is mirrored.ranking.verdict
        best = encrypted.ranking.matches[0]
        assert encrypted.title_of(best) == encrypted.name_of(best.release_id)


FILTERS = {
    "all": (Filters(), {0, 1, 2}),
    "a licence": (Filters(licence="MIT"), {1}),
    "a base model": (Filters(base_model="abab"), {0, 1, 2}),
    "another base model": (Filters(base_model="00"), set()),
    "a small adapter": (Filters(largest_adapter=512), {0, 2}),
    "an adapter that fits": (Filters(largest_adapter=1024), {0, 1, 2}),
    "a small epsilon": (Filters(largest_epsilon=0.9), {2}),
    "an adapter with a guarantee": (Filters(largest_adapter_epsilon=8.0), set()),
    "two at once": (Filters(licence="MIT", largest_epsilon=0.9), set()),
}


@pytest.mark.parametrize(
    ("text", "epsilon"),
    [("epsilon 8.0 at delta 1e-06, unit record", 8.0), ("none", math.inf), ("", math.inf)],
    ids=["8", "none", "nothing"],
)
def test_the_epsilon_of_an_adapter_is_read_from_its_terms(text, epsilon):
    terms = replace(Terms.of(release_of(MAP, Ed25519PrivateKey.generate(), adapter=ADAPTER)), adapter_guarantee=text)
    assert terms.adapter_epsilon == epsilon
    assert Filters(largest_adapter_epsilon=8.0).admits(terms) == (epsilon == 8.0)
    assert not Filters(largest_adapter_epsilon=7.9).admits(terms)


def test_filters_are_applied_here_and_the_market_sees_nothing_of_them(tmp_path):
    """The same calls with the same sizes, whatever is filtered."""
    with running_market(tmp_path / "m", MAP) as (address, ca, store), MarketClient(address, ca, tmp_path / "home") as client:
        variants = ({}, {"card": Card("owner-1", licence="MIT"), "adapter": ADAPTER}, {})
        for seed, changes in enumerate(variants):
            key = Ed25519PrivateKey.generate()
            release = replace(release_of(MAP, key, seed=seed, guarantee=Guarantee(0.5 if seed == 2 else 1.0, 1e-6)), **changes)
            release = replace(release, adapter=replace(ADAPTER, size_bytes=1000)) if release.adapter else release
            store.append(release, sign_release(release, key), scalars_of(release, MAP))
        client.sync(MAP)
        sketch, seen = sketch_of(features(40, 3), MAP, 2), set()
        for filters, expected in FILTERS.values():
            before = dict(client.traffic.sent), received(client)
            found = find_encrypted(sketch, client, MAP, filters)
            assert {int(found.title_of(match)[6]) for match in found.ranking.matches} == expected
            now = dict(client.traffic.sent), received(client)
            seen.add(
                tuple(
                    tuple(after[kind] - earlier.get(kind, 0) for kind in sorted(after)) for earlier, after in zip(before, now, strict=True)
                )
            )
            assert len(find_in_mirror(sketch, client, MAP, filters).ranking.matches) == len(expected)
        assert len(seen) == 1


def test_a_filter_that_is_no_identity_is_refused():
    with pytest.raises(UsageError):
        Filters(base_model="ABC")
