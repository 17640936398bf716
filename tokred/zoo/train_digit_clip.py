"""Train the bundled digit CLIP, or measure a trained one and write its card.

    python -m tokred.zoo.train_digit_clip --seed 0 --out runs/digit_clip
    python -m tokred.zoo.train_digit_clip --evaluate --bundle --out runs/digit_clip   # card; copies into the package

The image tower starts from the first four layers of the digit VLM's tower. Each step asks of each frame, for every
colour, digit and coloured digit, whether it is there; each is put in one of several wordings (a sigmoid loss).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tokred.data.coloured import COLOUR_NAMES, ColourScenes, ColourStyle, render_coloured
from tokred.data.scenes import normalize
from tokred.zoo.digit_clip import WordTokenizer, build_digit_clip
from tokred.zoo.digit_vlm import FOLDER as VLM_FOLDER
from tokred.zoo.digit_vlm import digit_vlm
from tokred.zoo.training import Average, Optimiser, Rates, trainer_arguments

if TYPE_CHECKING:
    from open_clip.model import CLIP
    from transformers import CLIPVisionModel

COLOUR_TEXTS = ("which digit is {0} ?", "{0} digit", "a {0} digit", "something {0}")
DIGIT_TEXTS = ("what colour is the {1} ?", "a {1}", "the digit {1}", "is there a {1} ?")
PAIR_TEXTS = ("a {0} {1}", "{0} {1}", "the {0} {1}", "the {1} is {0}")
FRAME_STYLE = ColourStyle(digits=(0, 1, 2, 3, 4), digit_rotation=0.3, aspect=0.15, shear=0.15)
RATES = Rates(muon=0.008, adam=1e-3, warmup=20)


@dataclass(frozen=True)
class ClipRecipe:
    """Everything that decides a training run besides the seed and the digit VLM."""

    steps: int = 420
    batch: int = 32
    rates: Rates = RATES
    style: ColourStyle = FRAME_STYLE
    ema: float = 0.99


def copy_tower(clip: CLIP, tower: CLIPVisionModel) -> None:
    """Start ``clip``'s image tower from the first layers of a transformers CLIP tower of the same width."""
    source, state = tower.state_dict(), clip.state_dict()
    names = {
        "visual.class_embedding": "embeddings.class_embedding",
        "visual.positional_embedding": "embeddings.position_embedding.weight",
        "visual.conv1.weight": "embeddings.patch_embedding.weight",
        "visual.ln_pre.weight": "pre_layrnorm.weight",
        "visual.ln_pre.bias": "pre_layrnorm.bias",
    }
    new = {name: source[old] for name, old in names.items()}
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    parts["attn.out_proj"] = "self_attn.out_proj"
    for i in range(len(clip.visual.transformer.resblocks)):
        to, old = f"visual.transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            new |= {f"{to}.{part}.{kind}": source[f"{old}.{name}.{kind}"] for part, name in parts.items()}
            qkv = [source[f"{old}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            new[f"{to}.attn.in_proj_{kind}"] = torch.cat(qkv)
    clip.load_state_dict(state | new)


def concept_texts(generator: torch.Generator) -> list[str]:
    """One wording of each of the 6 colours, 10 digits and 60 coloured digits, in this order."""

    def wording(texts: tuple[str, ...], colour: str, digit: int) -> str:
        return texts[int(torch.randint(len(texts), (), generator=generator))].format(colour, digit)

    colours = [wording(COLOUR_TEXTS, colour, 0) for colour in COLOUR_NAMES]
    digits = [wording(DIGIT_TEXTS, "", digit) for digit in range(10)]
    return colours + digits + [wording(PAIR_TEXTS, colour, digit) for colour in COLOUR_NAMES for digit in range(10)]


def concept_labels(scenes: ColourScenes) -> Tensor:
    """Which of the 76 concepts of ``concept_texts`` each scene shows: (B, 76) float 0 or 1."""
    colours = F.one_hot(scenes.colours + 1, len(COLOUR_NAMES) + 1)[..., 1:]  # (B, 4, 6), zero rows for empty slots
    digits = F.one_hot(scenes.classes + 1, 11)[..., 1:]
    pairs = (colours[..., None] * digits[..., None, :]).amax(1).flatten(1)
    return torch.cat([colours.amax(1), digits.amax(1), pairs], 1).float()


def clip_loss(clip: CLIP, scenes: ColourScenes, texts: Tensor) -> Tensor:
    """Sigmoid loss of every frame and text; colours, digits and coloured digits count alike."""
    logits, _ = clip.get_logits(normalize(scenes.images), texts)
    losses = F.binary_cross_entropy_with_logits(logits, concept_labels(scenes), reduction="none").mean(0)
    sizes = [len(COLOUR_NAMES), 10, 10 * len(COLOUR_NAMES)]
    colour, digit, pair = losses.split(sizes)
    return colour.mean() + 2 * digit.mean() + 4 * pair.mean()  # pairs are rare, their mean is small


def train(recipe: ClipRecipe, seed: int, vlm: Path = VLM_FOLDER) -> tuple[CLIP, dict[str, Any]]:
    """Train from the tower of the digit VLM in ``vlm``; returns the averaged model (eval, float32) and the record."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    clip, tokenizer = build_digit_clip().train(), WordTokenizer()
    copy_tower(clip, digit_vlm(vlm)[0].model.vision_tower)
    blocks = (clip.visual.transformer, clip.transformer)
    matrices = [p for part in blocks for p in part.parameters() if p.ndim == 2]
    optimiser = Optimiser(clip, matrices, recipe.rates, recipe.steps)
    average, log = Average(clip, recipe.ema), []
    wall, cpu = time.time(), time.process_time()
    bar = tqdm(range(recipe.steps), desc=f"digit CLIP, seed {seed}", mininterval=10)
    for _ in bar:
        scenes = render_coloured("train", recipe.batch, generator, recipe.style)
        loss = clip_loss(clip, scenes, tokenizer(concept_texts(generator)))
        optimiser.step(loss)
        average.update()
        if optimiser.done % 20 == 0:
            log.append({"step": optimiser.done, "loss": round(loss.item(), 4)})
            bar.set_postfix(loss=f"{loss.item():.3f}")
    average.copy_to(clip)
    seconds = {"wall_seconds": round(time.time() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    return clip.eval(), {"seed": seed, "recipe": asdict(recipe), **seconds, "log": log}


def save(clip: CLIP, record: dict[str, Any], out: Path) -> Path:
    """The folder ``seed<n>`` in ``out``: ``model.safetensors`` (float16) and ``log.json``."""
    from safetensors.torch import save_file

    folder = out / f"seed{record['seed']}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in clip.state_dict().items()}, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)
    (folder / "log.json").write_text(json.dumps(record, indent=1))
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    parser = trainer_arguments(__doc__, "three steps on tiny batches", scaled=False)
    parser.add_argument(
        "--vlm", type=Path, default=VLM_FOLDER, help="folder of the digit VLM; the bundled one by default"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.evaluate:
        from tokred.zoo.evaluate_digit_clip import evaluate

        evaluate(args.out / f"seed{args.seed}", bundle=args.bundle, smoke=args.smoke)
        return
    recipe = ClipRecipe(steps=3, batch=4) if args.smoke else ClipRecipe()
    save(*train(recipe, args.seed, args.vlm), args.out)


if __name__ == "__main__":
    main()
