"""Run an evaluation, from its options to the report; evaluate_plum.py and `plum eval` call `main`."""

from plum_partonomy.command_line import check_writable
from plum_partonomy.evaluation.options import parse_arguments


def main(options: list[str] | None = None) -> None:
    """Run an evaluation from its command line. Raises DataError if it cannot be done."""
    arguments = parse_arguments(options)
    check_writable(arguments.output_dir)
    # Imported where they are used: the readers take seconds that --help and a wrong option should not wait for, and
    # torch takes some that a file of answers does not need.
    from plum_partonomy.evaluation.answers import dataset_options, evaluate_answers

    if arguments.task == "correction":
        from plum_partonomy.evaluation.corrections import evaluate_correction

        evaluate_correction(arguments, **dataset_options(arguments))
    elif not arguments.is_partonomy:
        from plum_partonomy.evaluation.tasks import evaluate_task

        evaluate_task(arguments, **dataset_options(arguments))
    elif arguments.asks_plum:
        from plum_partonomy.evaluation.partonomy import evaluate

        evaluate(arguments)
    elif arguments.asks_model:
        from plum_partonomy.baselines.open import open_baseline
        from plum_partonomy.evaluation.partonomy import evaluate

        evaluate(arguments, open_baseline)
    else:
        evaluate_answers(arguments)
