"""Time Ranker.rank() for one user after the other, as a server does: 1,000 columns, on one core.

    python tests/bench/bench_one_user.py [CALLS]

Prints the median and the 99th percentile of a call, and the time a user where several are ranked in one call.
"""

import os

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before TensorFlow counts the cores

import itertools
import sys
import tempfile
import time
from pathlib import Path

from bench_infer import house_for, trained_house

import numpy as np


def main(calls=2000):
    with tempfile.TemporaryDirectory() as folder:
        chain = house_for(Path(folder), 1000, trained_house(Path(folder)))
        from get_indexing import Records
        from get_tfrecord import parse_history
        from infer import NOW_AFTER, Ranker

        started = time.perf_counter()
        ranker = Ranker(chain / "data/work")
        print(f"loaded in {time.perf_counter() - started:.1f} s, imports included")
        records = Records(str(chain / "data/sample/click_seq/part-00000.json"), parse_history)
        users = [user._replace(now=user.times[-1] + NOW_AFTER) for user in records]
        for name, rank, top_k in (("rank", ranker.rank, 0), ("ten of them", ranker.rank, 10), ("why", ranker.why, 5)):
            taken = []
            for user in itertools.islice(itertools.cycle(users), 10 + (calls if name != "why" else calls // 20)):
                started = time.perf_counter()
                rank(user.clicks, top_k, user.times, user.now)
                taken.append(1000 * (time.perf_counter() - started))
            p50, p99 = np.percentile(taken[10:], [50, 99])
            print(f"{name:20} p50 {p50:6.2f} ms, p99 {p99:6.2f} ms")
        for size in (1, 4, 16, 64):
            cycle = itertools.cycle(users)
            blocks = [list(itertools.islice(cycle, size)) for _ in range(max(calls // size, 20))]
            started = time.perf_counter()
            for block in blocks:
                list(ranker.lines(block))
            print(
                f"{size:3} users a call: {1000 * (time.perf_counter() - started) / len(blocks) / size:6.2f} ms a user"
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
