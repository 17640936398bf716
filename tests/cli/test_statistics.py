"""Statistics, timing and tables of tokred.eval against cases worked out by hand."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

from tokred.core.errors import InvalidParameterError, UnknownMethodError
from tokred.core.sites import EncoderInfo
from tokred.eval import cost, speed, vision
from tokred.eval.report import dumps, table, token_chain
from tokred.eval.vision import Pass

INFO = EncoderInfo(
    depth=12, dim=96, heads=3, kv_heads=3, head_dim=32, prefix=1, class_tokens=1, tokens=144, grid=(12, 12),
    attention_macs=4 * 96**2, mlp_macs=8 * 96**2, embed_macs=192 * 96, head_macs=960,
)  # fmt: skip


def test_mean_of_independent_observations() -> None:
    found = vision.mean(torch.tensor([True, True, True, False]))
    assert found.value == 0.75
    # deviations .25 .25 .25 -.75: sum of squares .75, s^2 = .25, s / sqrt(4)
    assert found.error == pytest.approx(0.25)


def test_mean_of_groups() -> None:
    values = torch.tensor([1.0, 1.0, 0.0, 0.0])
    # group sums of deviations: +1 and -1; sqrt(2 / 1 * 2) / 4
    assert vision.mean(values, torch.tensor([0, 0, 1, 1])).error == pytest.approx(0.5)
    # groups that hold one of each: nothing varies between groups
    assert vision.mean(values, torch.tensor([0, 1, 0, 1])).error == 0
    # groups of one are independent observations, whatever they are called
    assert vision.mean(values, torch.tensor([7, 3, 9, 4])) == vision.mean(values)


def test_unequal_groups() -> None:
    values, groups = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 0, 0, 1])
    # mean .75; group sums +.75 and -.75; sqrt(2 * 1.125) / 4
    assert vision.mean(values, groups).error == pytest.approx(math.sqrt(2.25) / 4)


def test_one_observation_has_no_error() -> None:
    assert math.isnan(vision.mean(torch.tensor([1.0])).error)
    assert math.isnan(vision.mean(torch.ones(3), torch.zeros(3, dtype=torch.long)).error)
    assert not vision.mean(torch.tensor([1.0])).significant
    with pytest.raises(InvalidParameterError, match="no observations"):
        vision.mean(torch.empty(0))


def test_paired_difference() -> None:
    first, second = torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([1, 0, 0, 1]).bool()
    found = vision.paired(first, second)
    assert found.value == 0.25
    # differences 0 1 1 -1: deviations -.25 .75 .75 -1.25, sum of squares 2.75; sqrt(2.75 / 3 / 4)
    assert found.error == pytest.approx(math.sqrt(2.75 / 12))
    assert not found.significant
    assert vision.paired(first, first) == (0.0, 0.0)
    with pytest.raises(InvalidParameterError, match="shapes"):
        vision.paired(first, second[:2])


def test_pairing_is_sharper_than_two_accuracies() -> None:
    hard = torch.rand(1000) < 0.5
    first = hard.clone()
    second = hard & (torch.rand(1000) < 0.95)
    apart = math.hypot(vision.mean(first).error, vision.mean(second).error)
    assert vision.paired(first, second).error < apart / 2
    assert vision.paired(first, second).significant


@pytest.mark.parametrize("target", [0.8, 0.65, 0.5])
def test_costs_match(target: float) -> None:
    level = cost.nearest_level(INFO, target)
    assert abs(level - target) < 0.04  # ToMe's r is a whole number
    for name in cost.MATCHED:
        method = cost.match_cost(name, INFO, level)
        assert abs(cost.fraction(INFO, method) / level - 1) <= 0.01, name


@pytest.mark.parametrize("name", list(cost.MATCHED))
def test_twin_has_the_same_tokens(name: str) -> None:
    method = cost.match_cost(name, INFO, 0.65)
    twin = cost.twin(method, INFO, seed=3)
    assert twin.plan(INFO) == method.plan(INFO)
    assert twin.placement == method.placement
    assert twin.seed == 3


def test_match_cost_refuses() -> None:
    with pytest.raises(UnknownMethodError, match="did you mean 'tome'"):
        cost.match_cost("tomee", INFO, 0.5)
    with pytest.raises(InvalidParameterError, match="share"):
        cost.match_cost("tome", INFO, 1.5)
    with pytest.raises(InvalidParameterError, match="found from the level"):
        cost.match_cost("topk", INFO, 0.5, keep_rate=0.3)
    assert cost.match_cost("zero_tprune", INFO, 0.5, eir=False).eir is False


def test_ablation_steps() -> None:
    rows = cost.ablation(INFO, 0.68, vhf=(1.0, 100.0))
    labels, methods, _ = zip(*rows, strict=True)
    assert labels == ("random drop", "WPR", "+ EIR", "+ VHF", "+ S-stage", "printed VHF")
    _, votes, emphasised, filtered, whole, printed = methods
    assert printed.replace(vhf=(1.0, 100.0)) == whole
    assert len(cost.ablation(INFO, 0.68, vhf=printed.vhf)) == 5
    assert (votes.eir, votes.vhf) == (False, None)
    assert (emphasised.eir, emphasised.vhf) == (True, None)
    assert (filtered.eir, filtered.vhf) == (True, (1.0, 100.0))
    assert votes.plan(INFO) == emphasised.plan(INFO) == filtered.plan(INFO) == methods[0].plan(INFO)
    assert all(stage.r_s == 0 for stage in filtered.bind(INFO).values())
    assert any(stage.r_s for stage in whole.bind(INFO).values())
    for method in methods[1:]:
        assert abs(cost.fraction(INFO, method) / 0.68 - 1) <= 0.01


def _vit() -> nn.Module:
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    return vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=5
    ).eval()


def test_measure_does_not_depend_on_threads() -> None:
    import tokred

    model = _vit()
    images, labels = torch.randint(0, 255, (60, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 5, (60,))
    passes = [
        Pass(None),
        Pass(tokred.ToMe(r=2)),
        Pass(tokred.RandomTokens(counts={1: 4}), reseed=True),
        Pass(tokred.RandomTokens(counts={1: 4}), reseed=False),
    ]
    seen: list[int] = []
    alone = vision.measure(model, passes, images, labels, lambda x: x / 255, done=seen.append)
    beside = vision.measure(model, passes, images, labels, lambda x: x / 255, threads=3)
    assert [a.tolist() for a in alone] == [b.tolist() for b in beside]
    assert sum(seen) == 4 * 60
    assert all(row.shape == (60,) and row.dtype == torch.bool for row in alone)
    with torch.inference_mode():
        assert alone[0].tolist() == (model(images / 255).argmax(1) == labels).tolist()
    assert "_tokred" not in model.__dict__


def test_measure_raises_what_a_pass_raises() -> None:
    import tokred

    labels = torch.zeros(4, dtype=torch.long)
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(tokred.TokredError, match="4 blocks"):
        vision.measure(_vit(), [Pass(tokred.TopK(layers=(9,)))], images, labels, lambda x: x / 255, threads=2)


class _Slow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.004)
        return x


def test_interleaved_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _Slow(), torch.zeros(2, 3, 8, 8)
    monkeypatch.setattr(speed, "_time_patched", lambda model, method, batch: 0.5 * speed._time(model, batch))
    pairs: list[int] = []
    found = speed.interleaved(model, {"a": None, "b": None}, batch, rounds=3, done=pairs.append)  # type: ignore[dict-item]
    assert len(pairs) == 2 * 4  # one round of warm-up
    assert found["a"].speedup == pytest.approx(2, rel=0.4)
    assert found["a"].low <= found["a"].speedup <= found["a"].high
    with pytest.raises(InvalidParameterError):
        speed.interleaved(model, {}, batch, rounds=0)


def test_speed_summary() -> None:
    found = speed._summary([(2.0, 1.0), (3.0, 1.0), (8.0, 2.0)], images=10)
    assert found == (10.0, pytest.approx(10 / 3), 3.0, 2.5, 3.5)
    assert speed._summary([(2.0, 1.0)], images=1).low == 2


def test_token_chain() -> None:
    assert token_chain(144, [144, 101, 101, 71]) == "144>101>71"
    assert token_chain(8, [8, 8]) == "8"
    assert token_chain(12, [11, 10, 9, 8, 7]) == "12>11>10>..>7"


def test_table_lines_up() -> None:
    lines = table(["name", "x"], [[["a", "1"]], [["bcd", "100"]]]).splitlines()
    assert lines == ["name    x", "---------", "a       1", "---------", "bcd   100"]


def test_nan_is_null() -> None:
    assert dumps({"se": [math.nan, 1.0]}).split() == ["{", '"se":', "[", "null,", "1.0", "]", "}"]
