"""What to look for in the frames: one question to a language model (QuoTA, arXiv 2503.08689, query decoupling).

The prompts ask for what the released code asks for, in words of our own.
"""

from __future__ import annotations

import ast
import re
from typing import Any, Literal

import torch

from tokred.core.budget import check_choice, check_count
from tokred.core.errors import InvalidParameterError
from tokred.core.scoring import Decoupled

__all__ = ["LVLMDecoupler", "parse_event", "parse_objects"]

OBJECTS_PROMPT = """Question about a video:
{query}

Work through three steps and write one line for each.
Step 1: Must particular physical things be found in the pictures to answer? Write yes or no.
Step 2: If yes, list all things to look for as a Python list of strings.
Step 3: Copy that list without abstract words and without places or directions. Write null if nothing remains.

Example: How many bicycles pass the bridge? (A) 1 (B) 2 (C) 3
Step 1: yes
Step 2: ["bicycle", "bridge"]
Step 3: ["bicycle", "bridge"]

Example: What is the colour of the hat to the left of the lamp? (A) red (B) green
Step 1: yes
Step 2: ["hat", "lamp", "left"]
Step 3: ["hat", "lamp"]

Example: What is the mood of this film? (A) calm (B) tense
Step 1: no

Now answer for the question above."""

EVENT_PROMPT = """Question about a video:
{query}

Which event must a picture show to help with the answer? Write one short question that asks whether that event can be
seen in a picture. Write the question alone, on one line."""


class LVLMDecoupler:
    """Ask the answering model, once and without pictures, what matters in a question.

    Any transformers model that generates serves; call it before the video goes through the model.

    Args:
        model, processor: the model, and its processor or tokenizer, with a chat template.
        kind: "objects" lists the physical things to look for (the released code); "event" rewrites the question as a
            short one about the presence of the key event (the paper's figure 5; its wording is not released).
        max_new_tokens: the released limit is 4096.
    """

    def __init__(
        self, model: Any, processor: Any, kind: Literal["objects", "event"] = "objects", max_new_tokens: int = 4096
    ) -> None:
        check_choice("kind", kind, ("objects", "event"))
        self.model, self.processor, self.kind = model, processor, kind
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens, minimum=1)

    def __call__(self, query: str) -> Decoupled:
        """Return the question for the scorer and the objects; if the model gives no usable answer, the query alone."""
        template = OBJECTS_PROMPT if self.kind == "objects" else EVENT_PROMPT
        answer = self._generate(template.format(query=query))
        if self.kind == "objects":
            return Decoupled(query, tuple(parse_objects(answer)))
        return Decoupled(parse_event(answer) or query)

    @torch.inference_mode()
    def _generate(self, prompt: str) -> str:
        """Greedy text after one user turn."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        in_parts = tokenizer is not self.processor  # a processor takes the content of a turn in parts
        content = [{"type": "text", "text": prompt}] if in_parts else prompt
        messages = [{"role": "user", "content": content}]
        try:
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except ValueError as error:  # transformers: no chat template is set
            raise InvalidParameterError(f"processor {type(self.processor).__name__}: {error}") from error
        # As transformers itself: a processor adds the first token where its template has none, a tokenizer never does.
        bos = tokenizer.bos_token
        special = in_parts and not (bos and text.startswith(bos))
        encoded = tokenizer(text, return_tensors="pt", add_special_tokens=special)
        inputs = {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        out = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def parse_objects(text: str) -> list[str]:
    """The objects of step 3 of an answer, in lower case; [] for "no", null, and whatever cannot be read.

    The released code evaluates the list with `eval` and leaves its result unset where the answer is not as expected;
    here a literal list of strings is read, and nothing is ever run.
    """
    text = text.lower()
    needed = re.search(r"step 1:\s*(yes|no)", text)
    if needed is None or needed.group(1) == "no":
        return []
    found = re.search(r"step 3:\s*(\[.*?\])", text, re.DOTALL)
    if found is None:
        return []
    try:
        objects = ast.literal_eval(found.group(1))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return []
    return objects if isinstance(objects, list) and all(isinstance(name, str) for name in objects) else []


def parse_event(text: str) -> str:
    """The first line of an answer that is not empty, or ""."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
