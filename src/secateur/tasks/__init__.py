"""The user's side: data for calibration, training and evaluation; loss; score."""

from secateur.tasks.classification import Classification, TextClassification
from secateur.tasks.detection import Detection
from secateur.tasks.intervals import Interval, Scores, paired_difference, proportion
from secateur.tasks.language import LanguageModel
from secateur.tasks.running import SEVERAL, batches, call, clone, device_of, evaluate, judge, mode, plain, to_device
from secateur.tasks.task import CALIBRATION, SPLITS, Pass, Task, check_split, passing

__all__ = [
    "CALIBRATION",
    "SEVERAL",
    "SPLITS",
    "Classification",
    "Detection",
    "Interval",
    "LanguageModel",
    "Pass",
    "Scores",
    "Task",
    "TextClassification",
    "batches",
    "call",
    "check_split",
    "clone",
    "device_of",
    "evaluate",
    "judge",
    "mode",
    "paired_difference",
    "passing",
    "plain",
    "proportion",
    "to_device",
]
