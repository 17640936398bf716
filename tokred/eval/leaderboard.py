"""`tokred bench --all`: every method on bundled models, as one page and one JSON file.

Which method is measured on which model, and which pairs fit but are left out, is on the page (`coverage`). A part is a
task of `tokred bench` on fewer examples, or one of two more: the backbones and merging in diffusion. What a part has
measured is written at once (part-NAME.json); a run that was cut short goes on from there, as long as machine, options,
bundled weights and libraries are the same, and when all parts are through, these files go.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tokred import __version__, zoo
from tokred.core.catalog import compatibility
from tokred.core.errors import TokredError
from tokred.core.method import Method, VisualMethod, registered
from tokred.core.sites import MediaLayout
from tokred.eval import leaderboard_sections as sections
from tokred.eval.bench import BenchOptions, Progress, require, task
from tokred.eval.leaderboard_page import page
from tokred.eval.records import check_out
from tokred.eval.report import dumps

__all__ = ["MODELS", "PARTS", "IncompleteError", "Model", "Part", "coverage", "run", "show"]

PACKAGES = ("timm", "transformers", "torchvision", "open_clip", "diffusers", "sklearn", "skimage", "matplotlib", "tqdm")
#: Distributions whose versions decide whether a part of an earlier run is still good.
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "diffusers", "open_clip_torch", "numpy")
Run = Callable[[BenchOptions, Progress], dict[str, Any]]


class IncompleteError(TokredError):
    """Parts of the benchmark failed; the page holds the others."""


@dataclass(frozen=True)
class Part:
    """One part of the leaderboard.

    Attributes:
        name, title: of files, of the page. run: measures; results of JSON types, with the pictures' files.
        sections: what the page shows of them. scenes: held-out examples. levels: None is the task's own.
        rounds: timed pairs a row. fast: scenes, levels and parameters of the dry run.
    """

    name: str
    title: str
    run: Run
    sections: Callable[[Mapping[str, Any]], list[dict[str, Any]]]
    scenes: int
    rounds: int
    levels: tuple[float, ...] | None = None
    fast: tuple[int, tuple[float, ...] | None, Mapping[str, Mapping[str, Any]]] = (4, None, {})

    def options(self, given: BenchOptions, fast: bool, rounds: int | None) -> BenchOptions:
        """What the part is asked for; `given` has what all parts share."""
        scenes, levels, parameters = self.fast if fast else (self.scenes, self.levels, {})
        if rounds is None:
            rounds = 1 if fast else self.rounds
        return replace(given, scenes=scenes, levels=levels, parameters=parameters, rounds=rounds)


def _task(name: str) -> Run:
    """`run` of a task of `tokred bench`, imported when it is called."""

    def measured(options: BenchOptions, progress: Progress) -> dict[str, Any]:
        found: dict[str, Any] = task(name).run(options, progress)
        return found

    return measured


def _video(options: BenchOptions, progress: Progress) -> dict[str, Any]:
    """EVS and QuoTA at all budgets, the others at the middle one."""
    from tokred.eval import bench_video
    from tokred.eval.vlm import choosers

    names = [*choosers(_layout("video")), *dict.fromkeys(name for name, _ in bench_video.INSIDE.values())]
    return bench_video.run(options, progress, middle=names)


def _needle(options: BenchOptions, progress: Progress) -> dict[str, Any]:
    """GemFilter at all budgets, methods inside the model at the middle one."""
    from tokred.eval import bench_needle

    return bench_needle.run(options, progress, middle=list(bench_needle.INSIDE))


def _backbones(options: BenchOptions, progress: Progress) -> dict[str, Any]:
    from tokred.vision.backbones.compare import compare
    from tokred.zoo.digit_backbones import bundled_runs

    progress.start("accuracy, then speed", 1, "tables")
    assert options.scenes is not None
    found = compare(
        bundled_runs(),
        scenes=options.scenes,
        split=options.split,
        seed=options.seed,
        rounds=options.rounds,
        workers=options.threads,
        grids=[(int(side), int(side)) for side in options.levels] if options.levels else None,
    )
    progress.advance(1)
    return {**found, "files": {}}


def _diffusion(options: BenchOptions, progress: Progress) -> dict[str, Any]:
    from tokred.eval.leaderboard_diffusion import SIDE, run

    side = int(options.levels[0]) if options.levels else SIDE
    return {**run(options, progress, side), "files": {}}


FEWER_STEPS = {name: {"num_inference_steps": 2} for name in ("reconstruct", "generate", "grid")}
#: What of it takes how long: docs/leaderboard.md.
PARTS: tuple[Part, ...] = (
    Part("vit", "Vision transformer", _task("vit"), sections.vit, 500, 5, fast=(4, (0.65,), {})),
    Part("vqa", "Questions about images", _task("vqa"), sections.vqa, 240, 3, fast=(4, (0.25,), {})),
    Part("video", "Questions about clips", _video, sections.video, 100, 3, (144, 72, 36), fast=(2, (72,), {})),
    Part("needle", "Needle in a long text", _needle, sections.needle, 200, 3, fast=(4, (64,), {})),
    Part("backbones", "Backbones", _backbones, sections.backbones, 500, 3, fast=(2, (4,), {})),
    Part("tokenize", "Image tokenizers", _task("tokenize"), sections.tokenize, 100, 3, fast=(2, (1, 4), FEWER_STEPS)),
    Part("diffusion", "Diffusion", _diffusion, sections.diffusion, 2, 3, fast=(2, (32,), {})),
)


@dataclass(frozen=True)
class Model:
    """A bundled model in the table of what is measured.

    Attributes:
        name: on the page. family: of its host. parts: that run methods on it. media: that it is shown, if any.
    """

    name: str
    family: str
    parts: tuple[str, ...] = ()
    media: str | None = None


MODELS: tuple[Model, ...] = (
    Model("digit-vit", "timm", ("vit", "backbones")),
    Model("digit-clip", "open_clip"),
    Model("digit-vlm, images", "transformers multimodal", ("vqa",), "image"),
    Model("digit-video-vlm, clips", "transformers multimodal", ("video",), "video"),
    Model("needle-llm", "transformers text", ("needle",)),
    Model("U-Net, random weights", "diffusers", ("diffusion",)),
)


def run(
    given: BenchOptions,
    progress: Progress,
    fast: bool = False,
    rounds: int | None = None,
    parts: Sequence[Part] | None = None,
) -> dict[str, Any]:
    """Measure every part, write leaderboard.html and leaderboard.json into `given.out`; the result is the latter's.

    A part that fails is named in ``failed`` and on the page, and the others go on.

    Args:
        given: what all parts share: out, seed, split, threads. fast: a dry run. rounds: timed pairs a row, of every
            part. parts: None is all.

    Raises:
        MissingExtraError: before anything is measured: a package is not installed that a part needs.
    """
    require("demo,diffusers", *PACKAGES, what="tokred bench --all")
    given.check_split()
    check_out(given.out)
    parts = PARTS if parts is None else parts
    given.out.mkdir(parents=True, exist_ok=True)
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "accuracy_threads": given.threads,
        "speed_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "libraries": _versions(),
    }
    found = []
    for number, part in enumerate(parts, 1):
        labelled = _Labelled(progress, f"{number}/{len(parts)} {part.name}")
        found.append(_measured(part, part.options(given, fast, rounds), machine, labelled))
    results = {
        "version": __version__,
        "date": _now(),
        "machine": machine,
        "fast": fast,
        "seed": given.seed,
        "split": given.split,
        "seconds": round(sum(record["seconds"] for record in found), 1),
        "cpu_seconds": round(sum(record["cpu_seconds"] for record in found), 1),
        "peak_memory_bytes": peak_memory(),
        "weights_sha256": weights_digest(),
        "methods": coverage(found),
        "failed": {record["name"]: record["error"] for record in found if record["error"]},
        "parts": found,
    }
    files = {"page": given.out / "leaderboard.html", "results": given.out / "leaderboard.json"}
    _write(files["page"], page(results))
    results["files"] = {name: str(path) for name, path in files.items()}
    slim = {**results, "parts": [_without_pictures(record) for record in found]}
    _write(files["results"], dumps(slim) + "\n")
    if not results["failed"]:
        for part in parts:
            _kept(given.out, part).unlink(missing_ok=True)
    return slim


def _kept(out: Path, part: Part) -> Path:
    return out / f"part-{part.name}.json"


def _measured(part: Part, options: BenchOptions, machine: Mapping[str, Any], progress: _Labelled) -> dict[str, Any]:
    """A part from its file, if a run with the same options left one, else measured now and written there."""
    path = _kept(options.out, part)
    key = {
        "version": __version__,
        "machine": machine,
        "weights": weights_digest(),
        "settings": {
            name: getattr(options, name)
            for name in ("scenes", "levels", "rounds", "seed", "split", "threads", "parameters")
        },
    }
    key = json.loads(dumps(key))
    before = _read(path)
    if before is not None and before.get("key") == key:
        progress.start("measured before", 1, "parts")
        progress.advance(1)
        return {**before["part"], "resumed": True}
    began, cpu = time.perf_counter(), time.process_time()
    record: dict[str, Any] = {"name": part.name, "title": part.title, "settings": key["settings"], "date": _now()}
    record["resumed"] = False
    with tempfile.TemporaryDirectory(prefix="tokred-bench-") as folder:
        try:
            shown = part.sections(part.run(replace(options, out=Path(folder)), progress))
            for section in shown:
                section["command"] += _asked(section["command"], options)
                section["pictures"] = [_embedded(picture) for picture in section["pictures"]]
        except Exception as error:  # whatever it is, the other parts go on
            said = " ".join(str(error).split())
            failed = f"{type(error).__name__}: {said}".replace(folder, "DIR")
            return {**record, **_taken(began, cpu), "error": failed, "sections": []}
    record |= {**_taken(began, cpu), "error": None, "sections": shown}
    record = json.loads(dumps(record))  # as it is read back
    _write(path, dumps({"key": key, "part": record}) + "\n")
    return record


def _asked(command: str, options: BenchOptions) -> str:
    """Seed and split for a command that has them, where they are not its defaults."""
    if command.startswith("python benchmarks/"):
        return ""
    said = f" --seed {options.seed}" if options.seed != BenchOptions.seed else ""
    return said + (f" --split {options.split}" if options.split != BenchOptions.split else "")


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _versions() -> dict[str, str | None]:
    """{distribution: version, None where it is not installed as one}."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def weights_digest() -> str:
    """SHA-256 over names and contents of all files of the bundled weights."""
    folder = Path(zoo.__file__).parent / "weights"
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        own = hashlib.sha256(path.read_bytes()).hexdigest()
        whole.update(f"{path.relative_to(folder).as_posix()} {own}\n".encode())
    return whole.hexdigest()


def peak_memory() -> int | None:
    """The most memory that this process has held, bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _taken(began: float, cpu: float) -> dict[str, float]:
    """Seconds of the clock and of this process's threads: together they say whether other work was in the way."""
    return {"seconds": round(time.perf_counter() - began, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}


def _read(path: Path) -> dict[str, Any] | None:
    """None for a file that is not there or was cut short."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    half = path.with_name(f"{path.name}.half")
    half.write_text(text, encoding="utf-8")
    os.replace(half, path)


def _embedded(picture: Mapping[str, str]) -> dict[str, Any]:
    """A picture as a data URI, with its size in pixels: WebP where Pillow can write it."""
    from PIL import Image, features

    with Image.open(picture["file"]) as image:
        kind = "WEBP" if features.check("webp") else "PNG"
        held = io.BytesIO()
        image.convert("RGB").save(held, kind, quality=82, method=4, optimize=True)
        width, height = image.size
    data = base64.b64encode(held.getvalue()).decode()
    uri = f"data:image/{kind.lower()};base64,{data}"
    return {"caption": picture["caption"], "width": width, "height": height, "uri": uri}


def _without_pictures(record: Mapping[str, Any]) -> dict[str, Any]:
    bare = [
        {**section, "pictures": [{key: value for key, value in p.items() if key != "uri"} for p in section["pictures"]]}
        for section in record["sections"]
    ]
    return {**record, "sections": bare}


def coverage(parts: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{method of the catalogue: its title, the sections that have it, why if none has, and its ``models``}.

    The latter are {bundled model: its sections, or "fits" (measured by none), "failed", or "no"}.
    """
    failed = [part["name"] for part in parts if part["error"]]
    why = "no bundled task runs it"
    if failed:
        why = f"not measured: {', '.join(failed)} failed"
    fits, found = compatibility(), {}
    for name, cls in sorted(registered().items(), key=lambda item: item[1].title.lower()):
        where = {
            part["name"]: [s["name"] for s in part["sections"] if any(row.get("method") == name for row in s["rows"])]
            for part in parts
        }
        models: dict[str, Any] = {}
        for model in MODELS:
            own = [section for part in model.parts for section in where.get(part, ())]
            fitting = fits[name].get(model.family, False) and (model.media is None or _acts_on(cls, model.media))
            lost = "failed" if set(model.parts) & set(failed) else "fits"
            models[model.name] = own or (lost if fitting else "no")
        every = [section for sections in where.values() for section in sections]
        found[name] = {"title": cls.title, "sections": every, "absent": None if every else why, "models": models}
    return found


def _layout(media: str) -> MediaLayout:
    """An image or a clip of 16 frames, 6 x 6 tokens each."""
    frames = 16 if media == "video" else 1
    return MediaLayout("video" if media == "video" else "image", frames, (6, 6), tuple(range(36 * frames)))


def _acts_on(cls: type[Method], media: str) -> bool:
    """Whether a method does anything to such media; one that is not known to leave them alone does."""
    if not issubclass(cls, VisualMethod) or "budget" not in {field.name for field in fields(cls)}:  # type: ignore[arg-type]
        return True
    return not cls(budget=1).bypasses(_layout(media))  # type: ignore[call-arg]


@functools.cache
def processor() -> str:
    """What the CPU calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "unknown CPU"


def show(results: Mapping[str, Any]) -> str:
    """What the terminal is told: of each part its sections and their best rows."""
    lines = []
    for part in results["parts"]:
        before = f", measured before, {part['date']}" if part["resumed"] else ""
        lines.append(f"{part['title']} ({part['seconds']:.0f} s{before})")
        lines += [f"  failed: {part['error']}"] if part["error"] else []
        for section in part["sections"]:
            rows = f"{len(section['rows'])} rows"
            lines.append(f"  {section['title']}: {section['headline'] or rows}")
    memory = results["peak_memory_bytes"]
    held = f"; {memory / 1e9:.1f} GB of memory at most" if memory is not None else ""
    lines.append(f"together {results['seconds']:.0f} s, {results['cpu_seconds']:.0f} s of CPU time{held}")
    absent = {name: method["absent"] for name, method in results["methods"].items() if method["absent"]}
    lines += [f"not on the page: {name}: {reason}" for name, reason in absent.items()]
    return "\n".join(lines)


class _Labelled(Progress):
    """A progress bar that also names the part."""

    def __init__(self, inner: Progress, part: str) -> None:
        super().__init__(inner.quiet)
        self._inner, self._part = inner, part

    def start(self, label: str, total: int, unit: str) -> None:
        self._inner.start(f"{self._part}: {label}", total, unit)

    def advance(self, amount: int = 1) -> None:
        self._inner.advance(amount)

    def stop(self) -> None:
        self._inner.stop()
