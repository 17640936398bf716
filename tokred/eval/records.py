"""Records of an evaluation that may be killed and goes on: a line of JSON for each item, in files that only grow.

::

    claim(out, {"task": "vqa", "model": "digit-vlm"})        # one process: the folder is this evaluation's
    with Records(out, "tome r=8", rank=0) as mine:           # each process writes a file of its own
        if 17 not in mine:
            mine.append([{"key": 17, "answer": "two"}])
    read(out, "tome r=8")                                    # {17: {"key": 17, "answer": "two"}}, of all processes

What was written before a kill stays: a line that was cut short is dropped, an item that was written twice counts once.
A record with "unreadable" in it notes that an item was left out: it is read like others, and is still to be done.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tokred import __version__
from tokred.core.errors import InvalidParameterError

__all__ = ["Key", "Records", "check_out", "claim", "complete", "digest", "identity", "read"]

Key: TypeAlias = int | str
FOLDER, SETTINGS = "records", "run.json"
LEFT_OUT = "unreadable"
#: in every settings file of ours: another program may have written a run.json, too
MARK = ("written by", "tokred eval")
_NAME = re.compile(r"[A-Za-z0-9_=+-]*-[0-9a-f]{8}\.\d+\.jsonl")


def identity(model: nn.Module, device: torch.device, *packages: str) -> dict[str, Any]:
    """What of a model must not change while its answers are recorded: weights, kind of device, versions.

    Args:
        packages: that compute, besides torch.
    """
    versions = {"tokred": __version__, "torch": torch.__version__}
    versions |= {name: importlib.metadata.version(name) for name in packages}
    return {"weights": digest(model), "device": device.type, "versions": versions}


def digest(model: nn.Module) -> str:
    """A short name of the weights: of names and shapes, all bits of each tensor added up, and 64 of its values."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)].double().cpu().numpy().tobytes()
        found.update(f"{name} {tuple(tensor.shape)} {_sum(flat)}".encode() + some)
    return found.hexdigest()[:16]


def _sum(flat: Tensor) -> int:
    """The values of a (N,) tensor as whole numbers of as many bits, added up modulo 2^64: one bit changes it."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(flat.contiguous().view(kinds[flat.element_size()]).sum(dtype=torch.int64)) if len(flat) else 0


def check_out(out: Path) -> None:
    """Say before a model is loaded that nothing can be written to `out`.

    Raises:
        InvalidParameterError: it is a file, or in a place where this user may not write.
    """
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InvalidParameterError(f"--out {out}: {place} is a file, and records go into a folder; give another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InvalidParameterError(f"--out {out}: {place} cannot be written to; give a folder of yours")


def claim(out: Path, settings: Mapping[str, Any], fresh: bool = False) -> None:
    """Make `out` the folder of the evaluation that `settings` (JSON types) describe, or go on with it.

    Call it in one process, before any `Records` there. `fresh` removes the records of the evaluation that was there,
    and no other file.

    Raises:
        InvalidParameterError: the folder holds another evaluation, records of which nothing is known, or something that
            is not ours to overwrite.
    """
    path, wanted = out / SETTINGS, json.loads(json.dumps({**settings, MARK[0]: MARK[1]}))
    check_out(out)
    if fresh:
        _forget(out)
    elif path.exists():
        found = _settings(path)
        if found is None:
            raise InvalidParameterError(f"{path} is damaged; begin anew with --fresh, or give another --out")
        if found.get(MARK[0]) != MARK[1]:
            raise InvalidParameterError(f"{path} is of another program; give another --out")
        differing = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        if differing:
            parts = (f"{k} (there {_brief(found.get(k))}, now {_brief(wanted.get(k))})" for k in differing)
            raise InvalidParameterError(
                f"{out} holds another evaluation, which differs in {', '.join(parts)}; give another --out, or --fresh "
                "to begin anew"
            )
        return
    else:
        ours, others = _files(out)
        if others:
            raise InvalidParameterError(f"{others[0]} is no record of an evaluation; give another --out")
        if ours:
            raise InvalidParameterError(
                f"{out} holds records of an unknown evaluation, for its {SETTINGS} is gone; begin anew with --fresh, "
                "or give another --out"
            )
    try:
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidParameterError(f"--out {out} cannot be made ({error.strerror}); give a folder of yours") from error
    half = path.with_suffix(".part")
    half.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    os.replace(half, path)


def _settings(path: Path) -> dict[str, Any] | None:
    """None where the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None
    return found if isinstance(found, dict) else None


def _files(out: Path) -> tuple[list[Path], list[Path]]:
    """What lies where records go: files that are named as ours are, and all else."""
    folder = out / FOLDER
    if not folder.is_dir():
        return [], [folder] if folder.exists() else []
    found = sorted(folder.iterdir())
    ours = [path for path in found if _NAME.fullmatch(path.name) and path.is_file()]
    return ours, [path for path in found if path not in ours]


def _forget(out: Path) -> None:
    """Remove an evaluation of ours: its settings say so, or they are lost and nothing but records is there.

    Raises:
        InvalidParameterError: it is not ours, or cannot be removed.
    """
    path = out / SETTINGS
    ours, others = _files(out)
    found = _settings(path) if path.exists() else None
    if found is not None and found.get(MARK[0]) != MARK[1]:
        raise InvalidParameterError(f"--fresh: {path} is of another program, and stays; give another --out")
    if found is None and others:
        raise InvalidParameterError(
            f"--fresh: {others[0]} is no record of an evaluation, and stays; give another --out"
        )
    if found is None and path.exists() and not ours:
        raise InvalidParameterError(f"--fresh: {path} is damaged and no records are there, so it stays; remove it")
    for one in (*ours, *([path] if path.exists() else [])):  # the settings last: a kill leaves no record without them
        try:
            one.unlink()
        except OSError as error:
            raise InvalidParameterError(f"--fresh: {one} cannot be removed ({error.strerror})") from error


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Records:
    """What is recorded under one name, and where this process adds to it. Also a context manager that closes the file.

    Attributes:
        done: {key: record} of all processes, without what was left out.

    Args:
        out: folder that was claimed. name: of the row, any text. rank: of the process; no two write one file.
    """

    def __init__(self, out: Path, name: str, rank: int = 0) -> None:
        found = read(out, name)
        self.done: dict[Key, dict[str, Any]] = {k: record for k, record in found.items() if LEFT_OUT not in record}
        path = _stem(out, name).with_suffix(f".{rank}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        whole = len(_whole(path.read_bytes()))
        self._file.truncate(whole)  # a line that was cut short would spoil the next

    def __contains__(self, key: Key) -> bool:
        return key in self.done

    def __len__(self) -> int:
        return len(self.done)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records, each with a "key" (an int or a string) and JSON values; they are on their way to the disk."""
        lines = []
        for record in records:
            if LEFT_OUT not in record:
                self.done[record["key"]] = dict(record)
            lines.append(json.dumps(record, separators=(",", ":"), ensure_ascii=False))
        if lines:
            self._file.write(("\n".join(lines) + "\n").encode())
            self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read(out: Path, name: str) -> dict[Key, dict[str, Any]]:
    """{key: record} of one name, of all processes, in the order of the keys' first lines.

    Of several records of a key the last counts; one that was left out only where there is no other.

    Raises:
        InvalidParameterError: a line in the middle of a file is no record.
    """
    found: dict[Key, dict[str, Any]] = {}
    stem = _stem(out, name)
    for path in sorted(stem.parent.glob(f"{stem.name}.*.jsonl")):
        for number, line in enumerate(_whole(path.read_bytes()).splitlines(), 1):
            try:
                record = json.loads(line)
                if LEFT_OUT not in record or LEFT_OUT in found.get(record["key"], record):
                    found[record["key"]] = record
            except (ValueError, TypeError, KeyError):
                raise InvalidParameterError(
                    f"{path}, line {number}, is no record; delete the line, or begin anew with --fresh"
                ) from None
    return found


def complete(
    found: Mapping[Key, Mapping[str, Any]], keys: Iterable[Key], out: Path, processes: int
) -> list[Mapping[str, Any]]:
    """The records of `keys`, in their order, of those that were `read`.

    Raises:
        InvalidParameterError: some are not there.
    """
    keys = list(keys)
    missing = [key for key in keys if key not in found]
    if missing:
        why = (
            "those of other processes: --out has to be a folder that all machines share"
            if processes > 1
            else "something removed them during the run; run the same command again"
        )
        raise InvalidParameterError(f"{out} lacks {len(missing)} of {len(keys)} records of a row, {why}")
    return [found[key] for key in keys]


def _whole(data: bytes) -> bytes:
    """Up to the last line that was finished."""
    return data[: data.rfind(b"\n") + 1]


def _stem(out: Path, name: str) -> Path:
    """Readable, and different for different names."""
    safe = re.sub(r"[^A-Za-z0-9_=+-]+", "-", name).strip("-")[:60]
    return out / FOLDER / f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
