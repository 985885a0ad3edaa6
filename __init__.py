"""ComfyUI-RIDFR: reference-guided face restoration, for ComfyUI."""

import sys

try:
    from .nodes import comfy_entrypoint
except ModuleNotFoundError as missing:
    if (missing.name or "").startswith("comfy"):
        raise ImportError(f"ComfyUI is too old for this pack (it lacks {missing.name}): update ComfyUI.") from None
    command = f"{sys.executable} -m pip install -r requirements.txt"
    raise ImportError(f"{missing.name} is not installed: run `{command}` in the pack's folder.") from None

WEB_DIRECTORY = "./web"  # docs/NODE_ID.md: the editor's help pages

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
