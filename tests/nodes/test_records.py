import pytest

from nodes.records import Pair, Prompt, Text, digest_of, parse_record, read_owned_records, read_records
from protocol.errors import RecordError

SECRET = "SECRET-7141"
BAD_LINES = {
    "not JSON": f'{{"prompt": "{SECRET}", ',
    "a list": f'["{SECRET}"]',
    "no text": f'{{"note": "{SECRET}"}}',
    "an empty prompt": f'{{"prompt": " ", "response": "{SECRET}"}}',
    "an empty response": f'{{"prompt": "{SECRET}", "response": ""}}',
    "half a surrogate pair": f'{{"text": "{SECRET} \\ud83d"}}',
    "endless nesting": f'{{"text": "{SECRET}", "x": ' + "[" * 100_000,
    "a number for a text": f'{{"text": 5, "x": "{SECRET}"}}',
}


def test_the_three_forms_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "response": "r"}\n\n{"prompt": "q"}\n{"text": "t"}\n')
    assert read_records(path) == [Pair("p", "r"), Prompt("q"), Text("t")]
    assert read_records(path, 2) == [Pair("p", "r"), Prompt("q")]


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_and_never_quoted(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(RecordError, match=r"a\.jsonl, line 2") as caught:
        read_records(path)
    assert SECRET not in str(caught.value) + str(caught.value.hint) + repr(caught.value.__cause__)


def test_bytes_that_are_no_utf8_are_a_bad_line():
    with pytest.raises(RecordError):
        parse_record(b'{"text": "\xff\xfe"}', "x")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(RecordError, match="empty"):
        read_records(tmp_path / "a.jsonl")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(RecordError):
            read_records(path)


def test_training_needs_responses_and_enough_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a b"}\n{"prompt": "q"}\n')
    with pytest.raises(RecordError, match="record 2: expected a response"):
        read_owned_records(path, 1)
    path.write_text('{"text": "a b"}\n')
    with pytest.raises(RecordError, match="at least 20"):
        read_owned_records(path, 20)


def test_the_digest_tells_records_and_order_apart():
    digests = {
        digest_of(r) for r in ([Pair("a", "b")], [Pair("ab", "")], [Text("ab")], [Pair("a", "b"), Text("c")], [Text("c"), Pair("a", "b")])
    }
    assert len(digests) == 5
