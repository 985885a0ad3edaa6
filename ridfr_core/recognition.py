"""Face recognition in torch: one network for embeddings and for their gradients.

insightface publishes its recognisers as ONNX. `load_iresnet` reads an ArcFace file, or the safetensors copy that
`ridfr convert` makes of it, into `IResNet`, the same network written in torch; `GraphRecogniser` is any other one.
Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoints
from .onnx_file import FaceModelError, Graph, read_graph
from .onnx_iresnet import read_iresnet
from .onnx_network import OnnxNetwork, RuntimeNetwork, torch_or_onnxruntime

CROP_SIZE = 112
WIDEST = 2**16  # channels of a layer: nothing larger is taken for an IResNet


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
        self.width = embedding

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem_act(self.stem(x)))
        return self.features(self.linear(self.norm(x).flatten(1)))


class GraphRecogniser(nn.Module):
    """A recogniser of another design (MobileFaceNet, ...), as its ONNX graph says: called like IResNet.

    width: numbers in an embedding.
    """

    def __init__(self, network: nn.Module, graph: Graph, bgr: bool = False):
        """network: runs the graph. bgr: swap red and blue before the network sees them."""
        super().__init__()
        self.network, self.bgr, self.bytes = network, bgr, _scales_itself(graph)
        self.width = network.try_out((1, 3, CROP_SIZE, CROP_SIZE))[0].numel()
        self.one_by_one = not self._takes_several(next(iter(graph.inputs.values()))[0])

    def _takes_several(self, batch: int | None) -> bool:
        """Many files are made for one crop at a time. batch: how many the file says; torch need not go by it."""
        try:
            found = self.network.try_out((2, 3, CROP_SIZE, CROP_SIZE))[0].flatten(1)
            return found.shape == (2, self.width)
        except FaceModelError:
            return False

    def forward(self, x: Tensor) -> Tensor:
        """Crops [B,3,112,112], RGB in [-1,1] -> raw embeddings [B,width]."""
        x = x.flip(1) if self.bgr else x
        x = (x + 1) * 127.5 if self.bytes else x
        parts = x.split(1) if self.one_by_one else [x]
        return torch.cat([self.network(part)[0].flatten(1) for part in parts])


class OnnxRecogniser(GraphRecogniser):
    """A recogniser that only onnxruntime runs: on the processor, without gradients."""

    def __init__(self, path: str | Path, bgr: bool = False):
        """Raises FaceModelError for a damaged file, ImportError without onnxruntime, onnxruntime's own errors."""
        super().__init__(RuntimeNetwork(path), read_graph(path, weights=False), bgr)

    def _takes_several(self, batch: int | None) -> bool:
        return batch is None


def _scales_itself(graph: Graph) -> bool:
    """Whether the network wants 0..255: insightface tells MXNet's exports by the names of their first operators."""
    first = [node.name for node in graph.nodes[:8]]
    return all(any(name.startswith(kinds) for name in first) for kinds in (("Sub", "_minus"), ("Mul", "_mul")))


def embed(recogniser: nn.Module, crops: Tensor) -> Tensor:
    """Unit embeddings [B,width] of aligned crops [B,3,112,112], RGB in [0,1]; differentiable if the recogniser is."""
    return F.normalize(recogniser(crops * 2 - 1), dim=-1)


def load_recogniser(path: str | Path, operations: ModuleType | type = nn, bgr: bool = False) -> nn.Module:
    """IResNet, or GraphRecogniser for an ONNX file of another design, or else OnnxRecogniser.

    bgr: it sees red and blue swapped.

    Raises FaceModelError, CheckpointError as of `load_iresnet`, FaceModelError where nothing runs it.
    """
    path = Path(path)
    if path.suffix.lower() != ".onnx":
        net = load_iresnet(path, operations)
    else:
        graph = read_graph(path)
        try:
            net = _iresnet(*read_iresnet(graph), path.name, operations)
        except FaceModelError:  # a whole ONNX file, but of another network
            return torch_or_onnxruntime(lambda: GraphRecogniser(OnnxNetwork(graph), graph, bgr),
                                        lambda: OnnxRecogniser(path, bgr))
    if bgr:  # the first layer's weights swapped see what the pixels swapped would show, gradients included
        net.stem.weight.copy_(net.stem.weight.flip(1))
    return net


def load_iresnet(path: str | Path, operations: ModuleType | type = nn) -> IResNet:
    """Read an ArcFace IResNet of any depth and width: insightface's ONNX file (w600k_r50, glintr100, ...) or a copy.

    Raises FaceModelError if an ONNX file cannot be read or its graph is another network, CheckpointError if a
    safetensors file is damaged or incomplete.
    """
    path = Path(path)
    if path.suffix.lower() == ".onnx":
        return _iresnet(*read_iresnet(read_graph(path)), path.name, operations)
    state, _ = checkpoints.read(path)
    checkpoints.expect(state, "recogniser", path.name)
    for key, tensor in state.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise checkpoints.CheckpointError(
                f"'{path.name}' has weights in {key} that are not fractions, or are NaN or infinite: convert "
                "insightface's ONNX file again with `ridfr convert`."
            )
    state = {key: tensor.float() for key, tensor in state.items()}
    return _iresnet(state, *_stages(state, path.name), path.name, operations, copy=True)


def _iresnet(state: dict[str, Tensor], layers: Sequence[int], widths: Sequence[int], name: str,
             operations: ModuleType | type = nn, copy: bool = False) -> IResNet:
    """The network with these weights; copy: they are from a file that says by itself that it is an IResNet."""
    with torch.device("meta"):
        net = IResNet(layers, widths, embedding=len(state["features.scale"]), operations=operations)
    if copy:
        checkpoints.check_tensors(state, net.state_dict(), "recogniser", name)
    elif {key: tensor.shape for key, tensor in state.items()} != {k: w.shape for k, w in net.state_dict().items()}:
        raise FaceModelError(
            f"{name} has the layers of an ArcFace IResNet but not its shapes (112x112 input, 3x3 convolutions); "
            "use a recogniser such as buffalo_l's w600k_r50.onnx."
        )
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)


def _stages(state: Mapping[str, Tensor], name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(layers, widths) of an IResNet's state: the first block of a stage has a convolution as its skip.

    Nothing but tensors that are there is counted: a file of a kilobyte may name block 100000000.
    """
    named = [match for key in state if (match := re.match(r"blocks\.(\d{1,4})\.(skip)?", key))]
    blocks = len({int(match[1]) for match in named})
    firsts = sorted({int(match[1]) for match in named if match[2]} | {0})
    telling = [f"blocks.{i}.skip.weight" for i in firsts]
    telling += [f"blocks.{i}.conv1.weight" for i in range(blocks)]
    if missing := [key for key in (*telling, "features.scale") if key not in state]:
        raise checkpoints.lacks(missing, "recogniser", name)
    widths = [state[f"blocks.{i}.skip.weight"].shape[:1] for i in firsts] + [state["features.scale"].shape[:1]]
    if not all(width and 0 < width[0] <= WIDEST for width in widths):
        raise checkpoints.CheckpointError(
            f"'{name}' has layers of a size that no recogniser has: convert insightface's ONNX file again with "
            "`ridfr convert`."
        )
    return tuple(b - a for a, b in zip(firsts, [*firsts[1:], blocks])), tuple(width[0] for width in widths[:-1])
