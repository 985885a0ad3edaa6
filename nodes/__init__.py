"""The ComfyUI nodes of RIDFR."""

from comfy_api.latest import ComfyExtension, io

from .apply_identity import ApplyIdentity
from .doctor import Doctor
from .guidance import GuidancePlot, IDPreservingSampling
from .identity import CompareIdentity, ExtractIdentity
from .images import ColorFix, DegradeFace, NanoPortraits
from .loaders import LoadContentControlNet, LoadFaceModel, LoadIdentityAdapter, LoadNanoModels
from .paths import register_folders
from .samplers import LQStartNoise, PaperSampler, PaperSchedule


class RIDFRExtension(ComfyExtension):
    async def on_load(self) -> None:
        register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadNanoModels,
            LoadFaceModel,
            LoadIdentityAdapter,
            LoadContentControlNet,
            ExtractIdentity,
            ApplyIdentity,
            CompareIdentity,
            DegradeFace,
            ColorFix,
            NanoPortraits,
            Doctor,
            IDPreservingSampling,
            GuidancePlot,
            PaperSampler,
            PaperSchedule,
            LQStartNoise,
        ]


async def comfy_entrypoint() -> RIDFRExtension:
    return RIDFRExtension()
