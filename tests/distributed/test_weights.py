"""The weight bridge on four real ranks: one launch of `weights_program.py`, judged case by case."""

import pytest
import torch
from launching import launch

RANKS = range(4)
# elements of one copy of the parameters and of the fp32 buffer; `out` is written as `tok`
PARAMETERS, BUFFER = 60 + 48 + 48 + 2, 20


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank saw in each case: results[rank][case]."""
    directory = tmp_path_factory.mktemp("weights")
    launch("tests/programs/weights_program.py", 1, str(directory))
    return [torch.load(directory / f"{rank}.pt") for rank in RANKS]


def of_case(results, case, key):
    for rank in RANKS:
        assert "raised" not in results[rank][case], results[rank][case]["raised"]
    return [results[rank][case][key] for rank in RANKS]


def alike(results, case, key):
    """The value that all ranks have, which must be the same."""
    values = of_case(results, case, key)
    assert values == [values[0]] * len(RANKS)
    return values[0]


LAYOUTS = {  # name: (bytes moved by one sync, verified first and second time)
    "split_2_2": (PARAMETERS * 2 + 2 * 2 + BUFFER * 4 * 2, [True, True]),
    "split_3_1": ((PARAMETERS + BUFFER) * 4, [True, False]),
    "split_1_3": ((PARAMETERS * 2 + BUFFER * 4) * 3, [False, False]),
    "colocated_2x2_4x1": ((PARAMETERS * 2 + BUFFER * 4) * 4, [True, True]),
    "colocated_hsdp_2x2": ((PARAMETERS + BUFFER + 2 + BUFFER) * 4 * 2, [True, True]),
    "overlapping": ((PARAMETERS + BUFFER + 2 + BUFFER) * 4, [True, True]),
    "aliased": (0, [True, True]),
    "alias_refused": ((PARAMETERS + BUFFER) * 4 * 4, [True, True]),
    "cast_no_alias": ((PARAMETERS * 2 + BUFFER * 4) * 4, [True, True]),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_generator_holds_the_bits_of_the_full_tensors(results, case):
    assert alike(results, case, "wrong") == []


@pytest.mark.parametrize("case", LAYOUTS)
def test_blocks_are_where_torch_says_the_shards_are(results, case):
    assert alike(results, case, "blocks") == []


@pytest.mark.parametrize("case", LAYOUTS)
def test_reports_count_versions_bytes_and_checks(results, case):
    moved, verified = LAYOUTS[case]
    expected = [(1, moved, verified[0]), (2, moved, verified[1])]
    assert alike(results, case, "reports") == expected


def test_the_weights_digest_is_the_same_on_any_mesh(results):
    digests = {alike(results, case, "digest") for case in LAYOUTS}
    assert len(digests) == 1


def test_only_equal_layouts_and_dtypes_are_aliased(results):
    assert [case for case in LAYOUTS if alike(results, case, "aliased")] == ["aliased"]


def test_small_buckets_make_many_rounds(results):
    assert alike(results, "split_2_2", "num_rounds") > 4
    assert alike(results, "split_3_1", "num_rounds") == 1


def test_a_corrupted_destination_is_named_on_all_ranks(results):
    error = alike(results, "corrupted", "error")
    assert error.startswith("RuntimeError: weights differ after sync 1 (1 mismatches)")
    # the trainer's row shards tile the whole tensor, so the rank itself is known
    assert "wo: generator ranks [3] differ from the trainer" in error


def test_a_stale_trainer_replica_is_named_on_all_ranks(results):
    error = alike(results, "stale_source", "error")
    for name in ("tok", "out", "wq", "wo", "two", "rope"):
        assert f"{name}: trainer ranks [1] differ from other replicas" in error


def test_a_sync_into_storage_that_should_be_aliased_is_refused(results):
    error = alike(results, "unbound_alias", "error")
    assert error.startswith("RuntimeError: aliased weights no longer share storage: ")


def test_tensors_that_do_not_fit_are_refused_on_all_ranks(results):
    error = alike(results, "misfits", "tensors")
    assert error.startswith("ValueError")
    assert "wq on generator rank 3 has shape (6, 8); the layout says (8, 6)" in error
    assert "wo on generator rank 3 is on the meta device" in error
    assert "two is torch.bfloat16 and torch.float16 on different generator ranks" in error
    assert "more on generator rank 3 has no layout" in error
    assert "tok on generator rank 3 is missing" in error


def test_sides_with_different_names_are_refused_on_all_ranks(results):
    error = alike(results, "misfits", "names")
    assert error == "ValueError: layouts do not match: out is missing from the source"
