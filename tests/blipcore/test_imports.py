"""The garbage collector is as it was, whatever an import does."""

import gc

import pytest

from blipcore.imports import collector_paused


@pytest.fixture(autouse=True)
def _collector_as_it_was():
    yield
    gc.unfreeze()
    gc.enable()


def test_the_collector_rests_inside_and_works_again_afterwards():
    with collector_paused(), collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_failed_import_leaves_it_on():
    with pytest.raises(ModuleNotFoundError), collector_paused():
        import blipcore.nowhere  # noqa: F401
    assert gc.isenabled()


def test_one_that_was_off_stays_off():
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()


def test_only_new_imports_are_frozen(tmp_path, monkeypatch):
    gc.unfreeze()
    with collector_paused():
        import gc as known  # noqa: F401
    assert gc.get_freeze_count() == 0
    (tmp_path / "fresh_module.py").write_text("VALUES = [[1]]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with collector_paused():
        import fresh_module  # noqa: F401
    assert gc.get_freeze_count() > 0
