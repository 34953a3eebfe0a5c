"""Answers of Ray's actors, one of which is killed: `python -m tests.market_node.actors DIR`."""

import os
import signal
import sys
from contextlib import closing
from pathlib import Path

from market_node.shards import Shards, evaluator
from protocol.encryption import MatchPlan
from tests.market_node.test_shards import answers, expected, queries_for, ready, version_of
from tests.nodes.guard_processes import wait_for
from tests.patient_ray import patient


def main(folder: Path) -> None:
    """Compare every answer with that of one process."""
    MatchPlan.capacity = property(lambda plan: 2)  # as in tests/market_node/test_index.py: a tile of four rows
    versions = [version_of(folder, rows, rows) for rows in (20, 23)]
    with patient():
        front = evaluator(2, "local")
    assert isinstance(front, Shards)
    with closing(front):
        ready(front, versions[0], 2)
        right = 0
        for step, version in enumerate((*versions, versions[0], versions[1], versions[0])):
            if step == 3:
                assert front.workers() == (2, 0)
                os.kill(front._workers[1].pid, signal.SIGKILL)
            queries = queries_for(version, 3)
            right += answers(front, version, queries) == expected(version, queries)
            if step == 3:
                wait_for(lambda: front.workers() == (2, 1), 300)
        print(f"{right} answers of 3 queries, {front.workers().lost} worker lost, the same bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
