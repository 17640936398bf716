"""Compare backbones trained on the bundled scenes with the bundled ViT, plain and patched, at equal GMACs.

    python -m tokred.vision.backbones.compare                          # the bundled backbones
    python -m tokred.vision.backbones.compare runs/strip_mlp runs/lookup_vit runs/dualtoken_vit --out backbones.json

Each argument is the folder of a run of `tokred.vision.backbones.train`, by default those that ship with tokred; a
LookupViT has one row for each grid that it was trained at. Below every such row stand the bundled digit-scene ViT's
patched forms whose multiply-adds come nearest to it. All rows see the same held-out scenes: beside the accuracy and its
standard error over scenes stands the paired difference to the unpatched ViT. Images/s is a median over rounds; in each,
every row is timed beside the unpatched ViT on the same batch, and the speed-up is the median of the ratios. One seed of
training says nothing about the spread over seeds: give the folders of several.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tokred.core.budget import check_choice, check_count
from tokred.core.errors import InvalidParameterError, TokredError
from tokred.core.flops import encoder_info, encoder_macs
from tokred.core.method import EncoderMethod
from tokred.core.patch import patch
from tokred.core.sites import EncoderInfo
from tokred.data.scenes import DigitScenes, normalize
from tokred.eval.cost import MATCHED, match_cost
from tokred.eval.report import dumps, percent, signed, table
from tokred.eval.speed import pairs, ratio
from tokred.eval.vision import Pass, mean, measure, paired, side_by_side
from tokred.vision.backbones.trained import grid_name, load_trained, parse_grids
from tokred.zoo.digit_backbones import FOLDER as BUNDLED
from tokred.zoo.digit_backbones import bundled_runs
from tokred.zoo.digit_vit import digit_vit

__all__ = ["compare", "macs", "show"]

SIZE = 96
METHODS = ("tome", "topk", "zero_tprune")
#: A patched form is left out if its multiply-adds are farther from the row's than this share of the unpatched ViT's.
NEAR = 0.05


@dataclass(frozen=True, eq=False)
class _Row:
    """One line of the table before it is measured; `grid` of a LookupViT, `method` of the bundled ViT."""

    label: str
    setting: str
    model: nn.Module
    gmacs: float
    grid: tuple[int, int] | None = None
    method: EncoderMethod | None = None
    source: str | None = None

    def ready(self) -> nn.Module:
        """The model, at this row's grid."""
        if self.grid is not None:
            self.model.set_compressed_grid(self.grid)  # type: ignore[operator]
        return self.model

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


@torch.no_grad()
def macs(model: nn.Module, size: int = SIZE) -> int:
    """Multiply-adds of one image (3, size, size) in matrix products and convolutions, by torch's own counter.

    The convention of `tokred.flops`: for a plain ViT both give the same number.
    """
    twin = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        twin(torch.zeros(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2


def compare(
    folders: Sequence[str | Path],
    *,
    scenes: int = 1000,
    split: str = "test",
    seed: int = 777,
    methods: Sequence[str] = METHODS,
    grids: Sequence[tuple[int, int]] | None = None,
    batch: int = 16,
    rounds: int = 7,
    workers: int = 1,
    progress: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Measure every row; JSON types.

    Args:
        folders: of finished runs on scenes. scenes, split, seed: the held-out scenes.
        methods: of `tokred.eval.cost.MATCHED`, the bundled ViT's patched forms; () is none.
        grids: of every LookupViT; None is those that each was trained at.
        batch, rounds: of the timing. workers: rows whose accuracy is measured side by side, in threads.
        progress: called with a line of text as the work goes on.

    Raises:
        InvalidParameterError: a folder holds no finished run or one on other data; a number outside its range.
        UnknownMethodError: a method cannot be set to a cost.
    """
    for name, value, least in (
        ("scenes", scenes, 2),
        ("seed", seed, 0),
        ("batch", batch, 1),
        ("rounds", rounds, 1),
        ("workers", workers, 1),
    ):
        check_count(name, value, least)
    check_choice("split", split, ("test", "val"))
    for method in methods:
        check_choice("methods", method, tuple(MATCHED))
    if not folders:
        raise InvalidParameterError("folders=(): expected at least one folder of a finished run")
    groups, left_out = _groups(folders, methods, grids)
    drawn = DigitScenes(split, seed).render(scenes)
    rows = [row for group in groups for row in group]

    def hit(_: None, job: tuple[int, _Row]) -> Tensor:
        number, row = job
        progress(f"{number + 1}/{len(rows)} accuracy of {row.label} {row.setting}")
        own = replace(row, model=copy.deepcopy(row.model))  # rows share models, whose grid is theirs to set
        return measure(own.ready(), [Pass(row.method)], drawn.images, drawn.labels, normalize)[0]

    hits = side_by_side(None, hit, list(enumerate(rows)), workers)
    progress(f"speed, {rounds} rounds of {len(rows)} rows")
    times = _times(rows, normalize(drawn.images[:batch]), rounds)
    found = [_result(row, hits[i], hits[0], times[i], min(batch, scenes), i == 0) for i, row in enumerate(rows)]
    cells = iter(found)
    return {
        "scenes": {"count": scenes, "split": split, "seed": seed},
        "machine": {
            "torch": torch.__version__,
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "batch": min(batch, scenes),
            "rounds": rounds,
        },
        "groups": [[next(cells) for _ in group] for group in groups],
        "left_out": left_out,
    }


def _groups(
    folders: Sequence[str | Path], methods: Sequence[str], grids: Sequence[tuple[int, int]] | None
) -> tuple[list[list[_Row]], list[str]]:
    """The bundled ViT alone, then for each trained row itself and the ViT's patched forms of its cost; and which of
    these there are not."""
    vit = digit_vit()
    info = encoder_info(vit)
    full = encoder_macs(info).total
    groups = [[_Row("digit-vit", "unpatched", vit, full / 1e9)]]
    left_out: list[str] = []
    for folder in folders:
        for row in _trained(Path(folder), grids):
            share = row.gmacs * 1e9 / full
            group = [row]
            for name in methods:
                patched = _patched(vit, info, name, share)
                if patched is None:
                    left_out.append(f"{name} at {row.gmacs:.3f} GMACs")
                else:
                    group.append(patched)
            groups.append(group)
    return groups, left_out


def _patched(vit: nn.Module, info: EncoderInfo, name: str, share: float) -> _Row | None:
    """The method nearest to a share of the multiply-adds; None where none comes near."""
    try:
        method = match_cost(name, info, share)
        cost = encoder_macs(info, method)
    except InvalidParameterError:  # more than the unpatched model's, or too few for a schedule of this method
        return None
    if abs(cost.total / cost.unreduced - share) > NEAR:
        return None
    return _Row("digit-vit", repr(method), vit, cost.total / 1e9, method=method)


def _trained(folder: Path, grids: Sequence[tuple[int, int]] | None) -> list[_Row]:
    model, record = load_trained(folder)
    run = record["run"]
    if run["data"] != "scenes":
        raise InvalidParameterError(f"{folder} was trained on {run['data']}: only runs on scenes can be compared here")
    source = f"bundled {folder.name}" if folder.parent == BUNDLED else str(folder)  # no path of this machine
    label, trained = f"{run['model']} seed {run['seed']}", run["recipe"]["grids"]
    if not trained:
        return [_Row(label, "", model, macs(model) / 1e9, source=source)]
    rows = []
    for height, width in grids or trained:
        model.set_compressed_grid((height, width))  # type: ignore[operator]
        name = f"grid {grid_name((height, width))}"
        rows.append(_Row(label, name, model, macs(model) / 1e9, grid=(height, width), source=source))
    return rows


@torch.inference_mode()
def _times(rows: Sequence[_Row], images: Tensor, rounds: int) -> list[list[tuple[float, float]]]:
    """Seconds a batch of (the first row, this row), in each round."""

    def seconds(row: _Row) -> float:
        model = row.ready()
        with patch(model, row.method) if row.method is not None else nullcontext():
            start = time.perf_counter()
            model(images)
            return time.perf_counter() - start

    found = pairs(
        [str(i) for i in range(len(rows))], lambda _: seconds(rows[0]), lambda i: seconds(rows[int(i)]), rounds
    )
    return [found[str(i)] for i in range(len(rows))]


def _result(
    row: _Row, hits: Tensor, reference: Tensor, times: list[tuple[float, float]], images: int, first: bool
) -> dict[str, Any]:
    accuracy = mean(hits)
    middle, low, high = ratio(times)
    return {
        "model": row.label,
        "setting": row.setting,
        "method": row.method.to_dict() if row.method is not None else None,
        "folder": row.source,
        "parameters": row.parameters,
        "gmacs": row.gmacs,
        "accuracy": accuracy.value,
        "se": accuracy.error,
        "against_unpatched": None if first else paired(hits, reference).to_dict(),
        "images_per_s": images / statistics.median(mine for _, mine in times),
        "speedup": None if first else {"median": middle, "quartiles": [low, high]},
    }


HEADER = ("model", "setting", "M param", "GMACs", "accuracy %", "vs digit-vit", "images/s", "speed-up")


def show(results: dict[str, Any]) -> str:
    """The results as a table of text, with a line of explanation."""
    groups = [[_cells(row) for row in group] for group in results["groups"]]
    machine, scenes = results["machine"], results["scenes"]
    missing = f"\nout of reach of the patched ViT: {'; '.join(results['left_out'])}" if results["left_out"] else ""
    return (
        f"{table(HEADER, groups, left=2)}\n"
        f"{scenes['count']} {scenes['split']} scenes; accuracy ± standard error over scenes; vs digit-vit: paired "
        "difference in points, * better and ! worse by more than two standard errors\n"
        f"batch {machine['batch']}, {machine['threads']} thread(s), {machine['rounds']} interleaved rounds{missing}"
    )


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["model"],
        row["setting"],
        f"{row['parameters'] / 1e6:.2f}",
        f"{row['gmacs']:.3f}",
        percent(row["accuracy"], row["se"]),
        signed(row["against_unpatched"]),
        f"{row['images_per_s']:.0f}",
        "" if row["speedup"] is None else f"{row['speedup']['median']:.2f}x",
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; the result is that of `compare`."""
    parser = argparse.ArgumentParser(
        prog="python -m tokred.vision.backbones.compare", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="folder of a run of tokred.vision.backbones.train; default: the bundled backbones",
    )
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--split", default="test", help="test or val")
    parser.add_argument("--seed", type=int, default=777, help="of the scenes")
    parser.add_argument("--methods", default=",".join(METHODS), help='of the patched ViT; "" is none')
    parser.add_argument("--grids", help="of every LookupViT, such as 3,5,7x4; default: those of its training")
    parser.add_argument("--batch", type=int, default=16, help="images of a timed batch")
    parser.add_argument("--rounds", type=int, default=7, help="of the timing")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        results = compare(
            args.folders or bundled_runs(),
            scenes=args.scenes,
            split=args.split,
            seed=args.seed,
            methods=[name for name in args.methods.split(",") if name],
            grids=parse_grids(args.grids) if args.grids else None,
            batch=args.batch,
            rounds=args.rounds,
            progress=lambda line: print(line, file=sys.stderr),
        )
    except TokredError as error:
        parser.error(str(error))
    print(show(results))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(dumps(results) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
