"""Tiny random text models of every family, multimodal ones with a deeper language model, and prompts for both.

A prompt of a text model is written as rows of parts: a number (so many text tokens) or "v" and a number (so many tokens
that may be dropped). Rows are padded on the left. Multimodal prompts are those of `vlm_models`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.matrix.vlm_models import FAMILIES, FIRST_TEXT, LAST_TEXT, PAD_ID, TEXT, Tiny, language_of, stirred

__all__ = ["DEPTH", "HOSTS", "TEXTS", "Host", "Request"]

DEPTH = 6
WINDOW = 8


@dataclass
class Request:
    """Inputs of a model.

    Attributes:
        inputs: keyword arguments. rows: the parts of each row. prunable: (B, S) bool, tokens that may go; None where
            the host knows by itself. prompt: as `vlm_models` made it, else None.
    """

    inputs: dict[str, Tensor]
    rows: list[list[Any]]
    prunable: Tensor | None
    host: Host = field(repr=False)
    prompt: Any = None

    def single(self, row: int) -> Request:
        """One row alone, unpadded."""
        if self.prompt is not None:
            alone = self.prompt.single(row)
            return Request(alone.inputs, alone.rows, None, self.host, alone)
        real = self.inputs["attention_mask"][row].bool()
        inputs = {key: value[row : row + 1, real] for key, value in self.inputs.items()}
        assert self.prunable is not None
        return Request(inputs, [self.rows[row]], self.prunable[row : row + 1, real], self.host)

    @property
    def width(self) -> int:
        return self.inputs["input_ids"].shape[1]


class Host(ABC):
    """A model to patch, and prompts for it.

    Attributes:
        name: of it. outer: its class. kernels: attention implementations. static: whether static caches work.
        window: of layers that attend in one, where it is shorter than prompts; None elsewhere.
    """

    name: str
    outer: str
    kernels: tuple[str, ...] = ("sdpa", "eager")
    static: bool = True
    window: int | None = None
    tolerance: float = 2e-5
    mrope: bool = False
    visual: Tiny | None = None

    @abstractmethod
    def config(self) -> Any:
        """Of the model."""

    @abstractmethod
    def make(self, kernel: str = "") -> nn.Module:
        """The model with random weights."""

    @abstractmethod
    def requests(self, few: bool = False) -> Request:
        """A batch of every kind of row."""

    @abstractmethod
    def decoder(self, model: Any) -> Any:
        """The language model without its head."""


class TextHost(Host):
    """A causal language model."""

    def __init__(self, name: str, outer: str, window: int | None = None, **options: Any) -> None:
        self.name, self.outer, self.window = name, outer, window
        self.kernels = options.pop("kernels", Host.kernels)
        self.options = options

    def config(self) -> Any:
        given = {**TEXT, "num_hidden_layers": DEPTH, "attention_dropout": 0.0, **self.options}
        return getattr(transformers, self.outer).config_class(**given)

    def make(self, kernel: str = "") -> nn.Module:
        torch.manual_seed(0)
        cls = getattr(transformers, self.outer)
        model = cls._from_config(self.config(), attn_implementation=kernel or self.kernels[0])
        return stirred(model)

    def requests(self, few: bool = False) -> Request:
        rows: list[list[Any]] = [[2, "v9", 3], [6], [1, "v6", 2, "v5", 3], [3, "v12", 1]]
        return self.request(rows[:3:2] if few else rows)

    def request(self, rows: list[list[Any]]) -> Request:
        drawn = []
        for number, row in enumerate(rows):
            generator = torch.Generator().manual_seed(100 + number)
            ids, flags = [1], [False]
            for part in row:
                count = part if isinstance(part, int) else int(part[1:])
                ids += torch.randint(FIRST_TEXT, LAST_TEXT, (count,), generator=generator).tolist()
                flags += [not isinstance(part, int)] * count
            drawn.append((ids, flags))
        length = max(len(ids) for ids, _ in drawn)
        made = torch.full((len(rows), length), PAD_ID)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        prunable = torch.zeros(len(rows), length, dtype=torch.bool)
        for row, (ids, flags) in enumerate(drawn):
            made[row, length - len(ids) :] = torch.tensor(ids)
            mask[row, length - len(ids) :] = 1
            prunable[row, length - len(ids) :] = torch.tensor(flags)
        return Request({"input_ids": made, "attention_mask": mask}, rows, prunable, self)

    def decoder(self, model: Any) -> Any:
        return model.model


class VisualHost(Host):
    """A multimodal model of `vlm_models`, with more layers in its language model."""

    def __init__(self, tiny: Tiny) -> None:
        self.visual = tiny
        self.name, self.outer, self.kernels, self.static = tiny.name, tiny.outer, tiny.kernels, tiny.static_cache
        self.mrope, self.tolerance = tiny.mrope, max(2 * tiny.tolerance, 3e-5)
        window = getattr(tiny, "window", None)
        self.window = window if window is not None and window < 100 else None

    def config(self) -> Any:
        assert self.visual is not None
        config = self.visual.config()
        text = config.get_text_config()
        text.num_hidden_layers = DEPTH
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = (list(text.layer_types) * DEPTH)[:DEPTH]
        return config

    def make(self, kernel: str = "") -> nn.Module:
        assert self.visual is not None
        return self.visual.make(kernel or self.kernels[0], self.config())

    def requests(self, few: bool = False) -> Request:
        tiny = self.visual
        assert tiny is not None
        two = "image:multi" if tiny.name == "llava_onevision" else "image"
        rows: list[list[Any]] = [[2, tiny.parts()[-1], 3], [6], [1, two, 2, two, 3]]
        prompt = tiny.inputs(rows[:3:2] if few else rows)
        return Request(prompt.inputs, prompt.rows, None, self, prompt)

    def decoder(self, model: Any) -> Any:
        return language_of(model)


_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
_MOSTLY = ["sliding_attention", "sliding_attention", "full_attention"] * 2

TEXTS: dict[str, TextHost] = {
    host.name: host
    for host in (
        TextHost("llama", "LlamaForCausalLM", mlp_bias=True, attention_bias=True),
        TextHost("mistral", "MistralForCausalLM", sliding_window=None),
        TextHost("mistral_window", "MistralForCausalLM", WINDOW, sliding_window=WINDOW),
        TextHost("phi3", "Phi3ForCausalLM", sliding_window=None),
        TextHost("qwen2", "Qwen2ForCausalLM"),
        TextHost("qwen3", "Qwen3ForCausalLM", head_dim=8),
        TextHost("gemma", "GemmaForCausalLM", head_dim=8),
        # its attention softcaps logits, which the library's sdpa leaves out
        TextHost("gemma2", "Gemma2ForCausalLM", WINDOW, sliding_window=WINDOW, kernels=("eager",), **_GEMMA),
        TextHost("gemma2_wide", "Gemma2ForCausalLM", sliding_window=512, kernels=("eager",), **_GEMMA),
        TextHost("gemma3_text", "Gemma3ForCausalLM", WINDOW, sliding_window=WINDOW, layer_types=_MOSTLY, **_GEMMA),
        TextHost(
            "starcoder2", "Starcoder2ForCausalLM", sliding_window=None, residual_dropout=0.0, embedding_dropout=0.0
        ),
    )
}

HOSTS: dict[str, Host] = {**TEXTS, **{name: VisualHost(tiny) for name, tiny in FAMILIES.items()}}
