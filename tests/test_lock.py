"""The locks name every package that run-time needs, in the tested version, with hashes; an installer refuses what has another."""

import base64
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK, CUDA, CPU, POSTGRES = (ROOT / "docs" / "deploy" / f"requirements{which}.lock" for which in ("", "-cuda", "-cpu", "-postgres"))
ENTRY = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9._+-]+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")
PINNED = {canonicalize_name(name): pin for name, pin in re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)}


def entries(text: str) -> dict[str, str]:
    """Return name and version of each entry of a lock that holds nothing else."""
    found = list(ENTRY.finditer(text))
    left = ENTRY.sub("", text)
    assert all(line.startswith("#") for line in left.splitlines()), left[:200]
    return {canonicalize_name(one[1]): one[2] for one in found}


def needed(name: str, extras: frozenset[str] = frozenset(), seen: set[tuple[str, frozenset[str]]] | None = None) -> set[str]:
    """Return what a package needs here at run time, and what that needs."""
    seen = set() if seen is None else seen
    if (name, extras) in seen:
        return set()
    seen.add((name, extras))
    found = {name}
    for text in requires(name) or ():
        one = Requirement(text)
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            found |= needed(canonicalize_name(one.name), frozenset(one.extras), seen)
    return found


def missing(*locks: dict[str, str]) -> set[str]:
    """Return what run-time needs and these locks have not; an editable installation needs one package more than the built one."""
    return needed("veilmart") - {"veilmart", "editables"} - {name for lock in locks for name in lock}


def test_every_entry_has_a_hash_and_the_version_that_is_tested():
    locked = entries(LOCK.read_text())
    assert len(locked) > 60
    assert {name: pin for name, pin in locked.items() if PINNED.get(name) != pin} == {}
    postgres = entries(POSTGRES.read_text())
    assert {name: pin for name, pin in postgres.items() if PINNED.get(name) != pin} == {}
    assert needed("psycopg", frozenset({"binary"})) - set(locked) == set(postgres) == {"psycopg", "psycopg-binary"}
    cuda, cpu = entries(CUDA.read_text()), entries(CPU.read_text())
    assert set(cuda) & set(PINNED) == set(cpu) == {"torch"}
    assert (cuda["torch"], cpu["torch"]) == (PINNED["torch"], f"{PINNED['torch']}+cpu")


def test_everything_that_run_time_needs_is_locked():
    """Of torch's build that is installed here: with CUDA or without."""
    locked = entries(LOCK.read_text())
    build = entries((CPU if version("torch").endswith("+cpu") else CUDA).read_text())
    assert missing(locked, build) == set()
    assert missing(locked) >= {"torch"}, "the control"


def test_what_is_installed_here_is_what_is_locked():
    def here(name: str) -> str:
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            return "not installed"

    assert {name: here(name) for name, pin in entries(LOCK.read_text()).items() if here(name) not in (pin, "not installed")} == {}


def test_no_index_is_named():
    for lock in (LOCK, CUDA, CPU, POSTGRES):
        assert not re.search(r"https?://|--index|--find-links|file:", lock.read_text())


# What an installer makes of hashes ----------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path) -> Path:
    made = tmp_path / "wheels" / "veilmart_probe-1.0-py3-none-any.whl"
    made.parent.mkdir()
    info = "veilmart_probe-1.0.dist-info"
    files = {
        "veilmart_probe.py": b"answer = 42\n",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: veilmart-probe\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {name: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode() for name, data in files.items()}
    lines = [f"{name},sha256={digest}," for name, digest in digests.items()]
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,", ""]).encode()
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return made


def install(wheel: Path, lock: str) -> subprocess.CompletedProcess[str]:
    file = wheel.parent / "test.lock"
    file.write_text(lock)
    command = [
        sys.executable, "-m", "pip", "install", "--isolated", "--dry-run", "--ignore-installed", "--no-index", "--no-cache-dir",
        "--disable-pip-version-check", "--find-links", str(wheel.parent), "--require-hashes", "-r", str(file),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_CONFIG_FILE": os.devnull})


def test_an_installer_takes_what_is_locked_and_nothing_else(wheel):
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    good = f"veilmart-probe==1.0 \\\n    --hash=sha256:{digest}\n"
    assert entries(good) == {"veilmart-probe": "1.0"}
    done = install(wheel, good)
    assert done.returncode == 0, done.stderr
    assert "Would install" in done.stdout
    edited = install(wheel, good.replace(digest, digest[:-1] + ("0" if digest[-1] != "0" else "1")))
    assert edited.returncode != 0
    assert "DO NOT MATCH" in edited.stderr
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    assert install(wheel, good).returncode != 0
    assert install(wheel, "veilmart-probe==1.0\n").returncode != 0, "without a hash nothing is taken"
