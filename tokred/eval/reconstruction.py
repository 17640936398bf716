"""How well an image tokenizer gives pictures back: PSNR, SSIM, and rFID where there are weights to see features with.

`tokred eval reconstruct` is `run` here; `tokred bench --task tokenize` uses the parts.
"""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, tee
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.core.budget import check_count
from tokred.core.errors import InvalidParameterError
from tokred.data.pictures import CardPictures, PictureBatch, open_pictures
from tokred.eval.bench import Progress, require
from tokred.eval.report import Panel, contact_sheet, dumps, table
from tokred.eval.vision import mean

__all__ = [
    "REPORTED",
    "Features",
    "Measured",
    "Moments",
    "alone",
    "cells",
    "flextok_ways",
    "frechet_distance",
    "grid_ways",
    "measure",
    "psnr",
    "run",
    "scale_ways",
    "sheet",
    "show",
    "ssim",
    "textok_ways",
]

SHOWN = 8  # pictures of a sheet
WINDOW, SIGMA = 11, 1.5  # of SSIM
K1, K2 = 0.01, 0.03

#: What others published, by class of tokenizer: (what the numbers are of, columns, rows).
REPORTED: dict[str, tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]] = {
    "FlexTok": (
        "ImageNet at 256 pixels, arXiv 2502.13967 and papers that quote it. Whether the rFIDs are of 32 or of 256 "
        "tokens differs between the sources that we could read; rFID 1.08 is the best that a public table lists.",
        ("model", "rFID", "gFID"),
        (
            ("d12-d12", "4.20", "-"),
            ("d18-d18, AR 1.33 B at 32 tokens", "1.61", "2.02"),
            ("d18-d28, AR 1.33 B at 32 tokens", "1.45", "1.86"),
            ("d18-d28, AR 1.3 B at 8 to 128 tokens", "-", "< 2"),
        ),
    ),
    "TexTok": (
        "ImageNet at 256 pixels, arXiv 2412.05796, as a summary and later papers have it. Without text only 1.49 is "
        "stated; the other three follow from the stated relative gains.",
        ("tokens", "rFID", "rFID without text", "gFID", "gFID without text"),
        (
            ("32", "2.40", "3.82", "3.55", "4.97"),
            ("64", "1.53", "2.04", "2.88", "3.30"),
            ("128", "1.04", "1.49", "-", "-"),
            ("256", "0.69", "0.91", "2.68", "2.91"),
        ),
    ),
    "TokenFlow": (
        "ImageNet, 50,000 pictures, arXiv 2412.03069. The released script takes SSIM with a range of 2 on pictures in "
        "[0, 1], which comes out higher than SSIM here.",
        ("model", "rFID", "PSNR", "SSIM"),
        (
            ("256 pixels, 9 scales, 817 codes", "1.37", "21.41", "0.687"),
            ("384 pixels, 15 scales, 2,227 codes", "0.63", "22.77", "0.731"),
        ),
    ),
}


# -- how near two pictures are ----------------------------------------------------------------------------------------


def psnr(found: Tensor, wanted: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,) float64, of pictures (B, 3, H, W) in [-1, 1]: 10 log10(2^2 / MSE).

    Infinite where they are equal. Nothing is rounded to 8 bits.

    Raises:
        InvalidParameterError: shapes that differ or are no pictures.
    """
    first, second = _pair(found, wanted)
    return 10 * torch.log10(4 / (first - second).square().mean(dim=(1, 2, 3)))


def ssim(found: Tensor, wanted: Tensor) -> Tensor:
    """Structural similarity, (B,) float64 up to 1, of pictures (B, 3, H, W) in [-1, 1] (Wang et al. 2004).

    Gaussian window of 11 x 11 and deviation 1.5 where it fits whole, K = (0.01, 0.03), population variances, mean over
    places and channels, on values in [0, 1].

    Raises:
        InvalidParameterError: as `psnr`, or pictures smaller than the window.
    """
    first, second = _pair(found, wanted)
    height, width = first.shape[-2:]
    if min(height, width) < WINDOW:
        raise InvalidParameterError(f"pictures of {height} x {width} pixels: SSIM needs {WINDOW} x {WINDOW} or more")
    x, y = ((part + 1) / 2 for part in (first, second))
    place = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    weight = torch.exp(-(place**2) / (2 * SIGMA**2))
    weight = weight / weight.sum()

    def window(values: Tensor) -> Tensor:
        flat = values.flatten(0, 1)[:, None]
        flat = F.conv2d(F.conv2d(flat, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))
        return flat.unflatten(0, values.shape[:2])

    mx, my = window(x), window(y)
    vx, vy, vxy = window(x * x) - mx * mx, window(y * y) - my * my, window(x * y) - mx * my
    places = (2 * mx * my + K1**2) * (2 * vxy + K2**2) / ((mx**2 + my**2 + K1**2) * (vx + vy + K2**2))
    return places.flatten(1).mean(dim=1)


def _pair(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    if found.shape != wanted.shape or found.ndim != 4 or found.shape[1] != 3 or 0 in found.shape:
        raise InvalidParameterError(
            f"pictures of shapes {tuple(found.shape)} and {tuple(wanted.shape)}: expected one (B, 3, H, W)"
        )
    return found.double(), wanted.double().to(found.device)


# -- how alike two sets of pictures are -------------------------------------------------------------------------------


class Moments:
    """Mean (D,) and covariance (D, D), unbiased, of features that come in batches; float64."""

    def __init__(self) -> None:
        self.count, self.mean, self.spread = 0, torch.zeros(0), torch.zeros(0, 0)

    def add(self, features: Tensor) -> None:
        """Features (B, D)."""
        rows = features.detach().double().cpu()
        count, centre = len(rows), rows.mean(dim=0)
        spread = (rows - centre).mT @ (rows - centre)
        if self.count:  # Chan et al. 1979: joins the sums of squares of two samples
            delta, whole = centre - self.mean, self.count + count
            spread = self.spread + spread + torch.outer(delta, delta) * (self.count * count / whole)
            centre = self.mean + delta * (count / whole)
        self.count, self.mean, self.spread = self.count + count, centre, spread

    @property
    def covariance(self) -> Tensor:
        if self.count < 2:
            raise InvalidParameterError(f"the covariance of {self.count} pictures was asked for: expected 2 or more")
        return self.spread / (self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64 (Heusel et al. 2017).

    The trace of the root is that of (C1^(1/2) C2 C1^(1/2))^(1/2), which is symmetric.
    """
    c1, c2 = first.covariance, second.covariance
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    shared = torch.linalg.eigvalsh(root @ c2 @ root).clamp_min(0).sqrt().sum()
    return float((first.mean - second.mean).square().sum() + c1.trace() + c2.trace() - 2 * shared)


class Features:
    """Pooled features (B, D) of pictures (B, 3, H, W) in [-1, 1], by a model of timm that `folder` holds.

    Pictures are scaled to the model's input (antialiased) and normalised as it says. Distances in the features of one
    model compare with those of the same model alone: published FIDs are of the original Inception-v3.

    Raises:
        InvalidParameterError: no folder of a timm model, or it cannot be loaded.
    """

    def __init__(self, folder: Path) -> None:
        require("timm", "timm", what="rFID")
        import timm

        if not (folder / "config.json").is_file():
            raise InvalidParameterError(
                f"features={str(folder)!r}: expected the folder of a timm model, config.json and its weights, as "
                "timm.models.save_for_hf writes it"
            )
        try:
            self.model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
        except Exception as error:
            raise InvalidParameterError(f"{folder} cannot be loaded by timm: {str(error).splitlines()[0]}") from error
        data = timm.data.resolve_model_data_config(self.model)
        self.size = data["input_size"][-2:]
        self.mode = "bicubic" if data["interpolation"] == "bicubic" else "bilinear"
        self.mean, self.std = (torch.tensor(data[name])[:, None, None] for name in ("mean", "std"))

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        scaled = F.interpolate((pictures + 1) / 2, self.size, mode=self.mode, antialias=True).clamp(0, 1)
        return self.model((scaled - self.mean) / self.std)


# -- ways of giving pictures back -------------------------------------------------------------------------------------

#: What a way makes of a batch: its label, tokens, pictures and the bytes that each takes, (B,).
Made = tuple[str, int, Tensor, Tensor]
#: A batch, the caption before its first, and its number -> what each way makes of it.
Ways = Callable[[PictureBatch, "str | None", int], Iterator[Made]]


def flextok_ways(tokenizer: Any, counts: Sequence[int], seed: int = 0, with_vae: bool = False, **options: Any) -> Ways:
    """The first k tokens of a FlexTok, for each k of `counts`.

    Args:
        seed: of the decoder's noise, which is the same for every k. with_vae: also the VAE alone, the most that tokens
            of its latents can reach. options: of `FlexTok.decode`.

    Raises:
        InvalidParameterError: a number of tokens that the tokenizer does not have.
    """
    from tokred.generation.flow import draw_noise

    for count in counts:
        tokenizer.model._count(int(count), "num_tokens")
    config, bits = tokenizer.model.config, (tokenizer.codebook_size - 1).bit_length()

    @torch.no_grad()
    def ways(batch: PictureBatch, before: str | None, number: int) -> Iterator[Made]:
        own = alone(tokenizer)
        latents = own.encode_latents(batch.images)
        ids = own.model.encode_latents(latents, max(counts)).ids
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        noise = draw_noise((len(ids), config.latent_channels, *latents.shape[-2:]), generator)
        size = torch.ones(len(ids), dtype=torch.float64)
        for count in counts:
            label = f"{count} token" + "s" * (count > 1)
            yield label, count, own.decode(ids, count, latents=noise, **options).cpu(), size * count * bits / 8
        if with_vae and own.vae is not None:
            yield "VAE alone", 0, own.decode_latents(latents).clamp(-1, 1).cpu(), size * latents[0].numel() * 4

    return ways


def alone(tokenizer: Any) -> Any:
    """The same modules with a scheduler of their own: one holds the state of one run."""
    scheduler = tokenizer.scheduler
    own = type(tokenizer)(tokenizer.model, tokenizer.vae, type(scheduler).from_config(scheduler.config))
    own.set_progress_bar_config(disable=True)
    return own


def textok_ways(tokenizer: Any, twin: Any = None) -> Ways:
    """A TexTok with the right caption, with that of the picture before, and without; then its `twin` without text.

    A caption that is wrong in the decoder alone shows how much of the picture the caption carries.
    """
    reads = tokenizer.model.config.text_in_encoder or tokenizer.model.config.text_in_decoder
    config = tokenizer.model.config

    def made(label: str, own: Any, images: Tensor, seen: Any, told: Any) -> Made:
        pictures = own.decode(own.encode(images, seen), told).cpu()
        said = [len((text or "").encode()) for text in told or [""] * len(images)]
        size = torch.tensor(said).double() + config.num_tokens * config.latent_dim * 2  # float16
        return label, config.num_tokens, pictures, size

    def ways(batch: PictureBatch, before: str | None, number: int) -> Iterator[Made]:
        images, captions = batch.images, batch.captions
        if reads and captions is not None:
            others = [before or captions[-1], *captions[:-1]]
            yield made("right caption", tokenizer, images, captions, captions)
            yield made("wrong caption", tokenizer, images, others, others)
            yield made("wrong in decoder", tokenizer, images, captions, others)
        yield made("no caption", tokenizer, images, None, None)
        if twin is not None:
            yield made("twin without text", twin, images, None, None)

    return ways


def scale_ways(tokenizer: Any) -> Ways:
    """The first 1, 2, ... scales of a TokenFlow."""
    lengths, bits = tokenizer.quantizer.lengths, (tokenizer.codebook_size - 1).bit_length()

    @torch.no_grad()
    def ways(batch: PictureBatch, before: str | None, number: int) -> Iterator[Made]:
        codes = tokenizer.encode(batch.images)
        size = torch.ones(len(codes), dtype=torch.float64)
        for side, count, pictures in zip(tokenizer.scales, lengths, tokenizer.progressive(codes).cpu(), strict=True):
            yield f"up to {side} x {side}", count, pictures, size * count * bits / 8

    return ways


def grid_ways(tokenizer: Any) -> Ways:
    """All codes of a grid tokenizer."""
    bits = (tokenizer.codebook_size - 1).bit_length()

    def ways(batch: PictureBatch, before: str | None, number: int) -> Iterator[Made]:
        codes = tokenizer.encode(batch.images)
        size = torch.full((len(codes),), codes.shape[1] * bits / 8, dtype=torch.float64)
        yield f"{codes.shape[1]} codes", codes.shape[1], tokenizer.decode(codes).cpu(), size

    return ways


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """Of one way: PSNR, SSIM and bytes of each picture, (N,) float64; the first pictures; moments of features."""

    tokens: int
    psnr: Tensor
    ssim: Tensor
    bytes: Tensor
    pictures: Tensor
    moments: Moments = field(default_factory=Moments)

    def row(self, label: str) -> dict[str, Any]:
        """JSON types, with standard errors."""
        found: dict[str, Any] = {"label": label, "tokens": self.tokens, "bytes": self.bytes.mean().item()}
        for name in ("psnr", "ssim"):
            found[name], found[f"{name}_se"] = mean(getattr(self, name))
        return found


def measure(
    batches: Iterable[PictureBatch],
    ways: Ways,
    features: Features | None = None,
    threads: int = 1,
    done: Callable[[int], object] = lambda pictures: None,
) -> tuple[dict[str, Measured], Moments]:
    """Give every picture back in every way: {label: what was measured}, and the moments of the pictures themselves.

    Args:
        features: none are taken where it is None. threads: batches side by side; all are held in memory then.
        done: called with the number of pictures of a batch.
    """
    found: dict[str, Measured] = {}
    real, first, second = Moments(), *tee(batches)
    before = chain([None], (batch.captions[-1] if batch.captions else None for batch in first))

    def one(job: tuple[int, tuple[PictureBatch, str | None]]) -> tuple[PictureBatch, list[tuple[Made, Tensor, Tensor]]]:
        number, (batch, caption) = job
        made = [(way, psnr(way[2], batch.images), ssim(way[2], batch.images)) for way in ways(batch, caption, number)]
        done(len(batch.images))
        return batch, made

    # `before` is one longer
    jobs = enumerate(zip(second, before, strict=False))
    with ThreadPoolExecutor(threads) as pool:
        for batch, made in map(one, jobs) if threads == 1 else pool.map(one, jobs):
            if features is not None:
                real.add(features(batch.images))
            for (label, tokens, pictures, size), near, alike in made:
                mine = found.setdefault(label, Measured(tokens, near[:0], alike[:0], size[:0], pictures[:0]))
                mine.psnr, mine.ssim = torch.cat([mine.psnr, near]), torch.cat([mine.ssim, alike])
                mine.bytes = torch.cat([mine.bytes, size])
                mine.pictures = torch.cat([mine.pictures, pictures])[:SHOWN]
                if features is not None:
                    mine.moments.add(features(pictures))
    return found, real


def run(
    model: str,
    data: str = "cards",
    count: int = 256,
    batch: int = 32,
    num_tokens: Sequence[int] | None = None,
    steps: int = 25,
    guidance: float = 1.0,
    seed: int = 0,
    features: Path | None = None,
    out: Path = Path("outputs/eval-reconstruct"),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a tokenizer on held-out pictures, write a sheet and results.json into `out`; results of JSON types.

    Args:
        model: see `tokred.zoo.tokenizers.open_tokenizer`.
        data: "cards" (the test split), or a folder: see `tokred.data.pictures.FolderPictures`. Of a folder the last
            `count` of a fixed order are taken, those that training with ``held_out: count`` never sees.
        num_tokens: of tokenizers of which prefixes can be decoded; None is 1, 2, 4 ... all.
        steps, guidance, seed: of a decoder that samples. Guidance 1 is none, the nearest to the picture.
        features: folder of a timm model, for rFID.

    Raises:
        InvalidParameterError: an option outside its range, or one that this tokenizer has no use for.
    """
    from tokred.zoo.tokenizers import open_tokenizer

    began = time.perf_counter()
    check_count("count", count, 2)
    check_count("batch", batch, 1)
    require("diffusers,train", "diffusers", "transformers", "tqdm", what="tokred eval reconstruct")
    sees = None if features is None else Features(features)
    tokenizer, made_by = open_tokenizer(model)
    kind = type(tokenizer).__name__
    if kind == "FlexTok":
        counts = list(num_tokens or powers(tokenizer.num_tokens))
        options = {"num_inference_steps": steps, "guidance_scale": guidance}
        ways = flextok_ways(tokenizer, counts, seed, with_vae=True, **options)
    elif kind == "TokenFlow":
        if num_tokens:
            raise InvalidParameterError(f"num_tokens={list(num_tokens)}: a TokenFlow is measured after each scale")
        ways = scale_ways(tokenizer)
    elif num_tokens and list(num_tokens) != [tokenizer.num_tokens]:
        raise InvalidParameterError(
            f"num_tokens={list(num_tokens)}: this tokenizer always takes {tokenizer.num_tokens}, its first tokens "
            "alone mean nothing"
        )
    else:
        ways = textok_ways(tokenizer) if kind == "TexTok" else grid_ways(tokenizer)
    size = tokenizer.image_size
    pictures = open_pictures(data, size, held_out=0 if data == "cards" else count)
    if data == "cards":
        pictures = CardPictures(split="test", held_out_seed=777)
    bar = Progress(quiet=True) if progress is None else progress
    bar.start("giving pictures back", count, "pictures")
    found, real = measure(pictures.held_out(count, batch), ways, sees, done=bar.advance)
    rows = [mine.row(label) for label, mine in found.items()]
    if sees is not None:
        for row, mine in zip(rows, found.values(), strict=True):
            row["rfid"] = frechet_distance(real, mine.moments)
    results: dict[str, Any] = {
        "task": "reconstruct",
        "model": {"name": model, "class": kind, "fingerprint": made_by, "image_size": size},
        "data": {"pictures": data, "count": len(next(iter(found.values())).psnr)},
        "decoder": {"steps": steps, "guidance": guidance, "seed": seed} if kind == "FlexTok" else None,
        "features": None if features is None else str(features),
        "rows": rows,
        "files": {"results": str(out / "results.json"), "pictures": str(out / "pictures.png")},
    }
    shown = next(pictures.held_out(SHOWN, SHOWN)).images
    out.mkdir(parents=True, exist_ok=True)
    sheet(shown, found).save(results["files"]["pictures"])
    results["seconds"] = round(time.perf_counter() - began, 1)
    Path(results["files"]["results"]).write_text(dumps(results) + "\n", encoding="utf-8")
    return json.loads(dumps(results))


def powers(most: int) -> list[int]:
    """1, 2, 4 ... and `most`."""
    return [*(2**i for i in range((most - 1).bit_length())), most]


def sheet(wanted: Tensor, found: Mapping[str, Measured]) -> Any:
    """Pictures by rows: the original, then what each way makes of it, with its PSNR."""
    from tokred.generation.images import to_pil

    wanted = wanted[: min(len(mine.pictures) for mine in found.values())]
    columns = [[Panel(picture, "") for picture in to_pil(wanted)]]
    for mine in found.values():
        pictures = to_pil(mine.pictures[: len(wanted)])
        near = mine.psnr[: len(pictures)].tolist()
        columns.append([Panel(one, f"{value:.1f} dB") for one, value in zip(pictures, near, strict=True)])
    titles = [
        (1, "original", ""),
        *((1, label, f"{_bytes(float(mine.bytes.mean()))} bytes") for label, mine in found.items()),
    ]
    return contact_sheet([list(row) for row in zip(*columns, strict=True)], 112, titles)


def show(results: Mapping[str, Any]) -> str:
    """The table of `run`, and what others published."""
    rows, decoder, model = results["rows"], results["decoder"], results["model"]
    header = ["", "bytes", "PSNR dB", "SSIM", *(["rFID"] if "rfid" in rows[0] else [])]
    said = "" if decoder is None else f", {decoder['steps']} steps, guidance {decoder['guidance']:g}"
    legend = "mean ± standard error over pictures. bytes: of the tokens, without headers"
    legend += ", and of the caption that goes with them." if decoder is None else ". VAE alone: its latents as float32."
    if model["class"] in ("TokenFlow", "VQTokenizer"):
        legend = "mean ± standard error over pictures. bytes: of the codes, without headers."
    if "rfid" in rows[0]:
        legend += (
            " rFID: Fréchet distance to the originals in the features of the given model; the fewer pictures, the "
            "larger it comes out."
        )
    lines = [
        f"{model['class']} {model['name']} on {results['data']['count']} held-out pictures of "
        f"{results['data']['pictures']}, {model['image_size']} x {model['image_size']} pixels{said}",
        "",
        table(header, [[cells(row) for row in rows]]),
        "",
        *textwrap.wrap(legend, 118),
    ]
    if model["class"] in REPORTED:
        note, columns, reported = REPORTED[model["class"]]
        lines += ["", *textwrap.wrap(f"Paper says: {note}", 118), "", table(columns, [reported])]
    return "\n".join(lines)


def _bytes(count: float) -> str:
    return f"{count:.0f}" if count >= 10 else f"{count:.3g}"


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table."""
    near = f"{row['psnr']:.2f} ±{row['psnr_se']:.2f}"
    found = [row["label"], _bytes(row["bytes"]), near, f"{row['ssim']:.3f} ±{row['ssim_se']:.3f}"]
    return [*found, *([f"{row['rfid']:.3f}"] if "rfid" in row else [])]
