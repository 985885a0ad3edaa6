"""A face model: detector and recogniser, read from a folder of insightface ONNX files (buffalo_l, antelopev2, ...).

The recogniser may also be the safetensors copy that `ridfr convert` makes of its ONNX file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import nn

from . import checkpoints
from .faces import Detector, Face
from .files import sha256
from .nano import WEIGHTS
from .onnx_file import FaceModelError, Graph, read_graph
from .onnx_network import RuntimeNetwork
from .recognition import CROP_SIZE, OnnxRecogniser, load_recogniser
from .scrfd import LAYOUTS

EMBEDDING = 512  # numbers in the embeddings that identity adapters know
LEAST = 64  # numbers in an embedding: what gives fewer tells age or expression
SOURCE_DIGEST = "ridfr.source_sha256"  # metadata of a converted recogniser: SHA-256 of its ONNX file
NANO, JUDGE = "nano", "nano_judge"  # the bundled packs
# How high a face is, at most, in a drawn portrait of 128 pixels, and how sure nano's detector is of it, at least. It is
# a hint, not a test: of 260 portraits none is outside, but 9 % of degraded ones; of photographs 8 of 8 are, and of 39
# cuttings from them all at 512 pixels, 29 at 128.
LARGEST, SURE = 112, 0.65
NAMED = 5  # how many pictures a sentence names
PURPOSES = {
    NANO: "for drawn portraits, with the nano models",
    JUDGE: "only judges drawn portraits (Compare Identity): Apply Identity refuses its identities",
}
RUN_BY = "run by torch", "run by onnxruntime on the processor"


@dataclass(frozen=True)
class FaceModel:
    """A detector and a recogniser that belong together.

    recogniser: IResNet, or GraphRecogniser where the file holds another network; OnnxRecogniser, which has no
    gradients, where torch can't run that.
    digest: sha256 of the recogniser's ONNX file, after "bgr-" where it sees red and blue swapped; embeddings of
    different digests cannot be compared.
    """

    name: str
    detector: Detector
    recogniser: nn.Module
    digest: str

    @property
    def drawn(self) -> bool:
        """Whether it knows drawn portraits alone."""
        return self.name in PURPOSES

    @property
    def purpose(self) -> str:
        if self.drawn:
            return PURPOSES[self.name]
        if self.recogniser.width != EMBEDDING:
            return f"for photos, to match and to judge; identity adapters need {EMBEDDING} numbers"
        return "for photos"

    def doubts(self, faces: Mapping[str, Face], clean: bool = False) -> list[str]:
        """A sentence if faces, by the name of their picture, do not look like what the face model is for; else none.

        clean: the pictures are good ones, so a detector that is not sure tells something, too.
        """
        odd = [name for name, face in faces.items() if face.height > LARGEST or clean and face.score < SURE]
        if not (self.drawn and odd):
            return []
        more = f" and {len(odd) - NAMED} more" if len(odd) > NAMED else ""
        return [f"The face model {self.name} knows drawn portraits of 128x128 pixels only, and this does not look like "
                f"one: {', '.join(odd[:NAMED])}{more}; for photographs load buffalo_l or another insightface pack."]

    def describe(self) -> str:
        """What it is for, what was loaded, what runs it: three lines."""
        size = "x".join(map(str, self.detector.fixed)) if self.detector.fixed else "pictures of any size"
        return "\n".join([
            self.purpose,
            f"detector: {self.detector.path.name}, {size}, {RUN_BY[isinstance(self.detector.network, RuntimeNetwork)]}",
            f"recogniser: {self.recogniser.width} numbers, {RUN_BY[isinstance(self.recogniser, OnnxRecogniser)]}",
        ])


def load_face_model(folder: str | Path, operations: ModuleType | type = nn, bgr: bool = False) -> FaceModel:
    """Load the detector and the recogniser of an insightface model folder; each is known by its shapes.

    Files that lie one folder too deep (antelopev2/antelopev2/, as its archive unpacks) are found too.
    bgr: the recogniser sees red and blue swapped. insightface's see RGB; FaceMe's released code hands them BGR, in
    training and inference alike, so its weights want that.
    Raises FaceModelError when the folder holds no detector or no recogniser.
    """
    folder = Path(folder)
    files = face_model_files(folder)
    roles: dict[str, Path] = {}
    for path in files:
        roles.setdefault(role_of(path), path)
    for role, needed in (
        ("detector", "SCRFD detector with landmarks"),
        ("recogniser", "ArcFace recogniser (of 112x112 pixels)"),
    ):
        if role not in roles:
            found = ", ".join(path.name for path in files) or "no .onnx file"
            raise FaceModelError(
                f"Face model folder {folder} has no {needed}, it has {found}; put the files of an insightface pack "
                "such as buffalo_l there."
            )
    path = roles["recogniser"]
    digest = ("bgr-" if bgr else "") + digest_of(path)
    return FaceModel(folder.name, Detector(roles["detector"]), load_recogniser(path, operations, bgr), digest)


def face_model_of(pack: str) -> FaceModel:
    """"nano", "nano_judge", or the folder of an insightface pack."""
    shipped = WEIGHTS / "insightface" / "models" / pack
    return load_face_model(shipped if shipped.is_dir() else pack)


def face_model_files(folder: Path) -> list[Path]:
    """A folder's weight files, or those one folder deeper; ONNX first, then safetensors."""
    patterns = ("*.onnx", "*.safetensors"), ("*/*.onnx", "*/*.safetensors")
    found = ([path for pattern in level for path in sorted(folder.glob(pattern))] for level in patterns)
    return next(filter(None, found), [])


def digest_of(path: Path) -> str:
    """SHA-256 of a recogniser's ONNX file, which its converted copy names too."""
    if path.suffix.lower() == ".onnx":
        return sha256(path)
    return checkpoints.read(path, "meta")[1].get(SOURCE_DIGEST) or sha256(path)


def role_of(path: Path) -> str:
    """"detector", "recogniser" or "other", told by the model's inputs and outputs as insightface does."""
    if path.suffix.lower() != ".onnx":
        return "recogniser" if checkpoints.kind_of(checkpoints.read(path, "meta")[0]) == "recogniser" else "other"
    graph = read_graph(path, weights=False)
    inputs, outputs = list(graph.inputs.values()), list(graph.outputs.values())
    if len(outputs) in LAYOUTS:
        return "detector"
    if len(inputs) == len(outputs) == 1 and inputs[0][-2:] == [CROP_SIZE, CROP_SIZE] and _width(path, graph) >= LEAST:
        return "recogniser"
    return "other"


def _width(path: Path, graph: Graph) -> int:
    """Numbers in the output, which is tried out where the file doesn't say."""
    (shape,) = graph.outputs.values()
    if shape and shape[-1]:
        return shape[-1]
    try:
        return load_recogniser(path).width
    except FaceModelError:
        return 0
