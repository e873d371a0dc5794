"""get_indexing.py: numbers for life, every raw format, clicks that keep their meaning, and the toolbox of all scripts."""

import collections
import contextlib
import errno
import gzip
import io
import itertools
import json
import multiprocessing.popen_spawn_posix
import multiprocessing.synchronize
import os
import random
import signal
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import Future
from concurrent.futures.process import _ExecutorManagerThread as ExecutorManagerThread
from pathlib import Path

import get_indexing as script
from get_indexing import (
    FileRange,
    InputError,
    Tallies,
    Tally,
    cut_files,
    find_files,
    get_indexing,
    in_turn,
    load_index,
    map_files,
    own_clicks,
    read_lines,
    read_records,
    signals_waiting,
    split_click,
)

import pytest

ROOT = Path(__file__).parent.parent
PAIR = {"c1": ["v1", "v2"], "c2": ["v2", "v3"]}
MANY = {f"c{i}": [f"v{i}"] for i in range(120)}  # enough that one bad line is under one in a hundred


def written(work_dir):
    """Return the two files of the index as {name: object}, by nothing but json."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(Path(work_dir, "indexing").iterdir())}


def index_bytes(work_dir):
    return {path.name: path.read_bytes() for path in Path(work_dir, "indexing").iterdir()}


def run_as_script(folder, *arguments, program=ROOT / "get_indexing.py", redirect="", **environment):
    """Run `python get_indexing.py` in a folder, as a user would in a shell."""
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, str(program), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def meaning(click, index):
    """Return (vid, cid) of a click under an index, None for an unknown video and for no known column."""
    vid, cid = split_click(click, index.videos, index.columns)
    return vid if vid in index.videos else None, cid


# ---------------------------------------------------------------- numbers


def test_videos_count_from_2_and_columns_keep_the_order_of_the_file(tmp_path, raw):
    raw(tmp_path / "raw", columns={"c9": ["v5", "v1"], "c1": ["v1", "v3"]}, titles={"v3": "Three", "v0": "Nought"})
    index = get_indexing(tmp_path / "raw", tmp_path)
    files = written(tmp_path)
    assert files["vid2idx"] == {"v5": 2, "v1": 3, "v3": 4, "v0": 5}
    assert list(files["cid2vidx"].items()) == [("c9", [2, 3]), ("c1", [3, 4])]
    assert index == load_index(tmp_path) == (files["vid2idx"], files["cid2vidx"])


def test_numbers_are_for_life(tmp_path, raw):
    raw(tmp_path / "monday", columns={"c1": ["v1", "v2"], "c2": ["v3"], "c3": ["v2"]}, users=[])
    get_indexing(tmp_path / "monday", tmp_path)
    assert written(tmp_path)["vid2idx"] == {"v1": 2, "v2": 3, "v3": 4}
    # c2 is gone, and v3 with it; c4 is new and stands first; c1 is filled anew; v2 leaves c3.
    raw(tmp_path / "tuesday", columns={"c4": ["v9", "v1"], "c3": ["v8"], "c1": ["v2", "v7", "v1"]}, users=[])
    get_indexing(tmp_path / "tuesday", tmp_path)
    files = written(tmp_path)
    assert files["vid2idx"] == {"v1": 2, "v2": 3, "v3": 4, "v9": 5, "v8": 6, "v7": 7}
    assert list(files["cid2vidx"].items()) == [("c1", [3, 7, 2]), ("c2", []), ("c3", [6]), ("c4", [5, 2])]
    # c2 comes back to its own place, and v3 to its own number.
    raw(tmp_path / "wednesday", columns={"c2": ["v3"]}, users=[])
    get_indexing(tmp_path / "wednesday", tmp_path)
    files = written(tmp_path)
    assert list(files["cid2vidx"].items()) == [("c1", []), ("c2", [4]), ("c3", []), ("c4", [])]
    assert len(files["vid2idx"]) == 6


def test_same_input_gives_the_same_bytes(tmp_path, raw, clicks_like_real):
    raw(tmp_path / "raw", **clicks_like_real(50, seed=1))
    for work in ("first", "second"):
        get_indexing(tmp_path / "raw", tmp_path / work, min_clicks=2)
    assert index_bytes(tmp_path / "first") == index_bytes(tmp_path / "second")
    get_indexing(tmp_path / "raw", tmp_path / "first", min_clicks=2)
    assert index_bytes(tmp_path / "first") == index_bytes(tmp_path / "second")


@pytest.mark.parametrize("half", ["vid2idx.json", "cid2vidx.json"])
def test_an_index_of_which_a_half_is_gone_or_damaged_is_to_be_restored_and_not_numbered_anew(tmp_path, raw, half):
    get_indexing(raw(tmp_path / "raw", columns=PAIR, users=[]), tmp_path)
    get_indexing(
        raw(tmp_path / "raw", columns={"new": []}), tmp_path
    )  # so that all lists are empty but the one of videos
    path, before = tmp_path / "indexing" / half, index_bytes(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:9])
    with pytest.raises(InputError, match=rf"{half}: damaged .*; restore it and run get_indexing\.py again"):
        get_indexing(tmp_path / "raw", tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=rf"{half}: gone, though its other half is there; restore it"):
        get_indexing(tmp_path / "raw", tmp_path)
    path.write_bytes(whole)
    get_indexing(tmp_path / "raw", tmp_path)
    assert index_bytes(tmp_path) == before


@pytest.mark.parametrize("files", [1, 2, 3])
def test_a_first_run_that_is_killed_between_its_files_is_made_good_by_the_second(tmp_path, raw, monkeypatch, files):
    data_dir, write_json, written_so_far = raw(tmp_path / "raw", columns=PAIR, users=[]), script.write_json, []

    def killed(path, value):
        if len(written_so_far) == files:
            raise KeyboardInterrupt
        written_so_far.append(write_json(path, value))

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(script, "write_json", killed)
        get_indexing(data_dir, tmp_path / "killed")
    assert len(written_so_far) == files
    get_indexing(data_dir, tmp_path / "killed")
    get_indexing(data_dir, tmp_path / "whole")
    assert index_bytes(tmp_path / "killed") == index_bytes(tmp_path / "whole")


def test_the_index_leaves_no_other_files_behind(tmp_path, raw):
    get_indexing(raw(tmp_path / "raw", columns=PAIR, users=[]), tmp_path / "work")
    assert sorted(os.listdir(tmp_path / "work/indexing")) == ["cid2vidx.json", "vid2idx.json"]


def test_a_grown_index_has_the_fingerprint_of_what_it_grew_from(tmp_path, raw):
    old = get_indexing(raw(tmp_path / "raw", columns=PAIR, users=[]), tmp_path)
    new = get_indexing(raw(tmp_path / "raw", columns={**PAIR, "c3": ["v9"]}), tmp_path)
    other = get_indexing(raw(tmp_path / "raw", columns={"c1": ["v2", "v1"], "c2": ["v3"]}), tmp_path / "other")
    assert new.fingerprint(3, 2) == old.fingerprint() != new.fingerprint()
    assert other.fingerprint()["sha256"] != old.fingerprint()["sha256"]
    new.check(old.fingerprint(), "model.json", "train.py")
    with pytest.raises(InputError, match=r"model\.json.*vid2idx\.json.*train\.py"):
        other.check(old.fingerprint(), "model.json", "train.py")


# ---------------------------------------------------------------- raw formats


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
def test_plain_and_gzip_files_give_the_same_index(tmp_path, raw, compressed):
    raw(tmp_path / "raw", columns={"ü1": ["视频", "v2"]}, titles={"v3": "T"}, gzip=compressed)
    assert len(find_files(tmp_path / "raw")) == 2
    get_indexing(tmp_path / "raw", tmp_path)
    assert written(tmp_path) == {"vid2idx": {"视频": 2, "v2": 3, "v3": 4}, "cid2vidx": {"ü1": [2, 3]}}


def test_several_files_are_read_in_the_order_of_their_names(tmp_path, write_lines):
    write_lines(tmp_path / "raw/cid2vids-2.json", [{"cid": "c2", "vids": ["v3"]}])
    write_lines(tmp_path / "raw/cid2vids-1.json.gz", [{"cid": "c1", "vids": ["v1"]}])
    write_lines(tmp_path / "raw/vid2title-b.json", [{"vid": "v5", "title": ""}])
    write_lines(tmp_path / "raw/vid2title-a.json", [{"vid": "v4", "title": ""}])
    get_indexing(tmp_path / "raw", tmp_path)
    assert written(tmp_path) == {"vid2idx": {"v1": 2, "v3": 3, "v4": 4, "v5": 5}, "cid2vidx": {"c1": [2], "c2": [3]}}


def test_a_cid_that_comes_again_adds_its_new_videos(tmp_path, write_lines):
    shelves = [("c1", ["v1", "v2", "v1"]), ("c2", ["v5"]), ("c1", ["v3", "v2", "v4"])]
    write_lines(tmp_path / "raw/cid2vids.json", [{"cid": c, "vids": v} for c, v in shelves])
    write_lines(tmp_path / "raw/vid2title.json", [{"vid": "v1", "title": "One"}])
    get_indexing(tmp_path / "raw", tmp_path)
    assert written(tmp_path)["vid2idx"] == {"v1": 2, "v2": 3, "v3": 4, "v4": 5, "v5": 6}
    assert written(tmp_path)["cid2vidx"] == {"c1": [2, 3, 4, 5], "c2": [6]}


def test_vids_may_be_one_string_with_commas_and_ids_may_be_integers(tmp_path, write_lines):
    shelves = [("c1", "v1, v2,v3"), (7, [10, "11", -3]), ("7", ["v1"]), ("c0", ""), ("c3", [])]
    write_lines(tmp_path / "raw/cid2vids.json", [{"cid": c, "vids": v} for c, v in shelves])
    write_lines(tmp_path / "raw/vid2title.json", [{"vid": 12, "title": "Twelve"}])
    get_indexing(tmp_path / "raw", tmp_path)
    assert written(tmp_path) == {
        "vid2idx": {"v1": 2, "v2": 3, "v3": 4, "10": 5, "11": 6, "-3": 7, "12": 8},
        "cid2vidx": {"c1": [2, 3, 4], "7": [5, 6, 7, 2], "c0": [], "c3": []},
    }


def test_the_first_line_may_carry_a_byte_order_mark_and_lines_may_end_as_on_windows(tmp_path, write_lines):
    lines = [b'\xef\xbb\xbf{"cid": "c1", "vids": "v1"}\r', b'{"cid": "c2", "vids": "v2"}\r', b"\r", b""]
    write_lines(tmp_path / "raw/cid2vids.json", lines)
    write_lines(tmp_path / "raw/vid2title.json", [{"vid": "v1", "title": "One"}])
    get_indexing(tmp_path / "raw", tmp_path)
    assert written(tmp_path)["cid2vidx"] == {"c1": [2], "c2": [3]}


def test_a_byte_order_mark_before_a_blank_line_is_no_bad_line(tmp_path, write_lines, capsys):
    write_lines(tmp_path / "cid2vids.json", [b"\xef\xbb\xbf", {"cid": "c1", "vids": "v1"}])
    assert script.read_columns(tmp_path) == {"c1": ["v1"]}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cut", [False, True])
def test_a_byte_order_mark_inside_a_file_is_no_json_wherever_the_file_is_cut(tmp_path, write_lines, cut):
    path = write_lines(
        tmp_path / "clicks.json", [{"uid": "a", "click_seq": []}, b'\xef\xbb\xbf{"uid": "b", "click_seq": []}']
    )
    start = path.read_bytes().index(b"\xef")
    ranges = [FileRange(str(path), 0, start), FileRange(str(path), start)] if cut else [FileRange(str(path))]
    tallies = []
    assert [uid for uid, _ in script.read_clicks(ranges, tallies)] == ["a"]
    assert tallies[-1].skipped == {"not JSON": 1}


def test_a_title_of_null_costs_the_title_alone(tmp_path, raw, capsys):
    raw(tmp_path / "raw", columns=PAIR, titles={"v1": "One", "v9": None})
    get_indexing(tmp_path / "raw", tmp_path)
    assert written(tmp_path)["vid2idx"] == {"v1": 2, "v2": 3, "v3": 4, "v9": 5}
    assert script.read_names(tmp_path / "raw", {"v1", "v9"})[0] == {"v1": "One"}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".json.gz", ".jsonl.gz"])
def test_files_of_every_ending_are_read_and_the_others_named_in_one_line(tmp_path, write_lines, capsys, ending):
    users = [{"uid": "u1", "click_seq": ["x"] * 5}]
    write_lines(tmp_path / f"raw/cid2vids{ending}", [{"cid": "c1", "vids": ["v1"]}])
    for name in (f"a{ending}", ".hidden", "c.JSON", "d.ndjson", "dt=2024-01-01/e.json", "f.json.bz2"):
        write_lines(tmp_path / "raw/click_seq" / name, users)
    get_indexing(tmp_path / "raw", tmp_path)
    assert written(tmp_path) == {"vid2idx": {"v1": 2, "x": 3}, "cid2vidx": {"c1": [2]}}
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{tmp_path}/raw/click_seq: 4 not read (c.JSON, d.ndjson, dt=2024-01-01, f.json.bz2)" in err


def test_a_file_of_columns_or_titles_that_is_not_read_is_named(tmp_path, raw, write_lines, capsys):
    raw(tmp_path / "raw", columns=PAIR, titles={"v1": "One"})
    write_lines(tmp_path / "raw/cid2vids-2.ndjson", [])
    write_lines(tmp_path / "raw/vid2title.csv", [])
    get_indexing(tmp_path / "raw", tmp_path)
    err = capsys.readouterr().err
    assert [err.count(name) for name in ("cid2vids-2.ndjson", "vid2title.csv", "\n")] == [1, 1, 2]


def test_a_file_in_the_data_folder_of_another_name_is_named(tmp_path, raw, write_lines, capsys):
    raw(tmp_path / "raw", columns=PAIR, titles={"v1": "One"}, users=[("u1", ["v1"])])
    write_lines(tmp_path / "raw/vid2tile.json", [])
    write_lines(tmp_path / "raw/.hidden", [])
    get_indexing(tmp_path / "raw", tmp_path)
    line = f"{tmp_path}/raw: 1 not read (vid2tile.json); files begin with cid2vids or vid2title\n"
    assert capsys.readouterr().err == line


def test_a_misspelt_file_of_columns_is_named_beside_the_error(tmp_path, raw, write_lines, capsys):
    write_lines(tmp_path / "raw/cid2vid.json", [{"cid": "c1", "vids": "v1"}])
    with pytest.raises(InputError, match="no columns"):
        get_indexing(tmp_path / "raw", tmp_path)
    assert "1 not read (cid2vid.json)" in capsys.readouterr().err


def test_the_report_counts_the_videos_of_the_columns_that_nothing_else_knows(tmp_path, raw, capsys):
    raw(tmp_path / "raw", columns=PAIR, users=[("u1", ["v1", "v1_c1", "v2"])])
    get_indexing(tmp_path / "raw", tmp_path, min_clicks=2)
    assert "; 2 videos of the columns are clicked fewer than 2 times\n" in capsys.readouterr().out
    raw(tmp_path / "raw", titles={"v1": "One", "v2": "Two"})
    get_indexing(tmp_path / "raw", tmp_path)
    assert "; 1 videos of the columns are unknown to the catalogue\n" in capsys.readouterr().out


def test_names_and_titles_are_read_where_the_raw_data_has_them(tmp_path, raw):
    raw(tmp_path, columns=PAIR, titles={"v1": "One", "v9": "Nine"}, names={"c2": "Second"})
    assert script.read_names(tmp_path, {"v9", "v0"}) == ({"v9": "Nine"}, {"c2": "Second"})
    assert script.read_names(tmp_path / "gone", {"v9"}) == ({}, {})


# ---------------------------------------------------------------- the vocabulary without a catalogue


def test_without_a_catalogue_videos_clicked_min_clicks_times_are_known(tmp_path, raw):
    users = [("u1", ["x", "y_c1", "v1", "a_b", "x"]), ("u2", ["y_c2", "x_c1", "z", "a_b_c2", "y", "w_c8", "w"]),
             ("u3", ["w_c8", "a_b", "z_c1", "y"])]  # fmt: skip
    raw(tmp_path / "raw", columns=PAIR, users=users)
    get_indexing(tmp_path / "raw", tmp_path, min_clicks=3)
    # y 4 (two of them in columns); a_b 3, w 3 (two of them in c8, which is no column) and x 3 by name; z 2.
    assert written(tmp_path)["vid2idx"] == {"v1": 2, "v2": 3, "v3": 4, "y": 5, "a_b": 6, "w": 7, "x": 8}
    assert written(tmp_path)["cid2vidx"] == {"c1": [2, 3], "c2": [3, 4]}


def test_what_follows_a_video_is_never_part_of_another_video():
    known = {"a": 2, "k": 3}
    clicks = {"a": 1, "a_x": 5, "k_1": 4,  # after a known video, clicked or not
              "b": 1, "b_x": 2, "b_x_y": 9,  # after a video that was clicked by itself
              "p_z": 7, "q_z": 8, "q_z_1": 9,  # z comes after several, so it is a column that is away
              "r_s": 6,  # s came after a known video elsewhere
              "e_": 5, "f_": 5,  # no column is called ""
              "solo_x1": 3, "m": 2}  # fmt: skip
    own, left_out = {"a": 6, "k": 4, "b": 12, "solo_x1": 3, "m": 2, "e_": 5, "f_": 5}, {"p_z": 7, "q_z": 17, "r_s": 6}
    assert own_clicks(collections.Counter(clicks), {"s"}, known) == (own, left_out)


def test_ids_that_are_left_out_since_they_look_like_clicks_in_unknown_columns_are_said(tmp_path, raw, capsys):
    clicks = [f"show{show}_{part}" for show in "ab" for part in (1, 2)]
    raw(tmp_path / "raw", columns=PAIR, users=[("u1", clicks * 3), ("u2", ["v1_c7", "show9_1", *clicks])])
    index = get_indexing(tmp_path / "raw", tmp_path, min_clicks=4)
    assert list(index.videos) == ["v1", "v2", "v3"]
    line = "4 ids, 'showa_1' for one, are taken for clicks in columns that nobody knows; if they are videos, write them"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("catalogue", [False, True])
def test_a_known_video_in_an_unknown_column_is_that_video(tmp_path, raw, clicks_like_real, catalogue):
    data = clicks_like_real(200, seed=1)
    plain = [click for _, clicks in data["users"] for click in clicks]
    endings = itertools.cycle(["_None", "_", "_nan", "_0", "_null"])
    users = [(uid, [click if "_" in click else click + next(endings) for click in clicks])
             for uid, clicks in data["users"]]  # fmt: skip
    titles = {vid: "T" for vids in data["columns"].values() for vid in vids} if catalogue else None
    index = get_indexing(raw(tmp_path / "raw", columns=data["columns"], users=users, titles=titles), tmp_path)
    meanings = [meaning(click, index) for _, clicks in users for click in clicks]
    assert len(index.videos) == 60 and [cid for _, cid in meanings].count(None) == 701
    assert meanings == [(vid, cid or None) for vid, _, cid in (click.partition("_") for click in plain)]


def test_with_a_catalogue_clicks_add_nothing(tmp_path, raw):
    raw(tmp_path / "raw", columns=PAIR, titles={"v1": "One"}, users=[("u1", ["x"] * 50)])
    get_indexing(tmp_path / "raw", tmp_path, min_clicks=1)
    assert written(tmp_path)["vid2idx"] == {"v1": 2, "v2": 3, "v3": 4}


def test_clicks_of_several_files_count_together(tmp_path, raw):
    raw(tmp_path / "raw", columns=PAIR, users=[("u1", ["x", "y"])], click_file="a")
    raw(tmp_path / "raw", users=[("u2", ["x_c1"])], click_file="b", gzip=True)
    get_indexing(tmp_path / "raw", tmp_path, min_clicks=2)
    assert written(tmp_path)["vid2idx"] == {"v1": 2, "v2": 3, "v3": 4, "x": 5}


def test_the_report_counts_videos_columns_unknown_and_empty_ones(tmp_path, raw, capsys):
    raw(tmp_path / "raw", columns={**PAIR, "c3": []}, titles={"v1": "One", "v8": "Eight"})
    get_indexing(tmp_path / "raw", tmp_path)
    out, _ = capsys.readouterr()
    assert out.count("\n") == 1  # v1 v2 v3 v8; v2 and v3 have no title
    assert "4 videos (4 new), 3 columns (3 new, 1 empty); 2 videos of the columns are unknown" in out


# ---------------------------------------------------------------- days


def test_a_column_that_goes_and_returns_keeps_its_clicks(tmp_path, raw, clicks_like_real):
    data = clicks_like_real(200, seed=1)
    clicks = [click for _, clicks in data["users"] for click in clicks]
    without = {cid: vids for cid, vids in data["columns"].items() if cid != "t0c"}
    for days in ([data["columns"], without, data["columns"]], [without, data["columns"]]):
        work = tmp_path / f"work-{len(days)}"
        for day, columns in enumerate(days):
            index = get_indexing(raw(tmp_path / "raw", columns=columns, users=data["users"]), work)
            meanings = [meaning(click, index) for click in clicks]
            assert len(index.videos) == 60
            ever = "t0c" in columns or day > 0
            assert sum(cid == "t0c" for _, cid in meanings) == (182 if ever else 0)
            assert sum(cid is not None for _, cid in meanings) == (2843 if ever else 2843 - 182)
            assert all(vid == click.split("_")[0] for (vid, _), click in zip(meanings, clicks, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_after_any_days_every_click_means_what_a_fresh_index_of_all_days_says(tmp_path, raw, seed):
    rng = random.Random(seed)
    videos, names = ["a", "b", "b_a", "e_", "_f", "g_h_i", "a_k"], ["k", "k_l", "l", "a", "_m", "0", "n_0"]
    universe = [*videos, *(f"{vid}_{cid}" for vid in videos for cid in [*names, "never", ""])]
    history, shelves = [], {}
    for day in range(6):
        today = {cid: rng.sample(videos, rng.randint(0, 4)) for cid in rng.sample(names, rng.randint(1, 5))}
        today = today if any(today.values()) else {"k": ["a"]}
        for cid, vids in today.items():
            shelves.setdefault(cid, {}).update(dict.fromkeys(vids))
        history += [(f"u{day}", videos + rng.choices(universe, k=60))]
        raw(tmp_path / "raw", columns=today, users=history)
        index = get_indexing(tmp_path / "raw", tmp_path / "work", min_clicks=1)
        raw(tmp_path / "all", columns={cid: list(vids) for cid, vids in shelves.items()}, users=history)
        fresh = get_indexing(tmp_path / "all", tmp_path / f"fresh-{day}", min_clicks=1)
        for click in universe:
            assert meaning(click, index) == meaning(click, fresh)


# ---------------------------------------------------------------- bad lines

BAD = {
    "not JSON": (b'{"cid": "x", "vids"', "not JSON"),
    "a nesting bomb": (b'{"cid": "x", "vids": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
    "a number of a million digits": (b'{"cid": ' + b"9" * 1_000_000 + b', "vids": []}', "not JSON"),
    "not UTF-8": (b'{"cid": "\xff\xfe", "vids": ["v1"]}', "not UTF-8"),
    "half a character": (b'{"cid": "\\ud83d", "vids": ["v1"]}', "not UTF-8"),
    "a list": (b'["x", ["v1"]]', "wrong type of line"),
    "vids a number": (b'{"cid": "x", "vids": 5}', "wrong type of vids"),
    "vids an object": (b'{"cid": "x", "vids": {"v1": 1}}', "wrong type of vids"),
    "a vid that is a list": (b'{"cid": "x", "vids": [["v1"]]}', "wrong type of vids"),
    "a vid that is null": (b'{"cid": "x", "vids": [null]}', "wrong type of vids"),
    "a boolean cid": (b'{"cid": true, "vids": ["v1"]}', "wrong type of cid"),
    "a boolean vid": (b'{"cid": "x", "vids": [false]}', "wrong type of vids"),
    "a broken number as id": (b'{"cid": 1.5, "vids": ["v1"]}', "wrong type of cid"),
    "no vids": (b'{"cid": "x"}', "no vids"),
    "no cid": (b'{"vids": ["v1"]}', "no cid"),
    "an empty id": (b'{"cid": "", "vids": ["v1"]}', "empty id"),
    "a long id": (b'{"cid": "' + b"x" * 1001 + b'", "vids": ["v1"]}', "id too long"),
}


@pytest.mark.parametrize(("line", "reason"), BAD.values(), ids=BAD)
def test_a_bad_line_is_skipped_and_reported_with_file_line_and_reason(tmp_path, write_lines, capsys, line, reason):
    good = [json.dumps({"cid": cid, "vids": vids}) for cid, vids in MANY.items()]
    path = write_lines(tmp_path / "raw/cid2vids.json", [*good[:60], line, *good[60:]])
    write_lines(tmp_path / "raw/vid2title.json", [{"vid": "v1", "title": "One"}])
    get_indexing(tmp_path / "raw", tmp_path)
    _, err = capsys.readouterr()
    assert written(tmp_path)["cid2vidx"] == {f"c{i}": [i + 2] for i in range(120)}
    assert err.count("\n") == 1
    assert str(path) in err and "1 of 121 lines" in err and f"line 61: {reason}" in err


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
def test_a_line_that_is_too_long_is_skipped_and_the_next_one_read(
    tmp_path, write_lines, capsys, monkeypatch, compressed
):
    monkeypatch.setattr(script, "MAX_LINE_BYTES", 1000)
    good = [{"cid": cid, "vids": vids} for cid, vids in MANY.items()]
    long = {"cid": "long", "vids": [f"v{i}" for i in range(1000)]}
    write_lines(tmp_path / f"raw/cid2vids.json{'.gz' * compressed}", [*good[:60], long, *good[60:]])
    write_lines(tmp_path / "raw/vid2title.json", [{"vid": "v1", "title": "One"}])
    get_indexing(tmp_path / "raw", tmp_path)
    assert list(written(tmp_path)["cid2vidx"]) == list(MANY)
    assert "line 61: too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"vid": "x", "title": 5}, "wrong type of title"),
        ({"vid": "x"}, "no title"),
        ({"title": "X"}, "no vid"),
        ({"vid": True, "title": "X"}, "wrong type of vid"),
    ],
)
def test_a_bad_line_of_the_catalogue_is_skipped_and_reported(tmp_path, raw, write_lines, capsys, line, reason):
    raw(tmp_path / "raw", columns={"c1": ["t0"]})
    good = [{"vid": f"t{i}", "title": "T"} for i in range(120)]
    write_lines(tmp_path / "raw/vid2title.json", [line, *good])
    get_indexing(tmp_path / "raw", tmp_path)
    assert list(written(tmp_path)["vid2idx"]) == [f"t{i}" for i in range(120)]
    assert f"vid2title.json: 1 of 121 lines are bad (line 1: {reason})" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"uid": "x", "click_seq": "v1"}, "wrong type of click_seq"),
        ({"uid": "x", "click_seq": ["v1", True]}, "wrong type of click_seq"),
        ({"uid": "x", "click_seq": ["v1", None]}, "wrong type of click_seq"),
        ({"uid": "x", "click_seq": [["v1"]]}, "wrong type of click_seq"),
        ({"uid": False, "click_seq": []}, "wrong type of uid"),
        ({"uid": "", "click_seq": []}, "empty id"),
        ({"uid": "x"}, "no click_seq"),
        ({"click_seq": ["v1"]}, "no uid"),
    ],
)
def test_a_bad_line_of_the_clicks_is_skipped_and_reported(tmp_path, raw, write_lines, capsys, line, reason):
    raw(tmp_path / "raw", columns=PAIR)
    good = [{"uid": i, "click_seq": ["x", 5]} for i in range(120)]
    write_lines(tmp_path / "raw/click_seq/clicks.json", [*good, line])
    get_indexing(tmp_path / "raw", tmp_path, min_clicks=120)
    assert list(written(tmp_path)["vid2idx"]) == ["v1", "v2", "v3", "5", "x"]
    assert f"clicks.json: 1 of 121 lines are bad (line 121: {reason})" in capsys.readouterr().err


def test_skipped_lines_are_counted_by_reason_and_the_first_three_named(tmp_path, write_lines, capsys):
    good = [{"uid": f"u{i}", "click_seq": []} for i in range(1000)]
    bad = ["", "{", b"\xff", "[]", '{"click_seq": []}', "{", '{"uid": "u"}']
    path = write_lines(tmp_path / "clicks.json", [*good[:500], *bad, *good[500:]])
    tally = Tally(str(path))
    assert len(list(read_records(tally, script.parse_clicks))) == 1000
    assert tally.lines == 1007
    assert tally.skipped == {
        "blank": 1, "not JSON": 2, "not UTF-8": 1, "wrong type of line": 1, "no click_seq": 1, "no uid": 1,
    }  # fmt: skip
    tally.check()
    err = capsys.readouterr().err
    assert (
        "6 of 1,007 lines are bad (line 502: not JSON, line 503: not UTF-8, line 504: wrong type of line, ...)" in err
    )


def test_one_bad_line_in_a_hundred_passes_and_more_stop_the_run_leaving_the_former_index(tmp_path, raw, write_lines):
    get_indexing(raw(tmp_path / "raw", columns=PAIR, titles={"v1": "One"}), tmp_path)
    good = [{"cid": cid, "vids": vids} for cid, vids in MANY.items()]
    before = index_bytes(tmp_path)
    path = write_lines(tmp_path / "raw/cid2vids.json", [*good[:98], "{"])
    with pytest.raises(InputError, match=rf"{path}: 1 of 99 lines .*line 99: not JSON.*MAX_BAD_FRACTION = 0\.01"):
        get_indexing(tmp_path / "raw", tmp_path)
    assert index_bytes(tmp_path) == before
    write_lines(path, [*good[:99], "{"])
    get_indexing(tmp_path / "raw", tmp_path)
    assert list(written(tmp_path)["cid2vidx"])[:3] == ["c1", "c2", "c0"]


@pytest.mark.parametrize("file", ["vid2title.json", "click_seq/clicks.json"])
def test_a_bad_catalogue_or_click_file_stops_the_run_leaving_the_former_index(tmp_path, raw, write_lines, file):
    get_indexing(raw(tmp_path / "raw", columns=PAIR, users=[]), tmp_path)
    before = index_bytes(tmp_path)
    raw(tmp_path / "raw", columns={"c7": ["v7"]})
    write_lines(tmp_path / "raw" / file, ["{", "{"])
    with pytest.raises(InputError, match="2 of 2 lines"):
        get_indexing(tmp_path / "raw", tmp_path)
    assert index_bytes(tmp_path) == before


# ---------------------------------------------------------------- bad files


@pytest.mark.parametrize("file", ["cid2vids.json.gz", "vid2title.json.gz", "click_seq/clicks.json.gz"])
@pytest.mark.parametrize("damage", ["cut short", "no gzip", "flipped"])
def test_a_damaged_gzip_file_is_named_and_the_former_index_left(tmp_path, raw, file, damage):
    titles = {f"v{i}": f"{i**7} title" for i in range(100)} if "title" in file else None
    users = [(f"u{i}", [f"v{i**7}", "v1_c1"]) for i in range(100)]
    raw(tmp_path / "raw", columns={**PAIR, **MANY}, users=users, titles=titles, gzip=True)
    get_indexing(tmp_path / "raw", tmp_path)
    before, path = index_bytes(tmp_path), tmp_path / "raw" / file
    data = path.read_bytes()
    half = len(data) // 2
    flipped = data[:half] + bytes([data[half] ^ 0xFF]) + data[half + 1 :]
    path.write_bytes({"cut short": data[:half], "no gzip": gzip.decompress(data), "flipped": flipped}[damage])
    with pytest.raises(InputError) as error:
        get_indexing(tmp_path / "raw", tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert index_bytes(tmp_path) == before


def test_a_gzip_file_cut_to_nothing_is_named_and_not_read_as_empty(tmp_path, raw):
    raw(tmp_path / "raw", columns=PAIR, users=[("u1", ["x"] * 9)], gzip=True)
    path = tmp_path / "raw/click_seq/clicks.json.gz"
    path.write_bytes(b"")
    with pytest.raises(InputError, match=str(path)):
        get_indexing(tmp_path / "raw", tmp_path)


def test_a_missing_folder_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=str(tmp_path / "data/nowhere")):
        get_indexing("data/nowhere", "work")
    assert not Path("work").exists()


def test_no_columns_is_one_clear_error(tmp_path, raw):
    raw(tmp_path / "raw", users=[("u1", ["v1"])], titles={"v1": "One"})
    with pytest.raises(InputError, match=f"{tmp_path / 'raw'}: no columns.*cid2vids"):
        get_indexing(tmp_path / "raw", tmp_path)


def test_a_file_that_is_there_both_plain_and_compressed_is_refused(tmp_path, raw):
    raw(tmp_path / "raw", columns=PAIR)
    raw(tmp_path / "raw", columns=PAIR, gzip=True)
    with pytest.raises(InputError, match=r"cid2vids\.json.* have the same name"):
        get_indexing(tmp_path / "raw", tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"v1": 2', '{"v1": 3}', '{"v1": 2, "v2": 2}'])
def test_a_damaged_former_index_is_refused_and_not_written_over(tmp_path, raw, text):
    get_indexing(raw(tmp_path / "raw", columns=PAIR, users=[]), tmp_path)
    path = tmp_path / "indexing/vid2idx.json"
    path.write_text(text)
    with pytest.raises(InputError, match=str(path)):
        get_indexing(tmp_path / "raw", tmp_path)
    assert path.read_text() == text


def test_a_missing_index_names_the_path_and_the_script_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/w/indexing/vid2idx\.json.*run get_indexing\.py first"):
        load_index("w")


# ---------------------------------------------------------------- clicks


def test_split_click_follows_its_rules_in_order():
    videos, columns = {"v1", "v_2", "v1_c1", "v", "_"}, {"c1", "c_1", "1", "c", "_c"}
    expected = {
        "v1": ("v1", None),  # a known video as a whole
        "v_2": ("v_2", None),  # ... though it has an underscore
        "v1_c1": ("v1_c1", None),  # ... though both halves are known
        "v1_c": ("v1", "c"),  # both sides known
        "v_2_c1": ("v_2", "c1"),  # ... with the underscore in the video
        "v1_c_1": ("v1", "c_1"),  # ... with the underscore in the column
        "v1_c1_c": ("v1_c1", "c"),
        "v__c": ("v", "_c"),
        "x_c1": ("x", "c1"),  # an unknown video of a known column
        "x_c_1": ("x", "c_1"),  # ... the longest such column, not x_c in column 1
        "x_y_c": ("x_y", "c"),
        "x": ("x", None),  # an unknown video
        "x_y": ("x_y", None),
        "v1_c9": ("v1", None),  # a known video in an unknown column
        "v1_": ("v1", None),
        "v_2_c9_z": ("v_2", None),  # ... the longest such video, not v
        "v1_x_c1": ("v1_x", "c1"),  # ... but a known column counts for more
        "": ("", None),
        "x__": ("x__", None),
        "___": ("_", None),  # the longest known video before an underscore
        "_c1": ("", "c1"),
    }
    assert {click: split_click(click, videos, columns) for click in expected} == expected


def test_split_click_equals_a_search_through_all_splits():
    videos, columns = {"a", "a_b", "b_a", "_", "a_"}, {"b", "b_a", "_b", "a_b_a"}
    clicks = [""]
    for _ in range(7):
        clicks += [click + letter for click in clicks for letter in "ab_" if len(click) < 7]
        clicks = list(dict.fromkeys(clicks))
    for click in clicks:
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


def test_a_click_of_a_million_underscores_is_still_one_click():
    assert split_click("_" * 1_000_000 + "c1", {"v1"}, {"c1"}) == ("_" * 999_999, "c1")


def test_a_click_of_a_million_underscores_is_no_video_and_takes_little_memory(tmp_path, raw):
    raw(tmp_path / "raw", columns=PAIR, users=[("u1", ["_" * 1_000_000 + "x", "y", "v1"])])
    tracemalloc.start()
    index = get_indexing(tmp_path / "raw", tmp_path, min_clicks=1, num_workers=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list(index.videos) == ["v1", "v2", "v3", "y"]
    assert peak < 30 << 20  # each of its 2,000 splits would take a million bytes


# ---------------------------------------------------------------- byte ranges


def read_cut(path, range_bytes):
    """Return (uids, Tally) of a file that is cut into ranges of so many bytes."""
    tallies, records = Tallies(), []
    for task in cut_files([str(path)], range_bytes):
        for file_range in task:
            part = Tally(file_range.path)
            records += read_records(part, lambda record: record["uid"], file_range)
            tallies.extend([part])
    return records, tallies[str(path)]


def test_every_line_is_read_exactly_once_whatever_the_size_of_the_ranges(tmp_path, write_lines):
    lines = [b'{"uid": 1, "click_seq": []}', b"", b"{", b'{"uid": "\xc3\xbc", "click_seq": [1]}', b"\r", b"[]"]
    path = write_lines(tmp_path / "clicks.json", lines)
    for ending in (b"\n", b""):  # the last line may lack its newline
        path.write_bytes(b"\n".join(lines) + ending)
        digests = set()
        for range_bytes in range(1, path.stat().st_size + 2):
            records, tally = read_cut(path, range_bytes)
            assert records == [1, "ü"]
            assert (tally.lines, tally.skipped) == (6, {"blank": 2, "not JSON": 1, "wrong type of line": 1})
            assert tally.first == [(3, "not JSON"), (6, "wrong type of line")]
            digests.add(tally.hexdigest())
        assert len(digests) == 1


def test_a_digest_tells_contents_and_orders_of_lines_apart(tmp_path, write_lines):
    contents = [["ab"], ["ba"], ["a"], ["a", ""], ["a", "b"], ["b", "a"], ["b", "a", "a"]]
    digests = [read_cut(write_lines(tmp_path / "clicks.json", lines), 1)[1].hexdigest() for lines in contents]
    assert len(set(digests)) == 7
    packed = write_lines(tmp_path / "clicks.json.gz", contents[-1])
    assert read_cut(packed, 1)[1].hexdigest() == digests[-1]  # it is the lines that count, packed or not


def test_ranges_stay_right_after_a_line_that_is_too_long(tmp_path, write_lines, monkeypatch):
    monkeypatch.setattr(script, "MAX_LINE_BYTES", 20)
    long = '{"uid": "' + "x" * 70 + '"}'
    path = write_lines(tmp_path / "clicks.json", ['{"uid": 1}', long, '{"uid": 2}', '{"uid": 3}'])
    for range_bytes in range(1, path.stat().st_size + 1):
        records, tally = read_cut(path, range_bytes)
        assert records == [1, 2, 3]
        assert (tally.lines, tally.first) == (4, [(2, "too long")])


def test_large_files_are_cut_small_ones_put_together_and_packed_ones_kept_whole(tmp_path):
    sizes = {"a.json": 250, "b.json": 30, "c.json": 30, "d.json": 0, "e.json.gz": 5, "f.json.gz": 90, "g.json": 1}
    a, b, c, d, e, f, g = paths = [str(tmp_path / name) for name in sizes]
    for path, size in zip(paths, sizes.values(), strict=True):
        Path(path).write_bytes(b"x" * size)
    assert cut_files(paths, range_bytes=100) == [
        [(a, 0, 100)],
        [(a, 100, 200)],
        [(a, 200, 300), (b, 0, 100)],  # 50 + 30 bytes
        [(c, 0, 100), (d, 0, 100), (e, 0, None)],  # 30 + 0 + 8 x 5
        [(f, 0, None)],  # 8 x 90
        [(g, 0, 100)],
    ]
    assert cut_files([]) == []


def test_an_empty_file_has_no_lines(tmp_path, write_lines):
    assert list(read_lines(FileRange(str(write_lines(tmp_path / "b.json", [])), 0, 7))) == []


def test_a_file_of_one_long_line_is_read_about_twice_however_many_ranges_it_has(tmp_path, monkeypatch):
    path, read = tmp_path / "clicks.json", []
    path.write_bytes(b"x" * (16 << 20))

    class Counted(io.BufferedReader):
        def __init__(self, path, _):
            super().__init__(io.FileIO(path))

        def readline(self, limit):
            line = super().readline(limit)
            read.append(len(line))
            return line

    monkeypatch.setattr(script, "open", Counted, raising=False)
    tasks = cut_files([str(path)], range_bytes=2 << 20)
    lines = [len(line) for [file_range] in tasks for line, _ in read_lines(file_range)]
    assert len(tasks) == 8 and lines == [16 << 20]
    assert sum(read) < 2.5 * (16 << 20)  # to the end of the line from every range it would be 4.5


# ---------------------------------------------------------------- tasks and workers


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks_and_no_worker_is_left(num_workers):
    with map_files(abs, list(range(-20, 0)), "count", num_workers) as results:
        assert list(results) == list(range(20, 0, -1))
    assert multiprocessing.active_children() == []


def test_no_task_is_no_result():
    with map_files(abs, [], "count", 2) as results:
        assert list(results) == []


def test_the_death_of_a_worker_is_one_line():
    with (
        pytest.raises(InputError, match="^a worker process died.*NUM_WORKERS$"),
        map_files(os._exit, [1, 1], "die", 2) as results,
    ):
        list(results)
    assert multiprocessing.active_children() == []


def test_the_death_of_a_worker_while_others_are_started_is_one_line(monkeypatch):
    launch = multiprocessing.popen_spawn_posix.Popen._launch
    started = []

    def launch_and_kill_the_first(popen, process):
        noticing = [thread for thread in threading.enumerate() if isinstance(thread, ExecutorManagerThread)]
        assert noticing == []  # it would close the pipes that this worker is being given
        launch(popen, process)
        started.append(popen)
        if popen is started[0]:
            os.kill(popen.pid, signal.SIGKILL)
            os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(multiprocessing.popen_spawn_posix.Popen, "_launch", launch_and_kill_the_first)
    with (
        pytest.raises(InputError, match="^a worker process died"),
        map_files(abs, [-1] * 8, "count", 4) as results,
    ):
        list(results)
    assert len(started) == 4 and multiprocessing.active_children() == []


@pytest.mark.parametrize("taken", [0, 1])
def test_an_error_while_results_are_taken_leaves_no_worker(taken):
    with pytest.raises(KeyboardInterrupt), map_files(abs, [-1] * 50, "count", 2) as results:
        assert list(itertools.islice(results, taken)) == [1] * taken
        raise KeyboardInterrupt
    assert multiprocessing.active_children() == []


def big_result(megabytes):
    return bytes(megabytes << 20)


def test_an_error_while_workers_write_large_results_ends_at_once():
    """A worker killed in the middle of a message leaves half of it, whose rest nobody will write."""
    code = "import test_get_indexing as t\nwith t.map_files(t.big_result, [200] * 8, 'make', 2) as results:\n"
    code += "    len(next(iter(results))); raise KeyboardInterrupt"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", f"if __name__ == '__main__':\n  exec({code!r})"], env=environment,
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode and "KeyboardInterrupt" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_workers_are_started_whichever_thread_it_reaches(number):
    """An unblocked thread takes it at once, and Python's handler then runs in the main thread all the same."""
    ended, handled = [], []
    former = signal.signal(number, lambda *_: handled.append(list(ended)))
    awake = threading.Event()
    other = threading.Thread(target=awake.wait)
    other.start()
    try:
        with signals_waiting():
            os.kill(os.getpid(), number)
            sum(range(100_000))  # time for the handler, were it not put off
            ended.append("block")
        assert handled == [["block"]]
    finally:
        awake.set()
        other.join()
        signal.signal(number, former)


def test_a_signal_while_the_workers_are_given_their_first_tasks_waits(monkeypatch):
    start = ExecutorManagerThread.start

    def start_and_signal(thread):
        signal.raise_signal(signal.SIGINT)
        start(thread)

    monkeypatch.setattr(ExecutorManagerThread, "start", start_and_signal)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores it
    try:
        with pytest.raises(KeyboardInterrupt), map_files(abs, [-1] * 8, "count", 2) as results:
            list(results)
    finally:
        signal.signal(signal.SIGINT, former)
    assert multiprocessing.active_children() == []


def test_tasks_are_handed_out_as_results_are_taken():
    class Pool:
        def __init__(self):
            self.given = []

        def submit(self, _, task):
            self.given.append(task)
            return self.of(task)

        def of(self, task):
            future = Future()
            future.set_result(-task)
            return future

    pool = Pool()
    results = in_turn(pool, collections.deque([pool.of(0), pool.of(1)]), [2, 3, 4])
    for taken, given in enumerate([[], [2], [2, 3], [2, 3, 4], [2, 3, 4]]):
        assert next(results) == -taken and pool.given == given
    assert list(results) == []


def test_the_callers_own_processes_are_left_alone():
    spawn = multiprocessing.get_context("spawn")
    never = spawn.Event()
    own = spawn.Process(target=never.wait)
    own.start()
    try:
        with map_files(abs, [-1, -2], "count", 2) as results:
            assert list(results) == [1, 2]
        assert multiprocessing.active_children() == [own]
    finally:
        own.kill()
        own.join()


def test_an_error_in_a_worker_is_raised_here():
    with pytest.raises(FileNotFoundError), map_files(os.listdir, ["/", "/no/such/folder"], "list", 2) as results:
        list(results)


@pytest.mark.parametrize("fault", [FileNotFoundError(2, "No such file"), PermissionError(13, "Permission denied")])
def test_where_no_semaphore_can_be_made_one_line_says_so_and_one_worker_needs_none(monkeypatch, fault):
    def semaphore(*_):
        raise fault

    monkeypatch.setattr(multiprocessing.synchronize._multiprocessing, "SemLock", semaphore)
    with (
        pytest.raises(InputError, match=f"/dev/shm.*{fault.strerror}.*set NUM_WORKERS = 1 in get_indexing.py$"),
        map_files(abs, [-1, -2], "count", 2),
    ):
        pass
    with map_files(abs, [-1, -2], "count", 1) as results:
        assert list(results) == [1, 2]


def test_a_number_of_cores_that_is_unknown_is_one(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(Path, "read_text", lambda _: "max 100000")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert script.count_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert script.count_cores() == 1


def test_one_core_allowed_is_one_worker():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert script.count_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("limit", "cores"), [("max 100000", 8), ("300000 100000", 3), ("50000 100000", 1), ("9900000 100000", 8), ("", 8)]
)
def test_a_control_group_limits_the_cores(monkeypatch, limit, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(Path, "read_text", lambda _: limit)
    assert script.count_cores() == cores


# ---------------------------------------------------------------- odd file systems


def test_a_file_system_that_cannot_sync_is_written_to_all_the_same(tmp_path, monkeypatch):
    fault = OSError(errno.EINVAL, "Invalid argument")

    def fsync(_):
        raise fault

    monkeypatch.setattr(os, "fsync", fsync)
    script.write_json(tmp_path / "a.json", {"a": 1})
    assert script.read_json(tmp_path / "a.json", "x.py") == {"a": 1}
    fault = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        script.write_json(tmp_path / "a.json", {"a": 2})
    assert os.listdir(tmp_path) == ["a.json"] and script.read_json(tmp_path / "a.json", "x.py") == {"a": 1}


def test_a_file_system_without_locks_is_worth_one_warning(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(script.fcntl, "flock", flock)
    with script.only_one(tmp_path / "work"):
        pass
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{tmp_path}/work cannot be locked" in err and "No locks available" in err


def test_a_second_script_of_the_same_name_is_refused_and_one_of_another_is_not(tmp_path, monkeypatch):
    def one(name, **each_worker):
        monkeypatch.setattr(sys, "argv", [name])
        return script.only_one(tmp_path, **each_worker)

    with contextlib.ExitStack() as stack:
        stack.enter_context(one("get_tfrecord.py"))
        stack.enter_context(one("infer.py"))
        stack.enter_context(one("train.py", each_worker=True))
        task = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}
        monkeypatch.setenv("TF_CONFIG", json.dumps(task))
        stack.enter_context(one("train.py", each_worker=True))  # another worker of the cluster
        for name, each_worker in (("get_tfrecord.py", False), ("train.py", True)):
            with pytest.raises(InputError, match=f"another {name} is at work in {tmp_path}"):
                stack.enter_context(one(name, each_worker=each_worker))
    with one("infer.py"):  # it ended
        pass


# ---------------------------------------------------------------- as a script


def test_the_script_works_in_a_fresh_folder_and_says_one_line(tmp_path, raw):
    raw(tmp_path / "data/sample", columns=PAIR, titles={"v1": "One"})
    done = run_as_script(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert written(tmp_path / "data/work")["cid2vidx"] == {"c1": [2, 3], "c2": [3, 4]}


@pytest.mark.parametrize("fault", ["no folder", "no columns", "no clicks", "bad lines", "cut gzip", "damaged index"])
def test_the_input_s_fault_ends_with_one_line_and_a_non_zero_exit(tmp_path, raw, write_lines, fault):
    data = tmp_path / "data/sample"
    if fault == "no columns":
        raw(data, titles={"v1": "One"})
    if fault == "no clicks":  # without a catalogue they are needed
        raw(data, columns=PAIR)
    if fault == "bad lines":
        write_lines(data / "cid2vids.json", ["{", "{"])
    if fault == "cut gzip":
        path = write_lines(data / "cid2vids.json.gz", [{"cid": "c1", "vids": [f"v{i**5}" for i in range(500)]}])
        path.write_bytes(path.read_bytes()[:-20])
    if fault == "damaged index":
        raw(data, columns=PAIR, titles={"v1": "One"})
        write_lines(tmp_path / "data/work/indexing/vid2idx.json", ["{"])
    done = run_as_script(tmp_path)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.startswith("get_indexing.py: ") and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr and "data/" in done.stderr


def test_help_prints_the_docstring_and_does_nothing(tmp_path):
    done = run_as_script(tmp_path, "--help")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, script.__doc__.strip(), "")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments", [["--data-dir", "x"], ["--help", "me"], ["x"], [""]])
def test_any_other_argument_is_refused_in_one_line_and_nothing_is_written(tmp_path, raw, arguments):
    raw(tmp_path / "data/sample", columns=PAIR, titles={"v1": "One"})
    done = run_as_script(tmp_path, *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"takes no arguments, not '{' '.join(arguments)}'" in done.stderr
    assert os.listdir(tmp_path / "data") == ["sample"]


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_stop_a_script(tmp_path, raw, redirect):
    raw(tmp_path / "data/sample", columns={"c1": ["v1"]}, titles={"v1": "One"})
    (tmp_path / "data/sample/notes.txt").touch()  # "1 not read", says stderr
    done = run_as_script(tmp_path, redirect=redirect)
    assert (done.returncode, done.stderr.count("not read")) == (0, "2>" not in redirect)
    assert done.stdout.count("\n") == (redirect == "2>&-")
    assert written(tmp_path / "data/work") == {"vid2idx": {"v1": 2}, "cid2vidx": {"c1": [2]}}


STRAY_PRINTS = """
import os
from get_indexing import map_files, run_script

def write(name):
    with open(name, "w") as file:
        for descriptor in (1, 2):
            os.write(descriptor, b"stray")  # as a library does that is not Python
        file.write("whole" + os.read(0, 9).decode())

def main():
    write("alone")
    with map_files(write, ["one", "two"], "write", 2) as results:
        print(list(results))

if __name__ == "__main__":
    run_script(main)
"""


@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_what_is_printed_to_a_closed_stream_never_gets_into_a_file_of_the_script_or_a_worker(tmp_path, redirect):
    (tmp_path / "say.py").write_text(STRAY_PRINTS)
    redirect = redirect if "<" in redirect else f"{redirect} </dev/null"
    done = run_as_script(tmp_path, program=tmp_path / "say.py", redirect=redirect)
    assert (done.returncode, done.stderr) == (0, "" if "2>" in redirect else "stray" * 3)
    assert [(tmp_path / name).read_text() for name in ("alone", "one", "two")] == ["whole"] * 3


def test_a_click_file_whose_name_is_not_utf_8_is_read_by_workers_and_named_with_escapes(tmp_path, raw, write_lines):
    """So is a file that is not read, and one whose lines are bad; stdout and stderr know ASCII alone."""
    data = raw(tmp_path / "data/sample", columns=PAIR)
    for name in (b"clicks-\xff.json", b"\xfe.json"):
        lines = [*({"uid": f"u{i}", "click_seq": ["x"]} for i in range(120)), "{"]
        write_lines(data / "click_seq" / os.fsdecode(name), lines)
    (data / os.fsdecode(b"cid2vids-\xfd.csv")).touch()
    source = (ROOT / "get_indexing.py").read_text("utf-8")
    program = tmp_path / "get_indexing.py"
    source = source.replace("RANGE_BYTES = 4 << 20", "RANGE_BYTES = 1000").replace(
        "NUM_WORKERS = None", "NUM_WORKERS = 2"
    )
    program.write_text(source, encoding="utf-8")
    done = run_as_script(tmp_path, program=program, PYTHONIOENCODING="ascii:strict", PYTHONPATH="")
    assert done.returncode == 0 and done.stdout.startswith("4 videos (4 new)")
    read, *bad = done.stderr.splitlines()
    assert "1 not read (cid2vids-\\udcfd.csv)" in read and len(bad) == 2
    assert "clicks-\\udcff.json: 1 of 121 lines are bad" in bad[0] and "\\udcfe.json: 1 of 121" in bad[1]
    assert written(tmp_path / "data/work")["vid2idx"] == {"v1": 2, "v2": 3, "v3": 4, "x": 5}


def test_a_stream_that_is_not_utf_8_gets_escapes(tmp_path):
    (tmp_path / "say.py").write_text(
        "import sys\nfrom get_indexing import run_script\n"
        "run_script(lambda: [print('ü 视'), print('ö', file=sys.stderr)])\n",
        encoding="utf-8",
    )
    done = run_as_script(tmp_path, program=tmp_path / "say.py", PYTHONIOENCODING="ascii:strict")
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\xfc \\u89c6\n", "\\xf6\n")


def test_it_does_not_import_tensorflow(tmp_path, raw):
    raw(tmp_path / "data/sample", columns=PAIR, users=[("u1", ["v9"] * 9)])
    program = "import sys, get_indexing; get_indexing.get_indexing(); print(*sys.modules, file=sys.stderr)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert not {"tensorflow", "keras", "numpy"} & set(done.stderr.split())
