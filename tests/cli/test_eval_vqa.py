"""`tokred eval vqa` and `tokred eval needle` on random weights and data made here: what they ask, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.cli.conftest import saved
from tests.cli.evaluations import kill_midway, lines, two_processes
from tests.cli.test_cli import refused, run

for package in ("transformers", "torchvision", "tqdm"):
    pytest.importorskip(package)

PROMPT = "{media} USER : {question} ASSISTANT :"
QUESTIONS = (
    "is there a 4 ?",
    "is there a 7 ?",
    "which digit is red ?",
    "how many digits are there ?",
    "what colour is the 3 ?",
)


@pytest.fixture(scope="module")
def pope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions in POPE's files about five pictures of the size that the tiny model takes."""
    folder = tmp_path_factory.mktemp("pope")
    rows = []
    for i, question in enumerate(QUESTIONS):
        Image.effect_noise((96, 96), 10 + 20 * i).convert("RGB").save(folder / f"{i}.png")
        for j, label in enumerate(("yes", "no")):
            rows.append({"question_id": 2 * i + j, "image": f"{i}.png", "text": question, "label": label})
    (folder / "coco_pope_random.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def vqa(pope: Path, model: Path, out: Path, *further: str) -> list[str]:
    return [
        "eval", "vqa", "--benchmark", "pope", "--data", str(pope), "--images", str(pope), "--model", str(model),
        "--prompt", PROMPT, "--instruction", "", "--batch", "4", "--tokens", "2", "--device", "cpu", "--out", str(out),
        *further,
    ]  # fmt: skip


def results(capsys: pytest.CaptureFixture[str], argv: list[str]) -> dict[str, Any]:
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert json.loads(Path(found["files"]["results"]).read_text()) == found
    return found


def numbers(found: dict[str, Any]) -> list[Any]:
    """What does not depend on the clock."""
    return [{k: v for k, v in row.items() if k != "seconds_per_question"} for row in found["rows"]]


def test_rows_of_an_evaluation(
    pope: Path, vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["hired budget=1.0|0.25", "random_tokens budget=36", "fastv budget=36 layer=3"]
    methods = [part for one in methods for part in ("--method", one)]
    found = results(capsys, vqa(pope, vlm_folder, tmp_path / "a", *methods))
    plain, whole, hired, random, fastv = found["rows"]
    assert [row["kind"] for row in found["rows"]] == ["unpatched", "method", "method", "random", "method"]
    assert [row["visual_tokens"] for row in found["rows"]] == [144, 144, 36, 36, 36]
    assert hired["tokens_read"] == 36
    assert fastv["tokens_read"] == (3 * 144 + 3 * 36) / 6
    assert whole["agreement"] == 1
    assert whole["metrics"] == plain["metrics"]
    assert whole["vs_unpatched"]["difference"] == 0
    assert plain["main"] == "F1"
    assert {"accuracy", "precision", "recall", "yes ratio", "random F1"} <= set(plain["metrics"])
    assert plain["metrics"]["accuracy"]["value"] == 0.5  # every question is asked twice, for yes and for no
    assert random["method"]["budget"] == 36
    labels = ["hired budget=0.25", "random_tokens budget=36", "fastv budget=36 layer=3"]
    assert [row["label"] for row in found["rows"]][2:] == labels
    assert found["time"]["model"] > found["time"]["outside"] > 0
    assert all(row["seconds_per_question"] > 0 and row["reported"] == [] for row in found["rows"])

    # killed: what is left of the records is enough to end with the same numbers
    for path in (tmp_path / "a" / "records").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "a" / "results.json").unlink()
    again = results(capsys, vqa(pope, vlm_folder, tmp_path / "a", *methods))
    assert numbers(again) == numbers(found)

    # a row more costs that row alone, and another evaluation does not get into the folder
    code, out, _ = run(capsys, *vqa(pope, vlm_folder, tmp_path / "a", "--method", "hired budget=0.25"))
    assert code == 0
    assert "paper says" in out
    assert "hired budget=0.25" in out
    assert "time of this run" not in out  # all was recorded
    line = refused(capsys, *vqa(pope, vlm_folder, tmp_path / "a", "--limit", "4"))
    assert "another evaluation" in line
    assert "--fresh" in line


def test_a_killed_run_goes_on(pope: Path, vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ("--method", "random_tokens budget=36", "--method", "hired budget=0.25")
    whole = results(capsys, vqa(pope, vlm_folder, tmp_path / "whole", *methods))
    argv = vqa(pope, vlm_folder, tmp_path / "parts", *methods)
    assert 7 <= kill_midway(argv, tmp_path / "parts", "tokred.eval.vqa_hosts:generated", 7) < 30
    again = results(capsys, argv)
    assert lines(tmp_path / "parts") == 30
    assert numbers(again) == numbers(whole)


@pytest.mark.parametrize("batch", ["1", "3"])
def test_a_patch_for_several_batches_answers_as_one_for_each(
    pope: Path, vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], batch: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from tokred.eval import vqa as module

    methods = ["hired budget=0.25", "random_tokens budget=36", "fastv budget=36 layer=3", "mustdrop"]
    options = [part for one in methods for part in ("--method", one)] + ["--batch", batch]
    patches = []
    real = module.VLMHost.under

    def under(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        patches.append(method)
        return real(self, method, *args, **kwargs)

    monkeypatch.setattr(module.VLMHost, "under", under)
    found = results(capsys, vqa(pope, vlm_folder, tmp_path / "several", *options))
    several = len(patches)
    monkeypatch.setattr(module, "TOGETHER", 1)
    each = results(capsys, vqa(pope, vlm_folder, tmp_path / "each", *options))
    assert numbers(found) == numbers(each)
    assert several < len(patches) - several


def test_two_processes_give_the_numbers_of_one(
    pope: Path, vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate")
    alone = results(capsys, vqa(pope, vlm_folder, tmp_path / "one", "--method", "random_tokens budget=36"))
    argv = vqa(pope, vlm_folder, tmp_path / "two", "--method", "random_tokens budget=36")
    together = two_processes(argv, tmp_path)
    assert (together["processes"], alone["processes"]) == (2, 1)
    assert numbers(together) == numbers(alone)
    ranks = [path.name.split(".")[-2] for path in (tmp_path / "two" / "records").iterdir() if path.stat().st_size]
    assert sorted(ranks) == ["0", "0", "1", "1"]


def test_other_weights_do_not_go_on_with_a_run(
    pope: Path, vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same folder, of which one number has changed."""
    import shutil

    from transformers import AutoModelForImageTextToText

    folder = shutil.copytree(vlm_folder, tmp_path / "model")
    results(capsys, vqa(pope, folder, tmp_path / "out", "--limit", "2"))
    results(capsys, vqa(pope, folder, tmp_path / "out", "--limit", "2"))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    next(model.parameters()).data.view(-1)[1] += 0.001
    model.save_pretrained(folder)
    argv = vqa(pope, folder, tmp_path / "out", "--limit", "2")
    assert "differs in weights (there " in refused(capsys, *argv)
    results(capsys, [*argv, "--fresh"])


def test_other_pictures_do_not_go_on_with_a_run(
    pope: Path, vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same questions about another file of that name, or about files of other names; a folder may be moved."""
    import shutil

    argv = vqa(pope, vlm_folder, tmp_path / "out", "--limit", "4")
    first = results(capsys, argv)
    moved = shutil.copytree(pope, tmp_path / "moved")
    argv = vqa(moved, vlm_folder, tmp_path / "out", "--limit", "4")
    assert results(capsys, argv)["rows"] == first["rows"]
    Image.effect_noise((90, 90), 99).convert("RGB").save(moved / "1.png")
    line = refused(capsys, *argv)
    assert f"{moved / '1.png'} has " in line
    assert "--fresh" in line
    (moved / "1.png").unlink()
    (moved / "1.jpg").write_bytes((pope / "1.png").read_bytes())
    rows = (moved / "coco_pope_random.json").read_text()
    (moved / "coco_pope_random.json").write_text(rows.replace("1.png", "1.jpg"))
    assert "differs in digest (there " in refused(capsys, *argv)
    assert results(capsys, [*argv, "--fresh"])["rows"][0]["metrics"] == first["rows"][0]["metrics"]


def test_videos_and_quota(vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokred.zoo.digit_vlm import digit_video_vlm

    model = saved(tmp_path / "model", *digit_video_vlm(vlm_folder))
    rows = []
    for i in range(3):
        folder = tmp_path / "videos" / f"v{i}"
        folder.mkdir(parents=True)
        for frame in range(6 if i else 3):
            Image.effect_noise((96, 96), 20 + 30 * frame).convert("RGB").save(folder / f"{frame}.png")
        options = {"candidates": ["red", "4"], "answer": "4", "question_type": "count" if i else "order"}
        rows.append({"video": f"v{i}", "question": QUESTIONS[i], **options})
    (tmp_path / "mlvu").mkdir()
    (tmp_path / "mlvu" / "1.json").write_text(json.dumps(rows))
    found = results(
        capsys,
        [
            "eval", "vqa", "--benchmark", "mlvu", "--data", str(tmp_path / "mlvu"),
            "--videos", str(tmp_path / "videos"),
            "--model", str(model), "--prompt", PROMPT, "--instruction", "", "--batch", "3", "--tokens", "2",
            "--frames", "2", "--method-frames", "4", "--method", "quota budget=72", "--scorer", "equal",
            "--device", "cpu", "--out", str(tmp_path / "out"),
        ],
    )  # fmt: skip
    plain, quota = found["rows"]
    assert plain["visual_tokens"] == 72
    assert quota["visual_tokens"] <= 72
    assert next(iter(plain["metrics"])) == plain["main"] == "M-Avg"
    parts = [plain["metrics"][name]["value"] for name in ("count", "order")]
    assert plain["metrics"]["M-Avg"]["value"] == pytest.approx(sum(parts) / 2)
    assert found["frames"] == {"unpatched": 2, "methods": 4}


def test_what_vqa_refuses(pope: Path, vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"

    def line(*argv: str) -> str:
        return refused(capsys, "eval", "vqa", "--out", str(out), *argv)

    assert "did you mean 'textvqa'" in line("--benchmark", "text-vqa")
    assert "--data is missing" in line("--benchmark", "pope")
    assert "leave it away" in line("--data", str(pope))
    assert "belongs to --data" in line("--images", str(pope))
    assert "is not a folder" in line("--benchmark", "pope", "--images", str(tmp_path / "none"))
    assert "--model is missing" in line("--benchmark", "pope", "--data", str(pope), "--images", str(pope))
    assert "did you mean 'hired'" in refused(capsys, *vqa(pope, vlm_folder, out, "--method", "hird"))
    assert "does not fit this model" in refused(capsys, *vqa(pope, vlm_folder, out, "--method", "tome_sd"))
    assert "budget='much'" in refused(capsys, *vqa(pope, vlm_folder, out, "--method", "hired budget=much"))
    assert "budget=1.5" in refused(capsys, *vqa(pope, vlm_folder, out, "--method", "hired budget=1.5"))
    assert "parameters by name" in refused(capsys, *vqa(pope, vlm_folder, out, "--method", "hired:0.2"))
    assert "--scorer is for QuoTA" in refused(capsys, *vqa(pope, vlm_folder, out, "--scorer", "equal"))
    assert "expected at least 1" in refused(capsys, *vqa(pope, vlm_folder, out, "--limit", "0"))
    without = [part for part in vqa(pope, vlm_folder, out) if part not in ("--prompt", PROMPT)]
    assert "give one with --prompt" in refused(capsys, *without)
    assert "{question}" in refused(capsys, *without, "--prompt", "Q")
    assert "hub cannot be reached" in refused(
        capsys, *[part.replace(str(vlm_folder), "nobody/nothing") for part in vqa(pope, vlm_folder, out)]
    )
    assert not list(tmp_path.rglob("results.json"))


GOOD = {"question_id": 1, "image": "0.png", "text": "is there a 4 ?", "label": "yes"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("text.json", b"hello", "line 1: no JSON: column 1"),
        ("table.csv", b"a,b\n1,2\n", "no JSON: line 1, column 1"),
        ("bytes.json", bytes(range(128, 256)), "is no text"),
        ("bytes.jsonl", b"\x80\n", "is no text"),
        ("archive.tar", b"\x89PNG", "is no text"),
        ("rows.parquet", b"x", "is no parquet file"),
        ("empty.jsonl", b"", "no question of POPE is in it; it is read from coco_pope_"),
        ("list.jsonl", b"[1, 2]\n", "line 1 is [1, 2], expected an object"),
        ("less.jsonl", json.dumps({**GOOD, "label": None}).encode(), "line 1: there is no field 'label'"),
        ("kind.jsonl", json.dumps({**GOOD, "image": 3}).encode(), "line 1: 'image' is 3, expected a file's name"),
        ("lost.jsonl", json.dumps({**GOOD, "image": "9.png"}).encode(), "asks about a picture that is not in"),
    ],
)
def test_files_of_another_format(
    pope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, says: str
) -> None:
    """Refused with the file's name before a model is looked for."""
    (tmp_path / name).write_bytes(content)
    argv = vqa(pope, tmp_path / "no-model", tmp_path / "out", "--data", str(tmp_path / name))
    line = refused(capsys, *argv)
    assert name in line
    assert says in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--subtitles", "."], "is of Video-MME"),
        (["--videos", "."], "is of benchmarks about videos"),
        (["--frames", "8"], "is of videos"),
        (["--config", "x"], "is of data sets of the hub"),
        (["--split", "val"], "is of data sets"),
        (["--annotations", "none.json"], "is no file"),
        (["--data", "nobody/nothing"], "hub cannot be reached"),
        (["--batch", "0"], "--batch 0: expected at least 1"),
        (["--tokens", "0"], "--tokens 0"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--device", "gpu"], "expected cpu, cuda or cuda:N"),
        (["--out", "/proc/none/out"], "--out /proc/none/out cannot be made"),
        (["--out", __file__], "is a file, and records go into a folder"),
        (["--model", "digit-video-vlm"], "is not made for images"),
        (["--model", "."], "no config.json"),
        (["--method", "quota budget=36", "--scorer", "nobody/nothing"], "hub cannot be reached"),
    ],
)
def test_options_that_cannot_be(
    pope: Path, vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    assert says in refused(capsys, *vqa(pope, vlm_folder, tmp_path / "out", *argv))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "says"), [(None, "is not in"), (b"", "v.mp4"), (b"no video", "v.mp4"), ("folder", "has no frames")]
)
def test_videos_that_cannot_be_read(
    vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | str | None, says: str
) -> None:
    pytest.importorskip("av")
    row = {"video": "v", "question": "Q", "candidates": ["x", "y"], "answer": "y", "question_type": "count"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    videos = tmp_path / "videos"
    videos.mkdir()
    if content == "folder":
        (videos / "v").mkdir()
    elif content is not None:
        (videos / "v.mp4").write_bytes(content)  # type: ignore[arg-type]
    line = refused(
        capsys, "eval", "vqa", "--benchmark", "mlvu", "--data", str(tmp_path / "rows.json"), "--videos", str(videos),
        "--model", str(vlm_folder), "--prompt", PROMPT, "--device", "cpu", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert says in line
    assert not (tmp_path / "out" / "results.json").exists()


def test_an_unreadable_picture_stops_the_run_and_keeps_the_answers(
    pope: Path, vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    data = shutil.copytree(pope, tmp_path / "data")
    whole = (data / "4.png").read_bytes()
    (data / "4.png").write_bytes(whole[:100])
    argv = vqa(data, vlm_folder, tmp_path / "out")
    assert "4.png cannot be read as a picture" in refused(capsys, *argv)
    assert not (tmp_path / "out" / "results.json").exists()
    (data / "4.png").write_bytes(whole)
    found = results(capsys, argv)
    assert found["questions"] == 10


def test_the_bundled_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("sklearn", "skimage"):
        pytest.importorskip(package)
    found = results(capsys, ["eval", "vqa", "--limit", "8", "--method", "hired budget=0.25", "--out", str(tmp_path)])
    plain, hired = found["rows"]
    assert plain["metrics"]["accuracy"]["value"] >= 0.5  # 88.8 % on a thousand
    assert (plain["visual_tokens"], hired["visual_tokens"]) == (144, 36)
    assert {"count", "side", "exists"} <= set(plain["metrics"])


# -- needle ------------------------------------------------------------------------------------------------------------


def test_needles_of_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", "needle", "--lengths", "96,128", "--depths", "3", "--samples", "2", "--out", str(tmp_path)]
    found = results(capsys, argv)
    plain, gemfilter = found["rows"]
    assert found["prompts"] == 12
    assert plain["tokens"] == (96 + 128) / 2 + 4
    assert gemfilter["tokens"] == 64
    assert gemfilter["metrics"]["recall"]["value"] >= 0.75  # 100 % on 500 prompts
    assert set(plain["grid"]) == {"96", "128"}
    assert list(plain["grid"]["96"]) == ["0 %", "50 %", "100 %"]
    assert plain["metrics"]["recall"]["value"] == pytest.approx(
        sum(value for by in plain["grid"].values() for value in by.values()) / 6
    )
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "by length and depth" in out


def test_needles_stand_at_their_depth() -> None:
    from tokred.eval.needle_eval import LLMHost, NeedleOptions, haystack_cases

    class Config:
        max_position_embeddings = 2048

    class Model:
        config = Config()

    options = NeedleOptions(Path(), lengths=(121,), depths=5, samples=2)
    for case in haystack_cases(options, LLMHost("needle-llm", Model(), None)):
        words = case.prompt[slice(*case.context)].split()
        place = next(i for i in range(0, 120, 6) if words[i : i + 6] == case.right[0].split())
        assert place / 6 == round(float(case.kinds["depth"].rstrip(" %")) / 100 * 19)
        assert case.prompt.split()[120:] == case.right[0].split()[:4]
        assert words[place + 4] == case.right[1]
        assert len(words) == 120


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, whose words are those of the data here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tokred.eval.needle_eval import NEEDLE, QUESTION, _filler
    from tokred.eval.needle_eval import PROMPT as HAYSTACK
    from tokred.zoo.words import word_tokenizer

    words = dict.fromkeys(f"{HAYSTACK} {NEEDLE} {QUESTION} {_filler(0)}".split())
    ids = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "<pad>", *words])}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(ids), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=3,
    )  # fmt: skip
    return saved(tmp_path_factory.mktemp("llm"), LlamaForCausalLM(config), word_tokenizer(ids, 512))


def test_needles_of_any_model(llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "eval", "needle", "--model", str(llm), "--lengths", "100,150", "--depths", "3", "--tokens", "3",
        "--method", "gemfilter k=40 layer=1", "--method", "fastv budget=20", "--device", "cpu", "--out", str(tmp_path),
    ]  # fmt: skip
    found = results(capsys, argv)
    plain, gemfilter, fastv = found["rows"]
    assert plain["tokens"] == pytest.approx(125, abs=4)
    assert gemfilter["tokens"] == 40
    assert fastv["tokens"] < 60  # 20 of the long part, and the rest of the prompt
    assert plain["main"] == "ROUGE-1"
    assert "found" in plain["metrics"]


def test_longbench_of_any_model(llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"context": "stood came {went} saw " * 200, "answers": ["saw", "came"], "all_classes": None, "_id": "1"}
    (tmp_path / "data").mkdir()
    for name in ("qasper", "gov_report"):
        text = json.dumps({**rows, "input": "old new ?", "dataset": name})
        (tmp_path / "data" / f"{name}.jsonl").write_text(text + "\n")
    argv = ["eval", "needle", "--benchmark", "longbench", "--data", str(tmp_path / "data"), "--model", str(llm)]
    argv += ["--tokens", "3", "--max-length", "200", "--device", "cpu", "--out", str(tmp_path / "out")]
    found = results(capsys, argv)
    (plain,) = found["rows"]
    assert 150 < plain["tokens"] <= 200
    assert list(plain["metrics"]) == ["average", "gov_report", "qasper"]
    parts = [plain["metrics"][name]["value"] for name in ("gov_report", "qasper")]
    assert plain["metrics"]["average"]["value"] == pytest.approx(sum(parts) / 2)


def test_a_patch_for_several_batches_of_needles(
    llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokred.eval import needle_eval

    argv = [
        "eval", "needle", "--model", str(llm), "--lengths", "100,120", "--depths", "3", "--tokens", "2", "--batch", "1",
        "--method", "gemfilter k=40 layer=1", "--method", "fastv budget=20", "--device", "cpu", "--out",
    ]  # fmt: skip
    several = results(capsys, [*argv, str(tmp_path / "several")])
    monkeypatch.setattr(needle_eval, "TOGETHER", 1)
    each = results(capsys, [*argv, str(tmp_path / "each")])
    for one, other in zip(several["rows"], each["rows"], strict=True):
        assert {**one, "seconds_per_prompt": 0} == {**other, "seconds_per_prompt": 0}


def test_a_killed_needle_run_goes_on(llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "eval", "needle", "--model", str(llm), "--lengths", "100", "--depths", "4", "--samples", "3", "--tokens", "2",
        "--batch", "2", "--method", "gemfilter k=40 layer=1", "--device", "cpu", "--out",
    ]  # fmt: skip
    whole = results(capsys, [*argv, str(tmp_path / "whole")])
    parts = tmp_path / "parts"
    assert 5 <= kill_midway([*argv, str(parts)], parts, "tokred.eval.needle_eval:generated", 5) < 24
    again = results(capsys, [*argv, str(parts)])
    assert lines(parts) == 24
    for one, other in zip(again["rows"], whole["rows"], strict=True):
        assert {**one, "seconds_per_prompt": 0} == {**other, "seconds_per_prompt": 0}
    together = two_processes([*argv, str(tmp_path / "two")], tmp_path)
    assert [row["metrics"] for row in together["rows"]] == [row["metrics"] for row in whole["rows"]]

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llm)
    next(model.parameters()).data[0, 0] += 0.001
    other = saved(tmp_path / "other", model)
    for path in llm.glob("token*"):
        (other / path.name).write_bytes(path.read_bytes())
    argv[argv.index("--model") + 1] = str(other)
    line = refused(capsys, *argv, str(parts))
    assert "model (there " in line
    assert "weights (there " in line


def test_what_needle_refuses(llm: Path, vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line(*argv: str) -> str:
        return refused(capsys, "eval", "needle", "--out", str(tmp_path / "out"), *argv)

    assert "did you mean 'longbench'" in line("--benchmark", "longbnch")
    assert "does not take it" in line("--data", str(tmp_path))
    assert "--data is missing" in line("--benchmark", "longbench", "--model", str(llm))
    assert "is not there" in line("--benchmark", "longbench", "--model", str(llm), "--data", str(tmp_path / "none"))
    assert "goes with all of" in line("--model", str(llm), "--needle", "x")
    assert "reads 2048 tokens" in line("--lengths", "4000")
    assert "whole numbers" in line("--lengths", "many")
    assert "words of its own haystacks" in line("--haystack", str(tmp_path))
    assert "expected a text file" in line("--model", str(llm), "--lengths", "100", "--haystack", str(tmp_path))
    assert "does not fit" in line("--method", "hired")
    assert "did you mean 'needle-llm'" in line("--model", "needle_llm")
    assert "no config.json" in line("--model", str(tmp_path))
    assert "hub cannot be reached" in line("--model", "nobody/nothing")
    assert "cannot be loaded as a causal language model" in line("--model", str(vlm_folder))
    assert "taught no conversations" in line("--chat")
    assert "does not take it" in line("--benchmark", "longbench", "--depths", "3", "--data", str(tmp_path))
    assert "k=0" in line("--method", "gemfilter k=0")
    assert "parameters by name" in line("--method", "gemfilter:64")
    assert "--batch 0" in line("--batch", "0")
    for name, content, says in (
        ("a.jsonl", b"\x80\n", "line 1 is no text"),
        ("b.csv", b"a,b\n", "no JSON"),
        ("qasper.jsonl", b'{"input": "x", "answers": ["a"]}', "no field 'context'"),
        ("dureader.jsonl", b'{"input": "x", "context": "y", "answers": ["a"]}', "no LongBench data set 'dureader'"),
    ):
        (tmp_path / name).write_bytes(content)
        said = line("--benchmark", "longbench", "--model", "no-model", "--data", str(tmp_path / name))
        assert says in said
        assert name in said
    assert not (tmp_path / "out").exists()
