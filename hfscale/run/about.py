"""What writers are told of a run: its name, its config and its environment."""

from __future__ import annotations

from hfscale.config.load import flatten, to_yaml
from hfscale.config.schema import TrainConfig
from hfscale.monitor.writers.base import About
from hfscale.run.environment import entries

TEXTS = ("run/config", "run/environment")


def about_run(config: TrainConfig, *, first_step: int) -> About:
    """Return what is said of the attempt that will log ``first_step`` next."""
    values = config.model_dump(mode="json", by_alias=True)
    plain = {
        key: value for key, value in flatten(values) if isinstance(value, str | int | float | bool)
    }
    texts = (f"```yaml\n{to_yaml(config)}```", environment(config))
    return About(
        config.run_dir,
        config.run.name,
        first_step=first_step,
        config=plain,
        texts={tag: text for tag, text in zip(TEXTS, texts, strict=True) if text},
    )


def environment(config: TrainConfig) -> str:
    """Return the newest entry of the run's environment.json as a table; "" where no launcher wrote
    one.
    """
    attempts = entries(config.run_dir)
    if not attempts:
        return ""
    facts = attempts[-1].as_dict()
    facts.pop("sources", None)  # where each value of the config came from
    facts["command"] = " ".join(attempts[-1].command)
    rows = [f"| {name} | {value} |" for name, value in flatten(facts) if value]
    return "\n".join(["| | |", "|---|---|", *rows])
