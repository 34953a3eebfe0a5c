"""What runs the transcripts of the documentation notices every line that is not as it is shown."""

import pytest

from tests.transcripts import Desk, Likeness, steps_in

SHOWN = [
    "published notes@7c1f0a2b  position 2, 796 bytes signed",
    "score 92.5 \u00b1 7.0  a tie",
    "the market is otter-basil-quartz-lemon",
    "next: veilmart pull notes@7c1f0a2b",
]
PRINTED = [
    "published notes@aa00bb11\tposition 2, 796 bytes signed",
    "score 95.1 \u00b1 6.6 a tie",
    "the market is heron-maple-onyx-fig",
    "next: veilmart pull notes@aa00bb11",
]


def test_ids_noise_and_blanks_may_differ():
    assert Likeness().differs(SHOWN, PRINTED) == ""
    assert Likeness().differs(["1  1  21a9bbc82aa96de0  2"], ["1\t1\t6192f0a41cdb1a31\t2"]) == ""
    assert Likeness().differs(["ward  1  ≈129  0.0187"], ["ward\t1\t-7\t0.0187"]) == ""


WAYS_TO_DIFFER = {
    "another word": (0, "published notes@aa00bb11 at position 2, 796 bytes signed"),
    "another small number": (0, "published notes@aa00bb11 position 3, 796 bytes signed"),
    "a score far off": (1, "score 130.1 \u00b1 6.6 a tie"),
    "another id in one place": (3, "next: veilmart pull notes@aa00bb12"),
    "another sign": (1, "score -92.5 ± 7.0  a tie"),
    "the same words for something else": (2, "the market is heron maple onyx fig"),
}


@pytest.mark.parametrize(("at", "line"), WAYS_TO_DIFFER.values(), ids=WAYS_TO_DIFFER)
def test_a_line_that_is_not_as_shown_is_noticed(at, line):
    assert Likeness().differs(SHOWN, [*PRINTED[:at], line, *PRINTED[at + 1 :]])


def test_a_line_too_few_or_too_many_is_noticed_unless_left_out():
    assert Likeness().differs(SHOWN, PRINTED[:-1])
    assert Likeness().differs(SHOWN[:-1], PRINTED)
    assert Likeness().differs([*SHOWN[:1], "...", *SHOWN[3:]], PRINTED) == ""
    assert Likeness().differs([*SHOWN[:1], "...", "next: veilmart find"], PRINTED)


def test_what_noise_decides_is_still_a_number():
    assert Likeness().differs(["ward  1  ≈129  0.0187"], ["ward\t1\tmany\t0.0187"])
    assert Likeness().differs(["ward  1  ≈129  0.0187"], ["ward\t2\t129\t0.0187"])


def test_two_ids_are_never_one():
    assert Likeness().differs(["a 00112233", "b 44556677"], ["a aabbccdd", "b aabbccdd"])


PAGE = """<!-- transcript -->
Words.
```
$ veilmart demo --texts texts
{files}
```
More words.
```
$ veilmart map show {missing}; echo $?
error: {missing}: expected a map's file or one of kme-lin-96, kme-grad-64, kme-lin-192, kme-rff-256: No such file or directory
2
$ echo notes@7c1f0a2b
notes@7c1f0a2b
```
<!-- /transcript -->
```
$ not typed
```
"""


def test_a_page_is_typed_line_by_line(tmp_path):
    files = [f"texts/{name}/{split}.jsonl" for name in ("bank-letters", "ward-notes") for split in ("train", "test")]
    page = PAGE.format(files="\n".join([*files, "..."]), missing="no.map")
    assert [step.typed for step in steps_in(page)] == [
        "veilmart demo --texts texts",
        "veilmart map show no.map; echo $?",
        "echo notes@7c1f0a2b",
    ]
    assert Desk(tmp_path / "desk", tmp_path / "home").follow(page) == 3
    with pytest.raises(AssertionError, match="shown:   letters@"):
        Desk(tmp_path / "desk", tmp_path / "home").follow(page.replace("\nnotes@", "\nletters@"))
    with pytest.raises(AssertionError, match="ended with 2"):
        Desk(tmp_path / "desk", tmp_path / "home").follow(page.replace("; echo $?", ""))


OLD = """<!-- transcript -->
```
$ echo notes@7c1f0a2b
notes@7c1f0a2b
$ printf 'a\\tb 7c1f0a2b\\nlonger\\tc\\n'
old 7c1f0a2b
```
<!-- /transcript -->
"""


def test_a_page_is_rewritten_where_that_is_asked_for_alone(tmp_path, monkeypatch):
    file = tmp_path / "page.md"
    file.write_text(OLD)
    with pytest.raises(AssertionError, match="shown:   old"):
        Desk(tmp_path / "desk", tmp_path / "home").follow(OLD, file)
    assert file.read_text() == OLD
    monkeypatch.setenv("VEILMART_RECORD", "1")
    assert Desk(tmp_path / "desk", tmp_path / "home").follow(OLD, file) == 2
    assert file.read_text() == OLD.replace("old 7c1f0a2b", "a       b 7c1f0a2b\nlonger  c")
