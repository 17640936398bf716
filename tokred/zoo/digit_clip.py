"""The bundled tiny CLIP: says how well a frame fits a text about coloured digits.

An open_clip ``CLIP`` with its own small vocabulary, used as any open_clip model::

    model, preprocess, tokenizer = digit_clip()
    image = model.encode_image(preprocess(frame)[None], normalize=True)      # (1, 64)
    text = model.encode_text(tokenizer(["which digit is red ?"]), normalize=True)
    (image @ text.T).item()                                                  # high where a digit is red

Made and measured by ``python -m tokred.zoo.train_digit_clip``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from open_clip.model import CLIP
    from PIL import Image

FOLDER = Path(__file__).parent / "weights" / "digit_clip"

_WORDS = (
    "<pad> <unk> <start> ? which digit digits is are how many there what colour the a in show shows something frame "
    "0 1 2 3 4 5 6 7 8 9 red green blue yellow cyan magenta "
    "<end>"  # last: open_clip reads the text at the highest id
)
WORDS = tuple(_WORDS.split())
_WORD_IDS = {word: i for i, word in enumerate(WORDS)}
CONTEXT = 12

CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 96,
        "patch_size": 8,
        "width": 128,
        "layers": 4,
        "head_width": 32,
        "mlp_ratio": 3.0,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": len(WORDS),
        "width": 64,
        "heads": 2,
        "layers": 2,
        "mlp_ratio": 2.0,
    },
}
MEAN, STD = (0.5,) * 3, (0.25,) * 3


class WordTokenizer:
    """Texts -> (n, 12) int64 ids: start, one id for each known word, end, padding. Letter case is ignored.

    A word outside ``WORDS`` becomes ``<unk>``; a text with more than ten words is cut.
    """

    context_length = CONTEXT

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        rows = [texts] if isinstance(texts, str) else texts
        length = context_length or CONTEXT
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        for i, text in enumerate(rows):
            words = re.findall(r"[a-z0-9]+|\?", text.lower())[: length - 2]
            known = [_WORD_IDS.get(word, _WORD_IDS["<unk>"]) for word in words]
            row = [_WORD_IDS["<start>"], *known, _WORD_IDS["<end>"]]
            ids[i, : len(row)] = torch.tensor(row)
        return ids


def build_digit_clip() -> CLIP:
    """The architecture with random weights; cosines times ``logit_scale.exp()`` plus ``logit_bias`` are logits."""
    try:
        from open_clip.model import CLIP
    except ImportError as error:
        raise ImportError('the digit CLIP needs open_clip; run: pip install "tokred[openclip]"') from error
    return CLIP(**CONFIG, init_logit_scale=2.3, init_logit_bias=-4.0).eval()


def digit_clip(folder: Path = FOLDER) -> tuple[CLIP, Callable[[Image.Image], Tensor], WordTokenizer]:
    """The bundled model (eval, float32, on the CPU), its transform of a PIL image, its tokenizer; no network."""
    model = build_digit_clip()
    from open_clip.transform import image_transform
    from safetensors.torch import load_file

    state = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(state, strict=True)
    size = CONFIG["vision_cfg"]["image_size"]
    return model, image_transform(size, is_train=False, mean=MEAN, std=STD), WordTokenizer()


def digit_clip_card() -> dict[str, Any]:
    """How the bundled weights were made, and their measured numbers."""
    card: dict[str, Any] = json.loads((FOLDER / "card.json").read_text())
    return card
