"""A node pack for the tests alone: makes unusual images, and counts the identity patches that a sampler calls."""

import torch


class ProbeImage:
    """Pictures that no stock node makes."""

    KINDS = ("nan", "grey", "rgba", "pair", "empty")
    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "kind": (list(cls.KINDS),)}}

    def make(self, image, kind):
        if kind == "nan":
            image = image.clone()
            image[-1, 0, 0, 0] = float("nan")
        elif kind == "grey":
            image = image.mean(-1, keepdim=True)
        elif kind == "rgba":
            image = torch.cat([image, torch.full_like(image[..., :1], 0.5)], -1)
        elif kind == "pair":
            image = torch.cat(list(image), 1)[None]
        else:
            image = image[:0]
        return (image,)


class Counted:
    def __init__(self, patch, counts, place):
        self.patch, self.counts, self.place = patch, counts, place

    def __call__(self, q, k, v, extra_options):
        self.counts[self.place] = self.counts.get(self.place, 0) + 1
        return self.patch(q, k, v, extra_options)

    def to(self, target):
        return Counted(self.patch.to(target), self.counts, self.place)


class ProbeCountPatches:
    """A model whose cross-attention patches are counted; `counts` fills while it is sampled."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "count", ("MODEL", "PROBE_COUNTS")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def count(self, model):
        model, counts = model.clone(), {}
        patches = model.model_options["transformer_options"]["patches_replace"]["attn2"]
        for place, patch in list(patches.items()):
            model.set_model_attn2_replace(Counted(patch, counts, place), *place)
        return (model, counts)


class ProbeReport:
    """What was counted, once the latent is there."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "report", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"counts": ("PROBE_COUNTS",), "latent": ("LATENT",)}}

    def report(self, counts, latent):
        return {"ui": {"counts": [[list(place), n] for place, n in counts.items()]}}


NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (ProbeImage, ProbeCountPatches, ProbeReport)}
