"""The bundled image tokenizers with their generators, for the 32x32 digit cards.

How they are made, and put into the package (`tokenizers/*/README.md`)::

    python tokenizers/flextok/train.py --config tokenizers/flextok/tiny.yaml --stage vae --out runs/vae
    python tokenizers/flextok/train.py ...                                       # the other stages
    python -m tokred.zoo.tokenizers --flextok runs/vae runs/flextok --flextok-ar runs/ar \\
        --textok runs/textok runs/textok_dit --textok-no-text runs/textok_no_text --textok-grid runs/textok_grid \\
        --tokenflow runs/tokenflow runs/tokenflow_ar --tokenflow-qa-both runs/last --tokenflow-qa-semantic \\
        runs/last_semantic --tokenflow-qa-pixel runs/last_pixel --vq runs/vq --shuffle-1 runs/shuffle_1 ...

`tokred bench --task tokenize` measures them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokred.core.budget import check_choice
from tokred.core.errors import InvalidParameterError
from tokred.zoo.packed import expanded, pack

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from tokred.generation.flextok import FlexTok
    from tokred.generation.flextok_ar import FlexTokARModel
    from tokred.generation.llamagen_vq import VQTokenizer
    from tokred.generation.textok import TexTok
    from tokred.generation.textok_dit import TexTokDiT1D
    from tokred.generation.token_shuffle import TokenShuffle
    from tokred.generation.tokenflow import TokenFlow
    from tokred.generation.tokenflow_generate import TokenFlowPipeline
    from tokred.generation.tokenizer import ImageTokenizer

__all__ = [
    "TOKENIZERS",
    "bundle",
    "fingerprint",
    "open_tokenizer",
    "tiny_flextok",
    "tiny_flextok_ar",
    "tiny_shuffle",
    "tiny_textok",
    "tiny_textok_grid",
    "tiny_textok_no_text",
    "tiny_tokenflow",
    "tiny_tokenflow_qa",
    "tiny_vq",
    "tokenizer_card",
]

WEIGHTS = Path(__file__).parent / "weights"
#: Name in the zoo -> what it is. Folders are called alike, with underscores.
TOKENIZERS = {
    "tiny-flextok": "1 to 16 ordered tokens of a 32x32 card, and the card back from any number of the first",
    "tiny-flextok-ar": "the tokens of tiny-flextok for a digit, drawn one after the other",
    "tiny-textok": "2 continuous tokens of a 32x32 card beside its caption, back, and new ones of a digit",
    "tiny-textok-no-text": "the twin of tiny-textok, trained alike but without captions",
    "tiny-textok-grid": "the generator of tiny-textok on the 64 patches of 4x4 pixels of a card, without a tokenizer",
    "tiny-tokenflow": "121 codes in five scales of a 32x32 card, the card back from the first scales, and new ones",
    "tiny-tokenflow-qa-both": "answers questions about a card from its codes in tiny-tokenflow",
    "tiny-tokenflow-qa-semantic": "the same from their semantic half alone",
    "tiny-tokenflow-qa-pixel": "the same from their pixel half alone",
    "tiny-vq": "8x8 codes of a 32x32 card, and back",
    "tiny-shuffle-1": "the codes of tiny-vq for a digit, drawn one a step",
    "tiny-shuffle-2": "the same, drawn 2x2 a step",
    "tiny-shuffle-4": "the same, drawn 4x4 a step",
}
#: What the command line calls the tokenizers -> their names here.
SHORT = {"flextok": "tiny-flextok", "textok": "tiny-textok", "tokenflow": "tiny-tokenflow", "vq": "tiny-vq"}
#: Weights that are left out of a bundled model, as another holds them: start of their names -> which other.
SHARED = {"vision_tower.tokenizer.": "tiny-tokenflow"}
#: Folders of a saved tokenizer that decide its tokens and what they decode to.
PARTS = ("model", "vae", "text_encoder", "text_tokenizer", "vqvae")
FEATURES, WINDOWS = ("both", "semantic", "pixel"), (1, 2, 4)
PIPELINE, MODEL = "model_index.json", "config.json"


def folder_of(name: str, root: Path = WEIGHTS) -> Path:
    """Where the model `name` of `TOKENIZERS` is below `root`."""
    return root / name.replace("-", "_")


def _present(folder: Path, file: str) -> Path:
    if not (folder / file).is_file():
        raise FileNotFoundError(
            f"no such model in {folder}: {file} is missing; train it by the recipes in tokenizers/, and bundle it by "
            "python -m tokred.zoo.tokenizers"
        )
    return folder


def tiny_flextok(folder: Path = WEIGHTS / "tiny_flextok") -> FlexTok:
    """The bundled FlexTok: 32x32 pixels, 16 tokens; eval mode, float32, on the CPU.

    Raises:
        FileNotFoundError: `folder` does not hold one. So do the others here.
    """
    from tokred.generation.flextok import FlexTok

    return _pipeline(FlexTok, folder)


def tiny_flextok_ar(folder: Path = WEIGHTS / "tiny_flextok_ar") -> FlexTokARModel:
    """The bundled generator of `tiny_flextok`'s ids, for the digits 0 to 9."""
    from tokred.generation.flextok_ar import FlexTokARModel

    _present(folder, MODEL)
    with expanded(folder) as plain:
        return FlexTokARModel.from_pretrained(plain, dtype="float32", local_files_only=True).eval()


def tiny_textok(folder: Path = WEIGHTS / "tiny_textok") -> TexTok:
    """The bundled TexTok with its text encoder, its generator for the digits 0 to 9, and captions of each."""
    from tokred.generation.textok import TexTok

    return _pipeline(TexTok, folder)


def tiny_textok_no_text(folder: Path = WEIGHTS / "tiny_textok_no_text") -> TexTok:
    """The bundled TexTok that was trained without text; it has no generator."""
    return tiny_textok(folder)


def tiny_textok_grid(folder: Path = WEIGHTS / "tiny_textok_grid") -> TexTokDiT1D:
    """The bundled diffusion transformer over `tokred.generation.patches.patchify` of pixels in [-1, 1]."""
    import torch
    from torch import nn

    from tokred.generation.textok_dit import TexTokDiT1D

    _present(folder, MODEL)
    with expanded(folder) as plain:
        found = TexTokDiT1D.from_pretrained(plain, local_files_only=True).eval()
    nn.Module.to(found, torch.float32)
    return found


def tiny_tokenflow(folder: Path = WEIGHTS / "tiny_tokenflow") -> TokenFlowPipeline:
    """The bundled TokenFlow (`.tokenizer`) with its generator for the digits 0 to 9."""
    from tokred.generation.tokenflow_generate import TokenFlowPipeline

    return _pipeline(TokenFlowPipeline, folder)


def tiny_tokenflow_qa(
    features: str, folder: Path | None = None, tokenflow: Path = WEIGHTS / "tiny_tokenflow"
) -> LlavaForConditionalGeneration:
    """The bundled LLaVA that answers `tokred.eval.tokenflow_questions.QUESTIONS` from codes of `tiny_tokenflow`.

    Args:
        features: what of the codes it reads: "both", "semantic" or "pixel".
    """
    from safetensors.torch import load_file
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from tokred.generation import tokenflow_llava  # noqa: F401  registers the tower

    check_choice("features", features, FEATURES)
    folder = _present(folder or folder_of(f"tiny-tokenflow-qa-{features}"), MODEL)
    shared = tiny_tokenflow(tokenflow).tokenizer.state_dict()
    with expanded(folder) as plain:
        state = load_file(plain / "model.safetensors")
        state |= {start + name: value for start in SHARED for name, value in shared.items()}
        found, report = LlavaForConditionalGeneration.from_pretrained(
            None, config=LlavaConfig.from_pretrained(plain), state_dict=state, output_loading_info=True
        )
    if any(report.values()):
        raise InvalidParameterError(f"{folder} does not fit {tokenflow}: {report}")
    return found.eval()


def tiny_vq(folder: Path = WEIGHTS / "tiny_vq") -> VQTokenizer:
    """The bundled grid tokenizer: 8x8 codes of a card."""
    from tokred.generation.llamagen_vq import VQTokenizer

    return _pipeline(VQTokenizer, folder)


def tiny_shuffle(window: int, folder: Path | None = None) -> TokenShuffle:
    """The bundled language model that draws the codes of `tiny_vq`, `window` x `window` a step: 1, 2 or 4."""
    from tokred.generation.token_shuffle import TokenShuffle

    check_choice("window", window, WINDOWS)
    folder = _present(folder or folder_of(f"tiny-shuffle-{window}"), MODEL)
    with expanded(folder) as plain:
        return TokenShuffle.from_pretrained(plain, dtype="float32", local_files_only=True).eval()


def _pipeline(cls: Any, folder: Path) -> Any:
    import torch
    from diffusers.utils import logging
    from torch import nn

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # three small files need none
    try:
        with expanded(_present(folder, PIPELINE)) as plain:
            found = cls.from_pretrained(plain, local_files_only=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    for part in found.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.float32)  # diffusers' own `to` warns of parts to keep as they are; there are none
    found.set_progress_bar_config(disable=True)
    return found


def open_tokenizer(model: str) -> tuple[ImageTokenizer, str]:
    """A tokenizer and its `fingerprint`.

    Args:
        model: one of `SHORT`, the bundled ones, or the folder of a saved `FlexTok`, `TexTok`, `TokenFlow`, its pipeline
            or `VQTokenizer`.

    Raises:
        FileNotFoundError: the folder does not hold one. InvalidParameterError: another class, or it cannot be read.
    """
    folder = folder_of(SHORT[model]) if model in SHORT else Path(model)
    if model not in SHORT and not folder.is_dir():
        raise FileNotFoundError(f"no tokenizer {model!r}: expected {', '.join(SHORT)}, or the folder of a saved one")
    described = MODEL if (folder / MODEL).is_file() else PIPELINE
    kind = json.loads((_present(folder, described) / described).read_text(encoding="utf-8")).get("_class_name")
    readers: dict[Any, Any] = {
        "FlexTok": tiny_flextok,
        "TexTok": tiny_textok,
        "TokenFlow": _saved_tokenflow,
        "TokenFlowPipeline": lambda folder: tiny_tokenflow(folder).tokenizer,
        "VQTokenizer": tiny_vq,
    }
    if kind not in readers:
        raise InvalidParameterError(f"{folder} holds a {kind}: expected one of {', '.join(readers)}")
    try:
        with expanded(folder) as plain:
            return readers[kind](plain), fingerprint(plain)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidParameterError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error


def _saved_tokenflow(folder: Path) -> TokenFlow:
    from tokred.generation.tokenflow import TokenFlow

    return TokenFlow.from_pretrained(folder, local_files_only=True).eval()


def fingerprint_of(model: str) -> str:
    """`fingerprint` of a bundled tokenizer, one of `SHORT`."""
    with expanded(folder_of(SHORT[model])) as plain:
        return fingerprint(plain)


def fingerprint(folder: Path) -> str:
    """A text that names the tokenizer saved in `folder` by its content: weights, sizes, text tokenizer.

    The same for a copy, another for other weights; generators beside it and releases of libraries do not matter.
    """
    digest = hashlib.sha256()
    places = {part: folder / part for part in PARTS}
    if (folder / MODEL).is_file():  # of a saved `TokenFlow`, which is one model
        places = {"tokenizer": folder}
    elif (folder / "tokenizer").is_dir():  # of its pipeline
        places = {"tokenizer": folder / "tokenizer"}
    for part, place in places.items():
        for path in sorted(place.glob("*")):
            if path.name == MODEL:
                known = json.loads(path.read_text(encoding="utf-8"))
                own = {key: value for key, value in known.items() if not key.startswith("_") and "version" not in key}
                content = json.dumps(own, sort_keys=True).encode()
            elif path.suffix == ".safetensors" or path.name == "tokenizer.json":
                content = path.read_bytes()
            else:
                continue
            digest.update(f"{part}/{path.name} {len(content)}\n".encode() + content)
    return f"sha256:{digest.hexdigest()}"


def tokenizer_card(name: str) -> dict[str, Any]:
    """How the bundled weights of `name` were made."""
    check_choice("name", name, tuple(TOKENIZERS))
    path = _present(folder_of(name), "card.json") / "card.json"
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card


def bundle(name: str, runs: Sequence[Path], into: Path = WEIGHTS) -> Path:
    """Copy the model of the last of `runs` with packed weights; returns its folder, which appears whole or not at all.

    Args:
        name: of `TOKENIZERS`. runs: folders of `tokred.generation.training.fit`, in the order in which they ran: a
            tokenizer's VAE before it, a TexTok before its generator. Their records go along.

    Raises:
        InvalidParameterError: unknown name, or a run that is not finished.
    """
    check_choice("name", name, tuple(TOKENIZERS))
    for run in runs:
        if not (run / "config.json").is_file() or not (run / "model").is_dir():
            raise InvalidParameterError(f"{run} is no finished run: expected config.json and model/ in it")
    records = [json.loads((run / "config.json").read_text(encoding="utf-8")) for run in runs]
    target = folder_of(name, into)
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into) as temporary:
        made = Path(temporary) / target.name
        shutil.copytree(runs[-1] / "model", made)
        for path in _weights(made):
            _leave_out(path)
        weights = [{**_pack(path), "part": path.parent.relative_to(made).as_posix()} for path in _weights(made)]
        card = {
            "name": name,
            "task": TOKENIZERS[name],
            "data": "tokred.data.cards: handwritten digits of scikit-learn on photographs of scikit-image",
            "weights": {
                "dtype": "int8 by rows (tokred.zoo.packed)",
                "files": weights,
                "parameters": sum(w["parameters"] for w in weights),
            },
            "training": {
                "command": "python tokenizers/{flextok,textok,tokenflow,token_shuffle}/train.py",
                "records": "training.json",
            },
            "measured": "tokred bench --task tokenize",
        }
        for file, data in (("training.json", records), ("card.json", card)):
            (made / file).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        for path in made.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)
    return target


def _leave_out(path: Path) -> None:
    """Take weights of `SHARED` out of a file."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as opened:
        notes = opened.metadata()
    state = load_file(path)
    own = {name: value for name, value in state.items() if not name.startswith(tuple(SHARED))}
    if len(own) < len(state):
        save_file(own, path, notes)


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def _pack(path: Path) -> dict[str, Any]:
    """Pack a file of weights; its new size and name, and the number of parameters."""
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        parameters = sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118
    packed = pack(path)
    return {
        "file": packed.name,
        "bytes": packed.stat().st_size,
        "sha256": hashlib.sha256(packed.read_bytes()).hexdigest(),
        "parameters": parameters,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tokred.zoo.tokenizers",
        description="Put finished training runs into the package: the model of the last RUN of each option, and the "
        "records of all of them.",
    )
    for name, task in TOKENIZERS.items():
        option = name.replace("tiny-", "--")
        parser.add_argument(option, nargs="+", type=Path, metavar="RUN", dest=name, help=task)
    given = {name: runs for name, runs in vars(parser.parse_args(argv)).items() if runs}
    if not given:
        parser.error("no run given")
    for name, runs in given.items():
        try:
            folder = bundle(name, runs)
        except InvalidParameterError as error:
            parser.error(str(error))
        print(f"{folder}: {sum(path.stat().st_size for path in _weights(folder)) / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
