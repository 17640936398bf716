"""timm's vision transformers as LookupViTs, in place and back: `to_lookup_vit` and `remove_lookup_vit`.

The model keeps its weights under their keys. With the default start of the new modules it is exactly the ViT run on the
bilinearly resized token grid, hence the ViT itself at the full grid, and is meant to be fine-tuned: without that,
accuracy drops (LookupViT, arXiv 2407.12753; the conversion is ours).
"""

from __future__ import annotations

import functools
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from tokred.core.budget import check_choice
from tokred.core.errors import AlreadyPatchedError, CompiledModelError, UnsupportedModelError
from tokred.vision.backbones.lookup_block import RESIZE, WEIGHT_INIT, check_compresses, check_grid, lookup_blocks
from tokred.vision.backbones.lookup_vit import LookupForward

__all__ = ["remove_lookup_vit", "to_lookup_vit"]

_ADDED = ("compressed_grid", "compressed_init", "antialias")


def to_lookup_vit(
    model: Any,
    grid: int | tuple[int, int] = (5, 5),
    init: str = "zero",
    *,
    lookup_mlp_div: float = 2.0,
    reuse: str = "transpose",
    final_infusion: bool = False,
    infuse_prefix: bool = True,
    qk_norm: bool = False,
    query_scale: str = "fixed",
    compressed_init: str = "bilinear",
    antialias: bool = True,
) -> Any:
    """Turn a timm `VisionTransformer` into a LookupViT, in place, and return it.

    Its blocks become `LookupBlock`s around the same modules, and its class a subclass of its own with the methods of
    `LookupForward` (`set_compressed_grid`, `lookup_mask`, `forward_intermediates(stream=...)`). Original keys of the
    state dict stay, with their tensors; new ones begin with ``blocks.i.{gather, infuse, norm_l, mlp_l}``. Registers,
    LayerScale, drop-path, q/k norm, no_embed_class, pre-norm, dynamic_img_size and every pooling are kept. An optimizer
    made before does not know the new parameters. Copies and pickles work; `remove_lookup_vit` undoes it.

    Args:
        grid: compressed grid (h, w), or m for (m, m).
        init: start of the new modules: "zero" (the function of the ViT on the resized grid), "copy" or "random": see
            `LookupBlock.init_new_weights`.
        lookup_mlp_div, reuse, infuse_prefix, qk_norm, query_scale: see `LookupBlock`.
        final_infusion: whether the last block refreshes the lookup tokens (maps of `forward_intermediates`).
        compressed_init, antialias: how the grid is made: see `resize_tokens`.

    Raises:
        UnsupportedModelError: the model is no plain timm `VisionTransformer`, its blocks are not timm's `Block`, or
            something else has changed its forward (a `tokred.patch`, hooks of accelerate).
        AlreadyPatchedError: it is a LookupViT already.
        CompiledModelError: it was compiled in place.
        InvalidParameterError: an option outside its range.
    """
    check_choice("init", init, WEIGHT_INIT)
    check_choice("compressed_init", compressed_init, RESIZE)
    small = check_grid("grid", grid)
    _check_model(model)
    check_compresses("grid", small, model.patch_embed.num_patches)
    blocks = lookup_blocks(
        model.blocks,
        final_infusion,
        lookup_mlp_div=lookup_mlp_div,
        reuse=reuse,
        infuse_prefix=infuse_prefix,
        prefix=model.num_prefix_tokens,
        qk_norm=qk_norm,
        query_scale=query_scale,
    )
    for block in blocks:
        block.init_new_weights(init)
    for i, block in enumerate(blocks):
        model.blocks[i] = block
    host: Any = type(model)
    model.__class__ = _lookup_class(host)
    model.compressed_init, model.antialias = compressed_init, antialias
    model.set_compressed_grid((small[0], small[1]))
    return model


def remove_lookup_vit(model: Any) -> Any:
    """Undo `to_lookup_vit`, in place: class, blocks and keys are the original ones, with their weights as they now are.

    Raises:
        UnsupportedModelError: the model was not made by `to_lookup_vit`.
    """
    host = getattr(type(model), "lookup_host", None)
    if host is None:
        raise UnsupportedModelError(f"a {type(model).__name__}: expected a model made by to_lookup_vit")
    for i, block in enumerate(model.blocks):
        model.blocks[i] = block.restored()
    model.__class__ = host
    for name in _ADDED:
        del model.__dict__[name]
    return model


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if isinstance(model, LookupForward):
        raise AlreadyPatchedError(f"this {name} is a LookupViT already; remove_lookup_vit undoes a conversion")
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(f"a {name}: expected a VisionTransformer of timm")
    changed = [
        method
        for method in ("forward", "forward_features", "forward_intermediates", "_pos_embed")
        if method in vars(model) or (method != "_pos_embed" and _defined_elsewhere(model, method))
    ]
    if changed:
        raise UnsupportedModelError(
            f"this {name} has its own {', '.join(changed)}: expected those of timm's VisionTransformer (undo a patch, "
            "or the hooks of another library, first)"
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise CompiledModelError("the model was compiled in place: convert it first, then compile")


def _defined_elsewhere(model: Any, method: str) -> bool:
    return getattr(type(model), method) is not getattr(VisionTransformer, method)


@functools.cache
def _lookup_class(host: type) -> type:
    """A subclass of the model's class that runs two streams, under the same name."""
    body = {
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
        "__reduce_ex__": _reduce,
        "lookup_host": host,
    }
    return type(host.__name__, (LookupForward, host), body)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Copies and pickles name the original class, since no module holds this one."""
    return _rebuild, (type(self).lookup_host,), dict(self.__dict__)


def _rebuild(host: type) -> Any:
    made = _lookup_class(host)
    return object.__new__(made)
