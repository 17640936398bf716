"""`tokred.eval.records`: what a kill leaves is what is gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokred.core.errors import InvalidParameterError
from tokred.eval.records import Records, check_out, claim, read

keys = st.one_of(st.integers(0, 5), st.text(max_size=3))
values = st.recursive(st.one_of(st.none(), st.integers(), st.text()), lambda v: st.lists(v, max_size=2), max_leaves=4)


@given(st.lists(st.tuples(keys, values), max_size=8), st.integers(0, 3), st.text(max_size=20))
def test_what_was_written_is_read(tmp_path_factory, items, split, name):
    out = tmp_path_factory.mktemp("records")
    for rank, part in enumerate((items[:split], items[split:])):
        with Records(out, name, rank) as mine:
            mine.append({"key": key, "value": value} for key, value in part)
    found = read(out, name)
    assert set(found) == {key for key, _ in items}
    assert all([key, record["value"]] in [list(item) for item in items] for key, record in found.items())
    again = Records(out, name, 0)
    assert again.done == found
    assert len(again) == len(found)
    again.close()


@given(st.integers(0, 200), st.lists(values, min_size=1, max_size=6))
def test_a_file_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, cut, items):
    out = tmp_path_factory.mktemp("records")
    with Records(out, "row") as mine:
        mine.append({"key": number, "value": value} for number, value in enumerate(items))
    (path,) = (out / "records").iterdir()
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    whole = data.count(b"\n")
    assert list(read(out, "row")) == list(range(whole))
    with Records(out, "row") as again:
        assert [number in again for number in range(len(items))] == [number < whole for number in range(len(items))]
        again.append({"key": number, "value": items[number]} for number in range(whole, len(items)))
    assert {key: record["value"] for key, record in read(out, "row").items()} == dict(enumerate(items))


def test_names_that_look_alike_stay_apart(tmp_path):
    for name in ("tome r=8", "tome-r=8", "a" * 80, "a" * 81):
        with Records(tmp_path, name) as mine:
            mine.append([{"key": 0, "name": name}])
    for name in ("tome r=8", "tome-r=8", "a" * 80, "a" * 81):
        assert read(tmp_path, name) == {0: {"key": 0, "name": name}}


def test_a_line_that_is_no_record_is_named(tmp_path):
    with Records(tmp_path, "row") as mine:
        mine.append([{"key": 0}])
    (path,) = (tmp_path / "records").iterdir()
    path.write_bytes(b'{"key":0}\n{"no":\n{"key":1}\n')
    with pytest.raises(InvalidParameterError, match=r"line 2, is no record"):
        read(tmp_path, "row")


def test_a_folder_is_of_one_evaluation(tmp_path):
    out = tmp_path / "out"
    claim(out, {"model": "a", "images": (3, 4)})
    with Records(out, "row") as mine:
        mine.append([{"key": 0}])
    claim(out, {"model": "a", "images": [3, 4]})
    assert len(read(out, "row")) == 1
    with pytest.raises(InvalidParameterError, match=r'differs in model \(there "a", now "b"\).*--fresh'):
        claim(out, {"model": "b", "images": [3, 4]})
    claim(out, {"model": "b", "images": [3, 4]}, fresh=True)
    assert read(out, "row") == {}
    assert json.loads((out / "run.json").read_text())["model"] == "b"
    (out / "run.json").write_text("{")
    with pytest.raises(InvalidParameterError, match="damaged"):
        claim(out, {"model": "b"})
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InvalidParameterError, match=r"file is a file, .* give another --out"):
            check_out(place)
    check_out(tmp_path / "not" / "yet" / "there")
    assert not (tmp_path / "not").exists()
    with pytest.raises(InvalidParameterError, match="cannot be made"):
        claim(Path("/proc/none/out"), {})
