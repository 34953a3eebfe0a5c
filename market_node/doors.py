"""The TLS side of a market's ports: what they present and whom they trust, read anew while the market serves.

gRPC either asks every client of a port for a certificate or none, so members have a port of their own; queriers show nobody anything.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Sequence
from pathlib import Path

import grpc

from market_node.authority import CERTIFICATE
from market_node.events import CertificatesNotRead, tell
from market_node.identity import MarketIdentity, market_identity
from protocol.errors import UsageError, VeilmartError

LOOK_S = 10.0  # until a rotation or renewal is seen by the next connection


class Doors:
    """What the ports of one market show."""

    def __init__(self, home: Path, hosts: Sequence[str], *, shared: bool = False) -> None:
        """shared: other processes, which may have other names, show the same certificate."""
        self._home, self._hosts, self._shared, self._said = home, tuple(hosts), shared, ""
        self.identity = self._read()

    def _read(self) -> MarketIdentity:
        return market_identity(self._home, self._hosts, datetime.datetime.now(datetime.UTC), shared=self._shared)

    def look(self) -> None:
        """Read the certificates again, renewing what ends soon; where that fails, go on with those that were there, and log the code."""
        try:
            if not (self._home / CERTIFICATE).exists():  # at a start another authority would be made; nobody here knows that one
                raise UsageError("the authority's certificate is gone")
            self.identity = self._read()
            self._said = ""
        except (VeilmartError, OSError) as error:
            code = error.code if isinstance(error, VeilmartError) else "os"
            if code != self._said:  # once, and not again every ten seconds
                self._said = code
                tell(CertificatesNotRead(code))

    async def keep_looking(self, every_s: float = LOOK_S) -> None:
        """Look again and again until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            await asyncio.to_thread(self.look)

    def credentials(self, *, members: bool) -> grpc.ServerCredentials:
        """Return the credentials of a port; members: ask for a certificate of this market's authorities."""

        def newest() -> tuple[bytes, bytes, bytes | None]:
            identity = self.identity
            return identity.server_key, identity.server_certificate, identity.trusted if members else None

        shown = newest()

        def configuration() -> grpc.ServerCertificateConfiguration:
            key, certificate, trusted = shown
            return grpc.ssl_server_certificate_configuration([(key, certificate)], trusted)

        def news() -> grpc.ServerCertificateConfiguration | None:  # asked by gRPC before every handshake; None: as before
            nonlocal shown
            if shown == newest():
                return None
            shown = newest()
            return configuration()

        return grpc.dynamic_ssl_server_credentials(configuration(), news, require_client_authentication=members)
