"""What the site is made of besides the files of ``docs/``, for MkDocs (``hooks`` in ``mkdocs.yml``).

- ``settings.md``, ``api.md``: lines ``<!-- settings -->``, ``<!-- names: PACKAGE -->`` and so on become what the package
  itself says, so that they cannot grow old.
- Links that lead out of ``docs/`` (``../results/sizes.png``, ``../SECURITY.md``), which are right in the repository: what they
  lead to becomes part of the site.
- An entry of ``nav`` that is a folder holds its pages. Pages that ``nav`` does not name follow under their folder's name, or
  under "More".
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parent))
import generated

ROOT = Path(__file__).resolve().parents[2]
#: The target of a Markdown link or image that is neither an address nor an anchor of the same page.
LINK = re.compile(r"(\]\()(?![a-z]+:|#|<)([^)#\s]+)")
CODE = re.compile(r"(^```.*?^```$|^(?: {4}|\t).*?$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"^<!-- (\w+)(?:: ([\w.]+))? -->$", re.MULTILINE)


def _outside_code(text: str, change: Any) -> str:
    """``text`` with ``change`` applied to what is not code."""
    return "".join(part if i % 2 else change(part) for i, part in enumerate(CODE.split(text)))


def _place_in_site(path: str) -> str:
    """The place in the site of a file of the repository. The README, whose name is a folder's index, would be the home page."""
    inside = path.removeprefix("docs/")
    return "readme.md" if inside == "README.md" and inside == path else inside


def _place_in_repository(place: str) -> str:
    """The file of the repository that has this place in the site."""
    if place == "readme.md":
        return "README.md"
    return f"docs/{place}" if (ROOT / "docs" / place).exists() else place


def _targets(path: str) -> list[str]:
    """Files of the repository outside ``docs/`` to which a page links, by their paths from its root."""
    found: list[str] = []

    def note(text: str) -> str:
        for _, target in LINK.findall(text):
            to = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
            if not to.startswith(("docs/", "..")) and (ROOT / to).is_file():
                found.append(to)
        return text

    _outside_code((ROOT / path).read_text(encoding="utf-8"), note)
    return found


def on_config(config: Any) -> Any:
    """Names pages outside ``docs/`` in ``nav`` by their place in the site."""

    def placed(item: Any) -> Any:
        if isinstance(item, list):
            return [placed(i) for i in item]
        if isinstance(item, dict):
            return {k: placed(v) for k, v in item.items()}
        return _place_in_site(item.removeprefix("../")) if item.startswith("../") else item

    config.nav = placed(config.nav)
    return config


def _named(item: Any) -> list[str]:
    if isinstance(item, list):
        return [name for i in item for name in _named(i)]
    return _named(list(item.values())) if isinstance(item, dict) else [item]


def _filled(item: Any, files: Files) -> Any:
    """An entry of ``nav`` whose value is a folder, with the pages in it; none if there are none."""
    if not isinstance(item, dict) or not all(isinstance(v, str) and v.endswith("/") for v in item.values()):
        return item
    ((name, folder),) = item.items()
    pages = sorted(f.src_uri for f in files.documentation_pages() if f.src_uri.startswith(folder))
    return {name: pages} if pages else None


def on_files(files: Files, config: Any) -> Files:
    """Adds what pages link to outside ``docs/``, and names in ``nav`` what is not named there."""
    config.nav = [i for i in (_filled(item, files) for item in config.nav) if i]
    named = _named(config.nav)
    pages = [f"docs/{f.src_uri}" for f in files.documentation_pages()]
    waiting = pages + [_place_in_repository(n) for n in named]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not (ROOT / path).is_file():
            continue
        seen.add(path)
        place = _place_in_site(path)
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            waiting += _targets(path)
    sections: dict[str, list[str]] = {}
    for file in sorted(files.documentation_pages(), key=lambda f: f.src_uri):
        if file.src_uri not in named:
            folder = posixpath.dirname(file.src_uri)
            sections.setdefault(folder.replace("/", ", ").capitalize() or "More", []).append(file.src_uri)
    config.nav = [*config.nav, *({name: found} for name, found in sections.items())]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fills marks, and leads links to the places in the site."""
    here = page.file.src_uri
    path = _place_in_repository(here)

    def filled(match: re.Match[str]) -> str:
        if match[1] not in generated.MARKS:
            raise PluginError(f"{path}: <!-- {match[1]} --> is not known; known: {', '.join(generated.MARKS)}")
        return generated.MARKS[match[1]](*[match[2]] if match[2] else [])

    def led(match: re.Match[str]) -> str:
        to = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))
        if not (ROOT / to).exists():
            return match[0]
        return match[1] + posixpath.relpath(_place_in_site(to), posixpath.dirname(here) or ".")

    return _outside_code(MARK.sub(filled, markdown), lambda text: LINK.sub(led, text))
