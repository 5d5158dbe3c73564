"""The plug-in for axolotl, with stand-ins for what it meets of axolotl; `make frameworks` has the real one."""

import functools
import subprocess
import sys
import types

import pytest
from transformers import Trainer

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainerMixin, exact
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.integrations import axolotl


class AxolotlTrainer(Trainer):
    pass


class Named(Trainer):
    """Of the key ``trainer_cls``."""


class OfAnother(Trainer):
    """Of another plug-in."""


class OtherPlugin:
    def get_trainer_cls(self, cfg):
        return OfAnother


class Builder:
    """Asks plug-ins first, then the YAML, as axolotl's does."""

    def _get_trainer_cls(self):
        classes = (plugin.get_trainer_cls(self.cfg) for plugin in self.cfg["plugins"])
        found = next(filter(None, classes), None)
        return found or self.cfg.get("trainer_cls") or AxolotlTrainer


@pytest.fixture
def plugin(monkeypatch):
    parts = {
        "axolotl.integrations.base": {"BasePlugin": object},
        "axolotl.core.builders.causal": {"HFCausalTrainerBuilder": Builder},
    }
    for name in ("axolotl", "axolotl.integrations", "axolotl.core", "axolotl.core.builders", *parts):
        module = types.ModuleType(name)
        vars(module).update(parts.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    axolotl._classes.cache_clear()
    yield axolotl.ExactPlugin()
    axolotl._classes.cache_clear()


def chosen(plugins, **keys):
    """The class that the builder of axolotl takes."""
    return Builder._get_trainer_cls(types.SimpleNamespace(cfg={"plugins": plugins, **keys}))


def test_our_class_is_in_front_of_theirs(plugin):
    made = chosen([plugin])
    assert made is exact(AxolotlTrainer)
    assert made.__mro__.index(GradUtilsTrainerMixin) < made.__mro__.index(AxolotlTrainer)


def test_a_class_of_the_yaml_or_of_a_later_plugin_is_made_exact(plugin):
    assert chosen([plugin], trainer_cls=Named) is exact(Named)
    assert chosen([plugin, OtherPlugin()]) is exact(OfAnother)


def test_a_plugin_listed_before_is_noticed(plugin):
    assert chosen([OtherPlugin(), plugin]) is OfAnother
    with pytest.raises(InvalidArgumentError, match=r"trains with OfAnother, .*ExactPlugin first"):
        plugin.post_trainer_create({}, OfAnother.__new__(OfAnother))
    made = exact(OfAnother)
    plugin.post_trainer_create({}, made.__new__(made))


def test_settings_come_from_the_yaml(plugin):
    made = chosen([plugin], grad_plugin={"on_nonfinite": "skip"})
    assert made.default_plugin == GradUtilsPlugin(on_nonfinite="skip")
    assert plugin.get_input_args() == "hf_gradutils.integrations.axolotl.ExactArgs"
    assert axolotl.ExactArgs(grad_plugin={"on_nonfinite": "skip"}).grad_plugin == {"on_nonfinite": "skip"}
    with pytest.raises(InvalidArgumentError, match="grad_plugin of the YAML has the fields of GradUtilsPlugin"):
        chosen([plugin], grad_plugin={"on_infinity": "skip"})


@pytest.mark.parametrize("key", ["rl", "reward_model", "process_reward_model"])
def test_where_axolotl_cannot_build_it_the_plugin_says_what_does(plugin, key):
    with pytest.raises(InvalidArgumentError, match=f"{key}.*hf-gradutils run axolotl train"):
        chosen([plugin], **{key: "dpo"})


def test_an_error_of_theirs_leaves_the_plugin_as_it_was(plugin, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Builder, "_get_trainer_cls", functools.partialmethod(_fail))
        with pytest.raises(ValueError, match="no such class"):
            plugin.get_trainer_cls({"plugins": [plugin]})
    assert chosen([plugin]) is exact(AxolotlTrainer)


def _fail(self):
    raise ValueError("no such class")


def test_without_axolotl_the_module_imports_and_the_plugin_says_what_is_missing():
    code = (
        "import sys; sys.modules['axolotl'] = None\nfrom hf_gradutils.integrations import axolotl\naxolotl.ExactPlugin"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "ImportError: hf_gradutils.integrations.axolotl needs axolotl: pip install axolotl" in run.stderr
    with pytest.raises(AttributeError, match="has no attribute 'Plugin'"):
        _ = axolotl.Plugin
