"""Scores a PLUM checkpoint on a benchmark of part questions:

    python evaluate_plum.py --model runs/demo/model --dataset partonomy --name mini_questions --split test \\
        --output_dir runs/demo/evaluation

or the answers of any other model, from a file (docs/predictions.schema.json), and baselines that need none:

    python evaluate_plum.py --predictions answers.jsonl --dataset partonomy --name mini_questions \\
        --output_dir runs/mine
    python evaluate_plum.py --baseline majority --dataset partonomy --name mini_questions \\
        --output_dir runs/majority

or models of others, alone and together (docs/benchmark.md), or one of your own in a Python file:

    python evaluate_plum.py --baseline vlm+sam3 --vlm Qwen/Qwen3-VL-2B-Instruct --sam3 facebook/sam3 \\
        --dataset partonomy --name mini_questions --output_dir runs/vlm_sam3

Every question is put to a PLUM model three times: the choices are scored, an answer is given with its parts tagged and
is segmented, and an answer is generated, tagged and segmented freely. The control asks all of it again with
the image of another record. Then the figures are computed from the questions and what was written down, no more:

    questions --model--> predictions.jsonl --scoring/metrics.py--> metrics.json --scoring/report.py--> report.html

A run that was interrupted goes on where it stopped. `torchrun --nproc_per_node 2 evaluate_plum.py ...` shares the
batches out over processes; what a batch holds depends on neither, so that the figures are those of one process.
"""

from dataclasses import fields

from plum_partonomy.command_line import run_command
from plum_partonomy.evaluation.run import EvaluationArguments, main

if __name__ == "__main__":
    run_command("evaluate_plum.py", main, [field.name for field in fields(EvaluationArguments)])
