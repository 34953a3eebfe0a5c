"""The journal: nothing in it can be changed unnoticed by somebody who does not also write its head."""

import json
import os

import pytest

from nodes.journal import Journal, head_file, read
from protocol.errors import LedgerDamaged, UsageError


@pytest.fixture
def path(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for number in range(4):
        journal.append("asked", epsilon="1.0", occasion=number)
    journal.close()
    return tmp_path / "journal.jsonl"


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def test_what_was_written_is_read_and_goes_on_after_an_end(path):
    journal = Journal(path)
    journal.append("refused", order=1, code="records")
    journal.close()
    entries = read(path)
    assert [(entry.number, entry.event) for entry in entries] == [*((n, "asked") for n in range(1, 5)), (5, "refused")]
    assert path.stat().st_mode & 0o777 == 0o600


EDITS = {
    "a field changed": lambda lines: [lines[0], lines[1].replace(b'"1.0"', b'"0.1"'), *lines[2:]],
    "a field added": lambda lines: [lines[0].replace(b'"occasion"', b'"more": 1, "occasion"'), *lines[1:]],
    "a line removed": lambda lines: [lines[0], *lines[2:]],
    "the first line removed": lambda lines: lines[1:],
    "two lines exchanged": lambda lines: [lines[1], lines[0], *lines[2:]],
    "a line twice": lambda lines: [*lines, lines[-1]],
    "the last line removed": lambda lines: lines[:-1],
    "the last line torn": lambda lines: [*lines[:-1], lines[-1][:-9]],
    "all lines removed": lambda lines: [],
    "no JSON": lambda lines: [*lines[:2], b"x\n", *lines[2:]],
    "a list": lambda lines: [*lines[:2], b"[1]\n", *lines[2:]],
    "a time changed": lambda lines: [lines[0].replace(b'"time": "2', b'"time": "1'), *lines[1:]],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_journal_is_noticed(path, edit):
    path.write_bytes(b"".join(edit(lines_of(path))))
    with pytest.raises(LedgerDamaged):
        read(path)
    with pytest.raises(LedgerDamaged):
        Journal(path)


def test_without_the_head_a_missing_end_would_not_be_noticed(path):
    """The control, and what the journal cannot show: whoever writes both files can shorten both."""
    shorter = lines_of(path)[:-1]
    path.write_bytes(b"".join(shorter))
    last = json.loads(shorter[-1])
    head_file(path).write_bytes(int(last["number"]).to_bytes(8, "little") + bytes.fromhex(last["hash"]))
    assert len(read(path)) == 3


def test_a_crash_while_a_line_is_written_loses_nothing_that_was_acknowledged(path):
    whole = path.read_bytes()
    for torn in (b"", b'{"ev', b'{"event": "asked"}'):
        path.write_bytes(whole + torn)
        journal = Journal(path)
        assert len(journal.found) == 4
        journal.append("asked")
        journal.close()
        assert len(read(path)) == 5
        path.write_bytes(whole)
        last = json.loads(whole.splitlines()[-1])
        head_file(path).write_bytes(int(last["number"]).to_bytes(8, "little") + bytes.fromhex(last["hash"]))


def test_a_crash_between_line_and_head_is_no_damage(path):
    head = head_file(path).read_bytes()
    journal = Journal(path)
    journal.append("asked")
    journal.close()
    head_file(path).write_bytes(head)
    assert len(read(path)) == 5


def test_two_processes_cannot_write_one_journal(path):
    journal = Journal(path)
    with pytest.raises(UsageError, match="another guard"):
        Journal(path)
    journal.close()
    Journal(path).close()


def test_a_full_disk_leaves_the_journal_as_it_was(path, monkeypatch):
    journal, real = Journal(path), os.pwrite
    with monkeypatch.context() as patched:
        patched.setattr("nodes.journal.os.pwrite", lambda file, data, at: real(file, data[:20], at))  # the disk takes twenty bytes more
        with pytest.raises(UsageError, match="No space left"):
            journal.append("asked")
    journal.append("asked")
    journal.close()
    assert len(read(path)) == 5
