"""Training on several workers, or on several devices of one, equals training on one."""

import csv
import json
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
from bench.kill_battery import wait_for
from cluster import QUIET, ROOT, addresses, as_the_readme_says, copy_of, python, run, small_folder, well
from conftest import edit


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A folder ready to train: 2 epochs of 6 or so steps without dropout, shards of very different sizes."""
    folder = small_folder(tmp_path_factory.mktemp("training") / "records", EPOCHS=2)
    python(folder, "get_indexing")
    python(folder, "get_tfrecord")
    return folder


@pytest.fixture(scope="module")
def alone(records):
    """A folder in which one process trained."""
    folder = copy_of(records, "alone")
    python(folder, "train")
    return folder


def start_workers(*folders):
    """Start a training cluster of two workers, one in each of the folders; or its first one alone."""
    cluster = {"worker": addresses(2)}
    return [
        run([sys.executable, "train.py"], folder,
            TF_CONFIG=json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}))
        for index, folder in enumerate(folders)
    ]  # fmt: skip


def arrays_of(folder):
    """The trained weights that stand in a folder, and its history without the seconds."""
    (path,) = (folder / "data/work/model").glob("*.weights.h5")
    arrays = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, node: arrays.update({name: node[()]}) if isinstance(node, h5py.Dataset) else None)
    with open(folder / "data/work/model/history.csv") as file:
        history = [{k: float(v) for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    return arrays, history


def assert_same(folder, other):
    """99 of 100 weights within 1e-3, all within .02, and the history within 1e-3.

    Adam divides by the size of the gradient, so a unit whose gradient is all rounding may take a step either way.
    """
    (arrays, history), (others, other_history) = arrays_of(folder), arrays_of(other)
    assert arrays.keys() == others.keys() and len(arrays) > 10
    for name in arrays:
        difference = np.abs(arrays[name] - others[name])
        assert np.mean(difference > 1e-3) <= 0.01 and np.max(difference, initial=0) < 0.02, name
    assert history == [pytest.approx(row, abs=1e-3) for row in other_history] and len(history) == 2


def epochs_of(out):
    """The rows of the table of epochs that a training printed, without the seconds."""
    return [line.rpartition("|")[0] for line in out.splitlines() if line[:5].strip().isdigit()]


def test_the_two_workers_of_the_readme_train_what_one_process_trains_and_save_it_once(records, alone):
    """Few steps; dropout 0. The loss, the targets and the validation metrics are those of all users, each counted once."""
    folder = copy_of(records, "two")
    epochs = sorted(epochs_of(as_the_readme_says(1, folder)))
    assert epochs[0::2] == epochs[1::2] and len(epochs) == 4  # both saw the same losses and metrics
    assert_same(folder, alone)
    names = sorted(path.name.partition(".")[2] for path in (folder / "data/work/model").glob("*.*.*"))
    assert names == ["memory.npz", "weights.h5"]
    expected, metrics = (json.loads((f / "data/work/model/metrics.json").read_text()) for f in (alone, folder))
    assert metrics["test"]["memory"] == expected["test"]["memory"]
    assert metrics["test"]["towers"] == pytest.approx(expected["test"]["towers"], abs=1e-2)


def test_a_lost_worker_ends_the_others_and_starting_again_goes_on(records, alone):
    """The second worker is killed in its second epoch; the first says so; both, started again, end as one process does."""
    folder = copy_of(records, "lost")
    first, second = start_workers(folder, folder)
    checkpoint = folder / "data/work/model/checkpoint.npz"
    wait_for(lambda: checkpoint.exists() or first.poll() is not None, "no epoch ends")
    subprocess.run(["pkill", "-KILL", "-P", str(second.pid)], check=True)
    _, err = first.communicate()
    second.communicate()
    if first.returncode:  # else the second was faster than its killer, and the end is the same
        assert "train.py: worker 0 of 2 lost another one" in err and "start all workers again" in err
        out = [well(worker) for worker in start_workers(folder, folder)]
        assert "going on after epoch 1 " in out[0] and "going on after epoch 1 " in out[1]
    assert_same(folder, alone)


def test_workers_that_start_from_different_things_each_say_so_in_one_line(records, alone):
    """Each has a WORK_DIR of its own; in one of them a model stands."""
    for worker in start_workers(copy_of(alone, "with a model"), copy_of(records, "without")):
        _, err = worker.communicate()
        assert worker.returncode == 1, err
        assert err.splitlines()[-1].startswith(
            "train.py: the workers of TF_CONFIG start from different records, models"
        )


def test_a_worker_that_never_starts_is_waited_for_only_so_long(records):
    folder = copy_of(records, "missing")
    edit(folder, "train", CLUSTER_TIMEOUT=3)
    (worker,) = start_workers(folder)
    _, err = worker.communicate()
    assert worker.returncode not in (0, -signal.SIGKILL, 124)
    assert "worker 0 waits for all 2 of TF_CONFIG, 3 s at most" in err


def test_two_devices_of_one_machine_take_the_steps_of_one(tmp_path):
    """MirroredStrategy over two logical CPUs, as over two GPUs, against one device: the same weights after a few steps."""
    program = tmp_path / "devices.py"
    program.write_text(
        "import sys\n"
        "import numpy as np\n"
        "import tensorflow as tf\n"
        "cpu = tf.config.list_physical_devices('CPU')[0]\n"
        "tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)\n"
        "import keras\n"
        "from bench_train import DAYS, NUM_TRENDS, random_batch, step_of\n"
        "from model_tf2 import build_model\n"
        "results = []\n"
        "for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1'])):\n"
        "    keras.utils.set_random_seed(1)\n"
        "    with strategy.scope():\n"
        "        model = build_model(num_videos=300, num_columns=20, emb_dim=8, user_blocks=1, dropout=0.0)\n"
        "    batches = [random_batch(np.random.default_rng(n), 300, 20, 7, 9) for n in range(3)]\n"
        "    spec = {name: tf.TensorSpec.from_tensor(value) for name, value in batches[0].items()}\n"
        "    trends = np.random.default_rng(1).normal(size=[DAYS, 21, NUM_TRENDS]).astype(np.float32)\n"
        "    step = step_of(model, spec, tf.constant(trends), strategy)\n"
        "    losses = [step(batch).numpy() for batch in batches]\n"
        "    results.append([*losses, *(v.numpy() for v in model.variables)])\n"
        "for one, two in zip(*results, strict=True):\n"
        "    np.testing.assert_allclose(one, two, atol=1e-3)\n"
        "print('same', len(results[0]))\n"
    )
    path = f"{ROOT}:{ROOT / 'tests/bench'}"
    assert QUIET and "same" in well(run([sys.executable, str(program)], tmp_path, PYTHONPATH=path))
