"""Evidence: releases of one market with all that proves them, in one file that is verified without a network (docs/protocol.md 6.13).

    manifest.json              the market's key, and SHA-256 of every other file
    checkpoint                 the signed note, with the lines of witnesses, that all below is under
    receipts/00000007.receipt  a release and its place in the log, named by its index
    witnessed/00.checkpoint    a checkpoint of the same log that a witness signed
    consistency/12.proof       from an older checkpoint, of 12 releases, to the one above: hashes of 32 bytes
    maps/HEX.map               a feature map that one of the releases was made with
    results/NAME.json          what an audit found, as its command printed it: carried along, signed by nobody

The file is a tar archive of one form only: the same files give the same bytes, and any others are refused.  A folder with these files
in it is evidence as well.  Only the standard library and `cryptography` are needed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from protocol.claims import Claims, open_claims
from protocol.codec import canonical_json, parse_hex, take
from protocol.errors import FormatError, InvalidProof, InvalidSignature, UsageError
from protocol.transparency import HASH_BYTES, Checkpoint, Receipt, accept, open_checkpoint, verify_consistency

SCHEMA = "veilmart.evidence/1"
MANIFEST, CHECKPOINT = "manifest.json", "checkpoint"
NAME = re.compile(
    r"checkpoint|witnessed/[0-9]{2}\.checkpoint|receipts/[0-9]{8,16}\.receipt|consistency/[0-9]{1,16}\.proof"
    r"|maps/[0-9a-f]{64}\.map|results/[a-z0-9.-]{1,60}\.json"
)
BLOCK = 512  # of a tar archive
MAX_FILE_BYTES = 1 << 26
END = bytes(2 * BLOCK)


@dataclass(frozen=True, slots=True)
class Verified:
    """Evidence that was verified: every signature, every proof, every digest."""

    fingerprint: bytes  # SHA-256 of the manifest: it names the evidence as a whole
    market_key: bytes
    checkpoint: Checkpoint
    releases: dict[int, Claims]  # by index in the log
    envelopes: dict[int, bytes]
    witnessed: tuple[bytes, ...]  # signed notes of the same log; whose lines they bear is for whoever trusts a witness
    maps: dict[bytes, bytes]  # manifest by map id
    results: dict[str, bytes]

    @property
    def complete(self) -> bool:
        """Whether every release of the log is here."""
        return len(self.releases) == self.checkpoint.size


def assemble(
    checkpoint: bytes,
    market_key: bytes,
    receipts: list[Receipt],
    proofs: Mapping[int, list[bytes]],
    maps: list[bytes],
    results: Mapping[str, bytes],
    witnessed: Sequence[bytes] = (),
) -> bytes:
    """Return the file of evidence; raise what `verify` raises if these parts do not prove each other.

    proofs: of consistency, by the size of the older log.  maps: manifests.  results: JSON by name.  witnessed: notes that witnesses signed.
    """
    files = {CHECKPOINT: checkpoint}
    files |= {f"receipts/{receipt.index:08}.receipt": receipt.to_bytes() for receipt in receipts}
    files |= {f"witnessed/{number:02}.checkpoint": note for number, note in enumerate(witnessed)}
    files |= {f"consistency/{size}.proof": b"".join(proof) for size, proof in proofs.items()}
    files |= {f"maps/{hashlib.sha256(manifest).hexdigest()}.map": manifest for manifest in maps}
    files |= {f"results/{name}.json": data for name, data in results.items()}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[MANIFEST] = canonical_json({"files": digests, "market_key": market_key.hex(), "schema": SCHEMA})
    verify(files)
    return pack(files)


def verify(files: Mapping[str, bytes]) -> Verified:
    """Return what the files of evidence prove; raise FormatError, InvalidSignature or InvalidProof.  No IO."""
    market_key, rest = _listed(files)
    checkpoint = open_checkpoint(rest.pop(CHECKPOINT), market_key)
    proofs = {name: data for name, data in rest.items() if name.startswith("consistency/")}
    unused, releases, envelopes = set(proofs), {}, {}

    def require_one_log(name: str, older: Checkpoint) -> None:
        if (older.size, older.root, older.catalogue) == (checkpoint.size, checkpoint.root, checkpoint.catalogue):
            accept(older, checkpoint, ())  # their notices must not contradict each other either
            return
        proof = f"consistency/{older.size}.proof"
        if older.size >= checkpoint.size or proof not in proofs:
            raise InvalidProof(f"{name}: under {older.size} releases, and nothing shows that those {checkpoint.size} are the same log")
        verify_consistency(older.size, checkpoint.size, older.root, checkpoint.root, _hashes(proofs[proof], proof))
        unused.discard(proof)

    for name, data in rest.items():
        if not name.startswith("receipts/"):
            continue
        receipt = Receipt.from_bytes(data)
        if receipt.market_key != market_key:
            raise InvalidSignature(f"{name}: of another market than the evidence")
        if name != f"receipts/{receipt.index:08}.receipt":
            raise FormatError(f"{name}: its release is at index {receipt.index}")
        require_one_log(name, receipt.verify())
        releases[receipt.index], envelopes[receipt.index] = open_claims(receipt.envelope), receipt.envelope
    if not releases:
        raise FormatError("evidence: expected at least one receipt")
    witnessed = {name: data for name, data in rest.items() if name.startswith("witnessed/")}
    for name, note in witnessed.items():
        require_one_log(name, open_checkpoint(note, market_key))
    if unused:
        raise FormatError(f"{min(unused)}: proves nothing that is here")
    maps = {}
    for name, data in rest.items():
        if name.startswith("maps/"):
            map_id = hashlib.sha256(data).digest()
            if name != f"maps/{map_id.hex()}.map" or all(claims.map_id != map_id for claims in releases.values()):
                raise FormatError(f"{name}: not the map of a release that is here")
            maps[map_id] = data
    results = {name.removeprefix("results/").removesuffix(".json"): data for name, data in rest.items() if name.startswith("results/")}
    fingerprint = hashlib.sha256(files[MANIFEST]).digest()
    return Verified(
        fingerprint, market_key, checkpoint, dict(sorted(releases.items())), envelopes, tuple(witnessed.values()), maps, results
    )


def read_evidence(path: Path) -> dict[str, bytes]:
    """Return the files of evidence, packed or in a folder; raise UsageError or FormatError.  Nothing is verified yet."""
    if not path.is_dir():
        try:
            return unpack(path.read_bytes())
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def is_evidence(data: bytes) -> bool:
    """Return whether bytes are a packed archive, as far as their beginning tells."""
    return data[257:265] == b"ustar\x0000"


def _listed(files: Mapping[str, bytes]) -> tuple[bytes, dict[str, bytes]]:
    """Return the market's key and every file but the manifest, in order; raise FormatError unless they are those that it lists."""
    text = files.get(MANIFEST, b"")
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError(f"{MANIFEST}: missing, or not JSON", hint="`veilmart audit export` makes evidence") from None
    if not isinstance(manifest, dict) or canonical_json(manifest) != text:
        raise FormatError(f"{MANIFEST}: not in canonical form")
    digests, market_key, schema = take(manifest, {"files": dict, "market_key": str, "schema": str}, MANIFEST)
    if schema != SCHEMA:
        raise FormatError(f"{MANIFEST}: expected the schema {SCHEMA}")
    if {*digests, MANIFEST} != set(files) or CHECKPOINT not in digests:
        odd = sorted({*digests, MANIFEST} ^ set(files)) or [CHECKPOINT]
        raise FormatError(f"{MANIFEST}: expected exactly the files it lists, differs in {odd[:4]}")
    for name, digest in digests.items():
        if not NAME.fullmatch(name):
            raise FormatError(f"{MANIFEST}: lists a file that is no evidence")
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise FormatError(f"{name}: not the file that {MANIFEST} lists")
    return parse_hex(market_key, HASH_BYTES, f"{MANIFEST}: market_key"), {name: files[name] for name in sorted(digests)}


def _hashes(data: bytes, name: str) -> list[bytes]:
    if len(data) % HASH_BYTES:
        raise FormatError(f"{name}: expected hashes of {HASH_BYTES} bytes")
    return [data[start : start + HASH_BYTES] for start in range(0, len(data), HASH_BYTES)]


# The archive --------------------------------------------------------------------------------------------------------------
# Written by hand, since the bytes that `tarfile` writes differ between versions of Python; any tar program reads them.


def pack(files: Mapping[str, bytes]) -> bytes:
    """Return the tar archive (POSIX ustar) of these files: sorted, without owner or time."""
    parts = []
    for name, data in sorted(files.items()):
        parts += [_header(name, len(data)), data, bytes(-len(data) % BLOCK)]
    return b"".join([*parts, END])


def unpack(data: bytes) -> dict[str, bytes]:
    """Return the files of an archive; raise FormatError unless `pack` gives exactly these bytes."""
    files: dict[str, bytes] = {}
    at = 0
    while data[at : at + 1] not in (b"", b"\0"):
        header = data[at : at + BLOCK]
        try:
            name, size = header[:100].rstrip(b"\0").decode("ascii"), int(header[124:135], 8)
        except ValueError:
            raise FormatError("evidence: not an archive") from None
        if not 0 <= size <= MAX_FILE_BYTES or not (name == MANIFEST or NAME.fullmatch(name)):
            raise FormatError("evidence: holds a file that is no evidence")
        files[name] = data[at + BLOCK : at + BLOCK + size]
        at += BLOCK + size + -size % BLOCK
    if not files or pack(files) != data:
        raise FormatError("evidence: not an archive in canonical form", hint="a folder with the same files is evidence too")
    return files


def _header(name: str, size: int) -> bytes:
    numbers = b"0000644\0" + 2 * b"0000000\0" + b"%011o\0" % size + b"00000000000\0"  # mode, owner, group, size, time
    before, after = (
        name.encode().ljust(100, b"\0") + numbers,
        b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + 2 * b"0000000\0" + bytes(167),
    )
    checksum = sum(before) + 8 * ord(" ") + sum(after)  # counted with spaces in its own place
    return before + b"%06o\0 " % checksum + after
