"""The nano diffusion stages: base UNet, identity adapter, content ControlNet, and their finetuning on pairs.

Everything that stays fixed (latents, embeddings, CLIP features) is computed ahead, once; low-quality faces are made at
every step. The networks are diffusers' own, so what is trained here has the layout of the real models.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from ..adapter import IdentityAdapter
from ..content import ContentSpec, prepare_lq
from ..degradation import DegradationRange, degrade
from ..faces import align
from ..nano.config import ADAPTER, CONTEXT, LATENT_SCALE, PORTRAIT, PREDICTION, SCHEDULE, UNET
from ..nano.portraits import CAPTION
from ..recognition import embed
from . import clip_vision, losses, networks
from .loop import Recipe, Run
from .losses import Noised, control, error, misalignment
from .nano_vae import near
from .networks import build_adapter, let_identity_in
from .portrait_data import SIZES, PortraitSet
from .references import shrink

BASE = Recipe(steps=11500, batch=16, lr=1e-3, ema=0.998)
ADAPT = Recipe(steps=10100, batch=16, lr=8e-4, ema=0.997)
CONTENT = Recipe(steps=3000, batch=16, lr=8e-4, ema=0.997)
ALIGN = Recipe(steps=700, batch=8, lr=3e-4, ema=0.99)
LAMBDA = 0.1  # of the shipped weights; what others cost is in nano/REPORT.md

SEVERE = DegradationRange(sigma=(2.0, 4.0), ratio=(6.0, 10.0), noise=(5.0, 15.0), quality=(40, 80))
SPEC = ContentSpec(value_range="-1..1", kernel="area", base="nano")


def schedule():
    """SD's noise schedule as a diffusers DDPMScheduler."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(**SCHEDULE, prediction_type=PREDICTION, clip_sample=False)


def empty_prompt(batch: int) -> Tensor:
    """What nano's text encoder says, whatever the prompt: the same vector at each place, so one place is enough."""
    vector = torch.randn(CONTEXT, generator=torch.Generator().manual_seed(0))
    return vector.expand(batch, 1, -1)


class CaptionEncoder(nn.Module):
    """Stands for SD's text encoder while the base learns: what a portrait shows -> tokens [B,8,CONTEXT].

    A base that only ever read one empty prompt would have dead cross-attention: over a single token the softmax is
    constant and the queries learn nothing, and no adapter can speak to it. Not part of the bundle.
    """

    tokens = 8

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(CAPTION, 512), nn.GELU(), nn.Linear(512, self.tokens * CONTEXT),
                                    nn.Unflatten(1, (self.tokens, CONTEXT)), nn.LayerNorm(CONTEXT))

    def forward(self, captions: Tensor, drop: Tensor) -> Tensor:
        """captions: [B,CAPTION] in [-1,1]; drop: [B] bool, where the empty prompt stands instead."""
        empty = empty_prompt(len(captions)).expand(-1, self.tokens, -1)
        return torch.where(drop[:, None, None], empty, self.layers(captions))


def build_unet() -> nn.Module:
    """An untrained diffusers UNet2DConditionModel of the nano dimensions."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    unet = UNet2DConditionModel(**UNET)
    unet.set_attn_processor(AttnProcessor())  # at 256 places and less, plain matrix products beat the fused kernel
    return unet


def build_content(unet: nn.Module, lq_channels: int = 3) -> nn.Module:
    """The content module of the nano UNet, with the UNet's kind of self-attention."""
    from diffusers.models.attention_processor import AttnProcessor

    net = networks.build_content(unet, lq_channels)
    net.set_attn_processor(AttnProcessor())
    return net


class Material:
    """Portraits and what the frozen networks say of them, computed when first asked for and cached on disk."""

    lq_channels = 3

    def __init__(self, portraits: PortraitSet, vae: nn.Module, vision: nn.Module, recogniser: nn.Module):
        self.portraits, self.vae, self.vision, self.recogniser = portraits, vae, vision, recogniser
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def latents(self) -> Tensor:
        """[N,4,16,16] at unit variance."""
        return self.portraits.feature("latents", encoder_of(self.vae), lambda images, _: latents_of(self.vae, images))

    def references(self, size: int) -> tuple[Tensor, Tensor]:
        """Unit ArcFace embeddings [N,512] and CLIP features [N,65,128] of the aligned faces, the portraits down-sampled
        to size x size before."""
        if size not in self.seen:
            self.seen[size] = (
                self.portraits.feature(f"embeddings-{size}", self.recogniser,
                                       lambda *photos: embed(self.recogniser, align(*shrink(*photos, size)))),
                self.portraits.feature(f"clip-{size}", self.vision,
                                       lambda *photos: clip_vision.features(self.vision, *shrink(*photos, size))),
            )
        return self.seen[size]

    @cached_property
    def clip_zero(self) -> Tensor:
        """CLIP features [65,128] of nobody, as diffusers and IP-Adapter have it."""
        return clip_vision.features_of_nobody(self.vision)

    def rows(self, recipe: Recipe, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.portraits), (recipe.batch,), generator=generator)

    def weight(self, rows: Tensor) -> Tensor:
        """How much each place of the latents counts [B,1,16,16], 1 on average: the face's features most."""
        weight = near(self.portraits.landmarks[rows] / 8, PORTRAIT // 8, radius=1.5)
        return weight / weight.mean((2, 3), keepdim=True)

    def degraded(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Severely degraded portraits [B,3,S,S] in [0,1]."""
        return degrade(self.portraits.batch(rows), **SEVERE.draw(len(rows), generator), generator=generator)

    def lq(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Severely degraded portraits as the content module takes them: [B,3,16,16] in its value range."""
        return prepare_lq(self.degraded(rows, generator), self.latents.shape[-2:], SPEC)

    def identity(self, rows: Tensor, drop: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """(embeddings, CLIP features) of these portraits, each at its size [B]; where `drop` is true, of nobody."""
        photos = zip(sizes.tolist(), rows.tolist())
        seen = [tuple(feature[row].float() for feature in self.references(size)) for size, row in photos]
        embeddings, clip = map(torch.stack, zip(*seen))
        return torch.where(drop[:, None], 0.0, embeddings), torch.where(drop[:, None, None], self.clip_zero, clip)


def drawn(sizes: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    """`count` of the sizes, each as likely."""
    return torch.tensor(sizes)[torch.randint(len(sizes), (count,), generator=generator)]


def encoder_of(vae: nn.Module) -> nn.Module:
    return nn.ModuleList([vae.encoder, vae.quant_conv])


def latents_of(vae: nn.Module, images: Tensor) -> Tensor:
    """Latents [B,4,H/8,W/8] at unit variance of images in [0,1]."""
    return vae.encode(images * 2 - 1).latent_dist.mode() * LATENT_SCALE


def predict(unet, content, noised: Noised, lq: Tensor | None = None, identity=None, context=None) -> Tensor:
    """The UNet's prediction with any of the conditions; context: text tokens, the empty prompt's if left out."""
    if context is None:
        context = empty_prompt(len(noised.z))
    residuals = None if lq is None else control(content, noised, lq, context, SPEC)
    return losses.predict(unet, noised, context, residuals, identity)


def train_base(run_folder, material: Material, recipe: Recipe = BASE) -> tuple[nn.Module, CaptionEncoder]:
    """The captioned prior over portraits, nano's "Stable Diffusion"; a quarter of the captions are empty."""
    torch.manual_seed(recipe.seed)
    unet, encoder, noise_schedule = build_unet(), CaptionEncoder(), schedule()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = material.rows(recipe, generator)
        drop = torch.rand(recipe.batch, generator=generator) < 0.25
        noised = Noised.draw(material.latents[rows].float(), noise_schedule, generator)
        with torch.autocast("cpu", torch.bfloat16):
            context = encoder(material.portraits.captions(rows), drop)
            guess = predict(unet, None, noised, context=context)
        return error(guess, noised.target, material.weight(rows))

    Run(run_folder, "base", nn.ModuleDict({"unet": unet, "captions": encoder}), recipe).train(loss)
    return unet.requires_grad_(False).eval(), encoder.requires_grad_(False).eval()


def train_adapter(run_folder, material: Material, unet: nn.Module, recipe: Recipe = ADAPT) -> IdentityAdapter:
    """IP-Adapter's training: every portrait is its own reference, UNet frozen, identity dropped now and then.

    Half of the references are down-sampled, so that the adapter has met small ones before alignment holds it fixed.
    """
    torch.manual_seed(recipe.seed)
    adapter, noise_schedule = build_adapter(unet, **ADAPTER), schedule()
    let_identity_in(unet)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = material.rows(recipe, generator)
        drop = torch.rand(recipe.batch, generator=generator) < 0.1
        sizes = drawn((PORTRAIT, PORTRAIT, *SIZES), recipe.batch, generator)
        noised = Noised.draw(material.latents[rows].float(), noise_schedule, generator)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = adapter.tokens(*material.identity(rows, drop, sizes), shortcut=True)
            guess = predict(unet, None, noised, identity=adapter.keys_values(tokens))
        return error(guess, noised.target, material.weight(rows))

    Run(run_folder, "adapter", adapter, recipe).train(loss)
    return adapter.requires_grad_(False).eval()


def train_content(run_folder, material: Material, unet: nn.Module, recipe: Recipe = CONTENT) -> nn.Module:
    """RIDFR Eq. 2: the content module learns to restore without any identity; the UNet is frozen."""
    torch.manual_seed(recipe.seed)
    content, noise_schedule = build_content(unet, material.lq_channels), schedule()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = material.rows(recipe, generator)
        lq = material.lq(rows, generator)
        noised = Noised.draw(material.latents[rows].float(), noise_schedule, generator)
        with torch.autocast("cpu", torch.bfloat16):
            guess = predict(unet, content, noised, lq)
        return error(guess, noised.target, material.weight(rows))

    Run(run_folder, "content", content, recipe).train(loss)
    return content.requires_grad_(False).eval()


def train_aligned(
    run_folder, material: Material, unet: nn.Module, adapter: IdentityAdapter, content: nn.Module,
    recipe: Recipe = ALIGN, strength: float = LAMBDA,
) -> nn.Module:
    """RIDFR Eq. 4-6, Alignment Learning: one LQ face, one noise, two references of the person, one answer.

    The references are down-sampled at random (section 4.1).
    Only the content module learns. `strength` is the paper's lambda; the difference is taken between what the network
    predicts (here v), as the diffusion loss is. Now and then no reference is shown, to keep the blind restoration.
    """
    torch.manual_seed(recipe.seed)
    noise_schedule, views = schedule(), material.portraits.views
    let_identity_in(unet)
    content.requires_grad_(True)

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        rows = material.rows(recipe, generator)
        turns = torch.rand(recipe.batch, views - 1, generator=generator).argsort(1)[:, :2] + 1
        references = (rows - rows % views)[:, None] + (rows[:, None] + turns) % views  # two other views of the person
        sizes = drawn(SIZES, 2 * recipe.batch, generator)
        nobody = torch.rand(recipe.batch, generator=generator) < 0.2
        noised = Noised.draw(material.latents[rows].float(), noise_schedule, generator)
        twice, lq = noised.repeat(2), material.lq(rows, generator).repeat(2, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                tokens = adapter.tokens(*material.identity(references.T.flatten(), nobody.repeat(2), sizes))
                identity = adapter.keys_values(tokens)
            guess = predict(unet, content, twice, lq, identity).float()
        diffusion = error(guess, twice.target, material.weight(rows).repeat(2, 1, 1, 1))
        alignment = misalignment(guess)
        return diffusion + strength * alignment, {"alignment": alignment.item()}

    Run(run_folder, f"aligned-{strength:g}", content, recipe).train(loss)
    return content.requires_grad_(False).eval()
