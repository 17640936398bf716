"""Train the bundled needle LLM from scratch, or measure a trained one and write its card.

    python -m tokred.zoo.train_needle_llm --seed 0 --out runs/needle_llm
    python -m tokred.zoo.train_needle_llm --evaluate --bundle --out runs/needle_llm   # card; copies into the package

From ordinary random weights a model of this size spends its time on a plateau: it answers with any value that it has
seen (chance among the needles). So the part that looks up a name is written by hand (``start_values``): layer 0 copies
the one or two words before each word, and layer 1 looks for the place whose copies are those of the last word. It stays
as it is (``written_parts``): nothing in the loss keeps its scores apart, and trained along it was blurred within 200
steps (the 64 best of 516 tokens by raw scores had the question in a third of the prompts). All the rest, which reads
the answer there and says it, is trained, on contexts that grow. Part of the batches are thinned contexts, broken text
in which only the needles asked for are sure to be whole, so that a shortened prompt is nothing new; which tokens stay
is drawn at random.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tokred.data.needles import NAME_AT, NAME_IDS, SENTENCE, VALUE_AT, draw_needles
from tokred.zoo.needle_llm import CONFIG, EOS, build_needle_llm, build_needle_tokenizer
from tokred.zoo.training import Average, Optimiser, Rates, save_folder, trainer_arguments

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

RATES = Rates(muon=0.01, adam=1e-3, betas=(0.9, 0.95), warmup=30, hold=0.3)


@dataclass(frozen=True)
class Phase:
    """``steps`` batches of contexts of one length; a share of them is thinned first."""

    steps: int
    batch: int
    tokens: int
    needles: int
    questions: int  #: of each context
    thinned: float = 0.0  #: share of the batches
    kept: tuple[int, ...] = (12, 16, 24, 32, 48, 64, 96, 128, 192)  #: tokens that a thinned context keeps


@dataclass(frozen=True)
class NeedleRecipe:
    """Everything that decides a training run besides the seed."""

    phases: tuple[Phase, ...] = (
        Phase(80, 32, 60, 8, 8, thinned=0.2, kept=(12, 16, 24, 32, 48)),
        Phase(70, 24, 120, 12, 12, thinned=0.25, kept=(12, 16, 24, 32, 48, 64, 96)),
        Phase(70, 16, 240, 16, 16, thinned=0.3),
        Phase(110, 8, 480, 24, 24, thinned=0.3),
        Phase(70, 4, 960, 32, 32, thinned=0.3),
    )
    rates: Rates = RATES
    ema: float = 0.99

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def scaled(self, factor: float) -> NeedleRecipe:
        """The same with ``factor`` times the steps of every phase."""
        phases = tuple(replace(p, steps=max(1, round(p.steps * factor))) for p in self.phases)
        return replace(self, phases=phases)

    def smoke(self) -> NeedleRecipe:
        """Two steps a phase on tiny batches: only shows that the command runs."""
        return replace(self, phases=tuple(replace(p, steps=2, batch=2) for p in self.phases))


@torch.no_grad()
def start_values(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """The circuit that finds the name asked for, written into ``written_parts``; the rest keeps its random values.

    Words: random directions, and a ``view`` that only names have. Layer 0: biases alone make query heads 0 and 1 look
    one and two words back, through the rotary phase of the fastest frequencies; they copy the view of that word into
    directions that no word uses. Layer 1: the last word asks with the copy of the word before it (the name before
    ``is``). In key group 0 places answer with the word two before them (the value of that name does), in key group 1
    with the word one before them (``is`` behind that name, in the needle and in the question itself). Both on the
    slower frequencies, which far places still share.
    """
    embed, layers = model.model.embed_tokens, model.model.layers
    width, size = CONFIG["hidden_size"], CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    half = size // 2
    bases = torch.linalg.qr(torch.randn(width, width, generator=generator))[0].split(size, 1)
    view, one_back, two_back, other = bases
    words = torch.randn(len(embed.weight), 2, size, generator=generator)
    words[: NAME_IDS.start, 0] = words[NAME_IDS.stop :, 0] = 0
    embed.weight.copy_(0.7 * words.flatten(1) @ torch.cat([view, other], 1).T)
    first, second = layers[0].self_attn, layers[1].self_attn
    theta = CONFIG["rope_parameters"]["rope_theta"]
    speed = theta ** -(torch.arange(half) / half)
    loud = 6.0 * (torch.arange(half) < 4)
    first.k_proj.weight[:size] = 0
    first.k_proj.bias[:size] = torch.cat([loud, 0 * loud])
    first.v_proj.weight[:size] = view.T
    for head, (back, target) in enumerate(((1, one_back), (2, two_back))):
        rows = slice(head * size, (head + 1) * size)
        first.q_proj.weight[rows] = 0
        first.q_proj.bias[rows] = torch.cat([loud * (-back * speed).cos(), loud * (-back * speed).sin()])
        first.o_proj.weight[:, rows] = 0.5 * target
    slow = (torch.arange(size) % half >= 4)[:, None]
    heads = CONFIG["num_attention_heads"] // CONFIG["num_key_value_heads"]
    for group, target in enumerate((two_back, one_back)):
        second.k_proj.weight[group * size : (group + 1) * size] = 1.5 * slow * target.T
        for head in range(group * heads, (group + 1) * heads):
            second.q_proj.weight[head * size : (head + 1) * size] = 1.5 * slow * one_back.T


def written_parts(model: LlamaForCausalLM) -> tuple[nn.Module, ...]:
    """What keeps the values of ``start_values``: all that decides the queries and keys of layer 1."""
    first, second = model.model.layers[:2]
    attention = second.self_attn
    return model.model.embed_tokens, first, second.input_layernorm, attention.q_proj, attention.k_proj


def thin(context: Tensor, needles: Tensor, count: int, pool: int, first: float, generator: torch.Generator) -> Tensor:
    """``count`` tokens (B, count) of contexts (B, T) in their order: random pieces, and the core of each needle asked.

    ``needles`` (B, Q) are the first tokens of the needles of which name, ``is`` and value are kept for sure; the rest
    are single tokens (``pool`` 1) or pieces (larger ``pool``). The first token has a chance ``first`` to be kept.
    """
    noise = torch.randn(context.shape, generator=generator)
    score = F.avg_pool1d(noise[:, None], pool, stride=1, padding=pool // 2)[:, 0] * pool**0.5
    score[:, 0] = torch.where(torch.rand(len(context), generator=generator) < first, 50.0, -50.0)
    around = torch.arange(SENTENCE)
    sure = (around >= NAME_AT) & (around <= VALUE_AT)
    score.scatter_add_(
        1,
        (needles[..., None] + around).flatten(1),
        (99.0 * sure + 1.0).repeat(needles.shape[1]).expand(len(context), -1),
    )
    kept = score.topk(count, dim=1).indices.sort(1).values
    return context.gather(1, kept)


def packed_mask(prefix: int, questions: int, width: int) -> Tensor:
    """(1, 1, L, L) bool: causal, and no question sees another."""
    block = torch.arange(questions).repeat_interleave(width)
    block = torch.cat([torch.full((prefix,), -1), block])
    same = (block[:, None] == block) | (block == -1)
    return (same & torch.ones(len(block), len(block)).tril().bool())[None, None]


def answer_logits(model: LlamaForCausalLM, context: Tensor, questions: Tensor, answers: Tensor) -> Tensor:
    """Logits (B, Q, 2, V) of each answer and of the ``</s>`` after it, all questions in one pass.

    ``context`` (B, T) ids, ``questions`` (B, Q, W) ids, ``answers`` (B, Q) ids. A question sees the context and itself,
    and its positions start behind the context, as if it stood there alone.
    """
    (batch, prefix), (_, count, width) = context.shape, questions.shape
    words = torch.cat([questions, answers[..., None]], -1)
    places = torch.cat([torch.arange(prefix), (prefix + torch.arange(width + 1)).repeat(count)])
    hidden = model.model(
        input_ids=torch.cat([context, words.flatten(1)], 1),
        position_ids=places.expand(batch, -1),
        attention_mask=packed_mask(prefix, count, width + 1),
        use_cache=False,
    ).last_hidden_state[:, prefix:]
    return model.lm_head(hidden.unflatten(1, (count, width + 1))[:, :, -2:])


def draw_batch(phase: Phase, generator: torch.Generator) -> tuple[bool, Tensor, Tensor, Tensor]:
    """Whether the contexts are thinned; contexts, questions, answers."""

    def chance() -> float:
        return float(torch.rand((), generator=generator))

    def choice(numbers: Sequence[int]) -> int:
        return numbers[int(torch.randint(len(numbers), (), generator=generator))]

    batch = draw_needles(phase.batch, phase.tokens, phase.needles, phase.questions, generator)
    context, questions, answers = batch.context, batch.questions, batch.answers
    thinned = chance() < phase.thinned
    if thinned:
        count = min(choice(phase.kept), phase.tokens)
        asked = min(phase.questions, max(1, count // 12))
        questions, answers = questions[:, :asked], answers[:, :asked]
        starts = batch.spans[..., 0].gather(1, batch.asked[:, :asked])
        context = thin(context, starts, count, choice((1, 5, 5)), chance(), generator)
        questions = questions[..., choice((0, 0, 1, 1, 2)) :]  # a shortened prompt may lose words of the question
    return thinned, context, questions, answers


def train(recipe: NeedleRecipe, seed: int) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train from scratch; returns the model (eval, float32; the average of its weights) and the record of the run."""
    wall, cpu = time.time(), time.process_time()
    torch.manual_seed(seed)
    model, generator = build_needle_llm().train(), torch.Generator().manual_seed(seed)
    start_values(model, generator)
    for part in written_parts(model):
        part.requires_grad_(False)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2 and p.requires_grad]
    optimiser = Optimiser(model, matrices, recipe.rates, recipe.steps)
    average, log = Average(model, recipe.ema), []
    for number, phase in enumerate(recipe.phases):
        recent: dict[str, float] = {}
        for step in (bar := tqdm(range(phase.steps), desc=f"phase {number + 1}", mininterval=10)):
            thinned, context, questions, answers = draw_batch(phase, generator)
            logits = answer_logits(model, context, questions, answers)
            wanted = torch.stack([answers, torch.full_like(answers, EOS)], -1)
            loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten())
            optimiser.step(loss)
            average.update()
            right = (logits[:, :, 0].argmax(-1) == answers).float().mean().item()
            kind = "thinned" if thinned else "whole"
            recent[kind] = recent.get(kind, right) * 0.9 + right * 0.1
            if optimiser.done % 25 == 0 or step == phase.steps - 1:
                scores = {k: round(v, 3) for k, v in recent.items()}
                log.append({"step": optimiser.done, "phase": number, "loss": round(loss.item(), 4), **scores})
                bar.set_postfix(loss=f"{loss.item():.3f}", **scores)
    average.copy_to(model)
    model.requires_grad_(True)
    seconds = {"cpu_seconds": round(time.process_time() - cpu, 1), "wall_seconds": round(time.time() - wall, 1)}
    return model.eval(), {"seed": seed, "recipe": asdict(recipe), **seconds, "log": log}


def save(model: LlamaForCausalLM, record: dict[str, Any], out: Path) -> Path:
    """The folder ``seed<n>`` in ``out``: float16 weights, configurations, tokenizer, ``log.json``."""
    return save_folder(model, build_needle_tokenizer(), record, out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = trainer_arguments(__doc__, "two steps a phase on tiny batches")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.evaluate:
        from tokred.zoo.evaluate_needle_llm import evaluate

        evaluate(args.out / f"seed{args.seed}", bundle=args.bundle, smoke=args.smoke)
        return
    recipe = NeedleRecipe().smoke() if args.smoke else NeedleRecipe().scaled(args.steps_scale)
    save(*train(recipe, args.seed), args.out)


if __name__ == "__main__":
    main()
