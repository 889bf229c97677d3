"""Which classes a configuration may name, decided before anything is imported.

Those of this library, of Lightning and of torch; those of modules that are imported already; and
the user's own that extend one of them, as far as their source shows it. All else is refused.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.machinery import ModuleSpec
from typing import Any

from jsonargparse import Namespace, set_parsing_settings

from fastvim.errors import UserError

TRUSTED = ("fastvim", "lightning", "lightning_fabric", "pytorch_lightning", "torch", "torchmetrics")
EXPECTED = "a class of fastvim, Lightning or torch, or one of your own that extends such a class"
_PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")


def admit(texts: Iterable[str]) -> None:
    """Let jsonargparse import the classes that may be named in these texts, and no others.

    Args:
        texts: of configurations and of the command line.
    """
    named = {path for text in texts for path in _PATH.findall(text)}
    own = {path.partition(".")[0] for path in named if _is_imported(path) or _extends(path)}
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=sorted(
            {*TRUSTED, *own} - {"jsonargparse"} - {*sys.stdlib_module_names}
        ),
        instantiate_subclass_spec_in_any=False,
        config_read_mode_fsspec_enabled=False,  # no configurations behind addresses
    )


def require_plain(config: Namespace) -> None:
    """Raise UserError for a class among plain values, as in `model_args`.

    Args:
        config: a parsed configuration, of which nothing is built yet.
    """
    for section in ("model", "data"):
        arguments = (config.get(section) or {}).get("init_args") or {}
        for option, value in vars(arguments).items() if arguments else ():
            if isinstance(value, dict) and (path := _class_within(value)) is not None:
                raise UserError(
                    f"{section}.{option} has class_path {path!r}: expected plain values"
                )


def _class_within(value: Any) -> Any:
    """The first `class_path` at any depth; None without one."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping) and "class_path" in value:
        return value["class_path"]
    inner = value.values() if isinstance(value, Mapping) else value
    several = inner if isinstance(value, Mapping | list | tuple) else ()
    return next((path for each in several if (path := _class_within(each)) is not None), None)


def _is_imported(path: str) -> bool:
    return path.rpartition(".")[0] in sys.modules


def _extends(path: str, seen: frozenset[str] = frozenset()) -> bool:
    """Whether the source of a class shows that it extends a trusted one."""
    if path.partition(".")[0] in TRUSTED:
        return True
    module, _, name = path.rpartition(".")
    source = None if path in seen or not module else _source(module)
    if source is None:
        return False
    names, classes = _names(source, module)
    bases = [
        names.get(base.partition(".")[0], "") + base[len(base.partition(".")[0]) :]
        for base in classes.get(name, ())
    ]
    if name not in classes and name in names:
        bases = [names[name]]
    return any(_extends(base, seen | {path}) for base in bases)


def _names(tree: ast.Module, module: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """What each name of a module means, as a dotted path, and the bases of its classes."""
    names: dict[str, str] = {}
    classes: dict[str, list[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            package = ".".join([*above, *filter(None, [node.module])])
            names |= {each.asname or each.name: f"{package}.{each.name}" for each in node.names}
        elif isinstance(node, ast.ClassDef):
            classes[node.name] = [ast.unparse(base) for base in node.bases]
            names[node.name] = f"{module}.{node.name}"
    return names, classes


def _source(module: str) -> ast.Module | None:
    """The source of a module, which is not imported; None where none is found."""
    places, spec, name = None, None, ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = _find(name, places)
        if spec is None:
            return None
        places = spec.submodule_search_locations
    with suppress(Exception):  # a loader without source, or source that is no Python
        text = spec.loader.get_source(module)  # type: ignore[union-attr]
        return ast.parse(text)
    return None


def _find(name: str, places: Any) -> ModuleSpec | None:
    finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next((spec for each in finders if (spec := each.find_spec(name, places))), None)
