"""Evidence proves itself offline, in one form of bytes only, and in a Python that has nothing but `cryptography`."""

import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import protocol
from protocol.errors import FormatError, InvalidProof, InvalidSignature, VeilmartError
from protocol.evidence import assemble, pack, read_evidence, unpack, verify
from protocol.release import open_envelope
from protocol.transparency import (
    Checkpoint,
    Receipt,
    appended,
    leaf_hash,
    origin_of,
    prove_consistency,
    prove_inclusion,
    root_of,
    sign_checkpoint,
)
from protocol.verify import main
from tests.protocol.worlds import envelope_of, small_map

MAP = small_map()
MARKET = Ed25519PrivateKey.generate()
KEY = MARKET.public_key().public_bytes_raw()
ENVELOPES = [envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed, count=300) for seed in range(5)]
RESULT = b'{"schema": "veilmart.audit-market/1"}'


class Log:
    """A market's log in memory."""

    def __init__(self, envelopes: list[bytes]) -> None:
        self.envelopes, self.known = envelopes, {}
        for index, envelope in enumerate(envelopes):
            made = appended(index, leaf_hash(envelope), self.node)
            self.known.update({(level, number): value for level, number, value in made})

    def node(self, level: int, number: int) -> bytes:
        return self.known[level, number]

    def note(self, size: int) -> bytes:
        return sign_checkpoint(Checkpoint(origin_of(KEY), size, root_of(size, self.node), bytes(32)), MARKET)

    def receipt(self, index: int, size: int) -> Receipt:
        return Receipt(self.envelopes[index], KEY, index, self.note(size), tuple(prove_inclusion(index, size, self.node)))


LOG = Log(ENVELOPES)


def evidence(size: int = 5, receipts=None, proofs=None, maps=(MAP.manifest,)) -> bytes:
    receipts = [LOG.receipt(index, size) for index in range(size)] if receipts is None else receipts
    return assemble(LOG.note(size), KEY, receipts, proofs or {}, list(maps), {"market": RESULT})


def test_evidence_of_a_whole_market_is_complete():
    found = verify(unpack(evidence()))
    assert (found.complete, found.market_key, found.checkpoint.size) == (True, KEY, 5)
    assert [found.releases[index].release_id for index in range(5)] == [open_envelope(e).release_id for e in ENVELOPES]
    assert found.maps == {MAP.map_id: MAP.manifest}
    assert found.results == {"market": RESULT}


def test_receipts_of_different_days_are_proven_to_be_of_one_log():
    receipts = [LOG.receipt(0, 2), LOG.receipt(3, 5)]
    proofs = {2: prove_consistency(2, 5, LOG.node)}
    found = verify(unpack(evidence(5, receipts, proofs)))
    assert (found.complete, sorted(found.releases)) == (False, [0, 3])
    with pytest.raises(InvalidProof, match="nothing shows"):
        evidence(5, receipts)
    with pytest.raises(InvalidProof):
        evidence(5, receipts, {2: prove_consistency(3, 5, LOG.node)})
    with pytest.raises(FormatError, match="proves nothing"):
        evidence(5, receipts, {**proofs, 3: prove_consistency(3, 5, LOG.node)})


def test_two_logs_of_one_market_are_no_evidence():
    fork = Log([ENVELOPES[1], ENVELOPES[0], *ENVELOPES[2:]])
    with pytest.raises(InvalidProof):
        evidence(5, [fork.receipt(0, 2), LOG.receipt(3, 5)], {2: prove_consistency(2, 5, LOG.node)})
    with pytest.raises(InvalidProof):
        evidence(5, [fork.receipt(0, 5), LOG.receipt(3, 5)])


def test_a_map_of_no_release_is_refused():
    with pytest.raises(FormatError, match="not the map"):
        evidence(maps=[MAP.manifest, small_map("other", 3).manifest])


def test_evidence_of_another_market_is_refused():
    receipt = LOG.receipt(1, 5)
    with pytest.raises(InvalidSignature):
        evidence(5, [replace(receipt, market_key=Ed25519PrivateKey.generate().public_key().public_bytes_raw())])


def test_any_tar_program_reads_it():
    data = evidence()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}
    assert members == unpack(data)


def test_every_flipped_bit_is_noticed():
    """Also those in the headers and in the padding: one form of bytes only."""
    data = evidence(1, maps=())
    for at in range(len(data)):
        for bit in (0, 3, 7):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            try:
                verify(unpack(bytes(changed)))
            except VeilmartError:
                continue
            pytest.fail(f"bit {bit} of byte {at} changed nothing")
    assert 3 * len(data) >= 10_000, "as many positions as are asked for"


def test_a_reader_that_takes_any_archive_is_caught_by_that_test():
    """Control: the same checks behind a tar program, which looks at no padding and at half of a header."""
    data, unnoticed = evidence(1, maps=()), 0
    for at in range(0, len(data), 29):
        changed = bytearray(data)
        changed[at] ^= 8
        try:
            with tarfile.open(fileobj=io.BytesIO(changed)) as archive:
                verify({member.name: archive.extractfile(member).read() for member in archive})
        except (VeilmartError, tarfile.TarError, AttributeError, UnicodeDecodeError):
            continue
        unnoticed += 1
    assert unnoticed > 10


def test_what_is_cut_off_or_added_is_noticed(tmp_path):
    data = evidence()
    for changed in (data[:-1], data[:-512], data + bytes(512), data[:600], b"", data[512:]):
        with pytest.raises(VeilmartError):
            verify(unpack(changed))
    for name, content in unpack(data).items():
        (tmp_path / "e" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "e" / name).write_bytes(content)
    assert verify(read_evidence(tmp_path / "e")).complete, "a folder is evidence as well"
    (tmp_path / "e" / "notes.txt").write_text("hello")
    with pytest.raises(FormatError, match="exactly the files it lists"):
        verify(read_evidence(tmp_path / "e"))


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "receipts/../checkpoint", "receipts/0.receipt", "results/A B.json"])
def test_a_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(FormatError):
        unpack(pack({**unpack(evidence()), name: b"x"}))


def test_the_program_names_what_is_wrong(tmp_path, capsys):
    file, other = tmp_path / "evidence.tar", tmp_path / "older"
    file.write_bytes(evidence())
    other.write_bytes(LOG.note(3))
    assert main([str(file), "--json", "--market-key", KEY.hex()[:8]]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["schema"], shown["complete"], len(shown["releases"])) == ("veilmart.verified-bundle/1", True, 5)
    assert main([str(file), "--market-key", "00" * 8]) == InvalidSignature.exit_code
    assert main([str(file), "--checkpoint", str(other)]) == 2
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("error: ") == 3


# A Python that has nothing but cryptography ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A fresh environment with copies of cryptography and what it needs, and of the package `protocol`; nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    found = Path(importlib.util.find_spec("cryptography").origin).parent.parent
    for name in ("cryptography", "cffi", "pycparser"):
        if (found / name).is_dir():
            shutil.copytree(found / name, packages / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in found.glob("_cffi_backend*"):
        shutil.copy(file, packages)
    shutil.copytree(Path(protocol.__file__).parent, folder / "protocol", ignore=shutil.ignore_patterns("__pycache__", "maps"))

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([folder / "venv" / "bin" / "python", *words], cwd=folder, capture_output=True, text=True, check=False, env={})

    return run


def test_evidence_is_verified_in_a_bare_python(bare, tmp_path):
    for name in ("numpy", "rfc8785", "typer", "grpc"):
        assert bare("-c", f"import {name}").returncode != 0, f"the environment is not bare: it has {name}"
    data, file = evidence(), tmp_path / "evidence.tar"
    file.write_bytes(data)
    good = bare("-m", "protocol.verify", str(file), "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["complete"]
    receipt = tmp_path / "notes.receipt"
    receipt.write_bytes(LOG.receipt(3, 5).to_bytes())
    assert bare("-m", "protocol.verify", str(receipt)).returncode == 0
    files = unpack(data)
    forged = {**files, "receipts/00000002.receipt": files["receipts/00000003.receipt"]}
    other_sums = bytearray(data)
    other_sums[data.index(ENVELOPES[1]) + len(ENVELOPES[1]) - 70] ^= 1  # a released integer
    for name, tampered in (("sums", bytes(other_sums)), ("swapped", pack(forged)), ("cut", data[:-512])):
        (tmp_path / name).write_bytes(tampered)
        refused = bare("-m", "protocol.verify", str(tmp_path / name))
        assert (refused.returncode, refused.stderr.startswith("error: ")) == (7, True), name
