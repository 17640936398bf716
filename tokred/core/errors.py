"""Errors of tokred. Each is also the built-in error that a caller would expect."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Iterable

__all__ = [
    "AlreadyPatchedError",
    "CompiledModelError",
    "ConflictError",
    "InvalidParameterError",
    "LayerError",
    "LayoutError",
    "MissingSiteError",
    "MissingWeightsError",
    "NoClassTokenError",
    "PaddingError",
    "PreEncodedError",
    "RaggedInputError",
    "RequestError",
    "ScorerError",
    "StaleCacheError",
    "TokredError",
    "UnknownMethodError",
    "UnknownParameterError",
    "UnsafeCheckpointError",
    "UnsupportedGenerationError",
    "UnsupportedModelError",
    "nearest",
]


class TokredError(Exception):
    """Base class of every error that tokred raises on purpose."""


class InvalidParameterError(TokredError, ValueError):
    """A field of a method, or an option of a call, is outside its range."""


class UnknownMethodError(TokredError, ValueError):
    """No method has the given name."""


class UnknownParameterError(TokredError, TypeError):
    """A method or a call has no such parameter."""


class UnsupportedModelError(TokredError, TypeError):
    """No host serves this model, or a host refuses it by name."""


class MissingSiteError(TokredError, TypeError):
    """The host of this model has no site where the method could act."""


class LayerError(TokredError, ValueError):
    """A layer index or a schedule does not fit the depth of the model."""


class LayoutError(TokredError, NotImplementedError):
    """The method has no definition for the way in which these visual tokens lie."""


class NoClassTokenError(TokredError, ValueError):
    """Scores of the class token were asked of a model without one."""


class ConflictError(TokredError, ValueError):
    """Two methods cannot act on one model together."""


class AlreadyPatchedError(TokredError, RuntimeError):
    """The model, or a part of it, is patched already."""


class CompiledModelError(TokredError, RuntimeError):
    """The patch would come too late: a compiled call would ignore it."""


class RaggedInputError(TokredError, NotImplementedError):
    """The method has no definition for inputs that are padded to different lengths."""


class PreEncodedError(TokredError, ValueError):
    """Scores of the vision tower are needed, but its output was made elsewhere, without them."""


class PaddingError(TokredError, ValueError):
    """A batch is padded on a side where the call cannot work."""


class RequestError(TokredError, ValueError):
    """What the caller gave for a request (query, frames, scores) does not fit its inputs."""


class StaleCacheError(TokredError, RuntimeError):
    """A KV cache and the model that is asked to go on from it do not fit together."""


class UnsupportedGenerationError(TokredError, NotImplementedError):
    """A way of generating that is refused by name on a patched model."""


class ScorerError(TokredError, ValueError):
    """A frame scorer cannot be built or called, or what it returned are no scores."""


class MissingWeightsError(TokredError, RuntimeError):
    """Pretrained weights were asked for that nobody can download automatically, or that this installation lacks."""


class UnsafeCheckpointError(TokredError, pickle.UnpicklingError, ValueError):
    """A file asks for more than weights need; nothing of it was executed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``", did you mean 'x'?"`` for the closest known name, or an empty string."""
    candidates = list(known)
    folded = {c.lower().replace("_", ""): c for c in candidates}
    match = difflib.get_close_matches(name.lower().replace("_", "").replace("-", ""), folded, n=1, cutoff=0.5)
    return f", did you mean {folded[match[0]]!r}?" if match else ""
