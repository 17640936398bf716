"""Needle contexts: the same for ever, needles where the spans say, answers that are true."""

from __future__ import annotations

import pytest
import torch

from tokred.data import NeedleContexts
from tokred.data.needles import (
    BOS,
    DOT,
    FILLER_IDS,
    IS,
    KEY,
    NAME_IDS,
    NEEDLE_WORDS,
    OF,
    QUESTION,
    SENTENCE,
    VALUE_IDS,
    draw_needles,
    text_of,
)


def test_word_list() -> None:
    assert len(set(NEEDLE_WORDS)) == len(NEEDLE_WORDS) == 232
    assert [len(ids) for ids in (FILLER_IDS, NAME_IDS, VALUE_IDS)] == [96, 64, 64]
    assert [NEEDLE_WORDS[i] for i in (BOS, DOT, KEY, OF, IS)] == ["<s>", ".", "key", "of", "is"]
    sorts = [NEEDLE_WORDS[ids.start] for ids in (FILLER_IDS, NAME_IDS, VALUE_IDS)]
    assert sorts == ["the", "alice", "tulip"]
    assert VALUE_IDS.stop == len(NEEDLE_WORDS)


@pytest.mark.parametrize(("tokens", "needles", "questions"), [(7, 1, 1), (62, 3, 2), (512, 16, 16), (1000, 64, 5)])
def test_needles_are_where_the_spans_say(tokens: int, needles: int, questions: int) -> None:
    batch = NeedleContexts("val", 3, tokens, needles, questions).batch(0, 5)
    assert batch.context.shape == (5, tokens)
    assert batch.names.shape == batch.values.shape == (5, needles)
    assert batch.spans.shape == (5, needles, 2)
    assert batch.questions.shape == (5, questions, QUESTION)
    assert batch.asked.shape == batch.answers.shape == (5, questions)
    assert all(field.dtype == torch.int64 for field in batch)
    for i in range(5):
        row = batch.context[i].tolist()
        assert row[0] == BOS
        assert all((token == DOT) == (place > 0 and place % SENTENCE == 0) for place, token in enumerate(row))
        names, values = batch.names[i].tolist(), batch.values[i].tolist()
        assert len(set(names)) == needles
        assert set(names) <= set(NAME_IDS)
        assert set(values) <= set(VALUE_IDS)
        told = dict(zip(names, values, strict=True))
        filler = set(range(1, tokens))
        last = 0
        for (start, stop), name in zip(batch.spans[i].tolist(), names, strict=True):
            assert start >= last
            assert row[start:stop] == [KEY, OF, name, IS, told[name], DOT]
            last = stop
            filler -= set(range(start, stop))
        assert all(row[place] in FILLER_IDS or row[place] == DOT for place in filler)
        assert len(set(batch.asked[i].tolist())) == questions
        for asked, question, answer in zip(batch.asked[i], batch.questions[i].tolist(), batch.answers[i], strict=True):
            assert question == [KEY, OF, names[asked], IS]
            assert told[names[asked]] == answer


def test_prompts_spans_and_text() -> None:
    batch = NeedleContexts("test", 0, tokens=31, needles=4, questions=2).batch(0, 3)
    prompts, spans = batch.prompts(1), batch.answer_spans(1)
    assert prompts.shape == (3, 31 + QUESTION)
    for i in range(3):
        said = text_of(batch.context[i, spans[i, 0] : spans[i, 1]])
        assert said == f"{text_of(batch.questions[i, 1])} {text_of(batch.answers[i, 1])} ."
        assert text_of(prompts[i]).startswith("<s> ")
        assert text_of(prompts[i]).endswith(text_of(batch.questions[i, 1]))
    with pytest.raises(IndexError):
        batch.prompts(2)


def test_context_does_not_depend_on_the_batch_or_the_questions() -> None:
    whole = NeedleContexts("test", 9, 62, 5, 2).batch(0, 130)
    for start, n in ((60, 10), (129, 1), (0, 3)):
        part = NeedleContexts("test", 9, 62, 5, 2).batch(start, n)
        assert all(torch.equal(a, b[start : start + n]) for a, b in zip(part, whole, strict=True))
    more = NeedleContexts("test", 9, 62, 5, 5).batch(0, 130)
    assert torch.equal(more.context, whole.context)
    assert torch.equal(more.questions[:, :2], whole.questions)


def test_streams_are_their_own() -> None:
    first = NeedleContexts("test", 9, 62, 5).batch(0, 4).context
    assert len({tuple(row) for row in NeedleContexts("test", 9, 62, 5).batch(0, 200).context.tolist()}) == 200
    others = [("val", 9, 62, 5), ("train", 9, 62, 5), ("test", 8, 62, 5), ("test", 9, 63, 5), ("test", 9, 62, 4)]
    for arguments in others:
        other = NeedleContexts(*arguments).batch(0, 4).context[:, :62]
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True)), arguments


def test_generator_decides() -> None:
    a, b = (draw_needles(4, 50, 3, 3, torch.Generator().manual_seed(1)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_place_and_word_is_used() -> None:
    """Nothing about the place or the value of a needle can be guessed."""
    batch = draw_needles(2000, 62, 3, 3, torch.Generator().manual_seed(0))
    places = torch.bincount((batch.spans[..., 0].flatten() - 1) // SENTENCE, minlength=10)
    asked = torch.bincount(batch.asked[:, 0], minlength=3)
    values = torch.bincount(batch.answers.flatten() - VALUE_IDS.start, minlength=len(VALUE_IDS))
    for counts in (places, asked, values):  # the least likely of them strays by five standard deviations
        mean = counts.double().mean()
        assert ((counts - mean).abs() < 5 * mean.sqrt()).all()
    assert len(batch.names.unique()) == len(NAME_IDS)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: NeedleContexts("validation"), "split must be one of"),
    (lambda: NeedleContexts("val", seed=-1), "seed must be >= 0"),
    (lambda: NeedleContexts("val", tokens=512, needles=65), r"needles must be in \[1, 64\]"),
    (lambda: NeedleContexts("val", tokens=6, needles=1), r"needles must be in \[1, 0\]"),
    (lambda: NeedleContexts("val", needles=4, questions=5), r"questions must be in \[1, 4\]"),
    (lambda: NeedleContexts("val").batch(-1, 2), "need start >= 0"),
    (lambda: draw_needles(1, 30, 0, 0, torch.Generator()), "needles must be"),
])  # fmt: skip
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
