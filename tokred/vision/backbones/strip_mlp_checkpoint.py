"""Reads the authors' Strip-MLP files without executing anything, and rewrites them as safetensors.

    python -m tokred.vision.backbones.strip_mlp_checkpoint FILE.pth OUT.safetensors

A released ``.pth`` is a pickle that holds a yacs configuration beside the weights, so ``torch.load`` refuses it with
``weights_only=True`` and would run whatever it says without. Here the pickle may name a fixed list of things and no
others. Those are stand-ins made for this one reading, so that a pickle which changes their attributes changes nothing
that anybody else uses; the tensors are then read from the archive by this module itself.
"""

from __future__ import annotations

import argparse
import io
import math
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokred.core.errors import InvalidParameterError, TokredError, UnsafeCheckpointError

__all__ = ["clean_state_dict", "load_strip_mlp_checkpoint", "main"]


DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
CONTAINERS = {kind.__name__: kind for kind in (set, dict, list, tuple)}


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype


class _Stored(NamedTuple):
    """A tensor that the pickle speaks of; its numbers are still in the archive."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Builds containers, numbers, texts, and records of tensors."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._config = type("Config", (dict,), {})  # stands for any class of yacs
        self._known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): lambda sizes=(): tuple(sizes),
            # (storage, offset, size, stride, requires_grad, hooks, metadata): the last three mean nothing here
            ("torch._utils", "_rebuild_tensor_v2"): lambda *given: _Stored(*given[:4]),
            ("torch._utils", "_rebuild_tensor"): lambda *given: _Stored(*given[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
            **{("torch", name): dtype for name, dtype in DTYPES.items()},
            **{(module, name): kind for module in ("builtins", "__builtin__") for name, kind in CONTAINERS.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "yacs":
            return self._config
        if (module, name) not in self._known:
            raise UnsafeCheckpointError(
                f"the file asks for {module}.{name}, which weights do not need; it was not executed, and nothing was "
                "loaded. Get the file from its authors again, or ask them for a plain state dict"
            )
        return self._known[module, name]

    def persistent_load(self, saved_id: Any) -> _Storage:
        kind, dtype, key, _location, _numel = saved_id
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise UnsafeCheckpointError(f"the file refers to {kind!r}, where a tensor's storage was expected")
        return _Storage(key, dtype)


def load_strip_mlp_checkpoint(path: str | PathLike[str]) -> dict[str, Tensor]:
    """State dict of a Strip-MLP file, under this library's names, on the CPU.

    Takes the released ``.pth`` (its entry ``model``, beside which a yacs configuration, an optimizer and so on may
    stand), a bare state dict saved by ``torch.save`` (torch 1.6 or later), and ``.safetensors``. ``module.`` is taken
    off the names, and ``proh_w`` (the spelling of MLP-DINO) becomes ``proj_w``. Executes nothing, and needs no yacs.

    Raises:
        UnsafeCheckpointError: the pickle names anything but tensors, containers and yacs classes.
        InvalidParameterError: the file is damaged, of another format, or has no Strip-MLP in it.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        try:
            weights: Mapping[str, Tensor] = load_file(path)
        except SafetensorError as error:
            raise InvalidParameterError(f"{path} is damaged, or is no safetensors file: {error}") from error
    else:
        weights = _read_archive(path)
    cleaned = clean_state_dict(weights)
    if "patch_embed.weight" not in cleaned or not any(".smlp_block." in name for name in cleaned):
        some = ", ".join(list(cleaned)[:3]) or "nothing"
        raise InvalidParameterError(f"{path} holds no Strip-MLP: its names are {some} ...; expected patch_embed.weight")
    return cleaned


def clean_state_dict(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The library's names: no ``module.`` in front, and ``proj_w`` where MLP-DINO writes ``proh_w``."""
    plain = {name.removeprefix("module."): value for name, value in weights.items()}
    return {re.sub(r"(^|\.)proh_w\.", r"\1proj_w.", name): value for name, value in plain.items()}


def _read_archive(path: Path) -> dict[str, Tensor]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise InvalidParameterError(
            f"{path} is damaged, or was not saved by torch 1.6 or later; load it with the torch that saved it, and "
            "save its entry 'model' again"
        ) from error
    with archive:
        try:
            return _read_tensors(archive)
        except UnsafeCheckpointError as error:
            raise UnsafeCheckpointError(f"{path}: {error}") from None
        except Exception as error:  # a damaged pickle fails in any way
            raise InvalidParameterError(f"{path} is damaged, or is no checkpoint: {error!r}") from error


def _read_tensors(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    names = archive.namelist()
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in names):
        raise UnsafeCheckpointError("a TorchScript archive, or no archive of torch.save: only weights are read here")
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise UnsafeCheckpointError("the archive is compressed, which torch.save never does")
    root = pickles[0].removesuffix("data.pkl")
    order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in names else "little"
    if order != sys.byteorder:
        raise ValueError(f"saved on a {order}-endian machine, read on a {sys.byteorder}-endian one")

    content = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise TypeError(f"a {type(content).__name__}, where a state dict was expected")
    wrong = [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, _Stored)]
    if wrong:
        raise TypeError(f"entries that are no tensors: {wrong[:3]}")
    return {name: _tensor(archive, root, stored) for name, stored in content.items()}


def _tensor(archive: zipfile.ZipFile, root: str, stored: _Stored) -> Tensor:
    (key, dtype), offset, size, stride = stored
    if math.prod(size) == 0:
        return torch.empty(size, dtype=dtype)
    storage = torch.frombuffer(bytearray(archive.read(f"{root}data/{key}")), dtype=dtype)
    if math.prod(size) > storage.numel():
        raise ValueError(f"a tensor of size {size} in a storage of {storage.numel()} numbers")
    # as_strided refuses to look past the end; the copy lets go of whatever else the storage holds
    return storage.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)


def main(arguments: list[str] | None = None) -> int:
    """Command line: rewrite a released file as safetensors, which timm and everyone else can read."""
    parser = argparse.ArgumentParser(prog="strip_mlp_checkpoint", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", metavar="IN", help="the authors' .pth")
    parser.add_argument("target", metavar="OUT.safetensors", help="the file to write")
    options = parser.parse_args(arguments)
    if not options.target.endswith(".safetensors"):
        parser.error(f"{options.target}: the name of the file to write must end in .safetensors")
    try:
        weights = load_strip_mlp_checkpoint(options.source)
        save_file(weights, options.target, metadata={"format": "pt"})
    except (TokredError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.target}: {len(weights)} tensors, {sum(w.numel() for w in weights.values()):,} numbers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
