"""Rewards of generated samples: metrics of the evaluation room with and without weights, judges, and a server's.

A reward that cannot be computed is a failure with a reason and never a number: a server that is down must not teach a
model that its samples are worth nothing.
"""

import base64
import io
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np
import requests
from PIL import Image

from loomvideo.pipelines.evaluation import metrics
from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.pipelines.evaluation.judges.rewards import JUDGED, JudgedRewards, is_away
from loomvideo.pipelines.evaluation.learned import FIGURES, PYIQA_PREFIX, learned_metrics, network_of
from loomvideo.pipelines.evaluation.measures import NAMES, ExtraMeasure, comparable, measure
from loomvideo.pipelines.evaluation.outage import Outage
from loomvideo.platform.errors import UserError
from loomvideo.platform.time_limits import REWARD_ANSWER

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0


class RewardError(Exception):
    """A sample that got no reward; the message says why.

    Args:
        reason: Why.
        away: Whether that says nothing of the sample, as whoever gives it was away.
    """

    def __init__(self, reason: str, away: bool = False):
        super().__init__(reason)
        self.away = away


@dataclass(frozen=True)
class Score:
    """What a sample is worth.

    Attributes:
        metrics: What rewards, floors and watching need, a judge's shares included, in their own units.
        rewards: The weighted rewards' values, higher is better.
        total: Their weighted sum; None where one of them failed.
        floored: The metrics that were below their floors.
        failure: Why there is no total; empty where there is one.
        away: Whether the failure says nothing of the sample: whoever scores was away, and may be asked again.
    """

    metrics: dict[str, float]
    rewards: dict[str, float] = field(default_factory=dict)
    total: float | None = None
    floored: tuple[str, ...] = ()
    failure: str = ""
    away: bool = False


@dataclass(frozen=True)
class Reward:
    """A reward: the metric that it is made of, and how."""

    metric: str
    of: Callable[[float, LoadedItem], float]


def _as_sharp_as_the_target(value: float, inputs: LoadedItem) -> float:
    if inputs.target is None:
        raise RewardError("sharpness: needs a target to compare with")
    # As sharp as the target, not sharper: noise is sharp.
    return -abs(math.log((value + 1) / (metrics.sharpness(inputs.target) + 1)))


REWARDS: dict[str, Reward] = {
    "garment_colour": Reward("garment_delta_e", lambda value, inputs: -value / 10),
    "locality": Reward("edit_locality", lambda value, inputs: value),
    "outside": Reward("outside_psnr_db", lambda value, inputs: value / 10),
    "sharpness": Reward("sharpness", _as_sharp_as_the_target),
    "fidelity": Reward("edit_psnr_db", lambda value, inputs: value / 10),
}
"""CIEDE2000 of the edited region's colour / 10, negative; share of the change inside the region; PSNR outside it in
10 dB; logarithm of the sharpness over the target's, negative; PSNR against the target in 10 dB."""


OF_EDITS = NAMES - {"garments_drawn_right"}
"""Metrics that a round's results may have: they are edits, never from words alone."""


def _measured(values: Mapping[str, float], name: str) -> float:
    value = values.get(name)
    if value is None or not math.isfinite(value):
        raise RewardError(f"{name}: not defined for this sample")
    return value


class Rewarder:
    """Scores samples.

    Args:
        weights: The weight of each reward by name, 0 for none: those of :data:`REWARDS`; metrics, figures of networks
            (:data:`~loomvideo.pipelines.evaluation.learned.FIGURES`) and of a judge
            (:data:`~loomvideo.pipelines.evaluation.judges.rewards.JUDGED`) in their own units, where a weight below 0
            asks for less of one; all others come from the server.
        floors: Least values of metrics; a sample below one is worth less than any above.
        server: URL that gets ``{"key", "text", "result", "source", "target"}`` with frames as base64 PNGs and answers
            ``{"rewards": {name: number}}``.
        patience_s: How long a server that fails is asked again, counted once for an outage.
        watched: Metrics that are measured beside those of rewards and floors; no other is.
        learned_weights: File or folder of a network by its name; the published ones where there is none.
        judge: Asks a judge; None where only names are checked.
        threads: Results of a prompt that are measured at once.

    Raises:
        UserError: for a reward that nobody gives, and for a metric that does not exist.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        floors: Mapping[str, float],
        server: str = "",
        patience_s: float = 600.0,
        watched: Sequence[str] = (),
        learned_weights: Mapping[str, str] | None = None,
        judge: JudgedRewards | None = None,
        threads: int = 1,
    ):
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.floors, self.server, self.judge = dict(floors), server, judge
        self._outage, self._threads = Outage(patience_s), threads
        for key, names, judged in (("floors", floors, JUDGED), ("watched", watched, ())):
            for name in names:
                if name not in OF_EDITS and name not in judged and not network_of(name):
                    close = get_close_matches(name, [*OF_EDITS, *judged, *itertools.chain(*FIGURES.values())], n=1)
                    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(OF_EDITS))}"
                    raise UserError(f"prefer.rewards.{key}: {name} is no metric of a result; {hint}")
        figures = {*floors, *watched, *(REWARDS[name].metric if name in REWARDS else name for name in self.weights)}
        self.measured = figures & OF_EDITS
        self.judged = figures & {*JUDGED}
        self.figures = {name for name in figures if network_of(name)}
        self._asked = sorted(figures - self.measured - self.judged - self.figures)
        networks = sorted({network_of(name) for name in self.figures})
        for name in learned_weights or {}:
            if name not in networks or name.startswith(PYIQA_PREFIX):
                why = "pyiqa knows its own" if name in networks else "no reward, floor or watched metric is its"
                raise UserError(f"prefer.rewards.learned_weights.{name}: {why}")
        self._networks = learned_metrics(networks, learned_weights or {}, 1)
        self._loaded: list[ExtraMeasure] | None = None
        if self._asked and not server:
            known = ", ".join((*REWARDS, *JUDGED, *itertools.chain(*FIGURES.values()), f"{PYIQA_PREFIX}NAME"))
            raise UserError(
                f"prefer.rewards.weights: {self._asked[0]} is none of {known} and no other metric; name the server "
                "that gives it in prefer.rewards.server"
            )
        if server and not self._asked:
            raise UserError(
                f"prefer.rewards.server: none of {', '.join(self.weights)} is asked of it; name its rewards in "
                "prefer.rewards.weights, otherwise than what is measured here, or leave it out"
            )
        if not self.weights:
            raise UserError("prefer.rewards.weights: give at least one reward, such as {garment_colour: 1.0}")

    def load(self) -> None:
        """Load the networks that are needed, on the device that Ray gave this process.

        Raises:
            UserError: if a network's package or weights are not there.
        """
        if self._loaded is None:
            self._loaded = [network.build() for network in self._networks]

    def score(self, video: np.ndarray, inputs: LoadedItem) -> Score:
        """Measure one result uint8 [frames, height, width, 3]; failures are part of the answer."""
        return self.scores([video], inputs)[0]

    def scores(self, videos: Sequence[np.ndarray], inputs: LoadedItem) -> list[Score]:
        """Measure the results of one prompt, several at once; a judge is asked about several too."""
        with ThreadPoolExecutor(self._threads) as pool:
            plain = list(pool.map(lambda video: self._measure(video, inputs), videos))
        measured = [self._figured(found, video, inputs) for found, video in zip(plain, videos, strict=True)]
        with ThreadPoolExecutor(self.judge.threads if self.judge else 1) as pool:
            return list(pool.map(lambda found, video: self._score(found, video, inputs), measured, videos))

    def _measure(self, video: np.ndarray, inputs: LoadedItem) -> dict[str, Any] | None:
        """What this process measures without networks; None for a result that cannot be compared."""
        return dict(measure(video, inputs, self.measured)) if comparable(video, inputs) else None

    def _figured(self, found: dict[str, Any] | None, video: np.ndarray, inputs: LoadedItem) -> dict[str, float] | None:
        """The same with the networks' figures, which are made one after another: they have one device."""
        if found is None:
            return None
        self.load()
        for network in self._loaded or ():
            given = network(video, inputs)
            found |= {name: given[name] for name in self.figures & given.keys()}
        return {name: float(value) for name, value in found.items() if math.isfinite(value)}

    def _score(self, values: dict[str, float] | None, video: np.ndarray, inputs: LoadedItem) -> Score:
        if values is None:
            return Score({}, failure="a result of another size or length")
        try:
            if self.judged:
                values = values | self._judge(video, inputs)
            given = self._ask(video, inputs) if self._asked else {}
            rewards = {
                name: given[name] if name in given else self._reward(name, values, inputs) for name in self.weights
            }
            floored = tuple(name for name, least in self.floors.items() if _measured(values, name) < least)
        except RewardError as error:
            return Score(values, failure=str(error), away=error.away)
        total = sum(self.weights[name] * value for name, value in rewards.items())
        return Score(values, rewards, total, floored)

    def _reward(self, name: str, values: Mapping[str, float], inputs: LoadedItem) -> float:
        if name in REWARDS:
            return REWARDS[name].of(_measured(values, REWARDS[name].metric), inputs)
        return _measured(values, name)

    def _judge(self, video: np.ndarray, inputs: LoadedItem) -> dict[str, float]:
        if self.judge is None:
            raise ValueError("rewards of a judge, and no judge to ask")
        figures, failure = self.judge(video, inputs)
        if failure:
            raise RewardError(failure, is_away(failure))
        return {name: figures[name] for name in self.judged & figures.keys()}

    def _ask(self, video: np.ndarray, inputs: LoadedItem) -> dict[str, float]:
        """The server's rewards; it is asked again until it answers or patience ends."""
        body = {
            "key": inputs.item.key,
            "text": inputs.item.text,
            "result": _pictures(video),
            "source": None if inputs.source is None else _pictures(inputs.source),
            "target": None if inputs.target is None else _pictures(inputs.target),
        }
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                rewards = self._answer(body)
            except (requests.RequestException, ValueError) as error:
                if not self._outage.may_wait(pause_s):
                    raise RewardError(f"{self.server}: {type(error).__name__}: {error}"[:300], away=True) from error
                logger.warning("%s: no reward (%s); asking again", self.server, type(error).__name__)
            else:
                self._outage.is_over()
                return rewards
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _answer(self, body: dict[str, Any]) -> dict[str, float]:
        reply = requests.post(self.server, json=body, timeout=REWARD_ANSWER.here())
        reply.raise_for_status()
        answer = reply.json()
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, dict):
            raise ValueError(f'the answer is no {{"rewards": {{name: number}}}}: {reply.text[:100]}')
        missing = [name for name in self._asked if not _is_number(rewards.get(name))]
        if missing:
            raise ValueError(f"the answer has no number for {', '.join(missing)}")
        return {name: float(rewards[name]) for name in self._asked}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _pictures(video: np.ndarray) -> list[str]:
    encoded = []
    for frame in video:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "PNG")
        encoded.append(base64.b64encode(buffer.getvalue()).decode())
    return encoded


def group_rewards(scores: Sequence[Score], spread: float) -> list[float | None]:
    """Rewards r in [0, 1] of the results of one prompt: 1/2 for its mean; None for what cannot be compared.

    A sample below a floor gets 0, the least there is, and does not move the others' mean. A sample that failed gets
    None: it is left out, as are all when fewer than two can be compared.

    Args:
        scores: The scores of one prompt's samples.
        spread: Standard deviations of the group from the middle to either end, times two.
    """
    totals = [score.total for score in scores if score.total is not None and not score.floored]
    scored = sum(score.total is not None for score in scores)
    if scored < 2:
        return [None] * len(scores)
    mean = float(np.mean(totals)) if totals else 0.0
    deviation = float(np.std(totals)) if totals else 0.0
    rewards: list[float | None] = []
    for score in scores:
        if score.total is None:
            rewards.append(None)
        elif score.floored:
            rewards.append(0.0)
        else:
            distance = (score.total - mean) / (2 * spread * deviation) if deviation > 1e-9 else 0.0
            rewards.append(float(np.clip(0.5 + distance, 0.0, 1.0)))
    return rewards
