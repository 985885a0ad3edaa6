"""The paper's tables at nano scale, on untrained networks: that all is measured, kept, and told truthfully."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ridfr_core.evaluation import held_out, nano_figures, nano_report
from ridfr_core.evaluation.held_out import HeldOut, Method
from ridfr_core.evaluation.shipped import nano_adapter, nano_restorer, nano_tower
from ridfr_core.metrics import Interval
from ridfr_core.training import nano_arms, nano_diffusion
from ridfr_core.training.portrait_data import portrait_set
from ridfr_core.training.recogniser import iresnet
from tests import nano_random

PEOPLE, REFERENCES, STEPS = 2, 2, 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    nano_random.write(folder)
    return folder


@pytest.fixture(scope="module")
def shipped(weights):
    return Method(nano_restorer(weights), nano_adapter(weights), nano_tower(weights))


@pytest.fixture
def bench(tmp_path, weights):
    return HeldOut(tmp_path, PEOPLE, REFERENCES, STEPS, weights)


@pytest.fixture
def arms(tmp_path, shipped, monkeypatch):
    """Arms of one step with two portraits, on the untrained networks."""
    monkeypatch.setattr(nano_arms, "CONTENT", replace(nano_diffusion.CONTENT, batch=2))
    monkeypatch.setattr(nano_arms, "ALIGN", replace(nano_diffusion.ALIGN, batch=2))
    portraits = portrait_set(tmp_path, "train", 2, 3)
    recogniser = iresnet((1, 1, 1, 1), (8, 8, 8, 8)).eval()
    vae, unet = shipped.restorer.vae, shipped.restorer.unet
    material = nano_diffusion.Material(portraits, vae, shipped.tower, recogniser)
    nano = SimpleNamespace(work=tmp_path, portraits=portraits, material=material, vae=vae, unet=unet,
                           adapter=shipped.adapter, vision=shipped.tower)
    return nano_arms.Arms(nano, content_steps=1, align_steps=1)


def test_the_report_has_every_table_and_is_remade_from_what_was_measured(tmp_path, bench, shipped, arms, monkeypatch):
    monkeypatch.setattr(nano_report, "LAMBDAS", (0.0, 1.0, 30.0))
    path = tmp_path / "REPORT.md"
    report = nano_report.NanoReport(bench, shipped, arms, 2, (1.0, 2.0), (1, 2), path)
    report.write(["1", "4", "lambda", "2", "3"], "the command")
    text = path.read_text()
    for title in ("Table 1", "Table 2", "Table 3", "Table 4", "λ"):
        assert f"## {title}" in text
    assert "nan " not in text and "nan]" not in text and (tmp_path / "lambda.png").stat().st_size > 5000

    monkeypatch.setattr(HeldOut, "_restore", lambda *args: pytest.fail("restored again"))
    path.write_text(text + "\n" + nano_report.CAUSES + "\n\nBecause.\n")
    report.write(["1", "4", "lambda", "2", "3"], "the command")
    assert path.read_text() == text + "\n" + nano_report.CAUSES + "\n\nBecause.\n"
    path.unlink()
    report.write(["1"], "the command")
    assert "minutes in all" in text and "minutes in all" not in path.read_text()


def test_arms_differ_by_seed_and_by_how_the_face_joins_and_naive_is_not_aligned(arms):
    def first(content):
        return content.controlnet_mid_block.weight.detach()  # what one step changes

    pixel = first(arms.content(0))
    assert arms.content(0, latent=True).conv_in.in_channels == 8
    assert not torch.equal(pixel, first(arms.content(1)))
    assert torch.equal(pixel, first(arms.content(0)))  # loaded, not trained again
    naive, aligned = arms.finetuned(0, 0.0), arms.finetuned(0, 30.0)
    assert not torch.equal(first(naive), pixel) and not torch.equal(first(naive), first(aligned))


def test_an_arm_with_the_bundles_recipe_is_the_bundles_network(arms):
    own, other = nano_arms.CONTENT, replace(nano_arms.CONTENT, seed=1)
    assert arms._folder(own) == arms.nano.work
    assert len({arms._folder(own), arms._folder(other), arms._folder(own, latent=True)}) == 3
    assert nano_arms.of_length(nano_diffusion.ALIGN, nano_diffusion.ALIGN.steps, 0) == nano_diffusion.ALIGN


def test_measured_by_hand(bench, shipped):
    """One restoration of one person, without the batches and the cache."""
    measured = bench.measure(shipped, bench.references, guidance=2.0)
    assert measured.psnr.shape == (PEOPLE, REFERENCES) and measured.variance.shape == (PEOPLE,)
    identity = bench.keys_values(shipped, bench.references[1, :1], 1)
    with torch.autocast("cpu", torch.bfloat16):
        image = shipped.restorer.restore(bench.lq[1:], identity, bench._nobody(shipped, 1), 2.0, STEPS,
                                         seeds=torch.tensor([1])).float()
    error = (image - bench.truth[1:]).square().mean()
    assert measured.psnr[1, 0].item() == pytest.approx(-10 * error.log10().item(), abs=1e-2)
    truth = bench.compare(bench.truth)
    torch.testing.assert_close(truth.similarity, torch.ones(PEOPLE, 1))
    assert truth.psnr.isinf().all()


def test_another_protocol_is_measured_anew(bench, shipped, monkeypatch):
    bench.measure(shipped, None)
    monkeypatch.setattr(HeldOut, "_restore", lambda *args: pytest.fail("restored again"))
    bench.measure(shipped, None)
    monkeypatch.setattr(held_out, "PROTOCOL", held_out.PROTOCOL + 1)
    with pytest.raises(pytest.fail.Exception, match="restored again"):
        bench.measure(shipped, None)


def test_the_figures_of_the_model_card(bench, shipped, monkeypatch):
    monkeypatch.setattr(nano_figures, "STEPS", STEPS)
    figures, pictures = nano_figures.measure(shipped, bench)
    assert figures.keys() == pictures.keys() == {"lq", "truth", "reference", "blind", "ridfr", "wrong", "vae"}
    assert figures["truth"] == {"similarity": pytest.approx(1, abs=1e-3)}
    assert figures["lq"]["psnr"] == pytest.approx(bench.compare(bench.lq).psnr.mean().item(), abs=0.01)
    assert not torch.equal(pictures["ridfr"], pictures["wrong"])


def test_guidance_one_needs_no_second_look_and_guidance_zero_is_blind(bench, shipped):
    identity = bench.keys_values(shipped, bench.references[:, 0], 1)
    nobody = bench._nobody(shipped, PEOPLE)

    def restore(*args):
        return shipped.restorer.restore(bench.lq, *args, steps=STEPS)

    torch.testing.assert_close(restore(identity, nobody, 0.0), restore(nobody), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(restore(identity, nobody, 1.0), restore(identity), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(restore(identity), restore(nobody), atol=1e-4)


def test_smaller_references_are_other_references(bench, shipped):
    full, eighth = (bench.keys_values(shipped, bench.references[:, 0], shrink) for shrink in (1, 8))
    assert not torch.allclose(full[0][0], eighth[0][0], atol=1e-4)


@pytest.mark.parametrize(
    "interval, above, bound, sign, target",
    [((1.6, 1.2, 2.0), True, 1.5, "yes", "≥ 1.5: yes"), ((1.4, 0.9, 2.0), True, 1.5, "**no**", "≥ 1.5: **no**"),
     ((0.5, 0.4, 0.9), False, 0.6, "yes", "≤ 0.6: yes"), ((0.8, 0.7, 1.1), False, None, "**no**", "")],
)
def test_a_claim_is_judged_by_its_interval_and_its_bound(interval, above, bound, sign, target):
    claim = nano_report.Claim("it", "1.4", Interval(*interval), 1, above, bound)
    assert claim.row()[3:] == [sign, target]


def test_batches_do_not_matter(bench, shipped, monkeypatch):
    together = bench.measure(shipped, bench.references)
    for file in bench.cache.iterdir():
        file.unlink()
    monkeypatch.setattr(held_out, "BATCH", 1)
    torch.testing.assert_close(bench.measure(shipped, bench.references).psnr, together.psnr, rtol=0, atol=1e-2)
