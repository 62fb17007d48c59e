"""Cross-references for the site: ``:class:`engm.ENGM``` in a docstring becomes a link.

This is an extension of griffe, which reads the sources for mkdocstrings. Names are looked up where the docstring
stands, as Python would look them up; a name that means nothing is a warning. A name that ``engm`` exports has to be on
the site, any other becomes a link if it is there, and code if not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc|obj):`(~?)([\w.]+)`")
OURS = "engm"


class SphinxRoles(griffe.Extension):
    """Rewrites the roles in every docstring of the package, once it is read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        if pkg.name != OURS:
            return
        for obj in every_object(pkg):
            if obj.docstring is not None:
                obj.docstring.value = ROLE.sub(partial(reference, pkg, obj), obj.docstring.value)


def every_object(obj: griffe.Object) -> Iterator[griffe.Object]:
    """The object and everything that is defined in it."""
    yield obj
    for member in obj.members.values():
        if isinstance(member, griffe.Object):
            yield from every_object(member)


def reference(pkg: griffe.Module, obj: griffe.Object, role: re.Match[str]) -> str:
    """The Markdown that a role becomes."""
    short, name = role.groups()
    shown = name.rpartition(".")[2] if short else name
    if name.startswith("torch."):
        return f"`{shown}`"
    path = find(pkg, obj, name)
    if path is None:
        griffe.logger.warning(f"{obj.path}: {role[0]} names nothing")
        return f"`{shown}`"
    top = path.partition(".")[2]
    exported = top in {str(export) for export in pkg.exports or []}
    if exported and top in pkg[top].members:  # a function named as its module, which griffe takes for the module
        path = f"{path}.{top}"
    return f'<autoref identifier="{path}"{"" if exported else " optional"}>`{shown}`</autoref>'


def find(pkg: griffe.Module, obj: griffe.Object, name: str) -> str | None:
    """The path of ``name`` as a docstring of ``obj`` would use it: in its class and bases, in its module, or whole."""
    if name.startswith(f"{OURS}."):
        return name if exists(pkg, name) else None
    scope: griffe.Object | None = obj
    while scope is not None:
        members = scope.all_members if scope.is_class else scope.members
        if name.partition(".")[0] in members and exists(pkg, f"{scope.path}.{name}"):
            return f"{scope.path}.{name}"
        scope = scope.parent if isinstance(scope.parent, griffe.Object) and not scope.is_module else None
    return None


def exists(pkg: griffe.Module, path: str) -> bool:
    """Whether there is something at a path in the package, inherited members included."""
    *parts, last = path.split(".")[1:]
    try:
        holder = pkg[parts] if parts else pkg
        return last in holder.all_members
    except KeyError:
        return False
