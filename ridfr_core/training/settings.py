"""The settings of a training run: a recipe's defaults, a YAML file of one's own, and KEY=VALUE over both."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import yaml

from ..content import CHOICES as CONTENT_CHOICES
from ..errors import RidfrError

RECIPES = Path(__file__).parent / "recipes"
# Neither what is learnt nor the order in which depends on these, so an interrupted run may go on with other values;
# on the photos it does, but by what they are, not by where they lie.
FREE = {"data", "out", "cache", "steps", "accumulate", "gradient_checkpointing", "workers", "save_every", "keep",
        "validate_every"}


class TrainingError(RidfrError):
    """Training cannot start or go on; the message is one sentence a user can act on."""


@dataclass(frozen=True)
class Degradation:
    """Ranges of RIDFR Eq. 7, see `degradation.DegradationRange`."""

    sigma: tuple[float, float]
    ratio: tuple[float, float]
    noise: tuple[float, float]
    quality: tuple[float, float]


@dataclass(frozen=True)
class Settings:
    """What every stage needs; the recipes in `recipes/` say what each key means."""

    data: str
    base: str
    out: str
    cache: str | None
    resolution: int
    steps: int
    batch: int
    accumulate: int
    lr: float
    schedule: str
    warmup: int
    weight_decay: float
    clip: float
    ema: float
    precision: str
    gradient_checkpointing: bool
    seed: int
    workers: int
    save_every: int
    keep: int
    validate_every: int
    validation_images: int


@dataclass(frozen=True)
class ContentSettings(Settings):
    """RIDFR Eq. 2."""

    degradation: Degradation
    validation_steps: int
    kind: str
    value_range: str
    kernel: str


@dataclass(frozen=True)
class IdentitySettings(Settings):
    """Of the stages with references."""

    shortcut: bool
    face_model: str
    clip_vision: str
    reference_sizes: tuple[int, ...]
    drop: float


@dataclass(frozen=True)
class AlignSettings(IdentitySettings):
    """RIDFR Eq. 4-6."""

    degradation: Degradation
    adapter: str
    content: str
    strength: float
    lora: float
    validation_people: int
    validation_steps: int


@dataclass(frozen=True)
class AdapterSettings(IdentitySettings):
    """IP-Adapter's self-reconstruction; a new adapter is made where none is named."""

    adapter: str | None


STAGES = {"content": ContentSettings, "align": AlignSettings, "naive": AlignSettings, "adapter": AdapterSettings}
CHOICES = {
    "kind": ("pixel", "latent"),
    "value_range": CONTENT_CHOICES["value_range"],
    "kernel": CONTENT_CHOICES["kernel"],
    "schedule": ("constant", "cosine"),
    "precision": ("fp32", "bf16", "fp16"),
}
LEAST = {
    "resolution": 64, "steps": 1, "batch": 1, "accumulate": 1, "lr": 0, "warmup": 0, "weight_decay": 0, "clip": 0,
    "ema": 0, "workers": 0, "save_every": 1, "keep": 1, "validate_every": 0, "validation_images": 1,
    "validation_steps": 1, "drop": 0, "strength": 0, "validation_people": 0,
}


def read_settings(stage: str, file: Path | None, overrides: Sequence[str]) -> Settings:
    """Settings of a stage: its recipe, then the YAML `file`, then "key=value" or "group.key=value" strings.

    Raises TrainingError: an unknown key, a value of another type or too small, a key without a value, a file that is
    not YAML.
    """
    values = _parse((RECIPES / f"{stage}.yaml").read_text(encoding="utf-8"), f"{stage}.yaml")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise TrainingError(f"'{file}' cannot be read ({error.strerror}): check the path.") from error
        _merge(values, _parse(text, file.name), file.name)
    for override in overrides:
        key, _, value = override.partition("=")
        *groups, key = key.split(".")
        nested = _parse(f"{key}: {value}", f"'{override}'")
        for group in reversed(groups):
            nested = {group: nested}
        _merge(values, nested, f"'{override}'")
    return _build(STAGES[stage], values, stage)


def _parse(text: str, source: str) -> dict:
    try:
        values = yaml.load(text, _Loader) or {}
    except yaml.YAMLError as error:
        raise TrainingError(f"{source} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise TrainingError(f"{source} must consist of lines 'key: value'.")
    return values


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-4 for text; here it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _merge(values: dict, new: Mapping, source: str) -> None:
    for key, value in new.items():
        if key not in values:
            near = difflib.get_close_matches(str(key), values, n=1, cutoff=0)
            raise TrainingError(f"{source} has the unknown key '{key}'; did you mean '{near[0]}'?")
        if isinstance(values[key], dict):
            if not isinstance(value, Mapping):
                raise TrainingError(f"{source}: '{key}' is a group of keys: {', '.join(values[key])}.")
            _merge(values[key], value, f"{source} in '{key}'")
        else:
            values[key] = value


def _build(kind: type, values: Mapping, stage: str):
    types = get_type_hints(kind)
    return kind(**{field.name: _value(kind, field.name, types[field.name], values[field.name], stage)
                   for field in fields(kind)})


def _value(kind: type, key: str, wanted, value, stage: str):
    if value is None:
        if type(None) in get_args(wanted):
            return None
        raise TrainingError(f"'{key}' is not set: give {key}=... (see `ridfr train {stage} --show`).")
    if wanted is Degradation:
        return _build(Degradation, value, stage)
    if get_origin(wanted) is tuple:
        item, *rest = get_args(wanted)
        fits = isinstance(value, list) and value and (rest == [...] or len(value) == 1 + len(rest))
        if not fits or not all(_is(v, item) for v in value):
            raise TrainingError(f"'{key}' is {value!r}, but must be a list of numbers such as [1, 2].")
        return tuple(item(v) for v in value)
    plain = next(t for t in (bool, int, float, str) if t is wanted or t in get_args(wanted))
    if not _is(value, plain):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise TrainingError(f"'{key}' is {value!r}, but must be {names[plain]}.")
    if value not in CHOICES.get(key, (value,)):
        raise TrainingError(f"'{key}' is '{value}', but must be one of {', '.join(CHOICES[key])}.")
    if key in LEAST and value < LEAST[key]:
        raise TrainingError(f"'{key}' is {value}, but must be at least {LEAST[key]}.")
    return plain(value)


def _is(value, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def changed(settings: Settings, before: Mapping) -> list[str]:
    """What differs from the settings a run began with and matters to it, as "key: old -> new"."""
    free = FREE - {"steps"} if settings.schedule == "cosine" else FREE
    return [f"{key}: {before.get(key)} -> {value}" for key, value in as_yaml(settings).items()
            if key not in free and value != before.get(key)]


def as_yaml(settings: Settings) -> dict:
    """Plain values that YAML can hold."""
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return plain(asdict(settings))
