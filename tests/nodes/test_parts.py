"""The list of parts: complete, the same every time, and an altered file is found."""

import json
from importlib.metadata import PathDistribution, distributions, version

from typer.testing import CliRunner

from nodes.audit.parts import bill_of, installed
from nodes.command import build


def package(folder, name: str, record: str, metadata: str = ""):
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}")
    (info / "RECORD").write_text(record)
    return PathDistribution(info)


def test_every_installed_package_is_listed_once_with_its_version():
    bill = bill_of(installed())
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    listed = {one["name"]: one["version"] for one in bill["components"]}
    assert len(listed) == len(bill["components"])
    assert {one.metadata["Name"].lower().replace("_", "-").replace(".", "-") for one in distributions()} == set(listed)
    assert listed["cryptography"] == version("cryptography")
    assert bill == bill_of(installed())
    for one in bill["components"]:
        assert one["purl"] == one["bom-ref"] == f"pkg:pypi/{one['name']}@{one['version']}"
        assert all(len(licence["license"]["name"]) <= 100 for licence in one.get("licenses", ()))


def test_an_altered_file_and_a_missing_one_are_found(tmp_path):
    (tmp_path / "code.py").write_text("answer = 42\n")
    record = 'code.py,sha256=IBlRK7fCA4i6vzqOWMC3GiIGwJ_1TOzVZkVFOQ0dvlw,12\n"gone, too.py",sha256=AAAA,3\nprobe-1.0.dist-info/RECORD,,\n'
    import base64
    import hashlib

    right = base64.urlsafe_b64encode(hashlib.sha256(b"answer = 42\n").digest()).rstrip(b"=").decode()
    record = record.replace("IBlRK7fCA4i6vzqOWMC3GiIGwJ_1TOzVZkVFOQ0dvlw", right)
    (part,) = installed([package(tmp_path, "probe", record, "License: MIT\n")])
    assert (part.name, part.version, part.licence, part.altered()) == ("probe", "1.0", "MIT", ["gone, too.py"])
    (tmp_path / "code.py").write_text("answer = 43\n")
    assert part.altered() == ["code.py", "gone, too.py"]


def test_the_first_of_a_name_is_the_one_that_is_imported(tmp_path):
    first, second = package(tmp_path / "a", "Some_Probe", "x,,\n"), package(tmp_path / "b", "some-probe", "y,,\n")
    (part,) = installed([first, second])
    assert (part.name, part.record) == ("some-probe", "x,,\n")


def test_a_licence_is_a_name_and_no_text(tmp_path):
    classifier = "Classifier: License :: OSI Approved :: BSD License\n"
    long = package(tmp_path / "a", "a", "", f"License: {'x' * 200}\n{classifier}")
    new = package(tmp_path / "b", "b", "", f"License-Expression: MIT\n{classifier}")
    none = package(tmp_path / "c", "c", "")
    assert [part.licence for part in installed([long, new, none])] == ["BSD License", "MIT", ""]


def run(*words: str):
    return CliRunner().invoke(build(None), ["audit", "parts", *words])


def test_the_command_writes_the_list(tmp_path):
    done = run("-o", str(tmp_path / "parts.json"), "--json")
    told, listed = json.loads(done.stdout), json.loads((tmp_path / "parts.json").read_bytes())
    assert done.exit_code == 0
    assert (told["parts"], told["files_compared"], told["altered"]) == (len(listed["components"]), False, {})
    assert "cryptography" in run().stdout


def test_the_command_fails_where_a_file_was_altered(tmp_path, monkeypatch):
    from nodes.audit import parts

    (tmp_path / "code.py").write_text("answer = 42\n")
    probe = package(tmp_path, "probe", "code.py,sha256=AAAA,12\n")
    monkeypatch.setattr(parts, "distributions", lambda: [probe])
    assert run("--json").exit_code == 0, "the control: without --files nothing is read"
    done = run("--files", "--json")
    assert (done.exit_code, json.loads(done.stdout)["altered"]) == (4, {"probe": ["code.py"]})
