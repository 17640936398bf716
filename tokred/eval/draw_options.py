"""What `tokred generate` can be asked for; light, so that the command's help needs no model library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["BUNDLED", "DrawOptions"]

#: bundled generators, as the command line calls them -> what they draw
BUNDLED = {
    "flextok": "ids one after the other; any number of the first (--num-tokens)",
    "textok": "latents out of noise, decoded with a caption of the class",
    "tokenflow": "codes scale by scale; the first scales alone (--num-tokens)",
    "token-shuffle": "1, 4 or 16 codes of a grid a step (--window)",
}


@dataclass(frozen=True)
class DrawOptions:
    """What to draw; None is the model's own.

    Attributes:
        what: classes or prompts; empty is every class. count: pictures of each, with the seeds seed, seed + 1, ...
        model: one of `BUNDLED`, or the folder of a saved generator. tokenizer: of a generator that is saved without.
        num_tokens: draw so many first tokens. guidance: scale of the generator's. steps: of what samples in steps.
        window: codes along each side of a step, token-shuffle.
        out: the picture, or the sheet of several. save_tokens: token file; of several pictures each gets its own.
    """

    what: tuple[str, ...] = ()
    model: str = "flextok"
    tokenizer: str | None = None
    count: int = 1
    seed: int = 0
    num_tokens: int | None = None
    guidance: float | None = None
    steps: int | None = None
    window: int | None = None
    out: Path = Path("outputs/generate.png")
    save_tokens: Path | None = None
