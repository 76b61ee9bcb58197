"""Which solvers and schedules one model can use, which it uses when none is named, and the scheduler of one request."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers

from services.sampler.solvers import DIFFUSION, FLOW, FLOW_OTHERS, FLOW_PIPELINES, SCHEDULES, Solver


@dataclass(frozen=True, slots=True)
class Choices:
    """The solvers that one model can use, and what it uses when nothing is said."""

    solvers: Mapping[str, Solver] = field(default_factory=dict)
    solver: str = ""  # of the model's own scheduler; "": it has no common name
    schedules: Mapping[str, str] = field(default_factory=dict)  # solver: its schedule when none is named, if it has one
    step_limits: Mapping[str, int] = field(default_factory=dict)  # solver: most steps, where there is a limit

    def filled(self, solver: str, schedule: str) -> tuple[str, str]:
        """Solver and schedule, where "" is the model's own; still "" where that has no common name."""
        solver = solver or self.solver
        return solver, schedule or self.schedules.get(solver, "")

    def schedule_names(self) -> list[str]:
        """Every schedule that some solver of this model follows."""
        known = {name for solver in self.solvers.values() for name in solver.schedules}
        return [name for name in SCHEDULES if name in known]

    def violations(self, solver: str, schedule: str, step_count: int) -> list[tuple[str, str]]:
        """(field, what to do) for all that this model cannot use; `step_count` is the resolved one."""
        if solver and solver not in self.solvers:
            wrong = [("solver", refusal(solver, "this model", list(self.solvers)))]
            if schedule and schedule not in self.schedule_names():
                wrong.append(("schedule", refusal(schedule, "this model", self.schedule_names())))
            return wrong
        solver = solver or self.solver
        return self._schedule_violations(solver, schedule) + self._step_violations(solver, step_count)

    def _schedule_violations(self, solver: str, schedule: str) -> list[tuple[str, str]]:
        usable = list(self.solvers[solver].schedules) if solver else []
        if not schedule or schedule in usable:
            return []
        if self.solvers and not solver:
            return [("schedule", "this model's own solver has no common name: name a solver too, or leave it out")]
        return [("schedule", refusal(schedule, f"solver {solver}" if solver else "this model", usable))]

    def _step_violations(self, solver: str, step_count: int) -> list[tuple[str, str]]:
        limit = self.step_limits.get(solver, step_count)
        if step_count <= limit:
            return []
        return [("step_count", f"solver {solver} takes at most {limit} steps, not {step_count}")]

    def scheduler(self, own: Any, solver: str, schedule: str) -> Any:
        """A scheduler for one request: `own`, the model's, copied, or another one made of its config."""
        chosen = self.filled(solver, schedule)
        if chosen == self.filled("", ""):
            return copy.deepcopy(own)
        return build(own, self.solvers[chosen[0]], chosen[1])


NO_CHOICES = Choices()


def refusal(value: str, whose: str, usable: list[str]) -> str:
    asked = repr(value[:40])
    if not usable:
        return f"{whose} takes none, {asked} was asked for: leave it out"
    return f"{asked} is not for {whose}; use one of {', '.join(usable)}, or leave it out"


def choices_of(pipeline: Any) -> Choices:
    """What the pipeline can use: nothing unless its solvers draw from the request's seed and its calls are known."""
    own, found = pipeline.scheduler, solvers_of(pipeline)
    tried = {name: attempt(own, solver) for name, solver in found.items()}
    built = {name: scheduler for name, scheduler in tried.items() if scheduler is not None}
    solvers = {name: found[name] for name in built}
    return Choices(
        solvers,
        solver=next((name for name, solver in solvers.items() if is_own(own, solver)), ""),
        schedules={name: schedule_of(scheduler, solvers[name]) for name, scheduler in built.items()},
        step_limits={n: built[n].config[s.step_limit] for n, s in solvers.items() if s.step_limit},
    )


def attempt(own: Any, solver: Solver) -> Any:
    """The solver's scheduler; None if it cannot be made of the config of `own`."""
    try:
        return build(own, solver, "")
    except (NotImplementedError, ValueError):  # e.g. a beta_schedule that only few schedulers know
        return None


def solvers_of(pipeline: Any) -> dict[str, Solver]:
    config = pipeline.scheduler.config
    if type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        names = FLOW_PIPELINES.get(type(pipeline).__name__, FLOW_OTHERS)
        shifts = config["use_dynamic_shifting"] and config["time_shift_type"] == "exponential"
        # FLUX gives `mu` to every scheduler; DPMSolver takes it only if it is to shift by it.
        return {name: FLOW[name] for name in names if name != "dpm++2m" or shifts}
    # `prepare_extra_step_kwargs` is what hands the request's generator to `step`.
    seeds = hasattr(pipeline, "prepare_extra_step_kwargs")
    known = "beta_start" in config and config.get("prediction_type") in ("epsilon", "v_prediction")
    return DIFFUSION if seeds and known else {}


def is_own(own: Any, solver: Solver) -> bool:
    return type(own).__name__ == solver.scheduler and agrees(own, solver.changes)


def schedule_of(scheduler: Any, solver: Solver) -> str:
    """The common name of what the scheduler follows, "" if it has none."""
    return next((name for name in solver.schedules if agrees(scheduler, SCHEDULES[name])), "")


def agrees(scheduler: Any, changes: Mapping[str, object]) -> bool:
    """Whether the changes would change nothing; keys that the scheduler does not know are passed over."""
    config = scheduler.config
    return all(config[key] == value for key, value in changes.items() if key in config)


def build(own: Any, solver: Solver, schedule: str) -> Any:
    """The solver's scheduler with the config of `own`, changed to follow `schedule`; "": that of the config."""
    shifts = {key: own.config[old] for key, old in solver.renamed.items()}
    changes = {**solver.changes, **shifts, **SCHEDULES.get(schedule, {})}
    return getattr(diffusers, solver.scheduler).from_config(own.config, **changes)
