"""What is told of every epoch to those who keep a diary: TensorBoard, MLflow."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from secateur.errors import DataError, MissingExtra
from secateur.files import write_atomic
from secateur.recover import Epoch
from secateur.recover.loop import Listener

RUN = "mlflow-run"
"""The file that remembers which of MLflow's runs a training is."""


def require(names: Sequence[str]) -> None:
    """Raise MissingExtra where a package is not installed: before anything is trained."""
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise MissingExtra(name, "log", f"a log for {name}") from error


@contextmanager
def logging(names: Sequence[str], folder: Path, title: str, settings: Mapping[str, Any]) -> Iterator[Listener]:
    """A listener that writes loss, validation score, sparsity, rate and seconds of every epoch to the logs named.

    An epoch that is told again after a run was stopped has the values that it had.

    folder: for what is written here; title, settings: of the run, where a log has a place for them.
    Raises DataError where a log cannot be opened.
    """
    with ExitStack() as stack:
        writers = [_opened(stack, name, LOGS[name](folder, title, settings)) for name in names]

        def tell(number: int, epoch: Epoch) -> None:
            values = {"loss": epoch.loss, "validation": epoch.validation, "sparsity": epoch.sparsity}
            for write in writers:
                write(number, {**values, "lr": epoch.lr, "seconds": epoch.seconds})

        yield tell


Writer = Callable[[int, dict[str, float]], None]


def _opened(stack: ExitStack, name: str, log: AbstractContextManager[Writer]) -> Writer:
    try:
        return stack.enter_context(log)
    except Exception as error:
        raise DataError(f"the log {name} could not be opened: {type(error).__name__}: {error}") from error


@contextmanager
def _tensorboard(folder: Path, title: str, settings: Mapping[str, Any]) -> Iterator[Writer]:
    """Event files in ``folder / "tensorboard"``."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / "tensorboard") as writer:

        def write(number: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, number)
            writer.flush()

        yield write


@contextmanager
def _mlflow(folder: Path, title: str, settings: Mapping[str, Any]) -> Iterator[Writer]:
    """A run named ``title`` wherever MLFLOW_TRACKING_URI says; a stopped one is gone on with."""
    import mlflow

    noted = folder / RUN
    known = noted.read_text(encoding="utf-8") if noted.is_file() else None
    with mlflow.start_run(run_id=known, run_name=None if known else title) as run:
        if known is None:
            write_atomic(noted, run.info.run_id)
            mlflow.log_params(dict(settings))
        yield lambda number, values: mlflow.log_metrics(values, step=number)


LOGS: dict[str, Callable[[Path, str, Mapping[str, Any]], AbstractContextManager[Writer]]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
}
