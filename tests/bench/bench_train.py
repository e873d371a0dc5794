"""Time a training step: with 50,000 and with 1,000,000 videos, against the machine's GEMM peak, and against a naive fit.

    python tests/bench/bench_train.py [ROUNDS [USERS]]

MFU is the multiply-adds of the matrix products that a step needs, forward and backward, as a fraction of what tf.matmul
does in the same time. The naive model: the same towers, but one sample for each click in a column, its history and one
column (the clicked one or one of NEGATIVES others), binary cross-entropy, and Keras' fit with a batch of 128. At the end
an evaluation of the validation users is held against an epoch of so many users.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from measure import cost_of, house, in_turn, seconds, write_clicks

from get_dataset import (
    AHEAD,
    AUX_NEGATIVES,
    BATCH_POSITIONS,
    ITEM_MAX_LEN,
    ITEM_SAMPLE,
    VIDEO_COLUMNS,
    add_candidates,
    column_table,
    held_out,
    load_manifest,
    make_dataset,
    video_table,
)
from get_tfrecord import USER_MAX_LEN
from model_tf2 import (
    EMB_DIM,
    FFN_RATIO,
    ITEM_BLOCKS,
    LOSS,
    USER_BLOCKS,
    Memory,
    Scorer,
    build_model,
    count_windows,
)
from train import LEARNING_RATE, MEMORY_DECAYS, MuonAdam, make_train_step, ranks_of

COLUMNS = 1000
FEW, MANY = 50_000, 1_000_000
NEGATIVES = 4
NAIVE_BATCH = 128
USERS = 20_000


def random_batch(rng, num_videos, columns=COLUMNS, windows=BATCH_POSITIONS // USER_MAX_LEN, length=USER_MAX_LEN):
    """Return a training batch as get_dataset.py makes it, a quarter of whose clicks are targets."""
    videos = rng.integers(2, num_videos, [windows, length + AHEAD])
    clicked = rng.integers(1, columns + 1, videos.shape) * (rng.random(videos.shape) < 0.25)
    following = np.stack([clicked[:, ahead : ahead + length] for ahead in range(1, 1 + AHEAD)], axis=2)
    targets = following * (following[..., :1] > 0)
    batch = {
        "user_feature": videos[:, :length],
        "user_column": clicked[:, :length],
        "target_video": videos[:, 1 : 1 + length],
        "target_column": targets,
        "target_item": np.maximum(targets - 1, 0),
        "item_column": np.arange(1, columns + 1),
        "item_feature": rng.integers(2, num_videos, [columns, ITEM_SAMPLE]),
        "negative_video": rng.integers(2, num_videos, [AUX_NEGATIVES]),
    }
    batch = {name: tf.constant(value, tf.int32) for name, value in batch.items()}
    label = tf.cast(batch["target_column"][..., 0] > 0, tf.float32)
    return batch | {"label": label, "item_log_prob": tf.zeros([columns]), "seed": tf.zeros([2], tf.int64)}


def needed_flops(batch):
    """Return the floating point operations of a step's matrix products; backward costs twice forward."""
    targets, positions = float(tf.reduce_sum(batch["label"])), tf.size(batch["label"]).numpy()
    alone = len(np.unique(batch["target_video"])) + AUX_NEGATIVES
    of_users, of_columns = positions * USER_BLOCKS, COLUMNS * ITEM_SAMPLE * ITEM_BLOCKS
    attention = 4 * EMB_DIM * (of_users * USER_MAX_LEN + of_columns * ITEM_SAMPLE)
    blocks = 2 * (of_users + of_columns + alone * ITEM_BLOCKS) * EMB_DIM**2 * (4 + 2 * FFN_RATIO)
    logits = 2 * EMB_DIM * (targets * (COLUMNS + AHEAD) + positions * AUX_NEGATIVES)
    return 3 * (attention + blocks + logits)


class Naive(keras.Model):
    """The same towers, one column a sample."""

    def __init__(self):
        super().__init__()
        self.towers = build_model(num_videos=FEW, num_columns=COLUMNS)

    def call(self, inputs):
        users = self.towers.user_vectors(inputs["videos"], inputs["columns"])[:, -1]
        columns = self.towers.column_vectors(inputs["item_feature"], inputs["item_column"])
        return self.towers.scale * tf.reduce_sum(users * columns, axis=1)


def naive_fit(rng, targets):
    """Return a function that fits the naive model to the samples of so many targets."""
    samples = targets * (1 + NEGATIVES)
    inputs = {
        "videos": rng.integers(2, FEW, [samples, USER_MAX_LEN]).astype(np.int32),
        "columns": rng.integers(0, COLUMNS + 1, [samples, USER_MAX_LEN]).astype(np.int32),
        "item_feature": rng.integers(2, FEW, [samples, ITEM_MAX_LEN]).astype(np.int32),
        "item_column": rng.integers(1, COLUMNS + 1, samples).astype(np.int32),
    }
    label = (np.arange(samples) % (1 + NEGATIVES) == 0).astype(np.float32)
    model = Naive()
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.BinaryCrossentropy(from_logits=True))
    return lambda: model.fit(inputs, label, batch_size=NAIVE_BATCH, verbose=0)


def new_step(num_videos, batch):
    """Return a training step of a new model for batches like this one."""
    shelves = np.random.default_rng(1).integers(1, COLUMNS + 1, [2 + num_videos, VIDEO_COLUMNS], np.int32)
    model = build_model(num_videos=num_videos, num_columns=COLUMNS, video_columns=shelves)
    optimizer = MuonAdam(model.trainable_variables, lambda step: LEARNING_RATE)
    spec = {name: tf.TensorSpec.from_tensor(value) for name, value in batch.items()}
    step = make_train_step(tf.distribute.get_strategy(), model, optimizer, spec, 0.5, LOSS)
    return lambda: step(batch).numpy()


def epoch_and_evaluation(folder, users):
    """Return (steps, seconds of the median step, seconds of an evaluation) of synthetic users."""
    write_clicks(folder / "raw", users)
    chain = house(folder / "house", folder / "raw")
    for script in ("get_indexing", "get_tfrecord"):
        cost_of(chain, script)
    manifest, index = load_manifest(chain / "data/work")
    videos = column_table(index, np.ones(2 + len(index.videos)))
    batches = make_dataset(manifest, chain / "data/work", seed=1)
    steps = len(batches)
    batches = add_candidates(batches, videos, len(index.videos), seed=1)
    model = build_model(num_videos=len(index.videos), num_columns=len(index.columns), video_columns=video_table(index))
    optimizer = MuonAdam(model.trainable_variables, lambda step: LEARNING_RATE)
    step = make_train_step(tf.distribute.get_strategy(), model, optimizer, batches.element_spec, 0.5, LOSS)
    times = [seconds(lambda batch=batch: step(batch).numpy()) for batch in batches.take(60)]
    counts = count_windows(manifest, ["train"], MEMORY_DECAYS, index, chain / "data/work")
    scorer = Scorer(model, Memory.of_counts(counts, 0, index), index)
    validation = scorer.rankable(held_out(manifest, "val", chain / "data/work"))

    def evaluate():
        scorer.refresh()
        ranks_of(validation, scorer, lambda *clicks: [("towers", scorer.towers(*clicks))])

    evaluation = in_turn(2, evaluation=evaluate)
    return steps, statistics.median(times[5:]), evaluation["evaluation"]


def main(rounds=20, users=USERS):
    keras.utils.set_random_seed(1)
    tf.config.experimental.enable_op_determinism()  # as train.py does
    rng = np.random.default_rng(0)
    batches = {number: random_batch(rng, number) for number in (FEW, MANY)}
    few, many = (new_step(number, batch) for number, batch in batches.items())
    matrix = tf.random.normal([2048, 2048])
    times = in_turn(rounds, few=few, many=many, gemm=lambda: tf.matmul(matrix, matrix).numpy())
    peak, targets = 2 * 2048**3 / times["gemm"], float(tf.reduce_sum(batches[FEW]["label"]))
    print(f"step: {1e3 * times['few']:.1f} ms, {targets / times['few']:,.0f} targets/s, "
          f"MFU {needed_flops(batches[FEW]) / times['few'] / peak:.2f} of {peak / 1e9:.0f} GFLOP/s; "
          f"with {MANY:,} videos {times['many'] / times['few']:.2f} times one with {FEW:,}")  # fmt: skip

    naive = 40 * NAIVE_BATCH // (1 + NEGATIVES)
    times = in_turn(3, ours=few, naive=naive_fit(rng, naive))
    ratio = targets / times["ours"] / (naive / times["naive"])
    print(
        f"naive fit, {NEGATIVES} negatives: {naive / times['naive']:,.0f} targets/s; ours is {ratio:.0f} times as fast"
    )

    with tempfile.TemporaryDirectory() as folder:
        steps, step, evaluation = epoch_and_evaluation(Path(folder), users)
    print(f"{users:,} users: {steps:,} steps of {1e3 * step:.0f} ms; an evaluation takes {evaluation:.1f} s, "
          f"{evaluation / (steps * step):.1%} of an epoch's steps")  # fmt: skip


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
