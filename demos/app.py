"""The Gradio demo: the bundled models, reduced before your eyes. The same as `tokred demo`.

python demos/app.py [--port 7860] [--open]
"""

from __future__ import annotations

import sys

from tokred.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
