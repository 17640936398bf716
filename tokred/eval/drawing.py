"""`tokred generate`: a class or a prompt to tokens to a picture, by a generator that ships with tokred or a saved one.

A picture depends on the model, what was asked, the settings and its seed alone, not on what else is drawn with it. It
is what `tokred decode` makes of its token file with the same seed and steps.
"""

from __future__ import annotations

import abc
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tokred.core.errors import InvalidParameterError, nearest
from tokred.eval.bench import Progress, require
from tokred.eval.draw_options import BUNDLED, DrawOptions
from tokred.eval.report import Panel, contact_sheet
from tokred.eval.token_files import STEPS, decoded, picture_format, samples, write_picture

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["generate", "open_generator", "told"]
MOST = 256  # pictures of a call


@dataclass(frozen=True)
class Asked:
    """One picture's condition: a class, or a prompt, and the caption that decodes it."""

    text: str
    label: int | None = None
    caption: str | None = None


# -- generators --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Drawer(abc.ABC):
    """A generator with the tokenizer that decodes what it draws.

    Attributes:
        made_by: the tokenizer's fingerprint, for token files. settings: of drawing, beside those of `DrawOptions`.
        classes: how many there are; None for a model of prompts. names: of the classes, where they have some.
    """

    takes: ClassVar[frozenset[str]] = frozenset()

    name: str
    model: Any
    tokenizer: Any
    made_by: str
    settings: dict[str, Any] = field(default_factory=dict)
    classes: int | None = None
    names: tuple[str, ...] = ()

    @abc.abstractmethod
    def draw(self, asked: Asked, given: DrawOptions, generator: torch.Generator) -> Tensor:
        """Tokens of one picture, (n,) int64 or (n, D) float32."""

    def check(self, given: DrawOptions) -> None:
        """Whether the model takes the options.

        Raises:
            InvalidParameterError: it does not, or one is outside its range.
        """
        for option in ("num_tokens", "guidance", "steps", "window"):
            if getattr(given, option) is not None and option not in self.takes:
                flag = "--" + option.replace("_", "-")
                why = f"always draws {self.tokenizer.num_tokens} tokens" if option == "num_tokens" else "has none"
                raise InvalidParameterError(f"{flag} {getattr(given, option)}: {self.name} {why}; leave it away")

    def guidance(self, given: DrawOptions) -> float | None:
        """The scale that was given, else the one of the settings; None is the model's own."""
        return self.settings.get("guidance") if given.guidance is None else given.guidance

    def asked(self, text: str) -> Asked:
        """What a word of the command line asks for.

        Raises:
            InvalidParameterError: no class of this model.
        """
        if self.classes is None:
            return Asked(text)
        label = self._label(text)
        if label is None:
            raise InvalidParameterError(f"{text!r}{nearest(text, self.names)}: {self.name} draws {self.choices()}")
        return Asked(text, label)

    def _label(self, text: str) -> int | None:
        if text in self.names:
            return self.names.index(text)
        if text.isdecimal() and int(text) < (self.classes or 0):
            return int(text)
        return None

    def choices(self) -> str:
        """What can be asked for."""
        if self.classes is None:
            return "prompts"
        found = f"classes 0 to {self.classes - 1}"
        if 0 < len(self.names) <= 20:
            found += f", or {', '.join(self.names)}"
        return found

    def every(self) -> tuple[str, ...]:
        """One word for each class.

        Raises:
            InvalidParameterError: a model of prompts, or of too many classes to draw them all.
        """
        if self.classes is None or self.classes > 100:
            raise InvalidParameterError(f"nothing to draw: {self.name} draws {self.choices()}; give one or more")
        return self.names or tuple(map(str, range(self.classes)))


class _FlexTok(Drawer):
    takes = frozenset({"num_tokens", "guidance", "steps"})

    def check(self, given: DrawOptions) -> None:
        super().check(given)
        most = self.model.ar.config.num_tokens
        if given.num_tokens is not None and not 1 <= given.num_tokens <= most:
            raise InvalidParameterError(f"--num-tokens {given.num_tokens}: {self.name} draws 1 to {most}")

    def draw(self, asked: Asked, given: DrawOptions, generator: torch.Generator) -> Tensor:
        embeds: dict[str, Any] = {"class_labels": asked.label}
        if asked.label is None:
            (text, mask), (none, none_mask) = (self.model.encode_prompt(words) for words in (asked.text, ""))
            embeds = {"text_embeds": text, "text_mask": mask}
            if given.guidance != 1:
                embeds |= {"negative_text_embeds": none, "negative_text_mask": none_mask}
        found: Tensor = self.model.ar.generate_tokens(
            **embeds,
            num_tokens=given.num_tokens,
            guidance_scale=self.guidance(given),
            generator=generator,
        )
        return found[0]


class _TexTok(Drawer):
    takes = frozenset({"guidance", "steps"})

    def draw(self, asked: Asked, given: DrawOptions, generator: torch.Generator) -> Tensor:
        condition: dict[str, Any] = {"prompt": asked.text} if asked.label is None else {"class_labels": asked.label}
        found = self.tokenizer(
            **condition,
            captions=asked.caption,
            num_inference_steps=given.steps or STEPS,
            guidance_scale=1.0 if self.guidance(given) is None else self.guidance(given),
            generator=generator,
            truncate=False,
            output_type="latent",
        )
        latents: Tensor = found.images[0]
        return latents.half().float()  # as a token file keeps them

    def captioned(self, asked: Asked, generator: torch.Generator) -> Asked:
        """With the caption that decodes the picture: the prompt, or one of the class, at random.

        Of a class the generator reads no caption: its tokens decide what a caption could say beside the class.
        """
        if not self.tokenizer._reads_text:
            return asked
        if asked.label is None:
            return Asked(asked.text, None, asked.text)
        bank = self.tokenizer.config.caption_bank or {}
        known = next((texts for key, texts in bank.items() if int(key) == asked.label), self.names[asked.label :][:1])
        if not known:
            raise InvalidParameterError(f"{self.name} has neither captions nor names of its classes to decode with")
        chosen = known[int(torch.randint(len(known), (), generator=generator))]
        return Asked(asked.text, asked.label, chosen)


class _TokenFlow(Drawer):
    takes = frozenset({"num_tokens", "guidance"})

    def check(self, given: DrawOptions) -> None:
        super().check(given)
        ends = self.model.ar.config.ends
        if given.num_tokens is not None and given.num_tokens not in ends:
            raise InvalidParameterError(
                f"--num-tokens {given.num_tokens}: {self.name} draws whole scales, {', '.join(map(str, ends))} tokens"
            )

    def draw(self, asked: Asked, given: DrawOptions, generator: torch.Generator) -> Tensor:
        condition: dict[str, Any] = {"prompt": asked.text} if asked.label is None else {"class_labels": asked.label}
        ends = self.model.ar.config.ends
        found = self.model(
            **condition,
            guidance_scale=self.guidance(given),
            num_scales=None if given.num_tokens is None else ends.index(given.num_tokens) + 1,
            generator=generator,
            output_type="pt",
            **{name: value for name, value in self.settings.items() if name != "guidance"},
        )
        tokens: Tensor = found.tokens[0]
        return tokens


class _TokenShuffle(Drawer):
    takes = frozenset({"guidance", "window"})

    def check(self, given: DrawOptions) -> None:
        super().check(given)
        own = self.model.config.window
        if given.window not in (None, own):
            raise InvalidParameterError(f"--window {given.window}: {self.name} draws {own} x {own} codes a step")

    def draw(self, asked: Asked, given: DrawOptions, generator: torch.Generator) -> Tensor:
        from tokred.eval.shuffle_table import draw

        assert asked.label is not None
        label = torch.tensor([asked.label])
        codes = draw(self.model, label, self.tokenizer.grid, generator, self.guidance(given))
        return codes[0].flatten()


def open_generator(model: str, tokenizer: str | None = None, window: int | None = None) -> Drawer:
    """A generator with its tokenizer.

    Args:
        model: one of `BUNDLED`, or a folder: a saved `FlexTokGenerationPipeline`, `TokenFlowPipeline` or `TexTok` with
            a generator, or a saved `FlexTokARModel` or `TokenShuffle`.
        tokenizer: for the last two, as `tokred.zoo.tokenizers.open_tokenizer` takes it; None is the bundled one.
        window: of the bundled token-shuffle; None is 2.

    Raises:
        FileNotFoundError: there is no such folder. InvalidParameterError: another class, it cannot be read, or parts
            that do not fit.
    """
    from tokred.data.cards import DIGIT_WORDS
    from tokred.eval.bench_tokenize import EXPERIMENTS
    from tokred.zoo import tokenizers as zoo

    if model not in BUNDLED:
        return _saved(model, tokenizer)
    if tokenizer is not None:
        raise InvalidParameterError(f"--tokenizer is for a saved generator; {model} comes with its own")
    if model == "token-shuffle" and window not in (None, *zoo.WINDOWS):
        raise InvalidParameterError(f"--window {window}: expected one of {', '.join(map(str, zoo.WINDOWS))}")
    digits: dict[str, Any] = {"classes": len(DIGIT_WORDS), "names": DIGIT_WORDS}
    if model == "flextok":
        settings = {"guidance": EXPERIMENTS["generate"][1]["ar_guidance_scale"]}
        return _flextok(model, zoo.tiny_flextok_ar(), *zoo.open_tokenizer("flextok"), settings=settings, **digits)
    if model == "token-shuffle":
        settings = {"guidance": EXPERIMENTS["windows"][1]["guidance_scale"]}
        vq, made_by = zoo.open_tokenizer("vq")
        return _TokenShuffle(model, zoo.tiny_shuffle(window or 2), vq, made_by, settings, **digits)
    if model == "tokenflow":
        known = EXPERIMENTS["scales"][1]
        settings = {"guidance": known["guidance_scale"], "top_k": int(known["top_k"]), "top_p": known["top_p"]}
        pipeline = zoo.tiny_tokenflow()
        return _TokenFlow(model, pipeline, pipeline.tokenizer, zoo.fingerprint_of(model), settings, **digits)
    settings = {"guidance": EXPERIMENTS["grid"][1]["guidance_scale"]}
    textok, made_by = zoo.open_tokenizer(model)
    return _TexTok(model, textok, textok, made_by, settings, **digits)


def _flextok(name: str, ar: Any, tokenizer: Any, made_by: str, **options: Any) -> Drawer:
    from tokred.generation.flextok_generate import FlexTokGenerationPipeline

    return _FlexTok(name, FlexTokGenerationPipeline(ar, tokenizer), tokenizer, made_by, **options)


def _saved(model: str, tokenizer: str | None) -> Drawer:
    """`open_generator` of a folder."""
    folder = Path(model)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no generator {model!r}{nearest(model, BUNDLED)}: expected {', '.join(BUNDLED)}, or the folder of a "
            "saved one"
        )
    kind = _kind(folder)
    if tokenizer is not None and kind not in ("flextok_ar", "token_shuffle"):
        raise InvalidParameterError(f"--tokenizer: {folder} holds its own")
    try:
        return _READERS[kind](folder, tokenizer)
    except InvalidParameterError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidParameterError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error


def _kind(folder: Path) -> str:
    """Which of `_READERS` reads a folder."""
    found = None
    for file, key in (("model_index.json", "_class_name"), ("config.json", "model_type")):
        if (folder / file).is_file():
            try:
                found = json.loads((folder / file).read_text(encoding="utf-8")).get(key)
            except (ValueError, AttributeError) as error:
                raise InvalidParameterError(f"{folder / file} cannot be read: {error}") from error
            break
    else:
        if (folder / "ar").is_dir() and (folder / "tokenizer").is_dir():
            found = "FlexTokGenerationPipeline"
    if found not in _READERS:
        held = "no saved generator" if found is None else f"a {found}, which draws nothing"
        raise InvalidParameterError(f"{folder} holds {held}: expected one of {', '.join(_READERS)}")
    return found


def _read_flextok(folder: Path, tokenizer: str | None) -> Drawer:
    from tokred.generation.flextok_generate import FlexTokGenerationPipeline
    from tokred.zoo.tokenizers import open_tokenizer

    flextok, made_by = open_tokenizer(str(folder / "tokenizer"))
    pipeline = FlexTokGenerationPipeline.from_pretrained(folder, flextok)
    pipeline.ar.eval()
    return _FlexTok(str(folder), pipeline, flextok, made_by, classes=pipeline.ar.config.num_classes)


def _read_flextok_ar(folder: Path, tokenizer: str | None) -> Drawer:
    from tokred.zoo.tokenizers import open_tokenizer, tiny_flextok_ar

    ar = tiny_flextok_ar(folder)
    if ar.config.num_classes is None:
        raise InvalidParameterError(
            f"{folder} draws from prompts, and there is no text encoder beside it: give the folder of a saved "
            "FlexTokGenerationPipeline"
        )
    return _flextok(str(folder), ar, *open_tokenizer(tokenizer or "flextok"), classes=ar.config.num_classes)


def _read_shuffle(folder: Path, tokenizer: str | None) -> Drawer:
    from tokred.zoo.tokenizers import open_tokenizer, tiny_shuffle

    model = tiny_shuffle(1, folder)  # of which windows, the folder says
    vq, made_by = open_tokenizer(tokenizer or "vq")
    if not hasattr(vq, "grid") or vq.codebook_size != model.config.codebook_size:
        raise InvalidParameterError(
            f"{folder} draws grids of {model.config.codebook_size} codes, which {tokenizer or 'vq'} does not decode: "
            "give its --tokenizer"
        )
    start = model.config.text_config.bos_token_id
    texts = model.config.image_token_start
    return _TokenShuffle(str(folder), model, vq, made_by, classes=texts if start is None else min(start, texts))


def _read_tokenflow(folder: Path, tokenizer: str | None) -> Drawer:
    from tokred.zoo.tokenizers import open_tokenizer, tiny_tokenflow

    pipeline = tiny_tokenflow(folder)
    names = pipeline.config.class_names
    classes: dict[str, Any] = {} if names is None else {"classes": len(names), "names": tuple(names)}
    return _TokenFlow(str(folder), pipeline, pipeline.tokenizer, open_tokenizer(str(folder))[1], **classes)


def _read_textok(folder: Path, tokenizer: str | None) -> Drawer:
    from tokred.zoo.tokenizers import open_tokenizer

    textok: Any
    textok, made_by = open_tokenizer(str(folder))
    if textok.generator is None:
        raise InvalidParameterError(f"{folder} holds a TexTok without a generator: it can only encode and decode")
    names = tuple(textok.config.class_names or ())
    classes = textok.generator.config.num_classes
    return _TexTok(str(folder), textok, textok, made_by, classes=classes, names=names if classes else ())


_READERS: dict[str, Any] = {
    "FlexTokGenerationPipeline": _read_flextok,
    "TexTok": _read_textok,
    "TokenFlowPipeline": _read_tokenflow,
    "flextok_ar": _read_flextok_ar,
    "token_shuffle": _read_shuffle,
}


# -- drawing -----------------------------------------------------------------------------------------------------------


def generate(options: DrawOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Draw pictures, write them and perhaps their token files, and say what was drawn (JSON types).

    Raises:
        InvalidParameterError: an option outside its range or that the model does not take, or no class of it; nothing
            is written. FileNotFoundError: no such model.
    """
    require("demo,diffusers", "diffusers", "transformers", "timm", what="tokred generate")
    form = picture_format(options.out)
    for flag, value, least in (("count", options.count, 1), ("seed", options.seed, 0), ("steps", options.steps, 1)):
        if value is not None and value < least:
            raise InvalidParameterError(f"--{flag} {value}: expected at least {least}")
    if options.seed >= 2**63 - MOST:
        raise InvalidParameterError(f"--seed {options.seed}: expected less than 2^63")
    if options.guidance is not None and not 0 <= options.guidance < math.inf:
        raise InvalidParameterError(f"--guidance {options.guidance:g}: expected a number of at least 0")
    began = time.perf_counter()
    drawer = open_generator(options.model, options.tokenizer, options.window)
    drawer.check(options)
    wanted = [drawer.asked(text) for text in options.what or drawer.every()]
    if len(wanted) * options.count > MOST:
        raise InvalidParameterError(f"{len(wanted)} times --count {options.count}: expected at most {MOST} pictures")
    progress = progress or Progress(quiet=True)
    progress.start("drawing", len(wanted) * options.count, "pictures")
    rows: list[list[Panel]] = []
    records: list[dict[str, Any]] = []
    files: list[tuple[Path, Tensor, str | None]] = []
    for asked in wanted:
        rows.append([])
        for seed in range(options.seed, options.seed + options.count):
            started = time.perf_counter()
            drawn, tokens, picture = _one(drawer, asked, options, seed)
            seconds = time.perf_counter() - started
            record: dict[str, Any] = {
                "asked": asked.text,
                "label": asked.label,
                "caption": drawn.caption,
                "seed": seed,
                "seconds": seconds,
                "tokens": list(tokens.shape),
                "latents" if tokens.is_floating_point() else "ids": tokens.tolist(),
            }
            if options.save_tokens is not None:
                place = options.save_tokens
                if len(wanted) * options.count > 1:
                    place = place.with_name(f"{place.stem}-{len(records)}{place.suffix}")
                record["file"] = str(place)
                files.append((place, tokens, drawn.caption))
            records.append(record)
            rows[-1].append(Panel(picture, f"{asked.text}, seed {seed}"))
            progress.advance(1)
    progress.stop()
    for place, tokens, caption in files:
        _save(drawer, place, tokens, caption)
    made = _sheet(rows)
    write_picture(made, options.out, form)
    return {
        "model": options.model,
        "settings": {
            **drawer.settings,
            **{name: value for name in sorted(drawer.takes) if (value := getattr(options, name)) is not None},
        },
        "image_size": drawer.tokenizer.image_size,
        "pictures": records,
        "picture": {"width": made.width, "height": made.height},
        "seconds": time.perf_counter() - began,
        "files": {"picture": str(options.out)},
    }


def _one(drawer: Drawer, asked: Asked, options: DrawOptions, seed: int) -> tuple[Asked, Tensor, Image]:
    """What was asked with its caption, the tokens, and the picture that `tokred decode` makes of them."""
    from tokred.generation.images import to_pil
    from tokred.generation.packing import TokenFile

    generator = torch.Generator().manual_seed(seed)
    if isinstance(drawer, _TexTok):
        asked = drawer.captioned(asked, generator)
    with torch.inference_mode():
        tokens = drawer.draw(asked, options, generator).cpu()
    bits = None if tokens.is_floating_point() else 1
    held = TokenFile(tokens, (drawer.tokenizer.image_size,) * 2, 0, caption=asked.caption, bits=bits)
    steps, noise = (options.steps, seed) if samples(drawer.tokenizer) else (None, None)
    return asked, tokens, to_pil(decoded(drawer.tokenizer, drawer.name, held, steps, None, noise, None))[0]


def _save(drawer: Drawer, path: Path, tokens: Tensor, caption: str | None) -> None:
    from tokred.generation.packing import save_tokens

    path.parent.mkdir(parents=True, exist_ok=True)
    codes = drawer.tokenizer.codebook_size
    form: dict[str, Any] = {"caption": caption} if codes is None else {"codebook_size": codes, "packed": True}
    save_tokens(path, tokens, fingerprint=drawer.made_by, image_size=drawer.tokenizer.image_size, **form)


def _sheet(rows: Sequence[Sequence[Panel]]) -> Image:
    """A picture as it is; several of them on a sheet, in rows or columns of what was asked for."""
    panels = [panel for row in rows for panel in row]
    if len(panels) == 1:
        return panels[0].image
    if len(rows[0]) == 1:  # one of each: rows of five
        rows = [panels[start : start + 5] for start in range(0, len(panels), 5)]
    elif len(rows) > len(rows[0]):  # wide rather than high
        rows = list(zip(*rows, strict=True))
    side = max(128, min(256, panels[0].image.width))
    return contact_sheet(rows, side)


def told(found: Mapping[str, Any]) -> str:
    """What `generate` gave back, for a terminal."""
    lines = []
    for one in found["pictures"]:
        shape = " x ".join(map(str, one["tokens"]))
        what = "numbers" if "latents" in one else "token" + "s" * (one["tokens"] != [1])
        file = f"; {one['file']}" if "file" in one else ""
        lines.append(f"{one['asked']}, seed {one['seed']}: {shape} {what}, {one['seconds']:.2f} s{file}")
    size = found["picture"]
    return "\n".join([*lines, f"written: {found['files']['picture']} ({size['width']} x {size['height']})"])
