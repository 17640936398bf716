"""Train the bundled digit VLM from scratch, or measure a trained one and write its card.

    python -m tokred.zoo.train_digit_vlm --seed 0 --out runs/digit_vlm
    python -m tokred.zoo.train_digit_vlm --evaluate --bundle --out runs/digit_vlm     # card; copies into the package

Two stages, one schedule each, on one CPU thread: the tower learns to see (``train_digit_vlm_tower``), then projector
and decoder learn to answer (``train_digit_vlm_language``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokred.zoo.digit_vlm import build_digit_vlm, build_processor
from tokred.zoo.train_digit_vlm_language import LanguageRecipe, train_language
from tokred.zoo.train_digit_vlm_tower import TowerRecipe, train_tower
from tokred.zoo.training import save_folder, trainer_arguments

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

TOWER, LANGUAGE = TowerRecipe(), LanguageRecipe()


@dataclass(frozen=True)
class VlmRecipe:
    """Everything that decides a training run besides the seed."""

    tower: TowerRecipe = TOWER
    language: LanguageRecipe = LANGUAGE

    def scaled(self, factor: float) -> VlmRecipe:
        """The same with ``factor`` times the steps of every phase."""
        tower = tuple(replace(p, steps=max(1, round(p.steps * factor))) for p in self.tower.phases)
        language = tuple(replace(p, steps=max(1, round(p.steps * factor))) for p in self.language.phases)
        return VlmRecipe(replace(self.tower, phases=tower), replace(self.language, phases=language))

    def smoke(self) -> VlmRecipe:
        """Two steps a phase on tiny batches: only shows that the command runs."""
        tower = tuple(replace(phase, steps=2, batch=4) for phase in self.tower.phases)
        language = tuple(replace(phase, steps=2, batch=2) for phase in self.language.phases)
        return VlmRecipe(replace(self.tower, phases=tower), replace(self.language, phases=language, pool=64))


def train(
    recipe: VlmRecipe, seed: int, tower_file: Path | None = None
) -> tuple[LlavaForConditionalGeneration, dict[str, Any]]:
    """Train from scratch; returns the model (eval, float32) and the record of the run.

    The trained tower is written to ``tower_file``. If that exists already, its tower is taken: each stage draws from a
    seed of its own, so that the result is the same.
    """
    torch.manual_seed(seed)
    model = build_digit_vlm()
    tower = model.model.vision_tower
    record: dict[str, Any] = {"seed": seed, "recipe": asdict(recipe)}
    if tower_file is not None and tower_file.exists():
        saved = torch.load(tower_file, weights_only=True)
        tower.load_state_dict(saved["weights"])
        record |= saved["record"]
    else:
        record |= _timed("tower", lambda: train_tower(tower, recipe.tower, torch.Generator().manual_seed(seed)))
        if tower_file is not None:
            tower_file.parent.mkdir(parents=True, exist_ok=True)
            part = {key: value for key, value in record.items() if key.startswith("tower")}
            torch.save({"weights": tower.state_dict(), "record": part}, tower_file)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    record |= _timed("language", lambda: train_language(model, recipe.language, generator))
    for clock in ("cpu_seconds", "wall_seconds"):
        record[clock] = round(record[f"tower_{clock}"] + record[f"language_{clock}"], 1)
    return model, record


def _timed(stage: str, run: Callable[[], list[dict[str, Any]]]) -> dict[str, Any]:
    """The log that ``run`` returns, and what it took."""
    wall, cpu = time.time(), time.process_time()
    log = run()
    seconds = {"cpu_seconds": round(time.process_time() - cpu, 1), "wall_seconds": round(time.time() - wall, 1)}
    return {f"{stage}_log": log} | {f"{stage}_{clock}": value for clock, value in seconds.items()}


def save(model: LlavaForConditionalGeneration, record: dict[str, Any], out: Path) -> Path:
    """The folder ``seed<n>`` in ``out``: float16 weights, configurations, tokenizer, processor, ``log.json``."""
    return save_folder(model, build_processor(), record, out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = trainer_arguments(__doc__, "two steps a phase on tiny batches")
    parser.add_argument(
        "--tower", type=Path, help="file for the trained tower; if it exists, the first stage is skipped"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.evaluate:
        from tokred.zoo.evaluate_digit_vlm import evaluate

        evaluate(args.out / f"seed{args.seed}", bundle=args.bundle, smoke=args.smoke)
        return
    recipe = VlmRecipe().smoke() if args.smoke else VlmRecipe().scaled(args.steps_scale)
    save(*train(recipe, args.seed, args.tower), args.out)


if __name__ == "__main__":
    main()
