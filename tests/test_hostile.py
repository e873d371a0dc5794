"""Hostile input: whatever a file holds, every line is kept or counted, and nothing is written elsewhere."""

import collections
import contextlib
import gzip
import json
import math
import os
import random
import re
import shutil

import get_dataset
import get_indexing as get_indexing_module
from get_indexing import InputError, Records, get_indexing, load_index, parse_column, parse_title
from get_tfrecord import LAST_SECOND, History, get_tfrecord, parse_history
from infer import Ranker, infer
from model_tf2 import build_model
from train import MuonAdam, restore_checkpoint, save_checkpoint, train

import pytest
from conftest import _clicks_like_real, _raw, _write_lines, files_of, one_line, run_python
from test_get_tfrecord import decoded

READ_CASES, CHAIN_CASES, RANK_CASES = 600, 20, 40  # files read, folders through two scripts, blocks of users ranked
LONGEST = 200_000  # bytes of a line in this file: MAX_LINE_BYTES, as a user would edit it
IDS = [
    "../../etc/passwd", "/etc/passwd", "..", "C:\\x", "a\nb", "a\r\nb", "a\tb", "quote\"s'", "\\", "\x00", "\x1b[31m", " ",
    "\u202eabc", "שלום", "مرحبا", "👩‍👩‍👧", "\U0010ffff", "\ufeff", "\u2028", "e\u0301", "_", "__", "a_b_c", "c_", "NaN", "null",
    "{}", "%s%n", "${HOME}", "{0}", "__import__('os')", "0", "-1", "x" * 1000,
]  # fmt: skip
WRONG = [None, True, False, 1.5, math.nan, math.inf, -math.inf, {}, {"uid": "u"}, [[]], [None], [["v"]], [{"v": 1}], [1.0],
         [True], ["v", None], ""]  # fmt: skip
WRONG_TIMES = [5, "", {}, [], [1], [1, 2, 3], [2, 1], [1, None], [True, 2], ["1", "2"], [0, math.nan], [0, math.inf], [-1, 0],
               [1, 1_764_000_000_000], [0, 10**400], [[1], [2]]]  # fmt: skip
WRONG_NOW = ["", "1", [1], {}, True, -1, 10**12, math.nan, math.inf]
SECONDS = [0, 0.5, 1, 2**31, 2**32, 1_764_000_000, 1_764_000_000.9, LAST_SECOND, float(LAST_SECOND)]
FORMATS = {
    "cid2vids": (parse_column, {"cid": "c1", "vids": ["v1", "v2"]}),
    "vid2title": (parse_title, {"vid": "v1", "title": "One"}),
    "click_seq": (parse_history, {"uid": "u1", "click_seq": ["v1", "v2_c1"]}),
}


@pytest.fixture(autouse=True, scope="module")
def settings():
    """MAX_LINE_BYTES is LONGEST, no number of bad lines stops a run here and, in small data, an epoch has few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_indexing_module, "MAX_LINE_BYTES", LONGEST)
        patch.setattr(get_indexing_module, "MAX_BAD_FRACTION", 1.0)
        patch.setattr(get_dataset, "MIN_STEPS", 6)
        yield


# ---------------------------------------------------------------- the generator


def good_line(rng, form):
    """Return (line, what its parser must give) of a valid but unpleasant record."""
    ids = [rng.choice(IDS) if rng.random() < 0.8 else rng.choice([0, -7, 10**40]) for _ in range(rng.randrange(6))]
    texts, own = [str(i) for i in ids], rng.choice(IDS)
    if form == "cid2vids":
        joined = [text for text in texts if "," not in text and text == text.strip()]
        name = rng.choice([None, "a name", 5, ["no name"]])
        record = {"cid": own, "vids": ",".join(joined) if (as_text := rng.random() < 0.3) else ids, "name": name}
        expected = own, joined if as_text else texts, name if name == "a name" else None
    elif form == "vid2title":
        title = rng.choice([*IDS, "", "long " * 1000])
        record, expected = {"vid": own, "title": title}, (own, title)
    else:
        times, now = sorted(rng.choices(SECONDS, k=len(ids))), rng.choice(SECONDS)
        known = [{}, {"now": now}, {"times": times}, {"times": times, "now": now}][rng.randrange(4)]
        record, seconds = {"uid": own, "click_seq": ids, **known}, known.get("times", [0] * len(ids))
        expected = History(own, texts, [int(second) for second in seconds], int(known.get("now", 0)))
    record |= {"extra": rng.choice([None, math.nan, 1e308, 10**400, [[{}]], "\u0000"])} if rng.random() < 0.3 else {}
    line = json.dumps(record, ensure_ascii=rng.random() < 0.5).encode()
    return rng.choice([b"", b" ", b"\t"]) + line + rng.choice([b"", b"\r", b"  "]), expected


def bad_line(rng, form):
    """Return a line that must be skipped."""
    record = FORMATS[form][1]
    text, key = json.dumps(record).encode(), rng.choice(list(record))
    wrong = rng.choice([value for value in WRONG if (key, value) not in (("vids", ""), ("title", ""), ("title", None))])
    too_long = dict.fromkeys(("cid", "vid", "uid"), rng.choice(["x" * 1001, 10**2000]))
    at, depth = rng.randrange(1, len(text)), rng.choice([2_000, 20_000, LONGEST // 4])
    records = [{name: value for name, value in record.items() if name != key}, record | {key: wrong}, record | too_long]
    if form == "click_seq":
        records += [record | {"times": rng.choice(WRONG_TIMES)}, record | {"now": rng.choice(WRONG_NOW)}]
    lines = [
        *(json.dumps(record).encode() for record in records),
        rng.choice([b"[", b"{"]) * depth,
        text[:-1] + b', "deep": ' + b"[" * depth + b"]" * (depth - rng.randrange(2)),
        text[:-1] + b', "long": "' + b"x" * (LONGEST + rng.randrange(3)) + b'"}',
        text + b"\x00" * rng.randint(1, 9),
        text[:at] + rng.choice([b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"]) + text[at:],
        text.replace(b"1", rng.choice([rb"\ud800", rb"\udfff\ud800", rb"\ud83d"])),
        text[:at],
        rng.choice([b"null", b"[]", b'"text"', b"1", b"NaN", b"true", b"\xef\xbb\xbf\xef\xbb\xbf{}", b"{}{}"]),
        b'{"uid": ' + b"9" * 5_000 + b', "cid": ' + b"9" * 5_000 + b"}",
        text.decode().encode("utf-16-le"),
        rng.randbytes(rng.randint(1, 40)).replace(b"\n", b"") + b"\x80",
    ]
    return rng.choice(lines)


def hostile_file(rng, form):
    """Return (bytes, lines, [what the good lines must give]); a byte order mark, blank lines, an open end."""
    lines, expected = [], []
    for _ in range(rng.randint(1, 8)):  # a file of no bytes is refused
        kind = rng.random()
        line, *parsed = good_line(rng, form) if kind < 0.5 else [bad_line(rng, form)]
        lines.append(line if kind < 0.9 else rng.choice([b"", b"\r", b" \t "]))
        expected += parsed
    data = b"\n".join(lines)
    mark = b"\xef\xbb\xbf" if rng.random() < 0.2 and not lines[0].startswith(b"\xef\xbb\xbf") else b""
    return mark + data + b"\n" * (rng.random() < 0.7 or not lines[-1]), len(lines), expected


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_every_line_of_a_hostile_file_is_kept_as_it_is_or_counted_by_reason(tmp_path, ending):
    (rng, flips), reasons, path = map(random.Random, (5, 6)), set(), tmp_path / f"x.json{ending}"
    for case in range(READ_CASES):
        form = list(FORMATS)[case % 3]
        data, num_lines, expected = hostile_file(rng, form)
        path.write_bytes(packed := gzip.compress(data, 1) if ending else data)
        records = Records(str(path), FORMATS[form][0])
        kept, tally = list(records), records.tally
        assert kept == expected, f"case {case}: {data[:500]}"
        assert tally.lines == num_lines == len(kept) + tally.skipped.total(), f"case {case}: {data[:500]}"
        reasons |= set(tally.skipped)
        if ending:  # cut anywhere, a gzip file is refused, and with a bit changed, as long as that changes anything
            path.write_bytes(packed[: rng.randrange(len(packed))])
            assert path.name in one_line(list, Records(str(path), FORMATS[form][0]))
            damaged = bytearray(packed)
            damaged[flips.randrange(len(packed))] ^= 1 << flips.randrange(8)
            path.write_bytes(damaged)
            with contextlib.suppress(InputError, OSError):
                assert list(Records(str(path), FORMATS[form][0])) == expected
    assert {"blank", "not JSON", "not UTF-8", "wrong type of line", "too long", "id too long", "empty id"} <= reasons
    assert {"not as many times as clicks", "times that fall", "times that are no unix seconds"} <= reasons
    keys = {key for _, record in FORMATS.values() for key in record}
    assert {f"no {key}" for key in keys} | {f"wrong type of {key}" for key in keys} <= reasons


def test_a_gzip_bomb_is_one_line_too_long_and_takes_little_memory(tmp_path):
    """A line of 512 MiB in a file of half a MiB; the memory is the child's own highest, as Linux counts it."""
    data = _raw(tmp_path / "data/sample", columns={"c1": ["v1"]}, titles={"v1": "One"})
    bomb = gzip.compress(b"[" * (16 << 20), 9) * 32 + gzip.compress(b"\n" + b'{"cid": "c2", "vids": ["v1"]}\n' * 100)
    (data / "cid2vids2.json.gz").write_bytes(bomb)
    program = "import get_indexing; get_indexing.get_indexing(); print(open('/proc/self/status').read())"
    child = run_python(tmp_path, "-c", program)
    assert child.returncode == 0, child.stderr
    assert int(re.search(r"VmHWM:\s+(\d+) kB", child.stdout)[1]) < 200_000
    assert "cid2vids2.json.gz: 1 of 101 lines are bad (line 1: too long)" in child.stderr


# ---------------------------------------------------------------- numbering and records


def test_hostile_folders_go_through_numbering_and_records_with_every_line_counted(tmp_path):
    """A user has 10,000 clicks and another one comes 20 times; whoever is held out is in one of validation and test."""
    rng, real = random.Random(7), _clicks_like_real(60, seed=61)
    real["users"] += [("often", ["t0a-1_t0a", "t0b-2"] * 5_000), *[("again", ["t0a-1", "t0a-2_t0a"])] * 20]
    for case in range(CHAIN_CASES):
        folder = tmp_path / str(case)
        data_dir = _raw(folder / "raw", **real)
        files = {form: hostile_file(rng, form) for form in FORMATS}
        for form, (data, *_) in files.items():
            name = os.fsdecode(b"click_seq/\xff.json") if form == "click_seq" else f"{form}z.json"
            (data_dir / name).write_bytes(data)
        before = files_of(folder)
        index = get_indexing(data_dir, folder / "work")
        manifest = get_tfrecord(data_dir, folder / "work", num_workers=1)
        assert {path: of for path, of in files_of(folder).items() if path.split("/")[0] != "work"} == before
        users = real["users"] + [(uid, clicks) for uid, clicks, *_ in files["click_seq"][2]]
        report, uids, labels = manifest["report"], collections.defaultdict(set), collections.Counter()
        for window in decoded(folder / "work/tfrecord"):
            uids[window["split"]].add(window["uid"])
            labels[window["split"]] += sum(window["label"])
        assert report["lines"] == len(real["users"]) + files["click_seq"][1]
        assert report["lines"] - sum(report["skipped"].values()) == len(users)
        assert report["users"] == len({uid for uid, _ in users})
        assert report["clicks"] == sum(len(clicks) for _, clicks in users)
        assert {split: of["targets"] for split, of in manifest["splits"].items()} == labels
        assert set.union(*uids.values()) == {uid for uid, clicks in users if clicks}
        assert {"often", "again"} <= uids["train"] & (uids["val"] ^ uids["test"]) and not uids["val"] & uids["test"]
        assert {cid for cid, *_ in files["cid2vids"][2]} | real["columns"].keys() == index.columns.keys()
        assert {vid for vid, _ in files["vid2title"][2]} <= index.videos.keys() and load_index(folder / "work") == index
        shutil.rmtree(folder)


# ---------------------------------------------------------------- ranking


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with raw/ and work/, trained on users of whom some have hostile ids, click on hostile ids and have times."""
    folder, rng, real = tmp_path_factory.mktemp("trained"), random.Random(8), _clicks_like_real(120, seed=63)
    columns = real["columns"] | {cid: rng.sample(IDS, 5) for cid in IDS}
    _raw(folder / "raw", columns, real["users"])
    clicks = {uid: [rng.choice(IDS) + "_" + rng.choice(IDS) for _ in range(9)] for uid in IDS}
    times = [1_764_000_000 + day * 86_400 for day in range(9)]
    lines = [{"uid": uid, "click_seq": of_user, "times": times} for uid, of_user in clicks.items()]
    _write_lines(folder / "raw/click_seq/hostile.json", lines)
    get_indexing(folder / "raw", folder / "work")
    get_tfrecord(folder / "raw", folder / "work", num_workers=1)
    train(folder / "work", arguments={"emb_dim": 8, "user_blocks": 1}, EPOCHS=1)
    return folder


def check_rankings(text, users, columns):
    """Assert a line for each user, in order: JSON with finite scores, each column once."""
    rankings = [json.loads(line) for line in text.split("\n")[:-1]]
    assert [(line["uid"], line["clicks"]) for line in rankings] == [(user.uid, len(user.clicks)) for user in users]
    for line in rankings:
        assert sorted(line["columns"]) == sorted(columns) and len(line["scores"]) == len(columns)
        assert all(map(math.isfinite, line["scores"])) and line["source"] in ("model", "popular")


def test_hostile_users_get_a_valid_line_each_whatever_their_times(trained):
    rng, ranker, columns = random.Random(9), Ranker(trained / "work"), load_index(trained / "work").columns
    for _ in range(RANK_CASES):
        users = [good_line(rng, "click_seq")[1] for _ in range(rng.randint(1, 30))]
        clicks = [f"{rng.choice(IDS)}_{rng.choice(IDS)}" for _ in range(rng.choice([1, 3, 200]))]
        users.append(History(rng.choice(IDS), clicks, [0] * len(clicks), LAST_SECOND))
        check_rankings("".join(ranker.lines(users)), users, columns)


def test_users_in_are_lines_out_for_every_ranking_file_and_nothing_is_written_elsewhere(trained, tmp_path):
    """Hidden files are no one's input."""
    folder = shutil.copytree(trained, tmp_path / "own")
    rng, clicks, expected = random.Random(10), folder / "raw/click_seq", {}
    names = ["a b", "-rf", "manifest", "default", "ünï", "new\nline", "%s", "$(touch x)", "x.tmp", "a.json.gz", "*",
             "a.made_of", os.fsdecode(b"\xff"), "\u2028", 65 * "视"]  # fmt: skip
    for hidden in (".hidden.json", "...json"):
        (clicks / hidden).write_bytes(b"not read")
    for name in names:
        data, _, expected[name] = hostile_file(rng, "click_seq")
        (clicks / f"{name}.json").write_bytes(data)
    before = files_of(folder)
    outputs = infer(clicks, folder / "work", folder / "ranking", num_workers=1)
    assert {path.name for path in outputs} == {f"{name}.json.gz" for name in [*names, "clicks", "hostile"]}
    files = [f"{name}{end}" for name in [*names, "clicks", "hostile"] for end in (".json.gz", ".made_of.json")]
    after = files_of(folder)
    assert after.keys() - before.keys() == {f"ranking/{name}" for name in ["default.json", *files]}
    assert before.items() <= after.items()
    columns = load_index(folder / "work").columns
    for name, users in expected.items():
        check_rankings(gzip.decompress((folder / f"ranking/{name}.json.gz").read_bytes()).decode(), users, columns)


@pytest.mark.parametrize("damage", [b"", b"\x80\x04.", "cut"])
def test_a_checkpoint_that_is_none_is_refused(tmp_path, damage):
    model = build_model(num_videos=3, num_columns=2, emb_dim=4)
    optimizer, path = MuonAdam(model, lambda step: 0.1, 3.0), tmp_path / "checkpoint.npz"
    save_checkpoint(tmp_path, model, optimizer, {"seed": 1}, "now", [{"epoch": 1}], model.get_weights())
    path.write_bytes(path.read_bytes()[:-999] if damage == "cut" else damage)
    line = one_line(restore_checkpoint, tmp_path, model, optimizer, {"seed": 1})
    assert str(path) in line and "run train.py again" in line
