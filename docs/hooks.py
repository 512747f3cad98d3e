"""What the site makes from the code: formulas as MathML, the keys of recipes, the public names."""

from __future__ import annotations

import re
from typing import Any

_DISPLAY = re.compile(r"^```math\n(.*?)\n```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<![\\$`])\$`(.+?)`\$")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """GitHub's own notation of formulas (```math, $`...`$) becomes MathML, which browsers draw without a script."""
    if page.file.src_uri == "reference/recipe.md":
        markdown = markdown.replace("<!-- keys -->", recipe_keys())
    if page.file.src_uri == "reference/python.md":
        markdown = markdown.replace("<!-- names -->", public_names())
    if "math" not in markdown and "$`" not in markdown:
        return markdown
    from latex2mathml.converter import convert

    shown = _DISPLAY.sub(lambda found: convert(found[1], display="block"), markdown)
    return _INLINE.sub(lambda found: convert(found[1]), shown)


def public_names() -> str:
    """An entry of the reference for everything `import deploy_prune as dp` offers."""
    import deploy_prune

    return "\n\n".join(f"::: {module}.{name}" for name, module in deploy_prune._WHERE.items())


def recipe_keys() -> str:
    """A table per part of a recipe: key, type, default, meaning; from the class that reads recipes."""
    from deploy_prune.recipe import schema

    found = schema()
    parts = found.get("$defs", {})
    blocks = [_table("The recipe itself", found, parts)]
    for name, prop in found["properties"].items():
        own = _reference(prop)
        if own in parts:
            about = parts[own].get("description", "").split("\n\n")[0].replace("\n", " ")
            blocks.append(_table(f"`{name}:`", parts[own], parts, about))
    return "\n\n".join(blocks)


def _table(title: str, part: dict[str, Any], parts: dict[str, Any], about: str = "") -> str:
    lines = [f"## {title}", "", about, "", "| key | type | default | meaning |", "|---|---|---|---|"]
    for key, prop in part["properties"].items():
        if _reference(prop) in parts and title == "The recipe itself":
            continue
        default = "required" if key in part.get("required", []) else f"`{prop.get('default')}`"
        meaning = prop.get("description", "").replace("\n", " ").replace("|", "\\|")
        lines.append(f"| `{key}` | {_type(prop)} | {default} | {meaning} |")
    return "\n".join(lines)


def _reference(prop: dict[str, Any]) -> str:
    options = [prop, *prop.get("allOf", []), *prop.get("anyOf", [])]
    return next((o["$ref"].rsplit("/", 1)[-1] for o in options if "$ref" in o), "")


def _type(prop: dict[str, Any]) -> str:
    if "enum" in prop:
        return " \\| ".join(f"`{value}`" for value in prop["enum"])
    if "const" in prop:
        return f"`{prop['const']}`"
    if "anyOf" in prop:
        return " or ".join(_type(option) for option in prop["anyOf"])
    if prop.get("type") == "array":
        return f"list of {_type(prop.get('items', {}))}"
    bounds = [f"{sign} {prop[key]}" for key, sign in _BOUNDS.items() if key in prop]
    return " ".join([str(prop.get("type", "any")), *bounds]).strip()


_BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
