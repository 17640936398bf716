"""First stage of the digit VLM: its CLIP tower learns to see, with heads that are thrown away.

The output of the layer that LLaVA reads (the last but one) names the digit and the colour of every patch; the class
token of three layers says how many digits there are, which ones and which colours, so that class-token attention means
something. Windows, subsets, full scenes: see ``train_digit_vit``, whose three phases these are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tokred.data.coloured import COLOURS, SLOTS, ColourScenes, ColourStyle, render_coloured
from tokred.data.scenes import normalize
from tokred.zoo.train_digit_vit import WINDOW, Phase, choose_patches, sincos_positions
from tokred.zoo.training import Average, Optimiser, Rates

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

DIGITS = 10
DIGIT_PATCH = 0.12  # a patch is digit if this share of it is covered
#: The held-out scenes' style with more varied digits: there are only 1,257 to learn from.
TRAIN_STYLE = ColourStyle(digits=(1, 2, 3, 4), digit_rotation=0.3, aspect=0.15, shear=0.15)
#: A window shows one digit and at most two strokes.
WINDOW_STYLE = replace(TRAIN_STYLE, size=8 * WINDOW, digits=(1,), strokes=1)

TOWER_RATES = Rates()


@dataclass(frozen=True)
class TowerRecipe:
    """Everything that decides the tower's training besides the seed."""

    phases: tuple[Phase, ...] = (
        Phase("window", 550, 128, (16,)),
        Phase("subset", 750, 64, (28, 44, 60, 84)),
        Phase("full", 60, 24, (144,)),
    )
    rates: Rates = TOWER_RATES
    background_weight: float = 0.3  # of patches without digit in both patch losses
    cls_layers: tuple[int, ...] = (1, 3, 4)  # 0-based; 3 is the layer that LLaVA reads
    cls_weights: tuple[float, ...] = (0.3, 1.0, 0.5)
    ema: float = 0.995

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


class TowerTrainee(nn.Module):
    """The tower with the heads that training needs, run on any subset of patches."""

    def __init__(self, tower: CLIPVisionModel, cls_layers: tuple[int, ...]) -> None:
        super().__init__()
        width = tower.config.hidden_size
        self.tower, self.cls_layers = tower, cls_layers
        self.read_layer = tower.config.num_hidden_layers - 2
        self.patch_norm, self.patch_head = nn.LayerNorm(width), nn.Linear(width, DIGITS + 1 + len(COLOURS) + 1)
        outputs = SLOTS + 1 + DIGITS + len(COLOURS)
        self.cls_heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs)) for _ in cls_layers
        )
        with torch.no_grad():
            tower.embeddings.position_embedding.weight[1:] = sincos_positions(width)
            nn.init.normal_(tower.embeddings.patch_embedding.weight, std=0.07)

    def forward(self, images: Tensor, shown: Tensor, places: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``shown`` (B, K): patches of ``images`` to use; ``places`` (B, K): their cells of the 12x12 grid.

        Returns digit logits (B, K, 11), colour logits (B, K, 7) and, for each class-token layer, its logits (B, 21).
        """
        embed = self.tower.embeddings
        tokens = embed.patch_embedding(images).flatten(2).mT
        tokens = tokens.gather(1, shown[..., None].expand(-1, -1, tokens.shape[-1]))
        positions = embed.position_embedding.weight
        cls = (embed.class_embedding + positions[0]).expand(len(images), 1, -1)
        x = self.tower.pre_layrnorm(torch.cat([cls, tokens + positions[1:][places]], 1))
        cls_logits: list[Tensor] = []
        read = x
        for index, layer in enumerate(self.tower.encoder.layers):
            x = layer(x, attention_mask=None)
            if index in self.cls_layers:
                cls_logits.append(self.cls_heads[len(cls_logits)](x[:, 0]))
            if index == self.read_layer:
                read = x
        digit, colour = self.patch_head(self.patch_norm(read[:, 1:])).split([DIGITS + 1, len(COLOURS) + 1], -1)
        return digit, colour, cls_logits


def read_features(tower: CLIPVisionModel, images: Tensor) -> Tensor:
    """What LLaVA reads of ``images`` (B, 3, 96, 96) uint8: the patches after the last layer but one, (B, 144, C)."""
    x = tower.pre_layrnorm(tower.embeddings(normalize(images)))
    for layer in tower.encoder.layers[:-1]:
        x = layer(x, attention_mask=None)
    return x[:, 1:]


def patch_labels(scenes: ColourScenes) -> tuple[Tensor, Tensor]:
    """Digit class (10: none) and colour (6: none) of every patch, each (B, N)."""
    coverage = F.avg_pool2d(scenes.masks, 8).flatten(2)  # (B, 4, N)
    most, slot = coverage.max(1)
    empty = most <= DIGIT_PATCH
    digit = scenes.classes.gather(1, slot).masked_fill(empty, DIGITS)
    return digit, scenes.colours.gather(1, slot).masked_fill(empty, len(COLOURS))


def _present(indices: Tensor, count: int) -> Tensor:
    """(B, 4) indices, -1 for none -> (B, count) float 0 or 1."""
    return F.one_hot(indices + 1, count + 1).amax(1)[:, 1:].float()


def tower_loss(
    trainee: TowerTrainee, scenes: ColourScenes, phase: Phase, recipe: TowerRecipe, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Loss (scalar) of a batch, and the shares of digit patches whose digit and colour are right."""
    coverage = F.avg_pool2d(scenes.masks.amax(1, keepdim=True), 8).flatten(1)
    shown, places = choose_patches(coverage, phase, generator)
    digit_logits, colour_logits, cls_logits = trainee(normalize(scenes.images), shown, places)
    digit, colour = (labels.gather(1, shown) for labels in patch_labels(scenes))
    weight = torch.ones(DIGITS + 1).index_fill_(0, torch.tensor(DIGITS), recipe.background_weight)
    loss = 2 * F.cross_entropy(digit_logits.flatten(0, 1), digit.flatten(), weight)
    weight = torch.ones(len(COLOURS) + 1).index_fill_(0, torch.tensor(len(COLOURS)), recipe.background_weight)
    loss = loss + F.cross_entropy(colour_logits.flatten(0, 1), colour.flatten(), weight)
    count = (scenes.classes >= 0).sum(1)
    digits, colours = _present(scenes.classes, DIGITS), _present(scenes.colours, len(COLOURS))
    for logits, share in zip(cls_logits, recipe.cls_weights, strict=True):
        of_count, of_digit, of_colour = logits.split([SLOTS + 1, DIGITS, len(COLOURS)], -1)
        cls_loss = 0.5 * F.cross_entropy(of_count, count)
        cls_loss = cls_loss + 4 * F.binary_cross_entropy_with_logits(of_digit, digits)
        loss = loss + share * (cls_loss + F.binary_cross_entropy_with_logits(of_colour, colours))
    is_digit = digit < DIGITS
    right = {
        "digit": (digit_logits.argmax(-1) == digit)[is_digit].float().mean().item(),
        "colour": (colour_logits.argmax(-1) == colour)[is_digit].float().mean().item(),
    }
    return loss, right


def train_tower(
    tower: CLIPVisionModel, recipe: TowerRecipe, generator: torch.Generator, split: str = "train"
) -> list[dict[str, Any]]:
    """Train ``tower`` in place (it ends as the average of its weights); returns the log."""
    trainee = TowerTrainee(tower, recipe.cls_layers).train()
    matrices = [p for p in tower.encoder.parameters() if p.ndim == 2]
    optimiser = Optimiser(trainee, matrices, recipe.rates, recipe.steps)
    average, log = Average(tower, recipe.ema), []
    for phase in recipe.phases:
        style = WINDOW_STYLE if phase.kind == "window" else TRAIN_STYLE
        bar = tqdm(range(phase.steps), desc=f"tower, {phase.kind}", mininterval=10)
        for _ in bar:
            scenes = render_coloured(split, phase.batch, generator, style)
            loss, right = tower_loss(trainee, scenes, phase, recipe, generator)
            optimiser.step(loss)
            average.update()
            if optimiser.done % 20 == 0:
                row = {"step": optimiser.done, "phase": phase.kind, "loss": loss.item(), **right}
                log.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
                bar.set_postfix(loss=f"{loss.item():.3f}", **{k: f"{v:.3f}" for k, v in right.items()})
    average.copy_to(tower)
    return log
