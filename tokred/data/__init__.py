"""Data that needs no download: scenes made of real digits and photographs of ordinary packages, needles in texts."""

from tokred.data.clips import Clip, ClipStyle, DigitClips, uniform_frames
from tokred.data.coloured import COLOURS, ColourStyle
from tokred.data.needles import NeedleBatch, NeedleContexts
from tokred.data.questions import QuestionBatch, QuestionScenes
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
    "COLOURS",
    "Clip",
    "ClipStyle",
    "ColourStyle",
    "DigitClips",
    "DigitScenes",
    "NeedleBatch",
    "NeedleContexts",
    "QuestionBatch",
    "QuestionScenes",
    "SceneBatch",
    "SceneStyle",
    "checksum",
    "checksum_matches",
    "normalize",
    "patch_coverage",
    "render",
    "uniform_frames",
]
