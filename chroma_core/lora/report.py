"""What a LoRA file is, as plain values and as text: sizes, alpha, targets, base, recipe, training, doubts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .modules import LoraFile, LoraModule, quoted
from .norms import layer_group, update_norm
from .targets import named_target

_ALPHA_SOURCES = {
    "tensors": "stated in the file's tensors",
    "configuration": "stated in the file's header or in the adapter_config.json beside it",
    "absent": "not stated: taken as the rank, so that the factor is 1",
    "mixed": "stated for some layers; for the others taken as the rank, so that their factor is 1",
}
_TITLE = {
    "modelspec.title": "title",
    "chromakit.trigger": "trigger",
    "modelspec.trigger_phrase": "trigger",
    "modelspec.author": "author",
    "modelspec.description": "description",
    "modelspec.license": "licence",
}
_SOME = 1e-12


def lora_report(
    lora: LoraFile, name: str = "", path: Path | None = None, remarks: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything that is known of a LoRA, as values for JSON.

    Args:
        name: what to call it.
        path: its file, for the size in bytes.
        remarks: doubts from elsewhere, such as a base that differs; they come first among the `warnings`.
    """
    norms = {layer: update_norm(module) for layer, module in lora.modules.items()}
    header = lora.metadata
    return {
        "file": name,
        "bytes": path.stat().st_size if path is not None and path.is_file() else None,
        "dialect": lora.dialect,
        "kinds": lora.kinds,
        "modules": len(lora.modules),
        "parameters": lora.parameters,
        "dtypes": sorted({str(t.dtype)[6:] for m in lora.modules.values() for t in m.factors().values()}),
        "ranks": lora.ranks,
        "alphas": lora.alphas,
        "alpha_source": lora.alpha_source,
        "target": named_target(list(lora.modules)),
        "groups": _groups(lora, norms),
        "base": {
            "sha256": header.get("chromakit.base_sha256"),
            "flavour": header.get("chromakit.flavour"),
            "file": header.get("chromakit.base_file"),
        },
        "trigger": header.get("chromakit.trigger") or header.get("modelspec.trigger_phrase"),
        "recipe": _json(header.get("chromakit.recipe")),
        "training": _json(header.get("chromakit.training")),
        "versions": _json(header.get("chromakit.versions")),
        "converted_from": _json(header.get("chromakit.converted_from")),
        "unmatched": list(lora.unmatched),
        "warnings": [*remarks, *_doubts(lora, norms)],
        "metadata": dict(header),
    }


def report_text(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [f"{report['file'] or 'LoRA'}: {_kinds(report)}, {report['dialect']} dialect"]
    lines += [f"WARNING: {warning}" for warning in report["warnings"]]
    size = f", {report['bytes'] / 2**20:.1f} MiB" if report["bytes"] else ""
    lines += [
        f"{report['parameters']:,} numbers in {', '.join(report['dtypes'])}{size}",
        f"target: {report['target'] or 'a choice of its own'}",
        f"rank {_listed(report['ranks']) or 'whole factors'}, alpha {_listed(report['alphas'])} "
        f"({_ALPHA_SOURCES[report['alpha_source']]})",
        "",
        *_table(report["groups"]),
        "",
    ]
    base = report["base"]
    known = [
        base["flavour"],
        base["file"],
        f"sha256 {base['sha256'][:16]}…" if base["sha256"] else None,
    ]
    lines.append(f"base: {', '.join(filter(None, known)) or 'not stated'}")
    lines.append(f"trigger: {report['trigger'] or 'not stated'}")
    for key in ("recipe", "training", "versions", "converted_from"):
        if report[key]:
            lines.append(f"{key.replace('_', ' ')}: {_flat(report[key])}")
    told = {label: report["metadata"][key] for key, label in _TITLE.items() if key in report["metadata"]}
    lines += [f"{label}: {value}" for label, value in told.items() if label != "trigger"]
    return "\n".join(lines)


def _groups(lora: LoraFile, norms: dict[str, float]) -> list[dict[str, Any]]:
    """Layers of one kind together: how many, their ranks, alphas, shapes, and the mean size of the change."""
    gathered: dict[str, list[str]] = {}
    for name in lora.modules:
        gathered.setdefault(layer_group(name), []).append(name)
    groups = []
    for label, names in gathered.items():
        part = LoraFile({name: lora.modules[name] for name in names})
        shapes = sorted({module.shape for module in part.modules.values()})
        groups.append(
            {
                "layers": label,
                "count": len(names),
                "ranks": part.ranks,
                "alphas": part.alphas,
                "shapes": [list(shape) for shape in shapes],
                "mean_norm": sum(norms[name] for name in names) / len(names),
            }
        )
    return groups


def _table(groups: list[dict[str, Any]]) -> list[str]:
    rows = [("layers", "count", "out×in", "rank", "alpha", "mean ‖ΔW‖")]
    for group in groups:
        rows.append(
            (
                group["layers"],
                str(group["count"]),
                " ".join("×".join(map(str, shape)) for shape in group["shapes"]),
                _listed(group["ranks"]) or "whole",
                _listed(group["alphas"]),
                f"{group['mean_norm']:.3g}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _doubts(lora: LoraFile, norms: dict[str, float]) -> list[str]:
    found = []
    if lora.unmatched:
        found.append(f"{len(lora.unmatched)} keys are not Chroma's: {quoted(lora.unmatched)}.")
    still = [name for name, norm in norms.items() if norm < _SOME]
    if still and lora.kinds != ["dora"]:
        found.append(f"{len(still)} of {len(norms)} layers change nothing (all zero): {quoted(still)}.")
    strongest = max((abs(module.scale) for module in lora.modules.values()), default=0.0)
    if strongest > 8:
        found.append(f"alpha / rank is {strongest:g}, which is unusually strong.")
    folded = all(isinstance(module, LoraModule) and module.scale == 1 for module in lora.modules.values())
    if lora.alpha_source == "configuration" and not folded:
        found.append(
            "alpha stands in a configuration that ComfyUI does not read: there the factor would be 1. Convert the file "
            "to the universal dialect for ComfyUI."
        )
    if "dora" in lora.kinds:
        found.append("It is a DoRA, which ComfyUI computes only nearly as it was trained (see docs/lora.md).")
    if "peft" in lora.dialect:
        found.append("ComfyUI's own loader does not read the peft dialect. Convert it to universal for use there.")
    return found


def _kinds(report: dict[str, Any]) -> str:
    words = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr"}
    return f"{' and '.join(words[kind] for kind in report['kinds'])} on {report['modules']} layers"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _flat(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{k} {json.dumps(v) if isinstance(v, dict) else v}" for k, v in value.items() if v is not None)


def _json(text: str | None) -> Any:
    """What a header field holds; the text itself when it is no JSON."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text
