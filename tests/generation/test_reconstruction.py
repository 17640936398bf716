"""`tokred.eval.reconstruction`: PSNR, SSIM and Fréchet distance against other libraries; what is measured of whom."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokred.core.errors import InvalidParameterError
from tokred.data.pictures import PictureBatch

pytest.importorskip("tqdm")

from tokred.eval import reconstruction
from tokred.eval.reconstruction import Features, Moments, frechet_distance, measure, psnr, ssim, textok_ways


def pictures(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@given(st.integers(1, 3), st.integers(11, 24), st.integers(11, 24), st.floats(0.01, 1.5))
@settings(max_examples=15)
def test_psnr_and_ssim_are_those_of_scikit_image(count: int, height: int, width: int, noise: float) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    wanted = pictures(count, height, width)
    found = (wanted + noise * pictures(count, height, width, 1)).clamp(-1, 1)
    near, alike = psnr(found, wanted), ssim(found, wanted)
    assert near.shape == alike.shape == (count,)
    assert near.dtype == alike.dtype == torch.float64
    for i in range(count):
        first, second = ((one[i].double().numpy() + 1) / 2 for one in (found, wanted))
        assert float(near[i]) == pytest.approx(metrics.peak_signal_noise_ratio(second, first, data_range=1), abs=1e-9)
        other = metrics.structural_similarity(
            first, second, data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert float(alike[i]) == pytest.approx(other, abs=1e-9)


def test_equal_pictures() -> None:
    wanted = pictures(2, 16, 12)
    assert psnr(wanted, wanted).tolist() == [math.inf] * 2
    torch.testing.assert_close(ssim(wanted, wanted), torch.ones(2, dtype=torch.float64))
    assert psnr(wanted * 0, wanted * 0 + 0.2).tolist() == pytest.approx([20] * 2)  # a tenth of the range


@pytest.mark.parametrize(
    ("measured", "first", "second", "says"),
    [
        (psnr, (1, 3, 4, 4), (1, 3, 4, 5), "shapes"),
        (psnr, (3, 4, 4), (3, 4, 4), r"expected one \(B, 3, H, W\)"),
        (ssim, (1, 1, 16, 16), (1, 1, 16, 16), "expected one"),
        (ssim, (1, 3, 10, 16), (1, 3, 10, 16), "SSIM needs 11 x 11"),
    ],
)
def test_what_cannot_be_compared(measured, first, second, says) -> None:
    with pytest.raises(InvalidParameterError, match=says):
        measured(torch.zeros(first), torch.zeros(second))


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 4), st.floats(-100, 100))
@settings(max_examples=25)
def test_moments_do_not_depend_on_batches(sizes: list[int], dim: int, offset: float) -> None:
    np = pytest.importorskip("numpy")
    count = sum(sizes)
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(count)).double() + offset
    found = Moments()
    for part in rows.split(sizes):
        found.add(part)
    torch.testing.assert_close(found.mean, rows.mean(dim=0))
    if count < 2:
        with pytest.raises(InvalidParameterError, match="2 or more"):
            _ = found.covariance
        return
    wanted = np.cov(rows.numpy().T).reshape(dim, dim)
    torch.testing.assert_close(found.covariance, torch.from_numpy(wanted), rtol=1e-8, atol=1e-10)


def moments(rows: torch.Tensor) -> Moments:
    found = Moments()
    found.add(rows)
    return found


def test_frechet_distance_is_its_definition() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(0)
    for dim, count in ((1, 9), (5, 40), (6, 4)):  # the last has singular covariances
        first, second = (
            torch.randn(count, dim, generator=generator).double() @ torch.randn(dim, dim, generator=generator).double()
            for _ in range(2)
        )
        a, b = moments(first), moments(second + 0.5)
        c1, c2 = a.covariance.numpy(), b.covariance.numpy()
        root = linalg.sqrtm(c1 @ c2).real
        wanted = ((a.mean - b.mean) ** 2).sum().item() + (c1 + c2 - 2 * root).trace()
        assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-6, abs=1e-6)
        assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
        moved = moments(first + 2)
        assert frechet_distance(a, moved) == pytest.approx(4 * dim, rel=1e-6)


def batches(count: int, size: int) -> list[PictureBatch]:
    images = pictures(count, 16, 16)
    return [
        PictureBatch(images[i : i + size], None, [f"caption {j}" for j in range(i, min(i + size, count))])
        for i in range(0, count, size)
    ]


@pytest.mark.parametrize("threads", [1, 3])
def test_every_way_sees_every_picture(threads: int) -> None:
    seen = []

    def ways(batch, before, number):
        seen.append((number, before))
        size = torch.full((len(batch.images),), 3.0, dtype=torch.float64)
        yield "same", 2, batch.images, size
        yield "half", 1, batch.images / 2, size / 3

    class Means:
        def __call__(self, images):
            return images.mean(dim=(2, 3))

    done = []
    found, real = measure(batches(5, 2), ways, Means(), threads, done.append)  # type: ignore[arg-type]
    assert sorted(seen) == [(0, None), (1, "caption 1"), (2, "caption 3")]
    assert sorted(done) == [1, 2, 2]
    wanted = pictures(5, 16, 16)
    assert found["same"].psnr.tolist() == [math.inf] * 5
    torch.testing.assert_close(found["half"].psnr, psnr(wanted / 2, wanted))
    assert torch.equal(found["same"].pictures, wanted)
    assert frechet_distance(real, found["same"].moments) == pytest.approx(0, abs=1e-9)
    row = found["half"].row("half")
    assert (row["label"], row["tokens"], row["bytes"]) == ("half", 1, 1)
    assert row["psnr"] == pytest.approx(found["half"].psnr.mean().item())
    assert row["psnr_se"] > 0


def test_captions_of_a_textok() -> None:
    """Right, another's, another's in the decoder alone, none, and a twin."""
    told = []

    class Stub:
        num_tokens = 4

        class model:
            class config:
                text_in_encoder, text_in_decoder, num_tokens, latent_dim = True, True, 4, 8

        def encode(self, images, captions):
            told.append(captions)
            return images

        def decode(self, tokens, captions):
            told.append(captions)
            return tokens

    one, two, *_ = batches(4, 2)
    ways = textok_ways(Stub(), Stub())
    first = list(ways(one, None, 0))
    assert [made[0] for made in first] == [
        "right caption", "wrong caption", "wrong in decoder", "no caption", "twin without text"
    ]  # fmt: skip
    right, others = ["caption 0", "caption 1"], ["caption 1", "caption 0"]
    assert told == [right, right, others, others, right, others, None, None, None, None]
    assert first[0][3].tolist() == [4 * 8 * 2 + 9] * 2
    assert first[3][3].tolist() == [4 * 8 * 2] * 2
    told.clear()
    list(ways(two, "caption 1", 1))
    assert told[2] == ["caption 1", "caption 2"]


def test_features_of_a_timm_folder(tmp_path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7).eval()
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    features = Features(tmp_path / "saved")
    images = pictures(2, 32, 32)
    with torch.no_grad():
        data = timm.data.resolve_model_data_config(model)
        scaled = torch.nn.functional.interpolate(
            (images + 1) / 2, data["input_size"][-2:], mode=data["interpolation"], antialias=True
        ).clamp(0, 1)
        mean, std = (torch.tensor(data[name])[:, None, None] for name in ("mean", "std"))
        wanted = model.forward_head(model.forward_features((scaled - mean) / std), pre_logits=True)
    torch.testing.assert_close(features(images), wanted)
    (tmp_path / "saved" / "model.safetensors").unlink()
    with pytest.raises(InvalidParameterError, match="cannot be loaded by timm"):
        Features(tmp_path / "saved")
    with pytest.raises(InvalidParameterError, match="the folder of a timm model"):
        Features(tmp_path)


def test_what_the_papers_say_fits_its_columns() -> None:
    for _, columns, rows in reconstruction.REPORTED.values():
        assert all(len(row) == len(columns) for row in rows)
    assert reconstruction.powers(16) == [1, 2, 4, 8, 16]
    assert reconstruction.powers(6) == [1, 2, 4, 6]
    assert reconstruction.powers(1) == [1]
