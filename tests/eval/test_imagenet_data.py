"""`tokred.eval.imagenet_data`: every source, its labels, and batches that do not depend on who reads them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokred.core.errors import InvalidParameterError
from tokred.eval.imagenet_data import Source, open_images

IDS = pytest.importorskip("timm.data").ImageNetInfo("imagenet-1k").label_names()
SOME = [IDS[7], IDS[400], IDS[999], IDS[3]]  # in no order


def shown(image: Image.Image) -> torch.Tensor:
    """The grey level of a picture of one colour: (1, 1, 1)."""
    return torch.from_numpy(np.asarray(image.resize((1, 1)))[..., 0].copy()).float()[None]


def picture(level: int, suffix: str = ".png") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (9, 7), (level, level, level)).save(data, "JPEG" if suffix == ".JPEG" else "PNG")
    return data.getvalue()


def packed(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def laid(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def read(data, size=2, workers=0, processes=1, done=()):
    """{number of a batch: [(key, label, level)]}, over all processes; none is read twice."""
    found = {}
    for rank in range(processes):
        for batch in data.batches(shown, size, workers, rank, processes, done, False):
            assert batch.number not in found
            assert not batch.unreadable
            assert batch.images.shape == (len(batch.keys), 1, 1, 1)
            found[batch.number] = list(zip(batch.keys, batch.labels, batch.images.flatten().tolist(), strict=True))
    return dict(sorted(found.items()))


def all_of(data, **how):
    return [item for batch in read(data, **how).values() for item in batch]


def test_a_folder_of_ids(tmp_path):
    """Three of the thousand classes: the folder's name decides, not its place."""
    laid(tmp_path, {f"{name}/x{n}.png": picture(10 * n) for n, name in enumerate(SOME)})
    laid(tmp_path, {f"{SOME[0]}/deep/y.png": picture(99), f"{SOME[0]}/.hidden.png": b"", "notes.txt": b""})
    data = open_images(Source(str(tmp_path)), 1000, None)
    assert data.total == 5
    wanted = [(7, 99.0), *((IDS.index(name), 10.0 * n) for n, name in enumerate(SOME))]
    assert sorted((label, level) for _, label, level in all_of(data)) == sorted(wanted)
    with pytest.raises(InvalidParameterError, match=r"has 4 classes .* and the model 10.*--class-map"):
        open_images(Source(str(tmp_path)), 10, None)


def test_whose_class_is_whose(tmp_path):
    laid(tmp_path / "a", {"cat/1.png": picture(1), "dog/1.png": picture(2)})
    source = Source(str(tmp_path / "a"))

    def labels(*model, **more):
        return [label for _, label, _ in all_of(open_images(Source(source.data, **more), *model))]

    assert labels(2, None) == [0, 1]
    assert labels(3, ("dog", "cow", "cat")) == [2, 0]
    for name, text in (("m.txt", "dog 4\ncat 9\n"), ("m.json", '{"dog": 4, "cat": 9}')):
        (tmp_path / name).write_text(text)
        assert labels(10, None, class_map=tmp_path / name) == [9, 4]
    (tmp_path / "m.txt").write_text("a cow\ndog\ncat\n")
    assert labels(10, None, class_map=tmp_path / "m.txt") == [2, 1]
    laid(tmp_path / "b", {f"{number}/1.png": picture(number) for number in range(11)})
    assert all(label == level for _, label, level in all_of(open_images(Source(str(tmp_path / "b")), 12, None)))
    for data, said in ((b"\x80", "is no text"), (b'{"dog": "x"}', "lines of a name and a number, or JSON")):
        (tmp_path / "m.json").write_bytes(data)
        with pytest.raises(InvalidParameterError, match=said):
            labels(10, None, class_map=tmp_path / "m.json")
    with pytest.raises(InvalidParameterError, match="is a folder; expected a file"):
        labels(10, None, class_map=tmp_path)
    for option in ("config", "split", "image_column", "label_column"):
        with pytest.raises(InvalidParameterError, match=f"--{option.replace('_', '-')} x is of a data set"):
            labels(2, None, **{option: "x"})
    for text, said in (("dog 4\n", "no class 'cat'"), ("dog 4\ncat 10\n", "up to 10"), ("", "names 0 classes")):
        (tmp_path / "m.txt").write_text(text)
        with pytest.raises(InvalidParameterError, match=said):
            labels(10, None, class_map=tmp_path / "m.txt")


@pytest.fixture
def validation(tmp_path):
    """An official tar with its devkit, of six images; image n has grey level 10 n and the label `truth[n]`."""
    savemat = pytest.importorskip("scipy.io").savemat
    truth = [2, 4, 1, 1, 3, 2]  # the devkit's own numbers, from 1
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(number + 1, name, f"word {number}", 0) for number, name in enumerate(SOME)] + [(1001, "n001", "animal", 2)]
    meta, names = io.BytesIO(), [f"ILSVRC2012_val_{n + 1:08}.JPEG" for n in range(6)]
    savemat(meta, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    text = "".join(f"{number}\n" for number in truth).encode()
    order = [3, 0, 5, 1, 2, 4]  # as they lie in the tar: not sorted
    packed(tmp_path / "val.tar", {names[n]: picture(10 * n, ".JPEG") for n in order})
    inside = {"kit/data/meta.mat": meta.getvalue(), "kit/data/ILSVRC2012_validation_ground_truth.txt": text}
    packed(tmp_path / "devkit.tar.gz", inside, "w:gz")
    laid(tmp_path, inside)
    return tmp_path, names, [IDS.index(SOME[number - 1]) for number in truth]


def test_the_official_tar(validation):
    root, names, wanted = validation
    labels = {"devkit": root / "devkit.tar.gz", "folder": root / "kit"}
    labels["truth"] = root / "kit/data/ILSVRC2012_validation_ground_truth.txt"
    texts = {
        "ids": "".join(f"{IDS[label]}\n" for label in wanted),
        "pairs": "".join(f"val/{name} {label}\n" for name, label in reversed(list(zip(names, wanted, strict=True)))),
        "kaggle": "ImageId,PredictionString\n"
        + "".join(f"{n[:-5]},{IDS[c]} 1 2 3 4\n" for n, c in zip(names, wanted, strict=True)),
    }
    for name, text in texts.items():
        labels[name] = root / f"{name}.txt"
        labels[name].write_text(text)
    for path in labels.values():
        data = open_images(Source(str(root / "val.tar"), labels=path), 1000, None)
        found = all_of(data, workers=int(path is labels["devkit"]))
        assert [label for _, label, _ in found] == wanted
        assert [round(level) for _, _, level in found] == [0, 10, 20, 30, 40, 50]
    flat = laid(root / "flat", {name: picture(10 * n, ".JPEG") for n, name in enumerate(names)})
    assert all_of(open_images(Source(str(flat), labels=labels["devkit"]), 1000, None)) == found
    in_folders = packed(root / "b.tar", {f"./val/{name}/1.png": picture(n) for n, name in enumerate(SOME)})
    found = all_of(open_images(Source(str(in_folders)), 1000, None))
    assert {label: level for _, label, level in found} == {IDS.index(name): n for n, name in enumerate(SOME)}


def test_labels_that_are_missing(validation):
    root, names, _ = validation
    tar = str(root / "val.tar")

    def refused(said, data=tar, **more):
        with pytest.raises((InvalidParameterError, FileNotFoundError), match=said):
            open_images(Source(data, **more), 1000, None)

    refused("labels are missing: give --labels, the devkit")
    refused("no --labels at", labels=root / "nowhere")
    (root / "only.txt").write_text("1\n2\n3\n4\n1\n2\n")
    refused("label map is missing.*meta.mat", labels=root / "only.txt")
    for text, said in (
        ("", "is empty"),
        (f"{IDS[0]}\n" * 5, "has 5 labels, and .* 6 images"),
        ("one 1\ntwo\n", "a name and a class"),
        ("one 1\n", "has no label of ILSVRC2012_val_00000001.JPEG"),
        ("".join(f"{name} 1000\n" for name in names), "is of class 1000, and the model has 0 to 999"),
    ):
        (root / "other.txt").write_text(text)
        refused(said, labels=root / "other.txt")
    packed(root / "kit2.tar.gz", {"data/meta.mat": b"x"}, "w:gz")
    refused("holds no ILSVRC2012_validation_ground_truth", labels=root / "kit2.tar.gz")
    (root / "other.txt").write_bytes(bytes(range(128, 256)))
    refused("--labels .*other.txt is no text", labels=root / "other.txt")
    (root / "kit3.tar.gz").write_bytes(b"no archive")
    refused("is no devkit", labels=root / "kit3.tar.gz")


def test_what_holds_no_images(tmp_path):
    def refused(said, path):
        with pytest.raises((InvalidParameterError, FileNotFoundError), match=said):
            open_images(Source(str(path)), 1000, None)

    refused("no data at .*expected a folder", tmp_path / "nowhere")
    laid(tmp_path / "a", {"x/readme.txt": b""})
    refused("holds no images", tmp_path / "a")
    laid(tmp_path / "b", {"val.tar": b""})
    refused("a tar is given by itself: --data .*val.tar", tmp_path / "b")
    laid(tmp_path / "c", {"x.parquet": b""})
    refused("--data hf:", tmp_path / "c")
    laid(tmp_path / "d", {"train/cat/1.png": b"", "val/cat/1.png": b""})
    refused("give one: --data .*val", tmp_path / "d")
    laid(tmp_path / "e", {"cat/1.png": b"", "dog/1.png": b"", "1.png": b""})
    refused("1.png lies beside the class folders", tmp_path / "e")
    (tmp_path / "text").write_text("no tar")
    refused("is no whole tar", tmp_path / "text")
    whole = packed(tmp_path / "whole.tar", {"a/1.png": picture(0), "b/1.png": picture(1)}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:1000])
    refused("cut.tar is no whole tar", tmp_path / "cut.tar")
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04 and so on")
    refused("x.zip is compressed", tmp_path / "x.zip")
    packed(tmp_path / "x.tar.gz", {"a/1.png": picture(0)}, "w:gz")
    refused("is compressed", tmp_path / "x.tar.gz")
    packed(tmp_path / "train.tar", {"n01440764.tar": b""})
    refused("holds tars such as n01440764.tar", tmp_path / "train.tar")


@pytest.mark.parametrize("count", [None, 5])
def test_batches_do_not_depend_on_processes_or_workers(tmp_path, count):
    laid(tmp_path, {f"{n % 2}/{n:02}.png": picture(n) for n in range(11)})
    data = open_images(Source(str(tmp_path), count=count), 2, None)
    assert data.total == (count or 11)
    whole = read(data)
    assert [len(batch) for batch in whole.values()] == ([2, 2, 1] if count else [2, 2, 2, 2, 2, 1])
    assert {label for batch in whole.values() for _, label, _ in batch} == {0, 1}  # evenly spaced
    assert read(data, processes=3) == whole
    assert read(data, workers=2, processes=2) == whole
    some = read(data, processes=2, done={0, 1, 2})
    assert some == {number: batch for number, batch in whole.items() if number != 0}


# -- data sets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path):
    """Three shards of 5, 4 and 3 rows; the grey level of row p of shard s is 10 s + p, its class that modulo 2."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    for shard, rows in enumerate((5, 4, 3)):
        levels = [10 * shard + row for row in range(rows)]
        table = {"picture": [{"bytes": picture(n), "path": None} for n in levels], "kind": [n % 2 for n in levels]}
        name = tmp_path / "set" / f"validation-{shard:05}-of-00003.parquet"
        name.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(table, features=features).to_parquet(name)
    return f"hf:{tmp_path / 'set'}"


def test_a_stream(parquet):
    data = open_images(Source(parquet), 2, ("dog", "cat"))  # the names decide
    whole = read(data)
    items = [item for batch in whole.values() for item in batch]
    assert sorted(level for _, _, level in items) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 20, 21, 22]
    assert all(label == 1 - level % 2 for _, label, level in items)
    assert len({key for key, _, _ in items}) == 12
    assert read(data, processes=2) == whole
    assert read(data, workers=2, processes=2) == whole  # more readers than shards
    first = next(iter(whole.values()))
    assert len(all_of(data, done={key for key, _, _ in first})) == 12 - len(first)
    few = open_images(Source(parquet, count=4), 2, None)
    assert sorted(level for _, _, level in all_of(few)) == [0, 1, 10, 20]


def test_streams_that_cannot_be(parquet, tmp_path):
    def refused(said, data=parquet, classes=2, **more):
        with pytest.raises(InvalidParameterError, match=said):
            open_images(Source(data, **more), classes, None)

    refused("has 2 classes .* and the model 10", classes=10)
    refused("no split 'validatoin', did you mean 'validation'", split="validatoin")
    refused("--image-column pictures: .* did you mean 'picture'", image_column="pictures")
    refused("--labels is for a tar or a folder", labels=tmp_path)
    refused("hub cannot be reached.*give a folder", data="hf:nobody/nothing")
    refused("datasets cannot open", data=f"hf:{tmp_path / 'nothing'}")
    with pytest.raises(InvalidParameterError, match="count 0"):
        Source(parquet, count=0)


def test_hidden_labels(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = {"image": [{"bytes": picture(1), "path": None}], "label": [-1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "set" / "test.parquet")
    with pytest.raises(InvalidParameterError, match="this split hides its labels"):
        open_images(Source(f"hf:{tmp_path / 'set'}", split="test"), 10, None)
