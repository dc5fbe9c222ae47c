"""The store of tokenised rows: exact, whole or absent, built once."""

import errno
import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_reason.data.cache import digest, file_digest, open_folder, open_store
from lit_reason.data.loader import BinSampler, PackLoader
from lit_reason.data.token_row import TokenRow


def make_rows(lengths, seed=0):
    rng = np.random.default_rng(seed)
    for k, n in enumerate(lengths):
        weight = rng.random(n).astype(np.float32)
        weight[0] = 0
        yield TokenRow(
            rng.integers(0, 2**31 - 1, n).astype(np.int32),
            weight,
            rng.integers(0, 10, n).astype(np.uint8),
            rng.integers(-1, 10, n).astype(np.int8),
            f"zeile {k} ü",
        )


def build_from(lengths, meta=None):
    return lambda: (make_rows(lengths), lambda: meta or {})


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=20))
def test_rows_come_back_as_they_went_in(lengths, tmp_path_factory):
    store = open_store(tmp_path_factory.mktemp("s"), "k", build_from(lengths, {"a": 1}))
    assert len(store) == len(lengths) and store.lengths.tolist() == lengths and store.meta == {"a": 1}
    for i, row in enumerate(make_rows(lengths)):
        back = store.row(i)
        assert back.row_id == row.row_id
        for name in ("ids", "weight", "segment", "decile"):
            np.testing.assert_array_equal(getattr(back, name), getattr(row, name))
            assert getattr(back, name).dtype == getattr(row, name).dtype
        assert store.weight_sums[i] == row.weight.sum(dtype=np.float64)
        assert store.trained_counts[i] == (row.weight > 0).sum()


def test_a_store_is_built_once(tmp_path):
    open_store(tmp_path, "k", build_from([3]))

    def never():
        raise AssertionError("built again")

    assert len(open_store(tmp_path, "k", never)) == 1


def test_a_failed_build_leaves_nothing(tmp_path):
    def broken():
        def rows():
            yield from make_rows([3])
            raise OSError(28, "No space left on device")

        return rows(), dict

    with pytest.raises(OSError, match="No space"):
        open_store(tmp_path, "k", broken)
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == []
    assert len(open_store(tmp_path, "k", build_from([4, 5]))) == 2


def test_a_full_disk_says_where(tmp_path):
    def build(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write has it: without a name

    with pytest.raises(OSError) as full:
        open_folder(tmp_path, "abc", build)
    assert full.value.filename == str(tmp_path / "abc") and not (tmp_path / "abc").exists()


def test_what_a_killed_build_left_is_cleared(tmp_path):
    (tmp_path / "k.building").mkdir()
    (tmp_path / "k.building" / "ids.bin").write_bytes(b"half")
    assert open_store(tmp_path, "k", build_from([4])).lengths.tolist() == [4]
    assert not (tmp_path / "k.building").exists()


def _open_and_report(folder, queue):
    built = []

    def build():
        built.append(1)
        return make_rows([5] * 200), dict

    queue.put((len(open_store(folder, "k", build)), len(built)))


def test_two_processes_build_one_store(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    started = [context.Process(target=_open_and_report, args=(tmp_path, queue)) for _ in range(3)]
    for p in started:
        p.start()
    results = [queue.get(timeout=60) for _ in started]
    for p in started:
        p.join()
    assert [n for n, _ in results] == [200] * 3 and sum(b for _, b in results) == 1


def test_a_store_travels_to_workers_without_its_data(tmp_path):
    store = open_store(tmp_path, "k", build_from([1000] * 20))
    expected = store.row(3).ids
    assert len(pickle.dumps(store)) < 10_000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).row(3).ids, expected)


def test_digests_follow_content(tmp_path):
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    file = tmp_path / "x"
    file.write_text("one")
    first = file_digest(file)
    file.write_text("two")
    assert file_digest(file) != first
    assert file_digest("user/name") == "user/name"
    before = file_digest(tmp_path)
    (tmp_path / "y").write_text("")
    assert file_digest(tmp_path) != before


def fingerprint(pack):
    return json.dumps([pack.ids.tolist(), pack.norm])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_goes_on_where_it_stopped(tmp_path, workers):
    store = open_store(tmp_path, "k", build_from([7, 3, 9, 4, 6] * 6))

    def loader():
        sampler = BinSampler(store.lengths, store.weight_sums, batch_tokens=12, shuffle=True, accumulate=2)
        return PackLoader(store, sampler, workers)

    first = loader()
    first.sampler.epoch = 1
    whole = [fingerprint(p) for p in first]
    assert len(whole) == len(first) > 5
    stopped = loader()
    stopped.sampler.epoch = 1
    drawn = iter(stopped)
    head = [fingerprint(next(drawn)) for _ in range(3)]
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = loader()
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(1)  # Lightning's first word after a resume
    assert head + [fingerprint(p) for p in resumed] == whole
    resumed.sampler.set_epoch(2)
    assert len(list(resumed)) == len(whole), "the next epoch is whole"
