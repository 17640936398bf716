"""`import tokred.vision` registers the backbones with timm, in either order of imports, and loads no timm by itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

NAMES = [
    "strip_mlp_tiny_light", "strip_mlp_tiny", "strip_mlp_small", "strip_mlp_base",
    "lookup_vit_tiny", "lookup_vit_small", "lookup_vit_base", "lookup_vit_large",
    "dualtoken_vit_tiny", "dualtoken_vit_small", "dualtoken_vit_small_mlp",
]  # fmt: skip


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("first", ["tokred.vision", "timm"])
def test_models_are_registered_in_either_order(first):
    second = "timm" if first == "tokred.vision" else "tokred.vision"
    code = f"import {first}, sys\nprint('timm' in sys.modules)\nimport {second}, timm\n"
    code += f"print([n for n in {NAMES} if not timm.is_model(n)])\nprint(timm.__spec__.name, timm.__version__ > '1')"
    loaded, missing, spec = run(code).splitlines()
    assert loaded == str(first == "timm")
    assert missing == "[]"
    assert spec == "timm True"


def test_public_names_load_on_use():
    code = "import tokred.vision as v\nprint(v.to_lookup_vit.__name__, v.remove_lookup_vit.__name__, v.MultiResSampler)"
    assert run(code).startswith("to_lookup_vit remove_lookup_vit")
