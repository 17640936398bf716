"""Train a FlexTok: its VAE, the tokenizer, then an autoregressive generator of its tokens.

    python tokenizers/flextok/train.py --config tokenizers/flextok/tiny.yaml --stage vae --out runs/vae
    python tokenizers/flextok/train.py --config ... --stage tokenizer --vae runs/vae/model --out runs/flextok
    python tokenizers/flextok/train.py --config ... --stage generator --tokenizer runs/flextok/model --out runs/ar
    accelerate launch --num_processes 8 --mixed_precision bf16 tokenizers/flextok/train.py ...     # the same, on 8 GPUs

A killed run goes on with `--resume`. `--vae` also takes a hub id such as EPFL-VILAB/flextok_vae_c16; `--data` a folder
of pictures instead of the recipe's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError, TokredError
from tokred.data.pictures import PictureBatch, Pictures
from tokred.generation.flextok import FlexTok, FlexTokModel, sample_keep_k
from tokred.generation.flextok_ar import FlexTokARConfig, FlexTokARModel
from tokred.generation.flow import noised, sample_sigmas
from tokred.generation.training import Objective, checked_fields, read_config, recipe_arguments, run_recipe, trained

STAGES = ("vae", "tokenizer", "generator")
SECTIONS = ("data", "vae", "model", "generator", "loss", *(f"train_{stage}" for stage in STAGES))
SHOWN = 8  # pictures of a sample sheet


@dataclass(frozen=True)
class Loss:
    """The section ``loss:``: nested dropout's law, share of pictures without condition, law and shift of times, REPA.

    `repa` is None or {"model": a DINOv2 of transformers, "weight": number, "block": of the decoder, "size": pixels}.
    """

    nested_dropout: str = "pow2"
    condition_dropout: float = 0.2
    sigmas: str = "mode"
    sigma_shift: float = 1.0
    repa: dict[str, Any] | None = None


class VAEObjective(Objective):
    """L1 reconstruction and a weak KL term; for pictures that no public VAE was made for."""

    KL = 1e-6

    def __init__(self, vae: AutoencoderKL, pictures: Pictures) -> None:
        self.model, self.pictures = vae, pictures
        self.shown = next(pictures.held_out(SHOWN)).images

    def batches(self, size: int, start: int, rank: int, world: int) -> Iterator[PictureBatch]:
        return self.pictures.train(size, start, rank, world)

    def loss(
        self, model: nn.Module, batch: PictureBatch, step: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch.images.to(device)
        posterior = self.model.encode(images).latent_dist
        found = model(images, sample_posterior=True).sample
        l1 = (found - images).abs().mean()
        return l1 + self.KL * posterior.kl().mean(), {"l1": l1.detach()}

    def save(self, folder: Path) -> None:
        """With the scaling factor that gives latents of held-out pictures a deviation of 1."""
        device = self.model.device
        found = [self.model.encode(b.images.to(device)).latent_dist.mode() for b in self.pictures.held_out(512)]
        self.model.register_to_config(scaling_factor=1 / float(torch.cat(found).std()))
        self.model.save_pretrained(folder)

    @torch.no_grad()
    def sheet(self) -> Sequence[Tensor]:
        return [self.shown, self.model(self.shown.to(self.model.device)).sample.clamp(-1, 1).cpu()]


class TokenizerObjective(Objective):
    """Velocity of noised latents under a random number of tokens."""

    def __init__(self, model: FlexTokModel, vae: AutoencoderKL | None, pictures: Pictures, how: Loss) -> None:
        self.flextok = FlexTok(model, vae, FlowMatchEulerDiscreteScheduler())
        self.flextok.set_progress_bar_config(disable=True)
        if vae is not None:
            vae.requires_grad_(False).eval()
        self.net, self.pictures, self.how = model, pictures, how
        self.model = model if how.repa is None else nn.ModuleDict({"net": model, "repa": Repa(model, **how.repa)})
        self.shown = next(pictures.held_out(SHOWN)).images

    def batches(self, size: int, start: int, rank: int, world: int) -> Iterator[PictureBatch]:
        return self.pictures.train(size, start, rank, world)

    def loss(
        self, model: nn.Module, batch: PictureBatch, step: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch.images.to(device)
        if self.flextok.vae is not None:
            self.flextok.vae.to(device)
        latents = self.flextok.encode_latents(images)
        count = len(latents)
        noise = torch.randn_like(latents)
        times = sample_sigmas(count, self.how.sigmas, shift=self.how.sigma_shift, device=device)
        kept = sample_keep_k(count, self.net.config.num_registers, self.how.nested_dropout)
        drop = torch.rand(count) < self.how.condition_dropout
        repa = self.model["repa"] if self.how.repa else None
        found = self.net(latents, noised(latents, noise, times), times, kept, drop, repa.block if repa else None)
        flow = (found.velocity - (noise - latents)).square().mean()
        numbers = {"flow": flow.detach(), "codes": torch.tensor(found.encoder.ids.unique().numel())}
        if repa is None:
            return flow, numbers
        aligned = repa(found.hidden, images)
        return flow + repa.weight * aligned, {**numbers, "repa": aligned.detach()}

    def save(self, folder: Path) -> None:
        self.flextok.save_pretrained(folder)

    @torch.no_grad()
    def sheet(self) -> Sequence[Tensor]:
        """Held-out pictures, then what 1, 2, 4 ... tokens give back."""
        ids = self.flextok.encode(self.shown)
        generator = torch.Generator().manual_seed(0)
        rows = self.flextok.progressive(ids, generator=generator, num_inference_steps=10, guidance_scale=1.0)
        return [self.shown, *rows.cpu()]


class Repa(nn.Module):
    """Patch tokens that leave a block of the decoder against DINOv2's features of the picture: minus their cosine."""

    def __init__(self, net: FlexTokModel, model: str, weight: float = 1.0, block: int = 1, size: int = 518) -> None:
        super().__init__()
        from transformers import AutoModel

        dino = AutoModel.from_pretrained(model).requires_grad_(False).eval()
        self._dino = [dino]  # not a part of what is trained and saved
        self.weight, self.block, self.size, self.grid = weight, block, size, net.config.pos_grid
        dim = net.config.decoder_dim
        self.head = nn.Sequential(
            nn.Linear(dim, 2 * dim),
            nn.SiLU(),
            nn.Linear(2 * dim, 2 * dim),
            nn.SiLU(),
            nn.Linear(2 * dim, dino.config.hidden_size),
        )
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, hidden: Tensor, images: Tensor) -> Tensor:
        """Hidden tokens (B, P + n, D) and pictures (B, 3, H, W) in [-1, 1] to a number."""
        dino, grid = self._dino[0].to(images.device), self.grid
        with torch.no_grad():
            pixels = F.interpolate((images + 1) / 2, (self.size, self.size), mode="bicubic", antialias=True)
            wanted = dino((pixels - self.mean) / self.std).last_hidden_state[:, 1:]
        side = round(wanted.shape[1] ** 0.5)
        patches = self.head(hidden[:, : grid * grid]).mT.unflatten(2, (grid, grid))
        patches = F.interpolate(patches, (side, side), mode="bilinear").flatten(2).mT
        return -F.cosine_similarity(patches, wanted, dim=-1).mean()


class GeneratorObjective(Objective):
    """Cross-entropy of the next token; a tenth of the pictures have no class."""

    CLASS_DROPOUT = 0.1

    def __init__(self, ar: FlexTokARModel, flextok: FlexTok, pictures: Pictures) -> None:
        if len(pictures.classes) != ar.config.num_classes:
            raise InvalidParameterError(
                f"generator.num_classes={ar.config.num_classes}: the pictures have {len(pictures.classes)} classes"
            )
        self.model, self.flextok, self.pictures = ar, flextok, pictures
        flextok.set_progress_bar_config(disable=True)

    def batches(self, size: int, start: int, rank: int, world: int) -> Iterator[PictureBatch]:
        return self.pictures.train(size, start, rank, world)

    def loss(
        self, model: nn.Module, batch: PictureBatch, step: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ids = self.flextok.to(device).encode(batch.images)
        labels = batch.labels.to(device)
        labels = labels.masked_fill(torch.rand(len(labels), device=device) < self.CLASS_DROPOUT, -1)
        return model(class_labels=labels, labels=ids).loss, {}

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    @torch.no_grad()
    def sheet(self) -> Sequence[Tensor]:
        """Four pictures of each of the first classes."""
        classes = torch.arange(min(SHOWN, len(self.pictures.classes)), device=self.model.device)
        rows = []
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            ids = self.model.generate_tokens(classes, generator=generator)
            rows.append(self.flextok.decode(ids, num_inference_steps=10, guidance_scale=1.0, generator=generator).cpu())
        return rows


def objective_of(args: argparse.Namespace, config: dict[str, dict[str, Any]], pictures: Pictures) -> Objective:
    """What a stage trains, from its command line and recipe."""
    if args.stage == "vae":
        return VAEObjective(AutoencoderKL(**config["vae"]), pictures)
    if args.stage == "tokenizer":
        vae = None if args.vae is None else AutoencoderKL.from_pretrained(args.vae)
        return TokenizerObjective(
            FlexTokModel(**config["model"]), vae, pictures, Loss(**checked_fields(Loss, config["loss"], "loss"))
        )
    if args.tokenizer is None:
        raise InvalidParameterError("--stage generator needs --tokenizer, the folder of a trained FlexTok")
    flextok = FlexTok.from_pretrained(trained(args.tokenizer, "--tokenizer"))
    sizes = {"codebook_size": flextok.codebook_size, "num_tokens": flextok.num_tokens}
    return GeneratorObjective(FlexTokARModel(FlexTokARConfig(**sizes, **config["generator"])), flextok, pictures)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; the result is that of `tokred.generation.training.fit`."""
    parser = recipe_arguments(__doc__, STAGES)
    parser.add_argument("--vae", help="stage tokenizer: folder or hub id of an AutoencoderKL; without, pixels")
    parser.add_argument("--tokenizer", type=Path, help="stage generator: folder of a trained FlexTok")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        config = read_config(args.config, SECTIONS)
        return run_recipe(args, config, lambda pictures: objective_of(args, config, pictures))
    except TokredError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
