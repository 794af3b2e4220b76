PYTHON := .venv/bin/python
INSTALLED := .venv/installed

.PHONY: help install demo train test slow lint docs fuzz perf

help:
	@echo "make install creates .venv and installs into it; then: . .venv/bin/activate"
	@echo "make demo    asks plum-tiny about a picture, scores it on the whole test split, trains for a minute"
	@echo "make train   trains plum-tiny from scratch: an hour or two, runs/plum_tiny"
	@echo "make test    the test suite; make slow: the tests that take minutes; make fuzz: hostile files"
	@echo "make docs    the documentation site; make perf: the benchmarks; make lint: style"

install: $(INSTALLED)

demo: $(INSTALLED)
	rm -rf runs/demo
	.venv/bin/plum ask examples/sailboat.png "What visible parts does the object in the image have?" --save runs/demo/answer
	$(PYTHON) evaluate_plum.py --model checkpoints/plum-tiny --choice_reduction answer_mean --output_dir runs/demo/evaluation
	$(PYTHON) train.py recipes/plum_tiny.yaml --max_steps 40 --eval_steps 20 --save_steps 40 --logging_steps 5 \
		--lr_scheduler_kwargs '{"num_decay_steps": 15}' --warmup_steps 5 --output_dir runs/demo/training
	@echo "answer: runs/demo/answer/overlay.png  scores: runs/demo/evaluation/report.html  curves: runs/demo/training/training_curves.png"

train: $(INSTALLED)
	$(PYTHON) train.py recipes/plum_tiny.yaml --output_dir runs/plum_tiny

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile

slow: $(INSTALLED)
	.venv/bin/pip install --quiet --constraint constraints.txt --editable ".[browser,notebook,onnx,trackio]"
	.venv/bin/pip install --quiet --constraint constraints.txt --no-deps lmms-eval chardet colorama dataproperty loguru \
		lxml mbstrdecoder pathvalidate portalocker pytablewriter sacrebleu tabledata tabulate tcolorpy tenacity typepy
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
	for target in $$($(PYTHON) -c "import tests.fuzz.targets as fuzz; print(*fuzz.TARGETS)"); do \
		$(PYTHON) tests/fuzz/run.py $$target -max_total_time=60 || exit 1; done

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
