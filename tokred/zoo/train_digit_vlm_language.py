"""Second stage of the digit VLM: projector and decoder learn to answer, the tower stays as it is.

Several questions are packed into one sequence: each sees ``<s>``, the visual tokens and itself (a 4-D mask), and its
positions start anew behind the visual tokens. What stands there varies, so that a shorter sequence is nothing new to
the model: subsets of the 144 patches (with their own positions or closed ranks), grids pooled before the projector, and
several pooled frames in a row of which one holds the answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tokred.data.coloured import COLOUR_NAMES, ColourStyle, render_coloured
from tokred.data.questions import Facts, ask, facts_of
from tokred.zoo.digit_vlm import BOS, EOS, GRID, PAD, WORD_IDS, question_prompt
from tokred.zoo.train_digit_vlm_tower import DIGIT_PATCH, read_features
from tokred.zoo.training import Average, Optimiser, Rates

if TYPE_CHECKING:
    from transformers import CLIPVisionModel, LlavaForConditionalGeneration

#: Plain backgrounds are frames for prompts of several frames.
POOL_STYLE = ColourStyle(digits=(0, 0, 1, 1, 2, 2, 3, 3, 4, 4), digit_rotation=0.3, aspect=0.15, shear=0.15)
QUESTION_LENGTH = 11  # longest question with its answer, in words
IMAGE_KINDS = {"digit_of_colour": 0.27, "colour_of_digit": 0.25, "exists": 0.18, "count": 0.15, "side": 0.15}
GRIDS = ((12, 12), (10, 10), (8, 8), (6, 6), (5, 5), (12, 6), (6, 12), (10, 5), (6, 8), (4, 4))
#: Frames of a prompt and the grid of each; 288 tokens at most.
FRAMES = ((2, 12), (3, 8), (4, 8), (4, 6), (6, 6), (8, 6), (8, 6), (8, 5), (10, 5), (16, 4))
LONG_FRAMES = ((8, 6), (12, 6), (16, 6), (20, 5), (24, 6), (32, 6))
MOST_FRAMES = 32  # positions of a thinned clip reach up to this many frames
LANGUAGE_RATES = Rates(muon=0.02, adam=2e-3, betas=(0.9, 0.95), warmup=30, hold=0.4)


@dataclass(frozen=True)
class LanguagePhase:
    """``steps`` batches; each is a subset of patches, a pooled grid or several frames, by these shares."""

    steps: int
    batch: int
    subset: float
    pooled: float
    frames: float
    tokens: tuple[int, ...]  #: numbers of patches in a subset
    layouts: tuple[tuple[int, int], ...] = FRAMES


@dataclass(frozen=True)
class LanguageRecipe:
    """Everything that decides this stage besides the seed and the tower."""

    phases: tuple[LanguagePhase, ...] = (
        LanguagePhase(200, 32, 0.85, 0.15, 0.0, (24, 36, 48, 64)),
        LanguagePhase(560, 32, 0.45, 0.25, 0.3, (9, 14, 20, 28, 36, 48, 64, 80, 110, 144)),
        LanguagePhase(80, 20, 0.55, 0.1, 0.35, (144,), LONG_FRAMES),
    )
    rates: Rates = LANGUAGE_RATES
    questions: int = 8
    pool: int = 640  # scenes whose features are kept
    fresh: float = 0.6  # new scenes for each sample of a batch
    ema: float = 0.99

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


class Visual(NamedTuple):
    """Visual tokens of a batch before the projector."""

    features: Tensor  #: (B, L, C)
    positions: Tensor  #: (B, L) int64, from 1 (0 is ``<s>``)
    digit: Tensor  #: (B, L) bool, whether a token shows part of a digit
    end: int  #: position of the first word of a question

    def thinned(self, count: int, prefer: Tensor, generator: torch.Generator) -> Visual:
        """``count`` random tokens; those with digits first in the rows where ``prefer`` (B,) is 1."""
        keys = torch.rand(self.digit.shape, generator=generator) + self.digit * prefer[:, None]
        kept = keys.topk(count, dim=1).indices.sort(1).values
        features = self.features.gather(1, kept[..., None].expand(-1, -1, self.features.shape[-1]))
        return Visual(features, self.positions.gather(1, kept), self.digit.gather(1, kept), self.end)

    def closed(self) -> Visual:
        """The same tokens at positions 1, 2, ..."""
        length = self.features.shape[1]
        return self._replace(positions=torch.arange(1, length + 1).expand_as(self.positions), end=length + 1)


class FeaturePool:
    """Tower outputs of the latest training scenes; each serves in several batches."""

    def __init__(self, tower: CLIPVisionModel, size: int, generator: torch.Generator, split: str) -> None:
        self.tower, self.generator, self.split = tower, generator, split
        self.features = torch.empty(size, GRID**2, tower.config.hidden_size)
        self.digit = torch.empty(size, GRID**2, dtype=torch.bool)
        self.classes, self.colours = torch.zeros(size, 10, dtype=torch.bool), torch.zeros(size, 6, dtype=torch.bool)
        self.facts = [Facts((), (), ())] * size
        self.next = 0
        for _ in range(0, size, 32):
            self.refresh(min(32, size))

    @torch.no_grad()
    def refresh(self, count: int) -> None:
        """Put ``count`` new scenes in the place of the oldest."""
        scenes = render_coloured(self.split, count, self.generator, POOL_STYLE)
        rows = (self.next + torch.arange(count)) % len(self.features)
        self.features[rows] = read_features(self.tower, scenes.images)
        self.digit[rows] = F.avg_pool2d(scenes.masks.amax(1, keepdim=True), 8).flatten(1) > DIGIT_PATCH / 2
        self.classes[rows] = F.one_hot(scenes.classes + 1, 11).amax(1)[:, 1:].bool()
        self.colours[rows] = F.one_hot(scenes.colours + 1, 7).amax(1)[:, 1:].bool()
        for i, row in enumerate(rows.tolist()):
            self.facts[row] = facts_of(scenes, i)
        self.next = (self.next + count) % len(self.features)

    def pooled(self, rows: Tensor, grid: tuple[int, int], bilinear: bool = False) -> tuple[Tensor, Tensor]:
        """Features (m, h * w, C) and digit marks (m, h * w) of scenes, resized to ``grid``."""
        if grid == (GRID, GRID):
            return self.features[rows], self.digit[rows]
        maps = self.features[rows].mT.unflatten(2, (GRID, GRID))
        if bilinear:
            maps = F.interpolate(maps, grid, mode="bilinear", align_corners=False)
        else:
            maps = F.adaptive_avg_pool2d(maps, grid)
        marks = F.adaptive_avg_pool2d(self.digit[rows].float().unflatten(1, (GRID, GRID))[:, None], grid)
        return maps.flatten(2).mT, marks.flatten(1) > 0


def image_rows(pool: FeaturePool, batch: int, rng: random.Random) -> list[int]:
    """Scenes with at least one digit; single digits, and so the answer "one", are rarer than the rest."""
    rows = [i for i, facts in enumerate(pool.facts) if len(facts.classes) > 1 or (facts.classes and rng.random() < 0.3)]
    return rng.sample(rows, batch) if len(rows) >= batch else rng.choices(rows, k=batch)


def frame_rows(pool: FeaturePool, count: int, rng: random.Random) -> list[int]:
    """Scenes of one clip: one with digits, the others plain or without the first one's first digit and colour."""
    target = rng.choice([i for i, facts in enumerate(pool.facts) if facts.classes])
    digit, colour = pool.facts[target].classes[0], pool.facts[target].colours[0]
    others = (~pool.classes[:, digit] & ~pool.colours[:, COLOUR_NAMES.index(colour)]).nonzero()[:, 0].tolist()
    plain = [i for i in others if not pool.facts[i].classes]
    drawn = plain if rng.random() < 0.2 else others
    rows = [rng.choice(plain if plain and rng.random() < 0.4 else drawn or others) for _ in range(count - 1)]
    if rows and rng.random() < 0.3:  # the answer's segment may be hit twice
        rows[0] = target
    rows.append(target)
    rng.shuffle(rows)
    return rows


def ask_frames(frames: Sequence[Facts], rng: random.Random) -> tuple[str, str]:
    """A question that the frames answer together: about a digit or colour that belongs to one pair only."""
    pairs = sorted({pair for facts in frames for pair in zip(facts.classes, facts.colours, strict=True)})
    digits, colours = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if rng.random() < 0.15:
        there = rng.random() < 0.5
        choices = digits if there else [c for c in range(10) if c not in digits]
        if choices:
            return f"is there a {rng.choice(choices)} ?", "yes" if there else "no"
    of_colour = [pair for pair in pairs if colours.count(pair[1]) == 1]
    of_digit = [pair for pair in pairs if digits.count(pair[0]) == 1]
    if of_colour and (rng.random() < 0.5 or not of_digit):
        digit, colour = rng.choice(of_colour)
        return f"which digit is {colour} ?", str(digit)
    digit, colour = rng.choice(of_digit)
    return f"what colour is the {digit} ?", colour


class Packed(NamedTuple):
    """Questions of a batch as word ids, padded on the right."""

    words: Tensor  #: (B, Q, W)
    ask_at: Tensor  #: (B, Q) place of the last word before the answer


def pack(pairs: Sequence[Sequence[tuple[str, str]]]) -> Packed:
    """Questions and answers of each sample -> ids."""
    words = torch.full((len(pairs), len(pairs[0]), QUESTION_LENGTH), PAD)
    ask_at = torch.zeros(words.shape[:2], dtype=torch.int64)
    for i, row in enumerate(pairs):
        for j, (question, answer) in enumerate(row):
            ids = [WORD_IDS[word] for word in f"{question_prompt(question, 'text')} {answer}".split()]
            words[i, j, : len(ids)] = torch.tensor(ids)
            ask_at[i, j] = len(ids) - 2
    return Packed(words, ask_at)


class Teacher:
    """Draws the batches of this stage."""

    def __init__(self, tower: CLIPVisionModel, recipe: LanguageRecipe, generator: torch.Generator, split: str) -> None:
        self.recipe, self.generator = recipe, generator
        self.rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
        self.pool = FeaturePool(tower, recipe.pool, generator, split)

    def draw(self, phase: LanguagePhase) -> tuple[str, Visual, Packed]:
        """Kind of the batch, visual tokens, questions."""
        self.pool.refresh(max(1, round(self.recipe.fresh * phase.batch)))
        draw = self.rng.random()
        if draw < phase.frames:
            return ("frames", *self._frames(phase))
        rows = image_rows(self.pool, phase.batch, self.rng)
        facts = [self.pool.facts[row] for row in rows]
        pairs = [[ask(kind, one, self.rng) for kind in self._kinds()] for one in facts]
        if draw < phase.frames + phase.pooled:
            return "pooled", self._image(rows, self.rng.choice(GRIDS)), pack(pairs)
        visual = self._image(rows, (GRID, GRID))
        count = self.rng.choice(phase.tokens)
        if count < GRID**2:
            visual = self._thin(visual, count, share=0.65)
        return "subset", visual, pack(pairs)

    def _kinds(self) -> list[str]:
        return self.rng.choices(list(IMAGE_KINDS), list(IMAGE_KINDS.values()), k=self.recipe.questions)

    def _image(self, rows: list[int], grid: tuple[int, int]) -> Visual:
        features, digit = self.pool.pooled(torch.tensor(rows), grid, bilinear=self.rng.random() < 0.5)
        length = features.shape[1]
        return Visual(features, torch.arange(1, length + 1).expand(len(rows), -1), digit, length + 1)

    def _thin(self, visual: Visual, count: int, share: float) -> Visual:
        """Fewer tokens; all with digits (in ``share`` of the samples) or any; own positions or closed ranks."""
        prefer = (torch.rand(len(visual.features), generator=self.generator) < share).float()
        visual = visual.thinned(count, prefer, self.generator)
        return visual.closed() if self.rng.random() < 0.5 else visual

    def _frames(self, phase: LanguagePhase) -> tuple[Visual, Packed]:
        count, side = self.rng.choice(phase.layouts)
        batch = max(2, round(phase.batch * min(1.0, 240 / (count * side**2 + 60))))
        rows = [frame_rows(self.pool, count, self.rng) for _ in range(batch)]
        pairs = [
            [ask_frames([self.pool.facts[i] for i in clip], self.rng) for _ in range(self.recipe.questions)]
            for clip in rows
        ]
        features, digit = self.pool.pooled(torch.tensor(rows).flatten(), (side, side))
        features, digit = (x.unflatten(0, (batch, count)).flatten(1, 2) for x in (features, digit))
        spread = self.rng.random() < 0.3  # as if the frames between had been dropped
        slots = sorted(self.rng.sample(range(MOST_FRAMES), count)) if spread else list(range(count))
        places = (torch.tensor(slots)[:, None] * side**2 + torch.arange(side**2)).flatten() + 1
        end = 1 + side**2 * (MOST_FRAMES if spread else count)
        visual = Visual(features, places.expand(batch, -1), digit, end)
        if not spread and self.rng.random() < 0.3:
            visual = self._thin(visual, round(self.rng.uniform(0.3, 0.9) * features.shape[1]), share=0.65)
        return visual, pack(pairs)


def packed_mask(prefix: int, questions: int) -> Tensor:
    """(1, 1, L, L) bool: causal, and no question sees another."""
    block = torch.arange(questions).repeat_interleave(QUESTION_LENGTH)
    block = torch.cat([torch.full((prefix,), -1), block])
    same = (block[:, None] == block) | (block == -1)
    return (same & torch.ones(len(block), len(block)).tril().bool())[None, None]


def answer_logits(model: LlavaForConditionalGeneration, visual: Visual, packed: Packed) -> tuple[Tensor, Tensor]:
    """Logits (B, Q, 2, V) of each answer and the ``</s>`` after it, and the ids (B, Q, 2) that are right."""
    batch, questions, width = packed.words.shape
    embed = model.model.language_model.embed_tokens
    words = embed(packed.words).flatten(1, 2)
    start = embed(torch.full((batch, 1), BOS))
    inputs = torch.cat([start, model.model.multi_modal_projector(visual.features), words], 1)
    places = (visual.end + torch.arange(width)).repeat(questions).expand(batch, -1)
    prefix = 1 + visual.features.shape[1]
    hidden = model.model.language_model(
        inputs_embeds=inputs,
        position_ids=torch.cat([torch.zeros(batch, 1, dtype=torch.int64), visual.positions, places], 1),
        attention_mask=packed_mask(prefix, questions),
        use_cache=False,
    ).last_hidden_state[:, prefix:]
    at = torch.stack([packed.ask_at, packed.ask_at + 1], -1)  # (B, Q, 2)
    answers = torch.stack([packed.words.gather(2, at[..., 1:])[..., 0], torch.full_like(packed.ask_at, EOS)], -1)
    cells = (at + width * torch.arange(questions)[:, None]).flatten(1)
    read = hidden.gather(1, cells[..., None].expand(-1, -1, hidden.shape[-1]))
    return model.lm_head(read).unflatten(1, (questions, 2)), answers


@torch.no_grad()
def start_values(model: LlavaForConditionalGeneration, features: Tensor) -> None:
    """Words and visual tokens start at a like scale; the projector first whitens ``features`` (..., C), a sample."""
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.5)
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    nn.init.orthogonal_(first.weight)
    nn.init.orthogonal_(second.weight)
    sample = features.flatten(0, -2)
    first.weight.div_(sample.std(0) + 1e-3)
    first.bias.copy_(-first.weight @ sample.mean(0))


def train_language(
    model: LlavaForConditionalGeneration, recipe: LanguageRecipe, generator: torch.Generator, split: str = "train"
) -> list[dict[str, Any]]:
    """Train projector and decoder in place (they end as the average of their weights); returns the log."""
    model.train()
    tower = model.model.vision_tower.eval().requires_grad_(False)
    teacher = Teacher(tower, recipe, generator, split)
    start_values(model, teacher.pool.features)
    parts = (model.model.multi_modal_projector, model.model.language_model.layers)
    matrices = [p for part in parts for p in part.parameters() if p.ndim == 2]
    optimiser = Optimiser(model, matrices, recipe.rates, recipe.steps)
    average, log = Average(model, recipe.ema), []
    recent: dict[str, float] = {}
    for number, phase in enumerate(recipe.phases):
        bar = tqdm(range(phase.steps), desc=f"language, phase {number + 1}", mininterval=10)
        for _ in bar:
            kind, visual, packed = teacher.draw(phase)
            logits, answers = answer_logits(model, visual, packed)
            loss = F.cross_entropy(logits.flatten(0, 2), answers.flatten())
            optimiser.step(loss)
            average.update()
            right = (logits[:, :, 0].argmax(-1) == answers[..., 0]).float().mean().item()
            recent[kind] = recent.get(kind, right) * 0.9 + right * 0.1
            if optimiser.done % 20 == 0:
                scores = {k: round(v, 3) for k, v in recent.items()}
                log.append({"step": optimiser.done, "phase": number, "loss": round(loss.item(), 4), **scores})
                bar.set_postfix(loss=f"{loss.item():.3f}", **scores)
    average.copy_to(model)
    model.requires_grad_(True).eval()
    return log
