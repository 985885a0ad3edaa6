"""The ComfyUI nodes of RIDFR."""

from comfy_api.latest import ComfyExtension, io

from .adaptive_strength import AdaptiveStrength
from .apply_identity import ApplyIdentity
from .doctor import Doctor
from .guidance import GuidancePlot, IDPreservingSampling
from .identity import CompareIdentity, ExtractIdentity
from .identity_files import LoadIdentity, SaveIdentity
from .identity_report import IdentityReport
from .images import ColorFix, DegradeFace, NanoPortraits
from .loaders import LoadContentControlNet, LoadFaceModel, LoadIdentityAdapter, LoadNanoModels
from .metrics import IdentityVariance, ImageQuality
from .paths import register_folders
from .references import CombineReferences, JoinIdentities
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
            JoinIdentities,
            CombineReferences,
            SaveIdentity,
            LoadIdentity,
            AdaptiveStrength,
            IdentityReport,
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
            ImageQuality,
            IdentityVariance,
        ]


async def comfy_entrypoint() -> RIDFRExtension:
    return RIDFRExtension()
