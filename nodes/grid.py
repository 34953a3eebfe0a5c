"""Flower's Grid inside one process: the same ServerApp and ClientApp objects, threads instead of a SuperLink.

Milliseconds a message where the simulation engine needs seconds.  It leans on three private spots of flwr 1.41 (Run.create_empty,
TaskIdentity, the underscore keys of Metadata), which is why flwr is pinned to one minor version and all of it stays in this file.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

FIRST_NODE_ID = 1000
NODE_UNAVAILABLE = 5


@dataclass(frozen=True, slots=True)
class Traffic:
    """How many messages were delivered, and the seconds of a thread that it took to handle them."""

    messages: int = 0
    seconds: float = 0.0


class InProcessGrid(Grid):  # type: ignore[misc]  # flwr is not followed by the type checker
    """A grid over the given node configurations; node ids count up from 1000 in their order."""

    def __init__(self, app: ClientApp, node_configs: Sequence[Mapping[str, str]], workers: int = 2) -> None:
        self._app = app
        self._run = Run.create_empty(run_id=1)
        # Without these, building a Message raises RuntimeError("TaskIdentity.run_id is not set").
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="grid")
        self._contexts = {
            FIRST_NODE_ID + i: Context(run_id=1, node_id=FIRST_NODE_ID + i, node_config=dict(config), state=RecordDict(), run_config={})
            for i, config in enumerate(node_configs)
        }
        self._pending: dict[str, Future[Message]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self.traffic = Traffic()

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Refuse: flwr deprecates this call in favour of Message(...)."""
        raise AttributeError("create_message is deprecated; build a flwr.app.Message")

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes."""
        return list(self._contexts)

    def get_nodes(self) -> list[Any]:
        """Return nothing: nodes of one process have no registered keys."""
        return []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Start each message on its node and return the message ids."""
        ids = []
        for message in messages:
            message_id = f"m{next(self._numbers)}"
            message.metadata.__dict__.update(_message_id=message_id, _src_node_id=1, _run_id=1)
            with self._lock:
                self._pending[message_id] = self._pool.submit(self._deliver, message)
            ids.append(message_id)
        return ids

    def _deliver(self, message: Message) -> Message:
        context = self._contexts.get(message.metadata.dst_node_id)
        if context is None:
            return Message(Error(NODE_UNAVAILABLE, "node unavailable"), reply_to=message)
        start = time.thread_time()
        reply: Message = self._app(message, context)
        with self._lock:
            self.traffic = Traffic(self.traffic.messages + 1, self.traffic.seconds + time.thread_time() - start)
        return reply

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there; each is returned once."""
        with self._lock:
            ready = [i for i in list(message_ids) if i in self._pending and self._pending[i].done()]
            return [self._pending.pop(i).result() for i in ready]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Return the replies that came within the timeout."""
        waiting, replies = set(self.push_messages(messages)), []
        end = None if timeout is None else time.monotonic() + timeout
        while waiting and (end is None or time.monotonic() < end):
            got = self.pull_messages(waiting)
            replies += got
            waiting -= {reply.metadata.reply_to_message_id for reply in got}
            if waiting:
                time.sleep(0.002)
        return replies

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def run_campaign(
    server: ServerApp, app: ClientApp, node_configs: Sequence[Mapping[str, str]], run_config: Mapping[str, str | int | float]
) -> Traffic:
    """Run one campaign of a ServerApp over nodes of this process; return how many messages it took."""
    grid = InProcessGrid(app, node_configs)
    try:
        server(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=dict(run_config)))
    finally:
        grid.close()
    return grid.traffic
