"""`tokred eval imagenet`: accuracy of a classifier under methods on labelled images, beside what papers say.

All rows see a batch before the next is loaded: an image is decoded once, and speeds are compared moments apart. What
each row says of an image is on the disk as soon as its batch is done (`tokred.eval.records`), so that a run that was
killed goes on, and several processes (`accelerate launch`) share the batches out; the numbers are those of one run.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokred.core.errors import InvalidParameterError, TokredError, UnsupportedModelError
from tokred.core.flops import Flops, flops
from tokred.core.method import Method
from tokred.core.patch import Patch, patch
from tokred.eval.bench import Progress, require
from tokred.eval.classifiers import Choice, Classifier, load_classifier
from tokred.eval.clock import Clock, spent
from tokred.eval.imagenet_data import Batch, ImageData, Source, open_images
from tokred.eval.imagenet_reported import Reported, paper_runs, reported
from tokred.eval.processes import Processes, finish, join
from tokred.eval.records import LEFT_OUT, Key, Records, check_out, claim, complete, identity, read
from tokred.eval.report import percent, table, token_chain
from tokred.eval.runs import Chosen, Run, choose, drawn, redrawn
from tokred.eval.vision import Estimate, mean

__all__ = ["DEFAULT_RUNS", "ImagenetOptions", "run", "show"]

UNPATCHED = "unpatched"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: where --method does not say: settings that every depth has
DEFAULT_RUNS: tuple[Run, ...] = (("tome", {"r": 8}), ("topk", {"keep_rate": 0.7}), ("zero_tprune", {"keep_rate": 0.7}))


@dataclass(frozen=True)
class ImagenetOptions:
    """What `tokred eval imagenet` was asked for.

    Attributes:
        out: folder of the records and results. source: the images. model: the classifier.
        runs: methods with parameters; None is `DEFAULT_RUNS` where the model has a host. paper: those that papers
            report for this model, too.
        batch: images a forward pass, a part of what is measured: sums differ in their last bits with it.
        workers: processes that decode images; None is one a core, up to 8, and none for scenes.
        device: None is CUDA where there is one. dtype: of model and images.
        skip_unreadable: leave unreadable images out instead of stopping. fresh: forget the records in `out`.
    """

    out: Path
    source: Source = field(default_factory=Source)
    model: Choice = field(default_factory=Choice)
    runs: Sequence[Run] | None = None
    paper: bool = False
    batch: int = 32
    workers: int | None = None
    device: str | None = None
    dtype: str = "float32"
    skip_unreadable: bool = False
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InvalidParameterError(f"--batch {self.batch}: expected at least 1")
        if self.workers is not None and self.workers < 0:
            raise InvalidParameterError(f"--workers {self.workers}: expected 0 (this process) or more")
        if self.dtype not in DTYPES:
            raise InvalidParameterError(f"--dtype {self.dtype}: expected one of {', '.join(DTYPES)}")


class _Row:
    """One line of the table: a model under a method, and what it said of each image."""

    def __init__(self, label: str, method: Method | None, model: nn.Module, handle: Patch | None) -> None:
        self.label, self.method, self.model, self.handle = label, method, model, handle
        self.records: Records | None = None

    def lacks(self, keys: Sequence[Key]) -> bool:
        assert self.records is not None
        return not all(key in self.records for key in keys)

    def leave_out(self, unreadable: Sequence[tuple[int, int, str, str]]) -> None:
        """Note images that were left out; a later run looks at them again."""
        assert self.records is not None
        self.records.append(
            {"key": key, "label": label, LEFT_OUT: f"{name}: {reason}"}
            for key, label, name, reason in unreadable
            if key not in self.records
        )


def run(options: ImagenetOptions, progress: Progress) -> dict[str, Any] | None:
    """Evaluate, write results.json into `options.out` and return the results (JSON types).

    Call it in every process of a distributed run; all but the first return None.

    Raises:
        InvalidParameterError, UnknownMethodError, FileNotFoundError ...: what was asked for cannot be had; said before
            anything is measured, except of images that cannot be read.
    """
    require("eval", "torchvision", "tqdm", what="tokred eval imagenet")
    began = time.perf_counter()
    methods = [choose(one) for one in options.runs or ()]
    options.source.check()
    check_out(options.out)
    here = join(options.device)
    classifier = _classifier(options, here)
    rows = _rows(options, classifier, methods)
    data = open_images(options.source, classifier.classes, classifier.class_names)
    size = _image_size(classifier)
    settings = {
        "task": "imagenet",
        "model": classifier.name,
        **identity(classifier.model, here.device, *_packages(classifier.name)),
        "templates": options.model.templates or "full" if classifier.name.startswith("openclip:") else None,
        "image_size": list(size),
        "images": data.facts,
        "batch": options.batch,
        "dtype": options.dtype,
    }
    if here.first:
        claim(options.out, settings, options.fresh)
    here.wait()
    clock = Clock()
    for row in rows:
        row.records = Records(options.out, row.label, here.rank)
    here.wait()  # nobody writes before all have read
    try:
        with clock.running():
            _evaluate(rows, classifier, data, options, here, clock, progress)
    finally:
        for row in rows:
            row.records.close()  # type: ignore[union-attr]
    here.wait()
    if not here.first:
        here.leave()
        return None
    results = _results(rows, classifier, data, size, options, here, clock)
    return finish(here, results, options.out, began)


# -- rows --------------------------------------------------------------------------------------------------------------


def _classifier(options: ImagenetOptions, here: Processes) -> Classifier:
    """Load it in the first process before the others: what it fetches or encodes is there for them."""
    if not here.first:
        here.wait()
    found = load_classifier(options.model, here.device, options.out / "texts")
    if here.first:
        here.wait()
    found.model.to(here.device, DTYPES[options.dtype]).requires_grad_(False)
    return found


def _rows(options: ImagenetOptions, classifier: Classifier, methods: Sequence[Chosen]) -> list[_Row]:
    rows = [_Row(UNPATCHED, None, classifier.model, None)]
    wanted = list(methods)
    if options.paper:
        wanted += [choose(one) for one in paper_runs(classifier.architecture, classifier.tag)]
        if len(wanted) == len(methods):
            raise InvalidParameterError(f"--paper: no paper that we know of reports a method on {classifier.name}")
    elif options.runs is None and _has_host(classifier.model):
        wanted = [choose(one) for one in DEFAULT_RUNS]
    for label, method, chosen in wanted:
        if all(label != row.label for row in rows):
            model = _sharing(classifier.model)
            rows.append(_Row(label, method, model, patch(model, method, **chosen)))
    return rows


def _packages(name: str) -> tuple[str, ...]:
    """What decodes, transforms and computes, besides torch."""
    if name.startswith("hf:"):
        kind = "transformers"
    elif name.startswith("openclip:") or name == "digit-clip":
        kind = "open_clip_torch"
    else:
        kind = "timm"
    return kind, "torchvision", "pillow"


def _has_host(model: nn.Module) -> bool:
    from tokred.adapters.registry import find_host

    try:
        find_host(model)
    except UnsupportedModelError:
        return False
    return True


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every weight: each row stays patched, and none takes memory of its own."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _image_size(classifier: Classifier) -> tuple[int, int]:
    from PIL import Image

    height, width = classifier.transform(Image.new("RGB", (256, 256))).shape[-2:]
    return int(height), int(width)


# -- the loop ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _evaluate(
    rows: Sequence[_Row],
    classifier: Classifier,
    data: ImageData,
    options: ImagenetOptions,
    here: Processes,
    clock: Clock,
    progress: Progress,
) -> None:
    done = frozenset.intersection(*(frozenset(row.records.done) for row in rows))  # type: ignore[union-attr]
    if here.first:
        left = None if data.total is None else max(data.total - len(done), 0)
        progress.start("images", left, "images")  # type: ignore[arg-type]
    workers = options.workers
    if workers is None:
        workers = 0 if options.source.data == "scenes" else min(8, len(_cores()))
    pin = here.device.type == "cuda"
    loader = data.batches(classifier.transform, options.batch, workers, here.rank, here.count, done, pin)
    dtype, best = DTYPES[options.dtype], min(5, classifier.classes)
    for seen, batch in enumerate(_timed(loader, clock)):
        if batch.unreadable and not options.skip_unreadable:
            _, _, name, reason = batch.unreadable[0]
            raise InvalidParameterError(
                f"{name} cannot be read as a picture: {reason}; mend it and run the same command again to go on, or "
                "leave such images out: --skip-unreadable"
            )
        first = batch.number % len(rows)  # takes turns, so that no row always comes first
        for row in (*rows[first:], *rows[:first]):
            if row.lacks(batch.keys):
                _one(row, batch, here.device, dtype, best, clock, warm=seen > 0)
            row.leave_out(batch.unreadable)
        if here.first:
            progress.advance(here.count * (len(batch.keys) + len(batch.unreadable)))
    progress.stop()


def _cores() -> Sequence[int]:
    import os

    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _timed(loader: Any, clock: Clock) -> Iterator[Batch]:
    """The loader's batches; an error of a worker process is told as if it were one of this process."""
    batches = _fetched(loader)
    while True:
        try:
            with clock.loading():
                batch = next(batches, None)
        except TokredError as error:
            text = str(error)
            if "Original Traceback" not in text:
                raise
            raise InvalidParameterError(text.rstrip().splitlines()[-1].partition("Error: ")[2]) from None
        if batch is None:
            return
        yield batch


def _fetched(loader: Any) -> Iterator[Batch]:
    """All that is the loader's, start of its workers included (profilers find it by this name)."""
    yield from loader


def _one(
    row: _Row, batch: Batch, device: torch.device, dtype: torch.dtype, best: int, clock: Clock, warm: bool
) -> None:
    """One batch through one row, and its records."""
    if row.handle is not None and row.method is not None and drawn(row.method):
        row.handle.replace(redrawn(row.method, batch.number))
    began = time.perf_counter()
    top = _predicted(row.model, batch.images, device, dtype, best)
    seconds = time.perf_counter() - began
    clock.model += seconds
    # the first batch of a process waits for kernels and memory: its time says nothing
    each = round(1000 * seconds / len(batch.keys), 4) if warm else None
    assert row.records is not None
    row.records.append(
        {"key": key, "label": label, "top": found, "batch": batch.number, "ms": each}
        for key, label, found in zip(batch.keys, batch.labels, top, strict=True)
    )


def _predicted(
    model: nn.Module, images: Tensor, device: torch.device, dtype: torch.dtype, best: int
) -> list[list[int]]:
    """All that is the model's: images to the device, forward pass, best classes back."""
    return model(images.to(device, dtype, non_blocking=True)).float().topk(best).indices.tolist()


# -- results -----------------------------------------------------------------------------------------------------------


def _results(
    rows: Sequence[_Row],
    classifier: Classifier,
    data: ImageData,
    size: tuple[int, int],
    options: ImagenetOptions,
    here: Processes,
    clock: Clock,
) -> dict[str, Any]:
    found = {row.label: read(options.out, row.label) for row in rows}
    if "list" in data.facts and data.total is not None:  # a stream may say a wrong number
        keys: list[Key] = list(range(data.total))
    else:
        keys = sorted(set().union(*found.values()), key=int)
    for own in found.values():
        complete(own, keys, options.out, here.count)
    left_out = {key: own[key][LEFT_OUT] for key in keys for own in found.values() if LEFT_OUT in own[key]}
    unreadable = list(left_out.values())
    seen = [key for key in keys if key not in left_out]
    if not seen:
        raise InvalidParameterError(
            f"none of the {len(keys)} images of {options.source.data} can be read; the first is {unreadable[0]}"
        )
    plain = found[UNPATCHED]
    known = classifier.weights != "random" and classifier.classes == 1000
    measured = []
    for row in rows:
        mine = found[row.label]
        cost = _cost(classifier.model, row.method, size)
        paper = reported(classifier.architecture, classifier.tag, row.method) if known else None
        measured.append(
            {
                "row": row.label,
                "method": None if row.method is None else row.method.to_dict(),
                **_accuracy([mine[key] for key in seen], [plain[key] for key in seen], drawn(row.method)),
                **_counted(cost),
                **_speed([mine[key] for key in seen], [plain[key] for key in seen]),
                **_said(paper),
            }
        )
    return {
        "task": "imagenet",
        "model": classifier.name,
        "weights": classifier.weights,
        "classes": classifier.classes,
        "image_size": list(size),
        "images": len(seen),
        "unreadable": unreadable,
        "data": data.facts,
        "machine": {
            "torch": torch.__version__,
            "device": str(here.device),
            "dtype": options.dtype,
            "processes": here.count,
            "batch": options.batch,
        },
        "rows": measured,
        "time": clock.to_dict(),
        "files": {"results": str(options.out / "results.json"), "records": str(options.out / "records")},
    }


def _accuracy(mine: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]], by_batch: bool) -> dict[str, Any]:
    """Shares with standard errors; images of one random draw count as one group (`tokred.eval.vision.mean`)."""
    groups = torch.tensor([record["batch"] for record in mine]) if by_batch else None

    def share(name: str, hits: list[bool]) -> dict[str, float]:
        found: Estimate = mean(torch.tensor(hits), groups)
        return {name: found.value, f"{name}_se": found.error}

    return {
        **share("top1", [record["top"][0] == record["label"] for record in mine]),
        **share("top5", [record["label"] in record["top"] for record in mine]),
        **share("agreement", [a["top"][0] == b["top"][0] for a, b in zip(mine, plain, strict=True)]),
    }


def _cost(model: nn.Module, method: Method | None, size: tuple[int, int]) -> Flops | None:
    try:
        return flops(model, size, method)
    except UnsupportedModelError:  # a family that cannot be counted can still be evaluated
        return None


def _counted(cost: Flops | None) -> dict[str, Any]:
    if cost is None:
        return {"gmacs": None, "gmacs_fraction": None, "tokens": None}
    tokens = [cost.tokens[0][0], *(leaving for _, leaving in cost.tokens)] if cost.tokens else None
    return {"gmacs": cost.total / 1e9, "gmacs_fraction": cost.total / cost.unreduced, "tokens": tokens}


def _speed(mine: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Images a second in the model, of one process; the speed-up is over the images that both were timed on."""
    own = [record["ms"] for record in mine if record["ms"] is not None]
    both = [(a["ms"], b["ms"]) for a, b in zip(mine, plain, strict=True) if a["ms"] is not None and b["ms"] is not None]
    per_second = 1000 * len(own) / math.fsum(own) if own and math.fsum(own) else None
    mine_both = math.fsum(a for a, _ in both)
    return {
        "images_per_s": per_second,
        "speedup": math.fsum(b for _, b in both) / mine_both if mine_both else None,
    }


def _said(paper: Reported | None) -> dict[str, Any]:
    return {
        "paper_top1": paper.top1 if paper else None,
        "paper_top5": paper.top5 if paper else None,
        "paper_gmacs": paper.gmacs if paper else None,
        "paper_source": paper.source if paper else None,
    }


def show(results: Mapping[str, Any]) -> str:
    """The table, with what its columns mean."""
    header = [
        "row",
        "tokens",
        "GMACs",
        "paper",
        "top-1 %",
        "paper",
        "top-5 %",
        "paper",
        "agreement %",
        "img/s",
        "speed",
    ]
    cells = [_cells(row) for row in results["rows"]]
    empty = {i for i, name in enumerate(header) if name == "paper" and not any(line[i] for line in cells)}
    cells = [[cell for i, cell in enumerate(line) if i not in empty] for line in cells]
    header = [name for i, name in enumerate(header) if i not in empty]
    machine, data = results["machine"], results["data"]
    weights = "" if results["weights"] == "bundled" else f" ({results['weights']} weights)"
    several = f", {machine['processes']} processes" if machine["processes"] > 1 else ""
    lines = [
        f"{results['model']}{weights}: {results['images']} images of {data['data']}, {machine['device']}, "
        f"{machine['dtype']}, batches of {machine['batch']}{several}, torch {machine['torch']}",
        "",
        table(header, [cells[:1], cells[1:]] if cells[1:] else [cells], left=2),
        "",
        "± one standard error. agreement: the same class as the unpatched model, right or wrong. GMACs: with scoring.",
        "tokens: those that attend, prefix included, by block. img/s: in the model, one process; speed: against the",
        "unpatched model on the same batches.",
    ]
    sources = {row["paper_source"]: None for row in results["rows"] if row["paper_source"]}
    if sources:
        lines.append(f"paper: {'; '.join(sources)}.")
    lines += spent(results["time"])
    if results["unreadable"]:
        names = results["unreadable"]
        more = f" and {len(names) - 3} more (results.json)" if len(names) > 3 else ""
        lines.append(f"unreadable and left out: {'; '.join(names[:3])}{more}.")
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    def paper(name: str) -> str:
        return "" if row[name] is None else f"{row[name]:.4g}"

    macs = "" if row["gmacs"] is None else f"{row['gmacs']:.3g} ({row['gmacs_fraction']:.0%})"
    return [
        row["row"],
        "" if row["tokens"] is None else token_chain(row["tokens"][0], row["tokens"][1:]),
        macs,
        paper("paper_gmacs"),
        percent(row["top1"], row["top1_se"]),
        paper("paper_top1"),
        percent(row["top5"], row["top5_se"]),
        paper("paper_top5"),
        percent(row["agreement"], row["agreement_se"]),
        "" if row["images_per_s"] is None else f"{row['images_per_s']:.4g}",
        "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
    ]
