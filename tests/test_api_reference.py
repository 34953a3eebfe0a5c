"""The API reference: every public name explains itself, and tests/reference.py makes the pages without a warning."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reference import GENERATED, PACKAGES

ROOT = Path(__file__).parent.parent


def unexplained(source: str) -> list[str]:
    """Return the public functions, classes and methods of a module that have no docstring, and the module itself."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["the module"]
    waiting = [("", tree.body)]
    while waiting:
        prefix, body = waiting.pop()
        for one in body:
            if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not one.name.startswith("_"):
                if not ast.get_docstring(one):
                    found.append(prefix + one.name)
                if isinstance(one, ast.ClassDef):
                    waiting.append((f"{prefix}{one.name}.", one.body))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_explains_itself(package):
    generated = [ROOT / name.replace(".", "/") for name in GENERATED]
    modules = [path for path in sorted((ROOT / package).rglob("*.py")) if not set(generated) & set(path.parents)]
    assert {str(path.relative_to(ROOT)): names for path in modules if (names := unexplained(path.read_text()))} == {}


def test_a_name_without_an_explanation_would_be_noticed():
    source = (
        '"""A module."""\n\n\nclass A:\n    """A class."""\n\n    def f(self):\n        return 1\n\n    def _g(self):\n        return 2\n'
    )
    assert unexplained(source) == ["A.f"]
    assert unexplained("x = 1\n") == ["the module"]


@pytest.mark.slow
def test_the_reference_is_made_without_a_warning(tmp_path):
    words = [sys.executable, "-W", "error::UserWarning", "-m", "tests.reference", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr, done.stderr[-2000:]
    for page, name in (("nodes", "Owner"), ("nodes", "Querier"), ("protocol", "open_envelope"), ("market_node/store", "Store")):
        assert f'id="{name}"' in (tmp_path / f"{page}.html").read_text(), name
