"""What several test files share: raw data, written as a user would have it, the scripts, and what is done to files."""

import atexit
import gzip as gzip_module
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before any test imports tensorflow


def edit(folder, script, **constants):
    """Edit constants of a script as a user would, with a text editor."""
    path = folder / f"{script}.py"
    text = path.read_text(encoding="utf-8")
    for name, value in constants.items():
        former = rf"^({name}: .*?) = (\(\n(?: .*\n)+\).*|.*)$"  # in brackets it may take several lines
        text, edits = re.subn(former, rf"\g<1> = {value!r}", text, flags=re.MULTILINE)
        assert edits == 1, f"{script}.py has no constant {name}"
    path.write_text(text, encoding="utf-8")


def edit_json(path, change):
    """Put change(value) in the place of the value of a JSON file."""
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


def flip_a_bit(path):
    """Damage a file in its middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def files_of(folder):
    """Return {path: bytes} of all files in a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def draw(uid):
    """Return the number in [0, 1) that decides about a user: the lowest are for validation, the highest for the test."""
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big") / 2**64


def held_out_by_hand(uid, in_column, times, share, min_history=1):
    """Return (split, the click from which on all is held out, the target's place); ("train", None, None) without one.

    in_column says of each click whether it is in a current column. Without times each click is a visit.
    """
    split = "val" if draw(uid) < share else "test" if draw(uid) >= 1 - share else "train"
    begins = []  # of each click's visit
    for at in range(len(in_column)):
        begins.append(begins[-1] if times and at and times[at] - times[at - 1] < 1800 else at)
    places = [(begin, -at) for at, begin in enumerate(begins) if begin >= min_history and in_column[at]]
    if split == "train" or not places:
        return "train", None, None
    begin, place = max(places)
    return split, begin, -place


def run_python(folder, *arguments, **environment):
    """Run Python in a folder, as a user would, where the scripts can be imported; return how it ended."""
    environment = {**os.environ, "PYTHONPATH": str(HOUSE), "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, check=False, cwd=folder, env=environment, capture_output=True, text=True)


def one_line(call, *args, **how):
    """Call what a script's main() calls and return the one line with which it refuses its input."""
    from get_indexing import InputError

    with pytest.raises((InputError, OSError)) as caught:
        call(*args, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def one_line_of_main(monkeypatch, folder, script):
    """Call main() of a script in a folder, in this process, and return the one line with which it refuses its input."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    return one_line(importlib.import_module(script).main)


def _scripts_of_the_project():
    """Return a folder with the scripts, which read data/sample and write data/work whatever the user edited."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    for script in Path(__file__).parents[1].glob("*.py"):
        shutil.copy(script, folder)
    edit(folder, "get_indexing", DATA_DIR="data/sample", WORK_DIR="data/work")
    return folder


HOUSE = _scripts_of_the_project()
sys.path.insert(0, str(HOUSE))  # before any test imports a script


def _write_lines(path, lines):
    """Write lines to a path, compressed if it ends in .gz, and return the path.

    A line is written as it is where it is bytes or text, and as JSON where it is any other value.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, bytes | str) else json.dumps(line, ensure_ascii=False) for line in lines]
    data = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    path.write_bytes(gzip_module.compress(data, mtime=0) if path.name.endswith(".gz") else data)
    return path


def _raw(folder, columns=None, users=None, titles=None, names=None, gzip=False, click_file="clicks"):
    """Write raw data into a folder, made where it is missing, and return the folder (a DATA_DIR).

    _raw(folder, columns={"c1": ["v1", "v2"]}, users=[("u1", ["v1", "v2_c1"])], titles={"v1": "One"}) writes
    folder/cid2vids.json, folder/click_seq/clicks.json and folder/vid2title.json; each is left out where it is None.
    A user may have a third part: the times of the clicks. names={"c1": "First"} adds column names; gzip=True writes
    .json.gz files; click_file is the click file's name.
    """
    end, names = ".json.gz" if gzip else ".json", names or {}
    folder.mkdir(parents=True, exist_ok=True)
    if columns is not None:
        lines = [{"cid": c, "vids": v, **({"name": names[c]} if c in names else {})} for c, v in columns.items()]
        _write_lines(folder / f"cid2vids{end}", lines)
    if titles is not None:
        _write_lines(folder / f"vid2title{end}", [{"vid": v, "title": title} for v, title in titles.items()])
    if users is not None:
        lines = [dict(zip(("uid", "click_seq", "times"), user, strict=False)) for user in users]
        _write_lines(folder / "click_seq" / f"{click_file}{end}", lines)
    return folder


def _clicks_like_real(num_users, seed, times=False):
    """Return {"columns": ..., "users": ...}, as _raw() takes them: always the same for a seed.

    With times every user's last click is on 2025-12-07 (UTC), and before 1 click of 4 a user was away for 6 to 40 hours.

    4 topics of 3 columns of 5 videos each ("t0a" holds "t0a-0" to "t0a-4"). A user has one topic: 7 of 10 clicks are made
    in its columns, going round a, b, c, a ..., 1 of 10 in any column, and 2 of 10 are plain clicks on a video of the
    topic. A history has 8 to 30 clicks. So few users are all held out, half each for val and test.
    """
    rng, clock = random.Random(seed), random.Random(seed + 1000)
    topics = [[f"t{topic}{letter}" for letter in "abc"] for topic in range(4)]
    columns = {cid: [f"{cid}-{i}" for i in range(5)] for cids in topics for cid in cids}
    users = []
    for user in range(num_users):
        own, turn, clicks = rng.choice(topics), rng.randrange(3), []
        for _ in range(rng.randint(8, 30)):
            kind = rng.random()
            if kind < 0.7:
                turn = (turn + 1) % 3
            cid = own[turn] if kind < 0.7 else rng.choice(list(columns) if kind < 0.8 else own)
            vid = rng.choice(columns[cid])
            clicks.append(f"{vid}_{cid}" if kind < 0.8 else vid)
        users.append((f"user{user}", clicks))
        if times:
            gaps = [
                clock.randrange(20, 300) if clock.random() < 0.75 else clock.randrange(6, 40) * 3600 for _ in clicks
            ]
            end = 1_765_152_000 - clock.randrange(86_400)
            users[-1] += ([end - sum(gaps[at:]) for at in range(1, len(clicks) + 1)],)
    return {"columns": columns, "users": users}
