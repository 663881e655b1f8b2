"""Scripts that make a shell complete the command line, written from its parser: commands, options, and their choices.

They complete `chromakit`, the name under which the command is installed; no shell asks back for `python -m …`.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NAME = "chromakit"


@dataclass(frozen=True)
class Place:
    """What may follow the commands that stand there already: `jobs` or `jobs use`.

    words: commands, or the choices of an argument, with their help; flags: help and choices of each.
    """

    after: tuple[str, ...]
    words: dict[str, str]
    flags: dict[str, tuple[str, tuple[str, ...]]]

    @property
    def name(self) -> str:
        """The commands, as the scripts know them."""
        return "".join(f" {word}" for word in self.after)


def places(parser: argparse.ArgumentParser, after: tuple[str, ...] = ()) -> Iterator[Place]:
    """Every place of a parser and of the commands below it, from the top."""
    complete: Callable[[], object] = getattr(parser, "complete", lambda: parser)
    complete()
    words: dict[str, str] = {}
    flags: dict[str, tuple[str, tuple[str, ...]]] = {}
    below: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words |= {each.dest: each.help or "" for each in action._choices_actions}
            below |= action.choices
            continue
        choices = tuple(map(str, action.choices or ()))
        if action.option_strings:
            said = (action.help or "").replace("%%", "%")
            flags |= dict.fromkeys(action.option_strings, (said, choices))
        else:
            words |= dict.fromkeys(choices, action.help or "")
    yield Place(after, words, flags)
    for name, inner in below.items():
        yield from places(inner, (*after, name))


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for one of `SHELLS`. Where nothing else is known to fit, the shell completes names of files."""
    return SHELLS[shell](list(places(parser)))


BASH = """\
# {name}: eval "$({name} completion bash)"
_{name}() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} place= words= flags= i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$place ${{COMP_WORDS[i]}}" in
            {commands}) place="$place ${{COMP_WORDS[i]}}" ;;
        esac
    done
    case "$place $before" in
{values}
    esac
    if [[ -z $words ]]; then
        case "$place" in
{words}
        esac
        [[ $current == -* ]] && words=$flags
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _{name} {name}
"""


def _bash(found: list[Place]) -> str:
    values = [
        f'            "{place.name} {flag}") words="{" ".join(choices)}" ;;'
        for place in found
        for flag, (_, choices) in place.flags.items()
        if choices
    ]
    words = [
        f'            "{place.name}") words="{" ".join(place.words)}" flags="{" ".join(place.flags)}" ;;'
        for place in found
    ]
    commands = "|".join(f'"{place.name}"' for place in found if place.after)
    return BASH.format(name=NAME, commands=commands, values="\n".join(values), words="\n".join(words))


def _zsh(found: list[Place]) -> str:
    """zsh reads bash's completions with a function of its own."""
    return f"autoload -U +X bashcompinit && bashcompinit\n{_bash(found)}"


def _fish(found: list[Place]) -> str:
    lines = [f"# {NAME}: {NAME} completion fish | source"]
    for place in found:
        seen = [f"__fish_seen_subcommand_from {word}" for word in place.after] or ["__fish_use_subcommand"]
        further = (
            f"; and not __fish_seen_subcommand_from {' '.join(place.words)}" if place.after and place.words else ""
        )
        begin = f"complete -c {NAME} -n {shlex.quote('; and '.join(seen) + further)}"
        lines += [f"{begin} -f -a {word} -d {_said(text)}" for word, text in place.words.items()]
        for flag, (text, choices) in place.flags.items():
            dash = "-l" if flag.startswith("--") else "-s"
            given = f" -x -a {shlex.quote(' '.join(choices))}" if choices else ""
            lines.append(f"{begin} {dash} {flag.lstrip('-')} -d {_said(text)}{given}")
    return "\n".join(lines) + "\n"


def _said(text: str) -> str:
    """A help text as a quoted word: fish knows no other escapes in single quotes than these."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


SHELLS: dict[str, Callable[[list[Place]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
"""What writes the script of each shell."""
