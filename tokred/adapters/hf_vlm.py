"""Multimodal models of transformers: visual tokens are reduced between the vision encoder and the language model.

One generic pair of hooks serves every family. The first, on the inner multimodal model, notes which columns of the
prompt are visual, and translates masks and positions of steps on a cache that holds a reduced prompt. The second, on
the language model, sees the merged sequence, asks the method, and hands on a shorter one: embeddings, mask, positions,
token types, deepstack rows. The cache says the prompt's own length to whoever slices by it (`logical_cache`), so
`generate` keeps its contract and no library function is copied. What families differ in is in `vlm_families`.

Scores of the vision tower are caught while `get_image_features` runs and travel on its output, which `generate` makes
once and carries to every pass that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from tokred.adapters.decoder_parts import Decoder
from tokred.adapters.decoder_session import DecoderSession
from tokred.adapters.prompt_session import REFUSALS
from tokred.adapters.visual_session import VisualSession
from tokred.adapters.vlm_families import FAMILIES, family_of
from tokred.core.carried import CarriedTokens
from tokred.core.decoder import DecoderMethod, PromptMethod
from tokred.core.encoded import Encoded
from tokred.core.errors import ConflictError, MissingSiteError, UnsupportedModelError
from tokred.core.host import Attachment, Host
from tokred.core.method import Method, VisualMethod
from tokred.core.sites import PromptInfo
from tokred.core.trace import Trace

__all__ = ["HFVLMHost", "Pipeline"]

#: outer models (with a language head) by the inner one they hold
_OUTER = tuple(sorted(f"{name.removesuffix('Model')}ForConditionalGeneration" for name in FAMILIES))


class HFVLMHost(Host):
    """Multimodal models of transformers that put visual tokens into the prompt of a language model.

    Attributes:
        outer: the model with the language head, None where the inner model alone was given. inner: without it.
    """

    family = "transformers multimodal"
    classes = _OUTER
    sites = ("VisualFeatures", "EncoderBlock", "Prompt", "PrefillLayer", "FeedForward", "CacheAfterPrefill")
    refusals: ClassVar[dict[str, str]] = {
        **REFUSALS,
        "quantized, offloaded or paged cache": "methods between and behind layers take entries out of it",
        "positions='compact' on Qwen-VL": "its positions are places in time and space, which a survivor keeps",
        "right padding in generate": "the next token would be predicted from padding, patched or not",
        "Pixtral": "a Pixtral tower packs images of many sizes into one sequence without a grid of their own",
        "Mllama": "its images enter by cross-attention, not as tokens of the prompt",
        "Blip2": "its query tokens are few and learnt, there is nothing to reduce",
        "InstructBlip": "its query tokens are few and learnt, there is nothing to reduce",
    }

    def __init__(self, model: Any) -> None:
        self.outer: Any = None if family_of(model) is not None else model
        self.inner: Any = model if self.outer is None else model.model
        kind = family_of(self.inner)
        assert kind is not None
        self.parts = kind(self.inner)
        self.root = model

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        if not isinstance(model, PreTrainedModel):
            return False
        return family_of(model) is not None or family_of(getattr(model, "model", model)) is not None

    def place(self, root: nn.Module) -> None:
        self.root = root

    def describe_prompt(self, given: object) -> PromptInfo:
        """A call in numbers: from sizes, or from what the processor returned (as `tokred.flops` takes them)."""
        from tokred.adapters.vlm_describe import describe_prompt

        return describe_prompt(self, given)

    def tower_host(self) -> Host:
        """The host of the vision tower, for methods that act inside it."""
        from tokred.adapters.registry import find_host

        host = find_host(self.parts.tower_module)
        host.place(self.outer if self.outer is not None else self.inner)
        return host

    def attach(self, methods: Sequence[Method], options: Mapping[str, Any]) -> Attachment:
        language = [m for m in methods if isinstance(m, (DecoderMethod, PromptMethod))]
        visual = [m for m in methods if m not in language and "VisualFeatures" in m.acts_at(self.sites)]
        inside: list[Method] = [m for m in methods if m not in visual and m not in language]
        owners: dict[int, str] = {}
        for decoding in language:
            if isinstance(decoding, DecoderMethod):
                inside += self._encoder_part(decoding)
                part = decoding.visual_part()
                if part is not None:
                    visual.append(part)
                    owners[id(part)] = decoding.spoken
        if options.get("exit") == "carry":
            visual.append(CarriedTokens())
            options = {**options, "exit": "restore"}
        if len(visual) > 1:
            names = " and ".join(owners.get(id(m), m.spoken) for m in visual)
            raise ConflictError(
                f"{names} both choose the visual tokens that the language model reads; give one of them"
            )
        parts: list[Any] = []
        try:
            if inside:
                parts.append(self.tower_host().attach(inside, options))
            if visual or language:
                method = visual[0] if visual else None
                assert method is None or isinstance(method, VisualMethod)
                front = VisualSession(self, method, options, parts[0] if parts else None)
                parts.append(front)
                if language:
                    session = DecoderSession(front, Decoder(self.parts.language_model, self.parts), language)
                    front.notes_columns = True
                    front.install()
                    parts.append(session)
                    session.install()
                else:
                    front.install()
        except BaseException:
            for part in reversed(parts):
                part.remove()
            raise
        return parts[0] if len(parts) == 1 else Pipeline(parts)

    def _encoder_part(self, method: DecoderMethod) -> list[Method]:
        """What a method of the language model does inside the vision tower."""
        part = method.encoder_part()
        if part is None:
            return []
        try:
            self.tower_host()
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{type(method).__name__} acts inside the vision tower too, which is not possible here: {error}. Use "
                f"{type(method).__name__}({method.without_encoder}) to leave the tower alone"
            ) from error
        return [part]


class Pipeline:
    """Several attachments of one model, in the order of the data."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)

    @property
    def trace(self) -> Trace:
        first, *rest = [part.trace for part in self.parts]
        for trace in rest:
            first = first.followed_by(trace)
        return first

    def encode_inputs(self, inputs: Mapping[str, Any]) -> Encoded:
        inside = [part for part in self.parts if isinstance(part, DecoderSession)]
        if inside:
            names = ", ".join(method.spoken for method in inside[0].all_methods)
            raise MissingSiteError(f"{names}: acts inside the language model, and encode() stops before it")
        return next(part for part in self.parts if hasattr(part, "encode_inputs")).encode_inputs(inputs)

    def request(self, **given: Any) -> Any:
        return next(part for part in self.parts if hasattr(part, "request")).request(**given)

    def remove(self) -> None:
        for part in reversed(self.parts):
            part.remove()
