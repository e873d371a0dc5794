"""Training, its evaluation beside the baselines, and what is kept of it."""

import csv
import hashlib
import json
import shutil
from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import _clicks_like_real, _raw

import get_dataset
import train as train_module
from get_dataset import load_manifest, make_dataset
from get_indexing import InputError, cluster_place, get_indexing
from get_tfrecord import get_tfrecord, split_of
from model_tf2 import MEMORY_CLICKS, PLAIN_TOWERS, Memory, build_model, count_clicks, count_memories
from train import (
    all_rankings,
    choose_mix,
    evaluate,
    load_model,
    metrics_of,
    rank_of,
    target_scorer,
    train,
)

RATIOS = dict(val_ratio=0.2, test_ratio=0.2)
TINY = dict(emb_dim=8, memory=False)


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """Small data in few steps: MIN_STEPS = 6, as a user would edit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_dataset, "MIN_STEPS", 6)
        yield


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A work folder with the index and the records of 150 users with structured clicks; nothing is trained there."""
    folder = tmp_path_factory.mktemp("records")
    raw = _raw(folder / "raw", **_clicks_like_real(150, seed=21))
    get_indexing(raw, folder / "work")
    get_tfrecord(raw, folder / "work", **RATIOS)
    return folder / "work"


@pytest.fixture(scope="module")
def users():
    """The same users' clicks as {uid: [(vid, cid or None), ...]}, taken apart without the scripts."""
    taken = {}
    for uid, clicks in _clicks_like_real(150, seed=21)["users"]:
        taken[uid] = [(click.split("_") + [None])[:2] for click in clicks]
    return taken


@pytest.fixture(scope="module")
def trained(records, tmp_path_factory):
    """(work folder after three epochs of train(), what it returned)."""
    work_dir = tmp_path_factory.mktemp("trained") / "work"
    shutil.copytree(records, work_dir)
    return work_dir, train(work_dir, epochs=3, emb_dim=8)


@pytest.fixture
def fresh(records, tmp_path):
    """A function name -> another work folder with the records, not trained."""
    return lambda name: shutil.copytree(records, tmp_path / name)


@pytest.fixture
def own(trained, tmp_path):
    """A copy of the trained work folder, for a test that changes it."""
    return shutil.copytree(trained[0], tmp_path / "work")


def weights_of(work_dir):
    """The best weights so far, and those after the last epoch, as arrays."""
    with np.load(work_dir / "model/checkpoint.npz") as checkpoint:
        last = [checkpoint[name] for name in checkpoint if name != "state"]
    return towers_of(work_dir) + last


def towers_of(work_dir):
    """The weights that load_model gives."""
    return [variable.numpy() for variable in load_model(work_dir)[0].trainable_variables]


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def edit_json(path, change):
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(value) or value), encoding="utf-8")


# ---------------------------------------------------------------- ranks and metrics


def brute_rank(scores, target):
    """Place of column number `target` in a sorted list, where equal scores go by column number."""
    order = sorted(range(1, len(scores) + 1), key=lambda column: (-scores[column - 1], column))
    return 1 + order.index(target)


def test_ranks_are_places_in_the_sorted_list_and_of_equal_scores_the_first_column_wins():
    rng = np.random.default_rng(22)
    scores, targets = rng.integers(0, 4, [200, 9]).astype(float), rng.integers(1, 10, 200)
    assert rank_of(scores, targets).tolist() == [brute_rank(s, t) for s, t in zip(scores, targets, strict=True)]


def test_a_ranking_of_equal_scores_gains_nothing_by_being_equal():
    assert rank_of(np.zeros([3, 5]), np.array([1, 3, 5])).tolist() == [1, 3, 5]


def test_metrics_are_those_of_the_field():
    metrics = {name: of.mean() for name, of in metrics_of(np.array([1, 2, 10, 11, 20]), num_columns=21).items()}
    assert metrics["HR@10"] == pytest.approx(3 / 5)
    assert metrics["NDCG@10"] == pytest.approx((1 + 1 / np.log2(3) + 1 / np.log2(11)) / 5)
    assert metrics["MRR"] == pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 11 + 1 / 20) / 5)
    # AUC of one positive: the share of the 20 others that are ranked below it
    assert metrics["GAUC"] == pytest.approx((20 + 19 + 11 + 10 + 1) / 20 / 5)


def test_gauc_is_the_mean_over_pairs_of_a_target_and_another_column():
    rng = np.random.default_rng(23)
    scores, targets = rng.permutation(40 * 7).reshape(40, 7), rng.integers(1, 8, 40)
    pairs = [scores[i, t - 1] > scores[i, c] for i, t in enumerate(targets) for c in range(7) if c != t - 1]
    assert metrics_of(rank_of(scores, targets), 7)["GAUC"].mean() == pytest.approx(np.mean(pairs))


# ---------------------------------------------------------------- places in a cluster


@pytest.mark.parametrize(
    ("kind", "number", "place"), [("chief", 0, (0, 3)), ("worker", 0, (1, 3)), ("worker", 1, (2, 3))]
)
def test_the_chief_comes_before_the_workers(monkeypatch, kind, number, place):
    cluster = {"worker": ["a:1", "b:1"], "chief": ["c:1"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": kind, "index": number}}))
    assert cluster_place() == place


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("block", [4_000_000, 100])
def test_every_target_of_a_split_is_evaluated_once_with_the_clicks_before_it(records, users, monkeypatch, block):
    """In blocks of few scores too. Histories are the clicks before the target, latest first."""
    monkeypatch.setattr(train_module, "SCORES_AT_ONCE", block)
    manifest, index = load_manifest(records)
    numbers = {cid: number for number, cid in enumerate(index.columns, start=1)}
    expected = []
    for uid, clicks in users.items():
        if split_of(uid, **RATIOS) == "test":
            coded = [(index.videos[vid], numbers.get(cid, 0)) for vid, cid in clicks]
            expected += [(coded[:at][::-1], coded[at][1]) for at in range(1, len(coded)) if coded[at][1]]
    model, found = build_model(num_videos=60, num_columns=12, emb_dim=8), []
    column_videos = get_dataset.column_table(index, np.zeros(62, int))
    for logits, videos, columns, targets in target_scorer(model, column_videos)(
        make_dataset(manifest, "test", records)
    ):
        assert logits.shape == (len(targets), 12) and videos.shape == (len(targets), MEMORY_CLICKS)
        for history, target in zip(np.stack([videos, columns], 2).tolist(), targets.tolist(), strict=True):
            found.append(([(video, column) for video, column in history if video], target))
    assert len(expected) == manifest["splits"]["test"]["targets"] > 100
    assert sorted(found) == sorted(expected)


def test_targets_of_long_histories_in_overlapping_windows_are_evaluated_once(tmp_path):
    rng = np.random.default_rng(24)
    columns = {f"c{i}": [f"v{i}"] for i in range(4)}
    users = [(f"u{u}", [f"v{c}_c{c}" for c in rng.integers(0, 4, rng.integers(2, 60))]) for u in range(60)]
    raw = _raw(tmp_path / "raw", columns=columns, users=users)
    index = get_indexing(raw, tmp_path / "work")
    manifest = get_tfrecord(raw, tmp_path / "work", user_max_len=9, window_overlap=4, **RATIOS)
    expected = Counter()
    for uid, clicks in users:
        if split_of(uid, **RATIOS) == "val":
            expected.update(int(click[-1]) + 1 for click in clicks[1:])
    score = target_scorer(
        build_model(num_videos=4, num_columns=4, emb_dim=8), get_dataset.column_table(index, np.zeros(6, int))
    )
    found = Counter()
    for *_, targets in score(make_dataset(manifest, "val", tmp_path / "work")):
        found.update(targets.tolist())
    assert found == expected


def test_evaluation_is_the_mean_over_all_blocks():
    blocks = [(np.eye(3)[[0]], None, None, np.array([1])), (np.eye(3)[[0, 0, 0]], None, None, np.array([2, 3, 1]))]
    results = evaluate(blocks, iter, lambda scores, *_: [("given", scores), ("turned", -scores)])
    assert results["given"]["MRR"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1) / 4)
    assert results["turned"]["MRR"] == pytest.approx((1 / 3 + 1 + 1 / 2 + 1 / 3) / 4)


def test_the_baselines_are_counted_on_the_training_users(records, users):
    manifest, index = load_manifest(records)
    numbers = {cid: number for number, cid in enumerate(index.columns, start=1)}
    clicked, follows = np.zeros(13), np.zeros([13, 13])
    for uid, clicks in users.items():
        if split_of(uid, **RATIOS) == "train":
            in_columns = [numbers[cid] for _, cid in clicks if cid]
            np.add.at(clicked, in_columns, 1)
            np.add.at(follows, (in_columns[:-1], in_columns[1:]), 1)
    popularity = clicked[1:] / clicked.sum()
    histories = [[numbers.get(cid, 0) for _, cid in clicks][:-1:][::-1] for clicks in list(users.values())[:40]]
    columns = np.array([(history + [0] * MEMORY_CLICKS)[:MEMORY_CLICKS] for history in histories])
    memory = count_memories(manifest, index, count_clicks(manifest, index, records), [0.6], records)[0.6]
    ranked = dict(
        all_rankings(manifest, memory, PLAIN_TOWERS, records)(np.zeros([40, 12], np.float32), columns, columns)
    )
    assert list(ranked) == ["random", "popularity", "own columns", "chain", "towers"]
    assert np.allclose(ranked["popularity"], popularity, rtol=1e-12)
    for row, history in enumerate(histories):
        own, chain = 1e-6 * popularity, 1e-6 * popularity
        for age, column in enumerate(history):
            if column:
                own[column - 1] += 0.8**age
        for turn, column in enumerate([column for column in history if column]):
            chain += 0.8**turn * follows[column, 1:] / follows[column].sum()
        assert np.allclose(ranked["own columns"][row], own, atol=1e-12)
        assert np.allclose(ranked["chain"][row], chain, atol=1e-12)


def test_the_random_baseline_ranks_a_target_in_the_middle(trained):
    assert 0.4 < trained[1]["random"]["GAUC"] < 0.6


def test_the_chosen_mix_is_the_best_of_those_tried_counting_its_neighbours(trained):
    """Of all memory weights and temperatures, with the memory's own constants as chosen."""
    work_dir, _ = trained
    manifest, index = load_manifest(work_dir)
    model, memory, chosen, _ = load_model(work_dir)
    score, ndcg = target_scorer(model, get_dataset.column_table(index, memory.video_clicks)), Counter()
    for logits, videos, columns, targets in score(make_dataset(manifest, "val", work_dir)):
        remembered = np.maximum(memory.scores(videos, columns, chosen.own_weight), 1e-9)
        remembered /= remembered.sum(axis=1, keepdims=True)
        for tenths in range(9):
            for temperature in (1.0, 1.5):
                weight = tenths / 10
                towers = np.exp(logits.astype(float) / temperature)
                mixed = (1 - weight) * towers / towers.sum(axis=1, keepdims=True) + weight * remembered
                for scores, target in zip(mixed, targets, strict=True):
                    rank = brute_rank(scores, target)
                    ndcg[tenths, temperature] += (rank <= 10) / np.log2(rank + 1)
    steady = {
        (tenths, temperature): np.mean([ndcg[t, temperature] for t in range(tenths - 1, tenths + 2) if 0 <= t < 9])
        for tenths, temperature in ndcg
    }
    found = steady[round(10 * chosen.memory_weight), chosen.temperature]
    assert found == pytest.approx(max(steady.values()), rel=1e-4)


# ---------------------------------------------------------------- a whole run


def test_a_run_writes_weights_memory_model_history_and_metrics(trained):
    work_dir, test = trained
    ends = {".".join(path.name.split(".")[-2:]) for path in (work_dir / "model").iterdir() if path.is_file()}
    named = {"model.json", "metrics.json", "history.csv", "checkpoint.npz"}
    assert ends == {"weights.h5", "memory.npz", *named}
    metrics = json.loads((work_dir / "model/metrics.json").read_text())
    assert metrics["test"] == test
    assert {"random", "popularity", "own columns", "chain", "towers", "memory", "mix"} == set(test)
    assert all(set(values) == {"HR@10", "NDCG@10", "MRR", "GAUC"} for values in test.values())
    assert all(0 < value <= 1 for values in test.values() for value in values.values())


def test_the_model_file_vouches_for_its_weights_and_its_memory(trained):
    folder = trained[0] / "model"
    saved = json.loads((folder / "model.json").read_text())
    for part, end in (("weights", ".weights.h5"), ("memory", ".memory.npz")):
        path = folder / saved[part]["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == saved[part]["sha256"]
        assert [found.name for found in folder.glob(f"*{end}")] == [path.name] and path.name.endswith(end)
    assert saved["arguments"]["emb_dim"] == 8
    assert (saved["arguments"]["num_videos"], saved["arguments"]["num_columns"]) == (60, 12)
    assert saved["user_max_len"] == 50 and saved["item_max_len"] == get_dataset.ITEM_MAX_LEN
    assert {"tensorflow", "keras", "numpy", "python"} <= set(saved["versions"])


def test_the_history_has_a_line_for_each_epoch_and_the_best_one_is_the_model(trained):
    folder = trained[0] / "model"
    with open(folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    best = max(float(row["NDCG@10"]) for row in rows)
    assert json.loads((folder / "model.json").read_text())["validation"]["NDCG@10"] == pytest.approx(best)
    assert float(rows[2]["loss"]) < float(rows[0]["loss"])


def test_the_loaded_model_gives_the_validation_metrics_that_were_kept(trained):
    work_dir, _ = trained
    manifest, index = load_manifest(work_dir)
    model, memory, _, saved = load_model(work_dir)
    score = target_scorer(model, get_dataset.column_table(index, memory.video_clicks))
    again = evaluate(make_dataset(manifest, "val", work_dir), score, lambda logits, *_: [("towers", logits)])
    assert again["towers"] == pytest.approx(saved["validation"])


def test_the_kept_memory_is_that_of_the_chosen_decay(trained):
    work_dir, _ = trained
    manifest, index = load_manifest(work_dir)
    _, memory, chosen, _ = load_model(work_dir)
    counted = count_memories(manifest, index, count_clicks(manifest, index, work_dir), [chosen.decay], work_dir)[
        chosen.decay
    ]
    assert isinstance(memory, Memory)
    assert np.array_equal(memory.by_video.values, counted.by_video.values)


def test_the_model_beats_popularity_on_clicks_with_structure(trained):
    test = trained[1]
    assert test["mix"]["NDCG@10"] > 1.3 * test["popularity"]["NDCG@10"]
    assert test["memory"]["NDCG@10"] > 1.3 * test["popularity"]["NDCG@10"]
    assert test["towers"]["NDCG@10"] > test["popularity"]["NDCG@10"]


@pytest.fixture
def chosen_on(monkeypatch):
    """The users in what choose_mix() is given, written down at each call."""
    uids = set()

    def spy(batches, *others):
        uids.update(uid.decode() for batch in batches.as_numpy_iterator() for uid in batch["uid"])
        return choose_mix(batches, *others)

    monkeypatch.setattr(train_module, "choose_mix", spy)
    return uids


def test_a_finished_run_trains_no_further_and_its_mix_is_chosen_on_validation_alone(own, trained, chosen_on):
    before = (own / "model/history.csv").read_bytes()
    assert train(own, epochs=3, emb_dim=8) == trained[1]
    assert (own / "model/history.csv").read_bytes() == before
    assert same(weights_of(own), weights_of(trained[0]))
    assert chosen_on == {f"user{n}" for n in range(150) if split_of(f"user{n}", **RATIOS) == "val"}


def test_without_memory_the_plain_towers_rank(uninterrupted):
    test = json.loads((uninterrupted / "model/metrics.json").read_text())["test"]
    assert list(test)[-1] == "towers" and not {"memory", "mix"} & set(test)
    assert load_model(uninterrupted)[2].memory_weight == 0


def test_where_a_baseline_is_better_the_run_says_so(capsys):
    values = dict.fromkeys(("HR@10", "NDCG@10"), 0.5)
    train_module.print_table({"chain": values | {"HR@10": 0.6}, "towers": values}, PLAIN_TOWERS)
    printed = capsys.readouterr().out
    assert "'chain' is better than 'towers' in HR@10" in printed and "in NDCG@10" not in printed


def test_training_with_either_loss_ends_when_validation_gets_no_better(fresh, monkeypatch):
    ndcg = iter([0.3, 0.5, 0.4, 0.5, 0.2, 0.9])
    evaluated = train_module.evaluate

    def with_ndcg(*arguments):
        results = evaluated(*arguments)
        return {"towers": results["towers"] | {"NDCG@10": next(ndcg)}} if len(results) == 1 else results

    monkeypatch.setattr(train_module, "evaluate", with_ndcg)
    work_dir = fresh("patience")
    train(work_dir, epochs=9, patience=3, loss="bce", **TINY)
    history = (work_dir / "model/history.csv").read_text().splitlines()
    assert len(history) == 1 + 5  # the best is epoch 2, the first of the equal ones
    assert json.loads((work_dir / "model/model.json").read_text())["validation"]["NDCG@10"] == 0.5


# ---------------------------------------------------------------- killed and run again


@pytest.fixture(scope="module")
def uninterrupted(records, tmp_path_factory):
    """A work folder after two epochs of the plain towers in one go."""
    work_dir = shutil.copytree(records, tmp_path_factory.mktemp("uninterrupted") / "work")
    train(work_dir, epochs=2, **TINY)
    return work_dir


def test_a_run_that_ended_early_goes_on_to_the_same_weights(fresh, uninterrupted):
    work_dir = fresh("early")
    train(work_dir, epochs=1, **TINY)
    train(work_dir, epochs=2, **TINY)
    assert same(weights_of(work_dir), weights_of(uninterrupted))


def killed(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["train_epoch", "save_checkpoint"])
def test_a_run_killed_in_its_second_epoch_goes_on_to_the_same_weights(fresh, uninterrupted, monkeypatch, place):
    work_dir, whole, calls = fresh("killed"), getattr(train_module, place), []

    def killed_at_the_second(*arguments):
        calls.append(place)
        return whole(*arguments) if len(calls) == 1 else killed()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, place, killed_at_the_second)
        train(work_dir, epochs=2, **TINY)
    train(work_dir, epochs=2, **TINY)
    assert same(weights_of(work_dir), weights_of(uninterrupted))
    with open(work_dir / "model/history.csv") as a, open(uninterrupted / "model/history.csv") as b:
        rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)] for file in (a, b)]
    assert rows[0] == rows[1] and len(rows[0]) == 2


def test_a_run_never_ends_with_the_weights_of_another_run(fresh, uninterrupted, monkeypatch):
    """Another seed's run, of other weights, is killed after it has saved some; then the first seed's run starts again."""
    work_dir = fresh("two")
    shutil.copytree(uninterrupted / "model", work_dir / "model")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, "save_checkpoint", killed)
        train(work_dir, epochs=2, seed=2, **TINY)
    assert not np.allclose(towers_of(work_dir)[1], towers_of(uninterrupted)[1], atol=1e-3)
    train(work_dir, epochs=2, **TINY)
    assert same(weights_of(work_dir), weights_of(uninterrupted))


def test_other_constants_start_from_the_beginning(fresh, uninterrupted):
    work_dir = fresh("changed")
    shutil.copytree(uninterrupted / "model", work_dir / "model")
    train(work_dir, epochs=1, learning_rate=1e-3, **TINY)
    assert len((work_dir / "model/history.csv").read_text().splitlines()) == 1 + 1
    assert not same(towers_of(work_dir), towers_of(uninterrupted))


def test_a_damaged_checkpoint_is_named_with_what_to_do(own):
    path = own / "model/checkpoint.npz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"checkpoint\.npz: damaged .*remove it and run train\.py again"):
        train(own, epochs=3, emb_dim=8)


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_best_weights(own, trained):
    with pytest.raises(InputError, match=r"the loss is (nan|inf|-inf) at step 2 of epoch 1"):
        train(own, epochs=3, learning_rate=float("inf"), emb_dim=8)
    assert same(towers_of(own), towers_of(trained[0]))
    assert all(np.isfinite(array).all() for array in towers_of(own))


# ---------------------------------------------------------------- what load_model refuses


@pytest.mark.parametrize("part", ["weights", "memory"])
def test_a_file_that_is_not_the_one_the_model_was_saved_with_is_refused(own, part):
    folder = own / "model"
    path = folder / json.loads((folder / "model.json").read_text())[part]["file"]
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
    with pytest.raises(InputError, match=r"model\.json was made with another index .*train\.py"):
        load_model(own)


def test_an_index_that_lost_videos_is_refused(own):
    edit_json(own / "indexing/vid2idx.json", lambda videos: dict(list(videos.items())[:-1]))
    with pytest.raises(InputError, match=r"cid2vidx\.json: column .* is not a list of numbers of vid2idx\.json"):
        load_model(own)


def test_a_grown_index_and_a_shelf_filled_anew_are_accepted(own, trained):
    edit_json(own / "indexing/vid2idx.json", lambda videos: videos | {"new": 62, "newer": 63})
    edit_json(own / "indexing/cid2vidx.json", lambda columns: columns | {"t0a": [63, 2], "t0b": [], "late": [62, 3]})
    assert same(towers_of(own), towers_of(trained[0]))


def test_training_on_records_of_another_index_is_refused(own):
    edit_json(own / "indexing/vid2idx.json", swap_first_two)
    with pytest.raises(InputError, match=r"manifest\.json was made with another index .*get_tfrecord\.py"):
        train(own, epochs=1, emb_dim=8)


def test_a_missing_model_names_the_script_to_run_first(fresh):
    with pytest.raises(FileNotFoundError, match=r"/model/model\.json: no such file; run train\.py first"):
        load_model(fresh("untrained"))


def test_a_model_of_another_format_is_refused(own):
    edit_json(own / "model/model.json", lambda saved: saved | {"format": 99})
    with pytest.raises(InputError, match=r"model\.json: format 99, not 1; run train\.py again"):
        load_model(own)


def test_a_damaged_model_file_is_refused(own):
    (own / "model/model.json").write_text("{")
    with pytest.raises(InputError, match=r"model\.json: damaged .* run train\.py again"):
        load_model(own)


def test_missing_records_name_the_script_to_run_first(fresh):
    work_dir = fresh("unrecorded")
    shutil.rmtree(work_dir / "tfrecord")
    with pytest.raises(FileNotFoundError, match=r"/tfrecord/manifest\.json: no such file; run get_tfrecord\.py first"):
        train(work_dir, epochs=1, **TINY)


def test_lazy_adam_does_what_adam_does_on_touched_rows_and_leaves_the_others():
    start = np.arange(12, dtype=np.float32).reshape(4, 3)
    touched, indices = [0, 2], tf.constant([2, 0, 2])  # row 2 twice: its gradients add up
    values = tf.constant([[1.0, -2.0, 0.5], [3.0, 0.0, -1.0], [0.5, 0.5, 0.5]])
    lazy, dense = keras.Variable(start), keras.Variable(start)
    constant = keras.optimizers.schedules.CosineDecay(0.1, 1000, 1.0)
    ours, reference = train_module.LazyAdam([lazy], constant), keras.optimizers.Adam(0.1)
    for _ in range(3):
        ours.apply([tf.IndexedSlices(values, indices, tf.constant([4, 3]))])
        reference.apply([tf.math.unsorted_segment_sum(values, indices, 4)], [dense])
    np.testing.assert_allclose(lazy.numpy()[touched], dense.numpy()[touched], rtol=1e-5)
    np.testing.assert_array_equal(lazy.numpy()[[1, 3]], start[[1, 3]])


def test_lazy_adam_treats_dense_gradients_as_adam_does():
    start = np.array([1.0, -2.0, 3.0], np.float32)
    lazy, dense = keras.Variable(start), keras.Variable(start)
    ours = train_module.LazyAdam([lazy], keras.optimizers.schedules.CosineDecay(0.1, 1000, 1.0))
    reference = keras.optimizers.Adam(0.1)
    for gradient in ([1.0, 0.0, -1.0], [0.5, 2.0, 0.0]):
        ours.apply([tf.constant(gradient)])
        reference.apply([tf.constant(gradient)], [dense])
    np.testing.assert_allclose(lazy.numpy(), dense.numpy(), rtol=1e-5)
