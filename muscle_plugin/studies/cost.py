"""``muscle-plugin cost``: what studies take before they are begun: runs, steps, images, label propagation, hours.

The time of a run is that of its steps, its evaluations and its label propagation::

    steps * seconds of a step  +  evaluations * test images / f  +  refreshes * (training images / f + seconds of a diffusion)

with f images per second forward. A step timed with fewer images counts in proportion to them. Start-up, checkpoints and
reading of data come on top. The lower bound of ``--tflops`` is the arithmetic of the nets over the rate that is given.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from muscle_plugin.errors import CatalogueError, ConfigError, InputError
from muscle_plugin.settings.command_line import add_arguments, parse_command_line
from muscle_plugin.studies.definitions import figures, study_names, tables
from muscle_plugin.studies.estimate import steps_of
from muscle_plugin.studies.sweep import Job, duration, jobs_of, plural

if TYPE_CHECKING:
    from muscle_plugin.studies.speeds import Images, Speeds, StepKind

#: Training and test images of the data sets, as ``muscle_plugin.data`` divides them.
IMAGES = {
    "digits": (1437, 360), "cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "cifar20": (50_000, 10_000),
    "miniimagenet": (50_000, 10_000), "svhn": (604_388, 26_032), "svhn_noextra": (73_257, 26_032),
    "stl10": (105_000, 8_000), "eurosat": (21_600, 5_400),
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """So many steps of a kind, and the images of one."""

    kind: StepKind
    steps: int
    images: Images


@dataclass(frozen=True)
class Work:
    """What one run of a configuration does.

    Attributes:
        name: of the configuration.
        stages: its steps, in order.
        evaluations: forward passes over the test images.
        refreshes: label propagations, each over all training images.
        test, train: images.
        diffusion: points, classes and k of a label propagation.
        flops: of an image of its net, forward, and forward and backward; None: not counted.
    """

    name: str
    stages: tuple[Stage, ...]
    evaluations: int
    refreshes: int
    test: int
    train: int
    diffusion: tuple[int, int, int]
    flops: tuple[float, float] | None = None

    @property
    def steps(self) -> int:
        """Training steps."""
        return sum(s.steps for s in self.stages)

    @property
    def trained(self) -> int:
        """Images forwarded and backward."""
        return sum(s.steps * s.images.trained for s in self.stages)

    @property
    def forwarded(self) -> int:
        """Images forwarded only: in steps, for features, in evaluations."""
        in_steps = sum(s.steps * s.images.forwarded for s in self.stages)
        return in_steps + self.refreshes * self.train + self.evaluations * self.test

    @property
    def operations(self) -> float:
        """Floating-point operations of its net."""
        forward, both = self.flops or (math.nan, math.nan)
        return self.trained * both + self.forwarded * forward

    def seconds(self, speeds: Speeds) -> float:
        """Time of the run at these speeds; NaN if one of them is not among them."""
        from muscle_plugin.studies.speeds import propagation_key

        rate = speeds.forward.get(self.stages[0].kind.images_of, math.nan)
        total = self.evaluations * self.test / rate
        if self.refreshes:
            diffusion = speeds.propagation.get(propagation_key(*self.diffusion), math.nan)
            total += self.refreshes * (self.train / rate + diffusion)
        for stage in self.stages:
            speed = speeds.steps.get(str(stage.kind))
            total += stage.steps * stage.images.all / speed.images_per_second if speed else math.nan
        return total


# ------------------------------------------------------------------------------------------------------------ counting


def _stages(settings: Any, steps: int) -> tuple[list[tuple[int | None, int]], int]:
    """(stage, its steps) of a run, and its refreshes of pseudo-labels."""
    from muscle_plugin.registry.own import stage_1_epochs

    start = getattr(settings, "lp_start", None)
    if start is None:
        return [(None, steps)], 0
    first_epochs = stage_1_epochs(start, settings.epoch)
    first = min(steps, first_epochs * max(1, steps // settings.epoch))
    return [(n, x) for n, x in ((1, first), (2, steps - first)) if x], settings.epoch - first_epochs


def _net(settings: Any) -> str:
    """A net's name, with its width where that is not its own."""
    return settings.net + ("" if settings.net_width in (None, 1) else f" of width {settings.net_width:g}")


class Counter:
    """Counts the work of configurations; what is alike is counted once."""

    def __init__(self, flops: bool = False) -> None:
        self._images: dict[tuple[str, int | None], Images] = {}
        self._flops: dict[tuple[str, int, int], tuple[float, float]] | None = {} if flops else None
        self._works: dict[str, Work] = {}  # by the configuration's file
        #: A run that has each kind of step, and its images.
        self.kinds: dict[StepKind, tuple[Any, Images]] = {}
        #: Label propagations, each with a step of the net whose features it is of.
        self.diffusions: dict[tuple[int, int, int], StepKind] = {}

    def work(self, job: Job) -> Work:
        """What a run does.

        Raises:
            ConfigError: its data set's size is not known here.
        """
        if job.work.config not in self._works:
            self._works[job.work.config] = self._work(job)
        return self._works[job.work.config]

    def _work(self, job: Job) -> Work:
        from muscle_plugin.studies.speeds import StepKind, alike, count_images, flops_per_image

        s = job.resolved.settings
        if s.dataset not in IMAGES:
            raise ConfigError(
                [f"{job.name}: the size of dataset {s.dataset} is not known here; sweep --dry-run measures it"]
            )
        train, test = IMAGES[s.dataset]
        steps = steps_of(s, train)
        assert steps is not None
        parts, refreshes = _stages(s, steps)
        stages = []
        for number, count in parts:
            kind, key = (
                StepKind(_net(s), s.img_size, s.algorithm, number),
                (alike(job.resolved, in_images_alone=True), number),
            )
            if key not in self._images:
                self._images[key] = count_images(job.resolved, number)
            self.kinds.setdefault(kind, (job.resolved, self._images[key]))
            stages.append(Stage(kind, count, self._images[key]))
        diffusion = (train, s.num_classes, s.lp_k) if refreshes else (0, 0, 0)
        if refreshes:
            self.diffusions.setdefault(diffusion, stages[0].kind)
        flops = None
        if self._flops is not None:
            net = (_net(s), s.img_size, s.num_classes)
            flops = self._flops.get(net) or flops_per_image(job.resolved)
            self._flops[net] = flops
        evaluations = -(-steps // s.num_eval_iter)
        return Work(job.name, tuple(stages), evaluations, refreshes, test, train, diffusion, flops)


# -------------------------------------------------------------------------------------------------------------- output


def _count(n: float) -> str:
    """A large number for people: ``12.3 M``."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if n >= size:
            return f"{n / size:.3g} {letter}"
    return f"{n:,.0f}"


def _time(seconds: float) -> str:
    return "?" if math.isnan(seconds) else duration(seconds)


@dataclass(frozen=True)
class _Rates:
    """What a table is to be reckoned with."""

    speeds: Speeds | None
    scale: float
    tflops: float | None
    jobs: int


def _row(name: str, works: Sequence[Work], seeds: int, rates: _Rates) -> list[str]:
    def total(values: Iterable[float]) -> float:
        return seeds * sum(values)

    row = [name, f"{seeds * len(works):,}"]
    row += [
        _count(total(x)) for x in ((w.steps for w in works), (w.trained for w in works), (w.forwarded for w in works))
    ]
    row.append(f"{seeds * sum(w.refreshes for w in works):,}")
    if rates.speeds:
        each = [w.seconds(rates.speeds) / rates.scale for w in works]
        longest, sum_of_all = max(each), total(each)
        row += [_time(sum_of_all), _time(max(longest, sum_of_all / rates.jobs))]
    if rates.tflops:
        row.append(_time(total(w.operations for w in works) / (rates.tflops * 1e12)))
    return row


def _table(groups: Mapping[str, Sequence[Work]], seeds: int, rates: _Rates, each: bool) -> Table:
    table = Table(title=f"{plural(seeds, 'seed')} of each configuration", title_justify="left")
    table.add_column("study", overflow="fold", min_width=16)
    heads = ["runs", "steps", "images forward and backward", "images forward only", "label propagations"]
    if rates.speeds:
        heads += ["one run at a time", f"{rates.jobs} at a time"]
    if rates.tflops:
        heads.append(f"at least, at {rates.tflops:g} TFLOP/s")
    for head in heads:
        table.add_column(head, justify="right", overflow="fold")
    everything = {id(w): w for works in groups.values() for w in works}  # two files may have one name
    for name, works in groups.items():
        table.add_row(*_row(name, works, seeds, rates))
        for work in works if each else ():
            table.add_row(*_row(f"  {work.name}", [work], seeds, rates))
    if len(groups) > 1:
        alike = sum(map(len, groups.values())) > len(everything)
        table.add_section()
        table.add_row(*_row("all, shared runs once" if alike else "all", list(everything.values()), seeds, rates))
    return table


def _machine(speeds: Speeds) -> str:
    m = speeds.machine
    what = m.get("gpu") or f"{m.get('processor')}, {m.get('threads')} thread(s) a run"
    load = "" if m.get("load_average") is None else f", load average {float(m['load_average']):.1f}"
    return f"{what}; {m.get('precision')}, torch {m.get('torch')}, {m.get('time')}, measured {m.get('at')}{load}"


def all_studies() -> list[str]:
    """Names of all studies, Figure 2 in one."""
    names = [t.name for t in tables()] + [f.name for f in figures()]
    return list(dict.fromkeys("figure2" if n.startswith("figure2") else n for n in names))


# -------------------------------------------------------------------------------------------------------- command line


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, allow_abbrev=False,
        usage=f"{prog} [NAME...] [--measure [--out FILE]] [--speeds FILE] [--scale X] [--tflops X] [--setting value ...]",
        description="What studies take: runs, steps, images, label propagations; and how long, from speeds that were measured."
        " No data set is needed.",
        epilog=f"Studies: {', '.join(study_names())}. A setting given here is for all runs.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )  # fmt: skip
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="studies, configurations or YAML files, as of sweep [all studies]")
    add("--seeds", type=int, default=5, metavar="N", help="runs of each configuration [%(default)s]")
    add("--each", action="store_true", help="a row for each configuration, too")
    add("--measure", action="store_true", help="time the steps on this machine")
    add("--out", type=Path, metavar="FILE", help="of --measure: write the speeds there, for --speeds")
    add("--speeds", type=Path, metavar="FILE", help="take the speeds that --measure --out wrote, here or elsewhere")
    add("--seconds", type=float, default=2.0, metavar="X", help="of --measure: time of each step's trial [%(default)s]")
    add(
        "--longest", type=float, default=5.0, metavar="X",
        help="of --measure: a step that would take longer is timed with a share of its images [%(default)s]",
    )  # fmt: skip
    add("--scale", type=float, default=1.0, metavar="X", help="a machine X times as quick as that of the speeds")
    add("--jobs", type=int, metavar="N", help="runs at a time; default: one per GPU, without GPU one per CPU core")
    add(
        "--tflops", type=float, metavar="X",
        help="a lower bound of the time: the nets' operations at X TFLOP/s (of what the device reaches, not its peak)",
    )  # fmt: skip
    return parser


def _faults(options: argparse.Namespace) -> list[str]:
    positive = {k: getattr(options, k) for k in ("seconds", "longest", "scale", "tflops")}
    faults = [
        f"--{k}: must be a number above 0, got {v:g}"
        for k, v in positive.items()
        if v is not None and not (0 < v < math.inf)
    ]
    counts = {"seeds": options.seeds, "jobs": options.jobs}
    faults += [f"--{k}: must be at least 1, got {v}" for k, v in counts.items() if v is not None and v < 1]
    if options.measure and options.speeds:
        faults.append("--measure, --speeds: give one of the two")
    if options.out and not options.measure:
        faults.append("--out: goes with --measure")
    if options.out and not options.out.absolute().parent.is_dir():
        faults.append(f"--out: {options.out.parent}: no such folder")
    if options.scale != 1 and not (options.measure or options.speeds):
        faults.append("--scale: of which speeds? Give --measure or --speeds FILE")
    if options.c or options.print_config:
        faults.append("--c, --print-config: of train; configurations are given by name or path, without a flag")
    return faults


def main(argv: Sequence[str], prog: str = "muscle-plugin cost") -> int:
    """Returns the exit status: 0, or 2 for bad input."""
    parser = _parser(prog)
    faults: list[str] = []
    groups: dict[str, list[Job]] = {}
    try:
        add_arguments(parser)
        options, layer, faults = parse_command_line(parser, argv)
        faults += _faults(options)
        for name in dict.fromkeys(options.names or all_studies()):
            try:
                groups[name] = jobs_of([name], 1, layer)
            except ConfigError as e:
                faults += e.faults
    except ConfigError as e:
        faults += e.faults
    except CatalogueError as e:
        faults.append(str(e))
    if faults:
        raise ConfigError(list(dict.fromkeys(faults))[:12])
    from muscle_plugin.errors import DataError, DeviceError, SpeedsError
    from muscle_plugin.studies.speeds import measure, read_speeds

    console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
    try:
        speeds = read_speeds(options.speeds) if options.speeds else None
        counter = Counter(flops=options.tflops is not None)
        with console.status("counting images") as status:
            works = {name: [counter.work(job) for job in jobs] for name, jobs in groups.items()}
            if options.measure:
                total = len(counter.kinds) + len(counter.diffusions)
                done = iter(range(1, total + 1))
                speeds = measure(
                    counter.kinds, counter.diffusions, options.seconds, options.longest,
                    lambda what: status.update(f"measuring {next(done)} of {total}: {what}"), options.jobs,
                )  # fmt: skip
        if options.out and speeds:
            speeds.write(options.out)
    except (SpeedsError, ConfigError, DataError, DeviceError, ValueError, NotImplementedError) as e:
        raise InputError(str(e).splitlines()[0]) from e
    rates = _Rates(speeds, options.scale, options.tflops, options.jobs or (speeds.at_once if speeds else 1))
    console.print(_table(works, options.seeds, rates, options.each))
    for line in _notes(works, rates, counter):
        console.print(line, markup=False)
    return 0


def _notes(works: Mapping[str, Sequence[Work]], rates: _Rates, counter: Counter) -> list[str]:
    """What a reader must know of the table."""
    out = []
    if rates.speeds is None:
        out.append(
            "Hours: not yet measured. --measure times the steps on this machine; --speeds FILE takes what it wrote elsewhere."
        )
    else:
        times = f", taken {rates.scale:g} times as quick" if rates.scale != 1 else ""
        out.append(f"Speeds: {_machine(rates.speeds)}{times}. Start-up, checkpoints and reading of data come on top.")
        from muscle_plugin.studies.speeds import propagation_key

        absent = [str(k) for k in counter.kinds if str(k) not in rates.speeds.steps]
        absent += [k for k in dict.fromkeys(x.images_of for x in counter.kinds) if k not in rates.speeds.forward]
        absent += [k for d in counter.diffusions if (k := propagation_key(*d)) not in rates.speeds.propagation]
        if absent:
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            out.append(f"?: not among the speeds: {'; '.join(absent[:3])}{more}. Measure these studies, too.")
    if rates.tflops:
        out.append(
            f"At {rates.tflops:g} TFLOP/s: nothing measured: the operations of the nets' convolutions and products over that"
            " rate, one run after the other; a lower bound, as all else is left out."
        )
    return out
