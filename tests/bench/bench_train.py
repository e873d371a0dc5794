"""Time a training step: with few videos and with many, against the machine's GEMM peak, and against a naive fit.

    python tests/bench/bench_train.py [ROUNDS [USERS]]

A step must not grow with the vocabulary: 1,000,000 videos are held against 50,000, and 500,000 against 12,000.
MFU is the multiply-adds of the matrix products that a step needs, forward and backward, as a fraction of what tf.matmul
does in the same time. The naive model: the same towers, but one sample for each click in a column, its history and one
column (the clicked one or one of NEGATIVES others), binary cross-entropy, and Keras' fit with a batch of 128. At the end
an evaluation of the validation users is held against an epoch of so many users.
"""

import functools
import statistics
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from measure import cost_of, house, in_turn, seconds, write_clicks

from get_dataset import (
    BATCH_POSITIONS, ITEM_MAX_LEN, ITEM_SAMPLE, VIDEO_COLUMNS, count_windows, held_out, load_manifest,
)  # fmt: skip
from get_tfrecord import USER_MAX_LEN
from model_tf2 import (
    EMB_DIM, FFN_RATIO, ITEM_BLOCKS, NUM_GAPS, NUM_TRENDS, USER_BLOCKS, Memory, build_model, training_loss,
)  # fmt: skip
from train import KERNEL_RATE, LEARNING_RATE, MuonAdam, epoch_batches, make_scorer, make_train_step, validate

COLUMNS = 1000
FEW = 50_000
VIDEOS = {FEW: 1_000_000, 12_000: 500_000}  # few: many
DAYS = 15  # of trends
NEGATIVES = 4
NAIVE_BATCH = 128
USERS = 20_000


def random_batch(rng, num_videos, columns=COLUMNS, windows=BATCH_POSITIONS // USER_MAX_LEN, length=USER_MAX_LEN):
    """Return a training batch as get_dataset.py makes it, a quarter of whose clicks are targets."""
    clicked = rng.integers(1, columns + 1, [windows, length + 1]) * (rng.random([windows, length + 1]) < 0.25)
    batch = {
        "user_feature": rng.integers(2, num_videos, [windows, length]),
        "user_column": clicked[:, :-1],
        "user_gap": rng.integers(0, NUM_GAPS, [windows, length]),
        "trend_row": rng.integers(0, DAYS, [windows, length]),
        "target_column": clicked[:, 1:],
        "target_item": np.maximum(clicked[:, 1:] - 1, 0),
        "item_column": np.arange(1, columns + 1),
        "item_feature": rng.integers(2, num_videos, [columns, ITEM_SAMPLE]),
    }
    batch = {name: tf.constant(value, tf.int32) for name, value in batch.items()}
    label = tf.cast(batch["target_column"] > 0, tf.float32)
    return batch | {"label": label, "item_log_prob": tf.zeros([columns])}


def needed_flops(batch):
    """Return the floating point operations of a step's matrix products; backward costs twice forward."""
    targets, positions = float(tf.reduce_sum(batch["label"])), tf.size(batch["label"]).numpy()
    of_users, of_columns = positions * USER_BLOCKS, COLUMNS * ITEM_SAMPLE * ITEM_BLOCKS
    attention = 4 * EMB_DIM * (of_users * USER_MAX_LEN + of_columns * ITEM_SAMPLE)
    blocks = 2 * (of_users + of_columns) * EMB_DIM**2 * (4 + 2 * FFN_RATIO)
    return 3 * (attention + blocks + 2 * COLUMNS * EMB_DIM * (EMB_DIM + targets))


class Naive(keras.Model):
    """The same towers, one column a sample."""

    def __init__(self):
        super().__init__()
        self.towers = build_model(num_videos=FEW, num_columns=COLUMNS)

    def call(self, inputs):
        users = self.towers.user_vectors(inputs["videos"], inputs["columns"], inputs["gaps"])[:, -1]
        columns = self.towers.column_vectors(inputs["item_feature"], inputs["item_column"])
        return self.towers.scale * tf.reduce_sum(users * columns, axis=1)


def naive_fit(rng, targets):
    """Return a function that fits the naive model to the samples of so many targets."""
    samples = targets * (1 + NEGATIVES)
    inputs = {
        "videos": rng.integers(2, FEW, [samples, USER_MAX_LEN]).astype(np.int32),
        "columns": rng.integers(0, COLUMNS + 1, [samples, USER_MAX_LEN]).astype(np.int32),
        "gaps": rng.integers(0, NUM_GAPS, [samples, USER_MAX_LEN]).astype(np.int32),
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
    model = build_model(num_videos=num_videos, num_columns=COLUMNS, shelves=shelves)
    spec = {name: tf.TensorSpec.from_tensor(value) for name, value in batch.items()}
    step = step_of(model, spec, tf.random.normal([DAYS, COLUMNS + 1, NUM_TRENDS]))
    return lambda: step(batch).numpy()


def step_of(model, spec, trends, strategy=None):
    """Return train.py's step for batches of that spec, at a constant rate."""
    strategy = strategy or tf.distribute.get_strategy()
    with strategy.scope():
        optimizer = MuonAdam(model, lambda step: LEARNING_RATE, KERNEL_RATE)
    loss = functools.partial(training_loss, model, trends=trends)
    return make_train_step(strategy, loss, optimizer, spec)


def ready_to_train(folder, users):
    """Return (manifest, index, work_dir, the Scorer of a new model) of synthetic users."""
    write_clicks(folder / "raw", users)
    chain = house(folder / "house", folder / "raw")
    for script in ("get_indexing", "get_tfrecord"):
        cost_of(chain, script)
    work_dir = chain / "data/work"
    manifest, index = load_manifest(work_dir)
    memory = Memory(count_windows(manifest, ["train"], work_dir, num_workers=1), index)
    return manifest, index, work_dir, make_scorer(tf.distribute.get_strategy(), memory, index, {})


def epoch_and_evaluation(folder, users):
    """Return (steps, seconds of the median step, seconds of an evaluation) of synthetic users."""
    manifest, index, work_dir, scorer = ready_to_train(folder, users)
    batches = epoch_batches(manifest, index, work_dir, scorer.memory, seed=1, epoch=1)
    step = step_of(scorer.model, batches.element_spec, tf.constant(scorer.memory.trend.table))
    times = [seconds(lambda batch=batch: step(batch).numpy()) for batch in batches.take(60)]
    validation = held_out(manifest, "val", work_dir)
    evaluation = in_turn(2, evaluation=lambda: validate(scorer, validation))
    return len(batches), statistics.median(times[5:]), evaluation["evaluation"]


def main(rounds=20, users=USERS):
    keras.utils.set_random_seed(1)
    tf.config.experimental.enable_op_determinism()  # as train.py does
    rng = np.random.default_rng(0)
    batches = {number: random_batch(rng, number) for pair in VIDEOS.items() for number in pair}
    steps = {str(number): new_step(number, batch) for number, batch in batches.items()}
    matrix, ours = tf.random.normal([2048, 2048]), steps[str(FEW)]
    times = in_turn(rounds, **steps, gemm=lambda: tf.matmul(matrix, matrix).numpy())
    peak, targets = 2 * 2048**3 / times["gemm"], float(tf.reduce_sum(batches[FEW]["label"]))
    taken = times[str(FEW)]
    print(f"step: {1e3 * taken:.1f} ms, {targets / taken:,.0f} targets/s, "
          f"MFU {needed_flops(batches[FEW]) / taken / peak:.2f} of {peak / 1e9:.0f} GFLOP/s")  # fmt: skip
    for few, many in VIDEOS.items():
        print(f"with {many:,} videos {times[str(many)] / times[str(few)]:.2f} times a step with {few:,}")

    naive = 40 * NAIVE_BATCH // (1 + NEGATIVES)
    times = in_turn(3, ours=ours, naive=naive_fit(rng, naive))
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
