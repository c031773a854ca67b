import json
import math
import os
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo.base.files import JsonLines, new_directory, read_lines, write_json, write_text

# What str.splitlines() breaks at, beside the newline: vertical tab, form feed, separators, NEL, U+2028 and U+2029.
LINE_BREAKS = "\r\n\v\f\x1c\x1d\x1e\x85\u2028\u2029"
TEXTS = st.text(st.sampled_from(string.printable + LINE_BREAKS + 'é中🙂\\"'))
ROWS = st.lists(st.dictionaries(TEXTS, TEXTS | st.floats(allow_nan=False, allow_infinity=False) | st.integers()))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("text", ["", "one", "zwei\n", "é\u2028\r\n🙂"])
def test_text_is_written_to_the_byte(tmp_path, text):
    for path in (tmp_path / "new", tmp_path / "new"):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert names(tmp_path) == ["new"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function):
    path = tmp_path / "file.json"
    write_text(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.json"]


def test_a_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *a, **k: (calls.append("replace"), replace(*a, **k)))
    write_text(tmp_path / "file.txt", "text")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the directory that holds the name


def test_json_keeps_the_order_of_keys_and_refuses_nan(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"b": 1, "a": [1.5, None, "é"]})
    assert list(json.loads(path.read_text())) == ["b", "a"]
    assert "é" in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"b": math.nan})
    assert list(json.loads(path.read_text())) == ["b", "a"]


def test_a_new_directory_takes_the_place_of_the_old_one_whole(tmp_path):
    for content in ("one", "two"):
        with new_directory(tmp_path / "parent" / "directory") as beside:
            (beside / "inner").mkdir()
            (beside / "inner" / content).write_text(content)
        assert names(tmp_path / "parent") == ["directory"]
        assert names(tmp_path / "parent" / "directory" / "inner") == [content]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_directory_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, error):
    with new_directory(tmp_path / "directory") as beside:
        (beside / "old").write_text("")

    def fail():
        with new_directory(tmp_path / "directory") as beside:
            (beside / "new").write_text("")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["directory"]
    assert names(tmp_path / "directory") == ["old"]


def test_what_a_killed_process_left_is_not_taken_over(tmp_path):
    for name in (".directory.new", ".directory.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left.over").write_text("")
    with new_directory(tmp_path / "directory") as beside:
        (beside / "file").write_text("")
    assert names(tmp_path) == ["directory"]
    assert names(tmp_path / "directory") == ["file"]


@given(ROWS)
def test_rows_come_back_as_they_were_whatever_they_hold(tmp_path_factory, rows):
    lines = JsonLines(tmp_path_factory.mktemp("lines") / "rows.jsonl")
    for row in rows:
        lines.append(row)
    assert lines.rows() == rows
    assert lines.num_rows() == len(rows)


def test_line_breaks_inside_a_string_do_not_end_a_row(tmp_path):
    lines = JsonLines(tmp_path / "rows.jsonl")
    rows = [{"text": f"a{character}b"} for character in LINE_BREAKS]
    for row in rows:
        lines.append(row)
    assert lines.rows() == rows


def test_a_cut_takes_back_what_came_after(tmp_path):
    lines = JsonLines(tmp_path / "rows.jsonl")
    for number in range(4):
        lines.append({"number": number, "text": "é"})
    for kept in (4, 2, 0):
        lines.cut(kept)
        assert [row["number"] for row in lines.rows()] == list(range(kept))
    lines.append({"number": 7})
    assert lines.rows() == [{"number": 7}]


def test_a_cut_never_makes_a_file_longer(tmp_path):
    lines = JsonLines(tmp_path / "rows.jsonl")
    lines.append({"number": 1})
    lines.cut(100)
    assert lines.rows() == [{"number": 1}]


def test_opening_again_appends(tmp_path):
    for number in range(2):
        JsonLines(tmp_path / "rows.jsonl").append({"number": number})
    assert JsonLines(tmp_path / "rows.jsonl").rows() == [{"number": 0}, {"number": 1}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_lacks_is_refused_and_writes_nothing(tmp_path, value):
    lines = JsonLines(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="JSON compliant"):
        lines.append({"number": value})
    assert lines.num_rows() == 0


def test_a_cut_drops_a_line_that_was_torn(tmp_path):
    lines = JsonLines(tmp_path / "rows.jsonl")
    lines.append({"number": 1})
    whole = lines.path.read_bytes()
    lines.path.write_bytes(whole + b'{"num')
    lines.cut(lines.num_rows())
    assert lines.path.read_bytes() == whole


def test_a_line_still_being_written_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_lines(path) == []
    lines = JsonLines(path)
    assert read_lines(path) == []
    for number in range(3):
        lines.append({"number": number, "text": "é\u2028"})
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for size in range(last, len(whole)):
        path.write_bytes(whole[:size])
        assert [row["number"] for row in read_lines(path)] == [0, 1]
