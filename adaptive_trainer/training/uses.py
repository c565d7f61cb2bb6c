"""What a Trainer can do with the best model of its run: evaluate it, predict by it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch.utils.data import Dataset

from adaptive_trainer.config.overrides import typed
from adaptive_trainer.data.datasets import MapDataset
from adaptive_trainer.data.pipeline import worker_deaths_deferred
from adaptive_trainer.errors import CheckpointError, Interrupted, when_stopped
from adaptive_trainer.inference.evaluate import Evaluated, evaluate, of_folder, of_settings, write
from adaptive_trainer.inference.model import Trained, load
from adaptive_trainer.inference.passes import Passes, opened
from adaptive_trainer.inference.predict import Prediction, photos_of, predictions
from adaptive_trainer.planning.networks import ModelFactory
from adaptive_trainer.report.earlier import to_type
from adaptive_trainer.report.record import Record
from adaptive_trainer.training.epochs.stopping import StopSignal
from adaptive_trainer.training.session import Session
from adaptive_trainer.utils.screen import showing

log = logging.getLogger(__name__)


class Uses:
    """The uses of the best model in `output_dir`, which `fit` has made, or an earlier run.

    Attributes:
        cfg: the settings of the run.
        output_dir: its folder.
    """

    cfg: DictConfig
    output_dir: Path
    _own_model: ModelFactory | None  # what makes the network, where it is the caller's
    _data: tuple[Dataset[Any] | None, Dataset[Any] | None]

    def evaluate(self, root: str | Path | None = None) -> Evaluated:
        """How often the best model is right.

        Args:
            root: a folder with ROOT/test/CLASS/image.jpg, or ROOT/CLASS/image.jpg; by default the test set of the run's
                data, or its validation set where there is none.

        Raises:
            UserError: there is no such model, or the data cannot be used.
            LadderExhausted: a single image does not fit.
        """
        with self._best() as (trained, passes):
            if root is None:
                data, what = of_settings(trained, typed(self.cfg), *self._data)
            else:
                data, what = of_folder(trained, root)
            return evaluate(passes, data, trained.classes, what)

    def predict(self, paths: str | Path | Iterable[str | Path]) -> list[Prediction]:
        """What photos show, by the best model; in order, those that cannot be read without classes.

        Args:
            paths: a file, a folder, or several of these.

        Raises:
            UserError: there is no such model, or a file or folder does not exist.
            LadderExhausted: a single image does not fit.
        """
        with self._best() as (trained, passes):
            return list(predictions(passes, photos_of(paths), trained.classes))

    def _loaded(self) -> Trained:
        path = self.output_dir / "checkpoints" / "best.pt"
        if not path.exists():
            raise CheckpointError(f"there is no {path}; fit() makes it, or output_dir=FOLDER names a run that has one")
        return load(path, self._own_model)

    @contextmanager
    def _best(self) -> Iterator[tuple[Trained, Passes]]:
        with when_stopped(lambda: "the pass over the images has to begin again"), showing(self.cfg.verbosity):
            trained = self._loaded()
            with opened(trained, trained.run_as(typed(self.cfg)), log.info) as passes:
                yield trained, passes

    def _test(self, data: MapDataset, session: Session, record: Record, stop: StopSignal) -> dict[str, float]:
        """Evaluate the best model on the test set, into evaluation.json; the figures, where it can be done.

        Raises:
            Interrupted: a signal came.
        """

        def poll() -> None:
            if stop.name:
                raise Interrupted(
                    f"stopped by {stop.name} while the test images were evaluated, training is finished and saved; "
                    f"evaluate them with {to_type(self.output_dir)}"
                )

        session.update.free_copies()  # of the last session, which makes no more updates
        try:
            trained = self._loaded()
            passes = Passes(trained, trained.run_as(session.config), session.capacity, record.event, poll)
            with worker_deaths_deferred():
                found = evaluate(passes, data, trained.classes, "the test set")
            write(found, self.output_dir, trained.path)
        except Interrupted:
            raise
        except Exception as error:  # the training has succeeded all the same, whatever a test set of one's own raises
            problem = str(error) or type(error).__name__
        else:
            log.info("test images: %s", found)
            return found.metrics
        record.event(f"the test images are not evaluated: {problem}")
        return {}
