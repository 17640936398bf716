"""Ask a Llama about one sentence of a long text: once it reads all of it, once GemFilter lets it read what counts.

python demos/llama.py [--text book.txt --question "..."] [--words 8000] [--k 1024]

Of some models GemFilter knows its layer, as of the default one; of others it measures them first. The default model has
8 billion parameters, of two bytes each, and the hub asks for your consent to its licence; --model takes any Llama,
Mistral, Phi-3 or Qwen, by its hub id or a folder.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokred
from tokred.eval.scripts import default_device, failing_in_one_line, gmacs, timed

SECRET, QUESTION = "The secret number of the lighthouse is 4817.", "What is the secret number of the lighthouse?"


def long_text(words: int) -> str:
    """Sentences that say nothing, and one in their middle that says something."""
    sentences = [f"Sentence {i} of the text says that nothing happens in year {i % 97}." for i in range(words // 12)]
    sentences.insert(len(sentences) // 2, SECRET)
    return " ".join(sentences)


@torch.inference_mode()
def run(given: argparse.Namespace) -> None:
    method = tokred.GemFilter(k=given.k, layer=given.layer)
    text = Path(given.text).read_text(encoding="utf-8") if given.text else long_text(given.words)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=given.dtype).eval().to(given.device)
    prompt = f"Read the text and answer the question about it.\n\n{text}\n\n{given.question}"
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(given.device)
    length = inputs["input_ids"].shape[1]

    def answer() -> str:
        output = model.generate(**inputs, max_new_tokens=given.tokens, do_sample=False)
        return tokenizer.decode(output[0, length:], skip_special_tokens=True).strip()

    plain, seconds = timed(answer)
    cost = gmacs(model, inputs)

    patch = tokred.patch(model, method)
    reduced, seconds_reduced = timed(answer)
    cost_reduced = gmacs(model, inputs)
    if not patch.trace.prompt:
        raise SystemExit(f"the prompt has {length} tokens, and {method} keeps every one; give a smaller --k")
    step = patch.trace.prompt[0]
    patch.remove()

    print(f"{given.model}, {method}, layer {step.layer} (each was called once before its time was taken)")
    print(f"  {length} tokens, {cost}, {seconds:.2f} s: {plain!r}")
    print(f"  {step.tokens_out[0]} tokens, {cost_reduced}, {seconds_reduced:.2f} s: {reduced!r}")
    print("  what it read: " + textwrap.shorten(step.words(tokenizer), 500))
    print(f"  undone, the first answer again: {answer() == plain}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B-Instruct", help="default: %(default)s")
    parser.add_argument("--text", metavar="FILE", help="default: a text that hides a secret number")
    parser.add_argument("--words", type=int, default=8000, help="of that text (default: %(default)s)")
    parser.add_argument("--question", default=QUESTION, help="default: %(default)s")
    parser.add_argument("--k", type=int, default=1024, help="tokens that are read by all layers (default: %(default)s)")
    parser.add_argument("--layer", type=int, help="that chooses them (default: known, or measured)")
    parser.add_argument("--tokens", type=int, default=20, help="of the answer, at most (default: %(default)s)")
    parser.add_argument("--device", default=default_device(), help="default here: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (default: %(default)s)")
    given = parser.parse_args(argv)
    with failing_in_one_line(given.model):
        run(given)


if __name__ == "__main__":
    main()
