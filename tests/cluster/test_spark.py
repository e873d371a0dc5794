"""get_tfrecord.py, the counting of train.py and infer.py give on Spark what they give on one machine, to the byte."""

import os
import re
import shutil
import signal

import pytest
from bench.kill_battery import comparable, standing, wait_for
from cluster import as_the_readme_says, copy_of, python, small_folder, submit, well


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder in which one machine did all of it."""
    folder = small_folder(tmp_path_factory.mktemp("spark") / "alone", EPOCHS=1)
    for script in ("get_indexing", "get_tfrecord", "train", "infer"):
        python(folder, script)
    return folder


@pytest.mark.parametrize(("script", "stage"), [("get_tfrecord", "tfrecord"), ("train", "model"), ("infer", "ranking")])
def test_a_spark_cluster_gives_the_bytes_of_one_machine(alone, script, stage):
    folder = copy_of(alone, f"cluster-{script}")
    expected = comparable(standing(folder, script))
    shutil.rmtree(folder / "data/work" / stage)
    if script == "get_tfrecord":
        as_the_readme_says(0, folder)
    else:
        well(submit(folder, script, "local[2]"))
    assert comparable(standing(folder, script)) == expected and expected


def test_a_task_whose_python_worker_is_killed_is_tried_again(alone):
    """The first task to begin writes its process's number into a file and waits to be killed; what comes later does not."""
    folder = copy_of(alone, "killed")
    expected = standing(folder, "get_tfrecord")
    for path in (folder / "data/work/tfrecord").iterdir():
        path.unlink()
    script = folder / "get_tfrecord.py"
    script.write_text(
        script.read_text().replace(
            "    from tensorflow.errors import OpError\n",
            "    from tensorflow.errors import OpError\n    import os, signal\n"
            "    mark = f'{folder}/../../killed'\n"
            "    if not os.path.exists(mark):\n"
            "        open(mark, 'w').write(str(os.getpid()))\n"
            "        signal.pause()\n",
        )
    )
    process = submit(folder, "get_tfrecord", "local[2,4]")
    mark = folder / "data/killed"
    wait_for(lambda: mark.exists() and mark.read_text() or process.poll() is not None, "no task begins")
    os.kill(int(mark.read_text()), signal.SIGKILL)
    well(process)
    assert standing(folder, "get_tfrecord") == expected


def test_bad_input_is_one_line_on_spark_as_well(alone):
    folder = copy_of(alone, "bad")
    with open(folder / "data/sample/click_seq/a.json", "a") as file:
        file.write("no JSON\n" * 50)
    before = standing(folder)
    process = submit(folder, "get_tfrecord", "local[2]")
    out, err = process.communicate()
    assert process.returncode == 1
    (line,) = re.findall(r"^get_tfrecord\.py: .*", out + err, re.MULTILINE)
    assert "a.json: 50 of " in line and "lines are bad" in line
    assert before.items() <= standing(folder).items()  # what no manifest lists may stand beside it
