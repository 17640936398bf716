"""How the tokenizers and generators are trained: accelerate, timm's optimizers, an average of the weights.

An `Objective` says what is learnt from which batches; `fit` runs it: one process or many, checkpoints that a killed run
goes on from exactly, progress, and pictures of what the averaged model does by now. The folder of a run holds
`config.json` (everything that decides it, then its log), `model/` (the averaged model, `save_pretrained`), `samples/`,
and while it lasts a checkpoint.

Needs ``pip install "tokred[train]"``.
"""

from __future__ import annotations

import abc
import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from PIL import Image
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from tqdm import tqdm

from tokred.core.budget import check_count
from tokred.core.errors import InvalidParameterError, UnknownParameterError, nearest
from tokred.data.pictures import Pictures, open_pictures
from tokred.generation.images import to_pil

__all__ = ["Objective", "Plan", "fit", "picture_sheet", "read_config", "recipe_arguments", "run_recipe", "trained"]


@dataclass(frozen=True)
class Plan:
    """How to train; the fields of ``train:`` in a recipe.

    Attributes:
        steps: updates. batch_size: pictures a process and update.
        opt: a name of timm's `list_optimizers`. lr, betas, weight_decay: its arguments (Muon takes no betas).
        warmup: updates from 0 to lr, linear; then a cosine to `min_lr`.
        clip_grad: largest norm of the gradient; 0 is no clipping.
        ema: decay of the moving average of the weights, warmed up; 0 is none.
        seed: of weights, data and noise.
        checkpoint_every, sample_every, log_every: updates.

    Raises:
        InvalidParameterError: a field outside its range.
    """

    steps: int = 100_000
    batch_size: int = 64
    opt: str = "adamw"
    lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 1000
    min_lr: float = 0.0
    clip_grad: float = 1.0
    ema: float = 0.9999
    seed: int = 0
    checkpoint_every: int = 1000
    sample_every: int = 1000
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "sample_every", "log_every"):
            check_count(name, getattr(self, name), 1)
        check_count("seed", self.seed)
        if check_count("warmup", self.warmup) >= self.steps:
            raise InvalidParameterError(f"warmup={self.warmup}: expected fewer than the {self.steps} steps of the run")
        optimizers = list_optimizers()
        if self.opt not in optimizers:
            raise InvalidParameterError(f"opt={self.opt!r}: timm has no such optimizer{nearest(self.opt, optimizers)}")
        for name, least in (("lr", 1e-12), ("weight_decay", 0.0), ("min_lr", 0.0), ("clip_grad", 0.0)):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= least):
                raise InvalidParameterError(f"{name}={value!r}: expected a number {'>' if name == 'lr' else '>='} 0")
        if not 0 <= self.ema < 1:
            raise InvalidParameterError(f"ema={self.ema!r}: expected a number in [0, 1)")
        object.__setattr__(self, "betas", tuple(self.betas))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """From the section ``train:`` of a recipe."""
        return cls(**checked_fields(cls, values, "train"))


def checked_fields(cls: Any, values: Mapping[str, Any], section: str) -> dict[str, Any]:
    """`values`, all of which are fields of the dataclass.

    Raises:
        UnknownParameterError: one is not.
    """
    known = [f.name for f in fields(cls)]
    for name in values:
        if name not in known:
            raise UnknownParameterError(f"{section}: {name!r} is no field of it{nearest(name, known)}")
    return dict(values)


class Objective(abc.ABC):
    """What is trained.

    Attributes:
        model: the module whose parameters learn and are averaged.
        adversary: a module that learns against it, by an optimizer of its own; None for none.
    """

    model: nn.Module
    adversary: nn.Module | None = None

    @abc.abstractmethod
    def batches(self, size: int, start: int, rank: int, world: int) -> Iterator[Any]:
        """Endless batches of one process, from the `start`-th update on; tensors on the CPU."""

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: Any, step: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar) of a batch, and numbers for the log. `model` is `self.model`, perhaps wrapped.

        Draws from torch's global generator, which `fit` seeds for every update.
        """

    def adversary_loss(self, step: int) -> Tensor | None:
        """Loss of `adversary` after the update `step`, on what `loss` has just made; None where it does not learn."""
        return None

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Write what a user loads; `self.model` holds the averaged weights meanwhile."""

    def sheet(self) -> Sequence[Tensor]:
        """Rows (B, 3, H, W) in [-1, 1] of a picture that shows what the averaged model does; () for none."""
        return ()


def fit(
    objective: Objective, plan: Plan, out: str | Path, recipe: Mapping[str, Any], resume: bool = False
) -> dict[str, Any]:
    """Train; returns what ``config.json`` holds in the end.

    Call it in every process of a distributed run. Numbers repeat for one seed and one number of processes; a run that
    was killed and is resumed ends with the same weights.

    Args:
        recipe: all that decides the run, JSON types.

    Raises:
        InvalidParameterError: `out` holds another run, or none that could be resumed.
        FloatingPointError: the loss is no longer a number.
    """
    out, recipe = Path(out), json.loads(json.dumps({**recipe, "train": asdict(plan)}))
    accelerator = Accelerator()
    device = accelerator.device
    _check_folder(out, recipe, resume)
    accelerator.wait_for_everyone()  # all have looked at the folder before one writes into it
    if accelerator.is_main_process:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        if not resume:
            _write(out / "config.json", {"recipe": recipe})
    betas = {"betas": plan.betas} if "adam" in plan.opt else {}
    raw = create_optimizer_v2(objective.model, opt=plan.opt, lr=plan.lr, weight_decay=plan.weight_decay, **betas)
    scheduler, _ = create_scheduler_v2(
        raw,
        "cosine",
        num_epochs=plan.steps,
        warmup_epochs=plan.warmup,
        warmup_lr=0.0,
        min_lr=plan.min_lr,
        warmup_prefix=False,
        step_on_epochs=True,
    )
    assert scheduler is not None
    # Not wrapped for several processes: a loss may call any part of the model, and `_share` averages the gradients.
    model, optimizer = accelerator.prepare_model(objective.model, evaluation_mode=True), accelerator.prepare(raw)
    opponent = None
    if objective.adversary is not None:
        theirs = create_optimizer_v2(objective.adversary, opt=plan.opt, lr=plan.lr, **betas)
        objective.adversary = accelerator.prepare_model(objective.adversary, evaluation_mode=True)
        opponent = accelerator.prepare(theirs)
    parameters = [p for p in objective.model.parameters() if p.requires_grad]
    ema = EMAModel(parameters, decay=plan.ema, use_ema_warmup=True, power=2 / 3) if plan.ema else None
    if ema is not None:
        ema.to(device)
    progress = _Progress()
    accelerator.register_for_checkpointing(progress, *([ema] if ema else []))
    if resume:
        accelerator.load_state(str(out / json.loads((out / "checkpoint.json").read_text())["folder"]))
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = objective.batches(plan.batch_size, progress.step, rank, world)
    bar = tqdm(
        total=plan.steps, initial=progress.step, disable=not accelerator.is_main_process, mininterval=2, desc=out.name
    )
    start = time.time()
    while progress.step < plan.steps:
        torch.manual_seed((plan.seed * 1_000_003 + progress.step) * 97 + rank)
        scheduler.step(progress.step)
        model.train()
        with accelerator.autocast():
            loss, numbers = objective.loss(model, next(batches), progress.step, device)
        accelerator.backward(loss)
        _share(accelerator, model)
        if plan.clip_grad:
            accelerator.clip_grad_norm_(model.parameters(), plan.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(parameters)
        if opponent is not None:
            opponent.zero_grad()
            with accelerator.autocast():
                answer = objective.adversary_loss(progress.step)
            if answer is not None:
                accelerator.backward(answer)
                _share(accelerator, objective.adversary)
                opponent.step()
                numbers = {**numbers, "adversary": answer.detach()}
        progress.step += 1
        last = progress.step == plan.steps
        if progress.step % plan.log_every == 0 or last:
            row = {
                "step": progress.step,
                "loss": float(loss.detach()),
                **{name: float(v) for name, v in numbers.items()},
            }
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"the loss of step {progress.step} is {row['loss']}: lower lr or set clip_grad"
                )
            progress.log.append({"step": progress.step, **{name: round(value, 5) for name, value in row.items()}})
            bar.set_postfix({name: f"{value:.4g}" for name, value in row.items()})
        bar.update()
        if progress.step % plan.sample_every == 0 or last:
            with torch.no_grad(), _averaged(objective, parameters, ema):
                if accelerator.is_main_process and (rows := objective.sheet()):
                    picture_sheet(rows).save(out / "samples" / f"{progress.step:07d}.png")
        if progress.step % plan.checkpoint_every == 0 and not last:
            progress.seconds += time.time() - start
            start = time.time()
            _checkpoint(accelerator, out, progress.step)
    bar.close()
    progress.seconds += time.time() - start
    record = {
        "recipe": recipe,
        "parameters": sum(p.numel() for p in objective.model.parameters()),
        "seconds": round(progress.seconds, 1),
        "processes": world,
        "precision": accelerator.mixed_precision,
        "log": progress.log,
    }
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with torch.no_grad(), _averaged(objective, parameters, ema):
            objective.save(out / "model")
        _write(out / "config.json", record)
        (out / "checkpoint.json").unlink(missing_ok=True)
        for old in out.glob("checkpoint-*"):
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return record


def _share(accelerator: Accelerator, model: nn.Module | None) -> None:
    """Gradients become their mean over the processes."""
    if accelerator.num_processes == 1 or model is None:
        return
    learning = [p for p in model.parameters() if p.requires_grad]
    for p in learning:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = accelerator.reduce(torch.cat([p.grad.flatten() for p in learning if p.grad is not None]), "mean")
    for p, mean in zip(learning, flat.split([p.numel() for p in learning]), strict=True):
        p.grad = mean.view_as(p)


class _Progress:
    """What a checkpoint holds beside weights, optimizer and average."""

    def __init__(self) -> None:
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds, "log": list(self.log)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]


class _averaged:
    """Eval mode and averaged weights inside, the trained ones again afterwards."""

    def __init__(self, objective: Objective, parameters: list[nn.Parameter], ema: EMAModel | None) -> None:
        self.model, self.parameters, self.ema = objective.model, parameters, ema

    def __enter__(self) -> None:
        self.model.eval()
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)

    def __exit__(self, *exception: object) -> None:
        if self.ema is not None:
            self.ema.restore(self.parameters)
        self.model.train()


def _checkpoint(accelerator: Accelerator, out: Path, step: int) -> None:
    """Write a checkpoint, then point to it, then remove the one before."""
    name = f"checkpoint-{step}"
    accelerator.save_state(str(out / name))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write(out / "checkpoint.json", {"folder": name})
        for old in out.glob("checkpoint-*"):
            if old.name != name:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _check_folder(out: Path, recipe: Mapping[str, Any], resume: bool) -> None:
    config = out / "config.json"
    if not resume:
        if config.exists():
            raise InvalidParameterError(f"{out} holds a run already: resume it, or give another folder")
        return
    if not config.exists() or not (out / "checkpoint.json").exists():
        raise InvalidParameterError(f"{out} holds no checkpoint to resume from: start the run without resume")
    there = json.loads(config.read_text())["recipe"]
    if there != recipe:
        names = [name for name in {**there, **recipe} if there.get(name) != recipe.get(name)]
        raise InvalidParameterError(
            f"{out} holds a checkpoint of another run, which differs in {', '.join(sorted(names))}"
        )


def _write(path: Path, data: Any) -> None:
    """In one piece: whoever reads sees the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1))
    os.replace(partial, path)


def picture_sheet(rows: Sequence[Tensor], scale: int | None = None, gap: int = 2) -> Image.Image:
    """Rows of pictures (B, 3, H, W) in [-1, 1] as one picture.

    Args:
        scale: pixels are repeated this often; None makes a picture about 96 wide. gap: white pixels between pictures.
    """
    side = rows[0].shape[-1]
    scale = max(1, 96 // side) if scale is None else scale
    cell, columns = side * scale + gap, max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * cell + gap, len(rows) * cell + gap), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(to_pil(row)):
            large = picture.resize((side * scale, side * scale), Image.Resampling.NEAREST)
            sheet.paste(large, (x * cell + gap, y * cell + gap))
    return sheet


def read_config(path: str | Path, sections: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A recipe: a YAML file of these sections, each a mapping.

    Raises:
        InvalidParameterError: it is not.
        FileNotFoundError: there is no such file.
    """
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InvalidParameterError(f"{path} is no YAML: {error}") from error
    if (
        not isinstance(config, dict)
        or set(config) != set(sections)
        or not all(isinstance(v, dict) for v in config.values())
    ):
        given = sorted(config) if isinstance(config, dict) else type(config).__name__
        raise InvalidParameterError(f"{path}: expected the sections {', '.join(sections)}, each a mapping; got {given}")
    return config


def trained(folder: Path, option: str) -> Path:
    """`folder`, of a saved tokenizer.

    Raises:
        InvalidParameterError: it holds none.
    """
    if not (folder / "model_index.json").is_file():
        raise InvalidParameterError(
            f"{option} {folder}: no saved tokenizer there; expected RUN/model of a finished run"
        )
    return folder


def recipe_arguments(description: str | None, stages: Sequence[str]) -> argparse.ArgumentParser:
    """The options that every recipe's ``train.py`` has; the description is the first line of its docstring."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--config", required=True, type=Path, help="recipe, such as tiny.yaml beside this file")
    parser.add_argument("--stage", required=True, choices=stages)
    parser.add_argument("--out", required=True, type=Path, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--data", help="a folder of pictures, or cards; default: the recipe's")
    parser.add_argument("--steps", type=int, help="updates, instead of the recipe's")
    parser.add_argument("--seed", type=int, help="instead of the recipe's")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of a process")
    return parser


def run_recipe(
    args: argparse.Namespace,
    config: dict[str, dict[str, Any]],
    objective_of: Callable[[Pictures], Objective],
    **further: Any,
) -> dict[str, Any]:
    """`fit` one stage of a recipe, whose section ``train_STAGE`` is its plan.

    Args:
        args: of `recipe_arguments`. config: of `read_config`. further: what else decides the run, JSON types.
        objective_of: makes what is trained, after torch's generator was seeded.
    """
    changes = {name: getattr(args, name) for name in ("steps", "seed") if getattr(args, name) is not None}
    values = {**config[f"train_{args.stage}"], **changes}
    if "steps" in changes:
        values["warmup"] = min(values.get("warmup", Plan.warmup), args.steps - 1)
    plan = Plan.from_dict(values)
    data = {name: value for name, value in config["data"].items() if name != "pictures"}
    source = config["data"]["pictures"] if args.data is None else args.data
    pictures = open_pictures(source, **{"seed": plan.seed, **data})
    torch.manual_seed(plan.seed)
    sections = {name: values for name, values in config.items() if not name.startswith("train_")}
    recipe = {"stage": args.stage, **sections, "data": data, "pictures": type(pictures).__name__, **further}
    return fit(objective_of(pictures), plan, args.out, recipe, args.resume)
