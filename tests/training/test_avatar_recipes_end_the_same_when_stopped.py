"""Motion, mouth and lower face: a run that was stopped and resumed ends with the bits of one that was not."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from streamdiff.avatar.cues import NUM_MEL, NUM_PHONE, State
from streamdiff.avatar.intent import Intent
from streamdiff.avatar.kinematics import arkit64
from streamdiff.avatar.mouth import FACE_PATCH, NUM_CONDITIONS, NUM_FACE_CONDITIONS, PATCH, MouthDecoder
from streamdiff.avatar.style import STYLE_NAMES
from streamdiff.avatar.window import MotionConfig
from streamdiff.training.avatar import lower_face
from streamdiff.training.avatar.lower_face import LowerFaceTask
from streamdiff.training.avatar.motion import ConsistencyTask, FlowTask, random_motion
from streamdiff.training.avatar.mouth import MouthTask
from streamdiff.training.avatar.windows import Dataset
from streamdiff.training.loop import LOG, Plan, Task, Trainer

SMALL = MotionConfig(dim=32, num_layers=1, num_heads=2, hidden=64)
NUM_STEPS, STOPPED_AFTER = 5, 2


def performances() -> Dataset:
    """Two performances of anything, one of them real, of the widths that the model reads."""
    generator = torch.Generator().manual_seed(0)
    num_frames = 2 * (SMALL.window + 8)
    intent = Intent(0, 0).rows(0, 1).shape[1]
    return Dataset(
        {
            "mel": torch.rand(num_frames, NUM_MEL, generator=generator).half(),
            "phones": torch.randint(0, 256, (num_frames, NUM_PHONE), generator=generator, dtype=torch.uint8),
            "said": torch.rand(num_frames, generator=generator) < 0.5,
            "state": torch.randint(0, len(State), (num_frames,), generator=generator, dtype=torch.int8),
            "intent": torch.rand(num_frames, intent, generator=generator),
            "motion": torch.rand(num_frames, arkit64().num_coefs, generator=generator),
            "style": torch.rand(2, len(STYLE_NAMES), generator=generator),
            "lengths": torch.tensor([num_frames // 2, num_frames // 2]),
            "real": torch.tensor([False, True]),
        },
        SMALL,
    )


def flow() -> Task:
    dataset = performances()
    return FlowTask(random_motion(SMALL, dataset.motion, seed=1), dataset, batch=4, lr=1e-3, seed=2)


def consistency() -> Task:
    dataset = performances()
    return ConsistencyTask(random_motion(SMALL, dataset.motion, seed=1), dataset, batch=4, lr=1e-3, seed=2)


def mouth() -> Task:
    generator = torch.Generator().manual_seed(0)
    pictures = {
        "conditions": torch.rand(9, NUM_CONDITIONS, generator=generator),
        "pictures": torch.randint(0, 256, (9, 4, PATCH, PATCH), generator=generator, dtype=torch.uint8),
        "weights": torch.rand(9, PATCH, PATCH, generator=generator).half(),
    }
    torch.manual_seed(1)
    return MouthTask(MouthDecoder(width=16), pictures, batch=2, lr=2e-3, seed=2)


def face(*, adversarial: bool) -> Task:
    generator = torch.Generator().manual_seed(0)
    conditions = torch.rand(6, NUM_FACE_CONDITIONS, generator=generator)
    shape = (6, 3, FACE_PATCH, FACE_PATCH)
    warped, wanted = (torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for _ in range(2))
    return LowerFaceTask(conditions, warped, wanted, batch=2, seed=2, adversarial=adversarial)


TASKS: dict[str, Callable[[], Task]] = {
    "motion": flow,
    "motion-consistency": consistency,
    "mouth": mouth,
    "fit": lambda: face(adversarial=False),
    "fit with a discriminator": lambda: face(adversarial=True),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", TASKS)
def test_a_stopped_run_ends_with_the_same_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_face, "_JUDGED_FROM", 1)
    straight = Trainer(TASKS[name](), tmp_path / "straight", Plan(steps=NUM_STEPS))
    straight.train()

    def stop(step: int, _total: int | None, _numbers: Mapping[str, float]) -> None:
        if step == STOPPED_AFTER:
            signal.raise_signal(signal.SIGINT)

    first = Trainer(TASKS[name](), tmp_path / "stopped", Plan(steps=NUM_STEPS))
    assert first.train(on_step=stop).step == STOPPED_AFTER
    second = Trainer(TASKS[name](), tmp_path / "stopped", Plan(steps=NUM_STEPS), resume=True)
    assert second.step == STOPPED_AFTER, "Ctrl-C kept a checkpoint"
    assert second.train().stopped_by is None
    one, other = (load_file(trainer.checkpoint) for trainer in (straight, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert any(key.startswith("judge/") for key in one) == (name == "fit with a discriminator")
    losses = [[value for _, value in trainer.history["loss"]] for trainer in (straight, second)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == NUM_STEPS


def test_the_learning_rate_follows_the_plan_of_steps(tmp_path: Path) -> None:
    def rates(steps: int, name: str) -> list[float]:
        trainer = Trainer(mouth(), tmp_path / name, Plan(steps=steps, warmup_steps=1))
        trainer.train()
        lines = (tmp_path / name / LOG).read_text().splitlines()
        return [json.loads(line)["lr"]["mouth"] for line in lines]

    four = rates(4, "one")
    assert four == rates(4, "other"), "however long each step took"
    assert four[0] == pytest.approx(2e-3)
    # Three quarters of half a cosine from 1 down to a fiftieth.
    assert four[-1] == pytest.approx(2e-3 * (0.02 + 0.98 * (1 + math.cos(0.75 * math.pi)) / 2))
    assert rates(8, "longer")[3] > four[3]
