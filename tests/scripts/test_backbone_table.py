"""The table of vision-language models in the documentation."""

from scripts.backbone_table import PAGE, insert


def test_the_documentation_has_the_table_of_the_families_that_the_tests_run_with():
    page = PAGE.read_text(encoding="utf-8")
    assert insert(page) == page
