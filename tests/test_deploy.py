"""The files in docs/deploy say what our programs accept, and keep apart what must be apart."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.command_line import accept

DEPLOY = Path(__file__).parent.parent / "docs" / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


def settings(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text().replace("\\\n", " ").splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def options_of(program: str) -> str:
    command = [str(Path(sys.executable).parent / program), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def check_command(words: list[str]) -> None:
    """Raise where a program would not take its command line."""
    program = Path(words[0]).name
    if program == "veilmart":
        accept(words[1:])
    else:
        known = options_of(program)
        for word in words[1:]:
            assert not word.startswith("--") or word in known.split() or f"{word} " in known, f"{program} has no {word}"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_starts_what_exists_without_privileges(unit):
    found = settings(unit)
    check_command(shlex.split(found["ExecStart"][0]))
    assert found["NoNewPrivileges"] == ["yes"]
    assert found["CapabilityBoundingSet"] == [""]
    assert found["User"] != ["root"]


def test_bundles_run_as_another_user_than_the_guard_and_see_none_of_its_folders():
    guard, node, runner = (settings(DEPLOY / f"veilmart-{name}.service") for name in ("guard", "supernode", "superexec"))
    assert len({unit["User"][0] for unit in (guard, node, runner)}) == 3
    assert f"/var/lib/{guard['StateDirectory'][0]}" in runner["InaccessiblePaths"][0].split()
    assert f"/var/lib/{guard['StateDirectory'][0]}" in node["InaccessiblePaths"][0].split()
    assert guard["StateDirectoryMode"] == ["0700"]
    assert runner["Group"] == guard["Group"], "the guard's socket is for that group"
    assert runner["IPAddressDeny"] == ["any"]
    assert runner["IPAddressAllow"] == ["127.0.0.1"]


def test_the_guard_lets_the_group_of_bundles_ask():
    words = shlex.split(settings(DEPLOY / "veilmart-guard.service")["ExecStart"][0])
    assert words[words.index("--socket-group") + 1] == settings(DEPLOY / "veilmart-superexec.service")["Group"][0]
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    words = shlex.split(services["guard"]["command"])
    assert words[words.index("--socket-group") + 1] == services["superexec"]["user"].partition(":")[2]


def test_owners_who_join_are_told_the_proxy_and_not_the_superlinks_own_loopback():
    words = shlex.split(settings(DEPLOY / "veilmart-market.service")["ExecStart"][0])
    name, port = words[words.index("--fleet") + 1].split(":")
    assert name == words[words.index("--name") + 1]
    assert f"listen {port} ssl;" in (DEPLOY / "nginx.conf").read_text()


def test_in_containers_the_records_are_mounted_into_the_guard_alone():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        check_command(shlex.split(service["command"]))
        assert any(volume.startswith("${RECORDS") for volume in service.get("volumes", [])) == (name == "guard")
        assert service["cap_drop"] == ["ALL"]
    assert len({service["user"] for service in services.values()}) == 3
    assert services["superexec"]["networks"] == ["bundles"]
    assert yaml.safe_load((DEPLOY / "compose.yaml").read_text())["networks"]["bundles"] == {"internal": True}


def test_what_telephones_home_is_off_in_every_file_that_starts_flower():
    quiet = dict(
        line.split("=", 1) for line in (DEPLOY / "flower.env").read_text().splitlines() if "=" in line and not line.startswith("#")
    )
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for environment in (quiet, services["supernode"]["environment"], services["superexec"]["environment"]):
        assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
        assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    for name in ("supernode", "superexec"):
        assert settings(DEPLOY / f"veilmart-{name}.service")["EnvironmentFile"] == ["/etc/veilmart/flower.env"]


def test_an_option_that_does_not_exist_would_be_noticed():
    with pytest.raises(AssertionError):
        check_command(["flower-supernode", "--no-such-option"])
