"""ID-Preserving Sampling in ComfyUI's own sampling, in this process, on random nano weights."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

SETTINGS = dict(
    step_size=0.3,
    step_kind="relative to the noise",
    iterations=1,
    start_percent=0.0,
    end_percent=1.0,
    target=1.0,
    references="mean",
    no_face="take the usual place",
    decode="face",
    find_every=0,
)


@pytest.fixture(scope="module")
def people(identity, face_model):
    """The two people, as the face model would have extracted them."""
    return replace(identity, digest=face_model.model.digest)


@pytest.fixture
def guided(nodes, nano, face_model, people, shown):
    """guided(**settings) -> MODEL and record; the LQ image is one picture for all."""

    def guided(model=None, who=people, lq=None, vae=None, face=face_model, **settings):
        lq = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(3)) if lq is None else lq
        node = nodes["RIDFR_IDPreservingSampling"]
        return node.execute(model or nano.model, vae or nano.vae, face, who, lq, **SETTINGS | settings).args

    return guided


@pytest.fixture
def alive(pack, monkeypatch):
    """alive() -> how many of the runs so far, which hold the weights and the faces, still are."""
    module, made = pack.nodes.guided_run, []
    start = module.Run.__init__

    def counted(self, *args):
        made.append(weakref.ref(self))
        start(self, *args)

    def alive() -> int:
        gc.collect()
        assert made, "no run was counted"
        return sum(run() is not None for run in made)

    monkeypatch.setattr(module.Run, "__init__", counted)
    return alive
