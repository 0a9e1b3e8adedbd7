"""Files of torchvision's data sets: found on disk, or downloaded."""

from __future__ import annotations

from pathlib import Path

from muscle_plugin.errors import DataError
from muscle_plugin.text import first_line


def find_or_download(
    name: str, data_dir: Path, folder: str, files: tuple[str, ...], splits: tuple[str, ...] = ()
) -> Path:
    """Return the folder that holds ``files``: ``data_dir/folder``, or ``data_dir/name/folder`` as USB has it.

    ``splits``: what torchvision calls the parts to download, where it does not fetch all at once.
    """
    places = [data_dir / folder, data_dir / name / folder]
    for place in places:
        if all((place / f).is_file() for f in files):
            return place
    try:
        from torchvision import datasets

        for part in [{"split": split} for split in splits] or [{}]:
            getattr(datasets, name.upper())(str(data_dir), download=True, **part)
    except Exception as e:  # torchvision raises whatever the network or the disk does
        what = f"folder {folder}" if folder else "files " + ", ".join(files)
        raise DataError(
            f"{name} is not in {data_dir} and could not be downloaded ({first_line(e)}). Without a"
            f" network, put torchvision's {what} there, or pass the folder that holds {'it' if folder else 'them'} as"
            " --data_dir"
        ) from None
    return places[0]
