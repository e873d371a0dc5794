"""get_dataset.py: equal batches with and without files, right targets, honest sampling, held-out histories as served, counts."""

import itertools
import math
import random
from collections import Counter

import get_dataset as script
from get_dataset import (
    BACKWARD, DAY, NEAR_DECAY,
    add_candidates, bucket_windows, column_table, count_windows, dataset_from_clicks, gap_buckets,
    held_out, load_manifest, make_dataset, shelves_table,
)  # fmt: skip
from get_indexing import UNKNOWN, Index, InputError, get_indexing, write_json
from get_tfrecord import ClickEncoder, History, get_tfrecord, survey, write_windows
from model_tf2 import Memory
from train import epoch_batches

import numpy as np
import pytest
import tensorflow as tf
from conftest import _clicks_like_real, _raw, held_out_by_hand

CONSTANTS = dict(USER_MAX_LEN=12, WINDOW_OVERLAP=4, MIN_HISTORY=1, VISIT_GAP=1800, HELD_OUT_USERS=15, RANGE_BYTES=2000)
INDEX = Index({"a": 2, "b": 3, "c": 4}, {"c1": [2, 3], "c2": [4]})
WINDOW = {"user_feature": "i4", "user_column": "i4", "user_time": "i8", "user_gap": "i4", "asked": "i8", "label": "f4"}
FEATURES = {*WINDOW, "target_column", "uid", "start", "repeated"}


def chain(folder, data):
    """Run the chain up to the records on raw data and return what load_manifest() does."""
    get_indexing(_raw(folder / "raw", **data), folder)
    get_tfrecord(folder / "raw", folder, 1, **CONSTANTS)
    return load_manifest(folder, CONSTANTS)


def of_lengths(*lengths):
    """Return raw data of users with so many clicks, the last ones in no column; a quarter of the clicks begins a visit."""
    clicks, rng, users = ["a_c1", "b", "x_c2", "c_c2", "b_c1"], random.Random(3), []
    for u, n in enumerate(lengths):
        gaps = [rng.choice([9, 9, 1799, 1800]) for _ in range(n)]
        times = itertools.accumulate(gaps, initial=1_700_000_000)
        users.append((f"u{u}", [clicks[(u + i * i) % 5 if i < n - u % 20 else 1] for i in range(n)], list(times)[1:]))
    return {"columns": {"c1": ["a", "b"], "c2": ["c"]}, "users": users}


def histories_of(users):
    """Return (uid, clicks) and (uid, clicks, times) as Historys."""
    return [History(uid, clicks, *(times or [[0] * len(clicks)]), 0) for uid, clicks, *times in users]


def cut_by_hand(data, share):
    """Yield (uid, clicks, times, split, where what is held out begins, place of the target, if there is one) of each user."""
    for uid, clicks, *times in data["users"]:
        in_column = [click.partition("_")[2] in data["columns"] for click in clicks]
        split, begin, place = held_out_by_hand(uid, in_column, times and times[0], share)
        yield uid, clicks, times[0] if times else [0] * len(clicks), split, begin or len(clicks), place


def training_windows(data, share):
    """Return {(uid, start): clicks} of the windows of two clicks or more that are trained on."""
    users = [(uid.encode(), clicks[:end]) for uid, clicks, *_, end, _ in cut_by_hand(data, share) if end > 1]
    starts = [(uid, clicks, start) for uid, clicks in users for start in range(0, max(len(clicks) - 4, 1), 8)]
    return {(uid, start): clicks[start : start + 12] for uid, clicks, start in starts}


def batches_of(*users, max_len, monkeypatch):
    """Return the batches of (uid, clicks, times) under INDEX, with all windows of like length in one."""
    monkeypatch.setattr(script, "MIN_STEPS", 1)
    constants = CONSTANTS | {"USER_MAX_LEN": max_len}
    return list(dataset_from_clicks(histories_of(users), INDEX, constants).as_numpy_iterator())


def windows_in(batches):
    """Return the (uid, start) of every window, in order."""
    return [(uid, start) for batch in batches for uid, start in zip(batch["uid"], batch["start"], strict=True)]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], strict=True)


def test_targets_and_moments_by_hand(monkeypatch):
    # a known video, one in column 1, an unknown one in column 2, a known one in no column, one in column 1
    of_1 = ["a", "b_c1", "zzz_c2", "c", "a_c1"], [1000, 1000, 1001, 1003, 1103]
    users = ("u1", *of_1), ("u2", ["c", "b_c2", "b", "a_c9"])
    [batch] = batches_of(*users, max_len=5, monkeypatch=monkeypatch)
    found = {name: batch[name].tolist() for name in FEATURES}
    assert found["user_feature"] == [[2, 3, 1, 4, 2], [4, 3, 3, 2, 0]]
    assert found["user_column"] == [[0, 1, 2, 0, 1], [0, 2, 0, 0, 0]]
    assert found["label"] == [[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]
    assert found["target_column"] == [[1, 2, 0, 1, 0], [2, 0, 0, 0, 0]]
    assert found["user_time"] == [of_1[1], [0] * 5]
    assert found["asked"] == [[1000, 1001, 1003, 1103, 0], [0] * 5]  # the time of the next click
    assert found["user_gap"] == [[1, 1, 2, 7, 0], [0] * 5]  # 0, 1, 2 and 100 seconds
    assert found["uid"] == [b"u1", b"u2"] and found["start"] == found["repeated"] == [0, 0]
    assert {name: batch[name].dtype for name in WINDOW} == WINDOW


def test_a_gap_is_counted_in_factors_of_two_and_none_where_either_side_is_not_known():
    """Of 1 s it is 1, of 2 s and 3 s it is 2, and so on, up to 31; a moment that is not after the click counts as 1 s."""
    gaps, expected = [-5, 0, 1], [1, 1, 1]
    for power in range(1, 31):
        gaps += [2**power, 2 ** (power + 1) - 1]
        expected += [power + 1] * 2
    then = np.full(len(gaps), 2_000_000_000)
    assert gap_buckets(then, then + gaps).numpy().tolist() == expected
    assert gap_buckets(np.array([0, 9, 0]), np.array([9, 0, 0])).numpy().tolist() == [0, 0, 0]


def test_what_a_window_repeats_is_no_target_of_it_and_a_single_click_is_in_no_batch(monkeypatch):
    users = ("u", ["a_c1"] * 6 + ["b_c2"] * 4, [*range(1, 11)]), ("one", ["a_c1"]), ("none", [])
    [batch] = batches_of(*users, max_len=8, monkeypatch=monkeypatch)
    assert (batch["start"].tolist(), batch["repeated"].tolist()) == ([0, 4], [0, 4])
    assert batch["label"].tolist() == [[1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0, 0, 0]]
    assert batch["target_column"].tolist() == [[1, 1, 1, 1, 1, 2, 2, 0], [0, 0, 0, 2, 2, 0, 0, 0]]
    assert batch["user_time"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [5, 6, 7, 8, 9, 10, 0, 0]]


def test_records_and_generator_give_equal_batches(tmp_path):
    data = _clicks_like_real(40, seed=1, times=True)
    data["users"] += _clicks_like_real(80, seed=2)["users"][40:]  # without times
    data["users"] += [("long", data["users"][50][1] * 9), ("longer", data["users"][60][1] * 20), ("one", ["t0a-0"])]
    index = get_indexing(_raw(tmp_path / "raw", **data), tmp_path)
    shards = {split: tmp_path / f"tfrecord/{split}.tfrecord" for split in ("train", "val", "test")}
    made_with, path = {"constants": CONSTANTS, "held_out_share": 0}, f"{tmp_path}/raw/click_seq/clicks.json"
    part = write_windows(
        [(path, 0, math.inf)], shards, ClickEncoder(index), made_with, survey(tmp_path / "raw/click_seq")
    )
    manifest = {"shards": {"train.tfrecord": {}}, "splits": {"train": {"windows": part["counts"]["train windows"]}}}
    from_records = make_dataset(manifest, tmp_path)
    from_generator = dataset_from_clicks(histories_of(data["users"]), index, CONSTANTS)
    assert from_generator.element_spec == from_records.element_spec and from_records.element_spec.keys() == FEATURES
    assert len(from_generator) == len(from_records) > 1
    for one, other in zip(from_records.as_numpy_iterator(), from_generator.as_numpy_iterator(), strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("lengths", [[12] * 30, [13] * 30, range(60), [0, 1, 2, 3] * 20, [400, *[3] * 25]])
@pytest.mark.parametrize("positions", [1, 30, 100_000])
def test_batches_keep_within_the_positions_padded_with_zeros_and_len_is_their_number(lengths, positions, monkeypatch):
    monkeypatch.setattr(script, "MIN_STEPS", 1)
    monkeypatch.setattr(script, "BATCH_POSITIONS", positions)
    data = of_lengths(*lengths)
    dataset, windows = dataset_from_clicks(histories_of(data["users"]), INDEX, CONSTANTS), training_windows(data, 0)
    batches = list(dataset.as_numpy_iterator())
    assert len(dataset) == len(batches) and sorted(windows_in(batches)) == sorted(windows)
    for batch in batches:
        of_batch = np.array([len(windows[window]) for window in windows_in([batch])])
        number, longest = batch["user_feature"].shape
        assert longest == max(of_batch) and (number == 1 or number * longest <= positions)
        assert longest < 2 * min(of_batch)  # windows of like length
        real = np.arange(longest) < of_batch[:, None]
        for name in ("user_feature", "user_time"):
            np.testing.assert_array_equal(batch[name] > 0, real)
        for name in ("asked", "user_gap"):  # known where a click follows
            np.testing.assert_array_equal(batch[name][:, :-1] > 0, real[:, 1:])
        assert not any(batch[name][~real].any() for name in (*WINDOW, "target_column"))


def test_a_batch_has_about_the_positions_asked_for_and_windows_of_like_length(monkeypatch):
    lengths = {1: 99} | dict.fromkeys(range(2, 51), 10)  # windows of one click are no one's
    # 30, 30, 60, 120 and 250 windows of up to 4, 7, 13, 25 and 50 clicks: a 150th of the places is 110.
    assert bucket_windows(lengths) == ([4, 7, 13, 25, 50], [27, 15, 8, 4, 2], 2 + 2 + 8 + 30 + 125)
    monkeypatch.setattr(script, "BATCH_POSITIONS", 100)
    assert bucket_windows(lengths)[1:] == ([25, 14, 7, 4, 2], 2 + 3 + 9 + 30 + 125)
    assert bucket_windows({1: 9, 2: 5})[1:] == ([1, 1], 5)  # little data gets small batches


def test_an_epoch_has_every_training_window_once_in_the_order_of_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "PARSE_BLOCK", 7)
    data = of_lengths(*[(5 * i) % 41 for i in range(150)])
    manifest, _ = chain(tmp_path, data)
    assert len(manifest["shards"]) > 9

    def epoch(seed):
        dataset = make_dataset(manifest, tmp_path, seed=seed)
        batches = list(dataset.as_numpy_iterator())
        assert len(dataset) == len(batches) > 1
        return batches

    first, again, other, plain = map(epoch, (1, 1, 2, None))
    for one, two in zip(first, again, strict=True):
        assert_equal(one, two)
    orders = [windows_in(batches) for batches in (first, other, plain)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    expected = sorted(training_windows(data, manifest["held_out_share"]))
    assert len(expected) > 100 and list(map(sorted, orders)) == [expected] * 3


@pytest.mark.parametrize("timed", [False, True], ids=["without times", "with times"])
def test_a_held_out_history_is_what_serving_would_read_before_the_visit(tmp_path, monkeypatch, timed):
    monkeypatch.setattr(script, "PARSE_BLOCK", 5)
    data = of_lengths(*[(5 * i) % 71 for i in range(100)])
    data["users"] = [user if timed else user[:2] for user in data["users"]]
    manifest, index = chain(tmp_path, data)
    columns, expected, later = {"c1": 1, "c2": 2}, {"val": {}, "test": {}}, 0
    for uid, clicks, times, split, begin, place in cut_by_hand(data, manifest["held_out_share"]):
        if place is not None:
            read = [click.partition("_") for click in clicks[:begin]][-12:]
            numbers = [[index.videos.get(vid, UNKNOWN) for vid, *_ in read], [columns.get(cid, 0) for *_, cid in read]]
            lists = [of + [0] * (12 - begin) for of in (*numbers, times[:begin][-12:])]
            target = columns[clicks[place].partition("_")[2]]
            expected[split][uid.encode()] = (*lists, times[begin], target, begin)
            later += begin < place
    assert (later > 0) == timed  # a visit may begin with clicks in no column
    names = ("user_feature", "user_column", "user_time", "now", "target_column", "history")
    for split, of_split in expected.items():
        found = held_out(manifest, split, tmp_path)
        rows = zip(*(found[name].tolist() for name in names), strict=True)
        assert len(found["uid"]) == len(of_split) > 10
        assert dict(zip(found["uid"].tolist(), rows, strict=True)) == of_split
        assert found["history"].tolist() == sorted(found["history"])


def test_a_column_shows_its_most_clicked_videos_and_ties_go_by_shelf_order():
    index = Index({}, {"c1": [7, 2, 5, 3, 4], "c2": [], "c3": [6, 2]})
    clicks = np.array([99, 99, 3, 0, 8, 3, 1, 3])  # of the videos 2 to 7: 3 0 8 3 1 3
    table = column_table(index, clicks, max_len=3)
    assert table.tolist() == [[0, 0, 0], [4, 7, 2], [0, 0, 0], [2, 6, 0]] and table.dtype == np.int32
    assert column_table(index, clicks, max_len=9).tolist()[1] == [4, 7, 2, 5, 3]


def test_a_video_is_known_by_the_columns_that_show_it_and_others_those_of_fewest_videos_first():
    index = Index(dict.fromkeys("abcd"), {"c1": [2, 3, 4], "c2": [], "c3": [4], "c4": [4, 2], "c5": [2, 4]})
    table = shelves_table(index, max_len=3)
    assert table.tolist() == [[0] * 3, [0] * 3, [4, 5, 1], [1, 0, 0], [4, 5, 1], [0] * 3] and table.dtype == np.int32
    assert shelves_table(index, max_len=1, num_columns=3).tolist() == [[0], [0], [1], [1], [1], [0]]


CLICKED = [*range(1, 7), *range(8, 40)]  # of 40 columns, 7 and 40 have no click


def drawn_batches(num_batches, seed=5):
    """Return (batches with candidates, targets [batches, 6, 2, 2]), most in columns 1 and 2; column n holds n + 1 and n + 2."""
    column_videos = np.array([[0, 0], *([n + 1, n + 2] for n in range(1, 41))], np.int32)
    rng, shape = np.random.default_rng(1), [num_batches, 6, 2, 2]
    targets = np.where(rng.random(shape) < 0.7, rng.integers(1, 3, shape), rng.choice(CLICKED, shape))
    targets[:, 1, 1], targets[:, 2, :, 1] = 0, 0  # places without a target, and targets with nothing after them
    batches = tf.data.Dataset.from_tensor_slices({"target_column": targets.astype(np.int32)})
    clicks = np.isin(np.arange(41), CLICKED) * 3.0
    return list(add_candidates(batches, column_videos, clicks, seed).as_numpy_iterator()), targets


@pytest.mark.parametrize(("limit", "number"), [(37, 6), (38, 38)], ids=["drawn", "all"])
def test_candidates_are_all_clicked_columns_or_fresh_draws_of_them_after_the_targets(monkeypatch, limit, number):
    monkeypatch.setattr(script, "MAX_CANDIDATES", limit)
    monkeypatch.setattr(script, "NUM_NEGATIVES", 6)
    (batches, targets), (again, _), (others, _) = (drawn_batches(50, seed) for seed in (5, 5, 6))
    drawn, of_others = ([tuple(batch["item_column"][-number:].tolist()) for batch in of] for of in (batches, others))
    for batch, same, of_batch, candidates in zip(batches, again, targets, drawn, strict=True):
        assert_equal(batch, same)
        columns = batch["item_column"]
        assert sorted(columns[:-number].tolist()) == ([] if number == 38 else np.unique(of_batch).tolist())
        assert candidates == tuple(sorted({*candidates} & {*CLICKED})) and len(candidates) == number
        assert batch["item_log_prob"].tolist() == [np.float32(np.log(number / 38))] * number
        shown = np.where(columns[:, None] > 0, np.stack([columns + 1, columns + 2], 1), 0)
        np.testing.assert_array_equal(batch["item_feature"], shown)
        np.testing.assert_array_equal(columns[batch["target_item"]][of_batch > 0], of_batch[of_batch > 0])
    assert (drawn != of_others and len(set(drawn)) > 45) == (number == 6)


@pytest.mark.parametrize(("limit", "number"), [(1, 5), (4096, 12)], ids=["drawn", "all"])
def test_a_column_not_clicked_in_the_training_records_is_no_candidate(tmp_path, monkeypatch, limit, number):
    """End to end, as train.py makes its batches: one column has no click at all, one only clicks that are held out."""
    monkeypatch.setattr(script, "MAX_CANDIDATES", limit)
    monkeypatch.setattr(script, "NUM_NEGATIVES", 5)
    data = _clicks_like_real(80, seed=6)
    data["columns"] = {"never": ["t0a-0", "t0b-0"], **data["columns"], "held": ["t0a-1"]}
    cut = cut_by_hand(data, 0.125)
    data["users"] = [(uid, [*clicks, *["t0a-1_held"] * (split == "test")]) for uid, clicks, _, split, *_ in cut]
    manifest, index = chain(tmp_path, data)
    assert manifest["held_out_share"] > 0.1 and 14 in held_out(manifest, "test", tmp_path)["target_column"]
    memory = Memory(count_windows(manifest, ["train"], tmp_path, 1), index)
    batches = list(epoch_batches(manifest, index, tmp_path, memory, 1, 1).as_numpy_iterator())
    assert len(batches) > 20 and all(len(batch["item_log_prob"]) == number for batch in batches)
    seen = set(np.concatenate([batch["item_column"] for batch in batches]).tolist())
    assert seen - {0} == set(range(2, 14))  # of 1 to 14


def test_every_column_is_drawn_as_often_as_its_log_prob_says(monkeypatch):
    """In test_model_tf2.py the loss over such draws is that over all columns in expectation."""
    monkeypatch.setattr(script, "MAX_CANDIDATES", 30)
    monkeypatch.setattr(script, "NUM_NEGATIVES", 6)
    batches, _ = drawn_batches(4000)
    times = sum(np.bincount(batch["item_column"][-6:], minlength=41) for batch in batches)[CLICKED]
    expected = 4000 * np.exp(batches[0]["item_log_prob"][0])
    assert (abs(times - expected) < 5 * np.sqrt(expected * (1 - 6 / 38))).all()


@pytest.mark.parametrize(("sample", "positions"), [(4, 17), (9, 17), (4, 18)])
def test_a_step_reads_the_first_video_of_each_column_and_random_others(monkeypatch, sample, positions):
    """Of shelves of 9 places 4, each but the first as often; all, where they are no more than that or than a batch's clicks."""
    monkeypatch.setattr(script, "ITEM_SAMPLE", sample)
    monkeypatch.setattr(script, "BATCH_POSITIONS", positions)
    shelf, dataset = np.arange(27).reshape(3, 9), tf.data.Dataset.from_tensors({"target_column": [[1, 2]]})
    batches = add_candidates(dataset.repeat(300), shelf, [0, 1, 1], seed=5)
    drawn = np.array([batch["item_feature"] for batch in batches.as_numpy_iterator()])
    assert np.array_equal(drawn[:, 1], drawn[:, 0] + 9)
    number, share = drawn.shape[2], (drawn.shape[2] - 1) / 8
    assert number == (4 if (sample, positions) == (4, 17) else 9)
    times = np.bincount(drawn[:, 0].ravel() - 9, minlength=9)
    assert times[0] == 300 and times.max() == 300 and times.sum() == 300 * number
    assert np.abs(times[1:] - 300 * share).max() <= 4 * (300 * share * (1 - share)) ** 0.5


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """(manifest, index, work folder, whole histories, those of which training may know): clicks as (video, column, day)."""
    folder, rng = tmp_path_factory.mktemp("counted"), random.Random(12)
    columns = {f"c{i}": [f"v{i}{k}" for k in range(4)] + ["v00"] for i in range(4)} | {"gone": ["v01"], "never": ["w"]}
    pool = [(v, c) for c, vids in columns.items() if c != "never" for v in (*vids, "v11", "unheard", "w")]
    users = enumerate(of_lengths(*[(7 * u) % 71 for u in range(60)])["users"])
    drawn = ((u, uid, enumerate(rng.choices(pool, k=len(times))), times) for u, (uid, _, times) in users)
    users = [(uid, [v + f"_{c}" * (i % 3 > 0) for i, (v, c) in of], times)[: 2 + u % 2] for u, uid, of, times in drawn]
    get_indexing(_raw(folder / "raw", columns=columns, users=users), folder)
    del columns["gone"]  # it was clicked and is retired
    index = get_indexing(_raw(folder / "raw", columns=columns), folder)
    manifest = get_tfrecord(folder / "raw", folder, 1, **CONSTANTS)
    assert len(manifest["shards"]) >= 3 * 3
    numbers, whole, trained_on = [None, *index.columns], [], []
    for _, clicks, times, _, end, _ in cut_by_hand({"columns": columns, "users": users}, manifest["held_out_share"]):
        parts = [(click.partition("_"), time // DAY) for click, time in zip(clicks, times, strict=True)]
        videos = [(index.videos.get(vid, UNKNOWN), numbers.index(cid or None), day) for (vid, _, cid), day in parts]
        whole.append(videos)
        trained_on.append(videos[:end])
    return manifest, index, folder, whole, trained_on


def brute_counts(histories):
    """[{(row, column): sum}] of clicks, near, follows and daily, over whole histories; pairs up to 4 clicks apart."""
    clicks, near, follows, daily = (Counter() for _ in range(4))
    for history in histories:
        clicks.update((video, column) for video, column, _ in history)
        daily.update((day, column) for _, column, day in history if day and column)
        follows.update(itertools.pairwise(column for _, column, _ in history if column))
        for i, j in itertools.combinations(range(len(history)), 2):
            if j - i <= 4:
                for at, by, weight in ((i, j, 1.0), (j, i, BACKWARD)):
                    if history[at][0] != UNKNOWN and history[by][1]:
                        near[history[at][0], history[by][1]] += weight * NEAR_DECAY ** (j - i - 1)
    return [clicks, near, follows, daily]


def as_sums(counts):
    """Counts -> [{(row, column): sum}], in the order of rows and columns."""
    sums = [{(row, column): value for row, column, value in zip(*pairs, strict=True)} for pairs in counts]
    assert all(list(of) == sorted(of) and len(of) == len(pairs.rows) for of, pairs in zip(sums, counts, strict=True))
    return sums


@pytest.mark.parametrize("cut", [{}, dict(COUNT_BLOCK=7, MAX_PAIRS=40), dict(COUNT_BYTES=1, MAX_PAIRS=1)])
def test_what_overlapping_windows_count_is_what_the_histories_hold_once_however_it_is_cut(counted, monkeypatch, cut):
    """Of all splits it is every click of everybody. There is room for all columns of a video, however often tables merge."""
    manifest, _, folder, whole, trained_on = counted
    for name, value in cut.items():
        monkeypatch.setattr(script, name, value)
    splits, histories = (["train", "val", "test"], whole) if "COUNT_BLOCK" in cut else (["train"], trained_on)
    expected = brute_counts(histories)
    assert all(len(sums) > 5 for sums in expected)
    counts = count_windows(manifest, splits, folder, num_workers=1)
    assert as_sums(counts) == list(map(pytest.approx, expected))


@pytest.mark.parametrize("bounds", [dict(MAX_WIDTH=2, MAX_PAIRS=50), dict(MEMORY_WIDTH=2)])
def test_a_bounded_table_keeps_totals_exact_and_the_strongest_columns(counted, monkeypatch, bounds):
    manifest, _, folder, _, trained_on = counted
    for name, value in bounds.items():
        monkeypatch.setattr(script, name, value)
    clicks, near, *others = as_sums(count_windows(manifest, ["train"], folder, 1))
    expected = brute_counts(trained_on)
    assert [clicks, *others] == [expected[0], *expected[2:]] and len(near) < len(expected[1])
    for video in {video for video, _ in expected[1]}:
        full, kept = ([sums.get((video, column), 0) for column in range(7)] for sums in (expected[1], near))
        assert [sum(kept), *sorted(kept[1:])] == pytest.approx([sum(full), 0, 0, 0, 0, *sorted(full)[-2:]])


@pytest.fixture
def made(tmp_path):
    """The (manifest, index) of a small chain."""
    return chain(tmp_path, _clicks_like_real(40, seed=4))


@pytest.mark.parametrize("name", ["train-*", "test-*", "manifest.json"])
def test_a_missing_or_damaged_file_is_named_with_the_script_to_run(tmp_path, made, name):
    (path,) = list((tmp_path / "tfrecord").glob(name))[:1]
    whole = path.read_bytes()
    for damage in (lambda: path.write_bytes(whole[:-1]), lambda: path.write_bytes(whole + b"x"), path.unlink):
        damage()
        with pytest.raises((InputError, FileNotFoundError), match=rf"{path}: .*run get_tfrecord\.py (again|first)"):
            load_manifest(tmp_path, CONSTANTS)


@pytest.mark.parametrize("change", [{"new": [2]}, {"t0b": []}], ids=["grown", "a column retired"])
def test_records_that_are_older_than_the_index_are_refused(tmp_path, made, change):
    write_json(tmp_path / "indexing/cid2vidx.json", made[1].columns | change)
    with pytest.raises(InputError, match=r"manifest\.json: made with index = .*; run get_tfrecord\.py again"):
        load_manifest(tmp_path, CONSTANTS)


def test_records_of_another_format_or_other_constants_are_refused_naming_values_and_script(tmp_path, made, monkeypatch):
    for name, was in CONSTANTS.items():
        message = rf"manifest\.json: made with {name} = {was}, now it is {was + 1}; run get_tfrecord\.py again"
        with pytest.raises(InputError, match=message):
            load_manifest(tmp_path, CONSTANTS | {name: was + 1})
    with pytest.raises(InputError, match=r"made with USER_MAX_LEN = 12, now it is 50"):  # of the scripts
        load_manifest(tmp_path)
    monkeypatch.setattr(script, "FORMAT", 99)
    with pytest.raises(InputError, match=r"made with format = \d+, now it is 99; run get_tfrecord\.py again"):
        load_manifest(tmp_path, CONSTANTS)
