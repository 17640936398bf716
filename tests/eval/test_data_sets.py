"""`tokred.eval.data_sets`: a hub that does not answer, with and without the data set in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokred.eval import hub
from tokred.eval.data_sets import load_data_set

datasets = pytest.importorskip("datasets")


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub is to be asked, and nothing listens there; an empty cache of data sets."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(hub, "reachable", lambda: False)

    def ask(*args: object, **kwargs: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", ask)
    return tmp_path


def test_it_is_given_up_without_a_question(silent: Path) -> None:
    with pytest.raises(Exception) as found:
        load_data_set("nobody/nothing", None, split="test")
    assert hub.unreachable(found.value)
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("streaming", [False, True])
def test_the_cache_is_looked_into(silent: Path, streaming: bool) -> None:
    place = silent / "nobody___things" / "default" / "0.0.0" / "0123abcd"
    writer = datasets.arrow_writer.ArrowWriter(path=str(silent / "x.arrow"))
    writer.write({"label": 3})
    writer.finalize()
    place.mkdir(parents=True)
    (silent / "x.arrow").rename(place / "things-test.arrow")
    info = datasets.DatasetInfo(
        builder_name="things", dataset_name="things", config_name="default", version="0.0.0",
        features=datasets.Features({"label": datasets.Value("int64")}),
        splits=[{"name": "test", "num_bytes": 8, "num_examples": 1, "dataset_name": "things"}],
    )  # fmt: skip
    info.write_to_directory(str(place))
    found = load_data_set("nobody/things", None, split="test", streaming=streaming)
    assert list(found) == [{"label": 3}]
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_asked(silent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: True)
    with pytest.raises(AssertionError, match="the hub was asked"):
        load_data_set("nobody/nothing", None)


def test_a_folder_is_read_whatever_the_hub_does(silent: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("set")
    datasets.Dataset.from_dict({"label": [1, 2]}).to_parquet(folder / "test.parquet")
    assert [row["label"] for row in load_data_set(str(folder), None, split="test", streaming=True)] == [1, 2]
