"""The node that makes the diffusion model draw a person."""

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from server import PromptServer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..ridfr_core.errors import RidfrError
from ..ridfr_core.identity import Identity, Person, check_weights, each_alone, relative_weights
from . import types
from .adapter_lora import with_lora
from .checks import checked
from .id_attention import IdentityAttention, Region, cross_attention_widths, install
from .id_rows import KEY
from .managed import ManagedAdapter, loaded
from .noise_range import END, START, NoiseRange

ONE_EACH = "one for each picture"
ALL_IN_ONE = "all in every picture, each in their mask"


class ApplyIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_ApplyIdentity",
            display_name="Apply Identity",
            category=types.CATEGORY,
            description="Makes the model draw this person's face. Several can follow one another.",
            search_aliases=["ip-adapter faceid apply", "apply faceid", "face identity", "same person", "regional face"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model: SD1.5 or SDXL, as the adapter."),
                types.IdentityAdapter.Input("adapter", tooltip="From Load Identity Adapter."),
                types.Identity.Input(
                    "identity",
                    tooltip="From Extract Identity. With several people, there must be as "
                    "many pictures in the batch as people.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="How strongly the face is drawn towards this person: 0 not at all, 1 as trained.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    display_name="start",
                    tooltip=START.format(what="the identity"),
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    display_name="end",
                    tooltip=END.format(what="the identity"),
                ),
                io.Float.Input(
                    "s_scale",
                    default=1.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    optional=True,
                    display_name="look of the photo",
                    tooltip="For PlusV2 adapters: how much of the photo's look (hair, age, light) comes along besides "
                    "the face itself. 1 is as trained.",
                    advanced=True,
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    display_name="LoRA strength",
                    tooltip="How much of the adapter's LoRA is mixed into the model, if it has one: 1 is as trained, 0 "
                    "leaves it out. A LoRA acts everywhere and all the time, whatever mask, start and end say. It is "
                    "never added twice: of several Apply Identity in a row with the same adapter, the first one's "
                    "strength counts, and if a LoRA loader has added it before, that one's.",
                ),
                *block_strengths(),
                io.Combo.Input(
                    "people",
                    options=[ONE_EACH, ALL_IN_ONE],
                    default=ONE_EACH,
                    optional=True,
                    tooltip="If the identity has several people: whether each is for the picture at the same place of "
                    "the batch, or all are in every picture, each where their mask is.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture the identity acts: white fully, black not at all. One mask for all "
                    "pictures or one for each; with 'all in every picture', one for each person.",
                ),
                types.Strengths.Input(
                    "strengths",
                    optional=True,
                    tooltip="From Adaptive Strength: a strength for each picture; the one above is multiplied by it.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model that knows the person; goes to the sampler.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model,
        adapter: ManagedAdapter,
        identity: Identity,
        strength: float,
        start_percent: float,
        end_percent: float,
        s_scale: float = 1.0,
        lora_strength: float = 1.0,
        down: float = 1.0,
        middle: float = 1.0,
        up: float = 1.0,
        people: str = ONE_EACH,
        mask: Tensor | None = None,
        strengths: Tensor | None = None,
    ) -> io.NodeOutput:
        check_fit(model, adapter, identity)
        by_block = {"input": strength * down, "middle": strength * middle, "output": strength * up}
        if not any(by_block.values()) or start_percent >= end_percent:
            why = "its start is not before its end" if any(by_block.values()) else "its strength is 0"
            show([f"The identity does nothing, since {why}."], cls.hidden.unique_id)
            return io.NodeOutput(model)

        def each(overall: float) -> float | Tensor:
            return overall if strengths is None else overall * strengths

        part, sigmas, notes = None, None, []
        if (start_percent, end_percent) != (0.0, 1.0):
            part = NoiseRange(start_percent, end_percent)
            sigmas = part.sigmas(model.get_model_object("model_sampling"))
        model = with_lora(model, adapter, lora_strength, notes)
        for one, region in regions(identity, people, mask, notes):
            tokens, bias = identity_tokens(adapter, one, s_scale)
            layers = zip(adapter.adapter.layers, adapter.adapter.keys_values(tokens), strict=True)
            patches = {
                place: IdentityAttention(
                    keys.cpu(), values.cpu(), each(by_block[place[0]]), sigmas, bias, region, part=part
                )
                for place, (keys, values) in layers
                if by_block[place[0]]
            }
            model = install(model, patches)
        if part is not None:
            tell_outside(model, part, notes, cls.hidden.unique_id)
        if notes:
            show(notes, cls.hidden.unique_id)
        return io.NodeOutput(model)


def show(notes: list[str], node: str) -> None:
    PromptServer.instance.send_progress_text("\n\n".join(notes), node)


def tell_outside(model, part: NoiseRange, notes: list[str], node: str) -> None:
    """Have each run of the model say on the node, below the notes, whether it comes by that part of the schedule."""

    def begin(executor, guider, sigmas, *args, **kwargs):
        sampling, steps = guider.inner_model.model_sampling, max(len(sigmas) - 1, 0)
        acts = f"The identity acts in {part.count(sampling, sigmas)} of {steps} steps."
        show([*notes, part.outside(sampling, sigmas, "The identity") or acts], node)
        return executor(guider, sigmas, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, begin)


def block_strengths() -> list[io.Float.Input]:
    """The strengths of the UNet's parts, on top of the overall one."""
    told = {
        "down": "where the network takes the picture in: layout and coarse shape",
        "middle": "at the network's middle, where it sees the least detail",
        "up": "where the network draws the picture: features and detail",
    }
    return [
        io.Float.Input(
            name,
            default=1.0,
            min=0.0,
            max=3.0,
            step=0.05,
            optional=True,
            display_name=f"strength, {name}",
            tooltip=f"Multiplies the strength {where}. Leave 1 unless you want to experiment.",
            advanced=True,
        )
        for name, where in told.items()
    ]


def check_fit(model, adapter: ManagedAdapter, identity: Identity) -> None:
    """Raises RidfrError if the adapter is for another model, face model or image encoder, or lacks something."""
    widths = cross_attention_widths(model)
    expected = dict(zip(adapter.adapter.layers, adapter.adapter.channels, strict=True))
    if widths != expected:
        raise RidfrError(
            f"The adapter {adapter.name} is {family(expected)} but the model is {family(widths)}: load an "
            "adapter made for this model."
        )
    prompt, dim = model.model.model_config.unet_config["context_dim"], adapter.adapter.dim
    if prompt != dim:  # SD2 has SD1.5's layers
        raise RidfrError(
            f"The adapter {adapter.name} is for a model that reads prompts of width {dim}, but this one's have width "
            f"{prompt}: load an adapter made for this model."
        )
    adapter.check_recogniser(identity)
    if adapter.adapter.needs_face:
        check_embeddings(adapter, identity)
    if adapter.adapter.needs_clip:
        check_clip(adapter, identity)
    for number, person in enumerate(identity.people, start=1):
        check_weights(person.weights, f"person {number}")


def check_embeddings(adapter: ManagedAdapter, identity: Identity) -> None:
    for number, person in enumerate(identity.people, start=1):
        if (width := person.embeddings.shape[-1]) != adapter.adapter.id_dim:
            raise RidfrError(
                f"The adapter {adapter.name} reads face embeddings of width {adapter.adapter.id_dim}, but those of "
                f"person {number} have width {width}: load another adapter, or use its face model in Extract Identity."
            )
        if adapter.raw and not person.quality:
            raise RidfrError(
                f"The adapter {adapter.name} reads raw face embeddings, whose length is not known for person {number}: "
                "use the photos as Extract Identity gives them, without the mean of Combine References."
            )


def check_clip(adapter: ManagedAdapter, identity: Identity) -> None:
    needed = adapter.adapter.clip_dim
    if identity.clip_uncond is None or any(person.clip is None for person in identity.people):
        raise RidfrError(
            f"The adapter {adapter.name} needs CLIP features but the identity has none: connect clip_vision to Extract "
            f"Identity, of Load Nano Models for nano, else of Load CLIP Vision (ViT-H for FaceID), of width {needed}."
        )
    size = identity.clip_uncond.shape
    for number, person in enumerate(identity.people, start=1):
        if len(size) != 2 or person.clip.shape[1:] != size:
            raise RidfrError(
                f"The CLIP features of person {number} have the size {[*person.clip.shape[1:]]} but those of no one "
                f"{[*size]}: extract the identity again."
            )
    if size[1] != needed:
        raise RidfrError(
            f"The adapter {adapter.name} needs a CLIP vision model of width {needed} but the identity was "
            f"extracted with one of width {size[1]}: extract it with the other."
        )


def family(widths: dict) -> str:
    name = {70: "for SDXL", 16: "for SD1.5"}.get(len(widths), "of another kind")
    return f"{name} ({len(widths)} cross-attention layers, the widest has {max(widths.values(), default=0)} channels)"


def regions(
    identity: Identity, people: str, mask: Tensor | None, notes: list[str]
) -> list[tuple[Identity, Region | None]]:
    """Who acts together, and where; who acts nowhere is added to the notes.

    mask: [M,H,W] in [0,1]. Raises RidfrError where people are to share pictures and have no mask each.
    """
    acting = [] if mask is None else (mask > 0).flatten(1).any(1).tolist()
    if people == ONE_EACH:
        if mask is not None and not any(acting):
            notes.append(
                "The mask is black everywhere: disconnect it, or the identity acts nowhere. (Load Image gives such a "
                "mask for a picture without transparency.)"
            )
        return [(identity, None if mask is None else Region(mask))]
    if len(acting) != len(identity.people):
        raise RidfrError(
            f"The identity has {len(identity.people)} people who are all to be in every picture, but there are "
            f"{len(acting)} masks: connect one mask for each person, as a batch."
        )
    notes += [
        f"The mask of person {number} is black everywhere, so this person is in no picture."
        for number, acts in enumerate(acting, start=1)
        if not acts
    ]
    return [(one, Region(mask[None])) for one, mask in zip(each_alone(identity), mask)]


def identity_tokens(adapter: ManagedAdapter, identity: Identity, s_scale: float) -> tuple[Tensor, Tensor | None]:
    """Identity tokens [people + 1, tokens, dim], of each person, then of no one; and the bias of their logits.

    The tokens of a person's photos stand side by side (as FaceMe's do in the place of a word, and as FaceID-portrait
    was trained), so that attention chooses among them; zeros follow where others have more photos. The bias
    [people + 1, 1, 1, tokens] is the logarithm of a photo's weight relative to the person's largest, so that a photo
    of weight 2 counts like two of weight 1, and -inf for the zeros. It is None where all photos count the same and no
    one has fewer.
    """
    device = loaded(adapter.patcher)
    photos = [len(person.embeddings) for person in identity.people]
    embeddings = torch.cat([embeddings_of(person, adapter.raw) for person in identity.people])
    embeddings = torch.cat([embeddings, torch.zeros_like(embeddings[:1])]).to(device)
    clip = None
    if adapter.adapter.needs_clip:
        clip = torch.cat([person.clip for person in identity.people] + [identity.clip_uncond[None]]).to(device)
    tokens = adapter.adapter.tokens(embeddings, clip, adapter.shortcut, s_scale)
    *people, no_one = tokens.split([*photos, 1])
    rows = [part.flatten(0, 1) for part in (*people, no_one.expand(max(photos), -1, -1))]
    weights = [*map(relative_weights, identity.people), torch.ones(max(photos))]
    padded = pad_sequence(weights, batch_first=True)
    bias = None if (padded == 1).all() else padded.log().repeat_interleave(tokens.shape[1], 1)[:, None, None]
    return pad_sequence(rows, batch_first=True), bias


def embeddings_of(person: Person, raw: bool) -> Tensor:
    """[N,id_dim]: of unit length, or as long as the recogniser made them."""
    return person.embeddings * torch.tensor([[photo.norm] for photo in person.quality]) if raw else person.embeddings
