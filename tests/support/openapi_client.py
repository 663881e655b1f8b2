"""A client that knows nothing of ChromaKit but its OpenAPI document: calls are built from it, answers held to it."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from jsonschema import Draft202012Validator

JSON = "application/json"


@dataclass(frozen=True)
class Answer:
    """A status, and JSON, or the bytes of a file."""

    status: int
    value: Any


class Client:
    """The operations of a document by their ids.

    Objects whose fields are listed may have no others, so that an answer with a field that is not described is wrong.
    """

    def __init__(self, url: str, path: str):
        self.url = url
        with urlopen(url + path) as answer:
            self.document = json.load(answer)
        self._models = copy.deepcopy(self.document["components"])
        _close(self._models)
        self.operations: dict[str, tuple[str, str, dict[str, Any]]] = {
            operation["operationId"]: (method, path, operation)
            for path, methods in self.document["paths"].items()
            for method, operation in methods.items()
        }
        self.called: dict[str, set[int]] = {name: set() for name in self.operations}

    def call(self, name: str, body: Any = None, /, checked: bool = True, **parameters: Any) -> Answer:
        """Call an operation; `checked`: what is sent is right by the document. What comes back always has to be."""
        method, path, operation = self.operations[name]
        query = {}
        for each in operation["parameters"]:
            value = parameters.pop(each["name"], None)
            assert value is not None or not each.get("required"), each["name"]
            if value is None:
                continue
            if checked:
                self.check(value, each["schema"])
            if each["in"] == "path":
                path = path.replace(f"{{{each['name']}}}", quote(str(value), safe=""))
            else:
                query[each["name"]] = json.dumps(value) if isinstance(value, bool) else str(value)
        assert not parameters, f"{name} takes no {parameters}"
        data, headers = None, {}
        if "requestBody" in operation:
            data = {} if body is None else body
            if checked:
                self.check(data, operation["requestBody"]["content"][JSON]["schema"])
            data, headers = json.dumps(data).encode(), {"Content-Type": JSON}
        address = f"{self.url}{path}" + (f"?{urlencode(query)}" if query else "")
        status, kind, content = _sent(Request(address, data, headers, method=method.upper()))
        self.called[name].add(status)
        described = operation["responses"][str(status)]["content"]
        if kind != JSON:
            assert any(kind.startswith(known.rstrip("*")) for known in described), (name, kind)
            return Answer(status, content)
        value = json.loads(content)
        self.check(value, described[JSON]["schema"])
        return Answer(status, value)

    def check(self, value: Any, schema: dict[str, Any]) -> None:
        """Raises ValidationError."""
        closed = copy.deepcopy(schema)
        _close(closed)
        Draft202012Validator({**closed, "components": self._models}).validate(value)


def _sent(request: Request) -> tuple[int, str, bytes]:
    try:
        with urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers.get_content_type(), answer.read()
    except HTTPError as error:
        return error.code, error.headers.get_content_type(), error.read()


def _close(schema: Any) -> None:
    """Allow no fields in objects beside those that are listed."""
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _close(inner)
    if isinstance(schema, dict) and schema.get("type") == "object" and "properties" in schema:
        schema.setdefault("additionalProperties", False)
