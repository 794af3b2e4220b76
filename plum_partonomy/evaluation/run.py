"""Run an evaluation, from its options to the report; evaluate_plum.py and `plum eval` call `main`."""

from plum_partonomy.command_line import check_writable
from plum_partonomy.evaluation.options import parse_arguments


def main(options: list[str] | None = None) -> None:
    """Run an evaluation from its command line. Raises DataError if it cannot be done."""
    arguments = parse_arguments(options)
    check_writable(arguments.output_dir)
    # These import torch and the readers, which take seconds that --help and a wrong option should not wait for.
    from plum_partonomy.evaluation.corrections import evaluate_correction
    from plum_partonomy.evaluation.partonomy import dataset_options, evaluate, evaluate_answers
    from plum_partonomy.evaluation.tasks import evaluate_task

    if arguments.task == "correction":
        evaluate_correction(arguments, **dataset_options(arguments))
    elif not arguments.is_partonomy:
        evaluate_task(arguments, **dataset_options(arguments))
    elif arguments.asks_plum:
        evaluate(arguments)
    elif arguments.asks_model:
        from plum_partonomy.baselines.open import open_baseline

        evaluate(arguments, open_baseline)
    else:
        evaluate_answers(arguments)
