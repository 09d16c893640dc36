"""The settings of a comparison and of a search, beside those of their training runs. Needs no torch."""

from collections.abc import Collection, Mapping
from itertools import combinations
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from tailora.core.config import AdaLoRA, LoRAConfig, StrictModel
from tailora.errors import ConfigError, listing
from tailora.study.search_space import SHARED_BY_RUNS, read_space
from tailora.train.config import TrainConfig

LORA, FULL = "lora", "full"
OF_ADAPTERS = {*LoRAConfig.model_fields, *AdaLoRA.model_fields, "adapter", "loraplus_lr_ratio", "quantize"}
OF_ADAPTERS |= {"fsdp_offload_params"}  # of a frozen base
TRIALS = 20
FIRST_RATES = {
    LORA: 5e-4,
    FULL: 5e-5,
}  # where the search for a learning rate starts: full fine-tuning needs about a tenth


def trial_settings(
    train: TrainConfig, changes: Mapping[str, Any], leave_out: Collection[str] = (), **fixed: Any
) -> dict[str, Any]:
    """Settings of one run of a study, without its output_dir: those of `train` with changes.

    leave_out: settings of `train` that the run does not take.    fixed: settings that override the changes.

    Raises ConfigError where they contradict each other.
    """
    common = train.model_dump(exclude_unset=True, exclude={"output_dir", "resume_from_checkpoint", *leave_out})
    split = train.seed if train.split_seed is None else train.split_seed  # the same examples for every seed
    values = {**common, **changes, "samples": 0, "split_seed": split, **fixed}
    TrainConfig(**values)
    return values


# Of a comparison and of a search
Minutes = Annotated[float | None, Field(gt=0, allow_inf_nan=False, description="time limit for the whole study")]
MARGIN = "differences of the loss below this do not matter; nats per token, or the unit of the task"
Margin = Annotated[float, Field(gt=0, allow_inf_nan=False, description=MARGIN)]
WORKERS = "runs at a time: each has a device of its own, or on a CPU its share of the cores"
Workers = Annotated[int, Field(ge=1, le=1000, description=WORKERS)]


class CompareConfig(StrictModel):
    """A comparison of arms. An arm is the settings of the run with a few of them changed."""

    arms: dict[str, dict[str, Any]] = Field(
        {LORA: {}, FULL: {"method": "full"}}, description="name -> settings that differ"
    )
    seeds: int = Field(3, ge=1, le=100, description="runs of each arm at its best learning rate")
    rate_tries: int = Field(5, ge=1, le=50, description="runs of each arm to find its best learning rate")
    minutes: Minutes = None
    margin: Margin = 0.02
    forgetting_data: str | None = Field(
        None, description="texts that are not about the task; default: texts that the base model writes"
    )
    workers: Workers = 1

    @model_validator(mode="after")
    def _arms_differ(self) -> Self:
        problems = [
            f"arm {name!r} changes {key}, which all arms share"
            for name, changes in self.arms.items()
            for key in changes
            if key in SHARED_BY_RUNS
        ]
        problems += [
            f"arms {first!r} and {second!r} have the same settings: change one of them"
            for (first, changes), (second, others) in combinations(self.arms.items(), 2)
            if changes == others and self.method(first) != FULL
        ]
        if len(self.arms) < 2:
            problems.append(f"a comparison needs two arms; there is {', '.join(self.arms) or 'none'}")
        if sum(self.method(name) == FULL for name in self.arms) > 1:
            problems.append("give method=full to one arm only: there is only one full fine-tuning")
        if problems:
            raise ConfigError(listing(problems))
        return self

    def first_rate(self, arm: str) -> float:
        """Where the search for the arm's learning rate begins."""
        return float(self.arms[arm].get("learning_rate", FIRST_RATES[self.method(arm)]))

    def method(self, arm: str) -> str:
        return str(self.arms[arm].get("method", LORA))


def arm_settings(train: TrainConfig, study: CompareConfig, arm: str, **fixed: Any) -> dict[str, Any]:
    """Settings of one run of an arm, without its output_dir. Raises ConfigError where they contradict each other."""
    leave_out = {"learning_rate"}
    if study.method(arm) == FULL:
        leave_out |= OF_ADAPTERS
    return trial_settings(train, study.arms[arm], leave_out, **fixed)


class SearchConfig(StrictModel):
    """A search. Without trials and minutes there are 20 trials."""

    trials: int | None = Field(None, ge=2, le=10**6, description="number of trials; 20 without --minutes")
    minutes: Minutes = None
    space: dict[str, Any] = Field(
        {},
        description="values of a setting to search: 4,8,16 or 1e-4..1e-2, or one; "
        'see "Comparing and searching" in the docs',
    )
    seeds: int = Field(3, ge=1, le=100, description="runs of each finalist")
    finalists: int = Field(3, ge=1, le=20, description="trials compared at the end: the best, and cheaper ones")
    margin: Margin = 0.02
    storage: str | None = Field(
        None, description="database of the search, to share it between machines: postgresql://... or sqlite:///..."
    )
    workers: Workers = 1
    lr_only: bool = Field(False, description="only find the useful range of learning rates, in one run")

    @model_validator(mode="after")
    def _space_is_read(self) -> Self:
        read_space(self.space)
        if self.lr_only and self.workers > 1:
            raise ConfigError("lr_only is one run: leave out workers")
        return self

    @property
    def trial_count(self) -> int | None:
        """None if the time limit decides."""
        return self.trials if self.trials is not None or self.minutes is not None else TRIALS
