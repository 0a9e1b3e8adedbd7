"""Where the runs of a sweep are executed, and how many at a time: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeAlias

from muscle_plugin.data.images import cores
from muscle_plugin.errors import InputError, Interrupted, UserError
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.text import duration, first_line

#: How often a run is retried after its process died.
RETRIES = 2
#: Seconds that a run has to save itself when the sweep dies.
GRACE = 60
#: Held in a process while it trains.
_training = threading.Lock()


def execute(config: str, overrides: dict[str, Any], command: list[str]) -> tuple[str, str]:
    """Train or resume one run, in a process that may train others before and after; returns how it ended, as ``finished``,
    ``stopped`` or ``failed`` and in words."""
    from muscle_plugin.runs.train import train

    _training.acquire()
    try:
        result = train(load_settings(config, **overrides), command, quiet=True)
    except Interrupted as e:
        return "stopped", str(e).splitlines()[0]
    except Exception as e:
        fault = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
        return "failed", f"failed: {fault.splitlines()[0]}"
    finally:
        _training.release()
        gc.collect()  # a compiled net refers to itself
        if torch := sys.modules.get("torch"):
            torch.cuda.empty_cache()  # other processes may share the GPU
    if result["stage"] == "pretrain":
        return "finished", f"pre-trained without labels, {duration(result['seconds'])}"
    score = "no test images" if result["last_top1"] is None else f"{100 * result['last_top1']:.2f} %"
    return "finished", f"{score}, {duration(result['seconds'])} of training"


class LocalPool:
    """Executes runs in processes of this machine, each of which trains one run after the other. A process that dies takes
    only its own run with it, which is retried. Processes take the GPUs in turn, as CUDA_VISIBLE_DEVICES names them."""

    def __init__(self, at_once: int, gpus: tuple[str, ...] = ()) -> None:
        self.at_once = at_once
        # GPU and process; last in, first out, so that no more processes are started than run at a time
        self._idle: list[tuple[str | None, ProcessPoolExecutor | None]] = [
            (gpus[i % len(gpus)] if gpus else None, None) for i in reversed(range(at_once))
        ]
        self._stopping = threading.Event()
        self._threads = ThreadPoolExecutor(at_once)

    def _run(self, config: str, overrides: dict[str, Any], command: list[str]) -> tuple[str, str]:
        gpu, process = self._idle.pop()
        spawn = multiprocessing.get_context("spawn")
        try:
            for _ in range(RETRIES + 1):
                if self._stopping.is_set():
                    return "stopped", "not started"
                process = process or ProcessPoolExecutor(1, spawn, initializer=_begin_process, initargs=(gpu,))
                try:
                    return process.submit(execute, config, overrides, command).result()
                except BrokenProcessPool:
                    process = None
        finally:
            self._idle.append((gpu, process))
        return "failed", f"failed: its process died {RETRIES + 1} times (killed, or out of memory?)"

    def submit(self, config: str, overrides: dict[str, Any], command: list[str]) -> Future[tuple[str, str]]:
        """Return the future result of :func:`execute` with these arguments."""
        return self._threads.submit(self._run, config, overrides, command)

    def stop(self) -> None:
        """Start nothing more; runs in progress save and stop."""
        self._stopping.set()
        for process in multiprocessing.active_children():
            process.terminate()

    def close(self) -> None:
        """Wait for what is running, and free all processes."""
        self._threads.shutdown(cancel_futures=True)
        for _, process in self._idle:
            if process:
                process.shutdown()


def _begin_process(gpu: str | None) -> None:
    """Let a new process see one GPU only, and end with the process that started it."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process()], daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    if _training.locked():
        os.kill(os.getpid(), signal.SIGTERM)  # the run saves itself after its step
    _training.acquire(timeout=GRACE)
    os._exit(1)


class RayPool:
    """Executes runs as tasks of Ray, which places them, assigns GPUs, and retries what died with its worker or node. The
    cluster is at an address (``auto``, ``ray://host:10001``), or ``local``: started here, with room for so many."""

    def __init__(self, address: str, at_once: int, gpus: int, gpus_per_run: float | None, cpus_per_run: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # a run without a GPU must see none: it would take the first, which others have been given
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        try:
            import ray
        except ImportError:
            raise InputError("Ray is not installed: pip install 'muscle-plugin[cluster]', or leave out --ray") from None
        self._ray = ray
        self._owned = not ray.is_initialized()
        where: dict[str, Any] = {"address": address}
        if address == "local":
            where = {"num_cpus": at_once * cpus_per_run, "num_gpus": gpus, "include_dashboard": False}
        try:
            ray.init(**where, logging_level="ERROR", log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise InputError(f"no Ray cluster at {address}: {first_line(e)}") from None
        there = ray.cluster_resources()
        has = int(there.get("GPU", 0))
        gpus_per_run = min(1.0, has) if gpus_per_run is None else gpus_per_run
        self.at_once = int(there.get("CPU", 0) // cpus_per_run)
        if gpus_per_run:
            self.at_once = min(self.at_once, has * runs_per_gpu(gpus_per_run))
        if self.at_once < 1:
            raise InputError(
                f"the Ray cluster at {address} has {there.get('CPU', 0):g} CPUs and {has} GPUs; a run wants {cpus_per_run}"
                f" (--num_threads) and {gpus_per_run:g} (--gpus_per_run; none with --device cpu)"
            )
        self._task = ray.remote(num_cpus=cpus_per_run, num_gpus=gpus_per_run, max_retries=RETRIES)(execute)
        self._tasks: list[Any] = []

    def submit(self, config: str, overrides: dict[str, Any], command: list[str]) -> Future[tuple[str, str]]:
        task = self._task.remote(config, overrides, command)
        self._tasks.append(task)
        return task.future()  # type: ignore[no-any-return]

    def stop(self) -> None:
        for task in self._tasks:
            self._ray.cancel(task)

    def close(self) -> None:
        if self._owned:
            self._ray.shutdown()


Pool: TypeAlias = LocalPool | RayPool


def open_pool(devices: set[str], at_once: int | None, share: float | None, ray: str | None, cpus_per_run: int) -> Pool:
    """The pool for runs of these devices, as ``--jobs``, ``--gpus_per_run`` and ``--ray`` want it."""
    without = devices == {"cpu"}
    gpus = () if without else visible_gpus()
    if not gpus and (share or "cuda" in devices) and (ray in (None, "local") or without):
        asked = "--gpus_per_run" if share else "device cuda"
        why = "--device cpu" if without else "this machine has no usable GPU"
        raise InputError(f"{asked}: asks for GPUs, but there are none for these runs ({why}); leave it out")
    room = len(gpus) * runs_per_gpu(share or 1)
    at_once = at_once or room or cores()
    if gpus and share:
        at_once = min(at_once, room)
    elif at_once > room > 0:
        share = math.floor(10_000 / -(-at_once // len(gpus))) / 10_000  # Ray counts in ten thousandths
    if not ray:
        return LocalPool(at_once, gpus)
    share = 0.0 if without else share or (1.0 if "cuda" in devices else None)
    return RayPool(ray, at_once, len(gpus), share, cpus_per_run)


def visible_gpus() -> tuple[str, ...]:
    """Names by which CUDA knows the GPUs that this process may use."""
    import torch

    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    # a process sees, and counts, only one of the parts of a GPU (MIG); each run gets one of them
    return tuple(names if count and names[0].startswith("MIG-") else names[:count])


def runs_per_gpu(share: float) -> int:
    """The number of runs that fit on one GPU if each gets ``share`` of it."""
    return int(1 / share + 1e-6)
