"""The files of the benchmarks: read as they are published, refused with line and field where they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokred.core.errors import InvalidParameterError
from tokred.eval.longbench import read_longbench, read_prompts
from tokred.eval.vqa_formats import DataFormatError, Question, Source, benchmark, read_questions
from tokred.eval.vqa_media import MediaError, Picture, Video, read_frames


def picture(path: Path, colour: int = 0, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (colour, 0, 0)).save(path)
    return path


def written(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(path: Path, *rows: Any) -> Path:
    return written(path, "".join(json.dumps(row) + "\n" for row in rows))


def only(name: str, data: Path, **source: Any) -> Question:
    (question,) = read_questions(name, Source(str(data), **source))
    return question


# -- each benchmark ----------------------------------------------------------------------------------------------------


def vqav2(tmp: Path) -> Path:
    told = [{"answer": "yes", "answer_id": i} for i in range(10)]
    asked = {"questions": [{"image_id": 42, "question": "Is it?", "question_id": 42000}], "data_subtype": "val2014"}
    written(tmp / "v2_OpenEnded_mscoco_val2014_questions.json", asked)
    annotation = {"question_id": 42000, "image_id": 42, "answers": told, "answer_type": "yes/no"}
    written(tmp / "v2_mscoco_val2014_annotations.json", {"annotations": [annotation]})
    picture(tmp / "COCO_val2014_000000000042.jpg")
    return tmp


def test_vqav2(tmp_path: Path) -> None:
    question = only("vqav2", vqav2(tmp_path), images=tmp_path)
    assert (question.id, question.text, question.answers) == ("42000", "Is it?", ("yes",) * 10)
    assert question.kinds == {"answer type": "yes/no"}
    assert isinstance(question.media, Picture)
    assert question.media.open().size == (8, 8)
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(FileNotFoundError, match="--annotations"):
        only("vqav2", tmp_path, images=tmp_path)


def test_gqa(tmp_path: Path) -> None:
    row = {"question": "Who?", "imageId": "n1", "answer": "man", "types": {"structural": "query"}}
    data = written(tmp_path / "testdev_balanced_questions.json", {"07": row})
    picture(tmp_path / "images" / "n1.jpg")
    question = only("gqa", data, images=tmp_path / "images")
    assert (question.id, question.answers, question.group, question.kinds) == ("07", ("man",), "n1", {"type": "query"})


def test_textvqa(tmp_path: Path) -> None:
    row = {"question": "What?", "image_id": "ab", "question_id": 3, "answers": ["x"] * 10}
    data = written(tmp_path / "TextVQA_0.5.1_val.json", {"data": [row], "dataset_type": "val"})
    picture(tmp_path / "ab.jpg")
    assert only("textvqa", data, images=tmp_path).answers == ("x",) * 10
    written(data, {"data": [{**row, "answers": ["x"]}]})
    with pytest.raises(DataFormatError, match=r"data\[0\].*annotators"):
        only("textvqa", data, images=tmp_path)


def test_pope(tmp_path: Path) -> None:
    row = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "no"}
    picture(tmp_path / "a.jpg")
    for kind in ("random", "adversarial"):
        lines(tmp_path / f"coco_pope_{kind}.json", row, {**row, "question_id": 2, "label": "yes"})
    questions = read_questions("pope", Source(str(tmp_path), images=tmp_path))
    assert [one.kinds["objects"] for one in questions] == ["adversarial"] * 2 + ["random"] * 2
    assert [one.answers[0] for one in questions] == ["no", "yes"] * 2
    lines(tmp_path / "coco_pope_random.json", row, {**row, "question_id": 2, "label": "maybe"})
    with pytest.raises(DataFormatError, match=r"coco_pope_random.json, line 2: 'label' is 'maybe'"):
        read_questions("pope", Source(str(tmp_path), images=tmp_path))


def test_scienceqa(tmp_path: Path) -> None:
    row = {
        "question": "Which?", "choices": ["ice", "fire"], "answer": 1, "hint": "Look.", "image": "image.png",
        "split": "test", "subject": "natural science", "grade": "grade8",
    }  # fmt: skip
    data = written(tmp_path / "problems.json", {"5": row, "6": {**row, "split": "train"}, "7": {**row, "image": None}})
    picture(tmp_path / "test" / "5" / "image.png")
    first, second = read_questions("scienceqa", Source(str(data), images=tmp_path))
    assert first.text == "Context: Look.\nWhich?\nA. ice\nB. fire"
    assert (first.answers, first.options) == (("fire",), ("ice", "fire"))
    assert first.kinds == {"context": "image", "subject": "NAT", "grade": "7-12"}
    assert second.media is None
    assert second.kinds["context"] == "text"
    written(data, {"5": {**row, "answer": 2}})
    with pytest.raises(DataFormatError, match=r"problem 5: 'answer' is 2"):
        read_questions("scienceqa", Source(str(data), images=tmp_path))


@pytest.mark.parametrize("nested", [False, True])
def test_mme(tmp_path: Path, nested: bool) -> None:
    folder = tmp_path / "existence"
    picture((folder / "images" if nested else folder) / "01.png")
    text = folder / ("questions_answers_YN/01.txt" if nested else "01.txt")
    written(text, "Is it a dog? Please answer yes or no.\tYes\nIs it a cat? Please answer yes or no.\tNo\n")
    first, second = read_questions("mme", Source(str(tmp_path)))
    assert (first.answers, second.answers) == (("yes",), ("no",))
    assert first.group == second.group == "existence/existence/01"
    assert isinstance(first.media, Picture)
    assert first.media.open().mode == "RGB"
    written(text, "no tab here")
    with pytest.raises(DataFormatError, match=r"01.txt, line 1: expected a question, a tab"):
        read_questions("mme", Source(str(tmp_path)))


def test_docvqa(tmp_path: Path) -> None:
    row = {"questionId": 9, "question": "Total?", "image": "documents/p.png", "docId": 4, "answers": ["1", "one"]}
    data = written(tmp_path / "val_v1.0.json", {"data": [row]})
    picture(tmp_path / "documents" / "p.png")
    question = only("docvqa", data, images=tmp_path)
    assert (question.answers, question.group) == (("1", "one"), "4")
    del row["answers"]
    written(data, {"data": [row]})
    with pytest.raises(DataFormatError, match="test split has none"):
        only("docvqa", data, images=tmp_path)


def videomme_row(**changed: Any) -> dict[str, Any]:
    return {
        "videoID": "v", "duration": "short", "question_id": "v-1", "question": "What?",
        "options": ["A. One", "B. Two"], "answer": "B", **changed,
    }  # fmt: skip


def test_videomme(tmp_path: Path) -> None:
    picture(tmp_path / "v" / "frame_2.png", 20)
    picture(tmp_path / "v" / "frame_10.png", 100)
    data = lines(tmp_path / "test.jsonl", videomme_row())
    question = only("videomme", data, videos=tmp_path)
    assert question.text == "What?\nA. One\nB. Two"
    assert (question.answers, question.kinds) == (("B. Two",), {"duration": "short"})
    assert isinstance(question.media, Video)
    frames = question.media.frames(4)
    assert frames.shape == (4, 8, 8, 3)
    assert frames[:, 0, 0, 0].tolist() == [20, 20, 100, 100]  # in the order of their numbers, repeated
    written(tmp_path / "v.srt", "1\n00:00:01 --> 00:00:02\nHello there.\n")
    assert "Hello there." in only("videomme", data, videos=tmp_path, subtitles=tmp_path).text
    nested = {key: value for key, value in videomme_row().items() if key in ("videoID", "duration")}
    nested["questions"] = [{key: value for key, value in videomme_row().items() if key not in nested}]
    assert only("videomme", written(tmp_path / "all.json", [nested]), videos=tmp_path).id == "v-1"
    for changed, message in (({"duration": "brief"}, "'duration' is 'brief'"), ({"answer": "C"}, "'answer' is 'C'")):
        with pytest.raises(DataFormatError, match=f"line 1: {message}"):
            only("videomme", lines(data, videomme_row(**changed)), videos=tmp_path)


def test_mlvu(tmp_path: Path) -> None:
    row = {"video": "a", "question": "What?", "candidates": ["x", "y"], "answer": "y", "question_type": "plotQA"}
    written(tmp_path / "json" / "1_plotQA.json", [row])
    written(tmp_path / "json" / "8_sub_scene.json", [{"video": "a", "question": "Say.", "answer": "Something"}])
    picture(tmp_path / "video" / "1_plotQA" / "a" / "0.png")
    question = only("mlvu", tmp_path / "json", videos=tmp_path / "video")
    assert (question.text, question.answers, question.kinds) == ("What?\nA. x\nB. y", ("y",), {"task": "plotQA"})


# -- rows --------------------------------------------------------------------------------------------------------------


def pope_rows() -> list[dict[str, Any]]:
    return [
        {"question_id": str(i), "question": "Is it?", "answer": "yes", "category": "random", "image_source": f"s{i}"}
        for i in range(3)
    ]


def test_parquet_and_saved_data_sets_hold_their_pictures(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "image": Image.new("RGB", (8, 8), (9 * i, 0, 0))} for i, row in enumerate(pope_rows())]
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(tmp_path / "p" / "test.parquet")
    datasets.DatasetDict({"test": made}).save_to_disk(tmp_path / "saved")
    for data in (tmp_path / "p" / "test.parquet", tmp_path / "p", tmp_path / "saved"):
        questions = read_questions("pope", Source(str(data)))
        assert [one.group for one in questions] == ["s0", "s1", "s2"]
        media = questions[2].media
        assert isinstance(media, Picture)
        assert media.open().getpixel((0, 0)) == (18, 0, 0)
    assert len(read_questions("pope", Source(str(data), limit=2))) == 2
    with pytest.raises(InvalidParameterError, match=r"--split val: .*test"):
        read_questions("pope", Source(str(tmp_path / "saved"), split="val"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"question": 1,\n "text": }]', r"no JSON: line 2, column 10"),
        ("[3]", "row 0 is 3, expected an object"),
        ('{"a": 1}', "expected a list of rows"),
        (
            '[{"video": "a", "question": "Q", "candidates": "x", "answer": "y"}]',
            "row 0: 'candidates' is 'x', expected list",
        ),
        ('[{"video": "a", "question": "Q", "candidates": ["x"], "answer": "z"}]', "row 0: 'answer' is 'z'"),
        ('[{"question": "Q", "candidates": ["x"], "answer": "x"}]', r"row 0: there is no field 'video' \(fields: "),
        ('[{"video": "b", "question": "Q", "candidates": ["x"], "answer": "x"}]', None),
        ("[]", "no question of MLVU"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, content: str, message: str | None) -> None:
    data = written(tmp_path / "rows.json", content)
    (tmp_path / "a").mkdir()
    with pytest.raises(MediaError if message is None else DataFormatError, match=message or "not in .*--videos DIR"):
        read_questions("mlvu", Source(str(data), videos=tmp_path))


def test_wrong_lines_are_named(tmp_path: Path) -> None:
    data = tmp_path / "coco_pope_random.json"
    good = {"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "no"}
    source = Source(str(data), images=picture(tmp_path / "a.jpg").parent)
    written(data, json.dumps(good) + '\n\n{"question_id": \n')
    with pytest.raises(DataFormatError, match="line 3: no JSON: column"):
        read_questions("pope", source)
    lines(data, good, good)
    with pytest.raises(DataFormatError, match=r"line 2: the id 'random/1' is that of .*line 1 too"):
        read_questions("pope", source)
    lines(data, {**good, "image": "b.jpg"})
    with pytest.raises(MediaError, match=r"line 1 asks about a picture that is not in .*b\.jpg"):
        read_questions("pope", source)
    lines(data, good)
    with pytest.raises(InvalidParameterError, match="--images DIR"):
        read_questions("pope", Source(str(data)))


def test_places_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="did you mean 'textvqa'"):
        benchmark("text_vqa")
    with pytest.raises(FileNotFoundError, match=r"testdev_balanced_questions\.json"):
        read_questions("gqa", Source(str(tmp_path / "none.json")))
    with pytest.raises(DataFormatError, match=r"give --data PATH"):  # the tests are offline
        read_questions("pope", Source("lmms-lab/POPE"))
    with pytest.raises(DataFormatError, match="neither parquet files nor"):
        read_questions("gqa", Source(str(tmp_path)))


# -- pictures and videos -----------------------------------------------------------------------------------------------


def test_unreadable_media(tmp_path: Path) -> None:
    broken = written(tmp_path / "a.jpg", "no picture")
    with pytest.raises(MediaError, match=r"a\.jpg cannot be read as a picture"):
        Picture.of_file(broken).open()
    film = written(tmp_path / "a.mp4", "no video")
    with pytest.raises((MediaError, ImportError), match=r"a\.mp4"):
        Video("a.mp4", film).frames(2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MediaError, match="has no frames"):
        Video("empty", tmp_path / "empty").frames(2)


@pytest.mark.parametrize("count", [2, 7, 30, 50])
def test_frames_of_a_file_are_the_middles_of_equal_parts(tmp_path: Path, count: int) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i in range(30):
            image = np.full((32, 32, 3), 8 * i, np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        film.mux(stream.encode())
    frames = read_frames(path, count)
    expected = [int((i + 0.5) * 30 / count) for i in range(count)]
    assert frames.shape == (count, 32, 32, 3)
    assert np.abs(frames[:, 16, 16, 0] / 8 - expected).max() < 1


# -- LongBench ---------------------------------------------------------------------------------------------------------


def test_longbench(tmp_path: Path) -> None:
    row = {"input": "Who?", "context": "Long.", "answers": ["Bo"], "dataset": "qasper", "_id": "x", "all_classes": None}
    lines(tmp_path / "qasper.jsonl", row, {**row, "_id": "y"})
    lines(tmp_path / "trec.jsonl", {**row, "dataset": "trec", "all_classes": ["Bo", "Al"]})
    lines(tmp_path / "dureader.jsonl", {**row, "dataset": "dureader"})  # Chinese: left aside
    found = read_longbench(tmp_path)
    assert [one.id for one in found] == ["qasper/x", "qasper/y", "trec/x"]
    assert found[2].classes == ("Bo", "Al")
    assert len(read_longbench(tmp_path, ("qasper",), 1)) == 1
    with pytest.raises(
        InvalidParameterError, match="--datasets: no LongBench data set 'qaspar', did you mean 'qasper'"
    ):
        read_longbench(tmp_path, ("qaspar",))
    with pytest.raises(FileNotFoundError, match=r"musique\.jsonl"):
        read_longbench(tmp_path, ("musique",))
    lines(tmp_path / "trec.jsonl", {**row, "dataset": "trec"})
    with pytest.raises(DataFormatError, match=r"trec\.jsonl, line 1: there is no field 'all_classes'"):
        read_longbench(tmp_path)
    assert read_prompts(written(tmp_path / "p.json", {"qasper": "{context} {input}"})) == {
        "qasper": "{context} {input}"
    }
    with pytest.raises(DataFormatError, match="'qasper' has no"):
        read_prompts(written(tmp_path / "p.json", {"qasper": "{input}"}))
