"""Time get_tfrecord.py, its start included, in turn with json.loads of the same lines, and a naive writer on a part.

    python tests/bench/bench_get_tfrecord.py [USERS [ROUNDS]]

The naive writer, one process, makes a record for each click in a column, with one Feature for each id, and one for each
of its NEGATIVES columns not clicked. Memory is compared with a tenth of the users.
"""

import itertools
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measure import COLUMNS, CORES, cost_of, house, seconds, write_clicks

NEGATIVES = 4
NAIVE_USERS = 500


def load(path):
    """Parse the lines of a file."""
    with open(path, "rb") as file:
        for line in file:
            json.loads(line)


def naive(lines, output, index):
    """Write one SequenceExample for each sample (history, column, label), as is usually done; return the targets."""
    import tensorflow as tf

    targets = 0
    with tf.io.TFRecordWriter(str(output)) as writer:
        for line in lines:
            record = json.loads(line)
            clicks = [click.partition("_") for click in record["click_seq"]]
            history = [index.videos[vid] for vid, _, _ in clicks]
            for place, (_, _, cid) in enumerate(clicks):
                if place and cid:
                    targets += 1
                    samples = [(cid, 1.0), *((f"c{random.randrange(COLUMNS)}", 0.0) for _ in range(NEGATIVES))]
                    for column, label in samples:
                        example = tf.train.SequenceExample()
                        example.context.feature["uid"].bytes_list.value.append(record["uid"].encode())
                        example.context.feature["label"].float_list.value.append(label)
                        lists = example.feature_lists.feature_list
                        for name, ids in (
                            ("user", history[max(0, place - 50) : place]),
                            ("item", index.columns[column]),
                        ):
                            for number in ids:
                                lists[name].feature.add().int64_list.value.append(number)
                        writer.write(example.SerializeToString())
    return targets


def main(users=200_000, rounds=3):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        houses = {}
        for number in (users // 10, users):
            write_clicks(folder / f"raw-{number}", number, files=1)
            houses[number] = house(folder / f"house-{number}", folder / f"raw-{number}")
            cost_of(houses[number], "get_indexing")
        few = cost_of(houses[users // 10], "get_tfrecord")
        clicks = folder / f"raw-{users}/click_seq/part-00000.json"
        costs, loads = [], []
        for _ in range(rounds):
            shutil.rmtree(houses[users] / "data/work/tfrecord", ignore_errors=True)
            costs.append(cost_of(houses[users], "get_tfrecord"))
            loads.append(seconds(lambda: load(clicks)))
        manifest = json.loads((houses[users] / "data/work/tfrecord/manifest.json").read_text())
        sizes = sum(shard["bytes"] for shard in manifest["shards"].values())

        from get_indexing import load_index

        index = load_index(houses[users] / "data/work")
        with open(clicks, "rb") as file:
            lines = list(itertools.islice(file, NAIVE_USERS))
        naive(lines[:1], folder / "naive", index)  # TensorFlow's import is not counted against it
        began = time.process_time()
        naive(lines, folder / "naive", index)
        naive_cpu = (time.process_time() - began) / NAIVE_USERS
        naive_bytes = (folder / "naive").stat().st_size / NAIVE_USERS

    wall, cpu, peak = (statistics.median(of) for of in zip(*costs, strict=True))
    loaded = statistics.median(loads)
    print(f"{users:,} users in one file: {wall:.1f} s, {cpu:.1f} core-seconds ({cpu / wall / CORES:.0%} of {CORES} cores), "
          f"largest process {peak:.0f} MB ({peak / few.peak - 1:+.1%} against {users // 10:,} users), "
          f"{sizes / users:,.0f} bytes a user")  # fmt: skip
    print(f"json.loads of the same lines: {loaded:.1f} core-seconds, 1 / {cpu / loaded:.1f} of them with the start")
    print(f"naive, {NEGATIVES} negatives, on {NAIVE_USERS} users: {1e3 * naive_cpu:.1f} core-ms and "
          f"{naive_bytes:,.0f} bytes a user")  # fmt: skip
    print(f"against the naive: {naive_cpu / cpu * users:.0f} times as many users a core-second, "
          f"1 / {naive_bytes / sizes * users:.0f} of the bytes")  # fmt: skip


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
