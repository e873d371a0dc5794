"""The shipped sample is what its program makes, and small."""

from pathlib import Path

from conftest import files_of
from make_sample import make_sample


def test_the_shipped_sample_is_what_its_program_makes_and_under_two_megabytes(tmp_path):
    make_sample(tmp_path)
    shipped = files_of(Path(__file__).parents[1] / "data/sample")
    assert shipped == files_of(tmp_path) and 0 < sum(map(len, shipped.values())) < 2_000_000
