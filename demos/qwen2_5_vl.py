"""Ask a Qwen2.5-VL about a picture or a video, with all of its visual tokens and with a part of them.

python demos/qwen2_5_vl.py [--image cat.jpg] [--method visionzip] [--budget 0.2]
python demos/qwen2_5_vl.py --video [clip.mp4] [--frames 16] [--method evs]

The default model is the smallest of its family; --model takes any Qwen2-VL to Qwen3-VL, by its hub id or a folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokred
from tokred.eval.scripts import default_device, failing_in_one_line, gmacs, photograph, timed

METHODS = {
    "visionzip": tokred.VisionZip,
    "divprune": tokred.DivPrune,
    "cdpruner": tokred.CDPruner,
    "vispruner": tokred.VisPruner,
    "evs": tokred.EVS,
}
DEFAULTS = {"image": ("visionzip", "What is in the picture?"), "video": ("evs", "What happens in the video?")}


@torch.inference_mode()
def run(given: argparse.Namespace) -> None:
    kind = "image" if given.video is None else "video"
    name, question = DEFAULTS[kind]
    method = METHODS[given.method or name](budget=given.budget)
    media = photograph(given.image) if kind == "image" else frames_of(given)
    processor = AutoProcessor.from_pretrained(given.model)
    model = AutoModelForImageTextToText.from_pretrained(given.model, dtype=given.dtype).eval().to(given.device)
    content = [{"type": kind}, {"type": "text", "text": given.question or question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    options = {"images": [media]} if kind == "image" else {"videos": [media], "do_sample_frames": False}
    inputs = processor(text=[prompt], **options, return_tensors="pt").to(model.device, model.dtype)

    def answer() -> str:
        output = model.generate(**inputs, max_new_tokens=given.tokens, do_sample=False)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    plain, seconds = timed(answer)
    cost = gmacs(model, inputs)

    patch = tokred.patch(model, method, processor=processor)
    reduced, seconds_reduced = timed(answer)
    cost_reduced = gmacs(model, inputs)
    if not patch.trace.media:
        raise SystemExit(f"{method} keeps every token here")
    kept = patch.trace.media[0]
    patch.trace.draw(media).save(given.out)
    patch.remove()

    print(f"{given.model}, {method} (each was called once before its time was taken)")
    print(f"  {kept.tokens_in} visual tokens, {cost}, {seconds:.2f} s: {plain!r}")
    print(f"  {kept.tokens_out} visual tokens, {cost_reduced}, {seconds_reduced:.2f} s: {reduced!r}")
    if kind == "video":
        print(f"  tokens of each pair of frames: {kept.per_partition}")
    print(f"  undone, the first answer again: {answer() == plain}")
    print(f"written: {given.out}")


def frames_of(given: argparse.Namespace) -> Any:
    """Frames (T, H, W, 3) uint8 of a video; without one a view that moves over the picture and then stands still."""
    if given.video:
        return tokred.vlm.read_video(given.video, base_frames=given.frames, extra_frames=0).frames
    picture = np.asarray(photograph(given.image).resize((420, 280)))
    starts = np.linspace(0, 2 * 140, given.frames).clip(max=140).astype(int)
    return np.stack([picture[:, start : start + 280] for start in starts])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="default: %(default)s")
    parser.add_argument("--image", metavar="FILE", help="default: a photograph of a cat")
    parser.add_argument(
        "--video", nargs="?", const="", metavar="FILE", help="ask about a video; without FILE one made of the picture"
    )
    parser.add_argument("--frames", type=int, default=16, help="of the video (default: %(default)s)")
    parser.add_argument("--question", help="default: what is in the picture, or what happens in the video")
    parser.add_argument("--method", choices=METHODS, help="default: visionzip, of a video evs")
    parser.add_argument("--budget", type=float, default=0.2, help="share of the visual tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=40, help="of the answer, at most (default: %(default)s)")
    parser.add_argument("--device", default=default_device(), help="default here: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (default: %(default)s)")
    parser.add_argument("--out", default="qwen2_5_vl.png", metavar="FILE", help="the picture (default: %(default)s)")
    given = parser.parse_args(argv)
    with failing_in_one_line(given.model):
        run(given)


if __name__ == "__main__":
    main()
