"""Which device and how many processes a run gets."""

import pytest
import torch

from plum_partonomy.evaluation.options import EvaluationArguments
from plum_partonomy.evaluation.processes import open_state
from plum_partonomy.masks import DataError
from tests.forks import run_distributed

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
TWO_PROCESSES = """
from plum_partonomy.evaluation.options import EvaluationArguments
from plum_partonomy.evaluation.processes import open_state
from plum_partonomy.masks import DataError

assert open_state(EvaluationArguments(output_dir="run", model="model")).num_processes == 2
try:
    open_state(EvaluationArguments(output_dir="run", model="model", task="gqa", name="gqa"))
except DataError as error:
    assert "--task gqa runs in one process" in str(error)
else:
    raise AssertionError
"""


@without_gpu
@pytest.mark.parametrize("task", ["partonomy", "correction", "gqa"])
def test_a_gpu_that_is_not_there_is_refused(task):
    with pytest.raises(DataError, match="needs a GPU, found none"):
        open_state(EvaluationArguments(output_dir="run", model="model", task=task, device="cuda"))


@without_gpu
def test_processes_without_a_gpu_know_of_each_other_and_some_tasks_run_in_one():
    run_distributed("-c", TWO_PROCESSES)
