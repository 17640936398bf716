"""The jobs behind the demo's tabs say what the library says, and refuse what they cannot use."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import tokred
from tokred.core.errors import InvalidParameterError, TokredError
from tokred.demo import ask, classify, codes, markup, recall
from tokred.demo.models import Shelf, Shelves
from tokred.demo.pictures import SHOWN, Stage, enlarged, open_upload

for package in ("timm", "transformers", "torchvision", "sklearn", "skimage"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def shelves():
    return Shelves()


@pytest.fixture(scope="module")
def scene():
    from tokred.data.scenes import DigitScenes

    return Image.fromarray(DigitScenes("test", seed=777).render(1).images[0].permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def asked():
    from tokred.data.questions import QuestionScenes

    batch = QuestionScenes("test", 777).batch(0, 1)
    return Image.fromarray(batch.images[0].permute(1, 2, 0).numpy()), batch.questions[0], batch.answers[0]


@pytest.fixture(scope="module")
def clip():
    from tokred.data.clips import DigitClips

    clip = DigitClips("test", 777, 64).clip(0, list(range(2, 64, 4)))
    return ask.Media(frames=clip.frames.permute(0, 2, 3, 1).numpy()), clip.question, clip.answer


# -- models ------------------------------------------------------------------------------------------------------------


def test_shelf_keeps_bundled_models_and_the_last_other():
    loaded = []
    shelf = Shelf(lambda name: loaded.append(name) or object(), ["mine"])
    for name in ("mine", "one", "one", "two", " mine ", "one"):
        with shelf.borrow(name):
            pass
    assert loaded == ["mine", "one", "two", "one"]
    with pytest.raises(InvalidParameterError, match="no model is named: choose mine"), shelf.borrow("  "):
        pass


def test_shelf_lends_a_model_to_one_job_at_a_time():
    shelf, inside, most = Shelf(lambda name: object(), ["mine"]), [], []

    def job() -> None:
        with shelf.borrow("mine"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=job) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


@pytest.mark.parametrize(
    ("kind", "name"), [("classifiers", "deit_small_patch16_224"), ("vlms", "llava-hf/llava-1.5-7b-hf")]
)
def test_hub_unreachable(shelves, monkeypatch, kind, name):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("tokred.eval.hub.getproxies", dict)
    began = time.perf_counter()
    shelf = getattr(shelves, kind)
    with (
        pytest.raises(InvalidParameterError, match=r"hub cannot be reached.*take a bundled model: digit"),
        shelf.borrow(name),
    ):
        pass
    assert time.perf_counter() - began < 30
    assert constants.HF_HUB_OFFLINE is False


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_uploads_are_read_or_refused(tmp_path, monkeypatch):
    path = tmp_path / "turned.jpg"
    picture = Image.new("RGB", (8, 4), "red")
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    picture.save(path, exif=exif)
    assert open_upload(path).size == (4, 8)
    Image.new("RGBA", (4, 4)).save(tmp_path / "clear.png")
    assert open_upload(tmp_path / "clear.png").mode == "RGB"
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InvalidParameterError, match=r"text\.png cannot be read as a picture: expected PNG"):
        open_upload(tmp_path / "text.png")
    with pytest.raises(InvalidParameterError, match="there is no picture yet"):
        open_upload(None)
    monkeypatch.setattr("tokred.demo.pictures.MOST_PIXELS", 31)
    with pytest.raises(InvalidParameterError, match="has 8 x 4 pixels; scale it below"):
        open_upload(path)


def test_a_cut_off_picture_is_refused(tmp_path):
    path = tmp_path / "half.png"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(InvalidParameterError, match="cannot be read as a picture"):
        open_upload(path)


@pytest.mark.parametrize("size", [(96, 96), (32, 20), (300, 100), (500, 10)])
def test_enlarged(size):
    found = enlarged(Image.new("RGB", size))
    assert max(found.size) == max(SHOWN, *size)
    assert abs(found.width / found.height - size[0] / size[1]) < 0.05 * size[0] / size[1]


def test_videos_are_refused(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(InvalidParameterError, match=r"text\.mp4 cannot be read as a video: expected MP4"):
        ask.open_video(tmp_path / "text.mp4")
    with pytest.raises(InvalidParameterError, match="there is no video yet"):
        ask.open_video(None)


def test_example_videos_come_back(tmp_path, clip):
    pytest.importorskip("av")
    from tokred.demo.samples import write_video

    frames = clip[0].frames
    write_video(tmp_path / "clip.mp4", frames)
    again = ask.open_video(tmp_path / "clip.mp4", len(frames)).frames
    assert again.shape == frames.shape
    assert np.abs(again.astype(int) - frames).mean() < 4  # of 255: compressed, the colours at half resolution


# -- classify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", classify.METHODS)
def test_classify_says_what_the_model_says(shelves, scene, name):
    with shelves.classifiers.borrow("digit-vit") as classifier:
        found = classify.classify(classifier, scene, name, 0.6, rounds=0)
        pixels = classifier.transform(scene)[None]
        with torch.inference_mode():
            plain = classifier.model(pixels).softmax(-1)[0]
            method = eval(f"tokred.{found.method}", {"tokred": tokred})
            with tokred.patch(classifier.model, method) as patch:
                reduced = classifier.model(pixels).softmax(-1)[0]
    for rows, chances in ((found.before, plain), (found.after, reduced)):
        assert [label for label, _ in rows] == [str(i) for i in chances.topk(5).indices.tolist()]
        assert [chance for _, chance in rows] == pytest.approx(chances.topk(5).values.tolist(), abs=1e-6)
    assert found.gmacs[1] / found.gmacs[0] == pytest.approx(0.6, abs=0.03)
    assert [stage.caption for stage in found.stages[1:]] == [
        f"after block {layer}: {left} tokens" for layer, left in patch.trace.counts
    ]
    assert found.speed is None
    assert all(stage.picture.size == (SHOWN, SHOWN) for stage in found.stages)


def test_classify_times_pairs(shelves, scene):
    with shelves.classifiers.borrow("digit-vit") as classifier:
        found = classify.classify(classifier, scene, "topk", 0.6, rounds=1)
    assert found.batch == 8
    assert found.speed is not None
    assert found.speed.images_per_s > 0


def test_classify_takes_other_classifiers(scene):
    from tokred.eval.classifiers import Choice, load_classifier

    classifier = load_classifier(Choice("deit_tiny_patch16_224", random=True))
    found = classify.classify(classifier, scene, "tome", 0.7, rounds=0)
    assert len(found.before) == 5
    assert found.before[0][0] != "class 0"  # names of ImageNet
    assert found.gmacs[1] < found.gmacs[0]


def test_classify_refuses(shelves, scene):
    with shelves.classifiers.borrow("digit-vit") as classifier:
        with pytest.raises(InvalidParameterError, match="hired is no method of this tab: choose topk"):
            classify.classify(classifier, scene, "hired", 0.6)
        with pytest.raises(TokredError):
            classify.classify(classifier, scene, "topk", 1.5)
        assert not hasattr(classifier.model, "_tokred")


# -- ask ---------------------------------------------------------------------------------------------------------------


def test_every_budgeted_method_is_offered(shelves):
    """The lists of the page are those of the methods that act there."""
    from tokred.eval.vlm import choosers, prompt_info

    tabs = ("image", ask.IMAGE_METHODS, "digit-vlm"), ("video", ask.VIDEO_METHODS, "digit-video-vlm")
    for kind, names, name in tabs:
        with shelves.vlms.borrow(name) as host:
            blank = np.zeros((2, 96, 96, 3), np.uint8)
            media = [[Image.fromarray(blank[0])]] if kind == "image" else []
            inputs = host.inputs([host.prompt("is there a 3 ?", [kind])], media, [] if media else [[blank]])
            layout = prompt_info(host.model, inputs).layouts[0]
        assert set(choosers(layout)) == set(names) - {"random_tokens"} - set(ask._INSIDE)


@pytest.mark.parametrize("name", ask.IMAGE_METHODS)
def test_ask_about_a_picture(shelves, asked, name):
    picture, question, answer = asked
    with shelves.vlms.borrow("digit-vlm") as host:
        (found,) = ask.ask(host, ask.Media(picture), question, [name], 0.25, rounds=0)
        assert "_tokred" not in host.model.__dict__
    assert found.before.text == answer
    assert found.before.tokens == 144
    assert abs(found.after.tokens - 36) <= (3 if name == "mustdrop" else 0)
    assert found.after.cache < found.before.cache
    assert found.after.gmacs < found.before.gmacs
    assert found.stages
    assert found.speedup is None
    if name != "random_tokens":
        assert found.after.text == answer


@pytest.mark.parametrize("name", ask.VIDEO_METHODS)
def test_ask_about_a_video(shelves, clip, name):
    media, question, answer = clip
    with shelves.vlms.borrow("digit-video-vlm") as host:
        (found,) = ask.ask(host, media, question, [name], 0.125, rounds=0)
    assert found.before.text == answer
    assert found.before.tokens == 576
    assert found.after.tokens <= 80
    assert found.after.cache < found.before.cache
    assert found.after.gmacs < found.before.gmacs
    assert len(found.stages) >= 1
    if name in ("quota", "pyramiddrop", "dart"):
        assert found.after.text == answer


def test_ask_times_and_compares(shelves, asked):
    picture, question, _ = asked
    with shelves.vlms.borrow("digit-vlm") as host:
        found = ask.ask(host, ask.Media(picture), question, ["hired", "gemfilter"], 0.1, rounds=1)
        alone = ask.ask(host, ask.Media(picture), question, ["gemfilter"], 0.1, rounds=0)
    assert [one.after.tokens for one in found] == [14, 14]
    assert found[1].after[:4] == alone[0].after[:4]
    assert all(one.speedup == one.before.seconds / one.after.seconds for one in found)
    assert [one.pairs for one in found] == [1, 1]
    assert alone[0].pairs == 0


def test_timed_runs_score_the_frames_anew(shelves, clip, monkeypatch):
    """A scorer remembers frames: a timed run that profits from an earlier one says nothing."""
    from tokred.adapters.scorers import OpenClipScorer

    scored = []
    embed = OpenClipScorer._embed_images
    monkeypatch.setattr(OpenClipScorer, "_embed_images", lambda self, given: scored.append(1) or embed(self, given))
    media, question, _ = clip
    with shelves.vlms.borrow("digit-video-vlm") as host:
        ask.ask(host, media, question, ["quota"], 0.1, rounds=0)  # now the demo's scorer knows these frames
        scored.clear()
        ask.ask(host, media, question, ["quota"], 0.1, rounds=2)
        assert len(scored) == 3  # two pairs, and the one before them that does not count


def test_keeping_everything_changes_nothing(shelves, asked):
    picture, question, _ = asked
    with shelves.vlms.borrow("digit-vlm") as host:
        (found,) = ask.ask(host, ask.Media(picture), question, ["hired"], 1, rounds=0)
    assert found.after._replace(gmacs=None) == found.before._replace(gmacs=None)  # scores are counted
    assert "kept every token" in found.notes[-1]


def test_questions_are_put_into_the_models_words(shelves, asked):
    picture, question, answer = asked
    with shelves.vlms.borrow("digit-vlm") as host:
        big = picture.resize((500, 300))  # uploads have any size
        loud = question.upper().replace(" ?", "?")
        (found,) = ask.ask(host, ask.Media(picture), f"  {loud} ", ["hired"], 0.5, rounds=0)
        assert found.before.text == answer
        assert not found.notes
        (found,) = ask.ask(host, ask.Media(big), "Where is Waldo", ["hired"], 0.5, rounds=0)
        assert "never taught: where, waldo" in found.notes[0]
        with pytest.raises(InvalidParameterError, match="there is no question yet"):
            ask.ask(host, ask.Media(picture), "  ", ["hired"], 0.5)
        with pytest.raises(InvalidParameterError, match="quota does not act on one image: choose cdpruner"):
            ask.ask(host, ask.Media(picture), question, ["quota"], 0.5)
        with pytest.raises(InvalidParameterError, match="expected above 0, up to 1"):
            ask.ask(host, ask.Media(picture), question, ["hired"], 0.0)


# -- long text ---------------------------------------------------------------------------------------------------------


def test_recall_marks_what_was_read(shelves):
    text, question, answer = recall.sample_text(0)
    with shelves.llms.borrow("needle-llm") as host:
        found = recall.recall(host, text, question, "gemfilter", 64, rounds=0)
        assert host.tokenizer(f"{text} {question}")["input_ids"].__len__() == found.before.tokens
    assert found.before.text == found.after.text == answer
    assert (found.before.tokens, found.after.tokens) == (516, 64)
    assert found.after.cache * 8 < found.before.cache * 1.01
    assert "".join(part for part, _ in found.words) == f"{text} {question}"
    marked = " ".join(part for part, kept in found.words if kept).split()
    assert len(marked) in (63, 64)  # <s> has no word
    assert answer in marked
    assert question.split()[2] in marked


def test_recall_of_random_words_and_whole_texts(shelves):
    text, question, _answer = recall.sample_text(1)
    with shelves.llms.borrow("needle-llm") as host:
        found = recall.recall(host, text, question, "random_prompt", 64, rounds=1)
        assert found.after.tokens == 64
        assert found.speedup is not None
        whole = recall.recall(host, text, question, "gemfilter", 4096, rounds=0)
        assert whole.after == whole.before
        assert "kept every token" in whole.notes[0]
        assert all(kept for _, kept in whole.words)
        other = recall.recall(
            host, "The cat sat. Key of Alice is tulip.", "key of Alice is?", "gemfilter", 16, rounds=0
        )
        assert "knows 227 words and not: cat, sat" in other.notes[0]
        assert other.before.text == "tulip"


def test_recall_refuses(shelves):
    with shelves.llms.borrow("needle-llm") as host:
        for text, question, what in (("", "key of alice is", "text"), ("the .", " ", "question")):
            with pytest.raises(InvalidParameterError, match=f"there is no {what} yet"):
                recall.recall(host, text, question, "gemfilter", 64)
        with pytest.raises(InvalidParameterError, match="fastv is no method of this tab"):
            recall.recall(host, "the .", "key of alice is", "fastv", 64)
        longest = host.model.config.max_position_embeddings
        with pytest.raises(InvalidParameterError, match=f"reads {longest}, the answer included"):
            recall.recall(host, "the " * longest, "key of alice is", "gemfilter", 64)


# -- tokenize ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card():
    pytest.importorskip("diffusers")
    from tokred.data.cards import DigitCards

    return Image.fromarray(DigitCards("test", seed=777).render(1).images[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("model", codes.TOKENIZERS)
def test_codes_there_and_back(card, tmp_path, model):
    span = codes.token_range(model)
    found = codes.encode(card, model, 6, "a red seven on dark blue , left", tmp_path)
    assert found.tokens == span.nearest(6) == min(span.lengths, key=lambda n: abs(n - 6))
    assert found.file.stat().st_size == found.found["bytes"]
    assert (found.found["caption"] is not None) == span.reads_text
    picture, said = codes.decode(found.file)
    assert said["model"] == model
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(found.chosen)).max() <= 1
    assert len({stage.caption for stage in found.stages}) == len(found.stages)


def test_old_token_files_go(card, tmp_path):
    first = codes.encode(card, "vq", 64, "", tmp_path).file
    second = codes.encode(card, "vq", 64, "", tmp_path).file
    assert first != second
    assert first.exists()
    os.utime(first.parent, (0, 0))
    codes.encode(card, "vq", 64, "", tmp_path)
    assert not first.exists()
    assert second.exists()


def test_codes_refuse(tmp_path):
    with pytest.raises(InvalidParameterError, match="no bundled tokenizer is called 'bpe': choose flextok"):
        codes.token_range("bpe")
    with pytest.raises(InvalidParameterError, match="there is no token file yet"):
        codes.decode(None)
    (tmp_path / "x.ftk").write_bytes(b"something else")
    with pytest.raises(TokredError):
        codes.decode(tmp_path / "x.ftk")


# -- markup ------------------------------------------------------------------------------------------------------------


def test_what_users_write_is_escaped():
    evil = "<script>alert('x')</script>"
    parts = [
        markup.answers(("a", "b"), (evil, evil)),
        markup.bars((evil, "b"), ([(evil, 0.5)], [])),
        markup.facts([evil], [[evil]]),
        markup.notes([evil]),
        markup.code(evil),
        markup.placeholder(evil),
        markup.passage([(evil, True), (evil, False)], "alert"),
        markup.passage([(evil, True)], evil),
        markup.figures([Stage(Image.new("RGB", (2, 2)), evil)]),
    ]
    for part in parts:
        assert "<script" not in part
        assert "alert" in part


def test_the_answer_is_marked_where_it_was_read():
    found = markup.passage([("no tulip ", False), ("a tulip here", True)], "tulip")
    assert found.count("tk-answer") == 1
    assert found.count("tulip") == 2
    assert "<mark></mark>" not in markup.passage([("tulip", True)], "tulip")
