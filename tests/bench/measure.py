"""What the benchmarks share: synthetic clicks, folders to run the scripts in, and clocks."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

HOUSE = Path(__file__).parents[2]
sys.path.insert(0, str(HOUSE))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

CORES = os.cpu_count()
VIDEOS, COLUMNS, TOPICS = 50_000, 1000, 100
START = 1_763_942_400  # unix seconds of the first clicks


def write_clicks(data_dir, users, files=8, seed=1):
    """Write raw data: videos and columns have a topic, a user has four; 30-200 clicks, a quarter of them in a column.

    Before a click in ten the user was away for a day or less.
    """
    rng, folder = np.random.default_rng(seed), Path(data_dir, "click_seq")
    folder.mkdir(parents=True)
    shelves = rng.integers(0, VIDEOS // TOPICS, [COLUMNS, 60]) * TOPICS + np.arange(COLUMNS)[:, None] % TOPICS
    columns = [{"cid": f"c{c}", "vids": [f"v{v}" for v in dict.fromkeys(row)]} for c, row in enumerate(shelves)]
    videos = [f"v{v}" for v in range(VIDEOS)]
    write_lines(Path(data_dir, "cid2vids.json"), columns)
    write_lines(Path(data_dir, "vid2title.json"), ({"vid": vid, "title": f"video {vid}"} for vid in videos))
    for number, of_file in enumerate(np.array_split(np.arange(users), files)):
        write_lines(folder / f"part-{number:05}.json", user_lines(rng, of_file, videos))


def user_lines(rng, users, videos):
    """Yield the raw line of each user."""
    for first in range(0, len(users), 1000):
        block = users[first : first + 1000]
        lengths = rng.integers(30, 201, len(block))
        tastes, owner = rng.integers(0, TOPICS, [len(block), 4]), np.repeat(np.arange(len(block)), lengths)
        topic = tastes[owner, rng.choice(4, len(owner), p=[0.5, 0.25, 0.15, 0.1])]
        rank = ((VIDEOS // TOPICS) ** rng.random(len(owner))).astype(int) - 1  # popularity falls as 1 / rank
        column = topic + TOPICS * rng.integers(0, COLUMNS // TOPICS, len(owner))
        column[rng.random(len(owner)) > 0.25] = -1
        gaps = np.where(rng.random(len(owner)) < 0.1, rng.integers(3600, 86_400, len(owner)), 60)
        ends, since = np.cumsum(lengths), np.cumsum(gaps)
        times = (START + since - since[ends - lengths][owner]).tolist()
        clicks = [
            videos[v] if c < 0 else f"{videos[v]}_c{c}"
            for v, c in zip((rank * TOPICS + topic).tolist(), column.tolist(), strict=True)
        ]
        for user, start, end in zip(block.tolist(), (ends - lengths).tolist(), ends.tolist(), strict=True):
            yield {"uid": f"u{user}", "click_seq": clicks[start:end], "times": times[start:end]}


def write_lines(path, records):
    """Write a JSON line for each record."""
    with open(path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def house(folder, data_dir):
    """Return folder with the scripts in it, where data/sample is data_dir."""
    (folder / "data").mkdir(parents=True)
    for script in HOUSE.glob("*.py"):
        shutil.copy(script, folder)
    (folder / "data/sample").symlink_to(Path(data_dir).absolute())
    return folder


class Cost(NamedTuple):
    """What a process and all its workers took; the memory is that of the largest of them."""

    wall: float  # seconds
    cpu: float  # core-seconds, user and system
    peak: float  # MB


def cost_of(folder, script, meanwhile=None):
    """Run a script in folder as a user would; return its Cost. meanwhile() is called every 10 ms."""
    started = time.perf_counter()
    with open(folder / f"{script}.log", "w") as log:
        process = subprocess.Popen([sys.executable, f"{script}.py"], cwd=folder, stdout=log, stderr=log)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if meanwhile:
                meanwhile()
            time.sleep(0.01)
    if status:
        raise SystemExit(Path(log.name).read_text())
    return Cost(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def seconds(work):
    """Return how long work() takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turn(rounds, **works):
    """Run each work() once unmeasured, then all in turn so many times; return {name: median seconds}."""
    times = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            taken = seconds(work)
            if number:
                times[name].append(taken)
    return {name: statistics.median(of) for name, of in times.items()}
