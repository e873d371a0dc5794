"""get_tfrecord.py: every target once and from its past alone, what is served held out, the same bytes for any workers."""

import collections
import contextlib
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing.connection
import os
import re
from pathlib import Path

import get_indexing as toolbox
import get_tfrecord as script
from get_dataset import load_manifest
from get_indexing import BadLine, InputError, get_indexing
from get_tfrecord import (
    TASKS_AHEAD, ClickEncoder, History, get_tfrecord, held_out_share, map_files, map_on_workers, parse_history,
    split_click, split_windows, survey,
)  # fmt: skip

import pytest
from conftest import _clicks_like_real, _raw, _write_lines, draw, files_of, held_out_by_hand, one_line, run_python
from tensorflow.train import SequenceExample

COLUMNS = {"c1": ["v1", "v2"], "c2": ["v3"], "c_3": ["v_4", "v5"]}  # v1 2, v2 3, v3 4, v_4 5, v5 6
CLICKS = {  # click: (video number, column number), by hand
    "v1": (2, 0), "v2_c1": (3, 1), "v1_c1": (2, 1), "v3_c2": (4, 2), "v_4_c_3": (5, 3), "v5_c2": (6, 2), "v_4": (5, 0),
    "new": (1, 0), "new_c2": (1, 2), "v1_c9": (2, 0),
}  # fmt: skip
NOW = 1_700_000_000
SHORT = dict(USER_MAX_LEN=8, WINDOW_OVERLAP=3, HELD_OUT_USERS=6, num_workers=1)


def histories(*lengths, timed=True):
    """Return users (uid, clicks, times): they go through CLICKS in different ways; of every other one the times are known.

    Times are all at the edge of a visit: 1,799 seconds go on with one, 1,800 end it.
    """
    clicks, users = list(CLICKS), []
    for u, number in enumerate(lengths):
        gaps = (1800 if at % (2 + u % 5) == 0 else 1799 for at in range(1, number))
        times = list(itertools.accumulate(gaps, initial=NOW + u))[:number] if timed and u % 2 else None
        users.append((f"u{u}", [clicks[(u + i * i + i // 7) % len(clicks)] for i in range(number)], times))
    return users


def uids_between(low, high, number):
    """Return so many user ids whose draw is between two numbers."""
    return list(itertools.islice((f"w{i}" for i in itertools.count() if low <= draw(f"w{i}") < high), number))


def held_out(user, **how):
    """Return (split, the click from which on all is held out, the target's place) of a user; all columns are current."""
    uid, clicks, times = user
    return held_out_by_hand(uid, [CLICKS[click][1] > 0 for click in clicks], times, 0.25, **how)


USERS = [
    *histories(*[2, 3, 7, 8, 9, 12, 13, 14, 18, 19, 40, 101, 8, 8, 5, 1, 0] * 2, 20, 30, 11),
    *((uid, ["v1", "v2_c1", *["v1"] * 30], None) for uid in uids_between(0, 0.25, 1) + uids_between(0.75, 1, 1)),
    (uids_between(0, 0.25, 2)[1], ["v1_c1", "v1", "new"], None),
]
assert len({uid for uid, _, _ in USERS}) == 40  # so SHORT holds out the lowest and the highest quarter of the draws


def write_users(path, users):
    """Write users (uid, clicks, times or None) as a click file."""
    lines = [{"uid": uid, "click_seq": clicks} | ({"times": times} if times else {}) for uid, clicks, times in users]
    return _write_lines(path, lines or [""])


def make_records(folder, users=None, work="work", columns=COLUMNS, **arguments):
    """Make the records of users, or of the raw data as it is, in folder/work; return their manifest."""
    if users is not None:
        write_users(_raw(folder / "raw", columns=columns) / "click_seq/clicks.json", users)
    get_indexing(folder / "raw", folder / work)
    return get_tfrecord(folder / "raw", folder / work, **{**SHORT, **arguments})


@pytest.fixture
def records(tmp_path):
    """A function that makes the records of users under tmp_path/work, and returns their manifest."""
    return lambda users=USERS, **how: make_records(tmp_path, users, **how)


@pytest.fixture
def rerun(tmp_path):
    """A function that makes the records of the raw data as it is."""
    return lambda work="work", **how: make_records(tmp_path, work=work, **how)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder with the shards of USERS, made with SHORT."""
    folder = tmp_path_factory.mktemp("made")
    make_records(folder, USERS)
    return folder / "work/tfrecord"


def decoded(folder, split=""):
    """Return the windows of a folder's shards as plain values, by nothing but tf.train, in one order of theirs."""
    windows = []
    for path in folder.glob(f"{split}*.tfrecord"):
        for data in record_bytes(path):
            example = SequenceExample.FromString(data)
            context, lists = example.context.feature, example.feature_lists.feature_list
            windows.append({
                "split": path.name.split("-")[0],
                "uid": context["uid"].bytes_list.value[0].decode(),
                **{name: context[name].int64_list.value[0] for name in ("start", "repeated")},
                **{name: list(lists[name].feature[0].int64_list.value)
                   for name in ("user_feature", "user_column", "user_time")},
                "label": list(lists["label"].feature[0].float_list.value),
            })  # fmt: skip
    return sorted(windows, key=lambda window: (window["split"], window["uid"], window["start"]))


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


def stamps(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.tfrecord")}


# ---------------------------------------------------------------- lines and times


BAD = {
    "wrong type of click_seq": [dict(click_seq=of) for of in ("v1", ["v1", True], ["v1", None], [["v1"]])],
    "wrong type of uid": [dict(uid=False), dict(uid=1.5)],
    "empty id": [dict(uid="")],
    "not as many times as clicks": [dict(times=of) for of in ([NOW], [], NOW, [NOW] * 3)],
    "times that fall": [dict(times=of) for of in ([NOW, NOW - 1], [NOW, 0])],
    "times that are no unix seconds": [
        dict(times=[NOW * 1000, NOW * 1000 + 1]),  # milliseconds
        *(dict(times=[of, NOW]) for of in (-1, "2023-11-14", None, True, math.nan, math.inf, 10**11 + 1)),
        *(dict(now=of) for of in (NOW * 1000, "today")),
    ],
}


@pytest.mark.parametrize(("reason", "record"), [(reason, record) for reason, of in BAD.items() for record in of])
def test_a_bad_line_says_why(reason, record):
    with pytest.raises(BadLine, match=f"^{reason}$"):
        parse_history(dict(uid="x", click_seq=["v1", "v2"]) | record)


@pytest.mark.parametrize(
    ("record", "times", "now"),
    [
        ({}, [0, 0], 0),  # not known
        (dict(times=None), [0, 0], 0),
        (dict(times=[NOW, NOW], now=NOW + 9), [NOW, NOW], NOW + 9),
        (dict(times=[NOW + 0.25, NOW + 0.75], now=NOW + 1.5), [NOW, NOW], NOW + 1),  # in whole seconds
        (dict(times=[0, 10**11]), [0, 10**11], 0),
    ],
)
def test_times_are_whole_seconds_and_0_where_they_are_not_given(record, times, now):
    line = dict(uid=7, click_seq=[10, "10_7"]) | record
    assert parse_history(line) == History("7", ["10", "10_7"], times, now)  # integers are their decimal text


def test_the_encoder_gives_numbers_and_counts_known_videos_in_unknown_columns(tmp_path):
    get_indexing(_raw(tmp_path / "raw", columns=COLUMNS), tmp_path)
    _raw(tmp_path / "raw", columns={cid: vids for cid, vids in COLUMNS.items() if cid != "c2"})  # which is retired
    encoder = ClickEncoder(get_indexing(tmp_path / "raw", tmp_path))
    assert encoder.current == {1, 3}
    videos, columns = encoder.encode(list(CLICKS))
    assert list(zip(videos, columns, strict=True)) == list(CLICKS.values())
    assert (encoder.encode([]), encoder.unknown_columns, encoder.unknown_video) == (([], []), 1, "new")
    assert encoder.encode(["v1_c9", "v1_", "v_4_nan", "v_4_c_3", "other", "new_c2", "v3_None"]) == (
        [2, 2, 5, 5, 1, 1, 4], [0, 0, 0, 3, 0, 2, 0],
    )  # fmt: skip
    assert encoder.unknown_columns == 1 + 4


def test_split_click_equals_a_search_through_all_splits():
    videos, columns = {"a", "a_b", "b_a", "_", "a_"}, {"b", "b_a", "_b", "a_b_a"}
    for click in ("".join(letters) for length in range(8) for letters in itertools.product("ab_", repeat=length)):
        splits = [(click[:i], click[i + 1 :]) for i, letter in enumerate(click) if letter == "_"]
        in_column = [split for split in splits if split[1] in columns]
        if click in videos:
            assert split_click(click, videos, columns) == (click, None)
        elif both := [split for split in in_column if split[0] in videos]:
            assert split_click(click, videos, columns) in both
        elif in_column:
            assert split_click(click, videos, columns) == max(in_column, key=lambda split: len(split[1]))
        elif heads := [vid for vid, _ in splits if vid in videos]:
            assert split_click(click, videos, columns) == (max(heads, key=len), None)
        else:
            assert split_click(click, videos, columns) == (click, None)


def test_a_click_longer_than_any_known_ids_is_an_unknown_video():
    for length, expected in ((2000, ("_" * 1999, "c1")), (50_000, ("_" * 50_000 + "c1", None))):
        assert split_click("_" * length + "c1", {"v1"}, {"c1"}) == expected


# ---------------------------------------------------------------- windows and targets


@pytest.mark.parametrize(
    ("max_len", "overlap", "min_history"), [(8, 3, 1), (8, 3, 3), (8, 7, 2), (5, 1, 1), (200, 2, 1)]
)
def test_every_click_is_new_in_one_window_and_every_column_click_a_target_once(
    tmp_path, records, max_len, overlap, min_history
):
    records(USER_MAX_LEN=max_len, WINDOW_OVERLAP=overlap, MIN_HISTORY=min_history)
    users = by_user(decoded(tmp_path / "work/tfrecord"))
    splits = collections.Counter()
    for uid, clicks, times in USERS:
        new = [w["start"] + i for w in users[uid] for i in range(w["repeated"], len(w["label"]))]
        assert sorted(new) == list(range(len(clicks)))
        split, begin, place = held_out((uid, clicks, times), min_history=min_history)
        targets = collections.defaultdict(list)
        for window in users[uid]:
            targets[window["split"]] += [window["start"] + i + 1 for i, label in enumerate(window["label"]) if label]
        trained = [at for at in range(min_history, len(clicks[:begin])) if CLICKS[clicks[at]][1]]
        expected = {"train": trained} | ({split: [place]} if place else {})
        assert {name: sorted(of_split) for name, of_split in targets.items() if of_split} == {
            name: of_split for name, of_split in expected.items() if of_split
        }
        splits[split, times is None] += 1
    assert min(splits[name, timed] for name in ("train", "val", "test") for timed in (True, False)) > 1


def test_a_target_s_input_is_the_clicks_before_it_and_nothing_else(shards):
    clicks_of, windows = {uid: clicks for uid, clicks, _ in USERS}, decoded(shards)
    assert {window["split"] for window in windows} == {"train", "val", "test"}
    for window in windows:
        label, start = window["label"], window["start"]
        clicks = clicks_of[window["uid"]][start : start + len(label)]  # at i a causal tower has read positions 0 .. i
        assert list(zip(window["user_feature"], window["user_column"], strict=True)) == [CLICKS[c] for c in clicks]
        assert all(type(of) is float and of in (0.0, 1.0) for of in label) and label[-1] == 0.0


def test_clicks_whose_times_are_all_0_make_the_records_of_clicks_without_times(tmp_path):
    made, users = [], histories(*range(40), timed=False)
    for work, of_all in (("plain", users), ("zeros", [(uid, clicks, [0] * len(clicks)) for uid, clicks, _ in users])):
        manifest = make_records(tmp_path, of_all, work)
        records = sorted(path.read_bytes() for path in (tmp_path / work / "tfrecord").glob("*.tfrecord"))
        made.append((records, {name: manifest[name] for name in manifest.keys() - {"input", "shards"}}))
    assert made[0] == made[1] and len(made[0][0]) == 3


def test_windows_and_labels_of_a_small_history_by_hand():
    def windows_of(videos, columns, **changes):
        constants = dict(USER_MAX_LEN=5, WINDOW_OVERLAP=2, MIN_HISTORY=2) | changes
        times = [NOW + video for video in videos]
        return split_windows("u", videos, columns, times, {1}, 0.0, constants)["train"]

    assert windows_of([2, 3, 4, 5, 6, 7, 8], [1, 1, 1, 0, 2, 1, 0]) == [
        dict(uid="u", start=0, repeated=0, user_feature=[2, 3, 4, 5, 6], user_column=[1, 1, 1, 0, 2],
             user_time=[NOW + 2, NOW + 3, NOW + 4, NOW + 5, NOW + 6],
             label=[0, 1, 0, 1, 0]),  # the clicks 4 and, in a retired column, 6; 3 has only one before it
        dict(uid="u", start=3, repeated=2, user_feature=[5, 6, 7, 8], user_column=[0, 2, 1, 0],
             user_time=[NOW + 5, NOW + 6, NOW + 7, NOW + 8],
             label=[0, 1, 0, 0]),  # the click 7; 6 is a target of the window before
    ]  # fmt: skip
    (short,) = windows_of([2, 3], [1, 1], WINDOW_OVERLAP=4, MIN_HISTORY=4)
    assert short["label"] == [0, 0]  # no click has four before it
    (single,) = windows_of([2], [1])
    assert (single["user_feature"], single["label"]) == ([2], [0])
    assert windows_of([], []) == []


# ---------------------------------------------------------------- held out

[VAL], [TEST], [TRAIN] = uids_between(0, 0.25, 1), uids_between(0.75, 1, 1), uids_between(0.25, 0.75, 1)


@pytest.mark.parametrize(
    ("columns", "seconds", "min_history", "begin", "place"),
    [
        pytest.param([1, 0, 0, 2, 1], [0, 10, 5000, 5010, 5020], 1, 2, 3, id="the first column click of the last visit"),
        pytest.param([1, 0, 1, 1], [0, 10, 5000, 5010], 1, 2, 2, id="the visit's first click"),
        pytest.param([1, 2, 1, 0, 0], [0, 4000, 4010, 9000, 9010], 1, 1, 1, id="a last visit without one passed over"),
        pytest.param([1, 9, 1], [0, 4000, 4010], 1, 1, 2, id="a retired column passed over in the visit"),
        pytest.param([0, 1, 9], [0, 4000, 8000], 1, 1, 1, id="a visit to retired columns passed over"),
        pytest.param([1, 1, 1], [0, 10, 20], 1, None, None, id="a user of one visit"),
        pytest.param([1, 1, 0], [0, 10, 4000], 1, None, None, id="no column click after the first visit"),
        pytest.param([0, 1], [0, 1800], 1, 1, 1, id="away for VISIT_GAP"),
        pytest.param([0, 1], [0, 1799], 1, None, None, id="away for a second less"),
        pytest.param([1, 1, 1], [0, 4000, 8000], 2, 2, 2, id="MIN_HISTORY clicks before the visit"),
        pytest.param([1, 1, 0, 1], [0, 4000, 4010, 4020], 2, None, None, id="MIN_HISTORY clicks before the target alone"),
        pytest.param([1, 2, 9], None, 1, 1, 1, id="without times the last one in a current column"),
        pytest.param([1, 0], None, 1, None, None, id="without times none with clicks before it"),
    ],
)  # fmt: skip
def test_which_click_is_held_out_by_hand(columns, seconds, min_history, begin, place):
    settings = dict(USER_MAX_LEN=50, WINDOW_OVERLAP=2, MIN_HISTORY=min_history, VISIT_GAP=1800)
    videos, times = list(range(2, 2 + len(columns))), [NOW + at for at in seconds] if seconds else [0] * len(columns)
    for uid, split in [(VAL, "val"), (TEST, "test"), (TRAIN, "train")]:
        windows = split_windows(uid, videos, columns, times, {1, 2}, 0.25, settings)
        if place is None or split == "train":
            assert windows.keys() == {"train"} and windows["train"][0]["user_feature"] == videos
            continue
        [trained], [held] = windows["train"], windows[split]
        assert trained["user_feature"] == videos[:begin] and trained["user_time"] == times[:begin]
        assert (held["start"], held["repeated"], held["user_feature"], held["user_time"]) == (0, begin, videos, times)
        assert held["label"] == [float(at == place) for at in range(1, len(videos) + 1)]


@pytest.mark.parametrize("timed", [False, True])
def test_the_windows_of_a_held_out_user_by_hand(timed):
    settings = dict(USER_MAX_LEN=4, WINDOW_OVERLAP=2, MIN_HISTORY=1, VISIT_GAP=1800)
    videos = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    columns = [1, 1, 0, 1, 1, 1, 2, 0, 0, 0, 2, 0]  # column 2 is retired
    times = [0] * 12
    if timed:  # the last visit begins with video 7; its first click in a current column comes when a window is over
        columns = [1, 1, 0, 1, 1, 0, 2, 0, 0, 0, 1, 1]
        times = [NOW + 10 * at + 9000 * (at >= 5) for at in range(12)]

    def window(start, repeated, end, label):
        return dict(uid=uid, start=start, repeated=repeated, user_feature=videos[start:end],
                    user_column=columns[start:end], user_time=times[start:end], label=label)  # fmt: skip

    for uid, split in [(VAL, "val"), (TEST, "test")]:
        # The four clicks before it, itself and three after it; then the rest.
        whole = [window(1, 4, 9, [0, 0, 0, 1, 0, 0, 0, 0]), window(7, 2, 11, [0] * 4), window(9, 2, 12, [0] * 3)]
        # The four clicks before the visit and all of it to the target, in one window; then the rest.
        window_of_visit = [window(1, 4, 11, [0] * 8 + [1, 0]), window(9, 2, 12, [0] * 3)]
        assert split_windows(uid, videos, columns, times, {1}, 0.25, settings) == {
            "train": [window(0, 0, 4, [1, 0, 1, 0]), window(2, 2, 5, [0, 1, 0])],
            split: window_of_visit if timed else whole,
        }


@pytest.mark.parametrize("number", [1, 599, 600, 601, 1200, 1201, 5000, 10**9])
@pytest.mark.parametrize("former", [0, 0.5, 0.125, 2**-10])  # 0: none
def test_the_share_is_a_power_of_two_and_stays_while_it_gives_half_to_four_times_as_many(number, former):
    share, powers = held_out_share(number, 300, former), [2.0**-k for k in range(1, 40)]
    stays = 150 <= former * number <= 1200
    assert share == (former if stays else next(power for power in powers if power * number <= 600))


def test_a_user_more_or_fewer_changes_neither_the_share_nor_the_shards_of_other_files(tmp_path, rerun):
    clicks, users, runs = _raw(tmp_path / "raw", columns=COLUMNS) / "click_seq", histories(*[9] * 401), []
    write_users(clicks / "a.json", users[:200])
    for number in (200, 199, 198, 201):  # in the second file: HELD_OUT_USERS / number of users moved with each
        write_users(clicks / "b.json", users[200 : 200 + number])
        assert rerun(HELD_OUT_USERS=30, RANGE_BYTES=20_000)["held_out_share"] == 0.125
        runs.append(stamps(tmp_path / "work/tfrecord"))
    assert [len(run) for run in runs] == [len(runs[0])] * 4 and len(runs[0]) % 6 == 0
    assert all(len(runs[0].items() & run.items()) == len(run) / 2 for run in runs[1:])


def test_as_users_come_nobody_is_held_out_who_was_trained_on_before(tmp_path, records):
    sets, shares = [], []
    for number in (40, 41, 80, 160, 320, 640):
        shares.append(records(histories(*[9] * number, timed=False), HELD_OUT_USERS=12)["held_out_share"])
        held = {split: {w["uid"] for w in decoded(tmp_path / "work/tfrecord", split)} for split in ("val", "test")}
        assert all(held.values())
        sets.append((held, {f"u{u}" for u in range(number)}))
    for (few, known), (many, _) in itertools.pairwise(sets):
        assert all(many[split] & known <= few[split] for split in ("val", "test"))
    assert shares == [0.5, 0.5, 0.5, 0.125, 0.125, 0.03125]


# ---------------------------------------------------------------- what is odd in the data


def test_users_on_several_lines_are_noticed(tmp_path, capsys):
    data = _clicks_like_real(200, seed=1)
    for day in range(3):
        users = [(uid, clicks[len(clicks) * day // 3 : len(clicks) * (day + 1) // 3]) for uid, clicks in data["users"]]
        _raw(tmp_path / "raw", columns=data["columns"], users=users, click_file=f"day{day}")
    get_indexing(tmp_path / "raw", tmp_path)
    manifest = get_tfrecord(tmp_path / "raw", tmp_path, num_workers=1)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "about 200 users are on 600 lines, 100.0% of them on several" in err
    assert manifest["held_out_share"] == 0.5
    assert {"users": 200, "on_several_lines": 1.0, "lines": 600}.items() <= manifest["report"].items()


def test_clicks_keep_their_meaning_whenever_their_column_comes_goes_or_returns(tmp_path):
    data = _clicks_like_real(200, seed=1)
    columns, without = data["columns"], {cid: vids for cid, vids in data["columns"].items() if cid != "t0c"}
    titles, reports = {vid: "T" for vids in columns.values() for vid in vids}, []
    for work, of_day in [("a", columns), ("a", without), ("a", columns), ("b", without), ("b", columns)]:
        get_indexing(_raw(tmp_path / "raw", columns=of_day, users=data["users"], titles=titles), tmp_path / work)
        report = get_tfrecord(tmp_path / "raw", tmp_path / work, num_workers=1)["report"]
        reports.append((report["column_clicks"], report["unknown_columns"], report["unknown_videos"]))
    assert reports == [(2843, 0, 0)] * 3 + [(2843 - 182, 182, 0), (2843, 0, 0)]


@pytest.mark.parametrize("twice", [False, True])
def test_events_that_are_logged_twice_are_said_with_their_share(records, capsys, twice):
    real = _clicks_like_real(40, 3)
    users = [(uid, [click for click in clicks for _ in range(1 + twice)], None) for uid, clicks in real["users"]]
    report = records(users, columns=real["columns"])["report"]
    assert report["repeated_clicks"] == sum(a == b for _, clicks, _ in users for a, b in itertools.pairwise(clicks))
    said = [line for line in capsys.readouterr().err.splitlines() if "repeat the one before" in line]
    assert len(said) == twice
    assert not twice or said[0].startswith(f"{report['repeated_clicks'] / report['clicks']:.0%} of the clicks repeat")


@pytest.mark.parametrize(
    ("written", "shown", "catalogue"),
    [
        (";".join, "'t0a-0;t0a-1;t0a-2;t0a-3;t0a-4'", False),
        (lambda vids: [f"{vid}\u200b" for vid in vids], r"'t0a-0\u200b'", True),
    ],
    ids=["semicolon", "zero-width space"],
)
def test_shelves_whose_videos_nobody_clicks_are_said_with_the_odd_characters_written_out(
    tmp_path, capsys, written, shown, catalogue
):
    data = _clicks_like_real(200, seed=1)
    titles = {vid: "T" for vids in data["columns"].values() for vid in vids} if catalogue else None
    columns = {cid: written(vids) for cid, vids in data["columns"].items()}
    folder = _raw(tmp_path / "raw", columns=columns, users=data["users"], titles=titles)
    get_indexing(folder, tmp_path)
    with contextlib.suppress(InputError):
        get_tfrecord(folder, tmp_path, num_workers=1)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nobody clicked ")]
    number = 12 if isinstance(columns["t0a"], str) else 60
    [line] = said
    assert f"nobody clicked {number} of the {number} videos on the shelves, {shown} for one" in line
    assert re.search(r"where clicks are like 't\d[abc]-\d'", line)


def test_a_click_file_that_was_cut_is_said_with_how_many_clicks_there_were(records, rerun, tmp_path, capsys):
    before, path = records()["report"]["clicks"], tmp_path / "raw/click_seq/clicks.json"
    lines = path.read_text().splitlines(keepends=True)
    for kept, said in ((len(lines) * 3 // 4, False), (len(lines) // 4, True)):
        path.write_text("".join(lines[:kept]))
        clicks = rerun()["report"]["clicks"]
        line = f"{clicks:,} clicks, where the former records had {before:,}: is a click file cut or missing?"
        assert (line in capsys.readouterr().err) == said
        before = clicks


def test_a_user_with_more_than_a_hundredth_of_all_clicks_is_said(records, capsys):
    users = [(f"u{n}", ["v1", "v2_c1"], None) for n in range(1000)]
    records([*users, ("machine", ["v1", "v2_c1"] * 11, None)])
    assert "one user has 22 of the 2,022 clicks" in capsys.readouterr().err
    records([*users, ("busy", ["v1", "v2_c1"] * 10, None)])
    assert "one user" not in capsys.readouterr().err
    records([*users[:200], ("machine", ["v1", "v2_c1"] * 12, None)])  # of a few users each has a larger part
    assert "one user has 24 of the 424 clicks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("known", "unknown", "line"),
    [
        (3, 0, ""),
        (2, 1, "33.3% of the clicks are of unknown videos; vid2title lines make them known"),
        (2, 2, "50.0% of the clicks are of unknown videos; vid2title lines make them known"),
        (2, 3, "60% of the clicks are of videos on no shelf and in no catalogue, '118.0' for one, where ids look like 'v1'; "),
    ],
)  # fmt: skip
def test_clicks_on_unknown_videos_are_said_and_above_one_half_with_an_id_of_each_kind(
    records, rerun, capsys, known, unknown, line
):
    users = [(f"u{u}", ["118.0", "118.0_c2", "118.0"][:unknown] + ["v2_c1"] * known, None) for u in range(20)]
    for make in (lambda: records(users), rerun):  # a second time, where the records stand
        assert make()["report"]["unknown_videos"] == 20 * unknown
        err = [said for said in capsys.readouterr().err.splitlines() if "of the clicks are of" in said]
        assert len(err) == (unknown > 0) and "".join(err).startswith(line)


# ---------------------------------------------------------------- workers and ranges


def test_records_and_counts_are_the_same_for_any_workers_and_ranges_and_their_bytes_for_any_workers(
    tmp_path, records, rerun
):
    whole, cut = records(work="whole"), rerun("cut", RANGE_BYTES=800)
    assert decoded(tmp_path / "cut/tfrecord") == decoded(tmp_path / "whole/tfrecord")
    assert len(whole["shards"]) == 3 and len(cut["shards"]) > 30
    assert (cut["splits"], cut["report"]) == (whole["splits"], whole["report"])
    before = stamps(tmp_path / "cut/tfrecord")
    assert rerun("two", num_workers=2, RANGE_BYTES=800) == rerun("cut", num_workers=2, RANGE_BYTES=800) == cut
    assert files_of(tmp_path / "two/tfrecord") == files_of(tmp_path / "cut/tfrecord")
    assert stamps(tmp_path / "cut/tfrecord") == before  # who looks what stands in parallel


def test_results_come_in_the_order_of_the_tasks_which_are_handed_out_as_they_are_taken(tmp_path):
    tasks, ahead = [str(tmp_path / f"{number:02}") for number in range(40)], 2 * TASKS_AHEAD
    results = map_on_workers(os.mkdir, tasks, 2)
    assert not any(tmp_path.iterdir())
    for taken, _ in enumerate(results, start=1):
        made = len(list(tmp_path.iterdir()))
        assert taken <= made <= ahead * -(-taken // ahead)  # only so many results wait
    assert list(map_on_workers(abs, range(-40, 0), 2)) == list(range(40, 0, -1))
    for number_of_workers, few in ((2, [3]), (1, [3, 4]), (2, [])):  # they need no process: none could be sent a lambda
        assert list(map_files(lambda task: -task, few, "count", number_of_workers)) == [-task for task in few]
    for worker in multiprocessing.active_children():  # each ends once all results are taken; the pool itself joins it
        assert multiprocessing.connection.wait([worker.sentinel], 60)


def test_a_worker_that_dies_ends_in_one_line_and_an_error_in_a_worker_is_raised_here():
    with pytest.raises(InputError, match=r"^a worker process died.*lower NUM_WORKERS in get_tfrecord\.py$"):
        list(map_files(os._exit, [1, 1], "die", 2))
    with pytest.raises(FileNotFoundError, match="/no/such/folder"):
        list(map_files(os.listdir, ["/", "/no/such/folder"], "list", 2))


@pytest.mark.parametrize(
    ("limit", "cores"), [("max 100000", 8), ("300000 100000", 3), ("50000 100000", 1), ("9900000 100000", 8), ("", 8)]
)
def test_a_control_group_limits_the_cores(monkeypatch, limit, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(Path, "read_text", lambda _: limit)
    assert script.count_cores() == cores


# ---------------------------------------------------------------- manifest


def test_the_manifest_s_numbers_equal_a_count_by_hand(tmp_path, capsys):
    users = histories(*[(7 * i * i) % 23 for i in range(400)])
    path = write_users(_raw(tmp_path / "raw", columns=COLUMNS) / "click_seq/b.json", users)
    lines = path.read_text().splitlines()
    lines[100:100] = ["", "{"]
    lines[200:200] = ["[]"]
    _write_lines(tmp_path / "raw/click_seq/a.json.gz", lines[:150])
    _write_lines(path, lines[150:])
    index = get_indexing(tmp_path / "raw", tmp_path)
    settings = dict(USER_MAX_LEN=8, WINDOW_OVERLAP=3, HELD_OUT_USERS=60, RANGE_BYTES=2000)
    returned = get_tfrecord(tmp_path / "raw", tmp_path, num_workers=1, **settings)
    manifest = json.loads((tmp_path / "tfrecord/manifest.json").read_text())
    assert manifest == returned
    assert set(script.MADE_WITH) == manifest.keys() - {"shards", "splits", "report"}
    drawn = sorted([draw(uid), bool(times)] for uid, _, times in users if not 0.25 <= draw(uid) < 0.75)
    assert manifest["held_out"] == drawn[-100:] and len(drawn) > 100
    out, err = capsys.readouterr()  # places are those in the file, not in a range of it
    assert "a.json.gz: 1 of 150 lines are bad (line 102: not JSON)" in err
    assert "b.json: 1 of 253 lines are bad (line 51: wrong type of line)" in err

    clicks = [click for _, seq, _ in users for click in seq]
    held = {user[0]: held_out(user) for user in users}
    trained = sum(CLICKS[click][1] > 0 for uid, seq, _ in users for click in seq[1 : held[uid][1]])
    number_held = collections.Counter(split for split, _, _ in held.values())
    lengths = sorted(len(seq) for _, seq, _ in users)
    timed = [times for _, _, times in users if times]
    assert manifest["report"] == {
        "lines": 403,
        "skipped": {"blank": 1, "not JSON": 1, "wrong type of line": 1},
        "users": 2 * sum(not 0.25 <= draw(uid) < 0.75 for uid, _, _ in users),
        "on_several_lines": 0.0,
        "clicks": len(clicks),
        "unknown_videos": sum(CLICKS[click][0] == 1 for click in clicks),
        "unknown_video": "new",
        "column_clicks": sum(CLICKS[click][1] > 0 for click in clicks),
        "unknown_columns": clicks.count("v1_c9"),
        "repeated_clicks": sum(
            CLICKS[one] == CLICKS[other] for _, seq, _ in users for one, other in itertools.pairwise(seq)
        ),
        "targets": trained + number_held["val"] + number_held["test"],
        "history": {"p50": lengths[399 // 2], "p90": lengths[399 * 9 // 10], "max": 22},
        "visits": sum(1 + sum(b - a >= 1800 for a, b in itertools.pairwise(times)) for times in timed),
        "shelved_videos": 5,
        "never_clicked": 5 - len({CLICKS[click][0] for click in clicks} - {1}),
        "shelved_example": "v1",
        "clicked_example": "new",
        "days": ["2023-11-14", "2023-11-15"],  # NOW is 22:13 of that day, and a history of 22 clicks takes 10.5 hours
    }
    assert f"403 lines (skipped: 1 blank, 1 not JSON, 1 wrong type of line), {len(clicks):,} clicks, " in out
    assert f"max 22; {manifest['report']['visits']} visits, 2023-11-14 to 2023-11-15\n" in out
    windows = decoded(tmp_path / "tfrecord")
    for split, counts in manifest["splits"].items():
        assert f"{split}: {counts['users']} users -> {counts['targets']:,} targets in " in out
        of_split = [window for window in windows if window["split"] == split]
        lengths = collections.Counter(str(len(window["label"])) for window in of_split)
        assert counts["windows"] == lengths and max(map(int, lengths)) <= (8 if split == "train" else 16)
        assert counts["targets"] == sum(sum(window["label"]) for window in of_split)
        assert counts["users"] == len({window["uid"] for window in of_split})
    assert manifest["splits"]["train"]["targets"] == trained
    assert all(manifest["splits"][split]["users"] == number_held[split] for split in ("val", "test"))
    files = files_of(tmp_path / "tfrecord")
    shards = {name: data for name, data in files.items() if name.endswith(".tfrecord")}
    assert manifest["shards"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in shards.items()
    }
    parts = {name for name in files if name.startswith("part-")}
    assert len(shards) == 3 * len(parts) > 9 and set(files) == {"manifest.json", *shards, *parts}
    assert manifest["constants"].items() >= (settings | dict(MIN_HISTORY=1, VISIT_GAP=1800)).items()
    assert "MAX_BAD_FRACTION" not in manifest["constants"]  # it shapes nothing
    assert (manifest["format"], manifest["held_out_share"]) == (script.FORMAT, 0.25)
    assert manifest["index"].items() > index.fingerprint().items()
    assert manifest["input"] == {
        name: hashlib.sha256("".join(f"{line}\n" for line in part).encode()).hexdigest()
        for name, part in (("a.json.gz", lines[:150]), ("b.json", lines[150:]))
    }


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("users", "held", "message"),
    [
        ([(f"u{i}", ["v1", "v2_c9", "v1"]) for i in range(50)], 6, r"no click was made in a known column.*cid2vids"),
        ([], 6, "nothing but blanks; copy it again"),
        ([("u", ["v1", "v2_c1"])] * 50, 6, r"50 lines hold about \d uids; write one line for each user"),
        ([(f"u{i}", ["v2_c1"]) for i in range(50)], 6, "every history is of one click.*one line for each user"),
        ([(uid, ["v1", "v2_c1"]) for uid in uids_between(0.25, 1, 40)], 6, "40 lines leave no target for val; about 17"),
        ([(uid, ["v1", "v2_c1"]) for uid in uids_between(0, 0.75, 40)], 6, "40 lines leave no target for test; about 17"),
        ([(f"u{i}", ["v1", "v2_c1"]) for i in range(20)], 20, "all column clicks are held out; more users or longer"),
    ],
    ids=["no column click", "blank lines alone", "the same uid", "one click a line", "no validation", "no test", "no training"],
)  # fmt: skip
def test_clicks_that_cannot_train_are_one_clear_error_and_write_no_manifest(tmp_path, records, users, held, message):
    with pytest.raises(InputError, match=message):
        records([(*user, None) for user in users], HELD_OUT_USERS=held)
    assert not (tmp_path / "work/tfrecord/manifest.json").exists()


def test_a_missing_or_empty_click_folder_is_named(tmp_path):
    get_indexing(_raw(tmp_path / "raw", columns=COLUMNS), tmp_path)
    for make in (lambda: None, (tmp_path / "raw/click_seq").mkdir):
        make()
        with pytest.raises(InputError, match=f"{tmp_path}/raw/click_seq"):
            get_tfrecord(tmp_path / "raw", tmp_path)


@pytest.mark.parametrize("bad", [dict(MIN_HISTORY=4), dict(WINDOW_OVERLAP=8)])
def test_constants_that_contradict_each_other_are_refused_with_their_values(records, bad):
    [(name, value)] = bad.items()
    with pytest.raises(InputError, match=f"MIN_HISTORY <= WINDOW_OVERLAP < USER_MAX_LEN.*'{name}': {value}"):
        records(**bad)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("clicks.json", b'{"uid": "u", "click_seq": ["v1", "v2_c1"]}\n{\n', r"clicks\.json: 1 of 2 lines are bad"),
        ("clicks.json", b'{"uid": "u", "click_seq": ["v1", "v1"]}', "no click was made"),
        ("more.json.gz", gzip.compress(b"{}\n")[:-10], r"more\.json\.gz: not a whole gzip file"),
        ("empty.json", b"", r"empty\.json: an empty file; copy it again"),
        ("empty.json.gz", b"", r"empty\.json\.gz: an empty file; copy it again"),
    ],
    ids=["bad lines", "no column click", "cut gzip", "empty file", "empty gzip"],
)
def test_a_run_that_stops_says_one_line_and_leaves_the_former_records_as_they_were(
    tmp_path, records, name, content, message
):
    records()
    before = files_of(tmp_path / "work/tfrecord")
    (tmp_path / "raw/click_seq" / name).write_bytes(content)
    assert re.search(message, one_line(get_tfrecord, tmp_path / "raw", tmp_path / "work", **SHORT))
    after = files_of(tmp_path / "work/tfrecord")
    assert before.items() <= after.items() and not [name for name in after if ".tmp." in name]


# ---------------------------------------------------------------- reruns


def test_the_content_of_a_file_is_that_of_its_bytes_and_the_same_when_packed(tmp_path):
    lines = [{"cid": "ü", "vids": []}, "", "x" * 3_000_000]
    plain, packed = (_write_lines(tmp_path / f"x{ending}", lines) for ending in (".json", ".json.gz"))
    digest = hashlib.sha256(plain.read_bytes()).hexdigest()
    assert script.content_of(str(plain)) == script.content_of(str(packed)) == (digest, 3)


def test_a_rerun_with_nothing_to_do_keeps_every_shard_and_does_not_import_tensorflow(tmp_path, records):
    records(RANGE_BYTES=800)
    before = stamps(tmp_path / "work/tfrecord")
    arguments = SHORT | dict(RANGE_BYTES=800)
    program = f"import sys, get_tfrecord; get_tfrecord.get_tfrecord('raw', 'work', **{arguments}); print(*sys.modules)"
    done = run_python(tmp_path, "-c", program)
    assert done.returncode == 0 and not {"tensorflow", "keras"} & set(done.stdout.split())
    assert len(before) > 30 and stamps(tmp_path / "work/tfrecord") == before


def test_whatever_others_put_beside_the_records_stays(tmp_path, records, rerun):
    records()
    folder = tmp_path / "work/tfrecord"
    others = ["notes.txt", "mine.tfrecord", "part-1.txt", "train-mine.tfrecord", "part-notes.json", "a/b.json",
              "train-0123456789abcde.tfrecord", "part-fedcba9876543210.json/d"]  # fmt: skip
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    stale = ["train-0123456789abcdef.tfrecord", "part-0123456789abcdef.json", f".tmp.{'a' * 32}.part-1.json"]
    for name in stale:
        (folder / name).write_text("{}")
    rerun(MIN_HISTORY=2)
    assert [(folder / name).read_text() for name in others] == ["mine"] * len(others)
    assert not [name for name in stale if (folder / name).exists()]


OTHER_FORMAT = b'{"format": 4, "held_out_share": 0.125}'  # a share that would stay


@pytest.mark.parametrize(
    ("pattern", "content"),
    [("manifest*", b"{"), ("manifest*", OTHER_FORMAT), ("part-*", b"{"), ("part-*", b"{}"), ("val-*", b"")],
)
def test_a_damaged_file_and_a_manifest_of_another_format_are_made_again(tmp_path, records, rerun, pattern, content):
    first, folder = records(), tmp_path / "work/tfrecord"
    files = files_of(folder)
    (path,) = folder.glob(pattern)
    path.write_bytes(content)
    assert rerun() == first and files_of(folder) == files


def test_a_task_s_files_are_named_by_the_bytes_that_they_were_made_of(tmp_path, rerun):
    clicks, folder = _raw(tmp_path / "raw", columns=COLUMNS) / "click_seq", tmp_path / "work/tfrecord"
    users = {name: [(f"{name}{i}", ["v1", "v2_c1", "v1"], None) for i in range(20)] for name in "abcd"}
    [size] = {write_users(clicks / f"{name}.json", users[name]).stat().st_size for name in "bcd"}

    def made():
        rerun(RANGE_BYTES=size)  # a task for each file
        return stamps(folder)

    before = made()
    (clicks / "b.json").write_bytes((clicks / "b.json").read_bytes())
    os.utime(clicks / "c.json", (1, 1))
    assert made() == before and len(before) == 9
    write_users(clicks / "a.json", users["a"])
    more = made()  # all others are a place further back
    assert len(more) == 12 and before.items() <= more.items()
    (clicks / "c.json").write_text((clicks / "c.json").read_text().replace('"v1"', '"v2"'))
    os.utime(clicks / "c.json", (1, 1))  # of the same size and date
    after = made()
    assert len(after) == 12 and len(after.items() & more.items()) == 9
    changed = {w["uid"] for w in decoded(folder) if w["user_feature"][0] == 3}
    assert changed == {f"c{i}" for i in range(20)}
    (clicks / "a.json").unlink()
    assert len(made().items() & after.items()) == 9 == len(stamps(folder))


@pytest.mark.parametrize(
    "change", [dict(USER_MAX_LEN=9), dict(MIN_HISTORY=2), dict(VISIT_GAP=900), dict(HELD_OUT_USERS=5), "MAX_ID_CHARS"]
)
def test_another_constant_is_noticed_and_remakes_every_shard(tmp_path, records, rerun, monkeypatch, change):
    former, before = records(), stamps(tmp_path / "work/tfrecord")
    if change == "MAX_ID_CHARS":  # of get_indexing.py: a longer line is another line that is skipped
        monkeypatch.setattr(toolbox, change, 999)
        now = script.record_constants(**{name: value for name, value in SHORT.items() if name.isupper()})
        with pytest.raises(InputError, match=r"with MAX_ID_CHARS = 1000, now it is 999; run get_tfrecord\.py again"):
            load_manifest(tmp_path / "work", now)
        change = {}
    manifest = rerun(**change)
    after = stamps(tmp_path / "work/tfrecord")
    assert manifest["constants"] != former["constants"] and len(after) == 3 and not before.keys() & after
    assert rerun("fresh", **change) == manifest
    assert files_of(tmp_path / "fresh/tfrecord") == files_of(tmp_path / "work/tfrecord")


# ---------------------------------------------------------------- clicks that change meanwhile


@pytest.mark.parametrize("returns", [False, True], ids=["they stay changed", "they become what they were"])
def test_clicks_that_change_while_they_are_read_are_refused_and_the_next_run_reads_them_anew(
    records, rerun, tmp_path, monkeypatch, returns
):
    former, path = records(), tmp_path / "raw/click_seq/clicks.json"
    path.write_text(path.read_text().replace('"v1"', '"v2"', 1))
    seen = path.read_text()

    def changed_after(*arguments):
        contents = survey(*arguments)
        path.write_text(seen.replace("v2_c1", "v3_c2"))
        return contents

    with monkeypatch.context() as patch:
        patch.setattr(script, "survey", changed_after)
        with pytest.raises(InputError, match=r"clicks.json: changed while it was read; run get_tfrecord\.py again$"):
            rerun()
    folder = tmp_path / "work/tfrecord"
    assert json.loads((folder / "manifest.json").read_text()) == former
    assert all((folder / shard).exists() for shard in former["shards"])
    if returns:
        path.write_text(seen)
    assert rerun() == rerun("fresh")
    assert files_of(folder) == files_of(tmp_path / "fresh/tfrecord")
