"""The sampler's schedule as SIGMAS, and the widgets for it that several nodes have."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..chroma_core.model.latents import snap_size
from ..chroma_core.options import option_of
from ..chroma_core.sampling.sampler import SamplingSettings
from ..chroma_core.sampling.schedule import FlowShift, Spacing, sampling_sigmas
from .option_widgets import widget
from .sockets import schema

SHIFTS = ["dynamic", "constant", "none"]
SHIFT_TIP = "dynamic: by resolution. constant: by flow_shift_value. none: no shift."


def shift_value(name: str = "flow_shift_value", **changes: Any) -> io.Float.Input:
    """The widget beside the choice of a flow shift, for `constant`."""
    tooltip = "The shift s of σ' = sσ / (1 + (s − 1)σ), read when flow_shift is constant. 1 shifts nothing."
    return io.Float.Input(
        name, **{"default": 1.0, "min": 0.01, "max": 100.0, "step": 0.05, "tooltip": tooltip, **changes}
    )


def end_step_widget() -> Any:
    """Where a run stops; 0 is the end."""
    sentence = option_of(SamplingSettings, "end_step").sentence
    return widget(SamplingSettings, "end_step", default=0, tooltip=sentence.replace("Unset", "0"))


def flow_shift_of(choice: str, value: float) -> FlowShift | None:
    """The core's flow shift from the two widgets; None leaves it to the recipe."""
    choices: dict[str, FlowShift | None] = {"recipe": None, "constant": value, "dynamic": "dynamic", "none": "none"}
    return choices[choice]


def shift_widgets(shift: FlowShift | None, unset: str) -> tuple[str, float]:
    """The way back: the two widgets of a flow shift; `unset` is the choice that leaves it to the recipe."""
    if shift is None:
        return unset, 1.0
    return (shift, 1.0) if isinstance(shift, str) else ("constant", float(shift))


class ChromaTailSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "sampling",
            node_id="ChromaTailSigmas",
            display_name="Chroma Tail Sigmas",
            description="Chroma Sampler's schedule as SIGMAS, for ComfyUI's SamplerCustomAdvanced.",
            search_aliases=["chroma scheduler", "sigmas", "noise schedule", "beta schedule", "tail bias", "flow shift"],
            inputs=[
                widget(SamplingSettings, "steps", tooltip="Steps that the sampler takes."),
                widget(SamplingSettings, "tail_bias", default=0.5),
                io.Combo.Input("flow_shift", options=SHIFTS, default="dynamic", tooltip=SHIFT_TIP),
                shift_value(),
                *(
                    io.Int.Input(
                        side,
                        default=1024,
                        min=32,
                        max=4096,
                        step=32,
                        tooltip="Of the image; the dynamic shift needs it.",
                    )
                    for side in ("width", "height")
                ),
                widget(SamplingSettings, "denoise"),
                widget(SamplingSettings, "spacing", display_name="scheduler"),
                widget(SamplingSettings, "start_step"),
                end_step_widget(),
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
