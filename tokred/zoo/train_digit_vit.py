"""Train the bundled digit-scene ViT from scratch, or measure trained ones and write the card.

    python -m tokred.zoo.train_digit_vit --seed 0 --out runs/digit_vit
    python -m tokred.zoo.train_digit_vit --evaluate --out runs/digit_vit      # after all seeds: writes the card

One schedule of three phases, each cheaper per step than showing all 144 patches, on one CPU thread:

* *window*: scenes of 32x32 pixels, whose 16 patches get the position embeddings of a random 4x4 block of the full grid.
  A digit fills much of a window, which is what starts the learning.
* *subset*: full scenes, of which the model sees all patches that touch the digit and random others. Makes it robust to
  missing patches.
* *full*: all patches.

Every patch is also classified (digit or background) by a head that is thrown away, and the class token is read after a
few blocks on the way by the model's own head, so that early class-token attention means something.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tokred.data.banks import load_banks
from tokred.data.scenes import DigitScenes, SceneBatch, SceneStyle, normalize, patch_coverage, render
from tokred.zoo.digit_vit import build_digit_vit
from tokred.zoo.muon import Muon
from tokred.zoo.training import trainer_arguments

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

GRID = 12
PATCHES = GRID**2
WINDOW = 4  # patches a side
BACKGROUND = 10  # class of a patch without digit
DIGIT_PATCH = 0.12  # a patch is digit if this share of it is covered
VAL_SEED = 1
#: The held-out scenes' style with more varied digits: there are only 1,257 to learn from.
TRAIN_STYLE = SceneStyle(digit_rotation=0.3, aspect=0.15, shear=0.15)


@dataclass(frozen=True)
class Phase:
    """``steps`` batches of ``batch`` scenes; each shows a number of patches drawn from ``tokens``."""

    kind: str
    steps: int
    batch: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run besides the seed."""

    phases: tuple[Phase, ...] = (
        Phase("window", 600, 128, (16,)),
        Phase("subset", 900, 64, (24, 40, 56, 80)),
        Phase("full", 120, 48, (PATCHES,)),
    )
    lr_muon: float = 0.02
    lr_adam: float = 1.2e-3
    warmup: int = 40
    hold: float = 0.3  # share of the steps before the rate falls, linearly, to `last_lr`
    last_lr: float = 0.02
    early_blocks: tuple[int, ...] = (3, 6, 9)  # class token read after these blocks (0-based)
    early_weight: float = 0.4
    ema: float = 0.995
    style: SceneStyle = TRAIN_STYLE

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def scaled(self, factor: float) -> Recipe:
        phases = tuple(replace(phase, steps=max(1, round(phase.steps * factor))) for phase in self.phases)
        return replace(self, phases=phases, warmup=max(1, round(self.warmup * min(1.0, factor))))

    def smoke(self) -> Recipe:
        """Five steps a phase on tiny batches: only shows that the command runs."""
        return replace(self, phases=tuple(replace(phase, steps=5, batch=4) for phase in self.phases), warmup=1)


def sincos_positions(dim: int, amplitude: float = 0.5, base: float = 100.0) -> Tensor:
    """2D sine-cosine table of the patch grid, row by row: (144, dim). Neighbours are alike from the first step."""
    frequencies = math.pi / 2 * base ** -torch.linspace(0, 1, dim // 4)
    phases = torch.arange(GRID)[:, None] * frequencies
    axis = torch.cat([phases.sin(), phases.cos()], 1)  # (12, dim / 2)
    rows = axis[:, None].expand(GRID, GRID, -1)
    columns = axis[None].expand(GRID, GRID, -1)
    return amplitude * torch.cat([rows, columns], -1).reshape(PATCHES, dim)


class Trainee(nn.Module):
    """The ViT with the patch head that training needs, run on any subset of patches."""

    def __init__(self, early_blocks: Sequence[int]) -> None:
        super().__init__()
        self.vit: VisionTransformer = build_digit_vit()
        self.patch_head = nn.Linear(self.vit.embed_dim, BACKGROUND + 1)
        self.early_blocks = tuple(early_blocks)
        with torch.no_grad():
            self.vit.pos_embed[0, 1:] = sincos_positions(self.vit.embed_dim)

    def forward(self, images: Tensor, shown: Tensor, places: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``shown`` (B, K): patches of ``images`` to use; ``places`` (B, K): their cells of the 12x12 grid.

        Returns class logits (B, 10), patch logits (B, K, 11) and the class logits after each early block.
        """
        vit = self.vit
        # not vit.patch_embed(images): timm checks the image size, and windows are smaller
        tokens = vit.patch_embed.proj(images).flatten(2).mT
        tokens = tokens.gather(1, shown[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = tokens + vit.pos_embed[0, 1:][places]
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
        x = torch.cat([cls, tokens], 1)
        early = []
        for index, block in enumerate(vit.blocks):
            x = block(x)
            if index in self.early_blocks:
                early.append(vit.head(vit.norm(x[:, 0])))
        x = vit.norm(x)
        return vit.head(x[:, 0]), self.patch_head(x[:, 1:]), early


def choose_patches(coverage: Tensor, phase: Phase, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Patches to show and their cells of the grid, each (B, K), from the digit's patch coverage (B, N)."""
    batch, patches = coverage.shape
    if phase.kind == "window":
        shown = torch.arange(patches).expand(batch, -1)
        corner = torch.randint(GRID - WINDOW + 1, (batch, 2, 1), generator=generator)
        return shown, (corner[:, 0] + shown // WINDOW) * GRID + corner[:, 1] + shown % WINDOW
    count = phase.tokens[int(torch.randint(len(phase.tokens), (), generator=generator))]
    order = torch.rand(batch, patches, generator=generator) + (coverage > 0).float()
    shown = order.topk(count, dim=1).indices.sort(1).values
    return shown, shown


def loss_of(trainee: Trainee, scenes: SceneBatch, phase: Phase, recipe: Recipe, generator: torch.Generator) -> Any:
    """Loss (scalar) and share of right answers of a batch."""
    coverage = patch_coverage(scenes.masks)
    shown, places = choose_patches(coverage, phase, generator)
    logits, patch_logits, early = trainee(normalize(scenes.images), shown, places)
    is_digit = coverage.gather(1, shown) > DIGIT_PATCH
    patch_labels = torch.where(is_digit, scenes.labels[:, None], BACKGROUND)
    loss = F.cross_entropy(logits, scenes.labels) + F.cross_entropy(patch_logits.flatten(0, 1), patch_labels.flatten())
    for early_logits in early:
        loss = loss + recipe.early_weight / len(early) * F.cross_entropy(early_logits, scenes.labels)
    return loss, (logits.argmax(1) == scenes.labels).float().mean().item()


def optimisers_of(trainee: Trainee, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = [p for p in trainee.vit.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trainee.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=recipe.lr_adam, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, lr=recipe.lr_muon, weight_decay=0.01), adam]


def rate_at(step: int, recipe: Recipe) -> float:
    """Factor of the learning rates: warm-up, constant, linear fall."""
    held = recipe.hold * recipe.steps
    fall = 1 - (1 - recipe.last_lr) * max(0.0, step - held) / max(1.0, recipe.steps - held)
    return min(1.0, (step + 1) / recipe.warmup) * fall


@torch.inference_mode()
def accuracy(model: nn.Module, scenes: DigitScenes, count: int, batch: int = 64) -> float:
    """Share of the first ``count`` scenes that ``model`` names right."""
    right = 0
    for start in range(0, count, batch):
        images, labels, _ = scenes.batch(start, min(batch, count - start))
        right += int((model(normalize(images)).argmax(1) == labels).sum())
    return right / count


def train(recipe: Recipe, seed: int, val_scenes: int = 1000, val_every: int = 300) -> tuple[nn.Module, dict[str, Any]]:
    """Train from scratch; returns the averaged model (float32) and the log; its scores are of validation scenes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    trainee = Trainee(recipe.early_blocks)
    average = build_digit_vit().eval()
    average.load_state_dict(trainee.vit.state_dict())
    optimisers = optimisers_of(trainee, recipe)
    base_rates = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    banks, val = load_banks("train"), DigitScenes("val", VAL_SEED)
    ramp = recipe.phases[0].steps / 2
    log: list[dict[str, Any]] = []
    wall, cpu, step = time.time(), time.process_time(), 0
    for phase in recipe.phases:
        bar = tqdm(range(phase.steps), desc=f"seed {seed}, {phase.kind}", mininterval=2)
        recent = 0.0  # training accuracy, running mean
        for done in bar:
            style = recipe.style.eased(min(1.0, 0.3 + 0.7 * step / ramp))
            if phase.kind == "window":
                style = replace(style, size=8 * WINDOW, strokes=(1, 3))
            factor = rate_at(step, recipe)
            for optimiser, rate in zip(optimisers, base_rates, strict=True):
                optimiser.param_groups[0]["lr"] = rate * factor
                optimiser.zero_grad(set_to_none=True)
            scenes = render(banks, phase.batch, generator, style)
            loss, right = loss_of(trainee, scenes, phase, recipe, generator)
            loss.backward()
            nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
            step += 1
            decay = min(recipe.ema, step / (step + 9))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(trainee.vit.parameters()), 1 - decay)
            recent += (right - recent) * max(0.05, 1 / (done + 1))
            if step % 20 == 0:
                log.append(
                    {"step": step, "phase": phase.kind, "loss": round(loss.item(), 4), "train": round(recent, 4)}
                )
                bar.set_postfix(loss=f"{loss.item():.3f}", train=f"{recent:.3f}")
            if step % val_every == 0 and phase.kind != "window":
                log.append({"step": step, "val": accuracy(average, val, val_scenes // 2)})
                tqdm.write(f"step {step}: validation {log[-1]['val']:.4f}")
    spent = {"wall_seconds": round(time.time() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    score = accuracy(average, val, val_scenes)
    print(f"seed {seed}: validation {score:.4f} on {val_scenes} scenes, {spent}")
    record = {
        "seed": seed,
        "recipe": asdict(recipe),
        **spent,
        "val_accuracy": score,
        "val_scenes": val_scenes,
        "log": log,
    }
    return average, record


def save(model: nn.Module, record: dict[str, Any], out: Path) -> None:
    """``seed<n>.safetensors`` (float16, as bundled), ``seed<n>_fp32.safetensors`` and ``seed<n>.json`` in ``out``."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    name = f"seed{record['seed']}"
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, out / f"{name}_fp32.safetensors")
    save_file({key: value.half() for key, value in state.items()}, out / f"{name}.safetensors")
    (out / f"{name}.json").write_text(json.dumps(record, indent=1))


def main(argv: Sequence[str] | None = None) -> None:
    parser = trainer_arguments(__doc__, "five steps a phase on tiny batches")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.evaluate:
        from tokred.zoo.evaluate_digit_vit import evaluate

        evaluate(args.out, bundle=args.bundle, smoke=args.smoke)
        return
    recipe = Recipe().smoke() if args.smoke else Recipe().scaled(args.steps_scale)
    model, record = train(recipe, args.seed, val_scenes=16 if args.smoke else 1000)
    save(model, record, args.out)


if __name__ == "__main__":
    main()
