"""Generated code matches its source."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCES = ("guard", "market")
GENERATED = tuple(f"{source}_pb2{ending}" for source in SOURCES for ending in (".py", ".pyi", "_grpc.py"))


def test_generated_code_is_what_make_wire_makes(tmp_path):
    plugin = Path(sys.executable).parent / "protoc-gen-mypy"
    files = [str(ROOT / f"proto/protocol/wire/{source}.proto") for source in SOURCES]
    command = [
        sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", f"--plugin=protoc-gen-mypy={plugin}", f"--python_out={tmp_path}",
        f"--grpc_python_out={tmp_path}", f"--mypy_out={tmp_path}", *files,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    for name in GENERATED:
        assert (tmp_path / "protocol/wire" / name).read_bytes() == (ROOT / "protocol/wire" / name).read_bytes(), f"{name}: run `make wire`"
