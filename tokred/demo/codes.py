"""The job of the tab Tokenize: a picture to a file of tokens, and the picture back from any number of them."""

from __future__ import annotations

import functools
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokred.core.errors import InvalidParameterError
from tokred.demo.pictures import Stage, enlarged
from tokred.eval.token_files import GUIDANCE, STEPS, decode_file, encode_file

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["TOKENIZERS", "Coded", "Range", "decode", "encode", "token_range"]

#: bundled tokenizers: what they are called on the command line -> what the page calls them
TOKENIZERS = {
    "flextok": "FlexTok: any number of tokens",
    "textok": "TexTok: beside a caption",
    "tokenflow": "TokenFlow: codes in scales",
    "vq": "VQ: one code a patch",
}


PREFIX, KEPT = "tokens-", 3600  # folders of token files, and seconds for which they stay


@dataclass(frozen=True)
class Range:
    """Numbers of tokens that a tokenizer gives pictures back from, ascending, and whether it reads a caption."""

    lengths: tuple[int, ...]
    reads_text: bool

    def nearest(self, wanted: float) -> int:
        """The number of tokens nearest to what a slider says."""
        return min(self.lengths, key=lambda length: abs(length - wanted))


@dataclass(frozen=True, eq=False)
class Coded:
    """What a picture gave.

    Attributes:
        original: as the tokenizer sees it. stages: what growing numbers of tokens give back; `chosen` is among them.
        chosen: the one of `tokens`. file: of the tokens. found: what `encode_file` says.
    """

    original: Image
    stages: list[Stage]
    chosen: Image
    tokens: int
    file: Path
    found: dict[str, Any]


@functools.lru_cache(maxsize=len(TOKENIZERS))
def _opened(model: str) -> Any:
    from tokred.zoo.tokenizers import open_tokenizer

    if model not in TOKENIZERS:
        raise InvalidParameterError(f"no bundled tokenizer is called {model!r}: choose {', '.join(TOKENIZERS)}")
    return open_tokenizer(model)[0]


def token_range(model: str) -> Range:
    """What the slider of a tokenizer may say. `InvalidParameterError`: no such tokenizer."""
    tokenizer = _opened(model)
    most = tokenizer.num_tokens
    config = getattr(getattr(tokenizer, "model", None), "config", None)
    text = bool(getattr(config, "text_in_encoder", False) or getattr(config, "text_in_decoder", False))
    if not tokenizer.prefixes:
        return Range((most,), text)
    scales = getattr(getattr(tokenizer, "quantizer", None), "lengths", None)  # TokenFlow: whole scales
    return Range(tuple(scales) if scales is not None else tuple(range(1, most + 1)), text)


@torch.inference_mode()
def encode(picture: Image, model: str, tokens: float, caption: str, folder: Path) -> Coded:
    """Write a picture's first tokens into a file below `folder`, and what they and other numbers of tokens give back.

    Args:
        tokens: the nearest number that the tokenizer can do is taken. caption: of tokenizers that read one; may be
            empty.

    Raises:
        TokredError: no such tokenizer, or a caption that it cannot read.
    """
    from tokred.generation.images import to_pil, to_pixels

    tokenizer, span = _opened(model), token_range(model)
    count = span.nearest(tokens)
    words = " ".join(caption.split()) or None if span.reads_text else None
    _sweep(folder)
    place = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))  # two pictures at once do not write one file
    found = encode_file(picture, place / f"{model}-{count}.ftk", model, count, words)
    pixels = to_pixels(picture, tokenizer.image_size)
    lengths = [length for length in span.lengths if length in _marks(span) or length == count]
    pictures = _given_back(tokenizer, pixels, lengths, words)
    stages = [
        Stage(enlarged(to_pil(one)[0]), f"{length} token{'s' * (length > 1)}")
        for length, one in zip(lengths, pictures, strict=True)
    ]
    chosen = stages[lengths.index(count)].picture
    return Coded(enlarged(to_pil(pixels)[0]), stages, chosen, count, Path(found["file"]), found)


def _sweep(folder: Path) -> None:
    """Remove what was handed out long ago; Gradio has a copy of its own."""
    for old in folder.glob(f"{PREFIX}*"):
        if time.time() - old.stat().st_mtime > KEPT:
            shutil.rmtree(old, ignore_errors=True)


def _marks(span: Range) -> tuple[int, ...]:
    """Numbers of tokens that are shown beside the chosen one: 1, 2, 4 ... or all scales."""
    if len(span.lengths) <= 8:
        return span.lengths
    return tuple(length for length in span.lengths if length & (length - 1) == 0)


def _given_back(tokenizer: Any, pixels: Any, lengths: list[int], caption: str | None) -> list[Any]:
    """Pictures (1, 3, H, W) from numbers of tokens; of a decoder that samples with the same noise for all."""
    if tokenizer.codebook_size is None:
        return [tokenizer.decode(tokenizer.encode(pixels, caption, truncate=False), caption, truncate=False)]
    codes = tokenizer.encode(pixels)
    if not tokenizer.prefixes:
        return [tokenizer.decode(codes)]
    if hasattr(tokenizer, "quantizer"):
        return [tokenizer.decode(codes, length) for length in lengths]
    options = {
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "height": pixels.shape[2],
        "width": pixels.shape[3],
    }
    return list(tokenizer.progressive(codes, lengths, torch.Generator().manual_seed(0), **options))


def decode(file: str | Path | None) -> tuple[Image, dict[str, Any]]:
    """The picture of an uploaded token file, and what `decode_file` says.

    Raises:
        TokredError: nothing was given, it is no such file, or of a tokenizer that is not bundled.
    """
    from PIL import Image

    if file is None:
        raise InvalidParameterError("there is no token file yet: upload one (.ftk), or encode a picture first")
    with tempfile.TemporaryDirectory() as folder:
        found = decode_file(Path(file), Path(folder) / "picture.png")
        with Image.open(found["file"]) as picture:
            return enlarged(picture.convert("RGB")), found
