"""Metrics against independent formulas, scikit-image and numpy in float64."""

import sys
import types

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ridfr_core import metrics, perceptual


def images(seed, size=(2, 3, 24, 20)):
    return torch.rand(size, generator=torch.Generator().manual_seed(seed))


def unit(seed, *shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_psnr_is_scikit_images():
    a, b = images(0), images(1)
    expected = [peak_signal_noise_ratio(y.numpy(), x.numpy(), data_range=1) for x, y in zip(a, b)]
    assert metrics.psnr(a, b).tolist() == pytest.approx(expected, rel=1e-5)


def test_ssim_is_scikit_images_on_luma():
    a = images(0)
    b = (a + 0.2 * images(1)).clamp(0, 1)
    expected = []
    for x, y in zip(a, b):
        x, y = (np.tensordot((0.299, 0.587, 0.114), one.double().numpy(), 1) for one in (x, y))
        expected.append(structural_similarity(x, y, data_range=1, gaussian_weights=True, sigma=1.5,
                                              use_sample_covariance=False))
    assert metrics.ssim(b, a).tolist() == pytest.approx(expected, abs=2e-5)
    assert metrics.ssim(a, a).tolist() == pytest.approx([1, 1])


def test_landmark_distance_is_in_pixels():
    truth = torch.rand(2, 5, 2) * 100
    moved = truth + torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])
    assert metrics.landmark_distance(moved, truth).tolist() == pytest.approx([5, 0], abs=1e-4)


def test_identity_variance_is_the_trace_of_the_covariance():
    embeddings = unit(0, 3, 8, 512)
    expected = [np.trace(np.cov(person.double().numpy(), rowvar=False)) for person in embeddings]
    assert metrics.identity_variance(embeddings).tolist() == pytest.approx(expected, rel=1e-5)


def test_identity_variance_is_one_minus_the_mean_cosine_of_two_results():
    embeddings = unit(1, 4, 5, 512) + unit(2, 4, 1, 512)
    embeddings = torch.nn.functional.normalize(embeddings, dim=-1)
    cosines = (embeddings @ embeddings.mT)[:, ~torch.eye(5, dtype=torch.bool)].mean(-1)
    torch.testing.assert_close(metrics.identity_variance(embeddings), 1 - cosines)
    assert not metrics.identity_variance(unit(3, 2, 1, 512).expand(2, 6, 512)).abs().gt(1e-6).any()


def test_bootstrap_interval_is_the_normal_one_for_a_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    interval = metrics.bootstrap(values)
    mean, half = values.mean().item(), 1.96 * values.std().item() / 20
    assert interval.value == pytest.approx(mean)
    assert (interval.low, interval.high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


def test_bootstrap_is_paired():
    """Two noisy quantities that differ by little, but in each person: the difference is sure, the ratio too."""
    generator = torch.Generator().manual_seed(0)
    a = 5 + 3 * torch.randn(50, generator=generator)
    b = a + 0.1 + 0.01 * torch.randn(50, generator=generator)
    assert metrics.bootstrap(a, b, statistic=lambda a, b: b - a).low > 0
    ratio = metrics.bootstrap(a, b, statistic=lambda a, b: b / a)
    assert ratio.value == pytest.approx((b.mean() / a.mean()).item()) and ratio.low < ratio.value < ratio.high
    nothing = metrics.bootstrap(a - a.mean())
    assert nothing.low < 0 < nothing.high


@pytest.fixture
def pyiqa(monkeypatch, tmp_path):
    """A pyiqa whose cache is empty; what it is asked to load is noted."""
    asked = []
    package = types.SimpleNamespace(create_metric=lambda name, device: asked.append(name), __spec__=object())
    cache = types.SimpleNamespace(DEFAULT_CACHE_DIR=str(tmp_path / "pyiqa"))
    for name, module in {"pyiqa": package, "pyiqa.utils": object(), "pyiqa.utils.download_util": cache}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: None)
    return asked


@pytest.mark.parametrize("name", perceptual.METRICS)
def test_a_metric_without_weights_is_absent_and_pyiqa_never_asked(pyiqa, name):
    with pytest.raises(perceptual.MetricAbsent, match="weights are not on this disk .*: run `pyiqa "):
        perceptual.load(name)
    assert not pyiqa


def test_a_metric_with_its_weights_is_loaded(pyiqa, tmp_path):
    for file in perceptual.FILES["lpips"]:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    perceptual.load("LPIPS")
    assert pyiqa == ["lpips"]


def test_a_broken_pyiqa_is_absent(monkeypatch, tmp_path):
    """A package of its own beside it may be too new: then anything may be raised, in many lines."""
    (tmp_path / "pyiqa.py").write_text("raise AttributeError('no such thing\\nin another package')")
    monkeypatch.delitem(sys.modules, "pyiqa", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(perceptual.MetricAbsent, match="^pyiqa cannot be imported .no such thing.: `pip install"):
        perceptual.load("LPIPS")


def test_without_pyiqa_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(perceptual.MetricAbsent, match=r"pip install -e '\.\[evaluate\]'"):
        perceptual.load("LPIPS")


def test_scores_come_one_by_one():
    a, b = images(0), images(1)
    assert perceptual.score(lambda x, y: (x - y).abs().max(), a, b) == (a - b).abs().amax((1, 2, 3)).tolist()
    assert perceptual.score(lambda x: x.mean(), a) == pytest.approx(a.mean((1, 2, 3)).tolist())
