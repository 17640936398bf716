"""Tiny random checkpoints as a hub has them, model and preprocessing in one folder, for the scripts in demos/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tokenizers import Tokenizer, models, pre_tokenizers

MARKS = (
    "<pad>", "<s>", "</s>", "<unk>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
WORDS = (
    "What happens is the in video picture ? USER ASSISTANT : Read text and answer a question about it . cat dog secret "
    "number Sentence says that nothing"
)
CHAT = (
    "{% for message in messages %}{{ message['role'] }} : "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}PART{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT :{% endif %}"
)
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}


def word_tokenizer() -> Any:
    """One token a word; what it does not know is <unk>."""
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate((*MARKS, *dict.fromkeys(WORDS.split())))}
    ids |= {f"w{i}": i for i in range(len(ids), TEXT["vocab_size"])}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        **special,
        additional_special_tokens=list(MARKS[4:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def id_of(mark: str) -> int:
    return MARKS.index(mark)


def stirred(model: Any) -> Any:
    """Random biases and norms too, and answers of words."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.suppress_tokens = list(range(len(MARKS)))
    return model.eval()


def save(folder: Path, *parts: Any) -> str:
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


def save_llava(folder: Path) -> str:
    """8 x 8 patches of 32 pixels in a CLIP of 4 layers, Llama of 4."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER), text_config=LlamaConfig(**TEXT), image_token_index=id_of("<image>")
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=word_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("PART", "<image> "),
    )
    return save(folder, stirred(LlavaForConditionalGeneration(config)), processor)


def save_llava_next(folder: Path) -> str:
    """The same tower and text, a picture as an overview and 1 x 2 or 2 x 1 tiles of 32 pixels."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    torch.manual_seed(0)
    points = [[32, 64], [64, 32]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT),
        image_token_index=id_of("<image>"),
        image_grid_pinpoints=points,
        tie_word_embeddings=False,
    )
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(image_grid_pinpoints=points, **sizes),
        tokenizer=word_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("PART", "<image> "),
    )
    return save(folder, stirred(LlavaNextForConditionalGeneration(config)), processor)


def save_qwen(folder: Path) -> str:
    """A Qwen2.5-VL of 2 layers of vision and 4 of language; patches of 4 pixels, merged 2 x 2."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    torch.manual_seed(0)
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**TEXT, "rope_parameters": rope},
        image_token_id=id_of("<|image_pad|>"),
        video_token_id=id_of("<|video_pad|>"),
        vision_start_token_id=id_of("<|vision_start|>"),
        vision_end_token_id=id_of("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    pixels = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 32 * 32, "max_pixels": 64 * 64}
    media = (
        "<|vision_start|>{% if part['type'] == 'video' %}<|video_pad|>{% else %}<|image_pad|>{% endif %}<|vision_end|> "
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=word_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=CHAT.replace("PART", media),
    )
    return save(folder, stirred(Qwen2_5_VLForConditionalGeneration(config)), processor)


def save_llama(folder: Path) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    return save(folder, stirred(LlamaForCausalLM(LlamaConfig(**TEXT, max_position_embeddings=4096))), tokenizer)


def save_timm(folder: Path) -> str:
    """A ViT of 12 blocks and 8 x 8 patches, as `local-dir:` of timm reads it."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "num_heads": 2}
    model = stirred(timm.create_model("deit_small_patch16_224", **sizes))
    save_for_hf(model, str(folder), model_args=sizes, safe_serialization=True)
    return f"local-dir:{folder}"


def save_open_clip(folder: Path) -> str:
    """A CLIP of 12 blocks and 8 x 8 patches, as `local-dir:` of open_clip reads it."""
    import json

    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 32, "layers": 12, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    model = stirred(open_clip.CLIP(**config))
    folder.mkdir(parents=True)
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    written = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(written))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"
