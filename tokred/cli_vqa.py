"""`tokred eval vqa` and `tokred eval needle`: their options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokred.cli_eval import add_method, add_task, default_out, methods, print_results

__all__ = ["add_needle", "add_vqa"]


def _shared(made: Any, what: str, default: str) -> None:
    """Options of both; without --method the rows are `default`."""
    add_method(made, default)
    made.add_argument("--limit", type=int, metavar="N", help=f"the first N {what}")
    made.add_argument("--tokens", type=int, metavar="N", help="tokens of an answer, at most")
    made.add_argument("--seed", type=int, default=0, help="of random choices and bundled data (default: %(default)s)")
    made.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    made.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16 (default: %(default)s)")
    made.add_argument(
        "--fresh", action="store_true", help="forget the answers in --out; without it a run goes on there"
    )
    made.add_argument(
        "--out", type=Path, metavar="DIR", help="records and results.json (default: outputs/eval-TASK-BENCHMARK)"
    )


def _settings(given: argparse.Namespace, task: str) -> dict[str, Any]:
    """What both take, as their options name it."""
    names = ("benchmark", "model", "batch", "tokens", "seed", "fresh", "device", "dtype")
    settings = {name: getattr(given, name) for name in names}
    return settings | {"out": given.out or default_out(task, given.benchmark), "runs": methods(given)}


# -- vqa ---------------------------------------------------------------------------------------------------------------


def add_vqa(tasks: Any, common: argparse.ArgumentParser) -> None:
    """Add `tokred eval vqa` to the tasks of `tokred eval`."""
    made = add_task(
        tasks,
        common,
        "vqa",
        _vqa,
        "a multimodal model under methods on benchmarks of question answering",
        """
        Ask a multimodal model the questions of a benchmark, as it is and under each method and budget, and print the
        benchmark's own metric with standard errors, agreement with the unpatched model, visual tokens and seconds a
        question, beside what papers say. A run that was killed goes on where it was. Processes of
        accelerate launch --multi_gpu --num_processes N -m tokred.cli eval vqa ... share the questions.

          tokred eval vqa
          tokred eval vqa --model digit-video-vlm
          tokred eval vqa --benchmark textvqa --data TextVQA_0.5.1_val.json --images train_images \\
              --model llava-hf/llava-v1.6-vicuna-7b-hf --method "hired budget=0.2|0.4" --method "mustdrop preset=192"
          tokred eval vqa --benchmark pope --data lmms-lab/POPE --limit 500 --model Qwen/Qwen2.5-VL-3B-Instruct
        """,
    )
    made.add_argument(
        "--benchmark",
        default="digits",
        help="vqav2, gqa, textvqa, pope, scienceqa, mme, docvqa, videomme, mlvu, or digits, bundled (default: digits)",
    )
    made.add_argument(
        "--data",
        metavar="PATH|NAME",
        help="the benchmark's own file or folder, or a data set of the hub with such rows",
    )
    made.add_argument("--images", type=Path, metavar="DIR", help="of a benchmark whose files name them")
    made.add_argument("--videos", type=Path, metavar="DIR", help="files, or folders of frames")
    made.add_argument(
        "--subtitles", type=Path, metavar="DIR", help="of Video-MME: .srt files; without them none are shown"
    )
    made.add_argument("--annotations", type=Path, metavar="FILE", help="of VQAv2, where not beside the questions")
    made.add_argument("--split", help="of a data set, or of ScienceQA")
    made.add_argument("--config", help="of a data set of the hub")
    made.add_argument(
        "--model",
        help="a folder, an id of the hub, digit-vlm or digit-video-vlm (default with digits: digit-vlm)",
    )
    _shared(made, "questions", "with digits, two at a quarter of the tokens; else none")
    made.add_argument("--batch", type=int, default=8, metavar="N", help="prompts at once (default: %(default)s)")
    made.add_argument(
        "--instruction", metavar="TEXT", help="behind each question, instead of the benchmark's; may be empty"
    )
    made.add_argument(
        "--prompt", metavar="TEXT", help="with {media} and {question}, for processors without a chat template"
    )
    made.add_argument("--frames", type=int, metavar="N", help="of a video (default: 64; digits: 16)")
    made.add_argument(
        "--method-frames",
        type=int,
        metavar="N",
        help="that rows with a method are shown, e.g. QuoTA's 96 (default: --frames)",
    )
    made.add_argument(
        "--scorer",
        help="of frames, for QuoTA: equal, digit-clip, or a CLIP or SigLIP of transformers (default: its own; bundled "
        "models: digit-clip)",
    )


def _vqa(given: argparse.Namespace) -> None:
    from tokred.core.errors import InvalidParameterError
    from tokred.eval.bench import Progress
    from tokred.eval.vqa import DIGITS, VqaOptions, run, show
    from tokred.eval.vqa_formats import Source, benchmark

    if given.benchmark != DIGITS:
        benchmark(given.benchmark)  # the nearest name is said before anything else
    for name in ("images", "videos", "subtitles"):
        folder = getattr(given, name)
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"--{name} {folder} is not a folder")
    if given.annotations is not None and not given.annotations.is_file():
        raise FileNotFoundError(f"--annotations {given.annotations} is no file; expected VQAv2's answers as JSON")
    if given.data is None:
        for name in ("images", "videos", "subtitles", "annotations", "split", "config"):
            if getattr(given, name) is not None:
                raise InvalidParameterError(f"--{name} belongs to --data, which is missing")
    source = None
    if given.data is not None or given.limit is not None:
        source = Source(
            given.data or "",
            given.images,
            given.videos,
            given.subtitles,
            given.annotations,
            given.split,
            given.config,
            given.limit,
        )
    options = VqaOptions(
        **_settings(given, "vqa"),
        source=source,
        instruction=given.instruction,
        prompt=given.prompt,
        frames=given.frames,
        method_frames=given.method_frames,
        scorer=given.scorer,
    )
    with Progress() as progress:
        print_results(given, run(options, progress), show)


# -- needle ------------------------------------------------------------------------------------------------------------


def add_needle(tasks: Any, common: argparse.ArgumentParser) -> None:
    """Add `tokred eval needle` to the tasks of `tokred eval`."""
    made = add_task(
        tasks,
        common,
        "needle",
        _needle,
        "a language model under methods inside it on needles in haystacks and LongBench",
        """
        Hide a sentence in long texts, at every length and depth, and ask a language model for it, as it is and under
        methods inside it; or ask LongBench's questions. Prints scores with standard errors, agreement with the
        unpatched model, tokens and seconds a prompt, beside what papers say. A run that was killed goes on.

          tokred eval needle
          tokred eval needle --model meta-llama/Llama-3.1-8B-Instruct --haystack essays/ --lengths 8000,32000 \\
              --method "gemfilter k=1024"
          tokred eval needle --benchmark longbench --data LongBench/data --datasets qasper,hotpotqa \\
              --prompts dataset2prompt.json --model meta-llama/Llama-3.1-8B-Instruct \\
              --method "gemfilter k=1024|2048"
        """,
    )
    made.add_argument("--benchmark", default="haystack", help="haystack or longbench (default: haystack)")
    made.add_argument(
        "--model", default="needle-llm", help="needle-llm, a folder, or an id of the hub (default: %(default)s)"
    )
    _shared(made, "questions of each data set", 'of needle-llm "gemfilter k=64 layer=1"; else none')
    made.add_argument("--batch", type=int, default=4, metavar="N", help="prompts at once (default: %(default)s)")
    made.add_argument(
        "--lengths", metavar="N,M", help="tokens of haystacks (default: 128,256,512; others 1000,2000,4000)"
    )
    made.add_argument("--depths", type=int, metavar="N", help="so many, from 0 to 100 %% (default: 5)")
    made.add_argument("--samples", type=int, metavar="N", help="prompts of a length and depth (default: 4; others 1)")
    made.add_argument(
        "--haystack", type=Path, metavar="PATH", help="a text file or a folder of them (default: filler words)"
    )
    made.add_argument("--needle", metavar="TEXT", help="the sentence to hide; goes with --question and --answer")
    made.add_argument("--question", metavar="TEXT", help="what is asked")
    made.add_argument("--answer", metavar="TEXT", help="the words that a right answer has in it")
    made.add_argument("--data", type=Path, metavar="PATH", help="LongBench: its data folder, or one file")
    made.add_argument("--datasets", metavar="A,B", help="LongBench: these only (default: all English ones)")
    made.add_argument("--prompts", type=Path, metavar="FILE", help="LongBench: its dataset2prompt.json (default: ours)")
    made.add_argument("--max-length", type=int, metavar="N", help="LongBench: longer prompts lose their middle")
    made.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="prompts as a turn of a conversation (default: haystacks of tokenizers with a template)",
    )


def _needle(given: argparse.Namespace) -> None:
    from tokred.core.errors import InvalidParameterError
    from tokred.eval.bench import Progress
    from tokred.eval.needle_eval import NeedleOptions, run, show

    try:
        lengths = [int(part) for part in given.lengths.split(",")] if given.lengths else None
    except ValueError:
        raise InvalidParameterError(f"--lengths {given.lengths}: expected whole numbers such as 1000,2000") from None
    options = NeedleOptions(
        **_settings(given, "needle"),
        lengths=lengths,
        depths=given.depths,
        samples=given.samples,
        haystack=given.haystack,
        needle=given.needle,
        question=given.question,
        answer=given.answer,
        data=given.data,
        datasets=[name.strip() for name in (given.datasets or "").split(",") if name.strip()],
        prompts=given.prompts,
        limit=given.limit,
        max_length=given.max_length,
        chat=given.chat,
    )
    with Progress() as progress:
        print_results(given, run(options, progress), show)
