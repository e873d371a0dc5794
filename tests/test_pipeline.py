"""Every script as a process, as a user runs it, in a fresh folder; what else a chain must do, in this process."""

import ast
import contextlib
import gzip
import io
import itertools
import json
import re
import shutil
import time

import get_dataset
from get_indexing import get_indexing
from get_tfrecord import get_tfrecord, record_constants
from infer import infer
from train import train

import pytest
from conftest import HOUSE, _clicks_like_real, _raw, edit, one_line_of_main, run_python

CHAIN = ["get_indexing", "get_tfrecord", "get_dataset", "model_tf2", "train", "infer"]
REAL, FEW = _clicks_like_real(300, seed=41, times=True), _clicks_like_real(161, seed=42)


def run(folder, *scripts):
    """{script: what it printed} of scripts that ran one after another, as processes, and ended well."""
    printed = {}
    for script in scripts:
        done = run_python(folder, f"{script}.py", PYTHONPATH="")
        assert done.returncode == 0 and "Traceback" not in done.stderr, f"{script}.py: {done.stdout}\n{done.stderr}"
        printed[script] = done.stdout
    return printed


def run_here(folder, **epochs):
    """What the scripts of every day print, called in this process on the data of a folder; an eighth is held out."""
    data_dir, work_dir, settings = folder / "data/sample", folder / "data/work", dict(HELD_OUT_USERS=20)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(get_dataset, "MIN_STEPS", 6)
        get_indexing(data_dir, work_dir)
        get_tfrecord(data_dir, work_dir, num_workers=1, **settings)
        train(work_dir, record_constants(**settings), arguments={"emb_dim": 8, "user_blocks": 1}, **epochs)
        infer(data_dir / "click_seq", work_dir, work_dir / "ranking", num_workers=1)
    return printed.getvalue()


def read(folder, name):
    return json.loads((folder / "data/work" / name).read_text(encoding="utf-8"))


def rankings(folder):
    with gzip.open(folder / "data/work/ranking/clicks.json.gz", "rt", encoding="utf-8") as file:
        return list(map(json.loads, file))


def copy_scripts(folder):
    folder.mkdir(exist_ok=True)
    for script in CHAIN:
        shutil.copy(HOUSE / f"{script}.py", folder)
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(a folder in which the six scripts ran one after another, what each printed), on clicks with times."""
    folder = copy_scripts(tmp_path_factory.mktemp("fresh"))
    edit(folder, "train", EPOCHS=1)
    edit(folder, "get_dataset", MIN_STEPS=15)
    edit(folder, "model_tf2", USER_BLOCKS=1)
    titles = {vid: f"Title of {vid}" for vids in REAL["columns"].values() for vid in vids}
    _raw(folder / "data/sample", **REAL, titles=titles, names={cid: f"Column {cid}" for cid in REAL["columns"]})
    return folder, run(folder, *CHAIN)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(a folder in which the chain ran, what it printed) without times, titles and names."""
    folder = tmp_path_factory.mktemp("plain")
    _raw(folder / "data/sample", **FEW)  # 161 users are one more than a quarter would do for
    return folder, run_here(folder, EPOCHS=1)


def test_numbers_and_records_are_those_of_all_videos_columns_users_and_clicks(done):
    folder, printed = done
    videos, columns = (read(folder, f"indexing/{name}.json") for name in ("vid2idx", "cid2vidx"))
    assert sorted(videos.values()) == list(range(2, 62))
    assert columns == {cid: [videos[vid] for vid in vids] for cid, vids in REAL["columns"].items()}
    assert printed["get_indexing"].startswith("60 videos") and printed["get_indexing"].count("\n") == 1
    manifest = read(folder, "tfrecord/manifest.json")
    assert manifest["report"]["clicks"] == sum(len(seq) for _, seq, _ in REAL["users"])
    assert manifest["report"]["lines"] == manifest["splits"]["train"]["users"] == 300
    gaps = [b - a for _, _, times in REAL["users"] for a, b in itertools.pairwise(times)]
    visits, first = 300 + sum(gap >= 1800 for gap in gaps), min(times[0] for _, _, times in REAL["users"])
    days = f"{time.strftime('%Y-%m-%d', time.gmtime(first))} to 2025-12-07"
    assert f"; {visits:,} visits, {days}\n" in printed["get_tfrecord"]


def test_the_dataset_and_the_model_print_what_they_are(done):
    of_dataset, of_model = (done[1][script] for script in ("get_dataset", "model_tf2"))
    assert re.search(r"user_feature +int32 +\[\d+, \d+\]", of_dataset)
    assert "Title of t" in of_dataset and "Column t" in of_dataset and "logits [users, columns]: [4, 50]" in of_model


def test_training_leaves_a_model_its_history_and_its_metrics(done):
    folder, printed = done
    assert (folder / "data/work/model" / read(folder, "model/model.json")["weights"]["file"]).exists()
    assert (folder / "data/work/model/history.csv").read_text().count("\n") == 2
    test = read(folder, "model/metrics.json")["test"]
    assert test["mix"]["NDCG@10"] > test["popularity"]["NDCG@10"]
    assert "test users" in printed["train"] and "popularity" in printed["train"]
    assert "training starts from nothing: no model stands; 1 epochs at most" in printed["train"]
    assert not (folder / "data/work/model/checkpoint.npz").exists()


def test_ranking_gives_each_user_a_line_in_input_order_with_every_column(done):
    lines, printed = rankings(done[0]), done[1]["infer"]
    assert [(line["uid"], line["clicks"]) for line in lines] == [(uid, len(seq)) for uid, seq, _ in REAL["users"]]
    assert all(sorted(line["columns"]) == sorted(REAL["columns"]) for line in lines)
    assert all(line["scores"] == sorted(line["scores"], reverse=True) for line in lines)
    assert f"Column {lines[0]['columns'][0]}" in printed and "300 users ranked" in printed
    now = max(times[-1] for _, _, times in REAL["users"]) + 43_200
    assert f"ranked for {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(now))}, NOW_AFTER" in printed


def test_rankings_put_a_users_own_topic_first(done):
    """Users of clicks_like_real stay in one topic of 3 columns out of 12; a ranking by chance has 1 in 4 right."""
    first = [line["columns"][0][:2] for line in rankings(done[0])]
    topics = [max("0123", key=[click[1] for click in clicks].count) for _, clicks, _ in REAL["users"]]
    assert sum(found == f"t{topic}" for found, topic in zip(first, topics, strict=True)) > 240


def test_without_times_titles_and_names_all_runs_too_and_no_moment_is_said(plain):
    folder, printed = plain
    assert [line["uid"] for line in rankings(folder)] == [uid for uid, _ in FEW["users"]]
    assert "161 users ranked" in printed
    assert not [said for said in ("visits", "within an hour", "ranked for") if said in printed]


def test_a_second_day_with_one_user_fewer_keeps_who_is_held_out_and_trains_warm(plain, tmp_path):
    folder = shutil.copytree(plain[0], tmp_path / "second_day")
    _raw(folder / "data/sample", users=[(uid, [*clicks, "t0a-0_t0a"]) for uid, clicks in FEW["users"][1:]])
    printed = run_here(folder, EPOCHS=1, WARM_EPOCHS=1)
    assert read(folder, "tfrecord/manifest.json")["held_out_share"] == 0.125  # of 160 new ones 1 / 4
    assert "training starts from the weights of the model of" in printed
    assert read(folder, "model/metrics.json")["test"]["standing"]
    assert [line["uid"] for line in rankings(folder)] == [uid for uid, _ in FEW["users"][1:]]
    assert "served: of the former rankings, for what 160 users clicked first since" in printed


def test_nothing_is_written_outside_the_work_folder(done):
    folder, _ = done
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {*(f"{s}.py" for s in CHAIN), "data"}
    assert {path.name for path in (folder / "data").iterdir()} == {"sample", "work"}
    raw = sorted(path.name for path in (folder / "data/sample").iterdir())
    assert raw == ["cid2vids.json", "click_seq", "vid2title.json"]


def contents(folder):
    """{path: (its bytes, when it was written)} of a folder's files that are not hidden."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_constants_that_only_concern_running_redo_nothing(plain, tmp_path, monkeypatch):
    folder = shutil.copytree(plain[0], tmp_path / "again")
    for name in ("get_tfrecord.TASKS_AHEAD", "get_dataset.PARSE_BLOCK", "train.CLUSTER_TIMEOUT", "infer.BATCH_USERS",
                 "infer.GZIP_LEVEL", "infer.RANK_BYTES"):  # fmt: skip
        monkeypatch.setattr(name, 7)
    before = contents(folder / "data/work")
    printed = run_here(folder, EPOCHS=1)
    assert "nothing to train" in printed and "0 users ranked; 0 of 1 rankings" in printed
    after = contents(folder / "data/work")
    for name in ("indexing/vid2idx.json", "indexing/cid2vidx.json", "tfrecord/manifest.json"):
        assert after.pop(name)[0] == before.pop(name)[0]  # its time is that of the comparison
    assert after == before


def test_constants_edited_after_training_do_not_change_the_ranking_of_another_click_folder(done, tmp_path):
    folder = shutil.copytree(done[0], tmp_path / "folder")
    edit(folder, "get_tfrecord", USER_MAX_LEN=20)
    edit(folder, "get_dataset", ITEM_MAX_LEN=2, BATCH_POSITIONS=64, MEMORY_WIDTH=2)
    edit(folder, "model_tf2", EMB_DIM=8, USER_BLOCKS=2, VIDEO_DECAY=0.1, HABIT_DECAY=0.1, TREND_REACHES=(0.5,))
    edit(folder, "train", EPOCHS=1, MEMORY=False, HABIT_POPULARITIES=(0.3,))
    edit(folder, "infer", CLICKS_DIR="others/click_seq", RANKING_DIR="data/others")
    (folder / "data/sample").rename(folder / "others")
    out = run(folder, "infer")["infer"]
    assert "300 users ranked; 1 of 1 rankings in data/others are new" in out
    assert f"user {REAL['users'][0][0]} clicked last:" in out and "Title of" not in out
    former, ranked = ((folder / f"data/{name}/clicks.json.gz").read_bytes() for name in ("work/ranking", "others"))
    assert ranked == former


def test_scripts_out_of_order_name_the_script_to_run_first(tmp_path, monkeypatch):
    bare, numbered = (_raw(tmp_path / name / "data/sample", **REAL).parents[1] for name in ("bare", "numbered"))
    get_indexing(numbered / "data/sample", numbered / "data/work")
    for folder, script, first in [
        (bare, "get_tfrecord", "get_indexing.py"), (numbered, "get_dataset", "get_tfrecord.py"),
        (numbered, "train", "get_tfrecord.py"), (numbered, "infer", "train.py"),
    ]:  # fmt: skip
        line = one_line_of_main(monkeypatch, folder, script)
        assert f"run {first} first" in line and str(folder) in line


def test_help_prints_what_the_script_does_and_any_other_argument_is_refused_in_one_line(tmp_path):
    copy_scripts(tmp_path)
    source = ast.parse((tmp_path / "get_indexing.py").read_text(encoding="utf-8"))
    done = run_python(tmp_path, "get_indexing.py", "--help")
    assert (done.returncode, done.stdout, done.stderr) == (0, ast.get_docstring(source, clean=False) + "\n", "")
    for arguments in (["--data-dir", "x"], ["-h"], ["--help", "x"], [""]):
        done = run_python(tmp_path, "get_indexing.py", *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr.startswith(f"get_indexing.py: takes no arguments, not {' '.join(arguments)!r}")
    assert not (tmp_path / "data/work").exists()
