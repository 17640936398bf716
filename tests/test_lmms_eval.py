"""The plug-in of lmms-eval: found by its registry, and answering its requests.

Where lmms-eval is not installed, what needs its own code is skipped, and the model's requests are those of a stand-in
with its base class's surface (`task_dict`, `cache_hook`).
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("transformers", "torchvision", "sklearn", "skimage"):
    pytest.importorskip(package)

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
REASON = (
    "lmms-eval is not installed: its pins (av<16, wandb==0.25.0 ...) do not go beside what tokred is tested with; "
    "docs/evaluation_vqa.md says how these tests are run against its source"
)
ROOT = Path(__file__).resolve().parents[1]


class StandIn:
    """What tokred uses of lmms_eval.api.model.lmms."""

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *args: None)


@pytest.fixture
def model_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`TokredHF`, on lmms-eval's own base class where there is one."""
    if not INSTALLED:
        modules = {name: types.ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model")}
        modules["lmms_eval.api.model"].lmms = StandIn  # type: ignore[attr-defined]
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    name = "tokred.integrations.lmms_eval"
    yield importlib.import_module(name).TokredHF
    if not INSTALLED:
        sys.modules.pop(name, None)


class Request:
    """An Instance of lmms-eval, as far as models read it."""

    def __init__(self, *args: Any) -> None:
        self.args = args


DOCUMENTS = 3


def documents() -> list[dict[str, Any]]:
    """Bundled questions as rows of a task."""
    from PIL import Image

    from tokred.data import QuestionScenes

    batch = QuestionScenes("test", 0).batch(0, DOCUMENTS)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in batch.images]
    return [
        {"image": image, "question": question, "answer": answer}
        for image, question, answer in zip(pictures, batch.questions, batch.answers, strict=True)
    ]


def messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}]
    return [{"role": "user", "content": content}]


def requests(ask: Callable[..., Any], **settings: Any) -> list[Request]:
    return [
        Request("", ask, {"max_new_tokens": 3, "until": ["\n"], **settings}, i, "digits", "test")
        for i in range(DOCUMENTS)
    ]


def expected(budget: float | None) -> list[str]:
    """Answers without lmms-eval."""
    import tokred
    from tokred.zoo import answer_text, question_prompt

    model, processor = tokred.zoo.load("digit-vlm")
    if budget is not None:
        tokred.patch(model, tokred.HiRED(budget=budget))
    said = []
    for one in documents():
        inputs = processor(text=question_prompt(one["question"]), images=one["image"], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        said.append(answer_text(processor.decode(output[0])))
    return said


def test_answers_are_those_of_the_patched_model(model_class: Any) -> None:
    plain = model_class(pretrained="digit-vlm", batch_size="2", device="cpu")
    reduced = model_class(pretrained="digit-vlm", method="hired", budget=0.1, batch_size=2, device="cpu")
    for model, budget in ((plain, None), (reduced, 0.1)):
        assert model.is_simple is False
        model.task_dict["digits"] = {"test": documents()}
        assert model.generate_until(requests(messages)) == expected(budget)
    assert "_tokred" not in reduced.model.__dict__  # nothing stays patched between calls
    mixed = requests(messages)
    mixed[1].args = (*mixed[1].args[:2], {"max_new_tokens": 2}, *mixed[1].args[3:])  # settings of its own
    assert plain.generate_until(mixed) == expected(None)


def test_the_bundled_models_bring_a_scorer_of_frames(model_class: Any) -> None:
    """QuoTA's own would ask the hub for weights."""
    pytest.importorskip("open_clip")
    model = model_class(pretrained="digit-video-vlm", method="quota", budget=0.25, device="cpu")
    assert type(model.method.scorer).__name__ == "OpenClipScorer"


def test_rounds_go_on_until_the_task_says_so(model_class: Any) -> None:
    model = model_class(device="cpu")
    model.task_dict["digits"] = {"test": documents()}

    def rounds(document: dict[str, Any], round_idx: int = 0, previous_output: Any = None, **given: Any) -> Any:
        if not round_idx:
            return messages(document)
        assert len(previous_output) == round_idx
        return messages(document), round_idx == 2, previous_output, given["previous_round_info"]

    assert model.generate_until_multi_round(requests(rounds)) == [[answer] * 2 for answer in expected(None)]


def test_what_the_model_refuses(model_class: Any) -> None:
    with pytest.raises(ValueError, match="is a parameter of a method"):
        model_class(budget=0.2)
    with pytest.raises(ValueError, match="did you mean 'hired'"):
        model_class(method="hird", budget=0.2)
    with pytest.raises(TypeError, match="no parameter 'budgets'"):
        model_class(method="hired", budgets=0.2)
    with pytest.raises(ValueError, match="batch_size"):
        model_class(batch_size="auto")
    with pytest.raises(NotImplementedError, match="likelihoods"):
        model_class(device="cpu").loglikelihood([])


def test_texts_that_end_an_answer(model_class: Any) -> None:
    cut = sys.modules[model_class.__module__]._cut
    assert cut("\n7\nbecause", ["\n"]) == "7"
    assert cut("7. Then", ["Then", "\n\n"]) == "7."
    assert cut(" 7 ", []) == "7"


def test_the_entry_point_names_the_manifests() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."lmms_eval.models"]\ntokred = "tokred.integrations:lmms_eval_manifests"' in text
    code = "import sys, tokred.integrations as t; print(t.NAME, [m for m in sys.modules if m.startswith('lmms_eval')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "tokred_hf []"


@pytest.mark.skipif(INSTALLED, reason="lmms-eval is installed")
def test_without_lmms_eval_the_message_says_what_to_do() -> None:
    with pytest.raises(ImportError, match="pip install lmms_eval"):
        importlib.import_module("tokred.integrations.lmms_eval")


# -- lmms-eval itself --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not INSTALLED, reason=REASON)
def test_the_registry_of_lmms_eval_finds_the_model() -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from tokred.integrations import lmms_eval_manifests

    registry = ModelRegistryV2()
    for manifest in registry._coerce_payload_to_manifests(lmms_eval_manifests):  # as from an entry point
        registry.register_manifest(manifest)
    found = registry.get_model_class("tokred_hf")
    assert (found.__name__, found.is_simple) == ("TokredHF", False)
    made = found.create_from_arg_string(
        "pretrained=digit-vlm,method=hired,budget=0.2", {"batch_size": 1, "device": "cpu"}
    )
    assert made.method.budget == 0.2


@pytest.mark.skipif(not INSTALLED, reason=REASON)
def test_lmms_eval_runs_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of bundled questions through lmms-eval's own evaluator."""
    datasets = pytest.importorskip("datasets")
    evaluator = pytest.importorskip("lmms_eval.evaluator", exc_type=ImportError)
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    from tokred.integrations import lmms_eval_manifests

    for manifest in lmms_eval_manifests():
        MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    datasets.Dataset.from_list(documents()).to_parquet(tmp_path / "test.parquet")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "tokred_digits.yaml").write_text(
        f"""
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {tmp_path / "test.parquet"}
task: tokred_digits
test_split: test
output_type: generate_until
doc_to_visual: !function digits.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 3
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
    )
    (tmp_path / "task" / "digits.py").write_text('def visual(doc):\n    return [doc["image"].convert("RGB")]\n')
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    done = evaluator.simple_evaluate(
        model="tokred_hf",
        model_args="pretrained=digit-vlm,method=hired,budget=0.5",
        tasks=["tokred_digits"],
        batch_size=2,
        device="cpu",
        task_manager=TaskManager("WARNING", include_path=str(tmp_path / "task"), model_name="tokred_hf"),
    )
    right = [said == one["answer"] for said, one in zip(expected(0.5), documents(), strict=True)]
    assert done["results"]["tokred_digits"]["exact_match,none"] == pytest.approx(sum(right) / len(right))
