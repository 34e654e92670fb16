import jax
import pytest

from experiments import process


@pytest.fixture
def folder():
    """Runs with jax's setting of the cache as it was, whatever a test does to it."""
    before = jax.config.jax_compilation_cache_dir
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_users_cache(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    process.keeps_programs(lambda: None)()
    assert folder() == str(tmp_path / "dsbp_jax")


def test_a_cache_that_was_chosen_stays(folder, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    process.keeps_programs(lambda: None)()
    assert folder() == str(tmp_path)
