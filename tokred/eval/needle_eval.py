"""`tokred eval needle`: a causal language model under methods inside it, on needles in haystacks and on LongBench.

A needle is a sentence hidden at a depth of a long text; the question asks for it. The bundled model has haystacks and
needles of its own words, other models read a text that is given or filler words. Answers are recorded as they come.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred.core.catalog import compatibility
from tokred.core.decoder import DecoderMethod
from tokred.core.errors import InvalidParameterError, nearest
from tokred.core.patch import Patch, patch
from tokred.eval.bench import Progress, require
from tokred.eval.clock import Clock, spent
from tokred.eval.hub import pretrained
from tokred.eval.inside import tokens_read
from tokred.eval.longbench import DATASETS, LongQuestion, judge_long, read_longbench, read_prompts, rouge_1
from tokred.eval.processes import finish, join
from tokred.eval.records import Records, check_out, claim, complete, identity, read
from tokred.eval.report import percent, signed, table
from tokred.eval.runs import Run, choose
from tokred.eval.vision import paired
from tokred.eval.vqa_hosts import DTYPES, TOGETHER, Answers, generated, parted
from tokred.eval.vqa_metrics import Metric, gqa_answer, share
from tokred.eval.vqa_rows import EvalRow, make_rows

__all__ = ["Case", "LLMHost", "NeedleOptions", "haystack_cases", "load_llm", "run", "show"]

BUNDLED = "needle-llm"
BENCHMARKS = ("haystack", "longbench")
#: lengths where none are given: of the bundled model, whose haystack has as many needles, and of others
LENGTHS, OTHER_LENGTHS, NEEDLES, DEPTHS = (128, 256, 512), (1000, 2000, 4000), 16, 5
DEFAULT_RUNS: tuple[Run, ...] = (("gemfilter", {"k": 64, "layer": 1}),)  # of the bundled model, see `bench_needle`
NEEDLE = "The password of the old lighthouse is marmalade."
QUESTION = "What is the password of the old lighthouse?"
ANSWER = "marmalade"
PROMPT = "Read the text and answer the question about it.\n\n{context}\n\n{question}"
LEGEND = """
tokens: of the prompt that are left behind the last layer; read: that a layer reads, on average. Then the score ±
standard error, and its parts. vs unpatched: paired difference of the score of a prompt; * better, ! worse by more than
2 standard errors. same: share of prompts answered as the unpatched model does. s: seconds of generate for a prompt, in
batches.
""".strip()


@dataclass(frozen=True)
class NeedleOptions:
    """What `tokred eval needle` was asked for. None leaves the choice to the benchmark.

    Attributes:
        benchmark: "haystack" or "longbench". model: "needle-llm" (bundled), a folder, or an id of the hub.
        runs: methods with parameters; None is `DEFAULT_RUNS` with the bundled model, else none.
        lengths: tokens of haystacks. depths: how many, evenly from 0 to 100 % (None: 5). samples: prompts of each.
        haystack: a text file or a folder of them. needle, question, answer: in place of ours.
        data, datasets, prompts, limit: see `longbench`. max_length: tokens of a prompt, longer ones lose their middle.
        chat: whether prompts are a turn of a conversation; None: haystacks, where the tokenizer has a template.
        batch, tokens, seed, out, fresh, device, dtype: see `vqa.VqaOptions`.
    """

    out: Path
    benchmark: str = "haystack"
    model: str = BUNDLED
    runs: Sequence[Run] | None = None
    lengths: Sequence[int] | None = None
    depths: int | None = None
    samples: int | None = None
    haystack: Path | None = None
    needle: str | None = None
    question: str | None = None
    answer: str | None = None
    data: Path | None = None
    datasets: Sequence[str] = ()
    prompts: Path | None = None
    limit: int | None = None
    max_length: int | None = None
    chat: bool | None = None
    batch: int = 4
    tokens: int | None = None
    seed: int = 0
    fresh: bool = False
    device: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.benchmark not in BENCHMARKS:
            raise InvalidParameterError(
                f"--benchmark {self.benchmark}{nearest(self.benchmark, BENCHMARKS)}; there are: {', '.join(BENCHMARKS)}"
            )
        least = {"depths": 1, "samples": 1, "batch": 1, "tokens": 1, "seed": 0, "limit": 1, "max_length": 64}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise InvalidParameterError(f"--{name.replace('_', '-')} {value}: expected at least {bound}")
        for length in self.lengths or ():
            if length < 32:
                raise InvalidParameterError(f"--lengths {length}: expected at least 32 tokens")
        for name in ("haystack", "needle"):
            if self.model == BUNDLED and self.benchmark == "haystack" and getattr(self, name) is not None:
                raise InvalidParameterError(f"--{name}: {BUNDLED} knows the words of its own haystacks alone")
        if self.model == BUNDLED and self.chat:
            raise InvalidParameterError(f"--chat: {BUNDLED} has been taught no conversations; leave it away")
        if self.benchmark == "longbench" and self.data is None:
            raise InvalidParameterError(
                "--data is missing: LongBench's data folder (narrativeqa.jsonl ...) or one file"
            )
        given = [name for name in ("needle", "question", "answer") if getattr(self, name) is not None]
        if given and len(given) < 3:
            raise InvalidParameterError(f"--{given[0]} goes with all of --needle, --question and --answer")
        foreign = {
            "haystack": ("data", "datasets", "prompts", "limit", "max_length"),
            "longbench": ("lengths", "depths", "samples", "haystack", "needle"),
        }[self.benchmark]
        for name in foreign:
            if getattr(self, name):
                raise InvalidParameterError(
                    f"--{name.replace('_', '-')}: the benchmark {self.benchmark} does not take it"
                )


class Case(NamedTuple):
    """One prompt.

    Attributes:
        prompt: text. context: where the long part stands in it, the characters from and to.
        right: the answers; of a haystack the needle and the word that is asked for. kinds: {heading: value}.
        tokens: of an answer, at most. question: of LongBench.
    """

    id: str
    prompt: str
    context: tuple[int, int]
    right: tuple[str, ...]
    kinds: dict[str, str]
    tokens: int
    question: LongQuestion | None = None


# -- models ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class LLMHost:
    """A causal language model with its tokenizer. `name`: as it was given."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def bundled(self) -> bool:
        return self.name == BUNDLED

    def written(self, text: str, chat: bool | None) -> str:
        """A prompt, as a turn of a conversation where that is wanted."""
        if chat is False or (chat is None and self.tokenizer.chat_template is None):
            return text
        try:
            turn = [{"role": "user", "content": text}]
            return self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        except ValueError as error:
            raise InvalidParameterError(
                f"the tokenizer of {self.name} has no chat template; leave --chat away"
            ) from error

    def count(self, text: str) -> int:
        """Tokens of a text without special ones."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def inputs(self, cases: Sequence[Case]) -> tuple[dict[str, Tensor], Tensor]:
        """What the model takes, padded on the left, and (B, S) bool: the tokens of the long part."""
        bos = self.tokenizer.bos_token
        plain = bool(bos) and all(case.prompt.startswith(bos) for case in cases)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        made = self.tokenizer(
            [case.prompt for case in cases],
            return_tensors="pt",
            padding=True,
            return_offsets_mapping=True,
            add_special_tokens=not plain,
        )
        starts, ends = made["offset_mapping"].unbind(-1)
        spans = torch.tensor([case.context for case in cases])
        inside = (starts >= spans[:, :1]) & (ends <= spans[:, 1:]) & (ends > starts)
        device = self.model.device
        inputs = {name: made[name].to(device) for name in ("input_ids", "attention_mask")}
        return inputs, inside & made["attention_mask"].bool()

    @torch.inference_mode()
    def answer(
        self,
        made: tuple[dict[str, Tensor], Tensor],
        tokens: int,
        handle: Patch | None = None,
    ) -> Answers:
        """Greedy answers to what `inputs` made, of the model as it is or patched.

        What acts before a layer may drop the tokens of the long part.
        """
        inputs, prunable = made
        told: AbstractContextManager[None] = nullcontext()
        if handle is not None and isinstance(handle.method, DecoderMethod):
            told = handle.request(prunable=prunable.to(self.model.device))
        with told:
            output, seconds = generated(
                self.model, inputs, max_new_tokens=tokens, pad_token_id=self.tokenizer.pad_token_id
            )
            trace = None if handle is None else handle.trace
        new = output[:, inputs["input_ids"].shape[1] :]
        said = [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        found = tokens_read(trace, inputs["attention_mask"].bool().cpu(), self.model.config.num_hidden_layers)
        return Answers(said, seconds, found.left, found.mean)


def load_llm(name: str, device: torch.device | str = "cpu", dtype: str = "auto") -> LLMHost:
    """The bundled needle LLM, a folder as from `save_pretrained`, or an id of the hub.

    Raises:
        InvalidParameterError: there is no such model, it is no causal one, or the hub cannot be reached.
    """
    require("transformers", "transformers", what="an evaluation of language models")
    if dtype not in ("auto", *DTYPES):
        raise InvalidParameterError(f"--dtype {dtype}: expected auto, {', '.join(DTYPES)}")
    device = torch.device(device)
    if name == BUNDLED:
        from tokred import zoo

        model, tokenizer = zoo.load(name)
        return LLMHost(name, model.to(device, DTYPES.get(dtype, torch.float32)), tokenizer)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted: Any = DTYPES.get(dtype) or (torch.float32 if device.type == "cpu" else "auto")
    model, tokenizer = pretrained(
        name, (AutoModelForCausalLM, AutoTokenizer), [BUNDLED], "causal language model", wanted
    )
    model = model.to(device)
    if not tokenizer.is_fast:
        raise InvalidParameterError(f"--model {name}: its tokenizer is a slow one, which cannot say where words stand")
    from tokred.adapters.registry import find_host

    find_host(model)  # refuses a family without a host, by name
    return LLMHost(name, model, tokenizer)


# -- haystacks ---------------------------------------------------------------------------------------------------------


def haystack_cases(options: NeedleOptions, host: LLMHost, text: str = "") -> list[Case]:
    """`samples` prompts for each length and depth. `text`: the haystack; the bundled model has its own."""
    lengths = options.lengths or (LENGTHS if host.bundled else OTHER_LENGTHS)
    longest = getattr(host.model.config, "max_position_embeddings", None)
    tokens = options.tokens or (2 if host.bundled else 50)
    room = 8 if host.bundled else tokens + 64
    for length in lengths:
        if longest is not None and length + room > longest:
            raise InvalidParameterError(
                f"--lengths {length}: {host.name} reads {longest} tokens, question and answer included"
            )
    count = options.depths or DEPTHS
    depths = [i / max(count - 1, 1) for i in range(count)]
    if host.bundled:
        return _bundled_cases(lengths, depths, options.samples or 4, options.seed, tokens)
    return _text_cases(options, host, text, lengths, depths, tokens)


def _depth_name(depth: float) -> str:
    return f"{100 * depth:g} %"


def _bundled_cases(lengths: Sequence[int], depths: Sequence[float], samples: int, seed: int, tokens: int) -> list[Case]:
    """Contexts of `tokred.data.needles`; the needle that is asked for changes places with the sentence at its depth."""
    from tokred.data.needles import SENTENCE, NeedleContexts, text_of

    cases = []
    for length in lengths:
        slots = (length - 1) // SENTENCE
        contexts = NeedleContexts("test", seed, length, min(NEEDLES, slots))
        batch = contexts.batch(0, samples * len(depths))
        for i, depth in enumerate(depth for depth in depths for _ in range(samples)):
            ids = batch.context[i].clone()
            at, target = int(batch.answer_spans()[i, 0]), 1 + SENTENCE * round(depth * (slots - 1))
            needle, other = ids[at : at + SENTENCE].clone(), ids[target : target + SENTENCE].clone()
            ids[at : at + SENTENCE], ids[target : target + SENTENCE] = other, needle
            context = text_of(ids[1:])  # the tokenizer puts <s> before it
            prompt = f"{context} {text_of(batch.questions[i, 0])}"
            answer = text_of(batch.answers[i])
            kinds = {"length": str(length), "depth": _depth_name(depth)}
            case = Case(f"{length}/{depth:g}/{i}", prompt, (0, len(context)), (text_of(needle), answer), kinds, tokens)
            cases.append(case)
    return cases


def _text_cases(
    options: NeedleOptions, host: LLMHost, text: str, lengths: Sequence[int], depths: Sequence[float], tokens: int
) -> list[Case]:
    """One needle in a text: each sample begins elsewhere in it."""
    needle, question = options.needle or NEEDLE, options.question or QUESTION
    text = " ".join(text.split())
    most = max(lengths)
    places = _starts(host, text)
    while len(places) < 2 * most:  # a short text is read again from its beginning
        text = f"{text} {text}"
        places = _starts(host, text)
    cases = []
    samples = options.samples or 1
    for length in lengths:
        room = length - host.count(needle) - host.count(PROMPT.format(context="", question=question))
        for depth in depths:
            for sample in range(samples):
                begin = (len(places) - most) * sample // samples
                part = text[places[begin] : places[begin + max(room, 1)]]
                context = _planted(part, needle, depth)
                prompt = host.written(PROMPT.format(context=context, question=question), options.chat)
                start = prompt.index(context)
                kinds = {"length": str(length), "depth": _depth_name(depth)}
                right = (needle, options.answer or ANSWER)
                span = (start, start + len(context))
                cases.append(Case(f"{length}/{depth:g}/{sample}", prompt, span, right, kinds, tokens))
    return cases


def _starts(host: LLMHost, text: str) -> list[int]:
    """The character at which each token begins."""
    made = host.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [start for start, _ in made["offset_mapping"]]


def _planted(text: str, needle: str, depth: float) -> str:
    """The needle behind the last sentence that ends before a depth; at its beginning and end for 0 and 1."""
    if depth >= 1:
        return f"{text} {needle}"
    at = text.rfind(". ", 0, int(depth * len(text)) + 1)
    return f"{needle} {text}" if depth <= 0 or at < 0 else f"{text[: at + 1]} {needle} {text[at + 2 :]}"


def _read_text(path: Path) -> str:
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise FileNotFoundError(f"--haystack {path}: expected a text file, or a folder of .txt files")
    try:
        text = "\n".join(one.read_text(encoding="utf-8") for one in files)
    except UnicodeDecodeError as error:
        raise InvalidParameterError(f"--haystack {path} is no text: {error}") from error
    if len(text.split()) < 50:
        raise InvalidParameterError(f"--haystack {path}: {len(text.split())} words are no haystack")
    return text


def _filler(seed: int) -> str:
    """Sentences of ordinary words without sense."""
    from tokred.data.needles import FILLER_IDS, text_of

    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(FILLER_IDS.start, FILLER_IDS.stop, (400, 9), generator=generator)
    return " ".join(f"{text_of(row).capitalize()}." for row in words)


# -- LongBench ---------------------------------------------------------------------------------------------------------


def long_cases(
    options: NeedleOptions, host: LLMHost, questions: Sequence[LongQuestion], prompts: Mapping[str, str]
) -> list[Case]:
    """LongBench's questions as prompts (`prompts`: in place of ours); a text that is too long loses its middle."""
    longest = options.max_length or getattr(host.model.config, "max_position_embeddings", None)
    cases = []
    for one in questions:
        data = DATASETS[one.dataset]
        template = prompts.get(one.dataset, data.prompt)
        tokens = options.tokens or data.tokens
        shell = template.replace("{input}", one.question)
        context = one.context
        if longest is not None:
            room = longest - host.count(shell.replace("{context}", "")) - (0 if options.max_length else tokens) - 16
            context = _without_middle(host, context, room, one.id)
        # the parts are put together by hand: texts and questions may have braces
        prompt = host.written(shell.replace("{context}", context), bool(options.chat))
        start = prompt.index(context)
        kinds = {"data set": one.dataset}
        cases.append(Case(one.id, prompt, (start, start + len(context)), one.answers, kinds, tokens, one))
    return cases


def _without_middle(host: LLMHost, text: str, room: int, name: str) -> str:
    starts = _starts(host, text)
    if len(starts) <= room:
        return text
    if room < 32:
        raise InvalidParameterError(f"{name}: {room} tokens are left for its text; --max-length is too small")
    half = room // 2
    return text[: starts[half]] + text[starts[len(starts) - (room - half)] :]


# -- the run -----------------------------------------------------------------------------------------------------------


def run(options: NeedleOptions, progress: Progress) -> dict[str, Any] | None:
    """Ask every prompt of every row, write results.json into `options.out`, and return the results (JSON types).

    Call it in every process of a run; all but the first return None.
    """
    require("eval", "transformers", "tqdm", what="tokred eval needle")
    began = time.perf_counter()
    if options.runs is None and options.model == BUNDLED:
        options = dataclasses.replace(options, runs=DEFAULT_RUNS)
    chosen = [choose(one) for one in options.runs or ()]
    check_out(options.out)
    cases_of = _cases(options)
    processes = join(options.device)
    host = load_llm(options.model, processes.device, options.dtype)
    known = [name for name, fits in compatibility().items() if fits.get("transformers text")]
    rows = make_rows(chosen, known)
    for row in rows:
        if row.method is not None:
            patch(host.model, row.method, **row.options).remove()  # refused here rather than later
    cases = cases_of(host)
    if processes.first:
        claim(options.out, _settings(options, cases, host), options.fresh)
    processes.wait()
    batches = _batches(cases, options.batch)
    clock = Clock()
    with clock.running():
        own = batches[processes.rank :: processes.count]
        _ask_all(host, rows, own, options.batch, options.out, processes.rank, clock, progress)
    processes.wait()
    if not processes.first:
        processes.leave()
        return None
    results: dict[str, Any] = {
        "task": "needle",
        "benchmark": options.benchmark,
        "model": options.model,
        "prompts": len(cases),
        "lengths": list(dict.fromkeys(case.kinds.get("length") for case in cases)),
        "machine": {"torch": torch.__version__, "device": str(host.model.device), "dtype": str(host.model.dtype)},
        "batch": options.batch,
        "processes": processes.count,
        "rows": _measured(options, host, rows, cases, processes.count),
        "time": clock.to_dict(),
        "files": {"results": str(options.out / "results.json"), "records": str(options.out / "records")},
    }
    return finish(processes, results, options.out, began)


def _cases(options: NeedleOptions) -> Callable[[LLMHost], list[Case]]:
    """What makes prompts for a model; the files are read at once, before one is loaded."""
    if options.benchmark == "longbench":
        assert options.data is not None
        questions = read_longbench(options.data, options.datasets, options.limit)
        prompts = read_prompts(options.prompts) if options.prompts is not None else {}
        return lambda host: long_cases(options, host, questions, prompts)
    text = _read_text(options.haystack) if options.haystack is not None else _filler(options.seed)
    return lambda host: haystack_cases(options, host, text)


def _settings(options: NeedleOptions, cases: Sequence[Case], host: LLMHost) -> dict[str, Any]:
    told = [[case.id, case.prompt, case.tokens, list(case.right)] for case in cases]
    return {
        "task": "needle",
        "benchmark": options.benchmark,
        "model": options.model,
        "prompts": len(cases),
        "digest": hashlib.sha256(json.dumps(told).encode()).hexdigest(),
        **identity(host.model, host.model.device, "transformers"),
        "batch": options.batch,
        "dtype": str(host.model.dtype),
    }


def _batches(cases: Sequence[Case], size: int) -> list[list[Case]]:
    """Prompts of one length, or one data set, together."""
    found: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        found.setdefault((case.kinds.get("length"), case.kinds.get("data set"), case.tokens), []).append(case)
    return [own[i : i + size] for own in found.values() for i in range(0, len(own), size)]


def _ask_all(
    host: LLMHost,
    rows: Sequence[EvalRow],
    batches: Sequence[Sequence[Case]],
    size: int,
    out: Path,
    rank: int,
    clock: Clock,
    progress: Progress,
) -> None:
    kept = [Records(out, row.key, rank) for row in rows]
    progress.quiet = progress.quiet or rank > 0
    progress.start("answers", len(rows) * sum(map(len, batches)), "answers")
    try:
        for part in parted(batches, max(TOGETHER // size, 1)):
            _ask(host, part, rows, kept, clock, progress)
    finally:
        progress.stop()
        for records in kept:
            records.close()


def _ask(
    host: LLMHost,
    part: Sequence[Sequence[Case]],
    rows: Sequence[EvalRow],
    kept: Sequence[Records],
    clock: Clock,
    progress: Progress,
) -> None:
    """Some batches under the rows that have not answered them, each row patched once for all that it has not."""
    prepared: dict[str, Any] = {}
    for row, records in zip(rows, kept, strict=True):
        waiting = [batch for batch in part if not all(case.id in records for case in batch)]
        progress.advance(sum(map(len, part)) - sum(map(len, waiting)))
        if not waiting:
            continue
        patched = nullcontext() if row.method is None else patch(host.model, row.method, **row.options)
        with patched as handle:
            for batch in waiting:
                first = batch[0].id
                if first not in prepared:
                    with clock.loading():
                        prepared[first] = host.inputs(batch)
                answers = host.answer(prepared[first], batch[0].tokens, handle)
                clock.model += answers.seconds
                said = zip(batch, answers.texts, answers.tokens, answers.read, strict=True)
                records.append(
                    {"key": c.id, "answer": a, "tokens": t, "read": r, "seconds": answers.seconds / len(batch)}
                    for c, a, t, r in said
                    if c.id not in records
                )
                progress.advance(len(batch))


# -- results -----------------------------------------------------------------------------------------------------------


def _score(case: Case, said: str, bundled: bool) -> float:
    if case.question is not None:
        return judge_long(said, case.question)
    return float(gqa_answer(said) == case.right[1]) if bundled else rouge_1(said, case.right[0])


def _measured(
    options: NeedleOptions, host: LLMHost, rows: Sequence[EvalRow], cases: Sequence[Case], processes: int
) -> list[dict[str, Any]]:
    plain: list[str] = []
    plain_scores = torch.empty(0)
    measured = []
    for row in rows:
        own = complete(read(options.out, row.key), [case.id for case in cases], options.out, processes)
        said = [record["answer"] for record in own]
        scores = torch.tensor([_score(c, a, host.bundled) for c, a in zip(cases, said, strict=True)]).double()
        metrics = _metrics(options, host, cases, said, scores)
        record: dict[str, Any] = {
            "kind": "unpatched" if row.method is None else "method",
            "label": row.label,
            "level": row.level,
            "method": row.described,
            "main": next(iter(metrics)),
            "metrics": {
                name: {"value": one.value, "se": one.error, "percent": one.percent} for name, one in metrics.items()
            },
            "tokens": statistics.mean(one["tokens"] for one in own),
            "tokens_read": statistics.mean(one["read"] for one in own),
            "seconds_per_prompt": statistics.mean(one["seconds"] for one in own),
            "reported": _reported(options, row, metrics),
        }
        if options.benchmark == "haystack":
            record["grid"] = _grid(cases, scores)
        if row.method is None:
            plain, plain_scores = said, scores
        else:
            same = share(torch.tensor([a == b for a, b in zip(said, plain, strict=True)]))
            record["agreement"], record["agreement_se"] = same.value, same.error
            record["vs_unpatched"] = paired(scores, plain_scores).to_dict()
        measured.append(record)
    return measured


def _metrics(
    options: NeedleOptions, host: LLMHost, cases: Sequence[Case], said: Sequence[str], scores: Tensor
) -> dict[str, Metric]:
    if options.benchmark == "longbench":
        parts = _by(cases, scores, "data set")
        error = math.sqrt(sum(part.error**2 for part in parts.values())) / len(parts)
        return {"average": Metric(statistics.mean(part.value for part in parts.values()), error), **parts}
    lengths = {f"at {name}": value for name, value in _by(cases, scores, "length").items()}
    if host.bundled:
        return {"recall": share(scores), **lengths}
    found = torch.tensor([gqa_answer(case.right[1]) in gqa_answer(a) for case, a in zip(cases, said, strict=True)])
    return {"ROUGE-1": share(scores), "found": share(found), **lengths}


def _by(cases: Sequence[Case], scores: Tensor, heading: str) -> dict[str, Metric]:
    names = [case.kinds[heading] for case in cases]
    return {name: share(scores[[i for i, one in enumerate(names) if one == name]]) for name in dict.fromkeys(names)}


def _grid(cases: Sequence[Case], scores: Tensor) -> dict[str, dict[str, float]]:
    """{length: {depth: mean score}}."""
    cells: dict[str, dict[str, list[float]]] = {}
    for case, score in zip(cases, scores.tolist(), strict=True):
        cells.setdefault(case.kinds["length"], {}).setdefault(case.kinds["depth"], []).append(score)
    return {length: {depth: statistics.mean(own) for depth, own in by.items()} for length, by in cells.items()}


#: GemFilter's tables: {model: {k, None for the whole prompt: scores in the order of `DATASETS`, the average last}}
_LONG = {
    "llama-3.1-8b": {
        None: "32.02 13.04 27.34 16.23 16.05 11.22 34.52 23.41 26.89 73.0 91.64 43.8 7.16 97.73 36.72",
        1024: "20.71 11.0 29.28 19.12 17.01 13.01 30.37 21.75 25.17 63.0 90.7 42.5 7.15 92.22 34.50",
        2048: "24.36 12.63 25.39 19.58 17.03 14.11 33.15 22.31 26.49 69.5 91.59 42.64 4.61 98.75 35.87",
        4096: "25.66 12.95 27.38 17.76 15.6 12.02 34.17 23.25 26.87 70.0 92.36 43.34 5.96 98.0 36.09",
    },
    "mistral-nemo": {
        None: "28.91 40.74 54.65 52.15 48.36 30.28 30.66 23.53 26.31 75.0 89.66 44.32 4.5 100.0 46.36",
        1024: "27.53 40.68 53.86 55.51 55.43 34.11 27.25 21.16 25.56 69.0 87.32 42.49 4.0 88.06 45.14",
        2048: "29.27 41.53 54.91 57.62 54.97 35.09 29.34 22.58 26.19 72.0 89.65 44.93 4.0 97.5 47.11",
        4096: "30.29 39.9 56.48 58.78 51.48 32.81 30.32 23.21 26.48 71.5 90.24 42.13 2.0 99.5 46.79",
    },
    "phi-3.5-mini": {
        None: "27.51 17.23 35.63 21.7 25.7 11.68 34.14 23.17 24.95 71.5 87.37 13.08 7.17 83.85 34.62",
        1024: "16.57 18.29 35.91 24.22 26.1 9.7 30.29 18.96 23.64 64.5 85.85 23.02 0.2 81.12 32.74",
        2048: "19.63 14.84 35.99 21.38 19.72 10.13 32.39 21.24 24.71 65.0 86.49 20.47 2.17 69.5 31.69",
        4096: "20.95 19.98 35.22 28.82 28.21 13.98 34.2 22.45 25.08 64.5 85.86 18.68 3.43 65.56 33.35",
    },
}
_NEEDLE = {"llama-3.1-8b": {None: 84.1, 1024: 88.7}, "mistral-nemo": {None: 48.6, 1024: 83.8}}


def _reported(options: NeedleOptions, row: EvalRow, metrics: Mapping[str, Metric]) -> list[dict[str, Any]]:
    """What GemFilter's paper prints of this row, for the metrics at hand."""
    name = options.model.rstrip("/").rpartition("/")[2].lower()
    asked = any(name == "gemfilter" for name, _ in options.runs or ())
    if row.described is not None and not (row.described["method"] == "gemfilter" and row.usual):
        return []
    if row.described is None and not asked:
        return []
    budget = row.level
    if options.benchmark == "haystack":
        for model, needles in _NEEDLE.items():
            if model in name and budget in needles:
                source = "GemFilter: ROUGE-1, lengths to 120K (Llama) and 60K tokens (Nemo), essays as haystack"
                return [{"metric": "ROUGE-1", "value": needles[budget], "source": source}]  # type: ignore[index]
        return []
    for model, tables in _LONG.items():
        if model in name and budget in tables:
            numbers = [float(number) for number in tables[budget].split()]  # type: ignore[index]
            values = dict(zip([*list(DATASETS)[:14], "average"], numbers, strict=True))
            whole = {"average", *list(DATASETS)[:14]} <= set(metrics)
            told = [key for key in metrics if key in values and (key != "average" or whole)]
            return [{"metric": key, "value": values[key], "source": "GemFilter, LongBench table"} for key in told]
    return []


# -- the table ---------------------------------------------------------------------------------------------------------

COLUMNS = 6


def show(results: Mapping[str, Any]) -> str:
    """The table, with what its columns mean; of haystacks also each row's grid of lengths and depths."""
    names = list(results["rows"][0]["metrics"])
    main, further = names[0], names[1 : COLUMNS + 1]
    header = ["row", "tokens", "read", f"{main} %", "vs unpatched", "same", *further, "s", "paper says"]
    rows = []
    for row in results["rows"]:
        metrics = row["metrics"]
        rows.append(
            [
                row["label"],
                f"{row['tokens']:.0f}",
                f"{row['tokens_read']:.0f}",
                percent(metrics[main]["value"], metrics[main]["se"]),
                signed(row.get("vs_unpatched")),
                f"{100 * row['agreement']:.1f}" if "agreement" in row else "",
                *(f"{100 * metrics[name]['value']:.1f}" for name in further),
                f"{row['seconds_per_prompt']:.3f}",
                next((f"{one['value']:g}" for one in row["reported"] if one["metric"] == main), ""),
            ]
        )
    machine = results["machine"]
    title = (
        f"{results['model']} on {results['benchmark']}: {results['prompts']} prompts, greedy answers; "
        f"{machine['device']}, {machine['dtype'].removeprefix('torch.')}, torch {machine['torch']}"
    )
    lines = [title, "", table(header, [rows]), "", *textwrap.wrap(LEGEND, 118), *spent(results["time"])]
    sources = dict.fromkeys(one["source"] for row in results["rows"] for one in row["reported"])
    if sources:
        lines += textwrap.wrap(f"paper says: {'; '.join(sources)}", 118)
    for row in results["rows"]:
        if "grid" in row:
            grid = row["grid"]
            depths = list(next(iter(grid.values())))
            cells = [[length, *(f"{100 * by[depth]:.0f}" for depth in depths)] for length, by in grid.items()]
            lines += ["", f"{row['label']}, by length and depth:"]
            lines.append(table(["tokens", *depths], [cells]))
    return "\n".join(lines)
