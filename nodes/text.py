"""Prompts to conditioning."""

from __future__ import annotations

from comfy_api.latest import io

from ..chroma_core.sampling.text import apply_trigger
from . import host
from .sockets import ChromaTextEncoder, schema, to_conditioning


class ChromaTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ChromaTextEncode",
            display_name="Chroma Text Encode",
            description="Encodes a prompt with T5, the way Chroma was trained: the real tokens and one visible pad "
            "token.",
            search_aliases=[
                "chroma prompt",
                "t5 encode",
                "clip text encode",
                "negative prompt",
                "trigger word",
                "conditioning",
            ],
            inputs=[
                ChromaTextEncoder.Input("text_encoder", tooltip="From Chroma Load Model."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="The prompt. [trigger] stands for the trigger word. Empty is a good negative prompt.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="The word that [trigger] in the prompt becomes, e.g. the one the LoRA was trained with.",
                ),
            ],
            outputs=[io.Conditioning.Output("conditioning", tooltip="For Chroma Sampler or the host's own samplers.")],
        )

    @classmethod
    def execute(cls, text_encoder, text, trigger) -> io.NodeOutput:
        prompt = apply_trigger(text, trigger)
        with host.working():
            condition = host.components.text_encoder(text_encoder, host.device()).encode(prompt)
        if condition.truncated:
            host.say(f"The prompt is too long: its last {condition.truncated} tokens were cut off.")
        return io.NodeOutput(to_conditioning(condition, text_encoder))


NODES = [ChromaTextEncode]
