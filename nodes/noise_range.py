"""`start` and `end` of a node, as stock Apply ControlNet has them: parts of the model's whole noise schedule."""

from dataclasses import dataclass

from torch import Tensor

START = (
    "Where in the model's whole noise schedule {what} sets in, as in Apply ControlNet: 0 is pure noise, 1 the finished "
    "picture. A sampler with denoise 0.7 begins at about 0.3, so all values up to that mean its first step."
)
END = (
    "Where in the model's whole noise schedule {what} stops, as in Apply ControlNet: 0 is pure noise, 1 the finished "
    "picture. A sampler with denoise 0.7 begins at about 0.3, so with less than that {what} does nothing."
)


@dataclass(frozen=True)
class NoiseRange:
    """From `start` to `end`, both in [0,1] and counted like ComfyUI's percent_to_sigma; the first step's is 0."""

    start: float
    end: float

    def sigmas(self, sampling) -> tuple[float, float]:
        """The noise levels (first, last) between which a node acts, both included.

        sampling: the MODEL's `model_sampling`, best asked when the sampler runs, since later nodes may replace it.
        May wait for the device: ask once per run.
        """
        return sampling.percent_to_sigma(self.start), sampling.percent_to_sigma(self.end)

    def count(self, sampling, sigmas: Tensor) -> int:
        """How many steps of a run begin within the range. sigmas: as of `outside`."""
        first, last = self.sigmas(sampling)
        return sum(first >= sigma >= last for sigma in sigmas[:-1].tolist())

    def outside(self, sampling, sigmas: Tensor, what: str) -> str | None:
        """A sentence where no step of a run lies within the range, so that `what` does nothing in it; else None.

        sigmas: the run's noise levels [steps + 1], of which the last is where it ends.
        """
        steps = sigmas[:-1].tolist()
        if not steps or self.count(sampling, sigmas):
            return None
        return (
            f"{what} does nothing in this run: its steps lie between {percent_of(sampling, steps[0]):.2f} and "
            f"{percent_of(sampling, steps[-1]):.2f} of the noise schedule, but start is {self.start:.2f} and end "
            f"{self.end:.2f}."
        )


def percent_of(sampling, sigma: float) -> float:
    """How far down the model's noise schedule a noise level lies, in [0,1]: the opposite of `percent_to_sigma`."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if sampling.percent_to_sigma(middle) > sigma else (low, middle)
    return (low + high) / 2
