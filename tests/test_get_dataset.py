"""get_dataset.py: equal batches with and without files, right targets, honest sampling, held-out histories as served."""

import hashlib
import shutil

import get_dataset as script
import get_tfrecord as get_tfrecord_module
from get_dataset import (
    add_candidates,
    bucket_windows,
    column_table,
    dataset_from_clicks,
    held_out,
    load_manifest,
    make_dataset,
    video_table,
)
from get_indexing import FileRange, Index, InputError, get_indexing
from get_tfrecord import ClickEncoder, get_tfrecord, write_windows

import numpy as np
import pytest
import tensorflow as tf

CONSTANTS = dict(USER_MAX_LEN=12, WINDOW_OVERLAP=4, MIN_HISTORY=1, HELD_OUT_USERS=30)
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

    def run(data):
        raw(tmp_path / "raw", **data)
        get_indexing(tmp_path / "raw", tmp_path, min_clicks=1)
        get_tfrecord(tmp_path / "raw", tmp_path, 1, **{name.lower(): value for name, value in CONSTANTS.items()})
        return load_manifest(tmp_path, CONSTANTS)

    return run


@pytest.fixture
def many_shards(monkeypatch):
    """Cut the input into ranges of 2000 bytes."""
    monkeypatch.setattr(get_tfrecord_module, "RANGE_BYTES", 2000)


@pytest.fixture
def large_batches(monkeypatch):
    """Put all windows of like length into one batch."""
    monkeypatch.setattr(script, "MIN_STEPS", 1)


def of_lengths(*lengths):
    """Return raw data of users with so many clicks."""
    clicks = ["a_c1", "b", "x_c2", "c_c2", "b_c1"]
    users = [(f"u{u}", [clicks[(u + i * i) % 5] for i in range(n)]) for u, n in enumerate(lengths)]
    return {"columns": {"c1": ["a", "b"], "c2": ["c"]}, "users": users}


def place_held_out(uid, clicks, share):
    """Return (split, place of the last click in a column) of a held-out user; ("train", None) of another."""
    draw = int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big") / 2**64
    places = [place for place, click in enumerate(clicks) if place and "_" in click]
    split = "val" if draw < share else "test" if draw >= 1 - share else "train"
    return (split, places[-1]) if split != "train" and places else ("train", None)


def training_windows(data, share):
    """Return {(uid, start): clicks} of the windows of two clicks or more that are trained on."""
    windows = {}
    for uid, clicks in data["users"]:
        trained = clicks[: place_held_out(uid, clicks, share)[1]]
        for start in range(0, len(trained), 8):
            if len(trained) > 1 and (start == 0 or len(trained) > start + 4):
                windows[uid.encode(), start] = trained[start : start + 12]
    return windows


def batches_of(*users, max_len):
    """Return the batches of (uid, clicks) under INDEX."""
    constants = dict(USER_MAX_LEN=max_len, WINDOW_OVERLAP=4, MIN_HISTORY=1)
    return list(dataset_from_clicks(users, INDEX, constants).as_numpy_iterator())


def windows_in(batches):
    """Return the (uid, start) of every window, in order."""
    return [(uid, start) for batch in batches for uid, start in zip(batch["uid"], batch["start"], strict=True)]


# ---------------------------------------------------------------- batches


def test_targets_by_hand(monkeypatch, large_batches):
    monkeypatch.setattr(script, "AHEAD", 3)
    # a known video, one in column 1, an unknown one in column 2, a known one in no column, one in column 1
    [batch] = batches_of(("u1", ["a", "b_c1", "zzz_c2", "c", "a_c1"]), ("u2", ["c", "b_c2", "b", "a_c9"]), max_len=5)
    assert batch["user_feature"].tolist() == [[2, 3, 1, 4, 2], [4, 3, 3, 2, 0]]
    assert batch["user_column"].tolist() == [[0, 1, 2, 0, 1], [0, 2, 0, 0, 0]]
    assert batch["target_video"].tolist() == [[3, 1, 4, 2, 0], [3, 3, 2, 0, 0]]
    assert batch["label"].tolist() == [[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]
    none = [0, 0, 0]  # where the next click is no target, those after it are none either
    assert batch["target_column"].tolist() == [
        [[1, 2, 0], [2, 0, 1], none, [1, 0, 0], none],
        [[2, 0, 0], none, none, none, none],
    ]
    assert batch["uid"].tolist() == [b"u1", b"u2"] and batch["start"].tolist() == batch["repeated"].tolist() == [0, 0]
    assert {name: batch[name].dtype.type for name in FEATURES} == FEATURES


def test_what_a_window_repeats_is_no_target_of_it(large_batches):
    clicks = ["a_c1"] * 6 + ["b_c2"] * 4
    [batch] = batches_of(("u", clicks), max_len=8)
    assert (batch["start"].tolist(), batch["repeated"].tolist()) == ([0, 4], [0, 4])
    assert batch["label"].tolist() == [[1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0, 0, 0]]
    assert batch["target_video"].tolist() == [[2, 2, 2, 2, 2, 3, 3, 0], [0, 0, 0, 3, 3, 0, 0, 0]]
    assert batch["target_column"][..., 0].tolist() == [[1, 1, 1, 1, 1, 2, 2, 0], [0, 0, 0, 2, 2, 0, 0, 0]]


def test_a_window_of_a_single_click_is_in_no_batch(large_batches):
    [batch] = batches_of(("one", ["a_c1"]), ("two", ["a", "b_c1"]), ("none", []), max_len=5)
    assert batch["uid"].tolist() == [b"two"]


def test_records_and_generator_give_equal_batches(tmp_path, raw, clicks_like_real):
    data = clicks_like_real(80, seed=1)
    data["users"] += [("long", data["users"][0][1] * 9), ("longer", data["users"][1][1] * 20), ("one", ["t0a-0"])]
    index = get_indexing(raw(tmp_path / "raw", **data), tmp_path)
    (tmp_path / "tfrecord").mkdir()
    shards = {split: tmp_path / f"tfrecord/{split}.tfrecord" for split in ("train", "val", "test")}
    made_with = {"constants": CONSTANTS, "held_out_share": 0.0}
    clicks = FileRange(str(tmp_path / "raw/click_seq/clicks.json"))
    manifest = write_windows([clicks], shards, ClickEncoder(index), made_with)
    from_records = make_dataset(manifest | {"shards": {path.name: {} for path in shards.values()}}, tmp_path)
    from_generator = dataset_from_clicks(data["users"], index, CONSTANTS)
    assert from_generator.element_spec == from_records.element_spec
    assert len(from_generator) == len(from_records) > 1
    for one, other in zip(from_records.as_numpy_iterator(), from_generator.as_numpy_iterator(), strict=True):
        assert one.keys() == other.keys() == {*FEATURES, "uid", "start", "repeated"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], strict=True)


def test_padding_is_zero_and_no_longer_than_the_longest_window_of_the_batch(tmp_path, chain, monkeypatch):
    monkeypatch.setattr(script, "BATCH_POSITIONS", 48)
    monkeypatch.setattr(script, "MIN_STEPS", 1)
    data = of_lengths(*range(40), *range(2, 62))
    manifest, _ = chain(data)
    windows, shapes = training_windows(data, 0.3), set()
    for batch in make_dataset(manifest, tmp_path, seed=1).as_numpy_iterator():
        lengths = np.array([len(windows[window]) for window in windows_in([batch])])
        shapes.add(batch["user_feature"].shape)
        assert batch["user_feature"].shape[1] == lengths.max()
        places = np.arange(lengths.max())
        real = places < lengths[:, None]
        np.testing.assert_array_equal(batch["user_feature"] > 0, real)
        assert not any(batch[name][~real].any() for name in FEATURES)
        is_new = (places + 1 < lengths[:, None]) & (places + 1 >= batch["repeated"][:, None])
        np.testing.assert_array_equal(batch["target_video"] > 0, is_new)
        np.testing.assert_array_equal(batch["target_column"][..., 0] > 0, batch["label"] > 0)
    assert len(shapes) > 3


@pytest.mark.parametrize(
    "lengths",
    [[3] * 30, [12] * 30, [13] * 30, range(60), [0, 1, 2, 3] * 20, [400, *[3] * 25]],
    ids=["three", "full", "one over", "all", "tiny", "one giant"],
)
@pytest.mark.parametrize("positions", [1, 30, 100_000])
def test_the_number_of_batches_is_known_without_a_pass(lengths, positions, monkeypatch, large_batches):
    monkeypatch.setattr(script, "BATCH_POSITIONS", positions)
    monkeypatch.setattr(
        tf.data.experimental, "assert_cardinality", lambda steps: known.append(steps) or (lambda data: data)
    )
    known, data = [], of_lengths(*lengths)
    batches = list(dataset_from_clicks(data["users"], INDEX, CONSTANTS).as_numpy_iterator())
    assert known == [len(batches)] and len(windows_in(batches)) == len(training_windows(data, 0))


def test_the_length_of_the_dataset_of_records_is_known(tmp_path, chain):
    data = of_lengths(*range(60))
    manifest, _ = chain(data)
    dataset = make_dataset(manifest, tmp_path, seed=3)
    batches = list(dataset.as_numpy_iterator())
    assert len(dataset) == len(batches) > 1 and len(windows_in(batches)) == len(training_windows(data, 0.5))


def test_a_batch_has_about_the_positions_asked_for_and_windows_of_like_length(monkeypatch):
    lengths = [9, 9, *[10] * 49]  # ten windows of each length from 2 to 50; those of one click are no one's
    # 30, 30, 60, 120 and 250 windows of up to 4, 7, 13, 25 and 50 clicks: a 150th of the places is 110.
    assert bucket_windows(lengths) == ([4, 7, 13, 25, 50], [27, 15, 8, 4, 2], 2 + 2 + 8 + 30 + 125)
    monkeypatch.setattr(script, "BATCH_POSITIONS", 100)
    assert bucket_windows(lengths) == ([4, 7, 13, 25, 50], [25, 14, 7, 4, 2], 2 + 3 + 9 + 30 + 125)
    assert bucket_windows([0, 0, 5])[1:] == ([1, 1], 5)  # little data gets small batches


def test_the_same_seed_gives_the_same_batches_and_another_another_order(tmp_path, chain, clicks_like_real, many_shards):
    manifest, _ = chain(clicks_like_real(150, seed=2))
    assert len(manifest["shards"]) > 9

    def epoch(seed):
        return list(make_dataset(manifest, tmp_path, seed=seed).as_numpy_iterator())

    first, again, other, plain = epoch(1), epoch(1), epoch(2), epoch(None)
    for one, two in zip(first, again, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
    assert windows_in(first) != windows_in(other)
    assert windows_in(plain) == windows_in(epoch(None)) != windows_in(first)
    assert sorted(windows_in(first)) == sorted(windows_in(other)) == sorted(windows_in(plain))


def test_every_training_window_comes_once_in_a_shuffled_epoch(tmp_path, chain, many_shards, monkeypatch):
    monkeypatch.setattr(script, "PARSE_BLOCK", 7)
    data = of_lengths(*[(5 * i) % 41 for i in range(150)])
    manifest, _ = chain(data)
    expected = list(training_windows(data, 0.2))
    windows = windows_in(make_dataset(manifest, tmp_path, seed=1).as_numpy_iterator())
    assert len(expected) > 100 and windows != expected
    assert sorted(windows) == sorted(expected)


# ---------------------------------------------------------------- held out


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_held_out_history_is_what_serving_would_read(tmp_path, chain, many_shards, monkeypatch, split):
    monkeypatch.setattr(script, "PARSE_BLOCK", 5)
    data = of_lengths(*[(5 * i) % 41 for i in range(100)])
    # The last clicks are in no column; many of them take windows of their own.
    data["users"] = [(uid, clicks + ["b"] * (i % 40)) for i, (uid, clicks) in enumerate(data["users"])]
    manifest, index = chain(data)
    found, columns, expected = held_out(manifest, split, tmp_path), {"c1": 1, "c2": 2}, {}
    for uid, clicks in data["users"]:
        of_split, place = place_held_out(uid, clicks, 0.3)
        if of_split == split:
            last = [click.partition("_") for click in clicks[max(place - 12, 0) : place]]
            padding = [0] * (12 - len(last))
            expected[uid.encode()] = (
                [index.videos[vid] for vid, _, _ in last] + padding,
                [columns.get(cid, 0) for _, _, cid in last] + padding,
                columns[clicks[place].partition("_")[2]],
                place,
            )
    names = ("user_feature", "user_column", "target_column", "history")
    rows = zip(*(found[name].tolist() for name in names), strict=True)
    assert len(found["uid"]) == len(expected) > 20
    assert dict(zip(found["uid"].tolist(), rows, strict=True)) == expected


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


def test_a_video_is_known_by_the_columns_that_show_it_and_others_those_of_fewest_videos_first():
    index = Index(dict.fromkeys("abcd"), {"c1": [2, 3, 4], "c2": [], "c3": [4], "c4": [4, 2], "c5": [2, 4]})
    table = video_table(index, max_len=3)
    assert table.tolist() == [[0] * 3, [0] * 3, [4, 5, 1], [1, 0, 0], [4, 5, 1], [0] * 3]
    assert table.dtype == np.int32
    assert video_table(index, max_len=1, num_columns=3).tolist() == [[0], [0], [1], [1], [1], [0]]


def drawn_batches(num_batches, num_columns, seed=5):
    """Return (batches with candidates, their targets [batches, 6, 2, 2]) of users who repeat columns.

    Column n holds the videos n + 1 and n + 2. A user clicks 7 times in 10 in the columns 1 and 2, and else in any.
    """
    column_videos = np.array([[0, 0], *([n + 1, n + 2] for n in range(1, num_columns + 1))], np.int32)
    rng = np.random.default_rng(1)
    shape = [num_batches, 6, 2, 2]
    targets = np.where(rng.random(shape) < 0.7, rng.integers(1, 3, shape), rng.integers(1, num_columns + 1, shape))
    targets[:, 1, 1], targets[:, 2, :, 1] = 0, 0  # places without a target, and targets with nothing after them
    batches = tf.data.Dataset.from_tensor_slices({"target_column": targets.astype(np.int32)})
    batches = add_candidates(batches, column_videos, num_videos=num_columns + 1, seed=seed)
    return list(batches.as_numpy_iterator()), targets


@pytest.fixture
def few_drawn(monkeypatch):
    """Draw 6 columns where there are more than 30."""
    monkeypatch.setattr(script, "MAX_CANDIDATES", 30)
    monkeypatch.setattr(script, "NUM_NEGATIVES", 6)


def test_all_columns_are_candidates_where_they_fit(monkeypatch):
    monkeypatch.setattr(script, "MAX_CANDIDATES", 40)
    batches, _ = drawn_batches(3, num_columns=40)
    for batch in batches:
        assert batch["item_column"].tolist() == list(range(1, 41))
        assert batch["item_log_prob"].tolist() == [0.0] * 40
    assert [batch[name].dtype for name in ("item_column", "item_feature", "item_log_prob", "negative_video")] == [
        np.int32, np.int32, np.float32, np.int32,
    ]  # fmt: skip


def test_of_more_columns_fresh_distinct_draws_are_candidates_and_the_targets_come_before_them(few_drawn):
    batches, targets = drawn_batches(50, num_columns=40)
    drawn = set()
    for batch, of_batch in zip(batches, targets, strict=True):
        assert batch["item_log_prob"].tolist() == [np.float32(np.log(6 / 40))] * 6
        own, candidates = batch["item_column"][:-6].tolist(), batch["item_column"][-6:].tolist()
        assert sorted(own) == np.unique(of_batch).tolist()
        assert len(set(candidates)) == 6 and min(candidates) >= 1 and max(candidates) <= 40
        drawn.add(tuple(candidates))
    assert len(drawn) > 45  # fresh ones for every batch


@pytest.mark.parametrize("num_columns", [20, 40], ids=["all", "drawn"])
def test_an_item_shows_its_column_and_a_target_its_item(few_drawn, num_columns):
    batches, targets = drawn_batches(20, num_columns)
    for batch, of_batch in zip(batches, targets, strict=True):
        columns = batch["item_column"]
        expected = np.where(columns[:, None] > 0, np.stack([columns + 1, columns + 2], 1), 0)
        np.testing.assert_array_equal(batch["item_feature"], expected)
        np.testing.assert_array_equal(columns[batch["target_item"]][of_batch > 0], of_batch[of_batch > 0])


def test_every_column_is_drawn_as_often_as_its_log_prob_says(few_drawn):
    batches, _ = drawn_batches(4000, num_columns=40)
    times = sum(np.bincount(batch["item_column"][-6:], minlength=41) for batch in batches)[1:]
    expected = 4000 * np.exp(batches[0]["item_log_prob"][0])
    assert (abs(times - expected) < 5 * np.sqrt(expected * (1 - 6 / 40))).all()


def test_the_sum_over_the_candidates_is_that_over_all_columns_also_where_users_repeat_columns(few_drawn):
    batches, targets = drawn_batches(4000, num_columns=40)
    x = np.exp(np.random.default_rng(2).normal(size=41))
    x[0], x[1:3] = 0, 5.0  # popular columns have high scores
    estimates = {1: [], 2: [], "another": []}
    for batch, of_batch in zip(batches, targets, strict=True):
        candidates, log_prob = batch["item_column"][-6:], batch["item_log_prob"]
        for own in of_batch[:, 0, 0].tolist():
            others = np.sum(np.where(candidates == own, 0, x[candidates] / np.exp(log_prob)))
            estimates[own if own < 3 else "another"].append(x[own] + others)
    for of_target in estimates.values():
        # The six targets of a batch share its candidates, so only one in six is independent of the others for sure.
        error = np.std(of_target) / np.sqrt(len(of_target) / 6)
        assert error < 0.015 * x.sum()
        assert abs(np.mean(of_target) - x.sum()) < 4 * error


def test_random_videos_are_real_ones_and_all_come_up(monkeypatch):
    monkeypatch.setattr(script, "AUX_NEGATIVES", 64)
    batches, _ = drawn_batches(40, num_columns=10)
    drawn = np.array([batch["negative_video"] for batch in batches])
    assert drawn.shape == (40, 64)
    assert set(drawn.ravel().tolist()) == set(range(2, 13))  # 11 videos count from 2
    assert len({tuple(row) for row in drawn.tolist()}) == 40


def test_the_same_seed_draws_the_same_candidates_and_another_others(few_drawn):
    one, two, other = (drawn_batches(20, num_columns=40, seed=seed)[0] for seed in (5, 5, 6))
    for first, second, third in zip(one, two, other, strict=True):
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
        assert any(first["negative_video"] != third["negative_video"])


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
        load_manifest(tmp_path, CONSTANTS)
    for part in (f"{tmp_path}/tfrecord/manifest.json", "indexing/vid2idx.json", "get_tfrecord.py"):
        assert part in str(error.value)


def test_columns_in_another_order_are_another_index(tmp_path, made):
    path = tmp_path / "indexing/cid2vidx.json"
    text = path.read_text()
    path.write_text(text.replace("t0a", "t0X").replace("t0b", "t0a").replace("t0X", "t0b"))
    with pytest.raises(InputError, match=r"manifest\.json: made with indexing/vid2idx.json = "):
        load_manifest(tmp_path, CONSTANTS)


def test_a_grown_index_is_no_mismatch(tmp_path, raw, made):
    _, before = made
    raw(tmp_path / "raw", columns={"new": ["newer"], **{cid: [] for cid in before.columns}})
    get_indexing(tmp_path / "raw", tmp_path)
    _, index = load_manifest(tmp_path, CONSTANTS)
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
        load_manifest(tmp_path, CONSTANTS)


def test_a_missing_manifest_names_its_absolute_path_and_the_script(tmp_path, made, monkeypatch):
    (tmp_path / "tfrecord/manifest.json").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/tfrecord/manifest\.json.*run get_tfrecord\.py first"):
        load_manifest(".")


def test_records_of_another_format_are_refused(tmp_path, made, monkeypatch):
    monkeypatch.setattr(script, "FORMAT", 99)
    with pytest.raises(InputError, match=r"manifest\.json: made with format = 3, now it is 99; run get_tfrecord\.py"):
        load_manifest(tmp_path, CONSTANTS)


@pytest.mark.parametrize("name", CONSTANTS)
def test_records_made_with_other_constants_are_refused_naming_constant_values_and_script(tmp_path, made, name):
    was = CONSTANTS[name]
    message = (
        rf"{tmp_path}/tfrecord/manifest\.json: made with {name} = {was}, now it is {was + 1}; run get_tfrecord\.py"
    )
    with pytest.raises(InputError, match=message):
        load_manifest(tmp_path, CONSTANTS | {name: was + 1})


def test_without_constants_named_those_of_the_scripts_hold(tmp_path, made):
    with pytest.raises(InputError, match=r"made with USER_MAX_LEN = 12, now it is 50"):
        load_manifest(tmp_path)


def test_records_may_be_moved(tmp_path, made):
    shutil.copytree(tmp_path, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("elsewhere"))
    shutil.rmtree(tmp_path / "tfrecord")
    manifest, _ = load_manifest(tmp_path / "elsewhere", CONSTANTS)
    assert len(list(make_dataset(manifest, tmp_path / "elsewhere"))) > 1


# ---------------------------------------------------------------- run by itself


def test_run_by_itself_it_shows_the_shapes_and_a_user_in_words(tmp_path, raw, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    titles, names = {"a": "First film", "b": "Second film"}, {"c1": "Evening"}
    users = [(f"u{i}", ["a", "b_c1", "what", "a_c1"]) for i in range(20)]  # the last of each is held out
    raw(tmp_path / "data/sample", columns={"c1": ["a", "b"]}, users=users, titles=titles, names=names)
    get_indexing()
    get_tfrecord(num_workers=1)
    capsys.readouterr()
    script.main()
    out = capsys.readouterr().out
    for name in (*FEATURES, "uid", "start", "repeated"):
        assert f"\n{name}" in f"\n{out}"
    assert out.endswith("  First film  -> then:\n  Second film  in Evening\n  an unknown video\n")
