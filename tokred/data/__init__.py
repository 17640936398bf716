"""Data that needs no download: procedural scenes made of real digits and photographs of ordinary packages."""

from tokred.data.scenes import (
    DigitScenes,
    SceneBatch,
    SceneStyle,
    checksum,
    checksum_matches,
    normalize,
    patch_coverage,
    render,
)

__all__ = [
    "DigitScenes",
    "SceneBatch",
    "SceneStyle",
    "checksum",
    "checksum_matches",
    "normalize",
    "patch_coverage",
    "render",
]
