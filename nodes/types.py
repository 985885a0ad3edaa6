"""Wire types that ComfyUI has no stock type for."""

from comfy_api.latest import io

FaceModel = io.Custom("RIDFR_FACE_MODEL")
Identity = io.Custom("RIDFR_IDENTITY")
IdentityAdapter = io.Custom("RIDFR_IDENTITY_ADAPTER")
Guidance = io.Custom("RIDFR_GUIDANCE")
Strengths = io.Custom("RIDFR_STRENGTHS")  # Tensor [images]

CATEGORY = "RIDFR"
LARGEST_SEED = 0xFFFFFFFFFFFFFFFF
