"""Score a PLUM checkpoint on a benchmark of part questions:

    python evaluate_plum.py --model runs/demo/model --dataset partonomy --name mini_questions --split test \\
        --output_dir runs/demo/evaluation

or the answers of any other model, from a file (docs/predictions.schema.json), and baselines without a model:

    python evaluate_plum.py --predictions answers.jsonl --dataset partonomy --name mini_questions \\
        --output_dir runs/mine
    python evaluate_plum.py --baseline majority --dataset partonomy --name mini_questions \\
        --output_dir runs/majority

or other models, alone and combined (docs/benchmark.md), or your own model in a Python file:

    python evaluate_plum.py --baseline vlm+sam3 --vlm Qwen/Qwen3-VL-2B-Instruct --sam3 facebook/sam3 \\
        --dataset partonomy --name mini_questions --output_dir runs/vlm_sam3

A PLUM model gets each question three times: it scores the choices, segments a given answer with tagged parts, and
generates, tags and segments an answer of its own. The wrong-image control repeats this with the image of another
record. The metrics are then computed from questions and predictions:

    questions --model--> predictions.jsonl --scoring/metrics.py--> metrics.json --scoring/report.py--> report.html

An interrupted run resumes. `torchrun --nproc_per_node 2 evaluate_plum.py ...` distributes the images over processes.
Batches do not depend on interruptions or the number of processes, so the metrics equal those of one process.
"""

from dataclasses import fields

from plum_partonomy.command_line import run_command
from plum_partonomy.evaluation.options import EvaluationArguments
from plum_partonomy.evaluation.run import main

if __name__ == "__main__":
    run_command("evaluate_plum.py", main, [field.name for field in fields(EvaluationArguments)])
