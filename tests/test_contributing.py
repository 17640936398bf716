"""The worked example of CONTRIBUTING.md is a whole method."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tokred
from tokred.core import method as registry
from tokred.core.errors import InvalidParameterError, LayerError

TEXT = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def short_keys():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names: dict = {"__name__": "example"}
    exec(compile(code, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    yield names["ShortKeys"]
    del registry._REGISTRY["short_keys"]


def test_the_example_works(short_keys):
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(x)
        with tokred.patch(model, "short_keys", keep_rate=0.7, layer=1) as patch:
            model(x)
            assert patch.trace.counts == [(1, 12)]
        with tokred.patch(model, short_keys(keep_rate=1.0)):
            assert torch.equal(model(x), plain)
    assert tokred.from_dict(short_keys(keep_rate=0.7).to_dict()) == short_keys(keep_rate=0.7)
    assert "short_keys" in {record.name for record in tokred.methods()}
    with pytest.raises(InvalidParameterError, match="keep_rate=2"):
        short_keys(keep_rate=2)
    with pytest.raises(LayerError, match="block 9"):
        tokred.patch(model, short_keys(layer=9))
