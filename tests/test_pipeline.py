"""Every script as a process, as a user runs it, in a fresh folder."""

import ast
import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bench.kill_battery import edit
from conftest import _clicks_like_real, _raw

ROOT = Path(__file__).parents[1]
CHAIN = ["get_indexing", "get_tfrecord", "get_dataset", "model_tf2", "train", "infer"]
REAL = _clicks_like_real(300, seed=41)


def start(script, folder, *arguments):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, f"{script}.py", *arguments], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def end(process):
    """(exit status, standard output, standard error) of a process that was started."""
    out, err = process.communicate()
    return process.returncode, out, err


def copy_scripts(folder):
    for script in CHAIN:
        shutil.copy(ROOT / f"{script}.py", folder)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(a folder in which the six scripts ran one after another, what each printed), with EPOCHS edited to 2."""
    folder, printed = tmp_path_factory.mktemp("fresh"), {}
    copy_scripts(folder)
    edit(folder, "train", EPOCHS=2)
    titles = {vid: f"Title of {vid}" for vids in REAL["columns"].values() for vid in vids}
    names = {cid: f"Column {cid}" for cid in REAL["columns"]}
    _raw(folder / "data/sample", **REAL, titles=titles, names=names)
    for script in CHAIN:
        status, out, err = end(start(script, folder))
        assert status == 0, f"{script}.py: {out}\n{err}"
        assert "Traceback" not in err
        printed[script] = out
    return folder, printed


def test_numbering_writes_the_index_and_a_short_report(done):
    folder, printed = done
    videos = json.loads((folder / "data/work/indexing/vid2idx.json").read_text())
    columns = json.loads((folder / "data/work/indexing/cid2vidx.json").read_text())
    assert sorted(videos.values()) == list(range(2, 62))
    assert columns == {cid: [videos[vid] for vid in vids] for cid, vids in REAL["columns"].items()}
    assert printed["get_indexing"].startswith("60 videos") and printed["get_indexing"].count("\n") == 1


def test_the_records_count_every_user_and_click(done):
    folder, printed = done
    manifest = json.loads((folder / "data/work/tfrecord/manifest.json").read_text())
    clicks = [click for _, seq in REAL["users"] for click in seq]
    assert manifest["report"]["lines"] == 300 and manifest["report"]["clicks"] == len(clicks)
    assert manifest["report"]["column_clicks"] == sum("_" in click for click in clicks)
    held_out = sum(any("_" in click for click in seq[1:]) for _, seq in REAL["users"])
    assert manifest["splits"]["val"]["users"] + manifest["splits"]["test"]["users"] == held_out
    assert manifest["splits"]["train"]["users"] == 300
    assert all((folder / "data/work/tfrecord" / name).exists() for name in manifest["shards"])
    assert f"{len(clicks):,} clicks" in printed["get_tfrecord"]


def test_the_dataset_and_the_model_print_what_they_are(done):
    _, printed = done
    assert re.search(r"user_feature +int32 +\[\d+, \d+\]", printed["get_dataset"])
    assert "Title of t" in printed["get_dataset"] and "Column t" in printed["get_dataset"]
    assert re.search(r"logits \[users,.* columns\]: \[4,.* 50\]", printed["model_tf2"])


def test_training_leaves_a_model_its_history_and_its_metrics(done):
    folder, printed = done
    saved = json.loads((folder / "data/work/model/model.json").read_text())
    assert (folder / "data/work/model" / saved["weights"]["file"]).exists()
    with open(folder / "data/work/model/history.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    test = json.loads((folder / "data/work/model/metrics.json").read_text())["test"]
    assert test["mix"]["NDCG@10"] > test["popularity"]["NDCG@10"]
    with open(folder / "data/work/model/test.csv", newline="", encoding="utf-8") as file:
        ranks = [int(row["mix"]) for row in csv.DictReader(file)]
    assert test["mix"]["MRR"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
    assert "test users" in printed["train"] and "popularity" in printed["train"]
    assert "training starts from nothing: no model stands; 2 epochs at most" in printed["train"]
    assert not (folder / "data/work/model/checkpoint.npz").exists()


def test_ranking_gives_each_user_a_line_in_input_order_with_every_column(done):
    folder, printed = done
    with gzip.open(folder / "data/work/ranking/clicks.json.gz", "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert [line["uid"] for line in lines] == [uid for uid, _ in REAL["users"]]
    assert all(sorted(line["columns"]) == sorted(REAL["columns"]) for line in lines)
    assert all(line["scores"] == sorted(line["scores"], reverse=True) for line in lines)
    assert f"Column {lines[0]['columns'][0]}" in printed["infer"] and "300 users ranked" in printed["infer"]


def test_rankings_put_a_users_own_topic_first(done):
    """Users of clicks_like_real stay in one topic of 3 columns out of 12; a ranking by chance has 1 in 4 right."""
    folder, _ = done
    with gzip.open(folder / "data/work/ranking/clicks.json.gz", "rt", encoding="utf-8") as file:
        first = [json.loads(line)["columns"][0][:2] for line in file]
    topics = [max("0123", key=[click[1] for click in clicks].count) for _, clicks in REAL["users"]]
    assert sum(found == f"t{topic}" for found, topic in zip(first, topics, strict=True)) > 240


def test_nothing_is_written_outside_the_work_folder(done):
    folder, _ = done
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {*(f"{s}.py" for s in CHAIN), "data"}
    assert {path.name for path in (folder / "data").iterdir()} == {"sample", "work"}
    assert {path.name for path in (folder / "data/sample").iterdir()} == {
        "cid2vids.json",
        "vid2title.json",
        "click_seq",
    }


def contents(folder):
    """{path: (its bytes, when it was written)} of a folder's files that are not hidden."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_constants_that_only_concern_running_and_comments_redo_nothing(done, tmp_path):
    folder = shutil.copytree(done[0], tmp_path / "again")
    edit(folder, "get_indexing", NUM_WORKERS=1, RANGE_BYTES=9_000)
    edit(folder, "train", CLUSTER_TIMEOUT=5)
    edit(folder, "infer", BATCH_USERS=7, GZIP_LEVEL=9)
    for script in CHAIN:
        with open(folder / f"{script}.py", "a", encoding="utf-8") as file:
            file.write("# a comment\n")
    before = contents(folder / "data/work")
    said = {}
    for script in ("get_tfrecord", "train", "infer"):
        status, said[script], err = end(start(script, folder))
        assert status == 0, err
    assert "nothing to train" in said["train"] and "0 users ranked in 0 files, 1 files stand" in said["infer"]
    after = contents(folder / "data/work")
    for compared in ("ranking/manifest.jsonl", "tfrecord/manifest.json"):  # their time is that of the comparison
        assert after.pop(compared)[0] == before.pop(compared)[0]
    assert after == before


def test_training_gives_the_same_weights_whatever_the_kerasjson_of_the_user_says(done, tmp_path, monkeypatch):
    (tmp_path / "keras").mkdir()
    (tmp_path / "keras/keras.json").write_text(json.dumps({"floatx": "float64", "backend": "torch"}))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    folder = shutil.copytree(done[0], tmp_path / "folder")
    expected = json.loads((folder / "data/work/model/model.json").read_text())
    shutil.rmtree(folder / "data/work/model")
    status, _, err = end(start("train", folder))
    assert status == 0, err
    saved = json.loads((folder / "data/work/model/model.json").read_text())
    assert (saved["weights"], saved["test"]) == (expected["weights"], expected["test"])


@pytest.fixture(scope="module")
def elsewhere(done, tmp_path_factory):
    """(folder, what infer.py printed) where after training constants were edited, data/sample went and others/ came.

    others/ has the same clicks, and the ranking is to go into data/others.
    """
    folder = shutil.copytree(done[0], tmp_path_factory.mktemp("elsewhere") / "folder")
    edit(folder, "get_tfrecord", USER_MAX_LEN=20)
    edit(folder, "get_dataset", ITEM_MAX_LEN=2, BATCH_POSITIONS=64)
    edit(folder, "model_tf2", EMB_DIM=8, USER_BLOCKS=2, VIDEO_DECAY=0.1, MEMORY_CLICKS=2, MEMORY_WIDTH=2)
    edit(folder, "train", EPOCHS=1, MEMORY=False, MEMORY_DECAYS=(0.1,))
    edit(folder, "infer", CLICKS_DIR="others/click_seq", RANKING_DIR="data/others")
    (folder / "data/sample").rename(folder / "others")
    status, out, err = end(start("infer", folder))
    assert status == 0, err
    return folder, out


def test_constants_edited_after_training_neither_refuse_nor_change_a_ranking(elsewhere):
    folder, _ = elsewhere
    former, ranked = (folder / f"data/{name}/clicks.json.gz" for name in ("work/ranking", "others"))
    assert ranked.read_bytes() == former.read_bytes()


def test_another_click_folder_is_ranked_without_a_data_dir(elsewhere):
    folder, out = elsewhere
    assert "300 users ranked in 1 files, 1 files stand in data/others" in out
    assert f"user {REAL['users'][0][0]} clicked last:" in out and "Title of" not in out
    assert not (folder / "data/sample").exists()


def one_clear_line(status, err, script):
    """Whether a script ended with one line of its own and no traceback; tensorflow may have said something before."""
    last = err.strip().splitlines()[-1]
    return status == 1 and "Traceback" not in err and last.startswith(f"{script}.py: ")


def test_scripts_out_of_order_name_the_script_to_run_first(tmp_path):
    bare, numbered = tmp_path / "bare", tmp_path / "numbered"
    for folder in (bare, numbered):
        _raw(folder / "data/sample", **REAL)
        copy_scripts(folder)
    assert end(start("get_indexing", numbered))[0] == 0
    cases = [
        (bare, "get_tfrecord", "get_indexing.py"),
        (numbered, "get_dataset", "get_tfrecord.py"),
        (numbered, "train", "get_tfrecord.py"),
        (numbered, "infer", "train.py"),
    ]
    for (folder, script, first), process in [(case, start(case[1], case[0])) for case in cases]:
        status, _, err = end(process)
        assert one_clear_line(status, err, script), err
        assert f"run {first} first" in err.strip().splitlines()[-1]
        assert str(folder) in err.strip().splitlines()[-1]


def test_missing_raw_data_is_named_in_one_line(tmp_path):
    copy_scripts(tmp_path)
    status, _, err = end(start("get_indexing", tmp_path))
    assert one_clear_line(status, err, "get_indexing") and err.count("\n") == 1
    assert str(tmp_path / "data/sample") in err


def test_help_prints_what_the_script_does_and_any_other_argument_is_refused_in_one_line(tmp_path):
    """Of get_indexing.py; that every script begins the same way is a rule of test_architecture.py."""
    copy_scripts(tmp_path)
    _raw(tmp_path / "data/sample", columns={"c1": ["v1"]}, titles={"v1": "One"})
    status, out, err = end(start("get_indexing", tmp_path, "--help"))
    source = (tmp_path / "get_indexing.py").read_text(encoding="utf-8")
    assert (status, out, err) == (0, ast.get_docstring(ast.parse(source), clean=False) + "\n", "")
    for arguments in (["--data-dir", "x"], ["-h"], ["--help", "x"], [""]):
        status, out, err = end(start("get_indexing", tmp_path, *arguments))
        assert one_clear_line(status, err, "get_indexing") and err.count("\n") == 1 and out == ""
        assert f"takes no arguments, not {' '.join(arguments)!r}" in err
    assert not (tmp_path / "data/work").exists()
