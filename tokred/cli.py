"""The command `tokred`.

Heavy libraries are imported by the command that needs them. What tokred refuses ends as one line on stderr and exit
code 2; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tokred.cli_common import add_command, written

if TYPE_CHECKING:
    from tokred.eval.bench import Task

__all__ = ["main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 for what was refused (argparse exits with 2 itself)."""
    given = parser().parse_args(argv)
    from tokred.core.errors import TokredError

    try:
        given.run(given)
    except (TokredError, ImportError, OSError) as error:
        if given.debug:
            raise
        if isinstance(error, BrokenPipeError):  # `tokred list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"tokred {given.command}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _one_line(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f'{error.name} is not installed; run: pip install "tokred[demo]"'
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, as everything else that is refused."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The argument parser of the command."""
    from tokred import __version__
    from tokred.cli_generate import add_generate

    root = _Parser(
        prog="tokred",
        description="Token reduction for vision and multimodal models: what there is, what it keeps, what it costs.",
    )
    root.add_argument("--version", action="version", version=f"tokred {__version__}")
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common = argparse.ArgumentParser(add_help=False, parents=[debug])
    common.add_argument("--json", action="store_true", help="print JSON to stdout and nothing else there")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_list(commands, common)
    _add_bench(commands, common)
    _add_inspect(commands, common)
    _add_flops(commands, common)
    _add_encode(commands, common)
    _add_decode(commands, common)
    add_generate(commands, common)
    _add_eval(commands, common)
    _add_demo(commands, debug)
    return root


def _setting(text: str) -> tuple[str, Any]:
    """``key=value``; the value is a Python literal (0.5, 3,6,9, None, {1: (10, 0.9)}), else a string."""
    from tokred.eval.runs import literal

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no key=value")
    return key.strip(), literal(value)


def _method_setting(text: str) -> tuple[str, str, Any]:
    key, value = _setting(text)
    method, dot, name = key.partition(".")
    if not dot:
        raise argparse.ArgumentTypeError(f"{text!r} is no method.key=value, such as zero_tprune.vhf=None")
    return method, name, value


def _names(text: str) -> list[str]:
    return [name.strip().replace("-", "_") for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0.8,0.65,0.5") from None


# -- list --------------------------------------------------------------------------------------------------------------


def _add_list(commands: Any, common: argparse.ArgumentParser) -> None:
    add_command(
        commands,
        common,
        "list",
        _list,
        "methods, model families, and which fits which",
        """
        List the methods (with their parameters and defaults), the model families whose library is installed (with
        what they refuse, and why), and which method fits which family.
        """,
    )


def _list(given: argparse.Namespace) -> None:
    import tokred
    from tokred.core.catalog import compatibility
    from tokred.eval.report import dumps

    methods, hosts, fits = tokred.methods(), tokred.hosts(), compatibility()
    if given.json:
        records = [m.to_dict() for m in methods]
        print(dumps({"methods": records, "hosts": [h.to_dict() for h in hosts], "compatibility": fits}))
        return
    print("METHODS")
    for m in methods:
        print(f"\n{m.name}  (tokred.{m.cls}; acts at {', '.join(m.sites)})\n  {m.paper}")
        text = ", ".join(f"{key}={_shown(value)}" for key, value in m.parameters.items())
        print(textwrap.fill(text, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))
    print("\nMODEL FAMILIES")
    for h in hosts:
        print(f"\n{h.family}  (sites: {', '.join(h.sites)})")
        print(textwrap.fill(", ".join(h.classes), 118, initial_indent="  ", subsequent_indent="  "))
        for name, reason in h.refusals.items():
            print(f"  refused: {name}: {reason}")
    if not hosts:
        print('\nno model library is installed; run: pip install "tokred[timm]" (or openclip, transformers, diffusers)')
        return
    from tokred.eval.report import table

    print("\nWHICH FITS WHICH\n")
    rows = [[name, *("yes" if hosting[h.family] else "-" for h in hosts)] for name, hosting in fits.items()]
    print(table(["method", *(h.family for h in hosts)], [rows]))


def _shown(value: Any) -> str:
    return value if value == "required" else repr(value)


# -- demo --------------------------------------------------------------------------------------------------------------


def _add_demo(commands: Any, debug: argparse.ArgumentParser) -> None:
    made = add_command(
        commands,
        debug,
        "demo",
        _demo,
        "a web page on which the bundled models are reduced before your eyes",
        """
        Serve a web page (Gradio) on this machine: classify pictures, ask about pictures and videos, question a long
        text, turn pictures into tokens and back, compare methods. It works offline on the bundled models and
        examples; names of other models can be typed where the hub is reachable. Ctrl-C stops it.
        """,
    )
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    made.add_argument("--port", type=int, metavar="N", help="default: the first free one from 7860 on")
    made.add_argument("--device", default="cpu", help="for models of the hub, say cuda (default: %(default)s)")
    made.add_argument("--threads", type=int, metavar="N", help="of torch (default: half of the cores)")
    made.add_argument("--open", action="store_true", help="open the page in the browser")


def _demo(given: argparse.Namespace) -> None:
    from tokred.demo.server import DemoOptions, serve

    own = {} if given.threads is None else {"threads": given.threads}
    serve(DemoOptions(given.host, given.port, given.device, browser=given.open, **own))


# -- bench -------------------------------------------------------------------------------------------------------------


def _add_bench(commands: Any, common: argparse.ArgumentParser) -> None:
    from tokred.eval.bench import TASKS, BenchOptions

    made = add_command(
        commands,
        common,
        "bench",
        _bench,
        "accuracy, cost and speed of methods on bundled models and data",
        """
        Compare methods at equal cost on a bundled model and held-out data, offline: accuracy with its standard error,
        the paired difference to random dropping of as many tokens (video: to as many tokens of evenly spaced frames),
        tokens, GMACs, speed. Prints a table (or --json) and writes pictures and results.json to --out. The default of
        each task takes two to five minutes on two idle cores, of vqa, which has the most methods, about seven.

        With --all: all tasks on fewer examples, the bundled backbones, and merging in a diffusion model, as one page
        (leaderboard.html, with tables, plots and pictures in it) and leaderboard.json in --out, in less than ten
        minutes on two idle cores. A run that was cut short goes on where it stopped when it is started again with
        the same options.
        """,
    )

    def each(text: Callable[[Task], str]) -> str:
        return "; ".join(f"{name}: {text(found)}" for name, found in TASKS.items())

    def listed(numbers: Sequence[float]) -> str:
        return ",".join(f"{number:g}" for number in numbers)

    made.add_argument(
        "--all",
        action="store_true",
        help="every method on bundled models, as one page that says what is measured where; goes with --fast, --out, "
        "--threads, --seed, --split, --rounds and --json",
    )
    made.add_argument("--task", help=f"what to measure (default: vit). {each(lambda t: t.about)}")
    made.add_argument("--methods", type=_names, metavar="A,B", help=f"defaults: {each(lambda t: t.methods)}")
    made.add_argument(
        "--levels",
        type=_numbers,
        metavar="X,Y",
        help=each(lambda t: f"{t.level} (default: {listed(t.levels)})") + "; with --ablate 0.68",
    )
    made.add_argument(
        "--scenes",
        type=int,
        metavar="N",
        help=f"held-out scenes, questions or clips (defaults: {each(lambda t: str(t.scenes))}; with --ablate 2000)",
    )
    made.add_argument("--seed", type=int, default=BenchOptions.seed, help="of the scenes (default: %(default)s)")
    made.add_argument("--split", default="test", choices=("test", "val"), help="which scenes (default: test)")
    made.add_argument(
        "--threads",
        type=int,
        default=min(2, os.cpu_count() or 1),
        metavar="N",
        help="accuracy passes side by side (default here: %(default)s); speed is always measured on one thread",
    )
    made.add_argument(
        "--rounds",
        type=int,
        help=f"timed pairs a row (default: {BenchOptions.rounds}, --all: 3 to 5, --fast: 1)",
    )
    made.add_argument(
        "--set",
        dest="settings",
        action="append",
        type=_method_setting,
        default=[],
        metavar="METHOD.KEY=VALUE",
        help="another parameter of a method, e.g. zero_tprune.vhf=None; may be repeated",
    )
    made.add_argument("--ablate", metavar="METHOD", help="vit only: take a method apart instead: zero_tprune")
    made.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="other weights of the bundled architecture: a file (vit) or a folder as from save_pretrained",
    )
    own = "; ".join(f"{name}: {found.context}" for name, found in TASKS.items() if found.context)
    made.add_argument("--context", type=int, metavar="N", help=f"tokens of a context (defaults: {own})")
    dry = each(lambda t: f"{t.fast[1]} scenes at {listed(t.fast[0])}")
    made.add_argument("--fast", action="store_true", help=f"a dry run of seconds, one pair a row ({dry})")
    made.add_argument(
        "--out", type=Path, metavar="DIR", help="default: outputs/bench-TASK, with --all outputs/bench-all"
    )


def _bench(given: argparse.Namespace) -> None:
    import torch

    run = _bench_all if given.all else _bench_task
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # passes run side by side instead: two threads in one small model wait for each other
    try:
        run(given)
    finally:
        torch.set_num_threads(before)


def _bench_task(given: argparse.Namespace) -> None:
    from tokred.core.errors import InvalidParameterError
    from tokred.eval.bench import TASKS, BenchOptions, Progress, task

    name = given.task or "vit"
    module = task(name)
    if given.context is not None and TASKS[name].context is None:
        raise InvalidParameterError(f"--context: the task {name} does not take it")
    parameters: dict[str, dict[str, Any]] = {}
    for method, key, value in given.settings:
        parameters.setdefault(method.replace("-", "_"), {})[key] = value
    levels, scenes = TASKS[name].fast if given.fast else (None, None)
    rounds = (1 if given.fast else BenchOptions.rounds) if given.rounds is None else given.rounds
    options = BenchOptions(
        out=given.out or Path("outputs") / f"bench-{name}",
        methods=given.methods,
        levels=given.levels or levels,
        scenes=scenes if given.scenes is None else given.scenes,
        seed=given.seed,
        split=given.split,
        threads=given.threads,
        rounds=rounds,
        parameters=parameters,
        ablate=given.ablate.replace("-", "_") if given.ablate else None,
        checkpoint=given.checkpoint,
        context=given.context,
    )
    with Progress() as progress:
        results = module.run(options, progress)
    if given.json:
        from tokred.eval.report import dumps

        print(dumps(results))
        return
    print(module.show(results))
    written(results)


def _bench_all(given: argparse.Namespace) -> None:
    from tokred.core.errors import InvalidParameterError
    from tokred.eval.bench import BenchOptions, Progress

    for name in ("task", "methods", "levels", "scenes", "settings", "ablate", "checkpoint", "context"):
        if getattr(given, name) not in (None, []):
            flag = {"settings": "set"}.get(name, name)
            raise InvalidParameterError(f"--all runs every task as it is and does not take --{flag}; leave one out")
    options = BenchOptions(
        out=given.out or Path("outputs") / "bench-all",
        seed=given.seed,
        split=given.split,
        threads=given.threads,
        rounds=BenchOptions.rounds if given.rounds is None else given.rounds,  # checked here
    )
    from tokred.eval import leaderboard  # loads the tasks

    with Progress() as progress:
        results = leaderboard.run(options, progress, given.fast, given.rounds)
    if given.json:
        from tokred.eval.report import dumps

        print(dumps(results))
    else:
        print(leaderboard.show(results))
        written(results)
    if results["failed"]:
        names = ", ".join(results["failed"])
        raise leaderboard.IncompleteError(f"{names} failed; the page {results['files']['page']} says how, and lacks it")


def _add_settings(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--set",
        dest="settings",
        action="append",
        type=_setting,
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the method; may be repeated",
    )


# -- inspect -----------------------------------------------------------------------------------------------------------


def _add_inspect(commands: Any, common: argparse.ArgumentParser) -> None:
    made = add_command(
        commands,
        common,
        "inspect",
        _inspect,
        "a picture of what a method keeps of an image, layer by layer",
        """
        Run one image through a patched model; print tokens and GMACs by layer and write a picture: the input, then what
        is left after each reduction. Dropped patches fade, merged patches share their mean colour.

          tokred inspect --method zero_tprune --set keep_rate=0.7 demo
          tokred inspect --model vit_base_patch16_224 --pretrained --method tome --set r=13 cat.jpg
          tokred inspect --model hf:facebook/dinov2-small --method topk --set keep_rate=0.5 cat.jpg
        """,
    )
    made.add_argument("image", metavar="IMAGE", help="a path, or: demo (a bundled test scene)")
    made.add_argument(
        "--model",
        default="digit-vit",
        help="a bundled model, a timm architecture, or hf:<id or path> (default: %(default)s)",
    )
    made.add_argument("--pretrained", action="store_true", help="timm's released weights (downloads them)")
    made.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights for the timm architecture")
    made.add_argument("--image-size", type=int, metavar="N", help="run a timm model at N x N pixels")
    made.add_argument("--method", required=True, help="by name, see: tokred list")
    _add_settings(made)
    made.add_argument("--out", type=Path, metavar="FILE", help="default: outputs/inspect-MODEL-METHOD.png")
    made.add_argument("--size", type=int, default=224, metavar="N", help="side of each panel in pixels (default: 224)")


def _inspect(given: argparse.Namespace) -> None:
    from tokred.core.errors import InvalidParameterError
    from tokred.core.method import resolve
    from tokred.eval.inspection import inspect, load_image, load_subject
    from tokred.eval.report import dumps

    if not 16 <= given.size <= 2048:
        raise InvalidParameterError(f"--size {given.size}: expected 16 to 2048 pixels")
    settings = dict(given.settings)
    name = resolve(given.method, settings)[0].name  # a wrong method is refused before a model is loaded
    image = load_image(given.image)
    subject = load_subject(given.model, given.pretrained, given.checkpoint, given.image_size)
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in given.model)
    out = given.out or Path("outputs") / f"inspect-{safe}-{name}.png"
    found = inspect(subject, image, name, settings, out, given.size)
    if subject.weights == "random":
        print(
            "note: random weights; pass --pretrained or --checkpoint for a selection that means something",
            file=sys.stderr,
        )
    if given.json:
        print(dumps(found))
        return
    print(
        f"{found['model']} ({found['weights']} weights), {found['patches']} patches + {found['prefix']} prefix tokens"
    )
    if found["gmacs"] is not None:
        saved = 1 - found["gmacs"] / found["gmacs_unpatched"]
        print(f"{found['gmacs_unpatched']:.4g} > {found['gmacs']:.4g} GMACs ({-saved:+.1%})")
    if not found["steps"]:
        print("these settings keep every token")
    for step in found["steps"]:
        print(f"  block {step['layer']:>2}: {step['tokens_in']:>4} > {step['tokens_out']:>4} tokens")
    print(f"written: {out} ({found['picture']['width']} x {found['picture']['height']})")


# -- flops -------------------------------------------------------------------------------------------------------------


def _add_flops(commands: Any, common: argparse.ArgumentParser) -> None:
    made = add_command(
        commands,
        common,
        "flops",
        _flops,
        "multiply-adds of a model under methods, beside what the papers say",
        """
        Count the multiply-adds of a timm architecture, unreduced and under a method (without --method: under the
        settings that papers report for DeiT-S); or those of a prompt in a language model: llava-1.5-7b, llama-3.1-8b,
        mistral-nemo, phi-3.5-mini. No weights are needed.

          tokred flops
          tokred flops --model vit_large_patch16_224 --method tome --set r=8
          tokred flops --model llava-1.5-7b
          tokred flops --model llama-3.1-8b --text-tokens 16384 --method gemfilter --set k=2048
        """,
    )
    made.add_argument("--model", default="deit_small_patch16_224", help="its name (default: %(default)s)")
    made.add_argument("--size", type=int, metavar="N", help="image side in pixels (default: the model's own)")
    made.add_argument("--text-tokens", type=int, metavar="N", help="tokens of the prompt that are not of images")
    made.add_argument("--prunable-tokens", type=int, metavar="N", help="those of a text model that may be dropped")
    made.add_argument("--kept-tokens", type=int, metavar="N", help="what is left, where the data decides")
    made.add_argument("--method", help="by name, see: tokred list")
    _add_settings(made)


def _flops(given: argparse.Namespace) -> None:
    from tokred.core.errors import InvalidParameterError
    from tokred.eval.bench import require
    from tokred.eval.flops_prompts import MODELS, prompt_rows, prompt_table, reported_rows
    from tokred.eval.flops_table import DEFAULT_METHODS, flops_rows, flops_table
    from tokred.eval.report import dumps

    if given.settings and given.method is None:
        raise InvalidParameterError("--set belongs to --method, which is missing")
    methods = DEFAULT_METHODS if given.method is None else [(given.method, dict(given.settings))]
    names = {"size": "image_size", **{key: key for key in ("text_tokens", "prunable_tokens", "kept_tokens")}}
    sizes = {key: getattr(given, name) for name, key in names.items() if getattr(given, name) is not None}
    if given.model in MODELS:
        require("transformers", "transformers", what=f"the language model {given.model!r}")
        if given.method is None and not sizes:
            rows = reported_rows(given.model)
        else:
            rows = prompt_rows(given.model, sizes, methods if given.method is not None else [])
        print(dumps(rows) if given.json else prompt_table(given.model, rows))
        return
    for key in set(sizes) - {"image_size"}:
        raise InvalidParameterError(
            f"--{key.replace('_', '-')} is of prompts, and {given.model} reads images; language models: "
            f"{', '.join(MODELS)}"
        )
    require("timm", "timm", what=f"the architecture {given.model!r}")
    rows = flops_rows(given.model, given.size, methods)
    print(dumps(rows) if given.json else flops_table(given.model, rows))


# -- encode, decode ----------------------------------------------------------------------------------------------------

_MODEL = "flextok, textok, tokenflow or vq, the bundled ones, or the folder of a saved tokenizer"


def _add_encode(commands: Any, common: argparse.ArgumentParser) -> None:
    made = add_command(
        commands,
        common,
        "encode",
        _encode,
        "a picture as a token file",
        """
        Write the tokens of a picture: ids, or numbers and the caption that decodes them (TexTok). The picture
        is scaled and cut to the tokenizer's square. Then say what the tokens give back, and how many bytes JPEG and
        WebP need for a picture as near to it (PSNR).

          tokred encode card.png -o card.ftk --num-tokens 8
          tokred encode card.png -o card.safetensors --model textok --caption "a red seven on dark blue , left"
        """,
    )
    made.add_argument("image", metavar="IMAGE", help="a path, or: demo (a held-out card)")
    made.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the token file")
    made.add_argument("--model", default="flextok", help=f"{_MODEL} (default: %(default)s)")
    made.add_argument(
        "--num-tokens",
        type=int,
        metavar="K",
        help="so many first tokens (FlexTok; TokenFlow: whole scales; default: all)",
    )
    made.add_argument("--caption", metavar="TEXT", help="what is to be seen (TexTok)")
    made.add_argument("--seed", type=int, default=0, help="of the noise of what is compared (default: %(default)s)")
    made.add_argument("--no-compare", action="store_true", help="write the file and compare nothing")


def _encode(given: argparse.Namespace) -> None:
    from tokred.eval.report import dumps
    from tokred.eval.token_files import encode_file, open_picture, told

    image = open_picture(given.image)
    found = encode_file(
        image, given.out, given.model, given.num_tokens, given.caption, not given.no_compare, given.seed
    )
    print(dumps(found) if given.json else told(found))


def _add_decode(commands: Any, common: argparse.ArgumentParser) -> None:
    made = add_command(
        commands,
        common,
        "decode",
        _decode,
        "the picture of a token file",
        """
        Write the picture of a token file. A file is decoded by the model that made it alone.

          tokred decode card.ftk -o again.png --num-tokens 2
        """,
    )
    made.add_argument("file", type=Path, metavar="FILE", help="what tokred encode or generate wrote")
    made.add_argument("-o", "--out", type=Path, required=True, metavar="IMAGE", help="the picture; its ending counts")
    made.add_argument("--model", help=f"{_MODEL} (default: the bundled one of the file's kind)")
    made.add_argument(
        "--num-tokens",
        type=int,
        metavar="K",
        help="use so many first tokens (FlexTok; TokenFlow: whole scales; default: all)",
    )
    made.add_argument("--steps", type=int, help="of the decoder (FlexTok; default: 25)")
    made.add_argument("--guidance", type=float, metavar="G", help="of the decoder (FlexTok; default: 1, none)")
    made.add_argument("--seed", type=int, help="of the decoder's noise (FlexTok; default: 0)")
    made.add_argument("--allow-truncated", action="store_true", help="read what is left of a file that was cut short")


def _decode(given: argparse.Namespace) -> None:
    from tokred.eval.report import dumps
    from tokred.eval.token_files import decode_file

    found = decode_file(
        given.file,
        given.out,
        given.model,
        given.steps,
        given.guidance,
        given.seed,
        given.num_tokens,
        given.allow_truncated,
    )
    if given.json:
        print(dumps(found))
        return
    caption = "" if found["caption"] is None else f", {found['caption']!r}"
    cut = ", of a file that was cut short" if found["truncated"] else ""
    tokens = f"{found['tokens']} token" + "s" * (found["tokens"] > 1)
    print(f"{tokens}{cut}{caption}\nwritten: {found['file']}")


# -- eval --------------------------------------------------------------------------------------------------------------


def _add_eval(commands: Any, common: argparse.ArgumentParser) -> None:
    from tokred.cli_imagenet import add_imagenet
    from tokred.cli_vqa import add_needle, add_vqa

    what = "quality of a model of yours: imagenet, vqa, needle, reconstruct"
    about = "Measure a model of yours, as it is and under methods, on data of yours. Tasks have --help of their own."
    tasks = commands.add_parser("eval", help=what, description=about).add_subparsers(
        dest="what", metavar="TASK", required=True
    )
    add_imagenet(tasks, common)
    add_vqa(tasks, common)
    add_needle(tasks, common)
    made = add_command(
        tasks,
        common,
        "reconstruct",
        _reconstruct,
        "PSNR, SSIM and rFID of an image tokenizer",
        """
        Give held-out pictures back from their tokens: PSNR and SSIM with standard errors, rFID with --features; of a
        FlexTok for 1, 2, 4 ... tokens, of a TexTok with the right caption, another's, and none. Prints a table (or
        --json) beside what the papers say, and writes pictures and results.json to --out.
        """,
    )
    made.set_defaults(command="eval reconstruct")
    made.add_argument("--model", default="flextok", help=f"{_MODEL} (default: %(default)s)")
    made.add_argument(
        "--data",
        default="cards",
        help="cards (the test split), or a folder of pictures, perhaps with captions.jsonl; the last --count of a "
        "fixed order are taken, those that a recipe with held_out: COUNT does not train on (default: %(default)s)",
    )
    made.add_argument("--count", type=int, default=256, metavar="N", help="pictures (default: %(default)s)")
    made.add_argument("--batch", type=int, default=32, metavar="N", help="pictures at once (default: %(default)s)")
    made.add_argument("--num-tokens", type=_numbers, metavar="K,L", help="FlexTok (default: 1, 2, 4 ... all)")
    made.add_argument("--steps", type=int, default=25, help="of FlexTok's decoder (default: %(default)s)")
    made.add_argument(
        "--guidance", type=float, default=1.0, metavar="G", help="of FlexTok's decoder (default: %(default)s, none)"
    )
    made.add_argument("--seed", type=int, default=0, help="of its noise (default: %(default)s)")
    made.add_argument(
        "--features", type=Path, metavar="DIR", help="rFID: folder of a timm model, such as a saved inception_v3"
    )
    made.add_argument(
        "--out", type=Path, default=Path("outputs/eval-reconstruct"), metavar="DIR", help="default: %(default)s"
    )


def _reconstruct(given: argparse.Namespace) -> None:
    from tokred.cli_eval import print_results
    from tokred.core.errors import InvalidParameterError
    from tokred.eval.bench import Progress
    from tokred.eval.reconstruction import run, show

    for number in given.num_tokens or ():
        if number != int(number):
            raise InvalidParameterError(f"--num-tokens {number:g}: expected whole numbers")
    counts = [int(number) for number in given.num_tokens] if given.num_tokens else None
    with Progress() as progress:
        results = run(
            given.model,
            given.data,
            given.count,
            given.batch,
            counts,
            given.steps,
            given.guidance,
            given.seed,
            given.features,
            given.out,
            progress,
        )
    print_results(given, results, show)


if __name__ == "__main__":
    sys.exit(main())
