"""`tokred encode`, `decode`, `eval reconstruct`, `bench --task tokenize`, and the bundled tokenizers. Random models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokred.zoo
from tests.cli.test_cli import refused, run

pytest.importorskip("diffusers")
pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from tests.cli.tiny_tokenizers import make_flextok, save_zoo
from tokred.core.errors import InvalidParameterError
from tokred.eval import bench_tokenize, token_files
from tokred.generation.images import to_pil, to_pixels
from tokred.generation.packing import load_tokens, save_tokens
from tokred.zoo import tokenizers as zoo


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.effect_noise((40, 32), 60).convert("RGB").save(path)
    return str(path)


# -- encode and decode -------------------------------------------------------------------------------------------------


def test_ids_there_and_back(capsys: pytest.CaptureFixture[str], root: Path, picture: str, tmp_path: Path) -> None:
    model, out = str(root / "tiny_flextok"), tmp_path / "new" / "card.ftk"
    code, text, err = run(capsys, "encode", picture, "-o", str(out), "--model", model, "--num-tokens", "3", "--json")
    assert code == 0, err
    found = json.loads(text)
    flextok = zoo.tiny_flextok(root / "tiny_flextok")
    with Image.open(picture) as image:
        ids = flextok.encode(image)[0, :3]
        wanted = to_pil(to_pixels(image, 32))[0]
    held = load_tokens(out, fingerprint=zoo.fingerprint(root / "tiny_flextok"))
    assert torch.equal(held.tokens, ids)
    assert (found["bytes"], found["payload_bytes"], found["tokens"]) == (20, 3, [3])
    assert [one["format"] for one in found["compared"]] == ["JPEG", "WEBP"]
    for one in found["compared"]:
        assert (one["psnr"] >= found["psnr"]) == (one["reached"] != "none")
    code, text, err = run(capsys, "decode", str(out), "-o", str(tmp_path / "again.png"), "--model", model)
    assert code == 0, err
    assert "3 tokens" in text
    pixels = flextok.decode(ids[None], guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
    with Image.open(tmp_path / "again.png") as again:
        assert again.tobytes() == to_pil(pixels)[0].tobytes()
        assert token_files._psnr(again, wanted) == pytest.approx(found["psnr"])
    further = ["--steps", "2", "--guidance", "2", "--seed", "5", "--num-tokens", "1", "--json"]
    code, text, err = run(capsys, "decode", str(out), "-o", str(tmp_path / "one.jpg"), "--model", model, *further)
    assert code == 0, err
    assert json.loads(text)["tokens"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"new", "again.png", "one.jpg"}


def test_latents_there_and_back(capsys: pytest.CaptureFixture[str], root: Path, picture: str, tmp_path: Path) -> None:
    model, out = str(root / "tiny_textok"), tmp_path / "card.safetensors"
    argv = ["encode", picture, "-o", str(out), "--model", model, "--caption", "a red square"]
    code, text, err = run(capsys, *argv)
    assert code == 0, err
    assert "4 x 8 numbers" in text
    assert "JPEG needs" in text
    assert load_tokens(out).caption == "a red square"
    code, text, err = run(capsys, "decode", str(out), "-o", str(tmp_path / "again.png"), "--model", model)
    assert code == 0, err
    assert "'a red square'" in text
    assert "does not sample" in refused(
        capsys, "decode", str(out), "-o", str(tmp_path / "x.png"), "--model", model, "--steps", "3"
    )
    twin = str(root / "tiny_textok_no_text")
    assert "was made by" in refused(capsys, "decode", str(out), "-o", str(tmp_path / "x.png"), "--model", twin)
    code, _, err = run(capsys, "encode", picture, "-o", str(out), "--model", twin, "--no-compare")
    assert code == 0, err
    assert load_tokens(out).caption is None


@pytest.mark.parametrize(("name", "kept", "count"), [("tokenflow", 5, 21), ("vq", None, 16)])
def test_codes_there_and_back(
    capsys: pytest.CaptureFixture[str], root: Path, picture: str, tmp_path: Path, name: str, kept: int, count: int
) -> None:
    model, out = str(root / f"tiny_{name}"), tmp_path / "card.ftk"
    code, text, err = run(capsys, "encode", picture, "-o", str(out), "--model", model, "--json")
    assert code == 0, err
    assert json.loads(text)["tokens"] == [count]
    tokenizer, made_by = zoo.open_tokenizer(model)
    with Image.open(picture) as image:
        wanted = tokenizer.encode(to_pixels(image, 32))[0]
    held = load_tokens(out, fingerprint=made_by)
    assert torch.equal(held.tokens, wanted)
    again = tmp_path / "again.png"
    further = [] if kept is None else ["--num-tokens", str(kept)]
    code, text, err = run(capsys, "decode", str(out), "-o", str(again), "--model", model, *further, "--json")
    assert code == 0, err
    assert json.loads(text)["tokens"] == (kept or count)
    with Image.open(again) as found:
        assert found.tobytes() == to_pil(tokenizer.decode(wanted[None, :kept]))[0].tobytes()
    for option in ("--steps", "--seed"):
        assert "does not sample" in refused(
            capsys, "decode", str(out), "-o", str(tmp_path / "x.png"), "--model", model, option, "3"
        )
    says = "always takes 16" if kept is None else "3"
    assert says in refused(capsys, "encode", picture, "-o", str(out), "--model", model, "--num-tokens", "3")
    code, out_text, err = run(
        capsys, "eval", "reconstruct", "--model", model, "--count", "3", "--batch", "2", "--out", str(tmp_path)
    )
    assert code == 0, err
    assert ("up to 4 x 4" if kept else "16 codes") in out_text
    assert ("Paper says" in out_text) == (name == "tokenflow")


def test_a_tokenflow_and_its_pipeline_are_one_tokenizer(root: Path, tmp_path: Path) -> None:
    tokenizer, made_by = zoo.open_tokenizer(str(root / "tiny_tokenflow"))
    tokenizer.save_pretrained(tmp_path / "alone")
    again, same = zoo.open_tokenizer(str(tmp_path / "alone"))
    assert type(again) is type(tokenizer)
    assert same == made_by
    assert zoo.open_tokenizer(str(root / "tiny_vq"))[1] != made_by


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["missing.png"], "no picture at"),
        (["IMAGE", "--model", "nonsense"], "expected flextok, textok, tokenflow, vq, or the folder"),
        (["IMAGE", "--model", "ROOT"], "model_index.json is missing"),
        (["IMAGE", "--num-tokens", "5"], "num_tokens=5: expected a whole number from 1 to 4"),
        (["IMAGE", "--num-tokens", "0"], "num_tokens=0"),
        (["IMAGE", "--caption", "a dog"], "reads no text"),
        (["IMAGE", "--model", "ROOT/tiny_textok", "--num-tokens", "2"], "always takes 4"),
        (["IMAGE", "--model", "ROOT/tiny_textok", "--caption", "a dog " * 20], "the limit is 12"),
        (["IMAGE", "--model", "ROOT/tiny_textok_no_text", "--caption", "a dog"], "without text"),
    ],
)
def test_encode_refuses(
    capsys: pytest.CaptureFixture[str], argv: list[str], says: str, root: Path, picture: str, tmp_path: Path
) -> None:
    given = [picture if word == "IMAGE" else word.replace("ROOT", str(root)) for word in argv]
    if "--model" not in given:
        given += ["--model", str(root / "tiny_flextok")]
    assert says in refused(capsys, "encode", *given, "-o", str(tmp_path / "new" / "card.ftk"))
    assert list(tmp_path.iterdir()) == []


def test_decode_refuses(capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path) -> None:
    made_by = zoo.fingerprint(root / "tiny_flextok")

    def file(name: str, tokens: torch.Tensor, **options: Any) -> str:
        path = tmp_path / name
        save_tokens(path, tokens, **{"fingerprint": made_by, "image_size": 32, "codebook_size": 40, **options})
        return str(path)

    good = file("good.ftk", torch.tensor([1, 2, 3]))
    cut = tmp_path / "cut.ftk"
    cut.write_bytes(Path(good).read_bytes()[:-2])
    text = tmp_path / "text.ftk"
    text.write_text("no tokens at all")
    out = tmp_path / "out" / "again.png"
    cases = [
        ([good, "-o", str(tmp_path / "again.nonsense")], "unknown file extension"),
        ([str(tmp_path / "none.ftk")], "No such file"),
        ([str(text)], "no token file"),
        ([str(cut)], "truncated: 2 of its 3 tokens are whole"),
        ([good, "--num-tokens", "9"], "num_tokens=9"),
        ([good, "--steps", "0"], "number of steps 0"),
        ([good, "--model", str(root / "tiny_textok")], "holds ids"),
        ([file("many.ftk", torch.arange(5))], "expected 1 to 4"),
        ([file("foreign.ftk", torch.tensor([1]), fingerprint="another")], "was made by the model with CRC"),
        ([file("large.ftk", torch.tensor([40]), codebook_size=64)], "there are only 40"),
        ([file("wide.ftk", torch.tensor([1]), image_size=64)], "64 x 64 pixels"),
    ]
    for argv, says in cases:
        given = argv if "-o" in argv else [*argv, "-o", str(out)]
        given = given if "--model" in given else [*given, "--model", str(root / "tiny_flextok")]
        assert says in refused(capsys, "decode", *given)
    assert not out.parent.exists()
    assert not list(tmp_path.glob("again*"))
    code, said, err = run(
        capsys, "decode", str(cut), "-o", str(out), "--model", str(root / "tiny_flextok"), "--allow-truncated"
    )
    assert code == 0, err
    assert "2 tokens, of a file that was cut short" in said
    assert out.is_file()


def test_as_good_is_the_lowest_quality_that_suffices() -> None:
    picture = Image.effect_noise((48, 48), 40).convert("RGB")
    for form, qualities in token_files.FORMATS.items():
        all_of_them = {quality: token_files.compressed(picture, form, quality) for quality in qualities}
        worst, best = all_of_them[qualities[0]][1], all_of_them[qualities[-1]][1]
        target = (worst + best) / 2
        found = token_files.as_good(picture, form, target)
        assert found["reached"] == "equal"
        assert (found["bytes"], found["psnr"]) == all_of_them[found["quality"]]
        assert found["psnr"] >= target > all_of_them[found["quality"] - 1][1]
        assert token_files.as_good(picture, form, worst - 1)["reached"] == "lowest"
        assert token_files.as_good(picture, form, best + 1)["reached"] == "none"
    assert token_files._psnr(picture, picture) == math.inf
    shifted = Image.fromarray(255 - (255 - torch.zeros(4, 4, 3, dtype=torch.uint8).numpy()) + 51)
    assert token_files._psnr(shifted, Image.new("RGB", (4, 4))) == pytest.approx(20 * math.log10(5))


# -- bench and eval ----------------------------------------------------------------------------------------------------


def test_bench(capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path) -> None:
    argv = ["bench", "--task", "tokenize", "--fast", "--scenes", "27", "--split", "val", "--checkpoint", str(root)]
    quick = [f"{name}.num_inference_steps=2" for name in ("reconstruct", "generate", "grid")]
    argv += [word for setting in quick for word in ("--set", setting)]
    code, out, err = run(capsys, *argv, "--json", "--out", str(tmp_path))
    assert code == 0, err
    results = json.loads(out)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    pictured = set(bench_tokenize.EXPERIMENTS) - {"questions"}
    assert set(results["files"]) == {"results"} | pictured
    for name in pictured:
        with Image.open(results["files"][name]) as sheet:
            assert sheet.width > 2 * 96
            assert sheet.height > 8 * 96
    found = results["experiments"]
    rows = found["reconstruct"]["rows"]
    assert [row["label"] for row in rows] == ["1 token", "4 tokens", "VAE alone"]
    assert [row["bytes"] for row in rows] == [6 / 8, 24 / 8, 4 * 16 * 16 * 4]
    rows = found["captions"]["rows"]
    labels = ["right caption", "wrong caption", "wrong in decoder", "no caption", "twin without text"]
    assert [row["label"] for row in rows] == labels
    for row in rows[1:]:
        assert row["vs_right"]["difference"] == pytest.approx(row["psnr"] - rows[0]["psnr"])
    assert rows[0]["bytes"] > rows[3]["bytes"] == 4 * 8 * 2
    assert [row["tokens"] for row in found["generate"]["rows"]] == [1, 4]
    assert found["generate"]["pictures"] == 27
    short, grid = found["grid"]["rows"]
    assert (short["tokens"], grid["tokens"]) == (4, 16)
    assert short["step_gmacs"] < grid["step_gmacs"]
    assert short["limit"] == pytest.approx(grid["gmacs"] / short["gmacs"])
    assert short["speedup"] > 0
    rows = found["scales"]["rows"]
    assert [(row["label"], row["tokens"]) for row in rows] == [
        ("up to 1 x 1", 1),
        ("up to 2 x 2", 5),
        ("up to 4 x 4", 21),
    ]
    assert all(0 <= row["drawn_agreement"] <= 1 for row in rows)
    assert [row["label"] for row in found["questions"]["rows"]] == ["both halves", "semantic half", "pixel half"]
    assert [row["steps"] for row in found["windows"]["rows"]] == [16, 4, 1]
    for name in set(found) - {"questions"}:
        for row in [*found[name]["rows"], found[name]["cards"]]:
            assert 0 <= row["agreement"] <= 1
    table = bench_tokenize.show(results)
    assert max(map(len, table.splitlines())) <= 120
    for name in (*map(str.upper, bench_tokenize.EXPERIMENTS), "the cards", "twin without text", "speed-up"):
        assert name in table


def test_bench_without_twin_and_grid(capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    (few / "tiny_textok").symlink_to(root / "tiny_textok", target_is_directory=True)
    argv = ["bench", "--task", "tokenize", "--fast", "--checkpoint", str(few), "--out", str(tmp_path / "out")]
    code, out, err = run(capsys, *argv, "--methods", "captions,grid", "--set", "grid.num_inference_steps=1", "--json")
    assert code == 0, err
    found = json.loads(out)["experiments"]
    assert [row["label"] for row in found["captions"]["rows"]][-1] == "no caption"
    assert [row["kind"] for row in found["grid"]["rows"]] == ["1-D"]
    assert "speedup" not in found["grid"]["rows"][0]
    assert "4 tokens of 8" in bench_tokenize.show(json.loads(out))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--methods", "caption"], "did you mean 'captions'"),
        (["--levels", "8"], "--levels 8: this FlexTok has 4 tokens"),
        (["--levels", "0.5"], "expected numbers of tokens"),
        (["--set", "generate.nonsense=1"], "no such setting"),
        (["--set", "grid.guidance_scale=much"], "expected a number"),
        (["--methods", "captions", "--set", "grid.guidance_scale=1"], "the experiments here are captions"),
        (["--ablate", "x"], "does not take it"),
        (["--context", "8"], "does not take it"),
        (["--checkpoint", "EMPTY"], "model_index.json is missing"),
    ],
)
def test_bench_refuses(
    capsys: pytest.CaptureFixture[str], argv: list[str], says: str, root: Path, tmp_path: Path
) -> None:
    weights = ["--checkpoint", str(root)] if "--checkpoint" not in argv else []
    given = [str(tmp_path) if word == "EMPTY" else word for word in argv]
    out = tmp_path / "out"
    assert says in refused(capsys, "bench", "--task", "tokenize", "--fast", *weights, *given, "--out", str(out))
    assert not out.exists()


def test_macs_are_those_of_the_products() -> None:
    linear = torch.nn.Linear(8, 16)
    assert bench_tokenize.macs(lambda: linear(torch.zeros(3, 8))) == 3 * 8 * 16
    q = torch.zeros(1, 2, 5, 4)  # two heads, 5 x 5 scores of width 4, then as much for the values
    attend = torch.nn.functional.scaled_dot_product_attention
    assert bench_tokenize.macs(lambda: attend(q, q, q)) == 2 * 2 * 5 * 5 * 4


def test_eval_reconstruct(capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path / "features", safe_serialization=True)
    argv = ["eval", "reconstruct", "--model", str(root / "tiny_flextok"), "--count", "5", "--batch", "3"]
    further = ["--steps", "2", "--num-tokens", "1,3", "--out", str(tmp_path), "--features", str(tmp_path / "features")]
    code, out, err = run(capsys, *argv, *further)
    assert code == 0, err
    for word in (
        "5 held-out pictures of cards",
        "1 token",
        "3 tokens",
        "VAE alone",
        "Paper says",
        "d18-d28",
        "1.45",
        "rFID:",
    ):
        assert word in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(row["rfid"] > 0 for row in results["rows"])
    assert results["decoder"] == {"steps": 2, "guidance": 1, "seed": 0}
    with Image.open(tmp_path / "pictures.png") as sheet:
        assert sheet.width > 4 * 112


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--count", "1"], "count=1"),
        (["--num-tokens", "1.5"], "whole numbers"),
        (["--num-tokens", "5"], "num_tokens=5"),
        (["--features", "nowhere"], "the folder of a timm model"),
        (["--data", "nowhere"], "no such folder"),
        (["--model", "nowhere"], "tokred eval reconstruct: error: no tokenizer 'nowhere'"),
    ],
)
def test_eval_refuses(
    capsys: pytest.CaptureFixture[str], argv: list[str], says: str, root: Path, tmp_path: Path
) -> None:
    model = ["--model", str(root / "tiny_flextok")] if "--model" not in argv else []
    out = tmp_path / "out"
    assert says in refused(capsys, "eval", "reconstruct", *model, *argv, "--out", str(out))
    assert not out.exists()


# -- the zoo -----------------------------------------------------------------------------------------------------------


def test_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [tmp_path / "vae", tmp_path / "flextok"]
    for number, folder in enumerate(runs):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"recipe": {"stage": number}}))
    (runs[0] / "model").mkdir()
    made = make_flextok(seed=3)
    made.save_pretrained(runs[1] / "model")
    into = tmp_path / "weights"
    folder = zoo.bundle("tiny-flextok", runs, into)
    assert {path.name for path in into.iterdir()} == {"tiny_flextok"}
    small, large = (sum(p.stat().st_size for p in zoo._weights(f)) for f in (folder, runs[1] / "model"))
    assert small < 0.6 * large
    again = zoo.tiny_flextok(folder)
    for name, value in made.model.state_dict().items():
        found = again.model.state_dict()[name]
        assert found.dtype == value.dtype
        torch.testing.assert_close(found, value, rtol=1e-3, atol=float(value.abs().max()) / 253)
    assert not again.model.training
    assert json.loads((folder / "training.json").read_text()) == [{"recipe": {"stage": i}} for i in range(2)]
    monkeypatch.setattr(zoo.folder_of, "__defaults__", (into,))
    card = zoo.tokenizer_card("tiny-flextok")
    state = [*made.model.state_dict().values(), *made.vae.state_dict().values()]
    assert card["weights"]["parameters"] == sum(value.numel() for value in state)
    assert {one["part"] for one in card["weights"]["files"]} == {"model", "vae"}
    zoo.bundle("tiny-flextok", runs[1:], into)  # another run takes its place
    assert len(json.loads((folder / "training.json").read_text())) == 1
    with pytest.raises(InvalidParameterError, match="no finished run"):
        zoo.bundle("tiny-flextok", [tmp_path], into)
    with pytest.raises(InvalidParameterError, match="tiny-flextok"):
        zoo.bundle("flextok", runs, into)
    with pytest.raises(FileNotFoundError, match=r"model_index.json is missing"):
        zoo.tiny_textok(tmp_path)


def test_what_another_model_holds_is_left_out(root: Path, tmp_path: Path) -> None:
    """A LLaVA of the tokenizer's codes is bundled without the tokenizer, and gets it back when it is loaded."""
    import shutil

    run_of = tmp_path / "run"
    run_of.mkdir()
    (run_of / "config.json").write_text("{}")
    shutil.copytree(root / "tiny_tokenflow_qa_both", run_of / "model")
    folder = zoo.bundle("tiny-tokenflow-qa-both", [run_of], tmp_path / "weights")
    from safetensors import safe_open

    with safe_open(next(folder.glob("*.safetensors")), "pt") as opened:
        assert not [name for name in opened.keys() if "vision_tower.tokenizer" in name]  # noqa: SIM118
    found = zoo.tiny_tokenflow_qa("both", folder, root / "tiny_tokenflow").state_dict()
    wanted = zoo.tiny_tokenflow_qa("both", root / "tiny_tokenflow_qa_both", root / "tiny_tokenflow").state_dict()
    for name, value in wanted.items():
        exact = "vision_tower.tokenizer" in name
        torch.testing.assert_close(found[name], value, rtol=0, atol=0 if exact else float(value.abs().max()) / 200)


def test_fingerprints_name_the_content(root: Path, tmp_path: Path) -> None:
    import shutil

    first = zoo.fingerprint(root / "tiny_flextok")
    copy = tmp_path / "copy"
    shutil.copytree(root / "tiny_flextok", copy)
    config = json.loads((copy / "model" / "config.json").read_text())
    (copy / "model" / "config.json").write_text(json.dumps(config | {"_diffusers_version": "99"}))
    assert zoo.fingerprint(copy) == first
    (copy / "model" / "config.json").write_text(json.dumps(config | {"max_timestep": 1.0}))
    assert zoo.fingerprint(copy) != first
    make_flextok(seed=1).save_pretrained(tmp_path / "other")
    assert zoo.fingerprint(tmp_path / "other") != first
    textok = zoo.fingerprint(root / "tiny_textok")
    shutil.copytree(root / "tiny_textok", tmp_path / "textok")
    shutil.rmtree(tmp_path / "textok" / "generator")
    assert zoo.fingerprint(tmp_path / "textok") == textok


@pytest.mark.parametrize("name", zoo.TOKENIZERS)
def test_bundled(name: str) -> None:
    folder = zoo.folder_of(name)
    if not folder.is_dir():
        pytest.skip(f"{folder.name} is not trained yet: python -m tokred.zoo.tokenizers bundles it")
    card = zoo.tokenizer_card(name)
    assert card["weights"]["parameters"] > 10_000
    assert sum(one["bytes"] for one in card["weights"]["files"]) < 6_000_000
    model = tokred.zoo.load(name)
    parts = [part for part in getattr(model, "components", {"model": model}).values() if hasattr(part, "parameters")]
    assert parts
    for part in parts:
        assert not part.training
        assert all(weight.dtype == torch.float32 for weight in part.parameters())
