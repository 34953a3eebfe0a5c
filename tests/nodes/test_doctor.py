"""What `doctor` finds on a machine where something is wrong, each beside a machine where it is not."""

import json
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from market_node.health import Health
from nodes import doctor
from protocol import health
from tests.command_line import run


def test_packages_from_two_places_are_seen(tmp_path, monkeypatch):
    assert doctor.origins().holds, doctor.origins()
    shadow = tmp_path / "market_node"
    shadow.mkdir()
    (shadow / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "market_node", raising=False)
    found = doctor.origins()
    assert found.holds is False
    assert str(tmp_path) in found.evidence


def test_a_full_disk_and_too_little_memory_are_seen(tmp_path, monkeypatch):
    assert (doctor.disk(tmp_path).holds, doctor.memory(tmp_path).holds) == (True, True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr("nodes.machine.free_bytes", lambda: 1 << 20)
    assert (doctor.disk(tmp_path / "not" / "there").holds, doctor.memory(tmp_path).holds) == (False, False)


def test_keys_that_others_can_read_are_seen():
    with tempfile.TemporaryDirectory() as folder:  # below pytest's own, which is closed, a key would be closed whatever its mode
        home = Path(folder)
        home.chmod(0o755)
        key = home / "node" / "owner.key"
        key.parent.mkdir()
        key.write_bytes(bytes(32))
        key.chmod(0o600)
        assert doctor.keys(home).holds
        key.chmod(0o644)
        assert doctor.keys(home).holds is False


def test_another_model_than_the_maps_is_seen(tiny_model_directory, tmp_path):
    from nodes.base_model import model_id

    assert doctor.model(tiny_model_directory, model_id(tiny_model_directory)).holds
    assert doctor.model(tiny_model_directory, "ab" * 32).holds is False
    assert doctor.model(tmp_path, "ab" * 32).holds is False


def test_a_clock_that_is_wrong_is_seen_by_the_markets(monkeypatch, tmp_path):
    def told(ahead_s):
        monkeypatch.setattr(health, "require_serving", lambda *how: health.Serving(0.01, ahead_s))
        return [finding.holds for finding in doctor.market("m:1", tmp_path / "ca.crt")]

    assert told(0.5) == [True, True]
    assert told(3600.0) == told(-3600.0) == [True, False]
    assert told(None) == [True, None], "an older market does not tell"
    assert [finding.holds for finding in doctor.market(None, None)] == [None]


def test_a_market_tells_its_time(monkeypatch):
    """Over a real connection, without TLS, for what is looked at is the metadata."""
    import asyncio

    import grpc

    async def ask() -> health.Serving:
        server = grpc.aio.server()
        add_HealthServicer_to_server(Health(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        monkeypatch.setattr(health, "connect", lambda address, ca: grpc.insecure_channel(address))
        try:
            return await asyncio.to_thread(health.require_serving, f"127.0.0.1:{port}", None, 10.0)
        finally:
            await server.stop(0)

    serving = asyncio.run(ask())
    assert abs(serving.ahead_s) <= serving.seconds + 0.1
    real = time.time
    monkeypatch.setattr("market_node.health.time.time", lambda: real() + 3600)
    monkeypatch.setattr("protocol.health.time", type("Clock", (), {"time": staticmethod(real), "perf_counter": time.perf_counter}))
    assert asyncio.run(ask()).ahead_s == pytest.approx(3600, abs=5)


def test_the_command_ends_with_4_and_says_what_to_do(capsys, monkeypatch, tmp_path):
    found = [doctor.Finding("disk", True, "there is some", "free some"), doctor.Finding("model", False, "none", "`veilmart model import`")]
    monkeypatch.setattr(doctor, "examine", lambda here, progress: tuple(found))
    done = run(capsys, "doctor", home=tmp_path)
    assert done.code == 4
    assert done.out.splitlines() == ["check\tresult\tevidence", "disk\tok\tthere is some", "model\tFAILED\tnone"]
    assert done.err == "model: `veilmart model import`\n"
    shown = json.loads(run(capsys, "doctor", "--json", home=tmp_path).out)
    assert (shown["schema"], shown["ok"], [check["advice"] for check in shown["checks"]]) == (
        "veilmart.doctor/1",
        False,
        ["", found[1].advice],
    )
    assert run(capsys, "doctor", "-q", home=tmp_path).out == "model\n"
    found.pop()
    assert run(capsys, "doctor", home=tmp_path).code == 0


def test_everything_is_looked_at(tmp_path, tiny_model_directory):
    """The real checks, on this machine: each says something, and none raises."""
    here = doctor.Installation(tmp_path, tiny_model_directory, "ab" * 32, tmp_path / "node")
    findings = {finding.name: finding for finding in doctor.examine(here)}
    assert set(findings) == {
        "python", "packages", "loaded from", "torch", "disk", "memory", "model", "key permissions", "clock", "authority", "market",
        "sandbox",
    }  # fmt: skip
    assert all(finding.evidence for finding in findings.values())
    assert [name for name in ("python", "packages", "loaded from", "torch") if not findings[name].holds] == []
    assert findings["model"].holds is False
