"""`--compile`: torch.compile of each network's calls in training passes, so that a resume has the same bits.

Left alone, torch.compile lets what came before decide what is computed now: a second batch size makes its next graph
one for all sizes, a disk cache remembers that for later runs, and after 8 graphs it silently stops compiling. Here a
graph is a function of the shapes alone: each has its own, and too many are an error.

Evaluations, figures and hooks call the networks uncompiled: their scores are those of `nndist evaluate`, and no picture
waits for a compiler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..distributed.batch_norm import keep_out_of_graphs
from ..distributed.runtime import Runtime
from ..errors import UserError, first_line
from ..torch_internals import COMPILED_CALL

MOST_SHAPES = 64
"""Graphs of one network: enough for the batch, an epoch's last batch and their micro-batches; not for texts that are
left at their own lengths."""
BACKEND = "inductor"
COMPILERS = "Debian: apt install g++, macOS: xcode-select --install, Windows: Visual Studio's Build Tools"


class Uncompiled:
    """Null object for a run without --compile."""

    is_compiled = False

    def calls(self) -> contextlib.AbstractContextManager[None]:
        """Leaves the networks as they are."""
        return contextlib.nullcontext()


class Compiled(Uncompiled):
    """The networks' calls, compiled within `calls()`. Raises UserError if there is no compiler that works."""

    is_compiled = True

    def __init__(self, networks: Mapping[str, nn.Module], runtime: Runtime):
        import torch._dynamo

        self.settings: Any = torch._dynamo.config.patch(
            recompile_limit=MOST_SHAPES,
            fail_on_recompile_limit_hit=True,
            skip_nnmodule_hook_guards=False,  # a hook that is added or removed later counts
        )
        torch.compiler.reset()  # what an earlier training in this process compiled does not count as this one's
        is_for_cpu = runtime.device.type == "cpu" and BACKEND == "inductor"
        self.options = {"cpp.threads": runtime.threads} if is_for_cpu else None
        check_compiler(runtime.device, self.options)
        keep_out_of_graphs()
        self.compiled: list[tuple[nn.Module, Callable[..., Any]]] = []
        for network in networks.values():
            if getattr(network, COMPILED_CALL) is None:  # the recipe may have compiled it itself
                network.compile(dynamic=False, backend=BACKEND, options=self.options)
                self.compiled.append((network, vars(network).pop(COMPILED_CALL)))

    @contextlib.contextmanager
    def calls(self) -> Iterator[None]:
        """Context manager: calls of the networks run their graphs; raises UserError if torch can't compile one."""
        for network, call in self.compiled:
            vars(network)[COMPILED_CALL] = call
        try:
            with self.settings:
                yield
        except Exception as error:
            if reason := why_not_compiled(error):
                raise UserError(f"--compile: {reason}; leave the flag out") from error
            raise
        finally:
            for network, _ in self.compiled:
                vars(network).pop(COMPILED_CALL, None)


def compiled_if_asked(asked: bool, networks: Mapping[str, nn.Module], runtime: Runtime, shard: str) -> Uncompiled:
    """The networks' compiled calls, or the null object. Raises UserError if the networks can't be compiled."""
    if not asked:
        return Uncompiled()
    if shard != "none" and runtime.world_size > 1:
        raise UserError(f"--compile: is not supported with --shard {shard}; leave one of them out")
    return Compiled(networks, runtime)


def check_compiler(device: torch.device, options: dict[str, Any] | None) -> None:
    """Compiles and runs something small; raises UserError with the remedy if that fails."""
    try:
        torch.compile(_doubled, dynamic=False, backend=BACKEND, options=options)(torch.ones(8, device=device))
    except Exception as error:  # of torch, of a compiler, of the system
        reason = first_line(_root(error)).rstrip(".")
        raise UserError(
            f"--compile: nothing can be compiled here ({reason}); install a C++ compiler ({COMPILERS}), or leave the "
            "flag out"
        ) from error


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return x + x


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def why_not_compiled(error: BaseException) -> str:
    """Why torch could not compile a network; "" for any other error."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    if isinstance(error, FailOnRecompileLimitHit):
        return (
            f"a network has been compiled {MOST_SHAPES} times, and needs it again: its inputs come in too many sizes, "
            "or its code depends on a value that changes"
        )
    if isinstance(error, TorchDynamoException):
        root = _root(error)
        return f"torch can't compile a network ({type(root).__name__}: {first_line(root)})"
    return ""
