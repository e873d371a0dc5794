"""get_indexing.py: numbers for life, every raw format, bad lines and files, and the toolbox of all scripts."""

import contextlib
import errno
import gzip
import importlib
import json
import math
import os
import re
import sys
from pathlib import Path

import get_indexing as script
from conftest import HOUSE, _raw, _write_lines, files_of, run_python
from get_indexing import InputError, Records, Tally, check_constants, get_indexing, load_index, read_lines

import pytest

PAIR = {"c1": ["v1", "v2"], "c2": ["v2", "v3"]}
MANY = {f"c{i}": [f"v{i}"] for i in range(120)}  # enough that one bad line is under one in a hundred
COLUMNS = [{"cid": cid, "vids": vids} for cid, vids in MANY.items()]


def written(work_dir):
    """Return the two files of the index as {name: object}, by nothing but json."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(Path(work_dir, "indexing").iterdir())}


# ---------------------------------------------------------------- numbers


def test_videos_count_from_2_and_columns_keep_the_order_of_the_file(tmp_path):
    _raw(tmp_path / "raw", columns={"c9": ["v5", "v1"], "c1": ["v1", "v3"]}, titles={"v3": "Three", "v0": "Nought"})
    index = get_indexing(tmp_path / "raw", tmp_path)
    files = written(tmp_path)
    assert files["vid2idx"] == {"v5": 2, "v1": 3, "v3": 4, "v0": 5}
    assert list(files["cid2vidx"].items()) == [("c9", [2, 3]), ("c1", [3, 4])]
    assert index == load_index(tmp_path) == (files["vid2idx"], files["cid2vidx"])


def test_numbers_are_for_life(tmp_path):
    _raw(tmp_path / "monday", columns={"c1": ["v1", "v2"], "c2": ["v3"], "c3": ["v2"]}, users=[])
    get_indexing(tmp_path / "monday", tmp_path)
    assert written(tmp_path)["vid2idx"] == {"v1": 2, "v2": 3, "v3": 4}
    # c2 is gone, and v3 with it; c4 is new and stands first; c1 is filled anew; v2 leaves c3.
    _raw(tmp_path / "tuesday", columns={"c4": ["v9", "v1"], "c3": ["v8"], "c1": ["v2", "v7", "v1"]}, users=[])
    get_indexing(tmp_path / "tuesday", tmp_path)
    files = written(tmp_path)
    assert files["vid2idx"] == {"v1": 2, "v2": 3, "v3": 4, "v9": 5, "v8": 6, "v7": 7}
    assert list(files["cid2vidx"].items()) == [("c1", [3, 7, 2]), ("c2", []), ("c3", [6]), ("c4", [5, 2])]
    # c2 comes back to its own place, and v3 to its own number.
    _raw(tmp_path / "wednesday", columns={"c2": ["v3"]}, users=[])
    get_indexing(tmp_path / "wednesday", tmp_path)
    files = written(tmp_path)
    assert list(files["cid2vidx"].items()) == [("c1", []), ("c2", [4]), ("c3", []), ("c4", [])]
    assert len(files["vid2idx"]) == 6


@pytest.mark.parametrize("half", ["vid2idx.json", "cid2vidx.json"])
def test_an_index_of_which_a_half_is_gone_or_damaged_is_to_be_restored_and_not_numbered_anew(tmp_path, half):
    get_indexing(_raw(tmp_path / "raw", columns=PAIR, users=[]), tmp_path)
    get_indexing(_raw(tmp_path / "raw", columns={"new": []}), tmp_path)  # its lists are all empty now
    path, before = tmp_path / "indexing" / half, files_of(tmp_path / "indexing")
    path.write_bytes(before[half][:9])
    with pytest.raises(InputError, match=rf"{half}: damaged .*; restore it and run get_indexing\.py again"):
        get_indexing(tmp_path / "raw", tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=rf"{half}: gone, its other half is not; restore it"):
        get_indexing(tmp_path / "raw", tmp_path)
    path.write_bytes(before[half])
    get_indexing(tmp_path / "raw", tmp_path)
    assert files_of(tmp_path / "indexing") == before


@pytest.mark.parametrize("files", [1, 2])
def test_a_first_run_that_is_killed_between_its_files_is_made_good_by_the_second(tmp_path, monkeypatch, files):
    data_dir, write_json, written_so_far = _raw(tmp_path / "raw", columns=PAIR, users=[]), script.write_json, []

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
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_a_grown_index_has_the_fingerprint_of_what_it_grew_from(tmp_path):
    old = get_indexing(_raw(tmp_path / "raw", columns=PAIR, users=[]), tmp_path)
    new = get_indexing(_raw(tmp_path / "raw", columns={**PAIR, "c3": ["v9"]}), tmp_path)
    other = get_indexing(_raw(tmp_path / "raw", columns={"c1": ["v2", "v1"], "c2": ["v3"]}), tmp_path / "other")
    assert new.fingerprint(3, 2) == old.fingerprint() != new.fingerprint()
    assert other.fingerprint(3, 2)["sha256"] != old.fingerprint()["sha256"]


# ---------------------------------------------------------------- raw formats


def test_several_files_are_read_in_the_order_of_their_names(tmp_path):
    _write_lines(tmp_path / "raw/cid2vids-2.json", [{"cid": "c2", "vids": ["v3"]}])
    _write_lines(tmp_path / "raw/cid2vids-1.json.gz", [{"cid": "c1", "vids": ["v1"]}])
    _write_lines(tmp_path / "raw/vid2title-b.json", [{"vid": "v5", "title": ""}])
    _write_lines(tmp_path / "raw/vid2title-a.json", [{"vid": "v4", "title": ""}])
    get_indexing(tmp_path / "raw", tmp_path)
    assert written(tmp_path) == {"vid2idx": {"v1": 2, "v3": 3, "v4": 4, "v5": 5}, "cid2vidx": {"c1": [2], "c2": [3]}}


def test_a_cid_that_comes_again_adds_its_new_videos(tmp_path):
    shelves = [("c1", ["v1", "v2", "v1"]), ("c2", ["v5"]), ("c1", ["v3", "v2", "v4"])]
    _write_lines(tmp_path / "raw/cid2vids.json", [{"cid": c, "vids": v} for c, v in shelves])
    _write_lines(tmp_path / "raw/vid2title.json", [{"vid": "v1", "title": "One"}])
    get_indexing(tmp_path / "raw", tmp_path)
    assert written(tmp_path)["vid2idx"] == {"v1": 2, "v2": 3, "v3": 4, "v4": 5, "v5": 6}
    assert written(tmp_path)["cid2vidx"] == {"c1": [2, 3, 4, 5], "c2": [6]}


def test_vids_may_be_one_string_with_commas_and_ids_may_be_integers(tmp_path):
    shelves = [("c1", "v1, v2,v3"), (7, [10, "11", -3]), ("7", ["v1"]), ("c0", ""), ("c3", [])]
    _write_lines(tmp_path / "raw/cid2vids.json", [{"cid": c, "vids": v} for c, v in shelves])
    _write_lines(tmp_path / "raw/vid2title.json", [{"vid": 12, "title": "Twelve"}])
    get_indexing(tmp_path / "raw", tmp_path)
    assert written(tmp_path) == {
        "vid2idx": {"v1": 2, "v2": 3, "v3": 4, "10": 5, "11": 6, "-3": 7, "12": 8},
        "cid2vidx": {"c1": [2, 3, 4], "7": [5, 6, 7, 2], "c0": [], "c3": []},
    }


def test_a_byte_order_mark_and_line_ends_of_windows_are_no_bad_lines(tmp_path, capsys):
    lines = [b'\xef\xbb\xbf{"cid": "c1", "vids": "v1"}\r', b'{"cid": "c2", "vids": "v2"}\r', b"\r", b""]
    _write_lines(tmp_path / "cid2vids-1.json", lines)
    _write_lines(tmp_path / "cid2vids-2.json", [b"\xef\xbb\xbf", {"cid": "c3", "vids": "v3"}])
    assert script.read_columns(tmp_path) == {"c1": ["v1"], "c2": ["v2"], "c3": ["v3"]}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".json.gz", ".jsonl.gz"])
def test_files_of_every_ending_are_read_and_the_others_named_in_one_line(tmp_path, capsys, ending):
    _write_lines(tmp_path / f"cid2vids{ending}", [{"cid": "ü1", "vids": ["视频"]}])
    _write_lines(tmp_path / f"vid2title{ending}", [{"vid": "v3", "title": "T"}])
    _write_lines(tmp_path / "click_seq/clicks.json", [])  # a folder is not named
    for name in (".hidden", "cid2vids-2.ndjson", "cid2vids.JSON", "vid2tile.json", "vid2title.csv"):
        _write_lines(tmp_path / name, [])
    get_indexing(tmp_path, tmp_path / "work")
    assert written(tmp_path / "work") == {"vid2idx": {"视频": 2, "v3": 3}, "cid2vidx": {"ü1": [2]}}
    assert capsys.readouterr().err == (
        f"{tmp_path}: 4 not read (cid2vids-2.ndjson, cid2vids.JSON, vid2tile.json, vid2title.csv); their names begin with "
        "cid2vids or vid2title and end in .json, .jsonl, .json.gz, .jsonl.gz\n"
    )


def test_in_a_folder_of_clicks_folders_too_are_named_and_of_many_the_first_five(tmp_path, capsys):
    for name in ("a.json", ".hidden", "c.JSON", "d.ndjson", "dt=2024-01-01/e.json", "f.bz2", "g.txt", "h.csv"):
        _write_lines(tmp_path / name, [])
    script.name_unread(tmp_path)
    few = "c.JSON, d.ndjson, dt=2024-01-01, f.bz2, g.txt, ..."
    line = f"{tmp_path}: 6 not read ({few}); the names of files end in .json, .jsonl, .json.gz, .jsonl.gz\n"
    assert capsys.readouterr().err == line


def test_names_and_titles_are_read_where_the_raw_data_has_them_undamaged_and_null_costs_the_title_alone(
    tmp_path, capsys
):
    _raw(tmp_path, columns=PAIR, titles={"v1": "One", "v8": None, "v9": "Nine"}, names={"c2": "Second"})
    assert list(get_indexing(tmp_path, tmp_path / "work").videos) == ["v1", "v2", "v3", "v8", "v9"]
    assert script.read_names(tmp_path, {"v8", "v9", "v0"}) == ({"v9": "Nine"}, {"c2": "Second"})
    assert script.read_names(tmp_path / "gone", {"v9"}) == ({}, {})
    (tmp_path / "vid2title.json").rename(tmp_path / "vid2title.json.gz")
    assert script.read_names(tmp_path, {"v9"}) == ({}, {"c2": "Second"})  # as far as the raw data are whole
    assert capsys.readouterr().err == ""


def test_the_vocabulary_is_the_shelves_and_the_catalogue_whatever_is_clicked(tmp_path):
    _raw(tmp_path / "raw", columns=PAIR, titles={"v2": "Two", "x": "X"}, users=[("u1", ["y", "y_c1", "z"] * 50)])
    (tmp_path / "raw/click_seq/cut.json.gz").write_bytes(b"clicks are not even read")
    get_indexing(tmp_path / "raw", tmp_path)
    assert written(tmp_path)["vid2idx"] == {"v1": 2, "v2": 3, "v3": 4, "x": 5}


def test_the_report_counts_videos_columns_unknown_and_empty_ones(tmp_path, capsys):
    get_indexing(_raw(tmp_path / "raw", columns=PAIR), tmp_path)
    assert capsys.readouterr().out == "3 videos (3 new), 2 columns (2 new, 0 empty); there is no catalogue\n"
    _raw(tmp_path / "raw", columns={**PAIR, "c3": []}, titles={"v1": "One", "v8": "Eight"})
    get_indexing(tmp_path / "raw", tmp_path)
    unknown = "2 videos of the columns are unknown to the catalogue"  # v2 and v3
    assert capsys.readouterr().out == f"4 videos (1 new), 3 columns (1 new, 1 empty); {unknown}\n"


# ---------------------------------------------------------------- bad lines

BAD = {
    "not JSON": (b'{"cid": "x", "vids"', "not JSON"),
    "a nesting bomb": (b'{"cid": "x", "vids": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
    "a number of a million digits": (b'{"cid": ' + b"9" * 1_000_000 + b', "vids": []}', "not JSON"),
    "not UTF-8": (b'{"cid": "\xff\xfe", "vids": ["v1"]}', "not UTF-8"),
    "half a character": (b'{"cid": "\\ud83d", "vids": ["v1"]}', "not UTF-8"),
    "a list": (b'["x", ["v1"]]', "wrong type of line"),
    "vids a number": (b'{"cid": "x", "vids": 5}', "wrong type of vids"),
    "no vids": (b'{"cid": "x"}', "no vids"),
    "an empty id": (b'{"cid": "", "vids": ["v1"]}', "empty id"),
    "a long id": (b'{"cid": "' + b"x" * 1001 + b'", "vids": ["v1"]}', "id too long"),
}


@pytest.mark.parametrize(("line", "reason"), BAD.values(), ids=BAD)
def test_a_bad_line_is_skipped_and_reported_with_file_line_and_reason(tmp_path, capsys, line, reason):
    path = _write_lines(tmp_path / "raw/cid2vids.json", [*COLUMNS[:60], line, *COLUMNS[60:]])
    get_indexing(tmp_path / "raw", tmp_path)
    assert written(tmp_path)["cid2vidx"] == {f"c{i}": [i + 2] for i in range(120)}
    assert capsys.readouterr().err == f"{path}: 1 of 121 lines are bad (line 61: {reason}): skipped\n"


def test_a_bad_line_of_the_catalogue_is_reported_once_by_get_indexing_alone(tmp_path, capsys):
    _write_lines(tmp_path / "raw/cid2vids.json", [{"cid": "c1", "vids": "t0"}])
    path = _write_lines(
        tmp_path / "raw/vid2title.json", [{"vid": "x"}, *({"vid": f"t{i}", "title": "T"} for i in range(120))]
    )
    get_indexing(tmp_path / "raw", tmp_path)
    assert list(written(tmp_path)["vid2idx"]) == [f"t{i}" for i in range(120)]
    assert capsys.readouterr().err == f"{path}: 1 of 121 lines are bad (line 1: no title): skipped\n"
    assert script.read_names(tmp_path / "raw", {"t119"}) == ({"t119": "T"}, {})
    assert capsys.readouterr() == ("", "")


def test_skipped_lines_are_counted_by_reason_and_the_first_three_named(tmp_path, capsys):
    bad = ["", "{", b"\xff", "[]", '{"vids": []}', "{", '{"cid": "c"}']
    path = _write_lines(tmp_path / "cid2vids.json", [*COLUMNS * 5, *bad, *COLUMNS * 5])
    records = Records(str(path), script.parse_column)
    assert len(list(records)) == 1200 and records.tally.lines == 1207
    assert records.tally.skipped == {
        "blank": 1, "not JSON": 2, "not UTF-8": 1, "wrong type of line": 1, "no vids": 1, "no cid": 1,
    }  # fmt: skip
    records.tally.check()
    places = "line 602: not JSON, line 603: not UTF-8, line 604: wrong type of line, ..."
    assert capsys.readouterr().err == f"{path}: 6 of 1,207 lines are bad ({places}): skipped\n"


def test_one_bad_line_in_a_hundred_passes_and_more_stop_the_run_leaving_the_former_index(tmp_path):
    get_indexing(_raw(tmp_path / "raw", columns=PAIR), tmp_path)
    before = files_of(tmp_path / "indexing")
    path = _write_lines(tmp_path / "raw/cid2vids.json", [*COLUMNS[:98], "{"])
    with pytest.raises(InputError, match=rf"{path}: 1 of 99 lines .*line 99: not JSON.*MAX_BAD_FRACTION = 0\.01"):
        get_indexing(tmp_path / "raw", tmp_path)
    assert files_of(tmp_path / "indexing") == before
    _write_lines(path, [*COLUMNS[:99], "{"])
    get_indexing(tmp_path / "raw", tmp_path)
    assert list(written(tmp_path)["cid2vidx"])[:3] == ["c1", "c2", "c0"]


# ---------------------------------------------------------------- bad files


@pytest.mark.parametrize("file", ["cid2vids.json.gz", "vid2title.json.gz"])
@pytest.mark.parametrize("damage", ["cut short", "no gzip", "flipped", "bad lines"])
def test_a_damaged_file_is_named_and_the_former_index_left(tmp_path, file, damage):
    _raw(tmp_path / "raw", columns={**PAIR, **MANY}, titles={f"v{i}": f"{i**7}" for i in range(100)}, gzip=True)
    get_indexing(tmp_path / "raw", tmp_path)
    before, path = files_of(tmp_path / "indexing"), tmp_path / "raw" / file
    data = path.read_bytes()
    half = len(data) // 2
    flipped = data[:half] + bytes([data[half] ^ 0xFF]) + data[half + 1 :]
    bad = gzip.compress(b"{\n{\n")
    damages = {"cut short": data[:half], "no gzip": gzip.decompress(data), "flipped": flipped, "bad lines": bad}
    path.write_bytes(damages[damage])
    with pytest.raises(InputError) as error:
        get_indexing(tmp_path / "raw", tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert files_of(tmp_path / "indexing") == before


@pytest.mark.parametrize("name", ["cid2vids-2.json", "vid2title.jsonl", "cid2vids-2.json.gz"])
def test_a_file_of_no_bytes_is_refused_and_one_of_blank_lines_is_not(tmp_path, name):
    path = _raw(tmp_path, columns=PAIR) / name
    path.touch()
    with pytest.raises(InputError, match=f"^{path}: an empty file; copy it again, or remove it$"):
        get_indexing(tmp_path, tmp_path / "work")
    _write_lines(path, ["", " "])
    assert list(get_indexing(tmp_path, tmp_path / "work").columns) == ["c1", "c2"]


def test_a_missing_folder_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=str(tmp_path / "data/nowhere")):
        get_indexing("data/nowhere", "work")
    assert not Path("work").exists()


def test_no_columns_or_no_video_is_one_clear_error_beside_the_name_of_a_misspelt_file(tmp_path, capsys):
    (_raw(tmp_path, titles={"v1": "One"}) / "cid2vid.json").touch()
    with pytest.raises(InputError, match=f"^{tmp_path}: no columns.*cid2vids"):
        get_indexing(tmp_path, tmp_path / "work")
    assert "1 not read (cid2vid.json)" in capsys.readouterr().err
    _raw(tmp_path, columns={"c1": []}, titles={})
    (tmp_path / "vid2title.json").unlink()
    with pytest.raises(InputError, match=f"^{tmp_path}: no video in any column or catalogue$"):
        get_indexing(tmp_path, tmp_path / "work")


def test_a_file_that_is_there_both_plain_and_compressed_is_refused(tmp_path):
    _raw(tmp_path / "raw", columns=PAIR)
    _raw(tmp_path / "raw", columns=PAIR, gzip=True)
    with pytest.raises(InputError, match=r"cid2vids\.json.* have the same name"):
        get_indexing(tmp_path / "raw", tmp_path)


@pytest.mark.parametrize("name, texts", {
    "vid2idx.json": ["", "[]", '"x"', "[" * 100_000, '{"a":' * 100_000, '{"v1": 2', '{"v1": 3}', '{"v1": 2, "v2": 2}',
                     '{"v1": "2"}', '{"\xff": 2}'],
    "cid2vidx.json": ["", "[]", '{"c1": 5}', '{"c1": null}', '{"c1": ["x"]}', '{"c1": {"2": 3}}', '{"c1": [99]}'],
}.items())  # fmt: skip
def test_a_damaged_former_index_is_refused_and_not_written_over(tmp_path, name, texts):
    get_indexing(_raw(tmp_path / "raw", columns=PAIR), tmp_path)
    for text in texts:
        (tmp_path / "indexing" / name).write_text(text, encoding="latin-1")  # a half of a character in UTF-8
        with pytest.raises(InputError, match=str(tmp_path / "indexing" / name)):
            get_indexing(tmp_path / "raw", tmp_path)
        assert (tmp_path / "indexing" / name).read_text(encoding="latin-1") == text


# ---------------------------------------------------------------- byte ranges


def read_cut(path, range_bytes):
    """Return (records, Tally) of a file of columns that is cut into ranges of so many bytes."""
    records, tally = [], Tally(str(path))
    for start in range(0, path.stat().st_size, range_bytes):
        of_range = Records(str(path), script.parse_column, start, start + range_bytes)
        records += of_range
        tally += of_range.tally
    return records, tally


def test_every_line_is_read_exactly_once_whatever_the_size_of_the_ranges(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "MAX_LINE_BYTES", 40)
    long, path = b'{"cid": "' + b"x" * 70 + b'", "vids": ""}', tmp_path / "x"
    lines = [b'{"cid": 1, "vids": ""}', b"", b"{", long, b'{"cid": "\xc3\xbc", "vids": [1]}', b"\r", b"[]"]
    for ending in (b"\n", b""):  # the last line may lack its newline
        path.write_bytes(b"\n".join(lines) + ending)
        assert max(map(len, read_lines(str(path)))) == 41  # of the long line no more is in memory
        for range_bytes in range(1, path.stat().st_size + 2):
            records, tally = read_cut(path, range_bytes)
            assert records == [("1", [], None), ("ü", ["1"], None)] and tally.lines == 7
            assert tally.skipped == {"blank": 2, "not JSON": 1, "too long": 1, "wrong type of line": 1}
            assert tally.first == [(3, "not JSON"), (4, "too long"), (7, "wrong type of line")]


# ---------------------------------------------------------------- constants

WRONG = {
    "an int": ("get_indexing", "MAX_LINE_BYTES", [True, 0, -1, 1.0, "32", None, (1,)]),
    "an int or 0": ("model_tf2", "USER_BLOCKS", [False, -1, 0.0, None]),
    "an int or None": ("get_tfrecord", "NUM_WORKERS", [0, False, 2.5, "all"]),
    "a float": ("get_indexing", "MAX_BAD_FRACTION", [True, math.nan, math.inf, -0.01, "0.01", None]),
    "a float or None": ("model_tf2", "DROPOUT", [math.nan, -math.inf, -1, False, "no"]),
    "a bool": ("train", "MEMORY", [1, 0, None, "True", ()]),
    "a word": ("model_tf2", "LOSS", ["hinge", "", "Softmax", None, ["bce"]]),
    "a path": ("infer", "RANKING_DIR", ["", None, Path("data"), b"data"]),
    "a tuple": ("train", "MIX_WEIGHTS", [(), [0.5], 0.5, "0.5", (0.5, "0.5"), (0.5, math.nan), (True,), (-0.1, 0.5)]),
}
RIGHT = {"MAX_LINE_BYTES": 1, "USER_BLOCKS": 0, "NUM_WORKERS": 3, "MAX_BAD_FRACTION": 0, "DROPOUT": 0.5, "MEMORY": False,
         "LOSS": "bce", "RANKING_DIR": "/x", "MIX_WEIGHTS": (1,)}  # fmt: skip


@pytest.fixture(scope="module")
def scripts():
    """{name: module} of all six scripts, each imported."""
    return {name: importlib.import_module(name) for name in script.CHAIN}


def test_the_shipped_constants_of_all_six_scripts_fit(scripts):
    assert len(scripts) == 6
    check_constants()


@pytest.mark.parametrize(("module", "name", "values"), WRONG.values(), ids=WRONG)
def test_a_constant_that_its_annotation_does_not_fit_is_refused_by_name(scripts, monkeypatch, module, name, values):
    for value in values:
        monkeypatch.setattr(scripts[module], name, value)
        with pytest.raises(InputError, match=re.escape(f"{name} = {value!r} in {module}.py: it must be ")) as error:
            check_constants()
        assert "\n" not in str(error.value)
    monkeypatch.setattr(scripts[module], name, RIGHT[name])
    check_constants()


def test_a_constant_whose_annotation_was_edited_away_keeps_its_value_and_its_home(scripts, monkeypatch):
    monkeypatch.delitem(scripts["get_tfrecord"].__annotations__, "HELD_OUT_USERS")
    monkeypatch.setattr(scripts["get_tfrecord"], "HELD_OUT_USERS", 7)
    check_constants()
    assert script.constants_of("get_tfrecord")["HELD_OUT_USERS"] == 7
    assert not script.constants_of("train", "get_dataset").keys() & {"HELD_OUT_USERS", "FORMAT", "BST_DSSM"}


# ---------------------------------------------------------------- writing, and one at a time


def test_a_file_system_without_locks_is_worth_one_warning(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(script.fcntl, "flock", flock)
    with script.only_one(tmp_path / "work"):
        pass
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{tmp_path}/work cannot be locked" in err and "No locks available" in err


def test_a_second_script_of_the_same_name_is_refused_and_one_of_another_is_not(tmp_path, monkeypatch):
    def one(name, worker=0):
        monkeypatch.setattr(sys, "argv", [name])
        return script.only_one(tmp_path, worker)

    with contextlib.ExitStack() as stack:
        for name, worker in (("get_tfrecord.py", 0), ("infer.py", 0), ("train.py", 0), ("train.py", 1)):
            stack.enter_context(one(name, worker))
        for name, worker in (("get_tfrecord.py", 0), ("train.py", 1)):
            with pytest.raises(InputError, match=f"another {name} is at work in {tmp_path}"):
                stack.enter_context(one(name, worker))
    with one("infer.py"):  # it ended
        pass


# ---------------------------------------------------------------- as a script


SAY = """
import os, signal, sys
from get_indexing import InputError, run_script

def main():
    print("ü 视")
    print("ö", file=sys.stderr)
    {fault}

if __name__ == "__main__":
    run_script(__file__)
"""
ENDS = {
    "raise InputError('a.json: too old')": "say.py: a.json: too old",
    "open('gone.json')": "say.py: [Errno 2] No such file or directory: 'gone.json'",
    "os.kill(os.getpid(), signal.SIGTERM)": "say.py: terminated",
    "os.kill(os.getpid(), signal.SIGINT)": "say.py: interrupted",
}


@pytest.mark.parametrize("fault", ENDS)
def test_a_fault_of_the_input_and_a_signal_end_a_script_with_one_line(tmp_path, fault):
    """What was printed before is there, in a stream that is not UTF-8 by escapes."""
    (tmp_path / "say.py").write_text(SAY.replace("{fault}", fault), encoding="utf-8")
    done = run_python(tmp_path, tmp_path / "say.py", PYTHONIOENCODING="ascii:strict")
    assert (done.returncode, done.stdout, done.stderr) == (1, "\\xfc \\u89c6\n", f"\\xf6\n{ENDS[fault]}\n")


def test_a_constant_edited_to_what_it_cannot_be_ends_the_script_with_one_line_before_all_else(tmp_path):
    _raw(tmp_path / "data/sample", columns=PAIR)
    source = (HOUSE / "get_indexing.py").read_text("utf-8").replace("MAX_ID_CHARS: int = 1000", "MAX_ID_CHARS: int = 0")
    (tmp_path / "get_indexing.py").write_text(source, "utf-8")
    done = run_python(tmp_path, tmp_path / "get_indexing.py", PYTHONPATH="")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("get_indexing.py: MAX_ID_CHARS = 0 in get_indexing.py: it must be int: ")
    assert os.listdir(tmp_path / "data") == ["sample"]
