"""The page of the demo, in Gradio: five tabs, each a job of this package."""

from __future__ import annotations

import html
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from tokred.core.errors import InvalidParameterError, TokredError
from tokred.core.method import registered
from tokred.demo import ask, classify, codes, markup, recall
from tokred.demo.models import LLMS, VIDEO_MODELS, VLMS, Shelf, Shelves
from tokred.demo.pictures import Stage, enlarged, open_upload
from tokred.demo.samples import Samples
from tokred.eval.inside import SETTINGS, RandomPrompt
from tokred.eval.vqa_hosts import BUNDLED, VLMHost

__all__ = ["build", "theme"]

TITLE = "tokred: the same answer from fewer tokens"
HEAD = """
# tokred
**The same answer from fewer tokens.** Each tab runs a model as it is and with most of its tokens gone, side by side.
The models shown first are tiny, trained ones that ship with the package. They run here; nothing leaves this machine.
"""
INSIDE = frozenset(name for name, _ in SETTINGS.values())
READ = "Read per layer: visual tokens that a layer of the language model reads, on average."
COMPARED = 2  # timed pairs of each method in a comparison
_TYPED = "A bundled one, or type a name where the model hub is reachable"


def theme() -> gr.themes.Base:
    """Fonts of the reader's own system: the page asks no other host for anything."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]
    plain = {"background_fill": "none", "text_color": "*body_text_color", "text_weight": "600", "padding": "0"}
    labels = {f"block_title_{name}": value for name, value in plain.items()}
    made = gr.themes.Soft(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=fonts, font_mono=mono)
    return made.set(**labels, block_title_background_fill_dark="none", block_title_text_color_dark="*body_text_color")


def build(shelves: Shelves, samples: Samples, folder: Path) -> gr.Blocks:
    """The page.

    Args:
        folder: for the token files that it hands out.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(HEAD)
        with gr.Tabs():
            with gr.Tab("Classify", id="classify"):
                _classify_tab(shelves, samples)
            with gr.Tab("Ask", id="ask"):
                _ask_tab(shelves, samples)
            with gr.Tab("Long text", id="text"):
                _text_tab(shelves)
            with gr.Tab("Tokenize", id="tokenize"):
                _tokenize_tab(samples, folder)
            with gr.Tab("Compare", id="compare"):
                _compare_tab(shelves, samples)
    return page


def _picture() -> gr.Image:
    """An upload that comes as the file that was sent: `open_upload` reads it, with messages of its own.

    Gradio would open it first, and compress it again. (A subclass of a component makes Gradio write a file beside it.)
    """
    made = gr.Image(
        type="filepath", label="Picture", sources=["upload", "clipboard"], height=260, elem_classes="tk-upload"
    )
    made.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return made


# -- jobs as events ----------------------------------------------------------------------------------------------------


def _told(job: Callable[..., Any]) -> Callable[..., Any]:
    """`job(step, *inputs)` as an event: what goes wrong is a message on the page, and what was shown stays."""

    def run(*inputs: Any, progress: Any = gr.Progress()) -> Any:  # noqa: B008 (how Gradio wants it)
        try:
            return job(lambda done, what: progress(done, desc=what), *inputs)
        except (TokredError, ImportError, OSError) as error:
            raise _message(" ".join(str(error).split())) from error
        except torch.OutOfMemoryError as error:
            raise _message(
                "the device ran out of memory: take a smaller model, a smaller picture or fewer tokens"
            ) from error
        except Exception as error:
            traceback.print_exc()
            raise _message(
                f"{type(error).__name__}: {error}. This was not expected; the terminal says where it happened."
            ) from error

    return run


def _message(text: str) -> gr.Error:
    """It stays until it is closed; the page would read it as HTML."""
    return gr.Error(html.escape(text), duration=None, print_exception=False)


def _titles(names: Sequence[str]) -> list[tuple[str, str]]:
    """(what a list shows, the method's name)."""
    found = []
    for name in names:
        title = RandomPrompt.title if name == RandomPrompt.name else registered()[name].title
        found.append((f"{title} (in the LLM)" if name in INSIDE and len(names) > len(recall.METHODS) else title, name))
    return found


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.1f} ms"


def _runs(pairs: int) -> str:
    """What the times of a result are."""
    return f"Times are the best of {pairs} runs, in turns." if pairs > 1 else "Times are of one run each."


def _time_row(found: Any) -> list[list[str]]:
    """The row of a table with the times to the first token, if they were measured."""
    if found.speedup is None:
        return []
    return [
        ["time to first word", _ms(found.before.seconds), _ms(found.after.seconds), f"{found.speedup:.2f}x as fast"]
    ]


def _bytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _share(after: float, before: float) -> str:
    return f"{100 * after / before:.0f} %" if before else ""


def _gmacs(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


# -- classify ----------------------------------------------------------------------------------------------------------


def _classify_tab(shelves: Shelves, samples: Samples) -> None:
    def job(step: Any, path: str | None, model: str, method: str, share: float) -> str:
        picture = open_upload(path)
        step(0, "loading the model")
        with shelves.classifiers.borrow(model) as classifier:
            found = classify.classify(classifier, picture, method, share, progress=step)
        before, after = found.gmacs
        rows = [["multiply-adds", f"{before:.3g} G", f"{after:.3g} G", _share(after, before)]]
        if found.speed is not None:
            many = f"{found.batch} pictures" if found.batch > 1 else "1 picture"
            times = (found.batch / found.speed.unpatched_images_per_s, found.batch / found.speed.images_per_s)
            rows.append([f"time for {many}", *map(_ms, times), f"{found.speed.speedup:.2f}x as fast"])
        far = abs(after / before - share) > 0.05
        return markup.stack(
            markup.bars(("as it is", "reduced"), (found.before, found.after)),
            markup.notes([f"The setting whose cost is nearest to {share:.0%} has {after / before:.0%}."] * far),
            markup.facts(["", "as it is", "reduced", ""], rows),
            markup.figures(found.stages),
            markup.code(f"tokred.patch(model, tokred.{found.method})    # tokens: {found.tokens}"),
        )

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            picture = _picture()
            method = gr.Dropdown(_titles(classify.METHODS), value="zero_tprune", label="Method")
            share = gr.Slider(0.3, 0.95, 0.6, step=0.01, label="Budget: share of the multiply-adds that stays")
            model = gr.Dropdown(
                list(shelves.classifiers.bundled),
                label="Model",
                allow_custom_value=True,
                info=f"{_TYPED}: deit_small_patch16_224 (timm), hf:google/vit-base-patch16-224, "
                "openclip:ViT-B-32/openai",
            )
            go = gr.Button("Classify", variant="primary")
        with gr.Column(scale=3, min_width=300):
            empty = "Click on an example below, or upload a picture: predictions and the tokens that stay appear here."
            out = gr.HTML(markup.placeholder(empty), elem_id="classify-out")
    inputs = [picture, model, method, share]
    run = _told(job)
    go.click(run, inputs, out, concurrency_id="classifier", scroll_to_output=True)
    share.release(run, inputs, out, concurrency_id="classifier")
    with gr.Column(elem_classes="tk-first tk-chips"):
        shown = gr.Examples(
            [[path] for path in samples.scenes],
            [picture],
            label="Examples: held-out scenes, each with a digit among strokes",
            elem_id="classify-examples",
        )
    shown.load_input_event.then(run, inputs, out, concurrency_id="classifier")


# -- ask ---------------------------------------------------------------------------------------------------------------


def _ask_tab(shelves: Shelves, samples: Samples) -> None:
    with gr.Tabs():
        with gr.Tab("about a picture", id="ask-image"):
            _ask_about(shelves.vlms, VLMS, samples.questions)
        with gr.Tab("about a video", id="ask-video"):
            _ask_about(shelves.vlms, VIDEO_MODELS, samples.clips)


def _media(kind: str, path: str | None) -> ask.Media:
    return ask.open_video(path) if kind == "video" else ask.Media(open_upload(path))


def _ask_about(shelf: Shelf[VLMHost], bundled: Sequence[str], examples: Sequence[tuple[str, str, str]]) -> None:
    kind = BUNDLED[bundled[0]]
    video = kind == "video"
    names = ask.VIDEO_METHODS if video else ask.IMAGE_METHODS
    first, start = ("quota", 0.125) if video else ("hired", 0.25)

    def job(step: Any, path: str | None, question: str, model: str, method: str, share: float) -> str:
        media = _media(kind, path)
        step(0, "loading the model")
        with shelf.borrow(model) as host:
            found = ask.ask(host, media, question, [method], share, progress=step)[0]
        before, after = found.before, found.after
        rows = [
            ["visual tokens", str(before.tokens), str(after.tokens), _share(after.tokens, before.tokens)],
            ["read per layer", f"{before.read:.0f}", f"{after.read:.0f}", _share(after.read, before.read)],
            ["memory (cache)", _bytes(before.cache), _bytes(after.cache), _share(after.cache, before.cache)],
        ]
        if before.gmacs is not None and after.gmacs is not None:
            cost = [f"{before.gmacs:.3g} G", f"{after.gmacs:.3g} G", _share(after.gmacs, before.gmacs)]
            rows.append(["multiply-adds", *cost])
        rows += _time_row(found)
        return markup.stack(
            markup.answers(("as it is", "reduced"), (before.text, after.text)),
            markup.notes(found.notes),
            markup.facts(["", "as it is", "reduced", ""], rows) + markup.small(f"{READ} {_runs(found.pairs)}"),
            markup.figures(found.stages, wide=video),
            markup.code(f"tokred.patch(model, tokred.{found.method})"),
        )

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            if video:
                media: Any = gr.Video(label="Video", sources=["upload"], height=260)
            else:
                media = _picture()
            question = gr.Textbox(label="Question", placeholder="which digit is red ?", max_lines=3)
            method = gr.Dropdown(_titles(names), value=first, label="Method")
            share = gr.Slider(0.02, 1, start, step=0.005, label="Budget: share of the visual tokens that stays")
            model = gr.Dropdown(
                list(bundled),
                label="Model",
                allow_custom_value=True,
                info=f"{_TYPED}: llava-hf/llava-1.5-7b-hf, Qwen/Qwen2.5-VL-3B-Instruct",
            )
            go = gr.Button("Ask", variant="primary")
        with gr.Column(scale=3, min_width=300):
            empty = "Click on an example below: both answers, what they took and the tokens that stay appear here."
            out = gr.HTML(markup.placeholder(empty), elem_id=f"ask-{kind}-out")
    run = _told(job)
    inputs = [media, question, model, method, share]
    group = "vlm"
    go.click(run, inputs, out, concurrency_id=group, scroll_to_output=True)
    question.submit(run, inputs, out, concurrency_id=group)
    share.release(run, inputs, out, concurrency_id=group)
    frames = f"; the model sees {ask.FRAMES} of their frames" if video else ""
    with gr.Column(elem_classes="tk-first tk-chips"):
        shown = gr.Examples(
            [[path, text] for path, text, _ in examples],
            [media, question],
            label=f"Examples: held-out {'clips' if video else 'scenes'}{frames}",
            elem_id=f"ask-{kind}-examples",
        )
    shown.load_input_event.then(run, inputs, out, concurrency_id=group)


# -- long text ---------------------------------------------------------------------------------------------------------


def _text_tab(shelves: Shelves) -> None:
    def job(step: Any, text: str, question: str, model: str, method: str, k: float) -> str:
        step(0, "loading the model")
        with shelves.llms.borrow(model) as host:
            found = recall.recall(host, text or "", question or "", method, int(k), progress=step)
        before, after = found.before, found.after
        rows = [
            ["tokens of the prompt", str(before.tokens), str(after.tokens), _share(after.tokens, before.tokens)],
            ["memory (cache)", _bytes(before.cache), _bytes(after.cache), _share(after.cache, before.cache)],
        ]
        rows += _time_row(found)
        return markup.stack(
            markup.answers(("whole text read", "marked words read"), (before.text, after.text)),
            markup.notes(found.notes),
            markup.facts(["", "whole", "reduced", ""], rows) + markup.small(_runs(found.pairs)),
            markup.passage(found.words, after.text),
            markup.code(f"tokred.patch(model, tokred.{found.method})" if method != RandomPrompt.name else ""),
        )

    run = _told(job)

    def another(step: Any, number: int) -> tuple[str, str, int, str]:
        text, question, answer = recall.sample_text(number)
        return text, question, number + 1, f"The text says: **{answer}**"

    text, question, answer = recall.sample_text(0)
    number = gr.State(1)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            passage = gr.Textbox(text, label="Text", lines=9, max_lines=9)
            asked = gr.Textbox(question, label="Question", max_lines=3)
            right = gr.Markdown(f"The text says: **{answer}**", elem_id="text-right")
            fresh = gr.Button("Another text, another question")
            method = gr.Dropdown(_titles(recall.METHODS), value="gemfilter", label="Method")
            k = gr.Slider(16, 512, 64, step=1, label="Budget: tokens of the prompt that are read")
            model = gr.Dropdown(
                list(LLMS), label="Model", allow_custom_value=True, info=f"{_TYPED}: meta-llama/Llama-3.1-8B-Instruct"
            )
            go = gr.Button("Read and answer", variant="primary")
        with gr.Column(scale=3, min_width=300):
            empty = "Press “Read and answer”: both answers, and the words that the method let through, appear here."
            out = gr.HTML(markup.placeholder(empty), elem_id="text-out")
    inputs = [passage, asked, model, method, k]
    go.click(run, inputs, out, concurrency_id="llm", scroll_to_output=True)
    asked.submit(run, inputs, out, concurrency_id="llm")
    k.release(run, inputs, out, concurrency_id="llm")
    drawn = fresh.click(_told(another), number, [passage, asked, number, right])
    drawn.success(run, inputs, out, concurrency_id="llm")


# -- tokenize ----------------------------------------------------------------------------------------------------------


def _tokenize_tab(samples: Samples, folder: Path) -> None:
    def job(step: Any, path: str | None, model: str, tokens: float, caption: str) -> tuple[str, str]:
        picture = open_upload(path)
        step(0.1, "encoding")
        found = codes.encode(picture, model, tokens, caption or "", folder)
        facts = found.found
        height, width = facts["image_size"]
        raw = 3 * height * width
        rows = [[f"{width} x {height} pixels", f"{raw} bytes", ""]]
        rows.append([f"{found.tokens} tokens", f"{facts['payload_bytes']} bytes", f"{facts['psnr']:.1f} dB"])
        for other in facts["compared"]:
            why = {"equal": "", "lowest": " (its lowest quality)", "none": " (its highest quality)"}[other["reached"]]
            rows.append([f"as much by {other['format']}{why}", f"{other['bytes']} bytes", f"{other['psnr']:.1f} dB"])
        both = [Stage(found.original, "the picture, as the tokenizer sees it")]
        both.append(Stage(found.chosen, f"back from {found.tokens} token{'s' * (found.tokens > 1)}"))
        page = markup.stack(
            f'<div class="tk-pair">{"".join(markup.figures([one], wide=True) for one in both)}</div>',
            markup.facts(["", "size", "PSNR"], rows),
            markup.figures(found.stages) if len(found.stages) > 1 else "",
        )
        return page, str(found.file)

    def chosen(step: Any, model: str) -> tuple[Any, Any]:
        span = codes.token_range(model)
        low, high = span.lengths[0], span.lengths[-1]
        only = len(span.lengths) == 1
        scales = 1 < len(span.lengths) < high
        info = f"in scales: {', '.join(map(str, span.lengths))}" if scales else "always so many" if only else None
        slider = gr.Slider(
            low if not only else 0, high, value=min(high, 8) if not scales and not only else high, step=1,
            interactive=not only, info=info,
        )  # fmt: skip
        return slider, gr.Textbox(visible=span.reads_text)

    def back(step: Any, file: str | None) -> str:
        step(0.2, "decoding")
        picture, found = codes.decode(file)
        many = f"{found['tokens']} token{'s' * (found['tokens'] > 1)}"
        return markup.figures([Stage(picture, f"{many} of {found['model']}, decoded")], wide=True)

    run = _told(job)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            picture = _picture()
            model = gr.Dropdown([(about, name) for name, about in codes.TOKENIZERS.items()], label="Tokenizer")
            tokens = gr.Slider(1, 16, 8, step=1, label="Tokens")
            caption = gr.Textbox(
                label="Caption (stored with the tokens)", placeholder="a red seven on dark blue , left", visible=False
            )
            go = gr.Button("Tokenize", variant="primary")
        with gr.Column(scale=3, min_width=300):
            empty = "Click on a card below, then move the slider: the picture comes back from so many tokens."
            out = gr.HTML(markup.placeholder(empty), elem_id="tokenize-out")
            file = gr.File(label="Token file", interactive=False, elem_id="token-file")
    inputs = [picture, model, tokens, caption]
    go.click(run, inputs, [out, file], concurrency_id="codes", scroll_to_output=True)
    tokens.release(run, inputs, [out, file], concurrency_id="codes")
    model.change(_told(chosen), model, [tokens, caption])
    with gr.Column(elem_classes="tk-first tk-chips"):
        shown = gr.Examples(
            [[path] for path in samples.cards],
            [picture],
            label="Examples: held-out cards",
            elem_id="tokenize-examples",
        )
    shown.load_input_event.then(run, inputs, [out, file], concurrency_id="codes")
    with gr.Accordion("Decode a token file", open=False), gr.Row():
        with gr.Column(scale=2, min_width=300):
            given = gr.File(label="Token file (.ftk)", type="filepath", elem_id="token-upload")
            decode = gr.Button("Decode")
        with gr.Column(scale=3, min_width=300):
            decoded = gr.HTML(markup.placeholder("The picture of the file appears here."), elem_id="decode-out")
    decode.click(_told(back), given, decoded, concurrency_id="codes")


# -- compare -----------------------------------------------------------------------------------------------------------


def _compare_tab(shelves: Shelves, samples: Samples) -> None:
    with gr.Tabs():
        with gr.Tab("a classifier", id="compare-classify"):
            _compare_classifiers(shelves, samples)
        with gr.Tab("a question about a picture", id="compare-ask"):
            _compare_answers(shelves, samples)


def _compare_classifiers(shelves: Shelves, samples: Samples) -> None:
    def job(step: Any, path: str | None, names: list[str], share: float) -> str:
        picture = open_upload(path)
        _some(names)
        with shelves.classifiers.borrow(shelves.classifiers.bundled[0]) as classifier:
            found = []
            for number, (title, name) in enumerate(_titles(names)):
                step(number / len(names), title)
                found.append(classify.classify(classifier, picture, name, share, COMPARED))
        (best, chance), whole = found[0].before[0], found[0].gmacs[0]
        first = found[0].tokens.partition(">")[0]
        rows = [["as it is", best, f"{100 * chance:.1f} %", first, f"{whole:.3g}", "", ""]]
        pictures = [found[0].stages[0]]
        for title, one in zip((title for title, _ in _titles(names)), found, strict=True):
            (label, own), cost = one.after[0], one.gmacs[1]
            speed = "" if one.speed is None else f"{one.speed.speedup:.2f}x"
            rows.append([title, label, f"{100 * own:.1f} %", one.tokens, f"{cost:.3g}", _share(cost, whole), speed])
            pictures.append(Stage(one.stages[-1].picture, f"{title}: {one.stages[-1].caption}"))
        off = [number for number, row in enumerate(rows) if row[1] != best]
        header = ["method", "prediction", "probability", "tokens by block", "GMACs", "of all", "speed"]
        return markup.stack(markup.facts(header, rows, off), markup.figures(pictures))

    _compare_form(
        _told(job), classify.METHODS, list(classify.METHODS), [[path] for path in samples.scenes], 0.5, "multiply-adds"
    )


def _compare_answers(shelves: Shelves, samples: Samples) -> None:
    def job(step: Any, path: str | None, question: str, names: list[str], share: float) -> str:
        media = _media("image", path)
        _some(names)
        with shelves.vlms.borrow(VLMS[0]) as host:
            found = ask.ask(host, media, question, names, share, COMPARED, progress=step)
        before = found[0].before
        rows = [["as it is", before.text, str(before.tokens), f"{before.read:.0f}", _gmacs(before.gmacs), "", ""]]
        assert media.picture is not None
        pictures = [Stage(enlarged(media.picture), f"input: {before.tokens} tokens, “{before.text}”")]
        for (title, _), one in zip(_titles(names), found, strict=True):
            after = one.after
            share_of = _share(after.gmacs, before.gmacs) if after.gmacs and before.gmacs else ""
            speed = "" if one.speedup is None else f"{one.speedup:.2f}x"
            rows.append(
                [title, after.text, str(after.tokens), f"{after.read:.0f}", _gmacs(after.gmacs), share_of, speed]
            )
            if one.stages:
                pictures.append(Stage(one.stages[-1].picture, f"{title}: “{after.text}”"))
        off = [number for number, row in enumerate(rows) if row[1] != before.text]
        header = ["method", "answer", "tokens left", "read by a layer", "GMACs", "of all", "speed"]
        notes = list(dict.fromkeys(note for one in found for note in one.notes))
        return markup.stack(markup.facts(header, rows, off), markup.notes(notes), markup.figures(pictures))

    first = ["cdpruner", "divprune", "hired", "random_tokens", "fastv", "gemfilter"]
    examples = [[path, text] for path, text, _ in samples.questions]
    _compare_form(_told(job), ask.IMAGE_METHODS, first, examples, 0.11, "visual tokens")


def _some(names: list[str]) -> None:
    if not names:
        raise InvalidParameterError("no method is ticked: tick at least one")


def _compare_form(
    run: Callable[..., Any], names: Sequence[str], ticked: list[str], examples: list[list[str]], share: float, of: str
) -> None:
    asked = len(examples[0]) == 2
    kind = "ask" if asked else "classify"
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            inputs: list[Any] = [_picture()]
            if asked:
                inputs.append(gr.Textbox(label="Question", placeholder="which digit is red ?", max_lines=3))
            methods = gr.CheckboxGroup(_titles(names), value=ticked, label="Methods")
            budget = gr.Slider(0.05 if asked else 0.3, 0.95, share, step=0.01, label=f"Budget: share of the {of}")
            go = gr.Button("Compare", variant="primary")
        with gr.Column(scale=3, min_width=300):
            empty = "Click on an example below: a table of all ticked methods, and what each keeps, appear here."
            out = gr.HTML(markup.placeholder(empty), elem_id=f"compare-{kind}-out")
    group = "vlm" if asked else "classifier"
    go.click(run, [*inputs, methods, budget], out, concurrency_id=group, scroll_to_output=True)
    with gr.Column(elem_classes="tk-first tk-chips"):
        shown = gr.Examples(
            examples,
            inputs,
            label="Examples",
            elem_id=f"compare-{kind}-examples",
        )
    shown.load_input_event.then(run, [*inputs, methods, budget], out, concurrency_id=group)
