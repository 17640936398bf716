"""Train a grid tokenizer (VQ), then a language model that draws its codes, s x s of them a step (Token-Shuffle).

    R=tokenizers/token_shuffle
    python $R/train.py --config $R/tiny.yaml --stage vq --out runs/vq
    python $R/train.py --config $R/tiny.yaml --stage generator --tokenizer runs/vq/model --window 2 --out runs/shuffle_2
    python $R/train.py ... --resolution 1024 --init runs/512/model        # the next of the recipe's resolutions
    accelerate launch --num_processes 8 --mixed_precision bf16 $R/train.py ...     # the same, on 8 GPUs

A killed run goes on with `--resume`. `--tokenizer` also takes LlamaGen's VQ-16: a .pt file, or its hub id
FoundationVision/LlamaGen.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tokred.core.budget import check_count
from tokred.core.errors import InvalidParameterError, TokredError
from tokred.data.pictures import PictureBatch, Pictures
from tokred.generation.llamagen_vq import VQTokenizer
from tokred.generation.textok_losses import PatchDiscriminator, TexTokLoss, TexTokLossWeights, perceptual_loss
from tokred.generation.token_shuffle import TokenShuffle
from tokred.generation.training import Objective, checked_fields, read_config, recipe_arguments, run_recipe

STAGES = ("vq", "generator")
SECTIONS = ("data", "vq", "loss", "text", "generator", "shuffle", "resolutions", "train_vq", "train_generator")
SHOWN = 8  # pictures of a sample sheet


@dataclass(frozen=True)
class Codebook:
    """Of the section ``loss:``, beside `TexTokLossWeights`: how the codebook learns.

    Attributes:
        quantiser: weight of diffusers' quantiser loss (commitment, and a quarter of it for the rows).
        refresh_every, refresh_until: every so many updates, up to that one, rows that no latent of `refresh_batches`
            batches is nearest to are put where latents are; at update 0 all rows are. 0 updates never does.
    """

    quantiser: float = 1.0
    refresh_every: int = 50
    refresh_until: int = 0
    refresh_batches: int = 4


class VQObjective(Objective):
    """Pictures back from their codes."""

    def __init__(self, vq: VQModel, pictures: Pictures, terms: TexTokLoss, how: Codebook) -> None:
        self.model, self.pictures, self.terms, self.how = vq, pictures, terms, how
        self.adversary = terms.discriminator
        self.tokenizer = VQTokenizer(vq)
        self.tokenizer.set_progress_bar_config(disable=True)
        self.shown = next(pictures.held_out(SHOWN)).images
        self.batch_size, self.made = 0, (self.shown, self.shown)

    def batches(self, size: int, start: int, rank: int, world: int) -> Iterator[PictureBatch]:
        self.batch_size = size
        return self.pictures.train(size, start, rank, world)

    def loss(
        self, model: nn.Module, batch: PictureBatch, step: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, how = batch.images.to(device), self.how
        if step < how.refresh_until and step % how.refresh_every == 0:
            self.refresh(step, device)
        latents = self.model.encode(images).latents
        codes, quantiser, (_, _, ids) = self.model.quantize(latents)
        found = self.model.decoder(self.model.post_quant_conv(codes))
        self.made = images, found.detach()
        terms = self.terms(images, found, step=step)
        loss = terms.pop("loss") + how.quantiser * quantiser
        numbers = {name: value.detach() for name, value in terms.items()}
        return loss, {**numbers, "quantiser": quantiser.detach(), "codes": torch.tensor(ids.unique().numel())}

    def adversary_loss(self, step: int) -> Tensor | None:
        if not self.terms.adversarial_at(step):
            return None
        return self.terms.discriminator_terms(*self.made, step, r1=step % 16 == 0)["loss"]

    @torch.no_grad()
    def refresh(self, step: int, device: torch.device) -> None:
        """The same rows in every process, and after a resumed run: they depend on the update alone."""
        latents = []
        for _, batch in zip(range(self.how.refresh_batches), self.pictures.train(self.batch_size, step), strict=False):
            latents.append(self.model.encode(batch.images.to(device)).latents)
        found = torch.cat(latents)
        used = torch.bincount(self.tokenizer.lookup(found).flatten(), minlength=self.tokenizer.codebook_size) > 0
        dead = (~used).nonzero().flatten() if step else torch.arange(len(used), device=device)
        flat = found.movedim(1, -1).flatten(0, 2)
        chosen = torch.randperm(len(flat), generator=torch.Generator().manual_seed(step))[: len(dead)]
        self.model.quantize.embedding.weight[dead[: len(chosen)]] = flat[chosen.to(device)]

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def sheet(self) -> Sequence[Tensor]:
        return [self.shown, self.tokenizer.decode(self.tokenizer.encode_grid(self.shown)).cpu()]


class Prompts:
    """Text ids of pictures: the class, as one id each, or the caption through a tokenizer of transformers.

    The section ``text:``: {prompts: class} or {prompts: caption, tokenizer: folder or hub id, max_length: tokens}.
    """

    def __init__(self, section: dict[str, Any], pictures: Pictures) -> None:
        self.kind, self.length, self.tokenizer = section.get("prompts"), section.get("max_length", 512), None
        if self.kind == "caption":
            self.tokenizer = AutoTokenizer.from_pretrained(section["tokenizer"])
            self.bos, self.size = self.tokenizer.bos_token_id, len(self.tokenizer)
        elif self.kind == "class" and pictures.classes:
            self.bos = len(pictures.classes)
            self.size = self.bos + 1
        else:
            raise InvalidParameterError(
                f"text.prompts={self.kind!r}: expected caption, or class and pictures that have classes"
            )

    def __call__(self, batch: PictureBatch, kept: Sequence[bool]) -> list[list[int]]:
        """Rows of ids that begin with BOS; that alone where the prompt is dropped."""
        start = [] if self.bos is None else [self.bos]
        if self.tokenizer is None:
            assert batch.labels is not None
            rows = [[label] for label in batch.labels.tolist()]
        elif batch.captions is None:
            raise InvalidParameterError("text.prompts='caption': these pictures have no captions.jsonl")
        else:
            options = {"add_special_tokens": False, "truncation": True, "max_length": self.length}
            rows = self.tokenizer(batch.captions, **options).input_ids
        return [start + (row if keep else []) for row, keep in zip(rows, kept, strict=True)]


class GeneratorObjective(Objective):
    """Cross-entropy of the codes of the next window; some pictures have no prompt."""

    def __init__(
        self, model: TokenShuffle, tokenizer: VQTokenizer, pictures: Pictures, prompts: Prompts, dropout: float
    ) -> None:
        if model.config.codebook_size != tokenizer.codebook_size:
            raise InvalidParameterError(
                f"the generator draws from {model.config.codebook_size} codes, --tokenizer has "
                f"{tokenizer.codebook_size}"
            )
        self.model, self.tokenizer, self.pictures = model, tokenizer, pictures
        self.prompts, self.dropout = prompts, dropout
        tokenizer.set_progress_bar_config(disable=True)
        tokenizer.vqvae.requires_grad_(False).eval()
        self.shown = next(pictures.held_out(SHOWN))

    def batches(self, size: int, start: int, rank: int, world: int) -> Iterator[PictureBatch]:
        return self.pictures.train(size, start, rank, world)

    def loss(
        self, model: nn.Module, batch: PictureBatch, step: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        codes = self.tokenizer.to(device).encode_grid(batch.images)
        kept = (torch.rand(len(codes)) >= self.dropout).tolist()
        out = model(**self.model.pack(self.prompts(batch, kept), codes))
        numbers = {"nll": out.image_loss, "z": out.image_z_loss, "text": out.text_loss}
        return out.loss, {name: value for name, value in numbers.items() if value is not None}

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    @torch.no_grad()
    def sheet(self) -> Sequence[Tensor]:
        """Four pictures of each of the first classes, or one of each caption that was held out."""
        shown, size = self.shown, self.pictures.size // self.tokenizer.factor
        if self.prompts.tokenizer is None:
            labels = torch.arange(min(SHOWN, len(self.pictures.classes))).repeat(4)
            shown = PictureBatch(shown.images, labels, None)
        count = len(shown.images) if shown.labels is None else len(shown.labels)
        prompts = self.prompts(shown, [True] * count)
        generator = torch.Generator(self.model.device).manual_seed(0)
        codes = self.model.generate_codes(prompts, size, do_sample=True, generator=generator)
        return list(self.tokenizer.decode(codes).cpu().split(SHOWN))


def open_tokenizer(path: str) -> VQTokenizer:
    """A trained VQ's folder, or LlamaGen's release."""
    if (Path(path) / "model_index.json").is_file():
        return VQTokenizer.from_pretrained(path)
    return VQTokenizer.from_official(path)


def generator_of(
    args: argparse.Namespace, config: dict[str, dict[str, Any]], codes: int, text: Prompts
) -> TokenShuffle:
    """A new model, or the one of `--init` for the next resolution."""
    if args.init is not None:
        return TokenShuffle.from_pretrained(args.init).next_stage(args.window, config["shuffle"]["z_loss"])
    sizes = {"bos_token_id": text.bos, "eos_token_id": None, "pad_token_id": None, **config["generator"]}
    base = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=text.size, **sizes))
    return TokenShuffle.wrap(base, codebook_size=codes, window=args.window, **config["shuffle"])


def objective_of(args: argparse.Namespace, config: dict[str, dict[str, Any]], pictures: Pictures) -> Objective:
    """What a stage trains, from its command line and recipe."""
    loss = dict(config["loss"])
    dropout = loss.pop("prompt_dropout", 0.1)
    if args.stage == "vq":
        own = {name: loss.pop(name) for name in [f.name for f in fields(Codebook)] if name in loss}
        chosen = TexTokLossWeights(**checked_fields(TexTokLossWeights, loss, "loss"))
        terms = TexTokLoss(
            chosen,
            perceptual_loss() if chosen.perceptual else None,
            PatchDiscriminator() if chosen.adversarial else None,
        )
        model = VQModel(**{"sample_size": pictures.size, "lookup_from_codebook": True, **config["vq"]})
        return VQObjective(model, pictures, terms, Codebook(**own))
    if args.tokenizer is None:
        raise InvalidParameterError(
            "--stage generator needs --tokenizer, the folder of a trained VQ, or LlamaGen's file"
        )
    tokenizer, text = open_tokenizer(args.tokenizer), Prompts(config["text"], pictures)
    return GeneratorObjective(
        generator_of(args, config, tokenizer.codebook_size, text), tokenizer, pictures, text, dropout
    )


def at_resolution(args: argparse.Namespace, config: dict[str, dict[str, Any]]) -> None:
    """Put the chosen row of the section ``resolutions:`` where it belongs; `--window` is left as it was given."""
    rows = {int(size): row for size, row in config["resolutions"].items()}
    size = min(rows) if args.resolution is None else args.resolution
    if size not in rows:
        raise InvalidParameterError(f"--resolution {size}: the recipe has {', '.join(map(str, sorted(rows)))}")
    row = rows[size]
    config["data"]["size"] = size
    config["shuffle"] = {**config["shuffle"], "z_loss": row.get("z_loss", 0.0)}
    config["train_generator"] = {**config["train_generator"], **row.get("train", {})}
    args.window = check_count("--window", row["window"] if args.window is None else args.window, 1)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; the result is that of `tokred.generation.training.fit`."""
    parser = recipe_arguments(__doc__, STAGES)
    parser.add_argument("--tokenizer", help="stage generator: a trained VQ's folder, or LlamaGen's VQ-16")
    parser.add_argument("--window", type=int, help="stage generator: s, instead of the recipe's")
    parser.add_argument("--resolution", type=int, help="stage generator: side in pixels, one of the recipe's")
    parser.add_argument("--init", type=Path, help="stage generator: go on from this model, at another resolution")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        config = read_config(args.config, SECTIONS)
        further: dict[str, Any] = {}
        if args.stage == "generator":
            at_resolution(args, config)
            further = {"window": args.window, "init": None if args.init is None else str(args.init)}
        return run_recipe(args, config, lambda pictures: objective_of(args, config, pictures), **further)
    except TokredError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
