"""ArcFace recognition in torch: one network for embeddings and for their gradients.

insightface publishes its recognisers as ONNX, which cannot be differentiated. `load_iresnet` reads such a file, or the
safetensors copy that `ridfr convert` makes of it, into `IResNet`, the same network written in torch.
Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoints
from .onnx_iresnet import FaceModelError, read_iresnet

CROP_SIZE = 112


class Affine(nn.Module):
    """y = scale * x + shift per channel: a batch norm at inference. x: [B,C] or [B,C,H,W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return x * self.scale.to(x).view(shape) + self.shift.to(x).view(shape)


class Block(nn.Module):
    """Residual block: affine, conv 3x3, PReLU, conv 3x3 (stride); the first of a stage has a 1x1 conv as its skip."""

    def __init__(self, channels_in: int, channels: int, stride: int, operations):
        super().__init__()
        self.norm = Affine(channels_in)
        self.conv1 = operations.Conv2d(channels_in, channels, 3, 1, 1)
        self.act = nn.PReLU(channels)
        self.conv2 = operations.Conv2d(channels, channels, 3, stride, 1)
        self.skip = operations.Conv2d(channels_in, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.act(self.conv1(self.norm(x)))) + self.skip(x)


class IResNet(nn.Module):
    """ArcFace's improved ResNet with its batch norms folded into the convolutions before them.

    `layers` and `widths` count blocks and channels of the four stages: (3,4,14,3) is R50 (buffalo_l), (3,13,30,3) R100
    (antelopev2). `operations` supplies Conv2d and Linear (torch.nn, or ComfyUI's `comfy.ops`).
    Calling it maps crops [B,3,112,112], RGB in [-1,1], aligned to the ArcFace template, to raw embeddings [B,512].
    There is nothing that differs between train and eval mode.
    """

    def __init__(self, layers=(3, 4, 14, 3), widths=(64, 128, 256, 512), embedding: int = 512,
                 operations: ModuleType | type = nn):
        super().__init__()
        self.stem = operations.Conv2d(3, widths[0], 3, 1, 1)
        self.stem_act = nn.PReLU(widths[0])
        blocks, channels_in = [], widths[0]
        for depth, channels in zip(layers, widths):
            for index in range(depth):
                blocks.append(Block(channels_in, channels, 2 if index == 0 else 1, operations))
                channels_in = channels
        self.blocks = nn.Sequential(*blocks)
        self.norm = Affine(channels_in)
        self.linear = operations.Linear(channels_in * (CROP_SIZE // 16) ** 2, embedding)
        self.features = Affine(embedding)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem_act(self.stem(x)))
        return self.features(self.linear(self.norm(x).flatten(1)))


def embed(recogniser: nn.Module, crops: Tensor) -> Tensor:
    """Unit embeddings [B,512] of aligned crops [B,3,112,112], RGB in [0,1]; differentiable where the recogniser is."""
    return F.normalize(recogniser(crops * 2 - 1), dim=-1)


def load_iresnet(path: str | Path, operations: ModuleType | type = nn) -> IResNet:
    """Read an ArcFace IResNet of any depth and width: insightface's ONNX file (w600k_r50, glintr100, ...) or a copy.

    Raises FaceModelError if an ONNX file cannot be parsed or its graph is another network, CheckpointError if a
    safetensors file is damaged or incomplete.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        state, layers, widths = read_iresnet(path)
    else:
        state, _ = checkpoints.read(path)
        checkpoints.expect(state, "recogniser", path.name)
        layers, widths = _stages(state, path.name)
    with torch.device("meta"):
        net = IResNet(layers, widths, embedding=len(state["features.scale"]), operations=operations)
    if path.suffix != ".onnx":
        checkpoints.check_tensors(state, net.state_dict(), "recogniser", path.name)
    elif {key: tensor.shape for key, tensor in state.items()} != {k: w.shape for k, w in net.state_dict().items()}:
        raise FaceModelError(
            f"{path.name} has the layers of an ArcFace IResNet but not its shapes (112x112 input, 3x3 convolutions); "
            "use a recogniser such as buffalo_l's w600k_r50.onnx."
        )
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)


def _stages(state: Mapping[str, Tensor], name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(layers, widths) of an IResNet's state: the first block of a stage has a convolution as its skip."""
    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    firsts = sorted({int(key.split(".")[1]) for key in state if ".skip." in key} | {0})
    telling = [f"blocks.{i}.skip.weight" for i in firsts]
    if missing := [key for key in (*telling, "features.scale") if key not in state]:
        raise checkpoints.lacks(missing, "recogniser", name)
    return tuple(b - a for a, b in zip(firsts, [*firsts[1:], blocks])), tuple(len(state[key]) for key in telling)
