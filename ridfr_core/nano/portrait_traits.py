"""What a portrait is drawn from: the identity's traits and the view's nuisances, hashed from integer seeds."""

from types import SimpleNamespace

import torch

TRAITS = (
    "skull_width", "skull_height", "face_length", "jaw_width", "jaw_square", "chin_width", "chin_out",
    "cheekbone", "cheek_hollow", "brow_ridge", "skin_tone", "skin_hue", "eye_spacing", "eye_size", "eye_aspect",
    "eye_tilt", "eye_depth", "lid_fold", "eye_bag", "iris_hue", "iris_light", "iris_size", "brow_thickness",
    "brow_arch", "brow_height", "brow_spacing", "brow_angle", "brow_length", "brow_dark", "nose_length",
    "nose_width", "nose_bridge", "nose_height", "nose_tip", "nostril", "mouth_width", "upper_lip", "lower_lip",
    "mouth_height", "cupid", "lip_tone", "ear_size", "ear_out", "ear_height", "hairline", "widow_peak",
    "freckles", "nasolabial", "forehead_lines", "chin_cleft", "mole1_x", "mole1_y", "mole1_size", "mole2_x",
    "mole2_y", "mole2_size", "mole3_x", "mole3_y", "mole3_size",
)

NUISANCES = (
    "yaw", "pitch", "roll", "shift_x", "shift_y", "zoom", "smile", "mouth_open", "brow_raise", "frown",
    "squint", "gaze_x", "gaze_y", "lipstick", "lipstick_hue", "blush", "eye_shadow", "eye_shadow_hue",
    "stubble", "glasses", "glasses_width", "glasses_round", "glasses_dark", "hair_length", "hair_volume",
    "hair_fringe", "hair_part", "hair_wave", "hair_flare", "hair_hue", "hair_light", "hair_phase", "light_x",
    "light_y", "light_hue", "light_colour", "light_power", "rim_hue", "rim_power", "fill", "back_hue",
    "back_hue2", "back_light", "back_light2", "back_angle", "back_shape_x", "back_shape_y", "back_shape_size",
    "clothes_hue", "clothes_light", "collar",
)


def _signed64(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed64(0x9E3779B97F4A7C15)
_MIX1 = _signed64(0xBF58476D1CE4E5B9)
_MIX2 = _signed64(0x94D049BB133111EB)


def splitmix64(state: torch.Tensor) -> torch.Tensor:
    """Finaliser of SplitMix64 (Steele, Lea & Flood 2014) on int64 tensors of any shape; arithmetic wraps."""
    def shift(x, bits):  # logical right shift: torch's is arithmetic
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    state = state + _GOLDEN
    state = (state ^ shift(state, 30)) * _MIX1
    state = (state ^ shift(state, 27)) * _MIX2
    return state ^ shift(state, 31)


def uniform(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Counter-based uniforms in [-1, 1): int64 keys [B] -> float32 [B, count]."""
    counters = torch.arange(1, count + 1, device=keys.device) * _GOLDEN
    bits = splitmix64(keys[:, None] + counters) >> 40  # 24 signed bits: exact in float32
    return bits.float() / (1 << 23)


def identity_keys(identities: torch.Tensor) -> torch.Tensor:
    return splitmix64(splitmix64(identities.long()) ^ 0x1D)


def view_keys(identities: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
    return splitmix64(splitmix64(identities.long() ^ 0x7E57) + splitmix64(views.long()))


def named(names, values: torch.Tensor) -> SimpleNamespace:
    """Columns of values [B, len(names)] as attributes of shape [B, 1, 1]."""
    return SimpleNamespace(**{name: values[:, i, None, None] for i, name in enumerate(names)})
