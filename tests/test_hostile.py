"""Hostile input: whatever a file holds, every line is kept or counted, nothing runs, and nothing is written elsewhere."""

import gzip
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import get_dataset
import get_indexing as get_indexing_module
import train as train_module
from get_indexing import (
    InputError,
    Tally,
    get_indexing,
    load_index,
    parse_clicks,
    parse_column,
    parse_title,
    read_records,
)
from get_tfrecord import get_tfrecord
from infer import Ranker, infer
from train import load_model, train

import numpy as np
import pytest
import tensorflow as tf
from conftest import _clicks_like_real, _raw, _write_lines

ROOT = Path(__file__).parents[1]
READ_CASES, CHAIN_CASES, RANK_CASES = 1200, 20, 40  # files read, folders through two scripts, blocks of users ranked
LONGEST = 200_000  # bytes of a line in this file: MAX_LINE_BYTES, as a user would edit it
IDS = [
    "../../etc/passwd", "/etc/passwd", "..", "C:\\x", "a\nb", "a\r\nb", "a\tb", "quote\"s'", "\\", "\x00", "\x1b[31m", " ",
    "\u202eabc", "שלום", "مرحبا", "👩‍👩‍👧", "\U0010ffff", "\ufeff", "\u2028", "e\u0301", "_", "__", "a_b_c", "c_", "NaN", "null",
    "{}", "%s%n", "${HOME}", "{0}", "__import__('os')", "0", "-1", "x" * 1000,
]  # fmt: skip
WRONG = [None, True, False, 1.5, math.nan, math.inf, -math.inf, {}, {"uid": "u"}, [[]], [None], [["v"]], [{"v": 1}], [1.0],
         [True], ["v", None], ""]  # fmt: skip
FORMATS = {
    "cid2vids": (parse_column, {"cid": "c1", "vids": ["v1", "v2"]}),
    "vid2title": (parse_title, {"vid": "v1", "title": "One"}),
    "click_seq": (parse_clicks, {"uid": "u1", "click_seq": ["v1", "v2_c1"]}),
}


@pytest.fixture(autouse=True, scope="module")
def shorter_lines():
    """MAX_LINE_BYTES is LONGEST and, in small data, an epoch has few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_indexing_module, "MAX_LINE_BYTES", LONGEST)
        patch.setattr(get_dataset, "MIN_STEPS", 6)
        yield


@pytest.fixture
def all_bad_allowed(monkeypatch):
    """MAX_BAD_FRACTION is 1: no number of bad lines stops a run."""
    monkeypatch.setattr(get_indexing_module, "MAX_BAD_FRACTION", 1.0)


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
        record, expected = {"uid": own, "click_seq": ids}, (own, texts)
    record |= {"extra": rng.choice([None, math.nan, 1e308, 10**400, [[{}]], "\u0000"])} if rng.random() < 0.3 else {}
    line = json.dumps(record, ensure_ascii=rng.random() < 0.5).encode()
    return rng.choice([b"", b" ", b"\t"]) + line + rng.choice([b"", b"\r", b"  "]), expected


def bad_line(rng, form):
    """Return a line that must be skipped."""
    record = dict(FORMATS[form][1])
    key = rng.choice(list(record))
    text = json.dumps(record)
    kind = rng.randrange(14)
    if kind == 0:
        del record[key]
        return json.dumps(record).encode()
    if kind == 1:  # a wrong type; an empty text is one only as an id
        wrong = rng.choice([value for value in WRONG if value != "" or key in ("cid", "vid", "uid")])
        return json.dumps(record | {key: wrong}).encode()
    if kind == 2:
        depth = rng.choice([2_000, 20_000, LONGEST // 2])
        return rng.choice([b"[", b'{"a":', b'{"uid":['])[:1] * depth
    if kind == 3:
        depth = rng.choice([2_000, 20_000, LONGEST // 4])
        return text[:-1].encode() + b', "deep": ' + b"[" * depth + b"]" * (depth - rng.randrange(2))
    if kind == 4:
        return text[:-1].encode() + b', "long": "' + b"x" * (LONGEST + rng.randrange(3)) + b'"}'
    if kind == 5:
        return text.encode() + b"\x00" * rng.randint(1, 9)
    if kind == 6:
        at = rng.randrange(len(text))
        return (
            text[:at].encode()
            + rng.choice([b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"])
            + text[at:].encode()
        )
    if kind == 7:
        return (
            text.replace('"c1"', r'"\ud800"').replace('"v1"', r'"\udfff\ud800"').replace('"u1"', r'"\ud83d"').encode()
        )
    if kind == 8:
        return text[: rng.randrange(1, len(text))].encode()
    if kind == 9:
        return rng.choice([b"null", b"[]", b'"text"', b"1", b"NaN", b"true", b"\xef\xbb\xbf\xef\xbb\xbf{}", b"{}{}"])
    if kind == 10:
        return b'{"uid": ' + b"9" * 5_000 + b', "cid": ' + b"9" * 5_000 + b"}"
    if kind == 11:
        return text.encode("utf-16-le").replace(b"\n", b"")
    if kind == 12:
        return json.dumps(record | {k: "x" * 1001 for k in ("cid", "vid", "uid")}).encode()
    return rng.randbytes(rng.randint(1, 40)).replace(b"\n", b"") + b"\x80"


def hostile_file(rng, form):
    """Return (bytes, lines, [what the good lines must give]); a byte order mark, blank lines, an open end."""
    lines, expected = [], []
    for _ in range(rng.randrange(8)):
        kind = rng.random()
        if kind < 0.5:
            line, parsed = good_line(rng, form)
            lines.append(line)
            expected.append(parsed)
        else:
            lines.append(bad_line(rng, form) if kind < 0.9 else rng.choice([b"", b"\r", b" \t "]))
    data = b"\n".join(lines)
    if lines and (rng.random() < 0.7 or not lines[-1]):
        data += b"\n"
    if lines and rng.random() < 0.2 and not lines[0].startswith(b"\xef\xbb\xbf"):
        data = b"\xef\xbb\xbf" + data
    return data, len(lines), expected


def contents(folder):
    """Return {path: hash} of every file in a folder, and its folders."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.is_file() and hashlib.md5(path.read_bytes()).digest() for path in paths}


def execute(arguments, folder, **environment):
    """Run python in a folder and return how it ended."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def one_line(call, *args, **how):
    """Return the one line with which a call refuses its input."""
    with pytest.raises((InputError, OSError)) as caught:
        call(*args, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- reading


def test_every_line_of_a_hostile_file_is_kept_as_it_is_or_counted_by_reason(tmp_path):
    rng = random.Random(5)
    reasons = set()
    for case in range(READ_CASES):
        form = list(FORMATS)[case % 3]
        data, num_lines, expected = hostile_file(rng, form)
        path, packed = tmp_path / f"{case}.json{'.gz' * (case % 2)}", gzip.compress(data, 1)
        path.write_bytes(packed if case % 2 else data)
        tally = Tally(str(path))
        kept = list(read_records(tally, FORMATS[form][0]))
        assert kept == expected, f"case {case}: {data[:500]}"
        assert tally.lines == num_lines == len(kept) + sum(tally.skipped.values()), f"case {case}: {data[:500]}"
        reasons |= set(tally.skipped)
        if case % 2:  # cut anywhere, a gzip file is refused
            path.write_bytes(packed[: rng.randrange(len(packed))])
            assert path.name in one_line(
                lambda path=path, form=form: list(read_records(Tally(str(path)), FORMATS[form][0]))
            )
        path.unlink()
    assert {"blank", "not JSON", "not UTF-8", "wrong type of line", "too long", "id too long", "empty id"} <= reasons
    keys = {key for _, record in FORMATS.values() for key in record}
    assert {f"no {key}" for key in keys} | {f"wrong type of {key}" for key in keys} <= reasons


def test_any_bytes_at_all_are_read_or_refused_with_one_line(tmp_path):
    """Files of random bytes, and valid ones with some bytes changed, plain and as gzip."""
    rng = random.Random(6)
    for case in range(READ_CASES):
        form = list(FORMATS)[case % 3]
        data = bytearray(rng.randbytes(rng.randrange(200)) if case % 4 == 0 else hostile_file(rng, form)[0][:2_000])
        data = gzip.compress(data, 1) if case % 2 else bytes(data)
        damaged = bytearray(data)
        for _ in range(rng.randrange(3) if data else 0):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path = tmp_path / f"{case}.json{'.gz' * (case % 2)}"
        path.write_bytes(damaged)
        tally = Tally(str(path))
        try:
            kept = sum(1 for _ in read_records(tally, FORMATS[form][0]))
        except (InputError, OSError) as error:
            assert case % 2 and "\n" not in str(error)
        else:
            assert tally.lines == kept + sum(tally.skipped.values())
            if case % 2 == 0:
                assert tally.lines == damaged.count(b"\n") + (not damaged.endswith(b"\n") and len(damaged) > 0)
        path.unlink()


def test_an_integer_id_that_is_too_long_is_skipped_as_its_text_would_be(tmp_path):
    path = _write_lines(tmp_path / "clicks.json", [{"uid": 10**2000, "click_seq": []}])
    tally = Tally(str(path))
    assert list(read_records(tally, parse_clicks)) == [] and tally.skipped == {"id too long": 1}


def test_a_gzip_bomb_is_one_line_too_long_and_takes_little_memory(tmp_path):
    """A line of 512 MiB in a file of half a MiB; the memory is the child's own highest, as Linux counts it."""
    data = _raw(tmp_path / "data/sample", columns={"c1": ["v1"]}, titles={"v1": "One"})
    bomb = gzip.compress(b"[" * (16 << 20), 9) * 32 + gzip.compress(b"\n" + b'{"cid": "c2", "vids": ["v1"]}\n' * 100)
    (data / "cid2vids2.json.gz").write_bytes(bomb)
    program = "import get_indexing; get_indexing.get_indexing(); print(open('/proc/self/status').read())"
    child = execute(["-c", program], tmp_path, PYTHONPATH=str(ROOT))
    assert child.returncode == 0, child.stderr
    assert int(re.search(r"VmHWM:\s+(\d+) kB", child.stdout)[1]) < 200_000
    assert "cid2vids2.json.gz: 1 of 101 lines are bad (line 1: too long)" in child.stderr


# ---------------------------------------------------------------- numbering and records


def shard_counts(work_dir):
    """Return ({split: [uids, labels]}) decoded from the shards by tensorflow alone."""
    counts = {}
    for path in (work_dir / "tfrecord").glob("*.tfrecord"):
        of_split = counts.setdefault(path.name.split("-")[0], [set(), 0])
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            example = tf.train.SequenceExample.FromString(record)
            of_split[0].add(example.context.feature["uid"].bytes_list.value[0].decode())
            of_split[1] += sum(example.feature_lists.feature_list["label"].feature[0].float_list.value)
    return counts


def test_hostile_folders_go_through_numbering_and_records_with_every_line_counted(tmp_path, all_bad_allowed):
    rng, real = random.Random(7), _clicks_like_real(60, seed=61)
    for case in range(CHAIN_CASES):
        folder = tmp_path / str(case)
        data_dir = _raw(folder / "raw", **real)
        files = {form: hostile_file(rng, form) for form in FORMATS}
        for form, (data, *_) in files.items():
            name = os.fsdecode(b"click_seq/\xff.json") if form == "click_seq" else f"{form}z.json"
            (data_dir / name).write_bytes(data)
        before = contents(folder)
        index = get_indexing(data_dir, folder / "work")
        manifest = get_tfrecord(data_dir, folder / "work", num_workers=1)
        after = contents(folder)
        assert all(path == "work" or path.startswith("work/") for path in after.keys() - before.keys())
        assert before.items() <= after.items()

        users = real["users"] + files["click_seq"][2]
        report = manifest["report"]
        assert report["lines"] == len(real["users"]) + files["click_seq"][1]
        assert report["lines"] - sum(report["skipped"].values()) == len(users)
        assert report["users"] == len({uid for uid, _ in users})
        assert report["clicks"] == sum(len(clicks) for _, clicks in users)
        counts = shard_counts(folder / "work")
        assert {split: of["targets"] for split, of in manifest["splits"].items()} == {
            s: n for s, (_, n) in counts.items()
        }
        assert set.union(*(uids for uids, _ in counts.values())) == {uid for uid, clicks in users if clicks}
        assert {cid for cid, *_ in files["cid2vids"][2]} | real["columns"].keys() == index.columns.keys()
        assert {vid for vid, _ in files["vid2title"][2]} <= index.videos.keys() and load_index(folder / "work") == index
        shutil.rmtree(folder)


def test_hostile_ids_come_out_of_the_index_as_they_went_in(tmp_path):
    get_indexing(_raw(tmp_path / "raw", columns={cid: IDS for cid in IDS}, titles={}), tmp_path / "work")
    index = load_index(tmp_path / "work")
    assert list(index.videos) == list(index.columns) == IDS
    assert sorted(path.name for path in (tmp_path / "work/indexing").iterdir()) == ["cid2vidx.json", "vid2idx.json"]


def test_one_user_may_come_many_times_or_click_very_often(tmp_path, monkeypatch):
    """A user with 200,000 clicks, and one who comes 500 times: held out in one split, every target stored once."""
    monkeypatch.setattr(get_indexing_module, "MAX_LINE_BYTES", 32 << 20)
    users = _clicks_like_real(60, seed=62)
    often = [("often", ["t0a-1_t0a", "t0b-2"] * 100_000)]
    data_dir = _raw(
        tmp_path / "raw", users["columns"], users["users"] + often + [("again", ["t0a-1", "t0a-2_t0a"])] * 500
    )
    get_indexing(data_dir, tmp_path / "work")
    manifest = get_tfrecord(data_dir, tmp_path / "work", num_workers=1)
    others = sum("_" in click for _, clicks in users["users"] for click in clicks[1:])
    assert manifest["report"]["targets"] == others + 99_999 + 500 and manifest["report"]["history"]["max"] == 200_000
    (train_uids, _), *held_out = (shard_counts(tmp_path / "work")[split] for split in ("train", "val", "test"))
    for uid in ("often", "again"):
        assert uid in train_uids and sum(uid in uids for uids, _ in held_out) == 1


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '"x"', "[" * 100_000, '{"c1": 5}', '{"c1": null}', '{"c1": ["x"]}', '{"c1": {"2": 3}}', '{"c1": [99]}'],
)
def test_an_index_of_wrong_shape_is_refused_by_name(tmp_path, text):
    get_indexing(_raw(tmp_path / "raw", columns={"c1": ["v1"]}, titles={}), tmp_path / "work")
    (tmp_path / "work/indexing/cid2vidx.json").write_text(text)
    assert "cid2vidx.json" in one_line(load_index, tmp_path / "work")


# ---------------------------------------------------------------- ranking


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with raw/ and work/, trained on users of whom some have hostile ids and click on hostile ids."""
    folder, rng, real = tmp_path_factory.mktemp("trained"), random.Random(8), _clicks_like_real(120, seed=63)
    columns = real["columns"] | {cid: rng.sample(IDS, 5) for cid in IDS}
    users = real["users"] + [(uid, [rng.choice(IDS) + "_" + rng.choice(IDS) for _ in range(9)]) for uid in IDS]
    get_indexing(_raw(folder / "raw", columns, users), folder / "work")
    get_tfrecord(folder / "raw", folder / "work", num_workers=1)
    train(folder / "work", epochs=1, emb_dim=8)
    return folder


@pytest.fixture
def own(trained, tmp_path):
    """A copy of that folder, for a test that changes it."""
    return shutil.copytree(trained, tmp_path / "own")


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def check_rankings(lines, users, columns):
    """Assert a line for each user, in order: strict JSON with finite scores, each column once."""
    strict = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [line["uid"] for line in strict] == [uid for uid, _ in users]
    for line in strict:
        assert sorted(line["columns"]) == sorted(columns) and len(line["scores"]) == len(columns)
        assert all(map(math.isfinite, line["scores"])) and line["source"] in ("model", "popular")


def test_hostile_users_get_a_valid_line_each(trained):
    rng, ranker, columns = random.Random(9), Ranker(trained / "work"), load_index(trained / "work").columns
    for _ in range(RANK_CASES):
        users = [good_line(rng, "click_seq")[1] for _ in range(rng.randint(1, 30))]
        users += [(rng.choice(IDS), [f"{rng.choice(IDS)}_{rng.choice(IDS)}" for _ in range(rng.choice([1, 3, 200]))])]
        text = "".join(ranker.lines(users))
        assert text.count("\n") == len(users) and text.endswith("\n")
        check_rankings(text.split("\n")[:-1], users, columns)


def test_users_in_are_lines_out_for_every_ranking_file_and_nothing_is_written_elsewhere(own, all_bad_allowed):
    """Hidden files are no one's input."""
    rng, clicks, expected = random.Random(10), own / "raw/click_seq", {}
    names = ["a b", "-rf", "manifest", "ünï", "new\nline", "%s", "$(touch x)", "x.tmp", "a.json.gz", "*",
             os.fsdecode(b"\xff")]  # fmt: skip
    for hidden in (".hidden.json", "...json"):
        (clicks / hidden).write_bytes(b"not read")
    for name in names:
        data, _, expected[name] = hostile_file(rng, "click_seq")
        (clicks / f"{name}.json").write_bytes(data)
    before = contents(own)
    outputs = infer(clicks, own / "work", own / "ranking", num_workers=1)
    after = contents(own)
    assert len(outputs) == len(names) + 1
    new = {path for path in after.keys() - before.keys() if path != "ranking"}
    assert new == {f"ranking/{name}" for name in ["manifest.jsonl", *(path.name for path in outputs)]}
    assert before.items() <= after.items()
    columns = load_index(own / "work").columns
    for name, users in expected.items():
        lines = gzip.decompress((own / f"ranking/{name}.json.gz").read_bytes()).decode().split("\n")
        assert lines.pop() == ""
        check_rankings(lines, users, columns)


# ---------------------------------------------------------------- numbers add up


def test_targets_in_the_manifest_are_the_labels_in_the_shards_and_what_training_saw(trained):
    manifest = json.loads((trained / "work/tfrecord/manifest.json").read_text())
    counts = shard_counts(trained / "work")
    assert {split: of["targets"] for split, of in manifest["splits"].items()} == {s: n for s, (_, n) in counts.items()}
    assert manifest["report"]["targets"] == sum(labels for _, labels in counts.values())
    header, *rows = (line.split(",") for line in (trained / "work/model/history.csv").read_text().splitlines())
    assert [int(row[header.index("targets")]) for row in rows] == [counts["train"][1]]


# ---------------------------------------------------------------- nothing is unpickled


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_the_payload_would_run_if_it_were_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([Payload(tmp_path / "ran")], object))
    np.load(tmp_path / "x.npz", allow_pickle=True)["a"]
    assert (tmp_path / "ran").exists()


def test_a_memory_with_a_pickled_object_is_refused_and_not_run(own, tmp_path):
    """model.json vouches for it: the one who made the file could write that, too."""
    model = own / "work/model"
    path = next(model.glob("*.memory.npz"))
    with np.load(path) as saved:
        arrays = dict(saved)
    np.savez(path, **arrays | {"video_clicks": np.array([Payload(tmp_path / "ran")], object)})
    saved = json.loads((model / "model.json").read_text())
    saved["memory"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (model / "model.json").write_text(json.dumps(saved))
    line = one_line(load_model, own / "work")
    assert path.name in line and "run train.py again" in line and not (tmp_path / "ran").exists()


def train_again(folder):
    train(folder / "work", warm_epochs=1, emb_dim=8, seed=2)


@pytest.fixture(scope="module")
def stopped(trained, tmp_path_factory):
    """A copy of that folder in which a second training was stopped after its last epoch."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("stopped") / "folder")

    def stop(*_):
        raise InputError("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "finish", stop)
        assert one_line(train_again, folder) == "stopped"
    return folder


@pytest.mark.parametrize("place", ["state", "0000", "best0000"])
def test_a_checkpoint_with_a_pickled_object_is_refused_and_not_run(stopped, tmp_path, place):
    folder = shutil.copytree(stopped, tmp_path / "folder")
    path = folder / "work/model/checkpoint.npz"
    with np.load(path) as saved:
        arrays = dict(saved)
    assert place in arrays
    np.savez(path, **arrays | {place: np.array([Payload(tmp_path / "ran")], object)})
    line = one_line(train_again, folder)
    assert path.name in line and "run train.py again" in line and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", b"PK\x03\x04" + b"\x00" * 50, b"\x93NUMPY"])
def test_a_checkpoint_that_is_none_is_refused_by_name(own, data):
    path = own / "work/model/checkpoint.npz"
    path.write_bytes(data)
    assert path.name in one_line(train_again, own)


# ---------------------------------------------------------------- as processes


def columns_are(*lines):
    return lambda data: _write_lines(data / "cid2vids.json", lines)


def clicks_are(*lines):
    return lambda data: _write_lines(data / "click_seq/clicks.json", lines)


def bytes_are(name, data):
    return lambda folder: (folder / name).write_bytes(data)


COLUMN = {"cid": "c1", "vids": ["v1"]}
USER = {"uid": "u1", "click_seq": ["v1", "v1_c1"]}
PROCESS_CASES = {
    "nesting bomb": ("get_indexing", columns_are(COLUMN, "[" * 500_000)),
    "NUL bytes": ("get_indexing", columns_are(COLUMN, b"\x00" * 1000)),
    "UTF-16": ("get_indexing", columns_are(json.dumps(COLUMN).encode("utf-16"))),
    "lone surrogate": ("get_indexing", columns_are(COLUMN, r'{"cid": "\ud800", "vids": []}')),
    "huge integer": ("get_indexing", columns_are(COLUMN, '{"cid": ' + "9" * 5000 + ', "vids": []}')),
    "columns that are none": ("get_indexing", columns_are("null", "[]", "1")),
    "code for a column": ("get_indexing", columns_are(COLUMN, "__import__('os').mkdir('ran')")),
    "empty columns file": ("get_indexing", columns_are()),
    "columns file is a link to nothing": ("get_indexing", lambda data: (data / "cid2vids2.json").symlink_to("nothing")),
    "no gzip": ("get_indexing", bytes_are("cid2vids2.json.gz", b'{"cid": "c"}\n')),
    "cut gzip": ("get_indexing", bytes_are("cid2vids2.json.gz", gzip.compress(b'{"cid": "c", "vids": []}\n' * 99)[:-9])),
    "pickle": ("get_indexing", bytes_are("cid2vids2.json", b"\x80\x04\x95cos\nmkdir\n(S'ran'\ntR.")),
    "titles of wrong type": ("get_indexing", bytes_are("vid2title2.json", b'{"vid": "v", "title": ["t"]}\n')),
    "clicks of wrong type": ("get_indexing", clicks_are(USER, {"uid": "u", "click_seq": "v1"})),
    "index is a bomb": ("get_indexing", bytes_are("../work/indexing/vid2idx.json", b'{"a":' * 100_000)),
    "index not UTF-8": ("get_tfrecord", bytes_are("../work/indexing/vid2idx.json", b'{"\xff": 2}')),
    "index counts in text": ("get_tfrecord", bytes_are("../work/indexing/vid2idx.json", b'{"v1": "2"}')),
    "clicks hold NaN": ("get_tfrecord", clicks_are(USER, '{"uid": "u", "click_seq": [NaN]}')),
    "clicks are a bomb": ("get_tfrecord", clicks_are(USER, '{"uid":' * 100_000)),
    "empty clicks": ("get_tfrecord", clicks_are()),
    "clicks in no column": ("get_tfrecord", clicks_are({"uid": "u1", "click_seq": ["v1", "v1_../../etc/passwd"]})),
    "clicks cut": ("get_tfrecord", bytes_are("click_seq/cut.json.gz", gzip.compress(b"{}\n" * 999)[:-5])),
}  # fmt: skip


@pytest.mark.parametrize(("script", "harm"), PROCESS_CASES.values(), ids=PROCESS_CASES)
def test_hostile_input_ends_a_script_with_exactly_one_line(tmp_path, script, harm):
    data = _raw(tmp_path / "data/sample", columns={"c1": ["v1"]}, users=[("u1", ["v1", "v1_c1"])])
    for name in ("get_indexing", "get_tfrecord"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    get_indexing(data, tmp_path / "data/work")
    harm(data)
    before = contents(tmp_path / "data/work")
    ended = execute([f"{script}.py"], tmp_path)
    said = [line for line in ended.stderr.splitlines() if not re.match(r"WARNING: All log|[IWE]\d{4} ", line)]
    assert ended.returncode == 1 and len(said) == 1 and said[0].startswith(f"{script}.py: "), ended.stderr
    assert not (tmp_path / "ran").exists()
    assert contents(tmp_path / "data/work/indexing") == {
        path.removeprefix("indexing/"): data for path, data in before.items() if path.startswith("indexing/")
    }


def test_columns_without_any_video_are_refused_with_one_line(tmp_path):
    """The clicks are made in known columns, but no video is known: there is nothing to train towers on."""
    users = [(uid, [f"{uid}x{n}_c{n % 2}" for n in range(4)]) for uid, _ in _clicks_like_real(60, seed=64)["users"]]

    def chain():
        get_indexing(_raw(tmp_path / "raw", columns={"c0": [], "c1": []}, users=users), tmp_path / "work")
        get_tfrecord(tmp_path / "raw", tmp_path / "work", num_workers=1)
        train(tmp_path / "work", epochs=1, emb_dim=8)

    assert "video" in one_line(chain)
