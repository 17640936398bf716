"""Train a backbone with timm's own pieces and accelerate, from one CPU to many GPUs.

    python -m tokred.vision.backbones.train --model strip_mlp_tiny --data scenes --out runs/strip_mlp
    accelerate launch --num_processes 8 --mixed_precision bf16 -m tokred.vision.backbones.train \\
        --model lookup_vit_small --data imagefolder /data/imagenet --out runs/lookup_vit_small

`--data scenes` draws the bundled digit scenes (96x96, ten classes) and builds a small variant of the model (`SMALL`);
`--data imagefolder PATH` reads PATH/train and PATH/val, a folder a class. Any other timm model trains, too: a plain ViT
to compare with is `--model vit_tiny_patch16_224`. Optimizer, scheduler, mixup, random erasing, augmentation and moving
average are timm's; processes, precision and checkpoints accelerate's. A LookupViT sees a new compressed grid in every
update (`MultiResSampler`).

The folder of a run holds `config.json` (everything that decides the run, then its log and scores), `model.safetensors`
(the averaged weights), `last.safetensors` (those of the last update), and while it lasts a checkpoint that `--resume`
goes on from. `tokred.vision.backbones.compare` compares such folders.

Needs ``pip install "tokred[train]"``. Several processes on CPUs start by ``ACCELERATE_USE_CPU=true torchrun
--nproc_per_node N -m tokred.vision.backbones.train ...``: `accelerate launch --cpu` starts one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from safetensors.torch import save_file
from timm.data import Mixup, create_dataset, create_transform, resolve_data_config
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, ParseKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset

from tokred.core.budget import check_choice, check_count
from tokred.core.errors import InvalidParameterError, TokredError, nearest
from tokred.data.banks import load_banks
from tokred.data.canvas import seeded
from tokred.data.scenes import DigitScenes, SceneStyle, normalize, render
from tokred.vision.backbones.dualtoken_vit import DualTokenViT
from tokred.vision.backbones.lookup_vit import MultiResSampler
from tokred.vision.backbones.trained import create, grid_name, parse_grids

__all__ = ["IMAGENET", "SMALL", "Recipe", "Run", "default_recipe", "train"]

FAMILIES = ("strip_mlp", "lookup_vit", "dualtoken_vit")
SIZE = 96  # side of a scene
WINDOW = 32  # side of a window: a digit fills much of it
VAL_SEED = 1
#: More varied digits than the held-out scenes have: there are only 1,257 to learn from.
TRAIN_STYLE = SceneStyle(digit_rotation=0.3, aspect=0.15, shear=0.15)
#: What only photographs in files go through; scenes are drawn anew, and a mirrored digit is another sign.
FILE_AUGMENTATION = ("auto_augment", "color_jitter")

# -- recipes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to train; the fields are those of timm's training, and each is an option of the command line.

    Attributes:
        epochs: their length is that of the data, or `Run.steps_per_epoch`.
        batch_size: images a process and step.
        opt: a name of timm's `list_optimizers`. lr, weight_decay, betas, eps: its arguments; parameters of one
            dimension and those of the model's `no_weight_decay` have no decay.
        sched: of timm's `create_scheduler_v2`, stepped every update. warmup_epochs: from `warmup_lr`, linear.
            min_lr: where it ends.
        clip_grad: largest norm of the gradient; 0 is no clipping.
        smoothing: of the labels. mixup, cutmix: their alpha, 0 is none.
        auto_augment: timm's word for RandAugment and others, "" is none. color_jitter, reprob (random erasing).
        drop_path: stochastic depth.
        ema: decay of the moving average of the weights, warmed up as timm does it; 0 is none.
        grids: compressed grids of a LookupViT, one is drawn for each update; () for other models.

    Raises:
        InvalidParameterError: a field outside its range.
    """

    epochs: int = 300
    batch_size: int = 64
    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    sched: str = "cosine"
    warmup_epochs: int = 20
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    clip_grad: float = 1.0
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    reprob: float = 0.25
    drop_path: float = 0.1
    ema: float = 0.9999
    grids: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs, 1)
        check_count("batch_size", self.batch_size, 1)
        check_choice("sched", self.sched, ("cosine", "tanh", "poly", "step", "multistep"))
        if check_count("warmup_epochs", self.warmup_epochs) >= self.epochs:
            raise InvalidParameterError(
                f"warmup_epochs={self.warmup_epochs!r}: expected fewer than the {self.epochs} epochs of the run"
            )
        optimizers = list_optimizers()
        if self.opt not in optimizers:
            raise InvalidParameterError(f"opt={self.opt!r}: timm has no such optimizer{nearest(self.opt, optimizers)}")
        for name in ("weight_decay", "warmup_lr", "min_lr", "clip_grad", "mixup", "cutmix", "color_jitter"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise InvalidParameterError(f"{name}={value!r}: expected a number >= 0")
        for name in ("lr", "eps"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InvalidParameterError(f"{name}={getattr(self, name)!r}: expected a number > 0")
        for name in ("smoothing", "drop_path", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidParameterError(f"{name}={getattr(self, name)!r}: expected a number in [0, 1)")
        if not 0 <= self.reprob <= 1:
            raise InvalidParameterError(f"reprob={self.reprob!r}: expected a probability in [0, 1]")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise InvalidParameterError(
                f"batch_size={self.batch_size}: mixup and cutmix pair the images of a batch; give an even number, or "
                "mixup=0 and cutmix=0"
            )


#: By family, for ImageNet. Strip-MLP: the authors' configuration, as a batch of 64 a process. DualToken-ViT: its own
#: recipe was not obtained (unverified); this is LightViT's, for 8 x 128 images. LookupViT: not obtained either
#: (unverified); a usual recipe for ViTs, and of the grids it is only known that there are several. "" is any other.
IMAGENET: dict[str, Recipe] = {
    "": Recipe(),
    "strip_mlp": Recipe(lr=5e-4, warmup_lr=5e-7, min_lr=5e-6, clip_grad=5.0, ema=0.0),
    "dualtoken_vit": Recipe(
        batch_size=128, weight_decay=0.04, warmup_lr=1e-7, min_lr=1e-6, mixup=0.2, color_jitter=0.3, clip_grad=0.0,
        auto_augment="rand-m9-mstd0.5",
    ),
    "lookup_vit": Recipe(grids=((3, 3), (5, 5), (7, 7), (10, 10))),
}  # fmt: skip

#: For the bundled scenes, one recipe for all, so that families can be compared. In so few updates AdamW learns nothing.
SCENES = Recipe(
    epochs=40, opt="muon", lr=5e-3, weight_decay=0.02, warmup_epochs=1, warmup_lr=1e-5, min_lr=2e-5,
    smoothing=0.0, mixup=0.0, cutmix=0.0, auto_augment="", color_jitter=0.0, reprob=0.0, drop_path=0.0, ema=0.995,
)  # fmt: skip
SCENE_GRIDS = ((3, 3), (4, 4), (6, 6), (9, 9))

#: Small variants for scenes by name: at most 1.5 M parameters and 0.06 to 0.25 GMACs. Those of other names stay as they
#: are. The first three take about 0.1 GMACs (LookupViT at 6 x 6), the last is the architecture of the bundled ViT.
SMALL: dict[str, dict[str, Any]] = {
    "strip_mlp_tiny": {"img_size": SIZE, "embed_dim": 32, "layers": (6, 6, 1, 1)},
    "dualtoken_vit_tiny": {
        "img_size": SIZE, "embed_dims": (64, 64, 96), "depths": (6, 3, 1), "num_heads": (2, 2, 3),
        "global_tokens": (3, 3),
    },
    "lookup_vit_tiny": {
        "img_size": SIZE, "patch_size": 8, "embed_dim": 96, "depth": 8, "num_heads": 3, "compressed_grid": (6, 6),
        "dynamic_img_size": True,
    },
    "vit_tiny_patch16_224": {
        "img_size": SIZE, "patch_size": 8, "embed_dim": 96, "depth": 12, "num_heads": 3, "dynamic_img_size": True,
    },
}  # fmt: skip


def family_of(model: str) -> str:
    """The family of a registered name, "" for models that are not of this package."""
    return next((family for family in FAMILIES if model.startswith(f"{family}_")), "")


def default_recipe(model: str, data: str) -> Recipe:
    """The recipe of a model's family on "scenes" or "imagefolder"."""
    check_choice("data", data, ("scenes", "imagefolder"))
    family = family_of(model)
    if data == "imagefolder":
        return IMAGENET[family]
    return replace(SCENES, grids=SCENE_GRIDS) if family == "lookup_vit" else SCENES


@dataclass(frozen=True)
class Run:
    """Everything that decides a run; see `main` for the command line.

    Attributes:
        model: a name that timm knows. model_kwargs: of `timm.create_model`, before those of `SMALL`.
        data: "scenes" or "imagefolder". path: of the image folder.
        recipe: None is the default of family and data.
        seed: of weights, data and augmentation.
        steps_per_epoch: updates; None is one pass through the folder, or 50 for scenes.
        accumulate: batches an update.
        windows: share of the epochs, the first, that show small windows of scenes. val_scenes: of the held-out ones.
        eval_every: epochs between two evaluations; the last epoch always has one.
        workers: processes that read files.

    Raises:
        InvalidParameterError: a field outside its range, or fields that do not go together.
    """

    model: str
    data: str = "scenes"
    path: str | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    seed: int = 0
    steps_per_epoch: int | None = None
    accumulate: int = 1
    windows: float = 0.6
    val_scenes: int = 500
    eval_every: int = 10
    workers: int = 0

    def __post_init__(self) -> None:
        check_choice("data", self.data, ("scenes", "imagefolder"))
        if not timm.is_model(self.model):
            raise InvalidParameterError(
                f"model={self.model!r}: timm knows no such model{nearest(self.model, timm.list_models())}"
            )
        if (self.path is None) == (self.data == "imagefolder"):
            raise InvalidParameterError(
                f"data={self.data!r} with path={self.path!r}: an image folder needs a path, scenes have none"
            )
        check_count("seed", self.seed)
        for name in ("accumulate", "val_scenes", "eval_every"):
            check_count(name, getattr(self, name), 1)
        check_count("workers", self.workers)
        if self.steps_per_epoch is not None:
            check_count("steps_per_epoch", self.steps_per_epoch, 1)
        if not 0 <= self.windows <= 1:
            raise InvalidParameterError(f"windows={self.windows!r}: expected a share of the epochs, in [0, 1]")
        recipe = default_recipe(self.model, self.data) if self.recipe is None else self.recipe
        object.__setattr__(self, "recipe", recipe)
        if recipe.grids and family_of(self.model) != "lookup_vit":
            raise InvalidParameterError(f"grids={recipe.grids!r}: {self.model} has no compressed grid, a LookupViT has")
        if self.data == "scenes":
            for name in FILE_AUGMENTATION:
                if getattr(recipe, name):
                    raise InvalidParameterError(
                        f"{name}={getattr(recipe, name)!r}: scenes are drawn anew each time and take no augmentation "
                        "but mixup, cutmix, smoothing and reprob"
                    )

    @property
    def how(self) -> Recipe:
        assert self.recipe is not None  # __post_init__ has set it
        return self.recipe

    @property
    def kwargs(self) -> dict[str, Any]:
        """Arguments of the model, the small variant's included."""
        small = SMALL.get(self.model, {"img_size": SIZE} if family_of(self.model) else {})
        return {**(small if self.data == "scenes" else {}), **self.model_kwargs}

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        result: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return result


# -- data --------------------------------------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor]  #: images (B, 3, H, W) as the model takes them, labels (B,)


class Source(Protocol):
    """Images of one process.

    `steps`: batches an epoch. `train(epoch)` yields exactly these; `val()` this process' share of the held-out images,
    each image in one process alone.
    """

    num_classes: int
    steps: int

    def train(self, epoch: int) -> Iterator[Batch]: ...
    def val(self) -> Iterator[Batch]: ...


class Scenes:
    """Digit scenes, drawn anew for each (seed, epoch, step, process): windows first, and ever harder ones."""

    num_classes = 10

    def __init__(self, run: Run, free_size: bool, rank: int = 0, world: int = 1) -> None:
        """`free_size`: windows go to the model as they are; else they lie somewhere on a plain image."""
        self.run, self.free_size, self.rank, self.world = run, free_size, rank, world
        self.steps = (run.steps_per_epoch or 50) * run.accumulate
        self.banks = load_banks("train")
        self.window_epochs = round(run.windows * run.how.epochs)

    def train(self, epoch: int) -> Iterator[Batch]:
        windows = epoch < self.window_epochs
        ramp = max(1.0, self.window_epochs / 2)  # epochs until the scenes are as hard as the held-out ones
        for step in range(self.steps):
            generator = seeded(self.run.seed, "train", epoch, step, self.rank)
            style = TRAIN_STYLE.eased(min(1.0, 0.3 + 0.7 * (epoch + step / self.steps) / ramp))
            if windows:
                style = replace(style, size=WINDOW, strokes=(1, 3))
            images, labels, _ = render(self.banks, self.run.how.batch_size, generator, style)
            if windows and not self.free_size:
                images = _on_canvas(images, generator)
            yield normalize(images), labels

    def val(self) -> Iterator[Batch]:
        scenes, size, count = DigitScenes("val", VAL_SEED), 64, self.run.val_scenes
        for start in range(self.rank * size, count, self.world * size):
            images, labels, _ = scenes.batch(start, min(size, count - start))
            yield normalize(images), labels


def _on_canvas(windows: Tensor, generator: torch.Generator) -> Tensor:
    """Windows (B, 3, S, S) uint8, each at a random place of an image (B, 3, 96, 96) of its own mean colour."""
    count, side = len(windows), windows.shape[-1]
    canvas = windows.float().mean((2, 3), keepdim=True).to(torch.uint8).expand(-1, -1, SIZE, SIZE).clone()
    corners = torch.randint(SIZE - side + 1, (count, 2), generator=generator).tolist()
    for image, window, (top, left) in zip(canvas, windows, corners, strict=True):
        image[:, top : top + side, left : left + side] = window
    return canvas


class ImageFolder:
    """PATH/train and PATH/val (or PATH/validation) by timm's dataset and transforms; no held-out images, no scores."""

    def __init__(self, run: Run, data_config: Mapping[str, Any], rank: int = 0, world: int = 1) -> None:
        how, root = run.how, Path(str(run.path))
        names = {"train": ("train",), "val": ("val", "validation")}
        found = {split: next((root / n for n in given if (root / n).is_dir()), None) for split, given in names.items()}
        if found["train"] is None:
            raise InvalidParameterError(f"path={run.path!r}: expected a folder that holds train/CLASS/IMAGE files")
        self.world, self.rank, self.run = world, rank, run
        common = {key: data_config[key] for key in ("input_size", "interpolation", "mean", "std")}
        self.dataset = _folder(found["train"])
        self.dataset.transform = create_transform(
            **common,
            is_training=True,
            color_jitter=how.color_jitter,
            auto_augment=how.auto_augment or None,
            re_prob=how.reprob,
            re_mode="pixel",
        )
        classes = self.dataset.reader.class_to_idx
        self.num_classes = len(classes)
        self.held_out = None if found["val"] is None else _folder(found["val"])
        if self.held_out is not None:
            if self.held_out.reader.class_to_idx != classes:
                raise InvalidParameterError(
                    f"path={run.path!r}: {found['val']} has other classes than {found['train']}"
                )
            self.held_out.transform = create_transform(**common, crop_pct=data_config["crop_pct"])
        self.sampler: DistributedSampler[Any] = DistributedSampler(
            self.dataset, world, rank, shuffle=True, seed=run.seed, drop_last=True
        )
        whole = len(self.sampler) // how.batch_size
        self.steps = run.steps_per_epoch * run.accumulate if run.steps_per_epoch else whole - whole % run.accumulate
        if not 1 <= self.steps <= whole:
            raise InvalidParameterError(
                f"{len(self.dataset)} images in {found['train']} make {whole} batches of {how.batch_size} in each of "
                f"{world} processes, {max(self.steps, run.accumulate)} are needed: lower batch_size, accumulate or "
                "steps_per_epoch"
            )

    def train(self, epoch: int) -> Iterator[Batch]:
        self.sampler.set_epoch(epoch)
        loader: DataLoader[Any] = DataLoader(
            self.dataset, self.run.how.batch_size, sampler=self.sampler, num_workers=self.run.workers, drop_last=True
        )
        for _, (images, labels) in zip(range(self.steps), loader, strict=False):
            yield images, labels

    def val(self) -> Iterator[Batch]:
        if self.held_out is not None:
            mine = Subset(self.held_out, range(self.rank, len(self.held_out), self.world))
            yield from DataLoader(mine, self.run.how.batch_size, num_workers=self.run.workers)


def _folder(root: Path) -> Any:
    try:
        return create_dataset("", root=str(root), split="")
    except RuntimeError as error:
        raise InvalidParameterError(f"{root}: {error}; expected a folder of images for each class") from error


def takes_windows(model: nn.Module) -> bool:
    """Whether the model takes images of any size without new weights."""
    embed = getattr(model, "patch_embed", None)
    return isinstance(model, DualTokenViT) or getattr(embed, "strict_img_size", True) is False


# -- training ----------------------------------------------------------------------------------------------------------


class _Progress:
    """What a checkpoint holds beside weights and optimizer."""

    def __init__(self) -> None:
        self.epoch, self.update, self.seconds = 0, 0, 0.0
        self.log: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "update": self.update, "seconds": self.seconds, "log": list(self.log)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.update, self.seconds, self.log = (state[k] for k in ("epoch", "update", "seconds", "log"))


class Trainer:
    """One run, in each of its processes."""

    def __init__(self, run: Run, out: Path) -> None:
        self.run, self.out, how = run, out, run.how
        self.accelerator = Accelerator(gradient_accumulation_steps=run.accumulate)
        device, place = self.accelerator.device, (self.accelerator.process_index, self.accelerator.num_processes)
        set_seed(run.seed)
        kwargs = {"drop_path_rate": how.drop_path, **run.kwargs}
        if run.data == "imagefolder":
            config = resolve_data_config(_config_args(kwargs), model=_without_weights(run.model, kwargs))
            self.source: Source = ImageFolder(run, config, *place)
        model = create(run.model, 10 if run.data == "scenes" else self.source.num_classes, kwargs)
        if run.data == "scenes":
            self.source = Scenes(run, takes_windows(model), *place)
        model = model.to(device)
        betas = {"betas": how.betas, "eps": how.eps} if "adam" in how.opt else {}
        raw = create_optimizer_v2(model, opt=how.opt, lr=how.lr, weight_decay=how.weight_decay, **betas)
        self.updates = self.source.steps // run.accumulate
        self.scheduler, _ = create_scheduler_v2(
            raw,
            how.sched,
            num_epochs=how.epochs,
            warmup_epochs=how.warmup_epochs,
            warmup_lr=how.warmup_lr,
            min_lr=how.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.updates,
        )
        assert self.scheduler is not None  # the recipe's schedules all exist
        self.ema = ModelEmaV3(model, decay=how.ema, use_warmup=True) if how.ema else None
        self.model, self.optimizer = self.accelerator.prepare(model, raw)
        self.progress = _Progress()
        self.accelerator.register_for_checkpointing(self.progress, *([self.ema] if self.ema else []))
        self.sampler = MultiResSampler(how.grids, seed=run.seed) if how.grids else None
        mixed = how.mixup > 0 or how.cutmix > 0
        self.mixup: Any = None
        if mixed:
            classes = self.source.num_classes
            self.mixup = Mixup(how.mixup, how.cutmix, label_smoothing=how.smoothing, num_classes=classes)
        self.loss = SoftTargetCrossEntropy() if mixed else LabelSmoothingCrossEntropy(how.smoothing)
        # files are erased by their transform
        erases = run.data == "scenes" and how.reprob > 0
        self.erase = RandomErasing(how.reprob, mode="pixel", device=str(device)) if erases else nn.Identity()

    @property
    def averaged(self) -> nn.Module:
        """The model that is evaluated: the moving average, if there is one."""
        inner: nn.Module = self.accelerator.unwrap_model(self.model)
        return inner if self.ema is None else self.ema.module

    def epoch(self) -> dict[str, Any]:
        """Train one epoch; its mean loss and last rate."""
        how, device, progress = self.run.how, self.accelerator.device, self.progress
        # a seed an epoch: a run that was resumed draws the same numbers
        set_seed((self.run.seed * 100_003 + progress.epoch) % 2**31, device_specific=True)
        self.model.train()
        total, rate = torch.zeros((), device=device), 0.0
        for images, labels in self.source.train(progress.epoch):
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
            images = self.erase(images)
            if self.sampler is not None:
                self.sampler.apply(self.model, progress.update)
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss = self.loss(self.model(images), labels)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and how.clip_grad:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), how.clip_grad)
                rate = self.optimizer.param_groups[0]["lr"]
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss.detach()
            if self.accelerator.sync_gradients:
                progress.update += 1
                self.scheduler.step_update(progress.update)  # type: ignore[union-attr]
                if self.ema is not None:
                    self.ema.update(self.accelerator.unwrap_model(self.model), step=progress.update)
        progress.epoch += 1
        mean = float(self.accelerator.reduce(total, "mean")) / self.source.steps
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss of epoch {progress.epoch} is {mean}: lower lr, lengthen warmup_epochs, or set clip_grad"
            )
        return {"epoch": progress.epoch, "update": progress.update, "loss": round(mean, 5), "lr": rate}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Accuracy on the held-out images: {"accuracy": share}, of a LookupViT {"3x3": share, ...}."""
        model = self.averaged.eval()
        broadcast(list(model.buffers()))  # statistics of BatchNorm differ between processes; the main one's are saved
        grids: Sequence[Any] = self.run.how.grids or (None,)
        scores = {}
        for grid in grids:
            if grid is not None:
                model.set_compressed_grid(grid)  # type: ignore[operator]
            found = torch.zeros(2, dtype=torch.float64 if self.accelerator.device.type != "mps" else torch.float32)
            for images, labels in self.source.val():
                with self.accelerator.autocast():
                    right = model(images.to(self.accelerator.device)).argmax(1).cpu() == labels
                found += torch.stack([right.sum(), torch.tensor(len(right))])
            right, count = self.accelerator.reduce(found.to(self.accelerator.device), "sum").tolist()
            if count:
                scores["accuracy" if grid is None else grid_name(grid)] = right / count
        return scores

    def save_checkpoint(self) -> None:
        """Write a checkpoint, then point to it, then remove the one before."""
        name = f"checkpoint-{self.progress.epoch}"
        self.accelerator.save_state(str(self.out / name))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            _write(self.out / "checkpoint.json", {"folder": name})
            for old in self.out.glob("checkpoint-*"):
                if old.name != name:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load_checkpoint(self) -> None:
        folder = self.out / json.loads((self.out / "checkpoint.json").read_text())["folder"]
        self.accelerator.load_state(str(folder))
        self.scheduler.step_update(self.progress.update)  # type: ignore[union-attr]


def _write(path: Path, data: Any) -> None:
    """In one piece: whoever reads sees the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1))
    os.replace(partial, path)


def _without_weights(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return create(name, 0, kwargs)


def _config_args(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {"img_size": kwargs["img_size"]} if isinstance(kwargs.get("img_size"), int) else {}


def train(run: Run, out: str | Path, resume: bool = False) -> dict[str, Any]:
    """Train, and leave the run in the folder `out`; returns what its `config.json` holds.

    Call it in every process of a distributed run. Numbers repeat for one seed and one number of processes; a resumed
    run goes on from the last checkpoint, written after each epoch, as if it had not stopped.

    Raises:
        InvalidParameterError: see `Run` and `Recipe`; `out` holds another run, or none that could be resumed.
        FloatingPointError: the loss is no longer a number.
    """
    out = Path(out)
    known = json.loads((out / "config.json").read_text()) if (out / "config.json").exists() else None
    _check_folder(run, out, known, resume)
    trainer = Trainer(run, out)
    how, main = run.how, trainer.accelerator.is_main_process
    trainer.accelerator.wait_for_everyone()  # all have looked at the folder before one writes into it
    if resume:
        trainer.load_checkpoint()
    elif main:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / "config.json", {"run": run.to_dict()})
    progress = trainer.progress
    while progress.epoch < how.epochs:
        start = time.time()
        row = trainer.epoch()
        if progress.epoch % run.eval_every == 0 or progress.epoch == how.epochs:
            row["val"] = {name: round(score, 5) for name, score in trainer.evaluate().items()}
        progress.seconds += time.time() - start
        progress.log.append(row)
        trainer.accelerator.print(f"{run.model} seed {run.seed}: {json.dumps(row)}", flush=True)
        trainer.save_checkpoint()
    inner = trainer.accelerator.unwrap_model(trainer.model)
    record = {
        "run": run.to_dict(),
        "kwargs": json.loads(json.dumps(run.kwargs)),
        "num_classes": trainer.source.num_classes,
        "parameters": sum(p.numel() for p in inner.parameters()),
        "processes": trainer.accelerator.num_processes,
        "precision": trainer.accelerator.mixed_precision,
        "seconds": round(progress.seconds, 1),
        "val": progress.log[-1].get("val", {}),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "log": progress.log,
    }
    if main:
        for name, module in (("model", trainer.averaged), ("last", inner)):
            state = {key: value.detach().cpu().clone().contiguous() for key, value in module.state_dict().items()}
            save_file(state, out / f"{name}.safetensors")
        _write(out / "config.json", record)
    trainer.accelerator.wait_for_everyone()
    return record


def _check_folder(run: Run, out: Path, known: dict[str, Any] | None, resume: bool) -> None:
    if not resume:
        if known is not None:
            raise InvalidParameterError(f"{out} holds a run already: resume it, or give another folder")
        return
    if known is None or not (out / "checkpoint.json").exists():
        raise InvalidParameterError(f"{out} holds no checkpoint to resume from: start the run without resume")
    wanted, there = _flat(run.to_dict()), _flat(known["run"])
    differing = [f"{k}={there.get(k)!r} there, {wanted.get(k)!r} given" for k in wanted if wanted[k] != there.get(k)]
    if differing:
        raise InvalidParameterError(f"{out} holds a checkpoint of another run: {'; '.join(differing)}")


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in run.items() if key != "recipe"}, **run["recipe"]}


# -- command line ------------------------------------------------------------------------------------------------------


def _pair(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokred.vision.backbones.train", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", required=True, help="a name that timm knows, those of tokred.vision included")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar=("scenes|imagefolder", "PATH"), help="scenes, or imagefolder PATH"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="NAME=VALUE")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of a process")
    given = {f.name: f.default for f in fields(Run)}
    for name in ("seed", "accumulate", "val_scenes", "eval_every", "workers"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=given[name], metavar="N")
    parser.add_argument("--steps-per-epoch", type=int, metavar="N")
    parser.add_argument("--windows", type=float, default=given["windows"], metavar="SHARE")
    group = parser.add_argument_group("recipe", "defaults are those of the model's family and of the data")
    kinds: dict[str, Any] = {"int": int, "float": float, "str": str, "tuple[float, ...]": _pair}
    for f in fields(Recipe):
        kind = kinds.get(str(f.type), str)
        group.add_argument(f"--{f.name.replace('_', '-')}", type=kind, metavar=f.name.upper(), default=None)
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; the result is that of `train`."""
    parser = _arguments()
    args = vars(parser.parse_args(argv))
    if len(args["data"]) > 2:
        parser.error(f"--data {' '.join(args['data'])}: expected scenes, or imagefolder PATH")
    torch.set_num_threads(args["threads"])
    try:
        changes = {f.name: args[f.name] for f in fields(Recipe) if args[f.name] is not None}
        if "grids" in changes:
            changes["grids"] = parse_grids(changes["grids"])
        own = {f.name: args[f.name] for f in fields(Run) if f.name in args and f.name not in ("data", "path", "recipe")}
        data = args["data"][0]
        recipe = replace(default_recipe(args["model"], data), **changes)
        path = args["data"][1] if len(args["data"]) > 1 else None
        return train(Run(data=data, path=path, recipe=recipe, **own), args["out"], resume=args["resume"])
    except TokredError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
