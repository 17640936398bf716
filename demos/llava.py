"""Ask a LLaVA about a picture, with all of its visual tokens and with a part of them.

python demos/llava.py [--image cat.jpg] [--question "..."] [--method hired] [--budget 0.2]

The default model has 7 billion parameters, of two bytes each; --model takes any LLaVA or LLaVA-NeXT, by its hub id or
a folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokred
from tokred.eval.scripts import default_device, failing_in_one_line, gmacs, photograph, timed

METHODS = {
    "hired": tokred.HiRED,
    "visionzip": tokred.VisionZip,
    "divprune": tokred.DivPrune,
    "cdpruner": tokred.CDPruner,
    "vispruner": tokred.VisPruner,
}


@torch.inference_mode()
def run(given: argparse.Namespace) -> None:
    method = METHODS[given.method](budget=given.budget)
    image = photograph(given.image)
    processor = AutoProcessor.from_pretrained(given.model)
    model = AutoModelForImageTextToText.from_pretrained(given.model, dtype=given.dtype).eval().to(given.device)
    content = [{"type": "image"}, {"type": "text", "text": given.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device, model.dtype)

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
    patch.trace.draw(seen(image, processor, inputs)).save(given.out)
    patch.remove()

    print(f"{given.model}, {method} (each was called once before its time was taken)")
    print(f"  {kept.tokens_in} visual tokens, {cost}, {seconds:.2f} s: {plain!r}")
    print(f"  {kept.tokens_out} visual tokens, {cost_reduced}, {seconds_reduced:.2f} s: {reduced!r}")
    print(f"  undone, the first answer again: {answer() == plain}")
    print(f"written: {given.out}")


def seen(image: Any, processor: Any, inputs: Any) -> Any:
    """What the tower saw: LLaVA-1.5 a square crop, (3, H, W) in [0, 1]; a model that makes tiles the whole picture."""
    pixels = inputs["pixel_values"][0].float().cpu()
    if pixels.ndim > 3:
        return image
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    return (pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]).clamp(0, 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="default: %(default)s")
    parser.add_argument("--image", metavar="FILE", help="default: a photograph of a cat")
    parser.add_argument("--question", default="What is in the picture?", help="default: %(default)s")
    parser.add_argument("--method", default="hired", choices=METHODS, help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=0.2, help="share of the visual tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=40, help="of the answer, at most (default: %(default)s)")
    parser.add_argument("--device", default=default_device(), help="default here: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (default: %(default)s)")
    parser.add_argument("--out", default="llava.png", metavar="FILE", help="the picture (default: %(default)s)")
    given = parser.parse_args(argv)
    with failing_in_one_line(given.model):
        run(given)


if __name__ == "__main__":
    main()
