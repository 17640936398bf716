"""Token-Shuffle: a causal language model that reads and writes s x s image codes a step (arXiv 2504.17789, Meta).

The vocabulary is text, then the K codes of an image tokenizer, then the marks of a picture's start and end (SOI, EOI).
A picture stands in the sequence as SOI, m = H W / s^2 positions, EOI: each position is a window of s x s codes, put
together before the transformer and taken apart after it. There is no released code and no released model: the
structure is what descriptions of the paper say. The module must be trained; it makes no finished model faster, so it is
no method of `tokred.patch`: `TokenShuffle.wrap` is the way in.

    base = AutoModelForCausalLM.from_pretrained("...")
    model = TokenShuffle.wrap(base, codebook_size=16384, window=2)    # its embeddings grow
    loss = model(**model.pack(prompts, codes)).loss                   # codes: (H, W) each
    codes = model.generate_codes(prompts, grid=32, do_sample=True)    # (B, 32, 32)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from tokred.core.budget import check_choice, check_count
from tokred.core.errors import InvalidParameterError, UnknownParameterError, nearest
from tokred.generation.token_shuffle_config import TokenShuffleConfig
from tokred.generation.token_shuffle_files import load_operators, read_operators, save_operators
from tokred.generation.token_shuffle_generate import TokenShuffleGeneration
from tokred.generation.token_shuffle_host import check_head, check_hooks, check_rotary, positions_of, takes, turn_grids
from tokred.generation.token_shuffle_inputs import Pictures, code_positions, pack, places_of, read_pictures
from tokred.generation.token_shuffle_ops import (
    EMPTY,
    Shuffle,
    Unshuffle,
    grid_places,
    principal_basis,
    projection_weights,
    redundancy,
)

__all__ = ["STAGES", "TokenShuffle", "TokenShuffleConfig", "TokenShuffleOutput"]

#: The paper's three stages of training, by side in pixels: what `next_stage` is told.
STAGES: dict[int, dict[str, Any]] = {
    512: {"window": 1, "z_loss": 0.0},
    1024: {"window": 2, "z_loss": 0.0},
    2048: {"window": 2, "z_loss": 1e-5},
}


@dataclass
class TokenShuffleOutput(ModelOutput):
    """What a pass gives.

    Attributes:
        loss: cross-entropy of a code, and what `z_loss` and `text_weight` add.
        logits: (B, L, V) of the text head; None beside labels with pictures, where only the loss needs some of them.
        image_logits: (N, m, s^2, K) of the N pictures in their order, 0 behind the last window of smaller ones; None
            without pictures.
        past_key_values: the cache. image_loss, image_z_loss, text_loss: parts of the loss, before their weights.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    image_logits: Tensor | None = None
    past_key_values: Cache | None = None
    image_loss: Tensor | None = None
    image_z_loss: Tensor | None = None
    text_loss: Tensor | None = None


class TokenShuffle(TokenShuffleGeneration, PreTrainedModel, GenerationMixin):
    """A causal language model of transformers with s x s image codes a position. See the module for an example.

    `wrap` is the way to make one of a language model; `from_pretrained` and `save_pretrained` hold everything,
    `save_operators` and `from_operators` only what was added. `base` may be wrapped by PEFT: it is reached through
    `get_input_embeddings`, `get_output_embeddings` and `get_decoder` alone.

    Args:
        base: the language model; None makes one with random weights by `config.text_config`.

    Raises:
        UnsupportedModelError: the language model lacks what is needed, which the error names.
    """

    config: TokenShuffleConfig
    config_class = TokenShuffleConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: TokenShuffleConfig, base: Any = None) -> None:
        super().__init__(config)
        self.base = AutoModelForCausalLM.from_config(config.text_config) if base is None else base
        check_hooks(self.base)
        sizes: dict[str, Any] = {
            "dim": config.width,
            "window": config.window,
            "num_blocks": config.num_blocks,
            "mlp_ratio": config.mlp_ratio,
            "two_layer": config.two_layer,
            "eps": config.norm_eps,
        }
        on = config.window > 1
        self.shuffle = Shuffle(**sizes, compress=config.compress) if on else None
        self.unshuffle = Unshuffle(**sizes, expand=config.expand) if on else None
        self.output_norm = nn.RMSNorm(config.width, eps=config.norm_eps) if on and config.output_norm else None
        if config.position_mode == "rope2d":
            turn_grids(self.get_decoder())
        if base is not None:
            for module in base.modules():  # its weights stay as they are
                module._is_hf_initialized = True
        self.post_init()

    # -- making one --------------------------------------------------------------------------------------------------

    @classmethod
    def wrap(
        cls,
        base: Any,
        *,
        codebook_size: int,
        window: int = 2,
        image_token_start: int | None = None,
        init: str | None = None,
        **options: Any,
    ) -> TokenShuffle:
        """Around a language model, which is used as it is and from then on shares its weights with the result.

        Args:
            base: any `AutoModelForCausalLM`; its embeddings grow by what its vocabulary lacks.
            codebook_size: K. window: s.
            image_token_start: where the vocabulary holds the codes already; None puts them behind it.
            init: "svd" takes the projections from the rows of the codes, exact inverses where their rank is at most
                d / s^2; "orthogonal" has none to look at. None is svd where `image_token_start` is given.
            options: other fields of `TokenShuffleConfig`.

        Raises:
            UnsupportedModelError: the model lacks what is needed. InvalidParameterError, UnknownParameterError: an
                option. Nothing was changed then.
        """
        known = TokenShuffleConfig.options()
        for name in options:
            if name not in known:
                raise UnknownParameterError(f"{name!r} is no option of a TokenShuffle{nearest(name, known)}")
        check_hooks(base)
        check_head(base)
        given = image_token_start is not None
        chosen = init or ("svd" if given and window > 1 and not options.get("two_layer") else "orthogonal")
        check_choice("init", chosen, ("svd", "orthogonal"))
        if options.get("position_mode") == "rope2d":
            check_rotary(base.get_decoder())
        rows = len(base.get_input_embeddings().weight)
        start = image_token_start if image_token_start is not None else rows
        check_count("codebook_size", codebook_size, 1)
        need = max(rows, check_count("image_token_start", start) + codebook_size)
        for mark in ("soi_token_id", "eoi_token_id"):
            if options.get(mark) is None:
                options[mark], need = need, need + 1
            need = max(need, check_count(mark, options[mark]) + 1)
        sizes = copy.deepcopy(base.config)
        sizes.vocab_size = need
        values = {"window": window, "codebook_size": codebook_size, "image_token_start": start, **options}
        config = TokenShuffleConfig(text_config=sizes, **values)  # raises before anything changes
        if need > rows:
            base.resize_token_embeddings(need, mean_resizing=False)
        config.text_config = base.config
        table = base.get_input_embeddings().weight
        model = cls(config, base)
        model._move_added(table)
        if chosen == "svd":
            model.init_from_table()
        return model.train(base.training)

    def _move_added(self, like: Tensor) -> None:
        for part in (self.shuffle, self.unshuffle, self.output_norm):
            if part is not None:
                part.to(device=like.device, dtype=like.dtype)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Called for each module with weights: blocks add nothing at first, projections are inverse on d / s^2 axes."""
        super()._init_weights(module)
        shuffle, unshuffle = self.shuffle, self.unshuffle
        if shuffle is None or unshuffle is None:
            return
        if any(module is block.fc2 for block in (*shuffle.blocks, *unshuffle.blocks)):
            init.zeros_(module.weight)
        elif module is shuffle.proj:
            axes = torch.linalg.qr(torch.randn(self.config.width, unshuffle.narrow))[0]
            init.copy_(module.weight, projection_weights(axes, shuffle, unshuffle)[0])
        elif module is unshuffle.proj:
            axes = shuffle.proj.weight[: unshuffle.narrow, : self.config.width].mT.float()
            init.copy_(module.weight, projection_weights(axes, shuffle, unshuffle)[1])

    @torch.no_grad()
    def init_from_table(self) -> None:
        """Projections that lose least of the codes' embeddings; the blocks are left alone.

        Raises:
            InvalidParameterError: projections of two layers, which cannot be set so.
        """
        if self.shuffle is None:
            return
        if self.config.two_layer:
            raise InvalidParameterError("init='svd' with two_layer=True: only single-layer projections can be set so")
        assert self.unshuffle is not None
        basis = principal_basis(self.image_table, self.unshuffle.narrow)
        inward, outward = projection_weights(basis, self.shuffle, self.unshuffle)
        self.shuffle.proj.weight.copy_(inward)
        self.unshuffle.proj.weight.copy_(outward)

    @property
    def image_table(self) -> Tensor:
        """The embeddings (K, d) of the codes."""
        return self.get_input_embeddings().weight[self.config.image_rows]

    def redundancy(self, ranks: Sequence[int] | None = None) -> dict[int, float]:
        """What of the codes' embeddings each rank loses: see `tokred.generation.token_shuffle_ops.redundancy`."""
        return redundancy(self.image_table, ranks)

    def next_stage(self, window: int | None = None, z_loss: float | None = None) -> TokenShuffle:
        """The same language model for the next resolution, such as `model.next_stage(**STAGES[1024])`.

        Another window gets new operators, from the embeddings that were trained so far; the same window keeps its own.
        The weights of the language model are shared with this one.
        """
        config = self.config
        changed = window is not None and window != config.window
        values = {"window": window if changed else config.window, "z_loss": config.z_loss if z_loss is None else z_loss}
        fields = {name: getattr(config, name) for name in TokenShuffleConfig.options() if name not in values}
        made = type(self)(TokenShuffleConfig(text_config=self.base.config, **fields, **values), self.base)
        made._move_added(self.get_input_embeddings().weight)
        if not changed:
            for name in ("shuffle", "unshuffle", "output_norm"):
                part, old = getattr(made, name), getattr(self, name)
                if part is not None:
                    part.load_state_dict(old.state_dict())
        elif not made.config.two_layer:
            made.init_from_table()
        return made.train(self.training)

    # -- what transformers asks for ----------------------------------------------------------------------------------

    def get_input_embeddings(self) -> Any:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> Any:
        return self.base.get_decoder()

    # -- operators on the model's own embeddings ---------------------------------------------------------------------

    def fuse(self, windows: Tensor) -> Tensor:
        """Windows (..., s^2) of codes, or `EMPTY`, as inputs (..., d) of the transformer."""
        empty = windows == EMPTY
        embeds = self.get_input_embeddings()(windows.masked_fill(empty, 0) + self.config.image_token_start)
        embeds = embeds.masked_fill(empty[..., None], 0)
        return embeds.squeeze(-2) if self.shuffle is None else self.shuffle(embeds)

    def split(self, hidden: Tensor) -> Tensor:
        """Logits (..., s^2, K) of the next window, from hidden states (..., d)."""
        head, rows = self.get_output_embeddings(), self.config.image_rows
        if self.unshuffle is None:
            return head(hidden)[..., None, rows]  # all of them: a part of the product may round otherwise
        hidden = self.unshuffle(hidden)
        hidden = hidden if self.output_norm is None else self.output_norm(hidden)
        if type(head) is nn.Linear and not hasattr(head, "_hf_hook"):
            return F.linear(hidden, head.weight[rows], None if head.bias is None else head.bias[rows])
        return head(hidden)[..., rows]

    def decode_step(self, x: Tensor, position_ids: Tensor | None, places: Tensor | None, **options: Any) -> Any:
        """The transformer on inputs (B, L, d); `places` (B, L, 2) are rows and columns, -1 outside pictures."""
        decoder = self.get_decoder()
        if position_ids is not None and takes(decoder, "position_ids"):
            options["position_ids"] = position_ids
        with grid_places(places if self.config.position_mode == "rope2d" else None):
            return decoder(inputs_embeds=x, **options)

    # -- one pass ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        image_codes: Tensor | Sequence[Tensor] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> TokenShuffleOutput:
        """Logits of the next text token or window, and the loss. `pack` makes the inputs.

        Args:
            input_ids: (B, L) int64. A picture is SOI and then one id of the codes' range for each of its windows; which
                one does not matter, `image_codes` says what is there. At window 1 without `image_codes` the ids count.
            attention_mask: (B, past + L), 0 where padded, on either side. position_ids: (B, L); None follows the mask.
            inputs_embeds: (B, L, d) instead of the embeddings of text; with `image_codes`, `input_ids` too.
            labels: (B, L) as in transformers, -100 where nothing counts. At the position of a window any other value
                makes its codes count; at text the value is the id, weighted by `config.text_weight`.
            image_codes: (N, H, W), or a list of (H, W): the pictures in the order of `input_ids`, row by row; `EMPTY`
                in a cell without code.
            past_key_values, use_cache, logits_to_keep, kwargs: as in transformers.

        Without pictures this is the language model's own forward. Positions before a window lead to its logits, all
        others to text. The loss is the mean over all codes that count, plus `z_loss` and `text_weight` times theirs.

        Raises:
            InvalidParameterError: codes outside the codebook, a grid that the window does not divide, positions and
                codes that do not fit together, more positions than the model has.
        """
        here = None if input_ids is None else code_positions(self.config, input_ids)
        windows_there = here is not None and (image_codes is not None or self.config.window > 1) and bool(here.any())
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if not windows_there:
            if image_codes is not None and not past:  # in later passes of `generate` they have been read
                raise InvalidParameterError(
                    "image_codes given, but input_ids has no position for them: expected SOI and then one id of "
                    "a code a window, as pack makes them"
                )
            return self._text(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        assert input_ids is not None
        assert here is not None
        pictures = read_pictures(self.config, image_codes, input_ids, here)
        self._check_length(past + input_ids.shape[1])
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        x = x.masked_scatter(here[..., None], self.fuse(pictures.windows).to(x.dtype))
        if position_ids is None and attention_mask is not None:
            position_ids = positions_of(attention_mask)[:, -input_ids.shape[1] :]
        out = self.decode_step(
            x,
            position_ids,
            places_of(self.config, pictures, here, position_ids, past),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = out.last_hidden_state
        image_logits = self.split(hidden[:, :-1][here[:, 1:]])  # a window is foretold where the one before it stands
        losses: dict[str, Tensor] = {}
        logits = None
        if labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.get_output_embeddings()(hidden[:, kept])
        else:
            losses = self._losses(hidden, image_logits, pictures, here, labels)
        if len(set(pictures.counts)) == 1:
            padded = image_logits.unflatten(0, (len(pictures.counts), -1))
        else:
            padded = nn.utils.rnn.pad_sequence(list(image_logits.split(pictures.counts)), batch_first=True)
        return TokenShuffleOutput(
            logits=logits, image_logits=padded, past_key_values=out.get("past_key_values"), **losses
        )

    def _text(self, **inputs: Any) -> TokenShuffleOutput:
        """The language model itself."""
        if not takes(self.base, "logits_to_keep"):
            del inputs["logits_to_keep"]
        out = self.base(**inputs)
        return TokenShuffleOutput(loss=out.loss, logits=out.logits, past_key_values=out.get("past_key_values"))

    def _losses(
        self, hidden: Tensor, image_logits: Tensor, pictures: Pictures, here: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        targets = pictures.windows.masked_fill((labels[here] == EMPTY)[:, None], EMPTY)
        counted = targets != EMPTY
        logits = image_logits.float()
        count = counted.sum().clamp(min=1)
        image = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=EMPTY, reduction="sum") / count
        found = {"loss": image, "image_loss": image.detach()}
        if self.config.z_loss:
            z = (logits.logsumexp(dim=-1).square() * counted).sum() / count
            found["loss"], found["image_z_loss"] = found["loss"] + self.config.z_loss * z, z.detach()
        if self.config.text_weight:
            wanted = (labels[:, 1:] != EMPTY) & ~here[:, 1:]
            told = self.get_output_embeddings()(hidden[:, :-1][wanted]).float()
            text = F.cross_entropy(told, labels[:, 1:][wanted], reduction="sum") / wanted.sum().clamp(min=1)
            found["loss"], found["text_loss"] = found["loss"] + self.config.text_weight * text, text.detach()
        return found

    def _check_length(self, total: int) -> None:
        most = getattr(self.config.text_config, "max_position_embeddings", None)
        if not hasattr(self.get_decoder(), "rotary_emb") and most is not None and total > most:
            raise InvalidParameterError(
                f"{total} positions given, but the language model has {most}: take a larger window or smaller pictures"
            )

    def pack(
        self, prompts: Sequence[Sequence[int] | Tensor], images: Sequence[Tensor | Sequence[Tensor]] | Tensor
    ) -> dict[str, Any]:
        """Inputs of `forward` with labels: each row is a prompt and its pictures, padded on the right.

        Args:
            prompts: B rows of text ids, without SOI. images: the codes (H, W) of each row, or a list of several.
        """
        return pack(self.config, prompts, images, self.get_input_embeddings().weight.device)

    # -- saving what was added ---------------------------------------------------------------------------------------

    def save_operators(self, folder: str | Path) -> None:
        """Write the operators and the embeddings of codes, SOI and EOI; not the language model."""
        save_operators(self, Path(folder))

    @classmethod
    def from_operators(cls, base: Any, folder: str | Path) -> TokenShuffle:
        """What `save_operators` wrote, around the language model that it was made of.

        Raises:
            InvalidParameterError: the folder holds none, or of a model of another width or with other tensors.
        """
        config, state = read_operators(Path(folder), base)
        model = cls.wrap(base, **config, init="orthogonal")
        load_operators(model, state)
        return model
