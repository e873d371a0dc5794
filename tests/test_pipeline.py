"""Every script as a process, as a user runs it, in a fresh folder."""

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
from conftest import _clicks_like_real, _raw

ROOT = Path(__file__).parents[1]
CHAIN = ["get_indexing", "get_tfrecord", "get_dataset", "model_tf2", "train", "infer"]
REAL = _clicks_like_real(300, seed=41)


def start(script, folder):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, f"{script}.py"], cwd=folder, env=environment, text=True,
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
    source = (folder / "train.py").read_text(encoding="utf-8")
    edited, edits = re.subn(r"^EPOCHS = \d+", "EPOCHS = 2", source, flags=re.MULTILINE)
    assert edits == 1
    (folder / "train.py").write_text(edited, encoding="utf-8")
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
    assert sum(split["users"] for split in manifest["splits"].values()) == 300
    assert all((folder / "data/work/tfrecord" / name).exists() for name in manifest["shards"])
    assert f"{len(clicks):,} clicks" in printed["get_tfrecord"]


def test_the_dataset_and_the_model_print_what_they_are(done):
    _, printed = done
    assert re.search(r"user_feature +int32 +\[\d+, \d+\]", printed["get_dataset"])
    assert "Title of t" in printed["get_dataset"] and "Column t" in printed["get_dataset"]
    assert "logits [users, clicks, columns]: [4, 50, 50]" in printed["model_tf2"]


def test_training_leaves_a_model_its_history_and_its_metrics(done):
    folder, printed = done
    saved = json.loads((folder / "data/work/model/model.json").read_text())
    assert (folder / "data/work/model" / saved["weights"]["file"]).exists()
    with open(folder / "data/work/model/history.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    test = json.loads((folder / "data/work/model/metrics.json").read_text())["test"]
    assert test["mix"]["NDCG@10"] > test["popularity"]["NDCG@10"]
    assert "test split" in printed["train"] and "popularity" in printed["train"]


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


def one_clear_line(status, err, script):
    """Whether a script ended with one line of its own and no traceback; tensorflow may have said something before."""
    last = err.strip().splitlines()[-1]
    return status not in (0, None) and "Traceback" not in err and last.startswith(f"{script}.py: ")


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
