"""get_tfrecord.py: every target once and from its past alone, what is served held out, the same bytes for any workers."""

import collections
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import get_tfrecord as script
from get_dataset import load_manifest
from get_indexing import FileRange, InputError, get_indexing
from get_tfrecord import ClickEncoder, count_users, get_tfrecord, lowest_draws, split_windows, survey, tally_report

import pytest
from tensorflow.train import SequenceExample

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
    "v1_c9": (2, 0),
}
SHORT = dict(user_max_len=8, window_overlap=3, held_out_users=6, num_workers=1)


def histories(*lengths):
    """Return users of so many clicks, going through CLICKS in different ways."""
    clicks = list(CLICKS)
    return [(f"u{u}", [clicks[(u + i * i + i // 7) % len(clicks)] for i in range(n)]) for u, n in enumerate(lengths)]


def draw(uid):
    """Return the number in [0, 1) that decides about a user."""
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big") / 2**64


def uids_between(low, high, number):
    """Return so many user ids whose draw is between two numbers."""
    return list(itertools.islice((f"w{i}" for i in itertools.count() if low <= draw(f"w{i}") < high), number))


def held_out(uid, clicks, share=0.3, min_history=1, current=(1, 2, 3)):
    """Return (split, place of the click held out) of a user; ("train", None) where nothing is."""
    split = "val" if draw(uid) < share else "test" if draw(uid) >= 1 - share else "train"
    places = [at for at, click in enumerate(clicks) if at >= min_history and CLICKS[click][1] in current]
    return (split, places[-1]) if split != "train" and places else ("train", None)


USERS = [
    *histories(2, 3, 7, 8, 9, 12, 13, 14, 18, 19, 40, 101, 8, 8, 5, 1, 0),
    *((uid, ["v1", "v2_c1", *["v1"] * 30]) for uid in uids_between(0, 0.3, 1) + uids_between(0.7, 1, 1)),
    (uids_between(0, 0.3, 2)[1], ["v1_c1", "v1", "new"]),
]
assert len(dict(USERS)) == 20  # so SHORT holds out the lowest and the highest 30 % of the draws


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
    monkeypatch.setattr(script, "RANGE_BYTES", 200)


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
                "repeated": example.context.feature["repeated"].int64_list.value[0],
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

LENGTHS = [(8, 3, 1), (8, 3, 3), (8, 7, 2), (5, 1, 1), (200, 2, 1)]


@pytest.mark.parametrize(("max_len", "overlap", "min_history"), LENGTHS)
def test_every_click_is_new_in_one_window_and_every_column_click_a_target_once(
    tmp_path, records, max_len, overlap, min_history
):
    records(user_max_len=max_len, window_overlap=overlap, min_history=min_history)
    users = by_user(decoded(tmp_path / "work/tfrecord"))
    splits = collections.Counter()
    for uid, clicks in USERS:
        new = [w["start"] + i for w in users[uid] for i in range(w["repeated"], len(w["label"]))]
        assert sorted(new) == list(range(len(clicks)))
        split, place = held_out(uid, clicks, min_history=min_history)
        targets = collections.defaultdict(list)
        for window in users[uid]:
            targets[window["split"]] += [window["start"] + i + 1 for i, label in enumerate(window["label"]) if label]
        trained = [at for at in range(min_history, len(clicks[:place])) if CLICKS[clicks[at]][1]]
        expected = {"train": trained} | ({split: [place]} if place else {})
        assert {name: sorted(of_split) for name, of_split in targets.items() if of_split} == {
            name: of_split for name, of_split in expected.items() if of_split
        }
        splits[split] += 1
    assert min(splits[name] for name in ("train", "val", "test")) > 2


def test_a_target_s_input_is_the_clicks_before_it_and_nothing_else(tmp_path, records):
    records()
    histories_of = dict(USERS)
    windows = decoded(tmp_path / "work/tfrecord")
    assert {window["split"] for window in windows} == {"train", "val", "test"}
    for window in windows:
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


def test_training_windows_repeat_the_overlap_and_no_more(tmp_path, records):
    records()
    users = by_user(decoded(tmp_path / "work/tfrecord", "train"))
    for uid, clicks in USERS:
        trained = len(clicks[: held_out(uid, clicks)[1]])
        starts, lengths = [w["start"] for w in users[uid]], [len(w["label"]) for w in users[uid]]
        assert [w["repeated"] for w in users[uid]] == [0, *[3] * (len(starts) - 1)][: len(starts)]
        if not trained:
            assert not starts
            continue
        assert starts == [5 * k for k in range(len(starts))]
        assert all(length == 8 for length in lengths[:-1])
        assert starts[-1] + lengths[-1] == trained
        assert len(starts) == 1 or lengths[-1] > 3  # a last window brings something new


def test_a_target_of_a_later_window_has_at_least_the_overlap_before_it(tmp_path, records):
    records()
    later = [w for w in decoded(tmp_path / "work/tfrecord", "train") if w["start"]]
    assert later and all(sum(w["label"][:2]) == 0 for w in later)


def test_windows_and_labels_of_a_small_history_by_hand():
    def windows_of(videos, columns, **changes):
        constants = dict(USER_MAX_LEN=5, WINDOW_OVERLAP=2, MIN_HISTORY=2) | changes
        return split_windows("u", videos, columns, {1}, 0.0, constants)["train"]

    assert windows_of([2, 3, 4, 5, 6, 7, 8], [1, 1, 1, 0, 1, 1, 0]) == [
        dict(uid="u", start=0, repeated=0, user_feature=[2, 3, 4, 5, 6], user_column=[1, 1, 1, 0, 1],
             label=[0, 1, 0, 1, 0]),  # the clicks 4 and 6; 3 has only one click before it
        dict(uid="u", start=3, repeated=2, user_feature=[5, 6, 7, 8], user_column=[0, 1, 1, 0],
             label=[0, 1, 0, 0]),  # the click 7; 6 is a target of the window before
    ]  # fmt: skip
    (short,) = windows_of([2, 3], [1, 1], WINDOW_OVERLAP=4, MIN_HISTORY=4)
    assert short["label"] == [0, 0]  # no click has four before it
    (single,) = windows_of([2], [1])
    assert (single["user_feature"], single["label"]) == ([2], [0])
    assert windows_of([], []) == []


def test_an_unknown_video_clicked_in_a_known_column_is_a_target(tmp_path, records):
    records([(f"u{i}", ["v1", "new_c2", "other_new_c_3"]) for i in range(20)])
    expected = {"train": ([2, 1], [0, 2], [1, 0]), "val": ([2, 1, 1], [0, 2, 3], [0, 1, 0])}
    expected["test"] = expected["val"]
    whole = ([2, 1, 1], [0, 2, 3], [1, 1, 0])
    of_users = by_user(decoded(tmp_path / "work/tfrecord"))
    for windows in of_users.values():
        for window in windows:
            found = window["user_feature"], window["user_column"], window["label"]
            assert found == (whole if len(windows) == 1 else expected[window["split"]])
    assert collections.Counter(map(len, of_users.values())).keys() == {1, 2}


def test_the_encoder_gives_video_and_column_numbers(tmp_path, raw):
    index = get_indexing(raw(tmp_path / "raw", columns=COLUMNS, titles={"v1": "One"}), tmp_path)
    videos, columns = ClickEncoder(index).encode(list(CLICKS))
    assert list(zip(videos, columns, strict=True)) == list(CLICKS.values())
    assert ClickEncoder(index).encode([]) == ([], [])


def test_the_encoder_counts_known_videos_in_unknown_columns(tmp_path, raw):
    index = get_indexing(raw(tmp_path / "raw", columns=COLUMNS, titles={"v1": "One"}), tmp_path)
    encoder = ClickEncoder(index)
    assert encoder.encode(["v1_c9", "v1_", "v_4_nan", "v_4_c_3", "new", "new_c2", "v1"]) == (
        [2, 2, 5, 5, 1, 1, 2], [0, 0, 0, 3, 0, 2, 0],
    )  # fmt: skip
    encoder.encode(["v3_None"])
    assert encoder.unknown_columns == 4


def test_integer_clicks_and_users_are_their_decimal_text(tmp_path, raw, write_lines):
    raw(tmp_path / "raw", columns={"7": ["10", "11"]}, titles={"10": "Ten"})
    users = [{"uid": i, "click_seq": [10, 11, "10_7"]} for i in range(19)] + [
        {"uid": "19", "click_seq": [10, 11, "10_7"]}
    ]
    write_lines(tmp_path / "raw/click_seq/clicks.json", users)
    get_indexing(tmp_path / "raw", tmp_path)
    get_tfrecord(tmp_path / "raw", tmp_path, **SHORT)
    windows = [w for w in decoded(tmp_path / "tfrecord") if len(w["label"]) == 3]
    assert sorted(w["uid"] for w in windows) == sorted(str(i) for i in range(20))
    assert all((w["user_feature"], w["user_column"]) == ([2, 3, 2], [0, 0, 1]) for w in windows)


# ---------------------------------------------------------------- held out


def test_what_is_held_out_by_hand():
    settings = dict(USER_MAX_LEN=4, WINDOW_OVERLAP=2, MIN_HISTORY=1)
    [val], [test] = uids_between(0, 0.2, 1), uids_between(0.8, 1, 1)
    videos = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    columns = [1, 1, 0, 1, 1, 1, 2, 0, 0, 0, 2, 0]  # column 2 is retired: the click of video 7 is held out

    def window(start, repeated, end, label):
        return dict(uid=uid, start=start, repeated=repeated, user_feature=videos[start:end],
                    user_column=columns[start:end], label=label)  # fmt: skip

    for uid, split in [(val, "val"), (test, "test")]:
        assert split_windows(uid, videos, columns, {1}, 0.2, settings) == {
            "train": [window(0, 0, 4, [1, 0, 1, 0]), window(2, 2, 5, [0, 1, 0])],
            # the four clicks before it, itself and three after it; then the rest
            split: [window(1, 4, 9, [0, 0, 0, 1, 0, 0, 0, 0]), window(7, 2, 11, [0] * 4), window(9, 2, 12, [0] * 3)],
        }
        # No click in a current column has a history: all is trained on.
        assert split_windows(uid, [2, 3], [1, 2], {1}, 0.2, settings) == {
            "train": [dict(uid=uid, start=0, repeated=0, user_feature=[2, 3], user_column=[1, 2], label=[1, 0])]
        }
    uid = uids_between(0.2, 0.8, 1)[0]
    assert split_windows(uid, videos[:3], columns, {1}, 0.2, settings).keys() == {"train"}


def test_a_held_out_history_is_the_last_clicks_before_the_target(tmp_path, records):
    records()
    clicks_of = dict(USERS)
    for split in ("val", "test"):
        windows = [w for w in decoded(tmp_path / "work/tfrecord", split) if sum(w["label"])]
        expected = {uid: held_out(uid, clicks)[1] for uid, clicks in USERS if held_out(uid, clicks)[0] == split}
        assert len(windows) == len(expected) > 2
        for window in windows:
            place = expected[window["uid"]]
            assert window["start"] == max(place - 8, 0)
            assert window["label"].index(1.0) == place - window["start"] - 1
            assert window["repeated"] == place - window["start"] and sum(window["label"]) == 1
            last = clicks_of[window["uid"]][max(place - 8, 0) : place + 8]
            assert window["user_feature"] == [CLICKS[click][0] for click in last]


def test_what_is_held_out_and_all_after_it_is_in_no_training_record(tmp_path, records):
    records()
    held = {uid: held_out(uid, clicks)[1] for uid, clicks in USERS}
    windows = decoded(tmp_path / "work/tfrecord", "train")
    ends = {w["uid"]: w["start"] + len(w["label"]) for w in windows}  # of the last window
    assert all(ends[uid] == place for uid, place in held.items() if place is not None and uid in ends)
    assert sum(place is not None for place in held.values()) > 6


def test_a_retired_column_is_no_target_of_validation_or_test_but_one_of_training(tmp_path, raw, records, rerun):
    users = histories(*[20] * 30)
    records(users, held_out_users=9)
    before = {w["uid"] for w in decoded(tmp_path / "work/tfrecord") if w["split"] != "train"}
    raw(tmp_path / "raw", columns={cid: vids for cid, vids in COLUMNS.items() if cid != "c2"})
    rerun(held_out_users=9)
    columns = collections.defaultdict(set)
    for window in decoded(tmp_path / "work/tfrecord"):
        columns[window["split"]] |= {window["user_column"][i + 1] for i, of in enumerate(window["label"]) if of}
    assert columns == {"train": {1, 2, 3}, "val": {1, 3}, "test": {1, 3}}
    places = {w["uid"]: w["start"] + w["label"].index(1.0) + 1
              for w in decoded(tmp_path / "work/tfrecord") if w["split"] != "train" and sum(w["label"])}  # fmt: skip
    assert places == {uid: held_out(uid, clicks, current=(1, 3))[1] for uid, clicks in users if uid in before}


@pytest.mark.parametrize(
    ("held_out_users", "users", "share"), [(6, 20, 0.3), (5, 40, 0.125), (10, 20, 0.5), (3000, 20, 0.5)]
)
def test_the_held_out_share_is_that_of_the_users_and_half_at_most(records, held_out_users, users, share):
    manifest = records(histories(*[9] * users), held_out_users=held_out_users)
    assert manifest["held_out_share"] == share
    expected = collections.Counter(held_out(f"u{u}", ["v1", "v2_c1"], share)[0] for u in range(users))
    assert {name: manifest["splits"][name]["users"] for name in ("val", "test")} == {
        name: expected[name] for name in ("val", "test")
    }
    assert manifest["splits"]["train"]["users"] == users


def test_as_users_come_nobody_is_held_out_who_was_trained_on_before(tmp_path, records):
    sets = []
    for number in (40, 41, 80, 160):
        records(histories(*[9] * number), held_out_users=12)
        sets.append(
            {split: {w["uid"] for w in decoded(tmp_path / "work/tfrecord", split)} for split in ("val", "test")}
        )
    for few, many in itertools.pairwise(sets):
        known = set.union(*(set(of) for of in few.values())) | {f"u{i}" for i in range(40)}
        assert all(many[split] & known <= few[split] for split in ("val", "test"))
    assert sets[0]["val"] - sets[-1]["val"] and sets[0]["test"] - sets[-1]["test"] and sets[-1]["val"]


def test_a_share_is_held_out_as_large_as_it_says():
    settings = dict(USER_MAX_LEN=4, WINDOW_OVERLAP=2, MIN_HISTORY=1)
    splits = collections.Counter(
        split for i in range(5000) for split in split_windows(f"user-{i}", [2, 3], [0, 1], {1}, 0.1, settings)
    )
    deviation = (5000 * 0.1 * 0.9) ** 0.5
    assert abs(splits["val"] - 500) < 5 * deviation and abs(splits["test"] - 500) < 5 * deviation
    assert splits["train"] == 5000


# ---------------------------------------------------------------- the first pass


def sketch_of(draws):
    return lowest_draws(collections.Counter(draws))


def several_lines(sketch):
    return tally_report({}, sketch)["on_several_lines"]


def test_the_sketch_is_exact_while_users_are_few(monkeypatch):
    monkeypatch.setattr(script, "SKETCH_SIZE", 64)
    draws = [i / 64 for i in range(64)]
    sketch = sketch_of([*draws, *draws[:16], *draws[:8]])
    assert (count_users(sketch), sketch.total(), several_lines(sketch)) == (64, 88, 0.25)
    assert (count_users(sketch_of([])), several_lines(sketch_of([]))) == (0, 0)


def test_the_sketch_of_many_users_is_right_within_a_few_percent_and_small(monkeypatch):
    monkeypatch.setattr(script, "SKETCH_SIZE", 1024)
    draws = [draw(f"user{i}") for i in range(20_000)]
    sketch = sketch_of(draws + draws[::4])
    # The k-th lowest of n has a relative deviation of 1 / sqrt(k), 3 %; a share of 1/4 of k one of sqrt(3 / k) / 4.
    assert abs(count_users(sketch) / 20_000 - 1) < 0.1
    assert abs(several_lines(sketch) - 0.25) < 0.05
    assert len(sketch) == 1025


def test_more_users_are_never_taken_for_fewer(monkeypatch):
    monkeypatch.setattr(script, "SKETCH_SIZE", 8)
    for seed in range(30):
        rng = random.Random(seed)
        draws = [rng.random() for _ in range(60)]
        estimates = [count_users(sketch_of(draws[:number])) for number in range(1, 61)]
        assert estimates[:8] == list(range(1, 9)) and estimates == sorted(estimates)


def test_the_sketch_is_the_same_however_the_users_were_cut(tmp_path, raw, monkeypatch):
    monkeypatch.setattr(script, "SKETCH_SIZE", 32)
    uids = [f"u{i}" for i in range(300)]
    uids += uids[:100]
    for number, size in itertools.product((20, 32, 33, 64, 65, 400), (1, 7, 33, 64, 150, 400)):
        whole, parts = collections.Counter(map(draw, uids[:number])), []
        for start in range(0, number, size):
            users = [(uid, ["v1"]) for uid in uids[start : min(start + size, number)]]
            path = (
                raw(tmp_path / f"{number}-{size}", users=users, click_file=f"{start:03}") / f"click_seq/{start:03}.json"
            )
            parts.append([FileRange(str(path))])
        _, sketch = survey(parts, num_workers=1)
        assert sketch == {place: whole[place] for place in sorted(whole)[:33]}


def test_users_on_several_lines_are_noticed(tmp_path, raw, clicks_like_real, capsys):
    data = clicks_like_real(200, seed=1)
    for day in range(3):
        users = [(uid, clicks[len(clicks) * day // 3 : len(clicks) * (day + 1) // 3]) for uid, clicks in data["users"]]
        raw(tmp_path / "raw", columns=data["columns"], users=users, click_file=f"day{day}")
    get_indexing(tmp_path / "raw", tmp_path)
    manifest = get_tfrecord(tmp_path / "raw", tmp_path, num_workers=1)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "about 200 users are on 600 lines, 100.0% of them on several" in err
    assert manifest["held_out_share"] == 0.5
    assert {"users": 200, "on_several_lines": 1.0, "lines": 600}.items() <= manifest["report"].items()


def test_one_line_a_user_is_nothing_to_say(records, capsys):
    records()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("long_format", [True, False], ids=["one click a line", "one click a user"])
def test_histories_that_are_all_of_one_click_are_refused(tmp_path, records, clicks_like_real, long_format):
    users = clicks_like_real(200, seed=1)["users"]
    users = [(uid, [click]) for uid, clicks in users for click in (clicks if long_format else clicks[:1])]
    assert len(users) == (3544 if long_format else 200)
    with pytest.raises(InputError, match="every history is of one click.*one line for each user"):
        records(users)
    assert not (tmp_path / "work/tfrecord/manifest.json").exists()


def test_clicks_keep_their_meaning_whenever_their_column_comes_goes_or_returns(tmp_path, raw, clicks_like_real):
    data = clicks_like_real(200, seed=1)
    columns, without = data["columns"], {cid: vids for cid, vids in data["columns"].items() if cid != "t0c"}
    reports = []
    for work, of_day in [("a", columns), ("a", without), ("a", columns), ("b", without), ("b", columns)]:
        get_indexing(raw(tmp_path / "raw", columns=of_day, users=data["users"]), tmp_path / work, num_workers=1)
        report = get_tfrecord(tmp_path / "raw", tmp_path / work, num_workers=1)["report"]
        reports.append((report["column_clicks"], report["unknown_columns"], report["unknown_videos"]))
    assert reports == [(2843, 0, 0)] * 3 + [(2843 - 182, 182, 0), (2843, 0, 0)]


# ---------------------------------------------------------------- workers and ranges


def test_one_and_two_workers_write_the_same_bytes(tmp_path, records, rerun, tiny_ranges):
    manifest = records(work="one")
    assert rerun("two", num_workers=2) == manifest
    one, two = folder_bytes(tmp_path / "one/tfrecord"), folder_bytes(tmp_path / "two/tfrecord")
    assert len(one) > 40 and one == two  # 4 files of each of more than ten ranges
    before = stamps(tmp_path / "two/tfrecord")
    rerun("two", num_workers=2)  # who looks what stands in parallel
    assert stamps(tmp_path / "two/tfrecord") == before


def test_small_ranges_give_the_same_records_and_counts_as_one(tmp_path, records, rerun, monkeypatch):
    whole = records(work="whole")
    monkeypatch.setattr(script, "RANGE_BYTES", 200)
    cut = rerun("cut")
    assert decoded(tmp_path / "cut/tfrecord") == decoded(tmp_path / "whole/tfrecord")
    before = stamps(tmp_path / "whole/tfrecord")
    assert rerun("whole") == whole  # finished work stands, however the input would be cut today
    assert stamps(tmp_path / "whole/tfrecord") == before
    assert len(whole["shards"]) == 3 and len(cut["shards"]) > 30
    assert cut | {"shards": 0, "range_bytes": 0} == whole | {"shards": 0, "range_bytes": 0}


def test_bad_lines_are_reported_by_their_place_in_the_file_whatever_the_ranges(
    tmp_path, raw, write_lines, monkeypatch, capsys
):
    monkeypatch.setattr(script, "RANGE_BYTES", 2000)
    raw(tmp_path / "raw", columns=COLUMNS, titles={"v1": "One"})
    good = [{"uid": f"u{i}", "click_seq": ["v1", "v2_c1"]} for i in range(300)]
    lines = [*good[:123], "{", *good[123:250], b"\xff", *good[250:]]
    path = write_lines(tmp_path / "raw/click_seq/clicks.json", lines)
    get_indexing(tmp_path / "raw", tmp_path)
    manifest = get_tfrecord(tmp_path / "raw", tmp_path, **SHORT)
    assert f"{path}: 2 of 302 lines are bad (line 124: not JSON, line 252: not UTF-8)" in capsys.readouterr().err
    assert manifest["report"]["skipped"] == {"not JSON": 1, "not UTF-8": 1}


def test_the_index_is_read_once(records, tiny_ranges, monkeypatch):
    loads = []
    load_index = script.load_index
    monkeypatch.setattr(script, "load_index", lambda work_dir: loads.append(work_dir) or load_index(work_dir))
    manifest = records()
    assert len(manifest["shards"]) > 30 and len(loads) == 1


@pytest.mark.parametrize(
    "columns", [{**COLUMNS, "c4": ["v1"]}, {"c1": ["v1"]}], ids=["a new column", "a retired column"]
)
def test_an_index_that_changes_while_records_are_written_shapes_none_of_them(
    tmp_path, raw, records, monkeypatch, columns
):
    first_pass, undisturbed = script.survey, records(work="undisturbed")

    def change_the_index(*arguments):
        get_indexing(raw(tmp_path / "raw", columns=columns), tmp_path / "work")
        return first_pass(*arguments)

    monkeypatch.setattr(script, "survey", change_the_index)
    assert records() == undisturbed
    assert folder_bytes(tmp_path / "work/tfrecord") == folder_bytes(tmp_path / "undisturbed/tfrecord")


# ---------------------------------------------------------------- manifest


def test_the_manifest_s_numbers_equal_a_count_by_hand(tmp_path, raw, write_lines, monkeypatch):
    raw(tmp_path / "raw", columns=COLUMNS, titles={"v1": "One"})
    monkeypatch.setattr(script, "RANGE_BYTES", 2000)
    users = histories(*[(7 * i * i) % 23 for i in range(400)])
    lines = [{"uid": uid, "click_seq": clicks} for uid, clicks in users]
    lines[100:100] = ["", "{"]
    lines[200:200] = ["[]"]
    write_lines(tmp_path / "raw/click_seq/a.json.gz", lines[:150])
    write_lines(tmp_path / "raw/click_seq/b.json", lines[150:])
    index = get_indexing(tmp_path / "raw", tmp_path)
    returned = get_tfrecord(tmp_path / "raw", tmp_path, **{**SHORT, "held_out_users": 120})
    manifest = json.loads((tmp_path / "tfrecord/manifest.json").read_text())
    assert manifest == returned

    clicks = [click for _, seq in users for click in seq]
    held = {uid: held_out(uid, seq) for uid, seq in users}
    trained = sum(CLICKS[click][1] > 0 for uid, seq in users for click in seq[1 : held[uid][1]])
    number_held = collections.Counter(split for split, _ in held.values())
    targets = trained + number_held["val"] + number_held["test"]
    lengths = sorted(len(seq) for _, seq in users)
    assert manifest["report"] == {
        "lines": 403,
        "skipped": {"blank": 1, "not JSON": 1, "wrong type of line": 1},
        "users": 400,
        "on_several_lines": 0.0,
        "clicks": len(clicks),
        "unknown_videos": sum(CLICKS[click][0] == 1 for click in clicks),
        "column_clicks": sum(CLICKS[click][1] > 0 for click in clicks),
        "unknown_columns": clicks.count("v1_c9"),
        "targets": targets,
        "history": {"p50": lengths[399 // 2], "p90": lengths[399 * 9 // 10], "max": 22},
    }
    windows = decoded(tmp_path / "tfrecord")
    for split, counts in manifest["splits"].items():
        of_split = [window for window in windows if window["split"] == split]
        lengths = collections.Counter(len(window["label"]) for window in of_split)
        assert counts["windows"] == [lengths[n] for n in range(9 if split == "train" else 17)]
        assert counts["targets"] == sum(sum(window["label"]) for window in of_split)
        assert counts["users"] == len({window["uid"] for window in of_split})
    assert manifest["splits"]["train"]["targets"] == trained
    assert [manifest["splits"][split]["users"] for split in ("val", "test")] == [
        number_held["val"],
        number_held["test"],
    ]
    assert manifest["constants"] == {"USER_MAX_LEN": 8, "WINDOW_OVERLAP": 3, "MIN_HISTORY": 1, "HELD_OUT_USERS": 120}
    assert (manifest["format"], manifest["held_out_share"]) == (script.FORMAT, 0.3)
    assert manifest["index"] == index.fingerprint()
    assert manifest["input"].keys() == {"a.json.gz", "b.json"} and len(set(manifest["input"].values())) == 2


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
    lengths = sorted(len(clicks) for _, clicks in USERS)
    assert f"history p50 {lengths[19 // 2]}, p90 {lengths[19 * 9 // 10]}, max 101" in out
    for split in ("train", "val", "test"):
        assert f"{split}: {manifest['splits'][split]['users']} users" in out


@pytest.mark.parametrize("catalogue", [True, False])
def test_clicks_on_ids_of_another_type_are_said_with_an_unknown_and_a_known_id(tmp_path, raw, capsys, catalogue):
    """Every video is clicked as 118.0, say, for 118, and of 240 clicks 180 in columns: those that stay known."""
    columns = {f"c{c}": [f"{c}1{v}" for v in range(8)] for c in range(1, 4)}
    users = [
        (f"u{u}", [f"{1 + (u + i) % 3}1{i}.0" + f"_c{1 + u % 3}" * (i % 4 > 0) for i in range(8)]) for u in range(30)
    ]
    titles = {vid: "T" for vids in columns.values() for vid in vids} if catalogue else None
    raw(tmp_path / "raw", columns=columns, users=users, titles=titles)
    get_indexing(tmp_path / "raw", tmp_path, min_clicks=1000)
    for _ in range(2):  # a second time, where the records stand
        report = get_tfrecord(tmp_path / "raw", tmp_path, num_workers=1)["report"]
        assert (report["clicks"], report["unknown_videos"], report["column_clicks"]) == (240, 240, 180)
        (line,) = capsys.readouterr().err.splitlines()
        assert "100% of the clicks are of videos on no shelf and in no catalogue" in line
        assert "'110.0' for one, where ids look like '110'; write the ids alike" in line


@pytest.mark.parametrize("known", [1, 2])
def test_clicks_half_of_which_are_known_are_nothing_to_say(records, capsys, known):
    records([(f"u{u}", ["new"] * 2 + ["v2_c1"] * known) for u in range(20)])
    assert capsys.readouterr().err.count("'new' for one, where ids look like 'v1'") == (known == 1)


# ---------------------------------------------------------------- refusals


def test_no_click_in_a_known_column_is_a_clear_error_and_writes_no_manifest(tmp_path, records):
    with pytest.raises(InputError, match=r"no click was made in a known column.*<vid>_<cid>.*cid2vids"):
        records([(f"u{i}", ["v1", "v2_c9", "v1"]) for i in range(50)])
    assert not (tmp_path / "work/tfrecord/manifest.json").exists()


def test_too_few_users_is_a_clear_error_that_says_how_many_are_needed(records):
    users = [(uid, ["v1", "v2_c1", "v2_c1"]) for uid in uids_between(0.1, 0.9, 20)]
    with pytest.raises(InputError, match=r"none of 20 users leaves a target for val; about 90 users are needed"):
        records(users, held_out_users=1)  # of 20: 1 - 0.95 ** n > 0.99 for n >= 90
    with pytest.raises(InputError, match=r"none of 20 users leaves a target for test; about 44 users are needed"):
        records([(uid, users[0][1]) for uid in uids_between(0, 0.9, 20)], held_out_users=2)  # 0.9 ** n for n >= 44


def test_no_target_left_for_training_is_a_clear_error(records):
    with pytest.raises(InputError, match=r"the column clicks of 20 users are all held out"):
        records([(f"u{i}", ["v1", "v2_c1"]) for i in range(20)], held_out_users=10)


def test_users_without_clicks_or_known_clicks_are_no_error(tmp_path, records):
    manifest = records([*histories(*[9] * 20), ("nothing", []), ("stranger", ["x", "y"]), ("once", ["v2_c1"])])
    assert manifest["report"]["users"] == 23
    users = by_user(decoded(tmp_path / "work/tfrecord"))
    assert "nothing" not in users
    [stranger], [once] = users["stranger"], users["once"]
    assert (stranger["user_feature"], stranger["label"]) == ([1, 1], [0, 0])
    assert (once["user_feature"], once["user_column"], once["label"]) == ([3], [1], [0])


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


@pytest.mark.parametrize(
    "bad", [dict(min_history=0), dict(min_history=4), dict(window_overlap=8), dict(held_out_users=0)]
)
def test_constants_that_contradict_each_other_are_refused_with_their_values(records, bad):
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


def test_a_run_that_failed_half_way_leaves_no_counts_to_the_next_in_the_same_process(records, monkeypatch):
    windows = itertools.count(1)

    def fail_at_the_twentieth(_):
        if next(windows) == 20:
            raise OSError("the disk is full")
        return b""

    first = records()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is full"):
        patch.setattr(script, "window_serializer", lambda: fail_at_the_twentieth)
        records(work="again")
    assert records(work="again") == first


def test_a_rerun_keeps_finished_shards(tmp_path, records, tiny_ranges):
    first = records()
    before = stamps(tmp_path / "work/tfrecord")
    again = get_tfrecord(tmp_path / "raw", tmp_path / "work", **SHORT)
    assert len(before) > 30 and stamps(tmp_path / "work/tfrecord") == before
    assert again == first


def test_a_rerun_with_nothing_to_do_does_not_import_tensorflow(tmp_path, records):
    records()
    program = f"import sys, get_tfrecord; get_tfrecord.get_tfrecord('raw', 'work', **{SHORT}); print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(script.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert not {"tensorflow", "keras"} & set(done.stdout.split())


def test_whatever_others_put_beside_the_records_stays(tmp_path, records, rerun):
    records()
    folder = tmp_path / "work/tfrecord"
    others = [
        "notes.txt",
        "train-notes.txt",
        "mine.tfrecord",
        "part-1.txt",
        "train-mine.tfrecord",
        "part-notes.json",
        "a/b.json",
        "train-x.tfrecord/c",
        "part-y.json/d",
    ]
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    stale = ["train-00009-0123456789abcdef.tfrecord", "part-00009-0123456789abcdef.json"]
    for name in stale:
        (folder / name).write_text("{}")
    rerun(min_history=2)
    assert [(folder / name).read_text() for name in others] == ["mine"] * len(others)
    assert not [name for name in stale if (folder / name).exists()]


def test_all_that_shaped_the_records_is_known_by_name(records):
    assert set(script.MADE_WITH) == records().keys() - {"range_bytes", "shards", "splits", "report"}


def test_a_damaged_manifest_is_made_again_from_the_shards(tmp_path, records, rerun):
    first = records()
    before = stamps(tmp_path / "work/tfrecord")
    (tmp_path / "work/tfrecord/manifest.json").write_text("{")
    assert rerun() == first and stamps(tmp_path / "work/tfrecord") == before


def test_a_killed_run_goes_on_with_the_shards_that_it_lacks(tmp_path, records, tiny_ranges):
    first = records()
    folder = tmp_path / "work/tfrecord"
    files, before = folder_bytes(folder), stamps(folder)
    part = sorted(folder.glob("part-*"))[3]
    part.unlink()  # it is written last
    lost = sorted(folder.glob("val-*"))[5]
    lost.unlink()
    (folder / "manifest.json").unlink()
    (folder / ".train-00001.tfrecord.0123456789abcdef0123456789abcdef.tmp").write_bytes(b"half")
    assert get_tfrecord(tmp_path / "raw", tmp_path / "work", **SHORT) == first
    assert folder_bytes(folder) == files
    made = {name for name, stamp in stamps(folder).items() if stamp != before[name]}
    numbers = {part.name.split("-")[1], lost.name.split("-")[1]}
    assert {name.split("-")[1] for name in made} == numbers


@pytest.mark.parametrize("content", ["{", "{}"], ids=["cut short", "empty"])
def test_a_damaged_part_file_is_made_again(tmp_path, records, rerun, content):
    first, (part,) = records(), (tmp_path / "work/tfrecord").glob("part-*")
    files = folder_bytes(part.parent)
    part.write_text(content)
    assert rerun() == first and folder_bytes(part.parent) == files


def test_a_shard_that_was_cut_short_is_made_again(tmp_path, records):
    records()
    folder = tmp_path / "work/tfrecord"
    files = folder_bytes(folder)
    shard = next(folder.glob("train-*"))
    shard.write_bytes(files[shard.name][:-10])
    get_tfrecord(tmp_path / "raw", tmp_path / "work", **SHORT)
    assert folder_bytes(folder) == files


def test_changed_input_remakes_its_shards_alone_and_removes_the_stale_ones(tmp_path, raw, records, monkeypatch):
    raw(tmp_path / "raw", users=[(uid + "a", clicks) for uid, clicks in USERS], click_file="a")
    monkeypatch.setattr(script, "RANGE_BYTES", (tmp_path / "raw/click_seq/a.json").stat().st_size)  # a task for each
    records()  # clicks.json comes after a.json
    before = stamps(tmp_path / "work/tfrecord")
    raw(tmp_path / "raw", users=[*USERS[:-1], (USERS[-1][0], ["v1"])])  # as many users, so the same share is held out
    get_tfrecord(tmp_path / "raw", tmp_path / "work", **SHORT)
    after = stamps(tmp_path / "work/tfrecord")
    assert len(before) == len(after) == 6
    assert {name for name in before if name in after} == {name for name in before if "-00000-" in name}
    assert all(after[name] == before[name] for name in after if name in before)


def test_input_rewritten_in_the_same_size_is_noticed(tmp_path, raw, records):
    records([(f"u{i}", ["v1", "v2_c1", "v1"]) for i in range(20)])
    path = tmp_path / "raw/click_seq/clicks.json"
    before = path.stat()
    raw(tmp_path / "raw", users=[(f"u{i}", ["v2", "v1_c1", "v1"]) for i in range(20)])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size
    get_tfrecord(tmp_path / "raw", tmp_path / "work", **SHORT)
    assert all(w["user_feature"][0] == 3 for w in decoded(tmp_path / "work/tfrecord"))


@pytest.mark.parametrize("change", [dict(user_max_len=9), dict(min_history=2), dict(held_out_users=8)])
def test_changed_constants_remake_every_shard(tmp_path, records, rerun, change):
    records()
    before = stamps(tmp_path / "work/tfrecord")
    rerun(**change)
    after = stamps(tmp_path / "work/tfrecord")
    assert len(after) == 3 and not before.keys() & after
    rerun("fresh", **change)
    assert folder_bytes(tmp_path / "fresh/tfrecord") == folder_bytes(tmp_path / "work/tfrecord")


def test_a_grown_index_remakes_the_records_with_its_new_videos(tmp_path, raw, records, rerun):
    records([(f"u{i}", ["new", "v2_c1", "v2_c1"]) for i in range(20)])
    assert all(w["user_feature"][:2] == [1, 3] for w in decoded(tmp_path / "work/tfrecord"))
    raw(tmp_path / "raw", columns={**COLUMNS, "c4": ["new"]})
    rerun()
    assert all(w["user_feature"][:2] == [7, 3] for w in decoded(tmp_path / "work/tfrecord"))


# ---------------------------------------------------------------- clicks that change meanwhile


def test_clicks_that_change_while_they_are_read_are_refused_and_the_next_run_reads_them_anew(
    records, rerun, tmp_path, monkeypatch
):
    former = records()
    path, look = tmp_path / "raw/click_seq/clicks.json", survey

    def changed_after(*arguments):
        seen = look(*arguments)
        path.write_text(path.read_text().replace("v2_c1", "v3_c2"))
        return seen

    path.write_text(path.read_text().replace('"v1"', '"v2"', 1))
    monkeypatch.setattr(script, "survey", changed_after)
    with pytest.raises(InputError, match=r"the clicks were changed while they were read; run get_tfrecord\.py again$"):
        rerun()
    folder = tmp_path / "work/tfrecord"
    assert json.loads((folder / "manifest.json").read_text()) == former
    assert all((folder / shard).exists() for shard in former["shards"])
    monkeypatch.setattr(script, "survey", look)
    assert rerun() == rerun("fresh")


def test_records_that_stand_are_no_older_than_the_clicks_they_were_compared_with(records, rerun, tmp_path):
    records()
    manifest, clicks = tmp_path / "work/tfrecord/manifest.json", tmp_path / "raw/click_seq/clicks.json"
    os.utime(manifest, (1, 1))
    rerun()
    assert manifest.stat().st_mtime >= clicks.stat().st_mtime


@pytest.mark.parametrize("limit", ["MAX_ID_CHARS", "MAX_LINE_BYTES"])
def test_another_limit_of_lines_is_noticed_and_makes_the_records_anew(records, rerun, monkeypatch, tmp_path, limit):
    former = records()
    monkeypatch.setitem(script.LIMITS, limit, 10**6)
    with pytest.raises(InputError, match=f"made with {limit} = .*, now it is 1000000; run get_tfrecord.py again"):
        load_manifest(tmp_path / "work", former["constants"])
    assert rerun()["shards"].keys().isdisjoint(former["shards"])
