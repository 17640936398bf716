"""The bundled tiny vision-language model: a LLaVA that answers questions about 2-4 coloured digits.

Its parts are those of LLaVA-1.5 at a hundredth of the width: a CLIP tower (96 px, 144 patches and a class token), a
projector of two layers, a Llama decoder that reads whole words. The same weights also make a LLaVA-NeXT-Video, whose
frames are 36 tokens each. Made and measured by ``python -m tokred.zoo.train_digit_vlm``::

    model, processor = digit_vlm()
    inputs = processor(text=question_prompt("which digit is red ?"), images=image, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    answer_text(processor.decode(output[0]))        # "7"
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokred.zoo.words import word_tokenizer

if TYPE_CHECKING:
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaNextVideoForConditionalGeneration,
        LlavaNextVideoProcessor,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

FOLDER = Path(__file__).parent / "weights" / "digit_vlm"

_WORDS = (
    "<pad> <s> </s> <unk> <image> <video> USER ASSISTANT : ? "
    "which digit digits is how many are there what colour the a in yes no image video "
    "0 1 2 3 4 5 6 7 8 9 zero one two three four "
    "red green blue yellow cyan magenta left-most right-most top-most bottom-most"
)
WORDS = tuple(_WORDS.split())
WORD_IDS = {word: i for i, word in enumerate(WORDS)}
PAD, BOS, EOS, IMAGE, VIDEO = (WORD_IDS[word] for word in ("<pad>", "<s>", "</s>", "<image>", "<video>"))

TOWER_CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 96,
    "patch_size": 8,
    "projection_dim": 128,
    "hidden_act": "gelu",
}
LLAMA_CONFIG: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
#: Side of the grid of patches, and tokens of a video frame after 2x2 average pooling.
GRID, FRAME_TOKENS = 12, 36
_MEAN, _STD = [0.5] * 3, [0.25] * 3


def _need_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError('the digit VLM needs transformers; run: pip install "tokred[transformers]"') from error
    return transformers


def build_digit_vlm() -> LlavaForConditionalGeneration:
    """The architecture with random weights."""
    transformers = _need_transformers()
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER_CONFIG),
        text_config=transformers.LlamaConfig(**LLAMA_CONFIG),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID**2,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of ``WORDS``; ``<s>`` is put first, padding goes to the left."""
    return word_tokenizer(WORD_IDS, LLAMA_CONFIG["max_position_embeddings"], ("<image>", "<video>"))


def _pixels() -> dict[str, Any]:
    """Arguments of an image or video processor that keeps the 96x96 pixels as they are."""
    size = {"height": TOWER_CONFIG["image_size"], "width": TOWER_CONFIG["image_size"]}
    return {
        "do_resize": False,
        "do_center_crop": False,
        "size": size,
        "crop_size": size,
        "image_mean": _MEAN,
        "image_std": _STD,
    }


def build_processor() -> LlavaProcessor:
    """Tokenizer and image processor of the image model."""
    transformers = _need_transformers()
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(**_pixels()),
        tokenizer=build_tokenizer(),
        patch_size=TOWER_CONFIG["patch_size"],
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def digit_vlm(folder: Path = FOLDER) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The bundled model (eval, float32, sdpa, on the CPU) and its processor; no network."""
    transformers = _need_transformers()
    options = {"local_files_only": True}
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype="float32", attn_implementation="sdpa", **options
    )
    return model.eval(), transformers.AutoProcessor.from_pretrained(folder, **options)


def digit_video_vlm(folder: Path = FOLDER) -> tuple[LlavaNextVideoForConditionalGeneration, LlavaNextVideoProcessor]:
    """The same weights as a LLaVA-NeXT-Video: a frame of 12x12 patches is average-pooled to 6x6 tokens.

    The processor takes ``videos=`` of uint8 frames (T, 3, 96, 96) or (T, 96, 96, 3), all of which are shown. Images
    take the place of ``<image>`` only in :func:`digit_vlm`.
    """
    transformers = _need_transformers()
    source, processor = digit_vlm(folder)
    config = transformers.LlavaNextVideoConfig(
        vision_config=source.config.vision_config,
        text_config=source.config.text_config,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        spatial_pool_mode="average",
        spatial_pool_stride=2,
        image_grid_pinpoints=[[TOWER_CONFIG["image_size"]] * 2],
        image_seq_length=GRID**2,
        video_seq_length=FRAME_TOKENS,
    )
    model = transformers.LlavaNextVideoForConditionalGeneration(config)
    state = {**source.state_dict(), "model.image_newline": model.model.image_newline.detach().zero_()}
    model.load_state_dict(state, strict=True)
    model.generation_config = source.generation_config
    video = transformers.LlavaNextVideoProcessor(
        video_processor=transformers.LlavaNextVideoVideoProcessor(**_pixels()),
        image_processor=transformers.LlavaNextImageProcessor(**_pixels()),
        tokenizer=processor.tokenizer,
        patch_size=TOWER_CONFIG["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model.eval(), video


def question_prompt(question: str, media: str = "image") -> str:
    """The prompt of a question; ``media`` is ``"image"``, ``"video"`` or ``"text"`` (no picture)."""
    if media not in ("image", "video", "text"):
        raise ValueError(f'media must be "image", "video" or "text", got {media!r}')
    return ("" if media == "text" else f"<{media}> ") + f"USER : {question} ASSISTANT :"


def answer_text(decoded: str) -> str:
    """The answer in a decoded output: what follows the last ``ASSISTANT :`` (or all of it) up to ``</s>``."""
    return decoded.rpartition("ASSISTANT :")[2].partition("</s>")[0].strip()


def digit_vlm_card() -> dict[str, Any]:
    """How the bundled weights were made, and their measured numbers."""
    card: dict[str, Any] = json.loads((FOLDER / "card.json").read_text())
    return card
