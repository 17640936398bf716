"""The authors' files: read as they are, without yacs, and without executing anything that somebody put into them."""

from __future__ import annotations

import builtins
import io
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError, TokredError, UnsafeCheckpointError
from tokred.vision.backbones.strip_mlp import StripMLP
from tokred.vision.backbones.strip_mlp_checkpoint import (
    CONTAINERS,
    DTYPES,
    _Unpickler,
    load_strip_mlp_checkpoint,
    main,
)

SMALL: dict[str, Any] = {"embed_dim": 8, "layers": (1, 1, 1, 1), "img_size": 64, "num_classes": 5}


def make(**options: Any) -> Any:
    return timm.create_model("strip_mlp_tiny", **{**SMALL, **options}).eval()


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return StripMLP(**SMALL).state_dict()


def respelled(weights: dict[str, Tensor], wrapped: bool = False) -> dict[str, Tensor]:
    """As MLP-DINO writes the names; `wrapped`: by a model inside DistributedDataParallel."""
    front = "module." if wrapped else ""
    return {front + name.replace("proj_w", "proh_w"): value for name, value in weights.items()}


def save_official(path: Path, weights: dict[str, Tensor], **extra: Any) -> Path:
    """A file as the authors' training script writes it; yacs exists only while it is written."""
    package, module = ModuleType("yacs"), ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module.CfgNode = node  # type: ignore[attr-defined]
    config, inner = node(), node()
    inner["NAME"], inner.__dict__["__immutable__"] = "strip_mlp_tiny", True
    config["MODEL"], config["AUG"], config.__dict__["__deprecated_keys__"] = inner, (1, 2.5, None, "x"), set()
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        "model": OrderedDict(weights),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [5e-4], "size": torch.Size([1]), "param": nn.Parameter(torch.ones(2))},
        "max_accuracy": 82.2,
        "epoch": 299,
        "config": config,
        **extra,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "yacs", package)
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save(content, path)
    return path


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


# -- files that are what they seem -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [dict, respelled, lambda weights: respelled(weights, wrapped=True)])
def test_official_file(tmp_path, weights, spelling):
    path = save_official(tmp_path / "strip.pth", spelling(weights))
    assert "yacs" not in sys.modules
    same(load_strip_mlp_checkpoint(path), weights)
    same(load_strip_mlp_checkpoint(str(path)), weights)


@pytest.mark.parametrize("wrap", [dict, OrderedDict, lambda w: {"state_dict": w}, lambda w: {"model": w, "epoch": 3}])
def test_bare_state_dict(tmp_path, weights, wrap):
    torch.save(wrap(weights), tmp_path / "strip.pth")
    same(load_strip_mlp_checkpoint(tmp_path / "strip.pth"), weights)
    same(load_strip_mlp_checkpoint(tmp_path / "strip.pth"), torch.load(tmp_path / "strip.pth").get("model", weights))


def test_views_and_dtypes(tmp_path, weights):
    shared = torch.arange(24.0)
    odd = {
        "a": shared[4:16].view(3, 4).t(),
        "b": shared[2::5],
        "empty": torch.empty(0, 3),
        "half": torch.ones(3).half(),
        "brain": torch.ones(3).bfloat16(),
        "flag": torch.tensor([True, False]),
        "byte": torch.arange(4).to(torch.uint8),
        "parameter": nn.Parameter(torch.randn(2)),
    }
    torch.save({**weights, **odd}, tmp_path / "strip.pth")
    got = load_strip_mlp_checkpoint(tmp_path / "strip.pth")
    same(got, {**weights, **odd})
    assert all(value.is_contiguous() and not value.requires_grad for value in got.values())
    assert got["a"].untyped_storage().nbytes() == 48


def test_safetensors_of_either_spelling(tmp_path, weights):
    save_file(respelled(weights), tmp_path / "strip.safetensors")
    same(load_strip_mlp_checkpoint(tmp_path / "strip.safetensors"), weights)


def test_command_line(tmp_path, weights):
    path = save_official(tmp_path / "strip.pth", respelled(weights))
    target = tmp_path / "strip.safetensors"
    module = "tokred.vision.backbones.strip_mlp_checkpoint"
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-W", "error::UserWarning", "-m", module, path, target],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{len(weights)} tensors" in done.stdout
    same(load_file(target), weights)


def test_command_line_errors(tmp_path, weights, capsys):
    path = save_official(tmp_path / "strip.pth", weights)
    assert main([str(tmp_path / "none.pth"), str(tmp_path / "out.safetensors")]) == 1
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(path), str(tmp_path / "out.pth")])
    assert ".safetensors" in capsys.readouterr().err
    torch.save({"x": print}, path)
    assert main([str(path), str(tmp_path / "out.safetensors")]) == 1
    assert ".print, which weights do not need" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


# -- through timm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_checkpoint_path(tmp_path, weights, suffix):
    """timm's own reader: of clean files, in either spelling."""
    for name, spelled in (("a", dict(weights)), ("b", respelled(weights))):
        path = tmp_path / f"{name}.{suffix}"
        save_file(spelled, path) if suffix == "safetensors" else torch.save({"model": spelled}, path)
        same(make(checkpoint_path=str(path)).state_dict(), weights)


def test_official_file_as_pretrained(tmp_path, weights):
    path = str(save_official(tmp_path / "strip.pth", respelled(weights)))
    overlay = {"file": path}
    same(make(pretrained=True, pretrained_cfg_overlay=overlay).state_dict(), weights)
    assert make(pretrained_cfg_overlay=overlay).pretrained_cfg["file"] == path
    features = make(pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    assert torch.equal(
        features.model.blocks4[0].channel_mixing.fc1.weight, weights["blocks4.0.channel_mixing.fc1.weight"]
    )


def test_adapted_to_another_use(tmp_path, weights):
    path = str(save_official(tmp_path / "strip.pth", weights))
    overlay = {"file": path}
    model = make(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1, img_size=96)
    assert model.head.weight.shape == (7, 64)
    torch.testing.assert_close(model.patch_embed.weight, weights["patch_embed.weight"].sum(1, keepdim=True))
    assert model(torch.randn(1, 1, 96, 96)).shape == (1, 7)
    assert torch.equal(model.merging1.weight, weights["merging1.weight"])
    bare = make(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
    assert torch.equal(bare.norm.weight, weights["norm.weight"])


def test_weights_in_memory(weights):
    clean = {"state_dict": {"model": respelled(weights, wrapped=True)}, "num_classes": 5}
    same(make(pretrained=True, pretrained_cfg_overlay=clean).state_dict(), weights)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"layers": (1, 1, 2, 1)}, "lacks"), ({"embed_dim": 16}, "other shapes"), ({"in_chans": 3, "alpha": 2}, "other")],
)
def test_file_of_another_variant(tmp_path, weights, options, told):
    path = str(save_official(tmp_path / "strip.pth", weights))
    with pytest.raises(InvalidParameterError, match=told):
        make(**options).load_pretrained(path)


# -- files that are not ----------------------------------------------------------------------------------------------


class Executes:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def touch(path: str) -> None:
    Path(path).touch()


@pytest.mark.parametrize("place", ["config", "model", "optimizer"])
def test_a_pickle_that_executes_is_refused(tmp_path, weights, place):
    import os
    import shutil

    mark = tmp_path / "executed"
    calls = [
        (os.system, f"touch {mark}"),
        (touch, str(mark)),
        (builtins.eval, f"open({str(mark)!r}, 'w')"),
        (builtins.exec, f"open({str(mark)!r}, 'w')"),
        (builtins.getattr, "", "upper"),
        (builtins.open, str(mark), "w"),
        (shutil.copy, __file__, str(mark)),
        (torch.load, str(mark)),
        (torch.storage._load_from_bytes, pickle.dumps(Executes(touch, str(mark)))),
        (torch.save, {}, str(mark)),
        (torch.UntypedStorage.from_file, str(mark), True, 4),
    ]
    for n, (function, *arguments) in enumerate(calls):
        content = {**weights, "x": Executes(function, *arguments)} if place == "model" else {}
        path = tmp_path / f"{n}.pth"
        if place == "model":
            torch.save({"model": content}, path)
        else:
            save_official(path, weights, **{place: [Executes(function, *arguments)]})
        with pytest.raises(UnsafeCheckpointError, match="was not executed"):
            load_strip_mlp_checkpoint(path)
        assert not mark.exists(), function
        with pytest.raises((RuntimeError, ValueError)):
            make(pretrained=True, pretrained_cfg_overlay={"file": str(path)})
        assert not mark.exists(), function
    if place == "model":  # read by the wrong reader, such a file does what it says
        torch.load(tmp_path / "1.pth", weights_only=False)
        assert mark.exists()


def test_errors_are_what_callers_catch():
    assert issubclass(UnsafeCheckpointError, (TokredError, ValueError))
    assert issubclass(UnsafeCheckpointError, pickle.UnpicklingError)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "FloatStorage.from_file"),
        ("torch.storage", "UntypedStorage"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils", "_import_dotted_name"),
        ("torch.jit._serialization", "load"),
        ("collections", "OrderedDict.fromkeys"),
        ("builtins", "dict.__subclasses__"),
        ("builtins", "__import__"),
        ("builtins", "type"),
        ("functools", "partial"),
        ("copyreg", "_reconstructor"),
        ("yacs_evil", "run"),
        ("", "system"),
    ],
)
def test_names_outside_the_list(module, name):
    with pytest.raises(UnsafeCheckpointError):
        _Unpickler(io.BytesIO()).find_class(module, name)


def test_the_list():
    """Nothing on it is shared with other code, but for types that cannot be changed."""
    known, again = _Unpickler(io.BytesIO())._known, _Unpickler(io.BytesIO())._known
    assert {pair for pair in known if pair[0] == "torch"} == {("torch", name) for name in (*DTYPES, "Size")}
    assert len(known) == 1 + 1 + 3 + len(DTYPES) + 2 * len(CONTAINERS)
    for pair, value in known.items():
        if value is again[pair]:
            with pytest.raises((TypeError, AttributeError)):
                value.changed = 1
    assert _Unpickler(io.BytesIO()).find_class("yacs.config", "os.system") is not dict
    config = _Unpickler(io.BytesIO()).find_class("yacs", "Anything")
    assert config.__bases__ == (dict,)


def test_attributes_set_by_a_pickle_stay_inside():
    """BUILD may set attributes of what a pickle names: of our stand-ins, and of nothing else."""
    before = dict(vars(torch._utils._rebuild_tensor_v2))
    evil = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x07\x00\x00\x00spoiledK\x01sb."
    assert _Unpickler(io.BytesIO(evil)).load().spoiled == 1
    assert vars(torch._utils._rebuild_tensor_v2) == before


def rewrite(source: Path, target: Path, compress: bool = False, **changes: bytes) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = changes.get(info.filename.split("/", 1)[1].replace("/", "_"), old.read(info))
            new.writestr(info.filename, data, zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED)
    return target


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_archives_of_another_kind(tmp_path, weights):
    class Scripted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    torch.jit.save(torch.jit.trace(Scripted(), torch.ones(1)), str(tmp_path / "script.pth"))
    with pytest.raises(UnsafeCheckpointError, match="TorchScript"):
        load_strip_mlp_checkpoint(tmp_path / "script.pth")
    torch.save(dict(weights), tmp_path / "plain.pth")
    same(load_strip_mlp_checkpoint(rewrite(tmp_path / "plain.pth", tmp_path / "copy.pth")), weights)
    with pytest.raises(UnsafeCheckpointError, match="compressed"):
        load_strip_mlp_checkpoint(rewrite(tmp_path / "plain.pth", tmp_path / "zip.pth", compress=True))
    with pytest.raises(InvalidParameterError, match="big-endian"):
        load_strip_mlp_checkpoint(rewrite(tmp_path / "plain.pth", tmp_path / "big.pth", byteorder=b"big"))


def test_damaged_files(tmp_path, weights):
    path = tmp_path / "strip.pth"
    torch.save(dict(weights), path, _use_new_zipfile_serialization=False)
    with pytest.raises(InvalidParameterError, match=r"torch 1\.6 or later"):
        load_strip_mlp_checkpoint(path)
    torch.save(dict(weights), path)
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(InvalidParameterError, match="damaged"):
            load_strip_mlp_checkpoint(path)
    path.write_bytes(whole)
    short = rewrite(path, tmp_path / "short.pth", data_0=b"\0" * 8)
    with pytest.raises(InvalidParameterError, match="damaged"):
        load_strip_mlp_checkpoint(short)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(InvalidParameterError, match="safetensors"):
        load_strip_mlp_checkpoint(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("content", [[1, 2], {"model": 3}, {"patch_embed.weight": "text"}, {1: torch.ones(1)}, 7])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "strip.pth")
    with pytest.raises(InvalidParameterError, match=r"strip\.pth"):
        load_strip_mlp_checkpoint(tmp_path / "strip.pth")


def test_files_of_another_model(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(InvalidParameterError, match="holds no Strip-MLP: its names are weight, bias"):
        load_strip_mlp_checkpoint(tmp_path / "linear.pth")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_strip_mlp_checkpoint(tmp_path / "none.pth")
