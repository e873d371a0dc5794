"""Train the towers, count memory and habit, choose how to mix them, measure it all beside simple baselines, and publish it.

Reads   WORK_DIR/tfrecord/, WORK_DIR/indexing/, the model that stands in WORK_DIR/model/
Writes  WORK_DIR/model/checkpoint.npz      where a run that was killed goes on; gone when it has ended
        WORK_DIR/model/history.csv         one line an epoch
        WORK_DIR/model/logs/               for TensorBoard, where it is installed: a folder a run, and one for all
    and when all has ended, together
        WORK_DIR/model/<id>.weights.h5     the towers' best weights
        WORK_DIR/model/<id>.memory.npz     what was counted
        WORK_DIR/model/model.json          which of them belong together, and all that is needed to serve them
        WORK_DIR/model/metrics.json        the table that is printed at the end, on the test users
        WORK_DIR/model/test.csv            one line a test user: the target, and its rank in every row of the table

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
import time
import uuid
import zipfile
from pathlib import Path
from typing import Final, NamedTuple

from get_dataset import (
    Counts, CountTable, add_candidates, add_counts, check_same, cluster_worker, column_table, count_windows, held_out,
    load_manifest, make_dataset, shelves_table, tensorflow_errors_named,
)  # fmt: skip
from get_indexing import (
    DATA_DIR, FIRST_VIDEO, WORK_DIR,
    InputError, OrZero, constants_of, file_fingerprint, fingerprint, load_index, only_one, read_json,
    remove_leftovers, replacing, run_script, warn, write_json,
)  # fmt: skip
from get_tfrecord import MADE_WITH, digests, read_if_whole, survey
from model_tf2 import (
    LOSS, SCORES_AT_ONCE,
    Memory, Mix, Scorer, Users, build_model, dropout_for, recency, sum_by_number, training_loss,
)  # fmt: skip

import keras
import numpy as np
import tensorflow as tf

EPOCHS: int = 6  # at most; the learning rate falls along a cosine over so many
PATIENCE: int = 4  # epochs without a better validation NDCG@10 before training ends
LEARNING_RATE: float = 3e-3  # of Adam, at the start
KERNEL_RATE: float = 3.0  # of Muon for the kernels, in learning rates of Adam
LOWEST_RATE: float = 0.02  # of the learning rate, at the end
WARM_START: bool = True  # False trains from nothing also where a model stands
WARM_EPOCHS: int = 2  # instead of EPOCHS where training starts from the weights of a model
WARM_RATE: float = 0.5  # of LEARNING_RATE, then
SEED: OrZero = 1  # of weights, dropout, shuffling and negatives
MEMORY: bool = True  # False leaves the plain two towers
MIX_WEIGHTS: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)  # of memory, and of habit, to choose from on validation
HABIT_POPULARITIES: tuple[float, ...] = (0.1, 0.6, 0.9)  # shares of recent popularity in habit, to choose from
HABIT_HOURS: tuple[float, ...] = (0.0, 3.0)  # how near in the hour of the day clicks count in habit, to choose from
CLICKED_FACTORS: tuple[float, ...] = (1.0, 0.001)  # for columns that the user clicked before, to choose from
CLUSTER_TIMEOUT: int = 600  # seconds that a worker waits for the others

MODEL_FORMAT: Final = 9  # of model.json
NO_LOSS: Final = {"loss": None, "targets": None}  # of epoch 0
NOT_FINITE: Final = "the model that stands is kept; lower LEARNING_RATE and run train.py again"
GAPS: Final = {"within an hour": 3600, "within a day": 86_400, "within a week": 604_800, "later": np.inf}  # seconds


def train(work_dir=WORK_DIR, record_constants=None, loss=LOSS, arguments=None, **constants):
    """Train on the records under work_dir and return the metrics of the test users, {row: {metric: value}}.

    record_constants are those that the records must be made with, by default today's; arguments are BST_DSSM's; constants,
    by their names, take the place of those above. A run that was killed goes on after its last finished epoch. Where the
    model that stands was made of the same, nothing is done. Of a cluster (TF_CONFIG) only the first worker writes.
    """
    settings = constants_of("get_dataset", "model_tf2") | {"LOSS": loss} | constants_of(__name__, **constants)
    strategy = make_strategy()
    keras.utils.set_random_seed(settings["SEED"])
    tf.config.experimental.enable_op_determinism()
    manifest, index = load_manifest(work_dir, record_constants)
    run = describe_run(settings, arguments or {}, manifest, index)
    folder = Path(work_dir, "model")
    if is_first():
        remove_leftovers(folder)
    standing, why_cold = find_standing(work_dir, index, run)
    check_same_start(strategy, run, standing, folder)
    if standing and run.items() <= standing.saved.items():
        print(f"nothing to train: {folder / 'model.json'} was made of these records with these constants")
        (folder / "checkpoint.npz").unlink(missing_ok=True)
        return standing.saved["test"]
    with tensorflow_errors_named(work_dir):
        counts, held_out_counts = (count_windows(manifest, splits, work_dir) for splits in (["train"], ["val", "test"]))
        every_click = add_counts(counts, held_out_counts)
        counts = counts._replace(daily=every_click.daily)  # as served: no moment sees its own day or a later one
        scorer = make_scorer(strategy, Memory(counts, index), index, run["shape"])
        why_cold = why_cold or other_shape(standing.saved["arguments"], scorer.model.arguments)
        start = f"nothing: {why_cold}" if why_cold else f"the weights of the model of {standing.saved['date']}"
        if not why_cold:
            grow(standing.model, scorer.model)
        print(f"training starts from {start}; {settings['EPOCHS' if why_cold else 'WARM_EPOCHS']:,} epochs at most")
        run_from = run | {"from": None if why_cold else standing.saved["weights"]}
        weights, logs = fit(strategy, scorer, manifest, index, work_dir, run_from)
        if not is_first():
            return None
        scorer.model.set_weights(weights)
        scorer.refresh()
        return choose_and_publish(scorer, standing, counts, every_click, run, manifest, index, work_dir, logs)


def describe_run(settings, shape, manifest, index):
    """Return all that shapes a training, as it will be read from model.json again."""
    versions = {module.__name__: module.__version__ for module in (tf, keras, np)}
    versions["python"] = platform.python_version()
    records = {name: manifest[name] for name in MADE_WITH}
    run = dict(constants=settings, shape=shape, records=records, index=index.fingerprint(), versions=versions)
    return json.loads(json.dumps(run | {"columns_hold": fingerprint(index.columns)}))


def make_scorer(strategy, memory, index, shape):
    """Return the Scorer of a new model for what was counted."""
    shelves, dropout = shelves_table(index), dropout_for(memory.video_clicks)
    arguments = dict(num_videos=len(index.videos), num_columns=len(index.columns), column_map=bool(shelves.any()))
    with strategy.scope():
        model = build_model(**arguments | {"dropout": dropout} | shape, shelves=shelves)
    return Scorer(model, memory, index)


def is_first():
    """Return whether this process is the one that writes: the only one, or the first of its cluster."""
    return cluster_worker()[0] == 0


def make_strategy():
    """Return how to train: on the cluster of TF_CONFIG, on all GPUs of this machine, or on its one device."""
    worker, workers = cluster_worker()
    if workers > 1:
        warn(f"worker {worker} waits for all {workers} of TF_CONFIG, {CLUSTER_TIMEOUT} s at most")
        signal.alarm(CLUSTER_TIMEOUT)  # TensorFlow itself waits for ever, and lets no other thread run
        options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=CLUSTER_TIMEOUT)
        strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
        signal.alarm(0)
        return strategy
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def check_same_start(strategy, run, standing, folder):
    """Refuse to train where the workers of a cluster start from different things; each of them says so."""
    if cluster_worker()[1] == 1:
        return
    checkpoint = folder / "checkpoint.npz"
    start = run, standing and standing.saved["id"], checkpoint.exists() and file_fingerprint(checkpoint)
    number = {"start": int(fingerprint(*start)[:10], 16)}  # a sum of thousands is exact as a float
    if mean_of_workers(strategy, number) != number:
        what = "the workers of TF_CONFIG start from different records, models, checkpoints, constants or versions"
        raise InputError(f"{what}; give all the same WORK_DIR and the same scripts, and start them again")


# ---------------------------------------------------------------- fitting the towers


def fit(strategy, scorer, manifest, index, work_dir, run):
    """Train the scorer's towers; return (the weights of the best epoch, the folder of the run's logs).

    Epoch 0 is the weights as they come, where `run` says from which model. A checkpoint of the same run goes on.
    """
    model, memory, folder, constants = scorer.model, scorer.memory, Path(work_dir, "model"), run["constants"]
    epochs = constants["WARM_EPOCHS" if run["from"] else "EPOCHS"]
    rate = constants["LEARNING_RATE"] * (constants["WARM_RATE"] if run["from"] else 1)
    batches_of = functools.partial(epoch_batches, manifest, index, work_dir, memory, constants["SEED"])
    any_epoch = batches_of(0)  # for its length and its shapes
    with strategy.scope():
        schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * len(any_epoch), constants["LOWEST_RATE"])
        optimizer = MuonAdam(model, schedule, constants["KERNEL_RATE"])
    trends = tf.constant(memory.trend.table) if len(memory.trend.table) > 1 else None
    loss = functools.partial(training_loss, model, kind=constants["LOSS"], trends=trends)
    train_step = make_train_step(strategy, loss, optimizer, any_epoch.element_spec)
    validation = held_out(manifest, "val", work_dir)
    log_name, history, best = restore_checkpoint(folder, model, optimizer, run)
    print("epoch      loss   targets | validation HR@10   NDCG@10       MRR      GAUC | seconds")
    next_epoch = history[-1]["epoch"] + 1 if history else int(not run["from"])
    for epoch in range(next_epoch, epochs + 1):
        if epoch > best_epoch(history) + constants["PATIENCE"]:
            break
        clock = time.time()
        trained = train_epoch(train_step, batches_of(epoch), epoch, optimizer) if epoch else NO_LOSS
        metrics = mean_of_workers(strategy, validate(scorer, validation))  # so that all end at the same epoch
        history.append({"epoch": epoch, **trained, **metrics, "seconds": round(time.time() - clock, 1)})
        if best_epoch(history) == epoch:
            best = model.get_weights()
        if is_first():
            write_csv(folder / "history.csv", history[0], [row.values() for row in history])
            log(folder / "logs" / log_name, epoch, {name: history[-1][name] for name in ("loss", *metrics)})
            save_checkpoint(folder, model, optimizer, run, log_name, history, best)
        print_epoch(history)
    return best, folder / "logs" / log_name


def epoch_batches(manifest, index, work_dir, memory, seed, epoch):
    """Return the training batches of an epoch, in an order and with candidates of its own."""
    draw = seed * 1_000_000 + epoch
    batches = make_dataset(manifest, work_dir, seed=draw)
    batches = batches.map(lambda batch: batch | {"trend_row": memory.trend.rows(batch["asked"])})
    column_videos = column_table(index, memory.video_clicks)
    return add_candidates(batches, column_videos, memory.column_clicks, seed=draw)


def validate(scorer, users):
    """Return {metric: mean over users} of the towers as they are now."""
    scorer.refresh()
    ranks = ranks_of(users, scorer, lambda block: [("towers", scorer.towers(block))])
    return means(metrics_of(ranks["towers"], len(scorer.numbers)))


class MuonAdam:
    """Keras' Muon (Jordan et al. 2024) for kernels, its Adam (Kingma and Ba 2015) for small weights, and Adam by rows for tables.

    Muon moves a kernel by an orthogonal matrix, so in all directions by as much, however rarely one is used. Of the
    embeddings of videos and columns only the rows that a batch touched are updated; the others, and their moments, stand
    still. So a step costs the same however many videos there are, where Keras' Adam goes through the whole table.
    """

    beta_1, beta_2, epsilon = 0.9, 0.999, 1e-7  # of Adam

    def __init__(self, model, schedule, kernel_rate):
        tables = (model.video_embedding, model.column_embedding)
        self.tables = [table.value for table in tables]
        self.rest = [weight for weight in model.trainable_variables if all(weight is not table for table in tables)]
        self.schedule = schedule
        self.muon = keras.optimizers.Muon(
            lambda: kernel_rate * schedule(self.step), adam_lr_ratio=1 / kernel_rate,
            weight_decay=None, exclude_layers=[r"^(?!.*kernel)"],
        )  # fmt: skip
        # Keras 3.12, that of Python 3.10, has no such arguments, and looks for a variable's moments by its path.
        self.muon.rms_rate = self.muon.adam_weight_decay = None
        for weight in self.rest:
            weight.value.path = weight.path
        self.muon.build(self.rest)
        zeros = [tf.zeros_like(table) for table in self.tables]
        self.means, self.squares = ([tf.Variable(zero, trainable=False) for zero in zeros] for _ in range(2))
        self.variables = [*self.muon.variables, *self.means, *self.squares]

    @property
    def step(self):
        """How many updates were made."""
        return self.muon.iterations

    def apply(self, table_gradients, other_gradients):
        """Update all by their gradients, summed over the replicas; those of tables are tf.IndexedSlices."""
        table_gradients = tf.distribute.get_replica_context().all_reduce("SUM", table_gradients)
        step = tf.cast(self.step.value, tf.float32) + 1
        rate = self.schedule(self.step.value) * tf.sqrt(1 - self.beta_2**step) / (1 - self.beta_1**step)
        for table, mean, square, gradient in zip(self.tables, self.means, self.squares, table_gradients, strict=True):
            rows, place = tf.unique(gradient.indices)
            gradient = tf.math.unsorted_segment_sum(gradient.values, place, tf.size(rows))
            new_mean = self.beta_1 * tf.gather(mean, rows) + (1 - self.beta_1) * gradient
            new_square = self.beta_2 * tf.gather(square, rows) + (1 - self.beta_2) * gradient**2
            change = rate * new_mean / (tf.sqrt(new_square) + self.epsilon)
            for variable, values in ((mean, new_mean), (square, new_square), (table, tf.gather(table, rows) - change)):
                # A raw operation: each replica sets its own copy, the same as all others.
                tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=rows, updates=values)
        self.muon.apply(other_gradients)


def make_train_step(strategy, loss, optimizer, batch_spec):
    """Return train_step(batch) -> [loss, number of targets], which updates the model once.

    Every replica is given the whole batch and takes its own part of the windows.
    """

    def replica_step(batch):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        with tf.GradientTape() as tape:
            value = loss(batch, replica=replica, num_replicas=strategy.num_replicas_in_sync)
        variables = optimizer.tables, [weight.value for weight in optimizer.rest]
        optimizer.apply(*tape.gradient(value, variables, unconnected_gradients="zero"))
        return value

    @tf.function(input_signature=[batch_spec], autograph=False)  # no Python branches on tensors; a third of the tracing
    def train_step(batch):
        value = strategy.reduce("SUM", strategy.run(replica_step, args=(batch,)), axis=None)
        return tf.stack([value, tf.reduce_sum(batch["label"])])

    return train_step


def train_epoch(train_step, batches, epoch, optimizer):
    """Run an epoch; return its mean loss and its number of targets. A loss that is not finite raises InputError."""
    from tqdm import tqdm

    sums = np.zeros(2)
    steps = tqdm(batches, f"epoch {epoch}", len(batches), leave=False, unit="batch", disable=None)
    for step, batch in enumerate(steps, start=1):
        outcome = train_step(batch).numpy()
        if not np.isfinite(outcome).all():
            rate = float(optimizer.schedule(optimizer.step - 1))
            what = f"the loss is {outcome[0]} at step {step} of epoch {epoch} (learning rate {rate:.3g})"
            raise InputError(f"{what}; {NOT_FINITE}")
        sums += outcome
    return {"loss": float(sums[0] / step), "targets": int(sums[1])}


def mean_of_workers(strategy, values):
    """Return the mean of the numbers {name: value} over the workers of a cluster: the same in each of them."""
    if cluster_worker()[1] == 1:
        return values
    numbers = tf.constant(list(values.values()), tf.float64)
    means_of = strategy.reduce("MEAN", strategy.run(lambda: numbers), axis=None)
    return dict(zip(values, means_of.numpy().tolist(), strict=True))


def best_epoch(history):
    """Return the number of the epoch with the best validation NDCG, 0 before the first."""
    return max(history, key=lambda row: row["NDCG@10"], default={"epoch": 0})["epoch"]


# ---------------------------------------------------------------- evaluation: every current column is ranked for every user


def ranks_of(users, scorer, rankings):
    """Return {name: ranks [n]} of the targets of users, as of held_out(); scores that are not finite are refused.

    rankings(Users) yields (name, scores [n, current columns]).
    """
    ranks, at_once = {}, max(1, SCORES_AT_ONCE // len(scorer.numbers))
    for start in range(0, len(users["target_column"]), at_once):
        block = {name: values[start : start + at_once] for name, values in users.items()}
        longest = max(1, np.count_nonzero(block["user_feature"], axis=1).max())
        clicks = (block[name][:, :longest] for name in ("user_feature", "user_column", "user_time"))
        for name, scores in rankings(Users(*clicks, block["now"], block["now"])):
            if not np.isfinite(scores).all():
                raise InputError(f"{name!r} gives scores that are not finite; {NOT_FINITE}")
            places = np.searchsorted(scorer.numbers, block["target_column"])
            ranks.setdefault(name, []).append(rank_of(scores, places))
    return {name: np.concatenate(blocks) for name, blocks in ranks.items()}


def rank_of(scores, places):
    """Return the rank, from 1, of column places[i] among scores[i]; of equal scores the first column wins."""
    own = np.take_along_axis(scores, places[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < places[:, None]
    return 1 + np.count_nonzero((scores > own) | ((scores == own) & earlier), axis=1)


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


def choose_and_publish(scorer, standing, counts, every_click, run, manifest, index, work_dir, logs):
    """Choose the mix on validation, test it, count on all clicks, and publish; return the test's metrics."""
    validation, test = (held_out(manifest, split, work_dir) for split in ("val", "test"))
    constants, num_columns = run["constants"], len(scorer.numbers)
    plain = Mix(0.0, 0.0, 1.0, constants["HABIT_POPULARITIES"][0], constants["HABIT_HOURS"][0])
    use_memory = constants["MEMORY"]
    chosen = choose_mix(validation, scorer, constants) if use_memory else plain
    rankings = all_rankings(scorer, counts, chosen, use_memory, standing, index)
    ranks, of_validation = ranks_of(test, scorer, rankings), ranks_of(validation, scorer, rankings)
    table = make_table(ranks, test, num_columns) | {
        "validation": {row: means(metrics_of(of_row, num_columns)) for row, of_row in of_validation.items()},
        "mix": chosen._asdict(),
    }
    publish(Path(work_dir, "model"), scorer.model, every_click, index, run, table, ranks, test)
    lines = table_lines(table, chosen)
    print(*lines, sep="\n")
    log(logs, 0, {"test users": "".join(f"    {line}\n" for line in lines)})  # indented: code, in Markdown
    of_all = logs.with_name("all-runs")  # one curve for the life of the model
    number, gains = len(list(of_all.glob("*"))), {row: of["NDCG@10"] for row, of in table["test"].items()}
    log(of_all, number, {f"test NDCG@10/{row}": gain for row, gain in gains.items()})
    return table["test"]


def choose_mix(users, scorer, constants):
    """Return the Mix that is best for users, by their NDCG@10: first its factor, for the towers alone, then all else.

    Of a few hundred users the best of many mixes is best by luck: each counts as the mean with those one step of a weight
    away.
    """

    def gains_of(kinds, factors, weights):
        """Return {Mix: NDCG@10} of all these kinds, Mixes that differ in habit."""

        def rankings(block):
            clicked, parts = scorer.clicked(block.columns), scorer.parts(block, *kinds)
            for place, kind in enumerate(kinds, start=2):
                of_kind = parts[[0, 1, place]]
                for factor, (memory, habit) in itertools.product(factors, weights):
                    mix = kind._replace(memory_weight=memory, habit_weight=habit, clicked_factor=factor)
                    yield mix, mix.apply(of_kind, clicked)

        ranks = ranks_of(users, scorer, rankings)
        return {mix: metrics_of(of_mix, len(scorer.numbers))["NDCG@10"].mean() for mix, of_mix in ranks.items()}

    hours = constants["HABIT_HOURS"] if users["now"].any() else constants["HABIT_HOURS"][:1]
    kinds = [Mix(0.0, 0.0, 1.0, *habit) for habit in itertools.product(constants["HABIT_POPULARITIES"], hours)]
    gains = gains_of(kinds[:1], constants["CLICKED_FACTORS"], [(0.0, 0.0)])
    factor = max(gains, key=gains.get).clicked_factor
    sizes = sorted({0.0, *constants["MIX_WEIGHTS"]})
    gains = gains_of(kinds, [factor], [pair for pair in itertools.product(sizes, repeat=2) if sum(pair) < 1])

    def are_near(mix, other):
        steps = (abs(sizes.index(mix[part]) - sizes.index(other[part])) for part in range(2))
        return mix[2:] == other[2:] and sum(steps) <= 1

    return max(gains, key=lambda mix: np.mean([gains[other] for other in gains if are_near(mix, other)]))


def all_rankings(scorer, counts, chosen, use_memory, standing, index):
    """Return rankings(Users), which yields (name, scores [n, current columns]); the last one is what will be published.

    They are of four simple baselines, of the model that stands, of the parts of the new one, and of their mix.
    """
    rng, num_numbers, memory = np.random.default_rng(0), 1 + len(index.columns), scorer.memory
    chain = CountTable(counts.follows, num_numbers, num_numbers)
    nudge = 1e-6 * scorer.of_current(memory.popularity[None])  # of columns equal otherwise, the popular one first
    if standing:  # counted in the training records, as the new one
        stood = Scorer(standing.model, Memory(counts, index, standing.saved["constants"]), index)
    plain = chosen._replace(memory_weight=0.0, habit_weight=0.0, clicked_factor=1.0)
    rows = {"towers": plain}
    if use_memory:
        rows |= {"memory": plain._replace(memory_weight=1.0), "habit": plain._replace(habit_weight=1.0), "mix": chosen}

    def rankings(users):
        yield "random", rng.random((len(users.columns), len(scorer.numbers)))
        yield "popularity", scorer.of_current(memory.recent_popularity(users.now)) + nudge
        recent = recency(users.columns > 0, 0.8)
        yield "own columns", scorer.of_current(sum_by_number(users.columns, recent, num_numbers)) + nudge
        follows = chain.weighted_rows(users.columns, recent / np.maximum(chain.totals[users.columns], 1))
        yield "chain", scorer.of_current(follows) + nudge
        if standing:
            yield "standing", stood.probabilities(users, standing.mix)
        parts, clicked = scorer.parts(users, plain), scorer.clicked(users.columns)
        for name, mix in rows.items():
            yield name, mix.apply(parts, clicked)

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
    for name, in_slice in slices_of(users).items():
        gains = {row: of_row["NDCG@10"][in_slice] for row, of_row in metrics.items()}
        number = int(in_slice.sum())
        slices[name] = {"users": number} | (means(gains) if number else dict.fromkeys(gains))
    return {"test": test, "slices": slices, "notes": list(notes_on(metrics, num_columns))}


def slices_of(users):
    """Return {slice: which users are in it, bool [n]}; those of the gap between last click and visit where times are known."""
    history, before = users["history"], clicked_before(users)
    middle, timed = int(np.median(history)), users["now"] > 0
    slices = {
        f"up to {middle} clicks": history <= middle, f"more than {middle}": history > middle,
        "clicked before": before, "never clicked": ~before,
    }  # fmt: skip
    gap, shorter = users["now"] - users["user_time"].max(axis=1), -1
    for name, seconds in GAPS.items() if timed.any() else ():
        slices[name] = timed & (gap > shorter) & (gap <= seconds)
        shorter = seconds
    return slices


def clicked_before(users):
    """Return whether each user's target is among the columns of the clicks that are read, bool [n]."""
    return (users["user_column"] == users["target_column"][:, None]).any(axis=1)


def interval(values):
    """Return the 95 % interval of a mean over users, by its standard error."""
    error = 1.96 * np.std(values) / len(values) ** 0.5
    return [float(np.mean(values) - error), float(np.mean(values) + error)]


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
        of_row = ["-" if gains[row] is None else f"{gains[row]:.4f}" for gains in slices.values()]
        lines.append(f"{row:12}" + "".join(f"{gain:>18}" for gain in of_row))
    habit = f"habit {chosen.habit_weight} (popularity {chosen.habit_popularity}, hours {chosen.habit_hours})"
    by = f"memory {chosen.memory_weight}, {habit}, factor for clicked columns {chosen.clicked_factor}"
    if chosen.habit_weight and chosen.habit_hours:
        by += ". Where infer.py supposes the moment, habit counts all hours alike"
    return [*lines, f"The model ranks by {list(test)[-1]!r}: {by}", *(f"Note: {note}." for note in table["notes"])]


# ---------------------------------------------------------------- the model that stands


class Standing(NamedTuple):
    """A published model."""

    model: keras.Model
    counts: Counts
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
            if read_json(path, "train.py") != saved:
                raise InputError(f"{path}: a new model was published just now; run this again")
            raise InputError(f"{file}: gone or damaged, not what {path} was written with; run train.py again")
    then = saved["index"]
    now = index.fingerprint(then["videos"], then["columns"])  # of a grown index it is the same
    check_same(path, {"indexing/vid2idx.json": then}, {"indexing/vid2idx.json": now}, "get_tfrecord.py and train.py")
    with damage_named(weights):
        shelves = shelves_table(index, saved["constants"]["VIDEO_COLUMNS"], saved["arguments"]["num_columns"])
        model = build_model(**saved["arguments"], shelves=shelves)
        model.load_weights(weights)
    with damage_named(memory):
        return Standing(model, Counts.load(memory), Mix(**saved["mix"]), saved)


@contextlib.contextmanager
def damage_named(path):
    """Turn what reading a damaged file raises into an InputError that names it."""
    try:
        yield
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: damaged ({error}); remove it and run train.py again") from error


def find_standing(work_dir, index, run):
    """Return (the Standing model to compare with, None without; why training starts from nothing, None where it may not)."""
    try:
        standing = load_model(work_dir, index)
    except FileNotFoundError:
        return None, "no model stands"
    except InputError as error:
        warn(error)
        return None, "the model that stands cannot be used"
    if is_first():
        end_publishing(Path(work_dir, "model"), standing.saved)  # of a run that was killed then
    then, now = standing.saved["records"], run["records"]
    if now["held_out_share"] > then["held_out_share"]:
        return None, f"a share of {now['held_out_share']} of the users is held out, {then['held_out_share']} until now"
    was_timed, is_timed = dict(then["held_out"]), dict(now["held_out"])  # of each user, by the draw
    both = was_timed.keys() & is_timed.keys()
    if 20 * len(both) < len(was_timed):
        return None, "the users are others than those of the model that stands, by their uids"
    rules = [[of["constants"][name] for name in ("VISIT_GAP", "MIN_HISTORY")] for of in (then, now)]
    if rules[0] != rules[1] or 20 * sum(was_timed[user] != is_timed[user] for user in both) > len(both):
        return None, "other clicks are held out: times came or went, or VISIT_GAP or MIN_HISTORY is another"
    return standing, None if run["constants"]["WARM_START"] else "WARM_START is False"


def other_shape(saved, now):
    """Return in words how a model's arguments differ from those saved, None where its weights fit all the same."""
    for name, value in now.items():
        if saved.get(name) != value and name not in ("num_videos", "num_columns", "dropout"):
            return f"the model that stands has {name} = {saved.get(name)}, now it is {value}"
    return None


def grow(old, new):
    """Give the new model the old one's weights. A new video starts as the mean of the old ones, beside its shelves; a new
    column as none, since it is scored by its videos."""
    for before, variable in zip(old.weights, new.weights, strict=True):
        rows = before.numpy()
        if variable is new.video_embedding:
            new_rows = np.tile(rows[FIRST_VIDEO:].mean(axis=0), [variable.shape[0] - len(rows), 1])
            rows = np.concatenate([rows, new_rows])
        elif variable is new.column_embedding:
            rows = np.pad(rows, [(0, variable.shape[0] - len(rows)), (0, 0)])
        variable.assign(rows)


def publish(folder, model, counts, index, run, table, ranks, users):
    """Write weights, counts and tables under a new id; then model.json, whose rename publishes all."""
    identity = uuid.uuid4().hex[:16]
    weights, memory_file = (folder / f"{identity}.{kind}" for kind in ("weights.h5", "memory.npz"))
    for path, save in ((weights, model.save_weights), (memory_file, counts.save)):
        with replacing(path) as temporary:
            save(temporary)
    files = dict(weights=weights, memory=memory_file)
    saved = dict(format=MODEL_FORMAT, id=identity, date=time.strftime("%Y-%m-%d %H:%M:%S"), arguments=model.arguments)
    saved |= {part: {"file": path.name, "sha256": file_fingerprint(path)} for part, path in files.items()}
    saved |= run | table
    write_json(folder / f"{identity}.metrics.json", table)
    write_test(folder / f"{identity}.test.csv", ranks, users, list(index.columns))
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
    """Write test.csv: one line a test user, with the target and its rank in every row of the table."""
    columns = [
        [uid.decode() for uid in users["uid"]],
        users["history"].tolist(),
        [cids[number - 1] for number in users["target_column"]],
        clicked_before(users).astype(int).tolist(),
        *(of_row.tolist() for of_row in ranks.values()),
    ]
    write_csv(path, ["uid", "history", "target", "clicked_before", *ranks], zip(*columns, strict=True))


def write_csv(path, head, rows):
    """Replace path by a table."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


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
                best = [arrays[f"best{i:04}"] for i in range(len(model.weights))]
                print(f"going on after epoch {state['history'][-1]['epoch']} of {path}")
                return state["log_name"], state["history"], best
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{'warm' if run['from'] else 'cold'}", [], None


def print_epoch(history):
    """Print the last epoch's row; * marks the best so far."""
    row = history[-1]
    loss = "        -         -" if row["loss"] is None else "{loss:9.4f} {targets:9,}".format(**row)
    metrics = "{HR@10:17.4f} {NDCG@10:9.4f} {MRR:9.4f} {GAUC:9.4f}".format(**row)
    best = " *" if best_epoch(history) == row["epoch"] else ""
    print(f"{row['epoch']:5} {loss} |{metrics} |{row['seconds']:8.1f}{best}")


def log(folder, step, values):
    """Log numbers and texts {name: value} for TensorBoard, where that is installed: TensorFlow no longer brings it."""
    if importlib.util.find_spec("tensorboard"):
        with tf.summary.create_file_writer(str(folder)).as_default(step):
            for name, value in values.items():
                if value is not None:
                    (tf.summary.text if type(value) is str else tf.summary.scalar)(name, value)


def say_if_clicks_changed(work_dir, data_dir=DATA_DIR):
    """Print a line where the click files are others than those that the records were made of, by their content."""
    folder, was = Path(data_dir, "click_seq"), read_if_whole(Path(work_dir, "tfrecord/manifest.json")).get("input")
    if not folder.is_dir() or not was:
        return
    try:
        now = digests(survey(folder, num_workers=1))
    except InputError as error:
        return warn(error)
    if others := sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name)):
        what = f"the clicks changed since the records were made ({', '.join(others[:3])})"
        warn(f"{folder}: {what}; run get_tfrecord.py first to train on them")


def main():
    with only_one(WORK_DIR, cluster_worker()[0]):
        say_if_clicks_changed(WORK_DIR)
        train()


if __name__ == "__main__":
    run_script(__file__)
