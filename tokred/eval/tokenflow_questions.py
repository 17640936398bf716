"""What a small language model can tell of a card from TokenFlow's codes: digit, colour, background, place.

The models are LLaVAs of `tokred.generation.tokenflow_llava`, trained alike but for what they read of each code: its
semantic half, its pixel half, or both (the stage ``projector`` of ``tokenizers/tokenflow/train.py``)::

    python -m tokred.eval.tokenflow_questions both=runs/last/model semantic=runs/last_semantic/model ...
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokred.core.budget import check_count
from tokred.core.errors import InvalidParameterError, TokredError
from tokred.data.cards import CAPTION_WORDS, DigitCards
from tokred.eval.report import table
from tokred.eval.vision import mean, paired
from tokred.zoo.words import word_tokenizer

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

__all__ = ["QUESTIONS", "WORDS", "answers_of", "compare", "conversations", "question_accuracy", "question_tokenizer"]

#: kind -> question; the answer is a part of the card's caption
QUESTIONS = {
    "digit": "what digit ?",
    "colour": "what colour ?",
    "background": "what background ?",
    "place": "what place ?",
}
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "what", "digit", "colour", "background", "place", "?")
#: every word of the questions and answers, in the order of their ids
WORDS = (*_SPECIAL, *(word for word in CAPTION_WORDS if word not in _SPECIAL))
PAD, BOS, EOS, IMAGE = (WORDS.index(word) for word in ("<pad>", "<s>", "</s>", "<image>"))
LONGEST = 4  # words of an answer, its end among them
IGNORED = -100
SPLIT, SEED = "test", 777  # cards of which neither digits nor photographs were seen in training


def question_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of `WORDS`; ``<s>`` is put first."""
    return word_tokenizer({word: i for i, word in enumerate(WORDS)}, 256, ("<image>",))


def answers_of(caption: str) -> dict[str, str]:
    """Answers by kind, from a card's caption such as ``a red seven on dark blue , left``.

    Raises:
        InvalidParameterError: another caption.
    """
    before, _, rest = caption.partition(" on ")
    background, _, place = rest.partition(" , ")
    words = before.split()
    if len(words) != 3 or not background or not place:
        raise InvalidParameterError(f"{caption!r} is no caption of a card: questions are about cards alone")
    return {"digit": words[2], "colour": words[1], "background": background, "place": place}


def _ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def conversations(captions: Sequence[str], image_tokens: int, rng: random.Random) -> dict[str, Tensor]:
    """All questions about each card in one sequence, in an order that `rng` draws: inputs of a LLaVA with labels.

    Args:
        captions: B captions of cards. image_tokens: n, visual tokens of a picture.

    Returns:
        `input_ids`, `attention_mask` and `labels` (B, L) int64: ``<s>``, n times ``<image>``, then each question, its
        answer and ``</s>``; padded on the right. Labels are -100 but for answers and their ends.
    """
    rows, labels = [], []
    for caption in captions:
        row, wanted = [BOS] + [IMAGE] * image_tokens, [IGNORED] * (1 + image_tokens)
        answers = answers_of(caption)
        for kind in rng.sample(list(QUESTIONS), len(QUESTIONS)):
            question, answer = _ids(QUESTIONS[kind]), [*_ids(answers[kind]), EOS]
            row += question + answer
            wanted += [IGNORED] * len(question) + answer
        rows.append(row)
        labels.append(wanted)
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [PAD] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "labels": torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels]),
    }


@torch.no_grad()
def answer(model: LlavaForConditionalGeneration, codes: Tensor, kind: str) -> list[str]:
    """What a model answers to one question about pictures, or their codes (B, ...)."""
    start = [BOS] + [IMAGE] * model.config.vision_config.num_image_tokens + _ids(QUESTIONS[kind])
    ids = torch.tensor([start], device=model.device).expand(len(codes), -1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": codes.to(model.device)}
    found = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False, pad_token_id=PAD, eos_token_id=EOS)
    texts = []
    for row in found[:, len(start) :].tolist():
        until = row.index(EOS) if EOS in row else len(row)
        texts.append(" ".join(WORDS[i] for i in row[:until]))
    return texts


def _answered(
    model: LlavaForConditionalGeneration, count: int, seed: int, batch: int, split: str = SPLIT
) -> dict[str, Tensor]:
    """Which answers are right, (count,) bool by kind, on held-out cards."""
    if model.config.text_config.vocab_size != len(WORDS):
        raise InvalidParameterError(
            f"the model knows {model.config.text_config.vocab_size} words, the questions have {len(WORDS)}: expected a "
            "model of the stage projector"
        )
    cards = DigitCards(split, seed)
    right: dict[str, list[bool]] = {kind: [] for kind in QUESTIONS}
    for start in range(0, count, batch):
        some = cards.batch(start, min(batch, count - start))
        codes = model.model.vision_tower.tokenizer.encode(some.images)
        wanted = [answers_of(caption) for caption in some.captions]
        for kind in QUESTIONS:
            found = answer(model, codes, kind)
            right[kind] += [text == answers[kind] for text, answers in zip(found, wanted, strict=True)]
    return {kind: torch.tensor(values) for kind, values in right.items()}


def question_accuracy(
    model: LlavaForConditionalGeneration, count: int = 1000, seed: int = SEED, batch: int = 100
) -> dict[str, Any]:
    """Share of right answers on `count` held-out cards, each of which is asked every question.

    Returns:
        `accuracy`, `accuracy_se` over all questions (the error is over cards), and the same by kind in `kinds`.

    Raises:
        InvalidParameterError: a count below 1, or a model of other words.
    """
    check_count("count", count, 1)
    return _scores(_answered(model, count, seed, batch))


def _over_kinds(right: Mapping[str, Tensor]) -> Tensor:
    """Share of right answers about each card, (count,) float64: a card is one observation."""
    return torch.stack(list(right.values())).double().mean(dim=0)


def _scores(right: Mapping[str, Tensor]) -> dict[str, Any]:
    every = mean(_over_kinds(right))
    kinds = {kind: mean(values) for kind, values in right.items()}
    return {
        "accuracy": every.value,
        "accuracy_se": every.error,
        "kinds": {kind: {"accuracy": one.value, "accuracy_se": one.error} for kind, one in kinds.items()},
    }


def compare(
    models: Mapping[str, LlavaForConditionalGeneration],
    count: int = 1000,
    seed: int = SEED,
    batch: int = 100,
    split: str = SPLIT,
) -> dict[str, Any]:
    """`question_accuracy` of several models on the same cards, and the differences to the first of them.

    Returns:
        `rows`: one a model, with its `label`, `features` and scores, and `differences` by kind and over all of them
        (`difference`), mean and standard error of paired observations; `cards`, `seed`.
    """
    check_count("count", count, 1)
    rows, first = [], None
    for label, model in models.items():
        right = _answered(model, count, seed, batch, split)
        first = right if first is None else first
        differences = {kind: paired(values, first[kind]).to_dict() for kind, values in right.items()}
        features = model.config.vision_config.feature_mode
        row = {"label": label, "features": features, **_scores(right), "differences": differences}
        rows.append({**row, "difference": paired(_over_kinds(right), _over_kinds(first)).to_dict()})
    return {"rows": rows, "cards": count, "seed": seed}


def report(results: Mapping[str, Any]) -> str:
    """The table of `compare`: accuracies in percent with their standard errors."""

    def cell(scores: Mapping[str, float]) -> str:
        return f"{100 * scores['accuracy']:.1f} ± {100 * scores['accuracy_se']:.1f}"

    rows = [
        [row["label"], row["features"], *(cell(row["kinds"][kind]) for kind in QUESTIONS), cell(row)]
        for row in results["rows"]
    ]
    title = f"Right answers in %, ± standard error, of {results['cards']} held-out cards"
    return f"{title}\n\n{table(['model', 'features', *QUESTIONS, 'all'], [rows], left=2)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    from transformers import LlavaForConditionalGeneration

    from tokred.generation import tokenflow_llava  # noqa: F401  registers the tower

    parser = argparse.ArgumentParser(prog="python -m tokred.eval.tokenflow_questions", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("models", nargs="+", metavar="LABEL=FOLDER", help="models of the stage projector")
    parser.add_argument("--count", type=int, default=1000, help="held-out cards")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        models = {}
        for given in args.models:
            label, _, folder = given.partition("=")
            if not (Path(folder) / "config.json").is_file():
                raise InvalidParameterError(f"{given}: expected LABEL=FOLDER of a saved model")
            models[label] = LlavaForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()
        results = compare(models, args.count, args.seed)
    except TokredError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(results, indent=1) if args.json else report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
