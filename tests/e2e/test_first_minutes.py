"""Everybody's first ten minutes, from their page alone: every line that a page shows is typed, and prints what is shown below it."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import nodes
import protocol
from nodes.demo import write_demo_data
from nodes.market_client import MarketClient
from protocol.features import default_map
from protocol.release import Card, sign_release
from tests.e2e.processes import market_process, veilmart
from tests.market_node.market import running_market
from tests.protocol.worlds import release_of
from tests.transcripts import MARKET, Desk

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TYPED = "<!-- transcript -->\n```\n{}\n```\n<!-- /transcript -->\n"
JOINED = "$ veilmart node join 127.0.0.1:7443 --invite file:city.invite\n..."
A_BANK = TYPED.format(
    f"$ veilmart demo --texts texts\n...\n{JOINED}\n"
    "$ veilmart node publish --data texts/bank-letters/train.jsonl --name bank-letters --epsilon 2 --no-train\n..."
)


def page(file: Path) -> tuple[str, Path]:
    """Return a page and where it lies."""
    return file.read_text(), file


class Place:
    """A folder for each person, and one market for all of them."""

    def __init__(self, root: Path, market: dict[str, str], model: Path) -> None:
        self.root, self.market, self._model = root, market, model

    def desk(self, who: str, organisation: str = "City Hospital") -> Desk:
        """Return the desk of a person who has made the model, and holds ca.crt and an invite for an organisation."""
        folder, home = self.root / who, self.root / f"home-{who}"
        folder.mkdir()
        (home / "models").mkdir(parents=True)
        (home / "models" / "smollm2-135m").symlink_to(self._model)
        shutil.copy(self.market["ca"], folder / "ca.crt")
        veilmart("market", "invite", "--org", organisation, "-o", str(folder / "city.invite"), home=self.root / "operator")
        return Desk(folder, home, self.market["address"])


@pytest.fixture(scope="module")
def place(tmp_path_factory, slm_directory):
    root = tmp_path_factory.mktemp("minutes")
    with market_process(root / "operator", options=()) as (started, _):
        yield Place(root, started, slm_directory)


@pytest.fixture(scope="module")
def an_owner(place):
    """Ana, who has done what her page says: her release is what the pages of others find."""
    return place.desk("ana").follow(*page(DOCS / "start-owner.md"))


@pytest.fixture(scope="module")
def a_bank(place, an_owner):
    """Another owner, with a specification alone."""
    return place.desk("bank", "North Bank").follow(A_BANK)


@pytest.mark.slow
def test_an_owners_first_ten_minutes(an_owner):
    assert an_owner >= 10


@pytest.mark.slow
def test_a_queriers_first_ten_minutes(place, a_bank):
    assert place.desk("quentin").follow(*page(DOCS / "start-querier.md")) >= 8


@pytest.mark.slow
def test_a_researchers_first_ten_minutes(place):
    assert place.desk("rosa").follow(*page(DOCS / "start-researcher.md")) >= 4


@pytest.mark.slow
def test_an_auditors_first_ten_minutes(tmp_path):
    feature_map = default_map()
    with running_market(tmp_path / "market", feature_map) as (address, ca, _):
        with MarketClient(address, ca, tmp_path / "owner") as client:
            for seed, name in enumerate(("recipes", "laws", "notes")):
                key = Ed25519PrivateKey.generate()
                client.publish(sign_release(replace(release_of(feature_map, key, seed=seed), card=Card(name)), key))
        (tmp_path / "desk").mkdir()
        shutil.copy(ca, tmp_path / "desk" / "ca.crt")
        assert Desk(tmp_path / "desk", tmp_path / "auditor", address).follow(*page(DOCS / "start-auditor.md")) >= 9


@pytest.mark.slow
def test_the_python_of_the_readme(place, tmp_path, monkeypatch, capsys):
    """Ten lines from a file of records to an answer: at the market of the pages, by the same member, for other records."""
    code = (ROOT / "README.md").read_text().split("<!-- python -->\n```python\n")[1].split("```")[0]
    desk = place.desk("py")
    desk.follow(TYPED.format(JOINED))
    write_demo_data(place.root / "py")
    shutil.copy(place.root / "py" / "ward-notes" / "train.jsonl", place.root / "py" / "notes.jsonl")
    shutil.copy(place.root / "py" / "ward-notes" / "test.jsonl", place.root / "py" / "task.jsonl")
    monkeypatch.chdir(place.root / "py")
    monkeypatch.setenv("VEILMART_HOME", str(place.root / "home-py"))
    exec(compile(code.replace(MARKET, place.market["address"]), "README.md", "exec"), {})
    price, found, answer = capsys.readouterr().out.splitlines()
    assert price == "epsilon with this release: 2.00"
    assert re.match(r"match \(.*'notes@[0-9a-f]{8}'", found)
    assert answer.startswith("W4/")  # as the made-up ward writes it; the base model does not
    assert {"Market", "Owner", "Querier"} <= set(nodes.__all__)
    assert "Guarantee" in protocol.__all__


@pytest.mark.nightly
def test_the_demo_of_the_readme(place):
    assert place.desk("dora").follow(*page(ROOT / "README.md")) == 1
