"""PSNR, SSIM and rFID of a FlexTok at 1, 2, 4 ... tokens: `tokred eval reconstruct` with the bundled one as default.

python tokenizers/flextok/evaluate.py --model runs/flextok/model
python tokenizers/flextok/evaluate.py --model DIR --data PICTURES --count 50000 --features INCEPTION --json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tokred import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    return cli.main(["eval", "reconstruct", "--model", "flextok", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
