"""The rules of a patch: undo, copies, threads, checkpointing, compilation, errors (design.md section 4)."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

import tokred
from tokred.core.errors import (
    AlreadyPatchedError,
    CompiledModelError,
    ConflictError,
    InvalidParameterError,
    LayerError,
    MissingSiteError,
    NoClassTokenError,
    UnknownMethodError,
    UnknownParameterError,
    UnsupportedModelError,
)

METHODS = [
    tokred.ToMe(r=5),
    tokred.TopK(layers=(1, 3)),
    tokred.TopK(layers=(1, 3), fuse=True),
    tokred.TopK(layers=(1, 3), score="mass"),
    tokred.RandomTokens(layers=(1, 3)),
    tokred.ZeroTPrune(schedule={0: (4, 0.9), 2: (3, 0.8)}),
    tokred.ZeroTPrune(schedule={1: (4, 0.9)}, feature="value", hook="attn"),
    tokred.ZeroTPrune(schedule={1: (4, 0.9)}, feature="x_before", tau_imp=0.5),
]
NAMES = [f"{i}-{m.name}" for i, m in enumerate(METHODS)]


def make_vit(**kwargs) -> VisionTransformer:
    torch.manual_seed(0)
    config = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 5, "num_heads": 3, "num_classes": 10}
    return VisionTransformer(**{**config, **kwargs}).eval()


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def fingerprint(model: nn.Module) -> list:
    """Everything about a model that a patch could leave behind."""
    seen = []
    for name, module in model.named_modules():
        plain = {
            key: (id(value) if isinstance(value, (nn.Module, torch.Tensor)) else repr(value))
            for key, value in vars(module).items()
            if not isinstance(value, dict) or not key.startswith(("_parameters", "_buffers", "_modules"))
        }
        seen.append((name, type(module), plain, list(module._parameters), list(module._modules)))
    return seen


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_remove_leaves_no_trace(method):
    model, x = make_vit(), images()
    before, keys = fingerprint(model), list(model.state_dict())
    with torch.no_grad():
        expected = model(x)
        with tokred.patch(model, method) as patch:
            assert list(model.state_dict()) == keys
            assert not torch.equal(model(x), expected)
            assert len(patch.trace) > 0
        assert fingerprint(model) == before
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "method",
    [
        tokred.ToMe(r=0),
        tokred.TopK(keep_rate=1.0),
        tokred.ZeroTPrune(keep_rate=1.0),
        tokred.ZeroTPrune(schedule={1: (0, 1.0)}),
        tokred.RandomTokens(keep_rate=1.0),
        tokred.RandomTokens(budget=1.0),
        tokred.RandomTokens(counts={1: 64}),
        tokred.TopK(keep_rate=0.999, layers=(1,)),  # ceil(0.999 * 64) = 64
    ],
    ids=repr,
)
def test_keep_everything_is_bit_identical(method):
    model, x = make_vit(), images()
    with torch.no_grad():
        expected = model(x)
        with tokred.patch(model, method):
            assert torch.equal(model(x), expected)


def test_an_exception_at_any_point_of_installation_undoes_it(monkeypatch):
    from tokred.adapters.timm_vit import TimmHost

    model = make_vit()
    before = fingerprint(model)
    add_taps = TimmHost.add_taps

    def failing(self, session, layer, wants):
        add_taps(self, session, layer, wants)
        if layer == 3:
            raise RuntimeError("as if something broke")

    monkeypatch.setattr(TimmHost, "add_taps", failing)
    with pytest.raises(RuntimeError, match="as if"):
        tokred.patch(model, tokred.ToMe(r=5))
    assert fingerprint(model) == before


def test_an_exception_in_forward_does_not_spoil_the_next_forward():
    model, x = make_vit(), images()
    with tokred.patch(model, tokred.ToMe(r=5)), torch.no_grad():
        expected = model(x)
        handle = model.blocks[3].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x)
        handle.remove()
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_batch_equals_per_sample(method):
    model, x = make_vit(), images(5)
    with tokred.patch(model, method), torch.no_grad():
        together = model(x)
        alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_deepcopy_is_independent(method):
    model, x = make_vit(), images()
    with torch.no_grad():
        plain = model(x)
        patch = tokred.patch(model, method)
        reduced = model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), reduced)
        patch.remove()
        assert torch.equal(model(x), plain)
        assert torch.equal(twin(x), reduced)  # the copy is still patched ...
        tokred.unpatch(twin)
        assert torch.equal(twin(x), plain)  # ... and has its own undo
    assert fingerprint_shape(twin) == fingerprint_shape(make_vit())


def fingerprint_shape(model: nn.Module) -> list:
    return [
        (name, type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_pickle_round_trip(method):
    model, x = make_vit(), images()
    with torch.no_grad():
        plain = model(x)
        tokred.patch(model, method)
        reduced = model(x)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert torch.equal(loaded(x), reduced)
        tokred.unpatch(loaded)
        assert torch.equal(loaded(x), plain)


def test_state_dict_loads_strictly_while_patched():
    model, other = make_vit(), make_vit()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    with tokred.patch(model, tokred.ToMe(r=5)):
        model.load_state_dict(other.state_dict(), strict=True)
        reduced = model(images())
    with tokred.patch(other, tokred.ToMe(r=5)):
        assert torch.equal(other(images()), reduced)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_threads_do_not_mix(method):
    model = make_vit()
    inputs = [images(n + 1) for n in range(4)]
    patch = tokred.patch(model, method)
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    results: dict[int, list] = {n: [] for n in range(4)}
    batches: dict[int, set] = {n: set() for n in range(4)}
    barrier = threading.Barrier(4)

    def run(n: int) -> None:
        barrier.wait()
        with torch.no_grad():
            for _ in range(8):
                results[n].append(model(inputs[n]))
                batches[n].add(patch.trace[0].origins.shape[0])

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(4):
        assert len(results[n]) == 8
        assert all(torch.equal(y, expected[n]) for y in results[n])
        assert batches[n] == {n + 1}  # each thread reads its own trace


def gradients(model: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    # all forwards first: a recomputation must find the state of its own pass, not of the latest
    losses = [model(x).square().mean() for x in inputs]
    sum(losses).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(method, reentrant, monkeypatch):
    import timm.models.vision_transformer as vit_module

    model = make_vit().train()
    a, b = images(2), images(3)
    with tokred.patch(model, method):
        expected = gradients(model, a, b)
        calls = []

        def run_sequence(blocks, x):
            for block in blocks:
                calls.append(block)
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

        monkeypatch.setattr(vit_module, "checkpoint_seq", run_sequence)
        model.set_grad_checkpointing(True)
        actual = gradients(model, a, b)
    assert len(calls) == 10
    for left, right in zip(expected, actual, strict=True):
        assert torch.equal(left, right)


def test_checkpointing_keeps_no_state_after_backward():
    import gc
    import weakref

    from tokred.adapters import encoder

    states = []
    original = encoder.ForwardState.__init__

    def spy(self, table):
        original(self, table)
        states.append(weakref.ref(self))

    model = make_vit().train()
    model.set_grad_checkpointing(True)
    with pytest.MonkeyPatch.context() as patcher, tokred.patch(model, tokred.ToMe(r=5)):
        patcher.setattr(encoder.ForwardState, "__init__", spy)
        for _ in range(4):
            model(images()).mean().backward()
        gc.collect()
        assert len(states) == 4
        assert sum(ref() is not None for ref in states) == 1  # the one that the trace shows


def test_hand_written_loop_over_blocks_is_one_pass():
    model, x = make_vit(), images()
    with tokred.patch(model, tokred.ToMe(r=5)), torch.no_grad():
        expected = model.forward_features(x)
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        for block in model.blocks:
            tokens = block(tokens)
        assert torch.equal(model.norm(tokens), expected)


def test_hand_written_loop_over_the_same_tokens_starts_anew():
    model = make_vit()
    tokens = torch.randn(2, 65, 48, generator=torch.Generator().manual_seed(4))

    def run():
        x = tokens
        for block in model.blocks:
            x = block(x)
        return x

    with tokred.patch(model, tokred.ToMe(r=5)) as patch:
        run()
        first = patch.trace[-1].group
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.05)
        again = run()
        assert not torch.equal(patch.trace[-1].group, first)
    with tokred.patch(model, tokred.ToMe(r=5)):
        assert torch.equal(run(), again)


def test_features_and_head_called_apart_equal_forward():
    model, x = make_vit(global_pool="avg", class_token=False), images()
    with tokred.patch(model, tokred.ToMe(r=5)), torch.no_grad():
        assert torch.equal(model.forward_head(model.forward_features(x)), model(x))


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_compiles_without_graph_breaks(method):
    model, x = make_vit(), images()
    with tokred.patch(model, method) as patch, torch.no_grad():
        expected, steps = model(x), patch.trace.counts
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        assert patch.trace.counts == steps
        torch.testing.assert_close(compiled(images(4)), model(images(4)))


def test_patch_after_the_first_compiled_call_is_honoured():
    model, x = make_vit(), images()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        plain = compiled(x)
        patch = tokred.patch(compiled, tokred.TopK(layers=(1, 3)))
        reduced = model(x)
        torch.testing.assert_close(compiled(x), reduced)
        assert not torch.allclose(plain, reduced)
        patch.replace(tokred.ToMe(r=5))
        torch.testing.assert_close(compiled(x), model(x))
        assert not torch.allclose(compiled(x), reduced)
        patch.remove()
        torch.testing.assert_close(compiled(x), plain)


def test_model_compiled_in_place_is_refused():
    model = make_vit()
    model.blocks[1].compile(backend="eager")
    before = fingerprint(model)
    with pytest.raises(CompiledModelError, match=r"blocks\.1"):
        tokred.patch(model, tokred.TopK(layers=(1, 3)))
    assert fingerprint(model) == before


def test_replace_takes_effect_and_keeps_the_old_method_on_error():
    model, x = make_vit(), images()
    with torch.no_grad(), tokred.patch(model, tokred.TopK(layers=(1, 3))) as patch:
        top = model(x)
        with pytest.raises(LayerError):
            patch.replace(tokred.TopK(layers=(1, 7)))
        assert torch.equal(model(x), top)
        assert patch.methods == (tokred.TopK(layers=(1, 3)),)
        assert patch.replace("tome", r=5) is patch
        assert not torch.equal(model(x), top)
        assert [layer for layer, _ in patch.trace.counts] == [0, 1, 2, 3, 4]
        patch.replace(tokred.TopK(layers=(1, 3)))
        assert torch.equal(model(x), top)


def test_two_methods_at_different_blocks():
    model, x = make_vit(), images()
    with torch.no_grad(), tokred.patch(model, [tokred.TopK(layers=(3,)), tokred.ToMe(r=[5])]) as patch:
        model(x)
        assert [(s.layer, s.method) for s in patch.trace] == [(0, "tome"), (3, "topk")]


def test_meta_device_model_is_patched_and_runs_by_shape():
    with torch.device("meta"):
        model = make_vit()
    for method in METHODS:
        with tokred.patch(model, method) as patch:
            assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 10)
            assert len(patch.trace) > 0


def test_nan_tokens_do_not_crash_or_spread_to_other_images():
    model, x = make_vit(), images(3)
    x[1] = float("nan")
    for method in METHODS:
        with tokred.patch(model, method), torch.no_grad():
            y = model(x)
            clean = model(x[[0, 2]])
        assert y[1].isnan().all()
        torch.testing.assert_close(y[[0, 2]], clean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_half_precision(method, dtype):
    model, x = make_vit().to(dtype), images().to(dtype)
    with tokred.patch(model, method), torch.no_grad():
        y = model(x)
    assert y.dtype == dtype
    assert y.isfinite().all()


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_autocast(method):
    model, x = make_vit(), images()
    with tokred.patch(model, method), torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
    assert (y.float() - exact).abs().max() < 0.2


def bad(error, pattern, method, *, model=None, **options):
    return pytest.param(error, pattern, method, model or {}, options, id=f"{error.__name__}-{pattern[:30]}")


@pytest.mark.parametrize(
    ("error", "pattern", "method", "model", "options"),
    [
        bad(LayerError, "block 5.*5 blocks", tokred.TopK(layers=(1, 5))),
        bad(LayerError, "7 entries.*5 blocks", tokred.ToMe(r=[1] * 7)),
        bad(LayerError, "block 5.*5 blocks", tokred.ZeroTPrune(preset="deit_s_3.08g")),
        bad(LayerError, "block 8", tokred.ZeroTPrune(schedule={8: (0, 0.5)})),
        bad(LayerError, "block 6", tokred.RandomTokens(counts={6: 3})),
        bad(NoClassTokenError, "score='mass'", tokred.TopK(), model={"class_token": False, "global_pool": "avg"}),
        bad(UnknownMethodError, "did you mean 'tome'", "tomme"),
        bad(ConflictError, "cannot act on one model", [tokred.ToMe(r=[4]), tokred.ZeroTPrune(schedule={3: (0, 0.5)})]),
        bad(ConflictError, "both act in block 1", [tokred.TopK(layers=(1,)), tokred.RandomTokens(layers=(1,))]),
        bad(InvalidParameterError, "exit", tokred.ToMe(r=4), exit="nowhere"),
        bad(InvalidParameterError, "score_backend", tokred.ToMe(r=4), score_backend="gpu"),
        bad(UnknownParameterError, "rr", "tome", rr=4),
        bad(UnknownParameterError, "keep_rate", tokred.TopK(layers=(1,)), keep_rate=0.5),
        bad(InvalidParameterError, "no method", 3),
        bad(UnsupportedModelError, "empty", []),
    ],
)
def test_bad_input_is_named_and_leaves_the_model_as_it_was(error, pattern, method, model, options):
    vit = make_vit(**model)
    before = fingerprint(vit)
    with pytest.raises(error, match=pattern):
        tokred.patch(vit, method, **options)
    assert fingerprint(vit) == before


def test_patching_twice_is_refused():
    model = make_vit()
    patch = tokred.patch(model, tokred.ToMe(r=5))
    for target in (model, nn.Sequential(model)):
        with pytest.raises(AlreadyPatchedError, match="replace"):
            tokred.patch(target, tokred.TopK(layers=(1,)))
    assert patch.active
    assert patch.methods == (tokred.ToMe(r=5),)
    tokred.unpatch(model)
    assert not patch.active
    tokred.unpatch(model)
    tokred.patch(model, tokred.TopK(layers=(1,))).remove()


def test_removed_patch_says_so():
    model = make_vit()
    patch = tokred.patch(model, tokred.ToMe(r=5))
    model(images())
    patch.remove()
    patch.remove()
    assert not patch.active
    assert len(patch.trace) == 5  # what it was when it was removed
    with pytest.raises(RuntimeError, match="removed"):
        patch.replace(tokred.ToMe(r=3))


def test_instance_forward_is_refused_only_where_it_would_hide_the_reduction():
    model = make_vit()
    model.blocks[1].forward = model.blocks[1].forward
    before = list(vars(model.blocks[1]))
    with pytest.raises(UnsupportedModelError, match="forward\\(\\) set on the instance"):
        tokred.patch(model, tokred.ToMe(r=5))
    assert list(vars(model.blocks[1])) == before
    with tokred.patch(model, tokred.ZeroTPrune(schedule={1: (0, 0.5)})) as patch:  # reduces after the block
        model(images())
        assert patch.trace.counts == [(1, 32)]


def test_models_without_a_host():
    import timm

    for name, reason in [("swin_tiny_patch4_window7_224", "window"), ("convnext_atto", "convolutional"),
                         ("beit_base_patch16_224", "relative position"), ("cait_xxs24_224", "alking"),
                         ("xcit_nano_12_p16_224", "ross-covariance")]:  # fmt: skip
        with torch.device("meta"):
            model = timm.create_model(name)
        with pytest.raises(UnsupportedModelError, match=reason):
            tokred.patch(model, tokred.ToMe(r=4))
    with pytest.raises(UnsupportedModelError, match="no host serves Linear"):
        tokred.patch(nn.Linear(2, 2), tokred.ToMe(r=4))
    with pytest.raises(UnsupportedModelError, match="DataParallel"):
        tokred.patch(nn.DataParallel(make_vit()), tokred.ToMe(r=4))
    with pytest.raises(UnsupportedModelError, match="several"):
        tokred.patch(nn.Sequential(make_vit(), make_vit()), tokred.ToMe(r=4))
    with pytest.raises(UnsupportedModelError, match=r"expected a torch\.nn\.Module"):
        tokred.patch("vit", tokred.ToMe(r=4))


def test_missing_site_is_named():
    class Elsewhere(tokred.Method):
        name = "elsewhere_for_test"
        paper = "none"
        sites = ("Nowhere",)

    from tokred.core import method as registry

    try:
        with pytest.raises(MissingSiteError, match="Elsewhere acts at Nowhere, which timm models do not have"):
            tokred.patch(make_vit(), Elsewhere())
    finally:
        del registry._REGISTRY["elsewhere_for_test"]
