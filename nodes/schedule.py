"""The sampler's schedule as SIGMAS, and the words for it that both nodes use."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io
from torch import Tensor

from ..chroma_core.model.latents import snap_size
from ..chroma_core.sampling.schedule import FlowShift, Spacing, sampling_sigmas
from .sockets import schema

SHIFTS = ["dynamic", "constant", "none"]
TAIL_BIAS_TIP = (
    "0: even steps. Towards 1, steps crowd at both ends: composition and fine detail get more, the middle fewer."
)
SHIFT_TIP = "dynamic: by resolution. constant: by flow_shift_value. none: no shift."
SHIFT_VALUE_TIP = "The shift s of σ' = sσ / (1 + (s − 1)σ), read when flow_shift is constant. 1 shifts nothing."
DENOISE_TIP = "Below 1, start from the latent with that much noise on it instead of from pure noise."
SPACING_TIP = "linear: even steps. beta: more of them at both ends, as ComfyUI's beta scheduler has it."
START_STEP_TIP = "Begin at this step of the schedule. The latent gets as much noise as belongs there."
END_STEP_TIP = "Stop at this step and leave the noise in the latent, for a sampler that goes on. 0: to the end."


def flow_shift_of(choice: str, value: float) -> FlowShift | None:
    """The core's flow shift from the two widgets; None leaves it to the recipe."""
    choices: dict[str, FlowShift | None] = {"recipe": None, "constant": value, "dynamic": "dynamic", "none": "none"}
    return choices[choice]


class ChromaTailSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ChromaTailSigmas",
            display_name="Chroma Tail Sigmas",
            description="Chroma Sampler's schedule as SIGMAS, for the host's SamplerCustomAdvanced.",
            search_aliases=["chroma scheduler", "sigmas", "noise schedule", "beta schedule", "tail bias", "flow shift"],
            inputs=[
                io.Int.Input("steps", default=25, min=1, max=150, tooltip="Steps that the sampler takes."),
                io.Float.Input("tail_bias", default=0.5, min=0.0, max=1.0, step=0.05, tooltip=TAIL_BIAS_TIP),
                io.Combo.Input("flow_shift", options=SHIFTS, default="dynamic", tooltip=SHIFT_TIP),
                io.Float.Input(
                    "flow_shift_value", default=1.0, min=0.01, max=100.0, step=0.05, tooltip=SHIFT_VALUE_TIP
                ),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=32,
                    max=4096,
                    step=32,
                    tooltip="Of the picture; the dynamic shift needs it.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=32,
                    max=4096,
                    step=32,
                    tooltip="Of the picture; the dynamic shift needs it.",
                ),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=DENOISE_TIP),
                io.Combo.Input(
                    "spacing",
                    options=list(get_args(Spacing)),
                    default="linear",
                    tooltip=SPACING_TIP,
                    optional=True,
                    advanced=True,
                ),
                io.Int.Input(
                    "start_step", default=0, min=0, max=149, tooltip=START_STEP_TIP, optional=True, advanced=True
                ),
                io.Int.Input("end_step", default=0, min=0, max=150, tooltip=END_STEP_TIP, optional=True, advanced=True),
            ],
            outputs=[io.Sigmas.Output("sigmas", tooltip="Noise levels from 1 to 0.")],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        return io.NodeOutput(sigmas_of(**widgets))


def sigmas_of(
    steps: int,
    tail_bias: float,
    flow_shift: str,
    flow_shift_value: float,
    width: int,
    height: int,
    denoise: float,
    spacing: Spacing = "linear",
    start_step: int = 0,
    end_step: int = 0,
) -> Tensor:
    """The noise levels that the node's widgets mean. Raises ConfigError."""
    width, height = snap_size(width, height)
    shift = flow_shift_of(flow_shift, flow_shift_value)
    assert shift is not None
    return sampling_sigmas(
        steps,
        width * height // 256,
        tail_bias=tail_bias,
        flow_shift=shift,
        denoise=denoise,
        spacing=spacing,
        start_step=start_step,
        end_step=end_step or None,
    )


NODES = [ChromaTailSigmas]
