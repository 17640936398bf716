"""Models of the demo: loaded when first asked for, kept while there is room, used by one job at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from tokred.core.errors import InvalidParameterError, TokredError
from tokred.demo import codes
from tokred.eval.classifiers import Choice, Classifier, load_classifier
from tokred.eval.hub import unreachable, what_to_do
from tokred.eval.needle_eval import LLMHost, load_llm
from tokred.eval.vqa_hosts import BUNDLED as BUNDLED_VLMS
from tokred.eval.vqa_hosts import VLMHost, load_vlm

__all__ = ["CLASSIFIERS", "LLMS", "VIDEO_MODELS", "VLMS", "Shelf", "Shelves"]

#: bundled models by what they are asked for
CLASSIFIERS = ("digit-vit",)
VLMS = tuple(name for name, media in BUNDLED_VLMS.items() if media == "image")
VIDEO_MODELS = tuple(name for name, media in BUNDLED_VLMS.items() if media == "video")
LLMS = ("needle-llm",)

T = TypeVar("T")


class Shelf(Generic[T]):
    """Models of one kind by name. The bundled ones stay, of the others the last one.

    Args:
        load: name -> model. bundled: names that need no hub.
    """

    def __init__(self, load: Callable[[str], T], bundled: Sequence[str]) -> None:
        self.bundled = tuple(bundled)
        self._load = load
        self._own: dict[str, T] = {}
        self._other: tuple[str, T] | None = None
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, name: str) -> Iterator[T]:
        """The model `name`; other jobs wait until it is given back, for a patch is the whole model's.

        Raises:
            InvalidParameterError: no such model, or the hub cannot be reached.
        """
        name = name.strip()
        if not name:
            raise InvalidParameterError(f"no model is named: choose {' or '.join(self.bundled)}, or type an id")
        with self._lock:
            yield self._find(name)

    def _find(self, name: str) -> T:
        if name in self._own:
            return self._own[name]
        if self._other is not None and self._other[0] == name:
            return self._other[1]
        if name not in self.bundled:
            self._other = None  # its memory is needed
        try:
            model = self._load(name)
        except TokredError as error:
            if unreachable(error.__cause__ or error):
                local = f"take a bundled model: {', '.join(self.bundled)}"
                raise InvalidParameterError(what_to_do(f"the model {name!r}", local)) from error
            raise
        if name in self.bundled:
            self._own[name] = model
        else:
            self._other = (name, model)
        return model


class Shelves:
    """Everything that the demo loads.

    Args:
        device: where models other than the bundled ones run.
    """

    def __init__(self, device: str = "cpu") -> None:
        def classifier(name: str) -> Classifier:
            choice = Choice(name, templates="simple") if name.startswith("openclip:") else Choice(name)
            found = load_classifier(choice)
            found.model.to("cpu" if name in CLASSIFIERS else device)
            return found

        def vlm(name: str) -> VLMHost:
            return load_vlm(name, "cpu" if name in BUNDLED_VLMS else device)

        def llm(name: str) -> LLMHost:
            return load_llm(name, "cpu" if name in LLMS else device)

        self.classifiers: Shelf[Classifier] = Shelf(classifier, CLASSIFIERS)
        self.vlms: Shelf[VLMHost] = Shelf(vlm, (*VLMS, *VIDEO_MODELS))
        self.llms: Shelf[LLMHost] = Shelf(llm, LLMS)

    def load_bundled(self) -> None:
        """Load what the page shows first, so that no first click waits for it."""
        for shelf in (self.classifiers, self.vlms, self.llms):
            for name in shelf.bundled:
                with shelf.borrow(name):
                    pass
        codes.token_range("flextok")
