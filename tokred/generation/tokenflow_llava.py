"""TokenFlow as the vision tower of transformers' LLaVA: a language model that reads a picture's codes.

TokenFlow, arXiv 2412.03069, Table 8 and the released code. The tower encodes pictures, looks the codes up, and gives
their features; the projector and the language model are `LlavaForConditionalGeneration`'s own, and so are `generate`,
saving and loading. Importing this module registers the tower with `AutoConfig` and `AutoModel`::

    model = build_llava(tokenizer, text_config, image_token_id=..., feature_mode="last")
    processor = build_processor(model.config, text_tokenizer)
    inputs = processor(text="<image> USER : which digit ?", images=picture, return_tensors="pt")
    model.generate(**inputs)

`llava_from_official` reads the released model with Qwen2.5.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokred.core.errors import InvalidParameterError
from tokred.generation import tokenflow_official
from tokred.generation.tokenflow import FEATURE_MODES, TokenFlow
from tokred.generation.tokenflow_ar_official import read_config, read_weights

__all__ = [
    "TokenFlowVisionConfig",
    "TokenFlowVisionModel",
    "build_llava",
    "build_processor",
    "from_official",
    "llava_from_official",
    "to_official",
]

IMAGE_PAD = 151655  # Qwen2.5's <|image_pad|>; the released code marks a picture's place by an id outside its words
TOWER, RELEASED_TOWER = "model.vision_tower.tokenizer.", "model.vision_tower.vision_tower."
#: beginnings of released names -> ours
NAMES = [
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.layers.", "model.language_model.layers."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.norm.", "model.language_model.norm."),
    ("lm_head.", "lm_head."),
]


# -- the tower ---------------------------------------------------------------------------------------------------------


class TokenFlowVisionConfig(PreTrainedConfig):
    """Sizes of a `TokenFlowVisionModel`.

    Args:
        tokenizer: arguments of `TokenFlow`; what is not given is its default.
        feature_mode: what the language model reads, of `TokenFlow.llm_features`: "last" (released), "last_semantic",
            "last_pixel", "full_residual", "full", "prefix".
        upto: scales whose codes are used; None is all. With "prefix" it sets the number of tokens.

    Attributes:
        hidden_size, num_image_tokens, image_size: width and number of the features, side of the pictures in pixels;
            always those that follow from the arguments.

    Raises:
        InvalidParameterError: another mode, or no such number of scales.
    """

    model_type = "tokenflow_vision"
    base_config_key = "vision_config"

    tokenizer: dict[str, Any] | None = None
    feature_mode: str = "last"
    upto: int | None = None
    hidden_size: int = 0
    num_image_tokens: int = 0
    image_size: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        given = {name: value for name, value in (self.tokenizer or {}).items() if not name.startswith("_")}
        self.tokenizer = json.loads(json.dumps(given))  # as it comes back from a file
        known = inspect.signature(TokenFlow.__init__).parameters
        sizes = {**{name: p.default for name, p in known.items()}, **self.tokenizer}
        scales = list(sizes["scales"])
        if self.feature_mode not in FEATURE_MODES:
            raise InvalidParameterError(
                f"feature_mode={self.feature_mode!r}: expected one of {', '.join(FEATURE_MODES)}"
            )
        if self.upto is not None and not (isinstance(self.upto, int) and 1 <= self.upto <= len(scales)):
            raise InvalidParameterError(f"upto={self.upto!r}: expected a number of scales from 1 to {len(scales)}")
        read, mode = scales[: self.upto], self.feature_mode
        halves = {"last_semantic": sizes["semantic_dim"], "last_pixel": sizes["pixel_dim"]}
        self.hidden_size = halves.get(mode, sizes["semantic_dim"] + sizes["pixel_dim"])
        last = read[-1] if mode == "prefix" else scales[-1]
        self.num_image_tokens = sum(side * side for side in read) if mode.startswith("full") else last * last
        self.image_size = sizes["image_size"]


class TokenFlowVisionModel(PreTrainedModel):
    """Pictures, or their codes, to the features that a projector reads. The tokenizer is frozen: no gradients."""

    config: TokenFlowVisionConfig
    config_class = TokenFlowVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keep_in_fp32_modules_strict = {"quantizer"}  # noqa: RUF012  scores in half precision change codes
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: TokenFlowVisionConfig) -> None:
        super().__init__(config)
        self.tokenizer = TokenFlow(**(config.tokenizer or {})).requires_grad_(False).eval()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the tokenizer as it was made; its parts of transformers see to themselves."""

    def train(self, mode: bool = True) -> TokenFlowVisionModel:
        """The tokenizer stays in eval mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Features (B, n, d), the output's `last_hidden_state` and only hidden state.

        Args:
            pixel_values: pictures (B, 3, S, S) in [-1, 1], or their codes (B, N) int64.
            kwargs: what LLaVA asks of other towers; nothing of it changes anything.

        Raises:
            InvalidParameterError: as `TokenFlow.llm_features`.
        """
        found = self.tokenizer.llm_features(pixel_values, self.config.feature_mode, self.config.upto)
        found = found.to(self.tokenizer.quant_conv.weight.dtype)
        return BaseModelOutputWithPooling(last_hidden_state=found, hidden_states=(found,))


AutoConfig.register(TokenFlowVisionConfig.model_type, TokenFlowVisionConfig)
AutoModel.register(TokenFlowVisionConfig, TokenFlowVisionModel)


# -- whole models ------------------------------------------------------------------------------------------------------


def llava_config(
    tokenizer: Mapping[str, Any],
    text_config: PreTrainedConfig,
    image_token_id: int,
    feature_mode: str = "last",
    upto: int | None = None,
) -> LlavaConfig:
    """Configuration of a LLaVA that reads TokenFlow's codes; arguments as in `build_llava`."""
    vocabulary = text_config.vocab_size
    if not 0 <= image_token_id < vocabulary:
        raise InvalidParameterError(f"image_token_id={image_token_id}: expected one of {vocabulary} ids")
    vision = TokenFlowVisionConfig(tokenizer=dict(tokenizer), feature_mode=feature_mode, upto=upto)
    return LlavaConfig(
        vision_config=vision,
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=vision.num_image_tokens,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        pad_token_id=text_config.pad_token_id,
        bos_token_id=text_config.bos_token_id,
        eos_token_id=text_config.eos_token_id,
    )


def build_llava(
    tokenizer: TokenFlow,
    text_config: PreTrainedConfig,
    image_token_id: int,
    feature_mode: str = "last",
    upto: int | None = None,
) -> LlavaForConditionalGeneration:
    """A LLaVA with this tokenizer, whose weights it copies, a random projector and a random language model.

    Args:
        text_config: of the language model. image_token_id: the word that stands for a visual token.
        feature_mode, upto: see `TokenFlowVisionConfig`.

    Raises:
        InvalidParameterError: an id that the language model does not have, or as `TokenFlowVisionConfig`.
    """
    model = LlavaForConditionalGeneration(
        llava_config(tokenizer.config, text_config, image_token_id, feature_mode, upto)
    )
    model.model.vision_tower.tokenizer.load_state_dict(tokenizer.state_dict())
    return model.eval()


def build_processor(
    config: LlavaConfig,
    text_tokenizer: PreTrainedTokenizerBase,
    image_token: str = "<image>",
    chat_template: str | None = None,
) -> LlavaProcessor:
    """Texts and pictures to a model's inputs; a picture is padded with grey to a square and scaled.

    Args:
        config: the model's. text_tokenizer: with `image_token` among its words, as the config's image token.

    Raises:
        InvalidParameterError: another image token, or a config of another tower.
    """
    vision = config.vision_config
    if not isinstance(vision, TokenFlowVisionConfig):
        raise InvalidParameterError(f"vision_config: {type(vision).__name__} given, expected TokenFlowVisionConfig")
    found = text_tokenizer.convert_tokens_to_ids(image_token)
    if found != config.image_token_index:
        raise InvalidParameterError(
            f"image_token={image_token!r} has the id {found} in the tokenizer, the model expects "
            f"{config.image_token_index}"
        )
    side = {"height": vision.image_size, "width": vision.image_size}
    return LlavaProcessor(
        image_processor=LlavaImageProcessor(
            do_pad=True, do_resize=True, size=side, resample=3, do_center_crop=False, crop_size=side,
            image_mean=[0.5] * 3, image_std=[0.5] * 3,
        ),
        tokenizer=text_tokenizer,
        patch_size=vision.image_size,  # one patch: any number of tokens is that one and some more
        num_additional_image_tokens=vision.num_image_tokens - 1,
        vision_feature_select_strategy="full",
        image_token=image_token,
        chat_template=chat_template,
    )  # fmt: skip


# -- the released model ------------------------------------------------------------------------------------------------


def llava_from_official(
    path: str | Path,
    text_config: PreTrainedConfig | None = None,
    image_token_id: int = IMAGE_PAD,
    feature_mode: str = "last",
    upto: int | None = None,
    dtype: torch.dtype | None = None,
    **tokenizer: Any,
) -> LlavaForConditionalGeneration:
    """The released LLaVA with Qwen2.5, in eval mode; every tensor finds its place, or it is an error.

    A projector was trained for "last"; with another `feature_mode` of the same width it is a starting point.

    Args:
        path: a folder with the safetensors files and `config.json`.
        text_config: of the language model; None is read from `config.json`.
        image_token_id: the word that stands for a visual token; Qwen2.5's own <|image_pad|> (the release has none).
        dtype: of the weights; None is as stored. The quantizer is float32 in any case.
        tokenizer: further options of `TokenFlow.from_official`, such as `scales`.

    Raises:
        InvalidParameterError: files or tensors that are missing, damaged or unknown.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InvalidParameterError(f"{path}: no such folder; expected the released files, downloaded")
    weights = read_weights(folder, dtype)
    if text_config is None:
        if not (folder / "config.json").is_file():
            raise InvalidParameterError(f"{folder} holds no config.json: give text_config")
        text_config = _text_config(read_config(folder / "config.json"))
    own = {name.removeprefix(RELEASED_TOWER): v for name, v in weights.items() if name.startswith(RELEASED_TOWER)}
    changes = {name: value for name, value in tokenizer.items() if name not in ("image_size", "scales")}
    sizes = tokenflow_official.read_config(own, tokenizer.get("image_size"), tokenizer.get("scales"), changes)
    config = llava_config(sizes, text_config, image_token_id, feature_mode, upto)
    state = from_official(weights)
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in LlavaForConditionalGeneration(config).state_dict().items()}
    given = {name: value.shape for name, value in state.items()}
    odd = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if odd:
        more = f", and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise InvalidParameterError(
            f"{folder}: tensors that are missing, unknown or of another shape: {', '.join(odd[:3])}{more}"
        )
    stored = next(iter(weights.values())).dtype if dtype is None else dtype
    model = LlavaForConditionalGeneration.from_pretrained(None, config=config, state_dict=state, dtype=stored)
    return model.eval()


def _text_config(described: Mapping[str, Any]) -> Qwen2Config:
    """What a released `config.json` says of its language model."""
    given = {name: value for name, value in described.items() if name in Qwen2Config().to_dict()}
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        given.pop(name, None)
    if "rope_theta" in described:
        given["rope_parameters"] = {"rope_type": "default", "rope_theta": float(described["rope_theta"])}
    return Qwen2Config(**given)


def from_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the released model under the names of a LLaVA of this module.

    Raises:
        InvalidParameterError: an unknown name.
    """
    tower = {name.removeprefix(RELEASED_TOWER): v for name, v in weights.items() if name.startswith(RELEASED_TOWER)}
    found = {TOWER + name: value for name, value in tokenflow_official.convert_state_dict(tower).items()}
    for name, value in weights.items():
        if not name.startswith(RELEASED_TOWER):
            found[_renamed(name, NAMES)] = value
    return found


def to_official(state: Mapping[str, Tensor], kind: str = "siglip") -> dict[str, Tensor]:
    """Undoes `from_official`, but for what the tokenizer does not carry (`tokred.generation.tokenflow_official`).

    Args:
        kind: type of the semantic encoder.
    """
    tower = {name.removeprefix(TOWER): value for name, value in state.items() if name.startswith(TOWER)}
    found = {RELEASED_TOWER + n: v for n, v in tokenflow_official.official_state_dict(tower, kind).items()}
    back = [(ours, released) for released, ours in NAMES]
    return {**found, **{_renamed(n, back): v for n, v in state.items() if not n.startswith(TOWER)}}


def _renamed(name: str, pairs: list[tuple[str, str]]) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name[len(old) :]
    raise InvalidParameterError(f"{name!r} is no tensor of TokenFlow's LLaVA")
