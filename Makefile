# The five verbs of the project. Use them inside a virtual environment of your own.
.PHONY: setup test lint bench docs

setup:  ## install tailora in editable form, with all that the tests need, and the hooks that run before a commit
	pip install -e '.[test]' pre-commit
	pre-commit install

test:  ## the default tests: at most 6 minutes on 2 cores
	pytest

lint:  ## style and types
	ruff check .
	ruff format --check .
	mypy

BENCHMARKS = speed.real speed.processors speed.inference memory.memory speed.adapters speed.startup speed.growth

bench:  ## run the benchmarks in order of importance, each for at most MINUTES; the same command continues
	for name in $(BENCHMARKS); do python -m benchmarks.$$name --minutes $(or $(MINUTES),6) || exit 1; done

docs:  ## write the measured tables of README.md and docs/ again, from the JSON files in benchmarks/results
	python benchmarks/update_docs.py
