"""get_dataset.py: equal batches with and without files, right targets, honest sampling, exact counts."""

import collections
import functools

import numpy as np
import pytest
import tensorflow as tf

import get_dataset as script
import get_tfrecord as records_script
from get_dataset import (
    PairCounter,
    add_candidates,
    batch_windows,
    bucket_windows,
    column_table,
    dataset_from_clicks,
    first_seen,
    load_manifest,
    make_dataset,
)
from get_indexing import Index, InputError, file_ranges, get_indexing
from get_tfrecord import get_tfrecord, split_of

SHORT = dict(user_max_len=12, window_overlap=4, val_ratio=0.3, test_ratio=0.3, num_workers=1)
INDEX = Index({"a": 2, "b": 3, "c": 4}, {"c1": [2, 3], "c2": [4]})
FEATURES = {
    "user_feature": np.int32,
    "user_column": np.int32,
    "target_video": np.int32,
    "target_column": np.int32,
    "label": np.float32,
}


@pytest.fixture
def chain(tmp_path, raw):
    """A function that runs the chain up to the records on raw data and returns what load_manifest() does."""

    def run(data, **arguments):
        raw(tmp_path / "raw", **data)
        get_indexing(tmp_path / "raw", tmp_path, min_clicks=1)
        get_tfrecord(tmp_path / "raw", tmp_path, **{**SHORT, **arguments})
        return load_manifest(tmp_path, SHORT["user_max_len"])

    return run


@pytest.fixture
def many_shards(monkeypatch):
    """Cut the input into ranges of 2000 bytes."""
    monkeypatch.setattr(records_script, "file_ranges", functools.partial(file_ranges, range_bytes=2000))


def of_lengths(*lengths):
    """Return raw data of users with so many clicks."""
    clicks = ["a_c1", "b", "x_c2", "c_c2", "b_c1"]
    users = [(f"u{u}", [clicks[(u + i * i) % 5] for i in range(n)]) for u, n in enumerate(lengths)]
    return {"columns": {"c1": ["a", "b"], "c2": ["c"]}, "users": users}


def batches_of(*users, bounds=(8,), sizes=(100,), max_len=8):
    """Return the batches of (uid, clicks) under INDEX."""
    constants = dict(USER_MAX_LEN=max_len, WINDOW_OVERLAP=4, MIN_HISTORY=1)
    windows = dataset_from_clicks(users, INDEX, constants)
    return list(batch_windows(windows, bounds, sizes).as_numpy_iterator())


def windows_in(batches):
    """Return the (uid, start) of every window, in order."""
    return [(uid, start) for batch in batches for uid, start in zip(batch["uid"], batch["start"], strict=True)]


# ---------------------------------------------------------------- batches


def test_targets_by_hand():
    # a known video, one in column 1, an unknown one in column 2, a known one in no column, one in column 1
    [batch] = batches_of(("u1", ["a", "b_c1", "zzz_c2", "c", "a_c1"]), ("u2", ["c", "b_c2", "b"]))
    assert batch["user_feature"].tolist() == [[2, 3, 1, 4, 2], [4, 3, 3, 0, 0]]
    assert batch["user_column"].tolist() == [[0, 1, 2, 0, 1], [0, 2, 0, 0, 0]]
    assert batch["target_video"].tolist() == [[3, 1, 4, 2, 0], [3, 3, 0, 0, 0]]
    assert batch["target_column"].tolist() == [[1, 2, 0, 1, 0], [2, 0, 0, 0, 0]]
    assert batch["label"].tolist() == [[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]
    assert batch["uid"].tolist() == [b"u1", b"u2"] and batch["start"].tolist() == [0, 0]
    assert {name: batch[name].dtype.type for name in FEATURES} == FEATURES


def test_a_repeated_target_is_no_target_of_the_second_window():
    clicks = ["a_c1"] * 6 + ["b_c2"] * 4
    [batch] = batches_of(("u", clicks), max_len=8)
    assert batch["start"].tolist() == [0, 4]
    assert batch["label"].tolist() == [[1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0, 0, 0]]
    assert batch["target_column"].tolist() == [[1, 1, 1, 1, 1, 2, 2, 0], [0, 0, 0, 2, 2, 0, 0, 0]]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_records_and_generator_give_equal_batches(tmp_path, chain, clicks_like_real, split):
    data = clicks_like_real(80, seed=1)
    data["users"] += [("long", data["users"][0][1] * 9), ("longer", data["users"][1][1] * 20)]
    manifest, index = chain(data)
    users = [user for user in data["users"] if split_of(user[0], 0.3, 0.3) == split]
    bounds, sizes, _ = bucket_windows(manifest["splits"][split]["windows"])
    from_generator = batch_windows(dataset_from_clicks(users, index, manifest["constants"]), bounds, sizes)
    from_records = make_dataset(manifest, split, tmp_path)
    assert from_generator.element_spec == from_records.element_spec
    count = 0
    for one, other in zip(from_records.as_numpy_iterator(), from_generator.as_numpy_iterator(), strict=True):
        assert one.keys() == other.keys() == {*FEATURES, "uid", "start"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], strict=True)
        count += 1
    assert count > 1


def test_padding_is_zero_and_no_longer_than_the_longest_window_of_the_batch(tmp_path, chain):
    data = of_lengths(*range(40), *range(2, 30))
    manifest, _ = chain(data)
    lengths = {(uid.encode(), s): min(12, len(c) - s) for uid, c in data["users"] for s in range(0, len(c), 8)}
    shapes = set()
    for batch in make_dataset(manifest, "train", tmp_path, seed=1, batch_positions=48).as_numpy_iterator():
        expected = np.array([lengths[window] for window in windows_in([batch])])
        shapes.add(batch["user_feature"].shape)
        assert batch["user_feature"].shape[1] == expected.max()
        real = np.arange(expected.max()) < expected[:, None]
        np.testing.assert_array_equal(batch["user_feature"] > 0, real)
        for name in FEATURES:
            assert not batch[name][~real].any()
        following = np.arange(expected.max()) < expected[:, None] - 1
        np.testing.assert_array_equal(batch["target_video"] > 0, following)
        np.testing.assert_array_equal(batch["target_column"] > 0, batch["label"] > 0)
    assert len(shapes) > 3


@pytest.mark.parametrize(
    "lengths",
    [[2] * 30, [12] * 30, [13] * 30, range(60), [0, 1, 2] * 20, [400, *[3] * 25]],
    ids=["two", "full", "one over", "all", "tiny", "one giant"],
)
def test_the_number_of_batches_is_known_without_a_pass(tmp_path, chain, lengths):
    manifest, _ = chain(of_lengths(*lengths))
    for split, seed, batch_positions in [("train", None, None), ("train", 3, 30), ("val", None, 100_000)]:
        dataset = make_dataset(manifest, split, tmp_path, seed, batch_positions)
        batches = list(dataset.as_numpy_iterator())
        assert len(dataset) == len(batches) > 0
        assert len(windows_in(batches)) == sum(manifest["splits"][split]["windows"])
    # Without assert_cardinality(), which has its own opinion about a wrong number.
    users = [(f"u{u}", ["a"] * n) for u, n in enumerate(lengths) if split_of(f"u{u}", 0.3, 0.3) == "train"]
    windows = dataset_from_clicks(users, INDEX, manifest["constants"])
    for batch_positions in (1, 30):
        bounds, sizes, steps = bucket_windows(manifest["splits"]["train"]["windows"], batch_positions)
        assert sum(1 for _ in batch_windows(windows, bounds, sizes)) == steps


def test_a_batch_has_about_the_positions_asked_for_and_windows_of_like_length():
    lengths = [0, 0, *[10] * 49]  # ten windows of each length from 2 to 50
    bounds, sizes, steps = bucket_windows(lengths, batch_positions=200)
    assert (bounds, sizes) == ([4, 7, 13, 25, 50], [50, 28, 15, 8, 4])
    assert steps == 1 + 2 + 4 + 15 + 63  # 30 / 50, 30 / 28, 60 / 15, 120 / 8 and 250 / 4, rounded up
    assert bucket_windows([0, 0, 5])[2] == 5  # little data gets small batches


def test_the_same_seed_gives_the_same_batches_and_another_another_order(tmp_path, chain, clicks_like_real, many_shards):
    manifest, _ = chain(clicks_like_real(150, seed=2))
    assert len(manifest["shards"]) > 9

    def epoch(seed):
        return list(make_dataset(manifest, "train", tmp_path, seed=seed).as_numpy_iterator())

    first, again, other, plain = epoch(1), epoch(1), epoch(2), epoch(None)
    for one, two in zip(first, again, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
    assert windows_in(first) != windows_in(other)
    assert windows_in(plain) == windows_in(epoch(None)) != windows_in(first)
    assert sorted(windows_in(first)) == sorted(windows_in(other)) == sorted(windows_in(plain))


def test_every_window_comes_once_in_a_shuffled_epoch(tmp_path, chain, many_shards, monkeypatch):
    monkeypatch.setattr(script, "PARSE_BLOCK", 7)
    data = of_lengths(*[(5 * i) % 41 for i in range(150)])
    manifest, _ = chain(data)
    expected = [
        (uid.encode(), start)
        for uid, clicks in data["users"]
        if split_of(uid, 0.3, 0.3) == "train"
        for start in range(0, len(clicks), 8)
        if len(clicks) > 1 and (start == 0 or len(clicks) > start + 4)
    ]
    windows = windows_in(make_dataset(manifest, "train", tmp_path, seed=1).as_numpy_iterator())
    assert len(expected) > 100 and windows != expected
    assert sorted(windows) == sorted(expected)


def test_no_batch_of_one_split_holds_a_user_of_another(tmp_path, chain, clicks_like_real):
    data = clicks_like_real(60, seed=3)
    manifest, _ = chain(data)
    users = {
        split: {uid for uid, _ in windows_in(make_dataset(manifest, split, tmp_path).as_numpy_iterator())}
        for split in ("train", "val", "test")
    }
    assert sum(map(len, users.values())) == len(set.union(*users.values())) == 60


# ---------------------------------------------------------------- the column side


def test_a_column_shows_its_most_clicked_videos_and_ties_go_by_shelf_order():
    index = Index({}, {"c1": [7, 2, 5, 3, 4], "c2": [], "c3": [6, 2]})
    clicks = np.array([99, 99, 3, 0, 8, 3, 1, 3])  # of the videos 2 to 7: 3 0 8 3 1 3
    assert column_table(index, clicks, max_len=3).tolist() == [[0, 0, 0], [4, 7, 2], [0, 0, 0], [2, 6, 0]]
    assert column_table(index, clicks, max_len=9).tolist()[1] == [4, 7, 2, 5, 3]


def test_a_video_newer_than_the_counts_has_no_clicks():
    index = Index({}, {"c1": [9, 2, 8, 3], "c2": [100]})
    table = column_table(index, np.array([99, 99, 0, 5]), max_len=3)
    assert table.tolist() == [[0, 0, 0], [3, 9, 2], [100, 0, 0]]
    assert table.dtype == np.int32


def columns_to_draw(num_columns):
    """Return (column_videos, column_clicks): column n holds the videos n + 1 and n + 2 and was clicked unevenly."""
    column_videos = np.array([[0, 0], *([n + 1, n + 2] for n in range(1, num_columns + 1))], np.int32)
    clicks = np.array([0, *((n * n) % 17 for n in range(1, num_columns + 1))], float)  # some are never clicked
    return column_videos, clicks


def drawn_batches(num_batches, num_columns, targets_in_batch):
    """Return (batches with candidates, popularity [columns]); targets are drawn by popularity."""
    column_videos, clicks = columns_to_draw(num_columns)
    popularity = clicks[1:] / clicks.sum()
    rng = np.random.default_rng(1)
    targets = 1 + rng.choice(num_columns, [num_batches, targets_in_batch, 1], p=popularity)
    targets = np.concatenate([targets, np.zeros_like(targets)], axis=2).astype(np.int32)  # a place without a target
    batches = tf.data.Dataset.from_tensor_slices({"target_column": targets, "label": (targets > 0).astype(np.float32)})
    batches = add_candidates(batches, column_videos, clicks, num_videos=num_columns + 1, seed=5)
    return list(batches.as_numpy_iterator()), popularity


def test_all_columns_are_candidates_where_they_fit(monkeypatch):
    monkeypatch.setattr(script, "MAX_CANDIDATES", 40)
    batches, _ = drawn_batches(3, num_columns=40, targets_in_batch=4)
    for batch in batches:
        assert batch["item_column"].tolist() == list(range(1, 41))
        assert batch["item_feature"].tolist() == [[n + 1, n + 2] for n in range(1, 41)]
        assert batch["item_log_prob"].tolist() == [0.0] * 40
    assert [batch[name].dtype for name in ("item_column", "item_feature", "item_log_prob", "negative_video")] == [
        np.int32, np.int32, np.float32, np.int32,
    ]  # fmt: skip


def test_of_more_columns_the_batch_s_own_and_random_ones_are_candidates(monkeypatch):
    monkeypatch.setattr(script, "MAX_CANDIDATES", 39)
    monkeypatch.setattr(script, "NUM_NEGATIVES", 6)
    batches, _ = drawn_batches(50, num_columns=40, targets_in_batch=5)
    drawn = set()
    for batch in batches:
        candidates = batch["item_column"].tolist()
        own = set(batch["target_column"].ravel().tolist()) - {0}
        assert candidates == sorted(set(candidates)) and own <= set(candidates)
        assert min(candidates) >= 1 and max(candidates) <= 40
        assert len(candidates) <= len(own) + 6
        assert batch["item_feature"].tolist() == [[n + 1, n + 2] for n in candidates]
        drawn.add(tuple(set(candidates) - own))
    assert len(drawn) > 40  # fresh ones for every batch


def test_log_prob_is_the_probability_of_being_a_candidate(monkeypatch):
    monkeypatch.setattr(script, "MAX_CANDIDATES", 30)
    monkeypatch.setattr(script, "NUM_NEGATIVES", 6)
    batches, popularity = drawn_batches(4000, num_columns=40, targets_in_batch=5)
    probability = 1 - (1 - popularity) ** 5 * (1 - 1 / 40) ** 6
    times = np.zeros(40)
    for batch in batches:
        times[batch["item_column"] - 1] += 1
        np.testing.assert_allclose(np.exp(batch["item_log_prob"]), probability[batch["item_column"] - 1], rtol=1e-4)
    deviation = np.sqrt(4000 * probability * (1 - probability))
    assert (abs(times - 4000 * probability) < 5 * deviation).all()


def test_the_correction_makes_the_candidates_sum_stand_for_the_sum_over_all_columns(monkeypatch):
    monkeypatch.setattr(script, "MAX_CANDIDATES", 30)
    monkeypatch.setattr(script, "NUM_NEGATIVES", 6)
    batches, _ = drawn_batches(4000, num_columns=40, targets_in_batch=5)
    x = np.exp(np.random.default_rng(2).normal(size=41))
    sums = [np.sum(x[batch["item_column"]] / np.exp(batch["item_log_prob"])) for batch in batches]
    error = np.std(sums) / np.sqrt(len(sums))
    assert error < 0.01 * x[1:].sum()
    assert abs(np.mean(sums) - x[1:].sum()) < 4 * error


def test_random_videos_are_real_ones_and_all_come_up(monkeypatch):
    monkeypatch.setattr(script, "NUM_NEGATIVES", 64)
    batches, _ = drawn_batches(40, num_columns=10, targets_in_batch=2)
    drawn = np.array([batch["negative_video"] for batch in batches])
    assert drawn.shape == (40, 64)
    assert set(drawn.ravel().tolist()) == set(range(2, 13))  # 11 videos count from 2
    assert len({tuple(row) for row in drawn.tolist()}) == 40


def test_the_same_seed_draws_the_same_candidates(monkeypatch):
    monkeypatch.setattr(script, "MAX_CANDIDATES", 30)
    monkeypatch.setattr(script, "NUM_NEGATIVES", 6)
    (one, _), (two, _) = (drawn_batches(20, num_columns=40, targets_in_batch=3) for _ in range(2))
    for first, second in zip(one, two, strict=True):
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


# ---------------------------------------------------------------- counting


def random_pairs(num_rows, num_columns, batches, size, seed=3):
    """Return [(rows, columns, weight)] and the same as a dense matrix [rows, columns], added up one by one."""
    rng, counts, pairs = np.random.default_rng(seed), collections.Counter(), []
    for _ in range(batches):
        rows = rng.integers(0, num_rows, size) ** 2 // num_rows
        columns = 1 + rng.integers(0, num_columns, size)
        pairs.append((rows.astype(np.int32), columns.astype(np.int32), float(rng.integers(1, 9)) / 4))
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            counts[row, column] += pairs[-1][2]
    dense = np.zeros([num_rows, num_columns])
    for (row, column), value in counts.items():
        dense[row, column - 1] = value
    return pairs, dense


@pytest.mark.parametrize("merge_pairs", [10, 10_000])
def test_pair_counts_equal_a_count_one_by_one(monkeypatch, merge_pairs):
    monkeypatch.setattr(script, "MERGE_PAIRS", merge_pairs)
    pairs, dense = random_pairs(20, 9, batches=30, size=25)
    counter = PairCounter(20, 9, width=9)
    for rows, columns, weight in pairs:
        counter.add(rows, columns, weight)
    table = counter.table()
    rows, columns = table.pairs()
    found = {(r, c): v for r, c, v in zip(rows.tolist(), columns.tolist(), table.values.tolist(), strict=True)}
    assert found == {(r, c + 1): dense[r, c] for r, c in zip(*np.nonzero(dense), strict=True)}
    assert (np.diff(table.keys) > 0).all()
    np.testing.assert_array_equal(table.totals, dense.sum(axis=1))


def test_the_width_keeps_the_strongest_of_each_row_and_the_totals_count_all():
    pairs, dense = random_pairs(20, 9, batches=30, size=25)
    counter = PairCounter(20, 9, width=3)
    for rows, columns, weight in pairs:
        counter.add(rows, columns, weight)
    table = counter.table()
    rows, _ = table.pairs()
    for row in range(20):
        expected = sorted(dense[row][dense[row] > 0])[::-1][:3]
        assert sorted(table.values[rows == row])[::-1] == expected
    np.testing.assert_array_equal(table.totals, dense.sum(axis=1))


def test_a_counter_goes_on_after_its_table_was_taken():
    pairs, dense = random_pairs(20, 9, batches=4, size=25)
    counter = PairCounter(20, 9, width=9)
    for rows, columns, weight in pairs:
        counter.add(rows, columns, weight)
        table = counter.table()
    assert table.values.sum() == dense.sum()


def test_nothing_counted_is_an_empty_table():
    table = PairCounter(5, 3, width=2).table()
    assert table.totals.tolist() == [0] * 5 and len(table.keys) == len(table.values) == 0
    assert table.weighted_rows(np.array([[0, 4]]), np.ones([1, 2])).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("matrix_size", [0, 1000], ids=["sparse", "as a matrix"])
def test_weighted_rows_equal_the_dense_matrix_product(monkeypatch, matrix_size):
    monkeypatch.setattr(script, "MATRIX_SIZE", matrix_size)
    pairs, dense = random_pairs(20, 9, batches=3, size=25)
    counter = PairCounter(20, 9, width=9)
    for rows, columns, weight in pairs:
        counter.add(rows, columns, weight)
    rng = np.random.default_rng(4)
    rows, weights = rng.integers(0, 20, [13, 6]), rng.normal(size=[13, 6])
    rows[0], weights[1] = 19, 0.0  # one row again and again; no weight at all
    expected = np.array(
        [sum(w * dense[row] for row, w in zip(*line, strict=True)) for line in zip(rows, weights, strict=True)]
    )
    assert (counter.table().matrix is None) == (matrix_size == 0)
    found = counter.table().weighted_rows(rows, weights)
    assert found.shape == (13, 9) and found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert counter.table().weighted_rows(rows[:0], weights[:0]).shape == (0, 9)


def test_every_click_of_a_long_history_is_new_in_just_one_window(tmp_path, chain):
    data = of_lengths(*[(i * 13) % 70 for i in range(60)])
    manifest, index = chain(data)
    of_column = {None: 0, "c1": 1, "c2": 2}
    for split in ("train", "val"):
        expected = collections.Counter()
        for uid, clicks in data["users"]:
            if split_of(uid, 0.3, 0.3) == split and len(clicks) > 1:
                pairs = [(click.split("_") + [None])[:2] for click in clicks]
                expected.update((index.videos[vid], of_column[cid]) for vid, cid in pairs)
        found = collections.Counter()
        for videos, columns, new in first_seen(manifest, split, tmp_path):
            found.update(zip(videos[new].tolist(), columns[new].tolist(), strict=True))
        assert sum(found.values()) > 300 and found == expected


# ---------------------------------------------------------------- refusals


@pytest.fixture
def made(chain, clicks_like_real):
    """The (manifest, index) of a small chain."""
    return chain(clicks_like_real(40, seed=4))


def test_records_of_another_index_are_refused_naming_both_files_and_the_script(tmp_path, made):
    (tmp_path / "indexing/vid2idx.json").unlink()
    (tmp_path / "indexing/cid2vidx.json").unlink()
    (tmp_path / "raw/cid2vids.json").write_text('{"cid": "c1", "vids": ["t0a-0"]}')
    get_indexing(tmp_path / "raw", tmp_path)
    with pytest.raises(InputError) as error:
        load_manifest(tmp_path, SHORT["user_max_len"])
    for part in (f"{tmp_path}/tfrecord/manifest.json", "indexing/vid2idx.json", "get_tfrecord.py"):
        assert part in str(error.value)


def test_columns_in_another_order_are_another_index(tmp_path, made):
    path = tmp_path / "indexing/cid2vidx.json"
    text = path.read_text()
    path.write_text(text.replace("t0a", "t0X").replace("t0b", "t0a").replace("t0X", "t0b"))
    with pytest.raises(InputError, match=r"manifest\.json was made with another index"):
        load_manifest(tmp_path, SHORT["user_max_len"])


def test_a_grown_index_is_no_mismatch(tmp_path, raw, made):
    _, before = made
    raw(tmp_path / "raw", columns={"new": ["newer"], **{cid: [] for cid in before.columns}})
    get_indexing(tmp_path / "raw", tmp_path)
    _, index = load_manifest(tmp_path, SHORT["user_max_len"])
    assert len(index.columns) == len(before.columns) + 1 and "newer" in index.videos


@pytest.mark.parametrize("damage", ["gone", "cut", "longer"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_or_damaged_shard_is_named_with_the_script_to_run(tmp_path, made, damage, split):
    shard = next((tmp_path / "tfrecord").glob(f"{split}-*"))
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1] if damage == "cut" else shard.read_bytes() + b"x")
    with pytest.raises(InputError, match=rf"{shard}: .*run get_tfrecord\.py again"):
        load_manifest(tmp_path, SHORT["user_max_len"])


def test_a_missing_manifest_names_its_absolute_path_and_the_script(tmp_path, made, monkeypatch):
    (tmp_path / "tfrecord/manifest.json").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/tfrecord/manifest\.json.*run get_tfrecord\.py first"):
        load_manifest(".")


def test_records_of_another_format_are_refused(tmp_path, made, monkeypatch):
    monkeypatch.setattr(script, "FORMAT", 99)
    with pytest.raises(InputError, match=r"manifest\.json: format 1, not 99; run get_tfrecord\.py again"):
        load_manifest(tmp_path, SHORT["user_max_len"])


# ---------------------------------------------------------------- run by itself


def test_run_by_itself_it_shows_the_shapes_and_a_user_in_words(tmp_path, raw, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    titles, names = {"a": "First film", "b": "Second film"}, {"c1": "Evening"}
    users = [(f"u{i}", ["a", "b_c1", "what"]) for i in range(20)]
    raw(tmp_path / "data/sample", columns={"c1": ["a", "b"]}, users=users, titles=titles, names=names)
    get_indexing()
    get_tfrecord(val_ratio=0.3, test_ratio=0.3)
    capsys.readouterr()
    script.main()
    out = capsys.readouterr().out
    for name in (*FEATURES, "uid", "start"):
        assert f"\n{name}" in f"\n{out}"
    assert out.endswith("  First film  -> then:\n  Second film  in Evening\n  an unknown video\n")
