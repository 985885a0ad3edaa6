"""The diffusion loss (RIDFR Eq. 2, Eq. 5), Alignment Learning's (Eq. 4, 6), and the prediction they compare."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..content import ContentSpec


@dataclass(frozen=True)
class Noised:
    """Latents on their way to noise: z_t [B,4,h,w], t [B], and the target the UNet should predict, [B,4,h,w]."""

    z: Tensor
    t: Tensor
    target: Tensor

    @classmethod
    def of(cls, latents: Tensor, noise: Tensor, t: Tensor, schedule) -> "Noised":
        """schedule: a diffusers DDPMScheduler; its prediction type says what the target is: the noise, or v."""
        z = schedule.add_noise(latents, noise, t)
        velocity = schedule.config.prediction_type == "v_prediction"
        return cls(z, t, schedule.get_velocity(latents, noise, t) if velocity else noise)

    @classmethod
    def draw(cls, latents: Tensor, schedule, generator: torch.Generator) -> "Noised":
        """With random noise and t."""
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.randint(schedule.config.num_train_timesteps, (len(latents),), generator=generator)
        return cls.of(latents, noise, t, schedule)

    def repeat(self, times: int) -> "Noised":
        """The same noised latents several times over."""
        return Noised(*(torch.cat([x] * times) for x in (self.z, self.t, self.target)))


def control(content: nn.Module, noised: Noised, lq: Tensor, context: Tensor, spec: ContentSpec) -> dict:
    """What the content module adds to the UNet, as its keyword arguments.

    lq: [B,C,h,w], prepared for concatenation. context: text tokens [B,T,D].
    """
    down, mid = content(spec.concat(noised.z, lq), noised.t, context, torch.zeros(()), return_dict=False)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def repeated(residuals: dict, times: int) -> dict:
    """What `control` gave, several times over: the content module does not see the reference."""
    down, mid = residuals["down_block_additional_residuals"], residuals["mid_block_additional_residual"]
    return {"down_block_additional_residuals": [torch.cat([one] * times) for one in down],
            "mid_block_additional_residual": torch.cat([mid] * times)}


def predict(unet: nn.Module, noised: Noised, context: Tensor, residuals: dict | None = None, identity=None) -> Tensor:
    """The UNet's prediction [B,4,h,w]; identity: (K', V') of each layer (see `networks.IdentityAttention`)."""
    kwargs = {} if identity is None else {"identity": identity}
    return unet(noised.z, noised.t, context, cross_attention_kwargs=kwargs, **(residuals or {})).sample


def error(guess: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean squared error of predictions [B,4,h,w], weighted by the places' weights [B,1,h,w]."""
    return (weight * (guess.float() - target).square()).mean()


def misalignment(guess: Tensor) -> Tensor:
    """RIDFR Eq. 4: mean squared difference of predictions [2B,4,h,w], the first half made with one reference of each
    person, the second half with another. Taken between what the network predicts, be it the noise or v."""
    first, second = guess.float().chunk(2)
    return F.mse_loss(first, second)
