"""Trials of a sweep, chosen by Optuna's TPE from what the earlier ones came to.

The study lies in search.log of the sweep's directory. Which trial comes next is a function of the recipe's seed, the trial's
number and the results so far: a search that was stopped and gone on with asks what it would have asked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import RecipeError, TrainingError
from kdcache.recipe import Recipe
from kdcache.recipe_sweep import Range
from kdcache.run_record import AFTER
from kdcache.sweep.board import FAILED, Board, Earlier, RowState
from kdcache.sweep.rows import Row, is_trial, make_row

if TYPE_CHECKING:
    import optuna

_LOG, _SPACE = "search.log", "kdcache space"


class Search:
    """The study of a sweep; what it minimises is the trained student's loss on the validation split, nats per token.

    Raises:
        TrainingError: the study in the directory searched other values.
    """

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        assert recipe.sweep is not None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna = optuna
        self._recipe, self._seed, self._space, self._wanted = (
            recipe,
            recipe.seed,
            recipe.sweep.search,
            recipe.sweep.trials or 0,
        )
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(directory / _LOG))), study_name="kdcache", load_if_exists=True
        )
        space = json.dumps({k: v.model_dump() if isinstance(v, Range) else v for k, v in self._space.items()})
        earlier = self._study.user_attrs.get(_SPACE, space)
        if earlier != space:
            raise TrainingError(
                f"the search in {directory} is over {earlier}, and sweep.search is now {space}; put it back, start over by "
                "--overwrite, or give the recipe key output another directory"
            )
        self._study.set_user_attr(_SPACE, space)

    def trials(self) -> dict[str, dict[str, Any]]:
        """Every trial that was asked for: the name of its row, and what it changes."""
        return {_name(t.number): self._values(t) for t in self._study.get_trials(deepcopy=False)}

    def wants_more(self) -> bool:
        """Whether fewer trials were asked for than the recipe wants."""
        return len(self._study.get_trials(deepcopy=False)) < self._wanted

    def agree_with(self, board: Board, earlier: Earlier) -> None:
        """Bring the study and the rows to the same state: either may have been written last when the sweep was killed.

        Raises:
            TrainingError: there are rows of trials that the study does not know of.
        """
        known, trials = {state.name: state for state in board.rows}, self.trials()
        lost = [name for name in known if is_trial(name) and name not in trials]
        if lost:
            raise TrainingError(
                f"{board.path} has the search's row {lost[0]}, but its {_LOG} does not know of it; start over by --overwrite"
            )
        for name, changes in trials.items():
            state = known.get(name)
            if state is None:
                state = self._row(name, changes)
                state.seconds = (earlier.of(name) or {}).get("seconds", 0.0)
                board.rows.append(state)
            elif state.scores is not None:
                self.tell(name, state.scores[AFTER]["loss"])

    def ask(self) -> RowState:
        """The next trial as a row; one whose values do not go together has failed already."""
        number = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = self._optuna.samplers.TPESampler(seed=(self._seed + number) % 2**32)
        trial = self._study.ask()
        return self._row(_name(trial.number), self._suggested(trial))

    def tell(self, name: str, loss: float) -> None:
        """What a trial came to; told again, it is ignored. A trial that failed is never told, and may yet succeed."""
        self._study.tell(int(name.rpartition("-")[2]), loss, skip_if_finished=True)

    def _row(self, name: str, changes: dict[str, Any]) -> RowState:
        try:
            return RowState(make_row(self._recipe, name, changes))
        except RecipeError as exc:
            return RowState(Row(name, changes, name, self._recipe), FAILED, str(exc))

    def _values(self, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        if set(trial.params) == set(self._space):
            return {key: trial.params[key] for key in self._space}
        # It was killed between being asked for and having its values.
        return self._suggested(self._optuna.trial.Trial(self._study, trial._trial_id))

    def _suggested(self, trial: optuna.trial.Trial) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, space in self._space.items():
            if isinstance(space, list):
                values[key] = trial.suggest_categorical(key, space)
            elif isinstance(space.low, int) and isinstance(space.high, int):
                values[key] = trial.suggest_int(key, space.low, space.high, log=space.log)
            else:
                values[key] = trial.suggest_float(key, space.low, space.high, log=space.log)
        return values


def _name(number: int) -> str:
    return f"trial-{number:03d}"
