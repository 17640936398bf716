"""Configuration of Token-Shuffle: `tokred.generation.token_shuffle`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING

from tokred.core.budget import check_choice, check_count
from tokred.core.errors import InvalidParameterError
from tokred.generation.token_shuffle_ops import SCHEDULES

__all__ = ["TokenShuffleConfig"]


class TokenShuffleConfig(PreTrainedConfig):
    """Sizes and options of a `TokenShuffle`. What the paper's sources leave open is an option (UNVERIFIED).

    Args:
        text_config: configuration of the language model, whose vocabulary holds the codes already; None is a Llama.
        window: s; 1 is off, the model is the language model then.
        codebook_size: K. image_token_start: the id of code 0 in the vocabulary.
        soi_token_id, eoi_token_id: marks of a picture's start and end; None is the ids behind the codes.
        num_blocks, mlp_ratio: residual MLPs of each operator, and their hidden width / d (the ratio is UNVERIFIED).
        two_layer: projections with a hidden layer (UNVERIFIED). compress: "pre" or "post", see `Shuffle`. expand:
            "post" or "pre", see `Unshuffle`. The defaults are the paper's by most sources.
        output_norm: an RMS norm between `Unshuffle` and the head (UNVERIFIED). norm_eps: of all norms added here.
        window_order: "raster", the order of windows in a picture and of slots in a window (UNVERIFIED).
        position_mode: "1d" counts windows on as the text is counted; "rope2d" turns them by row and column, both
            counted from the position where the picture begins, for models with rotary positions (UNVERIFIED).
        cfg_scale, cfg_schedule: of generation; "half_linear", "linear" or "constant" (the scale UNVERIFIED).
        z_loss: weight of mean(logsumexp^2); the paper uses it at 2048 pixels (there 1e-5, UNVERIFIED).
        text_weight: weight of the text's cross-entropy beside the image's (UNVERIFIED).
        vq_model: where the image tokenizer is to be found; a note.

    Raises:
        InvalidParameterError: a value outside its range, a window whose square does not divide the width, ids beyond
            the vocabulary.
    """

    model_type = "token_shuffle"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    text_config: Any = None
    window: int = 2
    codebook_size: int = 16384
    image_token_start: int = 32000
    soi_token_id: int | None = None
    eoi_token_id: int | None = None
    num_blocks: int = 2
    mlp_ratio: float = 1.0
    two_layer: bool = False
    compress: str = "pre"
    expand: str = "post"
    output_norm: bool = False
    norm_eps: float = 1e-6
    window_order: str = "raster"
    position_mode: str = "1d"
    cfg_scale: float = 7.5
    cfg_schedule: str = "half_linear"
    z_loss: float = 0.0
    text_weight: float = 0.0
    vq_model: str | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        check_count("codebook_size", self.codebook_size, 1)
        check_count("image_token_start", self.image_token_start)
        behind = self.image_token_start + self.codebook_size
        self.soi_token_id = behind if self.soi_token_id is None else self.soi_token_id
        self.eoi_token_id = behind + 1 if self.eoi_token_id is None else self.eoi_token_id
        if isinstance(self.text_config, dict):
            given = dict(self.text_config)
            self.text_config = CONFIG_MAPPING[given.pop("model_type", "llama")](**given)
        elif self.text_config is None:
            self.text_config = CONFIG_MAPPING["llama"](vocab_size=behind + 2)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        self._check(behind)

    def _check(self, behind: int) -> None:
        check_count("window", self.window, 1)
        check_count("num_blocks", self.num_blocks)
        for name, choices in (
            ("compress", ("pre", "post")),
            ("expand", ("post", "pre")),
            ("window_order", ("raster",)),
            ("position_mode", ("1d", "rope2d")),
            ("cfg_schedule", SCHEDULES),
        ):
            check_choice(name, getattr(self, name), choices)
        for name, least in (("mlp_ratio", 1e-6), ("cfg_scale", 0.0), ("z_loss", 0.0), ("text_weight", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
                raise InvalidParameterError(f"{name}={value!r}: expected a number of at least {least:g}")
        if self.width % self.window**2:
            raise InvalidParameterError(
                f"window={self.window}: its square must divide the width {self.width} of the language model"
            )
        marks: set[Any] = {self.soi_token_id, self.eoi_token_id}
        codes = range(self.image_token_start, behind)
        most = max(behind - 1, *marks)
        size = self.text_config.vocab_size
        if len(marks) < 2 or any(mark in codes for mark in marks) or most >= size:
            raise InvalidParameterError(
                f"image_token_start={self.image_token_start}, codebook_size={self.codebook_size}, soi_token_id="
                f"{self.soi_token_id}, eoi_token_id={self.eoi_token_id}: expected two marks outside the codes, and all "
                f"of them below the vocabulary size {size}; TokenShuffle.wrap makes room for them"
            )

    @classmethod
    def options(cls) -> list[str]:
        """The names of all fields but `text_config`."""
        return [name for name in cls.__annotations__ if name != "text_config"]

    @property
    def width(self) -> int:
        """d, the width of the language model."""
        return self.text_config.hidden_size

    @property
    def image_rows(self) -> slice:
        """The ids of the codes."""
        return slice(self.image_token_start, self.image_token_start + self.codebook_size)
