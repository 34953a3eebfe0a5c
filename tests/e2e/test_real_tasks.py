"""The twenty evaluation tasks: matching is right, and an encrypted query ranks exactly as a local copy does."""

import os
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nodes.base_model import BaseModel
from nodes.market_client import MarketClient
from nodes.query import find_encrypted, find_in_mirror, sketch_task
from nodes.records import read_records
from protocol.features import default_map
from protocol.hazmat.noise import operating_system
from protocol.privacy import Guarantee
from protocol.release import Card, Release, sign_release
from protocol.specification import estimate, quantise
from tests.e2e.processes import market_process, memory_of

pytestmark = pytest.mark.slow
MAP = default_map()


@pytest.fixture(scope="module")
def data() -> Path:
    folder = Path(os.environ.get("VEILMART_DATA", "../shared/data"))
    if not folder.is_dir():
        if os.environ.get("VEILMART_REQUIRE_DATA"):
            pytest.fail(f"VEILMART_DATA: no real task data at {folder}, and this run may not skip it")
        pytest.skip("needs ../shared/data: real task data not present")
    return folder


def test_an_encrypted_query_ranks_as_the_mirror_does_on_twenty_real_tasks(data, tmp_path, slm_directory):
    model = BaseModel.open(slm_directory)
    tasks = sorted(folder.name for folder in data.iterdir() if folder.is_dir() and folder.name not in MAP.fitted_on)
    assert len(tasks) == 20
    right, texts = 0, []
    with (
        market_process(tmp_path / "market") as (started, process),
        MarketClient(started["address"], Path(started["ca"]), tmp_path / "q") as client,
    ):
        for task in tasks:
            # Padded batches are fine here: these releases are made from public text for a test.
            features = MAP(model.embed_batched(read_records(data / task / "train.jsonl", 200)))
            specification = estimate(quantise(features), MAP.map_id, Guarantee(1.0, 1e-6), operating_system())
            key = Ed25519PrivateKey.generate()
            base = bytes.fromhex(model.model_id)
            release = Release(key.public_key().public_bytes_raw(), 1, b"", base, specification, None, Card(task), False)
            client.publish(sign_release(release, key))
        for task in tasks:
            records = read_records(data / task / "test.jsonl", 50)
            texts += [record.prompt.encode()[:48] for record in records if len(record.prompt) >= 48]
            sketch = sketch_task(records, model, MAP)
            encrypted, mirrored = find_encrypted(sketch, client, MAP), find_in_mirror(sketch, client, MAP)
            assert [match.release_id for match in encrypted.ranking.matches] == [match.release_id for match in mirrored.ranking.matches]
            assert encrypted.ranking.verdict is mirrored.ranking.verdict
            assert np.abs(encrypted.scores.llr - mirrored.scores.llr).max() < 0.5
            assert [match.tie for match in encrypted.ranking.matches] == [match.tie for match in mirrored.ranking.matches]
            right += encrypted.name_of(encrypted.ranking.matches[0].release_id).startswith(f"{task}@")
        assert len(texts) > 500
        for region in memory_of(process.pid):
            assert not any(text in region for text in texts), "a text of a query is in the market's memory"
    assert right >= 19, f"{right} of 20 tasks found their owner first"
