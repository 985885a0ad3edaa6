"""The same random Stable Diffusion twice: in diffusers, the reference, and in ComfyUI with this pack's nodes.

All layers are there, at a part of the real width: a whole SDXL takes 10 GiB in single precision.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PHOTOS_CLIP = 17  # CLIP tokens of a photo; 257 in ViT-H
SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)  # SD1.5's, SDXL's


@dataclass(frozen=True)
class Size:
    """Dimensions of a base model, and of the adapter that fits it."""

    base: str
    unet: dict
    clip_dim: int = 96
    rank: int = 4

    @property
    def context(self) -> int:
        return self.unet["cross_attention_dim"]


SD15 = Size(
    "SD15",
    dict(block_out_channels=(64, 128, 256, 256), cross_attention_dim=128, attention_head_dim=8),
)
SD15_FULL = Size("SD15", dict(cross_attention_dim=768, attention_head_dim=8), clip_dim=1280, rank=128)
SDXL = Size(
    "SDXL",
    dict(
        block_out_channels=(64, 128, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(1, 2, 4),
        use_linear_projection=True,
        cross_attention_dim=128,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
)


def relative_rms(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of the reference."""
    return ((got.double() - want.double()).square().mean() / want.double().square().mean()).sqrt().item()


def random_like_trained(network: nn.Module) -> nn.Module:
    """As initialised, with each norm's gains and each bias moved too, so that every weight matters."""
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return network.requires_grad_(False).eval()


def diffusers_unet(size: Size) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return random_like_trained(UNet2DConditionModel(sample_size=16, **size.unet))


def comfy_model(weights: dict[str, Tensor], size: Size, dtype: torch.dtype = torch.float32):
    """ComfyUI's MODEL of a UNet in ldm keys; in float32 it shares the tensors."""
    import comfy.model_detection
    import comfy.supported_models
    from comfy.model_patcher import ModelPatcher

    state = {key: weight.to(dtype) for key, weight in weights.items()}
    config = getattr(comfy.supported_models, size.base)(comfy.model_detection.detect_unet_config(state, ""))
    config.set_inference_dtype(dtype, None)
    model = config.get_model(state, "", device="meta")
    model.diffusion_model.load_state_dict(state, assign=True)
    cpu = torch.device("cpu")
    return ModelPatcher(model, load_device=cpu, offload_device=cpu)


def faceid_plus(unet: nn.Module, size: Size) -> dict[str, dict[str, Tensor]]:
    """A random FaceID-Plus checkpoint with its LoRA, as published: ip_adapter_faceid.py of tencent-ailab/IP-Adapter."""
    g = torch.Generator().manual_seed(1)
    dim = size.context

    def linear(out: int, inputs: int) -> Tensor:
        return torch.randn(out, inputs, generator=g) / inputs**0.5

    def affine(name: str, weight: Tensor) -> dict[str, Tensor]:
        return {f"{name}.weight": weight, f"{name}.bias": 0.1 * torch.randn(len(weight), generator=g)}

    def norm(name: str) -> dict[str, Tensor]:
        return affine(name, 1 + 0.1 * torch.randn(dim, generator=g))

    resampler = "perceiver_resampler."
    projection = affine("proj.0", linear(1024, 512)) | affine("proj.2", linear(4 * dim, 1024)) | norm("norm")
    projection |= affine(resampler + "proj_in", linear(dim, size.clip_dim))
    projection |= affine(resampler + "proj_out", linear(dim, dim)) | norm(resampler + "norm_out")
    for i in range(4):
        attention, feed_forward = f"{resampler}layers.{i}.0.", f"{resampler}layers.{i}.1."
        projection |= norm(attention + "norm1") | norm(attention + "norm2") | norm(feed_forward + "0")
        for name, out, inputs in [("to_q", dim, dim), ("to_kv", 2 * dim, dim), ("to_out", dim, dim)]:
            projection[f"{attention}{name}.weight"] = linear(out, inputs)
        projection[feed_forward + "1.weight"] = linear(4 * dim, dim)
        projection[feed_forward + "3.weight"] = linear(dim, 4 * dim)

    layers = {}
    for n, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        parts = {"q": attention.to_q, "k": attention.to_k, "v": attention.to_v, "out": attention.to_out[0]}
        for part, whole in parts.items():
            layers[f"{n}.to_{part}_lora.down.weight"] = linear(size.rank, whole.in_features)
            layers[f"{n}.to_{part}_lora.up.weight"] = 0.3 * linear(whole.out_features, size.rank)
        if ".attn2." in name:
            layers |= {f"{n}.to_{part}_ip.weight": linear(attention.to_k.out_features, dim) for part in "kv"}
    return {"image_proj": projection, "ip_adapter": layers}


def content_controlnet(size: Size) -> nn.Module:
    """RIDFR's content module in diffusers: a ControlNetModel whose input has the LQ's three channels, too."""
    from diffusers import ControlNetModel

    class Content(ControlNetModel):
        def forward(self, sample, timestep, encoder_hidden_states, controlnet_cond, **options):
            lq = F.interpolate(controlnet_cond, size=sample.shape[-2:], mode="bicubic") * 2 - 1
            both = torch.cat([sample, lq], 1)
            return super().forward(both, timestep, encoder_hidden_states, torch.zeros(()), **options)

    torch.manual_seed(4)
    net = Content(in_channels=7, **size.unet)
    net.controlnet_cond_embedding = nn.Identity()  # is handed zeros
    for conv in (*net.controlnet_down_blocks, net.controlnet_mid_block):  # start at zero
        nn.init.normal_(conv.weight, std=0.2 * conv.in_channels**-0.5)
    return random_like_trained(net)


@dataclass
class Photos:
    """What is known of two people from two photos each, and of nobody."""

    embeddings: Tensor  # [people,2,512]
    clip: Tensor  # [people,2,T,D]
    nobody: Tensor  # [T,D]

    @classmethod
    def random(cls, size: Size) -> "Photos":
        g = torch.Generator().manual_seed(2)
        return cls(
            F.normalize(torch.randn(2, 2, 512, generator=g), dim=-1),
            torch.randn(2, 2, PHOTOS_CLIP, size.clip_dim, generator=g),
            torch.randn(PHOTOS_CLIP, size.clip_dim, generator=g),
        )

    def first(self) -> "Photos":
        """The first person alone."""
        return Photos(self.embeddings[:1], self.clip[:1], self.nobody)

    def show(self, unet: nn.Module, cfg: bool) -> Tensor:
        """Give diffusers' projection the CLIP features; returns the embeddings [B,2,512], with cfg nobody's before."""
        embeddings, clip = self.embeddings, self.clip
        if cfg:
            embeddings = torch.cat([torch.zeros_like(embeddings), embeddings])
            clip = torch.cat([self.nobody.expand_as(clip), clip])
        projection = unet.encoder_hid_proj.image_projection_layers[0]
        projection.clip_embeds, projection.shortcut = clip.flatten(0, 1)[:, None], True  # PlusV2
        return embeddings

    def identity(self, core):
        """The pack's Identity."""
        people = tuple(core.Person(e, c, torch.ones(2)) for e, c in zip(self.embeddings, self.clip))
        return core.Identity(people, self.nobody, "digest", torch.zeros(2 * len(people), 3, 112, 112))


@dataclass
class Pair:
    """A base model with an identity adapter in diffusers (`pipe`), and both on their own in ComfyUI.

    weights: of the UNet, in ldm keys.
    """

    size: Size
    weights: dict[str, Tensor]
    photos: Photos
    pipe: object
    model: object
    adapter: object

    @property
    def unet(self) -> nn.Module:
        return self.pipe.unet


def predicted_noise(model, z: Tensor, t: int, positive: list, negative: list, cfg: float) -> Tensor:
    """What ComfyUI's sampling says is the noise in z_t, through the same calls as any sampler makes.

    positive, negative: CONDITIONING.
    """
    import comfy.sample
    from comfy.samplers import KSAMPLER

    def predict(model, x, sigmas, extra_args, callback, disable):
        return (x - model(x, sigmas[:1].expand(len(x)), **extra_args)) / sigmas[0]

    sigma = model.get_model_object("model_sampling").sigmas[t]
    start = model.model.process_latent_out(z * (1 + sigma**2).sqrt())
    sigmas = torch.stack([sigma, torch.zeros(())])
    noise = comfy.sample.sample_custom(
        model, torch.zeros_like(z), cfg, KSAMPLER(predict), sigmas, positive, negative, start, disable_pbar=True
    )
    return model.model.process_latent_in(noise)
