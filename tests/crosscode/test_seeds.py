"""Seeds that runs which are resumed must find again."""

from crosscode.seeds import derived_seed


def test_the_seeds_of_a_stream_are_fixed_numbers():
    assert derived_seed(7) == 7
    assert derived_seed(7, 3) == 7_000_024
    assert derived_seed(2, 1, 5) == 2_000_013_000_026
    assert derived_seed(4, 1, 2, base=1009) == 4_073_335
