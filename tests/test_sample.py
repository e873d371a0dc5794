"""The shipped sample is what its program makes, and small."""

from pathlib import Path

from make_sample import make_sample

SAMPLE = Path(__file__).parents[1] / "data" / "sample"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_the_program_gives_the_shipped_bytes(tmp_path):
    make_sample(tmp_path)
    assert contents(tmp_path) == contents(SAMPLE)


def test_the_sample_is_under_two_megabytes():
    assert 0 < sum(map(len, contents(SAMPLE).values())) < 2_000_000
