"""The settings of a training run: a recipe's defaults, a YAML file of one's own, and KEY=VALUE over both."""

import difflib
import math
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import yaml

from ..content import CHOICES as CONTENT_CHOICES
from ..errors import RidfrError, in_one_line

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
PATHS = {"data", "base", "out", "cache", "adapter", "content", "face_model", "clip_vision"}
# Of a list, each of its numbers.
LEAST = {
    "resolution": 64, "steps": 1, "batch": 1, "accumulate": 1, "lr": 0, "warmup": 0, "weight_decay": 0, "clip": 0,
    "ema": 0, "seed": 0, "workers": 0, "save_every": 1, "keep": 1, "validate_every": 0, "validation_images": 1,
    "validation_steps": 1, "drop": 0, "strength": 0, "validation_people": 0, "reference_sizes": 8,
}
MANY = 10**9
MOST = {
    "resolution": 4096, "steps": MANY, "batch": MANY, "accumulate": MANY, "warmup": MANY, "ema": 0.999999,
    "seed": 2**63 - 1, "workers": 256, "save_every": MANY, "keep": MANY, "validate_every": MANY,
    "validation_images": MANY, "validation_steps": 1000, "drop": 1, "validation_people": MANY, "reference_sizes": 4096,
}
DEGRADATION = {"sigma": (0, 100), "ratio": (1, 64), "noise": (0, 255), "quality": (1, 100)}
BIGGEST_FILE, DEEPEST = 2**20, 8  # bytes; lists and groups within one another


def read_settings(stage: str, file: Path | None, overrides: Sequence[str]) -> Settings:
    """Settings of a stage: its recipe, then the YAML `file`, then "key=value" or "group.key=value" strings.

    What a key that is text gets on the command line is taken as it stands, whatever YAML would make of it. ~ is the
    home folder in paths.
    Raises TrainingError: an unknown key, a value of another type, out of its range or not finite, a key without a
    value, a file that is not YAML.
    """
    values, kind = read_yaml(RECIPES / f"{stage}.yaml"), STAGES[stage]
    if file is not None:
        _merge(values, read_yaml(file), file.name)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise TrainingError(f"'{override}' is not a setting: write it as key=value.")
        *groups, key = key.split(".")
        text = _wants_text(kind, [*groups, key])
        nested = {key: _text(value) if text else _parse(value, f"'{override}'")}
        for group in reversed(groups):
            nested = {group: nested}
        _merge(values, nested, f"'{override}'")
    return _build(kind, values, stage)


def read_yaml(file: Path) -> dict:
    """The keys and values of a YAML file. Raises TrainingError, which names the file, if it cannot be read."""
    if file.exists() and not file.is_file():
        raise TrainingError(f"'{file}' is not a file: give a YAML file.")
    try:
        if file.stat().st_size > BIGGEST_FILE:
            raise TrainingError(f"'{file}' has more than {BIGGEST_FILE:,} bytes, which settings never have.")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"'{file}' cannot be read ({error.strerror}): check the path.") from error
    except UnicodeDecodeError as error:
        raise TrainingError(f"'{file}' is not UTF-8 text: save it as such.") from error
    values = _parse(text, f"'{file}'")
    if values is not None and not isinstance(values, dict):
        raise TrainingError(f"'{file}' must consist of lines 'key: value'.")
    return values or {}


def _parse(text: str, source: str):
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: !!int x
        raise TrainingError(f"{source} is not valid YAML: {in_one_line(error)}.") from error


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: none of 1.1's dates, times and octal numbers, no yes and no, but 1e-4.

    Settings need no references (a short file of which can mean a huge one) and no deep nesting.
    """

    yaml_implicit_resolvers: dict = {}
    depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references (*name) are not allowed here")
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError("it is nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.YAMLError("a key is given twice")
        return mapping


for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(0|[1-9]\d{0,30})", list("-+0123456789")),
    ("float", r"[-+]?((\.\d+|\d+\.\d*)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf)|\.nan", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _wants_text(kind: type, path: Sequence[str]) -> bool:
    """Whether the setting that this path of groups and a key leads to is text; not if there is none."""
    for key in path:
        kind = get_type_hints(kind).get(key) if isinstance(kind, type) else None
    return kind is str or str in get_args(kind)


def _text(value: str) -> str | None:
    return None if value.strip() in ("", "null") else value.strip()


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
    return kind(**{field.name: _value(field.name, types[field.name], values[field.name], stage)
                   for field in fields(kind)})


def _value(key: str, wanted, value, stage: str):
    if value is None:
        if type(None) in get_args(wanted):
            return None
        raise TrainingError(f"'{key}' is not set: give {key}=... (see `ridfr train {stage} --show`).")
    if wanted is Degradation:
        return _build(Degradation, value, stage)
    if get_origin(wanted) is tuple:
        return _numbers(key, wanted, value)
    plain = next(t for t in (bool, int, float, str) if t is wanted or t in get_args(wanted))
    if not _is(value, plain):
        names = {bool: "true or false", int: "a whole number", float: "a number",
                 str: "text (in a file, put it in quotes)"}
        raise TrainingError(f"'{key}' is {value!r}, but must be {names[plain]}.")
    if value not in CHOICES.get(key, (value,)):
        raise TrainingError(f"'{key}' is '{value}', but must be one of {', '.join(CHOICES[key])}.")
    if plain is str:
        return _path(key, value) if key in PATHS else value
    _check_range(key, value)
    if key == "resolution" and value % 8:
        raise TrainingError(f"'resolution' is {value}, but must be a multiple of 8, as the VAE needs it.")
    return plain(value)


def _numbers(key: str, wanted, value) -> tuple:
    """A list of numbers; of two, which are a range, the first is not the larger."""
    item, *rest = get_args(wanted)
    fits = isinstance(value, list) and value and (rest == [...] or len(value) == 1 + len(rest))
    if not fits or not all(_is(v, item) for v in value):
        raise TrainingError(f"'{key}' is {value!r}, but must be a list of numbers such as [1, 2].")
    for number in value:
        _check_range(key, number)
    if rest != [...] and value[0] > value[1]:
        raise TrainingError(f"'{key}' is {value!r}, but must go from a smaller number to a larger one.")
    return tuple(item(v) for v in value)


def _check_range(key: str, value: float) -> None:
    if not math.isfinite(value):
        raise TrainingError(f"'{key}' is {value}, but must be a finite number.")
    least, most = DEGRADATION.get(key, (LEAST.get(key, -math.inf), MOST.get(key, math.inf)))
    if value < least:
        raise TrainingError(f"'{key}' is {value}, but must be at least {least}.")
    if value > most:
        raise TrainingError(f"'{key}' is {value}, but must be at most {most}.")


def _path(key: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TrainingError(f"'{key}' is {value!r}, which has characters that are not Unicode: rename it.") from error
    if "\0" in value:
        raise TrainingError(f"'{key}' is {value!r}, but no path has a zero byte.")
    return os.path.expanduser(value)


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
