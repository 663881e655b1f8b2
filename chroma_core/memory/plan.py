"""Peaks of a choice of settings, and the choice of settings for a machine.

The parts of a model are the transformer, T5 and the VAE (always fp32). With offload `none` all three stay on the
device; with `model` and `block` they take turns there, and those that wait lie in the computer's memory. Training is
different: T5 encodes the captions and the VAE the images before the transformer comes; later the VAE decodes previews
beside it, in every mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal, get_args

from ..errors import ConfigError, check_choice
from ..loading.spec import ModelSpec, Offload
from ..lora.modules import AdapterKind
from ..model.eight_bits import Compute
from ..model.flavours import flavour
from ..model.latents import snap_size
from ..model.precision import Precision, precision
from ..options import Option
from .activations import (
    PATCH,
    TEXT_TOKENS,
    Pass,
    quantising,
    sampling_bytes,
    score_bytes,
    text_encoder_bytes,
    training_bytes,
    vae_decode_bytes,
    vae_encode_bytes,
)
from .anatomy import Part, Transformer, anatomy, lora_layers
from .machine import GIB, Machine, in_gib, machine
from .trained import OPTIMIZERS, adapter_shapes, parameters, state_bytes

Purpose = Literal["sampling", "training"]

SIZE_MULTIPLE = 32


@dataclass(frozen=True)
class Settings:
    """What decides how much memory is needed. `size`: pixels a side of a square image, None for the flavour's own.

    text_tokens: of a caption in the transformer; 512 for text_padding `zero` and `unmodified`. ema: a running mean of
    what is trained is kept beside it. trained_parameters: above 0, so many of the model's own parameters are trained
    in fp32 instead of an adapter. target, lokr_factor, optimizer: see `lora.targets`, `lora.settings`, `trained`.
    Raises ConfigError, PrecisionError for an unknown name or an impossible number.
    """

    flavour: str = "base"
    precision: str = "bf16"
    text_precision: str = "bf16"
    offload: Offload = "none"
    resident_blocks: int = 2
    offload_during_startup: bool = False
    size: Annotated[int | None, Option("Pixels a side. Unset: the flavour's own size.")] = None
    batch_size: Annotated[int, Option("Images in a batch.")] = 1
    rank: Annotated[int, Option("Rank of the LoRA in training.")] = 16
    target: str | tuple[str, ...] = "all"
    optimizer: Annotated[str, Option("The optimizer; see docs/optimizers.md.")] = "adamw"
    gradient_checkpointing: bool = True
    checkpointing_interval: Annotated[int, Option("Only every n-th block is computed again.")] = 1
    deterministic: Annotated[bool, Option("Training keeps the scores of attention; see docs/training.md.")] = False
    adapter: Annotated[str, Option("lora, rslora, dora or lokr.")] = "lora"
    lokr_factor: int = -1
    ema: Annotated[bool, Option("A running mean of the weights is kept.")] = False
    preserved: Annotated[float, Option("Share of steps with a second pass; see docs/training.md.")] = 0.0
    text_tokens: Annotated[int, Option("Tokens of a caption; 512 when it is padded.")] = TEXT_TOKENS
    trained_parameters: Annotated[int, Option("Full-rank training of so many parameters, without LoRA.")] = 0
    compute: Compute = "weights"

    @classmethod
    def of(cls, spec: ModelSpec, **more: Any) -> Settings:
        """For a model as it is loaded; `more` is what else decides."""
        same = {field.name for field in fields(ModelSpec)} & {field.name for field in fields(cls)}
        return cls(**{name: getattr(spec, name) for name in same} | more)

    def __post_init__(self) -> None:
        flavour(self.flavour)
        if not isinstance(self.target, str):
            object.__setattr__(self, "target", tuple(self.target))
        precision(self.precision)
        precision(self.text_precision)
        check_choice("The offload mode", self.offload, get_args(Offload))
        check_choice("The compute mode", self.compute, get_args(Compute))
        check_choice("The optimizer", self.optimizer, OPTIMIZERS)
        check_choice("The adapter", self.adapter, get_args(AdapterKind))
        ones = dict.fromkeys(("batch_size", "rank", "text_tokens", "checkpointing_interval"), 1)
        for name, least in {**ones, "resident_blocks": 2, "trained_parameters": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        snap_size(self.pixels, self.pixels, SIZE_MULTIPLE)

    @property
    def interval(self) -> int:
        """Every n-th block is computed again; 0: none."""
        return self.checkpointing_interval if self.gradient_checkpointing else 0

    @property
    def pixels(self) -> int:
        """Pixels a side."""
        return flavour(self.flavour).size if self.size is None else self.size


@dataclass(frozen=True)
class Peaks:
    """Bytes that settings need.

    lora, optimizer: the trained weights and the optimizer's state. sampling, training: peaks on the device.
    host_sampling, host_training: peaks of the computer's memory; training counts the prompt that may come meanwhile,
    for which the job's component leaves the device. moments: the device's peak in each part of a job.
    """

    weights: int
    text_encoder: int
    lora: int
    optimizer: int
    activations: int
    sampling: int
    training: int
    host_sampling: int
    host_training: int
    moments: dict[str, int]


def peaks(settings: Settings, shared_memory: bool = False) -> Peaks:
    """Predict the peaks; with `shared_memory` (CPU, Apple) `host` holds everything, for device and computer are one.

    Loading counts too: a block comes to the device in its dtype and is quantised there, one linear after the other,
    unless `offload_during_startup` has that done in the computer's memory.
    """
    whole, chosen, text = anatomy(settings.flavour), precision(settings.precision), precision(settings.text_precision)
    body, t5, fp32 = whole.transformer, whole.text_encoder, precision("fp32")
    size = snap_size(settings.pixels, settings.pixels, SIZE_MULTIPLE)[0]
    on_device = 0 if settings.offload_during_startup else 1
    run = _pass(settings, on_gpu=not shared_memory)
    layers = lora_layers(settings.flavour, settings.target)

    weights, text_weights, vae = body.whole.bytes(chosen), t5.whole.bytes(text), whole.vae.whole.bytes(fp32)
    held = _streamed_bytes(body, chosen, settings.resident_blocks) if settings.offload == "block" else weights
    load = held + on_device * _loading_bytes(body.blocks, chosen)
    text_peak = text_weights + max(
        text_encoder_bytes(t5, text, on_gpu=not shared_memory), on_device * _loading_bytes(t5.blocks, text)
    )
    decode = vae_decode_bytes(whole.vae, size)

    moment = max(sampling_bytes(body, run), load - held)
    if settings.offload == "none":
        sampling = text_weights + held + vae + max(moment, text_peak - text_weights, decode)
    else:
        sampling = max(held + moment, text_peak, vae + decode)

    shapes = _trained_shapes(settings)
    lora, optimizer = 4 * parameters(shapes), state_bytes(settings.optimizer, shapes)
    activations = training_bytes(body, run, layers, settings.rank, settings.interval)
    if settings.deterministic:
        activations += score_bytes(body, run, settings.interval)
    mean = lora if settings.ema else 0
    at_work = held  # where activations peak, in the single blocks
    if settings.offload == "block":
        at_work = _streamed_bytes(body, chosen, settings.resident_blocks, body.singles)
    kept = lora + mean + optimizer
    trained = at_work + kept
    # With offloading the model waits in the computer's memory while the VAE decodes.
    beside = trained if settings.offload == "none" else 0
    levels = replace(run, batch=_rows_within(body, run, activations, HELDOUT_ROWS))
    moments = {
        "captions": text_peak,
        "images": vae + vae_encode_bytes(whole.vae, size),
        "loading": load,
        "step": trained + lora + activations,  # with the gradients of what is trained
        # One pass after the other, and only the first keeps anything for the next: gradients.
        "target of the second pass": trained + lora + sampling_bytes(body, run) if settings.preserved else 0,
        "held-out loss": trained + sampling_bytes(body, levels),
        # Streamed double blocks are twice as large as single ones, with half of the activations when the peak is small.
        "preview": max(
            trained + sampling_bytes(body, run),
            held + kept + sampling_bytes(body, run) // 2,
            beside + vae + decode,
        ),
    }
    training = max(moments.values())

    # A tensor is read from its file, unpacked in fp32, and cast; nothing else of the file is held.
    reading = max(_reading_bytes(body.blocks, chosen, not on_device), _reading_bytes(t5.blocks, text, not on_device))
    parked = 0 if settings.offload == "none" else weights + text_weights + vae
    streamed = weights + reading if settings.offload == "block" else 0
    host_sampling = max(parked, streamed, reading)
    host_training = max(weights + 2 * lora + mean + optimizer, text_weights, streamed, reading)
    if shared_memory:
        everything = weights + text_weights + vae + (held if settings.offload == "block" else 0)
        host_sampling = everything + max(moment, decode, text_peak - text_weights, reading)
        host_training = training + reading + (weights if settings.offload == "block" else 0)
    return Peaks(
        weights, text_weights, lora, optimizer, activations, sampling, training, host_sampling, host_training, moments
    )


HELDOUT_ROWS = 10
"""Noise levels of the held-out loss; see `training.step.objective.HELDOUT_SIGMAS`."""


def step_traffic(settings: Settings) -> int:
    """Bytes that a training step brings to the device where blocks are streamed, else 0: every block that passes
    through, twice, but for the two that the forward pass ends with. A second pass has a forward pass more, for its
    target; counted is the mean over the steps."""
    if settings.offload != "block":
        return 0
    chosen = precision(settings.precision)
    sizes = [b.bytes(chosen) for b in anatomy(settings.flavour).transformer.blocks][settings.resident_blocks - 2 :]
    once = 2 * sum(sizes) - sum(sizes[-2:])
    return round(once + settings.preserved * (once + sum(sizes)))


def step_cost(settings: Settings) -> float:
    """The time of a mean step beside one without a second pass, where computing decides it.

    In units of a forward pass: the backward pass through frozen weights takes about one, recomputing its share of one;
    a second pass does all of it again, and one forward pass more for its target.
    """
    blocks = len(anatomy(settings.flavour).transformer.blocks)
    again = -(-blocks // settings.interval) / blocks if settings.interval else 0.0
    return 1 + settings.preserved * (3 + again) / (2 + again)


def heldout_rows(settings: Settings, rows: int) -> int:
    """How many of `rows` noise levels the held-out loss may take at a time (at least one) to stay below a step."""
    return _rows_within(anatomy(settings.flavour).transformer, _pass(settings, True), peaks(settings).activations, rows)


def _rows_within(body: Transformer, run: Pass, step: int, rows: int) -> int:
    fits = (n for n in range(rows, 1, -1) if sampling_bytes(body, replace(run, batch=n)) <= step)
    return next(fits, 1)


def _pass(settings: Settings, on_gpu: bool) -> Pass:
    size = snap_size(settings.pixels, settings.pixels, SIZE_MULTIPLE)[0]
    chosen = precision(settings.precision)
    return Pass(settings.batch_size, (size // PATCH) ** 2, settings.text_tokens, chosen, on_gpu, settings.compute)


def _trained_shapes(settings: Settings) -> list[tuple[int, ...]]:
    if settings.trained_parameters:
        # Whole linears: as a square matrix, which is right for what counts numbers and near for what counts rows.
        side = round(settings.trained_parameters**0.5)
        return [(side, side)] if settings.optimizer in ("adafactor", "came") else [(settings.trained_parameters,)]
    layers = lora_layers(settings.flavour, settings.target)
    kind, rank, factor = settings.adapter, settings.rank, settings.lokr_factor
    return [shape for rows, columns in layers.shapes for shape in adapter_shapes(kind, rank, rows, columns, factor)]


def _loading_bytes(blocks: tuple[Part, ...], chosen: Precision) -> int:
    """Bytes on top of the finished weights while the largest linear waits unquantised for its turn and is quantised."""
    if not chosen.quantised:
        return 0
    return max(chosen.dtype.itemsize * b.largest_linear + quantising(b.largest_linear, chosen) for b in blocks)


def _reading_bytes(blocks: tuple[Part, ...], chosen: Precision, quantise_here: bool) -> int:
    """Bytes in the computer's memory while the largest linear is read, and with `quantise_here` quantised."""
    return max(
        chosen.dtype.itemsize * b.largest_linear
        + max(4 * b.largest_linear, quantise_here * quantising(b.largest_linear, chosen))
        for b in blocks
    )


def _streamed_bytes(body: Transformer, chosen: Precision, resident: int, among: tuple[Part, ...] = ()) -> int:
    """The transformer's bytes on the device: what lies outside the blocks, the first resident − 2 blocks, and the two
    largest that pass through, of all or `among` some."""
    sizes = [b.bytes(chosen) for b in body.blocks]
    stay, rest = sizes[: resident - 2], sizes[resident - 2 :]
    passing = sorted([b.bytes(chosen) for b in among] or rest)[-2:]
    return body.outside_blocks.bytes(chosen) + sum(stay) + sum(passing)


@dataclass(frozen=True)
class Recommendation:
    """The settings to choose on a machine, what they need there, and a sentence for people.

    `fits`: whether peaks and margins fit; if not, these are the settings that need least.
    """

    purpose: Purpose
    precision: str
    text_precision: str
    offload: Offload
    resident_blocks: int
    offload_during_startup: bool
    gradient_checkpointing: bool
    device_peak_bytes: int
    host_peak_bytes: int
    device_memory_bytes: int
    host_memory_bytes: int
    device_name: str
    fits: bool
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def applied_to(self, settings: Settings) -> Settings:
        """`settings` with what is recommended."""
        return replace(settings, **{name: getattr(self, name) for name in CHOSEN})


CHOSEN = (
    *("precision", "text_precision", "offload", "resident_blocks", "offload_during_startup"),
    "gradient_checkpointing",
)
"""What is recommended of the settings."""

TEXT_CHOICES = ("bf16", "int8", "nf4")
CHOICES = ("bf16", "int8", "int4", "nf4")
"""Our own precisions, best first: see `docs/memory.md` for what each loses."""


def recommend(base: Settings, on: Machine | None = None, purpose: Purpose = "sampling") -> Recommendation:
    """The best settings that fit a machine (None: this one) with its margins, for `base`'s flavour, size, batch, rank
    and target.

    Quality goes first: bf16 (fp16 where the GPU has no bf16 of its own), int8, int4, nf4; within one precision the
    faster offload mode; T5 is quantised only where it does not fit. Blocks are streamed when nothing else fits, as many
    resident as there is room for. In training, gradient checkpointing is switched off where there is room, because
    recomputing costs about a third more time.
    """
    on = on or machine()
    best = next((s for s in _candidates(base, on, purpose) if fits_on(s, on, purpose)), None)
    least = min(_candidates(base, on, purpose), key=lambda s: _need(s, on, purpose)[0])
    chosen, fits = (least, False) if best is None else (_refined(best, on, purpose), True)
    device, host = _need(chosen, on, purpose)
    return Recommendation(
        purpose,
        **{name: getattr(chosen, name) for name in CHOSEN},
        device_peak_bytes=device,
        host_peak_bytes=host,
        device_memory_bytes=on.device_bytes,
        host_memory_bytes=on.host_bytes,
        device_name=on.name,
        fits=fits,
        sentence=_sentence(chosen, on, purpose, device, host, fits),
    )


def _candidates(base: Settings, on: Machine, purpose: Purpose) -> Iterator[Settings]:
    base = replace(base, gradient_checkpointing=True, resident_blocks=2, offload_during_startup=False)
    # Where device and computer share one memory, moving a part away frees nothing.
    # In training the parts take turns in any case.
    modes: tuple[Offload, ...] = ("none",) if on.shared or purpose == "training" else ("none", "model")
    for name in CHOICES:
        name = "fp16" if name == "bf16" and not on.bf16 else name  # as large, and computed by the GPU itself
        for mode in modes:
            # T5 beside the transformer in a lower precision would trade quality for the seconds of an exchange.
            texts = TEXT_CHOICES if mode == "model" or on.shared or purpose == "training" else TEXT_CHOICES[:1]
            for text in texts:
                yield replace(base, precision=name, text_precision=text, offload=mode)
    if not on.shared:
        for name in ("int8", "nf4"):
            for text in TEXT_CHOICES:
                yield replace(base, precision=name, text_precision=text, offload="block")
        yield replace(base, precision="nf4", text_precision="nf4", offload="block", offload_during_startup=True)


def _refined(settings: Settings, on: Machine, purpose: Purpose) -> Settings:
    if settings.offload == "block":
        blocks = len(anatomy(settings.flavour).transformer.blocks)
        more = (replace(settings, resident_blocks=n) for n in range(blocks - 1, 2, -1))
        settings = next((s for s in more if fits_on(s, on, purpose)), settings)
    free = replace(settings, gradient_checkpointing=False)
    return free if purpose == "training" and fits_on(free, on, purpose) else settings


INTERVALS = (8, 4, 3, 2)
"""Of `checkpointing_interval`, besides 1."""


def recomputing_least(settings: Settings, on: Machine) -> Settings:
    """Training settings with gradient checkpointing of as few blocks as a machine's memory allows: of none, of every
    n-th, or (also where nothing fits) of all. Without gradient checkpointing they stay as they are."""
    if not settings.gradient_checkpointing:
        return settings
    ways = [replace(settings, gradient_checkpointing=False)]
    ways += [replace(settings, checkpointing_interval=n) for n in INTERVALS]
    return next((s for s in ways if fits_on(s, on, "training")), replace(settings, checkpointing_interval=1))


def _need(settings: Settings, on: Machine, purpose: Purpose) -> tuple[int, int]:
    found = peaks(settings, on.shared)
    if purpose == "training":
        return found.training, found.host_training
    return found.sampling, found.host_sampling


def fits_on(settings: Settings, on: Machine, purpose: Purpose) -> bool:
    """Whether the peaks leave a machine its margins."""
    device, host = _need(settings, on, purpose)
    return device <= on.device_budget and host <= on.host_budget


def _sentence(settings: Settings, on: Machine, purpose: Purpose, device: int, host: int, fits: bool) -> str:
    what = f"precision {settings.precision}, T5 in {settings.text_precision}, offload {settings.offload}"
    if settings.offload == "block":
        what += f" with {settings.resident_blocks} resident blocks"
    if settings.offload_during_startup:
        what += " and offload_during_startup"
    if purpose == "training":
        what += f", gradient checkpointing {'on' if settings.gradient_checkpointing else 'off'}"
    doing = "Train" if purpose == "training" else "Sample"
    place = f"{on.name} ({on.device_bytes / GIB:.0f} GiB, computer {on.host_bytes / GIB:.0f} GiB)"
    need = f"{in_gib(device)} on the device and {in_gib(host)} of the computer's memory"
    if on.shared:
        need = f"{in_gib(host)} of memory"
    if fits:
        return f"{doing} at {settings.pixels} pixels on {place} with {what}: needs about {need}."
    return (
        f"{settings.pixels} pixels do not fit on {place}: even {what} needs about {need}, and room for everything else "
        "has to stay. Choose a smaller size or batch, close other programs, or use a larger device."
    )
