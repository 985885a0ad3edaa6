"""`ridfr train content | align | naive | adapter`: from settings to a weight file that ComfyUI's nodes open."""

from functools import partial
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from ..adapter import IdentityAdapter, find_lora
from ..checkpoints import CheckpointError, check_tensors, expect, read
from ..content import PREFIX, ContentSpec, controlnet_to_ldm, understand
from ..files import sha256
from ..nano import WEIGHTS
from .base import Base, load_base
from .clip_vision import load_tower
from .files import write_whole
from .material import Material, gather, usable_photos
from .networks import build_adapter, build_content, from_ldm, let_identity_in, merge_lora, widths
from .settings import (
    AlignSettings,
    ContentSettings,
    IdentitySettings,
    Settings,
    TrainingError,
    as_yaml,
    changed,
    read_yaml,
)
from .stages import AdapterStage, AlignStage, ContentStage, Frozen
from .trainer import Trainer, accelerator_for
from .validation import Validation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LQ_CHANNELS = {"pixel": 3, "latent": 4}


def run(name: str, settings: Settings) -> Path:
    """Train the stage called `name`, or go on where `settings.out` was left; returns the path of the weights.

    Raises TrainingError, CheckpointError, FaceModelError: one sentence a user can act on.
    """
    from tqdm import tqdm

    accelerator = accelerator_for(settings)
    _check_sizes(settings, accelerator.num_processes)
    with accelerator.main_process_first():  # the others find everything in the cache
        photos = usable_photos(settings, accelerator.print)
    _check_weights(settings)
    identity = {"stage": name, "photos": photos.digest, **_digests(settings)}
    _check_same_run(settings, identity)
    torch.manual_seed(settings.seed)  # of the weights of a new adapter
    tower = load_tower(settings.clip_vision) if isinstance(settings, IdentitySettings) else None
    clip_dim = tower.config.hidden_size if tower is not None else None
    stage = build_stage(settings, load_base(settings.base), clip_dim, accelerator.device)
    with accelerator.main_process_first():
        material = gather(settings, photos, tower, accelerator.device, accelerator.print,
                          lambda batches, **kwargs: tqdm(batches, disable=not accelerator.is_main_process, **kwargs))
    del tower  # ViT-H takes 2.5 GB
    if accelerator.is_main_process:
        _keep_settings(settings, identity, material.people)
    accelerator.print(f"{len(material.train.rows)} photos to train on, {len(material.validation.rows)} for validation.")
    accelerator.init_trackers("tensorboard")
    validation = Validation(accelerator, stage, stage.frozen, material, settings)
    Trainer(accelerator, stage, material.train, settings, validation).train()
    accelerator.end_training()
    path = Path(settings.out) / f"{'adapter' if isinstance(stage, AdapterStage) else 'content'}.safetensors"
    if accelerator.is_main_process:
        export(stage, path, _history(settings, identity, material))
    accelerator.print(f"The weights are in {path}.")
    return path


def build_stage(settings: Settings, base: Base, clip_dim: int | None, device: torch.device | str) -> nn.Module:
    """The stage of these settings with its trained network in fp32 and all others frozen in the run's precision.

    clip_dim: width of the CLIP features, for a new adapter.
    """
    dtype, adapter, spec = DTYPES[settings.precision], None, None
    if isinstance(settings, ContentSettings):
        spec = ContentSpec(settings.value_range, settings.kernel, base=base.name, kind=settings.kind)
        content = build_content(base.unet, LQ_CHANNELS[spec.kind])
    elif isinstance(settings, AlignSettings):
        content, spec = load_content(settings.content, base)
        adapter, lora = load_adapter(settings.adapter)
        check_adapter(adapter, base, clip_dim, settings.adapter)
        merge_lora(base.unet, lora, settings.lora)
    elif settings.adapter is not None:
        adapter, _ = load_adapter(settings.adapter)
        check_adapter(adapter, base, clip_dim, settings.adapter)
    else:
        adapter = build_adapter(base.unet, dim=base.unet.config.cross_attention_dim, clip_dim=clip_dim)
    if not isinstance(settings, ContentSettings):
        let_identity_in(base.unet)
    base = base.to(device, dtype)
    if settings.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    if spec is None:
        return AdapterStage(Frozen(base, shortcut=settings.shortcut), adapter.train())
    if settings.gradient_checkpointing:
        content.enable_gradient_checkpointing()
    if adapter is None:
        return ContentStage(Frozen(base, spec), content.train())
    adapter = adapter.requires_grad_(False).eval().to(device, dtype)
    return AlignStage(Frozen(base, spec, adapter, settings.shortcut), content.train(), settings.strength)


def load_content(where: str, base: Base) -> tuple[nn.Module, ContentSpec]:
    """A content ControlNet as diffusers has it, and how it takes the LQ face; `where`: a file, or "nano".

    Raises CheckpointError: not a content ControlNet, or one of another base.
    """
    path = WEIGHTS / "content_controlnet.safetensors" if where == "nano" else Path(where)
    state, spec = understand(*read(path), path.name)
    if spec.kind not in LQ_CHANNELS:
        raise TrainingError(f"'{path.name}' takes the face as a hint: use one that takes it beside the noisy latent.")
    if spec.base != base.name:
        raise TrainingError(f"'{path.name}' is made for {spec.base}, but the base is {base.name}: use one made for it.")
    content = build_content(base.unet, LQ_CHANNELS[spec.kind])
    check_tensors(state, controlnet_to_ldm(content.state_dict()), "content-controlnet", path.name)
    content.load_state_dict(from_ldm(content, controlnet_to_ldm, state, name=path.name))
    return content, spec


def load_adapter(where: str) -> tuple[IdentityAdapter, dict]:
    """An identity adapter in fp32, and the LoRA in its file or beside it; `where`: a file, or "nano"."""
    path = WEIGHTS / "identity_adapter.safetensors" if where == "nano" else Path(where)
    state, _ = read(path)
    expect(state, "identity-adapter", path.name)
    adapter = IdentityAdapter.from_state_dict({k: v.float() for k, v in state.items()}, name=path.name)
    return adapter, find_lora(path, state)


def check_adapter(adapter: IdentityAdapter, base: Base, clip_dim: int, name: str) -> None:
    """Raises CheckpointError unless an adapter, from the file called `name`, fits the base and CLIP's features."""
    if adapter.channels != widths(base.unet):
        raise CheckpointError(f"The identity adapter '{name}' is made for another base than {base.name} (its layers "
                              "have other widths): use the one that belongs to the base.")
    if adapter.needs_clip and adapter.clip_dim != clip_dim:
        raise CheckpointError(f"The identity adapter '{name}' reads CLIP features of width {adapter.clip_dim}, but the "
                              f"CLIP vision model gives {clip_dim}: use the one that belongs to the adapter, CLIP "
                              "ViT-H/14 for FaceID-Plus.")


def export(stage: nn.Module, path: Path, history: dict[str, str]) -> None:
    """The trained network in half precision, in the layout that Load Content ControlNet or Load Identity Adapter opens.

    history: more metadata, `ridfr.*`.
    """
    if isinstance(stage, AdapterStage):
        tensors, metadata = stage.adapter.state_dict(), history
    else:
        tensors = controlnet_to_ldm(stage.content.state_dict())
        metadata = history | stage.frozen.spec.to_metadata()
    tensors = {key: tensor.detach().half().contiguous().cpu() for key, tensor in tensors.items()}
    if wrong := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise TrainingError(f"'{path}' is not written, since {wrong[0]} has values that half precision cannot hold: "
                            "the training has diverged. Train again with a lower lr.")
    write_whole(path, lambda partial: save_file(tensors, partial, metadata))


def _history(settings: Settings, identity: dict[str, str], material: Material) -> dict[str, str]:
    """Where weights come from: what is needed to make them again."""
    history = {"stage": identity["stage"], "data": material.photos.digest, "photos": len(material.train.rows)}
    kept = ("steps", "batch", "lr", "schedule", "ema", "seed", "resolution")
    history |= {key: getattr(settings, key) for key in kept}
    if isinstance(settings, IdentitySettings):
        history |= {"recogniser": material.face_model.digest, "shortcut": settings.shortcut}
    if isinstance(settings, AlignSettings):
        history["lambda"] = settings.strength
        history |= {f"{key}_file": identity.get(f"{key}_sha256", getattr(settings, key))
                    for key in ("content", "adapter")}
    return {PREFIX + key: str(value) for key, value in history.items()}


def _digests(settings: Settings) -> dict[str, str]:
    """SHA-256 of those weights that training starts from and that are files, by their settings' keys."""
    paths = {key: getattr(settings, key, None) for key in ("base", "content", "adapter", "clip_vision")}
    return {f"{key}_sha256": sha256(path) for key, path in paths.items() if path and Path(path).is_file()}


def _check_sizes(settings: Settings, processes: int) -> None:
    parts = settings.accumulate * processes
    if settings.batch % parts:
        raise TrainingError(f"batch {settings.batch} cannot be shared by {processes} processes in "
                            f"{settings.accumulate} parts each: it must be a multiple of {parts}.")
    if isinstance(settings, IdentitySettings) and max(settings.reference_sizes) > settings.resolution:
        raise TrainingError(f"reference_sizes has {max(settings.reference_sizes)}, but the resolution is "
                            f"{settings.resolution}: leave out what is larger.")


def _check_weights(settings: Settings) -> None:
    """Raises TrainingError if weights are not there, before any are loaded."""
    for key in ("base", "content", "adapter", "face_model", "clip_vision"):
        where = getattr(settings, key, None)
        shipped = where in (None, "nano") or (key == "face_model" and (WEIGHTS / "insightface/models" / where).is_dir())
        if not shipped and not Path(where).exists():
            raise TrainingError(f"'{key}' is '{where}', which does not exist: check the path.")


def _check_same_run(settings: Settings, identity: dict[str, str]) -> None:
    """Raises TrainingError if `out` holds a run with other settings, weights or photos."""
    path = Path(settings.out) / "settings.yaml"
    if path.exists():
        try:
            before = read_yaml(path)
        except TrainingError as error:
            raise TrainingError(f"What the run in '{settings.out}' began with is not known, since {error} Use another "
                                "out, or remove this one.") from error
        different = [f"{key}: {before.get(key)} -> {now}" for key, now in identity.items() if before.get(key) != now]
        different += changed(settings, before)
        if different:
            raise TrainingError(f"'{settings.out}' holds a run with other settings ({'; '.join(different)}): use the "
                                "same ones to go on with it, or another out.")


def _keep_settings(settings: Settings, identity: dict[str, str], people: list[str]) -> None:
    """Those that the run began with, and who is kept apart."""
    kept = {"settings.yaml": identity | as_yaml(settings)}
    if people:
        kept["split.yaml"] = {"validation_people": people}
    for name, values in kept.items():
        path, text = Path(settings.out) / name, yaml.safe_dump(values, sort_keys=False)
        if not path.exists():
            write_whole(path, partial(Path.write_text, data=text, encoding="utf-8"))
