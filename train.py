"""Train the towers, count the memory, choose how to mix them, and measure it all beside simple baselines.

Reads   WORK_DIR/tfrecord/, WORK_DIR/indexing/
Writes  WORK_DIR/model/<hash>.weights.h5   the towers' best weights so far
        WORK_DIR/model/<hash>.memory.npz   the memory
        WORK_DIR/model/model.json          last: which of them belong together and how to rebuild the model
        WORK_DIR/model/history.csv         one line an epoch
        WORK_DIR/model/metrics.json        the table that is printed at the end, on the test split
        WORK_DIR/model/checkpoint.npz      where a run that was killed goes on
        WORK_DIR/model/logs/               for TensorBoard, where it is installed

    python train.py
"""

import contextlib
import csv
import importlib.util
import itertools
import json
import os
import platform
import signal
import sys
import time
import zipfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from get_dataset import (
    ITEM_MAX_LEN,
    PARSE_BLOCK,
    PairCounter,
    add_candidates,
    column_table,
    first_seen,
    load_manifest,
    make_dataset,
    parse_block,
)
from get_indexing import (
    WORK_DIR,
    InputError,
    cluster_place,
    constants,
    file_fingerprint,
    fingerprint,
    load_index,
    read_json,
    remove_leftovers,
    replacing,
    run_script,
    write_json,
)
from get_tfrecord import USER_MAX_LEN
from model_tf2 import (
    LOSS,
    MEMORY_CLICKS,
    PLAIN_TOWERS,
    Memory,
    Mix,
    build_model,
    count_clicks,
    count_memories,
    mix,
    training_loss,
)

EPOCHS = 12  # at most; the learning rate falls along a cosine over so many
PATIENCE = 4  # epochs without a better validation NDCG@10 before training ends
LEARNING_RATE = 3e-3  # of Adam, at the start
LOWEST_RATE = 0.02  # of LEARNING_RATE, at the end
SEED = 1  # of weights, dropout, shuffling and negatives
MEMORY = True  # False leaves the plain two towers
MEMORY_DECAYS = (0.6, 0.3, 0.9)  # per click between two that are counted as near; chosen on validation
OWN_WEIGHTS = (0.05, 0.0, 0.02, 0.1, 0.2, -0.05)  # of the user's own columns in the memory; chosen on validation
MEMORY_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of the memory in the mix; chosen on validation
TEMPERATURES = (1.0, 1.5)  # of the towers' softmax in the mix; chosen on validation
CLUSTER_TIMEOUT = 600  # seconds that a worker waits for the others
SCORES_AT_ONCE = 4_000_000  # numbers in a block of evaluated scores: bounds the memory needed
MODEL_FORMAT = 1  # of model.json


def train(work_dir=WORK_DIR, user_max_len=USER_MAX_LEN, epochs=EPOCHS, patience=PATIENCE, learning_rate=LEARNING_RATE,
          loss=LOSS, memory=MEMORY, seed=SEED, **arguments):  # fmt: skip
    """Train on the records under work_dir and return the metrics of the test split, {ranking: {metric: value}}.

    arguments are BST_DSSM's. A run that was killed goes on after its last finished epoch, to the same weights. In a
    cluster (TF_CONFIG) every worker calls this; the first one writes and returns the metrics, the others return None.
    """
    strategy = make_strategy()
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()
    manifest, index = load_manifest(work_dir, user_max_len)
    folder, clicks = Path(work_dir, "model"), count_clicks(manifest, index, work_dir)
    column_videos = column_table(index, clicks.video_clicks)
    steps = len(make_dataset(manifest, "train", work_dir))
    with strategy.scope():
        model = build_model(num_videos=len(index.videos), num_columns=len(index.columns), **arguments)
        schedule = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps, LOWEST_RATE)
        optimizer = LazyAdam(model.trainable_variables, schedule)
    score = target_scorer(model, column_videos)
    validation = make_dataset(manifest, "val", work_dir)

    used = constants("get_indexing", "get_dataset", "model_tf2", "train")
    run = fingerprint(used, manifest, index.columns, epochs, learning_rate, loss, seed, model.arguments, versions())
    history, is_first, train_step = restore_checkpoint(folder, model, optimizer, run), cluster_place()[0] == 0, None
    while len(history) < epochs and len(history) < best_epoch(history) + patience:
        epoch, started = len(history) + 1, time.time()
        draw = seed * 1_000_000 + epoch
        batches = make_dataset(manifest, "train", work_dir, seed=draw)
        batches = add_candidates(batches, column_videos, clicks.column_clicks, len(index.videos), seed=draw)
        train_step = train_step or make_train_step(strategy, model, optimizer, batches.element_spec, loss)
        with lost_worker_named():
            losses = train_epoch(train_step, batches, epoch, optimizer, manifest, work_dir)
            metrics = evaluate(validation, score, lambda logits, *_: [("towers", logits)], strategy)["towers"]
        history.append({"epoch": epoch, **losses, **metrics, "seconds": round(time.time() - started, 1)})
        if is_first:
            if best_epoch(history) == epoch:
                save_model(folder, model, clicks, PLAIN_TOWERS, manifest, index, metrics, run)
            write_history(folder, history)
            log_tensorboard(folder / "logs", history[-1])
            save_checkpoint(folder, model, optimizer, run, history)
        print(", ".join(f"{k} {v:,.4g}" if type(v) is float else f"{k} {v:,}" for k, v in history[-1].items()))
    if not is_first:
        return None

    saved = read_json(folder / "model.json", "train.py")
    model.load_weights(folder / saved["weights"]["file"])
    chosen = PLAIN_TOWERS
    if memory:
        memories = count_memories(manifest, index, clicks, MEMORY_DECAYS, work_dir)
        chosen = choose_mix(validation, score, memories)
        clicks = memories[chosen.decay]
    test = evaluate(make_dataset(manifest, "test", work_dir), score, all_rankings(manifest, clicks, chosen, work_dir))
    save_model(folder, model, clicks, chosen, manifest, index, saved["validation"], run)
    write_json(folder / "metrics.json", {"test": test, "validation": saved["validation"], "mix": chosen._asdict()})
    print_table(test, chosen)
    return test


def make_strategy():
    """Return how to train: on the cluster of TF_CONFIG, on all GPUs of this machine, or on its one device."""
    if "TF_CONFIG" in os.environ:
        place, places = cluster_place()
        print(
            f"worker {place} waits for all {places} of TF_CONFIG; after {CLUSTER_TIMEOUT} s an alarm ends it",
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


# ---------------------------------------------------------------- one epoch


class LazyAdam:
    """Adam (Kingma and Ba 2015) that updates only those rows of an embedding that the batch touched.

    On these rows it does what Keras' Adam does; the others, and their moments, stand still. So a step costs the same
    however many videos there are, where Keras' Adam goes through the whole table in every step.
    """

    def __init__(self, parameters, schedule, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
        self.parameters = [parameter.value for parameter in parameters]
        self.schedule, self.beta_1, self.beta_2, self.epsilon = schedule, beta_1, beta_2, epsilon
        self.step = tf.Variable(0.0, trainable=False)
        self.means = [tf.Variable(tf.zeros_like(parameter), trainable=False) for parameter in self.parameters]
        self.squares = [tf.Variable(tf.zeros_like(parameter), trainable=False) for parameter in self.parameters]
        self.variables = [self.step, *self.means, *self.squares]

    def apply(self, gradients):
        """Update the parameters by their gradients, dense or tf.IndexedSlices, summed over the replicas."""
        gradients = tf.distribute.get_replica_context().all_reduce("SUM", gradients)
        rate, step = self.schedule(self.step.read_value()), self.step.read_value() + 1
        tf.raw_ops.AssignVariableOp(resource=self.step.handle, value=step)
        rate *= tf.sqrt(1 - self.beta_2**step) / (1 - self.beta_1**step)
        for variables in zip(self.parameters, self.means, self.squares, gradients, strict=True):
            self.update(*variables, rate)

    def update(self, parameter, mean, square, gradient, rate):
        """Update one parameter. Each replica writes its own copy, the same as all others: so by the raw operations."""
        raw = tf.raw_ops
        if isinstance(gradient, tf.IndexedSlices):
            rows, place = tf.unique(gradient.indices)
            gradient = tf.math.unsorted_segment_sum(gradient.values, place, tf.size(rows))
            read = lambda table: tf.gather(table, rows)
            write = lambda table, new: raw.ResourceScatterUpdate(resource=table.handle, indices=rows, updates=new)
        else:
            read = lambda variable: variable.read_value()
            write = lambda variable, new: raw.AssignVariableOp(resource=variable.handle, value=new)
        new_mean = self.beta_1 * read(mean) + (1 - self.beta_1) * gradient
        new_square = self.beta_2 * read(square) + (1 - self.beta_2) * gradient**2
        write(mean, new_mean)
        write(square, new_square)
        write(parameter, read(parameter) - rate * new_mean / (tf.sqrt(new_square) + self.epsilon))


def make_train_step(strategy, model, optimizer, batch_spec, loss):
    """Return train_step(batch) -> [loss, loss of the columns, number of targets], which updates the model once.

    Every replica is given the whole batch and takes its own part of the windows.
    """

    def replica_step(batch):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        with tf.GradientTape() as tape:
            losses = training_loss(model, batch, loss, replica=replica, num_replicas=strategy.num_replicas_in_sync)
        optimizer.apply(tape.gradient(losses[0], model.trainable_variables))
        return tf.stack(losses)

    @tf.function(input_signature=[batch_spec])
    def train_step(batch):
        losses = strategy.reduce("SUM", strategy.run(replica_step, args=(batch,)), axis=None)
        return tf.concat([losses, [tf.reduce_sum(batch["label"])]], axis=0)

    return train_step


def train_epoch(train_step, batches, epoch, optimizer, manifest, work_dir):
    """Run an epoch; return its mean losses and its number of targets. A loss that is not finite raises InputError."""
    sums = np.zeros(3)
    bar = tqdm(batches, total=len(batches), desc=f"epoch {epoch}", unit="batch", disable=None)
    for step, batch in enumerate(bar, start=1):
        outcome = train_step(batch).numpy()
        if not np.isfinite(outcome).all():
            rate, shards = float(optimizer.schedule(optimizer.step - 1)), shards_of(batch, manifest, work_dir)
            raise InputError(
                f"the loss is {outcome[0]} at step {step} of epoch {epoch} (learning rate {rate:.3g}, windows of "
                f"{', '.join(shards)}); the best weights so far are kept; lower LEARNING_RATE and run train.py again"
            )
        sums += outcome
    return {"loss": float(sums[0] / step), "column_loss": float(sums[1] / step), "targets": int(sums[2])}


def shards_of(batch, manifest, work_dir):
    """Yield the names of the training shards that hold windows of a batch's users."""
    uids = batch["uid"].numpy()
    for name in manifest["shards"]:
        if name.startswith("train"):
            blocks = tf.data.TFRecordDataset(str(Path(work_dir, "tfrecord", name))).batch(PARSE_BLOCK).map(parse_block)
            if any(np.isin(block["uid"], uids).any() for block in blocks.as_numpy_iterator()):
                yield name


@contextlib.contextmanager
def lost_worker_named():
    """Turn what TensorFlow raises where another worker of the cluster is lost into an InputError."""
    try:
        yield
    except tf.errors.OpError as error:
        place, places = cluster_place()
        if places == 1:
            raise
        raise InputError(
            f"worker {place} of {places} lost another one ({type(error).__name__}); start all workers again, and they go on "
            "after the last finished epoch"
        ) from error


def best_epoch(history):
    """Return the number of the epoch with the best validation NDCG, 0 before the first."""
    return max(history, key=lambda row: row["NDCG@10"], default={"epoch": 0})["epoch"]


# ---------------------------------------------------------------- evaluation: every column is ranked for every target


def target_scorer(model, column_videos):
    """Return a function from batches to blocks of their targets: (logits [n, columns], videos [n, h], columns [n, h],
    targets [n]), where the histories [n, h] before each target are as Memory.scores() takes them."""

    @tf.function(reduce_retracing=True)
    def target_logits(batch, columns):
        users = model.user_vectors(batch["user_feature"], batch["user_column"])
        return model.logits(tf.boolean_mask(users, batch["label"] > 0), columns)

    def score(batches):
        columns = model.column_vectors(column_videos[1:], np.arange(1, len(column_videos)))
        for batch in batches:
            rows, at = np.nonzero(batch["label"].numpy())
            clicks = at[:, None] - np.arange(MEMORY_CLICKS)
            videos, clicked = (
                np.where(clicks >= 0, batch[name].numpy()[rows[:, None], np.maximum(clicks, 0)], 0)
                for name in ("user_feature", "user_column")
            )
            outputs = target_logits(batch, columns).numpy(), videos, clicked, batch["target_column"].numpy()[rows, at]
            yield from zip(
                *(np.array_split(x, 1 + len(rows) * len(columns) // SCORES_AT_ONCE) for x in outputs), strict=True
            )

    return score


def evaluate(batches, score, rankings, strategy=None):
    """Return {name: metrics} of what rankings(logits, videos, columns) yields for every block: (name, scores).

    With the strategy of a cluster each worker evaluates its part of the windows, and all return the same.
    """
    place, places = cluster_place() if strategy else (0, 1)
    if places > 1:
        batches = ({name: value[place::places] for name, value in batch.items()} for batch in batches)
    sums = {}
    for *inputs, targets in score(batches):
        for name, scores in rankings(*inputs):
            metrics = metrics_of(rank_of(scores, targets), scores.shape[1])
            of_block = np.array([*(values.sum() for values in metrics.values()), len(targets)])
            sums[name] = sums.get(name, 0) + of_block
    if places > 1:
        sums = {name: sum_over_workers(strategy, places, of) for name, of in sums.items()}
    return {name: dict(zip(metrics, (of[:-1] / of[-1]).tolist(), strict=True)) for name, of in sums.items()}


def sum_over_workers(strategy, workers, values):
    """Return the sum of the workers' arrays of values."""
    values = tf.constant(values * workers / strategy.num_replicas_in_sync)  # a worker may have several replicas
    parts = strategy.experimental_distribute_values_from_function(lambda _: values)
    return strategy.reduce("SUM", parts, axis=None).numpy()


def rank_of(scores, targets):
    """Return the rank, from 1, of column number targets[i] among scores[i]; of equal scores the first column wins."""
    own = np.take_along_axis(scores, targets[:, None] - 1, axis=1)
    earlier = np.arange(scores.shape[1]) < targets[:, None] - 1
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
        "GAUC": (num_columns - ranks) / max(num_columns - 1, 1),
    }


def choose_mix(batches, score, memories):
    """Return the Mix with the best NDCG@10 on batches: first of the memory's own constants, then of its weight.

    A weight is judged by the mean of its own NDCG and those of the next lower and higher weight: a lone peak is noise.
    """

    def memory_alone(_, videos, columns):
        for decay, memory in memories.items():
            near, own = memory.near(videos, columns), memory.own(columns)
            for own_weight in OWN_WEIGHTS:
                yield Mix(decay, own_weight, 1.0, 1.0), near + own_weight * own

    results = evaluate(batches, score, memory_alone)
    best = max(results, key=lambda choice: results[choice]["NDCG@10"])

    def mixed(logits, videos, columns):
        remembered = memories[best.decay].scores(videos, columns, best.own_weight)
        for memory_weight, temperature in itertools.product(MEMORY_WEIGHTS, TEMPERATURES):
            yield (memory_weight, temperature), mix(logits, remembered, memory_weight, temperature)

    results = evaluate(batches, score, mixed)

    def steady(place, temperature):
        weights = MEMORY_WEIGHTS[max(place - 1, 0) : place + 2]
        return np.mean([results[weight, temperature]["NDCG@10"] for weight in weights])

    choices = itertools.product(range(len(MEMORY_WEIGHTS)), TEMPERATURES)
    place, temperature = max(choices, key=lambda choice: steady(*choice))
    return Mix(best.decay, best.own_weight, MEMORY_WEIGHTS[place], temperature)


def all_rankings(manifest, memory, chosen, work_dir):
    """Return what ranks the test split, for evaluate(): baselines, the parts of the model, and their mix."""
    rng, chain = np.random.default_rng(0), count_chain(manifest, len(memory.popularity), work_dir)
    nudge = 1e-6 * memory.popularity  # of columns that are equal otherwise, the popular one first

    def rankings(logits, videos, columns):
        yield "random", rng.random(logits.shape)
        yield "popularity", np.broadcast_to(memory.popularity, logits.shape)
        yield "own columns", memory.own(columns) + nudge
        recency = np.where(columns > 0, 0.8 ** (np.cumsum(columns > 0, axis=1) - 1), 0)  # the last column click first
        yield "chain", chain.weighted_rows(columns, recency / np.maximum(chain.totals[columns], 1)) + nudge
        yield "towers", logits
        if chosen != PLAIN_TOWERS:
            remembered = memory.scores(videos, columns, chosen.own_weight)
            yield "memory", remembered
            yield "mix", mix(logits, remembered, chosen.memory_weight, chosen.temperature)

    return rankings


def count_chain(manifest, num_columns, work_dir):
    """Return the CountTable of which column was clicked next after which, in the training split."""
    chain = PairCounter(1 + num_columns, num_columns, num_columns)
    for _, columns, new in first_seen(manifest, "train", work_dir):
        rows, at = np.nonzero(columns)
        clicked = columns[rows, at]
        follows = (rows[1:] == rows[:-1]) & new[rows, at][1:]
        chain.add(clicked[:-1][follows], clicked[1:][follows], 1.0)
    return chain.table()


def print_table(test, chosen):
    """Print the metrics of every ranking, and where a baseline beats the model."""
    names = list(next(iter(test.values())))
    print(f"\n{'test split':12}" + "".join(f"{name:>9}" for name in names))
    for ranking, values in test.items():
        print(f"{ranking:12}" + "".join(f"{values[name]:9.4f}" for name in names))
    final = list(test)[-1]
    print(f"The model ranks by {final!r}: {chosen}")
    for name in names:
        best = max(test, key=lambda ranking: test[ranking][name])
        if test[best][name] > test[final][name]:
            print(f"Note: {best!r} is better than {final!r} in {name}.")


# ---------------------------------------------------------------- what is kept


def save_model(folder, model, memory, chosen, manifest, index, metrics, run):
    """Write weights and memory under names of their own hash, then model.json, which vouches for them."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".room.tmp", "wb") as room:  # h5py does not survive a full disk, so ask for the room before
        os.posix_fallocate(room.fileno(), 0, 2**20 + sum(weight.numpy().nbytes for weight in model.weights))
    remove_leftovers(folder)
    weights = save_by_hash(folder, ".weights.h5", model.save_weights)
    remembered = save_by_hash(folder, ".memory.npz", memory.save)
    write_json(
        folder / "model.json",
        {
            "format": MODEL_FORMAT,
            "weights": weights,
            "memory": remembered,
            "mix": chosen._asdict(),
            "arguments": model.arguments,
            "user_max_len": manifest["constants"]["USER_MAX_LEN"],
            "item_max_len": ITEM_MAX_LEN,
            "constants": fingerprint(constants("model_tf2")),
            "index": index.fingerprint(),
            "records": fingerprint(manifest),
            "run": run,
            "validation": metrics,
            "versions": versions(),
        },
    )
    for path in [*folder.glob("*.weights.h5"), *folder.glob("*.memory.npz"), *folder.glob(".*.tmp*")]:
        if path.name not in (weights["file"], remembered["file"]):
            path.unlink()


def save_by_hash(folder, suffix, write):
    """Write a file by write(path), name it by its SHA-256 and return {"file": name, "sha256": hash}."""
    new = folder / f".new{suffix}"
    write(new)
    sha256 = file_fingerprint(new)
    name = f"{sha256[:16]}{suffix}"
    with replacing(folder / name) as temporary:
        new.rename(temporary)
    return {"file": name, "sha256": sha256}


def load_model(work_dir=WORK_DIR):
    """Return (model, memory, mix, what model.json says), after checking that they and the index belong together."""
    folder, index = Path(work_dir, "model").absolute(), load_index(work_dir)
    path = folder / "model.json"
    saved = read_json(path, "train.py")
    if saved.get("format") != MODEL_FORMAT:
        raise InputError(f"{path}: format {saved.get('format')}, not {MODEL_FORMAT}; run train.py again")
    index.check(saved["index"], path, "get_tfrecord.py and train.py")
    if saved["constants"] != fingerprint(constants("model_tf2")):
        raise InputError(f"{path}: a constant of model_tf2.py was edited since; restore it or run train.py again")
    for part in (saved["weights"], saved["memory"]):
        if not (folder / part["file"]).exists() or file_fingerprint(folder / part["file"]) != part["sha256"]:
            raise InputError(f"{folder / part['file']}: not the file that {path} was written with; run train.py again")
    weights, memory = (folder / saved[part]["file"] for part in ("weights", "memory"))
    with damage_named(weights):
        model = build_model(**saved["arguments"])
        model.load_weights(weights)
    with damage_named(memory):
        return model, Memory.load(memory), Mix(**saved["mix"]), saved


@contextlib.contextmanager
def damage_named(path):
    """Turn what reading a damaged file raises into an InputError that names it."""
    try:
        yield
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: damaged ({error}); remove it and run train.py again") from error


def save_checkpoint(folder, model, optimizer, run, history):
    """Write all that a run needs to go on after its last epoch."""
    arrays = {f"{i:04}": v.numpy() for i, v in enumerate(model.variables + optimizer.variables)}
    with replacing(folder / "checkpoint.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, state=json.dumps({"run": run, "history": history}), **arrays)


def restore_checkpoint(folder, model, optimizer, run):
    """Set the variables as the same run's last finished epoch left them; return its history, [] if there is none."""
    path = folder / "checkpoint.npz"
    if not path.exists() or not (folder / "model.json").exists():
        return []
    if read_json(folder / "model.json", "train.py").get("run") != run:
        return []
    with damage_named(path), np.load(path) as saved:
        state = json.loads(str(saved["state"]))
        if state["run"] == run:
            for i, variable in enumerate(model.variables + optimizer.variables):
                variable.assign(saved[f"{i:04}"])
    if state["run"] != run:
        return []
    print(f"going on after epoch {len(state['history'])} of {path}")
    return state["history"]


def write_history(folder, history):
    """Write history.csv, a line for each epoch."""
    with replacing(folder / "history.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)


def log_tensorboard(folder, row):
    """Log a row of the history for TensorBoard, where that is installed: TensorFlow no longer brings it."""
    if importlib.util.find_spec("tensorboard"):
        with tf.summary.create_file_writer(str(folder)).as_default(step=row["epoch"]):
            for name, value in row.items():
                tf.summary.scalar(name, value)


def versions():
    """Return the versions of what the weights depend on."""
    return {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
    }


def main():
    train()


if __name__ == "__main__":
    run_script(main)
