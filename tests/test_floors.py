"""Who may import whom.  Static imports are read from the source; what a process really loads is asked of a fresh one."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDARD = set(sys.stdlib_module_names)
ALLOWED = {
    "protocol": {
        "protocol", "numpy", "cryptography", "grpc", "grpc_health", "google", "numba", "llvmlite", "tenseal", "zstandard", "rich",
    },
    "nodes": {
        "nodes", "protocol", "numpy", "cryptography", "grpc", "typer", "click", "rich", "platformdirs",
        "torch", "transformers", "tokenizers", "peft", "gguf", "safetensors", "flwr", "opacus", "dp_accounting", "scipy",
        "huggingface_hub", "starlette", "uvicorn",
    },
    "market_node": {
        "market_node", "protocol", "numpy", "cryptography", "grpc", "grpc_health", "prometheus_client", "sqlalchemy", "alembic", "psycopg",
        "typer", "platformdirs", "flwr", "ray", "starlette", "uvicorn", "markupsafe",
    },
}  # fmt: skip
# What both web surfaces share stands in the protocol, where nothing else needs it.
WEB = {"protocol/web": {"starlette", "jinja2", "markupsafe"}, "nodes/ui": {"markupsafe"}, "market_node/page": {"markupsafe"}}
# flwr is touched by one module a side, and by the grid.
FLOWER = {"nodes/flower.py", "nodes/grid.py", "market_node/flower.py"}
RAY = {"market_node/shard_ray.py"}
SLOW_TO_LOAD = (
    "torch", "transformers", "opacus", "flwr", "tenseal", "numba", "numpy", "grpc", "sqlalchemy", "alembic", "psycopg", "peft",
    "starlette", "uvicorn", "jinja2",
)  # fmt: skip


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_its_floor_allows(package):
    for path in sources(package):
        further = WEB.get(str(path.parent.relative_to(ROOT)), set())
        beyond = imports(path) - STANDARD - ALLOWED[package] - further
        assert not beyond, f"{path.relative_to(ROOT)} imports {beyond}"


def test_a_forbidden_import_would_be_seen(tmp_path):
    (tmp_path / "x.py").write_text("def f():\n    import torch.nn\n    from market_node import store\n")
    assert imports(tmp_path / "x.py") == {"torch", "market_node"}


def test_flwr_stays_in_its_adapters():
    touching = {str(path.relative_to(ROOT)) for package in ALLOWED for path in sources(package) if "flwr" in imports(path)}
    assert touching <= FLOWER


def test_ray_stays_in_its_module_and_is_loaded_when_it_is_asked_for():
    touching = {str(path.relative_to(ROOT)) for package in ALLOWED for path in sources(package) if "ray" in imports(path)}
    assert touching == RAY
    assert "ray" not in loaded_by("import market_node.shard_ray")


def test_a_matching_worker_loads_no_store_and_no_network():
    loaded = loaded_by("import market_node.shard_worker, protocol.evaluation; market_node.shard_worker.warm_up()")
    assert not loaded & {"sqlalchemy", "grpc", "cryptography", "tenseal", "typer", "ray"}


def test_one_module_of_the_protocol_draws():
    """Both sides show results and errors in one way: `protocol/console.py`, where no auditor's code needs it."""
    assert {path.name for path in sources("protocol") if "rich" in imports(path)} == {"console.py"}


def loaded_by(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split())


def test_importing_nodes_loads_nothing_heavy():
    loaded = loaded_by("import nodes; nodes.__all__")
    assert not loaded & {*SLOW_TO_LOAD, "typer", "cryptography"}


def test_building_the_command_line_loads_nothing_heavy():
    loaded = loaded_by("from nodes.command import build; build()")
    assert not loaded & set(SLOW_TO_LOAD)


def test_the_market_process_never_loads_a_model_or_a_querys_secrets():
    names = ("service", "server", "store", "matcher", "identity")
    loaded = loaded_by("\n".join(f"import market_node.{name}" for name in names) + "\nimport protocol.evaluation, protocol.encryption")
    assert not loaded & {"torch", "transformers", "opacus", "tenseal", "nodes", "flwr", "starlette", "jinja2"}


def test_importing_the_protocol_loads_no_model_library():
    names = [f"protocol.{path.stem}" for path in sources("protocol") if path.parent.name == "protocol" and path.stem != "__init__"]
    assert not loaded_by("import " + ", ".join(names)) & {
        "torch", "transformers", "opacus", "flwr", "tenseal", "numba", "starlette", "jinja2",
    }  # fmt: skip


def test_a_verifier_loads_nothing_but_cryptography():
    loaded = loaded_by("import protocol.verify; protocol.verify.verify_bundle") - loaded_by("")
    assert not loaded - STANDARD - {"protocol", "cryptography", "_cffi_backend"}


def test_the_top_level_holds_what_the_design_names():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.split("/")[0] for name in listed if not name.startswith(".")}
    assert top <= {
        "pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt",
        "proto", "protocol", "nodes", "market_node", "tests", "docs",
    }  # fmt: skip
