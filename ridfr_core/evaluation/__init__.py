"""`ridfr evaluate`: restore with diffusers' networks what ComfyUI's restore in a graph, and measure it."""
