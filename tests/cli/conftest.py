"""What the tests of commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="package")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the bundled VLM's architecture: what is tested holds with any weights."""
    from tokred.zoo.digit_vlm import build_digit_vlm, build_processor

    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("vlm"), build_digit_vlm(), build_processor())


def saved(folder: Path, *parts: Any) -> Path:
    """`folder`, with what `save_pretrained` of each part writes."""
    for part in parts:
        part.save_pretrained(folder)
    return folder
