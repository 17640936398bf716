"""Token files: round trips, the bytes of the specification, prefixes, and files that are not what they seem."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokred.core.errors import InvalidParameterError
from tokred.generation import packing
from tokred.generation.packing import TokenFile, load_tokens, pack_bits, save_tokens, unpack_bits

MODEL = "org/model@rev"


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


def write(path: Path, tokens: Tensor, **options: Any) -> int:
    given = {"fingerprint": MODEL, "image_size": 256, **options}
    if not tokens.is_floating_point():
        given.setdefault("codebook_size", 64000)
    return save_tokens(path, tokens, **given)


def slow_bits(values: list[int], bits: int) -> bytes:
    text = "".join(f"{value:0{bits}b}" for value in values)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[start : start + 8], 2) for start in range(0, len(text), 8))


# -- ids -------------------------------------------------------------------------------------------------------------


def test_the_bytes_are_those_of_the_specification(tmp_path: Path) -> None:
    size = write(tmp_path / "a.ftk", ids(1, 0x1234, 63999), image_size=(192, 256), vae_mode=True, float32=False)
    crc = zlib.crc32(MODEL.encode())
    want = b"FTK1" + bytes([1, 1]) + struct.pack("<HHHI", 3, 192, 256, crc) + struct.pack("<HHH", 1, 0x1234, 63999)
    assert (tmp_path / "a.ftk").read_bytes() == want
    assert size == len(want) == 16 + 6


@pytest.mark.parametrize(("n", "payload"), [(32, 64), (256, 512)])
def test_rates_of_the_specification(tmp_path: Path, n: int, payload: int) -> None:
    assert write(tmp_path / "a.ftk", torch.zeros(n, dtype=torch.long)) == 16 + payload
    assert load_tokens(tmp_path / "a.ftk").payload_bits == 8 * payload


@given(st.data())
def test_ids_come_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "round.ftk"
    codebook = data.draw(st.one_of(st.integers(2, 70000), st.integers(2, 1 << 32)))
    values = data.draw(st.lists(st.integers(0, codebook - 1), min_size=1, max_size=40))
    packed = data.draw(st.sampled_from([None, True] + [False] * (codebook <= 65536)))
    size = (data.draw(st.integers(1, 65535)), data.draw(st.integers(1, 65535)))
    mode, full = data.draw(st.booleans()), data.draw(st.booleans())
    options = {"codebook_size": codebook, "packed": packed, "image_size": size, "vae_mode": mode, "float32": full}
    written = write(path, ids(*values), **options)
    got = load_tokens(path, fingerprint=MODEL, codebook_size=codebook)
    assert got.tokens.tolist() == values
    assert got.tokens.dtype == torch.int64
    assert (got.image_size, got.vae_mode, got.float32, got.truncated) == (size, mode, full, False)
    bits = (codebook - 1).bit_length() if packed or codebook > 65536 else 16
    assert got.bits == bits
    assert written == path.stat().st_size == 16 + (packed or codebook > 65536) + -(-len(values) * bits // 8)


@given(st.integers(1, 32), st.data())
def test_bits_against_strings_of_digits(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=30))
    packed = pack_bits(np.array(values, dtype=np.int64), bits)
    assert packed == slow_bits(values, bits)
    count = data.draw(st.integers(0, len(values)))
    assert unpack_bits(packed, bits, count).tolist() == values[:count]


@given(st.sampled_from([64000, 120, 2, 100_000, 2**20]), st.integers(1, 20), st.data())
def test_a_file_cut_anywhere_is_a_prefix(
    tmp_path_factory: pytest.TempPathFactory, codebook: int, n: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.ftk"
    values = data.draw(st.lists(st.integers(0, codebook - 1), min_size=n, max_size=n))
    packed = None if codebook == 64000 else True
    whole = write(path, ids(*values), codebook_size=codebook, packed=packed)
    cut = data.draw(st.integers(16, whole - 1))
    path.write_bytes(path.read_bytes()[:cut])
    bits = 16 if packed is None else (codebook - 1).bit_length()
    left = max(0, (cut - 16 - bool(packed)) * 8 // bits)
    with pytest.raises(InvalidParameterError, match=f"{min(left, n)} of its {n} tokens"):
        load_tokens(path)
    if left == 0:
        with pytest.raises(InvalidParameterError, match="no whole one"):
            load_tokens(path, allow_truncated=True)
        return
    got = load_tokens(path, allow_truncated=True, fingerprint=MODEL)
    assert got.tokens.tolist() == values[:left]
    assert got.truncated


def test_a_shorter_file_is_a_cut_one_with_another_count(tmp_path: Path) -> None:
    write(tmp_path / "long.ftk", ids(*range(9)))
    write(tmp_path / "short.ftk", ids(*range(4)))
    content = bytearray((tmp_path / "long.ftk").read_bytes()[: 16 + 2 * 4])
    content[6:8] = struct.pack("<H", 4)
    assert bytes(content) == (tmp_path / "short.ftk").read_bytes()
    assert not load_tokens(tmp_path / "short.ftk", allow_truncated=True).truncated


def test_one_picture_of_a_batch_and_other_integers(tmp_path: Path) -> None:
    write(tmp_path / "a.ftk", ids(3, 4)[None].to(torch.int32))
    assert load_tokens(tmp_path / "a.ftk").tokens.tolist() == [3, 4]


# -- latents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caption", ["a red über-bus", "", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_come_back(tmp_path: Path, caption: str | None, dtype: torch.dtype) -> None:
    latents = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    size = write(tmp_path / "a.safetensors", latents, image_size=(32, 48), caption=caption)
    assert size == (tmp_path / "a.safetensors").stat().st_size
    got = load_tokens(tmp_path / "a.safetensors", fingerprint=MODEL)
    assert torch.equal(got.tokens, latents[0].half().float())
    assert got.tokens.dtype == torch.float32
    assert (got.caption, got.fingerprint, got.image_size, got.bits) == (caption, MODEL, (32, 48), None)
    assert got.payload_bits == 6 * 3 * 16 + 8 * len((caption or "").encode())


def test_latents_are_stored_as_float16(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", torch.ones(2, 3))
    assert load_file(tmp_path / "a.safetensors")["latents"].dtype == torch.float16


# -- what is refused before anything is written ----------------------------------------------------------------------

BAD = {
    "negative id": (ids(-1), {}, "0 to 63999"),
    "id beyond the codebook": (ids(64000), {}, "0 to 63999"),
    "no token": (torch.zeros(0, dtype=torch.long), {}, "one picture"),
    "two pictures": (torch.zeros(2, 3, dtype=torch.long), {}, "one picture"),
    "too many tokens": (torch.zeros(65536, dtype=torch.long), {}, "65535"),
    "bools": (torch.zeros(3, dtype=torch.bool), {}, "bool"),
    "complex numbers": (torch.zeros(3, dtype=torch.complex64), {}, "complex"),
    "no codebook": (ids(1), {"codebook_size": None}, "codebook_size"),
    "a codebook of one": (ids(0), {"codebook_size": 1}, "codebook_size"),
    "16 bits too few": (ids(1), {"codebook_size": 70000, "packed": False}, "16 bits"),
    "no fingerprint": (ids(1), {"fingerprint": ""}, "fingerprint"),
    "image too large": (ids(1), {"image_size": 65536}, "image_size"),
    "image without size": (ids(1), {"image_size": (0, 5)}, "image_size"),
    "image of a fraction": (ids(1), {"image_size": 5.5}, "image_size"),
    "image of three sizes": (ids(1), {"image_size": (5, 5, 5)}, "image_size"),
    "caption of ids": (ids(1), {"caption": "a"}, "caption"),
    "codebook of latents": (torch.ones(2, 3), {"codebook_size": 5}, "codebook_size"),
    "latents of two": (torch.ones(2, 2, 3), {}, "one picture"),
    "nan": (torch.full((2, 3), torch.nan), {}, "finite"),
    "beyond float16": (torch.full((2, 3), 7e4), {}, "65504"),
    "caption that is no text": (torch.ones(2, 3), {"caption": 5}, "caption"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_leaves_no_file(tmp_path: Path, case: str) -> None:
    tokens, options, match = BAD[case]
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(InvalidParameterError, match=match):
        write(tmp_path / "a", tokens, **options)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_a_list_is_no_tensor(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="list"):
        save_tokens(tmp_path / "a", [1, 2], fingerprint=MODEL, image_size=5)  # type: ignore[arg-type]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.ftk").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("disc is full")

    monkeypatch.setattr(packing.os, "replace", fail)
    with pytest.raises(OSError, match="disc is full"):
        write(tmp_path / "a.ftk", ids(1))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.ftk", b"old")]


def test_the_file_has_ordinary_permissions(tmp_path: Path) -> None:
    write(tmp_path / "a.ftk", ids(1))
    (tmp_path / "plain").write_bytes(b"")
    assert os.stat(tmp_path / "a.ftk").st_mode == os.stat(tmp_path / "plain").st_mode


# -- files that are not what they seem -------------------------------------------------------------------------------


def changed(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


DAMAGED = {
    "newer magic": (lambda c: changed(c, 0, b"FTK2"), "newer"),
    "newer version": (lambda c: changed(c, 4, b"\x02"), "newer"),
    "reserved flag": (lambda c: changed(c, 5, b"\x0b"), "newer"),
    "no tokens": (lambda c: changed(c, 6, b"\0\0"), "damaged"),
    "no height": (lambda c: changed(c, 8, b"\0\0"), "damaged"),
    "bytes too many": (lambda c: c + b"\0", "1 bytes too many"),
    "half a header": (lambda c: c[:9], "header alone"),
    "half a magic": (lambda c: c[:3], "header alone"),
    "header only": (lambda c: c[:16], "no whole one"),
    "empty": (lambda c: b"", "no token file"),
    "foreign": (lambda c: b"\x89PNG\r\n\x1a\n" + c, "no token file"),
    "corrupt magic": (lambda c: changed(c, 0, b"X"), "no token file"),
    "another model": (lambda c: changed(c, 12, b"\0\0\0\0"), "made by"),
    "id beyond the codebook": (lambda c: changed(c, 16, b"\xff\xff"), "65535"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_id_files(tmp_path: Path, case: str) -> None:
    damage, match = DAMAGED[case]
    write(tmp_path / "a.ftk", ids(5, 6, 7))
    (tmp_path / "a.ftk").write_bytes(damage((tmp_path / "a.ftk").read_bytes()))
    with pytest.raises(InvalidParameterError, match=match) as caught:
        load_tokens(tmp_path / "a.ftk", fingerprint=MODEL, codebook_size=64000, allow_truncated=True)
    assert "a.ftk" in str(caught.value)


@pytest.mark.parametrize(
    ("at", "new", "match"), [(16, b"\0", "0 bits"), (16, b"\x29", "41 bits"), (-1, b"\x01", "set bits")]
)
def test_damaged_packed_files(tmp_path: Path, at: int, new: bytes, match: str) -> None:
    write(tmp_path / "a.ftk", ids(5, 6, 7), codebook_size=100_000)
    content = (tmp_path / "a.ftk").read_bytes()
    (tmp_path / "a.ftk").write_bytes(changed(content, at % len(content), new))
    with pytest.raises(InvalidParameterError, match=match):
        load_tokens(tmp_path / "a.ftk")


def test_damaged_latent_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    size = write(path, torch.ones(2, 3), caption="a")
    content = path.read_bytes()
    for cut in (1, 8, 20, size - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(InvalidParameterError, match="damaged or truncated"):
            load_tokens(path, allow_truncated=True)
    path.write_bytes(content)
    with pytest.raises(InvalidParameterError, match="org/model@rev"):
        load_tokens(path, fingerprint="another")


NOTES = {"format": "tokred-latents", "version": "1", "fingerprint": MODEL, "height": "4", "width": "4"}


@pytest.mark.parametrize(
    ("notes", "latents", "match"),
    [
        ({}, torch.ones(2, 3).half(), "not one that save_tokens wrote"),
        ({**NOTES, "version": "2"}, torch.ones(2, 3).half(), "newer"),
        ({**NOTES, "height": "x"}, torch.ones(2, 3).half(), "image size"),
        ({**NOTES}, torch.ones(2, 3), "float16"),
        ({**NOTES}, torch.ones(2).half(), "float16"),
        ({**NOTES}, torch.full((2, 3), torch.inf).half(), "finite"),
    ],
)
def test_foreign_safetensors(tmp_path: Path, notes: dict[str, str], latents: Tensor, match: str) -> None:
    save_file({"latents": latents}, tmp_path / "a", notes)
    with pytest.raises(InvalidParameterError, match=match):
        load_tokens(tmp_path / "a")


@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_give_tokens_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, magic: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes((b"FTK1\x01" if magic else b"") + content)
    try:
        found: object = load_tokens(path, allow_truncated=True)
    except InvalidParameterError as error:
        found = error
    if isinstance(found, TokenFile):
        assert 1 <= len(found.tokens) <= len(content)
    else:
        assert str(path) in str(found)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_tokens(tmp_path / "none")
