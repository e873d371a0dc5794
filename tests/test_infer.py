"""Ranking: what each user's line holds, that serving is what was evaluated, and what a second run does again."""

import csv
import functools
import gzip
import json
import os
import shutil
from collections import Counter

import numpy as np
import pytest
from conftest import _clicks_like_real, _raw, _write_lines

import get_dataset
import get_tfrecord as get_tfrecord_module
import infer as infer_module
import model_tf2
import train as train_module
from get_dataset import column_table, dataset_from_clicks, load_manifest
from get_indexing import InputError, cut_files, get_indexing, load_index
from get_tfrecord import ClickEncoder, get_tfrecord
from infer import Ranker, infer
from model_tf2 import Memory, Scorer, count_windows
from train import MEMORY_DECAYS, load_model, train

REAL = _clicks_like_real(150, seed=31)
HEARD = ["t0a-1_t0a", "t0b-2"]  # clicks of a user whom the model knows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with raw/ and a trained work/ of 150 users with structured clicks; nothing is ranked there."""
    folder = tmp_path_factory.mktemp("trained")
    raw = _raw(folder / "raw", **REAL)
    get_indexing(raw, folder / "work")
    get_tfrecord(raw, folder / "work", num_workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_dataset, "MIN_STEPS", 6)
        train(folder / "work", epochs=1, emb_dim=8)
    return folder


@pytest.fixture
def own(trained, tmp_path):
    """A copy of that folder, for a test that changes it."""
    return shutil.copytree(trained, tmp_path / "own")


@pytest.fixture
def ranked(trained, tmp_path):
    """A function ([(uid, clicks), ...]) -> the lines of their ranking, made in a folder of its own."""

    def rank(users, **how):
        clicks = _raw(tmp_path / "asked", users=users) / "click_seq"
        shutil.rmtree(tmp_path / "ranking", ignore_errors=True)
        return lines_of(infer(clicks, trained / "work", tmp_path / "ranking", num_workers=1, **how)[0])

    return rank


def lines_of(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def table_of(lines):
    """Scores by column of each line."""
    return [dict(zip(line["columns"], line["scores"], strict=True)) for line in lines]


def popular_order(columns=REAL["columns"]):
    """The columns by clicks of all users, of equal ones the first first."""
    clicked = Counter(click.split("_")[1] for _, clicks in REAL["users"] for click in clicks if "_" in click)
    return sorted(columns, key=lambda cid: (-clicked[cid], list(columns).index(cid)))


def rank_own(own, asked=None, **how):
    """infer() of a folder made by own(), in this process."""
    return infer(asked or own / "asked/click_seq", own / "work", own / "ranking", num_workers=1, **how)


def filled(own, columns):
    """Make the index of a folder anew with these columns."""
    get_indexing(_raw(own / "raw", columns=columns), own / "work")


# ---------------------------------------------------------------- the lines


def test_each_user_has_a_line_in_input_order_with_every_column_once(ranked):
    users = [*REAL["users"], ("long", HEARD * 400), ("none", []), ("unheard", ["x", "y_z"])]
    lines = ranked(users)
    assert [line["uid"] for line in lines] == [uid for uid, _ in users]
    assert all(list(line) == ["uid", "columns", "scores", "source"] for line in lines)
    assert all(sorted(line["columns"]) == sorted(REAL["columns"]) for line in lines)


def test_scores_are_finite_never_rise_and_equal_ones_go_by_the_order_of_the_columns(ranked):
    order = list(REAL["columns"])
    for line in ranked([*REAL["users"], ("none", [])]):
        assert np.isfinite(line["scores"]).all()
        pairs = [(-score, order.index(cid)) for cid, score in zip(line["columns"], line["scores"], strict=True)]
        assert pairs == sorted(pairs)


def test_scores_are_log_probabilities(ranked):
    for line in ranked([*REAL["users"][:20], ("none", [])]):
        assert np.exp(line["scores"]).sum() == pytest.approx(1, abs=1e-3)


def test_equal_scores_go_by_the_order_of_the_columns(own):
    """Columns that hold the same videos and that nobody clicked are equal in popularity."""
    columns = {"z9": ["t0a-1"], "late": ["t0a-1"], "a0": ["t0a-1"]}
    get_indexing(_raw(own / "raw", columns=REAL["columns"] | columns), own / "work")
    line = lines_of(infer(_raw(own / "asked", users=[("none", [])]) / "click_seq", own / "work")[0])[0]
    assert line["columns"][-3:] == ["z9", "late", "a0"] and len(set(line["scores"][-3:])) == 1


def test_a_user_without_a_known_click_gets_the_popularity_order(ranked):
    lines = ranked([("none", []), ("u", HEARD), ("unheard", ["x", "what_ever", "t0a"]), ("odd", ["", "_", "_t9"])])
    assert [line["source"] for line in lines] == ["popular", "model", "popular", "popular"]
    for line in (lines[0], lines[2], lines[3]):
        assert line["columns"] == popular_order()
        assert line["scores"] == lines[0]["scores"]


def test_an_unknown_video_clicked_in_a_known_column_is_a_known_click(ranked):
    assert ranked([("u", ["unheard_t0a"])])[0]["source"] == "model"


def test_users_that_come_twice_get_a_line_each(ranked):
    lines = ranked([("same", HEARD), ("other", []), ("same", HEARD), ("same", ["t3a-1_t3a"])])
    assert [line["uid"] for line in lines] == ["same", "other", "same", "same"]
    assert lines[0] == lines[2] and lines[0]["columns"] != lines[3]["columns"]


def test_top_k_keeps_the_first_columns(ranked):
    users = [*REAL["users"][:9], ("none", [])]
    whole, first = ranked(users), ranked(users, top_k=3)
    assert [line["columns"] for line in first] == [line["columns"][:3] for line in whole]
    assert [line["scores"] for line in first] == [line["scores"][:3] for line in whole]
    assert ranked(users, top_k=1000) == whole


def test_users_ids_and_columns_are_written_as_they_are(ranked):
    assert ranked([('Zoë \u2028 "q" \\ 日本', HEARD)])[0]["uid"] == 'Zoë \u2028 "q" \\ 日本'


def test_different_users_get_different_rankings(ranked):
    lines = ranked([("a", ["t0a-1_t0a", "t0b-1_t0b"]), ("b", ["t3a-1_t3a", "t3b-1_t3b"])])
    assert lines[0]["columns"] != lines[1]["columns"]


# ---------------------------------------------------------------- columns that changed since training


def test_a_new_column_and_a_shelf_filled_anew_are_ranked_without_training_again(own):
    asked = _raw(own / "asked", users=[("u", HEARD), ("none", [])]) / "click_seq"
    before = lines_of(infer(asked, own / "work")[0])
    columns = REAL["columns"] | {"fresh": ["t0a-0", "t0a-1", "just made"], "t3a": ["t0b-0", "t0b-1"]}
    get_indexing(_raw(own / "raw", columns=columns), own / "work")
    after = lines_of(infer(asked, own / "work")[0])
    assert all(sorted(line["columns"]) == sorted(columns) for line in after)
    assert all(np.isfinite(line["scores"]).all() for line in after)
    assert after[1]["columns"] == popular_order(columns) and after[1]["columns"][-1] == "fresh"
    assert table_of(before)[0]["t3a"] != table_of(after)[0]["t3a"]


def test_a_retired_column_is_not_ranked(own):
    left = {cid: vids for cid, vids in REAL["columns"].items() if cid not in ("t0a", "t1b", "t3c")}
    get_indexing(_raw(own / "raw", columns=left), own / "work")
    lines = lines_of(infer(_raw(own / "asked", users=[("u", HEARD), ("none", [])]) / "click_seq", own / "work")[0])
    assert all(sorted(line["columns"]) == sorted(left) for line in lines)
    assert all(np.isfinite(line["scores"]).all() for line in lines)
    assert lines[1]["columns"] == popular_order(left)


def test_where_every_column_is_empty_it_says_so(own):
    path = own / "work/indexing/cid2vidx.json"
    path.write_text(json.dumps({cid: [] for cid in json.loads(path.read_text())}))
    with pytest.raises(InputError, match="no column"):
        infer(_raw(own / "asked", users=[("a", HEARD)]) / "click_seq", own / "work")


def test_a_retired_column_leaves_the_order_of_the_others(own):
    asked = _raw(own / "asked", users=REAL["users"][:30]) / "click_seq"
    before = lines_of(infer(asked, own / "work")[0])
    left = {cid: vids for cid, vids in REAL["columns"].items() if cid != "t1b"}
    get_indexing(_raw(own / "raw", columns=left), own / "work")
    after = lines_of(infer(asked, own / "work")[0])
    memory_weight = load_model(own / "work")[2].memory_weight
    for a, b in zip(before, after, strict=True):
        if memory_weight in (0, 1):
            assert [cid for cid in a["columns"] if cid != "t1b"] == b["columns"]
        assert set(a["columns"]) - set(b["columns"]) == {"t1b"}


# ---------------------------------------------------------------- serving agrees with training


def test_serving_gives_the_towers_logits_of_the_training_side(trained):
    index, ranker = load_index(trained / "work"), Ranker(trained / "work")
    users = [(uid, clicks) for uid, clicks in REAL["users"] if len(clicks) > 1][:25]
    constants = load_manifest(trained / "work")[0]["constants"]
    videos = column_table(index, ranker.memory.video_clicks)
    columns = ranker.model.column_vectors(videos[1:], np.arange(1, len(videos)))
    expected = []
    for window in dataset_from_clicks(users, index, constants).batch(1).as_numpy_iterator():
        vectors = ranker.model.user_vectors(window["user_feature"], window["user_column"])
        expected.append(ranker.model.logits(vectors[0, -1], columns))
    served = []
    for _, clicks in users:
        pair = [np.array([numbers], np.int32) for numbers in ranker.encoder.encode(clicks)]
        padded = [np.pad(numbers, [(0, 0), (0, 7)]) for numbers in pair]
        served.append(ranker.logits(*padded, np.array([len(clicks) - 1])).numpy()[0])
    assert np.allclose(served, expected, atol=1e-4)


def test_serving_gives_the_scores_that_evaluation_measured(trained):
    """For each test user's last target: the clicks before it are served, and the same clicks were evaluated."""
    work_dir, users = trained / "work", dict(REAL["users"])
    (manifest, index), ranker = load_manifest(work_dir), Ranker(work_dir)
    chosen, compared = ranker.chosen, 0
    score = target_scorer(ranker.model, column_table(index, ranker.memory.video_clicks))
    for batch in make_dataset(manifest, "test", work_dir):
        logits, videos, columns, _ = (np.concatenate(blocks) for blocks in zip(*score([batch]), strict=True))
        remembered = ranker.memory.scores(videos, columns, chosen.own_weight)
        measured = mix(logits, remembered, chosen.memory_weight, chosen.temperature)
        rows, places = np.nonzero(batch["label"].numpy())
        histories = [
            ranker.encoder.encode(users[batch["uid"][row].numpy().decode()][: place + 1])
            for row, place in zip(rows, places, strict=True)
        ]
        assert np.allclose(ranker.scores(histories), measured, atol=1e-4)
        compared += len(rows)
    assert compared == manifest["splits"]["test"]["targets"] > 100


def test_a_long_history_is_ranked_by_its_last_clicks(trained):
    ranker, rng = Ranker(trained / "work"), np.random.default_rng(32)
    videos, columns = rng.integers(2, 62, 200), rng.integers(0, 13, 200)
    whole = ranker.scores([(videos, columns)])
    assert np.allclose(whole, ranker.scores([(videos[-50:], columns[-50:])]), atol=1e-6)
    assert not np.allclose(whole, ranker.scores([(videos[:50], columns[:50])]), atol=1e-3)


def assert_equal_rankings(some, others):
    """Equal but for the last decimal of a score, where sums that were padded otherwise may round the other way."""
    assert [line["uid"] for line in some] == [line["uid"] for line in others]
    for a, b in zip(table_of(some), table_of(others), strict=True):
        assert a == pytest.approx(b, abs=1.01e-4)


@pytest.mark.parametrize("batch_users", [1, 7])
def test_a_ranking_does_not_depend_on_the_batch(ranked, monkeypatch, batch_users):
    users = [*REAL["users"][:20], ("none", []), ("long", HEARD * 60)]
    whole = ranked(users)
    monkeypatch.setattr(infer_module, "BATCH_USERS", batch_users)
    assert_equal_rankings(ranked(users), whole)


def test_two_workers_and_files_cut_into_ranges_give_the_same_bytes(own, monkeypatch):
    asked = _raw(own / "asked", users=REAL["users"][:80], click_file="one") / "click_seq"
    _raw(own / "asked", users=REAL["users"][80:], click_file="two", gzip=True)
    whole = [lines_of(path) for path in infer(asked, own / "work", num_workers=1)]
    monkeypatch.setattr(infer_module, "file_ranges", functools.partial(file_ranges, range_bytes=5000))
    contents = []
    for workers in (1, 2):
        shutil.rmtree(own / "work/ranking")
        contents.append([path.read_bytes() for path in infer(asked, own / "work", num_workers=workers)])
    assert contents[0] == contents[1]
    cut = [[json.loads(line) for line in gzip.decompress(content).splitlines()] for content in contents[0]]
    assert len(cut) == 2
    for a, b in zip(cut, whole, strict=True):
        assert_equal_rankings(a, b)


# ---------------------------------------------------------------- files


def test_each_input_file_has_its_output_and_nothing_else_is_left(own):
    asked = _raw(own / "asked", users=[("a", HEARD)], click_file="part-1") / "click_seq"
    _raw(own / "asked", users=[("b", HEARD)], click_file="part-0", gzip=True)
    paths = infer(asked, own / "work", num_workers=1)
    assert [path.name for path in paths] == ["part-0.json.gz", "part-1.json.gz"]
    assert [lines_of(path)[0]["uid"] for path in paths] == ["b", "a"]
    left = {path.name for path in (own / "work/ranking").iterdir()}
    assert left == {"part-0.json.gz", "part-1.json.gz", "manifest.json"}


def test_an_empty_click_file_gives_an_empty_ranking(ranked):
    assert ranked([]) == []


def stamp(path):
    return path.stat().st_mtime_ns, path.stat().st_ino


def test_the_ranking_of_a_click_file_that_is_gone_is_kept_and_named(own, capsys):
    asked = _raw(own / "asked", users=[("a", HEARD)], click_file="one") / "click_seq"
    _raw(own / "asked", users=[("b", HEARD)], click_file="two")
    _, two = infer(asked, own / "work", num_workers=1)
    (asked / "two.json").unlink()
    capsys.readouterr()
    infer(asked, own / "work", num_workers=1)
    assert two.exists() and f"{two}: no click file of this name any more" in capsys.readouterr().err


def test_a_finished_file_is_not_computed_again(own):
    asked = _raw(own / "asked", users=[("a", HEARD)], click_file="one") / "click_seq"
    _raw(own / "asked", users=[("b", HEARD)], click_file="two")
    before = [stamp(path) for path in infer(asked, own / "work", num_workers=1)]
    assert [stamp(path) for path in infer(asked, own / "work", num_workers=1)] == before
    _raw(own / "asked", users=[("b", HEARD), ("c", [])], click_file="two")
    one, two = infer(asked, own / "work", num_workers=1)
    assert stamp(one) == before[0] and stamp(two) != before[1]
    assert [line["uid"] for line in lines_of(two)] == ["b", "c"]
    one.unlink()
    before = stamp(two)
    assert infer(asked, own / "work", num_workers=1)[0].exists() and stamp(two) == before


def change_index(own):
    get_indexing(_raw(own / "raw", columns=REAL["columns"] | {"t0a": ["t1a-0"]}), own / "work")


def change_model(own):
    path = own / "work/model/model.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"mix": saved["mix"] | {"memory_weight": 0.35}}))


@pytest.mark.parametrize("change", [change_index, change_model])
def test_a_file_is_computed_again_when_model_or_index_changed(own, change):
    asked = _raw(own / "asked", users=[("a", HEARD)]) / "click_seq"
    path = infer(asked, own / "work")[0]
    before, lines = stamp(path), lines_of(path)
    change(own)
    infer(asked, own / "work")
    assert stamp(path) != before and lines_of(path) != lines


def test_a_file_is_computed_again_when_top_k_changed(own):
    asked = _raw(own / "asked", users=[("a", HEARD)]) / "click_seq"
    assert len(lines_of(infer(asked, own / "work")[0])[0]["columns"]) == 12
    assert len(lines_of(infer(asked, own / "work", top_k=2)[0])[0]["columns"]) == 2
    assert len(lines_of(infer(asked, own / "work")[0])[0]["columns"]) == 12


def test_bad_lines_are_skipped_and_every_good_one_is_ranked(own, capsys):
    lines = [{"uid": f"u{n}", "click_seq": HEARD} for n in range(200)]
    lines[50:50] = ["{not JSON"]
    lines[100:100] = [""]
    _write_lines(own / "asked/click_seq/clicks.json", lines)
    ranked = lines_of(infer(own / "asked/click_seq", own / "work")[0])
    assert [line["uid"] for line in ranked] == [f"u{n}" for n in range(200)]
    printed = capsys.readouterr()
    assert "1 of 202 lines are bad (line 51: not JSON)" in printed.err
    assert "200 users ranked" in printed.out


def test_too_many_bad_lines_stop_and_leave_the_former_output(own):
    asked = _raw(own / "asked", users=[("a", HEARD)]) / "click_seq"
    path = infer(asked, own / "work")[0]
    before, content = stamp(path), path.read_bytes()
    _write_lines(asked / "clicks.json", [{"uid": "b", "click_seq": HEARD}, "{not JSON"])
    with pytest.raises(InputError, match=r"clicks\.json: 1 of 2 lines are bad \(line 2: not JSON\), more than"):
        infer(asked, own / "work")
    assert stamp(path) == before and path.read_bytes() == content


def test_a_run_with_nothing_left_to_rank_says_so_and_returns_the_paths(own, capsys):
    asked = _raw(own / "asked", users=[("a", HEARD)]) / "click_seq"
    paths = infer(asked, own / "work")
    assert infer(asked, own / "work") == paths
    assert "0 users ranked in 0 files, 1 files stand" in capsys.readouterr().out


def test_a_truncated_gzip_file_stops_and_leaves_no_output(own):
    asked = _raw(own / "asked", users=REAL["users"], gzip=True) / "click_seq"
    packed = (asked / "clicks.json.gz").read_bytes()
    (asked / "clicks.json.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match="not a whole gzip file"):
        infer(asked, own / "work")
    assert [path for path in (own / "work/ranking").iterdir() if not path.name.startswith(".")] == []


def test_what_a_killed_run_left_is_removed(own):
    asked = _raw(own / "asked", users=[("a", HEARD)]) / "click_seq"
    (own / "work/ranking").mkdir()
    (own / "work/ranking/.clicks.json.gz.0.tmp").write_bytes(b"half")
    infer(asked, own / "work")
    assert not list((own / "work/ranking").glob(".*"))


def test_a_missing_clicks_folder_is_named(own):
    with pytest.raises(InputError, match=r"/nowhere: no such folder"):
        infer(own / "nowhere", own / "work")


def test_a_missing_model_names_the_script_to_run_first(own):
    shutil.rmtree(own / "work/model")
    with pytest.raises(FileNotFoundError, match=r"model\.json: no such file; run train\.py first"):
        infer(own / "raw/click_seq", own / "work")
