"""The OpenAI-compatible endpoint: the public client works, strangers and bad requests are refused, nothing is logged."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
import torch

from nodes import endpoint, loopback
from nodes.base_model import BaseModel
from nodes.reuse import Specialist, Strategy, Wish, assemble, strategies
from protocol.errors import OutsideWindow, Unauthorised, UsageError
from protocol.window import Window, day_of
from tests.nodes.test_families import random_adapter, write_model

TOKEN = "a-token-of-the-test-0123456789"
MARKER = "SECRET-MARKER-5519"


class Served:
    def __init__(self, port: int, specialist: str, assistants: dict) -> None:
        self.url, self.port, self.specialist, self.assistants = f"http://127.0.0.1:{port}", port, specialist, assistants

    def post(self, body: object, token: str = TOKEN, **headers: str) -> httpx.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with httpx.Client(trust_env=False, timeout=60) as client:
            return client.post(f"{self.url}/v1/chat/completions", content=data, headers={"authorization": f"Bearer {token}", **headers})

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, http_client=httpx.Client(trust_env=False), max_retries=0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = BaseModel.open(write_model(tmp_path_factory.mktemp("model"), "llama"), torch.float32)
    specialist = Specialist("notes@00000001", random_adapter(model), 1.0)
    assistants = {
        "base": assemble(Wish(Strategy.BASE, specialists=0), model),
        "veilmart": assemble(Wish(Strategy.SINGLE), model, [specialist]),
    }
    bound = loopback.bind(0)
    port = bound.getsockname()[1]
    server = loopback.make_server(endpoint.application(assistants, TOKEN, port))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    assert server.started
    yield Served(port, specialist.title, assistants)
    server.should_exit = True
    thread.join()
    bound.close()
    torch.set_num_threads(threads)


def question(text: str = "two and three", **more: object) -> dict:
    return {"model": "veilmart", "messages": [{"role": "user", "content": text}], "max_tokens": 12, **more}


def test_a_specialist_whose_window_ends_while_it_is_served_answers_no_more(served, monkeypatch):
    """The clock is set on; the base model, which is of no release, goes on, and a clock that stands still is the control."""
    ended = day_of(time.time()) + 1
    specialist = replace(served.assistants["veilmart"].account.specialists[0], window=Window(0, ended - 1))
    ending = replace(served.assistants["veilmart"], account=replace(served.assistants["veilmart"].account, specialists=(specialist,)))
    monkeypatch.setitem(served.assistants, "veilmart", ending)
    assert served.post(question()).status_code == 200
    monkeypatch.setattr(strategies, "day_of", lambda seconds: ended)
    for stream in (False, True):
        refused = served.post(question(stream=stream))
        assert (refused.status_code, refused.json()["error"]["param"]) == (410, "model")
        assert f"{specialist.title}: it held until" in refused.json()["error"]["message"]
    with pytest.raises(OutsideWindow):  # and whoever keeps an assistant in a program of its own
        ending.answer([("user", "two and three")], 12)
    assert served.post({**question(), "model": "base"}).status_code == 200


def test_the_public_client_streams_the_specialists_answer(served):
    expected = served.assistants["veilmart"].answer([("user", "two and three")], 12)
    with served.client() as client:
        assert [one.id for one in client.models.list()] == ["base", "veilmart"]
        assert client.models.retrieve("base").owned_by == "veilmart"
        whole = client.chat.completions.create(**question())
        assert whole.choices[0].message.content == expected.text
        assert whole.usage.completion_tokens == expected.tokens
        assert whole.model_extra["veilmart"]["answered_by"] == served.specialist
        chunks = list(client.chat.completions.create(**question(stream=True, stream_options={"include_usage": True})))
    text = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(text) == expected.text
    assert sum(bool(piece) for piece in text) > 3  # it came in pieces
    assert chunks[-2].choices[0].finish_reason == ("stop" if expected.finished else "length")
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_a_conversation_and_parts_of_text_are_understood(served):
    messages = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
    ]  # fmt: skip
    turns = [("system", "be brief"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    answer = served.post({**question(), "messages": messages}).json()["choices"][0]["message"]["content"]
    assert answer == served.assistants["veilmart"].answer(turns, 12).text


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example", ""])
def test_another_host_name_is_refused_even_with_the_token(served, host):
    assert served.post(question(), host=host).status_code in (400, 421)  # an empty one is refused by the HTTP parser or by us


def test_the_loopback_names_are_accepted(served):
    for host in (f"localhost:{served.port}", f"127.0.0.1:{served.port}"):
        assert served.post(question(), host=host).status_code == 200


@pytest.mark.parametrize("token", ["wrong", TOKEN[:-1], TOKEN + "x"])
def test_without_the_token_there_is_no_answer(served, token):
    assert served.post(question(), token=token).status_code == 401
    with httpx.Client(trust_env=False) as client:
        assert client.get(f"{served.url}/v1/models").status_code == 401


BAD_REQUESTS = {
    "no JSON": (b"{", 400), "bytes that are no text": (b'{"model": "\xff"}', 400), "a list": ([], 400),
    "no model": ({"messages": [{"role": "user", "content": "x"}]}, 400), "no messages": ({"model": "veilmart"}, 400),
    "another model": (question() | {"model": "gpt-4"}, 404), "two answers": (question(n=2), 400), "tools": (question(tools=[{}]), 400),
    "a stop word": (question(stop=["x"]), 400), "too many tokens": (question(max_tokens=10**9), 400), 
    "no tokens": (question(max_tokens=0), 400),
    "a role that is none": (question() | {"messages": [{"role": "wizard", "content": "x"}]}, 400),
    "an empty question": (question("  "), 400), 
    "an assistant last": (question() | {"messages": [{"role": "assistant", "content": "x"}]}, 400),
    "an image": (question() | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400),
    "half a surrogate pair": (b'{"model": "veilmart", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    "a prompt longer than the context": (question("x" * 300), 400), "a body that is too large": (question("x" * (2 << 20)), 413),
}  # fmt: skip


@pytest.mark.parametrize(("body", "status"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_bad_request_is_refused_in_the_clients_own_form(served, body, status):
    response = served.post(body)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_a_client_that_goes_away_stops_the_decoding(served):
    def decoding() -> bool:
        return any(thread.name == "veilmart-answer" for thread in threading.enumerate())

    body = json.dumps(question(stream=True, max_tokens=200)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nAuthorization: Bearer {TOKEN}\r\n"
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b"200 OK" in connection.recv(4096)
        connection.recv(1024)
    while decoding() and time.monotonic() - started < 60:
        time.sleep(0.01)
    stopped = time.monotonic() - started
    assert not decoding()
    started = time.monotonic()
    assert served.post(question(max_tokens=200)).status_code == 200  # the next one has its turn
    assert stopped < max(time.monotonic() - started, 0.5)


def test_nothing_of_a_question_or_an_answer_is_logged(served, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # as every command has it: here another test's handler may be closed by now
    assert served.post(question(MARKER)).status_code == 200
    assert served.post(question(MARKER, n=2)).status_code == 400

    def fails(self, turns, response):
        raise RuntimeError(MARKER)

    monkeypatch.setattr(type(served.assistants["base"]), "check_length", fails)
    failed = served.post(question(MARKER))
    assert failed.status_code == 500
    ours = [record for record in caplog.records if record.name.startswith(("veilmart", "uvicorn"))]
    assert any("request status=200" in record.getMessage() for record in ours)
    captured = capfd.readouterr()
    told = "".join(record.getMessage() + str(record.exc_info) for record in ours) + captured.out + captured.err + failed.text
    assert MARKER not in told
    assert TOKEN not in told


def test_a_log_that_held_the_question_would_be_noticed(caplog):
    """Negative control of the test above."""
    caplog.set_level(logging.DEBUG)
    endpoint.log.info("request text=%s", MARKER)
    assert MARKER in "".join(record.getMessage() for record in caplog.records if record.name.startswith("veilmart"))


def test_a_port_that_is_taken_is_said_clearly():
    with loopback.bind(0) as bound, pytest.raises(UsageError, match="cannot be used"):
        loopback.bind(bound.getsockname()[1])


def test_the_token_is_made_once_for_its_owner_alone(tmp_path: Path):
    path = tmp_path / "home" / "serve-token"
    token = endpoint.read_token(path)
    assert len(token) >= 40
    assert path.stat().st_mode & 0o777 == 0o600
    assert endpoint.read_token(path) == token
    assert endpoint.read_token(tmp_path / "other") != token
    path.chmod(0o644)
    with pytest.raises(Unauthorised, match="only its owner"):
        endpoint.read_token(path)


@pytest.mark.parametrize("text", ["", "short", "with blank 0123456789", "ümlaut-0123456789-0123"])
def test_a_token_that_protects_nothing_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "token"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(UsageError, match="at least 16"):
        endpoint.read_token(path)
