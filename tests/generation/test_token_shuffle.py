"""Token-Shuffle against slow definitions: windows, operators, one pass, losses, saving, what is refused."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from tests.generation.shuffle_models import (
    BOS,
    CODES,
    FAMILIES,
    TEXT,
    WIDTH,
    codes_of,
    language_model,
    randomise,
    shuffled,
)
from tokred.core.errors import InvalidParameterError, UnknownParameterError, UnsupportedModelError
from tokred.generation.token_shuffle import STAGES, TokenShuffle, TokenShuffleConfig
from tokred.generation.token_shuffle_host import positions_of
from tokred.generation.token_shuffle_ops import (
    EMPTY,
    Shuffle,
    Unshuffle,
    pad_codes,
    principal_basis,
    projection_weights,
    redundancy,
    unwindow,
    window,
)

sides = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))  # windows down, across, and s


# -- windows ---------------------------------------------------------------------------------------------------------


@given(sides)
@settings(max_examples=30)
def test_windows_are_those_of_the_slow_definition(case: tuple[int, int, int]) -> None:
    down, across, s = case
    codes = codes_of(2, down * s, across * s, size=10_000)
    wanted = torch.zeros(2, down * across, s * s, dtype=torch.int64)
    for y in range(down * s):
        for x in range(across * s):
            wanted[:, (y // s) * across + x // s, (y % s) * s + x % s] = codes[:, y, x]
    found = window(codes, s)
    assert torch.equal(found, wanted)
    assert torch.equal(unwindow(found, s, (down * s, across * s)), codes)
    depth = F.pixel_unshuffle(codes[:, None].double(), s).flatten(2).mT
    assert torch.equal(found, depth.long())


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3))
@settings(max_examples=30)
def test_padding_fills_up_below_and_on_the_right(height: int, width: int, s: int) -> None:
    codes = codes_of(height, width)
    padded = pad_codes(codes, s)
    assert all(side % s == 0 and side - s < old for side, old in zip(padded.shape, codes.shape, strict=True))
    assert torch.equal(padded[:height, :width], codes)
    assert (padded == EMPTY).sum() == padded.numel() - codes.numel()


def test_windows_that_do_not_fit() -> None:
    with pytest.raises(InvalidParameterError, match=r"4 x 5 given.*pad_codes"):
        window(codes_of(4, 5), 2)
    with pytest.raises(InvalidParameterError, match=r"\(\.\.\., H, W\)"):
        window(codes_of(4), 2)
    with pytest.raises(InvalidParameterError, match=r"\(\.\.\., 4, 4\)"):
        unwindow(codes_of(3, 4), 2, (4, 4))


# -- operators -------------------------------------------------------------------------------------------------------

FORMS = [
    {"compress": compress, "expand": expand, "two_layer": two}
    for compress in ("pre", "post")
    for expand in ("post", "pre")
    for two in (False, True)
]


def operators(s: int = 2, blocks: int = 2, **form: Any) -> tuple[Shuffle, Unshuffle]:
    options = {"num_blocks": blocks, "two_layer": form.get("two_layer", False)}
    return (
        Shuffle(WIDTH, s, compress=form.get("compress", "pre"), **options),
        Unshuffle(WIDTH, s, expand=form.get("expand", "post"), **options),
    )


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_operators_have_the_stated_shapes_and_see_one_window_at_a_time(form: dict[str, Any]) -> None:
    shuffle, unshuffle = operators(2, **form)
    e = torch.randn(2, 5, 4, WIDTH)
    h, order = shuffle(e), torch.randperm(5)
    assert h.shape == (2, 5, WIDTH)
    torch.testing.assert_close(shuffle(e[:, order]), h[:, order])
    y = unshuffle(h)
    assert y.shape == e.shape
    torch.testing.assert_close(unshuffle(h[:, order]), y[:, order])


@torch.no_grad()
def test_without_blocks_shuffling_is_linear_and_its_slots_are_alike() -> None:
    shuffle, _ = operators(2, blocks=0)
    first, second = torch.randn(2, 3, 4, WIDTH)
    torch.testing.assert_close(shuffle(2 * first - second), 2 * shuffle(first) - shuffle(second), atol=1e-5, rtol=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    chunks = shuffle(first).unflatten(-1, (4, -1))
    torch.testing.assert_close(shuffle(first[:, order]), chunks[:, order].flatten(-2))


@pytest.mark.parametrize("form", [form for form in FORMS if not form["two_layer"]])
@pytest.mark.parametrize("rank", [3, WIDTH // 4, WIDTH])
@torch.no_grad()
def test_projections_from_a_table_lose_its_tail_and_nothing_else(form: dict[str, Any], rank: int) -> None:
    table = torch.randn(64, rank, dtype=torch.float64) @ torch.randn(rank, WIDTH, dtype=torch.float64)
    shuffle, unshuffle = (part.double() for part in operators(2, blocks=0, **form))
    basis = principal_basis(table, WIDTH // 4).double()
    shuffle.proj.weight.copy_(projection_weights(basis, shuffle, unshuffle)[0])
    unshuffle.proj.weight.copy_(projection_weights(basis, shuffle, unshuffle)[1])
    windows = table.unflatten(0, (16, 4))
    lost = float((unshuffle(shuffle(windows)) - windows).norm() / table.norm())
    singular = torch.linalg.svdvals(table)
    tail = float((singular[WIDTH // 4 :].square().sum() / singular.square().sum()).sqrt())
    assert lost == pytest.approx(tail, abs=1e-6)
    assert redundancy(table, [WIDTH // 4])[WIDTH // 4] == pytest.approx(tail, abs=1e-6)
    assert (rank > WIDTH // 4) == (tail > 1e-3)


def test_redundancy_of_what_is_no_table() -> None:
    assert list(redundancy(torch.randn(50, 64))) == [32, 16, 8, 4]
    with pytest.raises(InvalidParameterError, match="floats"):
        redundancy(codes_of(4, 4))
    with pytest.raises(InvalidParameterError, match="1 to 8"):
        redundancy(torch.randn(9, 8), [9])


@pytest.mark.parametrize(("s", "ratio"), [(2, 1.0), (4, 0.5)])
def test_parameters_are_as_many_as_the_specification_counts(s: int, ratio: float) -> None:
    made = TokenShuffle.wrap(language_model(), codebook_size=CODES, window=s, mlp_ratio=ratio)
    added = [p for name, p in made.named_parameters() if not name.startswith("base.") and p.ndim == 2]
    narrow, hidden = WIDTH // s**2, int(ratio * WIDTH)
    assert sum(p.numel() for p in added) == 2 * WIDTH * narrow + 2 * 2 * 2 * hidden * WIDTH


# -- one pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_window_one_and_text_are_the_language_model_bit_for_bit(family: str) -> None:
    model = shuffled(family, window=1)
    assert {name for name, _ in model.named_parameters()} == {
        f"base.{name}" for name, _ in model.base.named_parameters()
    }
    codes = codes_of(2, 3, 2)
    inputs = model.pack([[BOS, 1], [BOS, 4]], codes)
    plain = inputs["input_ids"].clone()
    plain[:, 3:9] = codes.flatten(1) + TEXT
    wanted = model.base(input_ids=plain, attention_mask=inputs["attention_mask"]).logits
    found = model(**{**inputs, "labels": None})
    assert torch.equal(found.image_logits, wanted[:, 2:8, None, TEXT : TEXT + CODES])
    assert torch.equal(found.logits, wanted)
    assert torch.equal(model(input_ids=plain).logits, wanted)
    two = shuffled(family)
    text = torch.tensor([[BOS, 3, 5, 1]])
    out, own = two(input_ids=text, labels=text), two.base(input_ids=text, labels=text)
    assert torch.equal(out.logits, own.logits)
    assert torch.equal(out.loss, own.loss)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_pass_is_that_of_the_slow_definition(family: str) -> None:
    """Embeddings, shuffle, transformer, unshuffle and head, window by window and slot by slot."""
    model = shuffled(family)
    codes, prompt = codes_of(1, 4, 2), [BOS, 3]
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    inputs = [table(torch.tensor(token)) for token in (*prompt, model.config.soi_token_id)]
    for y in (0, 2):
        cells = codes[0, y : y + 2].flatten()
        inputs.append(model.shuffle(table(cells + TEXT)))
    hidden = model.get_decoder()(inputs_embeds=torch.stack(inputs)[None]).last_hidden_state[0]
    wanted = torch.stack([head(model.unshuffle(hidden[i]))[:, TEXT : TEXT + CODES] for i in (2, 3)])
    found = model(**{**model.pack([prompt], codes), "labels": None})
    torch.testing.assert_close(found.image_logits[0], wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.logits[0, :5], head(hidden), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_window_changes_what_comes_behind_it_alone() -> None:
    model, codes = shuffled(), codes_of(1, 4, 6)
    inputs = {**model.pack([[BOS]], codes), "labels": None}
    before = model(**inputs).image_logits[0]
    for place in range(6):
        y, x = 2 * (place // 3), 2 * (place % 3)
        changed = codes.clone()
        changed[0, y, x + 1] = (codes[0, y, x + 1] + 1) % CODES
        after = model(**{**inputs, "image_codes": changed}).image_logits[0]
        moved = (after - before).abs().flatten(1).max(dim=1).values
        assert (moved[: place + 1] == 0).all()
        assert (moved[place + 1 :] > 1e-6).all()


@pytest.mark.parametrize("options", [{}, {"position_mode": "rope2d"}, {"output_norm": True, "compress": "post"}])
@torch.no_grad()
def test_batches_are_their_rows(options: dict[str, Any]) -> None:
    """Ragged prompts, pictures of different sizes, several in a row; padded on the right and on the left."""
    model = shuffled(**options)
    prompts = [[BOS], [BOS, 4, 5, 1], [2, 3]]
    images = [codes_of(2, 4, seed=1), [codes_of(4, 4, seed=2), codes_of(2, 2, seed=3)], codes_of(6, 2, seed=4)]
    batch = {**model.pack(prompts, images), "labels": None}
    assert batch["attention_mask"].sum(dim=1).tolist() == [1 + 2 + 2, 4 + 2 + 4 + 2 + 1, 2 + 2 + 3]
    whole = model(**batch)
    assert whole.image_logits.shape == (4, 4, 4, CODES)
    shift = batch["input_ids"].shape[1] - batch["attention_mask"].sum(dim=1)
    left = {**batch}
    for name in ("input_ids", "attention_mask"):
        left[name] = torch.stack([row.roll(int(by)) for row, by in zip(batch[name], shift, strict=True)])
    rolled = model(**left)
    first = 0
    for prompt, own, row, by in zip(prompts, images, range(3), shift.tolist(), strict=True):
        alone = model(**{**model.pack([prompt], [own]), "labels": None})
        for picture, logits in enumerate(alone.image_logits):
            for found in (whole, rolled):
                torch.testing.assert_close(
                    found.image_logits[first + picture][: len(logits)], logits, atol=1e-5, rtol=1e-4
                )
        length = alone.logits.shape[1]
        torch.testing.assert_close(whole.logits[row, :length], alone.logits[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(rolled.logits[row, by:], alone.logits[0], atol=1e-5, rtol=1e-4)
        first += len(alone.image_logits)
    assert (whole.image_logits[0, 2:] == 0).all()  # behind the last window of a small picture


@torch.no_grad()
def test_pictures_turn_by_row_and_column() -> None:
    """The rotation that the decoder is given, against loops."""
    model = shuffled(position_mode="rope2d")
    seen: list[Any] = []
    handle = model.get_decoder().rotary_emb.register_forward_hook(lambda *call: seen.append(call[-1]))
    model(**{**model.pack([[BOS, 1, 2]], [codes_of(4, 6)]), "labels": None})
    handle.remove()
    cos, sin = seen[0]
    frequencies = model.get_decoder().rotary_emb.inv_freq
    for position in range(4 + 6 + 1):
        angles = position * frequencies
        if 4 <= position < 10:
            y, x = divmod(position - 4, 3)
            angles = torch.stack([(4 + (y if i < 2 else x)) * frequencies[2 * (i % 2)] for i in range(4)])
        twice = torch.cat([angles, angles])
        torch.testing.assert_close(cos[0, position], twice.cos(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sin[0, position], twice.sin(), atol=1e-5, rtol=1e-5)
    model.config.position_mode = "1d"
    assert torch.equal(model(input_ids=torch.tensor([[1, 2]])).logits, model.base(torch.tensor([[1, 2]])).logits)


# -- losses ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_losses_are_those_of_the_slow_definition() -> None:
    model = shuffled(z_loss=0.3, text_weight=0.7)
    images = [codes_of(2, 4, seed=1), pad_codes(codes_of(3, 3, seed=2), 2)]
    inputs = model.pack([[BOS, 1], [BOS]], images)
    inputs["labels"][0, :2] = EMPTY  # the prompt does not count
    found, logits = model(**inputs), model(**{**inputs, "labels": None})
    assert found.logits is None
    image, z, text = [], [], []
    for picture, codes in enumerate(images):
        for j, cells in enumerate(window(codes, 2)):
            for t, cell in enumerate(cells.tolist()):
                row = logits.image_logits[picture, j, t].double()
                if cell != EMPTY:
                    image.append(row.logsumexp(0) - row[cell])
                    z.append(row.logsumexp(0) ** 2)
    for row, labels in enumerate(inputs["labels"].tolist()):
        for place in range(1, len(labels)):
            code = inputs["input_ids"][row, place] in range(TEXT, TEXT + CODES)
            if labels[place] != EMPTY and not code:
                text.append(F.cross_entropy(logits.logits[row, place - 1].double(), torch.tensor(labels[place])))
    assert len(image) == 8 + 9
    parts = [torch.stack(part).mean() for part in (image, z, text)]
    for name, part in zip(("image_loss", "image_z_loss", "text_loss"), parts, strict=True):
        assert float(getattr(found, name)) == pytest.approx(float(part), rel=1e-5)
    assert float(found.loss) == pytest.approx(float(parts[0] + 0.3 * parts[1] + 0.7 * parts[2]), rel=1e-5)


@torch.no_grad()
def test_windows_whose_label_is_ignored_do_not_count() -> None:
    model, codes = shuffled(), codes_of(1, 4, 4)
    inputs = model.pack([[BOS]], codes)
    inputs["labels"][0, 3] = EMPTY  # the second window
    logits = model(**{**inputs, "labels": None}).image_logits[0]
    kept = [0, 2, 3]
    wanted = F.cross_entropy(logits[kept].flatten(0, 1), window(codes, 2)[0][kept].flatten())
    torch.testing.assert_close(model(**inputs).loss, wanted)
    inputs["labels"][:] = EMPTY
    assert float(model(**inputs).loss) == 0


def test_z_loss_is_finite_for_large_logits() -> None:
    model = shuffled(z_loss=1e-5)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e4)
    loss = model(**model.pack([[BOS]], codes_of(1, 4, 4))).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", [{"output_norm": True}, {"two_layer": True}])
def test_every_parameter_learns(options: dict[str, Any]) -> None:
    model = shuffled(text_weight=1.0, **options).train()
    model.gradient_checkpointing_enable()
    codes = torch.arange(16 * CODES).remainder(CODES).view(2, 16, -1)[:, :4, :8]
    model(**model.pack([list(range(TEXT)), [BOS]], codes)).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_a_step_of_training_lowers_the_loss() -> None:
    model, codes = TokenShuffle.wrap(language_model(), codebook_size=CODES).train(), codes_of(4, 4, 4)
    inputs = model.pack([[BOS, i] for i in range(4)], codes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * math.log(CODES) < losses[0]


@torch.no_grad()
def test_half_precision() -> None:
    model, codes = shuffled(z_loss=1e-5), codes_of(2, 4, 4)
    inputs = model.pack([[BOS, 1], [BOS]], codes)
    wanted = model(**inputs)
    half = model.to(torch.bfloat16)
    found = half(**inputs)
    assert found.image_logits.dtype == torch.bfloat16
    assert found.loss.dtype == torch.float32
    assert float(found.loss) == pytest.approx(float(wanted.loss), rel=0.1)
    assert (
        TokenShuffle.wrap(language_model().bfloat16(), codebook_size=CODES).shuffle.proj.weight.dtype == torch.bfloat16
    )


# -- making and saving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_wrapping_keeps_the_language_model_and_adds_rows(tied: bool) -> None:
    base = language_model(tie_word_embeddings=tied)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = TokenShuffle.wrap(base, codebook_size=CODES)
    for name, value in model.base.state_dict().items():
        assert torch.equal(value[: len(before[name])], before[name]), name
    assert len(model.image_table) == CODES
    assert (model.config.soi_token_id, model.config.eoi_token_id) == (TEXT + CODES, TEXT + CODES + 1)
    assert model.base.config.vocab_size == TEXT + CODES + 2 == model.config.text_config.vocab_size
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    eye = model.shuffle.proj.weight @ model.unshuffle.proj.weight
    torch.testing.assert_close(eye, torch.eye(WIDTH // 4), atol=1e-5, rtol=0)
    x = torch.randn(3, WIDTH)
    assert all(torch.equal(block(x), x) for block in (*model.shuffle.blocks, *model.unshuffle.blocks))


@torch.no_grad()
def test_codes_of_the_vocabulary_give_the_projections() -> None:
    base = language_model(vocab_size=64)
    low = torch.randn(48, WIDTH // 4) @ torch.randn(WIDTH // 4, WIDTH)
    base.get_input_embeddings().weight[10:58] = low
    model = TokenShuffle.wrap(base, codebook_size=48, image_token_start=10, soi_token_id=0, eoi_token_id=1)
    assert len(base.get_input_embeddings().weight) == 64
    windows = codes_of(5, 4, size=48)
    back = model.unshuffle(model.fuse(windows))
    assert float((back - low[windows]).norm() / low[windows].norm()) <= 1e-5
    assert model.redundancy()[WIDTH // 4] <= 1e-4 < model.redundancy()[WIDTH // 8]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_saving_and_loading(tmp_path: Path, family: str, tied: bool) -> None:
    model = shuffled(base=language_model(family, tie_word_embeddings=tied), cfg_scale=3.0, output_norm=True)
    inputs = model.pack([[BOS, 1], [BOS]], codes_of(2, 4, 4))
    wanted = model(**inputs)
    model.save_pretrained(tmp_path / "whole")
    again = TokenShuffle.from_pretrained(tmp_path / "whole")
    assert torch.equal(again(**inputs).image_logits, wanted.image_logits)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    assert again.config.cfg_scale == 3.0
    model.save_operators(tmp_path / "added")
    fresh = TokenShuffle.from_operators(language_model(family, tie_word_embeddings=tied), tmp_path / "added").eval()
    assert torch.equal(fresh(**inputs).image_logits, wanted.image_logits)
    assert all(getattr(fresh.config, name) == getattr(model.config, name) for name in TokenShuffleConfig.options())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(**inputs).image_logits, wanted.image_logits)
    with pytest.raises(InvalidParameterError, match="save_operators"):
        TokenShuffle.from_operators(language_model(family), tmp_path)
    with pytest.raises(InvalidParameterError, match="width 32, this one has 16"):
        TokenShuffle.from_operators(language_model("llama", hidden_size=16), tmp_path / "added")


def test_configuration_survives_json(tmp_path: Path) -> None:
    config = shuffled(position_mode="rope2d", expand="pre", vq_model="some/tokenizer").config
    config.save_pretrained(tmp_path)
    again = TokenShuffleConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert type(again.text_config) is type(config.text_config)
    assert TokenShuffleConfig().text_config.vocab_size == 32000 + 16384 + 2


class LowRank(torch.nn.Module):
    """What an adapter library puts in the place of a linear map."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down = torch.nn.Parameter(torch.randn(2, inner.in_features))
        self.up = torch.nn.Parameter(torch.zeros(inner.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + x @ self.down.mT @ self.up.mT


def test_adapters_inside_the_language_model_stay_and_learn() -> None:
    base = language_model()
    for layer in base.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
    down = base.model.layers[0].self_attn.q_proj.down.clone()
    model = shuffled(base=base)
    model.base.lm_head = LowRank(model.base.lm_head)
    assert torch.equal(base.model.layers[0].self_attn.q_proj.down, down)
    model(**model.pack([[BOS]], codes_of(1, 4, 4))).loss.backward()
    assert base.model.layers[0].self_attn.q_proj.up.grad.any()
    assert model.base.lm_head.up.grad.any()  # its rows are not sliced behind its back


# -- stages ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_stages_carry_the_weights_over() -> None:
    first = shuffled(window=STAGES[512]["window"])
    base = {name: value.clone() for name, value in first.base.state_dict().items()}
    second = first.next_stage(**STAGES[1024])
    assert second.config.window == 2
    assert all(torch.equal(value, base[name]) for name, value in second.base.state_dict().items())
    basis = principal_basis(second.image_table, WIDTH // 4)
    torch.testing.assert_close(second.unshuffle.proj.weight, basis)
    randomise(second)
    third = second.next_stage(**STAGES[2048])
    assert (third.config.window, third.config.z_loss) == (2, 1e-5)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in third.state_dict().items())
    inputs = second.pack([[BOS, 1]], codes_of(1, 4, 4))
    assert torch.equal(third(**inputs).image_logits, second(**inputs).image_logits)
    assert third(**inputs).image_z_loss > 0
    assert third.base is first.base
    assert first.config.window == 1


# -- what is refused -------------------------------------------------------------------------------------------------


def test_options_outside_their_range_change_nothing() -> None:
    base = language_model()
    before = base.get_input_embeddings().weight
    for options, says in (
        ({"window": 3}, "square must divide the width 32"),
        ({"window": 0}, "window=0"),
        ({"compress": "both"}, "'pre', 'post'"),
        ({"position_mode": "3d"}, "'1d', 'rope2d'"),
        ({"window_order": "column"}, "'raster'"),
        ({"cfg_schedule": "cosine"}, "half_linear"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"num_blocks": -1}, "num_blocks"),
        ({"codebook_size": 0}, "codebook_size=0"),
        ({"init": "zeros"}, "svd"),
        ({"soi_token_id": 12}, "two marks outside the codes"),
        ({"soi_token_id": 40, "eoi_token_id": 40}, "two marks outside the codes"),
    ):
        with pytest.raises(InvalidParameterError, match=says):
            TokenShuffle.wrap(base, **{"codebook_size": CODES, **options})
    with pytest.raises(UnknownParameterError, match="did you mean 'cfg_scale'"):
        TokenShuffle.wrap(base, codebook_size=CODES, cfg_scal=2)
    with pytest.raises(InvalidParameterError, match="single-layer"):
        shuffled(two_layer=True).init_from_table()
    assert base.get_input_embeddings().weight is before
    assert base.config.vocab_size == TEXT


def test_language_models_without_the_hooks_are_named() -> None:
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        Gemma2Config,
        GraniteConfig,
        T5Config,
        T5ForConditionalGeneration,
    )

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 8}
    gemma = Gemma2Config(hidden_size=16, head_dim=8, num_key_value_heads=1, **sizes)
    granite = GraniteConfig(hidden_size=16, num_key_value_heads=1, logits_scaling=8.0, **sizes)
    for base, says in (
        (torch.nn.Linear(2, 2), "Linear has no get_input_embeddings"),
        (AutoModel.from_config(language_model().config), r"get_output_embeddings\(\) gives no module"),
        (T5ForConditionalGeneration(T5Config(d_model=8, num_layers=1, num_heads=2, vocab_size=8)), "encoder-decoder"),
        (AutoModelForCausalLM.from_config(gemma), "caps its logits"),
        (AutoModelForCausalLM.from_config(granite), "not get_output_embeddings"),
    ):
        with pytest.raises(UnsupportedModelError, match=says):
            TokenShuffle.wrap(base, codebook_size=CODES)
    with pytest.raises(UnsupportedModelError, match=r"GPT2Model has no rotary_emb.*position_mode='1d'"):
        TokenShuffle.wrap(language_model("gpt2"), codebook_size=CODES, position_mode="rope2d")

    class Closed(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    closed = language_model()
    closed.get_decoder = Closed
    with pytest.raises(UnsupportedModelError, match="Closed takes no inputs_embeds"):
        TokenShuffle.wrap(closed, codebook_size=CODES)


def test_inputs_that_do_not_fit_together() -> None:
    model, codes = shuffled(), codes_of(1, 4, 4)
    inputs = model.pack([[BOS]], codes)
    wrong = codes.clone()
    wrong[0, 0, 0] = CODES
    for changes, says in (
        ({"image_codes": wrong}, f"codes: {CODES} given, expected 0 to {CODES - 1}"),
        ({"image_codes": -codes - 1}, "expected 0 to"),
        ({"image_codes": codes.float()}, "dtype torch.float32"),
        ({"image_codes": codes[:, :3]}, "3 x 4 given"),
        ({"image_codes": codes[:, :2]}, r"runs of \[4\].*pictures of \[2\]"),
        ({"image_codes": codes.repeat(2, 1, 1)}, r"pictures of \[4, 4\]"),
        ({"image_codes": None}, "reads them from image_codes"),
        ({"image_codes": [codes[0, 0]]}, r"\(H, W\)"),
        ({"input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == 23, 1)}, "right behind an SOI"),
        ({"input_ids": torch.zeros_like(inputs["input_ids"])}, "no position for them"),
    ):
        with pytest.raises(InvalidParameterError, match=says):
            model(**{**inputs, **changes})
    with pytest.raises(InvalidParameterError, match="2 prompts and 1 images"):
        model.pack([[BOS], [BOS]], codes)
    long = shuffled("gpt2")
    with pytest.raises(InvalidParameterError, match=r"67 positions given.*has 64"):
        long(**long.pack([[BOS]], codes_of(1, 16, 16)))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=3))
@settings(max_examples=20)
def test_positions_count_what_is_there(left: list[int]) -> None:
    mask = torch.stack([torch.arange(6) >= skip for skip in left])
    for row, found in zip(mask, positions_of(mask), strict=True):
        assert found[row].tolist() == list(range(int(row.sum())))
