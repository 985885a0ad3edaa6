"""The training loop on accelerate: any number of processes, and it can be killed at any moment and goes on."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import remove
from .draws import Draws, draws_of_process
from .files import TORCH, append, write_whole
from .settings import Settings, TrainingError
from .state import check_like, number, read_state, write_state

LOG_EVERY = 10
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of each parameter; the last is one number
SCALER = ("scale", "_growth_tracker")  # what changes in a gradient scaler


def accelerator_for(settings: Settings):
    """An accelerate.Accelerator; how many processes there are and on what is for `accelerate launch` to say.

    Raises TrainingError: fp16 without a GPU, or a way to share the work that cuts the networks into pieces.
    """
    from datetime import timedelta

    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    patient = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # while one process computes the features
    precision = "no" if settings.precision == "fp32" else settings.precision
    cpu = not torch.accelerator.is_available()  # unless told so, accelerate keeps processes on CPUs apart
    if cpu and precision == "fp16":
        raise TrainingError("'precision' is fp16, which needs a GPU: use bf16 or fp32 on a processor.")
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision=precision, gradient_accumulation_steps=settings.accumulate,
                                  log_with="tensorboard", project_dir=settings.out, kwargs_handlers=[patient])
    except ImportError as error:  # such as deepspeed
        raise TrainingError(f"accelerate cannot start as it is configured ({error}): run `accelerate config` and "
                            "choose several GPUs without DeepSpeed, FSDP or Megatron-LM.") from error
    way = str(accelerator.distributed_type.value)
    if way != "NO" and not way.startswith("MULTI_"):
        raise TrainingError(f"accelerate is configured for {way}, with which these networks cannot be trained: run "
                            "`accelerate config` and choose several GPUs without DeepSpeed, FSDP or Megatron-LM.")
    accelerator.gradient_accumulation_steps = settings.accumulate  # accelerate's environment would overrule it
    return accelerator


def rate(settings: Settings, taken: int) -> float:
    """Learning rate of the step after `taken` ones: it rises over `warmup` steps, then stays, or falls to 0 along a
    cosine."""
    if taken < settings.warmup:
        return settings.lr * taken / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    share = (taken - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def drawn(batches) -> dict[str, Tensor]:
    """The next batch. A process that draws would put its traceback into the message of its TrainingError."""
    try:
        return next(batches)
    except TrainingError as error:
        raise TrainingError(str(error).rpartition("TrainingError: ")[2].strip()) from error


class Average:
    """Averaged weights of parameters, with a decay that grows from 0.1 to `decay`."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, taken: int) -> None:
        """After a step; `taken`: how many there were before it."""
        decay = min(self.decay, (1 + taken) / (10 + taken))
        torch._foreach_lerp_([*self.weights.values()], [*self.parameters.values()], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """The averaged weights go into the parameters, and theirs come here."""
        for name, parameter in self.parameters.items():
            parameter.data, self.weights[name] = self.weights[name], parameter.data


class Trainer:
    """Trains what is registered in `stage` (see `stages`) on `draws`, from the newest checkpoint in `settings.out`.

    validate: called with the step on the main process every `validate_every` steps, while the averaged weights are in
    the stage; returns numbers to log.
    """

    def __init__(self, accelerator, stage: nn.Module, draws: Draws, settings: Settings,
                 validate: Callable[[int], dict[str, float]]):
        self.accelerator, self.draws, self.settings, self.validate = accelerator, draws, settings, validate
        self.folder = Path(settings.out)
        self.parameters = {name: p for name, p in stage.named_parameters() if p.requires_grad}
        self.stage = accelerator.prepare(stage)
        self.optimizer = accelerator.prepare(torch.optim.AdamW(
            self.parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay,
            fused=accelerator.device.type == "cuda"))
        self.average = Average(self.parameters, settings.ema)
        # A step that fp16 leaves out counts as a step, but not as one taken.
        self.step, self.taken, self.seconds = 0, 0, 0.0

    def train(self) -> None:
        """Take the steps that are left, then put the averaged weights into the stage."""
        from tqdm import tqdm

        self._load()
        settings = self.settings
        began = time.monotonic() - self.seconds
        batches = iter(self._loader())
        bar = tqdm(total=settings.steps, initial=self.step, disable=not self.accelerator.is_main_process)
        while self.step < settings.steps:
            values = self._step(batches)
            self.step += 1
            self.seconds = time.monotonic() - began
            bar.update()
            bar.set_postfix(loss=f"{values['loss']:.4f}")
            if self.step % LOG_EVERY == 0 or self.step == settings.steps:
                self._log(values)
            if self.step % settings.save_every == 0 or self.step == settings.steps:
                self._save()
            if settings.validate_every and self.step % settings.validate_every == 0:
                self._validate()
        bar.close()
        self.average.swap()

    def _step(self, batches) -> dict[str, float]:
        """One step of the optimiser; returns the losses, averaged over the whole batch, the gradient's norm and the
        learning rate."""
        accelerator, settings, parts, lr = self.accelerator, self.settings, [], rate(self.settings, self.taken)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for _ in range(settings.accumulate):
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in drawn(batches).items()}
            with accelerator.accumulate(self.stage):
                losses = self.stage(batch)
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.parameters.values(), settings.clip or math.inf)
                self.optimizer.step()
                self.optimizer.zero_grad()
            parts.append(torch.stack([value.detach().float() for value in losses.values()]))
        values = accelerator.reduce(torch.stack([*torch.stack(parts).mean(0), norm.detach()]), reduction="mean")
        found = dict(zip([*losses, "gradient"], values.tolist())) | {"lr": lr}
        self._stop_if_not_finite(found)
        if math.isfinite(found["gradient"]):
            self.average.update(self.taken)
            self.taken += 1
        return found

    def _stop_if_not_finite(self, found: dict[str, float]) -> None:
        """In fp16 an infinite gradient is normal: that step is left out and the loss scaled less."""
        scaled = self.settings.precision == "fp16"
        if all(math.isfinite(value) for name, value in found.items() if not (scaled and name == "gradient")):
            return
        raise TrainingError(
            f"The loss is {found['loss']} and the gradient {found['gradient']} at step {self.step}, with the "
            f"learning rate {found['lr']:g}; the last good checkpoint is {self._newest() or 'none'}: "
            "try a lower lr, or precision=bf16 instead of fp16."
        )

    def _loader(self):
        accelerator, settings = self.accelerator, self.settings
        steps = range(self.step, settings.steps)
        parts = draws_of_process(steps, settings.batch, settings.accumulate, accelerator.process_index,
                                 accelerator.num_processes)
        # On a processor each forked worker would keep the weights as they were before the first step: memory doubles.
        workers = 0 if accelerator.device.type == "cpu" else settings.workers
        return torch.utils.data.DataLoader(self.draws, batch_sampler=parts, num_workers=workers,
                                           pin_memory=accelerator.device.type == "cuda")

    def _log(self, values: dict[str, float]) -> None:
        """JSON knows no infinity and no NaN, so these are null in the log."""
        self.accelerator.log(values, step=self.step)
        if self.accelerator.is_main_process:
            row = {"step": self.step, "seconds": round(self.seconds, 1), **values}
            plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
            append(self.folder / "log.jsonl", json.dumps(plain) + "\n")

    def _validate(self) -> None:
        """On the main process, with the averaged weights."""
        if self.accelerator.is_main_process:
            self.average.swap()
            values = self.validate(self.step)
            self.average.swap()
            self._log({f"validation/{name}": value for name, value in values.items()})
        self.accelerator.wait_for_everyone()

    def _checkpoints(self) -> list[Path]:
        folders = (path for path in (self.folder / "checkpoints").glob("*") if path.name.isdecimal())
        return sorted(folders, key=lambda path: int(path.name))

    def _newest(self) -> Path | None:
        return next(reversed(self._checkpoints()), None)

    def _save(self) -> None:
        """By the main process alone: the others hold the same, and random numbers have no state (see `draws`)."""
        if self.accelerator.is_main_process:
            folder = self.folder / "checkpoints" / f"{self.step:07d}"
            write_whole(folder, lambda partial: write_state(partial, self._tensors(), self._numbers()), TORCH)
            for old in self._checkpoints()[: -self.settings.keep]:
                remove(old)

    def _tensors(self) -> dict[str, Tensor]:
        """Of each parameter: its weights, their average, and what the optimiser keeps of it."""
        tensors = {f"weights.{name}": parameter for name, parameter in self.parameters.items()}
        tensors |= {f"average.{name}": weights for name, weights in self.average.weights.items()}
        state = self.optimizer.optimizer.state
        return tensors | {f"{moment}.{name}": state[parameter][moment]
                          for name, parameter in self.parameters.items() if parameter in state for moment in MOMENTS}

    def _numbers(self) -> dict[str, float]:
        scaler = self.accelerator.scaler
        scale = scaler.state_dict() if scaler is not None else {}
        return {"step": self.step, "taken": self.taken, "seconds": self.seconds} | {
            name: scale[name] for name in SCALER if name in scale}

    def _load(self) -> None:
        """Go on from the newest checkpoint that is whole."""
        checkpoints = self._checkpoints()
        for folder in reversed(checkpoints):
            try:
                self._go_on_from(folder)
            except TrainingError as error:
                self.accelerator.print(f"The checkpoint {folder} cannot be used: {error}.")
            else:
                self.accelerator.print(f"Going on from {folder}.")
                return
        if checkpoints:
            raise TrainingError(f"No checkpoint in '{self.folder / 'checkpoints'}' can be used: remove that folder to "
                                "begin from the start, or use another out.")

    def _go_on_from(self, folder: Path) -> None:
        """Raises TrainingError, a few words, before anything is changed if the checkpoint is not whole."""
        tensors, numbers = read_state(folder)
        step, taken, seconds = (number(numbers, name, kind) for name, kind in
                                (("step", int), ("taken", int), ("seconds", float)))
        if step != int(folder.name):
            raise TrainingError(f"it says that it is of step {step}")
        scaler, optimizer, moments = self.accelerator.scaler, self.optimizer.optimizer, {}
        scale = {} if scaler is None else {name: number(numbers, name, float) for name in SCALER}
        for i, (name, parameter) in enumerate(self.parameters.items()):
            check_like(tensors, {f"{kind}.{name}": parameter for kind in ("weights", "average")})
            if f"{MOMENTS[0]}.{name}" in tensors:  # not of what never had a gradient
                check_like(tensors, {f"{moment}.{name}": parameter for moment in MOMENTS[:2]}
                           | {f"{MOMENTS[2]}.{name}": torch.zeros(())})
                # Copies: a view of the file would keep Windows from removing the checkpoint later
                moments[i] = {moment: tensors[f"{moment}.{name}"].clone() for moment in MOMENTS}
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weights.{name}"])
                self.average.weights[name].copy_(tensors[f"average.{name}"])
        if scaler is not None:
            scaler.load_state_dict(scaler.state_dict() | scale)
        self.step, self.taken, self.seconds = step, taken, seconds
