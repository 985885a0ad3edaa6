"""Identity-preserving face restoration in plain torch; nothing here imports ComfyUI."""
