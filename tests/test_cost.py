"""``muscle-plugin cost``: counts by hand, time by hand, speeds on file, and the real path on the digits."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from muscle_plugin import cli
from muscle_plugin.registry.names import DATASETS
from muscle_plugin.runs.train import build
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.settings.sources import Layer
from muscle_plugin.studies import estimate
from muscle_plugin.studies.cost import IMAGES, Counter, _Rates, _row, _table, all_studies
from muscle_plugin.studies.speeds import (
    Images,
    Speeds,
    StepKind,
    StepSpeed,
    alike,
    count_images,
    flops_per_image,
    propagation_key,
    read_speeds,
)
from muscle_plugin.studies.sweep import jobs_of


def work_of(name, **settings):
    (job,) = jobs_of([name], 1, Layer("test", settings))
    return Counter().work(job)


def speeds_of(work, seconds=0.5, forward=1000.0, diffusion=4.0):
    """Every step of a run takes ``seconds``."""
    steps = {
        str(s.kind): StepSpeed(trained=s.images.trained, forwarded=s.images.forwarded, seconds=seconds, steps=3)
        for s in work.stages
    }
    return Speeds(
        format=1, machine={"processor": "made up"}, at_once=2, steps=steps,
        forward={work.stages[0].kind.images_of: forward}, propagation={propagation_key(*work.diffusion): diffusion},
    )  # fmt: skip


def test_two_files_of_one_name_are_counted_each(tmp_path):
    counter, works = Counter(flops=True), []
    for folder, steps, width in (("a", 100, 1), ("b", 900, 2)):
        (tmp_path / folder).mkdir()
        text = f"extends: supervised_digits_10\nepoch: 1\nnum_train_iter: {steps}\nnet_width: {width}\n"
        (tmp_path / folder / "own.yaml").write_text(text)
        works.append(counter.work(*jobs_of([str(tmp_path / folder / "own.yaml")], 1, Layer("test"))))
    a, b = works
    assert (a.steps, b.steps) == (100, 900)
    assert a.stages[0].kind != b.stages[0].kind
    assert b.flops[0] > 3 * a.flops[0]
    table = _table({"a/own.yaml": [a], "b/own.yaml": [b]}, 1, _Rates(None, 1.0, None, 1), each=False)
    assert list(table.columns[2].cells)[-1] == "1,000"


def test_counts_of_a_supervised_run_by_hand():
    # 250 of 50,000 images are labelled; 50 + 50 a step, of which the labelled ones are forwarded; 180 epochs
    work = work_of("supervised_cifar10_250")
    assert work.steps == 180 * 49_750 / 50 == 179_100
    assert work.stages[0].images == Images(50, 0)
    assert (work.trained, work.refreshes) == (50 * 179_100, 0)
    assert work.evaluations == 90  # every 2,000 steps, and at the end
    assert work.forwarded == 90 * 10_000


def test_counts_of_muscle_over_fixmatch_by_hand():
    # setting 2: 300 epochs of 64 + 64; a weak and three hard views of each image: 4 x 128
    work = work_of("muscle_fixmatch_cifar10_250")
    assert work.steps == round(300 * 49_750 / 64)
    assert work.stages[0].images == Images(512, 0)
    assert work.trained == 512 * work.steps


def test_counts_of_label_propagation_with_mean_teacher_by_hand():
    # twice 180 epochs of 50 + 50; the teacher forwards as many, without gradient; features of 50,000 images 180 times
    work = work_of("meanteacher_labelprop_cifar10_250")
    assert [s.kind.stage for s in work.stages] == [1, 2]
    assert [s.steps for s in work.stages] == [179_100, 179_100]
    assert [s.images for s in work.stages] == [Images(100, 100)] * 2
    assert (work.refreshes, work.diffusion) == (180, (50_000, 10, 50))
    assert work.forwarded == 100 * 358_200 + 180 * 50_000 + 180 * 10_000


def test_label_propagation_forwards_other_images_in_stage_2():
    work = work_of("labelprop_digits_10")
    assert [s.images for s in work.stages] == [Images(24, 0), Images(96, 0)]
    assert [s.steps for s in work.stages] == [600, 600]
    assert (work.refreshes, work.diffusion) == (30, (1437, 10, 20))


def test_hidden_subclasses_have_a_stand_in_too():
    # weak and three hard views of 64 + 64
    assert count_images(load_settings("muscle_cifar20_80"), None) == Images(512, 0)


@pytest.mark.parametrize(
    ("changes", "images", "time"),
    [
        ({"lr": 0.5, "num_labels": 20, "epoch": 9, "seed": 3, "save_dir": "elsewhere", "mi_weight": 2}, True, True),
        ({"net": "cnn13"}, True, False),
        ({"net_dropout": 0.5}, True, False),
        ({"precision": "bf16"}, True, False),
        ({"dataset": "cifar10"}, True, False),
        ({"mi_weight": 0}, False, False),  # nothing is forwarded for it
        ({"hard_views": 2}, False, False),
        ({"total_batch": 50}, False, False),
        ({"algorithm": "muscle_fixmatch"}, False, False),
    ],
)
def test_which_settings_make_steps_alike(changes, images, time):
    """For ``cost``, which counts images by the smallest net, and for ``sweep --dry-run``."""
    one, other = load_settings("muscle_digits_10"), load_settings("muscle_digits_10", **changes)
    assert (alike(one, in_images_alone=True) == alike(other, in_images_alone=True)) == images
    assert (alike(one) == alike(other)) == time
    jobs = [
        SimpleNamespace(resolved=r, result={"steps": n, "seconds": 9.0}, run_dir=Path())
        for n, r in ((3, one), (1, other))
    ]
    speeds = estimate.Speeds(jobs)
    assert speeds.of(jobs[1]).seconds == (6.0 if time else 9.0)  # the median over runs of like steps


def test_time_of_a_run_by_hand():
    work = work_of("meanteacher_labelprop_cifar10_250")
    seconds = 358_200 * 0.5 + 180 * 10_000 / 1000 + 180 * (50_000 / 1000 + 4)
    assert work.seconds(speeds_of(work)) == pytest.approx(seconds)
    half = speeds_of(work).model_dump()
    for speed in half["steps"].values():  # timed with half of the images, in half of the time
        speed |= {"trained": 50, "forwarded": 50, "seconds": 0.25}
    assert work.seconds(Speeds.model_validate(half)) == pytest.approx(seconds)


def test_what_was_not_measured_is_not_guessed():
    speeds = speeds_of(work_of("supervised_digits_10"))
    assert math.isnan(work_of("muscle_digits_10").seconds(speeds))
    assert math.isnan(work_of("supervised_cifar10_250").seconds(speeds))


def test_time_falls_with_scale_and_with_runs_at_a_time():
    work = work_of("muscle_digits_10")
    rows = [
        _row("x", [work], 2, _Rates(speeds_of(work), scale, None, jobs))
        for scale, jobs in ((1, 1), (2, 1), (1, 2), (1, 9))
    ]
    # 1,200 steps of half a second and 24 evaluations of 360 images: 609 s a run, two runs
    assert [r[-2:] for r in rows] == [
        ["20 min", "20 min"],
        ["10 min", "10 min"],
        ["20 min", "10 min"],
        ["20 min", "10 min"],
    ]


def test_lower_bound_counts_every_operation_once():
    (job,) = jobs_of(["supervised_digits_10"], 1, Layer("test", {}))
    work = Counter(flops=True).work(job)
    forward, both = flops_per_image(job.resolved)
    # convolutions of small_cnn on 16 x 16: output positions x kernel x channels in and out; a linear layer; 2 for multiply-add
    by_hand = 2 * (8 * 8 * 25 * 1 * 32 + 4 * 4 * 25 * 32 * 64 + 1 * 16 * 64 * 128 + 128 * 10)
    assert forward == by_hand
    # backward: as much for the weights' gradient, and as much for the inputs', but not the first layer's
    assert both == 3 * by_hand - 2 * 8 * 8 * 25 * 32
    assert work.operations == 1200 * 24 * both + 24 * 360 * forward


def test_operations_of_a_real_step_are_those_of_its_images(build_short):
    # a teacher's images, which go forward only, among them
    algorithm = build_short(algorithm="meanteacher_original", total_batch=32, batch_size=None)
    algorithm.model.train()
    algorithm.epoch = 0
    with FlopCounterMode(display=False) as counter, algorithm.in_step():
        out, _ = algorithm.train_step(**algorithm.process_batch(**algorithm.batches.batch(0)))
        out["loss"].backward()
    forward, both = flops_per_image(load_settings("meanteacher_original_digits_10"))
    assert counter.get_total_flops() == pytest.approx(32 * both + 32 * forward, rel=1e-6)


def test_sizes_of_data_sets_are_known_and_true():
    from muscle_plugin.data.datasets.digits import digits
    from muscle_plugin.data.source import SourceOptions

    source = digits(SourceOptions(None, 8))
    assert IMAGES["digits"] == (len(source.train), len(source.test))
    assert set(DATASETS) - set(IMAGES) == {"folder"}
    assert {"table1", "table5", "figure2", "figure3", "digits", "classic_cv", "usb_cv"} <= set(all_studies())


def test_measured_written_and_read_again(tmp_path, capsys):
    file = tmp_path / "speeds.json"
    studies = ["labelprop_digits_10", "fixmatch_digits_10"]
    assert cli.main(["cost", *studies, "--measure", "--seconds", "0.05", "--out", str(file)]) == 0
    here = capsys.readouterr().out
    speeds = read_speeds(file)
    assert set(speeds.steps) == {f"small_cnn@16 {a}" for a in ("labelprop stage 1", "labelprop stage 2", "fixmatch")}
    assert speeds.steps["small_cnn@16 fixmatch"].trained == 24 + 2 * 72
    assert list(speeds.propagation) == ["1437 points, 10 classes, k 20"]
    speeds.write(tmp_path / "again.json")
    assert read_speeds(tmp_path / "again.json") == speeds
    assert cli.main(["cost", *studies, "--speeds", str(file)]) == 0
    assert capsys.readouterr().out == here
    assert cli.main(["cost", "muscle_digits_10", *studies, "--speeds", str(file)]) == 0
    assert "?: not among the speeds: small_cnn@16 muscle. Measure" in " ".join(capsys.readouterr().out.split())


def test_steps_that_would_take_long_are_timed_with_fewer_images(tmp_path):
    file = tmp_path / "speeds.json"
    assert (
        cli.main(
            ["cost", "fixmatch_digits_10", "--measure", "--seconds", "0.01", "--longest", "1e-6", "--out", str(file)]
        )
        == 0
    )
    (speed,) = read_speeds(file).steps.values()
    assert speed.trained == 4 + 2 * 12  # a sixth of 24 + 72


def test_without_speeds_it_says_that_nothing_was_measured(capsys):
    assert cli.main(["cost", "supervised_digits_10", "--tflops", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Hours: not yet measured." in out
    assert "nothing measured: the operations" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tabel1"], "no such study or configuration; did you mean 'table1'?"),
        (["muscle_digits_10", "--scale", "0", "--speeds", "x"], "--scale: must be a number above 0, got 0"),
        (["muscle_digits_10", "--tflops", "nan"], "--tflops: must be a number above 0, got nan"),
        (["muscle_digits_10", "--scale", "2"], "--scale: of which speeds? Give --measure or --speeds FILE"),
        (["muscle_digits_10", "--seeds", "0"], "--seeds: must be at least 1, got 0"),
        (["muscle_digits_10", "--out", "x.json"], "--out: goes with --measure"),
        (["muscle_digits_10", "--measure", "--out", "no/such/folder/x.json"], "--out: no/such/folder: no such folder"),
        (["muscle_digits_10", "--speeds", "absent.json"], "absent.json: cannot be read: No such file"),
        (["muscle_digits_10", "--scael", "2"], "--scael is not a setting"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert cli.main(["cost", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: "),
        ({"at_once": 0}, "at_once: "),
        ({"forward": {"small_cnn@16": 0}}, "forward.small_cnn@16: must be above 0"),
        ({"steps": {"x": {"trained": 1, "forwarded": 0, "seconds": -1, "steps": 1}}}, "steps.x.seconds: "),
        ({"steps": {"x": {"trained": 1, "forwarded": 0, "seconds": math.inf, "steps": 1}}}, "steps.x.seconds: "),
        ({"more": 1}, "more: "),
    ],
)
def test_a_file_that_is_no_file_of_speeds_is_refused_in_one_line(change, message, tmp_path, capsys):
    file = tmp_path / "speeds.json"
    file.write_text(json.dumps({**speeds_of(work_of("supervised_digits_10")).model_dump(), **change}))
    assert cli.main(["cost", "supervised_digits_10", "--speeds", str(file)]) == 2
    said = capsys.readouterr().err
    assert f"{file}: not a file of speeds: {message}" in said
    assert len(said.splitlines()) == 1


def test_a_data_set_of_unknown_size_is_refused(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(f"dataset: folder\nalgorithm: supervised\ndata_dir: {tmp_path}\n")
    assert cli.main(["cost", str(tmp_path / "mine.yaml")]) == 2
    assert "mine: the size of dataset folder is not known here" in capsys.readouterr().err


def test_kinds_of_steps_have_names():
    assert str(StepKind("cnn13", 32, "labelprop", 2)) == "cnn13@32 labelprop stage 2"


def test_a_dry_run_counts_the_steps_that_folders_of_images_would_be_trained_for(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "TRIAL_SECONDS", 0.0)
    rng = np.random.default_rng(0)
    for name, unlabelled in (("a", 30), ("b", 90)):
        for i in range(unlabelled + 20):
            part = f"labelled/{i % 2}" if i < 20 else "unlabelled"
            (tmp_path / name / part).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / part / f"{i}.png")
        settings = "dataset: folder\nalgorithm: fixmatch\nimg_size: 16\ntotal_batch: 4\nepoch: 2\nnum_threads: 1\n"
        (tmp_path / f"{name}.yaml").write_text(f"{settings}data_dir: {tmp_path / name}\n")
    jobs = jobs_of(
        [str(tmp_path / f"{n}.yaml") for n in "ab"], 1, Layer("command line", {"save_dir": str(tmp_path / "r")})
    )
    speeds = estimate.Speeds(jobs)
    found = [(speeds.of(j), j.resolved.settings) for j in jobs]
    assert [estimate.steps_of(s, x.images, x.labels) for x, s in found] == [30, 90]  # 2 * 30 / 2 and 2 * 90 / 2
    assert [build(j.resolved).num_train_iter for j in jobs] == [30, 90]
