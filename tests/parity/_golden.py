"""Reading golden folders: the cases of a manifest, their tensors, and comparison with the manifest's tolerance.

A golden folder holds one folder a method: a `manifest.json` (cases as a list, as a dict, or under `files`) and
safetensors files. Nothing is skipped silently: an option that the runner does not know is an error, and so is a stored
tensor that nobody read or compared.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm.models.deit
import timm.models.vision_transformer
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.conftest import ROOT, golden_dirs

__all__ = ["Case", "Golden", "Seen", "block_outputs", "collect", "recorded", "timm_model"]

#: keys of a case that describe how it was made, and change nothing in how it is run
DESCRIPTIVE = ("seed", "bytes", "tensors", "source", "note", "notes", "comment", "description", "sha256", "tolerance")
DESCRIPTIVE += ("name", "file", "cut", "official")
DEFAULT_TOLERANCE = (2e-5, 1e-4)  # absolute, relative


@dataclass(frozen=True)
class Case:
    """One entry of a manifest."""

    name: str
    entry: Mapping[str, Any]
    manifest: Mapping[str, Any]
    folder: Path

    def load(self) -> dict[str, Tensor]:
        stem = self.folder / self.entry.get("file", self.name)
        exact = [stem, stem.with_name(f"{stem.name}.safetensors")]
        split = [stem.with_name(f"{stem.name}_{part}.safetensors") for part in ("io", "model")]
        paths = [path for path in exact if path.is_file()][:1] or [path for path in split if path.is_file()]
        if not paths:
            pytest.fail(f"{self.folder}: the manifest names {self.name!r}, but there is no {exact[-1].name}")
        return {key: value for path in paths for key, value in load_file(path).items()}


def collect(config: pytest.Config, method: str) -> list[Any]:
    """Parameters for a test of `method`: every case of every golden folder.

    No case at all is a failing parameter; where the folders were given by --golden-dir, a skipped one. A manifest that
    says in `left_out` which cases are too large for its folder may list none: then they are skipped, unless another
    folder has them.
    """
    found, problems, absent = [], [], {}
    folders = golden_dirs(config)
    for folder in folders:
        label = str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else Path(folder.parent.name, folder.name))
        path = folder / method / "manifest.json"
        if not path.is_file():
            continue
        try:
            cases = read_manifest(path)
        except (ValueError, KeyError, TypeError) as error:
            cases = []
            problems.append(f"{path} cannot be read: {error!r}")
        else:
            left_out = json.loads(path.read_text()).get("left_out", {})
            absent.update({f"{label}/{name}": f"{label}/{method}: {why}" for name, why in left_out.items()})
            problems += [] if cases or left_out else [f"{path} lists no case"]
        found += [pytest.param(case, id=f"{label}/{case.name}") for case in cases]
    found += [pytest.param(problem, id=f"unreadable-{n}") for n, problem in enumerate(problems)]
    if found:
        return found
    if absent:
        return [pytest.param(why, id=name, marks=pytest.mark.skip(reason=why)) for name, why in absent.items()]
    searched = ", ".join(map(str, folders)) or "no golden folder at all"
    reason = f"no goldens of {method}: looked in {searched}"
    if config.getoption("--golden-dir") is not None:
        return [pytest.param(reason, id="none", marks=pytest.mark.skip(reason=f"{reason}, given by --golden-dir"))]
    return [pytest.param(reason, id="none")]


def read_manifest(path: Path) -> list[Case]:
    manifest = json.loads(path.read_text())
    entries = manifest["cases"] if "cases" in manifest else manifest["files"]
    if isinstance(entries, Mapping):
        pairs = list(entries.items())
    else:
        pairs = [(entry.get("name") or entry["file"], entry) for entry in entries]
    return [Case(name.removesuffix(".safetensors"), entry, manifest, path.parent) for name, entry in pairs]


class Golden:
    """One case being checked: its options, its tensors, and which of them were used."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.entry = case.entry
        self._tensors = case.load()
        self._read: set[str] = set()
        self._compared = 0
        stated = {**_tolerances(case.manifest.get("tolerance")), **_tolerances(case.entry.get("tolerance"))}
        self._tolerances = {"floats": DEFAULT_TOLERANCE, **stated}

    # -- options -----------------------------------------------------------------------------------------------------

    def kind(self, prefixes: Mapping[str, str]) -> str:
        """The case's `kind`; where it has none, what its name's prefix says."""
        if "kind" in self.entry:
            return self.entry["kind"]
        for prefix, kind in prefixes.items():
            if self.case.name.startswith(prefix):
                return kind
        pytest.fail(f"{self.case.name}: no kind, and its name starts with none of {', '.join(prefixes)}")

    def known(self, options: Iterable[str]) -> None:
        """Fail on a key of the case that the runner does not know."""
        known = {*options, *DESCRIPTIVE}
        unknown = [key for key in self.entry if key not in known and "margin" not in key]
        if unknown:
            pytest.fail(f"{self.case.name}: this runner does not know {unknown}; it knows {sorted(known)}")

    # -- tensors -----------------------------------------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        self._read.add(name)
        return self._tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self._tensors else None

    def state_dict(self) -> dict[str, Tensor]:
        prefix = self.entry.get("state_dict_prefix", "sd.")
        return {name[len(prefix) :]: self[name] for name in self._tensors if name.startswith(prefix)}

    def check(self, name: str, got: Tensor | Callable[[], Tensor], kind: str = "floats") -> None:
        """Compare with the stored tensor `name`, if the case has it: integers exactly, floats by the tolerance."""
        if name not in self:
            return
        want = self[name]
        self._compared += 1
        got = (got if isinstance(got, Tensor) else got()).detach()
        assert got.shape == want.shape, f"{name}: got shape {tuple(got.shape)}, the golden has {tuple(want.shape)}"
        if not want.is_floating_point():
            assert torch.equal(got.to(want.dtype), want), f"{name}: {(got.to(want.dtype) != want).sum()} entries differ"
            return
        atol, rtol = self._tolerances.get(kind, self._tolerances["floats"])
        dtype = torch.float64
        torch.testing.assert_close(
            got.to(dtype), want.to(dtype), atol=atol, rtol=rtol, msg=lambda text: f"{name}: {text}"
        )

    def check_sets(self, name: str, got: Tensor) -> None:
        """Compare rows of integers as sets."""
        self.check(name, lambda: _as_stored(got, self[name]))

    def finish(self) -> None:
        """Fail if a stored tensor was neither used nor compared, or if nothing was compared at all."""
        unread = sorted(set(self._tensors) - self._read)
        assert not unread, f"{self.case.name}: the runner did not look at {unread}"
        assert self._compared, f"{self.case.name}: nothing was compared"


def _as_stored(got: Tensor, want: Tensor) -> Tensor:
    """`got` in the order of `want` where both hold the same set; `got` itself where they do not (it then differs)."""
    same = got.shape == want.shape and torch.equal(got.sort(dim=-1).values, want.sort(dim=-1).values)
    return want if same else got


def _tolerances(stated: object) -> dict[str, tuple[float, float]]:
    """{"floats": (atol, rtol), ...} from texts such as "atol 2e-5 rtol 1e-4", or numbers; "exact" is left out."""
    if stated is None:
        return {}
    if isinstance(stated, str) or (isinstance(stated, Mapping) and {"atol", "rtol"} & set(stated)):
        stated = {"floats": stated}
    if not isinstance(stated, Mapping):
        pytest.fail(f"tolerance {stated!r}: expected a text or a dict")
    found = {}
    for what, value in stated.items():
        if isinstance(value, str):
            numbers = re.findall(r"(atol|rtol|max abs)\s*[=:]?\s*([0-9.]+(?:[eE][+-]?\d+)?)", value)
            value = {"atol" if name == "max abs" else name: float(number) for name, number in numbers}
        if isinstance(value, Mapping) and value:
            found[what] = (float(value.get("atol", 0.0)), float(value.get("rtol", 0.0)))
    return found


# -- timm models -----------------------------------------------------------------------------------------------------

_CLASSES = {
    "vit": timm.models.vision_transformer.VisionTransformer,
    "mae": timm.models.vision_transformer.VisionTransformer,
    "deit": timm.models.vision_transformer.VisionTransformer,
    "deit_dist": timm.models.deit.VisionTransformerDistilled,
}


def timm_model(golden: Golden, kind: str | None = None) -> Any:
    """The case's model in eval mode: `cfg` goes to timm as a whole, `sd.*` are its weights."""
    weights = golden.state_dict()
    if kind is None or (kind == "deit" and "dist_token" in weights):
        kind = "deit_dist" if "dist_token" in weights else "vit"
    if kind not in _CLASSES:
        pytest.fail(f"{golden.case.name}: unknown kind {kind!r}; this runner knows {sorted(_CLASSES)}")
    model = _CLASSES[kind](**golden.entry["cfg"])
    model.load_state_dict(weights)
    return model.eval()


@contextlib.contextmanager
def block_outputs(model: Any) -> Iterator[list[Tensor]]:
    """What leaves each block, in order; hooks go on first, so enter this before the model is patched."""
    outputs: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *call: outputs.append(call[-1])) for block in model.blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def last_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """What leaves a module."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda *call: outputs.append(call[-1]))
    try:
        yield outputs
    finally:
        handle.remove()


@dataclass(frozen=True)
class Seen:
    """One question that a host asked of a method: the view, and the answer."""

    method: Any
    view: Any
    rule: Any
    change: Any


@contextlib.contextmanager
def recorded(method: type) -> Iterator[dict[int, Seen]]:
    """What instances of `method` see and answer, by layer, while the host runs as ever."""
    log: dict[int, Seen] = {}
    reduce = method.reduce  # type: ignore[attr-defined]

    def spy(self: Any, view: Any, rule: Any) -> Any:
        change = reduce(self, view, rule)
        assert view.layer not in log, "one forward pass a recording"
        log[view.layer] = Seen(self, view, rule, change)
        return change

    with mock.patch.object(method, "reduce", spy):
        yield log
