"""axolotl, exact: one line of its YAML.

    plugins:
      - hf_gradutils.integrations.axolotl.ExactPlugin
    grad_plugin:            # optional: fields of GradUtilsPlugin
      on_nonfinite: skip

List it before other plug-ins: axolotl takes the Trainer class of the first that has one.
"""

import functools
from typing import TYPE_CHECKING, Any

from hf_gradutils.errors import GradUtilsError, InvalidArgumentError

try:
    from hf_gradutils.accelerator import GradUtilsPlugin
    from hf_gradutils.trainer import GradUtilsTrainerMixin, exact
    from hf_gradutils.upstream.axolotl import REWARD_KEYS, RL_KEY, causal_trainer_class
except ImportError as error:
    # axolotl prints an ImportError of a plug-in, and goes on to train without it.
    raise GradUtilsError(
        f"hf_gradutils cannot be imported beside these versions, so nothing is exact: {error}"
    ) from error

if TYPE_CHECKING:
    ExactArgs: type[Any]
    ExactPlugin: type[Any]

__all__ = ["ExactArgs", "ExactPlugin"]


def __getattr__(name: str) -> Any:
    # On request: axolotl takes seconds to import, and is not there where only this package's modules are listed.
    if name in __all__:
        return _classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _classes() -> dict[str, type[Any]]:
    try:
        from axolotl.integrations.base import BasePlugin
        from pydantic import BaseModel
    except ImportError as error:
        raise ImportError(f"hf_gradutils.integrations.axolotl needs axolotl: pip install axolotl ({error})") from error

    class ExactArgs(BaseModel):  # type: ignore[misc,unused-ignore]
        """Keys that this plug-in adds to the YAML."""

        grad_plugin: dict[str, Any] | None = None
        """Fields of ``GradUtilsPlugin``."""

    class ExactPlugin(_ExactTrainers, BasePlugin):  # type: ignore[misc]
        """Makes the Trainer that axolotl builds exact."""

    for made in (ExactArgs, ExactPlugin):
        made.__qualname__ = made.__name__
    return {"ExactArgs": ExactArgs, "ExactPlugin": ExactPlugin}


class _ExactTrainers:
    """The methods of axolotl's ``BasePlugin`` that are ours."""

    _is_asking = False

    def get_input_args(self) -> str:
        """The model of the keys that are added to the YAML."""
        return f"{__name__}.ExactArgs"

    def get_trainer_cls(self, cfg: Any) -> type[Any] | None:
        """The class that axolotl would have taken without this plug-in, made exact.

        Raises:
            InvalidArgumentError: axolotl cannot train with a class of a plug-in here, or a field is unknown.
        """
        if self._is_asking:
            return None
        if key := next((key for key in (RL_KEY, *REWARD_KEYS) if cfg.get(key)), None):
            # Its builders give a plug-in's class no model (rl), or arguments that its reward trainers do not take.
            raise InvalidArgumentError(
                f"axolotl cannot build the class of a plug-in with {key!r} in the YAML; remove ExactPlugin from its "
                "plugins and start it with: hf-gradutils run axolotl train …"
            )
        self._is_asking = True
        try:
            chosen = causal_trainer_class(cfg)
        finally:
            self._is_asking = False
        return exact(chosen, grad_plugin=_grad_plugin(cfg))

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Look at the Trainer that was built.

        Raises:
            InvalidArgumentError: another plug-in's class was taken.
        """
        if not isinstance(trainer, GradUtilsTrainerMixin):
            raise InvalidArgumentError(
                f"axolotl trains with {type(trainer).__name__}, which is not exact: another plug-in has a Trainer "
                "class too; list hf_gradutils.integrations.axolotl.ExactPlugin first"
            )


def _grad_plugin(cfg: Any) -> GradUtilsPlugin | None:
    fields = cfg.get("grad_plugin")
    if not fields:
        return None
    try:
        return GradUtilsPlugin(**fields)
    except TypeError as error:
        raise InvalidArgumentError(
            f"the key grad_plugin of the YAML has the fields of GradUtilsPlugin: {error}"
        ) from None
