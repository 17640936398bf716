"""Frame scorers and the decoupler, on tiny models with random weights: no network, no weights."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tokred.adapters import scorers
from tokred.adapters.scorers import (
    HFClipScorer,
    LVLMScorer,
    OpenClipScorer,
    answer_probability,
    default_scorer,
    strip_options,
)
from tokred.core.errors import InvalidParameterError, ScorerError
from tokred.core.scoring import Decoupled, Decoupler, FrameScorer, score_frames
from tokred.vlm.allocate import allocate, frame_weights
from tokred.vlm.decouple import LVLMDecoupler

SIDE = 16
WORDS = ["A", "B", "red", "cup", "dog", "where", "is", "the", "?", "Yes", "No", "question", "step", "1", ":", "yes"]


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    values = np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    return list(values)


def tokenize(texts: list[str]) -> torch.Tensor:
    """Eight ids a text, by its characters; the last is the end of the text."""
    rows = [[(sum(map(ord, text)) * (i + 3)) % 48 + 1 for i in range(7)] + [49] for text in texts]
    return torch.tensor(rows)


def preprocess(picture: Image.Image) -> torch.Tensor:
    assert picture.mode == "RGB"
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def open_clip_model(bias: float | None = None) -> Any:
    model = pytest.importorskip("open_clip.model", reason="needs open_clip")
    vision = model.CLIPVisionCfg(layers=2, width=16, head_width=8, patch_size=8, image_size=SIDE)
    text = model.CLIPTextCfg(context_length=8, vocab_size=50, width=16, heads=2, layers=1)
    return model.CLIP(12, vision, text, init_logit_bias=bias)


def open_clip_scorer(model: Any = None, **options: Any) -> OpenClipScorer:
    return OpenClipScorer(model or open_clip_model(), preprocess=preprocess, tokenizer=tokenize, **options)


class TextProcessor:
    """Half a processor: pictures and words to tensors."""

    def __call__(self, text: Any = None, images: Any = None, padding: Any = None, **options: Any) -> dict[str, Any]:
        if text is None:
            return {"pixel_values": torch.stack([preprocess(image) for image in images])}
        self.padding = padding
        ids = tokenize(text)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def hf_clip_scorer(kind: str = "clip", **options: Any) -> HFClipScorer:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text, vision = (
        {**size, "vocab_size": 50, "max_position_embeddings": 8},
        {**size, "image_size": SIDE, "patch_size": 8},
    )
    if kind == "clip":
        text |= {"eos_token_id": 49, "bos_token_id": 0, "pad_token_id": 1}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        return HFClipScorer(transformers.CLIPModel(config), TextProcessor(), **options)
    config = transformers.SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=vision)
    return HFClipScorer(transformers.SiglipModel(config), TextProcessor(), **options)


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} assistant :{% endif %}"
)


def tiny_lvlm(padding_side: str = "left") -> tuple[Any, Any]:
    """A LLaVA with random weights, and its processor with words as tokens."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {
        word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS, "user", "assistant"])
    }
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side=padding_side,
        chat_template=TEMPLATE,
    )
    images = transformers.CLIPImageProcessor(
        do_resize=False, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**size, image_size=SIDE, patch_size=8),
        text_config=transformers.LlamaConfig(
            **size, vocab_size=len(vocab), pad_token_id=0, bos_token_id=1, eos_token_id=2
        ),
        image_token_index=vocab["<image>"],
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(6)  # so that pictures matter to the answer
    return model, processor


SCORERS = {
    "open_clip": open_clip_scorer,
    "open_clip, sigmoid": lambda: open_clip_scorer(open_clip_model(-1.0), mode="sigmoid"),
    "transformers CLIP": hf_clip_scorer,
    "transformers SigLIP": lambda: hf_clip_scorer("siglip"),
    "LVLM": lambda: LVLMScorer(*tiny_lvlm()),
    "LVLM, yes_no": lambda: LVLMScorer(*tiny_lvlm(), prob_mode="yes_no"),
}
quiet = pytest.mark.filterwarnings("ignore:mode='sigmoid'")


@quiet
@pytest.mark.parametrize("name", SCORERS)
def test_scores_follow_the_frames(name):
    """Scores are in [0, 1], one a frame; frames in another order or other batches get the same; pictures matter."""
    scorer, frames = SCORERS[name](), pictures(7)
    assert isinstance(scorer, FrameScorer)
    scores = scorer(frames, "where is the cup ?")
    assert scores.shape == (7,)
    assert scores.dtype == torch.float64
    assert scores.device.type == "cpu"
    assert not scores.is_inference()
    assert 0 <= scores.min() < scores.max() <= 1
    assert torch.equal(score_frames(scorer, frames, "where is the cup ?"), scores)
    order = [3, 0, 6, 5, 1, 2, 4]
    permuted = scorer([frames[i] for i in order], "where is the cup ?")
    torch.testing.assert_close(permuted, scores[order], atol=1e-5, rtol=1e-4)
    scorer.batch, scorer._results = 3, {}
    getattr(scorer, "_embeddings", {}).clear()
    torch.testing.assert_close(scorer(frames, "where is the cup ?"), scores, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(scorer(frames, "where is the dog ?"), scores)
    assert not torch.allclose(scorer(frames, "where is the cup ?", ["red dog"]), scores)


@quiet
@pytest.mark.parametrize("name", SCORERS)
def test_constant_frames_get_equal_weights(name):
    scores = SCORERS[name]()([pictures(1)[0]] * 5, "where is the cup ?")
    torch.testing.assert_close(frame_weights(scores), torch.full((5,), 0.2, dtype=torch.float64), atol=1e-6, rtol=0)
    assert allocate(scores.round(decimals=5), 5 * 9).tolist() == [9] * 5


@quiet
@pytest.mark.parametrize("name", SCORERS)
def test_frames_may_be_pictures_arrays_or_tensors(name):
    scorer, arrays = SCORERS[name](), pictures(3)
    scores = scorer(arrays, "red dog ?")
    calls = []
    score = scorer._score
    scorer._score = lambda *args: calls.append(args) or score(*args)
    for same in (
        [Image.fromarray(a) for a in arrays],
        [torch.from_numpy(a) for a in arrays],
        np.stack(arrays),
        torch.from_numpy(np.stack(arrays)),
    ):
        assert torch.equal(scorer(same, "red dog ?"), scores)
    assert not calls, "frames of one content and one question are scored once"
    scorer(arrays, "red cup ?")
    scorer(arrays[:2], "red dog ?")
    scorer(arrays, "red dog ?", ["cup"])
    assert len(calls) == 3
    scores.zero_()  # what a caller does to its scores stays with the caller
    assert scorer(arrays, "red dog ?").any()


@quiet
@pytest.mark.parametrize("name", SCORERS)
def test_scoring_leaves_the_model_alone(name):
    scorer = SCORERS[name]()
    scorer.model.train()
    part = next(module for module in scorer.model.modules() if not list(module.children()))
    part.eval()
    modes = [module.training for module in scorer.model.modules()]
    before = {name: value.clone() for name, value in scorer.model.state_dict().items()}
    scorer(pictures(2), "red dog ?")
    assert [module.training for module in scorer.model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in scorer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in scorer.model.parameters())
    copied = copy.deepcopy(scorer)
    assert torch.equal(copied(pictures(2), "red dog ?"), scorer(pictures(2), "red dog ?"))


def test_few_results_are_kept(monkeypatch):
    monkeypatch.setattr(scorers, "REMEMBERED", 2)
    monkeypatch.setattr(scorers, "REMEMBERED_VIDEOS", 1)
    scorer = open_clip_scorer()
    for seed in range(4):
        scorer(pictures(2, seed), "red dog ?")
    assert len(scorer._results) == 2
    assert len(scorer._embeddings) == 1


@pytest.mark.parametrize(
    ("frames", "query", "objects", "words"),
    [
        ([], "red ?", (), "frames is empty"),
        (pictures(2), "  ", (), "query is empty"),
        (pictures(2), None, (), "query=None"),
        (pictures(2), "red ?", "cup", "objects='cup'"),
        ([np.zeros((3, 8, 8), np.uint8)], "red ?", (), r"\(3, 8, 8\).*\(H, W, 3\)"),
        ([np.zeros((8, 8, 3))], "red ?", (), "float64.*uint8"),
        ([np.zeros((8, 8), np.uint8)], "red ?", (), r"\(8, 8\)"),
        (["picture.png"], "red ?", (), r"PIL image"),
    ],
)
def test_wrong_inputs_are_named(frames, query, objects, words):
    with pytest.raises(ScorerError, match=words):
        open_clip_scorer()(frames, query, objects)


# -- CLIP ------------------------------------------------------------------------------------------------------------


def test_clip_scores_are_the_definition():
    model = open_clip_model(-0.5).eval()
    frames, objects = pictures(5), ["red cup", "dog"]
    with torch.no_grad():
        images = F.normalize(model.encode_image(torch.stack([preprocess(Image.fromarray(f)) for f in frames])), dim=-1)
        texts = F.normalize(model.encode_text(tokenize(objects)), dim=-1)
        cosine = images @ texts.T
        probability = (cosine * model.logit_scale.exp() + model.logit_bias).sigmoid().max(dim=1).values.double()
    best = cosine.max(dim=1).values.double()
    want = 0.2 + 0.8 * (best - best.min()) / (best.max() - best.min())
    got = open_clip_scorer(model, floor=0.2)(frames, "what ?", objects)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="nearly all tokens"):
        scorer = open_clip_scorer(model, mode="sigmoid")
    torch.testing.assert_close(scorer(frames, "what ?", objects), probability, atol=1e-6, rtol=1e-5)


def test_clip_of_transformers_agrees_with_the_model_itself():
    scorer, frames = hf_clip_scorer(), pictures(4)
    inputs = {"input_ids": tokenize(["red cup", "dog"]), "pixel_values": torch.stack(
        [preprocess(Image.fromarray(f)) for f in frames]
    )}  # fmt: skip
    with torch.no_grad():
        logits = scorer.model.eval()(**inputs).logits_per_image.double()
    best = logits.max(dim=1).values
    want = 0.05 + 0.95 * (best - best.min()) / (best.max() - best.min())
    torch.testing.assert_close(scorer(frames, "?", ["red cup", "dog"]), want, atol=1e-4, rtol=1e-4)
    assert scorer.processor.padding is True


def test_siglip_of_transformers_agrees_with_the_model_itself():
    with pytest.warns(UserWarning, match="tiny"):
        scorer = hf_clip_scorer("siglip", mode="sigmoid")
    frames = pictures(4)
    images = torch.stack([preprocess(Image.fromarray(f)) for f in frames])
    with torch.no_grad():
        logits = scorer.model.eval()(input_ids=tokenize(["dog"]), pixel_values=images).logits_per_image
    torch.testing.assert_close(scorer(frames, "?", ["dog"]), logits.sigmoid()[:, 0].double(), atol=1e-6, rtol=1e-4)
    assert scorer.processor.padding == "max_length"


def test_options_are_checked():
    with pytest.raises(InvalidParameterError, match="preprocess and tokenizer"):
        OpenClipScorer(open_clip_model())
    with pytest.raises(InvalidParameterError, match=r"mode='sigmoid'.*no logit bias"):
        open_clip_scorer(mode="sigmoid")
    with pytest.raises(InvalidParameterError, match="mode='softmax'"):
        open_clip_scorer(mode="softmax")
    with pytest.raises(InvalidParameterError, match=r"floor=1.*\[0, 1\)"):
        open_clip_scorer(floor=1)
    with pytest.raises(InvalidParameterError, match="batch=0"):
        open_clip_scorer(batch=0)


@pytest.mark.parametrize(
    ("query", "stripped"),
    [
        ("What runs?\nA. a cat\nB. a dog\nAnswer with the letter.", "What runs?"),
        ("What runs? (A) a cat (B) a dog", "What runs?"),
        ("What runs?\n A) cat\n B) dog", "What runs?"),
        ("Who is A. Miller?", "Who is A. Miller?"),
        ("What runs?", "What runs?"),
        (" A. cat B. dog", " A. cat B. dog"),
    ],
)
def test_options_are_stripped(query, stripped):
    assert strip_options(query) == stripped


def test_clip_reads_the_question_without_its_options():
    scorer, frames = open_clip_scorer(), pictures(4)
    assert torch.equal(scorer(frames, "red dog ?"), scorer(frames, "red dog ?\nA. yes\nB. no"))


def test_a_model_by_name(monkeypatch):
    """What a name leads to in open_clip, without its weights."""
    calls = []

    def create(name, pretrained, device):
        calls.append((name, pretrained, device))
        return open_clip_model().train(), None, preprocess

    library = SimpleNamespace(create_model_and_transforms=create, get_tokenizer=lambda name: tokenize)
    monkeypatch.setattr(scorers, "_import_open_clip", lambda: library)
    scorer = default_scorer()
    assert calls == [("ViT-B-32", "laion2b_s34b_b79k", "cuda" if torch.cuda.is_available() else "cpu")]
    assert not scorer.model.training
    if not torch.cuda.is_available():
        assert scorer(pictures(3), "red dog ?").shape == (3,)


def test_the_default_scorer_says_what_can_be_given_instead(monkeypatch):
    pytest.importorskip("open_clip", reason="needs open_clip")
    choices = r"scorer=.*callable.*tensor.*OpenClipScorer\(model.*digit_clip"
    with pytest.raises(ScorerError, match=f"cannot be built.*{choices}"):
        default_scorer()  # no weights here, and no network
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ScorerError, match=rf"tokred\[openclip\].*{choices}"):
        default_scorer()
    with pytest.raises(ImportError, match=r"tokred\[openclip\]"):
        OpenClipScorer()


# -- LVLM ------------------------------------------------------------------------------------------------------------


def test_lvlm_scores_are_the_definition():
    model, processor = tiny_lvlm()
    frames = pictures(4)
    scorer = LVLMScorer(model, processor)
    got = scorer(frames, "where is the cup ?")
    prompt = scorer._prompt("where is the cup ?", ())
    want = []
    for frame in frames:
        inputs = processor(text=prompt, images=Image.fromarray(frame), return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        want.append(logits.float().softmax(-1)[processor.tokenizer.convert_tokens_to_ids("A")].double())
    torch.testing.assert_close(got, torch.stack(want), atol=1e-6, rtol=1e-4)
    assert "cup" in prompt
    assert prompt.endswith("assistant :")
    assert "red cup, dog" in scorer._prompt("where ?", ["red cup", "dog"])
    assert "where ?" not in scorer._prompt("where ?", ["red cup", "dog"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_lvlm_reads_the_last_attended_position(side):
    """Frames of several sizes have prompts of several lengths: whichever side is padded, each is as if alone."""
    model, processor = tiny_lvlm(side)
    tall = np.random.default_rng(1).integers(0, 256, (SIDE * 2, SIDE, 3), dtype=np.uint8)
    frames = [*pictures(2), tall]
    processor_call = processor.__call__
    counts = {SIDE: 1, SIDE * 2: 2}

    class Ragged:
        """The processor, with one word more in front of the question for each row of a picture's size."""

        tokenizer = processor.tokenizer
        apply_chat_template = staticmethod(processor.apply_chat_template)

        def __call__(self, text, images, **options):
            longer = ["dog " * counts[image[0].height] + one for one, image in zip(text, images, strict=True)]
            square = [[image[0].crop((0, 0, SIDE, SIDE))] for image in images]
            return processor_call(text=longer, images=square, **options)

    together = LVLMScorer(model, Ragged())(frames, "where is the cup ?")
    alone = torch.cat([LVLMScorer(model, Ragged())([frame], "where is the cup ?") for frame in frames])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)


def test_vocabulary_probability_is_at_most_that_of_two_answers():
    model, processor = tiny_lvlm()
    frames = pictures(6)
    vocab = LVLMScorer(model, processor)(frames, "where is the cup ?")
    two = LVLMScorer(model, processor, prob_mode="yes_no")(frames, "where is the cup ?")
    assert (vocab <= two + 1e-7).all()
    other = LVLMScorer(model, processor, yes="B", no="A", prob_mode="yes_no")
    assert other._prompt("?", ()).count("B. Yes") == 1
    logits = torch.randn(5, 30) * 5
    assert (answer_probability(logits, 3, 7) <= answer_probability(logits, 3, 7, "yes_no")).all()
    swapped = answer_probability(logits, 7, 3, "yes_no")
    torch.testing.assert_close(answer_probability(logits, 3, 7, "yes_no"), 1 - swapped)
    assert answer_probability(logits.bfloat16(), 3, 7).dtype == torch.float32


def test_lvlm_options_are_checked():
    model, processor = tiny_lvlm()
    with pytest.raises(InvalidParameterError, match=r"yes='red cup'.*one token"):
        LVLMScorer(model, processor, yes="red cup")
    with pytest.raises(InvalidParameterError, match=r"no='maybe'.*one token"):
        LVLMScorer(model, processor, no="maybe")
    with pytest.raises(InvalidParameterError, match="prob_mode='logit'"):
        LVLMScorer(model, processor, prob_mode="logit")
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ScorerError, match="LlavaProcessor cannot format"):
        LVLMScorer(model, processor)(pictures(1), "where ?")
    with pytest.raises(InvalidParameterError, match="LlavaProcessor"):
        LVLMDecoupler(model, processor)("where ?")


# -- decoupling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "answer", "expected"),
    [
        ("objects", 'Step 1: yes\nStep 2: ["Cup"]\nStep 3: ["Cup", "dog"]', Decoupled("where ?", ("cup", "dog"))),
        ("objects", "Step 1: no", Decoupled("where ?", ())),
        ("objects", "", Decoupled("where ?", ())),
        ("event", "\n Is a dog there ?\nMore.", Decoupled("Is a dog there ?", ())),
        ("event", " \n", Decoupled("where ?", ())),
    ],
)
def test_decoupler_reads_the_answer(kind, answer, expected, monkeypatch):
    decoupler = LVLMDecoupler(None, None, kind)
    assert isinstance(decoupler, Decoupler)
    prompts = []
    monkeypatch.setattr(decoupler, "_generate", lambda prompt: prompts.append(prompt) or answer)
    assert decoupler("where ?") == expected
    (prompt,) = prompts
    assert "where ?" in prompt
    assert ("Step 3" in prompt) == (kind == "objects")


@pytest.mark.parametrize("part", ["processor", "tokenizer"])
def test_decoupler_asks_the_model_once_without_pictures(part, monkeypatch):
    model, processor = tiny_lvlm()
    calls, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: calls.append(inputs) or generate(**inputs))
    source = processor if part == "processor" else processor.tokenizer
    out = LVLMDecoupler(model, source, max_new_tokens=3)("where is the cup ?")
    assert out == Decoupled("where is the cup ?", ())  # an untrained model names no objects
    (call,) = calls
    assert set(call) == {"input_ids", "attention_mask", "max_new_tokens", "do_sample"}
    assert (call["max_new_tokens"], call["do_sample"]) == (3, False)
    words = processor.tokenizer.decode(call["input_ids"][0]).split()
    assert words[0] == "user"
    assert words[-2:] == ["assistant", ":"]
    assert "cup" in words
    with pytest.raises(InvalidParameterError, match="kind='none'"):
        LVLMDecoupler(model, source, kind="none")
    with pytest.raises(InvalidParameterError, match="max_new_tokens=0"):
        LVLMDecoupler(model, source, max_new_tokens=0)


# -- relevance of tokens -----------------------------------------------------------------------------------------------


def test_clip_relevance_is_the_negated_cosine_of_patch_and_text():
    import transformers

    import tokred
    from tests.matrix.vlm_models import Llava
    from tokred.adapters.scorers import ClipRelevance

    host = Llava()
    model, prompt = host.make(), host.inputs([[3, "image", 4], [2, "image", 6]])
    config = transformers.CLIPConfig(
        vision_config=model.config.vision_config.to_dict(),
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 30,
            "max_position_embeddings": 6,
            "eos_token_id": 29,
        },
        projection_dim=8,
    )
    clip = transformers.CLIPModel(config).eval()

    class Words:
        def __call__(self, texts, padding=False, truncation=False, max_length=None, return_tensors=None):
            rows = [[1, *(3 + len(w) for w in t.split()), 29] for t in ([texts] if isinstance(texts, str) else texts)]
            if return_tensors is None:
                return transformers.BatchEncoding({"input_ids": rows[0]})
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            return transformers.BatchEncoding({"input_ids": ids, "attention_mask": (ids != 0).long()})

    seen = {}

    def watched(view):
        seen["raw"] = relevance(view)
        seen["hidden"] = view.hidden()[:, 0]
        return seen["raw"]

    relevance = ClipRelevance(clip, Words())
    watched.needs = relevance.needs
    questions = ["a bb ccc dddd e", "aa b"]  # the first is longer than the text tower: two chunks
    with tokred.patch(model, tokred.CDPruner(budget=4, relevance=watched)) as patch, patch.request(query=questions):
        with torch.no_grad():
            model(**prompt.inputs)
        assert [step.tokens_out for step in patch.trace.media] == [4, 4]
    with torch.no_grad():
        for row, chunks in enumerate((["a bb ccc dddd", "e"], ["aa b"])):
            states = clip.vision_model.post_layernorm(seen["hidden"][row])
            image = torch.nn.functional.normalize(clip.visual_projection(states), dim=-1)
            total = 0
            for chunk in chunks:
                text = clip.get_text_features(**Words()([chunk], return_tensors="pt")).pooler_output
                total = total + image @ torch.nn.functional.normalize(text, dim=-1)[0]
            torch.testing.assert_close(seen["raw"][row], -total / len(chunks))
