"""Groups of parameters whose gradient norms are reported beside the total."""

import fnmatch
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from hf_gradutils.errors import InvalidArgumentError

NormGroups: TypeAlias = Literal["layer"] | Mapping[str, str] | None
"""``"layer"``: a group for each numbered layer and each module outside of layers. A mapping: group → name pattern
(:mod:`fnmatch`); a parameter belongs to the first that matches, or to ``rest``. None: no groups."""

ALL = "all"
"""The only group where there are none."""
REST = "rest"

_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_LAYER = re.compile(r"^(.*?\.\d+)\.")


def check_norm_groups(groups: Any) -> NormGroups:
    """Return ``groups``. InvalidArgumentError unless it is ``"layer"``, a mapping of names to patterns, or None."""
    is_mapping = isinstance(groups, Mapping) and all(isinstance(x, str) for item in groups.items() for x in item)
    if not (groups is None or groups == "layer" or is_mapping):
        raise InvalidArgumentError(
            f"grad_norm_groups must be 'layer' or map group names to name patterns, got {groups!r}; "
            "for example {'attention': '*.self_attn.*', 'embeddings': '*embed*'}"
        )
    return groups  # type: ignore[no-any-return]


def unwrapped_name(parameter: str) -> str:
    """A parameter's name in the model itself.

    >>> unwrapped_name("module._orig_mod.model.norm.weight")
    'model.norm.weight'
    """
    return _WRAPPERS.sub("", parameter).removeprefix(".")


def group_name(parameter: str, groups: NormGroups) -> str:
    """The group of a parameter, by its name without what wraps the model.

    >>> group_name("module.model.layers.11.mlp.up.weight", "layer")
    'model.layers.11'
    >>> group_name("model.embed_tokens.weight", "layer")
    'model.embed_tokens'
    >>> group_name("lm_head.weight", {"heads": "*head*"})
    'heads'
    """
    if groups is None:
        return ALL
    name = unwrapped_name(parameter)
    if groups == "layer":
        numbered = _LAYER.match(name)
        return numbered[1] if numbered else name.rpartition(".")[0] or name
    return next((group for group, pattern in groups.items() if fnmatch.fnmatchcase(name, pattern)), REST)
