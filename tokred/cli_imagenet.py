"""The command `tokred eval imagenet`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokred.cli_eval import add_method, add_task, default_out, methods, print_results

__all__ = ["add_imagenet"]


def add_imagenet(tasks: Any, common: argparse.ArgumentParser) -> None:
    """Add ``imagenet`` to the tasks of ``tokred eval``."""
    made = add_task(
        tasks,
        common,
        "imagenet",
        _imagenet,
        "top-1 and top-5 of a classifier under methods, on ImageNet or images of yours",
        """
        Classify labelled images with the unpatched model and under each method: top-1, top-5 and agreement with the
        unpatched model (with standard errors), GMACs, images a second, beside what papers report. Prints a table (or
        --json) and writes results.json and a record of every image to --out. The same command goes on after a kill.
        Processes of accelerate launch --multi_gpu --num_processes N -m tokred.cli eval imagenet ... share the images.

          tokred eval imagenet
          tokred eval imagenet --data ILSVRC2012_img_val.tar --labels ILSVRC2012_devkit_t12.tar.gz \\
              --model deit_small_patch16_224 --method "tome r=8|13|16" --method "zero_tprune preset=deit_s_3.08g"
          tokred eval imagenet --data /data/imagenet/val --model vit_base_patch16_224 --paper
          tokred eval imagenet --data hf:ILSVRC/imagenet-1k --model openclip:ViT-B-32/laion2b_s34b_b79k
        """,
    )
    made.add_argument(
        "--data",
        default="scenes",
        help="a folder of class folders, a tar (ILSVRC2012_img_val.tar, read where it lies), hf:<id or folder> of a "
        "data set, which is streamed, or the bundled scenes (default: %(default)s)",
    )
    made.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="of a tar or flat folder: the devkit (archive or folder), ids in order, or lines of a name and a class",
    )
    made.add_argument(
        "--class-map",
        type=Path,
        metavar="FILE",
        help="lines of a class folder's name and its number in the model",
    )
    made.add_argument("--split", help="of a data set (default: validation) or of the scenes (test, val; default: test)")
    made.add_argument("--config", metavar="NAME", help="of a data set")
    made.add_argument("--image-column", metavar="NAME", help="of a data set (default: found)")
    made.add_argument("--label-column", metavar="NAME", help="of a data set (default: found)")
    made.add_argument(
        "--count", type=int, metavar="N", help="evaluate so many images only, evenly spaced (default: all; 1000 scenes)"
    )
    made.add_argument("--seed", type=int, default=777, help="of the scenes (default: %(default)s)")
    made.add_argument(
        "--model",
        default="digit-vit",
        help="a bundled model (digit-vit, digit-clip, digit-strip-mlp, ...), a timm architecture, hf:<id or folder>, "
        "or openclip:ARCHITECTURE/WEIGHTS, zero-shot (default: %(default)s)",
    )
    made.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights for the timm architecture")
    made.add_argument("--random-weights", action="store_true", help="a dry run of a timm architecture")
    made.add_argument("--image-size", type=int, metavar="N", help="run a timm model at N x N pixels")
    made.add_argument(
        "--templates",
        metavar="full|simple",
        help="wordings of a class, openclip (default: full, 80)",
    )
    add_method(made, '"tome r=8", "topk keep_rate=0.7", "zero_tprune keep_rate=0.7"')
    made.add_argument("--paper", action="store_true", help="the rows that papers report for this model")
    made.add_argument(
        "--batch",
        type=int,
        default=32,
        metavar="N",
        help="images at once, part of what is measured (default: %(default)s)",
    )
    made.add_argument("--workers", type=int, metavar="N", help="processes that decode (default: one a core, up to 8)")
    made.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    made.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    made.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be read; list them")
    made.add_argument("--fresh", action="store_true", help="forget the records in --out instead of going on")
    made.add_argument("--out", type=Path, metavar="DIR", help="default: outputs/eval-imagenet-MODEL")


def _imagenet(given: argparse.Namespace) -> None:
    from tokred.eval.bench import Progress
    from tokred.eval.classifiers import Choice
    from tokred.eval.imagenet import ImagenetOptions, run, show
    from tokred.eval.imagenet_data import Source

    options = ImagenetOptions(
        out=given.out or default_out("imagenet", given.model),
        source=Source(
            given.data,
            given.labels,
            given.class_map,
            given.split,
            given.config,
            given.image_column,
            given.label_column,
            given.count,
            given.seed,
        ),
        model=Choice(given.model, given.checkpoint, given.random_weights, given.image_size, given.templates),
        runs=methods(given),
        paper=given.paper,
        batch=given.batch,
        workers=given.workers,
        device=given.device,
        dtype=given.dtype,
        skip_unreadable=given.skip_unreadable,
        fresh=given.fresh,
    )
    with Progress() as progress:
        results = run(options, progress)
    print_results(given, results, show)
