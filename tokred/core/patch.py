"""`patch`, `unpatch` and the handle between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tokred.core.encoded import Encoded
from tokred.core.errors import (
    AlreadyPatchedError,
    CompiledModelError,
    ConflictError,
    MissingSiteError,
    UnsupportedModelError,
)
from tokred.core.host import Attachment, Host
from tokred.core.method import Method, registered, resolve
from tokred.core.trace import Trace

__all__ = ["OPTIONS", "Patch", "patch", "unpatch"]

_RECORD = "_tokred"
#: options of `patch`: the site whose hosts read it, and what it means
OPTIONS: dict[str, tuple[str, str]] = {
    "exit": (
        "EncoderBlock",
        '"reduced" hands reduced tokens on, "restore" scatters them back to every position at the end of the encoder, '
        '"carry" (multimodal models) restores them and hands each on once to the language model',
    ),
    "fill": ("EncoderBlock", 'what "restore" writes where a token was dropped: "nearest" survivor or "zeros"'),
    "score_backend": (
        "EncoderBlock",
        'how scores are formed: "recompute" beside fused attention, "matrix" once for output and score, "auto"',
    ),
    "processor": ("VisualFeatures", "lets methods read the question and the frames of a call"),
    "restore_length": (
        "VisualFeatures",
        "True gives logits and hidden states at every position of the caller's prompt, False those of the reduced one",
    ),
}


class Patch:
    """A method at work on a model; also a context manager that removes it on exit.

    Attributes:
        model: the patched module. methods: what acts on it.
    """

    def __init__(self, model: nn.Module, host: Host, methods: Sequence[Method], options: Mapping[str, Any]) -> None:
        self.model = model
        self.methods = tuple(methods)
        self._host = host
        self._options = dict(options)
        self._attachment: Attachment | None = None
        self._last_trace = Trace(None)

    def _install(self) -> None:
        check_fit(self._host, self.methods)
        self._attachment = self._host.attach(self.methods, self._options)
        self.model.__dict__[_RECORD] = self

    @property
    def method(self) -> Method:
        """The method, where there is just one."""
        if len(self.methods) != 1:
            raise AttributeError(f"this patch has {len(self.methods)} methods; see .methods")
        return self.methods[0]

    @property
    def active(self) -> bool:
        """False once removed."""
        return self._attachment is not None

    @property
    def trace(self) -> Trace:
        """What the last forward pass of this thread kept; after `remove`, what it was then."""
        return self._attachment.trace if self._attachment is not None else self._last_trace

    def replace(self, method: object, **parameters: Any) -> Patch:
        """Put another method, or the same with other settings, in place of the present one.

        Takes what `patch` takes. If the new method does not fit, the old one stays.
        """
        if self._attachment is None:
            raise RuntimeError("this patch was removed; call tokred.patch again")
        options, rest = split_options(parameters)
        methods = resolve(method, rest)
        check_fit(self._host, methods)
        before, old_options = self.methods, self._options
        self._attachment.remove()
        try:
            self._options = {**old_options, **options}
            self._attachment = self._host.attach(methods, self._options)
        except BaseException:
            self._options = old_options
            self._attachment = self._host.attach(before, old_options)
            raise
        self.methods = tuple(methods)
        return self

    def request(self, **given: Any) -> AbstractContextManager[None]:
        """Give, for the calls inside the ``with``, what a method reads beside the model's inputs.

        Args:
            query: the question, a string or one for each sample. frames: the raw frames, uint8 (T, H, W, 3) or a list
                of them, one for each video. frame_scores: (T,) relevance in [0, 1], or one for each video.
            prunable: (samples, S) bool, the tokens of each prompt that methods inside a language model may drop; on
                multimodal models it stands in for the visual tokens.

        Raises:
            RequestError: nothing or something else was given. MissingSiteError: no method here reads it.
        """
        if self._attachment is None:
            raise RuntimeError("this patch was removed; call tokred.patch again")
        if not hasattr(self._attachment, "request"):
            raise MissingSiteError(f"{self!r} has no method that reads a request")
        return self._attachment.request(**given)

    def encode(self, inputs: Mapping[str, Any]) -> Encoded:
        """Run a multimodal model up to its language model, see `tokred.vlm.encode`."""
        if self._attachment is None:
            raise RuntimeError("this patch was removed; call tokred.patch again")
        if not hasattr(self._attachment, "encode_inputs"):
            raise MissingSiteError(f"{self!r} has no method that acts before a language model")
        return self._attachment.encode_inputs(inputs)

    def unmerge(self, tokens: Tensor, fill: str = "nearest") -> Tensor:
        """Scatter reduced tokens back to the grid: `Trace.restore` of the last pass."""
        return self.trace.restore(tokens, fill)

    def remove(self) -> None:
        """Take everything that tokred put there away; safe to call twice."""
        if self._attachment is not None:
            self._last_trace = self._attachment.trace
            self._attachment.remove()
            self._attachment = None
        if self.model.__dict__.get(_RECORD) is self:
            del self.model.__dict__[_RECORD]

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "" if self.active else ", removed"
        methods = ", ".join(repr(method) for method in self.methods)
        return f"Patch({type(self.model).__name__}, {methods}{state})"


def patch(model: nn.Module, method: object, **parameters: Any) -> Patch:
    """Reduce the tokens of `model` by `method` in every use from here on.

    Args:
        model: a model that a host serves, or one that holds exactly one such part (`tokred.hosts()` lists them), or a
            diffusion pipeline, of which the denoiser is meant.
        method: an instance such as ``tokred.ToMe(r=8)``, a name with its parameters as keywords, or a list of methods.
        **parameters: parameters of a method given by name, and options: ``exit="reduced" | "restore"`` (hand reduced
            tokens on, or scatter them back to every position at the end of the encoder; on multimodal models also
            ``"carry"``: the language model reads each once), ``fill="nearest" | "zeros"``
            (what is written where a token was dropped), ``score_backend="auto" | "recompute" | "matrix"``;
            on multimodal models ``processor=`` (lets methods read the question and the frames) and
            ``restore_length=True`` (logits and hidden states at every position of the caller's prompt; False gives
            those of the reduced one).

    Returns:
        A `Patch` with ``.trace``, ``.replace(method)`` and ``.remove()``, which is also a context manager.

    Raises:
        UnsupportedModelError: no host knows the model.
        MissingSiteError: the host has no site for the method.
        AlreadyPatchedError: the model or a part of it is patched; use ``.replace`` or `unpatch`.
        CompiledModelError: a part of it was compiled in place before.
        ConflictError: methods of the list that do not go together.
        UnknownMethodError: no method has that name.
        UnknownParameterError: no parameter of the method, no option of the model's host.
        InvalidParameterError: a value outside its range.
        LayerError: a block or layer that the model does not have.

    On any error the model is as it was.
    """
    model = unwrap(model)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    check_free(model)
    options, rest = split_options(parameters)
    methods = resolve(method, rest)
    if not methods:
        raise UnsupportedModelError("an empty list of methods does nothing; give at least one method")
    from tokred.adapters.registry import find_host

    made = Patch(model, find_host(model), methods, options)
    made._install()
    return made


def unpatch(model: nn.Module) -> nn.Module:
    """Remove everything that tokred put on `model` or on parts of it; return the model."""
    model = unwrap(model)
    for module in list(model.modules()):
        record = module.__dict__.get(_RECORD)
        if record is not None:
            record.remove()
    return model


def unwrap(model: Any) -> Any:
    """The module behind torch.compile's wrapper and DistributedDataParallel; of a diffusion pipeline its denoiser."""
    while True:
        if type(model).__name__ == "OptimizedModule":  # by name: importing torch._dynamo takes seconds
            # the class swap of the encoder invalidates the guards of what was compiled before
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, nn.DataParallel):
            raise UnsupportedModelError("DataParallel shares one model between threads; patch model.module instead")
        elif isinstance(model, torch.jit.ScriptModule):
            raise UnsupportedModelError("a TorchScript module cannot be patched; patch the Python model")
        elif not isinstance(model, nn.Module) and isinstance(getattr(model, "components", None), Mapping):
            from tokred.adapters.registry import denoiser_of

            model = denoiser_of(model)
        else:
            return model


def check_free(model: nn.Module) -> None:
    """Refuse what is patched already, and what was compiled in place."""
    for path, module in model.named_modules():
        where = f"{type(module).__name__}{f' at {path!r}' if path else ''}"
        if _RECORD in module.__dict__ or "_tokred_seat" in module.__dict__:
            raise AlreadyPatchedError(
                f"{where} is patched already; use the Patch's .replace(method), or tokred.unpatch(model) first"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise CompiledModelError(
                f"{where} was compiled in place (module.compile()), which would ignore a later patch; "
                "patch first, compile after"
            )


def check_fit(host: Host, methods: Sequence[Method]) -> None:
    """Every method has a site on the host, and no two exclude each other."""
    for method in methods:
        missing = [site for site in method.acts_at(host.sites) if site not in host.sites]
        if missing:
            from tokred.adapters.registry import host_classes

            having = [cls.family for cls in host_classes() if missing[0] in cls.sites]
            raise MissingSiteError(
                f"{type(method).__name__} acts at {missing[0]}, which {host.family} models do not have; "
                f"hosts that have it: {', '.join(having) or 'none installed'}; "
                f"methods for {host.family} models: {', '.join(_methods_for(host)) or 'none'}"
            )
    for first in methods:
        for second in methods:
            if first is not second and second.name in first.conflicts:
                raise ConflictError(
                    f"{type(first).__name__} and {type(second).__name__} cannot act on one model: "
                    f"{first.conflicts[second.name]}"
                )


def _methods_for(host: Host) -> list[str]:
    """Class names of the methods that fit a host."""
    from tokred.core.catalog import compatibility

    known = registered()
    return [known[name].__name__ for name, fits in compatibility().items() if fits.get(host.family)]


def split_options(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate the options of `patch` from the parameters of a method."""
    options = {key: value for key, value in parameters.items() if key in OPTIONS}
    rest = {key: value for key, value in parameters.items() if key not in OPTIONS}
    return options, rest
