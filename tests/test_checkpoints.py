"""Checkpoints: damaged, older, newer and foreign ones; what is kept; disks that are full; TensorBoard after a kill."""

import ast
import inspect
import json
import os
import random
import re
import subprocess
import sys
import textwrap
import threading

import psutil
import pytest
import torch
from conftest import ROOT, SHORT
from processes import needs_fork
from torch.utils._python_dispatch import TorchDispatchMode

from muscle_plugin.algorithms.muscle import Muscle
from muscle_plugin.errors import DamagedError, InputError, Interrupted, RunError, WriteError
from muscle_plugin.files import atomic_write, finish_move, load_tensors, read_whole, remove_parts, save_tensors
from muscle_plugin.run_files import CHECKPOINT_FORMAT, saved_checkpoints
from muscle_plugin.runs.recorder import Recorder
from muscle_plugin.training import checkpoint, state
from muscle_plugin.training.host import Host

#: Checkpoints at steps 2, 4 and 6.
SAVING = {"algorithm": "supervised", "save_name": "r", "num_save_iter": 2}


def flip(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 4
    path.write_bytes(content)


def steps(run_dir):
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def lose_checkpoints(run_dir, before_the_first):
    """Delete them all; also as if the run had been killed ``before_the_first``."""
    for path in run_dir.glob("*.pth"):
        path.unlink()
    if before_the_first:
        result = json.loads((run_dir / "result.json").read_text())
        (run_dir / "result.json").write_text(json.dumps(result | {"steps": 0, "complete": False}))


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def same_weights(a, b):
    return all(torch.equal(v, b[net][k]) for net in ("model", "ema_model") for k, v in a[net].items())


# ---------------------------------------------------------------------------------------------------------- the files


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    path = tmp_path / "x.pth"
    content = {"model": {"w": torch.randn(40, 50)}, "it": 3, "text": "a" * 100}
    save_tensors(path, content)
    whole = path.read_bytes()
    assert load_tensors(path).keys() == content.keys()
    assert torch.equal(torch.load(path, weights_only=True)["model"]["w"], content["model"]["w"])  # without us too
    rng = random.Random(0)
    places = [*range(-60, 0), *range(30), *(rng.randrange(len(whole)) for _ in range(200))]
    for place in places:
        path.write_bytes(whole)
        flip(path, place)
        with pytest.raises(DamagedError, match=path.name):
            load_tensors(path)
        with pytest.raises(DamagedError):
            read_whole(path)
    for length in [0, 1, 1000, *(len(whole) - n for n in (1, 39, 40, 41))]:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedError):
            read_whole(path)
    path.write_bytes(whole)
    path.rename(tmp_path / "moved.pth")
    assert read_whole(tmp_path / "moved.pth") == whole


def test_earlier_files_move_on(tmp_path):
    path, earlier = tmp_path / "a", [tmp_path / "b", tmp_path / "c"]
    for n in range(5):
        with atomic_write(path, earlier) as f:
            f.write(b"%d" % n)
    assert [p.read_bytes() for p in (path, *earlier)] == [b"4", b"3", b"2"]
    assert len(list(tmp_path.iterdir())) == 3


def die_before_rename(number):
    """This process ends before it renames for the so-many-th time, counted from 1."""
    calls, replace = iter(range(1, 99)), os.replace
    os.replace = lambda *args: os._exit(9) if next(calls) == number else replace(*args)


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("before", [2, 4], ids="{} written before".format)
def test_a_kill_between_renames_loses_no_earlier_file(tmp_path, before):
    """Killed before each rename in turn: afterwards the names lead to files that follow each other, and to as many."""
    path, earlier = tmp_path / "a", [tmp_path / "b", tmp_path / "c"]

    def write(n):
        with atomic_write(path, earlier) as f:
            f.write(b"%d" % n)

    for kill in range(1, 5):
        for old in tmp_path.iterdir():
            old.unlink()
        for n in range(before):
            write(n)
        child = os.fork()
        if child == 0:
            die_before_rename(kill)
            write(before)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        finish_move(path, earlier)
        remove_parts(tmp_path)
        newest = before - 1 if died and kill == 1 else before
        kept = [p.read_bytes() for p in (path, *earlier) if p.exists()]
        assert kept == [b"%d" % n for n in range(newest, max(newest - 3, -1), -1)], kill
        assert len(list(tmp_path.iterdir())) == len(kept)


def test_earlier_files_move_on_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_earlier_files_move_on(tmp_path)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    path, earlier = tmp_path / "a", [tmp_path / "b"]
    save_tensors(path, {"it": 1}, earlier)
    with pytest.raises(WriteError) as caught, atomic_write(path, earlier) as f:
        f.write(b"half")
        raise OSError(28, "No space left on device")
    assert (caught.value.filename, caught.value.errno) == (str(path), 28)
    assert load_tensors(path)["it"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# ----------------------------------------------------------------------------------------------------------- resuming


def test_the_best_and_the_newest_of_one_step_are_taken_once_and_alike(short_run, tmp_path, monkeypatch):
    taken, collect = [], checkpoint.collect
    monkeypatch.setattr(checkpoint, "collect", lambda host: (taken.append(host.it), collect(host))[1])
    accuracies = iter((0.1, 0.2, 0.1))
    monkeypatch.setattr(Host, "evaluate", lambda *_: {"eval/top-1-acc": next(accuracies), "eval/top_class_share": 0.2})
    short_run(algorithm="fixmatch", save_name="r", num_eval_iter=2, num_save_iter=4)
    assert taken == [2, 4, 6]  # the best, both, the newest
    best, before = tmp_path / "r" / "model_best.pth", tmp_path / "r" / "previous_model.pth"
    assert load_tensors(best)["it"] == 4
    assert best.read_bytes() == before.read_bytes()


def test_the_newest_and_those_before_it_are_kept(short_run, tmp_path):
    short_run(**SAVING)
    kept = {p.name: load_tensors(p)["it"] for p in saved_checkpoints(tmp_path / "r")}
    assert kept == {"latest_model.pth": 6, "previous_model.pth": 4}
    short_run(**SAVING | {"save_name": "one"}, keep_checkpoints=1)
    assert [p.name for p in saved_checkpoints(tmp_path / "one")] == ["latest_model.pth"]
    short_run(**SAVING | {"save_name": "three"}, keep_checkpoints=3)
    assert [load_tensors(p)["it"] for p in saved_checkpoints(tmp_path / "three")] == [6, 4, 2]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, lambda p: os.truncate(p, 5000), lambda p: os.truncate(p, 0), os.unlink])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(short_run, tmp_path, capsys, damage):
    from muscle_plugin.runs.train import train
    from muscle_plugin.settings.resolve import load_settings

    short_run(**SAVING)
    run_dir = tmp_path / "r"
    whole, logged = load_tensors(run_dir / "latest_model.pth"), (run_dir / "metrics.jsonl").read_text()
    damage(run_dir / "latest_model.pth")
    (run_dir / ".latest_model.pth.x.part").write_text("of a process that was killed")
    train(load_settings(None, **SHORT, **SAVING, save_dir=str(tmp_path), resume="auto"))
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "latest_model.pth" in line]
    assert note.startswith("note: ")
    assert re.search(r"step 4\b.*previous_model\.pth", note)
    assert "WARNING" in (run_dir / "log.txt").read_text()
    assert same_weights(whole, load_tensors(run_dir / "latest_model.pth"))
    assert steps(run_dir) == [json.loads(line)["step"] for line in logged.splitlines()]
    assert load_tensors(run_dir / "previous_model.pth")["it"] == 4  # the damaged one has not taken its place
    assert not list(run_dir.glob(".*"))


def test_a_run_is_one_whatever_links_name_it(short_run, tmp_path):
    from muscle_plugin.runs.directory import run_lock

    (tmp_path / "link").symlink_to(tmp_path / "r")
    with run_lock(tmp_path / "r"), pytest.raises(RunError, match="link .*another process"):
        short_run(**SAVING | {"save_name": "link"})
    short_run(**SAVING)
    with pytest.raises(RunError, match="is a link.*--overwrite"):
        short_run(**SAVING | {"save_name": "link"}, overwrite=True)
    assert len(saved_checkpoints(tmp_path / "r")) == 2


@pytest.mark.parametrize("resume", ["yes", "auto"])
def test_without_a_whole_checkpoint_nothing_starts_anew(short_run, tmp_path, resume):
    short_run(**SAVING)
    for path in saved_checkpoints(tmp_path / "r"):
        flip(path)
    kept = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="latest_model.pth: damaged.*previous_model.pth: damaged.*--overwrite") as caught:
        short_run(**SAVING, resume=resume)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == kept
    assert len(saved_checkpoints(tmp_path / "r")) == 2


def test_a_run_that_died_before_its_first_checkpoint_says_that_it_starts_anew(short_run, tmp_path, capsys):
    from muscle_plugin.runs.train import train
    from muscle_plugin.settings.resolve import load_settings

    short_run(**SAVING)
    whole = steps(tmp_path / "r")
    lose_checkpoints(tmp_path / "r", before_the_first=True)
    train(load_settings(None, **SHORT, **SAVING, save_dir=str(tmp_path), resume="auto"))
    assert re.search(f"note: {tmp_path / 'r'}: .*no checkpoint", capsys.readouterr().out)
    assert steps(tmp_path / "r") == whole


@pytest.mark.parametrize("resume", [(), ("--resume",), ("--resume", "auto")])
@pytest.mark.parametrize(
    ("lost", "changed"),
    [
        ("nothing", {"load_path": "typo.pth", "lr": 0.001}),
        ("nothing", {"lr": 0.001}),
        ("checkpoints", {"lr": 0.001}),
        ("checkpoints", {}),
        ("checkpoints and result", {}),
        ("all before the first checkpoint", {"lr": 0.001}),
    ],
)
def test_nothing_but_overwrite_begins_a_run_anew(short_run, tmp_path, capsys, resume, lost, changed):
    """Whatever of a finished run is left: neither a wrong path nor another setting replaces it."""
    from muscle_plugin.cli import run_command

    short_run(**SAVING)
    run_dir = tmp_path / "r"
    if lost != "nothing":
        lose_checkpoints(run_dir, before_the_first=lost.startswith("all"))
    if lost.endswith("result"):
        (run_dir / "result.json").unlink()
    kept, settings = files(run_dir), SHORT | SAVING | {"save_dir": tmp_path} | changed
    words = [str(w) for k, v in settings.items() for w in (f"--{k}", v)]
    assert run_command("train", [*words, *resume], "train.py") == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    typo = "load_path" in changed and resume
    assert re.match("error: load_path: typo.pth: no such file" if typo else f"error: {run_dir}\\b", error)
    assert typo or "--overwrite" in error or "began with other settings: lr was 0.05, now 0.001" in error
    assert files(run_dir) == kept


@pytest.mark.slow
def test_a_stopped_run_whose_checkpoints_are_gone_is_not_begun_at_step_0(short_run, tmp_path, monkeypatch):
    save = Host._save_if_due

    def stop(self):
        if self.it == 3:
            self.request_stop()
        save(self)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Host, "_save_if_due", stop)
        short_run(**SAVING)
    lose_checkpoints(tmp_path / "r", before_the_first=False)
    with pytest.raises(RunError, match=r"unfinished run \(step 3 of 6\), but no checkpoint.*--overwrite"):
        short_run(**SAVING, resume="auto")


def test_a_named_checkpoint_is_used_or_refused(short_run, tmp_path):
    short_run(**SAVING)
    newest, before = saved_checkpoints(tmp_path / "r")
    flip(newest)
    with pytest.raises(RunError, match="latest_model.pth: damaged"):
        short_run(**SAVING, resume="yes", load_path=str(newest))
    assert short_run(**SAVING, resume="yes", load_path=str(before))["complete"]


def test_predict_and_export_name_the_other_checkpoints_where_one_is_damaged(short_run, tmp_path, capsys):
    from muscle_plugin.cli import main

    short_run(**SAVING)
    flip(tmp_path / "r" / "latest_model.pth")
    (tmp_path / "x").mkdir()
    torch.save({}, tmp_path / "x" / "y.png")
    newest, before = saved_checkpoints(tmp_path / "r")
    best = tmp_path / "r" / "model_best.pth"
    for program in (f"predict --images {tmp_path / 'x'}", "export"):
        assert main(f"{program} --checkpoint {tmp_path / 'r'} --out {tmp_path / 'out'}".split()) == 2
        assert re.fullmatch(f"error: {newest}: damaged.* {before}, {best}\n", capsys.readouterr().err)


# ------------------------------------------------------------------------------------------- of other runs and versions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"algorithm": "fixmatch"}, ["algorithm 'supervised'.* 'fixmatch'"]),
        ({"lr": 0.01, "seed": 4}, ["lr 0.05.* 0.01", r"seed 0\b.* 4"]),
        ({"img_size": 20}, ["img_size 16.* 20"]),
        ({"net": "cnn13", "net_width": 0.25}, ["net 'small_cnn'.* 'cnn13'", "net_width None.* 0.25"]),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_naming_the_differences(short_run, tmp_path, other, named):
    short_run(**SAVING)
    path = str(tmp_path / "r" / "latest_model.pth")
    with pytest.raises(InputError, match=f"{path}.*another run") as caught:
        short_run(**SAVING | {"save_name": "other"} | other, resume="yes", load_path=path)
    assert all(re.search(n, str(caught.value)) for n in named), caught.value
    assert "\n" not in str(caught.value)


def test_other_weights_are_named(short_run, tmp_path):
    short_run(**SAVING)
    path = tmp_path / "r" / "latest_model.pth"
    content = load_tensors(path)
    name = next(iter(content["model"]))
    content["model"] = {**content["model"], name: torch.zeros(2, 3), "extra": torch.zeros(1)}
    save_tensors(path, content)
    with pytest.raises(InputError, match=rf"extra.* {name} \(2, 3\) .*\("):
        short_run(**SAVING, resume="yes")


def test_a_checkpoint_of_a_newer_version_is_refused(short_run, tmp_path, capsys):
    from muscle_plugin.inference.predict import Predictor

    short_run(**SAVING)
    path = tmp_path / "r" / "latest_model.pth"
    save_tensors(path, {"format": CHECKPOINT_FORMAT + 1, "anything": 3})
    with pytest.raises(InputError, match=r"latest_model\.pth: .*\bformat 2\b"):
        short_run(**SAVING, resume="yes")
    with pytest.raises(ValueError, match=r"latest_model\.pth: .*\bformat 2\b"):
        Predictor(path, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        ({"evaluations": ["a"]}, r"\bevaluations\.0: "),
        ({"it": 10**9}, r"\b1000000000 of 6"),
        ({"processes": []}, "IndexError: "),
        ({"scheduler": {"last_epoch": "x"}}, r"\blast_epoch\b"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "ValueError: "),
        ({"hooks": {"LoggingHook": {"sums": {"dict": []}}}}, r"HostLoggingHook\.sums\b"),
    ],
)
def test_a_foreign_state_is_one_line(short_run, tmp_path, capsys, damage, fault):
    from muscle_plugin.cli import main

    short_run(**SAVING)
    path = tmp_path / "r" / "latest_model.pth"
    save_tensors(path, load_tensors(path) | damage)
    assert main(["train", *words(tmp_path), "--resume"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*latest_model.pth: .*{fault}", line), line


def test_a_scheduler_gets_no_attribute_that_it_does_not_have(short_run, build_short, tmp_path):
    short_run(**SAVING)
    path = tmp_path / "r" / "latest_model.pth"
    content = load_tensors(path)
    content["scheduler"] |= {"step": 1, "get_lr": 2}
    save_tensors(path, content)
    algorithm = build_short(algorithm="supervised")
    algorithm.load_model(path)
    assert callable(algorithm.scheduler.step)
    assert "get_lr" not in vars(algorithm.scheduler)


# ------------------------------------------------------------------------------------------------- what a checkpoint holds


class Cloned(TorchDispatchMode):
    """Counts the bytes of the tensors that PyTorch clones or copies anew."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::clone", "aten::_to_copy"):
            self.bytes += out.numel() * out.element_size()
        return out


def bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_neither_a_checkpoint_nor_a_trial_step_copies_the_weights(build_short):
    algorithm = build_short(algorithm="muscle_comatch")
    algorithm.save_model = lambda *_: None
    algorithm.train()
    weights = bytes_of(algorithm.model.parameters())
    with Cloned() as cloned:
        content = checkpoint.collect(algorithm)
    assert cloned.bytes < weights / 10  # generators, sums
    assert next(iter(content["model"].values())).data_ptr() == next(algorithm.model.parameters()).data_ptr()
    queues = [content["algorithm"][n] for n in ("queue_feats", "queue_probs")]
    assert queues[0].data_ptr() == algorithm.queue_feats.data_ptr()
    with Cloned() as cloned, state.undone(algorithm):
        pass
    copies = bytes_of([*algorithm.model.buffers(), *algorithm.ema_model.buffers(), *queues])
    assert copies < cloned.bytes < 2 * copies + weights / 10


def test_a_trial_step_that_changes_weights_is_refused(build_short):
    algorithm = build_short(algorithm="muscle_fixmatch")
    parameter = next(algorithm.model.parameters())
    with (
        pytest.raises(InputError, match="train_step of fixmatch .*weights"),
        state.undone(algorithm),
        torch.no_grad(),
    ):
        parameter.add_(1)


def test_a_view_of_a_larger_tensor_is_saved_alone(tmp_path):
    whole = torch.arange(10_000)
    save_tensors(tmp_path / "x.pth", state.plain({"part": whole[:2], "spread": torch.zeros(1).expand(1000)}))
    assert (tmp_path / "x.pth").stat().st_size < 10_000
    assert load_tensors(tmp_path / "x.pth")["part"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("muscle_comatch", {"queue_feats", "queue_probs", "queue_ptr"}),
        ("muscle_labelprop", {"pseudo_labels", "pseudo_weights", "class_weights", "pseudo_log"}),
        ("dash", {"warmup_stage"}),
    ],
)
def test_attributes_of_usbs_classes_are_state_and_ours_are_not(build_short, name, expected):
    algorithm = build_short(algorithm=name)
    algorithm.late_queue = torch.zeros(3)  # as of a class that makes it in its first step
    found = state.capture_object(algorithm)
    assert expected | {"late_queue", "lambda_u"} <= found.keys()
    ours = {n for c in (Host, Muscle) for n in inspect.get_annotations(c)}
    assert not found.keys() & (ours | state.NOT_CAPTURED)


def assigned(tree, owners):
    """Attributes that code assigns to objects of these names."""
    targets = [t for n in ast.walk(tree) if isinstance(n, ast.Assign) for t in n.targets]
    targets += [n.target for n in ast.walk(tree) if isinstance(n, (ast.AnnAssign, ast.AugAssign))]
    flat = [x for t in targets for x in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return {
        t.attr for t in flat if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id in owners
    }


def test_whatever_this_package_sets_on_an_algorithm_is_declared():
    """An attribute of ours that is not would join the checkpoints of USB's classes."""
    known = state.NOT_CAPTURED
    for cls in (Host, Muscle):
        own = set(inspect.get_annotations(cls))
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        inherited = set(inspect.get_annotations(Host))
        assert assigned(tree, {"self"}) - {"device"} <= own | inherited | known
    for path in (ROOT / "muscle_plugin" / "training").glob("*.py"):
        names = assigned(ast.parse(path.read_text()), {"algorithm", "host"})
        assert names <= set(inspect.get_annotations(Host)) | known, path.name


# ------------------------------------------------------------------------------------------------------- full disks


LIMITED = """
import resource, sys
from muscle_plugin.cli import run_command
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
sys.exit(run_command("train", sys.argv[2:], "train.py"))
"""


def words(folder, *more):
    settings = SHORT | SAVING | {"save_dir": folder}
    return [str(w) for k, v in settings.items() for w in (f"--{k}", v)] + list(more)


def python(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=200, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.slow
def test_a_file_that_cannot_grow_ends_the_run_in_one_line(short_run, tmp_path):
    """A limit on the sizes of files stands for a disk without room: no root needed."""
    short_run(**SAVING | {"save_name": "whole"})
    size = (tmp_path / "whole" / "latest_model.pth").stat().st_size
    ended = python("-c", LIMITED, size // 2, *words(tmp_path))
    assert ended.returncode == 2, ended.stderr
    (line,) = [x for x in ended.stderr.splitlines() if x]
    assert re.match(f"error: {tmp_path / 'r' / 'latest_model.pth'}: .*File too large.*no checkpoint", line)
    assert not list((tmp_path / "r").glob(".*"))


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(short_run, tmp_path):
    short_run(**SAVING | {"save_name": "whole"})
    whole = tmp_path / "whole"
    size = (whole / "latest_model.pth").stat().st_size
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={2 * size + size // 2}", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True) if os.path.exists("/bin/mount") else None
    if mounted is None or mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip() if mounted else 'no mount'}")
    try:
        again = words(disk, "--use_tensorboard", "true", "--keep_checkpoints", "3")
        ended = python("train.py", *again)
        assert ended.returncode == 2, ended.stderr
        (line,) = [x for x in ended.stderr.splitlines() if x]
        assert re.search(r"No space left on device.* train\.py .*--resume", line)
        assert line.endswith("--resume")
        assert not list((disk / "r").glob(".*"))
        assert all(read_whole(p) for p in saved_checkpoints(disk / "r"))
        assert (disk / "r" / "latest_model.pth").exists()
        with (disk / "fill").open("wb", buffering=0) as f:  # not a byte is left, for the log either
            while f.write(b"0" * 4096) == 4096:
                pass
    except OSError:
        ended = python("train.py", *again, "--resume")
        assert ended.returncode == 2, ended.stderr
        assert "Traceback" not in ended.stderr
        (line,) = [x for x in ended.stderr.splitlines() if x]
        assert "No space left on device" in line
        (disk / "fill").unlink()
        subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(disk)], check=True)
        ended = python("train.py", *again, "--resume")
        assert ended.returncode == 0, ended.stderr
        assert same_weights(*(load_tensors(d / "latest_model.pth") for d in (whole, disk / "r")))
        assert steps(disk / "r") == steps(whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --------------------------------------------------------------------------------------------------------------- logs


LINES = [f'{{"step": {i}, "x": 1}}' for i in (2, 4, 6)]


@pytest.mark.parametrize(
    ("lines", "kept", "note"),
    [(LINES, [2, 4, 6], None), ([*LINES, '{"step": 8, "x"'], [2, 4, 6], None), ([*LINES, '{"step": 8}'], [2, 4, 6], None),
     ([LINES[0], LINES[1][:9], LINES[2]], [2, 6], "line 2:"),
     ([LINES[0], *LINES, ""], [2, 4, 6], "line 2:"), (["[" * 100_000, *LINES], [2, 4, 6], "line 1:"),
     ([LINES[0], '{"step": 1' + "0" * 400 + "}", *LINES[1:]], [2, 4, 6], "line 2:"),
     (["\udcff", '{"step": NaN}', *LINES], [2, 4, 6], "line 1 and 1 more:"),
     (LINES[:2], [2, 4], None)],
)  # fmt: skip
def test_lines_of_the_log_that_are_damaged_are_told_of(tmp_path, lines, kept, note):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with Recorder(tmp_path, 6, False, None) as recorder:
        pass
    assert steps(tmp_path) == kept
    assert [bool(re.match(f"{path}: .*{note}", n)) for n in recorder.notes] == ([] if note is None else [True])


def test_tensorboard_shows_each_step_once(tmp_path, monkeypatch):
    """What a continuation logs again it takes from the later file."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from chaos import scalars

    for step in (0, 2, 3, 4):
        with Recorder(tmp_path, step, True, None) as recorder:
            for i in range(step + 1, 7):
                recorder._events.add_scalar("x", 10 * step + i, i)
    assert scalars(tmp_path / "tensorboard") == {"x": list(zip(range(1, 7), (1, 2, 23, 34, 45, 46), strict=True))}


def test_a_disk_that_refuses_tensorboards_first_write_is_one_error(tmp_path, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", refuse)
    tracebacks = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    before = set(threading.enumerate())
    with pytest.raises(WriteError):
        Recorder(tmp_path, 0, True, None)
    for thread in {*threading.enumerate()} - before:
        thread.join(5)
    assert not tracebacks


@pytest.mark.parametrize(
    ("fault", "raised"), [(OSError(28, "No space left"), WriteError), (RuntimeError("no thread"), RuntimeError)]
)
def test_a_tensorboard_that_cannot_begin_leaves_the_process_as_it_was(tmp_path, monkeypatch, fault, raised):
    from torch.utils import tensorboard

    def refuse(*_, **__):
        raise fault

    monkeypatch.setattr(tensorboard, "SummaryWriter", refuse)
    metrics, hook = tmp_path / "metrics.jsonl", threading.excepthook
    with pytest.raises(raised):
        Recorder(tmp_path, 0, True, None)
    assert threading.excepthook is hook
    opened = [f for f in psutil.Process().open_files() if f.path == str(metrics)]
    assert metrics.exists()
    assert not opened


# ----------------------------------------------------------------------------------------------------------- children


@needs_fork
def test_a_forked_child_does_not_hold_the_run(tmp_path):
    """A loader's worker outlives a process that is killed for some seconds."""
    from muscle_plugin.runs.directory import run_lock

    (heard, said), (ready, tell) = os.pipe(), os.pipe()
    with run_lock(tmp_path / "r"):
        child = os.fork()
        if child == 0:
            os.write(tell, b".")
            os.read(heard, 1)
            os._exit(0)
        os.read(ready, 1)
    try:
        with run_lock(tmp_path / "r"):
            pass
    finally:
        os.write(said, b".")
        os.waitpid(child, 0)
