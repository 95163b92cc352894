"""The OpenAPI document, made of the routes and their handlers' annotations."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route

from . import __version__
from .errors import error_body

ERROR = {
    "description": "What went wrong; `param` names the field of the request, if it was one.",
    "content": {
        "application/json": {"example": error_body("...", type="...", param="...", code="...")}
    },
}


def document(routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """https://spec.openapis.org/oas/v3.1.0"""
    operations = list(_operations(routes, ""))
    types = [type for _, _, body, answer, _ in operations for type in (body, answer) if type]
    schemas, components = msgspec.json.schema_components(
        dict.fromkeys(types), ref_template="#/components/schemas/{name}"
    )
    schema = dict(zip(dict.fromkeys(types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for path, method, body, answer, summary in operations:
        good: dict[str, Any] = {"description": "OK"}
        if answer:
            good["content"] = {"application/json": {"schema": schema[answer]}}
        operation: dict[str, Any] = {
            "summary": summary,
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in re.findall(r"{(\w+)}", path)
            ],
            "responses": {"200": good, "default": ERROR},
        }
        if body:
            content = {"application/json": {"schema": schema[body]}}
            operation["requestBody"] = {"required": True, "content": content}
        if path.startswith(("/admin", "/metrics")):
            operation["security"] = [{}, {"admin_key": []}]
        paths.setdefault(path, {})[method] = operation
    key = {"type": "apiKey", "in": "header", "name": "X-Admin-Key"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Opta-LMX", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"admin_key": key}},
    }


def _operations(
    routes: Iterable[BaseRoute], prefix: str
) -> Iterator[tuple[str, str, Any, Any, str]]:
    """Path, method, type of the request's body and of the answer (None: no JSON), summary."""
    for route in routes:
        if isinstance(route, Mount):
            yield from _operations(route.routes, prefix + route.path)
        elif isinstance(route, Route) and not route.path.endswith("/"):
            handler = inspect.unwrap(route.endpoint)
            hints = get_type_hints(handler, include_extras=True)
            answer = hints.get("return")
            if get_origin(answer) is Annotated:  # a Response that holds this
                answer = get_args(answer)[1]
            elif answer is Response:
                answer = None
            [summary, *_] = (inspect.getdoc(handler) or "").splitlines() or [""]
            path = prefix + re.sub(r":\w+}", "}", route.path)
            for method in sorted((route.methods or set()) - {"HEAD"}):
                yield path, method.lower(), hints.get("body"), answer, summary
