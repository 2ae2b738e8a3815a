"""Evaluation tasks, one per file, named in a recipe or a file of tasks as ``bumblebee.evaluation.tasks.MultipleChoice``."""

from bumblebee.evaluation.tasks.exact_match import ExactMatch
from bumblebee.evaluation.tasks.generation import Generation
from bumblebee.evaluation.tasks.multiple_choice import MultipleChoice
from bumblebee.evaluation.tasks.perplexity import Perplexity
from bumblebee.evaluation.tasks.preference_accuracy import PreferenceAccuracy
from bumblebee.evaluation.tasks.task import EvaluationTask, SampleResult

__all__ = ["EvaluationTask", "ExactMatch", "Generation", "MultipleChoice", "Perplexity", "PreferenceAccuracy", "SampleResult"]
