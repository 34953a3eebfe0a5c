"""A cohort over a deployment: a market with its SuperLink, three SuperNodes, three guards, each a process of its own."""

import json
from contextlib import ExitStack

import pytest

from market_node.superlink import register_supernode
from nodes.base_model import BaseModel
from nodes.supernode import supernode_key
from protocol.keys import signing_key
from protocol.transparency import Receipt
from protocol.verify import verify_receipt
from tests.e2e.federation import campaign, node, operator
from tests.nodes.guard_processes import guard_process, write_policy
from tests.nodes.owners import tiny_map, write_records

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(900)]


def test_a_campaign_over_flower_brings_one_release_that_three_owners_signed(tmp_path, tiny_model_directory):
    which_map = tmp_path / "tiny.map"
    which_map.write_bytes(tiny_map(BaseModel.open(tiny_model_directory)).manifest)
    homes, market = [tmp_path / f"owner-{number}" for number in range(3)], tmp_path / "operator"
    keys = [signing_key(home / "node" / "owner.key").public_key().public_bytes_raw() for home in homes]
    for home, own in zip(homes, keys, strict=True):
        register_supernode(market / "market", supernode_key(home), home.name, own)
    with operator(market, "--map", str(which_map), "--smallest-count", "1") as said, ExitStack() as stack:
        for home, own in zip(homes, keys, strict=True):
            others = [key.hex() for key in keys if key != own]
            table = f'[cohort]\nname = "joint"\nmembers = {json.dumps(others)}\ncolluders = 0\n'
            policy = write_policy(tmp_path / f"{home.name}.toml", more=table)
            records = write_records(tmp_path / f"{home.name}.jsonl", 20, home.name)
            _, ready, _ = stack.enter_context(guard_process(home, records, tiny_model_directory, policy, which_map=str(which_map)))
            stack.enter_context(node(home, said["superlink"], said["ca"], f"unix:{ready['socket']}"))
        words = ("--cohort", "joint", "--colluders", "0", "--map", str(which_map), "--timeout", "800")
        account = campaign(market, said, *words, patience_s=840)
    assert {name: count for name, count in account["counts"].items() if count} == {"published": 1, "joined": 2}
    (file,) = (market / "market" / "campaigns" / account["campaign"] / "receipts").iterdir()
    assert Receipt.from_bytes(file.read_bytes()).verify().size == 1
    assert verify_receipt(file)[0]["signers"] == sorted(key.hex() for key in keys)
