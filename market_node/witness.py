"""A witness of somebody else's market: an ordinary client that signs what it saw, and never two histories."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from protocol.channel import CALL_TIMEOUT_S, addresses_of, connect, error_from_status
from protocol.errors import FormatError, InvalidProof, InvalidSignature, MarketUnreachable, QuotaExceeded
from protocol.keys import signing_key, write_durably
from protocol.notices import MAX_NOTICES_BYTES, NoticesHead, open_notices, require_listed
from protocol.transparency import Checkpoint, accept, open_checkpoint
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from protocol.witness import Witness, cosign


@dataclass(frozen=True, slots=True)
class Observed:
    """What a round of a witness came to."""

    checkpoint: Checkpoint
    news: int  # releases since the last round


class WitnessOf:
    """A witness of the market at an address; `home` keeps its key and, for each market, the checkpoint that it signed last."""

    def __init__(self, address: str, ca: Path, home: Path, name: str) -> None:
        self._key = signing_key(home / "witness.key")
        self.witness = Witness(name, self._key.public_key().public_bytes_raw())
        self._home, self._addresses, self._ca = home, addresses_of(address), ca

    def observe(self, now: Callable[[], float] = time.time) -> Observed:
        """Sign the market's newest checkpoint and hand it in.

        Raises InvalidProof if its log or its notices do not extend those signed before.
        """
        with self._alone():
            return self._observe(now)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        # Two processes of one witness would each compare with the same old checkpoint, and sign two histories that both extend it.
        with (self._home / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _observe(self, now: Callable[[], float]) -> Observed:
        import grpc

        channel = connect(self._addresses[0], self._ca)
        try:
            stub = MarketStub(channel)  # type: ignore[no-untyped-call]
            described = stub.Describe(pb.DescribeRequest(), timeout=CALL_TIMEOUT_S)
            note, market_key = bytes(described.checkpoint), bytes(described.market_key)
            shown = open_checkpoint(note, market_key)
            known = self._known(market_key)
            proof: list[bytes] = []
            if known is not None and 0 < known.size < shown.size:
                request = pb.ConsistencyRequest(first=known.size, second=shown.size)
                proof = [bytes(value) for value in stub.ProveConsistency(request, timeout=CALL_TIMEOUT_S).hashes]
            if known is not None and shown.size < known.size:
                raise InvalidProof(f"checkpoint: expected at least the {known.size} releases that were signed before, got {shown.size}")
            if accept(known, shown, proof) != shown:
                raise InvalidProof("checkpoint: expected at least what was signed before, got less")
            if shown.notices is not None and (known is None or shown.notices != known.notices):
                entries = _notices(stub, market_key)
                require_listed(entries, shown)
                if known is not None:
                    require_listed(entries, known)
            # Kept before it is signed: a crash in between must not let another history of the same size be signed later.
            if shown != known:
                write_durably(self._file, note, 0o644)
            if shown.size:
                stub.Cosign(pb.CosignRequest(note=cosign(note, self.witness.name, self._key, int(now()))), timeout=CALL_TIMEOUT_S)
            return Observed(shown, shown.size - (known.size if known else 0))
        except grpc.RpcError as error:
            self._addresses.append(self._addresses.pop(0))  # the next look is at the next process of the market
            raise error_from_status(error) from None
        finally:
            channel.close()

    @property
    def _file(self) -> Path:
        return self._home / "signed.checkpoint"

    def _known(self, market_key: bytes) -> Checkpoint | None:
        if not self._file.exists():
            return None
        try:
            return open_checkpoint(self._file.read_bytes(), market_key)
        except InvalidSignature:
            raise InvalidProof(
                "market: its key is another than that of the log signed before", hint="a witness of another market needs another --home"
            ) from None

    def run(self, every_s: float, stop: Event, on_round: Callable[[Observed | Exception], None]) -> None:
        """Observe again and again until told to stop; a market that is away is asked again, one that lies ends it by raising."""
        while not stop.is_set():
            try:
                on_round(self.observe())
            except (MarketUnreachable, QuotaExceeded) as error:
                on_round(error)
            stop.wait(every_s)


def _notices(stub: Any, market_key: bytes) -> list[bytes]:
    """Return all notices of a market, under a head that it signed."""
    entries: list[bytes] = []
    received, head = 0, None
    for chunk in stub.SyncNotices(pb.NoticesRequest(), timeout=CALL_TIMEOUT_S):
        received += chunk.ByteSize()
        if received > MAX_NOTICES_BYTES:
            raise FormatError(f"notices: expected at most {MAX_NOTICES_BYTES} bytes, got more")
        entries.extend(bytes(entry) for entry in chunk.entries)
        if chunk.HasField("head"):
            head = NoticesHead(int(chunk.head.size), bytes(chunk.head.root), bytes(chunk.head.signature))
    if head is None:
        raise FormatError("notices: expected a signed head on the last chunk")
    open_notices(entries, head, market_key)
    return entries
