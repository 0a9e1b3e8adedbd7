"""What pyproject.toml cannot say: the wheel holds ``benchmark_configs/``, which lies at the repository's top, as
``muscle_plugin/benchmark_configs/``, and its description is README.md without what leads into the repository. (A
``package-dir`` mapping would do the first too, but only with every package listed by hand.)"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = "benchmark_configs"


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # there the folder is found where it is
            target = Path(self._target())
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build, which may have had others
            shutil.copytree(CONFIGS, target, ignore=lambda _, names: [n for n in names if n.startswith(".")])

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        names = (p.relative_to(CONFIGS) for p in Path(CONFIGS).rglob("*.yaml"))
        own = [] if self.editable_mode else [str(Path(self._target(), n)) for n in names]
        return [*super().get_outputs(include_bytecode), *own]

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *(str(p) for p in Path(CONFIGS).rglob("*.yaml"))]

    def _target(self) -> str:
        return str(Path(self.build_lib, "muscle_plugin", CONFIGS))


def long_description() -> str:
    """README.md for a package index, where links into the repository lead nowhere: without its pictures, links as text."""
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)\n*", "", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(
    cmdclass={"build_py": BuildWithConfigs},
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
