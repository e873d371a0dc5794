"""Ranking: what each user's line holds, that serving is what was evaluated, and what a second run does again."""

import csv
import gzip
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import get_dataset
import infer as infer_module
import train as train_module
from get_dataset import column_table, dataset_from_clicks, load_manifest
from get_indexing import InputError, cut_files, get_indexing, load_index
from get_tfrecord import get_tfrecord
from infer import Ranker, Reason, infer, print_example
from model_tf2 import Memory, Scorer, count_windows
from train import MEMORY_DECAYS, train

import numpy as np
import pytest
from conftest import _clicks_like_real, _raw, _write_lines

REAL = _clicks_like_real(150, seed=31)
HEARD = ["t0a-1_t0a", "t0b-2"]  # clicks of a user whom the model knows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with raw/ and a trained work/ of 150 users with structured clicks; nothing is ranked there."""
    folder = tmp_path_factory.mktemp("trained")
    raw = _raw(folder / "raw", **REAL)
    get_indexing(raw, folder / "work")
    get_tfrecord(raw, folder / "work", num_workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_dataset, "MIN_STEPS", 6)
        patch.setattr(train_module, "MEMORY_WEIGHTS", (0.3, 0.6))  # so that both towers and memory count
        train(folder / "work", epochs=1, emb_dim=8)
    return folder


@pytest.fixture
def own(trained, tmp_path):
    """A copy of that folder, for a test that changes it."""
    return shutil.copytree(trained, tmp_path / "own")


@pytest.fixture
def ranked(trained, tmp_path):
    """A function ([(uid, clicks), ...]) -> the lines of their ranking, made in a folder of its own."""

    def rank(users, **how):
        clicks = _raw(tmp_path / "asked", users=users) / "click_seq"
        shutil.rmtree(tmp_path / "ranking", ignore_errors=True)
        return lines_of(infer(clicks, trained / "work", tmp_path / "ranking", num_workers=1, **how)[0])

    return rank


def lines_of(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def table_of(lines):
    """Scores by column of each line."""
    return [dict(zip(line["columns"], line["scores"], strict=True)) for line in lines]


def popular_order(columns=REAL["columns"]):
    """The columns by clicks of all users, of equal ones the first first."""
    clicked = Counter(click.split("_")[1] for _, clicks in REAL["users"] for click in clicks if "_" in click)
    return sorted(columns, key=lambda cid: (-clicked[cid], list(columns).index(cid)))


def rank_own(own, asked=None, **how):
    """infer() of a folder made by own(), in this process."""
    return infer(asked or own / "asked/click_seq", own / "work", own / "ranking", num_workers=1, **how)


def filled(own, columns):
    """Make the index of a folder anew with these columns."""
    get_indexing(_raw(own / "raw", columns=columns), own / "work")


# ---------------------------------------------------------------- the lines


def test_each_user_has_a_line_in_input_order_with_every_column_once(ranked):
    users = [*REAL["users"], ("long", HEARD * 400), ("none", []), ("unheard", ["x", "y_z"])]
    lines = ranked(users)
    assert [line["uid"] for line in lines] == [uid for uid, _ in users]
    assert all(list(line) == ["uid", "columns", "scores", "source"] for line in lines)
    assert all(sorted(line["columns"]) == sorted(REAL["columns"]) for line in lines)


def test_scores_are_finite_never_rise_and_equal_ones_go_by_the_order_of_the_columns(ranked):
    order = list(REAL["columns"])
    for line in ranked([*REAL["users"], ("none", [])]):
        assert np.isfinite(line["scores"]).all()
        pairs = [(-score, order.index(cid)) for cid, score in zip(line["columns"], line["scores"], strict=True)]
        assert pairs == sorted(pairs)


def test_scores_are_log_probabilities(ranked):
    for line in ranked([*REAL["users"][:20], ("none", [])]):
        assert np.exp(line["scores"]).sum() == pytest.approx(1, abs=1e-3)


def test_equal_scores_go_by_the_order_of_the_columns(own):
    """Columns that hold the same videos and that nobody clicked are equal in popularity."""
    filled(own, REAL["columns"] | {"z9": ["t0a-1"], "late": ["t0a-1"], "a0": ["t0a-1"]})
    _raw(own / "asked", users=[("none", [])])
    (line,) = lines_of(rank_own(own)[0])
    assert line["columns"][-3:] == ["z9", "late", "a0"] and len(set(line["scores"][-3:])) == 1


def test_a_user_without_a_known_click_gets_the_popularity_order(ranked):
    lines = ranked([("none", []), ("u", HEARD), ("unheard", ["x", "what_ever", "t0a"]), ("odd", ["", "_", "_t9"])])
    assert [line["source"] for line in lines] == ["popular", "model", "popular", "popular"]
    for line in (lines[0], lines[2], lines[3]):
        assert line["columns"] == popular_order()
        assert line["scores"] == lines[0]["scores"]


def test_an_unknown_video_clicked_in_a_known_column_is_a_known_click(ranked):
    assert ranked([("u", ["unheard_t0a"])])[0]["source"] == "model"


def test_users_that_come_twice_get_a_line_each(ranked):
    lines = ranked([("same", HEARD), ("other", []), ("same", HEARD), ("same", ["t3a-1_t3a"])])
    assert [line["uid"] for line in lines] == ["same", "other", "same", "same"]
    assert lines[0] == lines[2] and lines[0]["columns"] != lines[3]["columns"]


def test_top_k_keeps_the_first_columns(ranked):
    users = [*REAL["users"][:9], ("none", [])]
    whole, first = ranked(users), ranked(users, top_k=3)
    assert [line["columns"] for line in first] == [line["columns"][:3] for line in whole]
    assert [line["scores"] for line in first] == [line["scores"][:3] for line in whole]
    assert ranked(users, top_k=1000) == whole


def test_user_ids_are_written_as_they_are(ranked):
    assert ranked([('Zoë \u2028 "q" \\ 日本', HEARD)])[0]["uid"] == 'Zoë \u2028 "q" \\ 日本'


def test_different_users_get_different_rankings(ranked):
    lines = ranked([("a", ["t0a-1_t0a", "t0b-1_t0b"]), ("b", ["t3a-1_t3a", "t3b-1_t3b"])])
    assert lines[0]["columns"] != lines[1]["columns"]


# ---------------------------------------------------------------- columns that changed since training


def test_a_new_column_and_a_shelf_filled_anew_are_ranked_without_training_again(own):
    _raw(own / "asked", users=[("u", HEARD), ("none", [])])
    before = lines_of(rank_own(own)[0])
    columns = REAL["columns"] | {"fresh": ["t0a-0", "t0a-1", "just made"], "t3a": ["t0b-0", "t0b-1"]}
    filled(own, columns)
    after = lines_of(rank_own(own)[0])
    assert all(sorted(line["columns"]) == sorted(columns) for line in after)
    assert all(np.isfinite(line["scores"]).all() for line in after)
    assert after[1]["columns"] == popular_order(columns) and after[1]["columns"][-1] == "fresh"
    assert table_of(before)[0]["t3a"] != table_of(after)[0]["t3a"]


@pytest.mark.parametrize("memory_weight", [0.3, 0.9])
def test_a_column_newer_than_the_model_gets_what_the_towers_say_whatever_the_weight_of_the_memory(own, memory_weight):
    """The user clicked in no column, so nothing else enters its score."""
    filled(own, REAL["columns"] | {"fresh": ["t0a-0", "t0a-1"]})
    edit_model(own, mix=lambda mix: mix | {"memory_weight": memory_weight})
    ranker = Ranker(own / "work")
    videos = np.array([ranker.encoder.encode(["t0a-1", "t0b-2"])[0]])
    logits = ranker.scorer.towers(videos, np.zeros_like(videos)).astype(float) / ranker.mix.temperature
    expected = np.exp(logits) / np.exp(logits).sum()
    scores = ranker.scores(*ranker.padded([(videos[0], np.zeros(2, int))]))
    assert len(scores[0]) == 13 and np.exp(scores[0, 12]) == pytest.approx(expected[0, 12], rel=1e-5)
    assert not np.allclose(np.exp(scores[0, :12]), expected[0, :12], rtol=0.05)


def test_a_retired_column_is_not_ranked(own):
    left = {cid: vids for cid, vids in REAL["columns"].items() if cid not in ("t0a", "t1b", "t3c")}
    filled(own, left)
    _raw(own / "asked", users=[("u", HEARD), ("none", [])])
    lines = lines_of(rank_own(own)[0])
    assert all(sorted(line["columns"]) == sorted(left) for line in lines)
    assert all(np.isfinite(line["scores"]).all() for line in lines)
    assert lines[1]["columns"] == popular_order(left)


def test_where_every_column_is_empty_it_says_so(own):
    path = own / "work/indexing/cid2vidx.json"
    path.write_text(json.dumps({cid: [] for cid in json.loads(path.read_text())}))
    _raw(own / "asked", users=[("a", HEARD)])
    with pytest.raises(InputError, match="no column"):
        rank_own(own)


# ---------------------------------------------------------------- serving is what was evaluated


def test_serving_gives_the_towers_logits_of_the_training_side(trained):
    """The last position of a training window against all columns, for every user: one window holds all their clicks."""
    index, ranker = load_index(trained / "work"), Ranker(trained / "work")
    scorer, constants = ranker.scorer, load_manifest(trained / "work")[0]["constants"]
    videos = column_table(index, scorer.memory.video_clicks)
    columns = scorer.model.column_vectors(videos[1:], np.arange(1, len(videos)))
    expected = {}
    for batch in dataset_from_clicks(REAL["users"], index, constants).as_numpy_iterator():
        vectors = scorer.model.user_vectors(batch["user_feature"], batch["user_column"]).numpy()
        clicks = (batch[name] for name in ("uid", "user_feature", "user_column"))
        for uid, clicked, shelves, of_user in zip(*clicks, vectors, strict=True):
            last = np.count_nonzero(clicked) - 1
            expected[uid.decode()] = np.array(scorer.model.scaled_cosines(of_user[last:][:1], columns))[0]
            for place in np.flatnonzero(shelves):  # what is learned for a column clicked so many clicks ago
                expected[uid.decode()][shelves[place] - 1] += scorer.model.repeats.numpy()[last - place]
    assert expected.keys() == {uid for uid, _ in REAL["users"]}
    for uid, clicks in REAL["users"]:
        padded = [np.pad([numbers], [(0, 0), (0, 40 - len(clicks))]) for numbers in ranker.encoder.encode(clicks)]
        assert np.allclose(scorer.towers(*padded)[0], expected[uid], atol=1e-4)


def test_the_ranks_in_test_csv_are_those_that_serving_gives_with_the_memory_of_the_training_records(trained):
    """Each test user's raw clicks before the last one in a column are ranked for as infer.py does."""
    work, users, order = trained / "work", dict(REAL["users"]), list(REAL["columns"])
    (manifest, index), ranker = load_manifest(work), Ranker(work)
    counts = count_windows(manifest, ["train"], MEMORY_DECAYS, index, work, num_workers=1)
    memory = Memory.of_counts(counts, MEMORY_DECAYS.index(ranker.mix.decay), index)
    ranker.scorer = Scorer(ranker.scorer.model, memory, index)
    with open(work / "model/test.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["uid"] for row in rows} == {uid for uid in users if draw(uid) >= 0.5} and len(rows) > 50
    for row in rows:
        clicks = users[row["uid"]]
        place = max(place for place, click in enumerate(clicks) if "_" in click)
        target, before = clicks[place].split("_")[1], clicks[:place]
        assert (row["target"], row["history"]) == (target, str(place))
        assert row["clicked_before"] == str(int(any(click.endswith(f"_{target}") for click in before)))
        scores = ranker.scores(*ranker.padded([ranker.encoder.encode(before)]))[0]
        best = sorted(order, key=lambda cid: (-scores[order.index(cid)], order.index(cid)))
        assert row["mix"] == str(1 + best.index(target))


def draw(uid):
    """The place of a user between 0 and 1, by the first 8 bytes of the BLAKE2b hash: "test" is above 1/2 here."""
    return int(hashlib.blake2b(uid.encode(), digest_size=8).hexdigest(), 16) / 2**64


def test_a_user_without_a_known_click_is_evaluated_as_ranked_by_popularity(trained):
    ranker, unknown = Ranker(trained / "work"), np.array([[1, 1, 0]])
    evaluated = ranker.scorer.probabilities(unknown, np.zeros_like(unknown), ranker.mix)
    assert np.allclose(np.log(evaluated), ranker.scores(*ranker.padded([([1, 1], [0, 0])])))
    clicks = ranker.scorer.memory.column_clicks[1:] + 0.5
    assert np.allclose(evaluated, clicks / clicks.sum())


def test_the_explanation_of_a_history_of_any_length_reads_its_last_clicks_alone(trained):
    ranker = Ranker(trained / "work")
    (reason,) = ranker.why(HEARD * 50_000, top_k=1)
    assert len(reason.effects) == 100_000 and not any(reason.effects[: -ranker.user_max_len])
    last = HEARD * 25
    assert reason.effects[-len(last) :] == pytest.approx(ranker.why([*HEARD, *last], top_k=1)[0].effects[-len(last) :])


def test_a_long_history_is_ranked_by_its_last_clicks(trained):
    ranker, rng = Ranker(trained / "work"), np.random.default_rng(32)
    videos, columns = rng.integers(2, 62, 200), rng.integers(0, 13, 200)
    whole = ranker.scores(*ranker.padded([(videos, columns)]))
    assert np.allclose(whole, ranker.scores(*ranker.padded([(videos[-50:], columns[-50:])])), atol=1e-6)
    assert not np.allclose(whole, ranker.scores(*ranker.padded([(videos[:50], columns[:50])])), atol=1e-3)


def assert_equal_rankings(some, others):
    """Equal but for the last decimal of a score, where sums that were padded otherwise may round the other way."""
    assert [line["uid"] for line in some] == [line["uid"] for line in others]
    for a, b in zip(table_of(some), table_of(others), strict=True):
        assert a == pytest.approx(b, abs=1.01e-4)


@pytest.mark.parametrize("batch_users", [1, 7])
def test_a_ranking_does_not_depend_on_the_batch(ranked, monkeypatch, batch_users):
    users = [*REAL["users"][:20], ("none", []), ("long", HEARD * 60)]
    whole = ranked(users)
    monkeypatch.setattr(infer_module, "BATCH_USERS", batch_users)
    assert_equal_rankings(ranked(users), whole)


def test_two_workers_and_files_cut_into_ranges_give_the_same_bytes(own, monkeypatch):
    asked = _raw(own / "asked", users=REAL["users"][:80], click_file="one") / "click_seq"
    _raw(own / "asked", users=REAL["users"][80:], click_file="two", gzip=True)
    whole = [lines_of(path) for path in rank_own(own)]
    monkeypatch.setattr(infer_module, "RANK_BYTES", 5000)
    contents = []
    for workers in (1, 2):
        ranking = own / f"ranking{workers}"
        contents.append([path.read_bytes() for path in infer(asked, own / "work", ranking, num_workers=workers)])
    assert contents[0] == contents[1]
    cut = [[json.loads(line) for line in gzip.decompress(content).splitlines()] for content in contents[0]]
    assert len(cut) == 2
    for a, b in zip(cut, whole, strict=True):
        assert_equal_rankings(a, b)


# ---------------------------------------------------------------- files


def edit_model(own, **changes):
    """Change entries of model.json, each by a function, as a training that ended would: its id is another then."""
    path = own / "work/model/model.json"
    saved = json.loads(path.read_text())
    changed = saved | {name: change(saved[name]) for name, change in changes.items()}
    path.write_text(json.dumps(changed | {"id": "another"}))


def stamp(path):
    return path.stat().st_mtime_ns, path.stat().st_ino


@pytest.fixture
def two(own):
    """own(), asked for a user each in the files one and two, both ranked."""
    _raw(own / "asked", users=[("a", HEARD)], click_file="one")
    _raw(own / "asked", users=[("b", HEARD)], click_file="two", gzip=True)
    assert [path.name for path in rank_own(own)] == ["one.json.gz", "two.json.gz"]
    return own


def stamps(own):
    return {path.name: stamp(path) for path in (own / "ranking").glob("*.json.gz")}


def computed_again(own, **how):
    """Rank again and return the names of the rankings that were written anew."""
    before = stamps(own)
    rank_own(own, **how)
    return {name for name, of_file in stamps(own).items() if before.get(name) != of_file}


BOTH = {"one.json.gz", "two.json.gz"}


def test_each_input_file_has_its_output_and_a_line_in_the_manifest_and_nothing_else_is_left(two):
    assert [lines_of(two / f"ranking/{name}")[0]["uid"] for name in sorted(BOTH)] == ["a", "b"]
    assert {path.name for path in (two / "ranking").iterdir()} == BOTH | {"manifest.jsonl"}
    lines = [json.loads(line) for line in (two / "ranking/manifest.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [["one.json.gz"], ["two.json.gz"]]
    for line in lines:
        ((name, made_from),) = line.items()
        assert made_from["sha256"] == hashlib.sha256((two / "ranking" / name).read_bytes()).hexdigest()
        assert made_from["clicks"] == "../asked/click_seq"  # as seen from the rankings


def test_a_click_file_with_a_long_name_is_ranked(own):
    name = 65 * "视"  # 195 bytes of the 255 that a name can have
    _raw(own / "asked", users=[("a", HEARD)], click_file=name)
    assert [path.name for path in rank_own(own)] == [f"{name}.json.gz"]
    assert {path.name for path in (own / "ranking").iterdir()} == {f"{name}.json.gz", "manifest.jsonl"}


def test_an_empty_click_file_gives_an_empty_ranking(ranked):
    assert ranked([]) == []


def test_a_finished_file_is_not_computed_again(two, capsys):
    assert computed_again(two) == set()
    assert "0 users ranked in 0 files, 2 files stand" in capsys.readouterr().out
    _raw(two / "asked", users=[("b", HEARD), ("c", [])], click_file="two", gzip=True)
    assert computed_again(two) == {"two.json.gz"}
    assert [line["uid"] for line in lines_of(two / "ranking/two.json.gz")] == ["b", "c"]


def test_a_ranking_that_is_gone_or_damaged_is_computed_again(two):
    one = two / "ranking/one.json.gz"
    good = one.read_bytes()
    one.unlink()
    assert computed_again(two) == {"one.json.gz"} and one.read_bytes() == good
    one.write_bytes(good[:-1] + b"x")
    assert computed_again(two) == {"one.json.gz"} and one.read_bytes() == good


CHANGES = {
    "a shelf": lambda own, patch: filled(own, REAL["columns"] | {"t0a": ["t1a-0"]}),
    "the model": lambda own, patch: edit_model(own, mix=lambda mix: mix | {"memory_weight": 0.35}),
    "DECIMALS": lambda own, patch: patch.setattr(infer_module, "DECIMALS", 3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_file_is_computed_again_when_the_index_the_model_or_what_is_printed_changed(two, monkeypatch, change):
    before = lines_of(two / "ranking/one.json.gz")
    change(two, monkeypatch)
    assert computed_again(two) == BOTH
    assert lines_of(two / "ranking/one.json.gz") != before


def test_every_file_is_computed_again_when_the_limits_of_lines_changed(two, monkeypatch):
    monkeypatch.setitem(infer_module.LIMITS, "MAX_ID_CHARS", 999)
    assert computed_again(two) == BOTH


def test_a_file_is_computed_again_when_top_k_changed(two):
    for top_k, columns in ((2, 2), (0, 12)):
        assert computed_again(two, top_k=top_k) == BOTH
        assert len(lines_of(two / "ranking/one.json.gz")[0]["columns"]) == columns


def test_what_only_concerns_running_computes_nothing_again(two, monkeypatch):
    for name, value in dict(BATCH_USERS=1, GZIP_LEVEL=9, MEMO_SIZE=1).items():
        monkeypatch.setattr(infer_module, name, value)
    monkeypatch.setattr(infer_module, "RANK_BYTES", 7)
    assert computed_again(two) == set()


def test_a_line_of_the_manifest_that_was_torn_costs_its_own_file_alone(two):
    manifest = two / "ranking/manifest.jsonl"
    whole = manifest.read_text()
    manifest.write_text(whole + whole[:40])
    assert computed_again(two) == set() and manifest.read_text() == whole
    manifest.write_text(whole[:-40])
    assert computed_again(two) == {"two.json.gz"} and manifest.read_text() == whole
    for damaged in (b"\xff", b"7", b"[1]", b'["ab"]', b'{"one.json.gz": 7}', b'{"one.json.gz": {}}'):
        manifest.write_bytes(damaged + b"\n" + whole.encode() + damaged + b"\n")
        assert computed_again(two) == set() and manifest.read_text() == whole


def test_the_ranking_of_a_click_file_that_is_gone_is_kept_and_named(two, capsys):
    (two / "asked/click_seq/two.json.gz").unlink()
    rank_own(two)
    path = two / "ranking/two.json.gz"
    assert path.exists() and f"{path}: no click file of this name any more" in capsys.readouterr().err


def test_a_ranking_of_another_click_folder_is_never_overwritten_and_not_called_gone(two, capsys):
    before = {path.name: path.read_bytes() for path in (two / "ranking").iterdir()}
    others = _raw(two / "others", users=[("o", HEARD)], click_file="one") / "click_seq"
    with pytest.raises(InputError, match=r"one\.json\.gz is the ranking of a file in .*/asked/click_seq.*RANKING_DIR"):
        rank_own(two, others)
    assert {path.name: path.read_bytes() for path in (two / "ranking").iterdir()} == before
    (others / "one.json").rename(others / "three.json")
    assert lines_of(rank_own(two, others)[0])[0]["uid"] == "o"
    assert {name: data for name, data in before.items() if name in BOTH}.items() <= {
        path.name: path.read_bytes() for path in (two / "ranking").iterdir()
    }.items()
    assert "any more" not in capsys.readouterr().err and computed_again(two) == set()


def test_a_link_to_the_clicks_of_each_day_is_the_same_folder_every_day(own):
    for day in ("monday", "tuesday"):
        _raw(own / day, users=[(day, HEARD)], click_file="one")
        (own / "today").unlink(missing_ok=True)
        (own / "today").symlink_to(own / day)
        assert [line["uid"] for line in lines_of(rank_own(own, own / "today/click_seq")[0])] == [day]


def test_two_experiments_whose_click_folders_are_named_alike_do_not_overwrite_each_other(own, tmp_path, monkeypatch):
    for name in ("one", "other"):
        _raw(tmp_path / name / "asked", users=[("u", HEARD)])
    monkeypatch.chdir(tmp_path / "one")
    (output,) = infer("asked/click_seq", own / "work", tmp_path / "ranking", num_workers=1)
    former = output.read_bytes()
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(InputError, match=r"one/asked/click_seq, not in .*other/asked/click_seq; .* RANKING_DIR"):
        infer("asked/click_seq", own / "work", tmp_path / "ranking", num_workers=1)
    assert output.read_bytes() == former


def test_a_click_folder_may_be_named_by_another_path(two, monkeypatch):
    monkeypatch.chdir(two / "asked")
    assert computed_again(two, asked="click_seq") == computed_again(two, asked="../asked/click_seq") == set()


def test_files_and_folders_of_others_stay_and_disturb_nothing(two):
    notes = {"notes.txt": b"mine", "old/one.json.gz": b"kept", ".mine.tmp": b"x", "other.json.gz": b"not ours"}
    for name, data in notes.items():
        (two / "ranking" / name).parent.mkdir(exist_ok=True)
        (two / "ranking" / name).write_bytes(data)
        (two / "asked/click_seq" / name).parent.mkdir(exist_ok=True)
    (two / "ranking/.folder.tmp").mkdir()
    assert computed_again(two) == set() and computed_again(two, top_k=1) == BOTH
    assert {name: (two / "ranking" / name).read_bytes() for name in notes} == notes
    assert (two / "ranking/.folder.tmp").is_dir()


@pytest.mark.parametrize("name", [b"\xff.json", "\u2028.json".encode(), b"new\nline.json"])
def test_any_file_name_is_ranked_once(own, name):
    path = _raw(own / "asked", users=[("a", HEARD)], click_file="z") / "click_seq/z.json"
    path.rename(path.with_name(os.fsdecode(name)))
    (output,) = rank_own(own)
    assert os.fsencode(output.name) == name + b".gz" and lines_of(output)[0]["uid"] == "a"
    assert computed_again(own) == set()


@pytest.mark.parametrize("change", [CHANGES["a shelf"], CHANGES["the model"]])
def test_a_model_or_index_that_changes_under_a_run_stops_it_and_leaves_the_former_rankings(two, monkeypatch, change):
    """It changes when the run has read both, and has not yet given out its work."""
    before = stamps(two)
    _raw(two / "asked", users=[("a", ["t1a-1"])], click_file="one")

    def cut_later(paths, *range_bytes):
        change(two, monkeypatch)
        return cut_files(paths, *range_bytes)

    monkeypatch.setattr(infer_module, "cut_files", cut_later)
    infer_module.load_ranker.cache_clear()  # as in a worker that has just been started
    with pytest.raises(InputError, match="model or index changed while infer.py was at work; run it again"):
        rank_own(two)
    assert stamps(two) == before


def test_bad_lines_are_skipped_and_every_good_one_is_ranked(own, capsys):
    lines = [{"uid": f"u{n}", "click_seq": HEARD} for n in range(200)]
    lines[50:50] = ["{not JSON"]
    lines[100:100] = [""]
    _write_lines(own / "asked/click_seq/clicks.json", lines)
    ranked = lines_of(rank_own(own)[0])
    assert [line["uid"] for line in ranked] == [f"u{n}" for n in range(200)]
    printed = capsys.readouterr()
    assert "1 of 202 lines are bad (line 51: not JSON)" in printed.err
    assert "200 users ranked" in printed.out


def test_too_many_bad_lines_stop_and_leave_the_former_output(two):
    before = stamps(two)
    _write_lines(two / "asked/click_seq/one.json", [{"uid": "b", "click_seq": HEARD}, "{not JSON"])
    with pytest.raises(InputError, match=r"one\.json: 1 of 2 lines are bad \(line 2: not JSON\), more than"):
        rank_own(two)
    assert stamps(two) == before


def test_a_truncated_gzip_file_stops_and_leaves_no_output(own):
    asked = _raw(own / "asked", users=REAL["users"], gzip=True) / "click_seq"
    packed = (asked / "clicks.json.gz").read_bytes()
    (asked / "clicks.json.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match="not a whole gzip file"):
        rank_own(own)
    assert [path for path in (own / "ranking").iterdir() if not path.name.startswith(".")] == []


def test_what_a_killed_run_left_is_removed(two):
    for name in (f".one.json.gz.{'0' * 32}.tmp", f"..one.json.gz.{'0' * 32}.tmp.{'f' * 32}.tmp"):
        (two / "ranking" / name).write_bytes(b"half")
    rank_own(two)
    assert not list((two / "ranking").glob(".*"))


def test_a_missing_clicks_folder_is_named(own):
    with pytest.raises(InputError, match=r"/nowhere: no such folder"):
        rank_own(own, own / "nowhere")


@pytest.mark.parametrize("killed", [True, False], ids=["a first training that was killed", "no training"])
def test_where_no_training_was_finished_it_names_the_script_to_run_first(own, killed):
    for path in (own / "work/model").iterdir():
        if not (killed and path.name.endswith((".h5", ".npz", "history.csv"))):
            path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match=r"model\.json: no such file; run train\.py first"):
        rank_own(own, own / "raw/click_seq")


# ---------------------------------------------------------------- one user, now, and why


@pytest.fixture(scope="module")
def ranker(trained):
    return Ranker(trained / "work")


def test_one_user_is_ranked_as_in_the_file(ranked, ranker):
    users = REAL["users"][:20]
    for (_, clicks), line in zip(users, ranked(users), strict=True):
        of_user = ranker.rank(clicks)
        assert dict(of_user).keys() == set(line["columns"]) and of_user[:2] == ranker.rank(clicks, top_k=2)
        scores = {cid: math.log(probability) for cid, probability in of_user}
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        assert_equal_rankings([{**line, "columns": list(scores), "scores": list(scores.values())}], [line])


def test_several_threads_may_ask_one_ranker(ranker):
    clicks = [clicks for _, clicks in REAL["users"]]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ranker.rank, clicks)) == [ranker.rank(of_user) for of_user in clicks]


@pytest.mark.parametrize("clicks", [["t0a-1_t0a", "nobody knows", "t0b-2", "t1a-1_t1a"], ["nobody knows"], []])
def test_what_a_click_does_is_what_ranking_without_it_changes(ranker, clicks):
    reasons, ranked = ranker.why(clicks, top_k=3), dict(ranker.rank(clicks))
    assert [reason.cid for reason in reasons] == list(ranked)[:3]
    for reason in reasons:
        assert math.isclose(reason.probability, ranked[reason.cid], rel_tol=1e-4)
        assert 0 <= reason.of_towers <= 1 if "t0b-2" in clicks else reason.of_towers is None
        for place, effect in enumerate(reason.effects):
            without = dict(ranker.rank(clicks[:place] + clicks[place + 1 :]))
            assert abs(effect - math.log(ranked[reason.cid] / without[reason.cid])) < 3e-4
        assert len(reason.effects) == len(clicks)


def test_a_click_that_changes_nothing_has_no_effect(ranker):
    clicks = ["t3a-1_t3a", *["t0a-1_t0a", "t0b-2"] * 40]
    assert len(clicks) > ranker.user_max_len + 1
    unread = len(clicks) - ranker.user_max_len
    for reason in ranker.why(clicks):
        assert reason.effects[:unread] == [0.0] * unread and any(reason.effects[unread:])
    assert all(reason.effects == [0.0, 0.0] for reason in ranker.why(["nobody knows", "nor that"]))


def test_the_clicks_of_a_theme_speak_for_its_column(ranker):
    """Users go on in the theme of their last clicks, so the theme's column stands first because of them."""
    (reason,) = ranker.why(["t1a-1_t1a", "t2a-1_t2a", "t0a-1_t0a", "t0a-2_t0a"], top_k=1)
    assert reason.cid.startswith("t0")
    assert max(reason.effects) == max(reason.effects[2:]) > 0


# ---------------------------------------------------------------- the printed example


def test_the_example_names_what_was_clicked_what_is_shown_and_why_as_far_as_titles_are_known(own, capsys):
    index = load_index(own / "work")
    reasons = [Reason("t0a", 0.5, 0.25, [0.31, 0.9, 0.01]), Reason("t0b", 0.1, None, [-0.5, 0.0, 0.2])]
    example = "u", ["t0b-2", "t0a-1_t0a", "x"], reasons
    named = _raw(own / "named", columns={"t0a": ["t0a-1"]}, names={"t0a": "The best"}, titles={"t0b-2": "A title"})
    damaged = _raw(own / "damaged", columns={"t0a": ["t0a-1"]})
    (damaged / "cid2vids2.json.gz").write_bytes(b"no gzip")
    for data_dir, title, name in (
        (named, "A title", "The best"),
        (own / "none", "t0b-2", "t0a"),
        (damaged, "t0b-2", "t0a"),
    ):
        print_example(*example, index, data_dir)
        assert capsys.readouterr().out.splitlines() == [
            "user u clicked last:",
            f"  {title}",
            f"  t0a-1  in {name}",
            "  x",
            "and is shown first, by these of the clicks:",
            f"   50.0%  {name}  (towers 25%, memory 75%)",
            f"          +0.90  t0a-1  in {name}",
            f"          +0.31  {title}",
            "   10.0%  t0b  (popular)",
            "          +0.20  x",
        ]


def test_a_run_ends_with_the_first_user_of_what_it_ranked_and_one_that_ranked_nothing_without(own, capsys):
    asked = _raw(own / "asked", users=[("u", ["t0a-1_t0a", "t0b-2"]), ("v", ["t0b-2"])]) / "click_seq"
    rank_own(own, asked)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["user u clicked last:", "  t0a-1  in t0a"]
    rank_own(own, asked)
    assert len(capsys.readouterr().out.splitlines()) == 1
