"""A market's folder with releases in it, and the page over it, without a market: what it would have stored and signed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.testclient import TestClient

from market_node.backup import keep_newest
from market_node.page.application import application
from market_node.page.condition import Condition
from market_node.page.reading import Reading
from market_node.store import Store
from protocol.catalogue import scalars_of
from protocol.features import FeatureMap
from protocol.privacy import Guarantee
from protocol.release import AdapterReference, Card, Release, sign_release
from protocol.transparency import Checkpoint, origin_of, sign_checkpoint
from tests.protocol.worlds import release_of

DOMAINS = ("health", "finance", "legal", "travel", "code", "maths")


def synthetic(feature_map: FeatureMap, count: int, *, owners: int = 0, seed: int = 1) -> list[tuple[Release, Ed25519PrivateKey]]:
    """Return releases of a few domains whose means lie around one centre each; `owners` publish in turn, by default one for each."""
    rng = np.random.default_rng(seed)
    keys = [Ed25519PrivateKey.generate() for _ in range(owners or count)]
    base = {epsilon: release_of(feature_map, keys[0], guarantee=Guarantee(epsilon, 1e-6)) for epsilon in (0.5, 1.0, 2.0)}
    centres = rng.standard_normal((len(DOMAINS), feature_map.dimension))
    centres /= 2 * np.linalg.norm(centres, axis=1, keepdims=True)
    found = []
    for number in range(count):
        which, epsilon, records = number % len(DOMAINS), (0.5, 1.0, 2.0)[number % 3], int(rng.integers(60, 900))
        made = base[epsilon]
        noise = rng.standard_normal(feature_map.dimension) * made.specification.noise_variance**0.5
        mean = feature_map.task_mean + centres[which] + 0.08 * rng.standard_normal(feature_map.dimension)
        sums = np.rint([1024 * records, *(4096 * records * mean + noise)]).astype(np.int32)
        key, turn = keys[number % len(keys)], number // len(keys) + 1
        adapter = AdapterReference(number.to_bytes(32, "big"), 1_000_000 + number) if number % 4 else None
        card = Card(f"{DOMAINS[which]}-{number}", f"answers questions about {DOMAINS[which]}", ("apache-2.0", "research", "")[number % 3])
        specification = replace(made.specification, noisy_sums=sums)
        owner, previous = key.public_key().public_bytes_raw(), b"" if turn == 1 else bytes([1]) * 32
        release = replace(
            made, owner=owner, release_number=turn, previous=previous, specification=specification, adapter=adapter, card=card
        )
        found.append((release, key))
    return found


def fill(home: Path, releases: list[tuple[Release, Ed25519PrivateKey]], feature_map: FeatureMap, market_key: Ed25519PrivateKey) -> None:
    """Store releases in a market's folder, and keep the checkpoint over all that it holds then."""
    store = Store.open(home)
    offers = [(release, sign_release(release, key), scalars_of(release, feature_map)) for release, key in releases]
    for start in range(0, len(offers), 1024):
        store.append_all(offers[start : start + 1024])
    head, log = store.log()
    public = market_key.public_key().public_bytes_raw()
    note = sign_checkpoint(Checkpoint(origin_of(public), head.size, log.root, head.digest, log.notices), market_key)
    keep_newest(home, note, head.size, public)
    store.close()


def reading_of(home: Path, feature_map: FeatureMap, market_key: bytes | None = None) -> Reading:
    """Return what reads a folder whose map is no shipped one."""
    (file := home / "feature.map").write_bytes(feature_map.manifest)
    return Reading(home, str(file), market_key, fresh_s=0.0)


def client_of(reading: Reading, **how) -> TestClient:
    """Return an HTTP client of the page over a folder."""
    client = TestClient(application(reading, Condition(reading.home), **how))
    client.reading = reading
    return client
