"""Finished runs of two steps, shared by tests of export, probe and report."""

import torch

from d2v_fast.config import parse
from d2v_fast.train.build import build
from d2v_fast.train.loop import loop
from tests.test_cli import AUDIO, TEXT, VISION

RUNS = {"text": TEXT, "vision": VISION, "audio": AUDIO}


class Run:
    """A run of two steps, with outputs of student and teacher from the training process."""

    def __init__(self, folder, modality):
        self.folder = folder / modality
        config, _ = parse([*RUNS[modality], f"train.output={self.folder}"])
        self.trainer = build(config)
        loop(self.trainer)
        student, teacher = self.trainer.state.core.student.eval(), self.trainer.state.core.teacher
        size = {"text": (2, 16), "vision": (2, 3, 32, 32), "audio": (2, 6000)}[modality]
        self.inputs = torch.randint(5, 200, size) if modality == "text" else torch.randn(size)
        with torch.no_grad():
            self.student, self.teacher = student(self.inputs), teacher.module(self.inputs)
