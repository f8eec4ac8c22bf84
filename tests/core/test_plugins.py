import sys

import pytest

from turbopump.core import plugins
from turbopump.core.errors import UsageError


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A real distribution with entry points, on the path of this process."""
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[turbopump.tests]\nwidget = acme_plugin:KIND\nbroken = acme_plugin:NONE\nmissing = acme_nowhere:KIND\n"
    )
    (tmp_path / "acme_plugin.py").write_text("KIND = 'the widget'\ndef build():\n    return 3\n")
    (tmp_path / "acme_needs.py").write_text("import acme_absent\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._group.cache_clear()
    yield
    plugins._group.cache_clear()
    for name in ("acme_plugin", "acme_needs"):
        sys.modules.pop(name, None)


def test_a_kind_is_found_through_entry_points(installed):
    assert plugins.names("turbopump.tests") == ["broken", "missing", "widget"]
    assert plugins.find("turbopump.tests", "widget") == "the widget"


def test_an_unknown_kind_is_a_usage_error_with_a_hint(installed):
    with pytest.raises(UsageError, match=r"no tests kind 'widgte', did you mean 'widget'\? \(known: broken"):
        plugins.find("turbopump.tests", "widgte")
    with pytest.raises(UsageError, match=r"no nothing kind 'x' \(known: none installed\)"):
        plugins.find("turbopump.nothing", "x")


@pytest.mark.parametrize("kind", ["broken", "missing"])
def test_a_plugin_that_does_not_load_is_named(installed, kind):
    with pytest.raises(UsageError, match=f"tests kind '{kind}' is installed but does not load"):
        plugins.find("turbopump.tests", kind)


def test_load_function(installed):
    assert plugins.load_function("acme_plugin:build")() == 3


@pytest.mark.parametrize("reference", ["", "x", ":f", "m:", "m", ".m:f", "m..n:f"])
def test_malformed_references(reference):
    with pytest.raises(UsageError, match="not of the form module:function"):
        plugins.load_function(reference)


def test_references_to_nothing(installed):
    with pytest.raises(UsageError, match="no module 'acme_nowhere'; is its folder on PYTHONPATH"):
        plugins.load_function("acme_nowhere:f")
    with pytest.raises(UsageError, match="no module 'acme_absent'"):
        plugins.load_function("acme_needs:f")
    with pytest.raises(UsageError, match="module 'acme_plugin' has no 'bulid'"):
        plugins.load_function("acme_plugin:bulid")


def test_an_error_inside_the_users_module_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "acme_fails.py").write_text("{}.nothing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(AttributeError, match="nothing"):
        plugins.load_function("acme_fails:f")


def test_the_torch_side_is_loaded_by_name_only_when_asked():
    kind = plugins.ModelKind(int, workload=lambda *_: None, module="colorsys")
    sys.modules.pop("colorsys", None)
    assert "colorsys" not in sys.modules
    assert kind.torch_side() is sys.modules["colorsys"]
