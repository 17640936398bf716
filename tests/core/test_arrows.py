"""Which part may import which: methods know no model library, hosts know no method, the core knows neither."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tokred

PACKAGE = Path(tokred.__file__).parent
LIBRARIES = {"timm", "transformers", "diffusers", "open_clip", "torchvision", "accelerate", "sklearn", "skimage", "av"}
ADAPTER_LIBRARY = {
    "timm_vit.py": {"timm"},
    "open_clip.py": {"open_clip"},
    "hf_vision.py": {"transformers"},
    "hf_vlm.py": {"transformers"},
    "hf_llm.py": {"transformers"},
    "decoder_parts.py": {"transformers"},
    "cache_cuts.py": {"transformers"},
    "logical_cache.py": {"transformers"},
    "diffusion.py": {"diffusers"},  # inside a function: importing it takes seconds
    "configs.py": {"transformers", "timm"},  # each inside the function that needs it
    "scorers.py": {"open_clip"},  # likewise; models of transformers are given to it as they are
}
#: what a file of methods may import inside a function
METHOD_LIBRARY = {"frames.py": {"av"}}
#: the places where the core looks up a host, at call time
DOORS = {"patch.py", "flops.py", "catalog.py"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def files(folder: str) -> list[Path]:
    found = sorted((PACKAGE / folder).rglob("*.py"))
    assert found
    return found


def libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)} & LIBRARIES


@pytest.mark.parametrize("path", files("core"), ids=lambda p: p.name)
def test_core_imports_core_and_ops(path):
    inside = {name for name in imports(path) if name.startswith("tokred.")}
    allowed = ("tokred.core", "tokred.ops", *(["tokred.adapters"] if path.name in DOORS else []))
    assert all(name.startswith(allowed) for name in inside), inside
    assert not libraries(path)


@pytest.mark.parametrize("path", files("ops"), ids=lambda p: p.name)
def test_ops_import_nothing_but_torch(path):
    assert all(name.startswith("tokred.ops") for name in imports(path) if name.startswith("tokred"))
    assert not libraries(path)


def outer_imports(path: Path) -> set[str]:
    """Libraries that importing the file loads: those not inside a function."""
    tree = ast.parse(path.read_text())
    inner = {node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    nodes = [node for node in ast.walk(tree) if node not in inner]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


METHOD_FILES = [path for folder in ("vision", "vlm") for path in sorted((PACKAGE / folder).glob("*.py"))]


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_methods_import_core_and_ops(path):
    inside = {name for name in imports(path) if name.startswith("tokred.")}
    own = f"tokred.{path.parent.name}"
    assert all(name.startswith(("tokred.core", "tokred.ops", own)) for name in inside), inside
    assert libraries(path) <= METHOD_LIBRARY.get(path.name, set())
    assert outer_imports(path) <= {"__future__", "torch", "einops", "numpy", "tokred", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", files("adapters"), ids=lambda p: p.name)
def test_adapters_import_one_library_and_no_method(path):
    assert not any(name.startswith(("tokred.vision", "tokred.vlm")) for name in imports(path))
    assert libraries(path) <= ADAPTER_LIBRARY.get(path.name, set())


@pytest.mark.parametrize("name", ["scorers.py", "configs.py", "diffusion.py"])
def test_files_of_no_one_family_load_no_library(name):
    assert not outer_imports(PACKAGE / "adapters" / name) & LIBRARIES


def test_hosts_and_core_name_no_method():
    names = [record.name for record in tokred.methods()] + [record.cls for record in tokred.methods()]
    pattern = re.compile(rf"\b({'|'.join(names)})\b")
    for path in files("core") + files("adapters"):
        tree = ast.parse(path.read_text())
        strings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}  # docstrings may
        for node in ast.walk(tree):
            word = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
            assert word is None or not pattern.fullmatch(word), f"{path.name} uses {word}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in strings:
                assert not pattern.fullmatch(node.value), f"{path.name} names {node.value}"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_model_library():
    loaded = run(
        "import sys, tokred; tokred.ToMe, tokred.patch; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    assert not set(loaded.split()) & (LIBRARIES | {"triton", "PIL", "matplotlib", "rich"})


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.split(".")[0])
sys.meta_path.insert(0, Block())
"""


def test_tome_works_on_a_transformers_vit_without_timm():
    pytest.importorskip("transformers")
    out = run(
        BLOCK.format(blocked={"timm", "open_clip", "diffusers"})
        + """
import torch, tokred
from transformers import ViTConfig, ViTModel
sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
model = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
with torch.no_grad(), tokred.patch(model, tokred.ToMe(r=2)) as patch:
    print(model(pixel_values=torch.randn(2, 3, 32, 32)).last_hidden_state.shape[1], len(patch.trace))
print([host.family for host in tokred.hosts()])
"""
    )
    assert out.splitlines() == ["11 3", "['transformers multimodal', 'transformers vision', 'transformers text']"]


def test_without_any_model_library_the_error_says_so():
    out = run(
        BLOCK.format(blocked={"timm", "transformers", "open_clip", "diffusers"})
        + """
import torch, tokred
try:
    tokred.patch(torch.nn.Linear(2, 2), "tome")
except TypeError as error:
    print(error)
"""
    )
    assert "no model library is installed" in out


def test_every_public_name_resolves():
    for name in tokred.__all__:
        assert getattr(tokred, name) is not None
    assert set(tokred.__all__) <= set(dir(tokred))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tokred.nothing  # noqa: B018
