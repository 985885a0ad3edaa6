"""A training run that can be killed at any moment and goes on where it was."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..randomness import generator
from .files import TORCH, append, write_whole
from .settings import TrainingError


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a network learns.

    The learning rate rises for `warmup` steps, stays, and falls to a twentieth along a cosine over the last
    `cooldown` share of the steps. `ema` is the decay of the averaged weights, which are the ones that are kept.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    cooldown: float = 0.4
    ema: float = 0.999
    weight_decay: float = 0.01
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate at `step`."""
        into_cooldown = (step / self.steps - (1 - self.cooldown)) / self.cooldown
        fall = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(max(into_cooldown, 0.0), 1.0)))
        return self.lr * min(1.0, (step + 1) / self.warmup) * fall

    def generator(self, step: int) -> torch.Generator:
        """The random numbers of one step, the same whether or not the run was interrupted before it."""
        return generator(self.seed, step)


class Run:
    """Trains `module` by `loss(step, generator)`, with checkpoints in `folder/name.pt` and a log beside it.

    loss returns a scalar to minimise, or (scalar, {name: float}) to log more. After `train()` the module holds the
    averaged weights; `history` is a list of {"step", "loss", "seconds", ...}.
    """

    save_every = 120.0  # seconds

    def __init__(self, folder: Path, name: str, module: nn.Module, recipe: Recipe):
        self.path, self.log = folder / f"{name}.pt", folder / f"{name}.jsonl"
        self.name, self.module, self.recipe = name, module, recipe
        self.parameters = {k: p for k, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.99)
        )
        self.ema = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.step, self.seconds, self.history = 0, 0.0, []
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._load()

    def train(self, loss: Callable[[int, torch.Generator], Tensor | tuple[Tensor, dict]], log_every: int = 50):
        """Take the steps that are left, then put the averaged weights into the module."""
        began, saved = time.monotonic() - self.seconds, time.monotonic()
        running, count = 0.0, 0
        while self.step < self.recipe.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.rate(self.step)
            value = loss(self.step, self.recipe.generator(self.step))
            value, extra = value if isinstance(value, tuple) else (value, {})
            self._descend(value)
            self.step += 1
            running, count = running + value.item(), count + 1
            self.seconds = time.monotonic() - began
            if self.step % log_every == 0 or self.step == self.recipe.steps:
                self._note({"step": self.step, "loss": running / count, "seconds": round(self.seconds, 1), **extra})
                running, count = 0.0, 0
            if time.monotonic() - saved > self.save_every or self.step == self.recipe.steps:
                self.save()
                saved = time.monotonic()
        self.module.load_state_dict(self.ema, strict=False)

    def _descend(self, value: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        if not (value.isfinite() and norm.isfinite()):
            last = self.path if self.path.exists() else "none"
            raise TrainingError(f"{self.name}: the loss is {value.item()} and the gradient {norm.item()} at step "
                                f"{self.step}, with the learning rate {self.recipe.rate(self.step):g}; the last good "
                                f"checkpoint is {last}: go on from it with a lower lr in the recipe.")
        self.optimizer.step()
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        names = list(self.parameters)
        torch._foreach_lerp_([self.ema[k] for k in names], [self.parameters[k].detach() for k in names], 1 - decay)

    def _note(self, row: dict) -> None:
        self.history.append(row)
        append(self.log, json.dumps(row) + "\n")
        left = (self.recipe.steps - self.step) * row["seconds"] / self.step
        loss, steps = row["loss"], self.recipe.steps
        print(f"{self.name} {self.step}/{steps} loss {loss:.5f}, {left / 60:.0f} min left", flush=True)

    def save(self) -> None:
        """Write the checkpoint; the one before survives a crash or a full disk in the middle of it."""
        state = {
            "step": self.step, "seconds": self.seconds, "history": self.history, "ema": self.ema,
            "module": {k: p.detach() for k, p in self.parameters.items()}, "optimizer": self.optimizer.state_dict(),
        }
        write_whole(self.path, lambda partial: torch.save(state, partial), TORCH)

    def _load(self) -> None:
        """Raises TrainingError where the checkpoint is damaged or of another network; code in it never runs."""
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
            self.module.load_state_dict(state["module"], strict=False)
            if state["optimizer"]:
                self.optimizer.load_state_dict(state["optimizer"])
            self.ema |= state["ema"]
        except Exception as error:  # of almost every kind, by the place of the damage
            raise TrainingError(f"'{self.path}' is not a checkpoint of {self.name}, or a damaged one: remove it to "
                                f"train {self.name} from the start.") from error
