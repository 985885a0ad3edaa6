"""A look at photos that are not trained on: the loss, restored pictures, and how close they are."""

from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from ..contact_sheet import contact_sheet
from ..faces import align
from ..metrics import psnr, similarity, ssim
from ..pictures import to_pil
from ..recognition import embed
from ..restorer import Restorer
from .files import write_png
from .material import Material
from .settings import Settings
from .stages import AlignStage, ContentStage, Frozen

ROUNDS = 8  # of the validation loss, each with other noise and other t


class Validation:
    """The same draws and the same start noise each time. Calling it gives numbers to log, and `out`/validation, in the
    stages that restore, a sheet of degraded faces, restorations and truths."""

    def __init__(self, accelerator, stage: nn.Module, frozen: Frozen, material: Material, settings: Settings):
        self.accelerator, self.stage, self.frozen = accelerator, stage, frozen
        self.material, self.settings = material, settings

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        count = self.settings.validation_images
        values = self._losses(count)
        if isinstance(self.stage, ContentStage):
            batches = [self._batch(part) for part in self._parts(count)]
            with self.accelerator.autocast():
                restored = torch.cat([self._restore(batch, part) for batch, part in zip(batches, self._parts(count))])
            lq, hq = (torch.cat([batch[name] for batch in batches]) for name in ("lq", "hq"))
            values |= self._measure(restored.float(), hq)
            self._show(step, {"degraded": lq, "restored": restored.float(), "truth": hq})
        return values

    def _losses(self, count: int) -> dict[str, float]:
        """Means over `ROUNDS` draws of each image."""
        sums: dict[str, float] = {}
        for part in self._parts(ROUNDS * count):
            with self.accelerator.autocast():
                losses = self.stage(self._batch(part))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(part)
        return {name: value / (ROUNDS * count) for name, value in sums.items()}

    def _parts(self, count: int) -> list[range]:
        """The first `count` draws, as many at a time as a process trains on at once."""
        size = self.settings.batch // (self.settings.accumulate * self.accelerator.num_processes)
        return [range(first, min(first + size, count)) for first in range(0, count, size)]

    def _batch(self, numbers: range) -> dict[str, Tensor]:
        batch = default_collate([self.material.validation[n] for n in numbers])
        return {name: value.to(self.accelerator.device) for name, value in batch.items()}

    def _restore(self, batch: dict[str, Tensor], numbers: range) -> Tensor:
        """With the first reference, in the stage that has references; each image's noise is its own."""
        frozen, base, identity = self.frozen, self.frozen.base, None
        if isinstance(self.stage, AlignStage):
            first = {name: batch[name][:, :1] for name in ("embedding", "clip")}
            identity = frozen.keys_values(first, frozen.adapter)
        restorer = Restorer(base.unet, base.vae, self.stage.content, frozen.spec, base.prompt,
                            dict(base.schedule.config), base.vae.config.scaling_factor, frozen.condition)
        return restorer.restore(batch["lq"], identity, steps=self.settings.validation_steps,
                                seeds=torch.tensor(numbers))

    def _measure(self, restored: Tensor, truth: Tensor) -> dict[str, float]:
        values = {"psnr": psnr(restored, truth).mean().item(), "ssim": ssim(restored, truth).mean().item()}
        if self.material.face_model is not None:
            rows = [self.material.validation.row(n) for n in range(len(truth))]
            points, recogniser = self.material.landmarks[rows].to(truth.device), self.material.face_model.recogniser
            faces = (embed(recogniser, align(images, points)) for images in (restored, truth))
            values["similarity"] = similarity(*faces).mean().item()
        return values

    def _show(self, step: int, images: dict[str, Tensor]) -> None:
        columns = {name: [to_pil(one) for one in column] for name, column in images.items()}
        sheet = contact_sheet(columns, {}, f"Step {step}")
        path = Path(self.settings.out) / "validation" / f"{step:07d}.png"
        write_png(sheet, path)
        for tracker in self.accelerator.trackers:
            tracker.log_images({"validation": numpy.asarray(sheet)[None]}, step, dataformats="NHWC")
