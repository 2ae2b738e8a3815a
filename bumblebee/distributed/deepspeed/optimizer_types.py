"""Types of DeepSpeed's optimizers, which have none: what we use of them, private attributes included."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypedDict

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

OptimizerState: TypeAlias = "dict[str, Tensor | int]"  # of one tensor, by kind, such as "exp_avg"


class ParamGroup(TypedDict, total=False):
    """A parameter group of torch.optim, as far as optimizers share its options.

    Args:
        params: its parameters.
        lr: learning rate; missing in a group that has the optimizer's own, until the optimizer is created.
        weight_decay: weight decay; missing in the same way.
        initial_lr: learning rate before the schedule.
        fused: one kernel updates all parameters.
        capturable: the optimizer's step can be captured in a CUDA graph.
    """

    params: list[nn.Parameter]
    lr: float
    weight_decay: float
    initial_lr: float
    fused: bool | None
    capturable: bool


class ParameterOffload(Protocol):
    """Handles of the hooks that gather and release parameters at stage 3."""

    forward_hooks: Sequence[RemovableHandle]
    backward_hooks: Sequence[RemovableHandle]
    fwd_pre_hook: RemovableHandle


class BaseOptimizer(Protocol):
    """What we use of torch.optim.Optimizer."""

    param_groups: list[ParamGroup]
    state: MutableMapping[Tensor, OptimizerState]


class ZeroOptimizer(BaseOptimizer, Protocol):
    """What ``deepspeed.initialize`` returns as the optimizer. At stage 0 it is the base optimizer itself."""

    # Stages 1 and 2.
    single_partition_of_fp32_groups: list[Tensor]
    averaged_gradients: dict[int, list[Tensor] | None]  # by parameter group; without offload, None between steps
    _hp_optimizer_states_linked: bool

    def _lazy_init_hp_params_optimizer_state(self) -> None: ...

    # Stage 3.
    parameter_offload: ParameterOffload
    grad_position: dict[int, tuple[int, int, int]]  # parameter id -> (group, offset, elements on each rank)
    fp32_partitioned_groups_flat: list[Tensor]

    def get_param_id(self, param: Tensor) -> int: ...

    # Stage 3 with the optimizer state on NVMe.
    def _swappable_optimizer_subgroup(self, sub_group_id: int) -> bool: ...

    def _optimizer_states_and_gradient_swap_in(self, sub_group_id: int) -> None: ...

    def _writeback_swap_state(self, sub_group_id: int, write_opt_state: bool, write_gradients: bool) -> None: ...

    def _release_swap_buffers(self, sub_group_id: int) -> None: ...
