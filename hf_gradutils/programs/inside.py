"""Inside a program under ``hf-gradutils run`` or ``check``: hooks for what it has imported.

Imports no torch, no transformers and no more of this package: any of them may be half imported at that time.
"""

import functools
import sys
from typing import Any

from hf_gradutils import _environment
from hf_gradutils.programs.hooks import Make, Start, hook_new, hook_train
from hf_gradutils.programs.settings import Settings


def hook(name: str, module: Any, values: dict[str, Any]) -> None:
    """Hook a module that the program has just imported, as the values of ``Settings`` say."""
    settings = Settings(**values)
    if name == "torch.optim.optimizer":
        from hf_gradutils.programs.loops import watch_loops

        watch_loops(module.register_optimizer_step_pre_hook, settings)
        return
    if settings.makes_exact:
        hook_new(module.Trainer, _maker(settings))
    if settings.checks:
        hook_train(module.Trainer, functools.partial(_check, settings=settings))


def _check(trainer: Any, start: Start, settings: Settings) -> None:
    from hf_gradutils.programs.checking import check_and_end

    check_and_end(trainer, start, settings)


def _maker(settings: Settings) -> Make:
    reported = set()

    def make(cls: type[Any]) -> type[Any]:
        from hf_gradutils.trainer import exact

        made = exact(cls)
        if cls not in reported:
            reported.add(cls)
            settings.mark_exact()
            launched = _environment.read_launched_rank()
            if launched is None or launched.global_rank == 0:
                print(f"hf-gradutils: {cls.__module__}.{cls.__qualname__} is exact", file=sys.stderr, flush=True)
        return made

    return make
