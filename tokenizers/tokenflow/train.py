"""Train a TokenFlow: codes that give back a picture, and what a frozen teacher sees in it; then what reads them.

    python tokenizers/tokenflow/train.py --config tokenizers/tokenflow/tiny.yaml --stage tokenizer --out runs/tokenflow
    python tokenizers/tokenflow/train.py --config ... --stage generator --tokenizer runs/tokenflow/model --out runs/ar
    python tokenizers/tokenflow/train.py --config ... --stage projector --tokenizer runs/tokenflow/model \\
        --features last_semantic --out runs/questions_semantic
    accelerate launch --num_processes 8 --mixed_precision bf16 tokenizers/tokenflow/train.py ...   # the same, on 8 GPUs

The stage generator makes a model that draws codes of a class or caption, projector one that answers questions about
cards from codes. A killed run goes on with `--resume`. `--data` takes a folder of pictures instead of the recipe's.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from tokred.core.errors import InvalidParameterError, TokredError
from tokred.data.cards import CAPTION_WORDS
from tokred.data.pictures import PictureBatch, Pictures
from tokred.eval.tokenflow_questions import BOS, EOS, IMAGE, PAD, WORDS, conversations, question_tokenizer
from tokred.generation.textok_losses import PatchDiscriminator, TexTokLoss, TexTokLossWeights, perceptual_loss
from tokred.generation.tokenflow import FEATURE_MODES, TokenFlow
from tokred.generation.tokenflow_ar import TokenFlowARConfig, TokenFlowARModel, next_scale_features
from tokred.generation.tokenflow_generate import TokenFlowPipeline
from tokred.generation.tokenflow_llava import build_llava, build_processor
from tokred.generation.tokenflow_parts import CLIP_MEAN, CLIP_STD, semantic_loss
from tokred.generation.training import Objective, checked_fields, read_config, recipe_arguments, run_recipe
from tokred.zoo.words import word_tokenizer

STAGES = ("tokenizer", "generator", "projector")
SECTIONS = ("data", "model", "teacher", "loss", "generator", "prompts", "projector")
SECTIONS += tuple(f"train_{stage}" for stage in STAGES)
SHOWN = 8  # pictures of a sample sheet
CENTRE = 256  # cards that a teacher's mean features are taken over


@dataclass(frozen=True)
class Loss:
    """The section ``loss:``: weights beside the l2 loss of pixels, and how unused codes come back.

    Attributes:
        semantic, vq: of the teacher's features and of the codebooks (paper: 1). commitment: beta, 0.25 in the paper.
        perceptual, adversarial, start: LPIPS, and a patch discriminator from the step `start` on (paper: 1, 0.5,
            20000). Its loss is that of `tokred.generation.textok_losses`, softplus in place of the paper's hinge.
        renew_every, renew_until: each so many steps, up to this share of the run, rows of the codebooks that the batch
            does not use are replaced by vectors of it; at step 0 all are. 0 never does. Ours, not the paper's: a small
            codebook otherwise keeps rows that nothing is near to.
    """

    semantic: float = 1.0
    vq: float = 1.0
    commitment: float = 0.25
    perceptual: float = 1.0
    adversarial: float = 0.5
    start: int = 20_000
    renew_every: int = 0
    renew_until: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise InvalidParameterError(f"loss: {name}={value!r}: expected a number >= 0")

    def of_pixels(self) -> TexTokLoss:
        """Reconstruction, perceptual and adversarial loss."""
        weights = TexTokLossWeights(self.perceptual, self.adversarial, lecam=0.0, r1=0.0, kl=0.0, start=self.start)
        return TexTokLoss(
            weights,
            perceptual_loss() if self.perceptual else None,
            PatchDiscriminator() if self.adversarial else None,
        )


# -- teachers ----------------------------------------------------------------------------------------------------------


class ClipTeacher:
    """Patch tokens of a CLIP after its last norm and its projection: (B, 3, S, S) in [-1, 1] to (B, g * g, d)."""

    def __init__(self, model: str) -> None:
        from transformers import CLIPVisionModelWithProjection

        self.clip = CLIPVisionModelWithProjection.from_pretrained(model).requires_grad_(False).eval()
        self.width = self.clip.config.projection_dim

    def init(self, net: TokenFlow) -> None:
        """The semantic encoder starts as the teacher."""
        if net.config.semantic_encoder_config["type"] != "clip":
            raise InvalidParameterError("teacher: a CLIP teaches a semantic encoder of the type clip")
        vision = self.clip.vision_model
        net.semantic_encoder.load_state_dict(getattr(vision, "vision_model", vision).state_dict())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        clip = self.clip.to(images.device)
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        hidden = clip.vision_model(((images + 1) / 2 - mean) / std).last_hidden_state[:, 1:]
        return clip.visual_projection(clip.vision_model.post_layernorm(hidden))


class DigitTeacher:
    """The bundled digit ViT on cards: what leaves its first block, which still knows colours, beside what leaves its
    last norm, which knows the digit; each divided by its norm. (B, 3, 32, 32) in [-1, 1] to (B, g * g, 192).

    It was made for scenes of 96 pixels. Here it is given only the patches in the middle, where a card would lie, with
    their own positions: it names as many digits right as on whole scenes, in a ninth of the time.

    Args:
        grid: g. centre_on: pictures whose mean features are taken off first. Four fifths of the first block's features
            are the same for every patch of every card, and their cosine hardly asks for the rest.
    """

    def __init__(self, grid: int, centre_on: Tensor | None = None) -> None:
        from tokred import zoo

        vit: Any = zoo.load("digit-vit").requires_grad_(False).eval()
        self.vit, self.grid = vit, grid
        self.width = 2 * vit.embed_dim
        self.mean = torch.zeros(self.width)
        if centre_on is not None:
            self.mean = self.features(centre_on).flatten(0, 1).mean(0)

    def init(self, net: TokenFlow) -> None:
        """The semantic encoder starts from random weights: it is another one."""

    def __call__(self, images: Tensor) -> Tensor:
        parts = (self.features(images) - self.mean.to(images.device)).chunk(2, dim=-1)
        maps = torch.cat([F.normalize(part, dim=-1) for part in parts], dim=-1).mT
        side = round(maps.shape[2] ** 0.5)
        maps = F.interpolate(maps.unflatten(2, (side, side)), (self.grid, self.grid), mode="bilinear")
        return maps.flatten(2).mT

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Both halves, each divided by its norm, of the patches of a card: (B, 16, 192)."""
        vit = self.vit.to(images.device)
        x = vit.patch_embed.proj(2 * images).flatten(2).mT  # (x - 0.5) / 0.25 of x in [0, 1]
        side, whole = round(x.shape[1] ** 0.5), vit.patch_embed.grid_size[0]
        rows = torch.arange(side, device=x.device) + (whole - side) // 2
        places = (rows[:, None] * whole + rows).flatten() + 1
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, x + vit.pos_embed[:, places]], dim=1)
        found = []
        for block in vit.blocks:
            x = block(x)
            found.append(x)
        return torch.cat([F.normalize(part[:, 1:], dim=-1) for part in (found[0], vit.norm(x))], dim=-1)


def teacher_of(section: Mapping[str, Any], net: TokenFlow, pictures: Pictures) -> ClipTeacher | DigitTeacher:
    """The section ``teacher:``: "model", "digit-vit" or a folder or hub id of a CLIP; for the former also "centre"."""
    digits = section.get("model") == "digit-vit"
    known = {"model", "centre"} if digits else {"model"}
    if "model" not in section or not set(section) <= known:
        raise InvalidParameterError(f"teacher: expected {' and '.join(sorted(known))}, got {sorted(section)}")
    grid = net.quantizer.grid
    if digits:
        centre_on = next(pictures.train(CENTRE)).images if section.get("centre") else None
        teacher: ClipTeacher | DigitTeacher = DigitTeacher(grid, centre_on)
    else:
        teacher = ClipTeacher(section["model"])
    out = net.config.semantic_decoder_config["out_dim"]
    if out != teacher.width:
        raise InvalidParameterError(f"model: out_dim={out}, but the teacher's features have {teacher.width} numbers")
    return teacher


# -- stages ------------------------------------------------------------------------------------------------------------


class TokenizerObjective(Objective):
    """Pictures and the teacher's features back from codes."""

    def __init__(self, net: TokenFlow, teacher: Any, pictures: Pictures, how: Loss, steps: int) -> None:
        if pictures.size != net.image_size:
            raise InvalidParameterError(f"pictures of {pictures.size} pixels, the model takes {net.image_size}")
        self.model = self.net = net
        self.teacher, self.pictures, self.how = teacher, pictures, how
        self.pixels = how.of_pixels()
        self.adversary = self.pixels.discriminator
        self.renew_until = how.renew_until * steps
        self.shown = next(pictures.held_out(SHOWN)).images
        self.made: tuple[Tensor, Tensor] | None = None

    def batches(self, size: int, start: int, rank: int, world: int) -> Iterator[PictureBatch]:
        return self.pictures.train(size, start, rank, world)

    def renew(self, images: Tensor, step: int) -> None:
        """Bring unused codes back where it is their time; all of them at the start."""
        if not self.how.renew_every or step % self.how.renew_every or step > self.renew_until:
            return
        with torch.no_grad():
            z = torch.cat([self.net.semantic_map(images).float(), self.net.pixel_map(images).float()], dim=1)
        self.net.quantizer.renew(z, unused_only=step > 0)

    def loss(
        self, model: nn.Module, batch: PictureBatch, step: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, how = batch.images.to(device), self.how
        self.pixels.to(device)
        self.renew(images, step)
        found = model(images)
        self.made = images, found.sample.detach()
        terms = self.pixels(images, found.sample, step=step)
        semantic = semantic_loss(found.features, self.teacher(images))
        encoder = found.encoder
        total = terms.pop("loss") + how.semantic * semantic
        total = total + how.vq * encoder.vq_loss + how.commitment * encoder.commitment_loss
        numbers = {
            **terms,
            "semantic": semantic,
            "vq": encoder.vq_loss,
            "codes": torch.tensor(encoder.codes.unique().numel() / self.net.codebook_size),  # share that is in use
        }
        return total, {name: value.detach() for name, value in numbers.items()}

    def adversary_loss(self, step: int) -> Tensor | None:
        if self.made is None or not self.pixels.adversarial_at(step):
            return None
        return self.pixels.discriminator_terms(*self.made, step, r1=False)["loss"]

    def save(self, folder: Path) -> None:
        self.net.save_pretrained(folder)

    def sheet(self) -> Sequence[Tensor]:
        """Held-out pictures, then what their first 1, 2, ... scales give back."""
        return [self.shown, *self.net.progressive(self.net.encode(self.shown)).cpu()]


@dataclass(frozen=True)
class Prompts:
    """The section ``prompts:`` of the stage generator.

    Attributes:
        text_tokenizer: "words", one id for each word of the cards' captions, or a folder or hub id.
        captions: whether prompts are captions, or else names of classes.
        dropout: share of pictures without a prompt, for guidance (paper: 0.1).
        text_length, guidance_scale: of the pipeline that is saved.
    """

    text_tokenizer: str = "words"
    captions: bool = False
    dropout: float = 0.1
    text_length: int = 128
    guidance_scale: float = 7.5


BEGIN, END = "<img>", "</img>"


def text_tokenizer_of(name: str) -> Any:
    if name == "words":
        words = ("<pad>", "<s>", "</s>", "<unk>", BEGIN, END, *CAPTION_WORDS)
        return word_tokenizer({word: i for i, word in enumerate(words)}, 64)
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(name)
    if found.pad_token is None:
        found.add_special_tokens({"pad_token": "[PAD]"})
    return found


class GeneratorObjective(Objective):
    """Cross-entropy of all codes of the next scale, and of the words that close a picture."""

    def __init__(self, net: TokenFlow, fields: Mapping[str, Any], prompts: Prompts, pictures: Pictures) -> None:
        if not prompts.captions and not pictures.classes:
            raise InvalidParameterError(
                "prompts: the pictures have no classes; give captions: true, or a folder a class"
            )
        text = text_tokenizer_of(prompts.text_tokenizer)
        config = TokenFlowARConfig(
            vocab_size=len(text) + net.codebook_size,
            image_token_start=len(text),
            codebook_size=net.codebook_size,
            code_dim=net.quantizer.dim,
            scales=list(net.scales),
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            pad_token_id=text.pad_token_id,
            **fields,
        )
        self.model = TokenFlowARModel(config)
        self.net, self.pictures, self.prompts = net, pictures, prompts
        self.pipeline = TokenFlowPipeline(
            self.model,
            net,
            text,
            begin=BEGIN,
            text_length=prompts.text_length,
            class_names=pictures.classes or None,
            guidance_scale=prompts.guidance_scale,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.tail = torch.tensor([[*text(END, add_special_tokens=False).input_ids, text.eos_token_id]])

    def batches(self, size: int, start: int, rank: int, world: int) -> Iterator[PictureBatch]:
        return self.pictures.train(size, start, rank, world)

    def texts(self, batch: PictureBatch) -> list[str]:
        """A prompt for each picture, some of them empty."""
        if self.prompts.captions:
            if batch.captions is None:
                raise InvalidParameterError("prompts: captions are asked for, and the pictures have none")
            found = batch.captions
        else:
            assert batch.labels is not None
            found = [self.pictures.classes[label] for label in batch.labels.tolist()]
        dropped = (torch.rand(len(found)) < self.prompts.dropout).tolist()
        return ["" if drop else text for text, drop in zip(found, dropped, strict=True)]

    def loss(
        self, model: nn.Module, batch: PictureBatch, step: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        net = self.net.to(device)
        codes = net.encode(batch.images.to(device))
        with torch.no_grad():
            features = next_scale_features(codes, net.scales, net.lookup)
        ids, mask = self.pipeline.encode_prompt(self.texts(batch))
        tail = self.tail.to(device).expand(len(codes), -1)
        found = model(ids, mask, image_features=features, labels=codes, tail_ids=tail)
        own = found.logits[:, : codes.shape[1]].detach().float().flatten(0, 1)
        wanted = codes.flatten() + self.model.config.image_token_start
        return found.loss, {"code": F.cross_entropy(own, wanted)}

    def save(self, folder: Path) -> None:
        self.pipeline.save_pretrained(folder)

    @torch.no_grad()
    def sheet(self) -> Sequence[Tensor]:
        """Four pictures of each of the first classes, or of captions of held-out pictures."""
        if self.prompts.captions:
            texts = next(self.pictures.held_out(SHOWN)).captions or []
        else:
            texts = list(self.pictures.classes[:SHOWN])
        rows = []
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            rows.append(self.pipeline(texts, generator=generator, output_type="pt").images.cpu())
        return rows


class ProjectorObjective(Objective):
    """Questions about cards from their codes: a projector and a small language model learn, the tokenizer does not."""

    def __init__(self, net: TokenFlow, fields: Mapping[str, Any], features: str, pictures: Pictures) -> None:
        config = LlamaConfig(
            vocab_size=len(WORDS), pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, **dict(fields)
        )
        self.model = build_llava(net, config, IMAGE, features)
        self.net, self.pictures = net, pictures
        self.image_tokens = self.model.config.vision_config.num_image_tokens

    def batches(self, size: int, start: int, rank: int, world: int) -> Iterator[PictureBatch]:
        return self.pictures.train(size, start, rank, world)

    def loss(
        self, model: nn.Module, batch: PictureBatch, step: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if batch.captions is None:
            raise InvalidParameterError("--stage projector asks about cards: give --data cards")
        codes = self.net.to(device).encode(batch.images.to(device))
        rng = random.Random(int(torch.randint(2**31, ())))
        inputs = conversations(batch.captions, self.image_tokens, rng)
        found = model(**{name: value.to(device) for name, value in inputs.items()}, pixel_values=codes)
        return found.loss, {}

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        build_processor(self.model.config, question_tokenizer()).save_pretrained(folder)


def objective_of(args: argparse.Namespace, config: dict[str, dict[str, Any]], pictures: Pictures) -> Objective:
    """What a stage trains, from its command line and recipe."""
    if args.stage == "tokenizer":
        net = TokenFlow(**config["model"])
        teacher = teacher_of(config["teacher"], net, pictures)
        teacher.init(net)
        steps = args.steps or config["train_tokenizer"]["steps"]
        how = Loss(**checked_fields(Loss, config["loss"], "loss"))
        return TokenizerObjective(net, teacher, pictures, how, steps)
    if args.tokenizer is None:
        raise InvalidParameterError(f"--stage {args.stage} needs --tokenizer, the folder of a trained TokenFlow")
    net = TokenFlow.from_pretrained(args.tokenizer).requires_grad_(False).eval()
    if args.stage == "projector":
        return ProjectorObjective(net, config["projector"], args.features, pictures)
    prompts = Prompts(**checked_fields(Prompts, config["prompts"], "prompts"))
    return GeneratorObjective(net, config["generator"], prompts, pictures)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; the result is that of `tokred.generation.training.fit`."""
    parser = recipe_arguments(__doc__, STAGES)
    parser.add_argument("--tokenizer", type=Path, help="stages generator and projector: folder of a trained TokenFlow")
    parser.add_argument("--features", choices=FEATURE_MODES, default="last", help="stage projector: what it reads")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        config = read_config(args.config, SECTIONS)
        further = {"features": args.features} if args.stage == "projector" else {}
        return run_recipe(args, config, lambda pictures: objective_of(args, config, pictures), **further)
    except TokredError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
