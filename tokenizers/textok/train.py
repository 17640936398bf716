"""Train a TexTok, then a diffusion transformer of its tokens.

    python tokenizers/textok/train.py --config tokenizers/textok/tiny.yaml --stage tokenizer --out runs/textok
    python tokenizers/textok/train.py --config ... --stage tokenizer --no-text --out runs/textok_no_text    # the twin
    python tokenizers/textok/train.py --config ... --stage generator --tokenizer runs/textok/model --out runs/textok_dit
    python tokenizers/textok/train.py --config ... --stage generator --grid --out runs/textok_grid
    accelerate launch --num_processes 8 --mixed_precision bf16 tokenizers/textok/train.py ...     # the same, on 8 GPUs

A killed run goes on with `--resume`. Pictures of a folder need their `captions.jsonl`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError, TokredError
from tokred.data.cards import CAPTION_WORDS
from tokred.data.pictures import PictureBatch, Pictures
from tokred.generation.patches import patchify
from tokred.generation.textok import TexTok
from tokred.generation.textok_dit import TexTokDiT1D, make_scheduler
from tokred.generation.textok_losses import PatchDiscriminator, TexTokLoss, TexTokLossWeights, dit_loss, perceptual_loss
from tokred.generation.textok_model import TexTokModel, latent_statistics
from tokred.generation.training import Objective, checked_fields, read_config, recipe_arguments, run_recipe, trained

STAGES = ("tokenizer", "generator")
SECTIONS = ("data", "text", "model", "generator", "loss", *(f"train_{stage}" for stage in STAGES))
SHOWN = 8  # pictures of a sample sheet
R1_EVERY = 16  # updates between two that pay for R1


def text_parts(encoder: str, width: int) -> tuple[Any, Any]:
    """A frozen text encoder and its tokenizer.

    Args:
        encoder: folder or hub id of a T5, or "random": two layers of fixed random weights that know the cards' words.
    """
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    if encoder != "random":
        return T5EncoderModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
    from tokred.zoo.words import word_tokenizer

    words = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", "<s>", *CAPTION_WORDS))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=len(words), d_model=width, d_kv=16, d_ff=2 * width, num_layers=2, num_heads=4, dropout_rate=0.0
        )
        return T5EncoderModel(config), word_tokenizer(words, 16)


class TokenizerObjective(Objective):
    """Pictures back from few tokens and their caption; some pictures are shown without caption."""

    def __init__(
        self, textok: TexTok, pictures: Pictures, loss: TexTokLoss, text_dropout: float, with_text: bool
    ) -> None:
        self.textok, self.pictures, self.terms, self.text_dropout = textok, pictures, loss, text_dropout
        self.model, self.adversary, self.with_text = textok.model, loss.discriminator, with_text
        if textok.text_encoder is not None:
            textok.text_encoder.requires_grad_(False).eval()
        textok.set_progress_bar_config(disable=True)
        self.shown = next(pictures.held_out(SHOWN))
        if with_text and self.shown.captions is None:
            raise InvalidParameterError("these pictures have no captions: give a captions.jsonl, or --no-text")
        self.made: tuple[Tensor, Tensor] | None = None

    def batches(self, size: int, start: int, rank: int, world: int) -> Iterator[PictureBatch]:
        return self.pictures.train(size, start, rank, world)

    def text(self, captions: Sequence[str | None] | None, device: torch.device) -> dict[str, Tensor]:
        """Features of captions; none for the twin without text."""
        if not self.with_text or captions is None:
            return {}
        self.textok.text_encoder.to(device)
        embeds, mask = self.textok.encode_text(captions)
        return {"text_embeds": embeds.to(device), "text_mask": mask.to(device)}

    def loss(
        self, model: nn.Module, batch: PictureBatch, step: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch.images.to(device)
        shown = torch.rand(len(images)) >= self.text_dropout
        captions = [c if seen else None for c, seen in zip(batch.captions or [], shown.tolist(), strict=False)]
        text = self.text(captions or None, device)
        latent = self.textok.model.encode(images, **text)
        latents = latent.latents if latent.latent_dist is None else latent.latent_dist.sample()
        found = self.textok.model.decode(latents, **text).sample
        self.made = images, found.detach()
        terms = self.terms(images, found, latent.latent_dist, step)
        return terms.pop("loss"), {name: value.detach() for name, value in terms.items()}

    def adversary_loss(self, step: int) -> Tensor | None:
        if self.made is None or not self.terms.adversarial_at(step):
            return None
        return self.terms.discriminator_terms(*self.made, step, r1=step % R1_EVERY == 0)["loss"]

    def save(self, folder: Path) -> None:
        """With the statistics of its latents, which a generator needs."""
        device = self.model.device
        found = []
        for batch in self.pictures.held_out(512):
            output = self.model.encode(batch.images.to(device), **self.text(batch.captions, device))
            found.append(output.latents if output.latent_dist is None else output.latent_dist.mode())
        self.model.set_latent_statistics(*latent_statistics(found))
        self.textok.save_pretrained(folder)

    def sheet(self) -> Sequence[Tensor]:
        device = self.model.device
        text = self.text(self.shown.captions, device)
        images = self.shown.images.to(device)
        return [self.shown.images, self.model(images, **text).sample.clamp(-1, 1).cpu()]


class GeneratorObjective(Objective):
    """Noise to the tokens of a class; the caption is left to the decoder."""

    def __init__(self, dit: TexTokDiT1D, textok: TexTok, pictures: Pictures) -> None:
        if len(pictures.classes) != dit.config.num_classes:
            raise InvalidParameterError(
                f"generator.num_classes={dit.config.num_classes}: the pictures have {len(pictures.classes)} classes"
            )
        self.scheduler = make_scheduler(dit.config.objective, dit.config.learn_sigma)
        self.model, self.pictures = dit, pictures
        parts = {name: textok.components[name] for name in ("model", "text_encoder", "text_tokenizer")}
        bank: dict[int, list[str]] = {i: [] for i in range(len(pictures.classes))}
        for batch in pictures.held_out(512):
            if batch.captions and batch.labels is not None:
                for label, caption in zip(batch.labels.tolist(), batch.captions, strict=True):
                    bank[label].append(caption)
        known = bank if all(bank.values()) else None
        self.textok = TexTok(
            **parts, generator=dit, scheduler=self.scheduler, class_names=list(pictures.classes), caption_bank=known
        )
        self.textok.set_progress_bar_config(disable=True)
        self.tokenizer = textok.model.requires_grad_(False).eval()

    def batches(self, size: int, start: int, rank: int, world: int) -> Iterator[PictureBatch]:
        return self.pictures.train(size, start, rank, world)

    def loss(
        self, model: nn.Module, batch: PictureBatch, step: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.textok.to(device)
        with torch.no_grad():
            captions = batch.captions if self.textok.text_encoder is not None else None
            latents = self.tokenizer.normalize(self.textok.encode(batch.images, captions))
        labels = batch.labels.to(device)
        return dit_loss(model, latents, self.scheduler, class_labels=labels)["loss"], {}

    def save(self, folder: Path) -> None:
        self.textok.save_pretrained(folder)

    def sheet(self) -> Sequence[Tensor]:
        """Four pictures of each of the first classes, each with a caption of its class."""
        classes = list(range(min(SHOWN, len(self.pictures.classes))))
        return [
            self.textok(
                class_labels=classes,
                num_inference_steps=20,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
            ).images.cpu()
            for seed in range(4)
        ]


class GridObjective(Objective):
    """The same transformer on the picture's own patches: what a generator costs and gives without a tokenizer."""

    def __init__(self, dit: TexTokDiT1D, pictures: Pictures, patch: int) -> None:
        self.model, self.pictures, self.patch = dit, pictures, patch
        self.scheduler = make_scheduler(dit.config.objective, dit.config.learn_sigma)

    def batches(self, size: int, start: int, rank: int, world: int) -> Iterator[PictureBatch]:
        return self.pictures.train(size, start, rank, world)

    def loss(
        self, model: nn.Module, batch: PictureBatch, step: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        patches = patchify(batch.images.to(device), self.patch)
        return dit_loss(model, patches, self.scheduler, class_labels=batch.labels.to(device))["loss"], {}

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)


def objective_of(args: argparse.Namespace, config: dict[str, dict[str, Any]], pictures: Pictures) -> Objective:
    """What a stage trains, from its command line and recipe."""
    if args.stage == "generator" and args.grid:
        patch, side = config["model"]["patch_size"], config["model"]["image_size"]
        sizes = {"num_tokens": (side // patch) ** 2, "latent_dim": 3 * patch**2}
        return GridObjective(TexTokDiT1D(**sizes, **config["generator"]), pictures, patch)
    if args.stage == "generator":
        if args.tokenizer is None:
            raise InvalidParameterError(
                "--stage generator needs --tokenizer, the folder of a trained TexTok, or --grid"
            )
        textok = TexTok.from_pretrained(trained(args.tokenizer, "--tokenizer"))
        sizes = {"num_tokens": textok.num_tokens, "latent_dim": textok.model.config.latent_dim}
        return GeneratorObjective(TexTokDiT1D(**sizes, **config["generator"]), textok, pictures)
    with_text = config["text"]["use"]
    fields = dict(config["model"], text_in_encoder=with_text, text_in_decoder=with_text)
    parts = text_parts(config["text"]["encoder"], fields["text_dim"]) if with_text else (None, None)
    weights = dict(config["loss"])
    dropout = weights.pop("text_dropout", 0.1)
    chosen = TexTokLossWeights(**checked_fields(TexTokLossWeights, weights, "loss"))
    loss = TexTokLoss(
        chosen,
        perceptual_loss() if chosen.perceptual else None,
        PatchDiscriminator() if chosen.adversarial else None,
    )
    return TokenizerObjective(TexTok(TexTokModel(**fields), *parts), pictures, loss, dropout, with_text)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; the result is that of `tokred.generation.training.fit`."""
    parser = recipe_arguments(__doc__, STAGES)
    parser.add_argument("--no-text", action="store_true", help="stage tokenizer: neither side sees the caption")
    parser.add_argument("--num-tokens", type=int, help="stage tokenizer: N, instead of the recipe's")
    parser.add_argument("--tokenizer", type=Path, help="stage generator: folder of a trained TexTok")
    parser.add_argument("--grid", action="store_true", help="stage generator: on patches of pixels, without tokenizer")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        config = read_config(args.config, SECTIONS)
        if args.no_text:
            config["text"]["use"] = False
        if args.num_tokens is not None:
            config["model"]["num_tokens"] = args.num_tokens
        return run_recipe(args, config, lambda pictures: objective_of(args, config, pictures), grid=args.grid)
    except TokredError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
