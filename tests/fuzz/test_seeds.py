"""Reads a few damaged inputs of each family; `python tests/fuzz/run.py --cases 1000` reads many."""

import random
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def fuzz():
    """Imports the modules `run` and `readers`."""
    folder = Path(__file__).parent
    sys.path.insert(0, str(folder))
    found = []
    for name in ("run", "readers"):
        spec = spec_from_file_location(name, folder / f"{name}.py")
        found.append(module_from_spec(spec))
        sys.modules[name] = found[-1]
        spec.loader.exec_module(found[-1])
    yield found
    sys.path.remove(str(folder))
    for name in ("run", "readers", "originals"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def world(fuzz, tmp_path_factory):
    return fuzz[0].make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", ["recordings", "rows", "kaldi", "archives", "checkpoints", "urls"])
def test_damaged_input_is_read_or_refused_in_one_line(fuzz, world, tmp_path, family):
    run, readers = fuzz
    assert family in readers.FAMILIES and len(readers.FAMILIES) == 6
    line = run.run_family(family, range(12), 7, tmp_path, world)
    assert not line["failures"], line["failures"]


def test_failures_are_reported_and_inputs_are_kept(fuzz, world, tmp_path, monkeypatch):
    run, readers = fuzz

    def broken(world, rng, folder):
        (folder / "input").write_bytes(rng.randbytes(3))
        raise KeyError("a bug")

    monkeypatch.setitem(readers.FAMILIES, "rows", broken)
    line = run.run_family("rows", range(2), 0, tmp_path, world)
    assert [failure.partition(":")[0] for failure in line["failures"]] == ["rows-0-0", "rows-0-1"]
    assert (tmp_path / "rows-0-1" / "input").read_bytes() == random.Random("rows-0-1").randbytes(3)
    assert "KeyError" in (tmp_path / "rows-0-1" / "traceback.txt").read_text()
