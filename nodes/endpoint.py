"""An OpenAI-compatible endpoint on loopback: /v1/models and /v1/chat/completions, streamed or whole (docs/reuse.md 5).

Who may ask: whoever holds the token of a file that only its owner reads, and names this host: a web page that resolves its own name to
127.0.0.1 is refused by its Host header before anything else is looked at.  No text of a question or an answer is logged or kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodes.loopback import hosts_of, make_server, run, same_secret
from nodes.reuse.strategies import Answer, Assistant
from protocol.errors import OutsideWindow, Unauthorised, UsageError, VeilmartError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MAX_BODY_BYTES = 1 << 20
MAX_MESSAGES = 256
MAX_WAITING = 8  # requests that wait for their turn; one answer is decoded at a time
DEFAULT_TOKENS, MAX_TOKENS = 256, 2048
MIN_TOKEN_BYTES = 16
# Asking for these and not getting them would be a wrong answer, so they are refused.  Sampling options are accepted: answers are greedy.
REFUSED = ("tools", "functions", "response_format", "logprobs", "stop", "audio", "modalities")

log = logging.getLogger("veilmart.serve")


def read_token(path: Path) -> str:
    """Return the bearer token of a file, made anew if there is none; raise Unauthorised if others may read the file."""
    try:
        with path.open("rb") as stream:
            mode, data = os.fstat(stream.fileno()).st_mode, stream.read(4096)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        token = secrets.token_urlsafe(32)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(token + "\n")
        return token
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or 'cannot be read'}") from None
    if stat.S_IMODE(mode) & 0o077:
        raise Unauthorised(f"{path}: expected a file that only its owner may read", hint=f"chmod 600 {path}")
    token = data.decode("ascii", "replace").strip()
    if len(token) < MIN_TOKEN_BYTES or not token.isascii() or any(character.isspace() for character in token):
        raise UsageError(f"{path}: expected a token of at least {MIN_TOKEN_BYTES} ASCII characters without blanks")
    return token


class Refused(Exception):
    """A request that gets an error in the form that OpenAI's clients read."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.param = status, kind, param


@dataclass(frozen=True, slots=True)
class Question:
    """A request, checked."""

    model: str
    turns: tuple[tuple[str, str], ...]
    limit: int
    stream: bool
    usage: bool  # whether a stream ends with the number of tokens


def parse_question(body: bytes) -> Question:
    """Return the question of a request's body; raise Refused for anything that is not one or asks for what there is not."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "body: expected JSON") from None
    if not isinstance(value, dict):
        raise Refused(400, "body: expected a JSON object")
    for name in REFUSED:
        if value.get(name):
            raise Refused(400, f"{name}: not supported", param=name)
    if value.get("n") not in (None, 1):
        raise Refused(400, "n: expected 1, answers are greedy and there is one", param="n")
    model, stream = value.get("model"), value.get("stream")
    if not isinstance(model, str):
        raise Refused(400, "model: expected the name of one of /v1/models", param="model")
    if stream is not None and not isinstance(stream, bool):
        raise Refused(400, "stream: expected true or false", param="stream")
    limit = next((value[name] for name in ("max_completion_tokens", "max_tokens") if value.get(name) is not None), DEFAULT_TOKENS)
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_TOKENS:
        raise Refused(400, f"max_tokens: expected 1 to {MAX_TOKENS}", param="max_tokens")
    options = value.get("stream_options")
    usage = isinstance(options, dict) and options.get("include_usage") is True
    return Question(model, _turns(value.get("messages")), limit, bool(stream), usage)


def _turns(messages: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise Refused(400, f"messages: expected 1 to {MAX_MESSAGES} of them", param="messages")
    turns = []
    for message in messages:
        match message:
            case {"role": "system" | "developer", "content": content}:
                role = "system"
            case {"role": "user" | "assistant" as role, "content": content}:
                pass
            case _:
                raise Refused(400, "messages: expected a role (system, user, assistant) and content", param="messages")
        if isinstance(content, list):
            content = "".join(_part(part) for part in content)
        if not isinstance(content, str) or any("\ud800" <= character <= "\udfff" for character in content):
            raise Refused(400, "messages: expected content of Unicode text", param="messages")
        turns.append((role, content))
    if turns[-1][0] != "user" or not turns[-1][1].strip():
        raise Refused(400, "messages: expected the last one to be the user's, and not empty", param="messages")
    return tuple(turns)


def _part(part: object) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
    raise Refused(400, "messages: expected parts of text", param="messages")


@dataclass(frozen=True, slots=True, eq=False)
class _Served:
    """What one endpoint serves, and the turns its requests take."""

    assistants: Mapping[str, Assistant]
    token: bytes
    hosts: frozenset[str]
    turn: asyncio.Semaphore
    waiting: list[int]  # one number: requests that have not begun to be answered
    started: int


def application(assistants: Mapping[str, Assistant], token: str, port: int) -> Starlette:
    """Return the ASGI application that serves assistants by name to holders of the token."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    served = _Served(assistants, token.encode(), hosts_of(port), asyncio.Semaphore(1), [0], int(time.time()))

    def guarded(handler: Callable[[Request, _Served], Any]) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            started = time.perf_counter()
            try:
                _admit(request, served)
                response: Response = await handler(request, served)
            except Refused as refused:
                response = _error(refused)
            except Exception as error:  # noqa: BLE001  # its text may hold the question, so only its type is told and logged
                log.error("failed error=%s", type(error).__name__)
                response = _error(Refused(500, "the answer failed", "server_error"))
            log.info("request status=%d milliseconds=%.0f", response.status_code, 1e3 * (time.perf_counter() - started))
            return response

        return handle

    return Starlette(routes=[
        Route("/v1/models", guarded(_models), methods=["GET"]),
        Route("/v1/models/{name:path}", guarded(_model), methods=["GET"]),
        Route("/v1/chat/completions", guarded(_complete), methods=["POST"]),
    ])  # fmt: skip


def _admit(request: Request, served: _Served) -> None:
    # Before the token: an answer that depends on it must not be given to a page of another site.
    if request.headers.get("host", "").lower() not in served.hosts:
        raise Refused(421, "host: this endpoint answers to its loopback address only")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not same_secret(given.strip(), served.token):
        raise Refused(401, "authorization: expected the bearer token of this endpoint's token file", "authentication_error")


def _error(refused: Refused) -> Response:
    from starlette.responses import JSONResponse

    body = {"error": {"message": str(refused), "type": refused.kind, "param": refused.param, "code": None}}
    return JSONResponse(body, status_code=refused.status)


def _described(name: str, served: _Served) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": served.started, "owned_by": "veilmart"}


async def _models(request: Request, served: _Served) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse({"object": "list", "data": [_described(name, served) for name in served.assistants]})


async def _model(request: Request, served: _Served) -> Response:
    from starlette.responses import JSONResponse

    name = request.path_params["name"]
    if name not in served.assistants:
        raise Refused(404, "model: not served here, /v1/models lists what is", param="model")
    return JSONResponse(_described(name, served))


async def _complete(request: Request, served: _Served) -> Response:
    from starlette.responses import JSONResponse, StreamingResponse

    question = parse_question(await _body(request))
    assistant = served.assistants.get(question.model)
    if assistant is None:
        raise Refused(404, "model: not served here, /v1/models lists what is", param="model")
    try:
        assistant.require_holding()
    except OutsideWindow as error:  # it held when it was loaded; a client that tries again would hear the same
        raise Refused(410, f"{error}; `veilmart pull` its renewal and start this endpoint again", param="model") from None
    try:
        assistant.check_length(question.turns, question.limit)
    except VeilmartError as error:
        raise Refused(400, str(error), param="messages") from None
    if served.waiting[0] >= MAX_WAITING:
        raise Refused(429, "too many questions are waiting", "rate_limit_error")
    answering = Answering(assistant, question)
    common = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": question.model}
    if question.stream:
        events = _streamed(answering, common, served)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
    await _begin(answering, served)
    try:
        async for _ in answering.pieces():
            if await request.is_disconnected():
                raise Refused(499, "the client went away")
        answer = answering.answer
    finally:
        answering.stop()
    choice = {"index": 0, "message": {"role": "assistant", "content": answer.text}, "finish_reason": _reason(answer), "logprobs": None}
    body = {**common, "object": "chat.completion", "choices": [choice], "usage": answering.usage(), "veilmart": provenance(answer)}
    return JSONResponse(body)


async def _begin(answering: Answering, served: _Served) -> None:
    """Wait for a turn, then start; the turn ends with the thread that decodes, not with the client that may be gone before."""
    served.waiting[0] += 1
    try:
        await served.turn.acquire()
    finally:
        served.waiting[0] -= 1
    answering.start(served.turn.release)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise Refused(413, f"body: expected at most {MAX_BODY_BYTES} bytes")
    return bytes(body)


async def _streamed(answering: Answering, common: dict[str, Any], served: _Served) -> AsyncIterator[bytes]:
    def event(delta: dict[str, str], reason: str | None = None, **more: Any) -> bytes:
        choices = [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]
        return b"data: " + json.dumps({**common, "object": "chat.completion.chunk", "choices": choices, **more}).encode() + b"\n\n"

    # When the client goes away the server cancels this generator, at the next piece at the latest: `finally` stops the decoding.
    try:
        await _begin(answering, served)
        yield event({"role": "assistant", "content": ""})
        async for piece in answering.pieces():
            if piece:
                yield event({"content": piece})
        answer = answering.answer
        yield event({}, _reason(answer), veilmart=provenance(answer))
        if answering.question.usage:
            last = {**common, "object": "chat.completion.chunk", "choices": [], "usage": answering.usage()}
            yield b"data: " + json.dumps(last).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"
    except Exception as error:  # noqa: BLE001  # the answer has begun, so the error travels in it
        log.error("failed error=%s", type(error).__name__)
        yield b'data: {"error": {"message": "the answer failed", "type": "server_error"}}\n\n'
    finally:
        answering.stop()


class Answering:
    """One answer, decoded in a thread of its own, piece by piece, until it is finished or stopped."""

    def __init__(self, assistant: Assistant, question: Question) -> None:
        self.question = question
        self._assistant, self._stopped = assistant, threading.Event()
        self._answer: Answer | None = None
        self._failure: Exception | None = None
        self._queue: asyncio.Queue[str | None] = asyncio.Queue()

    @property
    def answer(self) -> Answer:
        """The whole answer, after the last piece."""
        assert self._answer is not None
        return self._answer

    def stop(self) -> None:
        """Decode no further token."""
        self._stopped.set()

    def start(self, at_end: Callable[[], None]) -> None:
        """Begin to decode; `at_end` is called in the event loop when nothing is decoded any more."""
        loop = asyncio.get_running_loop()

        def tell(piece: str | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(self._queue.put_nowait, piece)
                if piece is None:
                    loop.call_soon_threadsafe(at_end)

        threading.Thread(target=self._decode, args=(tell,), name="veilmart-answer", daemon=True).start()

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the text as it is decoded; an empty piece for a token that adds none."""
        while (piece := await self._queue.get()) is not None:
            yield piece
        if self._failure is not None:
            raise self._failure

    def _decode(self, tell: Callable[[str | None], None]) -> None:
        stream = self._assistant.stream(self.question.turns, self.question.limit)
        try:
            while not self._stopped.is_set():
                tell(next(stream))
        except StopIteration as stop:
            self._answer = stop.value
        except Exception as error:  # noqa: BLE001  # raised again by whoever reads the pieces
            self._failure = error
        finally:
            stream.close()
            tell(None)

    def usage(self) -> dict[str, int]:
        """Return the numbers of tokens, as OpenAI's clients expect them."""
        prompt = len(self._assistant.main.model.render(self.question.turns))
        return {"prompt_tokens": prompt, "completion_tokens": self.answer.tokens, "total_tokens": prompt + self.answer.tokens}


def _reason(answer: Answer) -> str:
    return "stop" if answer.finished else "length"


def provenance(answer: Answer) -> dict[str, Any]:
    """Return who answered, why, and what left the site; a field beside OpenAI's own."""
    return {
        "strategy": str(answer.strategy), "answered_by": answer.answered_by, "why": answer.why, "escalated": answer.escalated,
        "confidence": answer.confidence, "left_site": list(answer.left_site),
    }  # fmt: skip


def serve(assistants: Mapping[str, Assistant], token: str, bound: socket.socket) -> None:
    """Serve on a bound socket until the process is told to stop."""
    run(make_server(application(assistants, token, bound.getsockname()[1])), bound)
