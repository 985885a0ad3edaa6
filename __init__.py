"""ComfyUI-RIDFR: reference-guided face restoration, for ComfyUI."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
