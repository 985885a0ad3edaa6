"""ComfyUI-RIDFR: reference-guided face restoration, for ComfyUI."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"  # docs/NODE_ID.md: the editor's help pages

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
