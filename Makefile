# make demo: evaluate plum-tiny, train such a model from scratch on the drawn miniature, evaluate it, write the report.
# make test: the test suite.   make slow: the tests that take minutes.   make fuzz: hostile files.
# make docs: the site.   make perf: the benchmarks.
PYTHON := .venv/bin/python
INSTALLED := .venv/installed

.PHONY: demo test slow lint docs fuzz perf

demo: $(INSTALLED)
	rm -rf runs/demo
	$(PYTHON) evaluate_plum.py --model checkpoints/plum-tiny --choice_reduction answer_mean --output_dir runs/demo/plum-tiny
	.venv/bin/accelerate launch --cpu --num_processes 1 train.py recipes/plum_tiny.yaml --output_dir runs/demo/model
	$(PYTHON) evaluate_plum.py --model runs/demo/model --dataset partonomy --name mini_questions --split test \
		--choice_reduction answer_mean --output_dir runs/demo/evaluation

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest

slow: $(INSTALLED)
	.venv/bin/pip install --quiet --constraint constraints.txt --editable ".[browser,notebook,onnx]"
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m slow

perf: $(INSTALLED)
	HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 $(PYTHON) perf/all.py

lint: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

docs: $(INSTALLED)
	.venv/bin/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build

fuzz: $(INSTALLED)
	.venv/bin/pip install --quiet --constraint constraints.txt atheris
	for target in $$($(PYTHON) -c "import fuzz.targets; print(*fuzz.targets.TARGETS)"); do \
		$(PYTHON) fuzz/run.py $$target -max_total_time=60 || exit 1; done

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
