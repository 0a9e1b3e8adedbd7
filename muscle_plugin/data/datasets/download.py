"""Files of torchvision's data sets: found on disk, or downloaded."""

from __future__ import annotations

from pathlib import Path

from muscle_plugin.errors import DataError
from muscle_plugin.text import first_line


def find_or_download(name: str, data_dir: Path, folder: str, files: tuple[str, ...]) -> Path:
    """Return the folder that holds ``files``: ``data_dir/folder``, or ``data_dir/name/folder`` as USB has it."""
    places = [data_dir / folder, data_dir / name / folder]
    for place in places:
        if all((place / f).is_file() for f in files):
            return place
    try:
        from torchvision import datasets

        root = str(data_dir)
        if name == "svhn":
            for file in files:
                datasets.SVHN(root, split=file.partition("_")[0], download=True)
        elif name == "stl10":
            datasets.STL10(root, split="train", download=True)
        else:
            {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](root, download=True)
    except Exception as e:  # torchvision raises whatever the network or the disk does
        what = f"folder {folder}" if folder else "files " + ", ".join(files)
        raise DataError(
            f"{name} is not in {data_dir} and could not be downloaded ({first_line(e)}). Without a"
            f" network, put torchvision's {what} there, or pass the folder that holds {'it' if folder else 'them'} as"
            " --data_dir"
        ) from None
    return places[0]
