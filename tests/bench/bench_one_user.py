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
        from get_indexing import Tally, parse_clicks, read_records
        from infer import Ranker

        started = time.perf_counter()
        ranker = Ranker(chain / "data/work")
        print(f"loaded in {time.perf_counter() - started:.1f} s, imports included")
        users = [
            clicks
            for _, clicks in read_records(Tally(str(chain / "data/sample/click_seq/part-00000.json")), parse_clicks)
        ]
        for name, rank in (
            ("rank", ranker.rank),
            ("ten of them", lambda clicks: ranker.rank(clicks, 10)),
            ("why", ranker.why),
        ):
            taken = []
            for clicks in itertools.islice(itertools.cycle(users), calls if name != "why" else calls // 20):
                started = time.perf_counter()
                rank(clicks)
                taken.append(1000 * (time.perf_counter() - started))
            p50, p99 = np.percentile(taken[10:], [50, 99])
            print(f"{name:20} p50 {p50:6.2f} ms, p99 {p99:6.2f} ms")
        for size in (1, 4, 16, 64):
            blocks = [[(str(n), clicks) for n, clicks in enumerate(itertools.islice(itertools.cycle(users), start, start + size))]
                      for start in range(max(calls // size, 20))]  # fmt: skip
            started = time.perf_counter()
            for block in blocks:
                list(ranker.lines(block))
            print(
                f"{size:3} users a call: {1000 * (time.perf_counter() - started) / len(blocks) / size:6.2f} ms a user"
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
