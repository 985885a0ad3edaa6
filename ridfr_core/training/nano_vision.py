"""The nano CLIP-vision network: a ViT in CLIP's format that learnt portraits by filling in what was hidden.

It is self-supervised (masked autoencoding), so its features carry everything a portrait shows: pose, expression,
make-up and light as well as identity, as CLIP's do. Suppressing the former is what Alignment Learning is for.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..faces import ARCFACE_TEMPLATE, similarity_transform, warp
from ..nano.config import CLIP_VISION
from .clip_vision import normalise
from .loop import Recipe, Run
from .portrait_data import PortraitSet

RECIPE = Recipe(steps=3000, batch=64, lr=1e-3)
KEPT = 0.3  # share of the patches that the encoder sees


def build() -> nn.Module:
    """An untrained transformers CLIPVisionModelWithProjection of the nano dimensions."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP_VISION))


class MaskedAutoencoder(nn.Module):
    """CLIP's vision tower over the visible patches, and a light decoder which is thrown away."""

    def __init__(self):
        super().__init__()
        width, self.patch = CLIP_VISION["hidden_size"], CLIP_VISION["patch_size"]
        self.size = CLIP_VISION["image_size"]
        self.patches = (self.size // self.patch) ** 2
        self.tower = build()
        self.hidden = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, self.patches, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.pixels = nn.Linear(width, 3 * self.patch**2)

    def forward(self, images: Tensor, order: Tensor) -> Tensor:
        """Mean squared error over the hidden patches. images [B,3,H,W]; order: a permutation of the patches [B,P]."""
        kept = int(self.patches * KEPT)
        seen = order[:, :kept]
        vision = self.tower.vision_model
        tokens = vision.embeddings(images)
        width = tokens.shape[-1]
        visible = tokens[:, 1:].gather(1, seen[..., None].expand(-1, -1, width))
        encoded = vision.encoder(inputs_embeds=vision.pre_layrnorm(torch.cat([tokens[:, :1], visible], 1)))
        # the pooled and projected class token joins in, so that the projection learns too
        encoded = encoded.last_hidden_state
        pooled = self.tower.visual_projection(vision.post_layernorm(encoded[:, 0]))
        full = self.hidden.expand(len(images), self.patches, -1)
        full = full.scatter(1, seen[..., None].expand(-1, -1, width), encoded[:, 1:].to(full.dtype))
        full = self.decoder(full + self.places + pooled[:, None])
        target = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        target = target.gather(1, order[:, kept:, None].expand(-1, -1, target.shape[-1]))
        guess = self.pixels(full).gather(1, order[:, kept:, None].expand(-1, -1, target.shape[-1]))
        return F.mse_loss(guess.float(), target)


def train(run_folder, portraits: PortraitSet, recipe: Recipe = RECIPE) -> nn.Module:
    """Masked autoencoding of aligned crops; returns the vision tower."""
    torch.manual_seed(recipe.seed)
    net = MaskedAutoencoder()
    matrices = similarity_transform(portraits.landmarks, ARCFACE_TEMPLATE * (CLIP_VISION["image_size"] / 112))

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(portraits), (recipe.batch,), generator=generator)
        order = torch.rand(recipe.batch, net.patches, generator=generator).argsort(1)
        with torch.autocast("cpu", torch.bfloat16):
            crops = warp(portraits.batch(rows), matrices[rows], net.size)
            return net(normalise(crops, net.size), order)

    Run(run_folder, "vision", net, recipe).train(loss)
    return net.tower.requires_grad_(False).eval()
