"""The command `tokred generate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_generate"]


def add_generate(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``generate`` to the commands."""
    from tokred.cli_common import add_command
    from tokred.eval.draw_options import BUNDLED, DrawOptions

    made = add_command(
        commands,
        common,
        "generate",
        _generate,
        "new pictures of a class or a prompt, token by token",
        """
        Draw tokens of a class or a prompt with a generator, and decode them. The bundled generators draw 32x32 cards of
        handwritten digits: 0 to 9, or zero to nine. A picture depends on its seed, not on what else is drawn with it.

          tokred generate
          tokred generate 7 3 --count 4 --num-tokens 4
          tokred generate seven --model token-shuffle --window 4
          tokred generate --model tokenflow --count 3
          tokred generate 7 -o seven.png --save-tokens seven.ftk && tokred decode seven.ftk -o again.png
        """,
    )
    made.add_argument(
        "what",
        nargs="*",
        metavar="WHAT",
        help="classes, by number or name; of a saved generator of texts, prompts (default: each class)",
    )
    kinds = "; ".join(f"{name}: {text}" for name, text in BUNDLED.items())
    made.add_argument(
        "--model",
        default=DrawOptions.model,
        help=f"a bundled one ({kinds}), or the folder of a saved generator: FlexTokGenerationPipeline, "
        "TokenFlowPipeline, TexTok, FlexTokARModel or TokenShuffle (default: %(default)s)",
    )
    made.add_argument(
        "--tokenizer",
        help="of a saved FlexTokARModel or TokenShuffle: as encode --model takes it (default: the bundled one)",
    )
    made.add_argument(
        "--count", type=int, default=DrawOptions.count, metavar="N", help="pictures of each (default: %(default)s)"
    )
    made.add_argument(
        "--seed", type=int, default=DrawOptions.seed, help="of the first; the next have the next (default: %(default)s)"
    )
    made.add_argument(
        "--num-tokens",
        type=int,
        metavar="K",
        help="draw so many first tokens (FlexTok; TokenFlow: whole scales; default: all)",
    )
    made.add_argument(
        "--guidance",
        type=float,
        metavar="G",
        help="towards what is asked for; none is 1, for TokenFlow 0 (default: of flextok and textok 1.5, of tokenflow "
        "3, of token-shuffle 2, of another its own)",
    )
    made.add_argument("--steps", type=int, help="of FlexTok's decoder, of TexTok's generator (default: 25)")
    made.add_argument(
        "--window", type=int, metavar="S", help="S x S codes a step: 1, 2 or 4 (token-shuffle; default: 2)"
    )
    made.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="IMAGE",
        help="the picture, or the sheet of several (default: outputs/generate-MODEL.png)",
    )
    made.add_argument(
        "--save-tokens",
        type=Path,
        metavar="FILE",
        help="the token file; of several pictures each its own, numbered. tokred decode makes the same picture of it "
        "(FlexTok: with the same --seed and --steps)",
    )


def _generate(given: argparse.Namespace) -> None:
    from tokred.eval.bench import Progress
    from tokred.eval.drawing import DrawOptions, generate, told
    from tokred.eval.report import dumps

    safe = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in given.model)
    options = DrawOptions(
        what=tuple(given.what),
        model=given.model,
        tokenizer=given.tokenizer,
        count=given.count,
        seed=given.seed,
        num_tokens=given.num_tokens,
        guidance=given.guidance,
        steps=given.steps,
        window=given.window,
        out=given.out or Path("outputs") / f"generate-{safe}.png",
        save_tokens=given.save_tokens,
    )
    with Progress() as progress:
        found = generate(options, progress)
    print(dumps(found) if given.json else told(found))
