"""Time a training step with 50,000 and with 1,000,000 videos, in turn, and hold it against the machine's GEMM peak.

    python tests/bench/bench_train_step.py [PAIRS]

Prints the median time of a step for each vocabulary, their ratio, targets a second, and MFU: the multiply-adds of the
matrix products that a step needs, forward and backward, as a fraction of what tf.matmul does in the same time.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import tensorflow as tf

from get_dataset import BATCH_POSITIONS, ITEM_MAX_LEN, NUM_NEGATIVES
from get_tfrecord import USER_MAX_LEN
from model_tf2 import EMB_DIM, FFN_RATIO, LOSS, build_model
from train import LEARNING_RATE, LazyAdam, make_train_step

COLUMNS = 1000
VOCABULARIES = (50_000, 1_000_000)


def random_batch(rng, num_videos):
    """Return a training batch as get_dataset.py makes it, a quarter of whose clicks are targets."""
    shape = [BATCH_POSITIONS // USER_MAX_LEN, USER_MAX_LEN]
    videos = rng.integers(2, num_videos, [shape[0], shape[1] + 1])
    columns = rng.integers(1, COLUMNS + 1, videos.shape) * (rng.random(videos.shape) < 0.25)
    batch = {
        "user_feature": videos[:, :-1],
        "user_column": columns[:, :-1],
        "target_video": videos[:, 1:],
        "target_column": columns[:, 1:],
        "item_column": np.arange(1, COLUMNS + 1),
        "item_feature": rng.integers(2, num_videos, [COLUMNS, ITEM_MAX_LEN]),
        "negative_video": rng.integers(2, num_videos, [NUM_NEGATIVES]),
    }
    batch = {name: tf.constant(value, tf.int32) for name, value in batch.items()}
    label = tf.cast(batch["target_column"] > 0, tf.float32)
    return batch | {"label": label, "item_log_prob": tf.zeros([COLUMNS])}


def needed_flops(batch):
    """Return the floating point operations of a step's matrix products; backward costs twice forward."""
    targets, positions = float(tf.reduce_sum(batch["label"])), BATCH_POSITIONS
    attention = 4 * positions * USER_MAX_LEN * EMB_DIM + 4 * COLUMNS * ITEM_MAX_LEN**2 * EMB_DIM
    alone = len(np.unique(batch["target_video"])) + NUM_NEGATIVES
    in_blocks = positions + COLUMNS * ITEM_MAX_LEN + alone
    blocks = 2 * in_blocks * EMB_DIM**2 * (4 + 2 * FFN_RATIO)
    logits = 2 * EMB_DIM * (targets * COLUMNS + positions * NUM_NEGATIVES)
    return 3 * (attention + blocks + logits)


def gemm_peak(size=2048):
    """Return the floating point operations a second of a large matrix product, the best of five."""
    matrix = tf.random.normal([size, size])
    return max(2 * size**3 / seconds(lambda: tf.matmul(matrix, matrix).numpy()) for _ in range(5))


def seconds(work):
    """Return how long work() takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(pairs=30):
    rng = np.random.default_rng(0)
    steps, times = [], {num_videos: [] for num_videos in VOCABULARIES}
    for num_videos in VOCABULARIES:
        model = build_model(num_videos=num_videos, num_columns=COLUMNS)
        optimizer = LazyAdam(model.trainable_variables, lambda step: LEARNING_RATE)
        batch = random_batch(rng, num_videos)
        spec = {name: tf.TensorSpec.from_tensor(value) for name, value in batch.items()}
        steps.append((num_videos, make_train_step(model, optimizer, spec, LOSS), batch))
        steps[-1][1](batch)
    for _ in range(pairs):
        for num_videos, step, batch in steps:
            times[num_videos].append(seconds(lambda step=step, batch=batch: step(batch).numpy()))
    peak = gemm_peak()
    for num_videos, _, batch in steps:
        median = statistics.median(times[num_videos])
        print(
            f"{num_videos:>9,} videos: {1000 * median:.1f} ms a step, "
            f"{float(tf.reduce_sum(batch['label'])) / median:,.0f} targets/s, "
            f"MFU {needed_flops(batch) / median / peak:.2f} of {peak / 1e9:.0f} GFLOP/s"
        )
    few, many = (times[num_videos] for num_videos in VOCABULARIES)
    ratio = statistics.median(b / a for a, b in zip(few, many, strict=True))
    print(f"a step with {VOCABULARIES[1]:,} videos takes {ratio:.2f} times one with {VOCABULARIES[0]:,}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
