"""The training loop on accelerate: any number of processes, and it can be killed at any moment and goes on."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .draws import Draws, draws_of_process
from .files import TORCH, remove, write_whole
from .settings import Settings, TrainingError

LOG_EVERY = 10


def accelerator_for(settings: Settings):
    """An accelerate.Accelerator; how many processes there are and on what is for `accelerate launch` to say."""
    from datetime import timedelta

    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    patient = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # while one process computes the features
    precision = "no" if settings.precision == "fp32" else settings.precision
    cpu = not torch.accelerator.is_available()  # unless told so, accelerate keeps processes on CPUs apart
    return Accelerator(cpu=cpu, mixed_precision=precision, gradient_accumulation_steps=settings.accumulate,
                       log_with="tensorboard", project_dir=settings.out, kwargs_handlers=[patient])


class Progress:
    """Where a run is; part of its checkpoints."""

    def __init__(self):
        self.step, self.seconds = 0, 0.0

    def state_dict(self) -> dict:
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.seconds = state["step"], state["seconds"]


class Trainer:
    """Trains what is registered in `stage` (see `stages`) on `draws`, from the newest checkpoint in `settings.out`.

    validate: called with the step on the main process every `validate_every` steps, while the averaged weights are in
    the stage; returns numbers to log.
    """

    def __init__(self, accelerator, stage: nn.Module, draws: Draws, settings: Settings,
                 validate: Callable[[int], dict[str, float]]):
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.accelerator, self.draws, self.settings, self.validate = accelerator, draws, settings, validate
        self.folder = Path(settings.out)
        self.parameters = [p for p in stage.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        name = {"constant": "constant_with_warmup", "cosine": "cosine"}[settings.schedule]
        self.rate = get_scheduler(
            name, optimizer, num_warmup_steps=settings.warmup, num_training_steps=settings.steps
        )
        self.stage, self.optimizer = accelerator.prepare(stage, optimizer)
        self.ema, self.progress = EMAModel(self.parameters, decay=settings.ema), Progress()
        accelerator.register_for_checkpointing(self.rate, self.ema, self.progress)

    def train(self) -> None:
        """Take the steps that are left, then put the averaged weights into the stage."""
        from tqdm import tqdm

        self._load()
        settings, progress = self.settings, self.progress
        began = time.monotonic() - progress.seconds
        batches = iter(self._loader())
        bar = tqdm(total=settings.steps, initial=progress.step, disable=not self.accelerator.is_main_process)
        while progress.step < settings.steps:
            losses = self._step(batches)
            progress.step += 1
            progress.seconds = time.monotonic() - began
            bar.update()
            bar.set_postfix(loss=f"{losses['loss']:.4f}")
            if progress.step % LOG_EVERY == 0 or progress.step == settings.steps:
                self._log(losses | {"lr": self.rate.get_last_lr()[0]})
            if progress.step % settings.save_every == 0 or progress.step == settings.steps:
                self._save()
            if settings.validate_every and progress.step % settings.validate_every == 0:
                self._validate()
        bar.close()
        self.ema.copy_to(self.parameters)

    def _step(self, batches) -> dict[str, float]:
        """One step of the optimiser; returns the losses, averaged over the whole batch, and the gradient's norm."""
        accelerator, parts = self.accelerator, []
        for _ in range(self.settings.accumulate):
            batch = {name: value.to(accelerator.device) for name, value in next(batches).items()}
            with accelerator.accumulate(self.stage):
                losses = self.stage(batch)
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.parameters, self.settings.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            parts.append(torch.stack([value.detach().float() for value in losses.values()]))
        values = accelerator.reduce(torch.stack([*torch.stack(parts).mean(0), norm.detach()]), reduction="mean")
        found = dict(zip([*losses, "gradient"], values.tolist()))
        self._stop_if_not_finite(found)
        self.rate.step()
        self.ema.step(self.parameters)
        return found

    def _stop_if_not_finite(self, found: dict[str, float]) -> None:
        """In fp16 an infinite gradient is normal: that step is left out and the loss scaled less."""
        scaled = self.settings.precision == "fp16"
        if all(math.isfinite(value) for name, value in found.items() if not (scaled and name == "gradient")):
            return
        raise TrainingError(
            f"The loss is {found['loss']} and the gradient {found['gradient']} at step {self.progress.step}, with the "
            f"learning rate {self.rate.get_last_lr()[0]:g}; the last good checkpoint is {self._newest() or 'none'}: "
            "try a lower lr, or precision=bf16 instead of fp16."
        )

    def _loader(self):
        accelerator, settings = self.accelerator, self.settings
        steps = range(self.progress.step, settings.steps)
        parts = draws_of_process(steps, settings.batch, settings.accumulate, accelerator.process_index,
                                 accelerator.num_processes)
        # On a processor each forked worker would keep the weights as they were before the first step: memory doubles.
        workers = 0 if accelerator.device.type == "cpu" else settings.workers
        return torch.utils.data.DataLoader(self.draws, batch_sampler=parts, num_workers=workers,
                                           pin_memory=accelerator.device.type == "cuda")

    def _log(self, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=self.progress.step)
        if self.accelerator.is_main_process:
            row = {"step": self.progress.step, "seconds": round(self.progress.seconds, 1), **values}
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _validate(self) -> None:
        """On the main process, with the averaged weights."""
        if self.accelerator.is_main_process:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
            values = self.validate(self.progress.step)
            self.ema.restore(self.parameters)
            self._log({f"validation/{name}": value for name, value in values.items()})
        self.accelerator.wait_for_everyone()

    def _checkpoints(self) -> list[Path]:
        return sorted(path for path in (self.folder / "checkpoints").glob("*") if path.name.isdigit())

    def _newest(self) -> Path | None:
        return next(reversed(self._checkpoints()), None)

    def _save(self) -> None:
        """By the main process alone: the others hold the same, and random numbers have no state (see `draws`)."""
        if self.accelerator.is_main_process:
            folder = self.folder / "checkpoints" / f"{self.progress.step:07d}"
            write_whole(folder, lambda partial: self.accelerator.save_state(str(partial)), TORCH)
            for old in self._checkpoints()[: -self.settings.keep]:
                remove(old)

    def _load(self) -> None:
        newest = self._newest()
        if newest is not None:
            self.accelerator.load_state(str(newest))
            self.accelerator.step = 0  # a checkpoint lies between steps, and `accumulate` may have changed
            self.ema.to(self.accelerator.device)
            self.accelerator.print(f"Going on from {newest}.")
