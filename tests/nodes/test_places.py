"""Places: who is shown, and under which name."""

import json
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from nodes.base_model import BaseModel
from nodes.command import build
from nodes.market_client import MarketClient
from nodes.places import places
from nodes.query import find_in_mirror
from protocol.release import Card, sign_release
from protocol.scoring import Scores, rank, sketch_of
from tests.market_node.market import running_market
from tests.nodes.owners import tiny_map, write_records
from tests.protocol.worlds import features, release_of, small_map

MAP = small_map()
SKETCH = sketch_of(features(40, 3), MAP, 2)


@pytest.fixture
def client(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "q") as client:
        for seed in range(3):
            key = Ed25519PrivateKey.generate()
            client.publish(sign_release(release_of(MAP, key, seed=seed), key))
        yield client


def test_a_match_keeps_its_name_where_the_ranking_is_not_in_the_order_of_scores(client):
    """Those that would be a match come first: here the second of the catalogue has the largest score and the last place."""
    found = find_in_mirror(SKETCH, client, MAP)
    scores = Scores(np.array([5.0, 9.0, 1.0]), np.ones(3), np.array([0.0, 99.0, 0.0]), np.zeros(3), np.zeros(3))
    found = replace(found, scores=scores, ranking=rank(scores, found.catalogue, SKETCH))
    assert [found.title_of(match).split("@")[0] for match in found.ranking.matches] == ["owner-0", "owner-2", "owner-1"]
    for match in found.ranking.matches:
        assert found.title_of(match) == found.name_of(match.release_id)
        assert scores.llr[found.position_of(match)] == match.llr


def test_nothing_found_has_no_places(client):
    found = find_in_mirror(SKETCH, client, MAP)
    given = places(found, 5, wanted=lambda match: False)
    assert (given.matches, given.folded, given.copies) == ((), {}, {})


def test_the_command_says_who_had_to_stand_back(tmp_path, tiny_model_directory):
    feature_map = tiny_map(BaseModel.open(tiny_model_directory))
    (tmp_path / "tiny.map").write_bytes(feature_map.manifest)
    task = write_records(tmp_path / "task.jsonl", 20)
    with running_market(tmp_path / "m", feature_map) as (address, ca, _), MarketClient(address, ca, tmp_path / "q") as client:
        key, thief = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        releases = [replace(release_of(feature_map, key, number=n, seed=n), card=Card(f"own-{n}")) for n in (1, 2, 3)]
        copy = replace(releases[0], owner=thief.public_key().public_bytes_raw(), card=Card("copy"))
        for who, release in ((key, releases[0]), (key, releases[1]), (key, releases[2]), (thief, copy)):
            client.publish(sign_release(release, who))

        def find(*words: str) -> dict:
            there = ["--market", address, "--ca", str(ca), "--map", str(tmp_path / "tiny.map"), "--home", str(tmp_path / "q")]
            done = CliRunner().invoke(build(None), ["find", str(task), *there, "--base", str(tiny_model_directory), "--json", *words])
            return json.loads(done.stdout)

        mirrored, encrypted, all_of_them = find("--mirror"), find(), find("--places-per-org", "0")
    assert mirrored["copies"] == [{"title": copy.title, "of": releases[0].title}]
    assert mirrored["folded"] == [{"organisation": None, "matches": 1}]
    assert [match["organisation"] for match in mirrored["matches"]] == [None, None]
    assert len(mirrored["matches"]) == 2
    assert encrypted["copies"] == []
    assert len(encrypted["matches"]) == 3
    assert len(all_of_them["matches"]) == 4
