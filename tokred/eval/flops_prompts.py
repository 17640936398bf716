"""`tokred flops` of language models: the prefill of a prompt under methods inside them, beside what the papers say.

Everything is counted as the papers on language models count: two FLOPs a multiply-add, and half of the products of
attention, as a causal mask leaves them. The models are those of the papers, as configs without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokred.core.flops import Flops, flops
from tokred.core.method import resolve
from tokred.eval.report import table

__all__ = ["MODELS", "REPORTED", "Reported", "prompt_config", "prompt_rows", "prompt_table", "reported_rows"]

_CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_CLIP = {**_CLIP_L, "image_size": 336, "patch_size": 14, "projection_dim": 768}


def _text(kind: str, dim: int, inner: int, depth: int, kv_heads: int, vocabulary: int, **more: Any) -> Any:
    import transformers

    return getattr(transformers, f"{kind}Config")(
        hidden_size=dim,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=32,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        **more,
    )


def _llava() -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig

    language = _text("Llama", 4096, 11008, 32, 32, 32064)
    return LlavaConfig(vision_config=CLIPVisionConfig(**_CLIP), text_config=language)


#: shapes of the papers' models, by the names that `tokred flops --model` takes
MODELS: dict[str, Callable[[], Any]] = {
    "llava-1.5-7b": _llava,
    "llama-3.1-8b": lambda: _text("Llama", 4096, 14336, 32, 8, 128256),
    "mistral-nemo": lambda: _text("Mistral", 5120, 14336, 40, 8, 131072, head_dim=128, sliding_window=None),
    "phi-3.5-mini": lambda: _text("Phi3", 3072, 8192, 32, 32, 32064, pad_token_id=0, sliding_window=None),
}


@dataclass(frozen=True)
class Reported:
    """A setting, and what a paper prints of it.

    Attributes:
        label: in place of the method's own. saved, factor: what the paper says, as a share or as "times fewer".
        remark: what is open about the comparison.
    """

    model: str
    method: tuple[str, dict[str, Any]]
    sizes: Mapping[str, int]
    saved: float | None = None
    factor: float | None = None
    remark: str = ""
    label: str = ""


_CORE = "UNVERIFIED: neither prompt nor layer is printed"
_DROP = "UNVERIFIED: formula not printed"
_GEM = "time on an H100"
_GEMS = "time; its text says so of all three models, which multiply-adds do not bear out"


def _core(layer: int, text: int, remark: str = _CORE) -> Reported:
    sizes = {"text_tokens": text, "kept_tokens": 64}
    return Reported("llava-1.5-7b", ("corematching", {"prune_layer": layer}), sizes, factor=5.0, remark=remark)


def _must(text: int, method: tuple[str, dict[str, Any]], remark: str, label: str) -> Reported:
    sizes = {"text_tokens": text, "kept_tokens": 45}
    return Reported("llava-1.5-7b", method, sizes, saved=0.885, remark=remark, label=label)


def _gem(model: str, remark: str) -> list[Reported]:
    method: tuple[str, dict[str, Any]] = ("gemfilter", {"k": 1024})
    short = [Reported(model, method, {"text_tokens": n}) for n in (8192, 32768)]
    return [*short, Reported(model, method, {"text_tokens": 131072}, factor=2.4, remark=remark)]


_PRUNE = ("mustdrop", {"preset": 64, "retained_tokens": 309})
_EVERY = ("random_tokens", {"budget": 45})
#: the papers' settings as far as they are known; 45 of 576 tokens are MustDrop's 92.2 %, 309 its figure after merging
REPORTED: tuple[Reported, ...] = (
    _core(0, 64),
    _core(1, 64),
    _core(2, 64),
    _core(0, 40),
    _must(0, _PRUNE, f"{_DROP}; text left out", "MustDrop, 312 then 45"),
    _must(64, _PRUNE, _DROP, "MustDrop, 312 then 45"),
    _must(0, _EVERY, f"{_DROP}; text left out", "45 in every layer"),
    _must(24, _EVERY, _DROP, "45 in every layer"),
    _must(64, _EVERY, _DROP, "45 in every layer"),
    *_gem("llama-3.1-8b", _GEM),
    *_gem("mistral-nemo", _GEMS),
    *_gem("phi-3.5-mini", _GEMS),
)


def prompt_config(model: str) -> Any:
    """The config of one of `MODELS`."""
    return MODELS[model]()


def reported_rows(model: str) -> list[dict[str, Any]]:
    """What papers report of a model: for each kind of prompt a row unreduced, then those of the methods."""
    rows: list[dict[str, Any]] = []
    config = prompt_config(model)
    seen: list[int] = []
    reported = [one for one in REPORTED if one.model == model]
    for one in reported:
        if one.sizes["text_tokens"] not in seen:
            seen.append(one.sizes["text_tokens"])
            same = [r for r in reported if r.sizes["text_tokens"] == seen[-1]]
            rows += _rows(config, same)
    return rows


def _rows(config: Any, reported: Sequence[Reported]) -> list[dict[str, Any]]:
    plain = flops(config, {"text_tokens": reported[0].sizes["text_tokens"]}, causal=True)
    rows = [_row("unreduced", reported[0].sizes, plain, plain)]
    for one in reported:
        (method,) = resolve(*one.method)
        row = _row(one.label or repr(method), one.sizes, flops(config, one.sizes, method, causal=True), plain)
        rows.append({**row, "paper_saved": one.saved, "paper_factor": one.factor, "remark": one.remark})
    return rows


def prompt_rows(
    model: str, sizes: Mapping[str, Any], methods: Sequence[tuple[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """One row unreduced, one for each method (name, parameters), for a prompt of `sizes` as `tokred.flops` takes them.

    "prefill_tflops" is of the language model alone, and "saved" and "factor" compare it; "total_saved" counts vision
    and scoring, too; "decode_gflops" is the first new token's.
    """
    config = prompt_config(model)
    plain = flops(config, sizes, causal=True)
    rows = [_row("unreduced", sizes, plain, plain)]
    for name, parameters in methods:
        (method,) = resolve(name, parameters)
        rows.append(_row(repr(method), sizes, flops(config, sizes, method, causal=True), plain))
    return rows


def _row(label: str, sizes: Mapping[str, Any], cost: Flops, plain: Flops) -> dict[str, Any]:
    return {
        "method": label,
        "sizes": dict(sizes),
        "llm_tokens": list(cost.llm_tokens),
        "cache_tokens": list(cost.cache_tokens),
        "prefill_tflops": 2 * cost.llm / 1e12,
        "saved": 1 - cost.llm / plain.llm,
        "factor": plain.llm / cost.llm,
        "total_tflops": 2 * cost.total / 1e12,
        "total_saved": 1 - cost.total / plain.total,
        "decode_gflops": 2 * cost.decode / 1e9,
        "decode_factor": plain.decode / cost.decode,
        "paper_saved": None,
        "paper_factor": None,
        "remark": "",
    }


def prompt_table(model: str, rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    header = ["method", "text", "tokens", "cache", "prefill", "saved", "fewer", "all", "decode", "fewer", "paper says"]
    groups: list[list[list[str]]] = []
    for row in rows:
        if row["method"] == "unreduced":
            groups.append([])
        groups[-1].append(
            [
                row["method"],
                str(row["sizes"].get("text_tokens", "")),
                _span(row["llm_tokens"]),
                _span(row["cache_tokens"]),
                f"{row['prefill_tflops']:.2f}",
                f"{row['saved']:.1%}",
                f"{row['factor']:.2f}x",
                f"{row['total_saved']:.1%}",
                f"{row['decode_gflops']:.2f}",
                f"{row['decode_factor']:.2f}x",
                _paper(row),
            ]
        )
    notes = (
        "text: tokens that are not of images. tokens: in the first and the last layer; cache: what their caches hold.\n"
        "prefill: TFLOPs of the language model, two a multiply-add, half of the products of attention (causal).\n"
        "all: saved with vision and scoring counted. decode: GFLOPs of the first new token. No head is counted."
    )
    remarks = list(dict.fromkeys(row["remark"] for row in rows if row["remark"]))
    notes += "".join(f"\n[{number}] {remark}" for number, remark in enumerate(remarks, 1))
    numbers = {remark: f"[{number}]" for number, remark in enumerate(remarks, 1)}
    body = iter(rows)
    for group in groups:
        for cells in group:
            cells[-1] = " ".join(filter(None, [cells[-1], numbers.get(next(body)["remark"], "")]))
    return f"{model}\n\n{table(header, groups)}\n\n{notes}"


def _span(tokens: Sequence[int]) -> str:
    return str(tokens[0]) if tokens[0] == tokens[-1] else f"{tokens[0]}>{tokens[-1]}"


def _paper(row: Mapping[str, Any]) -> str:
    if row["paper_saved"] is not None:
        return f"{row['paper_saved']:.1%}"
    return "" if row["paper_factor"] is None else f"{row['paper_factor']:g}x"
