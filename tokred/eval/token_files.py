"""`tokred encode` and `tokred decode`: a picture to a token file and back, and what JPEG and WebP need for as much.

Files are those of `tokred.generation.packing`.
"""

from __future__ import annotations

import io
import math
import os
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tokred.core.errors import InvalidParameterError
from tokred.eval.bench import require

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "as_good",
    "compressed",
    "decode_file",
    "decoded",
    "encode_file",
    "open_picture",
    "picture_format",
    "samples",
    "told",
    "write_picture",
]

#: Format of PIL -> its qualities, worst to best.
FORMATS = {"JPEG": range(1, 101), "WEBP": range(0, 101)}
STEPS, GUIDANCE = 25, 1.0  # of a decoder that samples: without guidance it is nearest to the picture


def open_picture(source: str) -> Image:
    """A picture file; "demo" is a held-out card.

    Raises:
        FileNotFoundError: no such file. InvalidParameterError: no picture.
    """
    from PIL import Image

    if source == "demo":
        require("demo", "sklearn", "skimage", what="the demo card")
        from tokred.data.cards import DigitCards

        return Image.fromarray(DigitCards("test", seed=777).render(1).images[0].permute(1, 2, 0).numpy())
    if not Path(source).is_file():
        raise FileNotFoundError(f"no picture at {source!r} (a path, or the word: demo)")
    try:
        with Image.open(source) as file:
            file.load()
            return file.copy()
    except Exception as error:
        raise InvalidParameterError(f"{source} cannot be read as a picture: {error}") from error


def _psnr(found: Image, wanted: Image) -> float:
    """Of two pictures of 8 bits, in dB."""
    first, second = (np.asarray(picture.convert("RGB"), dtype=np.float64) for picture in (found, wanted))
    error = float(np.square(first - second).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def compressed(picture: Image, form: str, quality: int) -> tuple[int, float]:
    """Bytes of a picture in a format of PIL at a quality, and PSNR of what it gives back."""
    from PIL import Image

    buffer = io.BytesIO()
    picture.save(buffer, form, quality=quality, **({"optimize": True} if form == "JPEG" else {"method": 6}))
    with Image.open(io.BytesIO(buffer.getvalue())) as again:
        return buffer.getbuffer().nbytes, _psnr(again, picture)


def as_good(picture: Image, form: str, psnr: float) -> dict[str, Any]:
    """The lowest quality of a format at which its PSNR is at least `psnr`, by bisection: quality, bytes, psnr.

    `reached` is "equal", or "lowest" where the lowest quality is already better, or "none" where the highest is not as
    good (its numbers then).
    """
    qualities = FORMATS[form]
    low, high = 0, len(qualities) - 1
    size, found = compressed(picture, form, qualities[low])
    if found >= psnr:
        return {"format": form, "quality": qualities[low], "bytes": size, "psnr": found, "reached": "lowest"}
    size, found = compressed(picture, form, qualities[high])
    if found < psnr:
        return {"format": form, "quality": qualities[high], "bytes": size, "psnr": found, "reached": "none"}
    while high - low > 1:  # qualities[low] is worse than psnr, qualities[high] is not
        middle = (low + high) // 2
        if compressed(picture, form, qualities[middle])[1] < psnr:
            low = middle
        else:
            high = middle
    size, found = compressed(picture, form, qualities[high])
    return {"format": form, "quality": qualities[high], "bytes": size, "psnr": found, "reached": "equal"}


def encode_file(
    image: Image,
    out: Path,
    model: str = "flextok",
    num_tokens: int | None = None,
    caption: str | None = None,
    compare: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the tokens of a picture; what was written, and with `compare` what other formats need (JSON types).

    Args:
        image: scaled and cut to the tokenizer's square. model: see `tokred.zoo.tokenizers.open_tokenizer`.
        num_tokens: of tokenizers whose prefixes can be decoded. caption: of tokenizers that read one.
        seed: of the decoder's noise for the comparison.

    Raises:
        InvalidParameterError: an option that the tokenizer does not take, or outside its range; nothing is written.
    """
    require("diffusers", "diffusers", "transformers", what="tokred encode")
    from tokred.generation.images import to_pil, to_pixels
    from tokred.generation.packing import load_tokens, save_tokens
    from tokred.zoo.tokenizers import open_tokenizer

    tokenizer: Any
    tokenizer, made_by = open_tokenizer(model)
    pixels = to_pixels(image, tokenizer.image_size)
    discrete = tokenizer.codebook_size is not None
    if not tokenizer.prefixes and num_tokens not in (None, tokenizer.num_tokens):
        raise InvalidParameterError(f"--num-tokens {num_tokens}: {model} always takes {tokenizer.num_tokens}")
    if discrete:
        if caption is not None:
            raise InvalidParameterError(f"--caption: {model} reads no text")
        tokens = tokenizer.encode(pixels, *([num_tokens] if tokenizer.prefixes else []))
    else:
        tokens = tokenizer.encode(pixels, _caption(tokenizer, model, caption), truncate=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    form: dict[str, Any] = (
        {"codebook_size": tokenizer.codebook_size, "packed": True} if discrete else {"caption": caption}
    )
    size = save_tokens(out, tokens, fingerprint=made_by, image_size=tokenizer.image_size, **form)
    written = load_tokens(out)
    found: dict[str, Any] = {
        "file": str(out),
        "bytes": size,
        "payload_bytes": math.ceil(written.payload_bits / 8),
        "tokens": list(written.tokens.shape),
        "model": model,
        "fingerprint": made_by,
        "image_size": list(written.image_size),
        "caption": caption,
    }
    if compare:
        picture = to_pil(pixels)[0]
        again = to_pil(decoded(tokenizer, model, written, None, None, seed if samples(tokenizer) else None, None))[0]
        found["psnr"] = _psnr(again, picture)
        found["compared"] = [as_good(picture, other, found["psnr"]) for other in FORMATS]
    return found


def decode_file(
    file: Path,
    out: Path,
    model: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    num_tokens: int | None = None,
    allow_truncated: bool = False,
) -> dict[str, Any]:
    """Write the picture of a token file; what was written (JSON types).

    Args:
        model: which tokenizer made it; None is the bundled one that did. Another than the file's is an error.
        steps, guidance, seed: of a decoder that samples; None is 25, 1 and 0.
        num_tokens: use so many first tokens. allow_truncated: read what is left of a file that was cut short.

    Raises:
        InvalidParameterError: a file of another model or a damaged one, an option that the tokenizer does not take; no
            picture is written.
    """
    require("diffusers", "diffusers", "transformers", what="tokred decode")
    from tokred.generation.images import to_pil
    from tokred.generation.packing import load_tokens
    from tokred.zoo.tokenizers import open_tokenizer

    form = picture_format(out)
    known = load_tokens(file, allow_truncated=allow_truncated)
    name = model or ("textok" if known.bits is None else _maker(known.crc))
    tokenizer, made_by = open_tokenizer(name)
    if (tokenizer.codebook_size is None) != (known.bits is None):
        held = "latents" if known.bits is None else "ids"
        raise InvalidParameterError(f"{file} holds {held}, which {name} does not decode: give the --model that made it")
    tokens = load_tokens(
        file, allow_truncated=allow_truncated, fingerprint=made_by, codebook_size=tokenizer.codebook_size
    )
    picture = to_pil(decoded(tokenizer, name, tokens, steps, guidance, seed, num_tokens))[0]
    write_picture(picture, out, form)
    used = len(tokens.tokens) if num_tokens is None else min(num_tokens, len(tokens.tokens))
    return {
        "file": str(out),
        "tokens": used,
        "truncated": tokens.truncated,
        "model": name,
        "caption": tokens.caption,
        "image_size": list(tokens.image_size),
    }


def picture_format(out: Path) -> str:
    """PIL's name of the format of a file that is going to be written.

    Raises:
        InvalidParameterError: PIL writes no files with this ending.
    """
    from PIL import Image

    form = Image.registered_extensions().get(out.suffix.lower())
    if form is None or form not in Image.SAVE:
        raise InvalidParameterError(f"--out {out}: unknown file extension {out.suffix!r}; expected .png, .jpg or such")
    return form


def write_picture(picture: Image, out: Path, form: str) -> None:
    """Write a picture; the file appears whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        picture.save(partial, form)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def samples(tokenizer: Any) -> bool:
    """Whether its decoder draws noise and takes steps."""
    from tokred.generation.flextok import FlexTok

    return isinstance(tokenizer, FlexTok)


def _maker(crc: int) -> str:
    """The bundled tokenizer of ids whose fingerprint has this checksum; flextok where none has."""
    from tokred.zoo.tokenizers import SHORT, fingerprint_of, folder_of

    for name in ("tokenflow", "vq"):
        if folder_of(SHORT[name]).is_dir() and zlib.crc32(fingerprint_of(name).encode()) == crc:
            return name
    return "flextok"


def _caption(tokenizer: Any, model: str, caption: str | None) -> str | None:
    config = tokenizer.model.config
    if caption is not None and not (config.text_in_encoder or config.text_in_decoder):
        raise InvalidParameterError(f"--caption: {model} was trained without text")
    return caption


def decoded(
    tokenizer: Any,
    model: str,
    held: Any,
    steps: int | None,
    guidance: float | None,
    seed: int | None,
    num_tokens: int | None,
) -> torch.Tensor:
    """The picture (1, 3, H, W) of what a file holds."""
    if samples(tokenizer):
        height, width = held.image_size
        return tokenizer.decode(
            held.tokens[None],
            num_tokens,
            num_inference_steps=STEPS if steps is None else steps,
            guidance_scale=GUIDANCE if guidance is None else guidance,
            generator=torch.Generator().manual_seed(seed or 0),
            height=height,
            width=width,
        )
    given = {"steps": steps, "guidance": guidance, "seed": seed}
    if not tokenizer.prefixes and num_tokens not in (None, len(held.tokens)):
        raise InvalidParameterError(f"--num-tokens {num_tokens}: {model} decodes all {len(held.tokens)} of a picture")
    for name, value in given.items():
        if value is not None:
            raise InvalidParameterError(f"--{name}: the decoder of {model} does not sample")
    if held.image_size != (tokenizer.image_size,) * 2:
        raise InvalidParameterError(
            f"the file is of {held.image_size[0]} x {held.image_size[1]} pixels, {model} makes "
            f"{tokenizer.image_size} x {tokenizer.image_size}"
        )
    if held.bits is not None:
        return tokenizer.decode(held.tokens[None], *([num_tokens] if tokenizer.prefixes else []))
    return tokenizer.decode(held.tokens[None], _caption(tokenizer, model, held.caption), truncate=False)


def told(found: Mapping[str, Any]) -> str:
    """What `encode_file` gave back, for a terminal."""
    height, width = found["image_size"]
    shape = " x ".join(map(str, found["tokens"]))
    lines = [
        f"{width} x {height} pixels > {shape} {'tokens' if len(found['tokens']) == 1 else 'numbers'}: "
        f"{found['payload_bytes']} bytes, {found['bytes']} with the header"
    ]
    if "psnr" in found:
        lines.append(f"what they give back: {found['psnr']:.2f} dB; for as much")
        for one in found["compared"]:
            why = {
                "equal": "",
                "lowest": ", which is better: there is no lower quality",
                "none": ", the highest quality, which does not reach it",
            }[one["reached"]]
            lines.append(
                f"  {one['format']} needs {one['bytes']} bytes (quality {one['quality']}, {one['psnr']:.2f} dB{why})"
            )
    return "\n".join([*lines, f"written: {found['file']}"])
