"""From a folder of images to a table of predictions, by the command line."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from muscle_plugin.cli import main
from muscle_plugin.inference.predict import Predictor

NAMES = ("zero", "one", "two", "three")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four of scikit-learn's digits as image files: 4 labelled a class, 20 a class for testing, the rest unlabelled."""
    root = tmp_path_factory.mktemp("my images ä")
    digits = load_digits()
    seen = dict.fromkeys(range(4), 0)
    for i, (pixels, y) in enumerate(zip(digits.images, digits.target, strict=True)):
        if y > 3:
            continue
        seen[y] += 1
        part = f"labelled/{NAMES[y]}" if seen[y] <= 4 else f"test/{NAMES[y]}" if seen[y] <= 24 else "unlabelled"
        path = root / part / f"scan {i}.{('png', 'bmp', 'jpg')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((18 + i % 5, 16 + i % 4))
        image.convert("RGB" if i % 2 else "L").save(path)
    return root


SETTINGS = [
    "--dataset", "folder", "--img_size", "16", "--algorithm", "muscle_fixmatch",
    "--weak_augment", "digits_weak", "--hard_augment", "digits_hard", "--total_batch", "64", "--ratio", "3",
    "--num_train_iter", "150", "--epoch", "1", "--num_eval_iter", "75", "--lr", "0.05", "--ema_m", "0.95",
    "--num_threads", "1", "--use_tensorboard", "false",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    where = ["--data_dir", str(folder), "--save_dir", str(out), "--save_name", "mine"]
    assert main(["train", *SETTINGS, *where]) == 0
    return out / "mine"


def predict(*words):
    return main(["predict", *map(str, words)])


def table(path: Path):
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def test_every_file_of_a_run_is_json_though_nobody_knows_whether_pseudo_labels_are_right(folder, tmp_path):
    short = [
        "--algorithm",
        "labelprop",
        "--num_train_iter",
        "8",
        "--epoch",
        "4",
        "--num_eval_iter",
        "2",
        "--num_log_iter",
        "2",
    ]
    assert (
        main(["train", *SETTINGS, *short, "--data_dir", str(folder), "--save_dir", str(tmp_path), "--save_name", "r"])
        == 0
    )
    texts = {p.name: p.read_text() for p in (tmp_path / "r").glob("*.json*")}
    assert {"metrics.jsonl", "result.json", "environment.json"} <= texts.keys()
    for name, text in texts.items():
        for part in text.splitlines() if name.endswith("l") else [text]:
            json.loads(part, parse_constant=lambda word, name=name: pytest.fail(f"{name}: {word}"))
    lines = [json.loads(line) for line in texts["metrics.jsonl"].splitlines()]
    assert None in [line.get("train/pseudo_accuracy", "absent") for line in lines]
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    assert "1 finished" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.slow
def test_it_learns_from_the_folder_and_predicts_what_it_measured(run, folder, tmp_path):
    result = json.loads((run / "result.json").read_text())
    assert result["last_top1"] > 0.8
    assert result["num_labels"] == 16
    assert predict("--checkpoint", run, "--images", folder / "test", "--out", tmp_path / "p.csv") == 0
    rows = table(tmp_path / "p.csv")
    assert len(rows) == 80
    right = [row["file"].split("/")[0] == row["class"] for row in rows]
    assert np.mean(right) == pytest.approx(result["last_top1"])
    assert all(0.25 <= float(row["probability"]) <= 1 for row in rows)


@pytest.mark.slow
def test_one_image_and_any_batch_size_give_the_same_prediction(run, folder, tmp_path):
    image = sorted((folder / "unlabelled").iterdir())[5]
    assert predict("--checkpoint", run / "latest_model.pth", "--images", image, "--out", tmp_path / "1.csv") == 0
    assert predict("--checkpoint", run, "--images", image.parent, "--out", tmp_path / "all.csv", "--batch", 7) == 0
    (one,) = table(tmp_path / "1.csv")
    (same,) = (row for row in table(tmp_path / "all.csv") if row["file"] == image.name)
    assert one["class"] == same["class"]
    assert float(one["probability"]) == pytest.approx(float(same["probability"]), abs=1e-4)


def test_faults_are_one_line_and_leave_the_output_alone(run, folder, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "p.csv"
    images.mkdir()

    def fault(*words):
        assert predict(*words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    arguments = ("--checkpoint", run, "--images", images, "--out", out)
    assert f"{images}: no image" in fault(*arguments)
    (images / "a.HEIC").write_text("x")
    assert re.search(rf"{images}: no image.*\b1 \.heic", fault(*arguments))
    (images / "bad.png").write_text("x")
    Image.new("RGB", (9, 9)).save(images / "good.png")
    assert "bad.png: " in fault(*arguments)
    assert not out.exists()
    assert predict(*arguments, "--skip-bad-images") == 0
    assert "1 .heic" in capsys.readouterr().out
    assert [row["file"] for row in table(out)] == ["good.png"]
    capsys.readouterr()
    assert re.search(rf"{out}: .*--overwrite", fault(*arguments))
    assert f"{tmp_path / 'no'}: no such" in fault(
        "--checkpoint", run, "--images", tmp_path / "no", "--out", tmp_path / "q.csv"
    )
    assert f"{tmp_path / 'no.pth'}: no such" in fault(
        "--checkpoint", tmp_path / "no.pth", "--images", images, "--out", tmp_path / "q.csv"
    )
    (tmp_path / "no.pth").write_bytes(b"123")
    assert "readable checkpoint" in fault(
        "--checkpoint", tmp_path / "no.pth", "--images", images, "--out", tmp_path / "q.csv"
    )
    assert "--batch" in fault(*arguments, "--batch", 0, "--overwrite")


def test_a_folder_without_test_images_trains_and_predicts(folder, tmp_path, capsys):
    for part in ("labelled", "unlabelled"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / part).symlink_to(folder / part)
    where = [
        "--data_dir",
        str(tmp_path / "data"),
        "--save_dir",
        str(tmp_path),
        "--save_name",
        "r",
        "--allow_outside",
        "true",
    ]
    assert main(["train", *SETTINGS, *where, "--num_train_iter", "4", "--num_eval_iter", "2"]) == 0
    assert "no test images" in capsys.readouterr().out
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["complete"]
    assert result["last_top1"] is None
    assert not (tmp_path / "r" / "model_best.pth").exists()
    assert predict("--checkpoint", tmp_path / "r", "--images", folder / "test", "--out", tmp_path / "p.csv") == 0
    assert len(table(tmp_path / "p.csv")) == 80


def test_part_of_the_labels_can_be_used(folder, tmp_path):
    where = ["--data_dir", str(folder), "--save_dir", str(tmp_path), "--save_name", "r"]
    assert main(["train", *SETTINGS, *where, "--num_train_iter", "1", "--num_labels", "8"]) == 0
    split = json.loads((tmp_path / "r" / "split.json").read_text())
    assert split["labels_per_class"] == dict.fromkeys(sorted(NAMES), 2)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["comatch", "muscle_remixmatch", "muscle", "crmatch"])
def test_nets_with_heads_of_the_algorithms_own_predict_too(algorithm, short_run, tmp_path):
    wide = {"net": "wrn_28_2", "img_size": 32, "total_batch": 6, "num_train_iter": 1, "epoch": 1}
    short_run(algorithm=algorithm, save_name="r", **(wide if algorithm == "crmatch" else {}))
    Image.new("L", (8, 8), 90).save(tmp_path / "a.png")
    assert predict("--checkpoint", tmp_path / "r", "--images", tmp_path / "a.png", "--out", tmp_path / "p.csv") == 0
    assert table(tmp_path / "p.csv")[0]["class"] in "0123456789"


@pytest.mark.slow
def test_data_show_counts_classes_and_draws_every_view(folder, tmp_path, capsys):
    where = ["--data_dir", str(folder), "--save_dir", str(tmp_path)]
    picture, split = tmp_path / "v.png", tmp_path / "s.json"
    assert main(["data", "show", *SETTINGS, *where, "--out", str(picture), "--save_split", str(split)]) == 0
    shown = capsys.readouterr().out
    assert "16 labelled" in shown
    assert re.search(r"\b80 test .*\b16 x 16\b", shown)
    assert all(name in shown for name in NAMES)
    assert Image.open(picture).size[0] > 300
    assert main(["data", "show", *SETTINGS, *where, "--split_file", str(split)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.json", "v.png"]  # no run is begun


def test_class_names_are_shown_as_they_are(tmp_path, capsys):
    lines = []
    for i, name in enumerate(("cat [adult]", "x [/y]")):
        Image.new("RGB", (16, 16), (90 * i, 0, 0)).save(tmp_path / f"{i}.png")
        Image.new("RGB", (16, 16), (90 * i, 0, 9)).save(tmp_path / f"unlabelled {i}.png")
        lines.append(f"{i}.png,{name}\n")
    (tmp_path / "t.csv").write_text("".join(lines))
    words = ["--data_dir", str(tmp_path), "--labels_csv", str(tmp_path / "t.csv"), "--total_batch", "2"]
    assert main(["data", "show", "--dataset", "folder", "--img_size", "16", "--num_threads", "1", *words]) == 0
    shown = capsys.readouterr().out
    assert "cat [adult]" in shown
    assert "x [/y]" in shown


def test_images_that_the_net_was_not_made_for_are_refused(run):
    predictor = Predictor(str(run / "latest_model.pth"), "cpu")
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    assert predictor.probabilities(images).sum(1).tolist() == pytest.approx([1, 1])
    large = images.repeat(1, 1, 2, 2)
    for wrong in (images.float() / 255, images.long(), large, images[0], images.movedim(1, 3), images.numpy()):
        with pytest.raises(ValueError, match=r"uint8 .*RGB .*\(N, 3, 16, 16\)"):
            predictor.probabilities(wrong)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data"], "muscle-plugin data show"),
        (["data", "list"], "muscle-plugin data show"),
        (["data", "show", "--dataset", "digits", "--out", "views.xyz"], r"--out: views\.xyz: "),
        (["data", "show", "--dataset", "cifar20", "--num_labels", "100"], r"--num_labels: 100 .*\b80\b"),
        (["data", "show", "--dataset", "digits", "--sequestered", "1"], r"--sequestered: digits .*\b1\b"),
        (["data", "show", "--dataset", "digits", "--skip-bad-images"], "--skip_bad_images: "),
        (["data", "show", "--dataset", "digits", "--hard_ops", "3"], "digits_hard .*operations"),
        (["data", "show", "--dataset", "folder", "--data_dir", "/none"], "/none: "),
    ],
)
def test_faulty_requests_are_one_line(words, message, capsys):
    assert main(words) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert re.search(message, line)
