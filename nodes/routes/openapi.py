"""What there is under /chromakit, for people and for programs: an index, and an OpenAPI 3.1 document.

Both are made from the table that registers the routes, and from the models that read their bodies.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports] (Python 3.10 brings none of its own)

from aiohttp import web
from comfy_api.latest import io
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from ...chroma_core.loading.spec import ModelSpec
from ...chroma_core.options import options_of
from .. import host
from .common import JSON, STATUSES, Route, answer, told


class Told(TypedDict):
    """One route of the index."""

    method: str
    address: str
    summary: str


class Index(TypedDict):
    """What there is under /chromakit."""

    name: str
    version: str
    openapi: str
    docs: list[str]
    routes: list[Told]


DOCS = ["docs/programs.md", "docs/requests.md", "docs/nodes.md"]
"""Pages in the pack's folder about all this."""


def described(*routes: Route) -> tuple[Route, ...]:
    """The routes, with the two that tell of all of them."""

    async def index(request: web.Request) -> web.Response:
        shown: list[Told] = [
            {"method": each.method.upper(), "address": each.path, "summary": each.summary} for each in every
        ]
        return told(Index(name="ChromaKit", version=version(), openapi=openapi.path, docs=DOCS, routes=shown))

    async def whole(request: web.Request) -> web.Response:
        return await answer(lambda: document(every))

    openapi = Route("get", "/chromakit/openapi.json", whole, "This document.", dict[str, Any])
    every = (Route("get", "/chromakit", index, "What there is, and where it is described.", Index), openapi, *routes)
    return every


@cache
def version() -> str:
    """The pack's."""
    return tomllib.loads((host.PACK / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


@cache
def document(routes: tuple[Route, ...]) -> dict[str, Any]:
    """The OpenAPI document of a table of routes."""
    inputs: list[Any] = [((r, "body"), "validation", TypeAdapter(r.body)) for r in routes if isinstance(r.body, type)]
    inputs += [((r, "answer"), "serialization", TypeAdapter(r.answer)) for r in routes if _is_json(r)]
    found, shared = TypeAdapter.json_schemas(inputs, ref_template="#/components/schemas/{model}")
    schemas = {key: _plain(schema) for (key, _), schema in found.items()}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method] = _operation(route, schemas)
    models = {name: _plain(schema) for name, schema in shared["$defs"].items()}
    _describe(models[ModelSpec.__name__]["properties"], ModelSpec)
    return {
        "openapi": "3.1.0",
        "info": {"title": "ChromaKit", "version": version(), "description": "Chroma in ComfyUI: training, sampling."},
        "paths": paths,
        "components": {"schemas": {"Error": ERROR, **models}},
    }


ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
"""What is answered to whatever cannot be done, in words."""

OF_BODIES = (413, 415, 507)
"""Statuses of errors that only a request with a body can have."""


def _is_json(route: Route) -> bool:
    return not isinstance(route.answer, str)


def _operation(route: Route, schemas: Mapping[Any, Any]) -> dict[str, Any]:
    words = re.findall(r"\w+", route.path)[1:]
    answer = {JSON: {"schema": schemas[route, "answer"]}} if _is_json(route) else {route.answer: {}}
    success = {str(status): {"description": "Done.", "content": answer} for status in route.statuses}
    operation: dict[str, Any] = {
        "operationId": "_".join([route.method, *words]),
        "tags": words[:1],
        "summary": route.summary,
        "parameters": [*_parts(route), *_queries(route)],
        "responses": {**success, **_errors(route)},
    }
    if route.method != "get":
        body = schemas.get((route, "body")) or ({"type": "object"} if route.body is None else _widgets(route.body()))
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": body}}}
    return operation


def _errors(route: Route) -> dict[str, Any]:
    said = {status: kind.__doc__ or "" for kind, status in STATUSES.items()}
    said = {route.otherwise: "It cannot be done.", **said}
    if route.method == "get":
        said = {status: text for status, text in said.items() if status not in OF_BODIES}
    if "{" not in route.path:
        said.pop(404)
    content = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": text, "content": content} for status, text in sorted(said.items())}


def _parts(route: Route) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", route.path):
        yield {"name": name, "in": "path", "required": True, "schema": route.parts.get(name, {"type": "string"})}


def _queries(route: Route) -> Iterator[dict[str, Any]]:
    if isinstance(route.queries, tuple):
        found = {each.name: {**each.schema, "description": each.sentence} for each in route.queries}
    else:
        found = _plain(TypeAdapter(route.queries).json_schema())["properties"]
        _describe(found, route.queries)
    for name, schema in found.items():
        yield {"name": name, "in": "query", "description": schema.pop("description", name), "schema": schema}


def _widgets(inputs: Sequence[Any]) -> dict[str, Any]:
    """The body that may hold a value for each of a node's inputs; see `common.read_widgets`."""
    return {"type": "object", "additionalProperties": False, "properties": {each.id: _widget(each) for each in inputs}}


def _widget(each: Any) -> dict[str, Any]:
    kinds = {io.Int.Input: "integer", io.Float.Input: "number", io.Boolean.Input: "boolean"}
    schema = {"type": kinds.get(type(each), "string"), "default": each.default, "description": each.tooltip}
    if isinstance(each, io.Combo.Input):
        schema["enum"] = list(each.options or ())
    elif isinstance(each, io.Int.Input | io.Float.Input):
        schema |= {"minimum": each.min, "maximum": each.max}
    return {key: value for key, value in schema.items() if value is not None}


def _describe(properties: dict[str, Any], owner: type) -> None:
    """Say of the fields of a dataclass what its options say, which pydantic does not read."""
    for name, each in options_of(owner).items():
        properties[name]["description"] = each.sentence
        if each.choices:
            properties[name]["examples"] = list(each.choices)


def _plain(schema: Any) -> Any:
    """A schema of pydantic's without what it adds for itself, and with an option's sentence as its description."""
    if isinstance(schema, list):
        return [_plain(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _plain(value) for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
    if isinstance(option := found.get("option"), dict) and "sentence" in option:
        found |= {"description": option["sentence"]}
        del found["option"]
    return found
