"""Needles in a haystack of words: sentences ``key of NAME is VALUE .`` hidden among filler, and questions about them.

A prompt is a context and then ``key of NAME is``; the answer is one word, the value of the needle of that name. Nothing
else in the context says it, so tokens beside the needle's are of no use. A (split, seed, index) always names the same
context and questions::

    contexts = NeedleContexts("test", seed=7, tokens=512, needles=16)
    batch = contexts.batch(0, 8)
    batch.prompts()                      # ids (8, 516)
    text_of(batch.prompts()[0])          # "<s> ... key of alice is tulip . ... key of alice is"
    text_of(batch.answers[0])            # "tulip"

The words belong to all splits: a split is a stream of random draws of its own, and two contexts that agree are as good
as impossible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokred.data.banks import SPLITS
from tokred.data.canvas import CHUNK, seeded

_SPECIAL = "<pad> <s> </s> <unk> . key of is"
_FILLER = (
    "the and a to in it was that he she they we you with for on at by from up out down over under into about after "
    "before then when while where there here this these those all some many few each every more most other another "
    "old new little great long short high low near far early late day night year week hour morning evening road "
    "house river hill field town room door window table water wind rain snow sun light dark walked looked turned "
    "stood came went saw heard said kept left found held"
)
_NAMES = (
    "alice bruno clara david elena felix greta henry irene jonas karin louis maria nadia oscar paula quinn rosa simon "
    "tessa ursula viktor wanda xavier yvonne zoe adam bella carlos diana emil fiona george hanna ivan julia kevin "
    "laura martin nora otto peter rita samuel tina ulrich vera walter yusuf anton beate conrad doris erik frieda "
    "gustav helga isaac joana klaus lydia milan nina olaf"
)
_VALUES = (
    "tulip rose lily daisy violet orchid poppy iris fern moss oak pine maple birch cedar willow apple pear plum cherry "
    "lemon melon grape peach olive almond walnut carrot onion pepper tiger lion wolf fox bear deer otter seal whale "
    "eagle raven swan heron owl copper iron silver gold amber coral pearl ruby violin flute drum piano trumpet guitar "
    "anchor lantern compass ladder hammer basket"
)
#: Every word, by id: 8 special ones, 96 of filler, 64 names, 64 values.
NEEDLE_WORDS = tuple(" ".join((_SPECIAL, _FILLER, _NAMES, _VALUES)).split())
_IDS = {word: i for i, word in enumerate(NEEDLE_WORDS)}
BOS, DOT, KEY, OF, IS = (_IDS[word] for word in ("<s>", ".", "key", "of", "is"))
#: Ranges of the ids of each sort of word.
FILLER_IDS, NAME_IDS, VALUE_IDS = range(8, 104), range(104, 168), range(168, 232)
SENTENCE = 6  #: tokens of a needle, and of a sentence of filler with its full stop
QUESTION = 4  #: tokens of a question
NAME_AT, VALUE_AT = 2, 4  #: places of name and value in a needle
_TAG = 5  # keeps these streams apart from those of scenes and clips


class NeedleBatch(NamedTuple):
    """Contexts of one length, the needles in them, and questions about some of these."""

    context: Tensor  #: (B, T) int64 ids; ``<s>`` first, a full stop ends every sentence of six
    names: Tensor  #: (B, P) int64 ids, in the order of their places; distinct in a context
    values: Tensor  #: (B, P) int64 ids; two needles may share one
    spans: Tensor  #: (B, P, 2) int64: first token of a needle and one past its last; ``key of NAME is VALUE .``
    asked: Tensor  #: (B, Q) int64, which needle a question is about; distinct in a context
    questions: Tensor  #: (B, Q, 4) int64 ids ``key of NAME is``
    answers: Tensor  #: (B, Q) int64 ids

    def prompts(self, question: int = 0) -> Tensor:
        """Context and question ``question`` of each sample: (B, T + 4) ids. ``IndexError`` if there are fewer."""
        return torch.cat([self.context, self.questions[:, question]], 1)

    def answer_spans(self, question: int = 0) -> Tensor:
        """(B, 2) int64: where the needle stands that ``question`` is about."""
        return self.spans[torch.arange(len(self.spans)), self.asked[:, question]]


def text_of(ids: Tensor | Sequence[int]) -> str:
    """Words of ids (T,) or of a single id, parted by spaces."""
    return " ".join(NEEDLE_WORDS[i] for i in torch.as_tensor(ids).flatten().tolist())


def _check(tokens: int, needles: int, questions: int) -> None:
    most = min((tokens - 1) // SENTENCE, len(NAME_IDS))
    if not 1 <= needles <= most:
        raise ValueError(
            f"needles must be in [1, {max(most, 0)}]: each is a sentence of {SENTENCE} of the {tokens} tokens and has "
            f"a name of its own among {len(NAME_IDS)}; got {needles}"
        )
    if not 1 <= questions <= needles:
        raise ValueError(f"questions must be in [1, {needles}], the number of needles, got {questions}")


def draw_needles(n: int, tokens: int, needles: int, questions: int, generator: torch.Generator) -> NeedleBatch:
    """``n`` contexts of ``tokens`` tokens with ``needles`` needles, and ``questions`` questions about each.

    The generator's state decides everything. ``ValueError``: more needles than sentences or names, more questions than
    needles.
    """
    _check(tokens, needles, questions)

    def subset(size: int, count: int) -> Tensor:
        """(n, count) distinct numbers below ``size``, in random order."""
        return torch.rand(n, size, generator=generator).argsort(1)[:, :count]

    rows = torch.arange(n)[:, None]
    context = torch.randint(FILLER_IDS.start, FILLER_IDS.stop, (n, tokens), generator=generator)
    context[:, 0] = BOS
    context[:, SENTENCE::SENTENCE] = DOT
    starts = 1 + SENTENCE * subset((tokens - 1) // SENTENCE, needles).sort(1).values
    names = NAME_IDS.start + subset(len(NAME_IDS), needles)
    values = torch.randint(VALUE_IDS.start, VALUE_IDS.stop, (n, needles), generator=generator)
    for place, word in enumerate((KEY, OF, names, IS, values, DOT)):
        context[rows, starts + place] = word if isinstance(word, Tensor) else torch.tensor(word)
    asked = subset(needles, questions)
    question = torch.tensor([KEY, OF, 0, IS]).repeat(n, questions, 1)
    question[..., NAME_AT] = names.gather(1, asked)
    spans = torch.stack([starts, starts + SENTENCE], -1)
    return NeedleBatch(context, names, values, spans, asked, question, values.gather(1, asked))


class NeedleContexts:
    """An endless, indexable sequence of contexts of ``tokens`` tokens with ``needles`` needles.

    ``questions`` questions are asked about each context, about needles of their own. ``ValueError``: an unknown split,
    a negative seed, more needles than sentences (``(tokens - 1) // 6``) or names (64), more questions than needles.
    """

    def __init__(
        self, split: str = "test", seed: int = 0, tokens: int = 512, needles: int = 16, questions: int = 1
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        _check(tokens, needles, questions)
        self.split, self.seed = split, seed
        self.tokens, self.needles, self.questions = tokens, needles, questions

    def __repr__(self) -> str:
        sizes = f"tokens={self.tokens}, needles={self.needles}, questions={self.questions}"
        return f"NeedleContexts(split={self.split!r}, seed={self.seed}, {sizes})"

    def _chunk(self, number: int) -> NeedleBatch:
        generator = seeded(self.seed, self.split, _TAG, number, self.tokens, self.needles)
        return draw_needles(CHUNK, self.tokens, self.needles, self.questions, generator)

    def batch(self, start: int, count: int) -> NeedleBatch:
        """Contexts ``start`` .. ``start + count - 1``, the same whatever the batch. ``ValueError``: an empty range."""
        if start < 0 or count < 1:
            raise ValueError(f"need start >= 0 and count >= 1, got start={start}, count={count}")
        first, last = start // CHUNK, (start + count - 1) // CHUNK
        chunks = [self._chunk(number) for number in range(first, last + 1)]
        rows = slice(start - first * CHUNK, start - first * CHUNK + count)
        return NeedleBatch(*(torch.cat(parts)[rows] for parts in zip(*chunks, strict=True)))
