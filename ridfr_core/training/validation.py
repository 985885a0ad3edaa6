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
from .files import write_whole
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
        with self.accelerator.autocast():
            rounds = [self.stage(self._batch(range(i * count, (i + 1) * count))) for i in range(ROUNDS)]
            values = {name: sum(one[name].item() for one in rounds) / ROUNDS for name in rounds[0]}
            if isinstance(self.stage, ContentStage):
                batch = self._batch(range(count))
                restored = self._restore(batch).float()
                values |= self._measure(restored, batch["hq"])
                self._show(step, {"degraded": batch["lq"], "restored": restored, "truth": batch["hq"]})
        return values

    def _batch(self, numbers: range) -> dict[str, Tensor]:
        batch = default_collate([self.material.validation[n] for n in numbers])
        return {name: value.to(self.accelerator.device) for name, value in batch.items()}

    def _restore(self, batch: dict[str, Tensor]) -> Tensor:
        """With the first reference, in the stage that has references."""
        frozen, base, identity = self.frozen, self.frozen.base, None
        if isinstance(self.stage, AlignStage):
            first = {name: batch[name][:, :1] for name in ("embedding", "clip")}
            identity = frozen.keys_values(first, frozen.adapter)
        restorer = Restorer(base.unet, base.vae, self.stage.content, frozen.spec, base.prompt,
                            dict(base.schedule.config), base.vae.config.scaling_factor, frozen.condition)
        seeds = torch.arange(len(batch["lq"]))
        return restorer.restore(batch["lq"], identity, steps=self.settings.validation_steps, seeds=seeds)

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
        write_whole(path, lambda partial: sheet.save(partial, "PNG"))
        for tracker in self.accelerator.trackers:
            tracker.log_images({"validation": numpy.asarray(sheet)[None]}, step, dataformats="NHWC")
