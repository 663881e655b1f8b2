"""docs/import.md from the tables: `python -m chroma_core.import_config.document docs/import.md` writes it.

A test compares the file with `page()`.
"""

from __future__ import annotations

import sys

from ..files import write_atomic
from . import ai_toolkit, ai_toolkit_sets, simpletuner, simpletuner_sets
from .rules import Rule, Table

INTRO = """# Bring your configuration

    python -m chroma_core import-config FILE [--dataloader FILE] [--output job.toml] [--json]

reads SimpleTuner's `config.json` (and the data set file that it names) or ai-toolkit's YAML for a Chroma LoRA, writes
a `job.toml` for `python -m chroma_core train`, and reports option by option what was taken over, what differs and why,
what has no counterpart, and what it does not know. The remarks also stand at the head of the job file. `--json` prints
the same report for a program. An existing file is never overwritten.

- JSON may have comments and trailing commas; SimpleTuner's options may have their leading dashes.
- `data_backend_config` and paths of pictures and models are looked for from the present folder, then from the file's
  own folder and the two above it; what is found is written as an absolute path. What is not found stays as it is, and
  the report says so. `--dataloader` names SimpleTuner's data set file directly.
- Data sets that differ in nothing but their resolution become one with several resolutions.
- A configuration for another model family, a full fine-tune or another program is refused, naming what it is.
- Every value is checked as in any job file; an error names the foreign option.
- YAML is read with PyYAML, which comes with huggingface_hub; plain data only.

## What is not stated

An option that the foreign file does not state has ChromaKit's default. These differ:

| | SimpleTuner | ai-toolkit | ChromaKit |
|---|---|---|---|
| noise levels | logit-normal, shift 3, split remap | logit-normal | logit-normal, remap by a coin, no shift |
| learning rate | sine, 500 steps of warm-up | constant | constant |
| captions | file names | text files | text files |
| LoRA dropout | 0.1 | 0 | 0 |
| caption dropout | 0 | 0 | 0.1 |
| batch size | 4 | 1 | 1 |
| resolution | 1024 | 512 | the flavour's (1024) |
| LoRA layers | `all` | every linear layer of the blocks | `all` |
| guidance of previews | 1 | 7 | 4 |

Some things are no option there, and are written into the job file so that it trains as the other program does:
SimpleTuner's tail remap (`objective.remap = "quadratic_split"`, or `"none"` with the schedules that switch it off);
ai-toolkit's recipe for text and previews (`recipe = "ai-toolkit"`), noise levels without remap, and its layers. With
SimpleTuner's split remap no noise level between ¼ and ¾ is trained; `objective.remap = "quadratic"` reaches them all
([what that does](timesteps.md)).
Its shift goes before the remap, ours after it, so a shift is taken over with a remark, and its default of 3 is not.

A model is named by its repository (`lodestones/Chroma1-Base`, `-HD`, `-Flash` → the flavour), a `.safetensors` or
`.gguf` file (→ `model.transformer`) or a folder in diffusers layout (→ `model.folder`). Other repositories have no
counterpart; development versions (`lodestones/Chroma`) become the flavour's published weights, with a remark.

An option that this version of ChromaKit lacks is reported as one without counterpart, whatever the tables say.
"""


def page() -> str:
    """The whole of docs/import.md."""
    parts = [INTRO, "## SimpleTuner: config.json\n", _table(simpletuner.OPTIONS)]
    parts += [
        "## SimpleTuner: data sets\n\n"
        f"From config.json, for every set that does not say otherwise: {_names(simpletuner_sets.FOR_ALL_SETS)}.\n",
        _table(simpletuner_sets.SET_OPTIONS, "dataset."),
    ]
    for section, table in ai_toolkit.SECTIONS.items():
        parts += [f"## ai-toolkit: {section or 'the process'}\n", _table(table)]
    parts += ["## ai-toolkit: datasets\n", _table(ai_toolkit_sets.SET_OPTIONS, "dataset.")]
    return "\n".join(parts)


def _table(table: Table, section: str = "") -> str:
    """The options that become something, as a table; the others by their reason."""
    rows = ["| option | becomes | |", "|---|---|---|"]
    grouped: dict[tuple[str, str], list[str]] = {}
    for option, rule in table.items():
        if rule.to or rule.reason.startswith("`"):
            rows.append(f"| `{option}` | {_to(rule, section)} | {_cell(rule)} |")
        else:
            grouped.setdefault((rule.kind, rule.reason), []).append(option)
    titles = {
        "differs": "Different",
        "no counterpart": "No counterpart",
        "ignored": "Left out without a remark",
        "maps": "Checked",
    }
    for kind, title in titles.items():
        items = [f"- {_names(names)}: {reason}." for (k, reason), names in grouped.items() if k == kind]
        rows += ["", f"{title}:", "", *items] if items else []
    return "\n".join(rows) + "\n"


def _to(rule: Rule, section: str) -> str:
    return ", ".join(f"`{section}{path}`" for path in rule.to.replace(" or ", ", ").split(", ")) if rule.to else "–"


def _cell(rule: Rule) -> str:
    differs = rule.kind == "differs" and "differs" not in rule.reason
    return (("differs: " if differs else "") + rule.reason).replace("|", "\\|")


def _names(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    write_atomic(sys.argv[1], page()) if sys.argv[1:] else print(page())
