"""Denoisers of diffusers: what runs on fewer tokens, what comes back, and what a patch leaves behind (nothing)."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("diffusers")

import tokred
from tests.hosts.denoisers import DENOISERS, TEXT, call, denoiser, inputs, run
from tokred.core.errors import (
    AlreadyPatchedError,
    ConflictError,
    InvalidParameterError,
    LayoutError,
    MissingSiteError,
    RaggedInputError,
    UnsupportedModelError,
)

METHODS = [
    tokred.ToMeSD(ratio=0.5),
    tokred.ToMeSD(ratio=0.7, sx=4, use_rand=False),
    tokred.ToMeSD(ratio=0.4, merge_mlp=True),
    tokred.ToDo(2),
]
EVERYTHING = pytest.mark.parametrize("method", METHODS, ids=repr)
MODELS = pytest.mark.parametrize("name", DENOISERS)


def condition(model: nn.Module) -> dict[str, Any]:
    """All that a patch may touch: classes, attributes, hooks."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        hooks = [len(getattr(module, f"_forward{kind}")) for kind in ("_hooks", "_pre_hooks")]
        hooks += [len(getattr(module, f"_forward{kind}_with_kwargs")) for kind in ("_hooks", "_pre_hooks")]
        found[path] = (type(module), sorted(module.__dict__), hooks)
    return found


# -- identity and undo -------------------------------------------------------------------------------------------------


@MODELS
def test_keeping_everything_is_bypassed(name: str) -> None:
    model, x = denoiser(name), inputs(name)
    plain, before = run(model, x), condition(model)
    for method in (tokred.ToMeSD(ratio=0), tokred.ToDo(1), tokred.ToMeSD(ratio=0.01)):  # 0.01 of 64 tokens is none
        with tokred.patch(model, method) as patch:
            assert torch.equal(run(model, x), plain)
            assert len(patch.trace) == 0
            if method.is_identity(patch._host.info):
                assert {k: v for k, v in condition(model).items() if k} == {k: v for k, v in before.items() if k}
    assert condition(model) == before


@MODELS
@EVERYTHING
def test_undo_leaves_no_trace(name: str, method: tokred.Method) -> None:
    model, x = denoiser(name), inputs(name)
    plain, before, keys = run(model, x), condition(model), list(model.state_dict())
    patch = tokred.patch(model, method)
    assert list(model.state_dict()) == keys
    assert not torch.equal(run(model, x), plain)
    patch.remove()
    patch.remove()
    assert condition(model) == before
    assert torch.equal(run(model, x), plain)


def test_an_error_in_the_pass_leaves_a_model_that_works() -> None:
    model, x = denoiser("sd3"), inputs("sd3")
    with tokred.patch(model, METHODS[0]) as patch:
        wanted = run(model, x)
        fails = model.transformer_blocks[1].ff.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, x)
        fails.remove()
        assert patch._attachment.call.scope is None
        assert not patch._attachment.call.running
        assert torch.equal(run(model, x), wanted)
        patch.replace(tokred.ToDo(2))
        assert not torch.equal(run(model, x), wanted)
        with pytest.raises(InvalidParameterError, match="no window of 2 x 16"):
            patch.replace(tokred.ToMeSD(sx=16))
        assert patch.method == tokred.ToDo(2)
        patch.replace(METHODS[0])
        assert torch.equal(run(model, x), wanted)


# -- what it computes --------------------------------------------------------------------------------------------------


class Watch:
    """Remembers, of one run of an unpatched or patched model, the tokens that each block is given."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks = {place.info.layer: place for place in _places(model)}
        self.seen: dict[int, Tensor] = {}
        for layer, place in self.blocks.items():
            place.block.register_forward_pre_hook(
                lambda module, args, kwargs, layer=layer: self.seen.__setitem__(
                    layer, args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )


def _places(model: nn.Module) -> tuple:
    from tokred.adapters.diffusion import DiffusersHost

    return DiffusersHost(model).places


def _by_hand(model: nn.Module, change_of: Any, layers: set[int], parts: tuple[str, ...]) -> None:
    """Give modules of an unpatched model a forward that merges by a dense matrix, one sample at a time."""
    watch = Watch(model)

    def wrap(module: nn.Module, layer: int, text: int) -> None:
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs.pop("hidden_states")
            outputs = []
            for b in range(x.shape[0]):
                merge = change_of(layer, watch.seen[layer], b)  # (n, K) one-hot: what goes where
                mean = merge.T / merge.sum(dim=0)[:, None]
                own = {k: v[b : b + 1] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
                if own.get("image_rotary_emb") is not None:
                    own["image_rotary_emb"] = tuple(_rows(table, b) for table in own["image_rotary_emb"])
                y = inner(torch.cat([x[b, :text], mean @ x[b, text:]])[None], **own)
                first = y[0] if isinstance(y, tuple) else y
                first = torch.cat([first[0, :text], merge @ first[0, text:]])[None]
                outputs.append((first, *y[1:]) if isinstance(y, tuple) else (first,))
            joined = tuple(torch.cat(column) for column in zip(*outputs, strict=True))
            return joined if len(joined) > 1 else joined[0]

        def _rows(table: Tensor, b: int) -> Tensor:
            chosen = change_of.representative[layer][b]
            front = len(table) - watch.seen[layer].shape[1]
            return torch.cat([table[:front], table[front:][chosen]])

        module.forward = forward

    for layer in layers:
        place = watch.blocks[layer]
        for part in parts:
            for module in place.modules.get(part, ()):
                wrap(module, layer, TEXT if place.joined and part == "attention" else 0)


class ByHand:
    """Groups of `tests.methods.test_tome_sd.slow_groups`, as one-hot matrices."""

    def __init__(self, model: nn.Module, method: tokred.ToMeSD, timestep: float, grids: dict[int, tuple[int, int]]):
        self.method, self.timestep, self.grids = method, timestep, grids
        self.representative: dict[int, dict[int, Tensor]] = {}

    def __call__(self, layer: int, tokens: Tensor, b: int) -> Tensor:
        from tests.methods.test_tome_sd import slow_cells, slow_groups

        method, grid = self.method, self.grids[layer]
        windows = (grid[0] // method.sy) * (grid[1] // method.sx)
        r = min(int(tokens.shape[1] * method.ratio), tokens.shape[1] - windows)
        cells = [0] * windows
        if method.use_rand:
            cells = slow_cells(windows, method.sx * method.sy, method.seed, layer, self.timestep)
        groups = slow_groups(tokens[b], grid, (method.sy, method.sx), r, cells)
        merge = torch.zeros(tokens.shape[1], len(groups))
        for slot, group in enumerate(groups):
            merge[sorted(group), slot] = 1
        first = list(self._receivers(grid, cells)) + [next(iter(group)) for group in groups[windows:]]
        self.representative.setdefault(layer, {})[b] = torch.tensor(first)
        return merge

    def _receivers(self, grid: tuple[int, int], cells: list[int]) -> Any:
        across = grid[1] // self.method.sx
        for window, cell in enumerate(cells):
            top, left = window // across * self.method.sy, window % across * self.method.sx
            yield (top + cell // self.method.sx) * grid[1] + left + cell % self.method.sx


@MODELS
@pytest.mark.parametrize("grid", [(8, 8), (6, 10)], ids=str)
@pytest.mark.parametrize("method", METHODS[:3], ids=repr)
def test_merging_is_its_slow_definition(name: str, grid: tuple[int, int], method: tokred.ToMeSD) -> None:
    if name == "dit" and grid[0] != grid[1]:
        pytest.skip("DiT makes square pictures only")
    model, x = denoiser(name), inputs(name, grid=grid)
    slow = copy.deepcopy(model)
    patch = tokred.patch(model, method)
    fast = run(model, x)
    steps = {step.layer: step for step in patch.trace}
    assert {step.grid for step in steps.values()} == {grid}
    time = x["timestep"][0].item()
    change_of = ByHand(slow, method, time, {layer: step.grid for layer, step in steps.items()})
    _by_hand(slow, change_of, set(steps), method.parts)
    assert torch.allclose(run(slow, x), fast, atol=2e-5, rtol=1e-4)


@MODELS
def test_fewer_keys_is_the_model_with_the_other_keys_masked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = (9, 9) if name == "dit" else (9, 7)
    changes = {"pos_embed_max_size": 24} if name == "sd3" else {"sample_size": 18} if name == "dit" else {}
    model, x = denoiser(name, **changes), inputs(name, grid=grid)
    with tokred.patch(model, tokred.ToDo(2)) as patch:
        fast = run(model, x)
        kept = patch.trace[0].origins
    assert kept.shape[1] == (9 // 2) * (grid[1] // 2)
    seen = torch.zeros(grid[0] * grid[1], dtype=torch.bool).index_fill(0, kept[0], True)
    text = torch.ones(TEXT, dtype=torch.bool)
    masks = {len(m): m for m in (seen, torch.cat([seen, text] if name == "sd3" else [text, seen]))}
    attend, masked = F.scaled_dot_product_attention, []

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if query.shape[2] == key.shape[2] and key.shape[2] in masks:
            masked.append(key.shape[2])
            options["attn_mask"] = masks[key.shape[2]][None]
        return attend(query, key, value, **{k: v for k, v in options.items() if k != "enable_gqa"})

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    slow = run(model, x)
    assert len(masked) == sum(len(place.modules["attention"]) for place in _places(model) if place.info.level == 1)
    assert torch.allclose(slow, fast, atol=2e-5, rtol=1e-4)


@MODELS
def test_text_is_left_alone(name: str) -> None:
    """What reaches the text projections of a joint attention is as long as the text."""
    if name not in ("sd3", "flux"):
        pytest.skip("no joint attention")
    model, x = denoiser(name), inputs(name)
    seen = []
    for path, module in model.named_modules():
        if path.endswith(("add_q_proj", "add_k_proj", "to_add_out")):
            module.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    for method in METHODS:
        with tokred.patch(model, method):
            run(model, x)
    assert seen
    assert set(seen) == {TEXT}


@EVERYTHING
@MODELS
def test_a_batch_is_its_samples(name: str, method: tokred.Method) -> None:
    model, x = denoiser(name).double(), inputs(name, batch=3)  # in float32 last bits would change close choices
    x = {key: value.double() if value.is_floating_point() else value for key, value in x.items()}
    x["timestep"] = x["timestep"] + torch.tensor([0, 3, 0], dtype=x["timestep"].dtype)
    tokred.patch(model, method)
    together = run(model, x)
    for b in range(3):
        alone = {key: value if key.endswith("ids") else value[b : b + 1] for key, value in x.items()}
        assert torch.allclose(run(model, alone), together[b : b + 1], atol=2e-5, rtol=1e-4)


def test_a_number_as_timestep_is_a_tensor_of_it() -> None:
    model, x = denoiser("unet"), inputs("unet")
    patch = tokred.patch(model, tokred.ToMeSD())
    wanted = run(model, x)
    for time in (7, 7.0, torch.tensor(7), torch.tensor([7.0])):
        assert torch.equal(run(model, {**x, "timestep": time}), wanted)
    chosen = patch.trace[0].group
    run(model, {**x, "timestep": 8})
    assert not torch.equal(patch.trace[0].group, chosen)
    run(model, x)
    assert torch.equal(patch.trace[0].group, chosen)


def test_half_precision_and_odd_latents() -> None:
    model, x = denoiser("unet").bfloat16(), inputs("unet", grid=(9, 7))
    x = {key: value.bfloat16() if key != "timestep" else value for key, value in x.items()}
    with tokred.patch(model, tokred.ToMeSD(max_downsample=2)) as patch:
        y = run(model, x)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    assert [(step.grid, step.tokens_out) for step in patch.trace] == [
        ((9, 7), 32), ((5, 4), 10), ((5, 4), 10), ((5, 4), 10), ((5, 4), 10), ((9, 7), 32), ((9, 7), 32)
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{"merge_crossattn": True}, {"merge_attn": False, "merge_mlp": True}], ids=str)
def test_other_modules_of_a_block(options: dict[str, bool]) -> None:
    method = tokred.ToMeSD(ratio=0.5, **options)
    for name in ("unet", "pixart"):
        model, x = denoiser(name), inputs(name)
        slow = copy.deepcopy(model)
        patch = tokred.patch(model, method)
        fast = run(model, x)
        layers = {step.layer for step in patch.trace}
        _by_hand(slow, ByHand(slow, method, 7.0, dict.fromkeys(layers, (8, 8))), layers, method.parts)
        assert torch.allclose(run(slow, x), fast, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(fast, _plain(patch, x), atol=1e-3)


def _plain(patch: tokred.Patch, x: dict) -> Tensor:
    patch.remove()
    return run(patch.model, x)


def test_two_methods_in_different_blocks() -> None:
    model, x = denoiser("unet"), inputs("unet")
    patch = tokred.patch(model, [tokred.ToMeSD(), tokred.ToDo((1, 2))])
    run(model, x)
    reduced = {step.grid: (step.reduced, step.tokens_in, step.tokens_out) for step in patch.trace}
    assert reduced == {(8, 8): ("tokens", 64, 32), (4, 4): ("keys", 16, 4)}
    patch.remove()
    with pytest.raises(ConflictError, match=r"ToMeSD and ToDo both act in block 0 \(down_blocks.0.attentions.0"):
        tokred.patch(model, [tokred.ToMeSD(), tokred.ToDo()])


# -- training, threads, copies -----------------------------------------------------------------------------------------


def gradients(model: nn.Module, x: dict) -> dict[str, Tensor]:
    model.zero_grad()
    call(model, x).square().mean().backward()
    return {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["unet", "flux"])
@pytest.mark.parametrize("method", [METHODS[0], METHODS[3]], ids=repr)
def test_checkpoints_choose_again_what_they_chose(name: str, method: tokred.Method) -> None:
    model, x = denoiser(name).train(), inputs(name)
    reached = set(gradients(model, x))
    tokred.patch(model, method)
    wanted = gradients(model, x)
    assert set(wanted) == reached
    assert all(grad.isfinite().all() for grad in wanted.values())
    for reentrant in (False, True):
        model.enable_gradient_checkpointing(
            lambda module, *args, reentrant=reentrant: torch.utils.checkpoint.checkpoint(
                module.__call__, *args, use_reentrant=reentrant
            )
        )
        first, second = call(model, x), call(model, {**x, "timestep": x["timestep"] + 1})  # two passes, then backward
        model.zero_grad()
        (first.square().mean() + 0 * second.mean()).backward()
        for path, grad in wanted.items():
            assert torch.allclose(model.get_parameter(path).grad, grad, atol=1e-6, rtol=1e-4), path


def test_threads_do_not_mix() -> None:
    model = denoiser("sd3")
    patch = tokred.patch(model, tokred.ToMeSD(ratio=0.5))
    cases = [inputs("sd3", seed=seed, timestep=float(seed), grid=(8, 8 + 2 * seed)) for seed in range(3)]
    wanted = [run(model, x) for x in cases]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(6):
            if not torch.equal(run(model, cases[index]), wanted[index]):
                wrong.append(index)
        if patch.trace[0].grid != (8, 8 + 2 * index):
            wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@MODELS
def test_copies(name: str, tmp_path: Any) -> None:
    model, x = denoiser(name), inputs(name)
    plain = run(model, x)
    patch = tokred.patch(model, METHODS[0])
    wanted = run(model, x)
    copied = copy.deepcopy(model)
    assert torch.equal(run(copied, x), wanted)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(again, x), wanted)
    patch.remove()
    assert torch.equal(run(copied, x), wanted)
    tokred.unpatch(copied)
    assert torch.equal(run(copied, x), plain)
    assert torch.equal(run(model, x), plain)


def test_saving_a_patched_model_saves_the_model(tmp_path: Any) -> None:
    model, x = denoiser("unet"), inputs("unet")
    plain = run(model, x)
    with tokred.patch(model, METHODS[0]):
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    assert torch.equal(run(type(model).from_pretrained(tmp_path), x), plain)


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [METHODS[0], METHODS[3]], ids=repr)
@pytest.mark.parametrize(
    "name", ["dit", *(pytest.param(name, marks=pytest.mark.full) for name in ("unet", "pixart", "sd3", "flux"))]
)
def test_compiled(name: str, method: tokred.Method) -> None:
    torch._dynamo.reset()
    model, x = denoiser(name), inputs(name)
    plain = run(model, x)
    patch = tokred.patch(model, method)
    wanted = run(model, x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(run(compiled, x), wanted, atol=1e-5)
    assert len(patch.trace)
    later = {**x, "timestep": x["timestep"] + 1}
    assert torch.allclose(run(compiled, later), run(model, later), atol=1e-5)
    patch.replace(tokred.ToMeSD(ratio=0.25))
    assert torch.allclose(run(compiled, x), run(model, x), atol=1e-5)
    patch.remove()
    assert torch.allclose(run(compiled, x), plain, atol=1e-5)
    tokred.patch(compiled, method)  # after the first compiled call
    assert torch.allclose(run(compiled, x), wanted, atol=1e-5)


def test_a_compiled_flux_takes_squares_only() -> None:
    torch._dynamo.reset()
    model = denoiser("flux", num_layers=1, num_single_layers=0)
    tokred.patch(model, METHODS[0])
    compiled = torch.compile(model, backend="eager")
    x = inputs("flux", grid=(2, 8))
    run(model, x)
    with pytest.raises(RuntimeError, match="are not one square image"):  # 16 tokens, but not 4 x 4
        run(compiled, x)


# -- pipelines ---------------------------------------------------------------------------------------------------------


def pipeline(unet: nn.Module) -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any) -> Tensor:
    text = inputs("unet")["encoder_hidden_states"]
    return pipe(
        prompt_embeds=text[:1],
        negative_prompt_embeds=text[1:],
        height=8,
        width=8,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


def test_a_pipeline_is_its_denoiser() -> None:
    pipe = pipeline(denoiser("unet"))
    plain = generate(pipe)
    with tokred.patch(pipe, tokred.ToMeSD(ratio=0.5)) as patch:
        assert patch.model is pipe.unet
        reduced = generate(pipe)
        assert torch.equal(generate(pipe), reduced)
        assert not torch.equal(reduced, plain)
        step = patch.trace[0]
        assert step.group.shape == (2, 64)  # both halves of the guidance
        with pytest.raises(AlreadyPatchedError):
            tokred.patch(pipe.unet, tokred.ToDo())
    assert torch.equal(generate(pipe), plain)
    with tokred.patch(pipe.unet, tokred.ToMeSD(ratio=0.5)):
        assert torch.equal(generate(pipe), reduced)
        tokred.unpatch(pipe)
        assert torch.equal(generate(pipe), plain)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with tokred.patch(pipe, tokred.ToDo()) as patch:
        assert type(patch.model).__name__ == "UNet2DConditionModel"


def test_pipelines_without_a_denoiser_or_with_two() -> None:
    class Pipeline:
        components: dict[str, object] = {"scheduler": object(), "vae": nn.Linear(2, 2)}  # noqa: RUF012

    with pytest.raises(UnsupportedModelError, match=r"no part of Pipeline is a denoiser .* vae \(Linear\)"):
        tokred.patch(Pipeline(), tokred.ToMeSD())
    Pipeline.components = {"transformer": denoiser("dit"), "transformer_2": denoiser("dit")}
    with pytest.raises(UnsupportedModelError, match="several denoisers; patch one of them: transformer, transformer_2"):
        tokred.patch(Pipeline(), tokred.ToMeSD())


# -- trace -------------------------------------------------------------------------------------------------------------


def test_trace() -> None:
    model, x = denoiser("unet"), inputs("unet")
    patch = tokred.patch(model, tokred.ToMeSD(ratio=0.5))
    assert len(patch.trace) == 0
    run(model, x)
    trace = patch.trace
    assert repr(trace) == "Trace(64 -> 32 tokens in 3 blocks)"
    assert len(trace) == 3
    assert [step.path for step in trace] == [
        "down_blocks.0.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.1.transformer_blocks.0",
    ]
    assert trace.denoiser == tuple(trace)
    listed = json.loads(json.dumps(trace.to_dict()))["denoiser"]
    assert [step["tokens_out"] for step in listed] == [32, 32, 32]
    group = trace[0].group
    assert torch.equal(group.gather(1, trace[0].origins), torch.arange(32).expand(2, -1))
    picture = torch.rand(3, 64, 64)
    drawn = [trace.draw(picture, step=step, sample=sample) for step in range(3) for sample in range(2)]
    assert all(image.size == (64, 64) for image in drawn)
    assert drawn[0].tobytes() == trace.draw(picture, step=-3).tobytes()
    assert drawn[0].tobytes() != drawn[2].tobytes()
    with pytest.raises(InvalidParameterError, match="there are 3 to draw"):
        trace.draw(picture, step=3)
    patch.replace(tokred.ToDo())
    run(model, x)
    assert repr(patch.trace) == "Trace(64 -> 16 keys in 3 blocks)"
    assert (patch.trace[0].group == -1).sum() == 2 * 48
    patch.trace.draw(picture)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_methods_of_other_sites_are_told_what_fits() -> None:
    model = denoiser("dit")
    before = condition(model)
    with pytest.raises(MissingSiteError, match=r"ToMe acts at EncoderBlock, .*methods for diffusers models: .*ToMeSD"):
        tokred.patch(model, tokred.ToMe(r=8))
    assert condition(model) == before
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=16, num_heads=2)
    with pytest.raises(MissingSiteError, match=r"ToMeSD acts at DiffusionBlock, .*hosts that have it: diffusers"):
        tokred.patch(vit, tokred.ToMeSD())


def test_models_without_the_site() -> None:
    from diffusers import UNet2DConditionModel, UNet2DModel

    plain = UNet2DModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="UNet2DModel is refused by the diffusers host"):
        tokred.patch(plain, tokred.ToMeSD())
    none = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    before = condition(none)
    with pytest.raises(UnsupportedModelError, match="no block with self-attention"):
        tokred.patch(none, tokred.ToMeSD())
    assert condition(none) == before


def test_masks_over_image_tokens() -> None:
    model, x = denoiser("pixart"), inputs("pixart")
    tokred.patch(model, tokred.ToMeSD())
    with pytest.raises(RaggedInputError, match=r"attention_mask over the image tokens of block 0 \(transformer_blocks"):
        run(model, {**x, "attention_mask": torch.ones(2, 64)})
    words = torch.ones(2, TEXT)
    words[1, 3:] = 0
    assert run(model, {**x, "encoder_attention_mask": words}).isfinite().all()


@pytest.mark.parametrize("name", ["unet", "sd3", "flux"])
def test_fused_projections(name: str) -> None:
    # of SD3, diffusers' own fused attention serves neither dual attention nor norms of queries and keys
    changes = {"dual_attention_layers": (), "qk_norm": None} if name == "sd3" else {}
    model, x = denoiser(name, **changes), inputs(name)
    with tokred.patch(model, tokred.ToMeSD()):
        wanted = run(model, x)
    model.fuse_qkv_projections()
    with tokred.patch(model, tokred.ToMeSD()):
        assert torch.allclose(run(model, x), wanted, atol=1e-5)
    with tokred.patch(model, tokred.ToDo()), pytest.raises(UnsupportedModelError, match="unfuse_qkv_projections"):
        run(model, x)


def test_projections_that_are_replaced_after_the_patch() -> None:
    model, x = denoiser("unet"), inputs("unet")
    tokred.patch(model, tokred.ToDo())
    attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.to_k = copy.deepcopy(attention.to_k)
    attention.to_k._forward_pre_hooks.clear()
    with pytest.raises(UnsupportedModelError, match="did not call to_k as they were when the model was patched"):
        run(model, x)


def test_flux_with_image_prompts() -> None:
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model, x = denoiser("flux"), inputs("flux")
    model.transformer_blocks[1].attn.set_processor(FluxIPAdapterAttnProcessor(32, 32))
    tokred.patch(model, tokred.ToMeSD())
    with pytest.raises(UnsupportedModelError, match="FluxIPAdapterAttnProcessor may use queries before they are rot"):
        run(model, x)


def test_flux_with_several_images() -> None:
    model, x = denoiser("flux"), inputs("flux")
    tokred.patch(model, tokred.ToMeSD())
    ids = x["img_ids"].clone()
    ids[32:, 0], ids[32:, 1] = 1, ids[:32, 1]
    with pytest.raises(LayoutError, match="several images"):
        run(model, {**x, "img_ids": ids})


def test_chunks_of_the_mlp() -> None:
    model, x = denoiser("unet"), inputs("unet")
    wanted = run(model, x)
    for block in (place.block for place in _places(model)):
        block.set_chunk_feed_forward(16, 1)
    assert torch.allclose(run(model, x), wanted, atol=1e-5)
    with tokred.patch(model, tokred.ToMeSD()):
        assert run(model, x).isfinite().all()
    with (
        tokred.patch(model, tokred.ToMeSD(merge_mlp=True)),
        pytest.raises(UnsupportedModelError, match="chunks of the tokens"),
    ):
        run(model, x)


def test_a_grid_that_is_too_small_in_a_call() -> None:
    model = denoiser("sd3")
    tokred.patch(model, tokred.ToMeSD(sx=4, sy=4))
    with pytest.raises(InvalidParameterError, match="no window of 4 x 4 fits a grid of 2 x 8 tokens"):
        run(model, inputs("sd3", grid=(2, 8)))
    assert run(model, inputs("sd3")).isfinite().all()


def test_a_block_outside_of_its_model() -> None:
    model = denoiser("dit")
    tokred.patch(model, tokred.ToMeSD())
    block, x = model.transformer_blocks[0], torch.randn(1, 64, 16)
    with pytest.raises(UnsupportedModelError, match="ran outside of the model's forward"):
        block(x, timestep=torch.tensor([3]), class_labels=torch.tensor([1]))


def test_a_forward_on_the_instance_is_not_hidden() -> None:
    model = denoiser("dit")
    before = condition(model)
    model.forward = model.forward
    with pytest.raises(UnsupportedModelError, match="patch first and add those hooks afterwards"):
        tokred.patch(model, tokred.ToMeSD())
    del model.forward
    assert condition(model) == before
    patch = tokred.patch(model, tokred.ToMeSD())
    model.forward = model.forward  # offloading hooks wrap the bound method, and keep it when the patch is gone
    x = inputs("dit")
    reduced = run(model, x)
    patch.remove()
    plain = run(model, x)
    del model.forward
    assert torch.equal(run(model, x), plain)
    assert not torch.equal(plain, reduced)


# -- speed -------------------------------------------------------------------------------------------------------------


def test_the_benchmark_reports_every_promised_number() -> None:
    from tests.test_benchmarks import run as run_script

    result = json.loads(run_script("diffusion.py", "--json", "--device", "cpu"))
    rows = {row["method"]: row for row in result["rows"]}
    assert {"ToMeSD ratio 0.5", "ToDo factor 2", "ceiling at ratio 0.5"} <= set(rows)
    assert ("tomesd ratio 0.5" in rows) == result["peer_installed"]
    for row in rows.values():
        assert row["limit"] > 1
        assert row["share"] == pytest.approx(row["speedup"] / row["limit"])
        assert row["speedup_95"][0] <= row["speedup"] <= row["speedup_95"][1]
    assert rows["ToMeSD ratio 0.5"]["limit"] == pytest.approx(rows["ceiling at ratio 0.5"]["limit"])
    assert rows["ToMeSD ratio 0.5"]["scoring_share"] > 0 == rows["ToDo factor 2"]["scoring_share"]
    assert isinstance(rows["ToDo factor 2"]["met"], bool)
