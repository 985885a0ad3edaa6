"""Nodes that keep a person between sessions: Save Identity and Load Identity."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io
from server import PromptServer

from ..ridfr_core.identity import Identity, check_recogniser, each_alone
from ..ridfr_core.identity_files import load_identity, new_files, save_identity
from . import types
from .checks import checked
from .managed import ManagedFaceModel
from .paths import fingerprint, users_file

FOLDER = "identities"


class SaveIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_SaveIdentity",
            display_name="Save Identity",
            category=types.CATEGORY,
            description="Keeps a person for later: one file in models/identities with all that was extracted from the "
            "photos and a thumbnail of each, but not the photos themselves.",
            search_aliases=["save face", "save embeds", "store faceid", "export identity"],
            inputs=[
                types.Identity.Input("identity", tooltip="From Extract Identity."),
                io.String.Input(
                    "name",
                    default="person",
                    tooltip="The person's name, which becomes that of the file. Several people get one file each, with "
                    "a number behind the name. If the name is taken, _00002 is added, then _00003, and so on.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replaces a person who is already saved under this name. When off, both are kept.",
                ),
            ],
            outputs=[
                types.Identity.Output(display_name="identity", tooltip="The same identity, to go on with."),
                io.String.Output(display_name="file", tooltip="The file that was written; several, one in each line."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, identity: Identity, name: str, overwrite: bool) -> io.NodeOutput:
        folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
        people = each_alone(identity)
        files = new_files(folder, name, len(people), overwrite)
        for person, file in zip(people, files, strict=True):
            save_identity(person, file)
        text = "\n".join(map(str, files))
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)  # shown on the node
        return io.NodeOutput(identity, text, ui={"text": [text]})


class LoadIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_LoadIdentity",
            display_name="Load Identity",
            category=types.CATEGORY,
            description="Brings back a person whom Save Identity kept, without needing the photos.",
            search_aliases=["load face", "load embeds", "saved faceid", "import identity"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list(FOLDER),
                    display_name="person",
                    tooltip="A file in models/identities. Press R in the editor after a new one was saved.",
                ),
                types.FaceModel.Input(
                    "face_model",
                    optional=True,
                    tooltip="If connected, the file is refused unless it was made with this face model: adapters "
                    "understand one only.",
                ),
            ],
            outputs=[types.Identity.Output(display_name="identity", tooltip="Goes to Apply Identity.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, face_model: ManagedFaceModel | None = None) -> str:
        return fingerprint(users_file(FOLDER, file))

    @classmethod
    @checked
    def execute(cls, file: str, face_model: ManagedFaceModel | None = None) -> io.NodeOutput:
        identity = load_identity(users_file(FOLDER, file))
        if face_model is not None:
            check_recogniser(identity, face_model.model.name, face_model.model.digest, f"'{file}'")
        return io.NodeOutput(identity)
