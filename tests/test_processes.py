"""Several processes train one net: N with B / N images each are one with B; they stop, resume and die together."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import processes_worker
import psutil
import pytest
import torch
from conftest import CONFIGS, ROOT
from processes import in_processes, needs_fork

from muscle_plugin import distributed
from muscle_plugin.files import load_tensors
from muscle_plugin.losses import MutualInformationLoss

#: Algorithms whose every quantity is taken over the global batch.
EXACT = (
    "fixmatch", "flexmatch", "softmatch", "simmatch", "muscle", "muscle_fixmatch", "muscle_meanteacher",
    "muscle_meanteacher_original", "meanteacher_labelprop", "contrastive",
)  # fmt: skip
BY_FOUR = ("flexmatch", "muscle_fixmatch", "meanteacher_labelprop")


def _mutual_information(rank, world, weak, hard, value, weak_gradient, hard_gradient):
    n = len(weak) // world
    part = slice(rank * n, (rank + 1) * n)
    own_weak, own_hard = weak[part].clone().requires_grad_(), hard[:, part].clone().requires_grad_()
    loss, terms = MutualInformationLoss(0.7, global_batch=True)(own_weak, own_hard)
    loss.backward()
    torch.testing.assert_close(loss.detach(), value, rtol=0, atol=1e-12)
    torch.testing.assert_close(terms.information.detach(), -value / 0.7, rtol=0, atol=1e-12)
    # gradients are averaged over processes, each of which has its images' share of the loss
    torch.testing.assert_close(own_weak.grad / world, weak_gradient[part], rtol=0, atol=1e-12)
    torch.testing.assert_close(own_hard.grad / world, hard_gradient[:, part], rtol=0, atol=1e-12)
    local, _ = MutualInformationLoss(0.7)(own_weak, own_hard)
    assert abs(float(local.detach()) - float(value)) > 1e-3  # the global batch does make a difference


@needs_fork
@pytest.mark.parametrize("world", [2, 4])
def test_mutual_information_of_the_global_batch(world):
    torch.manual_seed(0)
    weak = torch.randn(16, 10, dtype=torch.float64, requires_grad=True)
    hard = torch.randn(3, 16, 10, dtype=torch.float64, requires_grad=True)
    loss, _ = MutualInformationLoss(0.7)(weak, hard)
    loss.backward()
    in_processes(world, _mutual_information, weak.detach(), hard.detach(), loss.detach(), weak.grad, hard.grad)


def _exchange(rank, world):
    x = torch.full((2, 3), float(rank), requires_grad=True)
    everyone = distributed.gather(x)
    assert everyone[:, 0].tolist() == [r for r in range(world) for _ in range(2)]
    (everyone * torch.arange(2.0 * world).unsqueeze(1)).sum().backward()
    assert x.grad[:, 0].tolist() == [world * (2.0 * rank), world * (2.0 * rank + 1)]
    uneven = torch.arange(rank + 1) + 10 * rank
    expected = [10 * r + i for r in range(world) for i in range(r + 1)]
    assert distributed.gather_parts(uneven).tolist() == expected
    first = distributed.gather_parts(uneven, to_first=True)
    assert first.tolist() == (expected if rank == 0 else uneven.tolist())
    tensors = [
        torch.full((3,), float(rank)),
        torch.tensor(5 * rank),
        torch.full((2, 2), 2.0 * rank, dtype=torch.float64),
    ]
    distributed.average_(tensors)
    mean = sum(range(world)) / world
    assert tensors[0].tolist() == [mean] * 3
    assert int(tensors[1]) == 5 * rank
    assert tensors[2].tolist() == [[2 * mean] * 2] * 2
    distributed.copy_from_first_([tensors[1]])
    assert int(tensors[1]) == 0
    assert distributed.any_process(rank == 1)
    assert not distributed.any_process(False)
    assert distributed.from_first(lambda: {"rank": distributed.rank()}) == {"rank": 0}
    assert distributed.gather_objects(str(rank)) == [str(r) for r in range(world)]


@needs_fork
def test_exchanges():
    in_processes(3, _exchange)


def _batch_norm(rank, world, whole, x, upstream):
    from muscle_plugin.training.nets import synchronise_batch_norm

    layer = synchronise_batch_norm(
        torch.nn.Sequential(torch.nn.BatchNorm2d(4, momentum=0.3)).double(), torch.device("cpu")
    )
    n = len(x) // world
    part = slice(rank * n, (rank + 1) * n)
    own = x[part].clone().requires_grad_()
    out = layer(own)
    (out * upstream[part]).sum().backward()
    torch.testing.assert_close(out.detach(), whole["out"][part])
    torch.testing.assert_close(own.grad, whole["gradient"][part])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(layer[0], name), whole[name])


@needs_fork
def test_batch_norm_over_all_processes():
    torch.manual_seed(0)
    x, upstream = torch.randn(12, 4, 3, 3, dtype=torch.float64), torch.randn(12, 4, 3, 3, dtype=torch.float64)
    layer = torch.nn.BatchNorm2d(4, momentum=0.3).double()
    whole = x.clone().requires_grad_()
    out = layer(whole)
    (out * upstream).sum().backward()
    found = {"out": out.detach(), "gradient": whole.grad, **{n: b.clone() for n, b in layer.named_buffers()}}
    in_processes(2, _batch_norm, found, x, upstream)


# ------------------------------------------------------------------------------------------------------- whole runs


def torchrun(processes, *words, **more):
    """A process that runs ``words`` under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env=environment, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def one_two_four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for processes, names in ((1, EXACT), (2, EXACT), (4, BY_FOUR)):
        in_processes(processes, processes_worker.main, folder, names, join=False)
    return folder


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize(("processes", "name"), [*((2, n) for n in EXACT), *((4, n) for n in BY_FOUR)])
def test_a_run_of_several_processes_is_that_of_one(one_two_four, name, processes):
    one, several = (torch.load(one_two_four / f"{name}.{n}.pt") for n in (1, processes))
    for net in ("model", "ema"):
        for key, value in one[net].items():
            torch.testing.assert_close(several[net][key], value, rtol=0, atol=1e-6)
    for a, b in zip(one["rows"], several["rows"], strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6, nan_ok=True)


@pytest.mark.slow
@needs_fork
def test_every_process_remembers_the_same(tmp_path):
    """Without synchronised batch norm too, and for algorithms that hold more than weights."""
    names = (
        "mixmatch",
        "remixmatch",
        "vat",
        "comatch",
        "freematch",
        "softmatch",
        "muscle_flexmatch",
        "meanteacher_original",
    )
    in_processes(2, processes_worker.main, tmp_path, names, True, join=False)
    assert {n: torch.load(tmp_path / f"{n}.2.pt")["differing"] for n in names} == {n: [] for n in names}


SETTINGS = (
    "--c", CONFIGS / "muscle_digits_10.yaml", "--save_name", "r", "--img_size", 16, "--num_train_iter", 60, "--epoch", 2,
    "--total_batch", 16, "--ratio", 1, "--num_eval_iter", 20, "--num_log_iter", 7, "--num_threads", 1,
    "--use_tensorboard", "false",
)  # fmt: skip


def start(processes, folder, *words):
    return torchrun(processes, ROOT / "train.py", *SETTINGS, "--save_dir", folder, *words)


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def logged(folder):
    rows = [json.loads(line) for line in (folder / "r" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def trainers(process):
    """The processes that train, by rank."""
    children = psutil.Process(process.pid).children()
    return {c.environ()["RANK"]: c for c in children if "train.py" in " ".join(c.cmdline())}


@pytest.mark.slow
def test_stopped_and_resumed_exactly_and_by_another_number_of_processes(tmp_path):
    whole = start(2, tmp_path / "whole")
    out, error = whole.communicate(timeout=300)
    assert whole.returncode == 0, error
    assert out.count("2 processes on cpu") == 1
    assert [p.name for p in (tmp_path / "whole" / "r").glob("*.pth*")].count("latest_model.pth") == 1

    cut = start(2, tmp_path / "cut")
    wait_for(tmp_path / "cut" / "r" / "latest_model.pth", cut)
    cut.send_signal(signal.SIGINT)
    _, error = cut.communicate(timeout=120)
    assert cut.returncode != 0
    assert "stopped after step" in error
    assert ": torchrun --standalone --nproc_per_node=2" in error
    result = json.loads((tmp_path / "cut" / "r" / "result.json").read_text())
    assert 20 <= result["steps"] < 60

    (tmp_path / "one").mkdir()
    subprocess.run(["cp", "-r", tmp_path / "cut" / "r", tmp_path / "one"], check=True)
    newest = tmp_path / "cut" / "r" / "latest_model.pth"  # damaged: all processes go on from the one before
    newest.write_bytes(newest.read_bytes()[:-1000])
    again = start(2, tmp_path / "cut", "--resume")
    alone = start(1, tmp_path / "one", "--resume")
    for process, before in ((again, 1), (alone, 0)):
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert len(re.findall(r"step 20\b.* previous_model\.pth", out)) == before
    a, b = (load_tensors(tmp_path / n / "r" / "latest_model.pth") for n in ("whole", "cut"))
    for net in ("model", "ema_model"):
        assert all(torch.equal(v, b[net][k]) for k, v in a[net].items())
    assert logged(tmp_path / "whole") == logged(tmp_path / "cut")
    assert json.loads((tmp_path / "one" / "r" / "result.json").read_text())["complete"]
    assert [row["step"] for row in logged(tmp_path / "one")] == [row["step"] for row in logged(tmp_path / "whole")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "rank", "words"), [(signal.SIGKILL, "1", ()), (signal.SIGSTOP, "0", ("--dist_timeout", 4))]
)
def test_a_process_that_dies_or_hangs_ends_the_run_with_an_error(tmp_path, number, rank, words):
    process = start(2, tmp_path, "--num_train_iter", 100_000, *words)
    checkpoint = tmp_path / "r" / "latest_model.pth"
    wait_for(checkpoint, process)
    trainers(process)[rank].send_signal(number)
    if number == signal.SIGSTOP:  # torchrun would give it half a minute to end
        other = trainers(process)["1" if rank == "0" else "0"]
        assert other.wait(timeout=300) is None or True
        for stopped in trainers(process).values():
            stopped.kill()
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "error: process" in error, error
    assert "another process" in error
    assert load_tensors(checkpoint)["it"] % 20 == 0


@pytest.mark.slow
def test_bad_input_is_said_once(tmp_path):
    process = start(2, tmp_path, "--total_batch", 6)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(re.findall(r"error: batch: 3 .*\b3 .*\b2 processes.*\b4 .*\b4\b", error)) == 1
    assert "[rank" not in error  # as PyTorch marks the lines of a process's traceback; torchrun adds one of its own
