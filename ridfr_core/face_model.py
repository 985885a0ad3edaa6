"""A face model: detector and recogniser, read from a folder of insightface ONNX files (buffalo_l, antelopev2, ...).

The recogniser may also be the safetensors copy that `ridfr convert` makes of its ONNX file.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from . import checkpoints
from .faces import Detector
from .nano import WEIGHTS
from .recognition import CROP_SIZE, FaceModelError, load_iresnet

EMBEDDING = 512
SOURCE_DIGEST = "ridfr.source_sha256"  # metadata of a converted recogniser: SHA-256 of its ONNX file


class OnnxRecogniser(nn.Module):
    """Any insightface recogniser on onnxruntime (MobileFaceNet, ...): called like IResNet, but without gradients."""

    def __init__(self, path: str | Path, bgr: bool = False):
        """bgr: swap red and blue before the network sees them."""
        super().__init__()
        import onnxruntime
        from insightface.model_zoo.arcface_onnx import ArcFaceONNX

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._model = ArcFaceONNX(str(path), session=session)
        self._bgr = bgr

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Crops [B,3,112,112], RGB in [-1,1] -> raw embeddings [B,512]."""
        x = x.flip(1) if self._bgr else x
        pixels = (x.float().cpu().numpy() + 1) * 127.5
        return torch.from_numpy(self._model.forward(pixels)).to(x.device)


@dataclass(frozen=True)
class FaceModel:
    """A detector and a recogniser that belong together.

    recogniser: IResNet, or OnnxRecogniser where the file holds another network (then there are no gradients).
    digest: sha256 of the recogniser's ONNX file, after "bgr-" where it sees red and blue swapped; embeddings of
    different digests cannot be compared.
    """

    name: str
    detector: Detector
    recogniser: nn.Module
    digest: str


def load_face_model(folder: str | Path, operations: ModuleType | type = nn, bgr: bool = False) -> FaceModel:
    """Load the detector and the recogniser of an insightface model folder; each is known by its shapes.

    Files that lie one folder too deep (antelopev2/antelopev2/, as its archive unpacks) are found too.
    bgr: the recogniser sees red and blue swapped. insightface's see RGB; FaceMe's released code hands them BGR, in
    training and inference alike, so its weights want that.
    Raises FaceModelError when the folder holds no detector or no recogniser.
    """
    folder = Path(folder)
    files = _models(folder, "") or _models(folder, "*/")
    roles: dict[str, Path] = {}
    for path in files:
        roles.setdefault(role_of(path), path)
    for role, needed in (
        ("detector", "SCRFD detector with landmarks"),
        ("recogniser", "ArcFace recogniser (112x112 to 512)"),
    ):
        if role not in roles:
            found = ", ".join(path.name for path in files) or "no .onnx file"
            raise FaceModelError(
                f"Face model folder {folder} has no {needed}, it has {found}; put the files of an insightface pack "
                "such as buffalo_l there."
            )
    path = roles["recogniser"]
    digest = ("bgr-" if bgr else "") + digest_of(path)
    return FaceModel(folder.name, Detector(roles["detector"]), _recogniser(path, operations, bgr), digest)


def face_model_of(pack: str) -> FaceModel:
    """"nano", "nano_judge", or the folder of an insightface pack."""
    shipped = WEIGHTS / "insightface" / "models" / pack
    return load_face_model(shipped if shipped.is_dir() else pack)


def _models(folder: Path, below: str) -> list[Path]:
    """Weight files: ONNX first, then safetensors."""
    return [path for kind in ("onnx", "safetensors") for path in sorted(folder.glob(f"{below}*.{kind}"))]


def digest_of(path: Path) -> str:
    """SHA-256 of a recogniser's ONNX file, which its converted copy names too."""
    if path.suffix == ".onnx":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return checkpoints.read(path, "meta")[1].get(SOURCE_DIGEST) or hashlib.sha256(path.read_bytes()).hexdigest()


def role_of(path: Path) -> str:
    """"detector", "recogniser" or "other", told by the model's inputs and outputs as insightface does."""
    if path.suffix != ".onnx":
        return "recogniser" if checkpoints.kind_of(checkpoints.read(path, "meta")[0]) == "recogniser" else "other"
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf and onnx raise several kinds for a damaged file
        raise FaceModelError(f"Face model file {path} cannot be read as ONNX ({error}); download it again.") from error
    if len(graph.output) in (9, 15):
        return "detector"
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [_shape(value) for value in graph.input if value.name not in stored]
    if len(inputs) == len(graph.output) == 1 and inputs[0][-2:] == [CROP_SIZE, CROP_SIZE] \
            and _shape(graph.output[0])[-1:] == [EMBEDDING]:
        return "recogniser"
    return "other"


def _shape(value) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _recogniser(path: Path, operations: ModuleType | type, bgr: bool) -> nn.Module:
    try:
        net = load_iresnet(path, operations)
    except FaceModelError:  # a whole ONNX file, as role_of has read it, but of another network
        return OnnxRecogniser(path, bgr)
    if bgr:  # the first layer's weights swapped see what the pixels swapped would show, gradients included
        net.stem.weight.copy_(net.stem.weight.flip(1))
    return net
