"""What a comparison or a search is asked for, beside the settings of its runs. Needs no torch."""

from typing import Any, Self

from pydantic import Field, model_validator

from tailora.core.config import AdaLoRA, LoRAConfig, StrictModel
from tailora.errors import ConfigError, listing
from tailora.study.search_space import read_space
from tailora.train.config import TrainConfig

LORA, FULL = "lora", "full"
GIVEN = {"model", "data", "eval_data", "output_dir", "seed", "split_seed", "validation_split", "max_steps"}
GIVEN |= {"num_train_epochs", "samples", "report_to", "resume_from_checkpoint", "save_steps", "streaming"}
AT_THE_END = {"eval_steps", "early_stopping_patience"}  # a step chosen by the examples that judge would flatter
GIVEN |= AT_THE_END
OF_ADAPTERS = {*LoRAConfig.model_fields, *AdaLoRA.model_fields, "adapter", "loraplus_lr_ratio", "quantize"}
TRIALS = 20
PRIORS = {"lora": 5e-4, "full": 5e-5}  # where the search for a rate begins: full fine-tuning wants about a tenth


class CompareConfig(StrictModel):
    """A comparison. Every arm is the run's settings with a few of them changed."""

    arms: dict[str, dict[str, Any]] = Field(
        {LORA: {}, FULL: {"method": "full"}}, description="name -> settings that differ"
    )
    seeds: int = Field(3, ge=1, le=100, description="runs of each arm at its own best rate")
    rate_tries: int = Field(5, ge=1, le=50, description="runs of each arm to find its learning rate")
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False, description="time for everything")
    margin: float = Field(0.02, gt=0, allow_inf_nan=False, description="nats per token that make no difference")
    forgetting_data: str | None = Field(None, description="texts of other tasks; by default what the base writes")

    @model_validator(mode="after")
    def _arms_differ(self) -> Self:
        problems = [f"arm {name!r} changes {key}, which all arms share" for name, key in self._shared()]
        if len(self.arms) < 2:
            problems.append(f"a comparison needs two arms; there is {', '.join(self.arms) or 'none'}")
        if sum(self.method(name) == FULL for name in self.arms) > 1:
            problems.append("there is one full fine-tuning: give one arm method=full")
        if problems:
            raise ConfigError(listing(problems))
        return self

    def _shared(self) -> list[tuple[str, str]]:
        return [(name, key) for name, changes in self.arms.items() for key in changes if key in GIVEN]

    def prior(self, arm: str) -> float:
        """Where the search for the arm's learning rate begins."""
        return float(self.arms[arm].get("learning_rate", PRIORS[self.method(arm)]))

    def method(self, arm: str) -> str:
        return str(self.arms[arm].get("method", LORA))


def arm_settings(train: TrainConfig, study: CompareConfig, arm: str, **given: Any) -> dict[str, Any]:
    """Settings of one run of an arm, without its output_dir. Raises ConfigError where they contradict each other."""
    common = train.model_dump(exclude_unset=True, exclude={"output_dir", "resume_from_checkpoint", "learning_rate"})
    if study.method(arm) == FULL:  # those of the adapter and of its frozen base are the other arms'
        common = {name: value for name, value in common.items() if name not in OF_ADAPTERS}
    split = train.seed if train.split_seed is None else train.split_seed
    values = {**common, **study.arms[arm], "samples": 0, "split_seed": split, **given}
    TrainConfig(**values)
    return values


class SearchConfig(StrictModel):
    """A search. Without trials and minutes there are 20 trials."""

    trials: int | None = Field(None, ge=2, le=10**6, description="settings to try; 20 without --minutes")
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False, description="time for everything")
    space: dict[str, Any] = Field(
        {}, description="setting -> values 4,8,16, range 1e-4..1e-2 or one fixed value; see docs"
    )
    seeds: int = Field(3, ge=1, le=100, description="runs that judge each finalist")
    finalists: int = Field(3, ge=1, le=20, description="settings that are judged: the best, and cheaper ones near it")
    margin: float = Field(0.02, gt=0, allow_inf_nan=False, description="nats per token that make no difference")
    storage: str | None = Field(
        None, description="database of the study, for machines that share no folder: postgresql://..., sqlite:///..."
    )
    lr_only: bool = Field(False, description="find the useful learning rates by one run, and nothing else")

    @model_validator(mode="after")
    def _space_is_read(self) -> Self:
        read_space(self.space)
        return self

    @property
    def wanted(self) -> int | None:
        """Number of trials; None where the time decides."""
        return self.trials if self.trials is not None or self.minutes is not None else TRIALS
