"""`start` and `end` as parts of the model's noise schedule."""

import importlib

import pytest
import torch


@pytest.fixture
def sampling(comfy):
    from comfy.model_sampling import ModelSamplingDiscrete

    return ModelSamplingDiscrete()


@pytest.fixture
def noise_range(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.noise_range")


def test_it_counts_like_comfyui(noise_range, sampling):
    assert noise_range.NoiseRange(0.2, 0.7).sigmas(sampling) == tuple(map(sampling.percent_to_sigma, (0.2, 0.7)))
    for percent in (0.1, 0.5, 0.9):
        assert abs(noise_range.percent_of(sampling, sampling.percent_to_sigma(percent)) - percent) < 1e-3


@pytest.mark.parametrize("start, end, outside", [(0.0, 0.2, True), (0.0, 0.5, False), (0.2, 1.0, False)])
def test_a_run_that_begins_later(noise_range, sampling, start, end, outside):
    """As with denoise 0.7."""
    run = torch.tensor([*map(sampling.percent_to_sigma, (0.3, 0.6, 0.9)), 0.0])
    said = noise_range.NoiseRange(start, end).outside(sampling, run, "The identity")
    assert bool(said) == outside
    assert not outside or "between 0.30 and 0.90" in said
