"""Train the towers, count the memory, choose how to mix them, measure it all beside simple baselines, and publish it.

Reads   WORK_DIR/tfrecord/, WORK_DIR/indexing/, the model that stands in WORK_DIR/model/, the titles in DATA_DIR
Writes  WORK_DIR/model/checkpoint.npz      where a run that was killed goes on; gone when it has ended
        WORK_DIR/model/history.csv         one line an epoch
        WORK_DIR/model/logs/               for TensorBoard, where it is installed: a folder a run
    and when all has ended, together
        WORK_DIR/model/<hash>.weights.h5   the towers' best weights
        WORK_DIR/model/<hash>.memory.npz   the memory
        WORK_DIR/model/model.json          which of them belong together, and all that is needed to serve them
        WORK_DIR/model/metrics.json        the table that is printed at the end, on the test users
        WORK_DIR/model/test.csv            one line a test user: the target, and its rank in every row of the table
    and after that
        WORK_DIR/model/projector/          vectors and names of the columns and of the most clicked videos
        WORK_DIR/model/projector_config.pbtxt  with which TensorBoard's projector shows them

    python train.py

Where a model stands, training starts from its weights and takes WARM_EPOCHS; until all has ended, that model ranks.
"""

import contextlib
import csv
import functools
import importlib.util
import itertools
import json
import os
import platform
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

from get_dataset import (
    DATASET_CONSTANTS, add_candidates, column_table, held_out, load_manifest, make_dataset, tensorflow_errors_named,
    video_table,
)  # fmt: skip
from get_indexing import (
    DATA_DIR, ENDINGS, FIRST_VIDEO, WORK_DIR,
    InputError, check_same, cluster_worker, file_fingerprint, fingerprint, load_index, only_one, progress, read_json,
    read_names, remove_leftovers, replacing, run_script, write_json,
)  # fmt: skip
from get_tfrecord import MADE_WITH
from model_tf2 import (
    LOSS, LOSSES, MODEL_CONSTANTS, SCORES_AT_ONCE,
    Counts, CountTable, Memory, Mix, Scorer, build_model, by_rarity, count_windows, mix, sum_by_place,
    training_loss,
)  # fmt: skip

import keras
import numpy as np
import tensorflow as tf

EPOCHS = 6  # at most; the learning rate falls along a cosine over so many
PATIENCE = 4  # epochs without a better validation NDCG@10 before training ends
LEARNING_RATE = 3e-3  # of Adam, at the start
KERNEL_RATE = 3.0  # of Muon for the kernels, in learning rates of Adam
LOWEST_RATE = 0.02  # of the learning rate, at the end
WARM_START = True  # False trains from nothing also where a model stands
WARM_EPOCHS = 2  # instead of EPOCHS where training starts from the weights of a model
WARM_RATE = 0.5  # of LEARNING_RATE, then
SEED = 1  # of weights, dropout, shuffling and negatives
MEMORY = True  # False leaves the plain two towers
MEMORY_DECAYS = (0.7, 0.9)  # per click between two that are counted as near; chosen on validation
MEMORY_WEIGHTS = tuple(tenth / 10 for tenth in range(10))  # of the memory in the mix; chosen on validation
REPEATS = (1.0, 0.5, 0.001)  # factors for columns that the user clicked before; chosen on validation
CLUSTER_TIMEOUT = 600  # seconds that a worker waits for the others
RESAMPLES = 1000  # of the test users, for the intervals
PROJECTOR_VIDEOS = 10_000  # of the most clicked, whose vectors are written out
MODEL_FORMAT = 4  # of model.json
NO_LOSSES = {"loss": None, "column_loss": None, "targets": None}  # of epoch 0
ASTRAY = "the model that stands is kept; lower LEARNING_RATE and run train.py again"  # where numbers are not finite

rules = {
    "a whole number in [1, inf)": ("EPOCHS", "PATIENCE", "WARM_EPOCHS", "CLUSTER_TIMEOUT", "RESAMPLES", "PROJECTOR_VIDEOS"),
    "a whole number in [0, 4294967295]": ("SEED",),
    "a number in (0, inf)": ("LEARNING_RATE", "KERNEL_RATE", "WARM_RATE"),
    "a number in [0, 1]": ("LOWEST_RATE",),
    "a tuple, not empty, of a number in (0, 1]": ("MEMORY_DECAYS", "REPEATS"),
    "a tuple, not empty, of a number in [0, 1]": ("MEMORY_WEIGHTS",),
    "one of True, False": ("WARM_START", "MEMORY"),
}  # fmt: skip


def train(work_dir=WORK_DIR, record_constants=None, epochs=EPOCHS, patience=PATIENCE, learning_rate=LEARNING_RATE,
          loss=LOSS, use_memory=MEMORY, warm_start=WARM_START, warm_epochs=WARM_EPOCHS, seed=SEED, data_dir=DATA_DIR,
          **arguments):  # fmt: skip
    """Train on the records under work_dir and return the metrics of the test users, {ranking: {metric: value}}.

    record_constants are those that the records must be made with, by default today's; arguments are BST_DSSM's; data_dir
    is where the titles are. A run that was killed goes on after its last finished epoch, to the same weights; one over
    the same as the model that stands does nothing. In a cluster (TF_CONFIG) every worker calls this; only the first
    one writes, and returns the metrics where it has trained.
    """
    if loss not in LOSSES:
        raise InputError(f"LOSS = {loss!r}: it must be one of {', '.join(LOSSES)}")
    strategy = make_strategy()
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()
    manifest, index = load_manifest(work_dir, record_constants)
    dropout, ahead_decay = by_rarity(manifest["report"]["clicks"], len(index.videos))
    video_columns = video_table(index)
    of_data = dict(
        num_videos=len(index.videos), num_columns=len(index.columns), dropout=dropout, column_map=bool(video_columns.any()),
    )  # fmt: skip
    with strategy.scope():
        model = build_model(**of_data | arguments, video_columns=video_columns)
    constants = dict(
        EPOCHS=epochs, PATIENCE=patience, LEARNING_RATE=learning_rate, KERNEL_RATE=KERNEL_RATE, LOWEST_RATE=LOWEST_RATE,
        WARM_START=warm_start, WARM_EPOCHS=warm_epochs, WARM_RATE=WARM_RATE, LOSS=loss, AHEAD_DECAY=ahead_decay, SEED=seed,
        MEMORY=use_memory, MEMORY_DECAYS=MEMORY_DECAYS, MEMORY_WEIGHTS=MEMORY_WEIGHTS, REPEATS=REPEATS,
        **DATASET_CONSTANTS, **MODEL_CONSTANTS,
    )  # fmt: skip
    metrics = replace_model(strategy, model, describe_run(constants, model, manifest, index), manifest, index, work_dir)
    if is_first():
        write_projector(work_dir, index, data_dir)
    return metrics


def describe_run(constants, model, manifest, index):
    """Return all that shapes a training, as it will be read from model.json again."""
    run = {
        "constants": constants,
        "arguments": model.arguments,
        "records": {name: manifest[name] for name in MADE_WITH},
        "index": index.fingerprint(),
        "columns_hold": fingerprint(index.columns),
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (tf, keras, np)},
    }
    return json.loads(json.dumps(run))


def replace_model(strategy, model, run, manifest, index, work_dir):
    """Train the model, from the weights that stand where it can, and publish it; return the metrics of the test users.

    Nothing is done where the model that stands is of the same run.
    """
    folder = Path(work_dir, "model")
    if is_first():
        remove_leftovers(folder)
        remove_leftovers(folder, ".new.*")  # drafts of save_by_hash()
    standing, why_cold = what_stands(work_dir, index, run)
    if standing and run.items() <= standing.saved.items():
        print(f"nothing to train: {folder / 'model.json'} was made of these records with these constants")
        (folder / "checkpoint.npz").unlink(missing_ok=True)
        return standing.saved["test"]
    start = f"from nothing: {why_cold}" if why_cold else f"from the weights of the model of {standing.saved['date']}"
    print(f"training starts {start}; {run['constants']['EPOCHS' if why_cold else 'WARM_EPOCHS']:,} epochs at most")
    with tensorflow_errors_named():
        counts = count_windows(manifest, ["train"], MEMORY_DECAYS, index, work_dir)
        if not why_cold:
            grow(standing.model, model, index)
        scorer = Scorer(model, Memory.of_counts(counts, 0, index), index)
        run_from = run | {"from": None if why_cold else standing.saved["weights"]}
        weights, logs = fit(strategy, scorer, manifest, index, work_dir, run_from)
        if not is_first():
            return None
        model.set_weights(weights)
        scorer.refresh()
        return finish(scorer, standing, counts, run, manifest, index, work_dir, logs)


def is_first():
    """Return whether this process is the one that writes: the only one, or the first of its cluster."""
    return cluster_worker()[0] == 0


def make_strategy():
    """Return how to train: on the cluster of TF_CONFIG, on all GPUs of this machine, or on its one device."""
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    worker, workers = cluster_worker()
    if workers > 1:
        print(
            f"worker {worker} waits for all {workers} of TF_CONFIG; after {CLUSTER_TIMEOUT} s an alarm ends it",
            file=sys.stderr,
        )
        signal.alarm(CLUSTER_TIMEOUT)  # TensorFlow itself waits for ever, and lets no other thread run
        options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=CLUSTER_TIMEOUT)
        strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
        signal.alarm(0)
        return strategy
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


# ---------------------------------------------------------------- fitting the towers


def fit(strategy, scorer, manifest, index, work_dir, run):
    """Train the scorer's towers; return (the weights of the best epoch, the folder of the run's logs).

    Epoch 0 is the weights as they come, where `run` says from which model. A checkpoint of the same run goes on.
    """
    model, folder, constants, is_warm = scorer.model, Path(work_dir, "model"), run["constants"], bool(run["from"])
    epochs = constants["WARM_EPOCHS" if is_warm else "EPOCHS"]
    rate = constants["LEARNING_RATE"] * (constants["WARM_RATE"] if is_warm else 1)
    column_videos = column_table(index, scorer.memory.video_clicks)
    batches_of = functools.partial(epoch_batches, manifest, index, work_dir, column_videos, constants["SEED"])
    any_epoch = batches_of(0)  # for its length and its shapes
    with strategy.scope():
        schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * len(any_epoch), LOWEST_RATE)
        optimizer = MuonAdam(model.trainable_variables, schedule)
    settings = constants["AHEAD_DECAY"], constants["LOSS"]
    train_step = make_train_step(strategy, model, optimizer, any_epoch.element_spec, *settings)
    validation = scorer.rankable(held_out(manifest, "val", work_dir))
    log_name, history, best = restore_checkpoint(folder, model, optimizer, run)
    print("epoch      loss    column   targets | validation HR@10   NDCG@10       MRR      GAUC | seconds")
    next_epoch = history[-1]["epoch"] + 1 if history else int(not is_warm)
    for epoch in range(next_epoch, epochs + 1):
        if epoch > best_epoch(history) + constants["PATIENCE"]:
            break
        clock = time.time()
        losses = train_epoch(train_step, batches_of(epoch), epoch, optimizer) if epoch else NO_LOSSES
        metrics = agreed(strategy, validate(scorer, validation))
        history.append({"epoch": epoch, **losses, **metrics, "seconds": round(time.time() - clock, 1)})
        if best_epoch(history) == epoch:
            best = model.get_weights()
        if is_first():
            write_csv(folder / "history.csv", history[0], [row.values() for row in history])
            log(folder / "logs" / log_name, epoch, history[-1])
            save_checkpoint(folder, model, optimizer, run, log_name, history, best)
        print_epoch(history)
    return best, folder / "logs" / log_name


def epoch_batches(manifest, index, work_dir, column_videos, seed, epoch):
    """Return the training batches of an epoch, in an order and with candidates of its own."""
    draw = seed * 1_000_000 + epoch
    return add_candidates(make_dataset(manifest, work_dir, seed=draw), column_videos, len(index.videos), seed=draw)


def validate(scorer, users):
    """Return {metric: mean over users} of the towers as they are now."""
    scorer.refresh()
    ranks = ranks_of(users, scorer, lambda *clicks: [("towers", scorer.towers(*clicks))])
    return means(metrics_of(ranks["towers"], len(scorer.numbers)))


# ---------------------------------------------------------------- one epoch


class MuonAdam:
    """Muon (Jordan et al. 2024) for the kernels, and for all else Adam (Kingma and Ba 2015).

    Muon moves a kernel by an orthogonal matrix, so in all directions by as much, however rarely one is used. Of an
    embedding Adam updates only those rows that the batch touched; the others, and their moments, stand still. So a step
    costs the same however many videos there are, where Keras' Adam goes through the whole table in every step.
    """

    momentum = 0.95  # of Muon
    beta_1, beta_2, epsilon = 0.9, 0.999, 1e-7  # of Adam

    def __init__(self, parameters, schedule):
        self.kernels = [parameter.value for parameter in parameters if parameter.name == "kernel"]
        self.others = [parameter.value for parameter in parameters if parameter.name != "kernel"]
        self.schedule = schedule
        self.step = tf.Variable(0.0, trainable=False)
        self.totals = [tf.Variable(tf.zeros_like(kernel), trainable=False) for kernel in self.kernels]
        self.means = [tf.Variable(tf.zeros_like(parameter), trainable=False) for parameter in self.others]
        self.squares = [tf.Variable(tf.zeros_like(parameter), trainable=False) for parameter in self.others]
        self.variables = [self.step, *self.totals, *self.means, *self.squares]

    def apply(self, kernel_gradients, other_gradients):
        """Update the parameters by their gradients, summed over the replicas; those of others are dense or tf.IndexedSlices."""
        gradients = tf.distribute.get_replica_context().all_reduce("SUM", (kernel_gradients, other_gradients))
        kernel_gradients, other_gradients = gradients
        rate, step = self.schedule(self.step.read_value()), self.step.read_value() + 1
        assign(self.step, step)
        for variables in zip(self.kernels, self.totals, kernel_gradients, strict=True):
            self.update_kernel(*variables, KERNEL_RATE * rate)
        rate *= tf.sqrt(1 - self.beta_2**step) / (1 - self.beta_1**step)
        for variables in zip(self.others, self.means, self.squares, other_gradients, strict=True):
            self.update(*variables, rate)

    def update_kernel(self, kernel, total, gradient, rate):
        """Update one kernel by Nesterov's momentum, made orthogonal."""
        new_total = gradient + self.momentum * total.read_value()
        change = rate * orthogonal(gradient + self.momentum * new_total)
        assign(total, new_total)
        assign(kernel, kernel.read_value() - change)

    def update(self, parameter, mean, square, gradient, rate):
        """Update one parameter by Adam: all of it, or the rows that tf.IndexedSlices name."""
        read, write = tf.identity, assign
        if isinstance(gradient, tf.IndexedSlices):
            rows, place = tf.unique(gradient.indices)
            gradient = tf.math.unsorted_segment_sum(gradient.values, place, tf.size(rows))
            read, write = functools.partial(tf.gather, indices=rows), functools.partial(assign, rows=rows)
        new_mean = self.beta_1 * read(mean) + (1 - self.beta_1) * gradient
        new_square = self.beta_2 * read(square) + (1 - self.beta_2) * gradient**2
        write(mean, new_mean)
        write(square, new_square)
        write(parameter, read(parameter) - rate * new_mean / (tf.sqrt(new_square) + self.epsilon))


def assign(variable, values, rows=None):
    """Set a variable, or rows of it. Each replica sets its own copy, the same as all others: so by raw operations."""
    if rows is None:
        tf.raw_ops.AssignVariableOp(resource=variable.handle, value=values)
    else:
        tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=rows, updates=values)


def orthogonal(matrix):
    """Return the matrix of orthonormal rows or columns next to one, roughly: of singular values between .6 and 1.2."""
    if matrix.shape[0] > matrix.shape[1]:
        return tf.transpose(orthogonal(tf.transpose(matrix)))
    matrix = matrix / (tf.norm(matrix) + 1e-12)
    for _ in range(5):  # Newton-Schulz, with Muon's coefficients, brings what was above .01 of the largest there
        squared = tf.matmul(matrix, matrix, transpose_b=True)
        matrix = 3.4445 * matrix + tf.matmul(2.0315 * tf.matmul(squared, squared) - 4.775 * squared, matrix)
    return matrix


def make_train_step(strategy, model, optimizer, batch_spec, ahead_decay, loss):
    """Return train_step(batch) -> [loss, loss of the columns, number of targets], which updates the model once.

    Every replica is given the whole batch and takes its own part of the windows.
    """

    def replica_step(batch):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        with tf.GradientTape() as tape:
            losses = training_loss(
                model, batch, loss, ahead_decay, replica=replica, num_replicas=strategy.num_replicas_in_sync
            )
        optimizer.apply(*tape.gradient(losses[0], (optimizer.kernels, optimizer.others)))
        return tf.stack(losses)

    @tf.function(input_signature=[batch_spec], autograph=False)  # no Python branches on tensors; a third of the tracing
    def train_step(batch):
        losses = strategy.reduce("SUM", strategy.run(replica_step, args=(batch,)), axis=None)
        return tf.concat([losses, [tf.reduce_sum(batch["label"])]], axis=0)

    return train_step


def train_epoch(train_step, batches, epoch, optimizer):
    """Run an epoch; return its mean losses and its number of targets. A loss that is not finite raises InputError."""
    sums = np.zeros(3)
    for step, batch in enumerate(progress(batches, len(batches), f"epoch {epoch}", "batch"), start=1):
        outcome = train_step(batch).numpy()
        if not np.isfinite(outcome).all():
            raise InputError(
                f"the loss is {outcome[0]} at step {step} of epoch {epoch} (learning rate "
                f"{float(optimizer.schedule(optimizer.step - 1)):.3g}); {ASTRAY}"
            )
        sums += outcome
    return {"loss": float(sums[0] / step), "column_loss": float(sums[1] / step), "targets": int(sums[2])}


def agreed(strategy, metrics):
    """Return the first worker's metrics in every worker of a cluster: all must end at the same epoch."""
    if cluster_worker()[1] == 1:
        return metrics
    values = tf.constant(list(metrics.values()), tf.float64)
    parts = strategy.experimental_distribute_values_from_function(
        lambda context: values if context.replica_id_in_sync_group == 0 else tf.zeros_like(values)
    )
    return dict(zip(metrics, strategy.reduce("SUM", parts, axis=None).numpy().tolist(), strict=True))


def best_epoch(history):
    """Return the number of the epoch with the best validation NDCG, 0 before the first."""
    return max(history, key=lambda row: row["NDCG@10"], default={"epoch": 0})["epoch"]


# ---------------------------------------------------------------- evaluation: every current column is ranked for every user


def ranks_of(users, scorer, rankings):
    """Return {name: ranks [n]} of the targets of users, as of Scorer.rankable(); scores that are not finite are refused.

    rankings(videos [n, len], columns [n, len]) yields (name, scores [n, current columns]).
    """
    ranks, at_once = {}, max(1, SCORES_AT_ONCE // len(scorer.numbers))
    for start in range(0, len(users["place"]), at_once):
        videos, columns, places = (
            users[name][start : start + at_once] for name in ("user_feature", "user_column", "place")
        )
        longest = np.count_nonzero(videos, axis=1).max()
        for name, scores in rankings(videos[:, :longest], columns[:, :longest]):
            if not np.isfinite(scores).all():
                raise InputError(f"{name!r} gives scores that are not finite; {ASTRAY}")
            ranks.setdefault(name, []).append(rank_of(scores, places))
    return {name: np.concatenate(blocks) for name, blocks in ranks.items()}


def rank_of(scores, places):
    """Return the rank, from 1, of column places[i] among scores[i]; of equal scores the first column wins."""
    own = np.take_along_axis(scores, places[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < places[:, None]
    return 1 + ((scores > own) | ((scores == own) & earlier)).sum(axis=1)


def metrics_of(ranks, num_columns):
    """Return HR@10, NDCG@10, MRR and GAUC of ranks [n]: {metric: [n]}, of which the means are reported.

    GAUC (Zhou et al. 2018): the AUC of each ranked list, averaged over a user's lists and then over users weighted by
    their number of lists, which is the mean over all lists.
    """
    top = ranks <= 10
    return {
        "HR@10": top,
        "NDCG@10": top / np.log2(ranks + 1),
        "MRR": 1 / ranks,
        "GAUC": (num_columns - ranks) / (num_columns - 1) if num_columns > 1 else np.ones(len(ranks)),
    }


def means(metrics):
    """Return {metric: mean} of {metric: [n]}."""
    return {name: float(np.mean(values)) for name, values in metrics.items()}


# ---------------------------------------------------------------- what follows: count, choose, test, publish


def finish(scorer, standing, counts, run, manifest, index, work_dir, logs):
    """Choose the mix on validation, test it, count the memory on all clicks, and publish; return the test's metrics."""
    validation = scorer.rankable(held_out(manifest, "val", work_dir))
    test = scorer.rankable(held_out(manifest, "test", work_dir))
    use_memory, num_columns = run["constants"]["MEMORY"], len(scorer.numbers)
    memories = {decay: Memory.of_counts(counts, place, index) for place, decay in enumerate(MEMORY_DECAYS)}
    chosen = choose_mix(validation, scorer, memories) if use_memory else Mix(MEMORY_DECAYS[0], 0.0, repeat=1.0)
    scorer.memory = memories[chosen.decay]
    if standing:  # its mix, but of what is counted in the training records, as for the new one
        standing = standing._replace(memory=memories.get(standing.mix.decay, scorer.memory))
    rankings = all_rankings(scorer, counts, chosen if use_memory else None, standing, index)
    ranks, of_validation = ranks_of(test, scorer, rankings), ranks_of(validation, scorer, rankings)
    table = make_table(ranks, test, num_columns) | {
        "validation": {row: means(metrics_of(of_row, num_columns)) for row, of_row in of_validation.items()},
        "mix": chosen._asdict(),
    }
    held_out_counts = count_windows(manifest, ["val", "test"], MEMORY_DECAYS, index, work_dir)
    counts = Counts.add(counts, held_out_counts, size=1 + len(index.columns))
    memory = Memory.of_counts(counts, MEMORY_DECAYS.index(chosen.decay), index)
    publish(Path(work_dir, "model"), scorer.model, memory, index, run, table, ranks, test)
    lines = table_lines(table, chosen)
    print(*lines, sep="\n")
    log(logs, 0, {"test users": "".join(f"    {line}\n" for line in lines)})  # indented: code, in Markdown
    return table["test"]


def choose_mix(users, scorer, memories):
    """Return the Mix for users, by their NDCG@10; memories are {decay: Memory}.

    Of those that are less than a standard error behind the best (Breiman et al. 1984) it is the plainest: without a factor
    for repeats, then half and half, then of the first decay. The best of many on a few hundred users is often there by luck.
    """

    def mixes(*clicks):
        clicked = scorer.clicked(clicks[1])
        for decay, memory in memories.items():
            parts = scorer.parts(*clicks, Mix(decay, 0.0, 1.0), memory)
            for weight, repeat in itertools.product(MEMORY_WEIGHTS, REPEATS):
                choice = Mix(decay, weight, repeat)
                yield choice, mix(*parts, clicked, choice)

    ranks = ranks_of(users, scorer, mixes)
    gains = {choice: metrics_of(of_choice, len(scorer.numbers))["NDCG@10"] for choice, of_choice in ranks.items()}
    best = max(gains.values(), key=np.mean)
    behind = {choice: best - of_choice for choice, of_choice in gains.items()}
    as_good = [choice for choice, lost in behind.items() if lost.mean() <= lost.std() / len(lost) ** 0.5]
    return min(as_good, key=lambda choice: (-choice.repeat, round(abs(choice.memory_weight - 0.5), 9)))


def all_rankings(scorer, counts, chosen, standing, index):
    """Return rankings(videos [n, len], columns [n, len]), which yields (name, scores [n, current columns]).

    They are of four simple baselines, of the model that stands, of the parts of the new one, and of their mix.
    """
    rng, size = np.random.default_rng(0), 1 + len(index.columns)
    chain = CountTable(counts.next, size, size)
    popularity = scorer.of_current(scorer.memory.popularity[None])
    nudge = 1e-6 * popularity  # of columns that are equal otherwise, the popular one first
    stood = standing and Scorer(standing.model, standing.memory, index, standing.saved["constants"]["ITEM_MAX_LEN"])

    def rankings(videos, columns):
        shape, in_column = (len(columns), len(scorer.numbers)), columns > 0
        yield "random", rng.random(shape)
        yield "popularity", np.broadcast_to(popularity, shape)
        later = np.cumsum(in_column[:, ::-1], axis=1)[:, ::-1] - in_column  # column clicks that follow
        recency = np.where(in_column, 0.8**later, 0)
        yield "own columns", scorer.of_current(sum_by_place(columns, recency, size)[:, 1:]) + nudge
        follows = chain.weighted_rows(columns, recency / np.maximum(chain.totals[columns], 1))
        yield "chain", scorer.of_current(follows) + nudge
        if standing:
            yield "standing", stood.probabilities(videos, columns, standing.mix)
        yield "towers", scorer.towers(videos, columns)
        if chosen:
            yield "memory", scorer.remembered(videos, columns, chosen)
            yield "mix", scorer.probabilities(videos, columns, chosen)

    return rankings


# ---------------------------------------------------------------- the table


def make_table(ranks, users, num_columns):
    """Return {"test": {row: {metric: mean}}, "slices": {slice: {"users": n, row: NDCG@10}}, "notes": [line, ...]}.

    "low" and "high" of a row are the 95 % interval of its NDCG@10.
    """
    metrics = {row: metrics_of(of_row, num_columns) for row, of_row in ranks.items()}
    test, slices = {}, {}
    for row, of_row in metrics.items():
        low, high = interval(of_row["NDCG@10"])
        test[row] = means(of_row) | {"low": low, "high": high}
    for name, of_slice in slices_of(users).items():
        gains = {row: of_row["NDCG@10"][of_slice] for row, of_row in metrics.items()}
        number = int(of_slice.sum())
        slices[name] = {"users": number} | (means(gains) if number else dict.fromkeys(gains))
    return {"test": test, "slices": slices, "notes": list(notes_on(metrics, num_columns))}


def slices_of(users):
    """Return {slice: which users are in it, bool [n]}."""
    history, before = users["history"], users["clicked_before"]
    middle = int(np.median(history))
    return {
        f"up to {middle} clicks": history <= middle,
        f"more than {middle}": history > middle,
        "clicked before": before,
        "never clicked": ~before,
    }


def interval(values):
    """Return the 95 % interval of a mean over users: percentiles over resamples() of them (Efron 1979)."""
    return np.percentile(resamples(len(values)) @ values / len(values), [2.5, 97.5]).tolist()


@functools.lru_cache(maxsize=1)
def resamples(number):
    """Return how often each of so many users comes in each of RESAMPLES draws of as many, with replacement."""
    return np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), RESAMPLES)


def notes_on(metrics, num_columns):
    """Yield a line for each row that is better than the last one, or within the noise of it."""
    if num_columns == 1:
        yield "one column is current, so all rankings are the same and every rank is 1"
        return
    *others, final = metrics
    for row in others:
        ahead = metrics[row]["NDCG@10"] - metrics[final]["NDCG@10"]
        low, high = interval(ahead)  # of the difference for each user, so a paired one
        if high >= 0:
            what = "better than" if low > 0 else "within the noise of"
            yield f"{row!r} is {what} {final!r} in NDCG@10: {ahead.mean():+.4f}, 95 % {low:+.4f} to {high:+.4f}"
        better = [name for name in ("HR@10", "MRR", "GAUC") if metrics[row][name].mean() > metrics[final][name].mean()]
        if better:
            yield f"{row!r} is ahead of {final!r} in {', '.join(better)}"


def table_lines(table, chosen):
    """Return in words the metrics of every ranking, those of the slices, and where a baseline is as good as the model."""
    test, slices = table["test"], table["slices"]
    lines = ["", f"{'test users':12}{'HR@10':>9}{'NDCG@10':>9}{'95 %':>18}{'MRR':>9}{'GAUC':>9}"]
    for row, means_of_row in test.items():
        numbers = "{HR@10:9.4f}{NDCG@10:9.4f}{low:10.4f} to {high:.4f}{MRR:9.4f}{GAUC:9.4f}"
        lines.append(f"{row:12}" + numbers.format(**means_of_row))
    lines += ["", f"{'NDCG@10 of':12}" + "".join(f"{name:>18}" for name in slices)]
    lines.append(f"{'users':12}" + "".join(f"{gains['users']:18,}" for gains in slices.values()))
    for row in test:
        gains_of_row = ["-" if gains[row] is None else f"{gains[row]:.4f}" for gains in slices.values()]
        lines.append(f"{row:12}" + "".join(f"{gain:>18}" for gain in gains_of_row))
    by = f"decay {chosen.decay}, memory_weight {chosen.memory_weight}, repeat {chosen.repeat}"
    return [*lines, f"The model ranks by {list(test)[-1]!r}: {by}", *(f"Note: {note}." for note in table["notes"])]


# ---------------------------------------------------------------- what is alike


def write_projector(work_dir, index, data_dir):
    """Write the vectors of the columns and of the most clicked videos, with their names, for TensorBoard's projector.

    They are of the model that stands; its own, written before, are left. A video is taken for a column of it alone. The
    model is published already, so what goes wrong here is said and no more.
    """
    folder = Path(work_dir, "model").absolute()
    config, entries = folder / "projector_config.pbtxt", ""
    for kind in ("columns", "videos"):
        paths = f'tensor_path: "projector/{kind}_vectors.tsv" metadata_path: "projector/{kind}_names.tsv"'
        entries += f'embeddings {{ tensor_name: "{kind}" {paths} }}\n'
    try:
        model, memory, _, saved = load_model(work_dir, index)
        text = f"# model {saved['id']}, {PROJECTOR_VIDEOS} videos\n{entries}"
        if config.exists() and config.read_bytes() == text.encode():
            return
        scorer = Scorer(model, memory, index, saved["constants"]["ITEM_MAX_LEN"])
        clicks = memory.video_clicks[FIRST_VIDEO:]
        videos = np.sort(np.argsort(-clicks, kind="stable")[:PROJECTOR_VIDEOS])
        vectors = model.column_vectors(FIRST_VIDEO + videos[:, None], np.zeros_like(videos))
        remove_leftovers(folder / "projector")
        vids = np.array(list(index.videos), object)[videos].tolist()
        titles, names = read_names(data_dir, set(vids))
        write_vectors(folder / "projector", "columns", scorer.vectors, scorer.cids, names)
        write_vectors(folder / "projector", "videos", vectors, vids, titles)
        with replacing(config) as temporary:
            temporary.write_text(text)
    except (InputError, OSError) as error:
        print(f"{folder / 'projector'}: not written ({error})", file=sys.stderr)


def write_vectors(folder, kind, vectors, ids, titles):
    """Write vectors [n, dim], and the ids of their rows with their titles: a line a row, separated by tabs."""
    spaces = str.maketrans("\t\n\r", "   ")
    rows = [("id", "title"), *((one.translate(spaces), titles.get(one, one).translate(spaces)) for one in ids)]
    with replacing(folder / f"{kind}_vectors.tsv") as temporary:
        np.savetxt(temporary, vectors, "%.9g", "\t")
    with replacing(folder / f"{kind}_names.tsv") as temporary:
        temporary.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------- what stands


class Standing(NamedTuple):
    """A published model."""

    model: keras.Model
    memory: Memory
    mix: Mix
    saved: dict  # what model.json says


def load_model(work_dir=WORK_DIR, index=None):
    """Return the Standing model, whose format is today's and whose files and index were found to belong together."""
    folder, index = Path(work_dir, "model").absolute(), index or load_index(work_dir)
    path = folder / "model.json"
    saved = read_json(path, "train.py")
    check_same(path, saved, {"format": MODEL_FORMAT}, "train.py")
    weights, memory = (folder / saved[part]["file"] for part in ("weights", "memory"))
    for file, part in ((weights, "weights"), (memory, "memory")):
        if not file.exists() or file_fingerprint(file) != saved[part]["sha256"]:
            raise InputError(f"{file}: gone or damaged, not what {path} was written with; run train.py again")
    index.check(saved["index"], path, "get_tfrecord.py and train.py")
    with damage_named(weights):
        table = video_table(index, saved["constants"]["VIDEO_COLUMNS"], saved["arguments"]["num_columns"])
        model = build_model(**saved["arguments"], video_columns=table)
        model.load_weights(weights)
    with damage_named(memory):
        return Standing(model, Memory.load(memory), Mix(**saved["mix"]), saved)


@contextlib.contextmanager
def damage_named(path):
    """Turn what reading a damaged file raises into an InputError that names it."""
    try:
        yield
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: damaged ({error}); remove it and run train.py again") from error


def what_stands(work_dir, index, run):
    """Return (the Standing model to compare with, None without; why training starts from nothing, None where it does not)."""
    try:
        standing = load_model(work_dir, index)
    except FileNotFoundError:
        return None, "no model stands"
    except InputError as error:
        print(error, file=sys.stderr)
        return None, "the model that stands cannot be used"
    saved = standing.saved
    end_publishing(Path(work_dir, "model"), saved)  # of a run that was killed then
    was, now = saved["records"]["held_out_share"], run["records"]["held_out_share"]
    if now > was:
        return None, f"{now:.2%} of the users are held out, {was:.2%} when the model that stands was trained"
    if not run["constants"]["WARM_START"]:
        return standing, "WARM_START is False"
    for name, value in run["arguments"].items():
        was = saved["arguments"].get(name)
        if was != value and name not in ("num_videos", "num_columns", "dropout"):
            return standing, f"the model that stands has {name} = {was}, now it is {value}"
    return standing, None


def grow(old, new, index):
    """Give the new model the old one's weights. A new video starts as the mean of the old ones on its shelves, or of all;
    a new column as none, since it is scored by its videos."""
    for before, variable in zip(old.variables, new.variables, strict=True):
        rows = before.numpy()
        if variable is new.video_embedding:
            rows = np.concatenate([rows, new_videos(rows, index)])
        elif variable is new.column_embedding:
            rows = np.pad(rows, [(0, variable.shape[0] - len(rows)), (0, 0)])
        variable.assign(rows)


def new_videos(rows, index):
    """Return embeddings [new videos, dim] for the videos that rows, those of the old ones, lack."""
    weight = np.float32(1e-6)  # of the mean of all, which any video on a shelf outweighs
    counts = np.full([FIRST_VIDEO + len(index.videos) - len(rows), 1], weight)
    sums = counts * rows[FIRST_VIDEO:].mean(axis=0)
    for shelf in index.columns.values():
        shelf = np.array(shelf, int)
        known, new = shelf[shelf < len(rows)], shelf[shelf >= len(rows)] - len(rows)
        sums[new] += rows[known].sum(axis=0)
        counts[new] += len(known)
    return sums / counts


def publish(folder, model, memory, index, run, table, ranks, users):
    """Write weights, memory and tables under names of their own; then model.json, whose rename publishes all."""
    # h5py does not survive a full disk, so ask for the room before.
    with tempfile.TemporaryFile(dir=folder) as room:
        room.writelines(weight.tobytes() for weight in model.get_weights())
        room.write(bytes(1 << 20))
    files = {
        "weights": save_by_hash(folder, ".weights.h5", model.save_weights),
        "memory": save_by_hash(folder, ".memory.npz", memory.save),
    }
    saved = {"format": MODEL_FORMAT, "date": time.strftime("%Y-%m-%d %H:%M:%S"), **files, **run, **table}
    saved["id"] = fingerprint(saved)[:16]
    write_json(folder / f"{saved['id']}.metrics.json", table)
    write_test(folder / f"{saved['id']}.test.csv", ranks, users, list(index.columns))
    write_json(folder / "model.json", saved)
    end_publishing(folder, saved)
    (folder / "checkpoint.npz").unlink(missing_ok=True)


def end_publishing(folder, saved):
    """Put the tables of the published model in their place, and remove the files of others that are its like."""
    for name in ("metrics.json", "test.csv"):
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder / f"{saved['id']}.{name}", folder / name)
    current = (saved["weights"]["file"], saved["memory"]["file"])
    for kind in ("weights.h5", "memory.npz", "metrics.json", "test.csv"):
        remove_leftovers(folder, f"{'[0-9a-f]' * 16}.{kind}", current)


def write_test(path, ranks, users, cids):
    """Write test.csv: one line a test user, with the target and its rank in every row of the table.

    A NUL in an id, which the csv module of Python 3.10 neither writes nor reads, becomes a replacement character.
    """
    columns = [
        [uid.decode().replace("\0", "\ufffd") for uid in users["uid"]],
        users["history"].tolist(),
        [cids[number - 1].replace("\0", "\ufffd") for number in users["target_column"]],
        users["clicked_before"].astype(int).tolist(),
        *(of_row.tolist() for of_row in ranks.values()),
    ]
    write_csv(path, ["uid", "history", "target", "clicked_before", *ranks], zip(*columns, strict=True))


def write_csv(path, head, rows):
    """Replace path by a table."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


def save_by_hash(folder, suffix, write):
    """Write a file by write(path), name it by its SHA-256 and return {"file": name, "sha256": hash}."""
    draft = folder / f".new{suffix}"
    write(draft)
    sha256 = file_fingerprint(draft)
    name = f"{sha256[:16]}{suffix}"
    with replacing(folder / name) as temporary:
        draft.rename(temporary)
    return {"file": name, "sha256": sha256}


# ---------------------------------------------------------------- what a run under way keeps


def save_checkpoint(folder, model, optimizer, run, log_name, history, best):
    """Write all that a run needs to go on after its last epoch, the best weights so far included."""
    arrays = {f"{i:04}": v.numpy() for i, v in enumerate(model.variables + optimizer.variables)}
    arrays |= {f"best{i:04}": values for i, values in enumerate(best)}
    state = json.dumps({"run": run, "log_name": log_name, "history": history})
    with replacing(folder / "checkpoint.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, state=state, **arrays)


def restore_checkpoint(folder, model, optimizer, run):
    """Set the variables as the same run's last epoch left them; return (name of its logs, history, best weights)."""
    path = folder / "checkpoint.npz"
    if path.exists():
        with damage_named(path), np.load(path) as arrays:
            state = json.loads(str(arrays["state"]))
            if state["run"] == run:
                for i, variable in enumerate(model.variables + optimizer.variables):
                    variable.assign(arrays[f"{i:04}"])
                best = [arrays[f"best{i:04}"] for i in range(len(model.variables))]
                print(f"going on after epoch {state['history'][-1]['epoch']} of {path}")
                return state["log_name"], state["history"], best
    return time.strftime("%Y%m%d-%H%M%S"), [], None


def print_epoch(history):
    """Print the last epoch's row; * marks the best so far."""
    row = history[-1]
    losses = "        -         -         -"
    if row["loss"] is not None:
        losses = "{loss:9.4f} {column_loss:9.4f} {targets:9,}".format(**row)
    metrics = "{HR@10:17.4f} {NDCG@10:9.4f} {MRR:9.4f} {GAUC:9.4f}".format(**row)
    best = " *" if best_epoch(history) == row["epoch"] else ""
    print(f"{row['epoch']:5} {losses} |{metrics} |{row['seconds']:8.1f}{best}")


def log(folder, step, values):
    """Log numbers and texts {name: value} for TensorBoard, where that is installed: TensorFlow no longer brings it."""
    if importlib.util.find_spec("tensorboard"):
        with tf.summary.create_file_writer(str(folder)).as_default(step):
            for name, value in values.items():
                if value is not None:
                    (tf.summary.text if type(value) is str else tf.summary.scalar)(name, value)


def say_if_clicks_changed(work_dir, data_dir=DATA_DIR):
    """Print a line where the click files are others, or newer, than those that the records were made of."""
    folder, manifest = Path(data_dir, "click_seq"), Path(work_dir, "tfrecord/manifest.json")
    if not folder.is_dir() or not manifest.exists():
        return
    paths = [path for path in folder.glob("[!.]*") if path.name.endswith(ENDINGS) and path.is_file()]
    newer = sorted(path.name for path in paths if path.stat().st_mtime > manifest.stat().st_mtime)
    if newer or {path.name for path in paths} != set(read_json(manifest, "get_tfrecord.py").get("input", ())):
        print(
            f"{folder}: the clicks changed since the records were made ({', '.join(newer[:3]) or 'other files'}); run "
            "get_tfrecord.py first to train on them",
            file=sys.stderr,
        )


@only_one(each_worker=True)
def main():
    say_if_clicks_changed(WORK_DIR)
    train()


if __name__ == "__main__":
    run_script(main)
