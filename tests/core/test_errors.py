import inspect
import pickle  # of the test only: processes of the standard library hand errors to each other this way

import pytest

from turbopump.core import errors


def all_errors():
    return [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.TurbopumpError)]


@pytest.mark.parametrize("cls", all_errors())
def test_every_error_is_in_the_tree_with_an_exit_code_and_a_line_of_doc(cls):
    assert cls.exit_code in (1, 2)
    assert cls.__doc__ and cls.__doc__.strip()
    assert (cls.exit_code == 2) == issubclass(cls, errors.UsageError)


def test_config_error_lists_its_problems():
    error = errors.ConfigError(["a: 1", "b: 2"], "r.toml")
    assert str(error) == "r.toml: 2 problems\n  a: 1\n  b: 2"
    assert error.problems == ("a: 1", "b: 2")
    assert str(errors.ConfigError(["a: 1"])).startswith("recipe: 1 problem\n")


def test_a_missing_dependency_names_the_command():
    error = errors.MissingDependencyError("torch", "train", "training")
    assert str(error) == "training needs torch, which is not installed: pip install 'turbopump[train]'"


def test_an_interrupted_run_exits_with_the_conventional_code():
    assert errors.Interrupted("stopped", 2).exit_code == 130
    assert errors.Interrupted("stopped", 15).exit_code == 143


@pytest.mark.parametrize(
    "error",
    [
        errors.ConfigError(["a: 1", "b: 2"], "r.toml"),
        errors.MissingDependencyError("torch", "train", "training"),
        errors.Interrupted("stopped", 15),
        errors.SampleError("sample 3"),
    ],
)
def test_errors_survive_the_way_between_processes(error):
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error) and str(back) == str(error) and back.exit_code == error.exit_code
    assert getattr(back, "problems", None) == getattr(error, "problems", None)
