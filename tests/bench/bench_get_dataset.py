"""Time a pass over the training batches, in turn with a raw read of the shards and with a naive pipeline.

    python tests/bench/bench_get_dataset.py [USERS [ROUNDS]]

Counts targets (clicks in a column that are to be predicted) a second. The naive pipeline reads the records of
bench_get_tfrecord.py's naive writer, parses them one by one and makes batches with padded_batch; one in
1 + NEGATIVES of its records is a target. Then training runs for STEPS steps, and the share of the time is shown in
which it waits for its next batch.
"""

import itertools
import sys
import tempfile
import time
from pathlib import Path

import tensorflow as tf
from bench_get_tfrecord import NEGATIVES, naive
from bench_train import ready_to_train, step_of
from measure import in_turn

from get_dataset import shards_of
from train import epoch_batches

NAIVE_USERS = 300
STEPS = 60


def naive_pass(path):
    """Go once over naive records; return how many there are."""
    lists = {name: tf.io.FixedLenSequenceFeature([], tf.int64) for name in ("user", "item")}
    context = {"label": tf.io.FixedLenFeature([], tf.float32)}

    def parse(serialized):
        parsed_context, parsed_lists = tf.io.parse_single_sequence_example(serialized, context, lists)
        return parsed_lists | parsed_context

    records = tf.data.TFRecordDataset(str(path)).map(parse, tf.data.AUTOTUNE)
    shapes = {"user": [None], "item": [None], "label": []}
    return sum(len(batch["label"]) for batch in records.padded_batch(128, shapes).prefetch(2).as_numpy_iterator())


def main(users=20_000, rounds=3):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifest, index, work_dir, scorer = ready_to_train(folder, users)
        targets = manifest["splits"]["train"]["targets"]
        with open(folder / "raw/click_seq/part-00000.json", "rb") as file:
            naive_targets = naive(list(itertools.islice(file, NAIVE_USERS)), folder / "naive", index)

        def batches():
            return epoch_batches(manifest, index, work_dir, scorer.memory, seed=1, epoch=1)

        def raw_read():
            paths = shards_of(manifest, "train", work_dir)
            for _ in tf.data.TFRecordDataset(paths, num_parallel_reads=4).batch(256).prefetch(2):
                pass

        times = in_turn(
            rounds,
            ours=lambda: sum(1 for _ in batches()),
            raw=raw_read,
            naive=lambda: naive_pass(folder / "naive"),
        )
        ours, few = targets / times["ours"], naive_targets / times["naive"]
        print(f"{targets:,} targets in {times['ours']:.2f} s: {ours:,.0f} targets/s; "
              f"a raw read of the shards takes {times['raw']:.2f} s")  # fmt: skip
        print(f"naive, {NEGATIVES} negatives: {few:,.0f} targets/s; ours is {ours / few:.0f} times as fast")

        source, waited = batches(), 0.0
        step = step_of(scorer.model, source.element_spec, tf.constant(scorer.memory.trend.table))
        iterator = itertools.chain.from_iterable(itertools.repeat(source))  # few users make few steps
        step(next(iterator))
        began = time.perf_counter()
        for _ in range(STEPS):
            asked = time.perf_counter()
            batch = next(iterator)
            waited += time.perf_counter() - asked
            step(batch).numpy()
        taken = time.perf_counter() - began
        print(f"training: {1000 * taken / STEPS:.0f} ms a step, of which it waits {waited / taken:.1%} for its batch")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
