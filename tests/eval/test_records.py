"""`tokred.eval.records`: what a kill leaves is what is gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokred.core.errors import InvalidParameterError
from tokred.eval.records import Records, check_out, claim, complete, read

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


# -- what is ours ------------------------------------------------------------------------------------------------------


def recorded(out: Path, settings: dict[str, str]) -> None:
    claim(out, settings)
    with Records(out, "row") as mine:
        mine.append([{"key": 0}])


@pytest.mark.parametrize("left", [None, "", "{", "[1]"])
def test_records_without_settings_are_of_nobody(tmp_path, left):
    """Settings that are gone or damaged: nothing goes on with the records, whatever it asks for."""
    recorded(tmp_path, {"model": "a"})
    if left is None:
        (tmp_path / "run.json").unlink()
    else:
        (tmp_path / "run.json").write_text(left)
    for settings in ({"model": "a"}, {"model": "b"}):
        with pytest.raises(InvalidParameterError, match="unknown evaluation.*--fresh" if left is None else "--fresh"):
            claim(tmp_path, settings)
    assert len(read(tmp_path, "row")) == 1
    claim(tmp_path, {"model": "b"}, fresh=True)
    assert read(tmp_path, "row") == {}
    claim(tmp_path, {"model": "b"})


@pytest.mark.parametrize("settings", [None, "{}", '{"model": "theirs"}', "no JSON"])
@pytest.mark.parametrize("name", ["thesis.txt", "thesis.jsonl", "folder"])
def test_fresh_touches_nothing_that_is_not_ours(tmp_path, settings, name):
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / name).mkdir() if name == "folder" else (folder / name).write_text("theirs")
    if settings is not None:
        (tmp_path / "run.json").write_text(settings)
    before = sorted(tmp_path.rglob("*"))
    for fresh in (False, True):
        with pytest.raises(InvalidParameterError, match="another --out"):
            claim(tmp_path, {"model": "a"}, fresh)
    assert sorted(tmp_path.rglob("*")) == before
    assert settings is None or (tmp_path / "run.json").read_text() == settings


def test_a_damaged_file_alone_stays(tmp_path):
    (tmp_path / "run.json").write_text("half of so")
    with pytest.raises(InvalidParameterError, match="damaged and no records are there"):
        claim(tmp_path, {"model": "a"}, fresh=True)
    assert (tmp_path / "run.json").read_text() == "half of so"


def test_fresh_leaves_a_neighbour_of_our_records(tmp_path):
    recorded(tmp_path, {"model": "a"})
    (tmp_path / "records" / "thesis.txt").write_text("theirs")
    claim(tmp_path, {"model": "b"}, fresh=True)
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["thesis.txt"]
    claim(tmp_path, {"model": "b"})


def test_a_record_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    recorded(tmp_path, {"model": "a"})

    def unlink(self, missing_ok=False):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(InvalidParameterError, match=r"row-.*jsonl cannot be removed \(Operation not permitted\)"):
        claim(tmp_path, {"model": "b"}, fresh=True)


# -- what was left out, and what lacks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("good", [0, 1])
def test_what_was_left_out_is_still_to_be_done(tmp_path, good):
    """Whichever process read it in the end."""
    with Records(tmp_path, "row", 1 - good) as mine:
        mine.append([{"key": 0, "unreadable": "x"}, {"key": 1, "unreadable": "y"}])
        assert 0 not in mine
    with Records(tmp_path, "row", good) as mine:
        assert mine.done == {}
        mine.append([{"key": 0, "top": [1]}])
        assert 0 in mine
    assert read(tmp_path, "row") == {0: {"key": 0, "top": [1]}, 1: {"key": 1, "unreadable": "y"}}
    with Records(tmp_path, "row") as mine:
        assert list(mine.done) == [0]


def test_records_that_lack_are_told(tmp_path):
    found = {"a": {"key": "a"}, "b": {"key": "b"}}
    assert complete(found, ["b", "a"], tmp_path, 1) == [{"key": "b"}, {"key": "a"}]
    with pytest.raises(InvalidParameterError, match=r"lacks 1 of 3 records.*a folder that all machines share"):
        complete(found, ["b", "c", "a"], tmp_path, 2)
    with pytest.raises(InvalidParameterError, match=r"lacks 2 of 2 records.*run the same command again"):
        complete(found, ["c", "d"], tmp_path, 1)
