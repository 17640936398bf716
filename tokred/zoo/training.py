"""What the trainers of the bundled models share: rates, two optimisers, an average of the weights, command lines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokred.zoo.muon import Muon


@dataclass(frozen=True)
class Rates:
    """Learning rates: warm-up, constant to ``hold`` of the steps, then a linear fall to ``last`` of the rate."""

    muon: float = 0.02
    adam: float = 1.2e-3
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = 40
    hold: float = 0.3
    last: float = 0.02

    def factor(self, step: int, steps: int) -> float:
        """Of both rates at ``step`` (0-based) of ``steps``."""
        held = self.hold * steps
        fall = 1 - (1 - self.last) * max(0.0, step - held) / max(1.0, steps - held)
        return min(1.0, (step + 1) / self.warmup) * fall


class Optimiser:
    """Muon for ``matrices``, AdamW without decay for the rest of ``module``; gradients are clipped to norm 1."""

    def __init__(self, module: nn.Module, matrices: Iterable[nn.Parameter], rates: Rates, steps: int) -> None:
        chosen = list(matrices)
        taken = {id(p) for p in chosen}
        self.params = [p for p in module.parameters() if p.requires_grad]
        rest = [p for p in self.params if id(p) not in taken]
        adam = torch.optim.AdamW(rest, lr=rates.adam, betas=rates.betas, weight_decay=0.0)
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [(Muon(chosen, lr=rates.muon), rates.muon)]
        self.parts.append((adam, rates.adam))
        self.rates, self.steps, self.done = rates, steps, 0

    def step(self, loss: Tensor) -> None:
        """Differentiate ``loss`` and update the parameters."""
        factor = self.rates.factor(self.done, self.steps)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for optimiser, rate in self.parts:
            optimiser.param_groups[0]["lr"] = rate * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.done += 1


class Average:
    """Exponential moving average of a module's parameters, in step with its training."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.source = list(module.parameters())
        self.values = [p.detach().clone() for p in self.source]
        self.decay, self.done = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.done += 1
        decay = min(self.decay, self.done / (self.done + 9))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.source], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into ``module``, which has the same parameters."""
        for p, value in zip(module.parameters(), self.values, strict=True):
            p.copy_(value)


def trainer_arguments(description: str | None, smoke: str, scaled: bool = True) -> argparse.ArgumentParser:
    """The command line of a trainer, its own options apart.

    Args:
        smoke: what ``--smoke`` does. scaled: whether there is ``--steps-scale``.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, logs and the card")
    parser.add_argument("--seed", type=int, default=0)
    if scaled:
        parser.add_argument("--steps-scale", type=float, default=1.0, help="factor of the steps of every phase")
    parser.add_argument("--smoke", action="store_true", help=smoke)
    parser.add_argument("--evaluate", action="store_true", help="measure what is in --out and write its card")
    parser.add_argument("--bundle", action="store_true", help="with --evaluate: put that seed into the package")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more than the idle cores is far slower")
    return parser


def save_folder(model: Any, reader: Any, record: dict[str, Any], out: Path) -> Path:
    """The folder ``seed<n>`` in ``out``: float16 weights, configurations, tokenizer or processor, ``log.json``.

    Args:
        reader: the tokenizer or processor. record: of the training, with its "seed".
    """
    folder = out / f"seed{record['seed']}"
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    reader.save_pretrained(folder)
    (folder / "log.json").write_text(json.dumps(record, indent=1))
    return folder
