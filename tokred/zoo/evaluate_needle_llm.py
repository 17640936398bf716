"""Measure a trained needle LLM and write its card.

    python -m tokred.zoo.evaluate_needle_llm            # prints the bundled model's validation recall
    python -m tokred.zoo.train_needle_llm --evaluate    # writes the card of a trained one

Recall is measured with the whole prompt; what is left of it when a method shortens the prompt is the benchmarks'
business. Every choice is made on validation contexts; the test contexts are read once for the weights that ship.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from tokred.data.needles import FILLER_IDS, NAME_IDS, VALUE_IDS, NeedleContexts, text_of
from tokred.zoo.evaluate_digit_vlm import TEST_SEED, VAL_SEED, share_row, weights_card
from tokred.zoo.needle_llm import CONFIG, EOS, FOLDER, needle_llm

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

#: (tokens, needles) of the contexts that are measured.
SIZES = ((256, 16), (512, 16), (1000, 24))
CHECKED_CONTEXTS = 4


@torch.inference_mode()
def recall(model: LlamaForCausalLM, contexts: NeedleContexts, count: int, batch: int = 16) -> dict[str, Any]:
    """Share of ``count`` contexts whose first question ``generate`` answers with the value and then ``</s>``."""
    hits: list[bool] = []
    for start in tqdm(range(0, count, batch), desc=f"{contexts.tokens} tokens, {contexts.split}", mininterval=5):
        part = contexts.batch(start, min(batch, count - start))
        prompts = part.prompts()
        output = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=2, do_sample=False)
        said = output[:, prompts.shape[1] :]
        hits += ((said[:, 0] == part.answers[:, 0]) & (said[:, -1] == EOS)).tolist()
    row = share_row(hits)
    return {"recall": row.pop("accuracy"), **row, "needles": contexts.needles}


def recall_table(model: LlamaForCausalLM, split: str, count: int) -> dict[str, Any]:
    """``recall`` by length of the context; half as many questions at the longest."""
    seed = TEST_SEED if split == "test" else VAL_SEED
    rows: dict[str, Any] = {"seed": seed}
    for tokens, needles in SIZES:
        questions = max(1, count // 2) if tokens == SIZES[-1][0] else count
        rows[str(tokens)] = recall(model, NeedleContexts(split, seed, tokens, needles), questions)
    return rows


def _test_table(folder: Path, count: int) -> dict[str, Any]:
    """Recall on the test split. It is stored beside the weights and read back: the split is looked at once."""
    stored, digest = folder / "test_scores.json", weights_card(folder / "model.safetensors")["sha256"]
    if stored.exists():
        result: dict[str, Any] = json.loads(stored.read_text())
        if (result["sha256"], result["count"]) == (digest, count):
            return result["scores"]
    scores = recall_table(needle_llm(folder)[0], "test", count)
    stored.write_text(json.dumps({"sha256": digest, "count": count, "scores": scores}, indent=1))
    return scores


def context_checksum(contexts: NeedleContexts) -> dict[str, Any]:
    """Words that identify the contexts: the first needle, the question and the answer of a few."""
    batch = contexts.batch(0, CHECKED_CONTEXTS)
    first = [text_of(row[start:stop]) for row, (start, stop) in zip(batch.context, batch.spans[:, 0], strict=True)]
    return {
        "tokens": contexts.tokens,
        "needles": contexts.needles,
        "first_needle": first,
        "first_needle_at": batch.spans[:, 0, 0].tolist(),
        "questions": [text_of(row) for row in batch.questions[:, 0]],
        "answers": [text_of(row) for row in batch.answers[:, 0]],
    }


def evaluate(folder: Path, bundle: bool = False, smoke: bool = False) -> dict[str, Any]:
    """Measure the model in ``folder`` and write ``card.json`` there; ``bundle`` also copies it into the package."""
    count = 4 if smoke else 600
    if not (folder / "log.json").exists():
        raise FileNotFoundError(f"no log.json in {folder}; train it first: --seed N --out {folder.parent}")
    record = json.loads((folder / "log.json").read_text())
    model, _ = needle_llm(folder)
    card: dict[str, Any] = {
        "name": "needle-llm",
        "task": "say the value that a context of filler words gives to a name: 'key of NAME is' -> 'VALUE </s>'",
        "architecture": {"class": type(model).__name__, **CONFIG},
        "weights": {
            **weights_card(folder / "model.safetensors"),
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "training": {
            "command": f"python -m tokred.zoo.train_needle_llm --seed {record['seed']} --out DIR",
            "hardware": f"one CPU thread, {platform.machine()}",
            "written": "embeddings, layer 0, input norm, queries and keys of layer 1: by hand or as drawn "
            "(start_values), not trained",
            **{key: record[key] for key in ("cpu_seconds", "wall_seconds", "recipe")},
        },
        "recall": {"val": recall_table(model, "val", count), "test": _test_table(folder, count)},
        "note": "the value and </s> by generate, whole prompt, one question a context; guessing one of the needles "
        "scores 1 / needles. One training seed",
        "data": {
            "needle": "key of NAME is VALUE .",
            "words": {"filler": len(FILLER_IDS), "names": len(NAME_IDS), "values": len(VALUE_IDS)},
            "source": "random words of tokred.data.needles; no text of others",
        },
        "checksum": {
            "split": "test",
            "seed": TEST_SEED,
            **context_checksum(NeedleContexts("test", TEST_SEED, *SIZES[1])),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "date": datetime.date.today().isoformat(),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1))
    if bundle:
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(folder, FOLDER, ignore=shutil.ignore_patterns("test_scores.json"))
    print(json.dumps(card["recall"], indent=1))
    return card


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="a trained model; the bundled one by default")
    parser.add_argument("--questions", type=int, default=500, help="of each length; half at the longest")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(json.dumps(recall_table(needle_llm(args.folder)[0], "val", args.questions), indent=1))


if __name__ == "__main__":
    main()
