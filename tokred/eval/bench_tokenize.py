"""`tokred bench --task tokenize`: the bundled image tokenizers and their generators on held-out cards.

Experiments, which `--methods` chooses from: what the first tokens of a FlexTok give back; whether the digit that its
generator was asked for is to be seen in so many tokens; what a TexTok gains by the caption; its generator on N tokens
beside the same one on the grid of patches; and those of `tokred.eval.bench_codes`.
"""

from __future__ import annotations

import hashlib
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokred.core.errors import InvalidParameterError, UnknownMethodError, UnknownParameterError, nearest
from tokred.data.cards import DIGIT_WORDS, Cards, DigitCards, on_scene
from tokred.data.pictures import PictureBatch
from tokred.eval import bench_codes
from tokred.eval.bench import TASKS, BenchOptions, Progress, require
from tokred.eval.reconstruction import Measured, alone, cells, flextok_ways, measure, sheet, textok_ways
from tokred.eval.report import Panel, contact_sheet, dumps, percent, table
from tokred.eval.speed import pairs, ratio
from tokred.eval.vision import mean, paired
from tokred.eval.vlm import refuse
from tokred.generation.flow import draw_noise, sample
from tokred.generation.images import to_pil
from tokred.generation.patches import unpatchify
from tokred.zoo import tokenizers as zoo

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Given", "macs", "run", "show", "tables"]

TASK = TASKS["tokenize"]
BATCH = 25
TIMED = 8  # pictures that are drawn at once when time is measured
#: Experiment -> (what it needs of the zoo, what `--set` can change and its default).
EXPERIMENTS: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    "reconstruct": (("tiny-flextok",), {"num_inference_steps": 25, "guidance_scale": 1.0}),
    "generate": (
        ("tiny-flextok", "tiny-flextok-ar"),
        {"num_inference_steps": 25, "guidance_scale": 1.0, "ar_guidance_scale": 1.5, "temperature": 1.0, "top_k": 0},
    ),
    "captions": (("tiny-textok",), {}),
    "grid": (("tiny-textok",), {"num_inference_steps": 25, "guidance_scale": 1.5}),
    **bench_codes.EXPERIMENTS,
}
#: Left out of an experiment, not of the run, where there is none.
OPTIONAL = {"captions": "tiny-textok-no-text", "grid": "tiny-textok-grid"}
LEGEND = {
    "reconstruct": "PSNR and SSIM ± standard error over cards, from the same noise for every number of tokens. bytes: "
    "of the ids. reads the digit: how often the bundled digit ViT names it. VAE alone: latents as float32, the most "
    "that tokens of them can reach.",
    "generate": "Pictures that the generator drew, as many of each digit, decoded from their first tokens. agreement: "
    "how often the bundled digit ViT names the digit that was asked for, and in the last row that of a real card.",
    "captions": "The same number of tokens of a card, told its caption, that of another card (on both sides, or in the "
    "decoder alone), or none; the twin was trained without. vs right: paired difference in dB, card by card; "
    "* better, ! worse by more than 2 standard errors. bytes: float16 and the caption.",
    "grid": "The same transformer on the tokens of TexTok (then its decoder makes the picture of them and of a caption "
    "of the class) and on the patches of the card themselves. agreement as above. GMACs: of one step without guidance, "
    "and of a whole picture with it, text encoder and decoder included. ms: of one picture in a batch of "
    f"{TIMED}, median; speed-up: median of interleaved pairs with the grid; limit: ratio of GMACs.",
    **bench_codes.LEGEND,
}


def run(options: BenchOptions, progress: Progress) -> dict[str, Any]:
    """Measure, write the pictures and results.json into `options.out`, and return the results (JSON types)."""
    what = "tokred bench --task tokenize"
    require("demo,diffusers", "diffusers", "transformers", "timm", "sklearn", "skimage", "tqdm", what=what)
    began = time.perf_counter()
    refuse(options, "tokenize", "ablate", "context")
    options.check_split()
    counts = options.counts("tokens") or tuple(map(int, TASK.levels))
    chosen, settings = _chosen(options)
    parts = Parts(options.checkpoint or zoo.WEIGHTS, chosen)
    flextok = parts.get("tiny-flextok")
    if flextok is not None:
        _check_counts(counts, flextok.num_tokens, options.levels is not None)
        counts = tuple(k for k in counts if k <= flextok.num_tokens)
    cards = _drawn(options, progress)
    reader = Reader()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "task": "tokenize",
        "cards": {"count": len(cards.images), "split": options.split, "seed": options.seed},
        "weights": parts.described,
        "machine": {
            "torch": torch.__version__,
            "processor": platform.machine(),
            "accuracy_threads": options.threads,
            "speed_threads": torch.get_num_threads(),
            "speed_pairs": options.rounds,
        },
        "experiments": {},
        "files": {"results": str(options.out / "results.json")},
    }
    given = Given(parts, cards, counts, options, reader, progress)
    for name in chosen:
        found, picture = _RUN[name](given, settings[name])
        results["experiments"][name] = {"settings": settings[name], **found}
        if picture is not None:
            path = options.out / f"{name}.png"
            picture.save(path)
            results["files"][name] = str(path)
    results["seconds"] = round(time.perf_counter() - began, 1)
    Path(results["files"]["results"]).write_text(dumps(results) + "\n", encoding="utf-8")
    return results


def _chosen(options: BenchOptions) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Experiments, and the settings of each."""
    names = list(dict.fromkeys(options.methods or EXPERIMENTS))
    for name in names:
        if name not in EXPERIMENTS:
            known = ", ".join(EXPERIMENTS)
            raise UnknownMethodError(f"--methods {name}{nearest(name, EXPERIMENTS)}; there are: {known}")
    settings = {name: dict(EXPERIMENTS[name][1]) for name in names}
    for name, parameters in options.parameters.items():
        if name not in names:
            raise InvalidParameterError(f"--set {name}...: the experiments here are {', '.join(names)}")
        for key, value in parameters.items():
            if key not in settings[name]:
                raise UnknownParameterError(
                    f"--set {name}.{key}: there is no such setting{nearest(key, settings[name])}; it has "
                    f"{', '.join(settings[name]) or 'none'}"
                )
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InvalidParameterError(f"--set {name}.{key}={value!r}: expected a number")
            settings[name][key] = value
    return names, settings


def _check_counts(counts: Sequence[int], most: int, asked: bool) -> None:
    if max(counts) > most and (asked or min(counts) > most):
        raise InvalidParameterError(f"--levels {max(counts)}: this FlexTok has {most} tokens")


class Parts:
    """Models of the zoo, or of the folder of --checkpoint, which is laid out alike; only those that are needed.

    Raises:
        FileNotFoundError: one that an experiment cannot do without is missing.
    """

    def __init__(self, root: Path, experiments: Sequence[str]) -> None:
        tokenflow = zoo.folder_of("tiny-tokenflow", root)
        readers: dict[str, Callable[[Path], Any]] = {
            "tiny-flextok": zoo.tiny_flextok,
            "tiny-flextok-ar": zoo.tiny_flextok_ar,
            "tiny-textok": zoo.tiny_textok,
            "tiny-textok-no-text": zoo.tiny_textok_no_text,
            "tiny-textok-grid": zoo.tiny_textok_grid,
            "tiny-tokenflow": zoo.tiny_tokenflow,
            "tiny-vq": zoo.tiny_vq,
            **{f"tiny-shuffle-{size}": partial(zoo.tiny_shuffle, size) for size in zoo.WINDOWS},
            **{
                f"tiny-tokenflow-qa-{name}": partial(zoo.tiny_tokenflow_qa, name, tokenflow=tokenflow)
                for name in zoo.FEATURES
            },
        }
        needed = dict.fromkeys(part for name in experiments for part in EXPERIMENTS[name][0])
        wished = [OPTIONAL[name] for name in experiments if name in OPTIONAL]
        there = [name for name in wished if zoo.folder_of(name, root).is_dir()]
        self._models = {name: readers[name](zoo.folder_of(name, root)) for name in [*needed, *there]}
        self.described = {name: _described(zoo.folder_of(name, root)) for name in self._models}
        if "grid" in experiments and self._models["tiny-textok"].generator is None:
            raise InvalidParameterError(f"{root}: tiny_textok has no generator, which the experiment grid needs")

    def get(self, name: str) -> Any:
        return self._models.get(name)


def _described(folder: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return {"folder": folder.name, "sha256": digest.hexdigest()}


class Reader:
    """The bundled digit ViT."""

    def __init__(self) -> None:
        from tokred.zoo.digit_vit import digit_vit

        self.model = digit_vit()

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """The digit (B,) int64 that it sees in cards (B, 3, S, S), uint8 or in [-1, 1]."""
        from tokred.data.scenes import normalize

        if pictures.is_floating_point():
            pictures = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        parts = [self.model(normalize(on_scene(part))).argmax(dim=1) for part in pictures.split(BATCH)]
        return torch.cat(parts)


class _WithDigits:
    """Ways of giving pictures back, whose pictures are also read."""

    def __init__(self, ways: Any, reader: Reader) -> None:
        self.ways, self.reader = ways, reader
        self.right: dict[str, dict[int, Tensor]] = {}

    def __call__(self, batch: PictureBatch, before: str | None, number: int) -> Any:
        for made in self.ways(batch, before, number):
            assert batch.labels is not None
            self.right.setdefault(made[0], {})[number] = self.reader(made[2]) == batch.labels
            yield made

    def of(self, label: str) -> Tensor:
        """(N,) bool: whether the digit was named right, in the order of the pictures."""
        return torch.cat([part for _, part in sorted(self.right[label].items())])


@dataclass(frozen=True, eq=False)
class Given:
    """What every experiment is given; `batch` cards are worked on at once."""

    batch: ClassVar[int] = BATCH

    parts: Parts
    cards: Cards
    counts: tuple[int, ...]
    options: BenchOptions
    reader: Reader
    progress: Progress

    @property
    def batches(self) -> list[PictureBatch]:
        cards, captions = self.cards, self.cards.captions
        return [
            PictureBatch(
                cards.images[start : start + BATCH].float() / 127.5 - 1,
                cards.labels[start : start + BATCH],
                captions[start : start + BATCH],
            )
            for start in range(0, len(captions), BATCH)
        ]

    @property
    def asked(self) -> Tensor:
        """Digits to draw, (n,): as many as there are cards, every digit as often but for one."""
        return torch.arange(len(self.cards.images)) % len(DIGIT_WORDS)

    def agreement(self, right: Tensor) -> dict[str, float]:
        """Share of (n,) bool with its standard error."""
        found = mean(right)
        return {"agreement": found.value, "agreement_se": found.error}

    def original(self) -> dict[str, float]:
        """How often the cards themselves are read right."""
        return self.agreement(self.reader(self.cards.images) == self.cards.labels)

    def given_back(self, ways: Any, label: str) -> tuple[dict[str, Measured], list[dict[str, Any]]]:
        """What each way of giving cards back measures, and its rows with the digits that are read."""
        reading = _WithDigits(ways, self.reader)
        self.progress.start(label, len(self.cards.images), "cards")
        found, _ = measure(self.batches, reading, threads=self.options.threads, done=self.progress.advance)
        rows = [mine.row(name) | self.agreement(reading.of(name)) for name, mine in found.items()]
        return found, rows

    def by_digit(self, columns: Sequence[Tensor], titles: Sequence[str]) -> Image:
        """A row a digit; a column a way of drawing it."""
        panels = []
        for pictures in columns:
            seen = enumerate(zip(to_pil(pictures), self.reader(pictures).tolist(), strict=True))
            panels.append([Panel(one, f"{i}: reads {guess}", guess == i) for i, (one, guess) in seen])
        rows = [list(row) for row in zip(*panels, strict=True)]
        return contact_sheet(rows, 96, [(1, title, "") for title in titles])


def _drawn(options: BenchOptions, progress: Progress) -> Cards:
    count = options.scenes or TASK.scenes
    progress.start("drawing cards", count, "cards")
    cards = DigitCards(options.split, options.seed).render(count)
    progress.advance(count)
    return cards


# -- experiments ------------------------------------------------------------------------------------------------------


def _reconstruct(given: Given, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    flextok = given.parts.get("tiny-flextok")
    ways = flextok_ways(flextok, given.counts, given.options.seed, with_vae=True, **settings)
    found, rows = given.given_back(ways, "FlexTok, giving back")
    return {"rows": rows, "cards": given.original()}, sheet(given.batches[0].images[:8], found)


def _generate(given: Given, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    flextok, ar = given.parts.get("tiny-flextok"), given.parts.get("tiny-flextok-ar")
    drawing = {name: settings[name] for name in ("temperature", "top_k")}
    decoding = {name: settings[name] for name in ("num_inference_steps", "guidance_scale")}
    batches = list(given.asked.split(BATCH))
    given.progress.start("FlexTok, drawing", len(given.asked), "pictures")
    jobs: list[tuple[Tensor, Tensor]] = []  # ids one after the other: transformers draws from torch's own generator
    for number, labels in enumerate(batches):
        generator = torch.Generator().manual_seed(given.options.seed * 1_000_003 + number)
        ids = ar.generate_tokens(
            labels,
            num_tokens=max(given.counts),
            guidance_scale=settings["ar_guidance_scale"],
            generator=generator,
            **drawing,
        )
        side = flextok.model.latent_size
        noise = draw_noise((len(labels), flextok.model.config.latent_channels, side, side), generator)
        jobs.append((ids, noise))

    def decode(job: tuple[Tensor, Tensor]) -> list[Tensor]:
        (ids, noise), own = job, alone(flextok)
        made = [own.decode(ids, count, latents=noise, **decoding) for count in given.counts]
        given.progress.advance(len(ids))
        return made

    with ThreadPoolExecutor(given.options.threads) as pool:
        done = list(pool.map(decode, jobs))
    rows, shown = [], []
    for count, parts in zip(given.counts, zip(*done, strict=True), strict=True):
        pictures = torch.cat(parts)
        rows.append({"tokens": count, **given.agreement(given.reader(pictures) == given.asked)})
        shown.append(pictures[: len(DIGIT_WORDS)])
    found = {"rows": rows, "cards": given.original(), "pictures": len(given.asked)}
    titles = [f"{count} token" + "s" * (count > 1) for count in given.counts]
    return found, given.by_digit(shown, titles)


def _captions(given: Given, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    textok, twin = given.parts.get("tiny-textok"), given.parts.get("tiny-textok-no-text")
    if twin is not None and (twin.num_tokens, twin.image_size) != (textok.num_tokens, textok.image_size):
        raise InvalidParameterError(
            f"tiny_textok_no_text has {twin.num_tokens} tokens of {twin.image_size} pixels, tiny_textok "
            f"{textok.num_tokens} of {textok.image_size}: they cannot be compared"
        )
    found, rows = given.given_back(textok_ways(textok, twin), "TexTok, giving back")
    right = found.get("right caption")
    for row in rows:
        if right is not None and row["label"] != "right caption":
            row["vs_right"] = paired(found[row["label"]].psnr, right.psnr).to_dict()
    return {"rows": rows, "cards": given.original()}, sheet(given.batches[0].images[:8], found)


def _grid(given: Given, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    textok, grid = given.parts.get("tiny-textok"), given.parts.get("tiny-textok-grid")
    draws = {"1-D": lambda labels, generator: _draw_tokens(textok, labels, generator, settings)}
    dits = {"1-D": textok.generator}
    if grid is not None:
        _check_grid(grid, textok.image_size)
        draws["grid"] = lambda labels, generator: _draw_patches(grid, textok.image_size, labels, generator, settings)
        dits["grid"] = grid
    given.progress.start("DiT, drawing", len(draws) * len(given.asked), "pictures")
    rows, shown = [], []
    for name, draw in draws.items():
        parts = []
        for number, labels in enumerate(given.asked.split(BATCH)):
            parts.append(draw(labels, torch.Generator().manual_seed(given.options.seed * 1_000_003 + number)))
            given.progress.advance(len(labels))
        pictures, dit = torch.cat(parts), dits[name]
        shown.append(pictures[: len(DIGIT_WORDS)])
        n, d = dit.config.num_tokens, dit.config.latent_dim
        one, label = torch.zeros(1, n, d), torch.zeros(1, dtype=torch.int64)
        rows.append(
            {
                "label": f"{n} tokens of {d}" if name == "1-D" else f"{n} patches of {d} numbers",
                "kind": name,
                "tokens": n,
                "parameters": sum(p.numel() for p in dit.parameters()),
                **given.agreement(given.reader(pictures) == given.asked),
                "step_gmacs": macs(partial(dit, one, 0.0, label)) / 1e9,
                "gmacs": macs(partial(draw, label, torch.Generator().manual_seed(0))) / 1e9,
            }
        )
    _add_times(given, draws, rows)
    titles = [f"{row['tokens']} {'tokens' if row['kind'] == '1-D' else 'patches'}" for row in rows]
    return {"rows": rows, "cards": given.original()}, given.by_digit(shown, titles)


def _add_times(given: Given, draws: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    """Milliseconds of a picture, and the speed-up over the grid where there is one."""
    labels = torch.arange(TIMED) % len(DIGIT_WORDS)

    def clock(name: str) -> float:
        generator = torch.Generator().manual_seed(0)
        start = time.perf_counter()
        draws[name](labels, generator)
        return time.perf_counter() - start

    rounds, slow = given.options.rounds, "grid" if "grid" in draws else "1-D"
    given.progress.start("speed, one thread", rounds + 1, "pairs")
    times = pairs(["1-D"], lambda _: clock(slow), lambda name: clock(name), rounds, given.progress.advance)["1-D"]
    for row in rows:
        mine = [grid if row["kind"] == "grid" else fast for grid, fast in times]
        row["ms"] = 1000 * statistics.median(mine) / TIMED
    if slow == "grid":
        speedup, low, high = ratio(times)
        rows[0] |= {"speedup": speedup, "speedup_quartiles": [low, high]}
        rows[0]["limit"] = rows[1]["gmacs"] / rows[0]["gmacs"]


def _check_grid(grid: Any, size: int) -> None:
    patches, width = grid.config.num_tokens, grid.config.latent_dim
    side, patch = round(patches**0.5), round((width / 3) ** 0.5)
    fits = side * side == patches and 3 * patch * patch == width and side * patch == size
    if not fits or grid.config.objective != "flow":
        raise InvalidParameterError(
            f"tiny_textok_grid has {patches} tokens of {width} numbers and objective {grid.config.objective!r}: "
            f"expected 'flow' on the patches of {size} x {size} pixels"
        )


def _draw_tokens(textok: Any, labels: Tensor, generator: torch.Generator, settings: Mapping[str, Any]) -> Tensor:
    """Pictures (B, 3, S, S) of classes by TexTok's generator, each with a caption of its class from the bank."""
    found = textok(
        class_labels=labels,
        num_inference_steps=settings["num_inference_steps"],
        guidance_scale=settings["guidance_scale"],
        generator=generator,
        output_type="pt",
    )
    return found.images


@torch.no_grad()
def _draw_patches(
    grid: Any, size: int, labels: Tensor, generator: torch.Generator, settings: Mapping[str, Any]
) -> Tensor:
    """Pictures of classes by the transformer on patches: the same noise law, steps and guidance."""
    from tokred.generation.textok_dit import make_scheduler

    n, d = grid.config.num_tokens, grid.config.latent_dim
    side, patch = round(n**0.5), round((d / 3) ** 0.5)
    patches = sample(
        lambda x, t: grid(x, 1000 * t, labels).sample,
        draw_noise((len(labels), n, d), generator),
        scheduler=make_scheduler("flow"),
        steps=int(settings["num_inference_steps"]),
        null_velocity=lambda x, t: grid(x, 1000 * t).sample,
        guidance_scale=float(settings["guidance_scale"]),
        guidance="cfg",
    )
    return unpatchify(patches, patch, (side, side)).clamp(-1, 1)


@torch.no_grad()
def macs(work: Callable[[], object]) -> float:
    """Multiply-adds of `work` in matrix products and convolutions, attention's included, by torch's own counter."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2


_RUN: dict[str, Callable[[Given, Mapping[str, Any]], tuple[dict[str, Any], Any]]] = {
    "reconstruct": _reconstruct,
    "generate": _generate,
    "captions": _captions,
    "grid": _grid,
    **bench_codes.RUN,
}


# -- table ------------------------------------------------------------------------------------------------------------


def show(results: Mapping[str, Any]) -> str:
    """A table an experiment, with what its columns mean."""
    cards = results["cards"]
    lines = [
        f"{cards['count']} {cards['split']} cards (seed {cards['seed']}), {results['machine']['speed_threads']} thread "
        f"for speed, torch {results['machine']['torch']}"
    ]
    for name, (header, rows, legend) in tables(results).items():
        settings = results["experiments"][name]["settings"]
        used = ", ".join(f"{key}={value:g}" for key, value in settings.items())
        lines += ["", f"{name.upper()}" + (f" ({used})" if used else ""), "", table(header, rows), ""]
        lines += textwrap.wrap(legend, 118)
    return "\n".join(lines)


def tables(results: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[list[str]]], str]]:
    """{experiment: (header, groups of rows of cells, what the columns mean)}."""
    return {name: (*_TABLES[name](found), LEGEND[name]) for name, found in results["experiments"].items()}


def _read(row: Mapping[str, Any]) -> str:
    return percent(row["agreement"], row["agreement_se"])


_Table = tuple[list[str], list[list[list[str]]]]


def _back_table(found: Mapping[str, Any]) -> _Table:
    compared = any("vs_right" in row for row in found["rows"])
    header = ["FlexTok" if not compared else "TexTok", "bytes", "PSNR dB", "SSIM", "reads the digit %"]
    rows = [[*cells(row), _read(row), *([_decibels(row.get("vs_right"))] if compared else [])] for row in found["rows"]]
    last = ["the cards", "", "", "", _read(found["cards"]), *([""] if compared else [])]
    return [*header, *(["vs right dB"] if compared else [])], [rows, [last]]


def _decibels(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    mark = ("*" if found["difference"] > 0 else "!") if found["significant"] else " "
    return f"{found['difference']:+.2f} ±{found['se']:.2f} {mark}"


def _draw_table(found: Mapping[str, Any]) -> _Table:
    rows = [[f"{row['tokens']}", _read(row)] for row in found["rows"]]
    return ["tokens", "agreement %"], [rows, [["the cards", _read(found["cards"])]]]


def _grid_table(found: Mapping[str, Any]) -> _Table:
    rows = []
    for row in found["rows"]:
        speed = [f"{row[name]:.2f}x" if name in row else "" for name in ("speedup", "limit")]
        count = f"{row['parameters'] / 1e6:.2f}"
        macs = [f"{row[name]:.4f}" for name in ("step_gmacs", "gmacs")]
        rows.append([row["label"], count, _read(row), *macs, f"{row['ms']:.1f}", *speed])
    header = ["DiT on", "M parameters", "agreement %", "GMACs a step", "GMACs", "ms", "speed-up", "limit"]
    return header, [rows, [["the cards", "", _read(found["cards"]), *[""] * 5]]]


_TABLES: dict[str, Callable[[Mapping[str, Any]], _Table]] = {
    "reconstruct": _back_table,
    "generate": _draw_table,
    "captions": _back_table,
    "grid": _grid_table,
    **bench_codes.TABLES,
}
