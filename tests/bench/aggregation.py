"""What aggregates of many releases cost a market, and how well the leaves of the tree keep kinds apart.

    python -m tests.bench.aggregation [N ...]

Releases of 200 kinds in 20 domains, 60 to 2 000 records, epsilon 1, 96 coordinates; one thread.  Prints a JSON line for each N.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node.aggregates import Running
from protocol import aggregation
from protocol.aggregation import State, domain_of, parse_aggregates
from protocol.features import default_map
from protocol.privacy import NORM_SQUARED, Guarantee, noise_variance
from protocol.release import Card, Release, sign_release
from protocol.specification import COUNT_STEP, FEATURE_SCALE, Specification
from protocol.window import ALWAYS

KINDS, DOMAINS = 200, 20
MAP = default_map()


class Envelopes:
    """Of a store what aggregates read."""

    def __init__(self, kept: list[bytes]) -> None:
        self.kept = kept

    def envelopes(self, start: int, stop: int) -> list[bytes]:
        """Return those of these positions."""
        return self.kept[start:stop]


def releases(count: int) -> tuple[list[bytes], list[str]]:
    """Return envelopes, and the kind of each as its name."""
    rng, key, guarantee = np.random.default_rng(1), Ed25519PrivateKey.generate(), Guarantee(1.0, 1e-6)
    variance, public = noise_variance(guarantee, NORM_SQUARED), key.public_key().public_bytes_raw()
    centres = rng.normal(0, 1, (KINDS, MAP.dimension))
    centres *= np.sqrt(MAP.full.norm) / np.linalg.norm(centres, axis=1, keepdims=True)
    made, names = [], []
    for number in range(count):
        kind, units = int(rng.integers(KINDS)), int(rng.integers(60, 2000))
        mean = centres[kind] + rng.normal(0, np.sqrt(MAP.full.within / units), MAP.dimension)
        exact = np.concatenate([[COUNT_STEP * units], FEATURE_SCALE * units * mean])
        # Rounded normal noise from a seed: a figure of cost, nothing is released.
        sums = np.rint(exact + rng.normal(0, np.sqrt(variance), len(exact))).astype(np.int32)
        names.append(f"d{kind % DOMAINS}-{kind}")
        specification = Specification(MAP.map_id, sums, variance, guarantee)
        previous = bytes([1]) * 32 if number else b""
        made.append(
            sign_release(Release(public, number + 1, previous, bytes(32), specification, None, Card(names[-1]), True, ALWAYS), key)
        )  # fmt: skip
    return made, names


def measure(count: int) -> dict[str, float]:
    """Return CPU seconds, bytes and purity for so many releases."""
    envelopes, names = releases(count)
    running = Running(Envelopes(envelopes[:-1]), MAP, bytes(32))  # type: ignore[arg-type]
    state = State(MAP.map_id, count, bytes(32), 0, bytes(32))
    times = [time.process_time()]
    running.follow(count - 1, [])
    times.append(time.process_time())
    running._store = Envelopes(envelopes)  # type: ignore[assignment]
    running.follow(count, [])
    times.append(time.process_time())
    body = running.body(state)
    times.append(time.process_time())
    parsed = parse_aggregates(body)
    times.append(time.process_time())
    reading, one_more, making, parsing = np.diff(times)
    purity = 1.0
    if count > aggregation.MAX_LEAVES:
        members = aggregation._gathered(running._shares[:count], [domain_of(name) for name in names])
        kinds = np.unique(names, return_inverse=True)[1]
        purity = float(np.mean([np.bincount(kinds[members == leaf]).max() / (members == leaf).sum() for leaf in np.unique(members)]))
    assert parsed.federation.releases == count
    return {
        "releases": count, "first_reading_s": round(float(reading), 3), "one_more_ms": round(1000 * float(one_more), 2),
        "statement_s": round(float(making), 3), "parse_ms": round(1000 * float(parsing), 1), "bytes": len(body),
        "leaves": len(parsed.leaves), "purity_of_leaves": round(purity, 3), "shares_mb": round(running._shares.nbytes / 1e6, 1),
    }  # fmt: skip


if __name__ == "__main__":
    for size in [int(word) for word in sys.argv[1:]] or [256, 10_000, 100_000]:
        print(json.dumps(measure(size)), flush=True)
