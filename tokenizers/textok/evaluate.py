"""PSNR, SSIM and rFID of a TexTok, with right and wrong captions: `tokred eval reconstruct` on the bundled one.

python tokenizers/textok/evaluate.py --model runs/textok/model
python tokenizers/textok/evaluate.py --model DIR --data PICTURES --count 50000 --features INCEPTION --json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tokred import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    return cli.main(["eval", "reconstruct", "--model", "textok", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
