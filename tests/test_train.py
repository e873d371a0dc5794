"""Training, its evaluation beside the baselines, what is kept of it, and what happens to the model that stands."""

import contextlib
import csv
import hashlib
import importlib
import inspect
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import get_dataset
import get_indexing as toolbox
import model_tf2
import train as train_module
from get_dataset import DATASET_CONSTANTS, held_out, load_manifest
from get_indexing import CHAIN, FIRST_VIDEO, Index, InputError, cluster_worker, get_indexing, keeps, load_index
from get_tfrecord import get_tfrecord, record_constants
from model_tf2 import MODEL_CONSTANTS, Memory, Mix, Scorer, build_model, count_windows
from train import (
    MEMORY_DECAYS,
    MEMORY_WEIGHTS,
    REPEATS,
    all_rankings,
    grow,
    load_model,
    make_table,
    metrics_of,
    rank_of,
    ranks_of,
    train,
)

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from werkzeug.test import Client
from conftest import _clicks_like_real, _raw

ROOT = Path(__file__).parents[1]
USERS, HELD_OUT = 150, 40
SETTINGS = record_constants(held_out_users=HELD_OUT)
TINY = dict(record_constants=SETTINGS, emb_dim=8, epochs=3, warm_epochs=2)
METRICS = {"HR@10", "NDCG@10", "MRR", "GAUC"}


def split_of(uid):
    """By the hash of the uid: the lowest are for validation, the highest for the test."""
    draw = int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big") / 2**64
    return "val" if draw < HELD_OUT / USERS else "test" if draw >= 1 - HELD_OUT / USERS else "train"


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """Small data in few steps: MIN_STEPS = 6, as a user would edit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_dataset, "MIN_STEPS", 6)
        yield


def make_records(raw, work_dir):
    get_indexing(raw, work_dir)
    get_tfrecord(raw, work_dir, held_out_users=HELD_OUT, num_workers=1)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A work folder with the index and the records of 150 users with structured clicks; nothing is trained there."""
    folder = tmp_path_factory.mktemp("records")
    make_records(_raw(folder / "raw", **_clicks_like_real(USERS, seed=21)), folder / "work")
    return folder / "work"


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
    """(work folder after three epochs of train(), what it returned, what it printed)."""
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
    make_records(_raw(folder / "raw", columns=columns, users=users), work_dir)
    return work_dir


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
    return [variable.numpy() for variable in load_model(work_dir).model.trainable_variables]


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def history_of(work_dir):
    """The rows of history.csv, but for the seconds."""
    with open(work_dir / "model/history.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def published(work_dir):
    """The bytes of all that ranks or that one reads of the model that stands."""
    names = {"model.json", "metrics.json", "test.csv"}
    paths = [path for path in (work_dir / "model").glob("*.*") if path.name in names or path.suffix in (".h5", ".npz")]
    return {path.name: path.read_bytes() for path in paths if path.name != "checkpoint.npz"}


def kinds_of(files):
    """What kinds of files there are, by the ends of their names."""
    return sorted(name.partition(".")[2] if re.match("[0-9a-f]{16}", name) else name for name in files)


def edit_json(path, change):
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(value)), encoding="utf-8")


# ---------------------------------------------------------------- ranks and metrics


def brute_rank(scores, place):
    """Rank of a place in a sorted list, where equal scores go by place."""
    order = sorted(range(len(scores)), key=lambda column: (-scores[column], column))
    return 1 + order.index(place)


def gain(rank):
    return (rank <= 10) / np.log2(rank + 1)


def test_ranks_are_places_in_the_sorted_list_and_of_equal_scores_the_first_column_wins():
    rng = np.random.default_rng(22)
    scores, places = rng.integers(0, 4, [200, 9]).astype(float), rng.integers(0, 9, 200)
    assert rank_of(scores, places).tolist() == [brute_rank(s, p) for s, p in zip(scores, places, strict=True)]
    assert rank_of(np.zeros([3, 5]), np.array([0, 2, 4])).tolist() == [1, 3, 5]


def test_metrics_are_those_of_the_field():
    metrics = {name: of.mean() for name, of in metrics_of(np.array([1, 2, 10, 11, 20]), num_columns=21).items()}
    assert metrics["HR@10"] == pytest.approx(3 / 5)
    assert metrics["NDCG@10"] == pytest.approx((1 + 1 / np.log2(3) + 1 / np.log2(11)) / 5)
    assert metrics["MRR"] == pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 11 + 1 / 20) / 5)
    # AUC of one positive: the share of the 20 others that are ranked below it
    assert metrics["GAUC"] == pytest.approx((20 + 19 + 11 + 10 + 1) / 20 / 5)


def test_gauc_is_the_mean_over_pairs_of_a_target_and_another_column():
    rng = np.random.default_rng(23)
    scores, places = rng.permutation(40 * 7).reshape(40, 7), rng.integers(0, 7, 40)
    pairs = [scores[i, p] > scores[i, c] for i, p in enumerate(places) for c in range(7) if c != p]
    assert metrics_of(rank_of(scores, places), 7)["GAUC"].mean() == pytest.approx(np.mean(pairs))


# ---------------------------------------------------------------- the table


def make_users(histories, clicked_before):
    return {"place": np.zeros(len(histories), int), "history": np.array(histories),
            "clicked_before": np.array(clicked_before, bool)}  # fmt: skip


def test_intervals_are_those_of_redrawn_users():
    """Of two users, one a hit: means are 0, 1/2 or 1, a quarter of the draws each at the ends. Of many: as normal."""
    two = make_table({"row": np.array([1, 99])}, make_users([1, 2], [0, 1]), 100)["test"]["row"]
    assert (two["low"], two["NDCG@10"], two["high"]) == (0, 0.5, 1)
    same_for_all = make_table({"row": np.array([2] * 9)}, make_users(range(9), [0] * 9), 100)["test"]["row"]
    assert [same_for_all[name] for name in ("low", "NDCG@10", "high")] == pytest.approx([1 / np.log2(3)] * 3)
    ranks = np.random.default_rng(25).integers(1, 20, 400)
    gains = np.array([gain(rank) for rank in ranks])
    many = make_table({"row": ranks}, make_users(range(400), [0] * 400), 100)["test"]["row"]
    half = 1.96 * gains.std() / 20
    assert many["low"] == pytest.approx(gains.mean() - half, abs=0.2 * half)
    assert many["high"] == pytest.approx(gains.mean() + half, abs=0.2 * half)
    assert many["low"] < many["NDCG@10"] == pytest.approx(gains.mean())


def test_notes_say_what_is_better_and_what_is_within_the_noise():
    final = np.arange(40) % 4 + 2
    rows = {"worse": final + 1, "equal": final, "better": final - 1, "ahead": np.where(np.arange(40) < 3, 1, final + 8),
            "mix": final}  # fmt: skip
    notes = make_table(rows, make_users(range(40), [0] * 40), 50)["notes"]
    by_row = {row: [note for note in notes if note.startswith(f"{row!r} ")] for row in rows}
    assert by_row["worse"] == [] and by_row["mix"] == []
    (equal,) = by_row["equal"]
    assert "within the noise of 'mix' in NDCG@10: +0.0000, 95 % +0.0000 to +0.0000" in equal
    better, in_others = by_row["better"]
    assert "better than 'mix' in NDCG@10: +0." in better and in_others == "'better' is ahead of 'mix' in MRR, GAUC"
    assert not any("NDCG" in note for note in by_row["ahead"])


def test_slices_are_the_means_of_their_users_which_add_up_and_an_empty_slice_has_none():
    ranks = np.array([1, 2, 3, 30])
    slices = make_table({"row": ranks}, make_users([5, 1, 9, 7], [0, 0, 0, 0]), 50)["slices"]
    expected = {"up to 6 clicks": [1, 2], "more than 6": [3, 30], "clicked before": [], "never clicked": ranks}
    assert list(slices) == list(expected)
    for name, of_slice in expected.items():
        assert slices[name]["users"] == len(of_slice)
        found = np.mean([gain(rank) for rank in of_slice]) if len(of_slice) else None
        assert slices[name]["row"] == (None if found is None else pytest.approx(found))


def test_the_printed_table_shows_intervals_slices_and_notes(trained):
    printed, metrics = trained[2], json.loads((trained[0] / "model/metrics.json").read_text())
    for row, of in metrics["test"].items():
        assert re.search(rf"^{row} +.*{of['NDCG@10']:.4f} +{of['low']:.4f} to {of['high']:.4f}", printed, re.MULTILINE)
    assert all(f"{name}" in printed for name in metrics["slices"])
    assert [line for line in printed.splitlines() if line.startswith("Note: ")] == [
        f"Note: {note}." for note in metrics["notes"]
    ]


# ---------------------------------------------------------------- places in a cluster, and a worker or shard that is lost


@pytest.mark.parametrize(
    ("kind", "number", "place"), [("chief", 0, (0, 3)), ("worker", 0, (1, 3)), ("worker", 1, (2, 3))]
)
def test_the_chief_comes_before_the_workers(monkeypatch, kind, number, place):
    cluster = {"worker": ["a:1", "b:1"], "chief": ["c:1"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": kind, "index": number}}))
    assert cluster_worker() == place


def test_records_that_are_rewritten_under_training_end_it_with_one_line(own, trained, monkeypatch):
    def gone(*_):
        raise tf.errors.NotFoundError(None, None, "train-00000.tfrecord; No such file")

    monkeypatch.setattr(train_module, "train_epoch", gone)
    with pytest.raises(InputError, match=r"the shards changed .*train-00000.*; run get_tfrecord\.py, then this again"):
        train(own, seed=2, **TINY)
    assert published(own) == published(trained[0])


def test_what_a_lost_worker_raises_is_one_line_in_a_cluster_alone(monkeypatch):
    with pytest.raises(tf.errors.UnavailableError), train_module.tensorflow_errors_named():
        raise tf.errors.UnavailableError(None, None, "gone")
    config = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(InputError, match="worker 1 of 2 lost another one"), train_module.tensorflow_errors_named():
        raise tf.errors.UnavailableError(None, None, "gone")


# ---------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def scoring(records):
    """(Scorer of towers that learned nothing and the training clicks' memory, Counts, manifest, index)."""
    manifest, index = load_manifest(records, SETTINGS)
    counts = count_windows(manifest, ["train"], MEMORY_DECAYS, index, records, num_workers=1)
    model = build_model(num_videos=60, num_columns=12, emb_dim=8)
    return Scorer(model, Memory.of_counts(counts, 0, index), index), counts, manifest, index


@pytest.fixture(scope="module")
def training_clicks(users):
    """What training may know of each user: of held-out ones what comes before their last column click."""
    return [clicks if split_of(uid) == "train" else clicks[: target_place(clicks)] for uid, clicks in users.items()]


def test_every_held_out_user_is_evaluated_once_by_the_last_column_click(records, users, scoring):
    scorer, _, manifest, _ = scoring
    for split in ("val", "test"):
        found = scorer.rankable(held_out(manifest, split, records))
        rows = zip(found["uid"], found["user_feature"], found["user_column"], found["place"], strict=True)
        expected = {}
        for uid, clicks in users.items():
            if split_of(uid) == split:
                at = target_place(clicks)
                expected[uid] = (clicks[:at], clicks[at][1] - 1)
        assert len(found["uid"]) == len(expected) > 30
        for uid, videos, columns, place in rows:
            history = [
                (video, column) for video, column in zip(videos.tolist(), columns.tolist(), strict=True) if video
            ]
            assert (history, place) == expected[uid.decode()]


@pytest.mark.parametrize("block", [4_000_000, 100])
def test_ranks_are_those_of_what_is_served_also_in_blocks(records, scoring, monkeypatch, block):
    """Of each user alone, without padding; a retired column is no target and in no ranking."""
    monkeypatch.setattr(train_module, "SCORES_AT_ONCE", block)
    scorer, _, manifest, index = scoring
    retired = Index(index.videos, index.columns | {"t0b": []})
    scorer, by = Scorer(scorer.model, scorer.memory, retired), Mix(MEMORY_DECAYS[0], 0.5, 0.5)
    everyone = held_out(manifest, "test", records)
    users = scorer.rankable(everyone)
    gone = list(index.columns).index("t0b") + 1
    assert 0 < (everyone["target_column"] == gone).sum() == len(everyone["uid"]) - len(users["uid"])
    ranks = ranks_of(users, scorer, lambda *clicks: [("mix", scorer.probabilities(*clicks, by))])["mix"]
    for user, (length, place) in enumerate(zip(users["history"], users["place"], strict=True)):
        alone = [users[name][user : user + 1, :length] for name in ("user_feature", "user_column")]
        (scores,) = scorer.probabilities(*alone, by)
        assert len(scores) == 11 and (scores[place] - scores > 1e-6).sum() <= 11 - ranks[user]
        assert (scores - scores[place] > 1e-6).sum() <= ranks[user] - 1


def test_the_baselines_are_counted_on_the_training_clicks(records, scoring, training_clicks):
    scorer, counts, manifest, index = scoring
    clicked, follows = np.zeros(13), np.zeros([13, 13])
    for clicks in training_clicks:
        in_columns = [column for _, column in clicks if column]
        np.add.at(clicked, in_columns, 1)
        np.add.at(follows, (in_columns[:-1], in_columns[1:]), 1)
    popularity = clicked[1:] / clicked.sum()
    users = scorer.rankable(held_out(manifest, "test", records))
    ranked = dict(all_rankings(scorer, counts, None, None, index)(users["user_feature"], users["user_column"]))
    assert list(ranked) == ["random", "popularity", "own columns", "chain", "towers"]
    assert np.allclose(ranked["popularity"], popularity, rtol=1e-12)
    for row, history in enumerate(users["user_column"].tolist()):
        own, chain = 1e-6 * popularity, 1e-6 * popularity
        for turn, column in enumerate(column for column in reversed(history) if column):
            own[column - 1] += 0.8**turn
            chain += 0.8**turn * follows[column, 1:] / follows[column].sum()
        assert np.allclose(ranked["own columns"][row], own, atol=1e-12)
        assert np.allclose(ranked["chain"][row], chain, atol=1e-12)


def test_the_chosen_mix_is_the_plainest_of_those_that_are_about_the_best_on_validation(trained, scoring, records):
    """By the ranks of scores written down here, of the towers and of the training clicks' memory."""
    _, counts, manifest, index = scoring
    model, _, chosen, saved = load_model(trained[0])
    ndcg = {}
    for place, decay in enumerate(MEMORY_DECAYS):
        scorer = Scorer(model, Memory.of_counts(counts, place, index), index)
        users = scorer.rankable(held_out(manifest, "val", records))
        clicks = users["user_feature"], users["user_column"]
        logits = scorer.towers(*clicks).astype(float) / chosen.temperature
        towers = np.exp(logits - logits.max(axis=1, keepdims=True))
        towers /= towers.sum(axis=1, keepdims=True)
        memory = np.maximum(scorer.remembered(*clicks, chosen), 1e-9)
        memory /= memory.sum(axis=1, keepdims=True)
        for weight in MEMORY_WEIGHTS:
            for repeat in REPEATS:
                mixed = ((1 - weight) * towers + weight * memory) * np.where(scorer.clicked(clicks[1]), repeat, 1)
                ranks = [brute_rank(scores, place) for scores, place in zip(mixed, users["place"], strict=True)]
                ndcg[decay, weight, repeat] = np.array([gain(rank) for rank in ranks])
    best = max(ndcg.values(), key=np.mean)
    error = {choice: np.std(best - of_choice) / np.sqrt(len(best)) for choice, of_choice in ndcg.items()}
    # 2e-3: ranks of columns as good as equal
    near = {choice for choice in ndcg if np.mean(best - ndcg[choice]) < error[choice] + 2e-3}
    sure = {choice for choice in ndcg if np.mean(best - ndcg[choice]) < error[choice] - 2e-3}
    taken = chosen.decay, chosen.memory_weight, chosen.repeat
    assert taken in near and len(near) < len(ndcg)
    assert all((-repeat, abs(weight - 0.5)) >= (-taken[2], abs(taken[1] - 0.5)) for _, weight, repeat in sure)
    assert saved["validation"]["mix"]["NDCG@10"] == pytest.approx(np.mean(ndcg[taken]), abs=2e-3)


@pytest.mark.parametrize(
    "ahead, gaining, losing, expected",
    [
        (
            (0.9, 0.5, 0.5),
            0,
            0,
            (0.7, 0.5, 1.0),
        ),  # nothing differs: half and half, of the first decay, without a factor
        ((0.7, 0.1, 1.0), 20, 18, (0.7, 0.5, 1.0)),  # best by a third of a standard error
        ((0.7, 0.1, 1.0), 20, 8, (0.7, 0.1, 1.0)),  # by more than two
        ((0.9, 0.5, 0.001), 20, 18, (0.7, 0.5, 1.0)),
        ((0.9, 0.5, 0.001), 20, 8, (0.9, 0.5, 0.001)),
    ],
)
def test_what_is_not_plain_must_be_worth_more_than_a_standard_error(monkeypatch, ahead, gaining, losing, expected):
    """Of 400 users one choice ranks the target of some higher, and of others lower, than all the rest do."""

    def ranks_of(users, scorer, rankings):
        choices = itertools.product(MEMORY_DECAYS, MEMORY_WEIGHTS, REPEATS)
        ranks = {Mix(*choice): np.full(400, 3) for choice in choices}
        ranks[Mix(*ahead)][:gaining] = 1  # NDCG 1 instead of 1/2
        ranks[Mix(*ahead)][gaining : gaining + losing] = 11  # 0
        return ranks

    monkeypatch.setattr(train_module, "ranks_of", ranks_of)
    scorer = types.SimpleNamespace(numbers=np.arange(20))
    assert train_module.choose_mix({}, scorer, {})[:3] == expected


def test_of_weights_as_far_from_half_the_first_is_the_plainest(monkeypatch):
    monkeypatch.setattr(train_module, "MEMORY_WEIGHTS", (0.3, 0.7))  # 0.7 - 0.5 is a little less than 0.2
    choices = [Mix(*choice) for choice in itertools.product(MEMORY_DECAYS, (0.3, 0.7), REPEATS)]
    monkeypatch.setattr(train_module, "ranks_of", lambda *_: {choice: np.full(9, 3) for choice in choices})
    assert train_module.choose_mix({}, types.SimpleNamespace(numbers=np.arange(20)), {})[:3] == (0.7, 0.3, 1.0)


# ---------------------------------------------------------------- a whole run


def test_a_run_publishes_weights_memory_model_tables_and_history(trained):
    work_dir, test, _ = trained
    ends = sorted(".".join(path.name.split(".")[-2:]) for path in (work_dir / "model").iterdir() if path.is_file())
    assert ends == sorted(["history.csv", "memory.npz", "metrics.json", "model.json", "test.csv", "weights.h5",
                           "projector_config.pbtxt"])  # fmt: skip
    metrics = json.loads((work_dir / "model/metrics.json").read_text())
    assert metrics["test"] == test == saved_in(work_dir)["test"]
    assert list(test) == ["random", "popularity", "own columns", "chain", "towers", "memory", "mix"]
    assert set(metrics["validation"]) == set(test) and metrics["mix"] == saved_in(work_dir)["mix"]
    for of in test.values():
        assert set(of) == {*METRICS, "low", "high"} and 0 < of["low"] <= of["NDCG@10"] <= of["high"] <= 1
    slices = list(metrics["slices"].values())
    for pair in (slices[:2], slices[2:]):
        assert sum(of["users"] for of in pair) == sum(split_of(f"user{n}") == "test" for n in range(USERS))


def test_a_line_of_test_csv_for_each_test_user_gives_the_whole_table_again(trained, users):
    work_dir, test, _ = trained
    cids = list(load_index(work_dir).columns)
    with open(work_dir / "model/test.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["uid", "history", "target", "clicked_before", *test]
    assert sorted(row["uid"] for row in rows) == sorted(uid for uid in users if split_of(uid) == "test")
    for row in rows:
        clicks, at = users[row["uid"]], target_place(users[row["uid"]])
        target = clicks[at][1]
        before = int(target in [column for _, column in clicks[:at]])
        assert (row["history"], row["target"], row["clicked_before"]) == (str(at), cids[target - 1], str(before))
    for name, of in test.items():
        ranks = np.array([int(row[name]) for row in rows])
        assert of["NDCG@10"] == pytest.approx(np.mean([gain(rank) for rank in ranks]))
        assert of["HR@10"] == pytest.approx(np.mean(ranks <= 10)) and of["MRR"] == pytest.approx(np.mean(1 / ranks))
    assert 0.35 < test["random"]["GAUC"] < 0.65


def test_the_model_file_vouches_for_its_files_and_names_every_constant_and_its_value(trained):
    folder, saved = trained[0] / "model", saved_in(trained[0])
    for part, end in (("weights", ".weights.h5"), ("memory", ".memory.npz")):
        path = folder / saved[part]["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == saved[part]["sha256"]
        assert [found.name for found in folder.glob(f"*{end}")] == [path.name] and path.name.endswith(end)
    assert saved["arguments"]["emb_dim"] == 8
    assert (saved["arguments"]["num_videos"], saved["arguments"]["num_columns"]) == (60, 12)
    assert {"tensorflow", "keras", "numpy", "python"} <= set(saved["versions"])
    constants = saved["constants"]
    assert constants.items() >= {**DATASET_CONSTANTS, **MODEL_CONSTANTS}.items()
    assert (constants["EPOCHS"], constants["WARM_EPOCHS"], constants["SEED"]) == (3, 2, train_module.SEED)
    assert tuple(constants["MEMORY_WEIGHTS"]) == MEMORY_WEIGHTS and saved["records"]["constants"] == SETTINGS
    for table, module in ((DATASET_CONSTANTS, get_dataset), (MODEL_CONSTANTS, model_tf2)):
        assert {name: value for name, value in table.items() if name != "MIN_STEPS"} == {
            name: getattr(module, name) for name in table if name != "MIN_STEPS"
        }


def test_the_history_has_a_line_for_each_epoch_and_the_best_one_is_the_model(trained):
    rows, saved = history_of(trained[0]), saved_in(trained[0])
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    best = max(float(row["NDCG@10"]) for row in rows)
    assert saved["validation"]["towers"]["NDCG@10"] == pytest.approx(best)
    assert float(rows[2]["loss"]) < float(rows[0]["loss"])
    assert len(re.findall(r"^ +[123] .*\|.*\|.* \*$", trained[2], re.MULTILINE)) >= 1  # the best so far is marked


def test_what_is_published_remembers_all_clicks_and_what_was_tested_only_those_of_training(
    trained, users, scoring, records
):
    work_dir, test, _ = trained
    model, memory, chosen, _ = load_model(work_dir)
    everything = Counter(column for clicks in users.values() for _, column in clicks if column)
    assert memory.column_clicks.tolist() == [everything[number] for number in range(13)]
    videos = Counter(video for clicks in users.values() for video, _ in clicks)
    assert memory.video_clicks.tolist() == [videos[number] for number in range(FIRST_VIDEO + 60)]
    _, counts, manifest, index = scoring
    scorer = Scorer(model, Memory.of_counts(counts, MEMORY_DECAYS.index(chosen.decay), index), index)
    tested = scorer.rankable(held_out(manifest, "test", records))
    scores = scorer.remembered(tested["user_feature"], tested["user_column"], chosen)
    ranks = [brute_rank(of_user, place) for of_user, place in zip(scores, tested["place"], strict=True)]
    assert test["memory"]["NDCG@10"] == pytest.approx(np.mean([gain(rank) for rank in ranks]))


def test_the_model_beats_popularity_on_clicks_with_structure(trained):
    popularity = trained[1]["popularity"]["NDCG@10"]
    assert trained[1]["mix"]["NDCG@10"] > 1.3 * popularity and trained[1]["memory"]["NDCG@10"] > 1.3 * popularity
    assert trained[1]["towers"]["NDCG@10"] > popularity


def not_at_all(strategy, scorer, manifest, index, work_dir, run):
    """In the place of fit(): the weights as they come."""
    return scorer.model.get_weights(), work_dir / "model/logs/none"


def refuse(*_, **__):
    raise AssertionError("this was not to be called")


def test_a_run_over_the_same_records_with_the_same_constants_does_nothing(own, trained, monkeypatch):
    for name in ("fit", "finish", "count_windows"):
        monkeypatch.setattr(train_module, name, refuse)
    again, printed = train_and_listen(own, **TINY)
    assert again == trained[1] and "nothing to train: " in printed
    assert published(own) == published(trained[0]) and history_of(own) == history_of(trained[0])


def test_records_made_anew_with_more_columns_are_trained_on_though_their_clicks_are_the_same(own, tmp_path):
    first = _clicks_like_real(USERS, seed=21)
    raw = _raw(tmp_path / "raw", **first | {"columns": first["columns"] | {"late": ["t1a-0"]}})
    get_indexing(raw, own)
    for make_anew in (False, True):
        if make_anew:
            get_tfrecord(raw, own, held_out_users=HELD_OUT, num_workers=1)
        for again in (False, True):
            _, printed = train_and_listen(own, **TINY)
            assert ("nothing to train" in printed) == again
            assert ("from the weights of the model of" in printed) != again


def test_the_choice_is_made_on_validation_users_alone(own, monkeypatch):
    given, choose = set(), train_module.choose_mix

    def spy(users, *others):
        given.update(uid.decode() for uid in users["uid"])
        return choose(users, *others)

    monkeypatch.setattr(train_module, "choose_mix", spy)
    monkeypatch.setattr(train_module, "fit", not_at_all)
    train(own, warm_start=False, **TINY | {"epochs": 4})
    assert given == {f"user{n}" for n in range(USERS) if split_of(f"user{n}") == "val"}


def scripted(monkeypatch, *values):
    """Give the validation NDCG@10 of the epochs these values."""
    ndcg = iter(values)
    monkeypatch.setattr(train_module, "agreed", lambda _, metrics: metrics | {"NDCG@10": next(ndcg)})


def test_training_with_the_other_loss_and_without_memory_ends_when_validation_gets_no_better(fresh, monkeypatch):
    scripted(monkeypatch, 0.3, 0.5, 0.4, 0.5, 0.9)
    test, printed = train_and_listen(fresh, use_memory=False, loss="bce", patience=2, **TINY | {"epochs": 9})
    ndcg = [row["NDCG@10"] for row in history_of(fresh)]
    assert ndcg == ["0.3", "0.5", "0.4", "0.5"]  # of equal ones the first is the best
    assert [line[-1] == "*" for line in printed.splitlines() if re.match(" +[0-9] ", line)] == [
        True,
        True,
        False,
        False,
    ]
    assert list(test)[-1] == "towers" and not {"memory", "mix"} & set(test)
    chosen = load_model(fresh).mix
    assert (chosen.memory_weight, chosen.repeat) == (0, 1)


def test_weights_that_are_not_finite_are_no_epoch_and_what_stood_stays(own, monkeypatch):
    """Of the last step of an epoch the loss is that of the weights before it."""
    before, train_epoch = published(own), train_module.train_epoch

    def astray(step, batches, epoch, optimizer):
        outcome = train_epoch(step, batches, epoch, optimizer)
        optimizer.others[0].assign(np.nan * optimizer.others[0])
        return outcome

    monkeypatch.setattr(train_module, "train_epoch", astray)
    with pytest.raises(InputError, match="'towers' gives scores that are not finite; the model that stands is kept"):
        train(own, warm_start=False, **TINY)
    assert published(own) == before and not (own / "model/checkpoint.npz").exists()


def test_an_unknown_loss_is_refused(fresh):
    with pytest.raises(InputError, match="LOSS = 'hinge': it must be one of softmax, bce"):
        train(fresh, loss="hinge", **TINY)


def test_one_column_alone_is_first_in_every_ranking_and_a_note_says_so(tmp_path):
    users = [(f"user{n}", [f"v{(n + at) % 5}_only" for at in range(5)]) for n in range(30)]
    get_indexing(_raw(tmp_path / "raw", columns={"only": ["v0", "v1", "v2"]}, users=users), tmp_path / "work")
    get_tfrecord(tmp_path / "raw", tmp_path / "work", held_out_users=HELD_OUT, num_workers=1)
    test, printed = train_and_listen(tmp_path / "work", **TINY | {"epochs": 1})
    assert all(set(of.values()) == {1} for of in test.values()) and "mix" in test
    notes = [line for line in printed.splitlines() if line.startswith("Note: ")]
    assert notes == ["Note: one column is current, so all rankings are the same and every rank is 1."]


# ---------------------------------------------------------------- what is alike


def read_vectors(work_dir, kind):
    """(vectors, [[id, title], ...]) of the files for TensorBoard's projector, after their heading."""
    names = (work_dir / f"model/projector/{kind}_names.tsv").read_text(encoding="utf-8").split("\n")
    assert names.pop(0) == "id\ttitle" and names.pop() == ""
    vectors = np.loadtxt(work_dir / f"model/projector/{kind}_vectors.tsv", np.float32, delimiter="\t", ndmin=2)
    return vectors, [line.split("\t") for line in names]


def test_the_vectors_of_the_columns_score_as_the_towers_do(trained):
    """In the order of the index. A user without column clicks has nothing but the scaled cosine."""
    vectors, names = read_vectors(trained[0], "columns")
    index, (model, memory, _, _) = load_index(trained[0]), load_model(trained[0])
    assert [cid for cid, _ in names] == list(index.columns) and vectors.shape == (12, 8)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    videos = np.random.default_rng(31).integers(FIRST_VIDEO, 62, [20, 9]).astype(np.int32)
    users = model.user_vectors(videos, np.zeros_like(videos))[:, -1].numpy()
    scores = Scorer(model, memory, index).towers(videos, np.zeros_like(videos))
    assert np.allclose(float(model.scale) * users @ vectors.T, scores, atol=1e-4)


def test_the_most_clicked_videos_are_columns_of_themselves_alone(own, users, monkeypatch):
    """Without blocks in the column tower: the embedding after the norm, and the map of it, of length one."""
    monkeypatch.setattr(train_module, "PROJECTOR_VIDEOS", 7)
    (own / "model/projector_config.pbtxt").unlink()
    index, model = load_index(own), load_model(own).model
    train_module.write_projector(own, index, own / "nowhere")
    vectors, names = read_vectors(own, "videos")
    clicks = Counter(video for of_user in users.values() for video, _ in of_user)
    most = sorted(sorted(index.videos.values(), key=lambda number: (-clicks[number], number))[:7])
    assert [index.videos[vid] for vid, _ in names] == most and all(vid == title for vid, title in names)
    states = model.embed_videos(np.array(most, np.int32)).numpy()
    states /= np.sqrt((states**2).mean(axis=1, keepdims=True) + 1e-6)
    expected = states + states @ model.column_map.kernel.numpy()
    assert np.allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)


def test_the_vectors_are_written_anew_where_the_model_or_their_number_changed_and_only_then(own, monkeypatch):
    names, index = own / "model/projector/videos_names.tsv", load_index(own)
    names.write_text("mine")
    train_module.write_projector(own, index, own / "nowhere")
    assert names.read_text() == "mine"
    monkeypatch.setattr(train_module, "PROJECTOR_VIDEOS", 3)
    train_module.write_projector(own, index, own / "nowhere")
    assert len(read_vectors(own, "videos")[1]) == 3
    edit_json(own / "model/model.json", lambda saved: saved | {"id": "other"})
    names.write_text("mine")
    train_module.write_projector(own, index, own / "nowhere")
    assert len(read_vectors(own, "videos")[1]) == 3


def test_a_projector_file_of_other_bytes_is_written_anew(own):
    config = own / "model/projector_config.pbtxt"
    written = config.read_bytes()
    config.write_bytes(b"\xff" + written)
    train_module.write_projector(own, load_index(own), own / "nowhere")
    assert config.read_bytes() == written


def test_the_names_are_the_titles_of_the_raw_data_each_on_one_line(own, tmp_path, capsys):
    config = own / "model/projector_config.pbtxt"
    raw = _raw(tmp_path / "raw", columns={"t0a": ["x"]}, names={"t0a": "two\nlines"}, titles={"t0a-0": "a\ttab\r"})
    config.unlink()
    train_module.write_projector(own, load_index(own), raw)
    assert dict(read_vectors(own, "columns")[1])["t0a"] == "two lines"
    titles = dict(read_vectors(own, "videos")[1])
    assert (titles["t0a-0"], titles["t0a-1"]) == ("a tab ", "t0a-1")
    (raw / "vid2title.json").write_text("no JSON\n")
    config.unlink()
    train_module.write_projector(own, load_index(own), raw)
    assert dict(read_vectors(own, "videos")[1])["t0a-0"] == "t0a-0"
    shutil.rmtree(own / "model/projector")
    (own / "model/projector").write_text("not a folder")
    config.unlink()
    capsys.readouterr()
    train_module.write_projector(own, load_index(own), raw)
    assert re.search("model/projector: not written .*projector", capsys.readouterr().err)


def test_a_run_killed_before_the_vectors_are_written_leaves_them_to_the_next(own, trained, monkeypatch):
    kill_at(monkeypatch, "write_projector", 1, own, seed=2)
    of_first = read_vectors(trained[0], "columns")[0]
    assert np.array_equal(read_vectors(own, "columns")[0], of_first)
    _, printed = train_and_listen(own, seed=2, **TINY)
    model, memory, _, _ = load_model(own)
    assert "nothing to train" in printed
    assert np.array_equal(read_vectors(own, "columns")[0], Scorer(model, memory, load_index(own)).vectors)
    assert not np.array_equal(read_vectors(own, "columns")[0], of_first)


def test_tensorboard_shows_the_curves_the_table_and_the_vectors_of_the_models_folder(trained):
    """As `tensorboard --logdir data/work/model` reads it."""
    work_dir, _, printed = trained
    events = EventMultiplexer().AddRunsFromDirectory(str(work_dir / "model")).Reload()
    (run,) = events.Runs()
    assert re.fullmatch(r"logs/\d{8}-\d{6}", run)
    for name in ("loss", "NDCG@10"):
        curve = [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in events.Tensors(run, name)]
        assert curve == [(int(row["epoch"]), pytest.approx(float(row[name]))) for row in history_of(work_dir)]
    (table,) = (tf.make_ndarray(event.tensor_proto).item().decode() for event in events.Tensors(run, "test users"))
    assert [line.removeprefix("    ") for line in table.splitlines()] == printed[
        printed.index("\ntest users") :
    ].splitlines()

    context = TBContext(
        logdir=str(work_dir / "model"), data_provider=MultiplexerDataProvider(events, work_dir / "model")
    )
    routes = ProjectorPlugin(context).get_plugin_apps()
    read = lambda route, **query: Client(routes[route]).get("/", query_string=query).data
    assert json.loads(read("/runs")) == ["."]
    shapes = {of["tensorName"]: of["tensorShape"] for of in json.loads(read("/info", run="."))["embeddings"]}
    assert shapes == {"columns": [12, 8], "videos": [60, 8]}
    for kind in shapes:
        vectors, names = read_vectors(work_dir, kind)
        assert np.array_equal(np.frombuffer(read("/tensor", run=".", name=kind), np.float32), vectors.ravel())
        lines = read("/metadata", run=".", name=kind).decode().splitlines()
        assert [line.split("\t") for line in lines] == [["id", "title"], *names]


# ---------------------------------------------------------------- starting from what stands


def test_a_first_run_starts_from_nothing_and_says_so(trained):
    assert "training starts from nothing: no model stands; 3 epochs at most" in trained[2]


def test_a_warm_run_starts_from_what_stands_says_so_and_takes_its_own_number_of_epochs(warm, trained):
    date = saved_in(trained[0])["date"]
    assert f"training starts from the weights of the model of {date}; 2 epochs at most" in warm[2]
    assert [row["epoch"] for row in history_of(warm[0])] == ["0", "1", "2"]
    assert history_of(warm[0])[0]["loss"] == ""
    assert list(warm[1]) == ["random", "popularity", "own columns", "chain", "standing", "towers", "memory", "mix"]


def test_a_warm_model_is_never_worse_on_validation_than_what_stood(warm):
    rows = [float(row["NDCG@10"]) for row in history_of(warm[0])]
    assert saved_in(warm[0])["validation"]["towers"]["NDCG@10"] == pytest.approx(max(rows))


def test_where_no_epoch_is_better_the_weights_that_stand_stay(own, trained, monkeypatch):
    scripted(monkeypatch, 0.9, 0.1)
    test, printed = train_and_listen(own, seed=2, **TINY | {"warm_epochs": 1})
    assert same(towers_of(own), towers_of(trained[0]))
    assert test["standing"] == test["mix"] and "'standing' is within the noise of 'mix'" in printed
    assert [test[row]["NDCG@10"] for row in trained[1]] == [trained[1][row]["NDCG@10"] for row in trained[1]]


@pytest.mark.parametrize("options", [{"warm_start": False}, {"emb_dim": 4}], ids=["from nothing", "another shape"])
def test_what_stands_is_in_the_table_also_where_training_does_not_start_from_it(own, trained, options):
    test, printed = train_and_listen(own, seed=2, **TINY | {"epochs": 1} | options)
    assert "training starts from nothing" in printed and {**test["standing"]} == trained[1]["mix"]


def test_what_stands_is_scored_with_its_own_decay_whatever_is_chosen_today(own, trained, monkeypatch):
    stood = load_model(own).mix
    (other,) = set(MEMORY_DECAYS) - {stood.decay}
    monkeypatch.setattr(train_module, "choose_mix", lambda *_: Mix(other, 0.9, 1.0))
    assert stood.memory_weight > 0
    test, _ = train_and_listen(own, seed=2, **TINY | {"epochs": 1, "warm_start": False})
    assert test["standing"] == trained[1]["mix"]


def test_a_table_holds_no_nul(tmp_path):
    users = {
        "uid": [b"u\0"],
        "history": np.array([3]),
        "target_column": np.array([1]),
        "clicked_before": np.array([True]),
    }
    train_module.write_test(tmp_path / "test.csv", {"mix": np.array([2])}, users, ["\0c"])
    text = (tmp_path / "test.csv").read_text(encoding="utf-8")
    assert text.splitlines() == ["uid,history,target,clicked_before,mix", "u\ufffd,3,\ufffdc,1,2"]


def test_a_draft_that_a_killed_run_left_goes(own):
    (own / "model/.new.weights.h5").write_bytes(b"half of it")
    train(own, **TINY)
    assert not (own / "model/.new.weights.h5").exists()


def test_the_counting_takes_as_many_workers_as_the_scripts_may():
    assert inspect.signature(count_windows).parameters["num_workers"].default is toolbox.NUM_WORKERS


def never(*_):
    raise KeyboardInterrupt


def start_of(work_dir, monkeypatch, **options):
    """What train() prints before it fits, and the model that it would fit."""
    models = []

    def spy(strategy, scorer, *_):
        models.append(scorer.model)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "fit", spy)
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(KeyboardInterrupt):
        train(work_dir, **TINY | options)
    return printed.getvalue(), models[0]


def test_a_run_that_cannot_be_warm_starts_from_nothing_and_says_why(own, monkeypatch):
    path = own / "model/model.json"
    text = path.read_text(encoding="utf-8")
    printed, model = start_of(own, monkeypatch, emb_dim=4)
    assert "training starts from nothing: the model that stands has emb_dim = 8, now it is 4; 3 epochs" in printed
    assert model.video_embedding.shape == (62, 4)
    printed, cold = start_of(own, monkeypatch, warm_start=False, seed=2)
    assert "from nothing: WARM_START is False; 3 epochs" in printed
    assert not same(cold.get_weights(), towers_of(own))
    printed, stands = start_of(own, monkeypatch, seed=2)
    assert "from the weights of the model of" in printed and same(stands.get_weights(), towers_of(own))
    edit_json(path, lambda saved: saved | {"index": saved["index"] | {"sha256": "other"}})
    assert "from nothing: the model that stands cannot be used" in start_of(own, monkeypatch, seed=2)[0]
    saved = json.loads(text)
    saved["records"]["held_out_share"] = 0.2
    path.write_text(json.dumps(saved), encoding="utf-8")
    printed, _ = start_of(own, monkeypatch)
    assert "from nothing: 26.67% of the users are held out, 20.00% when the model that stands was trained" in printed


@pytest.mark.parametrize("part", ["weights", "memory"])
def test_where_the_files_of_what_stands_are_damaged_training_starts_from_nothing(own, monkeypatch, part, capsys):
    (own / "model" / saved_in(own)[part]["file"]).write_bytes(b"damaged")
    printed, _ = start_of(own, monkeypatch)
    assert "training starts from nothing: the model that stands cannot be used" in printed
    assert re.search(rf"\.{part}\..*: gone or damaged, not what .*model.json was written with", capsys.readouterr().err)


def test_new_videos_get_the_mean_of_their_shelf_new_columns_zeros_and_all_else_is_as_it_was():
    index = Index(dict.fromkeys("abcdefgh"), {"one": [2, 3, 7], "two": [4, 5, 6], "three": [8]})
    sizes = dict(emb_dim=4, num_heads=2, user_blocks=1, item_blocks=1)
    old, new = build_model(num_videos=5, num_columns=2, **sizes), build_model(num_videos=8, num_columns=3, **sizes)
    grow(old, new, index)
    before, after = old.video_embedding.numpy(), new.video_embedding.numpy()
    assert np.array_equal(after[:7], before)
    assert np.allclose(after[7], before[[2, 3]].mean(axis=0))
    assert np.allclose(after[8:], before[2:].mean(axis=0))  # on a shelf of new videos alone, or on none
    assert np.array_equal(new.column_embedding.numpy(), [*old.column_embedding.numpy(), [0] * 4])
    tables = {old.video_embedding.path, old.column_embedding.path}
    for was, now in zip(old.variables, new.variables, strict=True):
        assert was.path in tables or np.array_equal(was, now)


def test_epoch_0_of_a_warm_run_is_what_stands_grown(today, trained, warm, monkeypatch):
    _, model = start_of(today, monkeypatch)
    weights, stood = model.get_weights(), load_model(trained[0]).model
    assert weights[0].shape[0] == FIRST_VIDEO + 61 and weights[1].shape[0] == 1 + 13
    assert np.array_equal(weights[0][:62], stood.video_embedding) and not weights[1][13].any()
    manifest, index = load_manifest(today, SETTINGS)
    assert np.allclose(weights[0][62], weights[0][index.columns["t0a"][:5]].mean(axis=0), atol=1e-7)
    counts = count_windows(manifest, ["train"], MEMORY_DECAYS, index, today, num_workers=1)
    scorer = Scorer(model, Memory.of_counts(counts, 0, index), index)
    users = scorer.rankable(held_out(manifest, "val", today))
    logits = scorer.towers(users["user_feature"], users["user_column"])
    ranks = [brute_rank(of_user, place) for of_user, place in zip(logits, users["place"], strict=True)]
    assert float(history_of(warm[0])[0]["NDCG@10"]) == pytest.approx(np.mean([gain(rank) for rank in ranks]))


def test_what_goes_by_the_data_unless_it_is_set_is_kept_with_the_model(trained, fresh, monkeypatch):
    saved = saved_in(trained[0])
    clicks = sum(len(clicks) for _, clicks in _clicks_like_real(USERS, seed=21)["users"])
    expected = model_tf2.by_rarity(clicks, 60)
    assert (saved["arguments"]["dropout"], saved["constants"]["AHEAD_DECAY"]) == expected
    monkeypatch.setattr(model_tf2, "DROPOUT", 0.25)
    assert start_of(fresh, monkeypatch)[1].arguments["dropout"] == 0.25
    assert start_of(fresh, monkeypatch, dropout=0.125)[1].arguments["dropout"] == 0.125


# ---------------------------------------------------------------- killed and run again


def kill_at(monkeypatch, place, call, work_dir, **options):
    """Train until a function of train.py is called so many times."""
    whole, calls = getattr(train_module, place), []

    def killed_there(*arguments):
        calls.append(place)
        return never() if len(calls) == call else whole(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, place, killed_there)
        train(work_dir, **TINY | options)


def test_a_first_run_killed_leaves_nothing_that_ranks_and_goes_on_to_the_same_weights(fresh, trained, monkeypatch):
    kill_at(monkeypatch, "save_checkpoint", 2, fresh)
    assert published(fresh) == {}
    with pytest.raises(FileNotFoundError, match=r"/model/model\.json: no such file; run train\.py first"):
        load_model(fresh)
    _, printed = train_and_listen(fresh, **TINY)
    assert "going on after epoch 1 of" in printed
    assert same(towers_of(fresh), towers_of(trained[0])) and history_of(fresh) == history_of(trained[0])
    assert kinds_of(published(fresh)) == kinds_of(published(trained[0]))


def test_a_warm_run_killed_anywhere_leaves_what_stood_and_goes_on_to_the_same_weights(
    today, trained, warm, monkeypatch
):
    """Killed in its second epoch, then when all is written but model.json, then right after model.json."""
    stood = published(trained[0])
    kill_at(monkeypatch, "train_epoch", 2, today)
    assert published(today) == stood and (today / "model/checkpoint.npz").exists()
    assert towers_of(today) and saved_in(today) == saved_in(trained[0])
    kill_at(monkeypatch, "write_test", 1, today)
    assert published(today).items() >= stood.items()
    assert same(towers_of(today), towers_of(trained[0]))
    kill_at(monkeypatch, "end_publishing", 2, today)  # the first call ends what stood
    monkeypatch.setattr(train_module, "train_epoch", refuse)
    monkeypatch.setattr(train_module, "finish", refuse)
    test, printed = train_and_listen(today, **TINY)
    assert "nothing to train" in printed and test == warm[1]
    assert same(towers_of(today), towers_of(warm[0])) and history_of(today) == history_of(warm[0])
    assert kinds_of(published(today)) == kinds_of(published(warm[0]))
    for name in ("test.csv", "metrics.json"):
        assert published(today)[name] == published(warm[0])[name]
    assert not (today / "model/checkpoint.npz").exists()


def test_a_checkpoint_gives_back_the_state_and_the_best_weights_to_the_same_run_alone(tmp_path):
    model = build_model(num_videos=3, num_columns=2, emb_dim=4)
    optimizer = train_module.MuonAdam(model.trainable_variables, lambda step: 0.1)
    rng, run, history = np.random.default_rng(28), {"seed": 1}, [{"epoch": 0}, {"epoch": 1}]
    variables = model.variables + optimizer.variables
    for variable in variables:
        variable.assign(rng.normal(0, 1, variable.shape))
    state, best = [np.array(variable) for variable in variables], [weights + 1 for weights in model.get_weights()]
    train_module.save_checkpoint(tmp_path, model, optimizer, run, "now", history, best)
    for variable in variables:
        variable.assign(variable * 0)
    assert train_module.restore_checkpoint(tmp_path, model, optimizer, {"seed": 2})[1:] == ([], None)
    assert not any(np.any(variable) for variable in variables)
    started, went, kept = train_module.restore_checkpoint(tmp_path, model, optimizer, run)
    assert (started, went) == ("now", history) and same(kept, best)
    assert same([np.array(variable) for variable in variables], state)
    path = tmp_path / "checkpoint.npz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"checkpoint\.npz: damaged .*remove it and run train\.py again"):
        train_module.restore_checkpoint(tmp_path, model, optimizer, run)


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_what_stands(own, trained):
    with pytest.raises(
        InputError, match=r"the loss is (nan|inf|-inf) at step 2 of epoch 1 \(learning rate inf\).*is kept"
    ):
        train(own, learning_rate=float("inf"), **TINY)
    assert published(own) == published(trained[0])
    assert all(np.isfinite(array).all() for array in towers_of(own))


# ---------------------------------------------------------------- other people's files


def test_files_and_folders_of_others_stay_and_only_files_of_its_own_pattern_go(own, monkeypatch):
    folder = own / "model"
    notes = [folder / "notes.weights.h5", folder / "0123456789abcdef.weights.h5.bak", folder / "mine" / "a.memory.npz"]
    for path in notes:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (folder / f"{'f' * 16}.memory.npz").mkdir()
    (folder / f"{'0' * 16}.weights.h5").write_text("left by a killed run")
    monkeypatch.setattr(train_module, "fit", not_at_all)
    train(own, seed=2, **TINY)
    assert all(path.read_text() == "mine" for path in notes) and (folder / f"{'f' * 16}.memory.npz").is_dir()
    assert not (folder / f"{'0' * 16}.weights.h5").exists()


# ---------------------------------------------------------------- what load_model refuses


@pytest.mark.parametrize("part", ["weights", "memory"])
def test_a_file_that_is_not_the_one_the_model_was_saved_with_is_refused(own, part):
    path = own / "model" / saved_in(own)[part]["file"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{path.name}.*model\.json.*run train\.py again"):
        load_model(own)
    path.unlink()
    with pytest.raises(InputError, match=rf"{path.name}.*model\.json.*run train\.py again"):
        load_model(own)


def swap_first_two(numbers):
    names = list(numbers)
    names[:2] = names[1::-1]
    return dict(zip(names, numbers.values(), strict=True))


@pytest.mark.parametrize("name", ["vid2idx.json", "cid2vidx.json"])
def test_an_index_with_other_numbers_is_refused(own, name):
    edit_json(own / "indexing" / name, swap_first_two)
    with pytest.raises(InputError, match=r"model\.json: made with indexing/vid2idx.json = .*, now it is .*train\.py"):
        load_model(own)
    with pytest.raises(
        InputError, match=r"manifest\.json: made with indexing/vid2idx.json = .*, now it is .*get_tfrecord\.py"
    ):
        train(own, **TINY)


def test_an_index_that_lost_videos_is_refused(own):
    edit_json(own / "indexing/vid2idx.json", lambda videos: dict(list(videos.items())[:-1]))
    with pytest.raises(InputError, match=r"cid2vidx\.json: column .* is no list of numbers of vid2idx\.json"):
        load_model(own)


def test_a_grown_index_and_a_shelf_filled_anew_are_accepted(own, trained):
    edit_json(own / "indexing/vid2idx.json", lambda videos: videos | {"new": 62, "newer": 63})
    edit_json(own / "indexing/cid2vidx.json", lambda columns: columns | {"t0a": [63, 2], "t0b": [], "late": [62, 3]})
    assert same(towers_of(own), towers_of(trained[0]))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file; run train.py first"), ("{", "damaged .*run train.py again"),
     ('{"format": 99}', "made with format = 99, now it is 4; run train.py again")],
)  # fmt: skip
def test_a_model_file_that_is_missing_damaged_or_of_another_format_is_refused(records, tmp_path, content, message):
    (tmp_path / "model").mkdir()
    if content:
        (tmp_path / "model/model.json").write_text(content)
    with pytest.raises((FileNotFoundError, InputError), match=rf"/model/model\.json: {message}"):
        load_model(tmp_path, load_index(records))


def test_missing_records_and_those_of_other_constants_name_the_script_to_run(fresh):
    with pytest.raises(
        InputError, match=r"manifest\.json: made with HELD_OUT_USERS = 40, now it is 41; run get_tfrecord"
    ):
        train(fresh, **TINY | {"record_constants": SETTINGS | {"HELD_OUT_USERS": 41}})
    shutil.rmtree(fresh / "tfrecord")
    with pytest.raises(FileNotFoundError, match=r"/tfrecord/manifest\.json: no such file; run get_tfrecord\.py first"):
        train(fresh, **TINY)


def test_raw_clicks_that_changed_since_the_records_were_made_are_said(records, capsys):
    data_dir, made = records.parent / "raw", (records / "tfrecord/manifest.json").stat().st_mtime
    clicks = data_dir / "click_seq/clicks.json"
    os.utime(clicks, (made - 5, made - 5))
    train_module.say_if_clicks_changed(records, data_dir)
    train_module.say_if_clicks_changed(records, data_dir / "nowhere")
    assert capsys.readouterr().err == ""
    os.utime(clicks, (made + 5, made + 5))
    train_module.say_if_clicks_changed(records, data_dir)
    (said,) = capsys.readouterr().err.splitlines()
    assert "the clicks changed since the records were made (clicks.json); run get_tfrecord.py first" in said
    os.utime(clicks, (made - 5, made - 5))
    other = data_dir / "click_seq/more.json"
    other.write_text("")
    os.utime(other, (made - 5, made - 5))
    train_module.say_if_clicks_changed(records, data_dir)
    other.unlink()
    assert "(other files)" in capsys.readouterr().err
    (clicks.parent / "folder.json").mkdir()  # get_tfrecord.py does not read it
    train_module.say_if_clicks_changed(records, data_dir)
    (clicks.parent / "folder.json").rmdir()
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- the optimizer


def test_lazy_adam_does_what_adam_does_on_touched_rows_and_leaves_the_others():
    start = np.arange(12, dtype=np.float32).reshape(4, 3)
    touched, indices = [0, 2], tf.constant([2, 0, 2])  # row 2 twice: its gradients add up
    values = tf.constant([[1.0, -2.0, 0.5], [3.0, 0.0, -1.0], [0.5, 0.5, 0.5]])
    lazy, dense = keras.Variable(start), keras.Variable(start)
    constant = keras.optimizers.schedules.CosineDecay(0.1, 1000, 1.0)
    ours, reference = train_module.MuonAdam([lazy], constant), keras.optimizers.Adam(0.1)
    for _ in range(3):
        ours.apply([], [tf.IndexedSlices(values, indices, tf.constant([4, 3]))])
        reference.apply([tf.math.unsorted_segment_sum(values, indices, 4)], [dense])
    np.testing.assert_allclose(lazy.numpy()[touched], dense.numpy()[touched], rtol=1e-5)
    np.testing.assert_array_equal(lazy.numpy()[[1, 3]], start[[1, 3]])


def test_lazy_adam_treats_dense_gradients_as_adam_does():
    start = np.array([1.0, -2.0, 3.0], np.float32)
    lazy, dense = keras.Variable(start), keras.Variable(start)
    ours = train_module.MuonAdam([lazy], keras.optimizers.schedules.CosineDecay(0.1, 1000, 1.0))
    reference = keras.optimizers.Adam(0.1)
    for gradient in ([1.0, 0.0, -1.0], [0.5, 2.0, 0.0]):
        ours.apply([], [tf.constant(gradient)])
        reference.apply([tf.constant(gradient)], [dense])
    np.testing.assert_allclose(lazy.numpy(), dense.numpy(), rtol=1e-5)


def test_muon_moves_a_kernel_by_as_much_in_every_direction_whatever_the_gradient():
    """Of a gradient with singular values from 1e-3 to 1, the first step moves by about the same in all directions."""
    rng = np.random.default_rng(4)
    left, right = (np.linalg.qr(rng.normal(size=[rows, 8]))[0] for rows in (8, 24))
    gradient = (left * np.geomspace(1e-3, 1, 8)) @ right.T
    gradients = [gradient, 1e6 * gradient, gradient.T]
    kernels = [keras.Variable(np.zeros(of_one.shape, np.float32), name="kernel") for of_one in gradients]
    ours = train_module.MuonAdam(kernels, lambda step: 0.1)
    ours.apply([tf.constant(of_one, tf.float32) for of_one in gradients], [])
    wide, longer, tall = (-kernel.numpy() / (0.1 * train_module.KERNEL_RATE) for kernel in kernels)
    np.testing.assert_allclose(wide, longer, atol=1e-3)  # the length of the gradient says nothing
    np.testing.assert_allclose(wide, tall.T, atol=1e-3)
    lengths = np.diag(left.T @ wide @ right)
    assert np.allclose((left * lengths) @ right.T, wide, atol=1e-3)  # the same directions
    assert lengths[4:].min() > 0.6 and lengths.max() < 1.3  # of a hundredth and more of the largest


def test_muon_goes_by_the_sum_of_falling_gradients_and_leaves_all_that_is_no_kernel_to_adam():
    kernel, table = (keras.Variable(np.zeros([4, 2], np.float32), name=name) for name in ("kernel", "age_bias"))
    steps = []
    for gradients in ([1.0, -1.0], [1.0, -0.01]):
        for variable in (kernel, table):
            variable.assign(np.zeros([4, 2], np.float32))
        ours = train_module.MuonAdam([table, kernel], lambda step: 0.1)
        for gradient in gradients:
            before = kernel.numpy()
            ours.apply([gradient * tf.constant(np.eye(4, 2), tf.float32)], [tf.ones([4, 2])])
        steps.append((kernel.numpy() - before)[0, 0])
    assert steps[0] > 0 > steps[1]  # a gradient as large the other way turns it, a small one does not
    np.testing.assert_allclose(table.numpy(), -0.2, rtol=1e-4)  # Adam: the rate in each step


# ---------------------------------------------------------------- constants

FIXED = {"PAD", "UNKNOWN", "FIRST_VIDEO", "ENDINGS", "CHAIN", "TASKS_AHEAD", "UNPACKS_TO", "FORMAT", "SPLITS", "LISTS", "WINDOW_SPEC",
         "PADDED_SHAPES", "DATASET_CONSTANTS", "MODEL_CONSTANTS", "LOSSES", "MODEL_FORMAT", "NO_LOSSES",
         "PREFIXES", "LIMITS", "MADE_WITH", "ASTRAY"}  # fmt: skip


@pytest.mark.parametrize("script", CHAIN)
def test_every_constant_is_held_to_a_rule_which_the_shipped_value_keeps_and_a_wrong_type_does_not(script):
    made = set(
        re.findall(r"^([A-Z][A-Z_0-9]*)(?=[A-Z_0-9, ]* \|?= )", (ROOT / f"{script}.py").read_text(), re.MULTILINE)
    )
    made |= set(
        re.findall(r"^[A-Z_0-9]+, ([A-Z_0-9]+)(?:, [A-Z_0-9]+)* = ", (ROOT / f"{script}.py").read_text(), re.MULTILINE)
    )
    module = importlib.import_module(script)
    rules = rules_of(module)
    assert made - FIXED == set(rules)
    assert sum(map(len, module.rules.values())) == len(rules)
    for name, rule in rules.items():
        value = getattr(module, name) if name != "MIN_STEPS" else 6
        assert keeps(value, rule), name
        for wrong in (object(), [value], {}, b"1", float("nan"), ()):
            assert not keeps(wrong, rule), (name, wrong)
        if type(value) is not bool:
            assert not keeps(True, rule), name
        if type(value) is not str:
            assert not keeps(str(value), rule), name


def rules_of(module):
    return {name: rule for rule, names in module.rules.items() for name in names}


@pytest.mark.parametrize(
    ("script", "name", "inside", "outside"),
    [
        ("get_indexing", "MAX_BAD_FRACTION", [0, 1, 0.5], [-0.1, 1.1]),
        ("get_indexing", "NUM_WORKERS", [None, 1], [0, -1, 1.0]),
        ("get_indexing", "DATA_DIR", ["data", "/data"], ["", "~/data", None]),
        ("get_tfrecord", "USER_MAX_LEN", [2], [1, None, 2.5]),
        ("get_dataset", "MAX_CANDIDATES", [0], [-1, None]),
        ("get_dataset", "ITEM_SAMPLE", [2], [1]),
        ("model_tf2", "EMB_DIM", [2, 8], [0, -2]),
        ("model_tf2", "DROPOUT", [0, 0.9], [-0.1, 0.95]),
        ("model_tf2", "VIDEO_DECAY", [1, 0.1], [0, 1.1]),
        ("model_tf2", "LOSS", ["bce"], ["hinge", "", None]),
        ("train", "EPOCHS", [1], [0, -3, 2.0, None]),
        ("train", "WARM_START", [True, False], [0, 1, None]),
        ("train", "LEARNING_RATE", [1e-9], [0, -1, float("inf")]),
        ("train", "REPEATS", [(1.0,)], [(0,), (0.5, 2), 0.5]),
        ("train", "SEED", [0, 2**32 - 1], [-1, 2**32]),
        ("infer", "GZIP_LEVEL", [0, 9], [10]),
        ("infer", "TOP_K", [0], [-1]),
    ],
)
def test_a_constant_can_be_what_its_rule_says_and_no_more(script, name, inside, outside):
    rule = rules_of(importlib.import_module(script))[name]
    assert [value for value in inside if not keeps(value, rule)] == []
    assert [value for value in outside if keeps(value, rule)] == []


def test_a_script_with_a_constant_that_cannot_be_ends_with_one_line_and_writes_nothing(tmp_path):
    for script in CHAIN:
        shutil.copy(ROOT / f"{script}.py", tmp_path)
    source = (tmp_path / "train.py").read_text(encoding="utf-8")
    edited, times = re.subn(r"^EPOCHS = \d+", "EPOCHS = 0", source, flags=re.MULTILINE)
    (tmp_path / "train.py").write_text(edited, encoding="utf-8")
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})  # fmt: skip
    assert (times, done.returncode, done.stdout) == (1, 1, "")
    assert done.stderr.splitlines()[-1] == "train.py: EPOCHS = 0 in train.py: it must be a whole number in [1, inf)"
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{script}.py" for script in CHAIN)
