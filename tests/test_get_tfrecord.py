"""get_tfrecord.py: every target once and from its past alone, one split per user, the same bytes for any workers."""

import collections
import functools
import hashlib
import json
import os
import re

import pytest
from tensorflow.train import SequenceExample

import get_tfrecord as script
from get_indexing import InputError, file_ranges, get_indexing
from get_tfrecord import ClickEncoder, cut_windows, get_tfrecord, split_of

COLUMNS = {"c1": ["v1", "v2"], "c2": ["v3"], "c_3": ["v_4", "v5"]}  # v1 2, v2 3, v3 4, v_4 5, v5 6
CLICKS = {  # click: (video number, column number), by hand
    "v1": (2, 0),
    "v2_c1": (3, 1),
    "v1_c1": (2, 1),
    "v3_c2": (4, 2),
    "v_4_c_3": (5, 3),
    "v5_c2": (6, 2),
    "v_4": (5, 0),
    "new": (1, 0),
    "new_c2": (1, 2),
    "v1_c9": (1, 0),
}
SHORT = dict(user_max_len=8, window_overlap=3, val_ratio=0.3, test_ratio=0.3, num_workers=1)


def histories(*lengths):
    """Return users of so many clicks, going through CLICKS in different ways."""
    clicks = list(CLICKS)
    return [(f"u{u}", [clicks[(u + i * i + i // 7) % len(clicks)] for i in range(n)]) for u, n in enumerate(lengths)]


USERS = histories(2, 3, 7, 8, 9, 12, 13, 14, 18, 19, 40, 101, 8, 8, 5, 1, 0, 2, 30, 11)


@pytest.fixture
def rerun(tmp_path):
    """A function that makes the records of the raw data as it is."""

    def make(work="work", **arguments):
        get_indexing(tmp_path / "raw", tmp_path / work)
        return get_tfrecord(tmp_path / "raw", tmp_path / work, **{**SHORT, **arguments})

    return make


@pytest.fixture
def records(tmp_path, raw, rerun):
    """A function that makes the records of users under tmp_path/work, and returns their manifest."""

    def make(users=USERS, work="work", columns=COLUMNS, **arguments):
        raw(tmp_path / "raw", columns=columns, users=users, titles={"v1": "One"})
        return rerun(work, **arguments)

    return make


@pytest.fixture
def tiny_ranges(monkeypatch):
    """Cut the input into ranges of 200 bytes."""
    monkeypatch.setattr(script, "file_ranges", functools.partial(file_ranges, range_bytes=200))


def decoded(folder, split=""):
    """Return the windows of a folder's shards, shard by shard, as plain values, by nothing but tf.train."""
    windows = []
    for path in sorted(folder.glob(f"{split}*.tfrecord")):
        for data in record_bytes(path):
            example = SequenceExample.FromString(data)
            lists = example.feature_lists.feature_list
            windows.append({
                "split": path.name.split("-")[0],
                "uid": example.context.feature["uid"].bytes_list.value[0].decode(),
                "start": example.context.feature["start"].int64_list.value[0],
                "user_feature": list(lists["user_feature"].feature[0].int64_list.value),
                "user_column": list(lists["user_column"].feature[0].int64_list.value),
                "label": list(lists["label"].feature[0].float_list.value),
            })  # fmt: skip
    return windows


def record_bytes(path):
    """Yield the records of a TFRecord file: each is its length (8 bytes), a checksum (4), the data, a checksum (4)."""
    data = path.read_bytes()
    while data:
        end = 12 + int.from_bytes(data[:8], "little")
        yield data[12:end]
        data = data[end + 4 :]


def by_user(windows):
    users = collections.defaultdict(list)
    for window in windows:
        users[window["uid"]].append(window)
    return users


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def stamps(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.tfrecord")}


# ---------------------------------------------------------------- windows and targets


@pytest.mark.parametrize(
    ("max_len", "overlap", "min_history"), [(8, 3, 1), (8, 3, 3), (8, 7, 2), (5, 1, 1), (200, 2, 1)]
)
def test_every_column_click_with_a_history_is_a_target_once(tmp_path, records, max_len, overlap, min_history):
    records(user_max_len=max_len, window_overlap=overlap, min_history=min_history)
    users = by_user(decoded(tmp_path / "work/tfrecord"))
    for uid, clicks in USERS:
        columns = [CLICKS[click][1] for click in clicks]
        targets = [w["start"] + i + 1 for w in users[uid] for i, label in enumerate(w["label"]) if label]
        assert sorted(targets) == [at for at in range(min_history, len(clicks)) if columns[at]]


def test_a_target_s_input_is_the_clicks_before_it_and_nothing_else(tmp_path, records):
    records()
    histories_of = dict(USERS)
    for window in decoded(tmp_path / "work/tfrecord"):
        clicks, start = histories_of[window["uid"]], window["start"]
        for i, label in enumerate(window["label"]):  # a causal tower at position i has read positions 0 .. i
            before = clicks[start : start + i + 1]
            assert window["user_feature"][: i + 1] == [CLICKS[click][0] for click in before]
            assert window["user_column"][: i + 1] == [CLICKS[click][1] for click in before]
            if label:
                following = clicks[start + i + 1]
                assert CLICKS[following] == (window["user_feature"][i + 1], window["user_column"][i + 1])


def test_the_label_is_a_float_and_the_last_position_has_none(tmp_path, records):
    records()
    for window in decoded(tmp_path / "work/tfrecord"):
        assert all(type(label) is float and label in (0.0, 1.0) for label in window["label"])
        assert window["label"][-1] == 0.0
        assert len(window["label"]) == len(window["user_feature"]) == len(window["user_column"])


def test_windows_repeat_the_overlap_and_no_more(tmp_path, records):
    records()
    users = by_user(decoded(tmp_path / "work/tfrecord"))
    for uid, clicks in USERS:
        starts, lengths = [w["start"] for w in users[uid]], [len(w["label"]) for w in users[uid]]
        if len(clicks) < 2:  # nothing follows
            assert not starts
            continue
        assert starts == [5 * k for k in range(len(starts))]
        assert all(length == 8 for length in lengths[:-1])
        assert starts[-1] + lengths[-1] == len(clicks)
        assert len(starts) == 1 or lengths[-1] > 3  # a last window brings something new


def test_a_target_of_a_later_window_has_at_least_the_overlap_before_it(tmp_path, records):
    records()
    later = [w for w in decoded(tmp_path / "work/tfrecord") if w["start"]]
    assert later and all(sum(w["label"][:2]) == 0 for w in later)


def test_windows_and_labels_of_a_small_history_by_hand():
    constants = dict(USER_MAX_LEN=5, WINDOW_OVERLAP=2, MIN_HISTORY=2)
    windows = list(cut_windows("u", [2, 3, 4, 5, 6, 7, 8], [1, 1, 1, 0, 1, 1, 0], constants))
    assert [(w["start"], w["user_feature"], w["label"]) for w in windows] == [
        (0, [2, 3, 4, 5, 6], [0, 1, 0, 1, 0]),  # the clicks 4 and 6; 3 has only one click before it
        (3, [5, 6, 7, 8], [0, 1, 0, 0]),  # the click 7; 6 is a target of the window before
    ]
    (short,) = cut_windows("u", [2, 3], [1, 1], constants | dict(WINDOW_OVERLAP=4, MIN_HISTORY=4))
    assert short["label"] == [0, 0]  # no click has four before it


def test_an_unknown_video_clicked_in_a_known_column_is_a_target(tmp_path, records):
    records([(f"u{i}", ["v1", "new_c2", "other_new_c_3"]) for i in range(20)])
    for window in decoded(tmp_path / "work/tfrecord"):
        assert (window["user_feature"], window["user_column"]) == ([2, 1, 1], [0, 2, 3])
        assert window["label"] == [1.0, 1.0, 0.0]


def test_the_encoder_gives_video_and_column_numbers(tmp_path, raw):
    index = get_indexing(raw(tmp_path / "raw", columns=COLUMNS, titles={"v1": "One"}), tmp_path)
    videos, columns = ClickEncoder(index).encode(list(CLICKS))
    assert list(zip(videos, columns, strict=True)) == list(CLICKS.values())
    assert ClickEncoder(index).encode([]) == ([], [])


def test_integer_clicks_and_users_are_their_decimal_text(tmp_path, raw, write_lines):
    raw(tmp_path / "raw", columns={"7": ["10", "11"]}, titles={"10": "Ten"})
    users = [{"uid": i, "click_seq": [10, 11, "10_7"]} for i in range(20)]
    write_lines(tmp_path / "raw/click_seq/clicks.json", users)
    get_indexing(tmp_path / "raw", tmp_path)
    get_tfrecord(tmp_path / "raw", tmp_path, **SHORT)
    windows = decoded(tmp_path / "tfrecord")
    assert sorted(w["uid"] for w in windows) == sorted(str(i) for i in range(20))
    assert all((w["user_feature"], w["user_column"]) == ([2, 3, 2], [0, 0, 1]) for w in windows)


# ---------------------------------------------------------------- splits


def test_no_user_is_in_two_splits(tmp_path, records, tiny_ranges):
    users = histories(*[20] * 30)
    records([*users, *users[:10]])  # the first ten come again, further on in the file
    splits = collections.defaultdict(set)
    for window in decoded(tmp_path / "work/tfrecord"):
        splits[window["uid"]].add(window["split"])
    assert len(splits) == 30 and all(len(of_user) == 1 for of_user in splits.values())
    assert set.union(*splits.values()) == {"train", "val", "test"}


def test_a_user_keeps_the_split_when_others_come_and_go(tmp_path, records):
    def splits():
        return {w["uid"]: w["split"] for w in decoded(tmp_path / "work/tfrecord")}

    records(histories(*[9] * 30))
    before = splits()
    records([*histories(*[5] * 60)[10:], ("x", ["v1", "v2_c1"])])
    after = splits()
    assert len(before) == 30 and len(after) == 51
    assert {uid: after[uid] for uid in before.keys() & after} == {uid: before[uid] for uid in before.keys() & after}


def test_the_splits_are_as_large_as_the_ratios_say():
    splits = collections.Counter(split_of(f"user-{i}", val_ratio=0.05, test_ratio=0.1) for i in range(5000))
    # Five standard deviations of a binomial count around 250 and 500.
    assert abs(splits["val"] - 250) < 5 * (5000 * 0.05 * 0.95) ** 0.5
    assert abs(splits["test"] - 500) < 5 * (5000 * 0.1 * 0.9) ** 0.5
    assert set(splits) == {"train", "val", "test"}


def test_a_larger_ratio_only_moves_users_out_of_train_and_never_into_it():
    for i in range(1000):
        small, large = split_of(f"u{i}", 0.1, 0.1), split_of(f"u{i}", 0.1, 0.3)
        assert small == large or (small, large) == ("train", "test")


# ---------------------------------------------------------------- workers and ranges


def test_one_and_two_workers_write_the_same_bytes(tmp_path, records, rerun, tiny_ranges):
    manifest = records(work="one")
    assert rerun("two", num_workers=2) == manifest
    one, two = folder_bytes(tmp_path / "one/tfrecord"), folder_bytes(tmp_path / "two/tfrecord")
    assert len(one) > 40 and one == two  # 4 files of each of more than ten ranges


def test_small_ranges_give_the_same_records_and_counts_as_one(tmp_path, records, rerun, monkeypatch):
    whole = records(work="whole")
    monkeypatch.setattr(script, "file_ranges", functools.partial(file_ranges, range_bytes=200))
    cut = rerun("cut")
    assert decoded(tmp_path / "cut/tfrecord") == decoded(tmp_path / "whole/tfrecord")
    assert len(whole["shards"]) == 3 and len(cut["shards"]) > 30
    assert {**cut, "shards": 0} == {**whole, "shards": 0}


def test_bad_lines_are_reported_by_their_place_in_the_file_whatever_the_ranges(
    tmp_path, raw, write_lines, tiny_ranges, capsys
):
    raw(tmp_path / "raw", columns=COLUMNS, titles={"v1": "One"})
    good = [{"uid": f"u{i}", "click_seq": ["v1", "v2_c1"]} for i in range(300)]
    lines = [*good[:123], "{", *good[123:250], b"\xff", *good[250:]]
    path = write_lines(tmp_path / "raw/click_seq/clicks.json", lines)
    get_indexing(tmp_path / "raw", tmp_path)
    manifest = get_tfrecord(tmp_path / "raw", tmp_path, **SHORT)
    assert f"{path}: 2 of 302 lines are bad (line 124: not JSON, line 252: not UTF-8)" in capsys.readouterr().err
    assert manifest["report"]["skipped"] == {"not JSON": 1, "not UTF-8": 1}


def test_the_index_is_read_once_for_all_ranges_of_a_worker(tmp_path, records, tiny_ranges, monkeypatch):
    loads = []
    load_index = script.load_index
    monkeypatch.setattr(script, "load_index", lambda work_dir: loads.append(work_dir) or load_index(work_dir))
    manifest = records()
    assert len(manifest["shards"]) > 30
    assert len(loads) <= 2  # by the entry function, and by its one worker


# ---------------------------------------------------------------- manifest


def test_the_manifest_s_numbers_equal_a_count_by_hand(tmp_path, raw, write_lines, monkeypatch):
    raw(tmp_path / "raw", columns=COLUMNS, titles={"v1": "One"})
    monkeypatch.setattr(script, "file_ranges", functools.partial(file_ranges, range_bytes=2000))
    users = histories(*[(7 * i * i) % 23 for i in range(400)])
    lines = [{"uid": uid, "click_seq": clicks} for uid, clicks in users]
    lines[100:100] = ["", "{"]
    lines[200:200] = ["[]"]
    write_lines(tmp_path / "raw/click_seq/a.json.gz", lines[:150])
    write_lines(tmp_path / "raw/click_seq/b.json", lines[150:])
    get_indexing(tmp_path / "raw", tmp_path)
    returned = get_tfrecord(tmp_path / "raw", tmp_path, **SHORT)
    manifest = json.loads((tmp_path / "tfrecord/manifest.json").read_text())
    assert manifest == returned

    clicks = [click for _, seq in users for click in seq]
    targets = sum(CLICKS[click][1] > 0 for _, seq in users for click in seq[1:])
    lengths = sorted(len(seq) for _, seq in users)
    assert manifest["report"] == {
        "lines": 403,
        "skipped": {"blank": 1, "not JSON": 1, "wrong type": 1},
        "clicks": len(clicks),
        "unknown_videos": sum(CLICKS[click][0] == 1 for click in clicks),
        "column_clicks": sum(CLICKS[click][1] > 0 for click in clicks),
        "targets": targets,
        "history": {"p50": lengths[399 // 2], "p90": lengths[399 * 9 // 10], "max": 22},
    }
    windows = decoded(tmp_path / "tfrecord")
    for split, counts in manifest["splits"].items():
        of_split = [window for window in windows if window["split"] == split]
        lengths = collections.Counter(len(window["label"]) for window in of_split)
        assert counts["windows"] == [lengths[n] for n in range(9)]
        assert counts["targets"] == sum(sum(window["label"]) for window in of_split)
    # A user with one click or none has no window, but is counted.
    assert sum(counts["users"] for counts in manifest["splits"].values()) == 400
    with_windows = collections.Counter(split for _, split in {(w["uid"], w["split"]) for w in windows})
    without = sum(len(seq) < 2 for _, seq in users)
    missing = [manifest["splits"][split]["users"] - with_windows[split] for split in ("train", "val", "test")]
    assert min(missing) >= 0 and sum(missing) == without
    assert manifest["constants"] == {
        "USER_MAX_LEN": 8, "WINDOW_OVERLAP": 3, "MIN_HISTORY": 1, "VAL_RATIO": 0.3, "TEST_RATIO": 0.3,
    }  # fmt: skip


def test_the_manifest_knows_every_shard_by_size_and_hash(tmp_path, records, tiny_ranges):
    manifest = records()
    files = folder_bytes(tmp_path / "work/tfrecord")
    shards = {name: data for name, data in files.items() if name.endswith(".tfrecord")}
    assert manifest["shards"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in shards.items()
    }
    parts = {name for name in files if name.startswith("part-")}
    assert len(shards) == 3 * len(parts) and set(files) == {"manifest.json", *shards, *parts}


def test_the_report_says_what_was_read_and_kept(records, capsys):
    manifest = records()
    out, report = capsys.readouterr().out, manifest["report"]
    assert f"20 lines (skipped: none), {report['clicks']} clicks" in out
    assert "p90 30, max 101" in out
    for split in ("train", "val", "test"):
        assert f"{split}: {manifest['splits'][split]['users']} users" in out


# ---------------------------------------------------------------- refusals


def test_no_click_in_a_known_column_is_a_clear_error_and_writes_no_manifest(tmp_path, records):
    with pytest.raises(InputError, match=r"no click was made in a known column.*<vid>_<cid>.*cid2vids"):
        records([(f"u{i}", ["v1", "v2_c9", "v1"]) for i in range(50)])
    assert not (tmp_path / "work/tfrecord/manifest.json").exists()


def test_too_few_users_is_a_clear_error_that_says_how_many_are_needed(records):
    # 1 - 0.95 ** n > 0.99 for n >= 90
    with pytest.raises(InputError, match=r"none of 2 users leaves a target for val; about 90 users are needed"):
        records(histories(5, 5), val_ratio=0.05, test_ratio=0.05)
    with pytest.raises(InputError, match=r"VAL_RATIO and TEST_RATIO must be positive"):
        records(test_ratio=0)


def test_no_target_left_for_training_is_a_clear_error(records):
    with pytest.raises(InputError, match=r"train"):
        records(val_ratio=0.5, test_ratio=0.5)


def test_users_without_clicks_or_known_clicks_are_no_error(tmp_path, records):
    manifest = records([*histories(*[9] * 20), ("nothing", []), ("stranger", ["x", "y"]), ("once", ["v2_c1"])])
    assert sum(counts["users"] for counts in manifest["splits"].values()) == 23
    users = by_user(decoded(tmp_path / "work/tfrecord"))
    assert "nothing" not in users and "once" not in users
    [stranger] = users["stranger"]
    assert (stranger["user_feature"], stranger["label"]) == ([1, 1], [0, 0])


def test_a_missing_index_names_its_absolute_path_and_the_script_to_run(tmp_path, raw, monkeypatch):
    raw(tmp_path / "raw", columns=COLUMNS, users=USERS)
    monkeypatch.chdir(tmp_path)
    missing = tmp_path / "work" / "indexing" / "vid2idx.json"
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(missing))}.*run get_indexing\.py first"):
        get_tfrecord("raw", "work")


def test_an_index_that_lacks_its_columns_names_the_missing_file(tmp_path, raw):
    get_indexing(raw(tmp_path / "raw", columns=COLUMNS, users=USERS), tmp_path)
    (
        tmp_path / "indexing/cid2vidx.json"
    ).unlink()  # as where the first get_indexing.py was killed between its two files
    with pytest.raises((FileNotFoundError, InputError), match=r"cid2vidx\.json.*run get_indexing\.py"):
        get_tfrecord(tmp_path / "raw", tmp_path, **SHORT)


def test_a_missing_or_empty_click_folder_is_named(tmp_path, raw):
    get_indexing(raw(tmp_path / "raw", columns=COLUMNS, titles={"v1": "One"}), tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}/raw/click_seq"):
        get_tfrecord(tmp_path / "raw", tmp_path)
    (tmp_path / "raw/click_seq").mkdir()
    with pytest.raises(InputError, match=f"{tmp_path}/raw/click_seq"):
        get_tfrecord(tmp_path / "raw", tmp_path)


@pytest.mark.parametrize("bad", [dict(min_history=0), dict(min_history=4), dict(window_overlap=8)])
def test_lengths_that_contradict_each_other_are_refused_with_their_values(records, bad):
    [(name, value)] = bad.items()
    with pytest.raises(InputError, match=f"MIN_HISTORY.*'{name.upper()}': {value}"):
        records(**bad)


@pytest.mark.parametrize("fault", ["bad lines", "cut gzip", "no column click"])
def test_a_run_that_stops_leaves_the_former_records_as_they_were(tmp_path, raw, write_lines, records, fault):
    records()
    folder = tmp_path / "work/tfrecord"
    before = folder_bytes(folder)
    if fault == "bad lines":
        write_lines(tmp_path / "raw/click_seq/clicks.json", ['{"uid": "u", "click_seq": ["v1", "v2_c1"]}', "{"])
    if fault == "cut gzip":
        raw(tmp_path / "raw", users=USERS, click_file="more", gzip=True)
        path = tmp_path / "raw/click_seq/more.json.gz"
        path.write_bytes(path.read_bytes()[:-10])
    if fault == "no column click":
        raw(tmp_path / "raw", users=[("u", ["v1", "v1"])])
    with pytest.raises(InputError):
        get_tfrecord(tmp_path / "raw", tmp_path / "work", **SHORT)
    after = folder_bytes(folder)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after if name.endswith(".tmp")]


# ---------------------------------------------------------------- reruns


def test_a_rerun_keeps_finished_shards(tmp_path, records, tiny_ranges):
    first = records()
    before = stamps(tmp_path / "work/tfrecord")
    again = get_tfrecord(tmp_path / "raw", tmp_path / "work", **SHORT)
    assert len(before) > 30 and stamps(tmp_path / "work/tfrecord") == before
    assert again == first


def test_a_killed_run_goes_on_with_the_shards_that_it_lacks(tmp_path, records, tiny_ranges):
    first = records()
    folder = tmp_path / "work/tfrecord"
    files, before = folder_bytes(folder), stamps(folder)
    part = sorted(folder.glob("part-*"))[3]
    part.unlink()  # it is written last
    lost = sorted(folder.glob("val-*"))[5]
    lost.unlink()
    (folder / "manifest.json").unlink()
    (folder / ".train-00001.tfrecord.0123.tmp").write_bytes(b"half")
    assert get_tfrecord(tmp_path / "raw", tmp_path / "work", **SHORT) == first
    assert folder_bytes(folder) == files
    made = {name for name, stamp in stamps(folder).items() if stamp != before[name]}
    numbers = {part.name.split("-")[1], lost.name.split("-")[1]}
    assert {name.split("-")[1] for name in made} == numbers


def test_a_shard_that_was_cut_short_is_made_again(tmp_path, records):
    records()
    folder = tmp_path / "work/tfrecord"
    files = folder_bytes(folder)
    shard = next(folder.glob("train-*"))
    shard.write_bytes(files[shard.name][:-10])
    get_tfrecord(tmp_path / "raw", tmp_path / "work", **SHORT)
    assert folder_bytes(folder) == files


def test_changed_input_remakes_its_shards_alone_and_removes_the_stale_ones(tmp_path, raw, records):
    raw(tmp_path / "raw", users=histories(*[9] * 20), click_file="a")
    records()  # clicks.json comes after a.json
    before = stamps(tmp_path / "work/tfrecord")
    raw(tmp_path / "raw", users=USERS[:-1])
    get_tfrecord(tmp_path / "raw", tmp_path / "work", **SHORT)
    after = stamps(tmp_path / "work/tfrecord")
    assert len(before) == len(after) == 6
    assert {name for name in before if name in after} == {name for name in before if "-00000-" in name}
    assert all(after[name] == before[name] for name in after if name in before)


def test_input_rewritten_in_the_same_size_is_noticed(tmp_path, raw, records):
    records([(f"u{i}", ["v1", "v2_c1"]) for i in range(20)])
    path = tmp_path / "raw/click_seq/clicks.json"
    before = path.stat()
    raw(tmp_path / "raw", users=[(f"u{i}", ["v2", "v1_c1"]) for i in range(20)])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size
    get_tfrecord(tmp_path / "raw", tmp_path / "work", **SHORT)
    assert all(w["user_feature"] == [3, 2] for w in decoded(tmp_path / "work/tfrecord"))


@pytest.mark.parametrize("change", [dict(user_max_len=9), dict(min_history=2), dict(val_ratio=0.2)])
def test_changed_constants_remake_every_shard(tmp_path, records, rerun, change):
    records()
    before = stamps(tmp_path / "work/tfrecord")
    rerun(**change)
    after = stamps(tmp_path / "work/tfrecord")
    assert len(after) == 3 and not before.keys() & after
    rerun("fresh", **change)
    assert folder_bytes(tmp_path / "fresh/tfrecord") == folder_bytes(tmp_path / "work/tfrecord")


def test_a_grown_index_remakes_the_records_with_its_new_videos(tmp_path, raw, records):
    records([(f"u{i}", ["new", "v2_c1"]) for i in range(20)])
    assert all(w["user_feature"] == [1, 3] for w in decoded(tmp_path / "work/tfrecord"))
    raw(tmp_path / "raw", columns={**COLUMNS, "c4": ["new"]})
    get_indexing(tmp_path / "raw", tmp_path / "work")
    get_tfrecord(tmp_path / "raw", tmp_path / "work", **SHORT)
    assert all(w["user_feature"] == [7, 3] for w in decoded(tmp_path / "work/tfrecord"))
