"""What a launcher starts: a folder whose config.yaml says what each rank does. Of two kinds:

    Training      a run directory, among whose ranks the batch must divide
    Computation   a folder that scores or predicts, in any number of processes

A launcher asks a job what it must know, and never what it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from hfscale.checkpoint import layout
from hfscale.config import permission
from hfscale.config.inference import HarnessConfig, PredictConfig, ShardsConfig
from hfscale.config.load import load_config, to_yaml
from hfscale.config.rules import notices, solve_batch
from hfscale.config.schema import Cluster, TrainConfig
from hfscale.config.section import Section
from hfscale.dist.secret import make_secret
from hfscale.engine.ds_config import inference_config
from hfscale.errors import EXIT_DONE, EXIT_HUNG, EXIT_STOPPED, ConfigError
from hfscale.hub import local_folder
from hfscale.packages import refuse_wrong_versions
from hfscale.reports.status import Line, describe, last_record
from hfscale.run.run import Run
from hfscale.run_files import CHECKPOINTS, CONFIG, SCORES, TENSORBOARD, is_run, parts_of
from hfscale.shards.files import write_atomically
from launch import run_dir
from launch.request import Request, quote


def show_curves(folder: Path, *, name: str) -> str:
    """Return the command that shows the curves in ``folder`` under the run's ``name``."""
    # a comma would begin the next run
    named = folder if "," in str(folder) else f"{name}:{folder}"
    return f"tensorboard --logdir{'' if named is folder else '_spec'} {quote(named)}"


class Job(ABC):
    """What ranks are started for, in ``folder``. ``procs`` and ``port`` are None where the launcher
    chooses; ``worker`` is the module that is one rank.
    """

    does: str  # train, evaluate, predict
    config: Section
    name: str  # in the queue
    cluster: Cluster
    place: tuple[str, str]  # what the folder is called, and what says where it lies
    curves: str = ""  # the command that shows them

    def __init__(
        self,
        folder: Path,
        *,
        procs: int | None = None,
        port: int | None = None,
        dry_run: bool = False,
        worker: str = Request.worker,
    ) -> None:
        self.folder, self.file = folder, folder / CONFIG
        self.procs, self.port = procs, port
        self.dry_run, self.worker = dry_run, worker

    @abstractmethod
    def fit(self, procs: int) -> str:
        """Return how the work is cut among ``procs`` ranks.

        Raises:
            ConfigError: if it cannot be.
        """

    @abstractmethod
    def check(self, procs: int, *, device_type: str) -> list[str]:
        """Return notices, after all that can be known of ``procs`` ranks without importing torch.

        Raises:
            UserError: for the first thing that speaks against it.
        """

    @abstractmethod
    def check_parts(self) -> None:
        """Return if model, data and the rest fit together. Takes seconds.

        Raises:
            UserError: for the first of them that does not.
        """

    @abstractmethod
    def fetch(self) -> None:
        """Return when what comes from the hub is here: nodes have no network."""

    @abstractmethod
    def from_hub(self) -> bool:
        """Return whether something is read from the hub's cache."""

    @abstractmethod
    def record(self, *, launcher: str, procs: int) -> None:
        """Write what the ranks read, and this attempt's entry. The folder is held."""

    @abstractmethod
    def reached(self) -> str | None:
        """Return what names how far it has come; None at its start."""

    @abstractmethod
    def status(self, *, running: bool) -> list[Line]:
        """Return what there is to say on where it is."""

    @abstractmethod
    def goes_on(self, *more: str) -> str:
        """Return the command by which a person goes on with it."""

    def results(self) -> list[tuple[str, Path]]:
        """Return what will be where, by its name."""
        return [(self.place[0], self.folder)]

    def usable_nodes(self, nodes: int, tasks: int) -> int:
        """Return how many of ``nodes``, with ``tasks`` ranks each, it can use."""
        return nodes

    def stops_in(self) -> float:
        """Return how many seconds it was seen to take from a request to stop to its end."""
        return 0.0

    def told(self, code: int) -> str:
        """Return what to say of a local start that ended with ``code``; "" for nothing."""
        return ""


class Training(Job):
    """A run, pretraining or fine-tuning."""

    does = "train"
    place = "run directory", "run.root"
    config: TrainConfig

    def __init__(self, request: Request, extra: Sequence[str] = (), *, fresh: bool = False) -> None:
        self.request, self.loaded = request, request.load(extra)
        self.config = self.loaded.config
        self.run = Run(self.config, fresh=fresh)
        self.name, self.cluster = self.config.run.name, self.config.cluster
        super().__init__(
            self.config.run_dir,
            procs=request.procs,
            port=request.port,
            dry_run=request.dry_run,
            worker=request.worker,
        )
        if "tensorboard" in self.config.metrics.drawn_by:
            self.curves = show_curves(self.folder / TENSORBOARD, name=self.name)

    def fit(self, procs: int) -> str:
        """Return how the batch is cut."""
        train = self.config.train
        plan = solve_batch(train.global_batch, micro_batch=train.micro_batch, data_size=procs)
        return plan.equation

    def check(self, procs: int, *, device_type: str) -> list[str]:
        """Return notices on the config, and on what it changes in its run directory."""
        self.fit(procs)
        said = notices(self.config)
        if not self.run.fresh:  # else what lies there is replaced
            said = [*said, *run_dir.compare(self.config), *self._over()]
        self.run.read(device_type=device_type)
        return said

    def _over(self) -> list[str]:
        """Return the notice on a run that has come as far as it is to go, if it has."""
        saved, steps = layout.committed(self.folder / CHECKPOINTS), self.config.train.steps
        if not saved or steps is None or layout.step_of(saved[-1]) < steps:
            return []
        reached = layout.step_of(saved[-1])
        return [
            f"nothing is left to do: the run has a checkpoint of step {reached}, and train.steps "
            f"is {steps}"
        ]

    def check_parts(self) -> None:
        """Return if tokenizer, data, objective or task, model and pretrained weights fit."""
        self.run.check()

    def fetch(self) -> None:
        """Return when the pretrained weights are here."""
        if pretrained := self.config.model.pretrained:
            local_folder(pretrained, where="model.pretrained", weights=True)

    def from_hub(self) -> bool:
        """Return whether tokenizer or pretrained weights are named as the hub does."""
        tokenizer = self.config.tokenizer and self.config.tokenizer.path
        names = (tokenizer, self.config.model.pretrained)
        return any(name and not Path(name).is_absolute() for name in names)

    def record(self, *, launcher: str, procs: int) -> None:
        """Write the resolved config and what environment.json says of this attempt."""
        run_dir.record(self.loaded, launcher=launcher, procs=procs)

    def reached(self) -> str | None:
        """Return the newest checkpoint."""
        saved = layout.committed(self.folder / CHECKPOINTS)
        return saved[-1].name if saved else None

    def status(self, *, running: bool) -> list[Line]:
        """Return the run's step, loss, speed and the rest."""
        return describe(self.config, running=running)

    def goes_on(self, *more: str) -> str:
        """Return the command that goes on with the run."""
        return " ".join([f"hfscale {self.config.verb} {quote(self.folder)}", *more])

    def usable_nodes(self, nodes: int, tasks: int) -> int:
        """Return the most of ``nodes`` among which the global batch divides; all of them where
        ``cluster.min_nodes`` asks for no fewer.
        """
        train, fewest = self.config.train, self.cluster.min_nodes or nodes
        fits = (
            count
            for count in range(nodes, fewest - 1, -1)
            if train.global_batch % (train.micro_batch * tasks * count) == 0
        )
        return next(fits, nodes)

    def stops_in(self) -> float:
        """Return how long a step and a save took last."""
        record = last_record(self.folder)
        return float(record.get("save_s", 0.0) + record.get("step_s", 0.0))

    def told(self, code: int) -> str:
        """Return how the run goes on, or what it is good for now."""
        if code in (EXIT_STOPPED, EXIT_HUNG):
            return f"stopped; the same command goes on, and so does: {self.goes_on()}"
        if code == EXIT_DONE:
            place = quote(self.folder)
            return f"done; hfscale evaluate {place} scores it; predict and export take it as well"
        return ""


class Computation(Job):
    """Scores or predictions, which are ``result`` once they are whole."""

    config: PredictConfig | ShardsConfig | HarnessConfig

    def __init__(
        self,
        config: PredictConfig | ShardsConfig | HarnessConfig,
        folder: Path | None = None,
        *,
        procs: int | None = None,
        port: int | None = None,
        dry_run: bool = False,
        worker: str = Request.worker,
    ) -> None:
        self.config, self.cluster = config, config.cluster
        predicts = isinstance(config, PredictConfig) and not config.predict.answers
        self.does = "predict" if predicts else "evaluate"
        self.name = f"hfscale-{self.does}"
        self.place = "folder", "--out" if predicts else "MODEL"
        if isinstance(config, PredictConfig):
            self.model, self.result = config.predict.model, config.predict.out
        else:
            asked = config.evaluate if isinstance(config, ShardsConfig) else config.harness
            self.model, self.result = asked.model, asked.out
        super().__init__(
            folder or self._home(), procs=procs, port=port, dry_run=dry_run, worker=worker
        )

    def _home(self) -> Path:
        if not isinstance(self.config, PredictConfig):
            return self.result
        return self.result.parent if self.config.predict.answers else parts_of(self.result)

    def fit(self, procs: int) -> str:
        """Return how many processes share it: any number does."""
        return f"{procs} processes"

    def check(self, procs: int, *, device_type: str) -> list[str]:
        """Return no notices; the rest was settled when the job was named."""
        refuse_wrong_versions()
        pipes = isinstance(self.config, ShardsConfig) and self.config.data.allow_pipe
        if pipes and not permission.granted(permission.PIPE):  # a stranger's folder, perhaps
            raise ConfigError(
                "this config may run commands, which nobody has allowed here",
                where=self.file,
                value=permission.PIPE,
                remedy=f"if you trust it, say {permission.PIPE}=true on the command line",
            )
        how = self.config.engine
        if how.zero_stage == 3:
            inference_config(how, precision=how.precision or "fp32", device_type=device_type)
        return []

    def check_parts(self) -> None:
        """Return if the model can be what a task asks for; the data was read by who prepared it."""
        if isinstance(self.config, PredictConfig):
            from hfscale.jobs.predict import check as check_task  # slow to import

            check_task(self.config)

    def fetch(self) -> None:
        """Return when the model's weights are here."""
        if self.from_hub():
            local_folder(self.model, where="MODEL", weights=True)

    def from_hub(self) -> bool:
        """Return whether the model is named as the hub does."""
        return not Path(self.model).is_absolute()

    def record(self, *, launcher: str, procs: int) -> None:
        """Write the config, and of a job of Slurm what environment.json says of this attempt."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if launcher != "local":
            run_dir.enter(self.folder, launcher=launcher, procs=procs)
        write_atomically(self.file, to_yaml(self.config).encode())
        make_secret(self.folder)

    def reached(self) -> str | None:
        """Return how many parts of the predictions are made; scores have none."""
        if not isinstance(self.config, PredictConfig):
            return None
        parts = len([*parts_of(self.result).glob("0*.jsonl")])
        return f"{parts} parts" if parts else None

    def status(self, *, running: bool) -> list[Line]:
        """Return whether the result is there, or what is made of it."""
        (name, result), *_ = self.results()
        state = "whole" if result.exists() else self.reached() or "nothing yet"
        return [
            Line(self.place[0], str(self.folder), str(self.folder)),
            Line(name, f"{result}: {state}", {"file": str(result), "state": state}),
        ]

    def results(self) -> list[tuple[str, Path]]:
        """Return where the result will be, whole, and the folder of its making."""
        result = self.result if self.does == "predict" else self.folder / SCORES
        return [("result", result), *super().results()]

    def goes_on(self, *more: str) -> str:
        """Return what goes on: the command that was given."""
        return "the same command"

    def told(self, code: int) -> str:
        """Return how it goes on."""
        return "stopped; run the same command again" if code == EXIT_STOPPED else ""


def open_job(source: str, overrides: Sequence[str] = ()) -> Job:
    """Return the job of a YAML file, or of a folder that has the config of one.

    Raises:
        ConfigError: for everything that is wrong with it.
    """
    folder = Path(source).resolve()
    if is_run(folder):
        config: Section = load_config(folder / CONFIG, decided=True).config
        if isinstance(config, PredictConfig | ShardsConfig | HarnessConfig):
            if rest := permission.grant(overrides):
                raise ConfigError(
                    "what scores or predicts goes on as it was asked for",
                    where="command line",
                    value=rest[0],
                    remedy="ask for something else with hfscale evaluate, or hfscale predict",
                )
            return Computation(config, folder)
    return Training(Request(source, tuple(overrides)))
