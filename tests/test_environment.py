"""Where a run may find itself: nothing writable but its own folder, no home, an ASCII locale, awkward and relative paths."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_digits

#: Makes the whole file system read-only, for one process and its children, but for one folder.
READ_ONLY = """
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
mount --bind "$2" "$2"
mount -o remount,bind,ro "$2"
mount -o remount,bind,ro /
cd "$1/elsewhere"
shift 2
exec "$@"
"""
TINY = {"img_size": 16, "total_batch": 16, "num_train_iter": 4, "epoch": 1, "num_eval_iter": 2, "num_threads": 1}


def read_only(writable, inside):
    """The beginning of a command that runs the rest with a read-only file system; a user who is not root needs user
    namespaces for it."""
    own = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", "--mount", *own, "sh", "-c", READ_ONLY, "sh", str(writable), str(inside)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of images that may not be written, and a working directory beside it; all names awkward."""
    place = tmp_path_factory.mktemp("a place, é 場所")
    seen = dict.fromkeys(range(3), 0)
    digits = load_digits()
    for pixels, y in zip(digits.images, digits.target, strict=True):
        if y < 3 and seen[y] < 20:
            seen[y] += 1
            part = f"labelled/zwölf {y}" if seen[y] <= 3 else f"test/zwölf {y}" if seen[y] <= 6 else "unlabelled"
            path = place / "Bilder und mehr ü" / part / f"bild {y} № {seen[y]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9).astype("uint8")).save(path)
    (place / "elsewhere").mkdir()
    (place / "temporary").mkdir()
    (place / "settings ö.yaml").write_text(
        "# naïve\nalgorithm: muscle_fixmatch\ndataset: folder\ndata_dir: ../Bilder und mehr ü\n"
        "weak_augment: digits_weak\nhard_augment: digits_hard\n",
        encoding="utf-8",
    )
    return place


@pytest.fixture(scope="module")
def confined(place):
    """A function that runs Python, in ``elsewhere``, where nothing else can be written, if that can be had here."""
    prefix = read_only(place, place / "Bilder und mehr ü")
    tried = ["sh", "-c", f"! touch {shlex.quote(str(ROOT / '.written'))} 2>&1 && touch here"]
    able = subprocess.run([*prefix, *tried], capture_output=True, check=False).returncode == 0

    def run(*words, **environment):
        keep = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "OMP_NUM_THREADS")
        bare = {k: os.environ[k] for k in keep if k in os.environ}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        bare |= {"PYTHONPATH": path, "TMPDIR": str(place / "temporary"), "PYTHONDONTWRITEBYTECODE": "1", **environment}
        made = subprocess.run(
            [*(prefix if able else []), sys.executable, *map(str, words)],
            cwd=place / "elsewhere", env=bare, capture_output=True, timeout=300, check=False,
        )  # fmt: skip
        assert made.returncode == 0, (made.stdout + made.stderr).decode(errors="replace")
        return made.stdout.decode("utf-8", errors="surrogateescape")

    run.able = able
    return run


def train(confined, name, **environment):
    tiny = [word for k, v in TINY.items() for word in (f"--{k}", v)]
    confined(
        ROOT / "train.py", "--c", "../settings ö.yaml", "--save_dir", "../Läufe", "--save_name", name, *tiny, **environment
    )  # fmt: skip


@pytest.mark.slow
def test_trains_and_reports_without_a_home(confined, place):
    environment = {"HOME": "/nowhere", "LANG": "C", "LC_ALL": "C"}
    train(confined, "no home", **environment)
    assert json.loads((place / "Läufe" / "no home" / "result.json").read_text())["complete"]
    confined("-m", "muscle_plugin.cli", "report", "../Läufe", "--out", "../bericht é", **environment)
    assert (place / "bericht é" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_trains_and_predicts_where_names_would_be_ascii(confined, place):
    environment = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    train(confined, "ascii ß", **environment)
    assert sorted(os.listdir(place / "Läufe" / "ascii ß" / "tensorboard"))
    words = ["predict", "--checkpoint", "../Läufe/ascii ß", "--images", "../Bilder und mehr ü/unlabelled"]
    confined("-m", "muscle_plugin.cli", *words, "--out", "predictions é.csv", **environment)
    lines = (place / "elsewhere" / "predictions é.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 3 * 14
    assert all(line.startswith("bild ") and "№" in line and ",zwölf " in line for line in lines[1:])


def test_nothing_else_could_be_written(confined):
    if not confined.able:
        pytest.skip("a read-only file system cannot be made here (unshare --mount)")
    code = """
import importlib.util, pathlib
for name in ("muscle_plugin", "semilearn"):
    try:
        pathlib.Path(importlib.util.find_spec(name).origin).with_name(".written").touch()
    except OSError as e:
        print(e)
"""
    assert confined("-c", code).count("Read-only") == 2
