"""Training, its evaluation beside the baselines, what is kept of it, and what happens to the model that stands."""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import types
import typing
from collections import Counter

import get_dataset
import get_indexing as toolbox
import model_tf2
import train as train_module
from get_dataset import cluster_worker, count_windows, held_out, load_manifest, tensorflow_errors_named
from get_indexing import FIRST_VIDEO, InputError, get_indexing, load_index
from get_tfrecord import get_tfrecord, record_constants
from model_tf2 import Memory, Mix, Scorer, Users, build_model
from train import (
    CLICKED_FACTORS, HABIT_POPULARITIES, MIX_WEIGHTS,
    all_rankings, grow, load_model, make_table, metrics_of, rank_of, train,
)  # fmt: skip

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from conftest import _clicks_like_real, _raw, draw, edit_json, flip_a_bit, one_line_of_main

USERS, HELD_OUT, SHARE = 150, 20, 1 / 4  # a half of them would be more than twice HELD_OUT
SETTINGS = record_constants(HELD_OUT_USERS=HELD_OUT)
TINY = dict(record_constants=SETTINGS, arguments={"emb_dim": 8, "user_blocks": 1}, EPOCHS=2, WARM_EPOCHS=1)
BASELINES = ["random", "popularity", "own columns", "chain"]
PARTS = ["towers", "memory", "habit", "mix"]


def split_of(uid):
    return "val" if draw(uid) < SHARE else "test" if draw(uid) >= 1 - SHARE else "train"


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_dataset, "MIN_STEPS", 6)  # as a user would edit it: small data in few steps
        yield


def make_records(raw, work_dir):
    get_indexing(raw, work_dir)
    get_tfrecord(raw, work_dir, num_workers=1, HELD_OUT_USERS=HELD_OUT)
    return work_dir


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A work folder with the index and the records of 150 users with structured clicks; nothing is trained there."""
    folder = tmp_path_factory.mktemp("records")
    return make_records(_raw(folder / "raw", **_clicks_like_real(USERS, seed=21)), folder / "work")


@pytest.fixture(scope="module")
def users(records):
    """The same users' clicks as {uid: [(video number, column number), ...]}, taken apart without the scripts."""
    index, taken = load_index(records), {}
    numbers = {cid: number for number, cid in enumerate(index.columns, start=1)}
    for uid, clicks in _clicks_like_real(USERS, seed=21)["users"]:
        parts = [(click.split("_") + [None])[:2] for click in clicks]
        taken[uid] = [(index.videos[vid], numbers.get(cid, 0)) for vid, cid in parts]
    return taken


def target_place(history):
    """The place of the last click in a column that has a history; every column is current."""
    return max(at for at, (_, column) in enumerate(history) if at and column)


def train_and_listen(*arguments, **options):
    """Return (what train() returned, what it printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        returned = train(*arguments, **options)
    return returned, printed.getvalue()


@pytest.fixture(scope="module")
def trained(records, tmp_path_factory):
    """(work folder after two epochs of train(), what it returned, what it printed)."""
    work_dir = shutil.copytree(records, tmp_path_factory.mktemp("trained") / "work")
    return work_dir, *train_and_listen(work_dir, **TINY)


@pytest.fixture(scope="module")
def second_day(trained, tmp_path_factory):
    """The trained folder on the next day: two clicks more a user, a new video on a shelf, and a new column."""
    folder, rng = tmp_path_factory.mktemp("second"), np.random.default_rng(29)
    first = _clicks_like_real(USERS, seed=21)
    columns = first["columns"] | {"t0a": [*first["columns"]["t0a"], "fresh"], "late": ["t1a-0", "t2a-0"]}
    users = []
    for uid, clicks in first["users"]:
        cids = rng.choice([*columns, "late"], 2)
        users.append((uid, [*clicks, *(f"{rng.choice(columns[cid])}_{cid}" for cid in cids)]))
    work_dir = shutil.copytree(trained[0], folder / "work")
    return make_records(_raw(folder / "raw", columns=columns, users=users), work_dir)


@pytest.fixture(scope="module")
def warm(second_day, tmp_path_factory):
    """(work folder after a warm run on the second day, what it returned, what it printed)."""
    work_dir = shutil.copytree(second_day, tmp_path_factory.mktemp("warm") / "work")
    return work_dir, *train_and_listen(work_dir, **TINY)


@pytest.fixture
def fresh(records, tmp_path):
    """A copy of the folder with the records, not trained."""
    return shutil.copytree(records, tmp_path / "work")


@pytest.fixture
def own(trained, tmp_path):
    """A copy of the trained work folder, for a test that changes it."""
    return shutil.copytree(trained[0], tmp_path / "work")


@pytest.fixture
def today(second_day, tmp_path):
    """A copy of the folder of the second day, in which the first day's model stands."""
    return shutil.copytree(second_day, tmp_path / "work")


def saved_in(work_dir):
    return json.loads((work_dir / "model/model.json").read_text(encoding="utf-8"))


def towers_of(work_dir):
    """The weights that load_model gives."""
    return load_model(work_dir).model.get_weights()


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def history_of(work_dir):
    """The rows of history.csv, but for the seconds."""
    return [row | {"seconds": None} for row in read_csv(work_dir / "model/history.csv")]


def ranks_in(work_dir):
    """{uid: {row of the table: rank}} of test.csv."""
    rows = read_csv(work_dir / "model/test.csv")
    return {row["uid"]: {name: int(row[name]) for name in list(row)[4:]} for row in rows}


def published(work_dir):
    """The bytes of all that ranks or that one reads of the model that stands."""
    names = {"model.json", "metrics.json", "test.csv"}
    paths = [path for path in (work_dir / "model").glob("*.*") if path.name in names or path.suffix in (".h5", ".npz")]
    return {path.name: path.read_bytes() for path in paths if path.name != "checkpoint.npz"}


def kinds_of(files):
    """What kinds of files there are, by the ends of their names."""
    return sorted(name.partition(".")[2] if re.match("[0-9a-f]{16}", name) else name for name in files)


# ---------------------------------------------------------------- ranks, metrics and the table


def brute_rank(scores, place):
    """Rank of a place in a sorted list, where equal scores go by place."""
    order = sorted(range(len(scores)), key=lambda column: (-scores[column], column))
    return 1 + order.index(place)


def gain(rank):
    return (rank <= 10) / np.log2(rank + 1)


def mean_gain(scores, places):
    """NDCG@10 of scores [n, columns] whose targets are at the places."""
    return np.mean([gain(brute_rank(of_user, place)) for of_user, place in zip(scores, places, strict=True)])


def test_ranks_are_places_in_the_sorted_list_of_equal_scores_the_first_column_first_and_metrics_those_of_the_field():
    rng = np.random.default_rng(22)
    scores, places = rng.integers(0, 4, [200, 9]).astype(float), rng.integers(0, 9, 200)
    assert rank_of(scores, places).tolist() == [brute_rank(s, p) for s, p in zip(scores, places, strict=True)]
    assert rank_of(np.zeros([3, 5]), np.array([0, 2, 4])).tolist() == [1, 3, 5]
    metrics = {name: of.mean() for name, of in metrics_of(np.array([1, 2, 10, 11, 20]), num_columns=21).items()}
    assert metrics["HR@10"] == pytest.approx(3 / 5)
    assert metrics["NDCG@10"] == pytest.approx((1 + 1 / np.log2(3) + 1 / np.log2(11)) / 5)
    assert metrics["MRR"] == pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 11 + 1 / 20) / 5)
    # AUC of one positive: the share of the 20 others that are ranked below it
    assert metrics["GAUC"] == pytest.approx((20 + 19 + 11 + 10 + 1) / 20 / 5)


def make_users(histories, clicked_before, gaps=()):
    """Held-out users of two clicks; gaps are the seconds from the last one to the visit, None where it is not known."""
    number = len(histories)
    last = [0 if gap is None else 1_000_000 - gap for gap in gaps or [None] * number]
    return {"history": np.array(histories), "target_column": np.full(number, 3),
            "now": 1_000_000 * np.sign(last), "user_time": np.pad(np.array(last)[:, None], [(0, 0), (1, 0)]),
            "user_column": np.where(clicked_before, 3, 4)[:, None] * [1, 0]}  # fmt: skip


def test_intervals_are_1_96_standard_errors_to_both_sides_of_the_mean():
    same_for_all = make_table({"row": np.array([2] * 9)}, make_users(range(9), [0] * 9), 100)["test"]["row"]
    assert [same_for_all[name] for name in ("low", "NDCG@10", "high")] == pytest.approx([1 / np.log2(3)] * 3)
    half = make_table({"row": np.array([1, 99] * 50)}, make_users(range(100), [0] * 100), 100)["test"]["row"]
    assert [half[name] for name in ("low", "NDCG@10", "high")] == pytest.approx([0.5 - 0.098, 0.5, 0.5 + 0.098])


def test_notes_say_what_is_better_and_what_is_within_the_noise():
    final = np.arange(40) % 4 + 2
    rows = {"worse": final + 1, "equal": final, "better": final - 1, "mix": final}
    notes = make_table(rows, make_users(range(40), [0] * 40), 50)["notes"]
    assert len(notes) == 2
    assert notes[0] == "'equal' is within the noise of 'mix' in NDCG@10: +0.0000, 95 % +0.0000 to +0.0000"
    ahead = np.array([1 / np.log2(rank) - 1 / np.log2(rank + 1) for rank in final])  # of each user: a paired difference
    error = 1.96 * ahead.std() / 40**0.5
    between = f"{ahead.mean():+.4f}, 95 % {ahead.mean() - error:+.4f} to {ahead.mean() + error:+.4f}"
    assert notes[1] == f"'better' is better than 'mix' in NDCG@10: {between}"


def test_slices_are_the_means_of_their_users_and_an_empty_slice_has_none():
    ranks = np.array([1, 2, 3, 30])
    slices = make_table({"row": ranks}, make_users([5, 1, 9, 7], [1, 0, 0, 0]), 50)["slices"]
    expected = {"up to 6 clicks": [1, 2], "more than 6": [3, 30], "clicked before": [1], "never clicked": [2, 3, 30]}
    gaps = [3600, 3601, None, 604_801]
    by_gap = make_table({"row": ranks}, make_users([5, 1, 9, 7], [1, 0, 0, 0], gaps), 50)["slices"]
    of_gaps = {"within an hour": [1], "within a day": [2], "within a week": [], "later": [30]}
    for found, of_slices in ((slices, expected), (by_gap, expected | of_gaps)):
        assert list(found) == list(of_slices)
        for name, of_slice in of_slices.items():
            mean = pytest.approx(np.mean([gain(rank) for rank in of_slice])) if of_slice else None
            assert found[name] == {"users": len(of_slice), "row": mean}


def test_the_printed_table_shows_intervals_slices_and_notes(trained):
    printed, metrics = trained[2], json.loads((trained[0] / "model/metrics.json").read_text())
    for row, of in metrics["test"].items():
        assert re.search(rf"^{row} +.*{of['NDCG@10']:.4f} +{of['low']:.4f} to {of['high']:.4f}", printed, re.MULTILINE)
    assert all(name in printed for name in metrics["slices"])
    assert re.findall(r"^Note: (.*)\.$", printed, re.MULTILINE) == metrics["notes"]


@pytest.mark.parametrize(("kind", "number", "place"), [("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2)])
def test_the_chief_comes_before_the_workers(monkeypatch, kind, number, place):
    cluster = {"worker": ["a:1", "b:1"], "chief": ["c:1"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": kind, "index": number}}))
    assert cluster_worker() == (place, 3)


@pytest.mark.parametrize("config", ["{", '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}'])
def test_a_wrong_cluster_is_one_line(monkeypatch, tmp_path, config):
    monkeypatch.setenv("TF_CONFIG", config)
    assert one_line_of_main(monkeypatch, tmp_path, "train").startswith("TF_CONFIG names no chief or worker")


def test_what_a_lost_worker_raises_is_one_line_in_a_cluster_alone(monkeypatch):
    with pytest.raises(tf.errors.UnavailableError), tensorflow_errors_named():
        raise tf.errors.UnavailableError(None, None, "gone")
    config = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(InputError, match="worker 1 of 2 lost another one"), tensorflow_errors_named():
        raise tf.errors.UnavailableError(None, None, "gone")


# ---------------------------------------------------------------- evaluation


def training_scorer(work_dir, model=None):
    """(Scorer of the model, or of towers that learned nothing, with the training clicks' memory; Counts; manifest; index)."""
    manifest, index = load_manifest(work_dir, SETTINGS)
    counts = count_windows(manifest, ["train"], work_dir, num_workers=1)
    model = model or build_model(num_videos=len(index.videos), num_columns=len(index.columns), emb_dim=8)
    return Scorer(model, Memory(counts, index), index), counts, manifest, index


def as_users(held, at=slice(None)):
    """Users of held-out ones."""
    return Users(*(held[name][at] for name in ("user_feature", "user_column", "user_time", "now", "now")))


def test_the_baselines_are_counted_on_the_training_clicks(records, users):
    scorer, counts, manifest, index = training_scorer(records)
    clicked, follows = np.zeros(13), np.zeros([13, 13])
    for uid, clicks in users.items():
        known = clicks if split_of(uid) == "train" else clicks[: target_place(clicks)]
        in_columns = [column for _, column in known if column]
        np.add.at(clicked, in_columns, 1)
        np.add.at(follows, (in_columns[:-1], in_columns[1:]), 1)
    popularity = clicked[1:] / clicked.sum()
    held = held_out(manifest, "test", records)
    ranked = dict(all_rankings(scorer, counts, Mix(0.0, 0.0, 1.0, 0.1), False, None, index)(as_users(held)))
    assert list(ranked) == [*BASELINES, "towers"]
    assert np.allclose(ranked["popularity"], popularity, rtol=1e-5)
    for row, history in enumerate(held["user_column"].tolist()):
        own, chain = 1e-6 * popularity, 1e-6 * popularity
        for turn, column in enumerate(column for column in reversed(history) if column):
            own[column - 1] += 0.8**turn
            chain += 0.8**turn * follows[column, 1:] / follows[column].sum()
        assert np.allclose(ranked["own columns"][row], own, atol=1e-12)
        assert np.allclose(ranked["chain"][row], chain, atol=1e-12)


PAIRS = [pair for pair in itertools.product(MIX_WEIGHTS, repeat=2) if sum(pair) < 1]
ALL_MIXES = [
    Mix(*pair, factor, share) for share, pair, factor in itertools.product(HABIT_POPULARITIES, PAIRS, CLICKED_FACTORS)
]


def test_the_chosen_mix_is_the_best_on_validation_with_those_a_step_of_a_weight_away_of_those_with_its_factor(trained):
    """By the ranks of each mix as it would be served, with the training clicks' memory. A step is .2."""
    model, _, chosen, saved = load_model(trained[0])
    scorer, _, manifest, _ = training_scorer(trained[0], model)
    users, gains = held_out(manifest, "val", trained[0]), {}
    for mix in ALL_MIXES:
        gains[mix] = mean_gain(scorer.probabilities(as_users(users), mix), users["target_column"] - 1)

    def near(mix):
        pairs = [(m, h) for m, h in PAIRS if abs(m - mix.memory_weight) + abs(h - mix.habit_weight) < 0.3]
        return [gains[mix._replace(memory_weight=m, habit_weight=h)] for m, h in pairs]

    smooth = {mix: np.mean(near(mix)) for mix in gains}
    alike = [smooth[mix] for mix in gains if mix.clicked_factor == chosen.clicked_factor]
    assert max(alike) > min(alike) + 0.02
    assert smooth[chosen] == pytest.approx(max(alike), abs=2e-3)  # of columns as good as equal, ranks may be others
    assert saved["validation"]["mix"]["NDCG@10"] == pytest.approx(gains[chosen], abs=2e-3)


@pytest.mark.parametrize(("first", "last", "taken"), [(0, 0, False), (18, 20, False), (20, 18, True)])
def test_a_factor_for_clicked_columns_is_taken_where_the_towers_alone_are_better(monkeypatch, first, last, taken):
    """It ranks some users' target first and others' 11th, where all else ranks it third, and the best mix one user's second."""
    ranks, best, columns = {mix: np.full(400, 3) for mix in ALL_MIXES}, Mix(0.0, 0.8, 1.0, 0.6), np.arange(20)
    ranks[Mix(0.0, 0.0, 0.001, 0.1)][: first + last], ranks[best][-1] = [1] * first + [11] * last, 2
    scorer = types.SimpleNamespace(
        numbers=columns, clicked=lambda _: columns < 0, parts=lambda _, *kinds: np.ones([2 + len(kinds), 1, 20])
    )
    block = types.SimpleNamespace(columns=None)
    monkeypatch.setattr(train_module, "ranks_of", lambda *given: {mix: ranks[mix] for mix, _ in given[-1](block)})
    chosen = train_module.choose_mix({"now": np.zeros(400)}, scorer, toolbox.constants_of("train"))
    assert chosen.clicked_factor == 0.001 if taken else chosen == best


# ---------------------------------------------------------------- a whole run


def test_a_run_publishes_weights_memory_model_tables_and_history(trained):
    work_dir, test, _ = trained
    files = [path.name for path in (work_dir / "model").iterdir() if path.is_file()]
    assert kinds_of(files) == ["history.csv", "memory.npz", "metrics.json", "model.json", "test.csv", "weights.h5"]
    metrics = json.loads((work_dir / "model/metrics.json").read_text())
    assert metrics["test"] == test == saved_in(work_dir)["test"] and list(test) == [*BASELINES, *PARTS]
    assert set(metrics["validation"]) == set(test) and metrics["mix"] == saved_in(work_dir)["mix"]
    assert all(of.keys() == {"HR@10", "NDCG@10", "MRR", "GAUC", "low", "high"} for of in test.values())
    assert all(of["low"] <= of["NDCG@10"] <= of["high"] for of in test.values())
    slices = [of["users"] for of in metrics["slices"].values()]
    number = sum(split_of(f"user{n}") == "test" for n in range(USERS))
    assert len(slices) == 4 and sum(slices[:2]) == sum(slices[2:]) == number
    rows = history_of(work_dir)  # a line for each epoch, of which the best one is the model
    assert [row["epoch"] for row in rows] == ["1", "2"] and float(rows[1]["loss"]) < float(rows[0]["loss"])
    best = max(float(row["NDCG@10"]) for row in rows)
    assert saved_in(work_dir)["validation"]["towers"]["NDCG@10"] == pytest.approx(best)


def test_the_model_beats_popularity_on_clicks_with_structure(trained):
    popularity = trained[1]["popularity"]["NDCG@10"]
    assert trained[1]["mix"]["NDCG@10"] > 1.3 * popularity and trained[1]["memory"]["NDCG@10"] > 1.3 * popularity
    assert trained[1]["towers"]["NDCG@10"] > popularity


def test_a_line_of_test_csv_for_each_test_user_gives_the_whole_table_again(trained, users):
    work_dir, test, _ = trained
    cids, rows = list(load_index(work_dir).columns), read_csv(work_dir / "model/test.csv")
    assert list(rows[0]) == ["uid", "history", "target", "clicked_before", *test]
    assert sorted(row["uid"] for row in rows) == sorted(uid for uid in users if split_of(uid) == "test")
    for row in rows:
        columns, at = [column for _, column in users[row["uid"]]], target_place(users[row["uid"]])
        expected = [str(at), cids[columns[at] - 1], str(int(columns[at] in columns[:at]))]
        assert [row["history"], row["target"], row["clicked_before"]] == expected
    for name, of in test.items():
        ranks = np.array([int(row[name]) for row in rows])
        assert of["NDCG@10"] == pytest.approx(np.mean([gain(rank) for rank in ranks]))
        assert of["HR@10"] == pytest.approx(np.mean(ranks <= 10)) and of["MRR"] == pytest.approx(np.mean(1 / ranks))
    assert 0.35 < test["random"]["GAUC"] < 0.65


def test_the_model_file_vouches_for_its_files_and_names_every_constant_and_its_value(trained):
    folder, saved = trained[0] / "model", saved_in(trained[0])
    for part, end in (("weights", "weights.h5"), ("memory", "memory.npz")):
        path = folder / f"{saved['id']}.{end}"  # both under one id
        assert saved[part] == {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        assert list(folder.glob(f"*.{end}")) == [path]
    assert saved["arguments"].items() >= {"emb_dim": 8, "num_videos": 60, "num_columns": 12}.items()
    assert {"tensorflow", "keras", "numpy", "python"} <= set(saved["versions"])
    expected = {"EPOCHS": 2, "WARM_EPOCHS": 1}
    for module in (get_dataset, model_tf2, train_module):
        kinds = module.__annotations__
        names = {name for name in kinds if kinds[name] is not typing.Final} - toolbox.RUNNING - expected.keys()
        expected |= {name: getattr(module, name) for name in names}
    assert saved["constants"] == json.loads(json.dumps(expected)) and saved["records"]["constants"] == SETTINGS


def test_what_is_published_remembers_all_clicks_and_what_was_tested_only_those_of_training(trained, users):
    work_dir, test, _ = trained
    model, counts, chosen, _ = load_model(work_dir)
    memory = Memory(counts, load_index(work_dir))
    everything = Counter(column for clicks in users.values() for _, column in clicks if column)
    assert memory.column_clicks.tolist() == [everything[number] for number in range(13)]
    videos = Counter(video for clicks in users.values() for video, _ in clicks)
    assert memory.video_clicks.tolist() == [videos[number] for number in range(FIRST_VIDEO + 60)]
    scorer, _, manifest, _ = training_scorer(work_dir, model)
    tested = held_out(manifest, "test", work_dir)
    _, of_memory, _ = scorer.parts(as_users(tested), chosen)
    assert test["memory"]["NDCG@10"] == pytest.approx(mean_gain(of_memory, tested["target_column"] - 1))


def refuse(*_, **__):
    raise AssertionError("this was not to be called")


def test_a_run_over_the_same_records_with_the_same_constants_does_nothing(own, trained, monkeypatch):
    for name in ("fit", "choose_and_publish", "count_windows"):
        monkeypatch.setattr(train_module, name, refuse)
    again, printed = train_and_listen(own, **TINY)
    assert again == trained[1] and "nothing to train: " in printed
    assert published(own) == published(trained[0]) and history_of(own) == history_of(trained[0])


def test_records_older_than_the_index_are_refused_and_those_made_anew_trained_on(own, trained, monkeypatch, tmp_path):
    """With one column more, though the clicks are the same."""
    first = _clicks_like_real(USERS, seed=21)
    raw = _raw(tmp_path / "raw", **first | {"columns": first["columns"] | {"late": ["t1a-0"]}})
    get_indexing(raw, own)
    older = r"made with index = .*: 12,.*, now it is .*: 13,.*; run get_tfrecord\.py again"
    with pytest.raises(InputError, match=older):
        train(own, **TINY)
    assert published(own) == published(trained[0])
    make_records(raw, own)
    assert "training starts from the weights of the model of" in start_of(own, monkeypatch)[0]


def scripted(monkeypatch, *values):
    """Give the validation NDCG@10 of the epochs these values."""
    ndcg = iter(values)
    monkeypatch.setattr(train_module, "mean_of_workers", lambda _, numbers: numbers | {"NDCG@10": next(ndcg)})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(work folder, what train() printed) of MEMORY = False and the other loss; some test users clicked nothing known."""
    folder, data = tmp_path_factory.mktemp("plain"), _clicks_like_real(80, seed=27)
    unknown = [f"ghost{n}" for n in range(40) if split_of(f"ghost{n}") == "test"]
    ghosts = [(uid, ["nobody", "nothing", f"t{n % 4}b-0_t{n % 4}b"]) for n, uid in enumerate(unknown)]
    raw = _raw(folder / "raw", columns=data["columns"], users=data["users"] + ghosts)
    work_dir = make_records(raw, folder / "work")
    with pytest.MonkeyPatch.context() as patch:
        scripted(patch, 0.3, 0.5, 0.4, 0.5, 0.9)
        patch.setattr(train_module, "SCORES_AT_ONCE", 100)  # blocks of 8 users
        return work_dir, train_and_listen(work_dir, loss="bce", MEMORY=False, PATIENCE=2, **TINY | {"EPOCHS": 9})[1]


def test_training_with_the_other_loss_and_without_memory_ends_when_validation_gets_no_better(plain):
    work_dir, printed = plain
    assert [row["NDCG@10"] for row in history_of(work_dir)] == ["0.3", "0.5", "0.4", "0.5"]
    epochs = [line for line in printed.splitlines() if re.match(" +[0-9] ", line)]  # of equal ones the first is best
    assert [line[-1] == "*" for line in epochs] == [True, True, False, False]
    assert list(saved_in(work_dir)["test"]) == [*BASELINES, "towers"]


def test_the_last_row_is_what_is_published_of_each_user_alone_also_without_memory(plain):
    """With the training clicks' memory, as it was tested; users without a known click get popularity.

    In test_infer.py it is what is served of the raw clicks, by all parts.
    """
    work_dir, _ = plain
    model, _, mix, saved = load_model(work_dir)
    scorer, _, manifest, _ = training_scorer(work_dir, model)
    tested, by_user, last = held_out(manifest, "test", work_dir), ranks_in(work_dir), list(saved["test"])[-1]
    rows = zip(tested["uid"], tested["history"], tested["target_column"] - 1, strict=True)
    for user, (uid, length, place) in enumerate(rows):
        clicks, rank = [of[:, :length] for of in as_users(tested, [user])[:3]], by_user[uid.decode()][last]
        (scores,) = scorer.probabilities(Users(*clicks, tested["now"][[user]], tested["now"][[user]]), mix)
        ties = (np.abs(scores - scores[place]) < 1e-6).sum() - 1  # of columns as good as equal
        assert abs(brute_rank(scores, place) - rank) <= ties
        if uid.startswith(b"ghost"):
            assert rank == brute_rank(scorer.memory.column_clicks[1:], place)
    assert any(uid.startswith("ghost") for uid in by_user)


def test_weights_that_are_not_finite_are_no_epoch_and_what_stood_stays(own, monkeypatch):
    """Of the last step of an epoch the loss is that of the weights before it."""
    before, train_epoch = published(own), train_module.train_epoch

    def astray(step, batches, epoch, optimizer):
        outcome = train_epoch(step, batches, epoch, optimizer)
        optimizer.rest[0].assign(np.nan * optimizer.rest[0])
        return outcome

    monkeypatch.setattr(train_module, "train_epoch", astray)
    with pytest.raises(InputError, match="'towers' gives scores that are not finite; the model that stands is kept"):
        train(own, WARM_START=False, **TINY)
    assert published(own) == before and not (own / "model/checkpoint.npz").exists()


def test_one_column_alone_is_first_in_every_ranking_and_a_note_says_so(tmp_path):
    users = [(f"user{n}", [f"v{(n + at) % 5}_only" for at in range(5)]) for n in range(50)]
    raw = _raw(tmp_path / "raw", columns={"only": ["v0", "v1", "v2"]}, users=users)
    test, printed = train_and_listen(make_records(raw, tmp_path / "work"), **TINY | {"EPOCHS": 1})
    assert all(set(of.values()) == {1} for of in test.values()) and "mix" in test
    assert printed.endswith("\nNote: one column is current, so all rankings are the same and every rank is 1.\n")


def test_tensorboard_shows_the_curves_and_the_table_of_the_models_folder(trained):
    """As `tensorboard --logdir data/work/model` reads it."""
    events = EventMultiplexer().AddRunsFromDirectory(str(trained[0] / "model")).Reload()
    (of_all, curves), (run, _) = sorted(events.Runs().items(), reverse=True)
    assert of_all == "logs/all-runs" and re.fullmatch(r"logs/\d{8}-\d{6}-cold", run)
    assert curves["tensors"] == [f"test NDCG@10/{row}" for row in trained[1]]  # a point for each run
    ((point,), mix) = events.Tensors(of_all, "test NDCG@10/mix"), trained[1]["mix"]
    assert point.step == 0 and float(tf.make_ndarray(point.tensor_proto)) == pytest.approx(mix["NDCG@10"])
    assert set(events.Runs()[run]["tensors"]) == {"loss", "HR@10", "NDCG@10", "MRR", "GAUC", "test users"}
    for name in ("loss", "NDCG@10"):
        curve = [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in events.Tensors(run, name)]
        assert curve == [(int(row["epoch"]), pytest.approx(float(row[name]))) for row in history_of(trained[0])]
    (table,) = (tf.make_ndarray(event.tensor_proto).item().decode() for event in events.Tensors(run, "test users"))
    assert table.replace("\n    ", "\n").strip() == trained[2][trained[2].index("\ntest users") :].strip()


# ---------------------------------------------------------------- moments


def test_a_day_is_known_by_the_days_before_it_and_by_neither_itself_nor_those_after(tmp_path):
    """On each pair of days all clicks of all users are in one column, drawn at random.

    A last visit on the second day of a pair can be told by the first day. One on the first day could be told by that day, or
    by the day after, alone: that is the leak, which would be perfect. The rate lets the trend be learned in a few steps.
    """
    rng, cids, users = np.random.default_rng(33), [f"c{n}" for n in range(20)], []
    of_pair = rng.choice(cids, 30)
    for n in range(160):
        last = 2 * rng.integers(15, 30) + n % 2
        days = np.array([*np.sort(rng.choice(2 * (last // 2), 8, replace=False)), last])
        times = [int(86_400 * (20_000 + day) + 3000 * (n % 20)) for day in days]
        clicks = [f"{cid}-{rng.integers(4)}_{cid}" for cid in of_pair[days // 2]]
        users.append((f"user{n}", clicks, times))
    raw = _raw(tmp_path / "raw", columns={cid: [f"{cid}-{v}" for v in range(4)] for cid in cids}, users=users)
    train_and_listen(make_records(raw, tmp_path / "work"), **TINY | {"EPOCHS": 6, "LEARNING_RATE": 0.02})
    by_user = ranks_in(tmp_path / "work")
    assert len(by_user) > 30 and "within a week" in saved_in(tmp_path / "work")["slices"]
    for row in ("popularity", "towers", "mix"):
        told = [[gain(ranks[row]) for uid, ranks in by_user.items() if int(uid[4:]) % 2 == day] for day in (0, 1)]
        assert np.mean(told[0]) < 0.4, row  # 0.23 is chance among 20 columns
        assert np.mean(told[1]) > 0.8, row


def test_the_days_before_a_moment_count_with_all_their_clicks_those_held_out_too(tmp_path):
    """Of these few users every last visit is held out, in a column that was never clicked before, on one of two days."""
    rng, cids, users = np.random.default_rng(34), [f"c{n}" for n in range(20)], []
    for n in range(60):
        clicks = [f"{cid}-0_{cid}" for cid in (*rng.choice(cids[1:], 3), "c0")]
        users.append((f"user{n}", clicks, [86_400 * (20_000 + day) for day in (1, 4, 8, 20 + n % 2)]))
    raw = _raw(tmp_path / "raw", columns={cid: [f"{cid}-0"] for cid in cids}, users=users)
    train_and_listen(make_records(raw, tmp_path / "work"), **TINY)
    told = {(int(uid[4:]) % 2, ranks["popularity"]) for uid, ranks in ranks_in(tmp_path / "work").items()}
    assert told == {(0, 20), (1, 1)}


# ---------------------------------------------------------------- starting from what stands


def test_a_warm_run_starts_from_what_stands_in_its_own_number_of_epochs_and_is_never_worse_on_validation(warm, trained):
    assert "training starts from nothing: no model stands; 2 epochs at most" in trained[2]
    date, rows = saved_in(trained[0])["date"], history_of(warm[0])
    assert f"training starts from the weights of the model of {date}; 1 epochs at most" in warm[2]
    assert [row["epoch"] for row in rows] == ["0", "1"] and rows[0]["loss"] == ""
    assert list(warm[1]) == [*BASELINES, "standing", *PARTS]
    best = max(float(row["NDCG@10"]) for row in rows)
    assert saved_in(warm[0])["validation"]["towers"]["NDCG@10"] == pytest.approx(best)


def test_where_no_epoch_is_better_the_weights_that_stand_stay(own, trained, monkeypatch):
    scripted(monkeypatch, 0.9, 0.1)
    test, printed = train_and_listen(own, SEED=2, **TINY)
    assert same(towers_of(own), towers_of(trained[0]))
    assert test["standing"] == test["mix"] and "'standing' is within the noise of 'mix'" in printed
    assert [test[row]["NDCG@10"] for row in trained[1]] == [trained[1][row]["NDCG@10"] for row in trained[1]]


def train_without_fitting(work_dir, monkeypatch, **options):
    """Return what train_and_listen() does where the towers that are published are those that it starts from."""
    unfitted = lambda _, scorer, *__: (scorer.model.get_weights(), work_dir / "model/logs/none")
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "fit", unfitted)
        return train_and_listen(work_dir, **TINY | options)


def test_what_stands_is_in_the_table_with_its_own_mix_also_after_a_cold_start(own, trained, monkeypatch):
    monkeypatch.setattr(train_module, "choose_mix", lambda *_: Mix(0.0, 0.0, 0.001, 0.1))
    test, printed = train_without_fitting(own, monkeypatch, SEED=2, arguments={"emb_dim": 4})
    assert "training starts from nothing" in printed and test["standing"] == trained[1]["mix"] != test["mix"]


def start_of(work_dir, monkeypatch, **options):
    """What train() prints before it fits, and the model that it would fit."""
    with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(train_module, "fit", lambda strategy, scorer, *_: stopped(scorer.model))
        with pytest.raises(KeyboardInterrupt) as stop:
            train(work_dir, **TINY | options)
    return printed.getvalue(), stop.value.args[0]


def stopped(value=None):
    raise KeyboardInterrupt(value)


def test_a_run_that_cannot_be_warm_starts_from_nothing_and_says_why(own, monkeypatch):
    path, saved = own / "model/model.json", saved_in(own)
    printed, model = start_of(own, monkeypatch, arguments={"emb_dim": 4})
    assert "training starts from nothing: the model that stands has emb_dim = 8, now it is 4; 2 epochs" in printed
    assert model.video_embedding.shape == (62, 4)
    printed, cold = start_of(own, monkeypatch, WARM_START=False, SEED=2)
    assert "from nothing: WARM_START is False; 2 epochs" in printed
    assert not same(cold.get_weights(), towers_of(own))
    printed, stands = start_of(own, monkeypatch, SEED=2)
    assert "from the weights of the model of" in printed and same(stands.get_weights(), towers_of(own))
    edit_json(path, lambda _: saved | {"index": saved["index"] | {"sha256": "other"}})
    assert "from nothing: the model that stands cannot be used" in start_of(own, monkeypatch, SEED=2)[0]
    for every, start in ((10, "nothing: other clicks are held out"), (99, "the weights of the model of")):  # times came
        flipped = [[draw, timed != (n % every == 0)] for n, (draw, timed) in enumerate(saved["records"]["held_out"])]
        edit_json(path, lambda _, of=flipped: saved | {"records": saved["records"] | {"held_out": of}})
        assert f"training starts from {start}" in start_of(own, monkeypatch, SEED=2)[0]
    rules = saved["records"]["constants"] | {"VISIT_GAP": 60}
    edit_json(path, lambda _: saved | {"records": saved["records"] | {"constants": rules}})
    assert "from nothing: other clicks are held out: times came or went" in start_of(own, monkeypatch)[0]
    edit_json(path, lambda _: saved | {"records": saved["records"] | {"held_out_share": 0.125}})
    why = "a share of 0.25 of the users is held out, 0.125 until now"
    assert f"from nothing: {why}" in start_of(own, monkeypatch)[0]


def test_uids_hashed_anew_end_the_warm_start_and_the_row_of_the_standing_model(own, monkeypatch, tmp_path):
    """Users who are held out today were trained on yesterday, under other names."""
    data = _clicks_like_real(USERS, seed=21)
    kept, prefixed = data["users"], [(f"salt-{uid}", *rest) for uid, *rest in data["users"]]
    make_records(_raw(tmp_path / "raw", **data | {"users": kept[: USERS // 2] + prefixed[USERS // 2 :]}), own)
    assert "training starts from the weights of the model of" in start_of(own, monkeypatch)[0]
    make_records(_raw(tmp_path / "raw", **data | {"users": prefixed}), own)
    assert "from nothing: the users are others than those of the model" in start_of(own, monkeypatch)[0]
    test, _ = train_without_fitting(own, monkeypatch)
    assert "standing" not in test


def test_new_videos_get_the_mean_of_the_old_ones_new_columns_zeros_and_all_else_is_as_it_was():
    sizes = dict(emb_dim=4, num_heads=2, user_blocks=1, item_blocks=1)
    old, new = build_model(num_videos=5, num_columns=2, **sizes), build_model(num_videos=8, num_columns=3, **sizes)
    grow(old, new)
    before, after = old.video_embedding.numpy(), new.video_embedding.numpy()
    assert np.array_equal(after[:7], before)
    assert np.allclose(after[7:], before[2:].mean(axis=0))
    assert np.array_equal(new.column_embedding.numpy(), [*old.column_embedding.numpy(), [0] * 4])
    assert same(old.get_weights()[2:], new.get_weights()[2:])  # all after the two tables


def test_epoch_0_of_a_warm_run_is_what_stands_grown(today, warm, monkeypatch):
    _, model = start_of(today, monkeypatch)
    scorer, _, manifest, _ = training_scorer(today, model)
    videos = model.video_embedding.numpy()
    assert np.allclose(videos[62], videos[2:62].mean(axis=0), atol=1e-7)
    users = held_out(manifest, "val", today)
    expected = mean_gain(scorer.towers(as_users(users)), users["target_column"] - 1)
    assert float(history_of(warm[0])[0]["NDCG@10"]) == pytest.approx(expected)


# ---------------------------------------------------------------- killed and run again, damaged, changed


def kill_at(monkeypatch, place, call, work_dir):
    """Train until a function of train.py is called so many times."""
    whole, calls = getattr(train_module, place), itertools.count(1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, place, lambda *given: stopped() if next(calls) == call else whole(*given))
        train(work_dir, **TINY)


def test_a_first_run_killed_leaves_nothing_that_ranks_and_goes_on_to_the_same_weights(fresh, trained, monkeypatch):
    kill_at(monkeypatch, "train_epoch", 2, fresh)
    assert published(fresh) == {}
    with pytest.raises(FileNotFoundError, match=r"/model/model\.json: no such file; run train\.py first"):
        load_model(fresh)
    _, printed = train_and_listen(fresh, **TINY)
    assert "going on after epoch 1 of" in printed
    assert same(towers_of(fresh), towers_of(trained[0])) and history_of(fresh) == history_of(trained[0])
    assert kinds_of(published(fresh)) == kinds_of(published(trained[0]))


def test_a_warm_run_killed_when_it_publishes_leaves_what_stood_and_goes_on_to_the_same(
    today, trained, warm, monkeypatch
):
    """Killed right before model.json is written, then right after it.

    In test_faults.py the disk is full at each write before.
    """
    stood = published(trained[0])
    kill_at(monkeypatch, "write_json", 2, today)
    assert published(today).items() >= stood.items() and len(published(today)) > len(stood)
    assert same(towers_of(today), towers_of(trained[0]))
    kill_at(monkeypatch, "end_publishing", 2, today)  # the first call ends what stood
    assert same(towers_of(today), towers_of(warm[0])) and published(today)["test.csv"] == stood["test.csv"]
    monkeypatch.setattr(train_module, "train_epoch", refuse)
    monkeypatch.setattr(train_module, "choose_and_publish", refuse)
    test, printed = train_and_listen(today, **TINY)
    assert "nothing to train" in printed and test == warm[1] and history_of(today) == history_of(warm[0])
    assert kinds_of(published(today)) == kinds_of(published(warm[0]))
    for name in ("test.csv", "metrics.json"):
        assert published(today)[name] == published(warm[0])[name]
    assert not (today / "model/checkpoint.npz").exists()


def test_a_checkpoint_goes_to_the_same_run_alone(tmp_path):
    model = build_model(num_videos=3, num_columns=2, emb_dim=4)
    optimizer, best, history = train_module.MuonAdam(model, lambda step: 0.1, 3.0), model.get_weights(), [{"epoch": 1}]
    train_module.save_checkpoint(tmp_path, model, optimizer, {"seed": 1}, "now", history, best)
    assert train_module.restore_checkpoint(tmp_path, model, optimizer, {"seed": 2, "from": None})[1:] == ([], None)
    name, went, kept = train_module.restore_checkpoint(tmp_path, model, optimizer, {"seed": 1})
    assert (name, went) == ("now", history) and same(kept, best)


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_what_stands(own, trained):
    message = r"the loss is -?(nan|inf) at step 2 of epoch 1 \(learning rate inf\).*is kept"
    with pytest.raises(InputError, match=message):
        train(own, LEARNING_RATE=float("inf"), **TINY)
    assert published(own) == published(trained[0]) and towers_of(own)


def test_files_and_folders_of_others_stay_and_only_files_of_its_own_pattern_go(own, monkeypatch):
    folder, zeros = own / "model", "0" * 16
    names = "notes.weights.h5", f"{zeros}.weights.h5.bak", f"{zeros}.memory.npz/a.memory.npz"
    notes = [folder / name for name in names]
    left = [folder / f"{zeros}.weights.h5", folder / f"{zeros}.test.csv", folder / f".tmp.{zeros * 2}.model.json"]
    for path in notes + left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    train_without_fitting(own, monkeypatch, SEED=2)
    assert all(path.read_text() == "mine" for path in notes) and not any(path.exists() for path in left)


@pytest.mark.parametrize("part", ["weights", "memory"])
def test_a_file_that_is_not_the_one_of_the_model_is_refused_and_no_start(own, monkeypatch, part, capsys):
    path = own / "model" / saved_in(own)[part]["file"]
    flip_a_bit(path)
    message = rf"{path.name}: gone or damaged, not what .*model\.json was written with; run train\.py again"
    with pytest.raises(InputError, match=message):
        load_model(own)
    assert "from nothing: the model that stands cannot be used" in start_of(own, monkeypatch)[0]
    assert re.search(message, capsys.readouterr().err)
    path.unlink()
    with pytest.raises(InputError, match=message):
        load_model(own)


@pytest.mark.parametrize("name", ["vid2idx.json", "cid2vidx.json"])
def test_an_index_with_other_numbers_is_refused(own, name):
    first_two_swapped = lambda of: dict(zip([*list(of)[1::-1], *list(of)[2:]], of.values(), strict=True))
    edit_json(own / "indexing" / name, first_two_swapped)
    with pytest.raises(InputError, match=r"model\.json: made with indexing/vid2idx.json = .*, now it is .*train\.py"):
        load_model(own)
    with pytest.raises(InputError, match=r"manifest\.json: made with index = .*, now it is .*get_tfrecord\.py"):
        train(own, **TINY)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "damaged .*"), ('{"format": 99}', "made with format = 99, now it is 9")]
)
def test_a_model_file_that_is_damaged_or_of_another_format_is_refused(records, tmp_path, content, message):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.json").write_text(content)
    with pytest.raises(InputError, match=rf"/model/model\.json: {message}.* run train.py again"):
        load_model(tmp_path, load_index(records))


def test_clicks_that_changed_since_the_records_are_said_by_their_content_not_by_their_date(records, tmp_path, capsys):
    made = (records / "tfrecord/manifest.json").stat().st_mtime
    raw = shutil.copytree(records.parent / "raw", tmp_path / "raw")
    clicks, other = raw / "click_seq/clicks.json", raw / "click_seq/more.json"
    text = clicks.read_text()

    def said(path, content, age, data_dir=raw):
        path.write_text(content)
        os.utime(path, (made - age, made - age))
        train_module.say_if_clicks_changed(records, data_dir)
        return capsys.readouterr().err

    (clicks.parent / "folder.json").mkdir()  # get_tfrecord.py does not read it
    assert said(clicks, text, -5) == said(clicks, text, 5, raw / "nowhere") == ""
    changed = text.replace("t0a-0", "t0a-1", 1)  # as long as before
    assert "the records were made (clicks.json); run get_tfrecord.py first" in said(clicks, changed, 5)
    assert said(clicks, text, 5) == "" and "(more.json)" in said(other, text, 5)


# ---------------------------------------------------------------- the optimizer


def adam(start, gradients, rate):
    """Three steps of Adam (Kingma and Ba 2015, algorithm 1, with the epsilon of their section 2)."""
    value, mean, square = start.astype(float), 0.0, 0.0
    for step, gradient in enumerate(gradients, start=1):
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        value = value - rate * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step) * mean / (square**0.5 + 1e-7)
    return value


@pytest.fixture(scope="module")
def stepped():
    """{path: start}, {path: [gradient of each step]} and {path: end} of variables in three steps of MuonAdam, tables first.

    The rates are 0.1 and 0.3. Of the tables rows 1 and 3 are touched, row 3 twice: its gradients add up.
    """
    model, rng = build_model(num_videos=5, num_columns=4, emb_dim=4), np.random.default_rng(4)
    optimizer = train_module.MuonAdam(model, keras.optimizers.schedules.CosineDecay(0.1, 1000, 1.0), 3.0)
    variables = {weight.path: weight for weight in (model.video_embedding, model.column_embedding, *optimizer.rest)}
    start, gradients = {name: weight.numpy() for name, weight in variables.items()}, {name: [] for name in variables}
    for _ in range(3):
        given = []
        for name, weight in variables.items():
            values = rng.normal(size=[3, 4] if len(given) < 2 else weight.shape).astype(np.float32)
            rows = np.array([3, 1, 3])
            given.append(tf.IndexedSlices(values, rows, weight.shape) if len(given) < 2 else tf.constant(values))
            gradients[name].append(tf.convert_to_tensor(given[-1]).numpy())
        optimizer.apply(given[:2], given[2:])
    return start, gradients, {name: weight.numpy() for name, weight in variables.items()}


def test_adam_moves_the_touched_rows_of_the_tables_and_the_others_stand_still(stepped):
    start, gradients, end = stepped
    for name in list(start)[:2]:
        np.testing.assert_allclose(end[name][[1, 3]], adam(start[name], gradients[name], 0.1)[[1, 3]], rtol=1e-4)
        np.testing.assert_array_equal(np.delete(end[name], [1, 3], 0), np.delete(start[name], [1, 3], 0))


def test_kernels_are_moved_by_keras_muon_and_all_else_by_adam(stepped):
    start, gradients, end = stepped
    kernels = [name for name in start if name.endswith("/kernel")]
    assert len(kernels) == 9  # four of each block, and the column map
    reference, variables = (
        keras.optimizers.Muon(0.3, weight_decay=None),
        [keras.Variable(start[name]) for name in kernels],
    )
    reference.rms_rate = None  # no argument in Keras 3.12, which also looks for a variable's moments by its path
    for variable in variables:
        variable.value.path = variable.path
    for step in range(3):
        reference.apply([tf.constant(gradients[name][step]) for name in kernels], variables)
    for name, variable in zip(kernels, variables, strict=True):
        np.testing.assert_allclose(end[name], variable.numpy(), atol=1e-5, err_msg=name)
    others = start.keys() - kernels - set(list(start)[:2])
    assert {name.split("/")[-1] for name in others} == {"age_bias", "scale", "gaps", "trends"}
    for name in others:
        np.testing.assert_allclose(end[name], adam(start[name], gradients[name], 0.1), rtol=1e-4, err_msg=name)
