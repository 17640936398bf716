"""Token files: the tokens of one picture on disc.

Ids go into an `.ftk` file, a format of ours; all integers are little-endian:

====== ========= ===================================================================================================
offset type      meaning
====== ========= ===================================================================================================
0      4 bytes   `FTK1`
4      u8        version, 1
5      u8        flags: 1 = the VAE's mode was encoded (not a sample), 2 = encoded in float32, 4 = bit-packed payload;
                 the others are reserved and 0
6      u16       number of tokens n, 1 to 65535
8      u16 u16   height and width of the picture in pixels
12     u32       CRC-32 of the model's fingerprint, a text such as "hub id@revision" (UTF-8)
16     n x u16   the ids; or, bit-packed: u8 b, then n ids of b bits each, most significant bit first, zeros at the end
====== ========= ===================================================================================================

Where a prefix of the tokens can be decoded alone, so can a file that was cut short: `allow_truncated=True` reads the
ids that are whole. Codebooks beyond 65536 are always bit-packed. Nothing in the file guards the ids themselves: a
changed one decodes to another picture.

Latents go, as float16 and with the caption that decodes them, into a safetensors file.
"""

from __future__ import annotations

import os
import secrets
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokred.core.errors import InvalidParameterError

__all__ = ["TokenFile", "load_tokens", "pack_bits", "save_tokens", "unpack_bits"]

MAGIC = b"FTK1"
VERSION = 1
HEADER = struct.Struct("<4sBBHHHI")
VAE_MODE, FLOAT32, PACKED = 1, 2, 4
U16_CODEBOOK = 1 << 16  # ids below it fit the plain payload
MAX_BITS = 32
MAX_FIELD = (1 << 16) - 1  # n, height and width
LATENTS_FORMAT = "tokred-latents"


@dataclass(frozen=True)
class TokenFile:
    """What a token file holds.

    Attributes:
        tokens: ids (n,) int64, or latents (n, D) float32 (float16 in the file).
        image_size: height and width in pixels.
        crc: CRC-32 of the fingerprint of the model that made the tokens.
        fingerprint: that text where the file holds it (latents), else None.
        caption: what the latents must be decoded with; None for ids, and for latents made without a text.
        vae_mode, float32: how the ids were encoded; None for latents.
        bits: bits an id takes in the file; None for latents.
        truncated: whether the file was cut short, and `tokens` is the prefix that is left.
    """

    tokens: Tensor
    image_size: tuple[int, int]
    crc: int
    fingerprint: str | None = None
    caption: str | None = None
    vae_mode: bool | None = None
    float32: bool | None = None
    bits: int | None = None
    truncated: bool = False

    @property
    def payload_bits(self) -> int:
        """Bits that the tokens take, headers left out: n * `bits`, or n * D * 16 and 8 a byte of the caption."""
        if self.bits is not None:
            return len(self.tokens) * self.bits
        return self.tokens.numel() * 16 + 8 * len((self.caption or "").encode())


def save_tokens(
    path: str | os.PathLike[str],
    tokens: Tensor,
    *,
    fingerprint: str,
    image_size: int | tuple[int, int],
    codebook_size: int | None = None,
    packed: bool | None = None,
    vae_mode: bool = True,
    float32: bool = True,
    caption: str | None = None,
) -> int:
    """Write the tokens of one picture and return the size of the file in bytes.

    The file appears whole or not at all: it is written beside its place and moved there.

    Args:
        path: where to. An existing file is replaced.
        tokens: ids (n,) or (1, n) of an integer dtype, or latents (n, D) or (1, n, D) of a floating one.
        fingerprint: text that names the model, hub id and revision.
        image_size: side, or height and width, of the picture in pixels.
        codebook_size: number of different ids; ids only, and required for them.
        packed: write ids with ceil(log2(codebook_size)) bits each instead of 16. None does so where 16 are too few.
        vae_mode: the VAE's mode was encoded, not a sample. float32: the encoder ran in float32. Notes; ids only.
        caption: the text that the latents were encoded with and must be decoded with; latents only.

    Raises:
        InvalidParameterError: another shape or dtype, ids outside the codebook, latents that are not finite or beyond
            float16, an image size or a number of tokens that the header cannot hold, an option of the other form.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype == torch.bool or tokens.is_complex():
        what = f"dtype {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InvalidParameterError(f"tokens: {what} given, expected a tensor of integers or of floats")
    size = _image_size(image_size)
    if not isinstance(fingerprint, str) or not fingerprint:
        raise InvalidParameterError(f"fingerprint={fingerprint!r}: expected a text that names the model")
    tokens = tokens.detach().cpu()
    if tokens.is_floating_point():
        if codebook_size is not None or packed is not None:
            raise InvalidParameterError("codebook_size and packed belong to ids, but latents (floats) were given")
        content = _latent_bytes(tokens, fingerprint, size, caption)
    else:
        if caption is not None:
            raise InvalidParameterError("caption belongs to latents, but ids (integers) were given")
        flags = VAE_MODE * bool(vae_mode) | FLOAT32 * bool(float32)
        content = _id_bytes(tokens, fingerprint, size, codebook_size, packed, flags)
    _write_whole(Path(path), content)
    return len(content)


def load_tokens(
    path: str | os.PathLike[str],
    *,
    allow_truncated: bool = False,
    fingerprint: str | None = None,
    codebook_size: int | None = None,
) -> TokenFile:
    """Read what `save_tokens` wrote.

    Args:
        path: the file.
        allow_truncated: accept an `.ftk` file whose end is missing, and return the ids that are whole.
        fingerprint: the model that is going to decode; a file made by another is an error. None accepts any.
        codebook_size: number of different ids of that model; an id beyond it is an error. None accepts any.

    Raises:
        InvalidParameterError: no token file, a newer version, a damaged or truncated one, another model.
        OSError: the file cannot be read.
    """
    content = Path(path).read_bytes()
    if content[:3] == MAGIC[:3]:
        found = _read_ids(path, content, allow_truncated)
    else:
        found = _read_latents(path)
    if fingerprint is not None and found.crc != _crc(fingerprint):
        made = f"{found.fingerprint!r}" if found.fingerprint else f"the model with CRC {found.crc:08x}"
        raise InvalidParameterError(
            f"{path} was made by {made}, not by {fingerprint!r} (CRC {_crc(fingerprint):08x}): "
            "decode it with the model that made it"
        )
    largest = int(found.tokens.max())
    if codebook_size is not None and found.bits is not None and largest >= codebook_size:
        raise InvalidParameterError(
            f"{path} holds id {largest}, but there are only {codebook_size}: it is damaged, or of another model"
        )
    return found


# -- ids -------------------------------------------------------------------------------------------------------------


def _id_bytes(
    ids: Tensor, fingerprint: str, size: tuple[int, int], codebook_size: int | None, packed: bool | None, flags: int
) -> bytes:
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if ids.ndim != 1 or not 1 <= len(ids) <= MAX_FIELD:
        raise InvalidParameterError(
            f"tokens: ids of shape {tuple(ids.shape)} given, expected (n,) or (1, n), those of one picture, "
            f"n from 1 to {MAX_FIELD}"
        )
    if not isinstance(codebook_size, int) or isinstance(codebook_size, bool) or not 2 <= codebook_size <= 1 << MAX_BITS:
        raise InvalidParameterError(f"codebook_size={codebook_size!r}: expected an integer from 2 to 2^{MAX_BITS}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= codebook_size:
        raise InvalidParameterError(f"tokens: ids from {low} to {high} given, expected 0 to {codebook_size - 1}")
    if packed is None:
        packed = codebook_size > U16_CODEBOOK
    if not packed and codebook_size > U16_CODEBOOK:
        raise InvalidParameterError(f"packed=False: {codebook_size} different ids do not fit 16 bits; leave packed out")
    values = ids.to(torch.int64).numpy()
    if packed:
        bits = (codebook_size - 1).bit_length()
        flags, payload = flags | PACKED, bytes([bits]) + pack_bits(values, bits)
    else:
        payload = values.astype("<u2").tobytes()
    return HEADER.pack(MAGIC, VERSION, flags, len(values), *size, _crc(fingerprint)) + payload


def _read_ids(path: object, content: bytes, allow_truncated: bool) -> TokenFile:
    if content[:4] != MAGIC[: len(content[:4])]:
        raise InvalidParameterError(
            f"{path} starts with {content[:4]!r}, this release reads {MAGIC!r}: it is damaged, or of a newer format"
        )
    if len(content) < HEADER.size:
        raise InvalidParameterError(
            f"{path} has {len(content)} bytes, the header alone has {HEADER.size}: it is truncated beyond use"
        )
    _, version, flags, count, height, width, crc = HEADER.unpack_from(content)
    if version != VERSION or flags & ~(VAE_MODE | FLOAT32 | PACKED):
        raise InvalidParameterError(
            f"{path} has version {version} and flags {flags:#04x}, this release reads version {VERSION} and flags up "
            f"to {VAE_MODE | FLOAT32 | PACKED:#04x}: read it with a newer release of tokred"
        )
    if not (count and height and width):
        raise InvalidParameterError(f"{path} claims {count} tokens of a picture of {height} x {width}: it is damaged")
    payload, bits = content[HEADER.size :], 16
    if flags & PACKED:
        payload, bits = payload[1:], payload[0] if payload else 0
        if len(content) > HEADER.size and not 1 <= bits <= MAX_BITS:
            raise InvalidParameterError(f"{path} claims {bits} bits an id, expected 1 to {MAX_BITS}: it is damaged")
    whole = len(payload) * 8 // bits if bits else 0
    expected = -(-count * bits // 8)
    truncated = not bits or len(payload) < expected
    if len(payload) > expected and bits:
        raise InvalidParameterError(f"{path} has {len(payload) - expected} bytes too many: it is damaged")
    if truncated and (not allow_truncated or not whole):
        hint = "no whole one is left" if not whole else "allow_truncated=True reads those"
        raise InvalidParameterError(f"{path} is truncated: {whole} of its {count} tokens are whole; {hint}")
    count = min(count, whole)
    if flags & PACKED:
        values = unpack_bits(payload, bits, count)
        if not truncated and pack_bits(values, bits) != payload:
            raise InvalidParameterError(f"{path} has set bits after its last token: it is damaged")
    else:
        values = np.frombuffer(payload, "<u2", count).astype(np.int64)
    return TokenFile(
        tokens=torch.from_numpy(values),
        image_size=(height, width),
        crc=crc,
        vae_mode=bool(flags & VAE_MODE),
        float32=bool(flags & FLOAT32),
        bits=bits,
        truncated=truncated,
    )


def pack_bits(values: np.ndarray, bits: int) -> bytes:
    """Integers (n,) in [0, 2^bits) as a string of bits, most significant first, zeros up to the next whole byte."""
    places = np.arange(bits - 1, -1, -1)
    return np.packbits((values[:, None] >> places & 1).astype(np.uint8)).tobytes()


def unpack_bits(payload: bytes, bits: int, count: int) -> np.ndarray:
    """The first `count` integers of `bits` bits each, (count,) int64: undoes `pack_bits`."""
    flat = np.unpackbits(np.frombuffer(payload, np.uint8), count=count * bits)
    return flat.reshape(count, bits).astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


# -- latents ---------------------------------------------------------------------------------------------------------


def _latent_bytes(latents: Tensor, fingerprint: str, size: tuple[int, int], caption: str | None) -> bytes:
    latents = latents[0] if latents.ndim == 3 and len(latents) == 1 else latents
    if latents.ndim != 2 or 0 in latents.shape:
        raise InvalidParameterError(
            f"tokens: latents of shape {tuple(latents.shape)} given, expected (n, D) or (1, n, D), those of one picture"
        )
    if caption is not None and not isinstance(caption, str):
        raise InvalidParameterError(f"caption={caption!r}: expected a text or None")
    half = latents.to(torch.float16)
    if not half.isfinite().all():
        raise InvalidParameterError(
            "tokens: latents are stored as float16, so they must be finite and no larger than "
            f"{torch.finfo(torch.float16).max:.0f}"
        )
    notes = {"format": LATENTS_FORMAT, "version": str(VERSION), "fingerprint": fingerprint}
    notes |= {"height": str(size[0]), "width": str(size[1])}
    if caption is not None:
        notes["caption"] = caption
    return safetensors.torch.save({"latents": half.contiguous()}, notes)


def _read_latents(path: str | os.PathLike[str]) -> TokenFile:
    try:
        with safe_open(path, "pt") as opened:
            notes = opened.metadata() or {}
            half = opened.get_tensor("latents") if "latents" in opened.keys() else None  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InvalidParameterError(
            f"{path} is no token file, or it is damaged or truncated: neither {MAGIC!r} nor safetensors ({error})"
        ) from error
    if notes.get("format") != LATENTS_FORMAT:
        raise InvalidParameterError(f"{path} is a safetensors file, but not one that save_tokens wrote")
    if notes.get("version") != str(VERSION):
        raise InvalidParameterError(
            f"{path} has version {notes.get('version')}, this release reads {VERSION}: "
            "read it with a newer release of tokred"
        )
    try:
        size = int(notes["height"]), int(notes["width"])
        fingerprint = notes["fingerprint"]
    except (KeyError, ValueError) as error:
        raise InvalidParameterError(f"{path} lacks its image size or fingerprint: it is damaged") from error
    if half is None or half.ndim != 2 or half.dtype != torch.float16 or not half.isfinite().all():
        raise InvalidParameterError(f"{path} holds no finite latents (n, D) of float16: it is damaged")
    return TokenFile(half.float(), size, _crc(fingerprint), fingerprint, notes.get("caption"))


# -- both ------------------------------------------------------------------------------------------------------------


def _crc(fingerprint: str) -> int:
    return zlib.crc32(fingerprint.encode())


def _image_size(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else size
    fits = isinstance(pair, (tuple, list)) and len(pair) == 2
    if not fits or not all(isinstance(side, int) and 1 <= side <= MAX_FIELD for side in pair):
        raise InvalidParameterError(
            f"image_size={size!r}: expected a side, or (height, width), in pixels, each from 1 to {MAX_FIELD}"
        )
    return pair[0], pair[1]


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
