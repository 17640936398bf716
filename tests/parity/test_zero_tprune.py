"""Zero-TPrune against the authors' early code (early_*) and the equations (layer_*, model_*)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.parity._golden import Golden, Seen, block_outputs, last_output, recorded, timm_model
from tokred import ops
from tokred.core.sites import AttentionTap, EncoderBlock, EncoderInfo
from tokred.core.tokens import TokenTable
from tokred.vision.zero_tprune import Stage, similar_tokens

METHOD = "zero_tprune"

PREFIXES = {"early_": "early", "layer_": "layer", "model_": "model"}
#: values of the manifest -> values of our fields, where they differ
BOOST = {"cls": "sqrt", "sqrt": "sqrt", "none": "none", None: "none", "half_n": "half_n"}
PARTITION = {"seq-u": "sequential_u", "seq-i": "sequential_i"}
HOOK = {"post_block": "block", "post_attn": "attn"}
#: options with the same name and meaning as a field
FIELDS = ("renorm", "eir", "vhf", "order", "damping", "tau_imp", "tol", "var_norm", "similarity", "seed")
OPTIONS = (
    "r_s",
    "keep",
    "iters",
    "boost",
    "cls_boost",
    "boost_idx",
    "boosted",
    "protected",
    "partition",
    "feature",
    "hook",
)


def test_case(golden: Golden) -> None:
    if "attn" in golden:
        check_layer_case(golden)
    elif "prune_list" in golden.entry or golden.kind({**PREFIXES, "": "model"}) == "early":
        check_early_case(golden)
    else:
        check_model_case(golden)
    golden.finish()


# -- options ---------------------------------------------------------------------------------------------------------


def options_of(golden: Golden, allowed: Sequence[str]) -> dict[str, Any]:
    """Options of a case, from its `options` and from itself; `golden.known` has refused others already."""
    inner = golden.entry.get("options", {})
    refuse_unknown(golden, inner, (*OPTIONS, *FIELDS))
    own = {key: golden.entry[key] for key in allowed if key in golden.entry}
    return {**own, **inner}


def refuse_unknown(golden: Golden, options: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        pytest.fail(f"{golden.case.name}: this runner does not know the options {unknown}; it knows {sorted(known)}")


def fields_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ZeroTPrune; what an option leaves out stays the field's default."""
    fields = {key: options[key] for key in FIELDS if key in options}
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    boost = options.get("boost", options.get("cls_boost", "cls"))
    if boost not in BOOST:
        pytest.fail(f"unknown boost {boost!r}; known: {list(BOOST)}")
    fields["cls_boost"] = BOOST[boost]
    if "partition" in options:
        fields["partition"] = PARTITION.get(options["partition"], options["partition"])
    if "feature" in options:
        fields["feature"] = options["feature"]
    if "hook" in options:
        fields["hook"] = HOOK.get(options["hook"], options["hook"])
    boosted = options.get("boosted", options.get("boost_idx"))
    if boosted is not None:
        fields["boosted"] = tuple([boosted] if isinstance(boosted, int) else boosted)
    return fields


# -- one layer -------------------------------------------------------------------------------------------------------


def check_layer_case(golden: Golden) -> None:
    golden.known(("kind", "B", "H", "N", "Df", "options", *OPTIONS, *FIELDS))
    options = options_of(golden, (*OPTIONS, *FIELDS))
    attention, feature = golden["attn"], golden["feat"]
    batch, _, tokens, _ = attention.shape
    protected = protected_positions(golden, options, tokens)
    # Prefix tokens stand in front here: move the protected ones there, and read positions through the same table.
    order = torch.tensor(protected + [t for t in range(tokens) if t not in protected])
    fields = fields_of(options)
    if fields.get("boosted") is None:
        fields["boosted"] = [0] if 0 in protected else []
    fields["boosted"] = tuple(order.tolist().index(position) for position in fields["boosted"])
    if fields.get("feature", "key") not in ("key", "key_mean"):
        pytest.fail(f"feature {fields['feature']!r} is not stored apart in a layer case")
    fields["feature"] = "key"  # `feat` is the feature itself
    method = tokred.ZeroTPrune(**fields)
    rule = Stage(options.get("r_s", 0), options.get("keep", 1.0), options.get("iters", 5))
    view = layer_view(attention[:, :, order][:, :, :, order], feature[:, order], len(protected))
    kept = tokred.Keep(torch.arange(view.count).expand(batch, -1))
    if method.count(view.count, rule) < view.count:  # as a host does: it asks only where tokens are removed
        kept = method.reduce(view, rule)
    check_stages(golden, "", Seen(method, view, rule, kept), order)


def protected_positions(golden: Golden, options: Mapping[str, Any], tokens: int) -> list[int]:
    """The class token by default, and the distillation token where there is one (then it is boosted too)."""
    if "protected" in options:
        return sorted(options["protected"])
    boosted = options.get("boosted", options.get("boost_idx"))
    boosted = [boosted] if isinstance(boosted, int) else boosted
    readings = [[0], sorted(boosted)] if boosted else [[0]]
    stored = next((name for name in ("out.pre.importance", "out.i.cand") if name in golden), None)
    whole = stored == "out.pre.importance" or options.get("r_s", 0) == 0 or options.get("order") == "IS"
    if stored is not None and whole:  # the stored shapes tell the readings apart
        readings = [reading for reading in readings if tokens - len(reading) == golden[stored].shape[-1]]
    if not readings:
        pytest.fail(f"{golden.case.name}: protected tokens are not given, and neither the class token nor boosted fit")
    return readings[0]


def layer_view(attention: Tensor, feature: Tensor, prefix: int) -> EncoderBlock:
    """The view of a block with this attention whose keys, all heads side by side, are this feature."""
    batch, heads, tokens, _ = attention.shape
    info = EncoderInfo(
        depth=1, dim=feature.shape[2], heads=heads, kv_heads=1, head_dim=feature.shape[2], prefix=prefix,
        class_tokens=0, tokens=tokens - prefix, grid=None, attention_macs=0, mlp_macs=0,
    )  # fmt: skip
    key = feature[:, None]
    tap = AttentionTap(key, key, 1.0, probabilities=attention)
    return EncoderBlock(0, info, feature, TokenTable(batch, tokens - prefix), lambda: tap)


def check_stages(golden: Golden, key: str, seen: Seen, order: Tensor) -> None:
    """Every stage of one pruning layer; `order` maps our positions (prefix first) to those of the golden."""
    method, view, rule = seen.method, seen.view, seen.rule
    prefix, n = view.prefix, view.count
    batch = view.tokens.shape[0]

    def positions(prunable: Tensor) -> Tensor:
        return order[prunable + prefix]

    def stored(values: Tensor, candidates: Tensor) -> Tensor:
        """Values (B, ..., n) of some candidates, in ascending order of the golden's positions."""
        index = candidates.gather(1, positions(candidates).argsort(dim=1))
        shape = (batch, *[1] * (values.dim() - 2), index.shape[1])
        return values.gather(-1, index.view(shape).expand(*values.shape[:-1], -1))

    golden.check(f"{key}out.kept", positions(seen.change.indices).sort(dim=1).values)
    attention = view.attention_matrix(method.tau_imp)
    everyone = torch.arange(n).expand(batch, -1)
    alive = torch.ones(batch, n, dtype=torch.bool)
    copies_first = method.order == "SI"

    def vote(present: Tensor | None, iterations: int) -> Any:
        return method.importance(attention, present, iterations, prefix, view.info.class_tokens)

    present = n if copies_first else method.count(n, rule._replace(r_s=0))
    first = vote(None, 1 if copies_first else rule.iters)
    if copies_first:
        golden.check(f"{key}out.pre.importance", stored(first.score, everyone), "importance")
    else:
        found, candidates = first, everyone
        if rule.keep < 1:
            alive = torch.zeros_like(alive).scatter(1, ops.top_indices(first.score, present), True)

    copies = present - method.count(present, rule._replace(keep=1.0))
    if copies:
        similar = similar_tokens(
            method._feature(view), first.score, alive, present, copies, method.partition, method.similarity,
            method.seed + view.layer,
        )  # fmt: skip
        alive = alive.scatter(1, similar.pruned, False)
        golden.check_sets(f"{key}out.s.pruned", positions(similar.pruned))
        golden.check_sets(f"{key}out.s.group_b", positions(similar.group_b))
        group_a = golden.get(f"{key}out.s.group_a")
        golden.check_sets(f"{key}out.s.group_a", positions(similar.group_a))
        if group_a is not None:  # the other two tensors stand beside it
            where = (group_a[:, :, None] == positions(similar.group_a)[:, None]).int().argmax(dim=2)
            golden.check(f"{key}out.s.best_b", positions(similar.best_b).gather(1, where))
            golden.check(f"{key}out.s.best_sim", similar.similarity.gather(1, where))

    if copies_first:
        candidates = everyone[alive].view(batch, -1)
        found = vote(alive, rule.iters)
    golden.check(f"{key}out.i.cand", positions(candidates).sort(dim=1).values)
    golden.check(f"{key}out.i.importance", stored(found.score, candidates), "importance")
    golden.check(f"{key}out.i.head_scores", stored(found.head_scores, candidates), "importance")
    golden.check(f"{key}out.i.head_var", found.head_variance)
    golden.check(f"{key}out.i.head_mask", found.head_mask)


# -- models ----------------------------------------------------------------------------------------------------------

MODEL = ("kind", "cfg", "schedule_0indexed", "options", "B", "state_dict_prefix", "class_token", "distill_token")


def check_model_case(golden: Golden) -> None:
    golden.known((*MODEL, *OPTIONS, *FIELDS))
    kind = golden.entry.get("kind")
    model = timm_model(golden, None if kind == "model" else kind)
    prefix = model.num_prefix_tokens
    options = options_of(golden, (*OPTIONS, *FIELDS))
    refuse_unknown(golden, options, [key for key in (*OPTIONS, *FIELDS) if key not in ("r_s", "keep", "iters")])
    protected = options.get("protected", list(range(prefix)))
    if sorted(protected) != list(range(prefix)):
        pytest.fail(f"protected={protected}: in a model all {prefix} prefix tokens are protected, and they alone")
    methods = []
    for layer, entry in golden.entry["schedule_0indexed"].items():
        refuse_unknown(golden, entry, (*OPTIONS, *FIELDS))
        amounts = [entry.get("r_s", 0), entry.get("keep", 1.0), *([entry["iters"]] if "iters" in entry else [])]
        methods.append(tokred.ZeroTPrune(schedule={int(layer): amounts}, **fields_of({**options, **entry})))
    if len({method.replace(schedule={0: (0, 1.0)}) for method in methods}) == 1:  # one method, as users write it
        schedule = {layer: amounts for method in methods for layer, amounts in method.schedule.items()}
        methods = [methods[0].replace(schedule=schedule)]
    images = golden["input"]
    logs, _ = run_model(golden, model, methods)
    for layer, seen in logs.items():
        check_stages(golden, f"block{layer}.", seen, torch.arange(seen.view.tokens.shape[1]))
    assert images.shape[0] == golden.entry.get("B", images.shape[0])


def check_early_case(golden: Golden) -> None:
    golden.known((*MODEL, "prune_list", "retain_rate_list", "tau_imp", "iters", "damping", "eir"))
    case = golden.entry
    refuse_unknown(golden, case.get("options", {}), ())
    kind = case.get("kind")
    model = timm_model(golden, None if kind == "early" else kind)
    schedule = {
        layer: (0, rate, case.get("iters", 5))
        for layer, rate in zip(case["prune_list"], case["retain_rate_list"], strict=True)
    }
    method = tokred.ZeroTPrune(
        schedule=schedule,
        cls_boost="none",
        vhf=None,
        eir=case.get("eir", True),
        tau_imp=case.get("tau_imp", 1.0),
        damping=case.get("damping", 0.0),
    )
    logs, outputs = run_model(golden, model, [method])
    for layer, seen in logs.items():
        view = seen.view
        attention = view.attention_matrix(method.tau_imp)
        found = method.importance(attention, None, seen.rule.iters, view.prefix, view.info.class_tokens)
        golden.check(f"out.importance.{layer}", found.score, "importance")
        mask = torch.zeros(found.score.shape, dtype=torch.bool).scatter(1, seen.change.indices, True)
        golden.check(f"out.keep_mask.{layer}", mask)
    for layer, tokens in enumerate(outputs):
        golden.check(f"out.tokens_after_block.{layer}", tokens)


def run_model(golden: Golden, model: Any, methods: list[Any]) -> tuple[dict[int, Seen], list[Tensor]]:
    """Run the patched model; compare logits, final tokens and their origins. Returns what the method saw, by block."""
    images, prefix = golden["input"], model.num_prefix_tokens
    golden.check("out.logits_unpatched", lambda: model(images))
    with (
        torch.no_grad(), block_outputs(model) as outputs, last_output(model.norm) as normed,
        recorded(tokred.ZeroTPrune) as log,
    ):  # fmt: skip
        patch = tokred.patch(model, methods)
        logits = model(images)
    golden.check("out.logits", logits)
    golden.check("out.tokens_normed", normed[0])
    n = normed[0].shape[1] - prefix
    origins = patch.trace[-1].origins if len(patch.trace) else torch.arange(n).expand(len(images), -1)
    front = torch.arange(prefix).expand(len(images), -1)
    golden.check("out.final_token_origin", torch.cat([front, origins + prefix], dim=1))
    return log, outputs
