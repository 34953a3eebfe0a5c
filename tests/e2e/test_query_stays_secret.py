"""After 50 encrypted queries neither the memory nor the log of the market process holds a coordinate or a text of any of them.

The control is a build that receives a query in clear and logs it: the same scan must find it.
"""

import re
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nodes.market_client import MarketClient
from nodes.query import find_encrypted
from protocol.encryption import STD128, MatchPlan
from protocol.features import default_map
from protocol.scoring import sketch_of
from tests.e2e.processes import market_process, memory_of
from tests.protocol.worlds import envelope_of, features

MAP = default_map()
QUERIES, RELEASES = 50, 20

# A build that logs what a query holds; everything else is the real market.
LOGGING_BUILD = """
import sys
from market_node import service
from market_node.service import MarketService
kept = []
async def receive(self, chunks, honest=MarketService._receive_query):
    async def watched():
        async for chunk in chunks:
            if chunk.data:
                kept.append(bytes(chunk.data[:512]))
                sys.stderr.write(f"query {chunk.data[:512].hex()}\\n")
            yield chunk
    return await honest(self, watched())
MarketService._receive_query = receive
from nodes.command import main
main()
"""


def seen_in_memory(pid: int, secrets: np.ndarray) -> bool:
    """Return whether any of these 8-byte words lies in the writable memory of a process, at any alignment."""
    possible = np.zeros(1 << 20, bool)  # a quick first look at 20 bits of a word
    possible[secrets & 0xFFFFF] = True
    for data in memory_of(pid):
        for shift in range(8):
            words = np.frombuffer(data, "<u8", max(len(data) - shift, 0) // 8, shift)
            if np.isin(words[possible[words & 0xFFFFF]], secrets).any():
                return True
    return False


def secrets_of(vector: np.ndarray) -> np.ndarray:
    """Return what must not be seen: each coordinate as a double, and pairs of neighbours as floats, also of the unit vector."""
    forms = [vector, vector / np.linalg.norm(vector)]
    doubles = [form.astype("<f8").view("<u8") for form in forms]
    floats = [form.astype("<f4")[shift : len(form) // 2 * 2 - shift].copy().view("<u8") for form in forms for shift in (0, 1)]
    return np.unique(np.concatenate([*doubles, *floats]))


def sketch(seed: int):
    return sketch_of(features(40, seed, MAP.dimension), MAP, 2)


def publish_releases(client: MarketClient) -> None:
    for seed in range(RELEASES):
        client.publish(envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed))


def test_no_coordinate_of_fifty_queries_is_in_the_markets_memory_or_log(tmp_path):
    sizes, secrets = set(), []
    with (
        market_process(tmp_path / "market") as (started, process),
        MarketClient(started["address"], Path(started["ca"]), tmp_path / "q") as client,
    ):
        publish_releases(client)
        for seed in range(QUERIES):
            asked = sketch(1000 + seed)
            before = dict(client.traffic.sent)
            find_encrypted(asked, client, MAP)
            sizes.add(client.traffic.sent["query"] - before.get("query", 0))
            secrets.append(secrets_of(asked.centred_mean))
        assert not seen_in_memory(process.pid, np.concatenate(secrets))
    log = (tmp_path / "market" / "market.log").read_text()
    assert len(re.findall('"event": "Published"', log)) == RELEASES
    assert not any(word.tobytes().hex() in log for vector in secrets for word in vector)
    assert sizes == {STD128.query_bytes}, "every query has the same length"


def test_a_build_that_logs_queries_is_caught_by_that_scan(tmp_path):
    secret = sketch(77).centred_mean
    clear = secret.astype("<f8").tobytes() + bytes(STD128.query_bytes - 8 * len(secret))
    with (
        market_process(tmp_path / "market", LOGGING_BUILD) as (started, process),
        MarketClient(started["address"], Path(started["ca"]), tmp_path / "q") as client,
    ):
        publish_releases(client)
        size = MatchPlan.build(RELEASES, MAP.dimension).answer_bytes
        client.match(MAP.map_id, client.sync(MAP).head, clear, size)  # packed words are a ciphertext, whatever they say
        assert seen_in_memory(process.pid, secrets_of(secret))
    assert secret.astype("<f8").tobytes()[:8].hex() in (tmp_path / "market" / "market.log").read_text()
