"""From prompts and classes to pictures: the pipeline's parts together, its saving, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokred.core.errors import InvalidParameterError
from tokred.generation.images import to_pil
from tokred.generation.tokenflow import TokenFlow
from tokred.generation.tokenflow_ar import TokenFlowARConfig, TokenFlowARModel
from tokred.generation.tokenflow_generate import TokenFlowPipeline
from tokred.zoo.words import word_tokenizer

WORDS = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<img>", "zero", "one", "two", "red"])}
SCALES, CODES = [1, 2, 4], 24
CLASSES = ["zero", "one", "two"]
PIXELS = {"block_out_channels": [4, 4, 4], "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
GREEDY: dict[str, Any] = {"top_k": 1, "top_p": 0.0, "output_type": "pt"}


def tokenizer() -> TokenFlow:
    torch.manual_seed(0)
    encoder = {"type": "clip", "patch_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return TokenFlow(
        image_size=16, scales=SCALES, codebook_size=CODES, semantic_dim=4, pixel_dim=4,
        semantic_encoder_config={**encoder, "num_attention_heads": 1},
        semantic_decoder_config={"dim": 8, "depth": 1, "heads": 1, "out_dim": 8},
        pixel_encoder_config=PIXELS, pixel_decoder_config=PIXELS,
    ).eval()  # fmt: skip


def generator(**options: Any) -> TokenFlowARModel:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "vocab_size": len(WORDS) + CODES, "image_token_start": len(WORDS), "codebook_size": CODES, "code_dim": 8,
        "scales": SCALES, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "pad_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    return TokenFlowARModel(TokenFlowARConfig(**{**sizes, **options})).eval()


def make(**options: Any) -> TokenFlowPipeline:
    pipeline = TokenFlowPipeline(
        **{
            "ar": generator(),
            "tokenizer": tokenizer(),
            "text_tokenizer": word_tokenizer(WORDS, 32),
            "class_names": CLASSES,
            "text_length": 6,
            "guidance_scale": 2.0,
            **options,
        }
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_prompts_end_where_the_picture_begins() -> None:
    ids, mask = make().encode_prompt(["red one", ""])
    assert ids.tolist() == [[1, 8, 6, 4], [0, 0, 1, 4]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    several, _ = make(begin="<img> red").encode_prompt("one")  # the released text is several ids
    assert several.tolist() == [[1, 6, 4, 8]]


def test_pictures_are_those_of_the_drawn_codes() -> None:
    pipeline = make()
    found = pipeline(["red one", "zero"], **GREEDY)
    ids, mask = pipeline.encode_prompt(["red one", "zero"])
    free, free_mask = pipeline.encode_prompt("")
    want = pipeline.ar.generate(
        ids, mask, lookup=pipeline.tokenizer.lookup, negative_input_ids=free, negative_attention_mask=free_mask,
        guidance_scale=2.0, top_k=1, top_p=0.0,
    )  # fmt: skip
    assert torch.equal(found.tokens, want)
    assert torch.equal(found.images, pipeline.tokenizer.decode(want))
    assert found.images.shape == (2, 3, 16, 16)
    pil = pipeline(["red one", "zero"], **{**GREEDY, "output_type": "pil"}).images
    assert [one.tobytes() for one in pil] == [one.tobytes() for one in to_pil(found.images)]


def test_a_class_is_its_name() -> None:
    pipeline = make()
    want = pipeline(["two", "zero"], **GREEDY).tokens
    for labels in ([2, 0], torch.tensor([2, 0])):
        assert torch.equal(pipeline(class_labels=labels, **GREEDY).tokens, want)
    assert torch.equal(pipeline(class_labels=2, **GREEDY).tokens, want[:1])


def test_guidance_and_negative_prompts() -> None:
    pipeline = make()
    plain = pipeline("one", guidance_scale=0, **GREEDY).tokens
    assert torch.equal(pipeline("one", negative_prompt="one", **GREEDY).tokens, plain)
    strong = {**GREEDY, "guidance_scale": 20.0}
    away = [pipeline("one", negative_prompt=text, **strong).tokens for text in ("", "two two", "red")]
    assert len({tuple(codes.flatten().tolist()) for codes in [plain, *away]}) > 2
    assert torch.equal(make(guidance_scale=20.0)("one", **GREEDY).tokens, away[0])
    several = pipeline(["one", "two"], negative_prompt=["red", ""], **strong).tokens
    assert torch.equal(several[:1], pipeline("one", negative_prompt="red", **strong).tokens)


def test_progress_counts_passes(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = make()
    pipeline.set_progress_bar_config(disable=False)
    pipeline("one", guidance_scale=0)
    assert "7/7" in capsys.readouterr().err  # 1 + 2 x 3
    pipeline("one", guidance_scale=0, num_scales=2, **GREEDY)
    assert "2/2" in capsys.readouterr().err


def test_callback_previews_and_stops() -> None:
    pipeline = make()
    seen: list[Tensor] = []
    whole = pipeline("one", **GREEDY, callback_on_prefix=lambda codes: seen.append(pipeline.tokenizer.decode(codes)))
    assert [image.shape for image in seen] == [(1, 3, 16, 16)] * 3
    assert torch.equal(seen[-1], whole.images)
    short = pipeline("one", **GREEDY, callback_on_prefix=lambda codes: codes.shape[1] == 5)
    assert torch.equal(short.tokens, whole.tokens[:, :5])
    assert torch.equal(short.images, seen[1])
    assert torch.equal(pipeline("one", **GREEDY, num_scales=2).images, seen[1])


def test_the_generator_decides() -> None:
    pipeline = make()

    def draw(seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        return pipeline("one", guidance_scale=0, top_k=0, top_p=0.0, generator=random).tokens

    first = draw(1)
    assert torch.equal(draw(1), first)
    assert not torch.equal(draw(2), first)


def test_save_and_load(tmp_path: Path) -> None:
    pipeline = make(begin="<img> red")
    pipeline.save_pretrained(tmp_path)
    again = TokenFlowPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.tokenizer, TokenFlow)
    assert isinstance(again.ar, TokenFlowARModel)
    for name in ("begin", "text_length", "class_names", "guidance_scale"):
        assert again.config[name] == pipeline.config[name]
    found, want = (one(class_labels=[1, 2], **GREEDY) for one in (again, pipeline))
    assert torch.equal(found.tokens, want.tokens)
    assert torch.equal(found.images, want.images)


BAD_PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "scales": ({"scales": [1, 2, 3]}, r"\[1, 2, 3\], the tokenizer has \[1, 2, 4\]"),
    "codes": ({"codebook_size": CODES - 1}, "draws from 23 codes, the tokenizer has 24"),
    "width": ({"code_dim": 9}, "reads codes of width 9, the tokenizer's have 8"),
    "words": ({"image_token_start": len(WORDS) - 1}, "has 9 ids, but codes start at id 8"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_that_do_not_fit(case: str) -> None:
    options, match = BAD_PARTS[case]
    with pytest.raises(InvalidParameterError, match=match):
        make(ar=generator(**options))


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "either prompt or class_labels"),
    "both": ({"prompt": "one", "class_labels": 1}, "either prompt or class_labels"),
    "no prompts": ({"prompt": []}, "expected a text"),
    "numbers": ({"prompt": [1]}, "expected a text"),
    "long": ({"prompt": "one one one one one"}, "7 text tokens, the generator reads 6"),
    "class beyond": ({"class_labels": [0, 3]}, "0 to 2"),
    "class below": ({"class_labels": -1}, "0 to 2"),
    "no classes": ({"class_labels": []}, "0 to 2"),
    "output": ({"prompt": "one", "output_type": "np"}, "pil, pt"),
    "negatives": ({"prompt": ["one", "two", "one"], "negative_prompt": ["", ""]}, "expected 1 or 3"),
    "scales": ({"prompt": "one", "num_scales": 9}, "1 to 3"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case: str) -> None:
    options, match = BAD_CALLS[case]
    with pytest.raises(InvalidParameterError, match=match):
        make()(**options)


def test_classes_of_a_pipeline_of_texts() -> None:
    with pytest.raises(InvalidParameterError, match="knows no classes"):
        make(class_names=None)(class_labels=1)
