"""Where settings come from: YAML files, layered by ``extends``, and the configurations of this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import ScalarNode

from muscle_plugin.errors import ConfigError, PluginError
from muscle_plugin.registry.plugins import located
from muscle_plugin.text import closest, did_you_mean, shown

#: Bounds of a configuration file: its size, the depth of its YAML, how many files ``extends`` may bring in.
MOST_BYTES = 1 << 18
MOST_DEPTH = 20
MOST_FILES = 64

EXAMPLE = "muscle_fixmatch_digits_10"


@dataclass
class Layer:
    """Settings from one place (a file, the command line), named for error messages; the name may be empty. ``shipped``: a
    configuration of this package."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    shipped: bool = False


def config_directory() -> Path:
    """The folder of configurations that come with this package: in it when it is installed from a wheel, beside it in
    the repository."""
    here = Path(__file__).resolve().parents[1]
    inside = here / "benchmark_configs"
    return inside if inside.is_dir() else here.parent / "benchmark_configs"


def config_names() -> list[str]:
    """Names of all configurations that come with this package."""
    here = config_directory()
    names = (p.relative_to(here).with_suffix("").as_posix() for p in here.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("_"))


def config_name(path: Path) -> str | None:
    """The name of a file of ``benchmark_configs``; None for another file."""
    try:
        return path.resolve().relative_to(config_directory()).with_suffix("").as_posix()
    except ValueError:
        return None


def _file_named(name: str) -> Path:
    """Where ``benchmark_configs`` would have a configuration of this name, which may end in ``.yaml``."""
    return config_directory() / f"{name.removesuffix('.yaml')}.yaml"


def find_config(word: str | Path, studies: Sequence[str] = ()) -> Path:
    """The file of a configuration: ``word`` itself if it is one, or what ``benchmark_configs`` has under that name. A message
    also names the ``studies`` that would be right."""
    path, named = Path(word), _file_named(str(word))
    try:
        if path.is_file():
            return path
        if named.is_file():
            return named
        is_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
        here = [p.stem for p in path.parent.glob("*.yaml")] if is_path else []
    except (OSError, ValueError) as e:
        raise ConfigError([f"{shown(word)}: not a file's name: {getattr(e, 'strerror', None) or e}"]) from None
    names = config_names()
    offered = [*(() if is_path else studies), *(n for n in names if n not in here)]
    near = did_you_mean(str(word).removesuffix(".yaml"), offered, most=3)
    if is_path and (not near or closest(path.stem, here, 0.6)):
        return path  # reading it says what is wrong with it
    what = "study or configuration" if studies else "configuration"
    of_studies = f"studies: {', '.join(studies)}; " if studies else ""
    there = f"; {of_studies}{config_directory()} has {len(names)} configurations, such as {EXAMPLE}"
    raise ConfigError([f"{shown(word)}: no such {what}{near or there}"])


class _BoundedComposer(Composer):
    """Refuses what makes a short YAML text large or deep in memory: settings are single values, so that neither nesting
    nor a reference to a list or a mapping has a use."""

    _depth = 0

    def compose_node(self, parent: object, index: object) -> Any:
        if self.parser.check_event(AliasEvent):
            event = self.parser.peek_event()
            if not isinstance(self.anchors.get(event.anchor), (ScalarNode, type(None))):
                raise ComposerError(None, None, "a reference to a list or a mapping", event.start_mark)
        if self._depth > MOST_DEPTH:
            raise ComposerError(None, None, f"nested more than {MOST_DEPTH} deep", self.parser.peek_event().start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _content(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, as plain values; a ConfigError but for a file that is absent."""
    try:
        with path.open("rb") as f:  # of a device or a pipe no more than this is read
            raw = f.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise ConfigError([f"{path}: larger than {MOST_BYTES >> 10} KB; not a file of settings"])
        yaml = YAML(typ="safe", pure=True)
        yaml.Composer = _BoundedComposer
        content = yaml.load(raw.decode("utf-8"))
    except (ConfigError, FileNotFoundError):
        raise
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError([f"{path}: cannot be read: {e}"]) from None
    except YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError([f"{path}{where}: not valid YAML: {shown(getattr(e, 'problem', None) or e)}"]) from None
    except Exception as e:  # of values: a 13th month, a number of 5,000 digits
        raise ConfigError([f"{path}: not valid YAML: {shown(e) or type(e).__name__}"]) from None
    if content is None:
        raise ConfigError([f"{path}: holds no settings; expected lines of `name: value`"])
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
        raise ConfigError([f"{path}: expected lines of `name: value`, found {type(content).__name__}"])
    return content


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> list[Layer]:
    """The layers of a YAML file, lowest precedence first; ``extends`` names one file or a list, relative to the file, or
    configurations of this package. Every fault is a ConfigError. ``seen``: the files that led to this one."""
    try:
        path = path.resolve()
    except (OSError, RuntimeError, ValueError) as e:  # a link to itself, a name that none can be
        raise ConfigError([f"{shown(path)}: cannot be read: {e}"]) from None
    if path in seen:
        raise ConfigError([f"{path}: extends itself, by way of {' -> '.join(p.name for p in (*seen, path))}"])
    if seen and path.exists() and not path.is_file():  # a pipe would not end; one that the user names does
        raise ConfigError([f"{path}: not a file; {seen[-1]} extends it"])
    try:
        content = _content(path)
    except FileNotFoundError:
        near = closest(path.stem, (p.stem for p in path.parent.glob("*.yaml")), 0.6)
        hint = f"; did you mean {near[0]}.yaml?" if near else ""
        asked = f"; {seen[-1]} extends it (relative to itself, or a name of benchmark_configs)" if seen else ""
        raise ConfigError([f"{path}: no such file{hint}{asked}"]) from None
    if "plugins" in content:
        try:
            content["plugins"] = located(content["plugins"], path.parent)
        except PluginError as e:
            raise ConfigError([f"{path}: plugins: {e}"]) from None
    bases = content.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise ConfigError([f"{path}: extends must name a file or a list of files, got {shown(bases)}"])
    layers: list[Layer] = []
    for base in bases:
        if len(seen) + len(layers) >= MOST_FILES:
            raise ConfigError([f"{path}: extends brings in more than {MOST_FILES} files"])
        layers += read_yaml(_base_file(path, base), (*seen, path))
    return [*layers, Layer(path.name, content, config_name(path) is not None)]


def _base_file(path: Path, base: str) -> Path:
    """The file that ``extends`` of ``path`` means: relative to it, or one of this package's, with or without ``.yaml``."""
    relative, named = path.parent / base, _file_named(base)
    try:
        return named if not relative.exists() and named.is_file() else relative
    except (OSError, ValueError):
        return relative  # reading it says what is wrong with it


def read_saved(path: Path) -> list[Layer]:
    """The layers of a run's ``config.yaml``, as :func:`read_yaml`: a pipe, which a user may name, has no place there."""
    if path.exists() and not path.is_file():
        raise ConfigError([f"{path}: not a file"])
    return read_yaml(path)
